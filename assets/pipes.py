"""What a trainer says while it runs, as events of its asset: numbers to plot, and the refusal that it ended with."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
from dagster_pipes import PipesParams

RETRIES, RETRY_SECONDS = 2, 10  # of a trainer that was killed


class TrainerMessages(dg.PipesMessageReader):
    """Reads what `nestdiff_core.cli.train` writes: log lines go to the run's log, numbers become observations of the
    asset, which the UI plots while the run goes on. For one launch; `refusal` is why the trainer refused, once it has.
    """

    def __init__(self, context: dg.AssetExecutionContext, path: Path | None = None) -> None:
        """path: of the file that messages go through, for a trainer on another machine."""
        self.context, self.refusal = context, None
        self._reader = dg.PipesTempFileMessageReader() if path is None else dg.PipesFileMessageReader(str(path))

    @contextmanager
    def read_messages(self, handler: dg.PipesMessageHandler) -> Iterator[PipesParams]:
        with self._reader.read_messages(_Live(handler, self)) as parameters:  # pyright: ignore[reportArgumentType]
            yield parameters

    def on_launched(self, launched_payload: dg.PipesLaunchedData) -> None:
        self._reader.on_launched(launched_payload)

    def no_messages_debug_text(self) -> str:
        return self._reader.no_messages_debug_text()

    def receive(self, message: dict[str, Any]) -> None:
        """One message of our own, from the thread that reads them."""
        match message:
            case {"numbers": dict(numbers)}:
                self.refusal = None  # of a job before this one, which a time limit of Slurm's had stopped
                shown = {name: _short(value) for name, value in numbers.items() if math.isfinite(value)}
                self.context.log_event(dg.AssetObservation(self.context.asset_key, metadata=shown))
            case {"refusal": dict(refusal)}:
                self.refusal = refusal

    def failure(self) -> dg.Failure | dg.RetryRequested:
        """Why the trainer ended without having done its work.

        One that was killed, or stopped by somebody else than Dagster, is started again and resumes; a refusal would
        only be repeated, except that the trainer before a retry may still be saving. (A RetryPolicy would start a
        run that was cancelled again.)
        """
        kind = None if self.refusal is None else self.refusal["kind"]
        if self.refusal is None or kind == "Interrupted" or (kind == "LockHeld" and self.context.retry_number > 0):
            return dg.RetryRequested(max_retries=RETRIES, seconds_to_wait=RETRY_SECONDS)
        record = {name: str(value) for name, value in self.refusal.items() if value is not None and name != "sentence"}
        return dg.Failure(description=self.refusal["sentence"], metadata=record, allow_retries=False)


def _short(value: float) -> float:
    """To six digits: the log of a run shows every number in full."""
    return value if isinstance(value, int) else float(f"{value:.6g}")


class _Live:
    """Dagster's handler, but for messages of our own: it would keep those until the end."""

    def __init__(self, handler: dg.PipesMessageHandler, reader: TrainerMessages) -> None:
        self._handler, self._reader = handler, reader

    def handle_message(self, message: Any) -> None:
        if message.get("method") == "report_custom_message":
            self._reader.receive(message["params"]["payload"])
        else:
            self._handler.handle_message(message)

    def report_pipes_framework_exception(self, origin: str, exc_info: Any) -> None:
        self._handler.report_pipes_framework_exception(origin, exc_info)
