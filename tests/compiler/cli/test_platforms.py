"""The commands where Python has less than on Linux: what Windows and macOS lack is taken away, in a program of its own.

That simulates the missing modules and attributes only. `make types` looks the same up in the standard library's own
stubs (mypy --platform win32 and darwin), which knows all of them, but not what runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.checkpoints import write_checkpoint
from support.command import n3c
from support.specs import SMALL, spec_from_text

WITHOUT = """
import os, pathlib, signal, sys

MODULES = {"win32": ["fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"], "darwin": []}
MISSING = {
    "win32": [
        (os, "O_DIRECTORY O_NOFOLLOW O_CLOEXEC O_SYNC sched_getaffinity sched_setaffinity sysconf sysconf_names"
             " confstr pread pwrite preadv pwritev posix_fadvise posix_fallocate fork forkpty getuid geteuid getgid"
             " getegid getgroups getpgid setsid killpg nice mkfifo mknod chown lchown fchown fchdir fdatasync lockf"
             " getloadavg initgroups wait3 wait4 getxattr memfd_create eventfd O_TMPFILE O_DIRECT"),
        (signal, "SIGHUP SIGKILL SIGALRM SIGUSR1 SIGUSR2 SIGPIPE SIGQUIT SIGCHLD SIGSTOP SIGTSTP SIGCONT SIGWINCH"
                 " alarm setitimer pause pthread_kill pthread_sigmask sigwait sigpending siginterrupt"),
    ],
    "darwin": [
        (os, "sched_getaffinity sched_setaffinity posix_fadvise posix_fallocate getxattr memfd_create eventfd"
             " O_TMPFILE O_DIRECT fdatasync"),
    ],
}

def take_away(system):
    for module in MODULES[system]:
        sys.modules[module] = None
    for module, names in MISSING[system]:
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)
    opened = pathlib.Path.open
    def without_proc(path, *arguments, **more):
        if str(path).startswith("/proc/"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return opened(path, *arguments, **more)
    pathlib.Path.open = without_proc
"""

RUN = """
import json, sys, threading
system, commands = sys.argv[1], json.loads(sys.argv[2])
take_away(system)
from n3c.compiler.cli import main
codes = []
for command in commands:
    print("::", *command, file=sys.stderr)
    try:
        main.main(command)
    except SystemExit as ended:
        codes.append(int(ended.code))
print("CODES", json.dumps(codes))
"""

SPEC = (
    SMALL.replace("vocab_size = 97", "vocab_size = 256")
    .replace('"MEM*E-ME"', '"M*E"')
    .replace("max_seq_len = 32", "batch_sizes = [1]\nmax_seq_len = 48\nprefill_chunk = 8\ndraft_tokens = 2")
)


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_every_command_without_what_the_system_lacks(system: str, tmp_path: Path) -> None:
    spec, weights = tmp_path / "spec.toml", tmp_path / "weights"
    spec.write_text(SPEC.lstrip(), encoding="utf-8")
    write_checkpoint(weights, spec_from_text(SPEC), shards=2)
    (weights / "tokenizer.json").unlink()
    commands: list[list[object]] = [
        ["check", spec],
        ["inspect", spec],
        ["inspect", weights],
        ["import", weights, "-o", tmp_path / "imported.toml"],
        ["export-config", spec, "-o", tmp_path / "config.json"],
        ["build", spec, "--target", "torch", "-o", tmp_path / "out"],
        ["build", spec, "--target", "onnx", "-o", tmp_path / "out"],
        ["inspect", tmp_path / "out"],
        ["quantize", spec, "--weights", weights, "-o", tmp_path / "half", "--part", "1/2"],
        ["quantize", spec, "--weights", weights, "-o", tmp_path / "half", "--resume"],
        ["run", tmp_path / "out", "--weights", weights, "--prompt", "ab", "--max-new-tokens", "2"],
        ["verify", tmp_path / "out"],
        ["passes"],
        ["schema"],
        ["doctor"],
        ["check", tmp_path / "missing.toml"],
    ]
    arguments = json.dumps([[str(part) for part in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + RUN, system, arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    codes = json.loads(done.stdout.rpartition("CODES")[2])
    assert dict(zip(map(str, commands), codes, strict=True)) == {str(c): 0 for c in commands[:-1]} | {
        str(commands[-1]): 6
    }, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "half", "imported.toml", "out", "spec.toml", "weights"
    ]  # fmt: skip
    assert n3c("quantize", spec, "--weights", weights, "-o", tmp_path / "here").code == 0
    for path in (tmp_path / "here").iterdir():
        assert path.read_bytes() == (tmp_path / "half" / path.name).read_bytes()
