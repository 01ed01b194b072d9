"""Prefill of long prompts by chunks, whole Nano in NVFP4 and BF16: tokens a second, and of the card's products.

FLOPs are those of the spec's matrix products (two a weight that a token meets, attention over the mean context).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from n3c.compiler.report.cost import flops_per_token
from n3c.passes.lower.model import lower

from .decode import BF16
from .part import Row, Setting, card, kernel_table, report, spec_of, wall_seconds_of
from .served import call_of, engine_of, free

TITLE = "Prefill"


def run(setting: Setting) -> Iterator[Row]:
    """Yield a row for each prompt length."""
    chunk, lengths = (16, (64,)) if setting.tiny else (2048, (8192, 131_072))
    sizes = {"serving.prefill_chunk": chunk, "serving.max_seq_len": max(lengths)}
    formats: list[tuple[str, dict[str, Any]]] = [("BF16", BF16), ("NVFP4", {})]
    for title, own in formats:
        spec = spec_of("nano", setting, {**sizes, **own, "serving.batch_sizes": [1]})
        engine: Any = engine_of(spec, setting, ("prefill",), [1])
        for length in lengths:
            # The time of a chunk depends on the context in attention only: three places stand for all.
            places = [0, length // 2 // chunk * chunk, length - chunk]
            taken = [wall_seconds_of(setting, call_of(engine, "prefill", place), runs=3, warm=1) for place in places]
            seconds = sum(taken) / 3 * length / chunk
            flops = length * flops_per_token(lower(spec), length // 2)
            yield {
                "model": f"nano {title}",
                "prompt": length,
                "chunk": chunk,
                "tokens/s": round(length / seconds),
                "TFLOP/s": round(flops / seconds / 1e12, 1),
                "of BF16's peak": f"{flops / seconds / card(setting).bf16:.0%}",
            }
        yield {"kernels": f"a chunk, {title}", "table": kernel_table(setting, call_of(engine, "prefill", 0))}
        engine = None  # the memory of its weights
        free()


if __name__ == "__main__":
    report(run)
