"""The pattern DSL: which block stands at each layer, and the forms in which others write it.

    pattern = item* ; item = block | group | cut
    block   = symbol count?            symbol: one of `blocks.LEGEND`, as M Mamba-2 and * attention
    group   = "(" block-or-group+ ")" count?
    cut     = "|"                      a pipeline cut, as Megatron writes it; outside groups only
    count   = decimal digits directly after the symbol or the bracket: `M3` is `MMM`, `(ME)4` four pairs

White space and newlines separate freely; `#` starts a comment that ends with its line.
Other forms that are read and written without loss: Megatron's `main/mtp/mtp` with `|`
(Megatron-LM, megatron/core/models/hybrid/hybrid_layer_allocation.py), and `hybrid_override_pattern`
and `layers_block_type` of Hugging Face's nemotron_h configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from n3c.ir.text import escaped

from .block_kind import BlockKind
from .blocks import ATTENTION, MAMBA
from .kinds import by_symbol, kind_of, kinds, know_more, who_adds

MAX_BLOCKS = 4096
"""Most blocks of one pattern; the deepest released model has 108."""


class PatternError(ValueError):
    """A pattern that cannot be read; `offset` and `length` count characters of the pattern text."""

    def __init__(self, message: str, offset: int, length: int = 1, advice: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.offset = offset
        self.length = length
        self.advice = advice


@dataclass(frozen=True, slots=True)
class Pattern:
    """A parsed pattern. Two patterns are equal if they have the same blocks and pipeline cuts."""

    symbols: str
    """The expanded pattern, one symbol a block."""
    stages: tuple[int, ...] = ()
    """Pipeline cuts: a cut `i` stands in front of layer `i`; they never decrease, and may repeat."""
    text: str = field(default="", compare=False)
    """The pattern as it was written."""
    offsets: tuple[int, ...] = field(default=(), compare=False, repr=False)
    """For each block, the offset of its symbol in `text`."""

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parse the DSL; raises PatternError at the first thing that is wrong."""
        return _parse(text)

    @property
    def kinds(self) -> tuple[BlockKind, ...]:
        """The kind of each block."""
        known = by_symbol()
        return tuple(known[symbol] for symbol in self.symbols)

    def __iter__(self) -> Iterator[BlockKind]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.symbols)

    def __contains__(self, kind: object) -> bool:
        return isinstance(kind, BlockKind) and kind.symbol in self.symbols

    def layers(self, kind: BlockKind) -> tuple[int, ...]:
        """Return the layer indexes of `kind`."""
        return tuple(index for index, symbol in enumerate(self.symbols) if symbol == kind.symbol)

    def counts(self) -> dict[BlockKind, int]:
        """Return how many blocks of each kind there are, for the kinds that there are."""
        return {kind: count for kind in kinds() if (count := self.symbols.count(kind.symbol))}

    def summary(self) -> str:
        """Return the counts in words: `88 layers: 40 M, 40 E, 8 *`."""
        layers = f"{len(self)} layer{'s' if len(self) > 1 else ''}"
        return f"{layers}: {', '.join(f'{count} {kind.symbol}' for kind, count in self.counts().items())}"

    def doubts(self) -> Iterator[PatternError]:
        """Yield what can be read and was hardly meant: `(ME)*4`, which is `ME` once and four attention blocks.

        A repeated attention block directly behind a group or a symbol looks like a sign for times; `(ME) *4` does not.
        """
        attention = (offset for offset, kind in zip(self.offsets, self, strict=False) if kind is ATTENTION)
        for offset in dict.fromkeys(attention):
            count, end = _count(self.text, offset + 1)
            before = self.text[offset - 1 : offset]
            if count > 1 and (before == ")" or (before in by_symbol() and before != ATTENTION.symbol)):
                message = f"`*{count}` is {count} attention blocks, not a repetition ({self.summary()})"
                advice = f"to repeat, write the count alone, as `(ME){count}`; a space before `*` says that it is meant"
                yield PatternError(message, offset, end - offset, advice)

    def compact(self) -> str:
        """Return a short, readable DSL text that parses to an equal pattern, as `(ME)3 M*E`."""
        cuts = (0, *self.stages, len(self.symbols))
        return " | ".join(_compact(self.symbols[a:b]) for a, b in pairwise(cuts)).strip()


def _parse(text: str) -> Pattern:
    # A stack of open groups: their symbols, the offset of each symbol, where the group opened.
    symbols: list[str] = []
    offsets: list[int] = []
    opened: list[tuple[list[str], list[int], int]] = []
    stages: list[int] = []
    position = 0
    while position < len(text):
        char = text[position]
        if char.isspace():
            position += 1
        elif char == "#":
            end = text.find("\n", position)
            position = len(text) if end < 0 else end + 1
        elif char == "(":
            opened.append((symbols, offsets, position))
            symbols, offsets = [], []
            position += 1
        elif char == "|":
            if opened:
                raise PatternError("a pipeline cut `|` cannot stand inside a group", position)
            stages.append(len(symbols))
            position += 1
        elif char == ")" or kind_of(char) is not None:
            if char == ")":
                if not opened:
                    raise PatternError("`)` closes no group", position)
                outer_symbols, outer_offsets, start = opened.pop()
                if not symbols:
                    raise PatternError("empty group", start, position + 1 - start)
                item, places = symbols, offsets
                symbols, offsets = outer_symbols, outer_offsets
            else:
                item, places, start = [char], [position], position
            count, end = _count(text, position + 1)
            if len(symbols) + len(item) * count > MAX_BLOCKS:
                raise PatternError(f"pattern has more than {MAX_BLOCKS} blocks", start, end - start)
            symbols += item * count
            offsets += places * count
            position = end
        else:
            raise _unexpected(text, position)
    if opened:
        raise PatternError("`(` is never closed", opened[-1][2])
    if not symbols:
        raise PatternError("pattern has no blocks", 0, max(1, len(text)))
    return Pattern("".join(symbols), tuple(stages), text, tuple(offsets))


def _count(text: str, start: int) -> tuple[int, int]:
    """Return the repetition count that begins at `start` (1 without digits) and where it ends."""
    end = start
    while end < len(text) and text[end] in "0123456789":
        end += 1
    if end == start:
        return 1, end
    # Longer digit strings are beyond any bound; int() refuses very long ones with an error of its own.
    count = int(text[start:end]) if end - start < 10 else MAX_BLOCKS + 1
    if count == 0:
        raise PatternError("a repetition must be at least 1", start, end - start)
    return count, end


def _unexpected(text: str, position: int) -> PatternError:
    char = text[position]
    if char in "0123456789":
        end = position
        while end < len(text) and text[end] in "0123456789":
            end += 1
        message = f"`{text[position : min(end, position + 20)]}` repeats nothing"
        return PatternError(message, position, end - position, "write the count directly after a symbol or `)`")
    if char == "/":
        return PatternError("`/` is not a pattern symbol", position, 1, "the blocks of MTP are [mtp] `pattern`")
    advice = f"symbols are {_listed([f'{kind.symbol} ({kind.title})' for kind in kinds()])}; {who_adds()}"
    if char.upper() in by_symbol():
        advice = f"did you mean `{char.upper()}`?"
    return PatternError(f"`{escaped(char)}` is not a pattern symbol", position, 1, advice)


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _compact(symbols: str) -> str:
    """Group repetitions from the left: at each place, the unit that saves the most text."""
    items: list[str] = []
    literal = ""
    place = 0
    while place < len(symbols):
        unit, count = _best_unit(symbols, place)
        if count == 1:
            literal += unit
        else:
            items += [literal] if literal else []
            literal = ""
            items.append(f"({_compact(unit)}){count}" if len(unit) > 1 else f"{unit}{count}")
        place += len(unit) * count
    return " ".join([*items, literal] if literal else items)


def _best_unit(symbols: str, place: int) -> tuple[str, int]:
    """Return the unit and the repetition to write at `place`; one symbol once where none is shorter."""
    best, most_saved = (symbols[place], 1), -1
    for period in range(1, min(128, (len(symbols) - place) // 2) + 1):
        unit = symbols[place : place + period]
        if not symbols.startswith(unit, place + period) or not _reads_well(unit):
            continue
        count = 2
        while symbols.startswith(unit, place + count * period):
            count += 1
        # The gain is judged on the flat text; groups inside the unit only shorten it further.
        saved = period * (count - 1) - len(f"(){count} ")
        if saved > most_saved:
            best, most_saved = (unit, count), saved
    return best


def _reads_well(unit: str) -> bool:
    """Whether people would repeat `unit`: `ME` rather than `EM`, and attention ends a period."""
    mamba, attention = MAMBA.symbol, ATTENTION.symbol
    if mamba not in unit:
        return True
    after_attention = unit[unit.rfind(attention) + 1 :] if attention in unit else ""
    return unit[0] == mamba and mamba not in after_attention


def from_hybrid_override(text: str) -> Pattern:
    """Read `hybrid_override_pattern`: symbols only. Raises PatternError."""
    for offset, char in enumerate(text):
        if kind_of(char) is None:
            raise _unexpected(text, offset)
    return _parse(text)


def from_layers_block_type(names: Sequence[str]) -> Pattern:
    """Read `layers_block_type` in any spelling; PatternError's offset is the index of the bad entry."""
    symbols: list[str] = []
    for index, name in enumerate(names):
        kind = _kind_called(name)
        if kind is None:
            types = _listed([kind.hf_names[-1] for kind in kinds()])
            raise PatternError(f"unknown block type `{name}`", index, 1, f"types are {types}")
        symbols.append(kind.symbol)
        if index >= MAX_BLOCKS:
            raise PatternError(f"pattern has more than {MAX_BLOCKS} blocks", index)
    if not symbols:
        raise PatternError("pattern has no blocks", 0)
    text = "".join(symbols)
    return Pattern(text, (), text, tuple(range(len(text))))


def _kind_called(name: str) -> BlockKind | None:
    """Return the kind that an entry of `layers_block_type` means, that of an extension if need be."""

    def known() -> BlockKind | None:
        return next((kind for kind in kinds() if name in (kind.symbol, *kind.hf_names)), None)

    found = known()
    if found is None:
        know_more()
        found = known()
    return found


def from_megatron(text: str) -> tuple[Pattern, Pattern | None, int]:
    """Read Megatron's `--hybrid-layer-pattern`: the main pattern, that of MTP if any, and the MTP depth.

    `M*ME|M*ME/*E/*E` is eight layers cut in the middle and two prediction steps of `*E`.
    Raises PatternError, its offset counted in `text`.
    """
    main_text, *steps = text.split("/")
    main = _megatron_part(main_text, 0, cuts=True)
    if not any(steps):
        return main, None, 0
    offset = len(main_text) + 1
    mtp = _megatron_part(steps[0], offset, cuts=False)
    for step in steps:
        if step != steps[0]:
            message = f"every MTP step must be the same: `{step}` is not `{steps[0]}`"
            raise PatternError(message, offset, max(1, len(step)))
        offset += len(step) + 1
    return main, mtp, len(steps)


def _megatron_part(text: str, start: int, *, cuts: bool) -> Pattern:
    for offset, char in enumerate(text):
        if kind_of(char) is None and not (cuts and char == "|"):
            error = _unexpected(text, offset)
            raise PatternError(error.message, start + offset, error.length, error.advice)
    try:
        return _parse(text)
    except PatternError as error:
        raise PatternError(error.message, start + error.offset, error.length, error.advice) from None


def to_megatron(main: Pattern, mtp: Pattern | None = None, depth: int = 1) -> str:
    """Write Megatron's form: `|` at the pipeline cuts and one `/pattern` for each MTP step."""
    cuts = (0, *main.stages, len(main.symbols))
    text = "|".join(main.symbols[a:b] for a, b in pairwise(cuts))
    return text if mtp is None else text + f"/{mtp.symbols}" * depth
