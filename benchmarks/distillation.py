"""Post-training quantization against distillation (QAD) at the same bits: a trained tiny model, three seeds."""

from __future__ import annotations

import importlib
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from n3c.backends.torch.loading import load_package
from n3c.compiler import quantize
from n3c.specs.load import load_spec
from n3c.specs.schema import Quantization, Rule, Spec

from .trained import prepare, train

TITLE = "Distillation into NVFP4"

LENGTH, SEQUENCES = 64, 512
KEPT = ("moe.router", "mamba.conv1d", "mtp.*", "embedding", "lm_head")


def run(quick: bool) -> Iterator[str]:
    """Yield the table: cross-entropy on held-out text, and KL to the teacher, before and after."""
    teacher_steps, steps, seeds = (20, 5, 1) if quick else (300, 300, 3)
    path = Path(__file__).parents[1] / "specs" / "tiny.toml"
    spec = replace(load_spec(path)[0], quantization=Quantization("nvfp4", (1, 16), (Rule("bf16", roles=KEPT),)))
    yield "specs/tiny.toml, every linear but head, router and MTP in NVFP4: weights in 1x16 and activations. The"
    yield f"teacher has learnt {teacher_steps} steps of 8 x {LENGTH} bytes of Python's library; QAD has {steps} more,"
    yield "with the KL divergence as the loss, at a rate of 5e-5."
    yield f"Nats on {SEQUENCES} held-out sequences: mean of {seeds} seeds, and each.\n"
    yield "| | cross-entropy | KL to the teacher |"
    yield "|---|---:|---:|"
    with tempfile.TemporaryDirectory() as folder:
        found = [measure(spec, Path(folder), seed, teacher_steps, steps) for seed in range(seeds)]
    for name in found[0]:
        columns = [_column([of_seed[name][part] for of_seed in found]) for part in range(2)]
        yield f"| {name} | {columns[0]} | {columns[1]} |"


def _column(numbers: list[float]) -> str:
    return f"{statistics.mean(numbers):.4f} ({', '.join(f'{number:.4f}' for number in numbers)})"


def measure(spec: Spec, folder: Path, seed: int, teacher_steps: int, steps: int) -> dict[str, tuple[float, float]]:
    """Return cross-entropy and divergence of each model of a seed."""
    text = prepare(spec, folder)
    out = folder / f"seed{seed}"
    sizes = ["--batch-size", "8", "--seq-len", str(LENGTH), "--seed", str(seed), "--val-every", "0"]
    train(folder, out / "teacher", *sizes, "--steps", str(teacher_steps), "--lr", "0.003")
    teacher, ptq = out / "teacher" / "export", out / "ptq"
    quantize(spec, weights=teacher, output=ptq, calibration=text, calibration_samples=32, calibration_length=LENGTH)
    models = {"teacher": (teacher, None), "PTQ": (ptq, ptq)}
    for name, options in (("scales follow", []), ("scales frozen", ["--frozen-scales"])):
        place = out / name.replace(" ", "_")
        given = [*sizes, "--steps", str(steps), "--lr", "0.00005", "--teacher", str(teacher), "--quantized", str(ptq)]
        train(folder, place, *given, *options)
        models[f"QAD, {name}"] = (place / "export", place / "export")
    data = torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8).long()
    ids = data[-SEQUENCES * LENGTH :].view(SEQUENCES, LENGTH)
    logits = {name: _logits(folder, weights, formats, ids) for name, (weights, formats) in models.items()}
    return {name: _losses(ours, logits["teacher"], ids) for name, ours in logits.items()}


@torch.no_grad()
def _logits(folder: Path, weights: Path, formats: Path | None, ids: Tensor) -> Tensor:
    """Return the logits of a model, with the activations of its formats, where it has any."""
    package: Any = load_package(folder)
    model = package.Model().eval()
    package.load_checkpoint(model, weights)
    if formats is not None:
        formats_of = importlib.import_module(f"{package.__name__}.quantized").Quantized
        formats_of(formats, frozen=True, activations="stored").apply(model)
    logits: Tensor = model(ids).logits[:, :-1]
    return logits


def _losses(ours: Tensor, teacher: Tensor, ids: Tensor) -> tuple[float, float]:
    target, log_q = teacher.log_softmax(-1), ours.log_softmax(-1)
    divergence = F.kl_div(log_q, target, reduction="none", log_target=True).sum(-1).mean()
    return float(F.cross_entropy(ours.flatten(0, 1), ids[:, 1:].flatten())), float(divergence)
