"""A round of speculative decoding on Super's widths in NVFP4, beside plain decoding.

Whole Super where the card holds it, else its first blocks with the MTP block: there the drafter's share, which reads
the whole head, counts for too much. A round is `draft` as often as tokens are drafted, and one `verify`; with an
acceptance of A tokens a round, it is A times `decode`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .part import Row, Setting, kernel_table, report, seconds_of, spec_of, wall_seconds_of
from .served import call_of, engine_of, free, replay_of

TITLE = "Speculative decoding"
ACCEPTANCE = 3.0


def run(setting: Setting) -> Iterator[Row]:
    """Yield a row for each batch."""
    import torch

    serving = {"serving.max_seq_len": 256 if setting.tiny else 8192}
    whole = spec_of("super", setting, serving)
    room = torch.cuda.get_device_properties(0).total_memory if setting.device == "cuda" else 0
    spec = whole
    title = "Super" if not setting.tiny else "tiny"
    if not setting.tiny and room < 90e9:
        spec = spec_of("super", setting, {**serving, "model.pattern": str(whole.model.pattern.symbols[:44])})
        title = "Super's first 44 of 88 blocks"
    for batch in (1, 8):
        engine: Any = engine_of(spec, setting, ("decode", "verify", "draft"), [batch])
        times: dict[str, float] = {}
        for entry in ("decode", "verify", "draft"):
            call: Any = call_of(engine, entry, 32 if setting.tiny else 1024)
            wall = wall_seconds_of(setting, call)
            replay: Any = replay_of(engine, entry)
            times[entry] = seconds_of(setting, replay) if replay else wall
            if entry == "verify" and batch == 1:
                yield {"kernels": f"{title}, verify", "table": kernel_table(setting, replay or call)}
        round_ = times["verify"] + spec.serving.draft_tokens * times["draft"]
        yield {
            "model": title,
            "batch": batch,
            **{f"{entry} ms": round(1e3 * seconds, 3) for entry, seconds in times.items()},
            "round ms": round(1e3 * round_, 3),
            f"times plain at acceptance {ACCEPTANCE:g}": round(ACCEPTANCE * times["decode"] / round_, 2),
            "without a graph": str(dict(engine.unrecorded))[:200],
        }
        engine = call = replay = None  # the memory of its weights
        free()


if __name__ == "__main__":
    report(run)
