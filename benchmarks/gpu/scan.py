"""The scan of training alone, forward and backward, S = 8,192 at Nano's sizes: n3c's kernels and mamba_ssm's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from .part import Row, Setting, generated, relative_error, report, seconds_of, spec_of

TITLE = "Scan"


def run(setting: Setting) -> Iterator[Row]:
    """Yield milliseconds of each implementation and how far it is from PyTorch's in float32."""
    import torch

    length = 64 if setting.tiny else 8192
    spec = spec_of("nano", setting)
    package = generated(spec)
    mamba = spec.mamba
    assert mamba is not None
    torch.manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.randn(shape, device=setting.device).bfloat16()

    x = normal(1, length, mamba.num_heads, mamba.head_dim)
    b, c = (normal(1, length, mamba.n_groups, mamba.state_size) for _ in range(2))
    dt = torch.rand(1, length, mamba.num_heads, device=setting.device) * 0.1
    a = -torch.rand(mamba.num_heads, device=setting.device) * 15 - 1
    want: Any = None
    for name in ("pytorch", "n3c", "mamba_ssm"):
        try:
            scan = _implementation(name, package, mamba.chunk_size)
            inputs = [t.clone().requires_grad_() for t in (x, dt, a, b, c)]
            both, forward = partial(_both, scan, inputs), partial(_forward, scan, inputs)
            y, gradients = both()
            got = [y, *gradients]
            want = want or got
            errors = [relative_error(one.detach(), other.detach()) for one, other in zip(got, want, strict=True)]
            yield {
                "scan": name,
                "forward ms": round(1e3 * seconds_of(setting, forward), 3),
                "forward and backward ms": round(1e3 * seconds_of(setting, both), 3),
                "errors of y, dx, ddt, dA, dB, dC": ", ".join(f"{error:.1e}" for error in errors),
            }
        except Exception as error:
            yield {"scan": name, "error": f"{type(error).__name__}: {error}"[:500]}


def _both(scan: Callable[..., Any], inputs: list[Any]) -> Any:
    import torch

    y = scan(*inputs)
    return y, torch.autograd.grad(y.float().sum(), inputs)


def _forward(scan: Callable[..., Any], inputs: list[Any]) -> Any:
    import torch

    with torch.no_grad():
        return scan(*inputs)


def _implementation(name: str, package: Any, chunk: int) -> Callable[..., Any]:
    import importlib

    import torch

    if name == "mamba_ssm":
        kernel = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
        return partial(kernel, chunk_size=chunk)
    part = importlib.import_module(f"{package.__name__}.ssd")
    dispatch = importlib.import_module(f"{package.__name__}.dispatch")

    def scan(x: Any, dt: Any, a: Any, b: Any, c: Any) -> Any:
        dispatch.PREFERENCE[:] = ["triton"] if name == "n3c" else []
        y = part.scan(x, dt, a, b, c, chunk)[0]
        return y.to(torch.bfloat16)

    return scan


if __name__ == "__main__":
    report(run)
