"""The log as JSON, one object a line, with the request, job and stage that it was written for.

    {"time": …, "level": "info", "logger": "klein.access", "message": …, "request_id": …}

What is at work is kept in a context variable: tasks and threads that run in a copy of their
caller's context write its fields too. An exception is in two fields, its type and its stack. No
line has a prompt or a key in it, but what an unforeseen exception says of itself.
"""

import json
import logging
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType, TracebackType
from typing import Any

_fields: ContextVar[Mapping[str, str]] = ContextVar(
    "klein_log_fields", default=MappingProxyType({})
)
log = logging.getLogger("klein")


@contextmanager
def fields(**values: str) -> Iterator[None]:
    """What is logged inside has these fields besides those outside."""
    token = _fields.set({**_fields.get(), **values})
    try:
        yield
    finally:
        _fields.reset(token)


def set_stage(stage: str) -> None:
    """What is logged in this context from now on belongs to `stage`."""
    _fields.set({**_fields.get(), "stage": stage})


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON; `extra={"fields": {…}}` of a log call is in it."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields.get(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0]:
            line["exception"] = record.exc_info[0].__qualname__
            line["stack"] = "".join(traceback.format_exception(*record.exc_info)).rstrip()
        return json.dumps(line, default=str)


def setup(environ: Mapping[str, str]) -> None:
    """With `KLEIN_LOG_FORMAT=json`, let every handler there is write JSON, and warnings and
    uncaught exceptions go there too.

    Read before the other settings, so that what is wrong with them is told in a line as well.
    """
    if environ.get("KLEIN_LOG_FORMAT", "").strip().lower() != "json":
        return
    logging.basicConfig()
    log.setLevel(logging.INFO)
    named = logging.root.manager.loggerDict.values()
    loggers = [logging.root, *(each for each in named if isinstance(each, logging.Logger))]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        handler.setFormatter(JsonFormatter())
    logging.captureWarnings(capture=True)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda args: _log_uncaught(
        args.exc_type, args.exc_value, args.exc_traceback
    )


def is_json() -> bool:
    """Whether the log is JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.root.handlers)


def say(sentence: str, level: int = logging.CRITICAL) -> None:
    """Tell whoever started klein: on stderr as it is, or where the log is JSON, in a line."""
    if is_json():
        record = log.makeRecord(log.name, level, __file__, 0, sentence.strip(), (), None)
        sentence = JsonFormatter().format(record)
    print(sentence, file=sys.stderr, flush=True)


def _log_uncaught(
    kind: type[BaseException], error: BaseException | None, stack: TracebackType | None
) -> None:
    if not issubclass(kind, SystemExit):
        log.critical("%s ended a thread", kind.__name__, exc_info=(kind, error or kind(), stack))
