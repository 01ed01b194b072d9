"""Importing generated modules."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Any

_numbers = itertools.count()


def import_file(path: Path) -> Any:
    """Import a Python file under a name of its own."""
    name = f"generated_{next(_numbers)}_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses look their module up
    found.loader.exec_module(module)
    return module
