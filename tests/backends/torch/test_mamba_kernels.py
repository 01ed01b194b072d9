"""The scan against mamba_ssm's own Triton kernels, which Triton's interpreter runs on a CPU; `make test-oracles`.

They are the kernels that model.py calls on a GPU, so this also shows that both of its forms mean the same.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from .generated import generate, tiny_spec

pytestmark = pytest.mark.oracles

NAMES = ("x", "dt", "A", "B", "C", "state")


def smallest_config(configs: list[Any], **_: object) -> Callable[[Any], Any]:
    """Stand in for `triton.autotune`, which times its configurations on a device: take the smallest blocks."""

    def elements(config: Any) -> int:
        return math.prod(value for name, value in config.kwargs.items() if name.startswith("BLOCK"))

    class Kernel:
        def __init__(self, kernel: Any) -> None:
            self.kernel, self.configs, self.best_config = kernel, configs, min(configs, key=elements)

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(*args: Any, **options: Any) -> None:
                if self.best_config.pre_hook is not None:
                    self.best_config.pre_hook(dict(zip(self.kernel.arg_names, args, strict=False)) | options)
                self.kernel[grid](*args, **options, **self.best_config.kwargs)

            return launch

    return Kernel


def no_device(_: object) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def properties(_: object) -> types.SimpleNamespace:
    return types.SimpleNamespace(multi_processor_count=1, total_memory=1 << 30)


@pytest.fixture(scope="module")
def scan_kernel() -> Iterator[Any]:
    """Return mamba_ssm's `mamba_chunk_scan_combined`, interpreted."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "set it before Python starts, as `make test-oracles` does"
    with pytest.MonkeyPatch.context() as patch:
        triton = importlib.import_module("triton")
        patch.setattr(triton, "autotune", smallest_config)
        patch.setattr(torch.cuda, "device", no_device)
        patch.setattr(torch.cuda, "get_device_properties", properties)
        # Kernels that Megatron-core has imported by now would be timed on a device.
        for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
            patch.delitem(sys.modules, name)
        # The package's __init__ imports CUDA extensions: only its files are wanted.
        found = importlib.util.find_spec("mamba_ssm")
        assert found is not None and found.submodule_search_locations is not None
        package = types.ModuleType("mamba_ssm")
        package.__path__ = list(found.submodule_search_locations)
        patch.setitem(sys.modules, "mamba_ssm", package)
        yield importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined


@pytest.fixture(scope="module")
def module() -> Any:
    return generate(tiny_spec("M", mtp=None))


def inputs(length: int, groups: int, with_state: bool) -> list[Tensor]:
    """Return x, dt, A, B, C and h_0: 4 heads of 16 channels, 16 states."""
    g = torch.Generator().manual_seed(length)
    x = torch.randn(1, length, 4, 16, generator=g)
    dt = torch.rand(1, length, 4, generator=g) * 0.5
    A = -torch.linspace(0.1, 16, 4)
    B, C = torch.randn(2, 1, length, groups, 16, generator=g).unbind(0)
    state = torch.randn(1, 4, 16, 16, generator=g) * float(with_state)
    return [tensor.requires_grad_() for tensor in (x, dt, A, B, C, state)]


@pytest.mark.parametrize(
    ("length", "chunk", "places", "groups", "with_state"),
    [
        (64, 16, (), 1, False),
        (64, 16, (), 4, True),
        (64, 32, (), 2, True),
        (50, 16, (), 2, False),
        (50, 16, (), 1, True),
        (7, 16, (), 4, True),
        (64, 16, (16, 21, 22, 48), 2, False),  # at the edge of a chunk, inside one, a document of one token
        (64, 16, (16, 21, 22, 48), 4, True),
        (50, 32, (1, 31, 40), 1, True),
        (40, 16, (38,), 2, False),
    ],
)
def test_kernel(
    module: Any,
    scan_kernel: Any,
    length: int,
    chunk: int,
    places: tuple[int, ...],
    groups: int,
    with_state: bool,
    record_property: Callable[[str, object], None],
) -> None:
    """y, the state after the last token, and the gradients of both by all six inputs."""
    ours, theirs = inputs(length, groups, with_state), inputs(length, groups, with_state)
    token = torch.arange(length)[None]
    documents = torch.stack([token >= place for place in places]).sum(0).int() if places else None
    got = module.ssd.ssd(*ours, chunk, documents)
    state = theirs[-1] if with_state else None
    options = {"initial_states": state, "seq_idx": documents, "return_final_states": True}
    expected = scan_kernel(*theirs[:-1], chunk, **options)
    g = torch.Generator().manual_seed(1)
    seeds = [torch.randn(tensor.shape, generator=g) for tensor in got]
    taken = 6 if with_state else 5
    pairs = list(zip(("y", "after"), got, expected, strict=True))
    by_ours = torch.autograd.grad(got, ours[:taken], seeds)
    by_theirs = torch.autograd.grad(expected, theirs[:taken], seeds)
    pairs += [(f"d{n}", a, b) for n, a, b in zip(NAMES, by_ours, by_theirs, strict=False)]
    for name, a, b in pairs:
        error = float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1))
        record_property(name, error)
        assert error <= 1e-5, (name, error)
