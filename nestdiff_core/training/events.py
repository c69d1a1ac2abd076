"""Event files for TensorBoard: every number of the log, under `level_N/`."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from types import TracebackType

from nestdiff_core.training.report import Line


class EventFiles:
    """Writes log lines into `folder` for TensorBoard; nothing where the package tensorboard is missing.

    after: the step that training goes on from; what an earlier attempt wrote beyond it is hidden.
    """

    def __init__(self, folder: Path, *, level: int, after: int) -> None:
        self.level, self._writer = level, None
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            _in_a_second_of_its_own(folder)
            self._writer = SummaryWriter(str(folder), purge_step=after + 1 if after else None)

    def __call__(self, line: Line) -> None:
        if self._writer is not None:
            for name, value in line.items():
                if name != "step":
                    self._writer.add_scalar(f"level_{self.level}/{name}", value, int(line["step"]))
            self._writer.flush()

    def __enter__(self) -> EventFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()


def _in_a_second_of_its_own(folder: Path) -> None:
    """Wait for one. TensorBoard reads files in the order of their names, which begin with the second; of two from the
    same one the later may come first, and what it hides is then what was written before."""
    for _ in range(25):
        if not any(folder.glob(f"events.out.tfevents.{int(time.time())}.*")):
            return
        time.sleep(0.05)
