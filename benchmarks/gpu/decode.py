"""Decoding of whole models with random weights made on the device, by the torch engine, beside transformers.

`engine` is a call as generation makes it, with its copies from and to the host; `device` is the time between its first
and last kernel. The roofline is the least bytes of a step (`compiler/report/cost.py`) over the bandwidth of the card by
its data sheet: `ceilings` says what it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from n3c.compiler.report.cost import decode_bytes
from n3c.passes.serving import serve
from n3c.specs.schema import Spec

from .part import Row, Setting, card, kernel_table, made_on, report, seconds_of, spec_of, wall_seconds_of
from .served import call_of, engine_of, free, replay_of
from .train import transformers_model

TITLE = "Decoding"
BF16 = {"quantization.format": "bf16", "quantization.rules": []}


def run(setting: Setting) -> Iterator[Row]:
    """Yield a row for each model, batch and context; then the kernels of a step."""
    capacity = 256 if setting.tiny else 33_024
    serving = {"serving.max_seq_len": capacity}
    models = [("nano", "NVFP4", {}), ("nano", "BF16", BF16)]
    contexts = (64, 128) if setting.tiny else (1024, 32_768)
    for name, title, formats in models:
        for batch in (1, 8) if setting.tiny else (1, 8, 32):
            spec = spec_of(name, setting, {**serving, **formats, "serving.batch_sizes": [batch]})
            try:
                yield from _engine_rows(f"{name} {title}", spec, setting, batch, contexts)
            except Exception as error:
                yield {"model": f"{name} {title}", "batch": batch, "error": f"{type(error).__name__}: {error}"[:500]}
            free()
    yield from _transformers_rows(spec_of("nano", setting, BF16), setting, contexts[0])


def _engine_rows(title: str, spec: Spec, setting: Setting, batch: int, contexts: tuple[int, ...]) -> Iterator[Row]:
    served = serve(spec)
    engine = engine_of(spec, setting, ("decode",), [batch])
    for context in contexts:
        call = call_of(engine, "decode", context)
        seconds = wall_seconds_of(setting, call)
        replay = replay_of(engine, "decode")
        device = seconds_of(setting, replay) if replay else seconds
        least = decode_bytes(served, spec, batch, context)["total"] / card(setting).bandwidth
        yield {
            "model": title,
            "batch": batch,
            "context": context,
            "engine ms": round(1e3 * seconds, 3),
            "device ms": round(1e3 * device, 3),
            "tokens/s": round(batch / seconds, 1),
            "of the roofline": f"{least / seconds:.0%} (device {least / device:.0%})",
        }
        if context == contexts[0] and batch <= 8:
            yield {
                "kernels": f"{title}, batch {batch}, context {context}",
                "table": kernel_table(setting, replay or call),
            }
    if engine.unrecorded:
        yield {"model": title, "batch": batch, "without a graph": str(dict(engine.unrecorded))[:400]}


def _transformers_rows(spec: Spec, setting: Setting, context: int) -> Iterator[Row]:
    import torch

    with made_on(setting.device, torch.bfloat16), torch.no_grad():
        model = transformers_model(spec).eval()
    for batch in (1, 8):
        free()  # the cache of the batch before
        try:
            seconds = wall_seconds_of(setting, _transformers_step(model, setting, batch, context))
        except Exception as error:
            yield {"model": "transformers", "batch": batch, "error": f"{type(error).__name__}: {error}"[:500]}
            continue
        yield {
            "model": "transformers BF16",
            "batch": batch,
            "context": context,
            "ms": round(1e3 * seconds, 3),
            "tokens/s": round(batch / seconds, 1),
        }


def _transformers_step(model: Any, setting: Setting, batch: int, context: int) -> Callable[[], object]:
    import torch

    def step() -> None:
        with torch.inference_mode():
            model(token, past_key_values=cache, use_cache=True)

    with torch.inference_mode():
        ids = torch.randint(256, (batch, context), device=setting.device)
        token, cache = ids[:, :1].clone(), model(ids, use_cache=True).past_key_values
    return step


if __name__ == "__main__":
    report(run)
