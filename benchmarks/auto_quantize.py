"""Loss against effective bits: what `n3c quantize --auto` chooses for a trained tiny model, beside fixed lists.

`python -m benchmarks auto_quantize` trains specs/tiny.toml for some minutes on one thread, on the
source text of Python's standard library (which every machine has that runs this), chooses formats
under a row of budgets, and measures the loss on held-out files with weights and activations
quantized. It prints the tables and writes the plot to docs/images/.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from n3c.backends.progress import SILENT
from n3c.backends.safetensors import nvfp4
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.torch.loading import hidden_states
from n3c.compiler.quantization.calibration.calibrate import Amax, calibrate
from n3c.compiler.quantization.calibration.streamed_model import StreamedModel
from n3c.compiler.quantization.search import fake_quant
from n3c.compiler.quantization.search.budget import mean_bits
from n3c.compiler.quantization.search.sensitivity import measure
from n3c.compiler.quantization.units import Linear, Unit, find_units
from n3c.specs.dump import dump_spec
from n3c.specs.load import load_spec
from n3c.specs.roles import select_layers
from n3c.specs.schema import Quantization, Spec

from .plot import Series, line_plot

TITLE = "n3c quantize --auto"

SPEC = Path(__file__).parents[1] / "specs" / "tiny.toml"
PLOT = Path(__file__).parents[1] / "docs" / "images" / "auto-quantize.svg"
BLOCK = (1, 16)
BUDGETS = (4.5, 4.6, 4.8, 5.0, 5.5, 6.0, 7.0, 8.0, 10.0, 12.0, 16.0)

STEPS, BATCH, LENGTH, RATE = 400, 16, 128, 3e-3
CALIBRATION, HELD_OUT = 64, 256
"""Sequences of `LENGTH` bytes: training text for calibration, other files for the loss."""


def run(quick: bool) -> Iterator[str]:
    """Yield the tables."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from _run(quick)
    finally:
        torch.set_num_threads(threads)


def _run(quick: bool) -> Iterator[str]:
    spec = with_block(load_spec(SPEC)[0])
    text, held_out = corpus()
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights"
        start = time.perf_counter()
        final = train(spec, text, weights, 20 if quick else STEPS)
        yield (
            f"specs/tiny.toml, {20 if quick else STEPS} steps of {BATCH} x {LENGTH} bytes of Python's standard library "
            f"({len(text) / 1e6:.1f} MB of text, every 20th file held out): {time.perf_counter() - start:.0f} s, "
            f"last training loss {final:.3f} nats.\n"
        )
        model = StreamedModel(spec, Checkpoint(weights))
        ids, test = rows(text, CALIBRATION), rows(held_out, 16 if quick else HELD_OUT)
        evaluated = Evaluated(model, weights, calibrate(model, ids, SILENT, mtp=False), test)
        by_method = {
            "weights": measure(spec, Checkpoint(weights), SILENT),
            "calibration": measure(spec, Checkpoint(weights), SILENT, ids=ids),
        }
        units = find_units(spec, "nvfp4", BLOCK[0], mtp=False)
        full = evaluated.loss({})
        yield f"Loss of the BF16 checkpoint on {test.numel():,} held-out bytes: {full:.4f} nats a byte.\n"

        chosen: dict[str, list[tuple[float, float]]] = {}
        yield "| budget | chosen from weights: bits | loss above BF16 | from calibration: bits | loss above BF16 |"
        yield "|---:|---:|---:|---:|---:|"
        for budget in BUDGETS[:3] if quick else BUDGETS:
            cells = [f"{budget:g}"]
            for method, sensitivity in by_method.items():
                choice = sensitivity.within(budget)
                harm = evaluated.loss(choice.formats) - full
                chosen.setdefault(method, []).append((choice.bits, harm))
                cells += [f"{choice.bits:.3f}", f"{harm:+.5f}"]
            yield f"| {' | '.join(cells)} |"

        seconds, bits, harm = quantize(spec, weights, ids, Path(folder) / "chosen", evaluated)
        yield (
            f"\n`n3c quantize --auto --effective-bits 4.8 --calibration ids.npy`: {bits:.3f} bits, {seconds:.1f} s; "
            f"loss of the checkpoint that it wrote, read back: {harm - full:+.5f}.\n"
        )
        yield "| fixed | bits | loss above BF16 | from calibration at these bits |"
        yield "|---|---:|---:|---:|"
        fixed: dict[str, tuple[float, float]] = {}
        for name, formats in fixed_choices(spec, units).items():
            bits, harm = mean_bits(units, formats), evaluated.loss(formats) - full
            fixed[name] = (bits, harm)
            same = by_method["calibration"].within(bits)
            yield f"| {name} | {bits:.3f} | {harm:+.5f} | {evaluated.loss(same.formats) - full:+.5f} |"
    if not quick:
        PLOT.parent.mkdir(exist_ok=True)
        PLOT.write_text(plot(chosen, fixed), encoding="utf-8")


def with_block(spec: Spec) -> Spec:
    """Return the spec quantized in `BLOCK`, as post-training quantization is."""
    return replace(spec, quantization=Quantization("nvfp4", BLOCK))


def corpus() -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes to train on and the held-out ones: the modules of the standard library, sorted by path."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = [np.frombuffer(file.read_bytes(), np.uint8) for file in files]
    held_out = [part for i, part in enumerate(parts) if i % 20 == 10]
    return np.concatenate([part for i, part in enumerate(parts) if i % 20 != 10]), np.concatenate(held_out)


def rows(text: np.ndarray, count: int) -> torch.Tensor:
    """Return `count` sequences [count, LENGTH], spread evenly over the text."""
    starts = np.linspace(0, len(text) - LENGTH, count).astype(np.int64)
    return torch.from_numpy(np.stack([text[start : start + LENGTH] for start in starts]).astype(np.int64))


def train(spec: Spec, text: np.ndarray, folder: Path, steps: int) -> float:
    """Train a fresh model, write it to `folder` in BF16, and return the mean loss of the last 20 steps, in nats."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    generated = StreamedModel.generate(spec)
    model: Any = generated.Model().eval()  # in training, routers compute balance losses, which nothing reads
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.5 + 0.5 * float(np.cos(np.pi * s / steps)))
    )
    losses: list[float] = []
    for _ in range(steps):
        starts = generator.integers(0, len(text) - LENGTH, BATCH)
        batch = torch.from_numpy(np.stack([text[s : s + LENGTH] for s in starts]).astype(np.int64))
        h = hidden_states(model.backbone(batch))  # without the MTP block, which nothing reads
        logits = model.head(h)[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    generated.save_checkpoint(model.to(torch.bfloat16), folder)
    return float(np.mean(losses[-20:]))


def quantize(
    spec: Spec, weights: Path, ids: torch.Tensor, out: Path, evaluated: Evaluated
) -> tuple[float, float, float]:
    """Run the command; return its seconds, the bits that it chose, and the loss of what it wrote."""
    file, tokens = out.with_suffix(".toml"), out.with_suffix(".npy")
    file.write_text(dump_spec(spec), encoding="utf-8")
    np.save(tokens, ids.numpy())
    options = ("--auto", "--effective-bits", "4.8", "--calibration", str(tokens), "--calibration-length", str(LENGTH))
    start = time.perf_counter()
    command = (sys.executable, "-c", "from n3c.compiler.cli.main import main; main()", "quantize", str(file), "--json")
    done = subprocess.run(
        [*command, "--weights", str(weights), "-o", str(out), *options], check=True, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    chosen = json.loads(done.stdout)["auto"]
    formats = {unit["name"]: unit["format"] for unit in chosen["units"]}
    return seconds, chosen["effective_bits"], evaluated.loss(formats, Checkpoint(out))


def dequantized(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Return a weight of a quantized checkpoint in float32."""
    if f"{name}_scale_2" in checkpoint:
        codes, scale = checkpoint.read(name).view(np.uint8), checkpoint.read(f"{name}_scale")
        scale_2 = np.float32(checkpoint.read(f"{name}_scale_2").item())
        return torch.from_numpy(nvfp4.dequantize(nvfp4.Nvfp4Matrix(codes, scale, scale_2)))
    value = torch.from_numpy(checkpoint.read(name).astype(np.float32))
    return value * float(checkpoint.read(f"{name}_scale")) if f"{name}_scale" in checkpoint else value


class Evaluated:
    """The loss of a checkpoint on held-out text with some linears quantized, computed in float32."""

    def __init__(self, model: StreamedModel, weights: Path, amax: Amax, test: torch.Tensor) -> None:
        self.model = model
        self.amax = amax
        self.test = test
        self.units = {unit.name: unit for unit in find_units(model.spec, "nvfp4", BLOCK[0], mtp=False)}
        self.whole: Any = model.generated.Model()
        model.generated.load_checkpoint(self.whole, weights)
        self.original = {name: tensor.clone() for name, tensor in self.whole.state_dict().items()}

    def loss(self, formats: Mapping[str, str], written: Checkpoint | None = None) -> float:
        """Return the mean cross-entropy in nats, weights and activations in the formats of their units.

        `written` is a checkpoint that has the weights quantized; without it they are quantized here.
        """
        self.whole.load_state_dict(self.original)
        of_linear = {
            linear: formats[name] for name, unit in self.units.items() if name in formats for linear in unit.linears
        }
        with torch.no_grad(), self.quantized(of_linear, written):
            total = 0.0
            for batch in self.test.split(32):
                h = hidden_states(self.whole.backbone(batch))
                logits = self.whole.head(h)[:, :-1]
                total += float(
                    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
                )
        return total / self.test[:, 1:].numel()

    @contextmanager
    def quantized(self, formats: Mapping[Linear, str], written: Checkpoint | None) -> Generator[None]:
        """Compute with these formats while inside."""
        handles: list[Any] = []
        stacks: dict[int, tuple[str, float]] = {}
        for linear, format_ in formats.items():
            amax = self.amax.inputs[linear.module]
            mixer, stacked, projection = linear.module.rpartition(".experts.*.")
            if stacked:
                weight = getattr(self.whole.get_submodule(f"{mixer}.experts"), projection)
            else:
                weight = self.whole.get_submodule(linear.module).weight
            if written is None:
                weight.data = fake_quant.weight(weight.data, format_, BLOCK[0])
            else:
                weight.data = torch.stack([dequantized(written, name) for name in linear.tensors]).view(weight.shape)
            if stacked:
                stacks[weight.data_ptr()] = (format_, amax)
            else:
                read = partial(_read, format_, amax)
                handles.append(self.whole.get_submodule(linear.module).register_forward_pre_hook(read))

        def read_by_experts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            format_, amax = stacks.get(weight.data_ptr(), ("bf16", 0.0))
            return fake_quant.activation(x, format_, amax)

        try:
            with self.model.experts_reading(read_by_experts):
                yield
        finally:
            for handle in handles:
                handle.remove()


def _read(format_: str, amax: float, _: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
    """Return what a linear of a format reads: a hook of its module."""
    return (fake_quant.activation(arguments[0], format_, amax),)


def fixed_choices(spec: Spec, units: list[Unit]) -> dict[str, dict[str, str]]:
    """Return the policies that need no measurement, each as unit → format."""
    pattern = spec.model.pattern
    feeding = select_layers("before attention", pattern)
    last = select_layers(f"last {max(1, round(0.15 * len(pattern)))}", pattern)

    def nano(role: str, layer: int) -> str:
        sensitive = (
            role.startswith("attention.") or role == "lm_head" or (role.startswith("mamba.") and layer in feeding)
        )
        return "bf16" if sensitive else "nvfp4"

    def super_(role: str, _: int) -> str:
        if role.startswith("moe.experts."):
            return "nvfp4"
        return "fp8" if role.startswith(("mamba.", "moe.shared.")) else "bf16"

    def pretraining(role: str, layer: int) -> str:
        if role.startswith(("attention.", "moe.latent_")) or role == "lm_head" or layer in last:
            return "bf16"
        return "fp8" if role == "mamba.out_proj" else "nvfp4"

    policies: dict[str, Callable[[str, int], str]] = {
        "uniform NVFP4": lambda _role, _layer: "nvfp4",
        "uniform FP8": lambda _role, _layer: "fp8",
        "list of Nano's release (attention, the Mamba layers that feed it, head BF16)": nano,
        "recipe of Super (experts NVFP4; Mamba, shared experts FP8; rest BF16)": super_,
        "list of Super's pretraining (last 15 % of layers, attention, latent, head BF16)": pretraining,
    }
    return {
        name: {unit.name: policy(unit.linears[0].role, _layer(unit)) for unit in units}
        for name, policy in policies.items()
    }


def _layer(unit: Unit) -> int:
    parts = unit.name.split(".")
    return int(parts[2]) if parts[0] == "backbone" else -1


def plot(chosen: Mapping[str, list[tuple[float, float]]], fixed: Mapping[str, tuple[float, float]]) -> str:
    """Return the plot as SVG."""
    lines = [Series(f"--auto, from {name}", points, joined=True) for name, points in chosen.items()]
    marks = [Series(name.partition(" (")[0], [point], joined=False) for name, point in fixed.items()]
    return line_plot(
        [*lines, *marks],
        x="effective bits a weight",
        y="loss above BF16, nats a byte",
        title="specs/tiny.toml, trained",
    )
