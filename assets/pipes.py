"""What a trainer says while it runs, as events of its asset: numbers to plot, and the refusal that it ended with."""

import json
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import dagster as dg
from dagster_pipes import PipesDefaultMessageWriter, PipesParams

RETRIES, RETRY_SECONDS = 2, 10  # of a trainer that was killed
POLL_SECONDS = 0.05


class TrainerMessages(dg.PipesMessageReader):
    """Reads what `nestdiff_core.cli.train` writes: log lines go to the run's log, numbers become observations of the
    asset, which the UI plots while the run goes on. For one launch; `refusal` is why the trainer refused, once it has.

    Dagster's own reader takes a line that is still being written for a whole one and reads nothing after it, so that a
    run falls silent and a refusal passes for a trainer that was killed.
    """

    def __init__(self, context: dg.AssetExecutionContext, path: Path | None = None) -> None:
        """path: of the file that messages go through, for a trainer on another machine."""
        self.context, self.refusal = context, None
        self._path = path

    @contextmanager
    def read_messages(self, handler: dg.PipesMessageHandler) -> Iterator[PipesParams]:
        with tempfile.TemporaryDirectory() as folder:
            path, ended = self._path or Path(folder) / "messages.jsonl", Event()
            path.write_bytes(b"")
            reading = Thread(target=self._read, args=(path, handler, ended), daemon=True)
            reading.start()
            try:
                yield {PipesDefaultMessageWriter.FILE_PATH_KEY: str(path)}
            finally:
                ended.set()
                reading.join()
                path.unlink(missing_ok=True)

    def no_messages_debug_text(self) -> str:
        return "The trainer writes them to a file."

    def _read(self, path: Path, handler: dg.PipesMessageHandler, ended: Event) -> None:
        """Until the session has ended and nothing more comes; a message that cannot be read costs itself alone."""
        with path.open("rb") as file:
            line = b""
            while True:
                last = ended.is_set()
                line += (piece := file.readline())
                if line.endswith(b"\n"):
                    try:
                        self._hand_on(json.loads(line), handler)
                    except Exception:  # whatever it is, the thread goes on
                        handler.report_pipes_framework_exception("a message of the trainer", sys.exc_info())
                    line = b""
                elif not piece:
                    if last:
                        return
                    ended.wait(POLL_SECONDS)

    def _hand_on(self, message: Any, handler: dg.PipesMessageHandler) -> None:
        """Messages of our own are not for Dagster's handler, which would keep them until the end."""
        if message.get("method") == "report_custom_message":
            self.receive(message["params"]["payload"])
        else:
            handler.handle_message(message)

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
