"""Every reader of a file that others may have made, as a function of the file's bytes: for fuzzing and its corpus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from n3c.backends.modelopt.record import RECORD, read_record
from n3c.backends.onnx.bindings import read_bindings
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.header import HeaderError, read_header
from n3c.backends.safetensors.resume import WorkDirectory
from n3c.backends.trt.plan_file import read_sidecar
from n3c.compiler.building.recorded import recorded
from n3c.compiler.quantization.calibration.activation_scales import load_scales, resolve
from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.runtime.generation.runner import eos_token_ids
from n3c.runtime.generation.tokenizer import find_tokenizer
from n3c.runtime.manifest import read_manifest
from n3c.specs.convert import run_import
from n3c.specs.load import load_spec

from .specs import SMALL, spec_from_text

CORPUS = Path(__file__).parents[1] / "corpus"
"""For each reader a folder of inputs: a good one, and what fuzzing has found."""
_SPEC = spec_from_text(SMALL)


def _at(name: str, read: Callable[[Path], object]) -> Callable[[Path, bytes], None]:
    """Return what writes bytes to the file `name` of a folder and has them read."""

    def once(folder: Path, data: bytes) -> None:
        path = folder / name
        path.write_bytes(data)
        try:
            read(path)
        finally:
            path.unlink()

    return once


def _quantization(path: Path) -> None:
    (path.parent / "config.json").write_bytes((CORPUS / "config/good.json").read_bytes())
    try:
        run_import(path.parent)
    finally:
        (path.parent / "config.json").unlink()


def _index(path: Path) -> None:
    checkpoint = Checkpoint(path.parent)
    for name in checkpoint:
        checkpoint.read(name)


def _manifest(path: Path) -> None:
    recorded(read_manifest(path.parent) or {})


def _tokenizer(path: Path) -> None:
    tokenizer = find_tokenizer([path.parent], 97)
    assert tokenizer is not None
    tokenizer.stream().feed(tokenizer.encode("ab"))


def _journal(path: Path) -> None:
    work = WorkDirectory(path.parent / "out")
    work.state.mkdir(parents=True, exist_ok=True)
    (work.state / "part-1-of-1.jsonl").write_bytes(path.read_bytes())
    work.done(())


READERS: dict[str, Callable[[Path, bytes], None]] = {
    "spec": _at("spec.toml", load_spec),
    "config": _at("config.json", run_import),
    "hf_quant_config": _at("hf_quant_config.json", _quantization),
    "header": _at("model.safetensors", read_header),
    "index": _at("model.safetensors.index.json", _index),
    "manifest": _at("manifest.json", _manifest),
    "bindings": _at("bindings.json", read_bindings),
    "sidecar": _at("a.plan.json", lambda path: read_sidecar(path.with_name("a.plan"))),
    "tokenizer": _at("tokenizer.json", _tokenizer),
    "generation_config": _at("generation_config.json", lambda path: eos_token_ids(path.parent)),
    "scales": _at("scales.json", lambda path: resolve(_SPEC, load_scales(path, _SPEC))),
    "record": _at(RECORD, lambda path: read_record(path.parent)),
    "journal": _at("journal.jsonl", _journal),
}
"""Name → a function of an empty folder and the bytes of the file. It raises what `refused` does not know: a fault."""


def read(name: str, folder: Path, data: bytes) -> bool:
    """Have a reader read `data`; return whether it is refused. What is no diagnostic with a place is raised."""
    try:
        READERS[name](folder, data)
    except HeaderError:
        return True
    except N3CError as error:
        if error.exit_code in (ExitCode.OK, ExitCode.INTERNAL):
            raise
        assert all(found.code and found.span and found.span.file for found in error.diagnostics), error
        return True
    return False
