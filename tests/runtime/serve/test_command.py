"""`n3c serve` as a program: what it prints, how it ends, and the lines of the documentation."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from n3c.runtime.serve import open as opening
from n3c.runtime.serve.http_server import HttpServer
from n3c.runtime.serve.log import EscapedFormatter
from support.command import PROGRAM, default_signals, n3c

ROOT = Path(__file__).parents[3]


@contextmanager
def serving(built: Path, *arguments: object) -> Generator[tuple[subprocess.Popen[str], str]]:
    """Run the program; yield it and its address."""
    command = [*PROGRAM, "serve", built / "out", "--weights", built / "weights", "--port", 0, "--json", *arguments]
    program = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=default_signals
    )
    try:
        assert program.stdout is not None
        told = ""
        while not told.endswith("}\n") or told.count("{") != told.count("}"):
            line = program.stdout.readline()
            assert line, program.communicate()
            told += line
        yield program, json.loads(told)["url"]
    finally:
        program.kill()
        program.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_when_streams_are_done(built: Path, number: int) -> None:
    with serving(built, "--name", "small") as (program, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        chunks = client.completions.create(
            model="small", prompt="You", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        next(chunks)
        program.send_signal(number)
        assert list(chunks)[-1].choices[0].finish_reason == "length"
        out, err = program.communicate(timeout=60)
        assert (program.returncode, out) == (0, "")
        assert "Traceback" not in err


def test_a_key_in_the_environment_and_nothing_of_requests_in_the_log(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(opening.API_KEY, "secret")
    with serving(built, "--access-log", "--no-mtp", "--no-prefix-cache", "--engine", "torch") as (program, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        body = {"model": "small", "prompt": "private words", "max_tokens": 2}
        answer = httpx.post(f"{url}/v1/completions", json=body, headers={"Authorization": "Bearer secret"}, timeout=60)
        assert answer.status_code == 200
        program.terminate()
        out, err = program.communicate(timeout=60)
        assert "POST /v1/completions" in out + err
        assert "private" not in out + err and "secret" not in out + err


def test_what_it_refuses(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = (built / "out", "--weights", built / "weights", "--json")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with monkeypatch.context() as patch:
            patch.setattr("n3c.runtime.generation.runner.open_engine", _unopened)
            result = n3c("serve", *where, "--port", taken.getsockname()[1])
    assert (result.code, result.codes) == (2, ["E0844"])
    assert n3c("serve", *where, "--port", 0, "--cache-memory", "much").codes == ["E0701"]
    assert n3c("serve", built / "out", "--port", 0, "--json").codes == ["E0808"]

    def found(name: str) -> str | None:
        return None if name == "uvicorn" else name

    monkeypatch.setattr("importlib.util.find_spec", found)
    missing = n3c("serve", *where, "--port", 0)
    assert (missing.code, missing.codes) == (4, ["E0509"])
    assert missing.data["diagnostics"][0]["help"] == "pip install 'n3c[serve]'"


def _unopened(*_: object, **__: object) -> None:
    raise AssertionError("no engine is to be opened")


def test_a_port_that_another_takes_while_it_loads(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:

        def taken(*_: object, **__: object) -> Any:
            other.listen()
            return served

        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        served = opening.open_served(built / "out", built / "weights")
        monkeypatch.setattr("n3c.compiler.cli.commands.serve.open_served", taken)
        port = other.getsockname()[1]
        result = n3c("serve", built / "out", "--weights", built / "weights", "--port", port, "--json")
    assert (result.code, result.codes) == (2, ["E0844"])
    assert not served.service.healthy


def test_a_tokenizer_that_is_missing_is_told_before_weights_are_read(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(built / "weights", tmp_path / "weights", ignore=shutil.ignore_patterns("tokenizer.json"))
    monkeypatch.setattr("n3c.runtime.generation.runner.open_engine", _unopened)
    result = n3c("serve", built / "out", "--weights", tmp_path / "weights", "--port", 0, "--json")
    assert (result.code, result.codes) == (6, ["E0805"])


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (("--host", "a\x1b[31m\u202e\nerror[E9999]"), "E0844"),
        (("--host", "a" * 70), "E0844"),
        (("--host", "."), "E0844"),
        (("--grace", "nan"), "E0816"),
        (("--api-key", ""), "E0701"),  # as of a variable that is not set: nobody is to have a server without a key
        (("--api-key", "two words"), "E0701"),
        (("--api-key", "\udcff"), "E0701"),
        (("--name", "a\x1b[31m"), "E0701"),
        (("--name", "\udcff"), "E0701"),
    ],
)
def test_values_that_it_refuses(built: Path, given: tuple[str, str], code: str) -> None:
    result = n3c("serve", built / "out", "--weights", built / "weights", "--port", 0, *given, "--json")
    assert (result.code, result.codes) == (2, [code])
    assert all(character.isprintable() or character == "\n" for character in result.err)


def test_what_is_sent_stays_text_in_the_log(built: Path) -> None:
    """Requests that are none, and hostile ones, are lines on stderr; stdout has the JSON alone."""
    with serving(built, "--access-log") as (program, url):
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        for request in (
            b"GET /\x1b[31m HTTP/1.1\r\n\r\n",
            b"\x1b]0;owned\x07 / HTTP/1.1\r\n\r\n",
            b"GET /%1b[31m?%1b%0aerror HTTP/1.1\r\nHost: \x1b[31m\r\n\r\n",
            b"GET /v1/models/%0a%1b[2J HTTP/1.1\r\nHost: a\r\nUpgrade: \xe2\x80\xae\r\nConnection: Upgrade\r\n\r\n",
        ):
            with socket.create_connection(address, timeout=10) as connection:
                connection.sendall(request)
                assert connection.recv(100).startswith(b"HTTP/1.1 40")
        program.terminate()
        out, err = program.communicate(timeout=60)
        assert out == "" and "GET /v1/models/%0A%1B" in err
        assert all(character.isprintable() or character == "\n" for character in err)


def test_a_message_is_a_line_of_the_log() -> None:
    def failed(text: str) -> logging.LogRecord:
        try:
            raise ValueError(text)
        except ValueError:
            return logging.LogRecord("uvicorn.error", logging.ERROR, "", 1, "of %s", (text,), sys.exc_info())

    text = EscapedFormatter().format(failed("\x1b[31m\nERROR: forged"))
    assert text.startswith("ERROR: of \\x1b[31m\\nERROR: forged\nTraceback") and "\x1b" not in text


def commands() -> list[str]:
    """Return the commands of docs/serving.md that ask a server."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/serving.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line for block in blocks for line in re.split(r"\n(?=curl )", "\n" + block)]
    return [line for line in lines if line.startswith("curl ")]


@pytest.mark.parametrize("command", commands())
def test_the_lines_of_the_documentation(command: str, server: HttpServer) -> None:
    line = command.replace("http://127.0.0.1:8000", server.url).replace('"tiny"', '"small"')
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, env=os.environ)
    if "stream" in line:
        assert done.stdout.rstrip().endswith("data: [DONE]")
    elif "metrics" in line:
        assert "n3c_round_seconds" in done.stdout
    else:
        told: Any = json.loads(done.stdout)
        assert "error" not in told, told


def test_without_numpy_the_help_is_there() -> None:
    code = "import sys; sys.modules['numpy'] = None; from n3c.compiler.cli.main import main; main(['serve', '--help'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
