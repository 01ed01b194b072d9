"""A training step of the first seven blocks of Nano, `MEMEM*E`, beside transformers' `nemotron_h`.

The model has Nano's widths and vocabulary, 4.7B parameters. n3c's step is that of train.py (`Trainer.train_step`, its
default numerics: forward, loss, balance loss, backward, norm and clipping of the gradient, AdamW with float32 master
weights); transformers has weights, gradients and moments in BF16, and no clipping, so that it fits. Both scan by
Triton: n3c's own kernels, mamba_ssm's where `N3C_KERNELS` prefers it, and transformers mamba_ssm's where installed.
TFLOP/s counts three times the matrix products of the forward pass, by the spec: what the model needs, not what an
implementation adds.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from n3c.compiler.report.cost import flops_per_token
from n3c.passes.lower.model import lower
from n3c.specs.huggingface import export_config
from n3c.specs.schema import Spec

from .part import Row, Setting, generated, kernel_table, made_on, peak_memory, report, seconds_of, spec_of
from .served import free

TITLE = "Training step"
PATTERN = "MEMEM*E"


def run(setting: Setting) -> Iterator[Row]:
    """Yield a row a contestant and batch, and the kernels of n3c's step."""
    spec = spec_of("nano", setting, {"model.pattern": PATTERN})
    large, small, length = (2, 1, 64) if setting.tiny else (4, 1, 4096)
    for name, sequences in (("n3c", large), ("n3c", small), ("transformers", small), ("n3c, mamba_ssm's scan", large)):
        try:
            yield from _rows(name, spec, setting, sequences, length)
        except Exception as error:
            yield {"what": name, "sequences": sequences, "error": f"{type(error).__name__}: {error}"[:500]}
        free()


def _rows(name: str, spec: Spec, setting: Setting, sequences: int, length: int) -> Iterator[Row]:
    import torch

    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    os.environ["N3C_KERNELS"] = "mamba_ssm,triton" if "mamba_ssm" in name else "triton,mamba_ssm"
    with tempfile.TemporaryDirectory() as folder:
        step = (
            _transformers_step(spec, setting, sequences, length)
            if name == "transformers"
            else _trainer_step(spec, sequences, length, Path(folder))
        )
        seconds = seconds_of(setting, step, runs=5, warm=2)
        flops = 3 * sequences * length * flops_per_token(lower(spec), length // 2)
        yield {
            "what": name,
            "sequences": f"{sequences} x {length}",
            "ms": round(1e3 * seconds, 1),
            "tokens/s": round(sequences * length / seconds),
            "TFLOP/s": round(flops / seconds / 1e12, 2),
            "GB": round(peak_memory(setting), 1),
        }
        if name == "n3c" and sequences > 1:
            yield {"kernels": f"{name}, {sequences} x {length}", "table": kernel_table(setting, step, most=40)}


def _trainer_step(spec: Spec, sequences: int, length: int, folder: Path) -> Callable[[], object]:
    import torch

    package = generated(spec)
    settings, trainer, world = (
        importlib.import_module(f"{package.__name__}.training.{part}") for part in ("settings", "trainer", "world")
    )
    wide = spec.model.vocab_size > 65_536
    tokens = torch.randint(
        spec.model.vocab_size, (sequences * length * 12,), generator=torch.Generator().manual_seed(0)
    )
    (folder / "tokens.bin").write_bytes(tokens.to(torch.int32 if wide else torch.int16).numpy().tobytes())
    given = {
        "data": str(folder / "tokens.bin"),
        "out": str(folder / "out"),
        "steps": 1000,
        "batch_size": sequences,
        "seq_len": length,
    }
    values = settings.checked(given)
    made = trainer.Trainer(values, world.World.join(values))
    made.model.train()
    step: Callable[[], object] = made.train_step
    return step


def _transformers_step(spec: Spec, setting: Setting, sequences: int, length: int) -> Callable[[], object]:
    import torch

    with made_on(setting.device, torch.bfloat16):
        model = transformers_model(spec).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(spec.model.vocab_size, (sequences, length), device=setting.device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def transformers_model(spec: Spec) -> Any:
    """Return transformers' model of a spec with fresh weights, on the default device and in the default type."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    config = export_config(spec)
    for key in ("n3c", "architectures", "model_type"):
        config.pop(key, None)
    config["attn_implementation"] = "sdpa"
    model: Any = NemotronHForCausalLM(NemotronHConfig(**config))
    model.set_experts_implementation("grouped_mm")
    return model


if __name__ == "__main__":
    report(run)
