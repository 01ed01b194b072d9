"""A few instructions of PTX over arrays of words, as its manual says: to run what no interpreter of Triton runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]


def run_ptx(text: str, *inputs: Words) -> Words:
    """Return what `{ … }` leaves in $0; its inputs are $1, $2 and so on, words of 32 bits of one shape."""
    registers: dict[str, Words] = {f"${i}": np.asarray(x, np.uint32) for i, x in enumerate(inputs, 1)}

    def value(name: str) -> Words:
        return registers[name] if name in registers else np.full_like(inputs[0], int(name, 0))

    body = text.strip().removeprefix("{").removesuffix("}")
    for statement in filter(None, (part.strip() for part in body.split(";"))):
        if statement.startswith(".reg"):
            continue
        name, operands = statement.split(maxsplit=1)
        target, *given = re.split(r"\s*,\s*", operands)
        registers[target] = INSTRUCTIONS[name](*(value(operand) for operand in given))
    return registers["$0"]


def _bytes(words: Words) -> npt.NDArray[np.uint8]:
    return words.astype("<u4")[..., None].view(np.uint8)  # [.., 4], the lowest first


def _permuted(a: Words, b: Words, selector: Words) -> Words:
    """Take a byte of b and a for each nibble; its highest bit asks for copies of the byte's highest bit."""
    table = np.concatenate([_bytes(a), _bytes(b)], axis=-1)
    nibbles = (selector[..., None] >> np.array([0, 4, 8, 12], np.uint32)) & 15
    chosen = np.take_along_axis(table, (nibbles & 7).astype(np.int64), axis=-1)
    signs = np.where(chosen & 0x80, 0xFF, 0).astype(np.uint8)
    found: Words = np.where(nibbles & 8, signs, chosen).astype(np.uint8).view("<u4")[..., 0]
    return found


def _four_products(a: Words, b: Words, c: Words) -> Words:
    products = _bytes(a).view(np.int8).astype(np.int64) * _bytes(b).view(np.int8)
    sums: Words = (products.sum(-1) + c.view(np.int32)).astype(np.int32).view(np.uint32)
    return sums


def _two_fused(a: Words, b: Words, c: Words) -> Words:
    """Multiply and add two bfloat16; the results must be exact."""

    def half(words: Words, place: int) -> npt.NDArray[np.float64]:
        high = words & 0xFFFF0000 if place else words << 16
        return np.ascontiguousarray(high).view(np.float32).astype(np.float64)

    result = np.zeros_like(a)
    for place in (0, 1):
        exact = half(a, place) * half(b, place) + half(c, place)
        bits = exact.astype(np.float32).view(np.uint32)
        assert not (bits & 0xFFFF).any() and np.array_equal(bits.view(np.float32).astype(np.float64), exact)
        result |= bits if place else bits >> 16
    return result


INSTRUCTIONS: dict[str, Callable[..., Any]] = {
    "xor.b32": np.bitwise_xor,
    "shr.u32": np.right_shift,
    "sub.s32": np.subtract,
    "mov.b32": np.positive,
    "prmt.b32": _permuted,
    "dp4a.s32.s32": _four_products,
    "fma.rn.bf16x2": _two_fused,
}
