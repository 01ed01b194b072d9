"""Weights over HTTP, by vLLM's routes: guarded, in phases, with requests in flight."""

from __future__ import annotations

import socket
import threading
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.compiler import build
from n3c.ir.diagnostics import N3CError
from n3c.passes.lower.model import lower
from n3c.runtime.serve.app import create_app
from n3c.runtime.serve.open import open_served
from n3c.runtime.serve.served_model import ServedModel
from support.checkpoints import write_checkpoint
from support.programs import random_tensors, save_tensors
from support.serving_http import listening
from support.specs import SMALL, spec_from_text

TEXT = (
    SMALL.replace('"MEM*E-ME"', '"M*E"')
    .replace("vocab_size = 97", "vocab_size = 256")
    .replace("max_seq_len = 32", "batch_sizes = [1, 2]\nmax_seq_len = 64\nprefill_chunk = 8\ndraft_tokens = 2")
)
KEY = "secret"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    spec = spec_from_text(TEXT)
    (folder / "spec.toml").write_text(TEXT.lstrip())
    write_checkpoint(folder / "weights", spec, shards=1)
    (folder / "weights" / "tokenizer.json").unlink()
    save_tensors(random_tensors(lower(spec), seed=3), folder / "other")
    build(folder / "spec.toml", target="torch", output=folder / "out")
    return folder


def served(folder: Path, weights: str = "weights", **options: Any) -> ServedModel:
    return open_served(folder / "out", folder / weights, name="m", engine="torch", **options)


def client_of(model: ServedModel, key: str | None = KEY) -> TestClient:
    return TestClient(create_app(model), headers={} if key is None else {"Authorization": f"Bearer {key}"})


def completed(client: TestClient, prompt: str = "abcdefghijkl", count: int = 10) -> str:
    body = {"model": "m", "prompt": prompt, "max_tokens": count, "temperature": 0}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def test_an_update_equals_a_start_with_these_weights(folder: Path) -> None:
    other = Checkpoint(folder / "other")
    tensors = {name: np.ascontiguousarray(other.read(name)) for name in other}
    raw = b"".join(tensor.tobytes() for tensor in tensors.values())
    memory = SharedMemory(create=True, size=len(raw))
    model, fresh = served(folder, api_key=KEY, allow_weight_updates=True), served(folder, "other")
    try:
        assert memory.buf is not None
        memory.buf[: len(raw)] = raw
        client = client_of(model)
        before, expected = completed(client), completed(client_of(fresh, None))
        assert client.post("/pause?mode=wait").json() == {"status": "paused"}
        assert client.get("/is_paused").json() == {"is_paused": True}
        assert client.post("/start_weight_update").status_code == 200
        info = {
            "names": list(tensors),
            "dtype_names": [str(tensor.dtype) for tensor in tensors.values()],
            "shapes": [list(tensor.shape) for tensor in tensors.values()],
            "shared_memory": memory.name,
        }
        assert client.post("/update_weights", json={"update_info": info}).status_code == 200
        assert client.post("/finish_weight_update").json()["updates"] == 1
        assert client.post("/resume").json() == {"status": "resumed"}
        assert completed(client) == expected != before
    finally:
        memory.close()
        memory.unlink()
        model.close()
        fresh.close()


@pytest.mark.parametrize("mode", ["keep", "abort"])
def test_requests_in_flight_go_on_or_end(mode: str, folder: Path) -> None:
    model = served(folder, api_key=KEY, allow_weight_updates=True)
    try:
        client, done = client_of(model), list[Any]()
        whole = completed(client, count=48)
        body = {"model": "m", "prompt": "abcdefghijkl", "max_tokens": 48, "temperature": 0}
        thread = threading.Thread(target=lambda: done.append(client.post("/v1/completions", json=body)))
        batch = model.service.scheduler.batch
        decoded = batch.decoded
        thread.start()
        while batch.decoded < decoded + 2 and thread.is_alive():
            pass
        client.post(f"/pause?mode={mode}")
        client.post("/resume")
        thread.join()
        if mode == "keep":
            assert done[0].json()["choices"][0]["text"] == whole
        else:
            assert done[0].status_code == 503
    finally:
        model.close()


def test_a_trainer_that_never_comes_does_not_keep_the_server_from_ending(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody listens at its address, and says nothing; whoever asked for it has gone."""
    monkeypatch.setattr("n3c.runtime.serve.http_server.LINGER_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        model = served(folder, api_key=KEY, allow_weight_updates=True)
        info = {
            "master_address": "127.0.0.1",
            "master_port": silent.getsockname()[1],
            "world_size": 2,
            "rank_offset": 1,
        }
        key, body = {"Authorization": f"Bearer {KEY}"}, {"init_info": info}
        with listening(model, grace=0) as server, pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/init_weight_transfer_engine", json=body, headers=key, timeout=0.5)


def test_without_the_option_or_the_key_there_is_nothing(folder: Path) -> None:
    with pytest.raises(N3CError, match="allow-weight-updates needs --api-key"):
        served(folder, allow_weight_updates=True)
    plain = served(folder, api_key=KEY)
    guarded = served(folder, api_key=KEY, allow_weight_updates=True)
    try:
        assert client_of(plain).post("/pause").status_code == 404
        assert client_of(guarded, None).post("/pause").status_code == 401
        client = client_of(guarded)
        assert client.post("/pause?mode=later").status_code == 400
        for path, body in (
            ("/finish_weight_update", b""),
            ("/update_weights", b"{"),
            ("/update_weights", b"[]"),
            ("/update_weights", b'{"update_info": {"names": 3}}'),
            ("/init_weight_transfer_engine", b'{"init_info": {"master_address": "127.0.0.1", "master_port": 70000}}'),
            ("/init_weight_transfer_engine", b'{"init_info": {"master_address": "127.0.0.1", "master_port": 7, '
             b'"world_size": 2, "rank_offset": 0}}'),
        ):  # fmt: skip
            answer = client.post(path, content=body)
            assert answer.status_code == 400, (path, body, answer.text)
            assert answer.json()["error"]["type"] == "invalid_request_error"
        assert client.post("/start_weight_update").status_code == 200
        assert "E0603" in client.post("/finish_weight_update").json()["error"]["code"]
        assert completed(client)
    finally:
        plain.close()
        guarded.close()
