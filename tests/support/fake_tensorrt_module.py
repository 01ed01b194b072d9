"""A module `tensorrt` in a folder, found by the processes that build plans too; what it does, the model says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

MODULE = """
import os, signal, sys, time
from support.fake_tensorrt import StandIn

class Behaving(StandIn):
    def _parser(self, network, logger):
        parser = super()._parser(network, logger)
        parse_from_file = parser.parse_from_file

        def behave(path):
            with open(path, "rb") as file:
                word = file.read(6)
            if word == b"crash ":
                print("no more memory", file=sys.stderr, flush=True)
                os._exit(3)
            if word == b"killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if word == b"slow  " or "N3C_TEST_SLOW" in os.environ:
                print(flush=True)  # what a library prints is no message
                time.sleep(60)
            return parse_from_file(path)

        parser.parse_from_file = behave
        return parser

    def _builder(self, logger):
        self.fails = os.environ.get("N3C_TEST_FAILS", "")
        return super()._builder(logger)

sys.modules[__name__] = Behaving()
"""


def install_stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `tensorrt` be the stand-in, until the test ends."""
    (folder / "tensorrt.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
