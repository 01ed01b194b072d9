"""Options that have no effect beside the others are usage errors that name them and what they need."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.command import n3c, tree, write_small

CASES = [
    ("build SPEC --target torch -o OUT --sm 120", "--sm", "--target trt"),
    ("build SPEC --target onnx -o OUT --sm 80", "--sm", "--target trt"),
    ("build SPEC --target torch -o OUT --trt rtx", "--trt", "--target trt"),
    ("build SPEC --target onnx -o OUT --trt full", "--trt", "--target trt"),
    ("build SPEC --target torch -o OUT --stages 2", "--stages", "--target onnx or trt"),
    ("build SPEC --target torch -o OUT --entry decode", "--entry", "--target onnx or trt"),
    ("build SPEC --target torch -o OUT --weights-mode bound", "--weights-mode", "--target onnx or trt"),
    ("build SPEC --target onnx -o OUT --jobs 2", "--jobs", "--target trt"),
    ("build SPEC --target torch -o OUT --no-cache", "--no-cache", "--target trt"),
    ("build SPEC --target trt -o OUT --no-cache --cache-size 1GB", "--cache-size", "a cache: leave --no-cache out"),
    ("check SPEC --target torch --sm 120", "--sm", "--target trt"),
    ("check SPEC --target onnx --trt full", "--trt", "--target trt"),
    ("inspect BUILD --context 8", "--context", "a SPEC or a CHECKPOINT"),
    ("inspect BUILD --batch 1", "--batch", "a SPEC or a CHECKPOINT"),
    ("inspect BUILD --memory 24GB", "--memory", "a SPEC or a CHECKPOINT"),
    ("inspect BUILD --set moe.top_k=2", "--set", "a SPEC"),
    ("inspect config.json --set moe.top_k=2", "--set", "a SPEC"),
    ("import config.json --force", "--force", "--output"),
    ("export-config SPEC --force", "--force", "--output"),
    ("quantize SPEC --weights W -o OUT --force", "--force", "--write-spec or --save-activation-scales"),
    ("quantize SPEC --weights W -o OUT --effective-bits 4.8", "--effective-bits", "--auto"),
    ("quantize SPEC --weights W -o OUT --auto-mtp", "--auto-mtp", "--auto"),
    ("quantize SPEC --weights W -o OUT --calibration-samples 128", "--calibration-samples", "--calibration"),
    ("quantize SPEC --weights W -o OUT --calibration-length 9", "--calibration-length", "--calibration"),
    ("quantize SPEC --weights W -o OUT --tokenizer T", "--tokenizer", "--calibration"),
    ("quantize SPEC --weights W -o OUT --text-field body", "--text-field", "--calibration"),
    ("quantize SPEC --weights W -o OUT --save-activation-scales s.json", "--save-activation-scales", "--calibration"),
    ("quantize SPEC --weights W -o OUT --like L --fmt fp8", "--fmt", "--like gives all formats"),
    ("quantize PLAIN --weights W -o OUT --fmt fp8 --block 1x16", "--block", "a weight in nvfp4"),
    ("quantize PLAIN --weights W -o OUT --search mse", "--search", "a weight in nvfp4"),
    ("run BUILD --weights W --prompt a --seed 1", "--seed", "--temperature above 0"),
    ("run BUILD --weights W --prompt a --top-k 3", "--top-k", "--temperature above 0"),
    ("run BUILD --weights W --prompt a --temperature 0 --top-p 0.5", "--top-p", "--temperature above 0"),
    ("run BUILD --weights W --prompt a --thinking-tags a b", "--thinking-tags", "--reasoning-budget"),
    ("run BUILD --weights W --prompt-ids 1 --stop a", "--stop", "a tokenizer.json"),
    ("simulate SPEC --gpu B200 --trace t.jsonl --prompt-tokens 9", "--prompt-tokens", "--rate"),
    ("simulate SPEC --gpu B200 --trace t.jsonl --shared-tokens 9", "--shared-tokens", "--rate"),
    ("simulate BUILD --gpu B200 --rate 1 --set moe.top_k=2", "--set", "a SPEC"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a spec, its build, a config and an empty folder W."""
    folder = tmp_path_factory.mktemp("options")
    spec = write_small(folder)
    (folder / "W").mkdir()
    (folder / "plain.toml").write_text(spec.read_text() + '[quantization]\nformat = "bf16"\nblock = [1, 16]\n')
    assert n3c("build", spec, "--target", "torch", "-o", folder / "built").code == 0
    assert n3c("export-config", spec, "-o", folder / "config.json").code == 0
    return folder


@pytest.mark.parametrize(("line", "option", "needs"), CASES, ids=[case[0] for case in CASES])
def test_the_message_names_the_option_and_what_it_needs(line: str, option: str, needs: str, folder: Path) -> None:
    paths = {
        "SPEC": "small.toml",
        "BUILD": "built",
        "OUT": "out",
        "W": "W",
        "PLAIN": "plain.toml",
        "config.json": "config.json",
    }
    before = tree(folder)
    result = n3c(*(folder / paths[word] if word in paths else word for word in line.split()), "--json")
    assert (result.code, result.codes) == (2, ["E0701"]), result.err
    assert result.data["diagnostics"][0]["message"].startswith(f"{option} has no effect: ")
    assert needs in result.data["diagnostics"][0]["message"]
    assert tree(folder) == before
