"""What a server logs: lines on stderr, with what a terminal would obey in them escaped."""

from __future__ import annotations

import logging
from typing import Any

from n3c.ir.text import escaped, escaped_lines


class EscapedFormatter(logging.Formatter):
    """A message is one line, whatever it quotes; a traceback follows in lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        line = escaped(f"{record.levelname}: {record.getMessage()}")
        return line if record.exc_info is None else f"{line}\n{escaped_lines(self.formatException(record.exc_info))}"


LOG: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"escaped": {"()": EscapedFormatter}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "escaped"}},
    "loggers": {"uvicorn": {"handlers": ["stderr"], "level": "INFO", "propagate": False}},
}
"""The configuration of uvicorn's loggers."""
