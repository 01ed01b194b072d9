"""What a packed weight means, against the packing of checkpoints and PyTorch's own FP8."""

from __future__ import annotations

import numpy as np
import torch

from n3c.backends.safetensors import nvfp4
from n3c.backends.safetensors.packing import pack_nvfp4
from n3c.runtime.engines.torch.packed import PackedWeight

from .weights import random_weight


def test_nvfp4_is_that_of_checkpoints() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    packed = pack_nvfp4(weight, 1)
    scale = torch.tensor(packed.scale_2)
    blocks = torch.from_numpy(packed.scale.view(np.uint8))
    found = PackedWeight("nvfp4", torch.from_numpy(packed.codes), blocks, scale, (8, 64))
    assert torch.equal(found.dequantized(torch.float32), torch.from_numpy(nvfp4.dequantize(packed)))
    assert found.bytes == 8 * 32 + 8 * 4 + 4


def test_a_stack_is_its_matrices() -> None:
    stack = random_weight("nvfp4", 3, 4, 32)
    assert stack.block_scales is not None and stack.scale is not None
    for e, dense in enumerate(stack.dequantized(torch.float32)):
        one = PackedWeight("nvfp4", stack.data[e], stack.block_scales[e], stack.scale[e], (4, 32))
        assert torch.equal(one.dequantized(torch.float32), dense)


def test_fp8_is_pytorchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(4, 64)
    weight = PackedWeight("fp8", codes, None, torch.tensor(0.5), (4, 64))
    exact = codes.view(torch.float8_e4m3fn).float() * 0.5
    assert torch.equal(weight.dequantized(torch.float32).nan_to_num(1), exact.nan_to_num(1))
