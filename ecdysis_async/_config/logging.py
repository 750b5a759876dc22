"""Where the log of ``ecdysis run`` goes: one handler on stderr, or what a file says, as uvicorn has it."""

from __future__ import annotations

import importlib
import json
import logging
import logging.config
import os
import re
import sys
from typing import Any

from ecdysis_async._system.log_stream import PatientHandler

from .options import OptionError, Options

__all__ = ["PlainFormatter", "configure_logging"]

FORMAT = "%(asctime)s %(levelname)-8s %(name)s: %(message)s"

# As servers count it: more than debug.
TRACE = 5


# C0 but for tabs and line ends, and C1: they move a terminal's cursor, or rename its window.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class PlainFormatter(logging.Formatter):
    """Writes the lines of this library without control characters: names and errors in them are another process' words.

    An application's own lines stay as they are.
    """

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not record.name.startswith("ecdysis_async"):
            return text
        return _CONTROL_CHARACTERS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def configure_logging(options: Options) -> None:
    """Set up logging for this process.

    Raises:
        OptionError: the file says nothing that can be understood, or the package that reads it is missing.
    """
    logging.addLevelName(TRACE, "TRACE")
    if options.log_config is None:
        handler = PatientHandler(sys.stderr)
        handler.setFormatter(PlainFormatter(FORMAT))
        logging.basicConfig(handlers=[handler], level=(options.log_level or "info").upper(), force=True)
        return
    try:
        _configure_by_file(options.log_config)
    except OptionError:
        raise
    except Exception as error:
        raise OptionError(f"log_config: {options.log_config} sets no logging up: {error}") from error
    if options.log_level is not None:
        logging.getLogger("ecdysis_async").setLevel(options.log_level.upper())


def _configure_by_file(path: str) -> None:
    match os.path.splitext(path)[1].lower():
        case ".json":
            with open(path, encoding="utf-8") as file:
                logging.config.dictConfig(json.load(file))
        case ".yaml" | ".yml":
            logging.config.dictConfig(_read_yaml(path))
        case _:
            logging.config.fileConfig(path, disable_existing_loggers=False)


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        yaml = importlib.import_module("yaml")
    except ModuleNotFoundError as error:
        raise OptionError("log_config: a YAML file needs PyYAML: pip install pyyaml") from error
    with open(path, encoding="utf-8") as file:
        content: dict[str, Any] = yaml.safe_load(file)
    return content
