"""A plugin of pytest: files in random order, and tests in random order inside each; `N3C_TEST_SEED` is the seed.
`N3C_TEST_SEED=1 PYTHONPATH=tests pytest -p support.shuffled tests/specs`
"""

from __future__ import annotations

import os
import random

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order by file and test; a file stays together, as its fixtures may be slow."""
    rng = random.Random(os.environ["N3C_TEST_SEED"])
    files: dict[object, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    groups = list(files.values())
    rng.shuffle(groups)
    for group in groups:
        rng.shuffle(group)
    items[:] = [item for group in groups for item in group]
