"""What a trainer says arrives, however it was written."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import dagster as dg

from assets.pipes import TrainerMessages


class Handler:
    """Dagster's, which puts log lines into a run's log."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.unreadable = 0

    def handle_message(self, message: Any) -> None:
        self.said.append(message["params"]["message"])

    def report_pipes_framework_exception(self, origin: str, exc_info: Any) -> None:
        self.unreadable += 1


def message(method: str, **params: Any) -> bytes:
    return json.dumps({"method": method, "params": params}).encode() + b"\n"


def test_a_line_that_is_still_being_written_is_waited_for(tmp_path: Path) -> None:
    """What comes after it is read too: a refusal is no reason to try again."""
    path, handler = tmp_path / "messages.jsonl", Handler()
    context = cast(dg.AssetExecutionContext, SimpleNamespace(retry_number=0))
    messages = TrainerMessages(context, path)
    refusal = {"kind": "NumericsError", "sentence": "The loss is not finite"}
    with messages.read_messages(cast(dg.PipesMessageHandler, handler)), path.open("ab", buffering=0) as file:
        line = message("log", message="step 1")
        file.write(line[:20])
        time.sleep(0.3)
        assert not handler.said
        file.write(line[20:])
        file.write(b"\xff no message\n")
        file.write(message("log", message="step 2"))
        file.write(message("report_custom_message", payload={"refusal": refusal}))
    assert handler.said == ["step 1", "step 2"] and handler.unreadable == 1
    failure = messages.failure()
    assert isinstance(failure, dg.Failure) and failure.description == "The loss is not finite"
    assert not path.exists()
