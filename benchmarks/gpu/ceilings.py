"""What the card gives at most: bytes a second of a large copy, FLOP/s of a large matrix product."""

from __future__ import annotations

from collections.abc import Iterator

from .part import Row, Setting, report, seconds_of

TITLE = "Ceilings"


def run(setting: Setting) -> Iterator[Row]:
    """Yield both, measured."""
    import torch

    size = 1 << (20 if setting.tiny else 31)
    source = torch.empty(size, dtype=torch.uint8, device=setting.device).random_()
    target = torch.empty_like(source)
    seconds = seconds_of(setting, lambda: target.copy_(source))
    yield {"what": "copy, bytes read and written", "TB/s": round(2 * size / seconds / 1e12, 3)}
    seconds = seconds_of(setting, lambda: source.view(torch.int64).sum())
    yield {"what": "sum, bytes read", "TB/s": round(size / seconds / 1e12, 3)}
    n = 256 if setting.tiny else 8192
    a, b = torch.randn(2, n, n, device=setting.device, dtype=torch.bfloat16).unbind(0)
    seconds = seconds_of(setting, lambda: a @ b)
    yield {"what": f"product of {n} x {n} x {n}, BF16", "TFLOP/s": round(2 * n**3 / seconds / 1e12, 1)}


if __name__ == "__main__":
    report(run)
