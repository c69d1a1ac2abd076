"""Makes .venv and .dagster in this checkout. Every make target runs it first; where nothing changed it ends at once.

It owns the environment (packages, variables) and an empty Dagster instance; what goes into them is requirements.lock,
pyproject.toml and pipelines/dagster.yaml. Interrupted at any point, it is run again and continues.

Standard library only. A Python that is too old must still be able to read this file in order to say so: no
syntax and no annotation here is newer than Python 3.6.
"""

import csv
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
ACTIVATE = VENV / "bin" / "activate"
LOG = VENV / "install.log"
STAMP = VENV / "nestdiff.json"
DOWNLOADS = VENV / "tmp"  # not /tmp, which may be a small one in memory
INSTANCE = ROOT / ".dagster"

OLDEST_PYTHON = (3, 11)
INSTALLED_GB = 7.0  # of .venv in the end; most of it are the CUDA libraries that torch brings
DOWNLOADED_GB = 3.0  # beside it while pip installs

PIP_FAILURES = (
    (
        r"ConnectionError|ConnectTimeout|ReadTimeout|NameResolution|Max retries exceeded|ProxyError",
        "The package index cannot be reached: connect to the network, or name a mirror in PIP_INDEX_URL",
    ),
    (r"No space left on device", "The disk is full: make room (PIP_NO_CACHE_DIR=1 keeps pip's cache small)"),
)

# Two pieces for .venv/bin/activate: the first in its function `deactivate`, the second at its end.
MARKS = "# >>> nestdiff >>>\n", "# <<< nestdiff <<<\n"
ON_DEACTIVATE = """\
    if [ -n "${_NESTDIFF_ROOT:-}" ] ; then
        unset DAGSTER_HOME DAGSTER_CLI_JOB_EXECUTE_MODULE_NAME
        if [ -n "${_OLD_DAGSTER_HOME:-}" ] ; then export DAGSTER_HOME="$_OLD_DAGSTER_HOME" ; fi
        if [ "${NESTDIFF_HOME:-}" = "$_NESTDIFF_ROOT/artifacts" ] ; then unset NESTDIFF_HOME ; fi
        if [ "${NESTDIFF_EXPERIMENT:-}" = digits ] ; then unset NESTDIFF_EXPERIMENT ; fi
        unset _NESTDIFF_ROOT _OLD_DAGSTER_HOME
    fi
"""
ON_ACTIVATE = """\
# Exported, so that another checkout's environment, activated in a shell below this one, can take them back.
export _NESTDIFF_ROOT="${VIRTUAL_ENV%/*}"
export _OLD_DAGSTER_HOME="${DAGSTER_HOME:-}"
export DAGSTER_HOME="$_NESTDIFF_ROOT/.dagster"
# `dagster job execute` reads neither workspace.yaml nor pyproject.toml.
export DAGSTER_CLI_JOB_EXECUTE_MODULE_NAME=pipelines.definitions
export NESTDIFF_HOME="${NESTDIFF_HOME:-$_NESTDIFF_ROOT/artifacts}"
export NESTDIFF_EXPERIMENT="${NESTDIFF_EXPERIMENT:-digits}"
"""


def main():
    check_python(sys.version_info)
    if is_installed() and is_initialised():
        return
    with only_one_setup() as lock:
        if not is_installed():
            install(lock)
        if not is_initialised():
            initialise_instance()


def check_python(version):
    """Refuse a Python older than OLDEST_PYTHON."""
    if tuple(version[:2]) < OLDEST_PYTHON:
        oldest, found = (".".join(str(number) for number in v[:3]) for v in (OLDEST_PYTHON, version))
        sys.exit(
            f"nestdiff needs Python {oldest} or newer and {sys.executable} is {found}: "
            "name another, as in `make setup PYTHON=python3.12`."
        )


def check_venv_module():
    """Refuse a Python without venv and ensurepip, which Debian and Ubuntu package by themselves."""
    if not all(importlib.util.find_spec(module) for module in ("venv", "ensurepip")):
        sys.exit(
            f"{sys.executable} cannot make a virtual environment: install its venv module "
            "(Debian and Ubuntu: apt install python3-venv)."
        )


def check_disk(present_gb):
    """Refuse a disk without room for what .venv still lacks, and for its download meanwhile."""
    needed_gb = (INSTALLED_GB + DOWNLOADED_GB) * (1 - present_gb / INSTALLED_GB)
    free_gb = shutil.disk_usage(str(ROOT)).free / 1e9
    if free_gb < needed_gb:
        sys.exit(
            f"Setting up needs {needed_gb:.0f} GB free in {ROOT} ({INSTALLED_GB:.0f} GB stay), {free_gb:.1f} are: "
            "make room and run the same command again."
        )


@contextmanager
def only_one_setup():
    """Hold the checkout's set-up lock; yields its descriptor for pip to inherit, so that the pip of a set-up that
    was killed is waited for too."""
    INSTANCE.mkdir(exist_ok=True)
    with open(str(INSTANCE / ".setup.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another set-up of this checkout", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def digest(*paths):
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


def stamp():
    """What a finished .venv was made from, and where."""
    return {"made_from": digest(ROOT / "requirements.lock", ROOT / "pyproject.toml", Path(__file__)), "root": str(ROOT)}


def last_stamp():
    return json.loads(STAMP.read_text()) if STAMP.exists() else {}


def is_installed():
    return PYTHON.exists() and last_stamp() == stamp()


def install(lock):
    """Bring .venv to what requirements.lock and pyproject.toml say, from whatever state it is in."""
    shutil.rmtree(str(DOWNLOADS), ignore_errors=True)  # of a set-up that was killed
    check_disk(size_gb(VENV))
    if STAMP.exists():
        if last_stamp()["root"] != str(ROOT):
            relocate_scripts(VENV / "bin", last_stamp()["root"], str(ROOT))
        STAMP.unlink()
    if not is_venv():
        check_venv_module()
        print("Making .venv", flush=True)
        subprocess.check_call([sys.executable, "-m", "venv", "--clear", str(VENV)])
    for dist_info in VENV.glob("lib/python*/site-packages/*.dist-info"):
        if not is_whole(dist_info):
            shutil.rmtree(str(dist_info))  # pip then installs the package again, over what is there
    print("Installing the packages of requirements.lock into .venv (from nothing: 6.5 GB, some minutes)", flush=True)
    DOWNLOADS.mkdir()
    LOG.write_text("")
    pip_install(lock, "--no-deps", "--require-hashes", "-r", "requirements.lock")
    pip_install(lock, "--no-deps", "--no-build-isolation", "-e", ".")
    shutil.rmtree(str(DOWNLOADS))
    ACTIVATE.write_text(with_variables(ACTIVATE.read_text()))
    STAMP.write_text(json.dumps(stamp()))


def size_gb(folder):
    return sum(path.lstat().st_size for path in folder.rglob("*")) / 1e9


def is_venv():
    """Is there an environment with a pip that works? (Scripts that activate it are made after its pip.)"""
    return PYTHON.exists() and ACTIVATE.exists() and subprocess.call([str(PYTHON), "-c", "import pip._internal"]) == 0


def is_whole(dist_info):
    """Did pip finish installing this package, and are its files still there at full length?

    pip takes a package for installed from its first metadata file on, and rewrites RECORD last, with INSTALLER in it.
    """
    record = dist_info / "RECORD"
    if not record.exists():
        return False
    with open(str(record), newline="") as file:
        rows = list(csv.reader(file))
    files = {dist_info.parent / path: size for path, _, size in rows if not path.endswith(".pyc")}
    return dist_info / "INSTALLER" in files and all(
        path.exists() and (not size or path.stat().st_size == int(size)) for path, size in files.items()
    )


def relocate_scripts(folder, old_root, new_root):
    """Make the scripts of an environment work after its checkout was moved: they name their interpreter in full."""
    old, new = (os.fsencode(os.path.join(root, ".venv")) for root in (old_root, new_root))
    for script in folder.iterdir():
        content = b"" if script.is_symlink() else script.read_bytes()
        if old not in content:
            continue
        if content.startswith(b"#!" + old):
            # As pip writes it where the path has spaces: sh runs the second line, Python sees a string.
            interpreter, _, rest = content[2:].partition(b"\n")
            content = b"#!/bin/sh\n'''exec' \"" + interpreter + b'" "$0" "$@"\n' + b"' '''\n" + rest
        script.write_bytes(content.replace(old, new))


def pip_install(lock, *arguments):
    """`pip install` in the environment. Its words go to LOG; a terminal shows the latest."""
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *arguments]
    with open(str(LOG), "a", buffering=1) as log, start(command, TMPDIR=str(DOWNLOADS), pass_fds=(lock,)) as pip:
        for line in pip.stdout or ():
            log.write(line)
            show(line)
    show("")
    if pip.returncode:
        words = LOG.read_text()
        reasons = [sentence for pattern, sentence in PIP_FAILURES if re.search(pattern, words)]
        reason = reasons[0] if reasons else "pip failed: " + words.strip().splitlines()[-1]
        sys.exit(f"{reason}; then run the same command again (details: {LOG}).")


def start(command, pass_fds=(), **variables):
    """A process with these variables in its environment, its output and errors in one stream of text."""
    return subprocess.Popen(
        command,
        cwd=str(ROOT),
        env=dict(os.environ, **variables),
        pass_fds=pass_fds,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )


def show(line):
    """Replace the terminal's last line."""
    if sys.stdout.isatty():
        print("\r\033[K" + line.strip()[: shutil.get_terminal_size().columns - 1], end="", flush=True)


def with_variables(activate):
    """The text of .venv/bin/activate with this project's variables, set by it and taken back by `deactivate`."""
    begin, end = MARKS
    plain = re.sub(re.escape(begin) + ".*?" + re.escape(end), "", activate, flags=re.DOTALL)
    head, function, body = plain.partition("deactivate () {\n")
    return head + function + begin + ON_DEACTIVATE + end + body + begin + ON_ACTIVATE + end


def is_initialised():
    made, config = INSTANCE / ".initialised", INSTANCE / "dagster.yaml"
    return made.exists() and config.exists() and made.read_text() == digest(config)


def initialise_instance():
    """Create the instance's tables, once and alone: processes that do so side by side on their first use fail."""
    config = INSTANCE / "dagster.yaml"
    if not config.exists():
        config.unlink(missing_ok=True)  # a link whose target was moved
        config.symlink_to(Path("..", "pipelines", "dagster.yaml"))
    with start([str(PYTHON), "-m", "dagster", "instance", "info"], DAGSTER_HOME=str(INSTANCE)) as dagster:
        words, _ = dagster.communicate()
    if dagster.returncode:
        sys.exit(f"{words}\nDagster cannot open its instance in {INSTANCE}: correct {config.resolve()} (reason above).")
    (INSTANCE / ".initialised").write_text(digest(config))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted: run the same command again, it continues from here.")
