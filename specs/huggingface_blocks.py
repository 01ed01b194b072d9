"""`block_configs` of compressed models (`nemotron_h_puzzle`): what each block says of itself.

    {"block_type": "mamba"}, {"block_type": "moe", "moe_intermediate_size": 1280, "num_experts_per_tok": 4}, …

Of MoE blocks a few keys may differ (`PER_LAYER`) and become `[[moe.layers]]`; what else a block says holds for
all of its kind, as in every published model. A value of null says nothing. Sources: Megatron-Bridge,
nemotron_h_puzzle_bridge.py; TensorRT-LLM, modeling_nemotron_h.py (`_normalize_puzzle_config`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from n3c.ir.diagnostics import Span

from .block_kind import BlockKind, ConfigKey
from .blocks import MOE
from .json_places import JsonPlaces
from .keys import MTP_LAYERS
from .layer_tables import PER_LAYER, entries_for, moe_of_block
from .pattern import Pattern
from .places import Path, shown
from .schema import Spec

TRUNK, MTP = "block_configs", "mtp_block_configs"
_SIZES = ("num_experts", *PER_LAYER, "latent_size")
"""The keys of [moe] that each MoE block of a published config gives."""
Error = Callable[[str, str, Span, "str | None"], None]
"""`error(code, message, place, advice)`."""


@dataclass(slots=True)
class BlockConfigs:
    """What the blocks of a config say."""

    common: dict[str, object] = field(default_factory=dict[str, object])
    """Name of a field of the config → the value that blocks give it."""
    origins: dict[str, Path] = field(default_factory=dict[str, Path])
    """Name of a field in `common` → where the JSON says it."""
    sizes: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]])
    """MoE block → the keys of [moe] that it gives, as plain values."""
    entries: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """`[[moe.layers]]`, as plain values."""
    places: dict[Path, Path] = field(default_factory=dict[Path, Path])
    """Spec path of a key of `entries` → where the JSON says it."""

    def agree(self, spec: Spec) -> bool:
        """Whether each block of a spec has the sizes that these blocks give."""
        tables = {block: moe_of_block(spec, block) for block in self.sizes}
        return all(
            getattr(tables[block], key) == value for block, keys in self.sizes.items() for key, value in keys.items()
        )


def block_types(entries: Sequence[object]) -> list[str] | None:
    """Return the types of the blocks that a list describes; None where an entry is not an object with a type."""
    types = [
        cast("dict[str, object]", entry).get("block_type") if isinstance(entry, dict) else None for entry in entries
    ]
    return [str(type_) for type_ in types] if None not in types else None


def read_blocks(
    config: Mapping[str, object], main: Pattern, mtp: Pattern | None, places: JsonPlaces, error: Error
) -> BlockConfigs:
    """Read the blocks of a config whose patterns are `main` and `mtp`; what n3c does not compile goes to `error`."""
    return _Reader(config, main, places, error).read(mtp)


class _Reader:
    def __init__(self, config: Mapping[str, object], main: Pattern, places: JsonPlaces, error: Error) -> None:
        self.config, self.main, self.places, self.error = config, main, places, error
        self.found = BlockConfigs()
        self.paths: dict[tuple[int, str], Path] = {}
        """MoE block and key of [moe] → where the JSON says it."""

    def read(self, mtp: Pattern | None) -> BlockConfigs:
        for name, pattern, first in ((TRUNK, self.main, 0), (MTP, mtp, len(self.main))):
            given = self.config.get(name)
            entries = cast("list[object]", given) if isinstance(given, list) else []
            if pattern is None or block_types(entries) is None or len(entries) != len(pattern):
                continue  # none, or an error that is told where the pattern is read
            for index, (kind, entry) in enumerate(zip(pattern, entries, strict=True)):
                self.block(kind, cast("Mapping[str, object]", entry), first + index, (name, index))
        beyond = [keys for block, keys in self.found.sizes.items() if block >= len(self.main)]
        if any(keys != beyond[0] for keys in beyond):
            message = "MoE blocks of multi-token prediction that differ from each other are not supported"
            self.error("E0304", message, self.places.json_key(MTP), None)
        self.differences()
        return self.found

    def block(self, kind: BlockKind, block: Mapping[str, object], number: int, path: Path) -> None:
        """Sort the keys of one block into what holds for all blocks and what may differ."""
        if kind is MOE:
            self.found.sizes[number] = {}
        for name, value in block.items():
            key = next((key for key in kind.config_keys if name in (key.name, *key.aliases)), None)
            if name == "block_type" or value is None:
                continue
            if key is None:
                message = f"`{shown(name)}` of {kind.title} blocks is not supported"
                self.error("E0304", message, self.places.json_key(*path, name), None)
            elif kind is MOE and key.key in PER_LAYER:
                self.found.sizes[number][key.key] = value
                self.paths[number, key.key] = (*path, name)
            else:
                self.common(key, value, (*path, name))

    def common(self, key: ConfigKey, value: object, path: Path) -> None:
        """Take a value that holds for all blocks of a kind, unless something else was said before."""
        given = next((name for name in (key.name, *key.aliases) if name in self.config), None)
        if given is None:
            self.found.origins.setdefault(key.name, path)
        first = self.found.common.setdefault(key.name, value) if given is None else self.config[given]
        if value != first:
            message = f"`{shown(str(path[-1]))}` is {shown(str(value))}, and {shown(str(first))} elsewhere"
            names = ", ".join(f"`{config.name}`" for config in MOE.config_keys if config.key in PER_LAYER)
            self.error("E0304", message, self.places.json_value(*path), f"blocks may differ in {names} alone")

    def differences(self) -> None:
        """Give each key of [moe] that may differ one value, and entries to the blocks that have another."""
        differing = {block: dict(keys) for block, keys in self.found.sizes.items()}
        for key in MOE.config_keys:
            giving = [block for block, keys in self.found.sizes.items() if key.key in keys]
            if not giving:
                continue
            if key.name in self.config:
                usual = self.config[key.name]
            else:
                block = self.usual(key.key, giving)
                usual = self.found.common[key.name] = self.found.sizes[block][key.key]
                self.found.origins[key.name] = self.paths[block, key.key]
            for keys in differing.values():
                if keys.get(key.key) == usual:
                    del keys[key.key]
        self.found.entries = entries_for(differing, self.main)
        for index, entry in enumerate(self.found.entries):
            first = entry["layers"].partition("..")[0]
            block = len(self.main) if first == MTP_LAYERS else int(first)
            block = next(moe for moe in self.found.sizes if moe >= block)
            for name in entry.keys() - {"layers"}:
                self.found.places["moe", "layers", index, name] = self.paths[block, name]

    def usual(self, key: str, giving: Sequence[int]) -> int:
        """Return the block whose value is the usual one.

        It is that of multi-token prediction, as TensorRT-LLM has it, or else the first with the value that most have.
        """
        beyond = next((block for block in giving if block >= len(self.main)), None)
        if beyond is not None:
            return beyond
        values = [json.dumps(self.found.sizes[block][key]) for block in giving]
        return giving[values.index(Counter(values).most_common(1)[0][0])]


def exported_blocks(spec: Spec) -> dict[str, list[dict[str, Any]]]:
    """Return `block_configs` and `mtp_block_configs` of a spec, with the sizes of each MoE block."""
    blocks = [_exported(spec, kind, block) for block, kind in enumerate(spec.blocks)]
    count = len(spec.model.pattern)
    return {TRUNK: blocks[:count]} | ({MTP: blocks[count:]} if spec.mtp else {})


def _exported(spec: Spec, kind: BlockKind, block: int) -> dict[str, Any]:
    sizes = moe_of_block(spec, block) if kind is MOE else None
    given = ((key.name, getattr(sizes, key.key)) for key in MOE.config_keys if sizes and key.key in _SIZES)
    return {"block_type": kind.hf_names[-1], **{name: value for name, value in given if value is not None}}
