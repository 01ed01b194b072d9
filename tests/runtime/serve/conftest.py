"""A server of a small model, in a thread of its own, for the whole session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from n3c.runtime.serve.http_server import HttpServer
from support.serving_http import listening, small_served, write_build


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `out` and `weights`."""
    folder = tmp_path_factory.mktemp("served")
    write_build(folder)
    return folder


@pytest.fixture(scope="session")
def server(built: Path) -> Iterator[HttpServer]:
    with listening(small_served(built)) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: HttpServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
