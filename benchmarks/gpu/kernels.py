"""Every kernel of the torch engine on the device: its error against float32 PyTorch, and its bytes a second.

Weights rotate among copies that together exceed the L2 cache, as they do in a model, and calls are replayed as one
graph. Bytes are the least: each weight that is used once, states read and written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from .part import Row, Setting, relative_error, report, seconds_of_each

TITLE = "Kernels of decoding"
NANO = {"D": 2688, "E": 128, "K": 6, "I": 1856, "L": 2688}
SUPER = {"D": 4096, "E": 512, "K": 22, "I": 2688, "L": 1024}
ROTATED = 200e6  # bytes
W4A4 = ", activations rounded"


def run(setting: Setting) -> Iterator[Row]:
    """Yield a row for each kernel, format and number of rows."""
    parts: Sequence[Callable[[Setting], Iterator[Row]]] = (_linears, _experts, _mamba, _attention)
    for part in parts:
        try:
            yield from part(setting)
        except Exception as error:
            yield {"kernel": part.__name__, "error": f"{type(error).__name__}: {error}"[:500]}


def _linears(setting: Setting) -> Iterator[Row]:
    import torch

    from n3c.runtime.engines.torch.activations import rounded
    from n3c.runtime.engines.torch.kernels.linear import few_rows_linear, many_rows_linear

    shapes = [(64, 96)] if setting.tiny else [(10_304, 2688), (2688, 4096), (131_072, 2688)]
    for n, k in shapes:
        for stored, how in (("bf16", ""), ("fp8", ""), ("nvfp4", ""), ("nvfp4", W4A4)):
            if n > 100_000 and stored != "bf16":
                continue
            copies = _copies(stored, (n, k), setting)
            activation = _activation(setting) if how else None
            for rows in (1, 32) if setting.tiny else (1, 4, 8, 32):
                x = _normal(setting, rows, k)
                kernel = partial(few_rows_linear if rows <= 16 else many_rows_linear, activation=activation)
                want = rounded(activation, x.float()) @ copies[0].dequantized(torch.float32).T
                error = relative_error(kernel(x, copies[0]), want)
                seconds = seconds_of_each(setting, [partial(kernel, x, w) for w in copies])
                yield _row(f"linear {n} x {k}{how}", stored, rows, error, seconds, copies[0].bytes)


def _experts(setting: Setting) -> Iterator[Row]:
    import torch

    from n3c.runtime.engines.torch.activations import rounded
    from n3c.runtime.engines.torch.kernels.experts import routed_experts

    models = {"tiny": {"E": 4, "K": 2, "I": 48, "L": 32}} if setting.tiny else {"nano": NANO, "super": SUPER}
    for name, s in models.items():
        for stored, how in (("nvfp4", ""), ("nvfp4", W4A4), ("bf16", "")):
            if name == "super" and stored == "bf16":
                continue
            activation = _activation(setting) if how else None
            up, down = (
                _packed(stored, (s["E"], s["I"], s["L"]), setting),
                _packed(stored, (s["E"], s["L"], s["I"]), setting),
            )
            for rows in (1, 4) if setting.tiny else (1, 4, 8, 32, 2048):
                x = _normal(setting, rows, s["L"])
                chosen = torch.stack([torch.randperm(s["E"])[: s["K"]] for _ in range(rows)]).to(setting.device)
                weights = torch.rand(rows, s["K"], device=setting.device)
                call = partial(routed_experts, x, chosen, weights, up, down, (activation, activation))
                got, some = call(), min(rows, 4)
                want = torch.zeros(some, s["L"], device=setting.device)
                for t in range(some):
                    read = rounded(activation, x[t].float())
                    for i, e in enumerate(chosen[t].tolist()):
                        inner = rounded(activation, (_one(up, e) @ read).relu().square())
                        want[t] += weights[t, i] * (_one(down, e) @ inner)
                met = len(chosen.unique())
                seconds = seconds_of_each(setting, [call], most=8)
                size = (up.bytes + down.bytes) * met // s["E"]
                row = _row(
                    f"experts {name}, {met} met{how}", stored, rows, relative_error(got[:some], want), seconds, size
                )
                flops = 4 * rows * s["K"] * s["I"] * s["L"]
                yield {**row, "TFLOP/s": round(flops / seconds / 1e12, 1)}


def _mamba(setting: Setting) -> Iterator[Row]:
    import torch

    from n3c.runtime.engines.torch.kernels.mamba_step import mamba2_step

    heads, p, n, groups = (4, 16, 16, 2) if setting.tiny else (64, 64, 128, 8)
    inner, channels = heads * p, heads * p + 2 * groups * n
    weight, bias = _normal(setting, channels, 4), _normal(setting, channels)
    a_log, d, dt_bias = (torch.rand(heads, device=setting.device) for _ in range(3))
    for batch in (1,) if setting.tiny else (1, 8, 32):
        for tokens in (1, 2) if setting.tiny else (1, 4):
            projected = _normal(setting, batch, tokens, inner + channels + heads)
            window = _normal(setting, batch, 3, channels)
            ssm = torch.randn(batch, heads, p, n, device=setting.device)

            def step(window: Any = window, ssm: Any = ssm, projected: Any = projected) -> Any:
                return mamba2_step(projected, window, ssm, weight, bias, a_log, d, dt_bias, groups=groups)

            seconds = seconds_of_each(setting, [step], most=8)
            yield _row("Mamba-2 step", "float32 state", batch * tokens, None, seconds, 2 * ssm.nbytes)


def _attention(setting: Setting) -> Iterator[Row]:
    import torch

    from n3c.runtime.engines.torch.kernels.attention import cached_attention

    capacity = 64 if setting.tiny else 33_024
    for batch, length in (
        ((1, capacity // 2),) if setting.tiny else ((1, capacity // 32), (1, capacity - 8), (8, capacity - 8))
    ):
        keys, values = _normal(setting, batch, 2, capacity, 128), _normal(setting, batch, 2, capacity, 128)
        q = _normal(setting, batch, 32, 1, 128)
        lengths = torch.full((batch,), length, device=setting.device)
        got = cached_attention(q, keys, values, lengths)
        want = torch.nn.functional.scaled_dot_product_attention(
            q.float(), keys[:, :, : length + 1].float(), values[:, :, : length + 1].float(), enable_gqa=True
        )
        seconds = seconds_of_each(setting, [partial(cached_attention, q, keys, values, lengths)], most=8)
        size = 2 * batch * 2 * length * 128 * 2
        yield _row(f"attention over {length}", "bf16", batch, relative_error(got, want), seconds, size)


def _row(kernel: str, stored: str, rows: int, error: float | None, seconds: float, size: float) -> dict[str, Any]:
    return {
        "kernel": kernel,
        "format": stored,
        "rows": rows,
        "error": "see engine_parity" if error is None else f"{error:.1e}",
        "us": round(1e6 * seconds, 1),
        "MB": round(size / 1e6, 2),
        "TB/s": round(size / seconds / 1e12, 2),
    }


def _copies(stored: str, shape: tuple[int, ...], setting: Setting) -> list[Any]:
    first = _packed(stored, shape, setting)
    count = 1 if setting.tiny else max(1, min(8, round(ROTATED / first.bytes)))
    return [first, *(_packed(stored, shape, setting) for _ in range(count - 1))]


def _packed(stored: str, shape: tuple[int, ...], setting: Setting) -> Any:
    import torch

    from n3c.runtime.engines.torch.packed import PackedWeight

    *stack, n, k = shape
    if stored == "bf16":
        data = torch.empty(shape, dtype=torch.bfloat16, device=setting.device).normal_(std=k**-0.5)
        return PackedWeight("bf16", data, None, None, shape)
    scale = torch.full(stack, 0.3 * k**-0.5, device=setting.device)
    if stored == "fp8":
        data = torch.empty(shape, dtype=torch.bfloat16, device=setting.device).normal_()
        return PackedWeight("fp8", data.to(torch.float8_e4m3fn).view(torch.uint8), None, scale, shape)
    codes = torch.randint(256, (*stack, n, k // 2), dtype=torch.uint8, device=setting.device)
    blocks = torch.randint(0x30, 0x40, (*stack, n, k // 16), dtype=torch.uint8, device=setting.device)
    return PackedWeight("nvfp4", codes, blocks, scale, shape)


def _activation(setting: Setting) -> Any:
    import torch

    from n3c.runtime.engines.torch.activations import Activation

    return Activation("nvfp4", torch.tensor(8 / 2688, device=setting.device))  # for numbers up to 8


def _one(weight: Any, expert: int) -> Any:
    import torch

    from n3c.runtime.engines.torch.packed import PackedWeight

    data, blocks, scale = (
        None if part is None else part[expert] for part in (weight.data, weight.block_scales, weight.scale)
    )
    assert data is not None
    return PackedWeight(weight.format, data, blocks, scale, weight.shape[1:]).dequantized(torch.float32)


def _normal(setting: Setting, *shape: int) -> Any:
    import torch

    return torch.randn(shape, device=setting.device).to(torch.bfloat16 if setting.device == "cuda" else torch.float32)


if __name__ == "__main__":
    report(run)
