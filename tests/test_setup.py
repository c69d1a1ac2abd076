"""The set-up: what it refuses and in which words, what it repairs, and the variables that it leaves behind."""

from __future__ import annotations

import importlib.util
import itertools
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import dagster as dg
import pytest

ROOT = Path(__file__).parents[1]
VARIABLES = ("DAGSTER_HOME", "DAGSTER_CLI_JOB_EXECUTE_MODULE_NAME", "NESTDIFF_HOME", "NESTDIFF_EXPERIMENT")
TARGETS = ("setup", "quickstart", "test", "check", "dev", "bench", "storm", "reproduce-cifar10", "lock", "help")


@pytest.fixture
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nestdiff_setup", ROOT / "scripts" / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", [(3, 8, 18), (3, 10, 13), (2, 7, 18)])
def test_old_python_is_refused_in_one_sentence(setup: ModuleType, version: tuple[int, int, int]) -> None:
    """The sentence names the Python that is wanted, the one that was found and how to name another."""
    with pytest.raises(SystemExit) as refusal:
        setup.check_python(version)
    words = str(refusal.value)
    assert "3.11" in words and ".".join(map(str, version)) in words and "PYTHON=" in words and "\n" not in words


def test_oldest_python_of_setup_is_that_of_the_project(setup: ModuleType) -> None:
    """The set-up and pyproject.toml agree about the oldest Python."""
    oldest = ".".join(map(str, setup.OLDEST_PYTHON))
    assert f'requires-python = ">={oldest}"' in (ROOT / "pyproject.toml").read_text()
    setup.check_python((*setup.OLDEST_PYTHON, 0))


def test_full_disk_is_refused_in_one_sentence(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little disk is said with what is needed and what is free, and a .venv that is there needs nothing more."""
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda _: setup.shutil._ntuple_diskusage(9e9, 8e9, 1e9))
    with pytest.raises(SystemExit, match=r"needs 10 GB free in .* 1\.0 are: make room"):
        setup.check_disk(present_gb=0.0)
    setup.check_disk(present_gb=setup.INSTALLED_GB)


def test_missing_venv_module_is_refused_with_its_package(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's bare python3 has no ensurepip: the sentence says what to install."""
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else name)
    with pytest.raises(SystemExit, match="apt install python3-venv"):
        setup.check_venv_module()


@pytest.fixture
def dist_info(tmp_path: Path) -> Path:
    """A package of one file as pip leaves it."""
    (tmp_path / "p.py").write_text("x = 1\n")
    folder = tmp_path / "p-1.dist-info"
    folder.mkdir()
    (folder / "INSTALLER").write_text("pip\n")
    (folder / "RECORD").write_text("p.py,sha256=abc,6\np-1.dist-info/INSTALLER,sha256=abc,4\np-1.dist-info/RECORD,,\n")
    return folder


@pytest.mark.parametrize("damage", ["record", "installer", "missing", "cut"])
def test_package_that_pip_did_not_finish_is_found(setup: ModuleType, dist_info: Path, damage: str) -> None:
    """A package without its last metadata, or with a file missing or cut, is installed again; a whole one is not."""
    assert setup.is_whole(dist_info)
    record, module = dist_info / "RECORD", dist_info.parent / "p.py"
    match damage:
        case "record":
            record.unlink()
        case "installer":
            record.write_text(record.read_text().replace("p-1.dist-info/INSTALLER,sha256=abc,4\n", ""))
        case "missing":
            module.unlink()
        case "cut":
            module.write_text("x")
    assert not setup.is_whole(dist_info)


def test_script_works_after_its_checkout_was_moved(setup: ModuleType, tmp_path: Path) -> None:
    """A script of .venv/bin finds its interpreter again, also under a path with spaces, and after a second move."""
    places = [tmp_path / name for name in ("first", "second place", "third")]
    folder = places[0] / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").symlink_to(sys.executable)
    script = folder / "hello"
    script.write_text(f"#!{folder}/python\nimport sys\nprint('hello', *sys.argv[1:])\n")
    script.chmod(0o755)
    for old, new in itertools.pairwise(places):
        old.rename(new)
        setup.relocate_scripts(new / ".venv" / "bin", str(old), str(new))
        said = subprocess.run([new / ".venv" / "bin" / "hello", "a b"], capture_output=True, text=True, check=True)
        assert said.stdout == "hello a b\n"


ACTIVATE = """deactivate () {
    unset VIRTUAL_ENV
}
deactivate nondestructive
VIRTUAL_ENV="%s"
export VIRTUAL_ENV
"""


def variables_after(commands: str, folder: Path, **before: str) -> dict[str, str]:
    """The project's variables in a shell that ran `commands`."""
    env = {"PATH": "/usr/bin:/bin", **before}
    said = subprocess.run(
        ["sh", "-euc", f"{commands}\nenv"], cwd=folder, env=env, capture_output=True, text=True, check=True
    )
    pairs = dict(line.split("=", 1) for line in said.stdout.splitlines())
    return {name: pairs[name] for name in VARIABLES if name in pairs}


@pytest.fixture
def checkout(setup: ModuleType, tmp_path: Path) -> Path:
    """A checkout whose path has a space, with an activate script as the set-up writes it."""
    root = tmp_path / "a checkout"
    root.mkdir()
    plain = ACTIVATE % (root / ".venv")
    once = setup.with_variables(plain)
    assert setup.with_variables(once) == once
    (root / "activate").write_text(once)
    return root


def test_activation_sets_variables_and_deactivation_takes_them_back(checkout: Path) -> None:
    """Activated, dagster finds its instance and the jobs, the project its artifacts; deactivated, nothing is left."""
    expected = {
        "DAGSTER_HOME": f"{checkout}/.dagster",
        "DAGSTER_CLI_JOB_EXECUTE_MODULE_NAME": "pipelines.definitions",
        "NESTDIFF_HOME": f"{checkout}/artifacts",
        "NESTDIFF_EXPERIMENT": "digits",
    }
    assert variables_after(". ./activate", checkout) == expected
    assert variables_after(". ./activate; . ./activate", checkout) == expected
    assert variables_after(". ./activate; . ./activate; deactivate", checkout) == {}


def test_activation_keeps_the_users_values(checkout: Path) -> None:
    """A user's artifact root and experiment stay in force; another Dagster home comes back on deactivation."""
    mine = {"DAGSTER_HOME": "/d", "NESTDIFF_HOME": "/n", "NESTDIFF_EXPERIMENT": "toy"}
    active = variables_after(". ./activate", checkout, **mine)
    assert (active["NESTDIFF_HOME"], active["NESTDIFF_EXPERIMENT"]) == ("/n", "toy")
    assert active["DAGSTER_HOME"] == f"{checkout}/.dagster"
    assert variables_after(". ./activate; deactivate", checkout, **mine) == mine


def test_another_checkouts_defaults_do_not_leak(setup: ModuleType, checkout: Path, tmp_path: Path) -> None:
    """`make` of one checkout, run in a shell where another is active, uses its own artifacts."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "activate").write_text(setup.with_variables(ACTIVATE % (other / ".venv")))
    active = variables_after(f". ./activate; cd {other}; exec sh -euc '. ./activate; env'", checkout)
    assert active["NESTDIFF_HOME"] == f"{other}/artifacts" and active["DAGSTER_HOME"] == f"{other}/.dagster"


def test_make_alone_lists_every_target() -> None:
    """`make` says what can be asked of it."""
    said = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(TARGETS) == set(re.findall(r"^  make ([\w-]+)", said, flags=re.MULTILINE))


def test_lock_is_exact_hashed_and_names_no_host() -> None:
    """requirements.lock installs the same bytes from whatever index pip is set up for."""
    lock = (ROOT / "requirements.lock").read_text()
    packages = re.split(r"^(?=[a-z0-9])", lock, flags=re.MULTILINE)[1:]
    assert len(packages) > 100 and "://" not in lock
    assert all(re.match(r"[\w.-]+(\[\w,]+\])?==\S+ ", package) and "--hash=sha256:" in package for package in packages)


def test_instance_gives_an_unsized_pool_one_slot(tmp_path: Path) -> None:
    """Dagster accepts pipelines/dagster.yaml, keeps its files in its home, frees the slot of a dead run, and trains one
    level at a time."""
    (tmp_path / "dagster.yaml").symlink_to(ROOT / "pipelines" / "dagster.yaml")
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        pools = instance.event_log_storage
        assert pools.initialize_concurrency_limit_to_default("gpu")
        assert pools.claim_concurrency_slot("gpu", "one run", "denoiser").is_claimed
        assert not pools.claim_concurrency_slot("gpu", "another run", "denoiser").is_claimed
        assert (
            instance.run_monitoring_enabled and instance.run_monitoring_settings["free_slots_after_run_end_seconds"] > 0
        )
        assert not instance.telemetry_enabled and not instance.nux_enabled
        assert (tmp_path / "history" / "runs.db").exists()
