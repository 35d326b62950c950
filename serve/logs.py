"""Logs as JSON, one object a line: time, level, logger, message, and what it is about (`request_id`, `job`, `tenant`).

No prompt, key or URL is written by the code that logs. An exception's own text may quote any of them (a database's, a
parser's), so of one that is not ours only the type and the place are written.
"""

from __future__ import annotations

import json
import logging
import traceback
from datetime import UTC, datetime
from typing import Any, TextIO

from magicid.errors import MagicIDError

LOGGERS = ("magicid", "serve")
_OF_EVERY_RECORD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON, with the values that were given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        given = record.__dict__.items()  # with Ray's own, which begin with _
        line |= {key: value for key, value in given if key not in _OF_EVERY_RECORD and not key.startswith("_")}
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = describe(record.exc_info[1])
        return json.dumps(line, default=str)


def describe(error: BaseException) -> dict[str, str]:
    """Type and place of an error, and its text where it is one of ours."""
    place = "".join(traceback.format_tb(error.__traceback__))
    problem = error.problem if isinstance(error, MagicIDError) else ""
    return {"type": type(error).__name__, "problem": problem, "place": place}


def set_up(level: str, stream: TextIO | None = None) -> None:
    """Write this process's logs to a stream: stderr by default, which Ray keeps by process."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
