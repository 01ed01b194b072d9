"""The cache of plans: by content, bounded, whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir
import pytest

from n3c.backends.caches import cache_folder
from n3c.backends.locks import locked
from n3c.backends.onnx.emit import emit_entry
from n3c.backends.trt.build import PlanResult
from n3c.backends.trt.plan_cache import PlanCache, plan_key
from n3c.passes.serving import serve
from support.specs import small_spec


def result(folder: Path, content: bytes = b"plan" * 100) -> PlanResult:
    path = folder / "x.plan"
    path.write_bytes(content)
    return PlanResult(path, len(content), "Layers:\nName: k\n", 512, 1.0, 2.0, 3)


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    cache, built = PlanCache(tmp_path / "a" / "cache"), result(tmp_path)
    assert cache.take("key", tmp_path / "y.plan") is None
    cache.keep("key", built)
    taken = PlanCache(tmp_path / "a" / "cache").take("key", tmp_path / "y.plan")
    assert taken == PlanResult(tmp_path / "y.plan", built.bytes, built.listing, built.scratch_bytes)
    assert (tmp_path / "y.plan").read_bytes() == built.path.read_bytes()
    assert entries(tmp_path / "a" / "cache") == {"key"}


@pytest.mark.parametrize("place", [0, 40, 70, 120, -1])
def test_a_damaged_entry_is_none_and_goes(place: int, tmp_path: Path) -> None:
    cache = PlanCache(tmp_path / "cache")
    cache.keep("key", result(tmp_path))
    entry = tmp_path / "cache" / "key"
    content = bytearray(entry.read_bytes())
    content[place] ^= 1
    for damaged in (bytes(content), bytes(content[:place]), b""):
        entry.write_bytes(damaged)
        assert cache.take("key", tmp_path / "y.plan") is None
        assert not entry.exists() and not (tmp_path / "y.plan").exists()


def test_what_was_not_used_for_longest_goes(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache = PlanCache(folder, 2000)  # three entries of 551 bytes
    for i, key in enumerate("abc"):
        cache.keep(key, result(tmp_path))
        os.utime(folder / key, (1000 + i, 1000 + i))
    assert cache.take("a", tmp_path / "y.plan") is not None
    cache.keep("d", result(tmp_path))
    assert entries(folder) == {"a", "c", "d"}
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2000
    cache.keep("large", result(tmp_path, bytes(3000)))
    assert entries(folder) == {"a", "c", "d"}


def test_what_a_killed_process_left_goes_after_a_day(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache = PlanCache(folder)
    for name, time in ((".old.1", 1000), (".new.2", None)):
        (folder / name).touch()
        if time is not None:
            os.utime(folder / name, (time, time))
    cache.keep("key", result(tmp_path))
    assert entries(folder) == {"key", ".new.2"}


def test_another_process_that_makes_space_is_left_to_it(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path / "cache", 600)
    with locked(tmp_path / "cache" / ".lock"):
        cache.keep("a", result(tmp_path))
        cache.keep("b", result(tmp_path))
    assert entries(tmp_path / "cache") == {"a", "b"}


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        PlanCache(tmp_path / "file" / "cache")


def test_the_key_is_the_content() -> None:
    base = plan_key(b"graph", "rtx", "1", (80, 120), {"x": (1, 2, 3)})
    assert base == plan_key(b"graph", "rtx", "1", [80, 120], {"x": (1, 2, 3)})
    others = {
        plan_key(b"graphs", "rtx", "1", (80, 120), {"x": (1, 2, 3)}),
        plan_key(b"graph", "full", "1", (80, 120), {"x": (1, 2, 3)}),
        plan_key(b"graph", "rtx", "2", (80, 120), {"x": (1, 2, 3)}),
        plan_key(b"graph", "rtx", "1", (120,), {"x": (1, 2, 3)}),
        plan_key(b"graph", "rtx", "1", (80, 120), {"x": (1, 2, 4)}),
    }
    assert len(others | {base}) == 6


def test_only_names_that_leave_no_trace_are_left_out() -> None:
    program = serve(small_spec()).program
    entry = emit_entry(program, "decode", batch=1)
    content = entry.to_nameless_bytes()
    entry.model.graph.name = entry.model.producer_name = "another"
    assert entry.to_nameless_bytes() == content != entry.to_bytes()
    node = next(iter(entry.model.graph))
    node.name = "another"
    assert entry.to_nameless_bytes() != content
    assert onnx_ir.from_proto(onnx_ir.to_proto(entry.model)).graph.name == "another"  # the model itself keeps it


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("N3C_CACHE_DIR", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("N3C_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    for named, folder in (
        ("/caches", "/caches/n3c"),
        ("relative", f"{tmp_path}/.cache/n3c"),
        ("", f"{tmp_path}/.cache/n3c"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", named)
        assert cache_folder() == Path(folder)
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_folder() == Path(f"{tmp_path}/Library/Caches/n3c")
    monkeypatch.setattr("sys.platform", "win32")
    for named, folder in ((f"{tmp_path}/local", f"{tmp_path}/local/n3c"), ("", f"{tmp_path}/AppData/Local/n3c")):
        monkeypatch.setenv("LOCALAPPDATA", named)
        assert cache_folder() == Path(folder)
    monkeypatch.delenv("LOCALAPPDATA")
    assert cache_folder() == tmp_path / "AppData/Local/n3c"

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(OSError, match="no home"):
        cache_folder()
