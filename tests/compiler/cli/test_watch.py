"""Nothing leaves the machine, and nothing is written but outputs, caches that the documents name, and what goes again.

Every command runs as a program of its own, in a home and a folder for temporary files that are empty before, under
two watches: Python's audit hook tells each connection that is tried, each process that is started and each file that
is opened to be written; and where the system gives a network of its own (`unshare --net`, without root), the kernel
counts what any library tries to send, too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

import n3c.ir
from n3c.compiler.cli.main import COMMANDS
from support.checkpoints import write_checkpoint
from support.command import PROGRAM
from support.specs import SMALL, spec_from_text

HOOK = """
import json, os, sys

LOG = os.open(os.environ["N3C_WATCH_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
STARTED = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "urllib.Request")
SENT = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg")
MADE = ("os.mkdir", "os.rename", "os.link", "os.symlink")

def hear(event, arguments):
    found = None
    if event in STARTED or event in SENT:
        found = (event, repr(arguments)[:4000])
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        if isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            found = ("write", os.path.abspath(os.fsdecode(arguments[0])))
    elif event in MADE:
        found = ("write", os.path.abspath(os.fsdecode(arguments[0 if event == "os.mkdir" else 1])))
    if found is not None:
        os.write(LOG, (json.dumps(found) + "\\n").encode())

sys.addaudithook(hear)
"""
COUNTED = 'mount=/proc; "$@"; code=$?; cat /proc/net/snmp /proc/net/snmp6 > "$N3C_COUNTERS"; exit $code'
OWN_NETWORK = ("unshare", "--map-root-user", "--net", "sh", "-c", COUNTED, "sh")
STOPPED = ("sh", "-c", '"$@" > "$N3C_READY" & until test -s "$N3C_READY"; do sleep 0.1; done; kill $!; wait $!', "sh")
"""What stops a program once it says that it is ready; the hook does not hear a shell."""
CONNECT = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 53))"

SPEC = (
    SMALL.replace("vocab_size = 97", "vocab_size = 256")
    .replace('"MEM*E-ME"', '"M*E"')
    .replace("max_seq_len = 32", "batch_sizes = [1]\nmax_seq_len = 48\nprefill_chunk = 8\ndraft_tokens = 2")
)
LINES: dict[str, list[str]] = {
    "check": ["spec.toml --target trt --context 16"],
    "init": ["begun.toml"],
    "specs": [""],
    "inspect": ["spec.toml", "weights", "out"],
    "diff": ["spec.toml tiny", "weights weights"],
    "build": ["spec.toml --target torch -o out --weights weights", "spec.toml --target onnx -o out"],
    "quantize": [
        "spec.toml --weights weights -o quantized",
        "spec.toml --weights weights -o calibrated --calibration text.txt --calibration-length 16 --auto"
        " --save-activation-scales scales.json --write-spec chosen.toml --effective-bits 9",
    ],
    "verify": ["out --weights weights"],
    "repro": ["out"],
    "run": [
        "out --weights weights --prompt ab --max-new-tokens 2",
        "out --weights weights --prompt ab --max-new-tokens 2 --engine torch",
    ],
    "bench": ["out --engine torch --context 4 --new-tokens 2 --runs 1"],
    "serve": ["out --weights weights --engine torch --port 0 --json"],
    "simulate": ["spec.toml --gpu L4 --rate 9 --prompt-tokens 9 --output-tokens 4 --acceptance 1.5 --requests 20"],
    "import": ["weights -o imported.toml"],
    "export-config": ["spec.toml -o config.json"],
    "passes": [""],
    "schema": [""],
    "completion": ["bash", "zsh", "fish"],
    "doctor": [""],
}
"""Command → what is run of it, one after the other; a command that is not here fails the test."""
if find_spec("tensorrt_rtx"):
    LINES["build"].append("spec.toml --target trt --entry decode -o out")
OUTPUTS = {"out", "quantized", "calibrated", "scales.json", "chosen.toml", "begun.toml", "imported.toml", "config.json"}
"""What the commands above are told to write."""
PACKAGE = Path(n3c.ir.__path__[0]).resolve().parent


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a home, a folder for temporary files, a log, and `work` in which commands run."""
    place = tmp_path_factory.mktemp("watch").resolve()
    for name in ("home", "temporary", "hook", "work"):
        (place / name).mkdir()
    (place / "hook" / "sitecustomize.py").write_text(HOOK, encoding="utf-8")
    (place / "work" / "spec.toml").write_text(SPEC.lstrip(), encoding="utf-8")
    (place / "work" / "text.txt").write_text("to be or not to be, that is the question. " * 400, encoding="utf-8")
    write_checkpoint(place / "work" / "weights", spec_from_text(SPEC), shards=2)
    (place / "work" / "weights" / "tokenizer.json").unlink()
    return place


def watched(place: Path, program: list[str], *, alone: bool) -> tuple[int, list[list[str]], int]:
    """Run `program`; return its exit code, what the hook heard, and how much the kernel was asked to send."""
    log, counters = place / "log", place / "counters"
    for path in (log, counters):
        path.unlink(missing_ok=True)
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "ORT_", "HF_", "TORCH"))
    }
    imported = os.pathsep.join([str(place / "hook"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment |= {"HOME": str(place / "home"), "TMPDIR": str(place / "temporary"), "PYTHONPATH": imported}
    environment |= {"N3C_WATCH_LOG": str(log), "N3C_COUNTERS": str(counters), "N3C_READY": str(place / "ready")}
    environment |= {"N3C_CACHE_DIR": str(place / "cache")}
    command = [*(OWN_NETWORK if alone else ()), *program]
    done = subprocess.run(
        command, env=environment, cwd=place / "work", capture_output=True, text=True, timeout=300, check=False
    )
    assert "Traceback" not in done.stderr or program[:3] != list(PROGRAM), done.stderr
    heard = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return done.returncode, heard, _sent(counters.read_text(encoding="ascii")) if alone else 0


def _sent(counters: str) -> int:
    """Return the packets that were sent or had no way, of IPv4 and IPv6."""
    lines = counters.splitlines()
    names, values = (line.split()[1:] for line in lines if line.startswith("Ip:"))
    four = dict(zip(names, map(int, values), strict=True))
    six = {key: int(value) for key, value in (line.split() for line in lines if line.startswith("Ip6"))}
    return sum(four[key] + six[f"Ip6{key}"] for key in ("OutRequests", "OutNoRoutes"))


@pytest.fixture(scope="module")
def alone(place: Path) -> bool:
    """Whether programs get a network of their own; checked with one that wants to connect."""
    if shutil.which("unshare") is None or subprocess.run([*OWN_NETWORK[:3], "true"], check=False).returncode:
        return False
    return watched(place, [sys.executable, "-c", CONNECT], alone=True)[2] > 0


def test_the_hook_hears_a_connection(place: Path) -> None:
    """The control: what the next test asserts can fail."""
    _, heard, _ = watched(place, [sys.executable, "-c", CONNECT], alone=False)
    assert [event for event, *_ in heard] == ["socket.connect"]


@pytest.fixture(scope="module")
def report(place: Path, alone: bool) -> Callable[[str, str], None]:
    """Return a function that runs one line and asserts what both watches say."""

    def run(command: str, line: str) -> None:
        stopped = STOPPED if command == "serve" else ()
        code, heard, sent = watched(place, [*stopped, *PROGRAM, command, *line.split()], alone=alone)
        assert code == 0
        assert [found for found in heard if found[0] != "write" and not _is_builder(found)] == []
        assert sent == 0
        strange = {path for kind, path in heard if kind == "write" and not _allowed(place, Path(path))}
        assert strange == set(), f"{command} {line}"
        assert [path.name for name in ("home", "temporary") for path in (place / name).rglob("*")] == []

    return run


def _is_builder(found: list[str]) -> bool:
    """Whether a process was started that builds a plan: Python again, and the watch hears it, too."""
    return found[0] in ("subprocess.Popen", "os.posix_spawn") and "n3c.backends.trt.builder_process" in found[1]


def _allowed(place: Path, path: Path) -> bool:
    """Whether a command may write `path`: outputs and what stands in for them meanwhile, temporary files, caches."""
    work = place / "work"
    if path.is_relative_to(work):
        name = path.relative_to(work).parts[:1]
        return not name or name[0] in OUTPUTS or any(name[0].startswith(f".{out}.n3c-") for out in OUTPUTS) or (
            path.parent == work and not path.exists()  # a file that was renamed to its output
        )  # fmt: skip
    if any(path.is_relative_to(place / name) for name in ("temporary", "cache")) or path == Path(os.devnull):
        return True
    return "__pycache__" in path.parts and path.is_relative_to(PACKAGE)


def test_every_command(place: Path, report: Callable[[str, str], None]) -> None:
    assert set(LINES) == set(COMMANDS), "a new command: say in LINES how it is run"
    for command in (
        "check",
        "build",
        "inspect",
        *(name for name in LINES if name not in ("check", "build", "inspect")),
    ):
        for line in LINES[command]:
            report(command, line)
    assert {path.name for path in (place / "work").iterdir()} == OUTPUTS | {"spec.toml", "text.txt", "weights"}
