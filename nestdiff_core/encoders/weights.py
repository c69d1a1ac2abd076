"""Weights of encoders: untrained ones from a seed, and published files."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from nestdiff_core.errors import ConfigError, EnvironmentFault, IntegrityError
from nestdiff_core.files import LOCK, fingerprint, sha256_file

_CONTAINERS = ("state_dict", "model", "teacher")  # under which published files keep their weights
_COUNTERS = "num_batches_tracked"  # of batch norm: old files lack it, and a frozen network never reads it


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The block's initialisations come from `seed`; torch's own state is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def read_weights(path: Path, *, where: str = "encoder") -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of plain tensors saved by torch; no pickled program is run.

    where: the part of the experiment that names the file, for errors.
    """
    if not path.is_file():
        raise ConfigError(
            f"{where}.weights is not a file",
            key=f"{where}.weights",
            path=path,
            fix="Correct the path, or use `hub` or `random`.",
        )
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises nearly any class in torch's zip and pickle readers
        raise IntegrityError(
            f"{path.name} cannot be read as weights ({type(error).__name__}: {brief(error)})",
            stage=where,
            path=path,
            expected="a .safetensors file, or plain tensors saved by torch",
            fix="Get the file again, or save its tensors as .safetensors.",
        ) from error
    while name := next((name for name in _CONTAINERS if isinstance(content.get(name), Mapping)), None):
        content = content[name]
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def weights_digest(weights: str) -> str | None:
    """Hash of what stands in a file or folder of weights; None for `random`, `hub`, and a path that is not there.

    A folder may be an artifact: who holds its lock says nothing about its weights.
    """
    path = Path(weights).expanduser()
    if not weights or not path.exists():
        return None
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return fingerprint(
        [[str(file.relative_to(path)), sha256_file(file)] for file in files if file.is_file() and file.name != LOCK]
    )


def fill(
    network: nn.Module, state: Mapping[str, Tensor], path: Path, *, where: str = "encoder", spare: Iterable[str] = ()
) -> None:
    """Give `network` the weights `state`, in the network's own precision.

    spare: keys of the file that have no place here. Any other difference, in keys or shapes, is an IntegrityError
    that names them, and leaves the network as it was.
    """
    own = network.state_dict()
    state = {key: value for key, value in state.items() if key in own or key not in set(spare)}
    missing = sorted(key for key in own.keys() - state.keys() if not key.endswith(_COUNTERS))
    unexpected = sorted(state.keys() - own.keys())
    if missing or unexpected:
        what = f"{len(missing)} weights are missing and {len(unexpected)} are not known"
        raise _misfit(path, where, what, missing[:5], unexpected[:5])
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise _misfit(path, where, f"{key} has another shape", tuple(own[key].shape), tuple(value.shape))
    network.load_state_dict({**own, **state})


def require_known(
    name: str, known: Iterable[str], library: str, *, key: str = "encoder.name", listing: str = ""
) -> None:
    """Raise ConfigError, with the near ones, for a name that is not `known` to a library.

    listing: how a user sees the whole list.
    """
    known = set(known)
    if name in known:
        return
    near = difflib.get_close_matches(name, sorted(known), n=3)
    raise ConfigError(
        f"{library} has no such model",
        key=key,
        found=name,
        expected=near or f"a name that {library} knows",
        fix=f"Did you mean {' or '.join(near)}?" if near else f"{listing} lists them.",
    )


def not_fetched(what: str, error: Exception, *, where: str = "encoder") -> EnvironmentFault:
    """The error for a download that failed."""
    return EnvironmentFault(
        f"{what} could not be fetched ({brief(error)})",
        stage=where,
        key=f"{where}.weights",
        fix=f"Fetch the file where there is a network, and give it as {where}.weights.",
    )


def brief(error: Exception) -> str:
    """The words of a library's error on one line."""
    return " ".join(str(error).split())[:300]


def _misfit(path: Path, where: str, what: str, expected: object, found: object) -> IntegrityError:
    return IntegrityError(
        f"The weights do not fit {where}.name: {what}",
        stage=where,
        path=path,
        expected=expected,
        found=found,
        fix=f"Make {where}.name the model that the file was saved from.",
    )
