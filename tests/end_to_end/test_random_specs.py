"""Random specs through every command: what `check` accepts is built, quantized, run, verified and imported."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from n3c.compiler.report.cost import count_parameters
from n3c.ir.diagnostics import ExitCode
from n3c.passes.lower.model import lower
from n3c.specs.dump import dump_spec
from n3c.specs.load import load_spec
from n3c.specs.schema import Spec
from support.checkpoints import write_checkpoint
from support.command import n3c
from support.random_specs import specs

CONTEXT, PROMPT, TOKENS = 24, 11, 4
FEW = settings(
    max_examples=6,
    derandomize=True,
    phases=(Phase.generate,),
    suppress_health_check=[HealthCheck.too_slow],
)


def served_small(spec: Spec) -> Spec:
    """Return a spec that serves a few tokens: states grow with batch and context, which nothing bounds."""
    model = replace(spec.model, max_position_embeddings=max(CONTEXT, spec.model.max_position_embeddings))
    chunk = min(8, spec.serving.prefill_chunk)
    serving = replace(spec.serving, batch_sizes=(1,), max_seq_len=CONTEXT, prefill_chunk=chunk)
    return replace(spec, model=model, serving=serving)


def through_every_command(spec: Spec, folder: Path) -> None:
    """What `check` refuses every command refuses with the same diagnostics; all else works to the end."""
    path, weights, out, quantized = (folder / name for name in ("spec.toml", "weights", "out", "quantized"))
    path.write_text(dump_spec(spec), encoding="utf-8")
    refusals = [refused_alike(path, target, out) for target in ("torch", "onnx")]
    if ExitCode.SPEC in refusals:
        assert n3c("inspect", path).code == ExitCode.SPEC
    if any(refusals):
        serving = replace(spec.serving, kv_cache_dtype="bf16")  # two codes of FP8 are written at a time
        spec = replace(spec, quantization=None, training=None, serving=serving)
        path.write_text(dump_spec(spec), encoding="utf-8")
    write_checkpoint(weights, spec)
    (weights / "tokenizer.json").unlink()
    exported_and_imported(spec, path, folder)
    inspected = works("inspect", path)
    assert inspected["parameters"]["total"] == count_parameters(lower(spec), spec).total
    works("check", path)
    for target in ("torch", "onnx"):
        works("build", path, "--target", target, "-o", out)
    works("quantize", path, "--weights", weights, "-o", quantized, *(() if spec.quantization else ("--fmt", "fp8")))
    generated(out, weights, spec)
    verified(out, weights)
    works("import", quantized, "-o", folder / "quantized.toml")
    works("build", folder / "quantized.toml", "--target", "torch", "-o", folder / "of quantized")
    generated(folder / "of quantized", quantized, spec)


def refused_alike(path: Path, target: str, out: Path) -> int:
    """Return the exit code of `check`; what that refuses `build` refuses alike, and writes nothing."""
    checked = n3c("check", path, "--target", target, "--json")
    if checked.code:
        assert checked.code in (ExitCode.SPEC, ExitCode.TARGET) and checked.codes, checked.out
        built = n3c("build", path, "--target", target, "-o", out, "--json")
        assert (built.code, built.codes) == (checked.code, checked.codes), built.out
        assert not out.exists()
    return checked.code


def works(*arguments: object) -> dict[str, Any]:
    """Run a command to its end, and return what it says."""
    result = n3c(*arguments, "--json")
    assert result.code == 0, (arguments[0], result.out)
    return result.data


def verified(out: Path, weights: Path) -> None:
    rows = n3c("verify", out, "--weights", weights, "--json").data["implementations"]
    assert len(rows) >= 3
    assert all(row["ok"] for row in rows), rows


def exported_and_imported(spec: Spec, path: Path, folder: Path) -> None:
    """A config has every key of a spec."""
    config, again = folder / "config.json", folder / "again.toml"
    works("export-config", path, "-o", config)
    works("import", config, "-o", again)
    assert replace(load_spec(again)[0], name=spec.name) == spec


def generated(out: Path, weights: Path, spec: Spec) -> None:
    """Drafted tokens or none, the tokens are the same."""
    ids = ",".join(str(i % spec.model.vocab_size) for i in range(PROMPT))
    given = ("run", out, "--weights", weights, "--prompt-ids", ids, "--max-new-tokens", TOKENS)
    assert works(*given)["token_ids"] == works(*given, "--no-mtp")["token_ids"]


@FEW
@given(specs(narrowest=8).map(served_small))
def test_random_specs(spec: Spec) -> None:
    with tempfile.TemporaryDirectory() as folder:
        through_every_command(spec, Path(folder))


@pytest.mark.slow
@settings(FEW, max_examples=40)
@given(specs(narrowest=8).map(served_small))
def test_many_random_specs(spec: Spec) -> None:
    with tempfile.TemporaryDirectory() as folder:
        through_every_command(spec, Path(folder))
