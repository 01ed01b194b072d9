"""OUT: whole or not at all, whatever happens; nobody's files are lost."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from n3c.backends.torch.emit import TRAINING
from n3c.compiler.building import outdir
from n3c.ir.diagnostics import N3CError
from n3c.runtime.manifest import read_manifest, verify_files
from support.command import default_signals, n3c, n3c_program, tree, write_small


def silent(_: str) -> None:
    """Nothing is waited for in these tests, or nobody listens."""


WRITTEN = {"config.json", "train.py", "small/model.py", *(f"small/training/{name}" for name in TRAINING)}
"""Some of what the torch target writes, below OUT/torch."""


def build(spec: Path, out: Path, *more: str) -> None:
    result = n3c("build", spec, "--target", "torch", "-o", out, *more)
    assert result.code == 0, result.err


def names(folder: Path) -> list[str]:
    """Return what is in `folder`, hidden entries too."""
    return sorted(path.name for path in folder.iterdir())


MANIFEST_OF_NOTHING = {"spec": {"name": "", "sha256": ""}, "parameters": {"total": 0, "mtp": 0}, "ledger": []}


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    return write_small(tmp_path)


def test_the_manifest_lists_every_file_with_its_hash(spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    build(spec, out)
    manifest = read_manifest(out)
    assert manifest is not None
    assert sorted(file["path"] for file in manifest["files"]) == sorted(set(tree(out)) - {"manifest.json"})
    for file in manifest["files"]:
        content = (out / file["path"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert names(out.parent) == ["out"]
    assert (out.stat().st_mode & 0o777) == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_second_build_is_the_same(spec: Path, tmp_path: Path) -> None:
    build(spec, tmp_path / "out")
    first = tree(tmp_path / "out")
    build(spec, tmp_path / "out")
    second = tree(tmp_path / "out")
    del first["manifest.json"], second["manifest.json"]  # has times
    assert first == second
    assert names(tmp_path) == ["out", "small.toml"]


def test_targets_of_the_same_spec_stay_and_others_go(spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(spec, out)
    assert n3c("build", spec, "--target", "onnx", "-o", out).code == 0
    assert names(out) == ["manifest.json", "onnx", "spec.toml", "torch"]
    build(spec, out)
    assert names(out) == ["manifest.json", "onnx", "spec.toml", "torch"]
    build(spec, out, "--set", "model.norm_eps=1e-6")
    assert names(out) == ["manifest.json", "spec.toml", "torch"]


@pytest.mark.parametrize("foreign", ["notes.txt", "torch/runs/metrics.jsonl", ".hidden", "link"])
def test_foreign_files_are_refused_and_untouched(foreign: str, spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for built_before in (False, True):
        if built_before:
            shutil.rmtree(out)
            build(spec, out)
        (out / foreign).parent.mkdir(parents=True, exist_ok=True)
        if foreign == "link":
            (out / foreign).symlink_to(spec)
        else:
            (out / foreign).write_text("mine", encoding="utf-8")
        before = tree(tmp_path)
        result = n3c("build", spec, "--target", "torch", "-o", out, "--json")
        assert (result.code, result.codes) == (6, ["E0611"])
        assert not built_before or foreign in result.err
        assert tree(tmp_path) == before


def test_what_python_leaves_beside_the_code_is_not_foreign(spec: Path, tmp_path: Path) -> None:
    build(spec, tmp_path / "out")
    written = tree(tmp_path / "out/torch")
    (tmp_path / "out/torch/small/__pycache__").mkdir()
    (tmp_path / "out/torch/small/__pycache__/model.cpython-311.pyc").write_bytes(b"x")
    assert n3c("build", spec, "--target", "onnx", "-o", tmp_path / "out").code == 0
    assert tree(tmp_path / "out/torch") == written
    assert set(written) >= WRITTEN


def test_edited_files_are_refused_and_untouched(spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(spec, out)
    edited = [out / "torch" / "small" / "model.py", out / "spec.toml"]
    for path in edited:
        path.write_text("# mine\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
        before = tree(tmp_path)
        for source in (spec, out / "spec.toml"):
            result = n3c("build", source, "--target", "onnx", "-o", out, "--json")
            assert (result.code, result.codes) == (6, ["E0611"])
            assert path.relative_to(out).as_posix() in result.err
            assert "edited" in result.err and "delete" in result.err
        assert tree(tmp_path) == before
        path.unlink()
        build(spec, out)
        assert "# mine" not in path.read_text(encoding="utf-8")


def test_a_link_in_place_of_a_built_file_is_not_lost(spec: Path, tmp_path: Path) -> None:
    build(spec, tmp_path / "out")
    model = tmp_path / "out" / "torch" / "small" / "model.py"
    model.rename(tmp_path / "mine.py")
    model.symlink_to(tmp_path / "mine.py")  # the same bytes, but it is the link that would go
    assert n3c("build", spec, "--target", "torch", "-o", tmp_path / "out", "--json").codes == ["E0611"]
    assert model.is_symlink()


def test_damaged_graphs_are_built_again(spec: Path, tmp_path: Path) -> None:
    assert n3c("build", spec, "--target", "onnx", "-o", tmp_path / "out").code == 0
    graph = tmp_path / "out" / "onnx" / "decode.onnx"
    built = graph.read_bytes()
    graph.write_bytes(built[:-1])
    assert n3c("build", spec, "--target", "onnx", "-o", tmp_path / "out").code == 0
    assert graph.read_bytes() == built


@pytest.mark.parametrize(("name", "code"), [("out/notes.txt", "E0611"), ("out", "E0610")])
def test_a_file_put_there_during_the_build_is_not_lost(name: str, code: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(N3CError) as caught, outdir.replacing(out, silent) as folder:
        (folder / "made").touch()
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine", encoding="utf-8")
    assert caught.value.diagnostics[0].code == code
    assert tree(tmp_path) == {name: b"mine"}


def test_a_link_in_the_place_of_the_working_folder_is_not_followed(spec: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / ".out.n3c-new").symlink_to(tmp_path / "mine")
    build(spec, tmp_path / "out")
    assert names(tmp_path) == ["mine", "out", "small.toml"]
    assert names(tmp_path / "mine") == ["notes.txt"]


@pytest.mark.parametrize("out", ["weights/out", "weights/a/b", "link/out", "weights"])
def test_nothing_is_written_inside_the_checkpoint(out: str, spec: Path, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "link").symlink_to("weights")
    for weights in ("weights", "link"):
        given = ("--target", "torch", "--weights", tmp_path / weights, "-o", tmp_path / out, "--json")
        result = n3c("build", spec, *given)
        assert (result.code, result.codes) == (6, ["E0612"])
        assert "which is read and never written to" in result.data["diagnostics"][0]["message"]
    assert not any((tmp_path / "weights").iterdir())


def test_standard_output_is_no_folder(spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/config.json").write_text("{}")
    for command in (("build", spec, "--target", "torch"), ("quantize", spec, "--weights", "weights")):
        result = n3c(*command, "-o", "-", "--json")
        assert (result.code, result.codes) == (6, ["E0612"])
    assert not (tmp_path / "-").exists()


def test_a_link_to_the_output_stays_a_link(spec: Path, tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big")
    build(spec, tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "big") == ["manifest.json", "spec.toml", "torch"]


def test_single_files_replace_no_device_and_no_link(spec: Path, tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old", encoding="utf-8")
    (tmp_path / "link.json").symlink_to("real.json")
    assert n3c("export-config", spec, "-o", tmp_path / "link.json", "--force").code == 0
    assert (tmp_path / "link.json").is_symlink()
    assert "nemotron_h" in (tmp_path / "real.json").read_text(encoding="utf-8")
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text(encoding="utf-8")))
    reader.start()
    assert n3c("export-config", spec, "-o", tmp_path / "pipe").code == 0
    reader.join(30)
    assert read == [(tmp_path / "real.json").read_text(encoding="utf-8")]
    assert (tmp_path / "pipe").is_fifo()
    assert names(tmp_path) == ["link.json", "pipe", "real.json", "small.toml"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_error_while_building_leaves_the_old_output(error: type[BaseException], tmp_path: Path) -> None:
    with outdir.replacing(tmp_path / "x/y/out", silent) as folder:
        (folder / "manifest.json").write_text(json.dumps(MANIFEST_OF_NOTHING | {"files": []}), encoding="utf-8")
    before = tree(tmp_path)
    for out in (tmp_path / "x/y/out", tmp_path / "x/z/out"):
        with pytest.raises((error, N3CError)), outdir.replacing(out, silent) as folder:
            (folder / "half").write_text("written", encoding="utf-8")
            raise error
    assert tree(tmp_path) == before
    assert names(tmp_path / "x") == ["y"]


def test_a_failing_rename_leaves_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith("n3c-new"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(KeyboardInterrupt), outdir.replacing(out, silent) as folder:
        (folder / "made").touch()
    assert names(tmp_path) == ["out"]
    assert not names(out)


def test_a_full_disk_is_told_and_leaves_nothing(spec: Path, tmp_path: Path) -> None:
    def small_files() -> None:  # writing on gives EFBIG, as a full disk gives ENOSPC
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    build(spec, tmp_path / "old")
    before = tree(tmp_path)
    for out in ("old", "new"):
        result = n3c_program("build", spec, "--target", "torch", "-o", tmp_path / out, "--json", before=small_files)
        assert (result.code, result.codes) == (6, ["E0613"])
    assert tree(tmp_path) == before


SLOW_BUILD = """
import sys, time
from n3c.compiler.cli.main import main
from n3c.compiler.building import driver

def slow(job, *flops):
    folder = job.folder / "torch"
    folder.mkdir()
    (folder / "half.py").write_text("half")
    job.progress.phase("half")
    time.sleep(60)

driver._emit_torch = slow
sys.exit(main(sys.argv[1:]))
"""
"""A build that stops half-way until it is killed."""


@pytest.fixture
def half_way(spec: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a build of tmp_path/out that hangs half-way, over an output that is there already."""
    build(spec, tmp_path / "out")
    command = [sys.executable, "-c", SLOW_BUILD, "build", str(spec), "--target", "torch", "-o", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=default_signals) as process:
        assert process.stderr is not None
        while "half" not in process.stderr.readline():
            assert process.poll() is None
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_build_leaves_the_old_output_and_nothing_else(
    number: signal.Signals, half_way: subprocess.Popen[str], tmp_path: Path
) -> None:
    before = {name: content for name, content in tree(tmp_path).items() if ".out.n3c-" not in name}
    half_way.send_signal(number)
    _, err = half_way.communicate(timeout=30)
    assert half_way.returncode == 1
    assert err.strip() == "error[E0702]: interrupted"
    assert tree(tmp_path) == before


def test_a_killed_build_leaves_the_old_output_and_the_next_one_clears_up(
    half_way: subprocess.Popen[str], spec: Path, tmp_path: Path
) -> None:
    half_way.kill()
    half_way.wait()
    assert names(tmp_path) == [".out.n3c-lock", ".out.n3c-new", "out", "small.toml"]
    assert names(tmp_path / "out") == ["manifest.json", "spec.toml", "torch"]
    build(spec, tmp_path / "out")
    assert names(tmp_path) == ["out", "small.toml"]
    assert set(tree(tmp_path / "out/torch")) >= WRITTEN


def test_a_build_killed_between_its_renames_loses_nothing(spec: Path, tmp_path: Path) -> None:
    build(spec, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.n3c-old")
    assert n3c("build", spec, "--target", "onnx", "-o", tmp_path / "out").code == 0
    assert names(tmp_path) == ["out", "small.toml"]
    assert names(tmp_path / "out") == ["manifest.json", "onnx", "spec.toml", "torch"]


def test_builds_of_one_output_wait_for_each_other(spec: Path, tmp_path: Path) -> None:
    inside, waited = threading.Event(), threading.Event()

    def first() -> None:
        with outdir.replacing(tmp_path / "out", silent) as folder:
            (folder / "first").touch()
            inside.set()
            waited.wait(30)
            listed = {"path": "first", "bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
            manifest = MANIFEST_OF_NOTHING | {"files": [listed]}
            (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(30)
    with outdir.replacing(tmp_path / "out", lambda _: waited.set()) as folder:
        assert waited.is_set()
        assert names(tmp_path / "out") == ["first", "manifest.json"]
        (folder / "second").touch()
    thread.join()
    assert names(tmp_path) == ["out", "small.toml"]
    assert names(tmp_path / "out") == ["second"]


def test_two_targets_built_at_once_are_both_there(spec: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from n3c.compiler.cli.main import main; main()", "build", str(spec)]
    running = [
        subprocess.Popen([*command, "--target", target, "-o", str(tmp_path / "out")], stderr=subprocess.DEVNULL)
        for target in ("torch", "onnx")
    ]
    assert [process.wait(60) for process in running] == [0, 0]
    assert names(tmp_path) == ["out", "small.toml"]
    assert names(tmp_path / "out") == ["manifest.json", "onnx", "spec.toml", "torch"]


def test_files_are_verified_against_the_manifest(spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert n3c("build", spec, "--target", "onnx", "-o", out).code == 0
    manifest = read_manifest(out)
    assert manifest is not None and verify_files(out, manifest) == []
    content = (out / "onnx/decode.onnx").read_bytes()
    for changed, reason in [
        (content[:-1], f"{len(content) - 1} bytes instead of {len(content)}"),
        (b"x" + content[1:], "another SHA-256"),
    ]:
        (out / "onnx/decode.onnx").write_bytes(changed)
        (fault,) = verify_files(out, manifest)
        assert (fault.code, fault.message) == ("E0640", f"`onnx/decode.onnx` is not what was built: {reason}")
    (out / "onnx/decode.onnx").write_bytes(content)
    (out / "spec.toml").unlink()
    assert [f.message for f in verify_files(out, manifest)] == [
        "`spec.toml` is not what was built: no such file in the output"
    ]


@pytest.mark.parametrize("path", ["/dev/zero", "../secret", "a\0b", "onnx", "x" * 300])
def test_a_manifest_that_names_what_is_no_file_of_the_build(path: str, tmp_path: Path) -> None:
    (tmp_path / "out" / "onnx").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"")
    manifest = {"files": [{"path": path, "bytes": 0, "sha256": ""}]}
    assert [f.code for f in verify_files(tmp_path / "out", manifest)] == ["E0640"]
