"""Adapters that train the same spec with other trainers: torchtitan and Megatron-Bridge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from n3c.specs.schema import Spec

from .context import LINE_LENGTH
from .megatron import Precision, gaps, megatron_pattern, precision

VERSIONS = {
    "torch": "2.13.0",
    "torchtitan": "0.3.0",
    "triton": "3.7.1",  # torchtitan imports it, on any device
    "core": "0.19.2",
    "bridge": "August 2026 (067f987)",
}
"""The versions that the adapters are written for, and which of them ran."""

MIXED = {"nvfp4": "bf16_with_nvfp4_mixed", "mxfp8": "bf16_with_mxfp8_mixed", "bf16": "bf16_mixed"}
RECIPES = {
    "nvfp4": '{"fp4_quantization_recipe": "nvfp4"}',
    "mxfp8": '{"fp8_quantization_recipe": "mxfp8"}',
    "bf16": "{}",
}
"""Format → TEQuantizationRecipe (Megatron-LM, megatron/core/extensions/transformer_engine.py)."""


@dataclass(frozen=True, slots=True)
class TitanView:
    """Variables that only the template of the torchtitan adapter has."""

    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class MegatronView:
    """Variables that only the templates for Megatron-Bridge have."""

    versions: Mapping[str, str]
    megatron_pattern_lines: tuple[str, ...]
    """The pattern in literals that fit into lines."""
    short: bool
    """Whether that is one literal, on the line of its name."""
    stages: int
    precision: Precision
    mixed: str
    recipes: Mapping[str, str]
    two_dimensional: bool


def engine_files(spec: Spec) -> dict[str, TitanView | MegatronView]:
    """Return the adapters of a spec: file name → what its template has beside the variables of all.

    The Megatron files are left out where `gaps(spec)` names something that they cannot say.
    """
    files: dict[str, TitanView | MegatronView] = {"torchtitan_adapter.py": TitanView(VERSIONS)}
    if gaps(spec):
        return files
    chosen, pattern = precision(spec), megatron_pattern(spec)
    megatron = MegatronView(
        versions=VERSIONS,
        megatron_pattern_lines=_pattern_lines(pattern),
        short=len(pattern) <= LINE_LENGTH - len('PATTERN = ""'),
        stages=len(spec.model.pattern.stages) + 1,
        precision=chosen,
        mixed=MIXED[chosen.format],
        recipes={format_: RECIPES[format_] for format_ in sorted({format_ for _, format_ in chosen.matchers})},
        two_dimensional=spec.training is not None and spec.training.block == (16, 16),
    )
    return {**files, "megatron_provider.py": megatron, "megatron_recipe.py": megatron}


def _pattern_lines(text: str) -> tuple[str, ...]:
    """Return a pattern as string literals that fit into lines."""
    size = len(text) if len(text) <= LINE_LENGTH - 6 else 80
    return tuple(f'"{text[first : first + size]}"' for first in range(0, len(text), size))
