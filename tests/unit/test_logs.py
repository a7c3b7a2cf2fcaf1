"""The log as JSON, in processes of their own: it changes what belongs to a whole process."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from klein import logs
from tests.support import live

UNCAUGHT = """
import logging, threading, warnings
from klein import logs
logging.basicConfig()
logs.setup({"KLEIN_LOG_FORMAT": "JSON"})
warnings.warn("look")
with logs.fields(request_id="r1"):
    logging.getLogger("klein.x").info("a\\nb \\ud800", extra={"fields": {"status": 200}})
threading.Thread(target=lambda: 1 / 0).start()
raise ValueError("two\\nlines")
"""


def lines(home: Path, *argv: str, **environ: str) -> tuple[list[dict[str, Any]], int]:
    """What python says, every line of it JSON, and how it ends."""
    env = live.environment(home, KLEIN_LOG_FORMAT="json", **environ)
    done = subprocess.run(
        [sys.executable, *argv],
        env=env,
        cwd=live.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return [json.loads(line) for line in done.stdout.splitlines()], done.returncode


def test_everything_is_a_line(tmp_path: Path) -> None:
    """Warnings, exceptions of threads and the last one too, each with its stack in a field."""
    found, _ = lines(tmp_path, "-c", UNCAUGHT)
    warned, told, thread, last = found
    assert "UserWarning: look" in warned["message"]
    assert (told["level"], told["message"]) == ("info", "a\nb \ud800")
    assert (told["request_id"], told["status"]) == ("r1", 200)
    assert "T" in told["time"]
    assert (thread["exception"], last["exception"]) == ("ZeroDivisionError", "ValueError")
    assert "ValueError: two\nlines" in last["stack"]


@pytest.mark.parametrize(
    ("argv", "environ", "code", "says"),
    [
        ("klein generate x -o nowhere/a.png", {}, 2, "no folder"),
        (
            "klein generate x -o a.png",
            {"MODEL_ID": "./nowhere"},
            70,
            "MODEL_ID: there is no folder",
        ),
        ("klein.runpod", {"MODEL_ID": "./nowhere"}, 1, "klein cannot start: MODEL_ID"),
        ("klein.runpod", {"KLEIN_DEVICE": "x"}, 1, "klein cannot start: KLEIN_DEVICE"),
        ("bentoml serve service:Klein", {"KLEIN_DEVICE": "x"}, 1, "cannot start: KLEIN_DEVICE"),
    ],
)
def test_entrypoints_say_why_they_stop(
    tmp_path: Path, argv: str, environ: dict[str, str], code: int, says: str
) -> None:
    """In one line, settings that cannot be read included."""
    found, ended = lines(tmp_path, "-m", *argv.split(), **environ)
    assert says in found[-1]["message"]
    assert (found[-1]["level"], ended) == ("critical", code)


def test_text_is_the_default() -> None:
    """Nothing is changed in a process that does not ask for it."""
    before = [handler.formatter for handler in logging.root.handlers]
    logs.setup({"KLEIN_LOG_FORMAT": "text"})
    assert [handler.formatter for handler in logging.root.handlers] == before
    assert not logs.is_json()
