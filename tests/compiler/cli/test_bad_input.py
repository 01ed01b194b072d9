"""Bad input: the documented exit code, a located message, no traceback, nothing written and nothing lost."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

from n3c.specs.load import load_spec
from support.checkpoints import write_checkpoint
from support.command import n3c, tree, write_small
from support.specs import QUANTIZED, SPECS

FIELDS = ["file", "line", "column", "code", "severity", "message", "help"]
"""The keys of a diagnostic, which the design fixes."""
CODE = """'"]; import os'"""
RULE = '[[quantization.rules]]\nformat = "bf16"\n'
NVFP4 = '[quantization]\nformat = "nvfp4"\nblock = [16, 16]\n'

# name → (changes to SMALL, tables behind it, code of the first error, its line or None for any)
BAD_SPECS: dict[str, tuple[list[tuple[str, str]], str, str, int | None]] = {
    "toml": ([("hidden_size = 64", "hidden_size = = 64")], "", "E0101", 4),
    "unknown key": ([("latent_size = 32", "latent_dim = 32")], "", "E0102", 24),
    "missing key": ([("vocab_size = 97\n", "")], "", "E0104", 3),
    "wrong type": ([("hidden_size = 64", 'hidden_size = "64"')], "", "E0105", 4),
    "zero": ([("hidden_size = 64", "hidden_size = 0")], "", "E0106", 4),
    "negative": ([("num_experts = 8", "num_experts = -8")], "", "E0106", None),
    "absurd": ([("hidden_size = 64", "hidden_size = 99999999999999999999")], "", "E0106", 4),
    "stray symbol": ([("MEM*E-ME", "MEMXE-ME")], "", "E0108", 7),
    "exploding pattern": ([("MEM*E-ME", "((((M)999)999)999)999")], "", "E0108", 7),
    "too many experts chosen": ([("top_k = 3", "top_k = 9")], "", "E0206", None),
    "rule without a weight": ([], f"{NVFP4}{RULE}roles = ['mlp.up']\nlayers = 'first 1'\n", "E0401", 40),
    "indivisible K": ([("latent_size = 32", "latent_size = 40")], NVFP4.replace("[16, 16]", "[1, 16]"), "E0404", 38),
    "code in the name": ([('name = "small"', f"name = {CODE}")], "", "E0111", 2),
    "code in a role": ([], f"{NVFP4}{RULE}roles = [{CODE}]\n", "E0109", 42),
    "code in a layer": ([], f"{NVFP4}{RULE}roles = ['*']\nlayers = {CODE}\n", "E0110", 43),
    "code in a module": ([], f"{NVFP4}{RULE}modules = [{CODE}]\n", "E0111", 42),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SPECS)
def test_bad_specs(case: str, tmp_path: Path) -> None:
    changes, extra, code, line = BAD_SPECS[case]
    spec = write_small(tmp_path, *changes, extra=extra)
    before = tree(tmp_path)
    for command in (["check", spec], ["build", spec, "--target", "torch", "-o", tmp_path / "out"], ["inspect", spec]):
        result = n3c(*command, "--json")
        assert result.code == 3
        assert result.data["ok"] is False
        first = result.data["diagnostics"][0]
        assert list(first) == FIELDS
        assert (first["file"], first["code"], first["severity"]) == (str(spec), code, "error")
        assert first["line"] == (line or first["line"]) > 0
        assert f"{spec}:{first['line']}:{first['column']}: error[{code}]: " in result.err
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("override", "code", "exit_code"),
    [
        ("moe.top_k", "E0701", 2),
        ("=3", "E0701", 2),
        ("moe..top_k=3", "E0701", 2),
        ("moe.top_q=3", "E0102", 3),
        ("model.hidden_size.x=3", "E0114", 3),
        ("quantization.rules.7.format=bf16", "E0114", 3),
        ("quantization.rules.x.format=bf16", "E0114", 3),
        ("quantization.rules.²0.format=bf16", "E0114", 3),
        ("quantization.rules.9999999999.format=bf16", "E0114", 3),
        ("moe.top_k=many", "E0105", 3),
        ("moe.top_k=9", "E0206", 3),
        ('name="]; import os', "E0111", 3),
        ("model.pattern=ME?", "E0108", 3),
    ],
)
def test_bad_overrides(override: str, code: str, exit_code: int, tmp_path: Path) -> None:
    result = n3c("check", write_small(tmp_path, extra=QUANTIZED), "--set", override, "--json")
    assert (result.code, result.codes[0]) == (exit_code, code)
    assert result.data["diagnostics"][0]["file"] == "--set"


def test_unreadable_specs(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.toml").write_bytes(b'schema = 1\nname = "caf\xe9"\n')
    (tmp_path / "binary.toml").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "empty.toml").touch()
    (tmp_path / "loop.toml").symlink_to(tmp_path / "loop.toml")
    expected = {
        "missing.toml": (6, "E0601"),
        "folder": (6, "E0601"),
        "loop.toml": (6, "E0601"),
        "empty.toml/below.toml": (6, "E0601"),
        "x" * 300: (6, "E0601"),
        "latin.toml": (3, "E0100"),
        "binary.toml": (3, "E0100"),
        "empty.toml": (3, "E0104"),
    }
    for name, (exit_code, code) in expected.items():
        result = n3c("check", tmp_path / name, "--json")
        assert (result.code, result.codes[0]) == (exit_code, code), name
        assert result.data["diagnostics"][0]["file"] == str(tmp_path / name)
    assert n3c("check", tmp_path / "latin.toml").err.startswith(
        f"{tmp_path / 'latin.toml'}:2:12: error[E0100]: not UTF-8"
    )
    for name in ("missing.toml", "x" * 300, "empty.toml/below.toml"):
        for command in ("inspect", "import", "export-config"):
            assert n3c(command, tmp_path / name, "--json").code == 6, (command, name)


@pytest.mark.parametrize("before", ["", "schema = 1\n", "a = 1\na = 2\n"])
@pytest.mark.parametrize(
    "end",
    ["[x", "[[x", "[x.", "[", 'a = "', "a = '''", "a = [", "a = {", 'b = "\\u12', 'b = "\\uzzzz"', "b", "b =", '"b'],
)
def test_a_text_that_ends_early(before: str, end: str, tmp_path: Path) -> None:
    for newline in ("", "\n"):
        (tmp_path / "cut.toml").write_text(before + end + newline, encoding="utf-8")
        result = n3c("check", tmp_path / "cut.toml", "--json")
        assert (result.code, len(result.codes)) == (3, 1)
        assert result.codes[0] == ("E0103" if before.startswith("a = 1") else "E0101")
    with_spec = write_small(tmp_path, extra=f"{before}[mamba]\n{end}")
    assert n3c("check", with_spec, "--json").code == 3


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ("[quantization]\n" + "[[quantization.rules]]\n" * 600_000, "E0100"),
        ("[quantization]\n" + "[[quantization.rules]]\n" * 100_000, "E0106"),
        (f"{NVFP4}rules = [{'{},' * 5000}]\n", "E0106"),
        ("[" + "a." * 20_000 + "a]\n", "E0101"),
        ("'a'. " * 20_000 + "a = 1\n", "E0101"),
        ("a = " + "[" * 100_000 + "\n", "E0101"),
    ],
    ids=["bytes", "tables", "entries", "header", "key", "brackets"],
)
def test_texts_that_would_take_long(extra: str, code: str, tmp_path: Path) -> None:
    result = n3c("check", write_small(tmp_path, extra=extra), "--json")
    assert (result.code, result.codes[0]) == (3, code)
    assert result.data["diagnostics"][0]["file"] == str(tmp_path / "small.toml")


def test_loops_of_links(tmp_path: Path) -> None:
    spec, loop = write_small(tmp_path), tmp_path / "loop"
    loop.symlink_to("loop")
    write_checkpoint(tmp_path / "weights", load_spec(spec)[0])
    work = ("quantize", spec, "--weights", tmp_path / "weights")
    for arguments, code in [
        (("check", loop), "E0601"),
        (("import", loop), "E0601"),
        (("build", spec, "--target", "torch", "-o", loop), "E0612"),
        (("build", spec, "--target", "torch", "-o", loop / "below"), "E0612"),
        (("quantize", spec, "--weights", loop, "-o", tmp_path / "out"), "E0601"),
        ((*work, "-o", loop), "E0612"),
        ((*work, "-o", loop / "below"), "E0612"),
        ((*work, "-o", tmp_path / "out", "--activation-scales", loop), "E0601"),
        ((*work, "-o", tmp_path / "out", "--calibration", loop), "E0601"),
    ]:
        result = n3c(*arguments, "--json")
        assert (result.code, result.codes[0]) == (6, code), arguments
        assert result.data["diagnostics"][0]["file"], arguments
    assert not (tmp_path / "out").exists()


def test_files_that_never_end(tmp_path: Path) -> None:
    spec = write_small(tmp_path)
    write_checkpoint(tmp_path / "weights", load_spec(spec)[0])
    work = ("quantize", spec, "--weights", tmp_path / "weights", "-o", tmp_path / "out")
    for arguments, code, exit_code in [
        (("check", "/dev/zero"), "E0100", 3),
        (("import", "/dev/zero"), "E0100", 3),
        ((*work, "--calibration", "/dev/zero"), "E0630", 6),
        ((*work, "--activation-scales", "/dev/zero"), "E0100", 3),
    ]:
        result = n3c(*arguments, "--json")
        assert (result.code, result.codes[0]) == (exit_code, code), arguments


def test_bad_targets(tmp_path: Path) -> None:
    spec = write_small(tmp_path, extra=QUANTIZED)
    for arguments, exit_code, code in [
        (["check", spec, "--target", "jax"], 2, "E0701"),
        (["check", spec, "--sm", "many"], 2, "E0701"),
        (["check", spec, "--sm", "90210"], 4, "E0502"),
        (["check", spec, "--sm", "80,,86"], 2, "E0701"),
        (["check", spec, "--sm", ""], 2, "E0701"),
        (["check", spec, "--sm", "-80"], 2, "E0701"),
        (["check", spec, "--sm", "90"], 4, "E0502"),
        (["check", spec, "--sm", "80,75"], 4, "E0503"),
        (["build", spec, "--target", "jax"], 2, "E0701"),
        (["build", spec], 2, "E0701"),
        (["build", spec, "--target", "trt", "--sm", "90210"], 4, "E0502"),
        (["build", spec, "--target", "trt", "--sm", "75"], 4, "E0503"),
        (["build", spec, "--target", "trt", "--trt", "full", "--sm", "1"], 4, "E0502"),
        (["build", spec, "--target", "trt", "--stages", "9"], 2, "E0704"),
        (["build", SPECS / "tiny-moe.toml", "--target", "onnx", "--entry", "draft"], 2, "E0705"),
        (["build", spec, "--target", "onnx", "--entry", "train"], 2, "E0701"),
        (["build", spec, "--target", "onnx", "--weights-mode", "embedded"], 2, "E0706"),
        (["build", spec, "--target", "torch", "--print-ir-after", "dream"], 2, "E0701"),
    ]:  # fmt: skip
        if arguments[0] == "build":
            arguments += ["-o", tmp_path / "out"]
        result = n3c(*arguments, "--json")
        assert (result.code, result.codes[0]) == (exit_code, code), arguments
    assert not (tmp_path / "out").exists()


def test_what_a_target_lacks_is_told_where_the_spec_asks_for_it(tmp_path: Path) -> None:
    spec = write_small(tmp_path, ('kv_cache_dtype = "fp32"', 'kv_cache_dtype = "fp8"'), extra=QUANTIZED)
    lines = spec.read_text(encoding="utf-8").splitlines()

    def places(*more: str) -> list[tuple[str, str]]:
        result = n3c("check", spec, "--json", *more)
        assert result.code == (4 if result.data["diagnostics"] else 0)
        return [(d["code"], lines[d["line"] - 1]) for d in result.data["diagnostics"]]

    cache = 'kv_cache_dtype = "fp8"'
    assert places("--target", "torch") == []
    assert places() == places("--target", "onnx") == places("--sm", "89") == []
    assert places("--sm", "80,86") == [("E0508", cache)] * 2
    build = ("build", spec, "-o", tmp_path / "out", "--json")
    assert n3c(*build, "--target", "trt", "--sm", "80").codes == ["E0508"]
    widths = ("num_kv_heads = 2\nhead_dim = 16", "num_kv_heads = 2\nhead_dim = 13")
    odd = write_small(tmp_path, ('kv_cache_dtype = "fp32"', cache), widths)
    assert n3c("build", odd, "-o", tmp_path / "out", "--json", "--target", "onnx").codes == ["E0508"]
    assert not (tmp_path / "out").exists()


def test_a_missing_tensorrt_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    spec = write_small(tmp_path)
    result = n3c("build", spec, "--target", "trt", "--trt", "full", "-o", tmp_path / "out", "--json")
    assert (result.code, result.codes) == (4, ["E0501"])
    assert "emit" not in result.err
    assert list(tmp_path.iterdir()) == [spec]


def test_a_missing_package_is_the_machines_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "n3c.backends.torch.emit", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)  # as if it were not installed
    result = n3c("build", write_small(tmp_path), "--target", "torch", "-o", tmp_path / "out", "--json")
    assert (result.code, result.codes) == (4, ["E0509"])
    assert not (tmp_path / "out").exists()


@contextlib.contextmanager
def unprivileged(folder: Path) -> Generator[None]:
    """Act as a user who may read `folder` but not write to it, as tests may run as root, who may do anything."""
    for path in folder.rglob("*"):  # whatever the umask says
        path.chmod(0o755 if path.is_dir() else 0o644)
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    spec = write_small(tmp_path)
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    before = tree(tmp_path)
    for out, code in [
        (tmp_path / "file", "E0610"),
        (tmp_path / "file" / "below", "E0612"),
        (tmp_path / ("x" * 300), "E0612"),
        (Path("/proc/n3c-out"), "E0612"),
        (Path("/"), "E0611"),
        (Path("/proc"), "E0611"),
    ]:
        result = n3c("build", spec, "--target", "torch", "-o", out, "--json")
        assert (result.code, result.codes) == (6, [code]), out
        assert result.data["diagnostics"][0]["file"] == str(out)
    assert tree(tmp_path) == before


def test_a_folder_without_permission() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        spec = write_small(folder)
        # First where it works, which loads every module: the sources may be out of that user's reach.
        assert n3c("build", spec, "--target", "torch", "-o", folder / "first").code == 0
        assert n3c("import", folder / "first" / "torch" / "config.json", "-o", folder / "first.toml").code == 0
        assert n3c("export-config", spec, "-o", folder / "first.json").code == 0
        before = tree(folder)
        with unprivileged(folder):
            build = n3c("build", spec, "--target", "torch", "-o", folder / "out", "--json")
            below = n3c("build", spec, "--target", "torch", "-o", folder / "a" / "b", "--json")
            again = n3c("build", spec, "--target", "torch", "-o", folder / "first", "--json")
            imported = n3c("import", folder / "first" / "torch" / "config.json", "-o", folder / "x.toml", "--json")
            exported = n3c("export-config", spec, "-o", folder / "config.json", "--json")
        assert [(r.code, r.codes) for r in (build, below, again)] == [(6, ["E0612"])] * 3
        assert [(r.code, r.codes[-1]) for r in (imported, exported)] == [(6, "E0602")] * 2
        assert tree(folder) == before


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "E0301"),
        (b"[1]", "E0301"),
        (b'{"model_type": "nemotron_h", }', "E0301"),
        (b'{"model_type": "caf\xe9"}', "E0100"),
        (b'{"model_type": "llama"}', "E0302"),
        (b'{"model_type": "nemotron_h", "hybrid_override_pattern": "M\\"]; import os"}', "E0108"),
        (b'{"a": 1, "a": 2}', "E0303"),
        (b"[" * 99999, "E0301"),
    ],
)
def test_bad_configs(content: bytes, code: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    before = tree(tmp_path)
    for command in (
        ["import", tmp_path],
        ["import", tmp_path / "config.json", "-o", tmp_path / "spec.toml"],
        ["inspect", tmp_path],
    ):
        result = n3c(*command, "--json")
        assert (result.code, result.codes[0]) == (3, code)
        assert result.data["diagnostics"][0]["file"] == str(tmp_path / "config.json")
        assert result.data["diagnostics"][0]["line"] == 1
    assert tree(tmp_path) == before


def test_the_name_of_a_folder_never_becomes_code(tmp_path: Path) -> None:
    folder = tmp_path / '"]; import os'
    folder.mkdir()
    assert n3c("export-config", write_small(tmp_path), "-o", folder / "config.json").code == 0
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["n3c"]  # which holds the spec's own name
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert n3c("import", folder, "-o", tmp_path / "again.toml").code == 0
    assert n3c("build", tmp_path / "again.toml", "--target", "torch", "-o", tmp_path / "out").code == 0
    assert 'name = "import-os"' in (tmp_path / "out/spec.toml").read_text(encoding="utf-8")
    assert '"]; import' not in (tmp_path / "out/torch/import_os/model.py").read_text(encoding="utf-8")


def test_bad_builds_to_inspect(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    for text in (
        "",
        "{",
        "[]",
        '{"spec": {}}',
        '{"spec": {"name": 1, "sha256": 2}, "files": [], "ledger": []}',
        "[" * 99999,
    ):
        manifest.write_text(text, encoding="utf-8")
        result = n3c("inspect", tmp_path, "--json")
        assert (result.code, result.codes) == (6, ["E0614"])
        assert result.data["diagnostics"][0]["file"] == str(manifest)
    assert n3c("inspect", tmp_path, "--set", "moe.top_k=1").code == 2


def test_bad_figures_to_inspect(tmp_path: Path) -> None:
    for option in ("--context", "--batch"):
        for value in ("0", "-1", "many", "1.5"):
            result = n3c("inspect", write_small(tmp_path), option, value, "--json")
            assert (result.code, result.codes) == (2, ["E0701"])


def test_every_shipped_spec_rejects_a_missing_table(tmp_path: Path) -> None:
    for shipped in sorted(SPECS.glob("*.toml")):
        text = shipped.read_text(encoding="utf-8").replace("[model]", "[modle]")
        (tmp_path / "bad.toml").write_text(text, encoding="utf-8")
        result = n3c("check", tmp_path / "bad.toml", "--json")
        assert result.code == 3
        assert json.dumps(result.data).count("did you mean `model`?") == 1
