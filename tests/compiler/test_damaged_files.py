"""Every file that n3c reads, damaged in many ways: a located diagnostic with a code of its own, or it is read."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models

from n3c.backends.onnx.bindings import read_bindings
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.inventory import inventory
from n3c.backends.trt.plan_file import Sidecar, read_sidecar, sidecar_path, write_sidecar
from n3c.compiler.quantization.calibration.activation_scales import load_scales, resolve, save_scales
from n3c.compiler.quantization.units import find_linears
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.runtime.build_folder import open_build
from n3c.runtime.generation.runner import eos_token_ids
from n3c.runtime.generation.tokenizer import find_tokenizer
from n3c.specs.load import load_spec
from support.checkpoints import write_checkpoint
from support.command import n3c, write_small
from support.mutations import altered, damaged
from support.specs import QUANTIZED

COUNT = 40
"""Damaged texts of each way and file."""


@dataclass(frozen=True)
class Read:
    """A file, and what reads it."""

    path: Path
    read: Callable[[], object]
    count: int = COUNT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spec, a checkpoint, a quantized one, and a build."""
    folder = tmp_path_factory.mktemp("damaged")
    spec = write_small(folder, extra=QUANTIZED)
    write_checkpoint(folder / "weights", load_spec(spec)[0])
    (folder / "weights" / "generation_config.json").write_text('{"eos_token_id": [2, 3]}', encoding="utf-8")
    tokenizer = Tokenizer(tokenizer_models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "weights" / "tokenizer.json"))
    assert n3c("build", spec, "--target", "onnx", "--entry", "decode", "-o", folder / "out").code == 0
    plan = folder / "decode.b1.plan"
    plan.write_bytes(b"plan")
    sha256 = hashlib.sha256(b"plan").hexdigest()
    write_sidecar(plan, Sidecar("decode.b1", 0, "rtx", "1.7.1.116", (86, 120), 4, sha256, sha256, "bound"))
    entries = {f"{linear.module}.input_amax": 1.5 for linear in find_linears(load_spec(spec)[0])}
    for suffix in ("json", "safetensors"):
        save_scales(folder / f"scales.{suffix}", entries)
    assert n3c("quantize", spec, "--weights", folder / "weights", "-o", folder / "made").code == 0
    return folder


def _spec(folder: Path) -> Read:
    return Read(folder / "small.toml", lambda: load_spec(folder / "small.toml"), 2 * COUNT)


def _command(*arguments: object) -> None:
    """Run a command; its error is raised, with the exit code that it had."""
    result = n3c(*arguments, "--json")
    if result.code:
        found = [Diagnostic(d["code"], d["message"], Span(d["file"] or "")) for d in result.data["diagnostics"]]
        raise N3CError(found, ExitCode(result.code))


def _config(folder: Path) -> Read:
    return Read(folder / "made/config.json", lambda: _command("inspect", folder / "made"))


def _hf_quant_config(folder: Path) -> Read:
    return Read(folder / "made/hf_quant_config.json", lambda: _command("import", folder / "made"))


def _source_config(folder: Path) -> Read:
    def read() -> None:
        _command("quantize", folder / "small.toml", "--weights", folder / "weights", "-o", folder / "fresh")
        shutil.rmtree(folder / "fresh")

    return Read(folder / "weights/config.json", read, COUNT // 2)


def _all_tensors(directory: Path) -> None:
    checkpoint = Checkpoint(directory)
    inventory(checkpoint)
    for name in checkpoint:
        checkpoint.read(name)


def _index(folder: Path) -> Read:
    return Read(folder / "weights/model.safetensors.index.json", lambda: _all_tensors(folder / "weights"))


def _ledger(folder: Path) -> Read:
    again = ("quantize", folder / "small.toml", "--weights", folder / "weights", "-o", folder / "made", "--resume")
    return Read(folder / "made/n3c_ledger.json", lambda: _command(*again), COUNT // 2)


def _manifest(folder: Path) -> Read:
    def read() -> None:
        _command("inspect", folder / "out")
        open_build(folder / "out")

    return Read(folder / "out/manifest.json", read)


def _bindings(folder: Path) -> Read:
    path = folder / "out/onnx/bindings.json"
    return Read(path, lambda: read_bindings(path), 5 * COUNT)


def _sidecar(folder: Path) -> Read:
    plan = folder / "decode.b1.plan"
    return Read(sidecar_path(plan), lambda: read_sidecar(plan), 5 * COUNT)


def _tokenizer(folder: Path) -> Read:
    def read() -> None:
        tokenizer = find_tokenizer([folder / "weights"], 97)
        assert tokenizer is not None
        tokenizer.stream().feed(tokenizer.encode("ab"))

    return Read(folder / "weights/tokenizer.json", read, 5 * COUNT)


def _scales(folder: Path, suffix: str) -> Read:
    spec, path = load_spec(folder / "small.toml")[0], folder / f"scales.{suffix}"
    return Read(path, lambda: resolve(spec, load_scales(path, spec)))


def _scales_in_json(folder: Path) -> Read:
    return _scales(folder, "json")


def _scales_in_safetensors(folder: Path) -> Read:
    return _scales(folder, "safetensors")


def _generation_config(folder: Path) -> Read:
    return Read(folder / "weights/generation_config.json", lambda: eos_token_ids(folder / "weights"))


JSON_FILES: dict[str, Callable[[Path], Read]] = {
    "config.json": _config,
    "hf_quant_config.json": _hf_quant_config,
    "config.json of quantize": _source_config,
    "index": _index,
    "ledger": _ledger,
    "manifest": _manifest,
    "bindings": _bindings,
    "sidecar": _sidecar,
    "tokenizer.json": _tokenizer,
    "activation scales": _scales_in_json,
    "generation_config.json": _generation_config,
}
FILES = JSON_FILES | {"spec": _spec, "scales in safetensors": _scales_in_safetensors}


def hold(case: Read, texts: Iterator[bytes]) -> int:
    """Read each text in place of the file; return how many were refused. The file is put back."""
    good, refused = case.path.read_bytes(), 0
    try:
        for text in texts:
            case.path.write_bytes(text)
            try:
                case.read()
            except N3CError as error:
                refused += 1
                assert error.exit_code not in (ExitCode.OK, ExitCode.INTERNAL), (text, error)
                assert all(found.code and found.span and found.span.file for found in error.diagnostics), (text, error)
    finally:
        case.path.write_bytes(good)
    return refused


@pytest.mark.parametrize("name", FILES)
def test_bytes_that_are_damaged(name: str, folder: Path) -> None:
    case = FILES[name](folder)
    case.read()
    assert hold(case, damaged(case.path.read_bytes(), case.count, seed=1)) >= 3


@pytest.mark.parametrize("name", JSON_FILES)
def test_values_that_are_no_such_values(name: str, folder: Path) -> None:
    case = JSON_FILES[name](folder)
    assert hold(case, altered(json.loads(case.path.read_bytes()), case.count, seed=2)) >= 2


def test_headers_of_safetensors(folder: Path) -> None:
    path = folder / "weights/model-00001-of-00003.safetensors"
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])

    def files() -> Iterator[bytes]:
        yield from (text + good[8 + length :] for text in damaged(good[: 8 + length], COUNT, seed=3))
        for text in altered(header, COUNT, seed=4):
            yield len(text).to_bytes(8, "little") + text + good[8 + length :]

    assert hold(Read(path, lambda: _all_tensors(folder / "weights")), files()) > COUNT
