"""The model of time (`backends/kernel_time.py`) against kernels of the forms that it models, written for the purpose.

Weights rotate among copies that together exceed L2, as they do in a model, and calls are replayed as one graph. The
instructions of these kernels were counted as those of the builder's were, in what Triton compiles for SM 90.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from n3c.backends.gpus import Gpu
from n3c.backends.kernel_time import duration, parts_of
from n3c.backends.kernel_work import Choice, Cost, Repeated, Work
from n3c.ir.types import DType

from .part import Row, Setting, card, relative_error, report, seconds_of_each

TITLE = "The model of time"
SUM, CHOSEN, VALUES = Cost(4.4, 1.5), Cost(14.5, 25.0), Cost(14.8, 0.0)
"""Of a lane, for a weight and row; sectors of L2 take longer than the wavefronts that they are."""
ROTATED = 200e6  # bytes


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel with its inputs made, and what the model knows of it."""

    kernel: str
    work: Work
    calls: Sequence[Callable[[], Any]]
    """The same with other weights each."""
    want: Callable[[], Any]
    """The result of the first call in float32."""


def run(setting: Setting) -> Iterator[Row]:
    """Yield measured and predicted microseconds of each kernel; on a CPU the prediction is for an H100."""
    gpu = card(setting)
    for make in (_sums, _chosen, _values, _grouped):
        try:
            for case in make(setting):
                yield _measured(case, setting, gpu)
        except Exception as error:
            yield {"kernel": make.__name__, "error": f"{type(error).__name__}: {error}"[:500]}


def _measured(case: Case, setting: Setting, gpu: Gpu) -> Row:
    error = relative_error(case.calls[0](), case.want())
    measured = seconds_of_each(setting, case.calls, most=16)
    predicted, bound = duration(parts_of(case.work, gpu))
    return {
        "kernel": case.kernel,
        "error": f"{error:.1e}",
        "us": round(1e6 * measured, 1),
        "predicted us": round(1e6 * predicted, 1),
        "off": f"{predicted / measured - 1:+.0%}" if setting.device == "cuda" else "not a GPU",
        "bound by": bound,
    }


def _kernels() -> Any:
    """Return the module of the kernels, untyped as Triton's language is; loaded where Triton is needed only."""
    return importlib.import_module("benchmarks.gpu.forms")


def _copies(make: Callable[[], Any], size: float, setting: Setting) -> list[Any]:
    return [make() for _ in range(1 if setting.tiny else max(1, min(8, round(ROTATED / size))))]


def _weight(n: int, k: int, device: str) -> Any:
    import torch

    return torch.randn(n, k, device=device).bfloat16()


def _product(x: Any, w: Any) -> Any:
    """Return x wᵀ in float32, of one pair or of each of a stack."""
    return x.float() @ w.float().transpose(-1, -2)


def _sums(setting: Setting) -> Iterator[Case]:
    """Yield sums of Super's in_proj and of a matrix that L2 holds, rows in either order."""
    import torch

    device = setting.device
    for n, k in [(6, 48)] if setting.tiny else [(18_560, 4096), (4096, 4096)]:
        weights = _copies(partial(_weight, n, k, device), 2 * n * k, setting)
        for rows in (1, 2) if setting.tiny else (1, 4, 8):
            x = torch.randn(rows, k, device=device)
            y = torch.empty(rows, n, device=device)
            for fastest in (False, True) if rows > 1 else (False,):

                def call(w: Any, x: Any = x, y: Any = y, fastest: bool = fastest) -> Any:
                    rows, k = x.shape
                    n = w.shape[0]
                    _kernels().sum_kernel[(rows * n,)](
                        x, w, y, n, rows, K=k, ROWS_FASTEST=fastest, BLOCK=64 if k < 64 else 1024
                    )
                    return y

                size, elements = 2 * n * k, float(rows * n * k)
                again = () if fastest else (Repeated(size, rows),)
                done = Work(
                    "sum",
                    size,
                    (x.nbytes, y.nbytes),
                    again,
                    size * (rows - 1) if fastest else 0,
                    elements * SUM.instructions,
                    elements * SUM.wavefronts,
                )
                order = "fastest" if fastest else "slowest"
                yield Case(
                    f"sum {n} x {k}, {rows} rows, {order}",
                    done,
                    [partial(call, w) for w in weights],
                    partial(_product, x, weights[0]),
                )


def _chosen(setting: Setting) -> Iterator[Case]:
    """Yield the up projection of Super's chosen experts for one and for eight tokens."""
    import torch

    from n3c.backends.onnx.spellings.tables import E2M1

    device = setting.device
    experts, top_k, n, k = (4, 2, 3, 32) if setting.tiny else (512, 22, 2688, 1024)
    codes = torch.randint(256, (experts, n, k // 2), dtype=torch.uint8, device=device)
    scales = torch.rand(experts, n, k // 16, device=device)
    values = torch.from_numpy(E2M1).to(device)
    byte = torch.arange(256, device=device)
    low, high = values[byte & 15].contiguous(), values[byte >> 4].contiguous()
    x = torch.randn(k, device=device)
    for tokens in (1, 2) if setting.tiny else (1, 8):
        chosen = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).flatten().to(device)
        y = torch.empty(len(chosen), n, device=device)

        def call(chosen: Any = chosen, y: Any = y) -> Any:
            block = 16 if setting.tiny else 128
            _kernels().chosen_kernel[(y.numel(),)](x, codes, scales, low, high, chosen, y, n, K=k, BLOCK=block)
            return y

        def want(chosen: Any = chosen) -> Any:
            pairs = torch.stack((low[codes[chosen].int()], high[codes[chosen].int()]), -1).flatten(-2)
            return (pairs.unflatten(-1, (-1, 16)) * scales[chosen][..., None]).flatten(-2) @ x

        expert = n * (k // 2 + k // 16 * 4)
        choice, elements = Choice(experts, top_k, tokens), float(len(chosen) * n * k)
        done = Work(
            "sum",
            round(choice.distinct * expert),
            (y.nbytes,),
            (Repeated(expert * top_k, tokens, choice),),
            0,
            elements * CHOSEN.instructions,
            elements * CHOSEN.wavefronts,
        )
        yield Case(f"chosen experts {n} x {k}, {tokens} tokens", done, [call], want)


def _values(setting: Setting) -> Iterator[Case]:
    """Yield attention's sum over 4,096 values, 32 query heads over 2."""
    import torch

    device = setting.device
    heads, shared, length, d = (2, 1, 20, 4) if setting.tiny else (32, 2, 4096, 128)
    p = torch.rand(heads, length, device=device)
    v = torch.randn(shared, length, d, device=device).bfloat16()
    y = torch.empty(heads, d, device=device)

    def call() -> Any:
        _kernels().values_kernel[(heads * d,)](p, v, y, length, heads // shared, D=d, BLOCK=16 if setting.tiny else 128)
        return y

    elements = float(heads * length * d)
    done = Work(
        "sum",
        v.nbytes,
        (p.nbytes, y.nbytes),
        (),
        32 * round(elements),
        elements * VALUES.instructions,
        elements * VALUES.wavefronts,
    )
    yield Case(
        f"values of {length} positions",
        done,
        [call],
        lambda: torch.einsum("ht,htd->hd", p, v.float().repeat_interleave(heads // shared, 0)),
    )


def _grouped(setting: Setting) -> Iterator[Case]:
    """Yield products of all experts with a bucket of rows each."""
    import torch

    device, dtype = setting.device, torch.bfloat16 if setting.device == "cuda" else torch.float32
    experts, n, k = (3, 32, 32) if setting.tiny else (128, 2688, 1024)
    for rows in (16,) if setting.tiny else (16, 128):
        x = torch.randn(experts, rows, k, device=device).to(dtype)
        w = torch.randn(experts, n, k, device=device).to(dtype)
        y = torch.empty(experts, rows, n, device=device, dtype=dtype)

        def call(x: Any = x, w: Any = w, y: Any = y, rows: int = rows) -> Any:
            tile = 32 if setting.tiny else 128
            grid = (-(-n // tile), experts)
            _kernels().grouped_kernel[grid](x, w, y, n, K=k, C=rows, BN=tile, BK=32 if setting.tiny else 64)
            return y

        flops = 2.0 * experts * rows * n * k
        done = Work("product", w.nbytes, (x.nbytes, y.nbytes), flops={DType.BF16: flops})
        yield Case(
            f"grouped {experts} x {rows} x {n} x {k}",
            done,
            [call],
            partial(_product, x, w),
        )


if __name__ == "__main__":
    report(run)
