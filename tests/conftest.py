"""Small models gain nothing from many threads; Triton kernels run in its interpreter; no extension is seen.

The plans of a session are kept for it alone. No test fails by the time that it takes: machines are slow, or busy.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("n3c", settings(), deadline=None)
settings.load_profile("n3c")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined; programs that tests start have it too
os.environ.setdefault("N3C_EXTENSIONS", "")  # whatever the environment has installed: tests that need one say so


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files first that are long though they have few tests: then no process waits for another one's last file."""
    here = Path(__file__).parent
    items.sort(key=lambda item: item.path.parent not in (here, here / "end_to_end"))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("N3C_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield
