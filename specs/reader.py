"""From plain values to a `Spec`: types, bounds, patterns and rules, everything that is wrong at once.

The reader knows nothing of TOML or JSON: it takes a tree of dicts, lists and scalars and a `Places`
that says where each stands. The schema is the dataclasses of `schema`; nothing is repeated here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from n3c.ir.diagnostics import Diagnostic, Severity, Span, did_you_mean

from .block_kind import BlockKind
from .consistency import check
from .keys import key
from .kinds import kinds, know_more, who_adds
from .pattern import Pattern, PatternError
from .places import Path, Places, dotted, shown
from .roles import all_roles, common_globs, match_roles, not_linear, select_layers
from .schema import OWN_TABLES, Format, Serving, Spec, TrainingFormat

MAX_ERRORS = 100
"""A file with more errors than this is something else; reading stops."""
MAX_ENTRIES = 64
"""Most entries of an array, other than rules and modules."""
MAX_RULES = 4096
"""Most rules of a table; each is held against every weight of the model."""

_BAD = object()  # what a value that was reported reads as


def read_spec(
    raw: Mapping[str, object], places: Places, start: Span, texts: Mapping[Path, str] | None = None
) -> tuple[Spec | None, list[Diagnostic]]:
    """Read a spec from plain values.

    `start` is the place of the whole document. `texts` gives, for values from the command line,
    what was typed, so that `3` can mean "3" where a string is wanted. Returns the spec, or None
    where any of the diagnostics is an error.
    """
    reader = _Reader(places, start, texts or {})
    spec = reader.spec(raw)
    return spec, in_order(reader.found, start.file)


def in_order(found: Sequence[Diagnostic], file: str) -> list[Diagnostic]:
    """Return diagnostics by their place in `file`, what is elsewhere last."""

    def place(item: Diagnostic) -> tuple[bool, int, int]:
        span = item.span
        return (span.file != file, span.line, span.column) if span else (True, 0, 0)

    return sorted(found, key=place)


Fields = Mapping[str, tuple[Any, Mapping[str, Any], bool]]
_fields: dict[type, Fields] = {}


def fields_of(cls: type) -> Fields:
    """Return, for each key of a table class: its type, its metadata, and whether it is required."""
    if cls not in _fields:
        hints = get_type_hints(cls)
        _fields[cls] = {
            field.name: (hints[field.name], field.metadata, field.default is dataclasses.MISSING)
            for field in dataclasses.fields(cls)
            if "doc" in field.metadata
        }
    return _fields[cls]


def spec_fields() -> Fields:
    """Return the same for the top level of a spec, with the tables of all block kinds that are known."""
    own = fields_of(Spec)
    return {**own, **{kind.table: (kind.table_class, _doc(kind), False) for kind in kinds() if kind.table not in own}}


def _doc(kind: BlockKind) -> Mapping[str, Any]:
    described: Mapping[str, Any] = key(f"Required where the pattern has {kind.symbol}.", default=None).metadata
    return described


class _Reader:
    def __init__(self, places: Places, start: Span, texts: Mapping[Path, str]) -> None:
        self.places = places
        self.start = start
        self.texts = texts
        self.found: list[Diagnostic] = []
        self.values: dict[str, Any] = {}
        self.given: list[Path] = []

    # Reporting

    @property
    def failed(self) -> bool:
        return any(item.severity is Severity.ERROR for item in self.found)

    def say(self, code: str, message: str, span: Span | None, advice: str | None = None) -> None:
        severity = Severity.WARNING if code.startswith("W") else Severity.ERROR
        if len(self.found) < MAX_ERRORS:
            self.found.append(Diagnostic(code, message, span or self.start, severity, advice))

    def know_more(self) -> None:
        """Learn of the block kinds of extensions, and report each that cannot be had."""
        self.found += [fault for fault in know_more() if fault not in self.found]

    def say_about(self, path: str, code: str, message: str, advice: str | None = None) -> None:
        """Report about a dotted path; the value is marked, for a table its header."""
        parts = tuple(int(part) if part.isdecimal() else part for part in path.split("."))
        self.say(code, message, self.places.value(parts), advice)

    # Tables

    def spec(self, raw: Mapping[str, object]) -> Spec | None:
        if raw.keys() - OWN_TABLES:
            self.know_more()
        values = self.table(Spec, raw, ())
        for name in ("quantization", "training"):
            self.rules(name)
        self.fit_serving()
        check(self.values, raw, self.say_about)
        if values is None or self.failed:
            return None
        values["serving"] = Serving(**{name: self.values[f"serving.{name}"] for name in fields_of(Serving)})
        used = {*values["model"].pattern, *(values["mtp"].pattern if values["mtp"] else ())}
        values |= {kind.table: None for kind in kinds() if kind not in used}
        tables = {name: values.pop(name) for name in values.keys() - OWN_TABLES}
        tables = {name: table for name, table in tables.items() if table is not None}
        return Spec(**values, tables=tables, spans=self.spans())

    def fit_serving(self) -> None:
        """Lower the lengths of [serving] that the spec leaves out to what the model allows."""
        absent = [name for name in fields_of(Serving) if ("serving", name) not in self.given]
        for name in absent:
            self.values[f"serving.{name}"] = getattr(Serving(), name)
        longest = self.values.get("model.max_position_embeddings")
        for name in ("max_seq_len", "prefill_chunk"):
            length = self.values.get(f"serving.{name}")
            if name in absent and longest is not None:
                length = self.values[f"serving.{name}"] = min(length, longest)
            longest = length

    def table(self, cls: type, raw: object, path: Path) -> dict[str, Any] | None:
        """Read one table; its good values also go to `self.values`, so that checks can still compare them."""
        if not isinstance(raw, dict):
            self.say("E0105", f"{_title(path)} must be a table, not {_kind(raw)}", self.places.key(path))
            return None
        table = cast("dict[str, object]", raw)
        fields = fields_of(cls) if path else spec_fields()
        self.unknown(table, fields, path)
        values: dict[str, Any] = {}
        for name, (hint, metadata, required) in fields.items():
            place = (*path, name)
            if name in table:
                self.given.append(place)
                value = self.value(plain(hint), table[name], place, metadata)
            elif required:
                what = f"table [{name}]" if name in _homes() else f"key `{name}`"
                where = f" in {_title(path)}" if path else ""
                advice = f"`{name}`: {metadata['doc']}"
                self.say("E0104", f"missing {what}{where}", self.places.key(path) if path else None, advice)
                value = _BAD
            else:
                value = next((field.default for field in dataclasses.fields(cls) if field.name == name), None)
            values[name] = value
            if value is not _BAD:
                self.values[dotted(place)] = value
        return None if any(value is _BAD for value in values.values()) else values

    def unknown(self, table: Mapping[str, object], fields: Iterable[str], path: Path) -> None:
        known = list(fields)
        for name in table:
            if name in known or len(self.found) >= MAX_ERRORS:
                continue
            advice = did_you_mean(name[:80], [key for key in known if key not in table]) or did_you_mean(
                name[:80], known
            )
            if advice is None:
                homes = [f"[{home}]" for home, cls in _homes().items() if name in fields_of(cls)]
                advice = f"`{name}` is a key of {homes[0]}" if homes else f"known: {', '.join(known)}"
                advice += "" if path or homes else f"; {who_adds()}"
            is_table = isinstance(table[name], dict) and not path
            what = f"table [{shown(name)}]" if is_table else f"key `{shown(name)}`"
            where = f" in {_title(path)}" if path else ""
            self.say("E0102", f"unknown {what}{where}", self.places.key((*path, name)), advice)

    # Values

    def value(self, hint: Any, raw: object, path: Path, metadata: Mapping[str, Any]) -> Any:
        origin, args = get_origin(hint), get_args(hint)
        if not isinstance(raw, str) and _wants_text(hint) and path in self.texts:
            raw = self.texts[path]
        if hint is Pattern:
            return self.pattern(raw, path)
        if dataclasses.is_dataclass(hint):
            values = self.table(cast("type", hint), raw, path)
            return _BAD if values is None else cast("type", hint)(**values)
        if origin is Literal:
            return self.choice(raw, path, args)
        if origin is tuple:
            return self.array(args, raw, path, metadata)
        return self.scalar(hint, raw, path, metadata)

    def scalar(self, hint: type, raw: Any, path: Path, metadata: Mapping[str, Any]) -> Any:
        value: Any = raw
        if hint is float and type(raw) is int:
            value = float(raw) if abs(raw) < 1 << 53 else math.copysign(math.inf, raw)
        if type(value) is not hint:
            self.wrong_type(raw, path, _WANTED[hint])
            return _BAD
        if isinstance(value, str):
            regex = metadata["regex"]
            if regex is not None and re.fullmatch(regex, value) is None:
                return self.malformed(value, path)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            limit = _out_of_bounds(value, metadata)
            if limit is not None:
                self.say("E0106", f"{_named(path)} must be {limit}, not {_number(raw)}", self.places.value(path))
                return _BAD
        return value

    def malformed(self, value: str, path: Path) -> object:
        kind, advice = "E0111", None
        name = str(path[-1]) if isinstance(path[-1], str) else str(path[-2])
        if name == "layers":
            words = ('"all", ', '"before attention"') if path[0] != "moe" else ("", '"mtp"')
            kind, advice = "E0110", f'write {words[0]}"3", "3..9", "first N", "last N" or {words[1]}'
        elif name == "name":
            advice = "small letters, digits, `.`, `_` and `-`, at most 80, beginning with a letter or digit"
        elif name == "passes":
            advice = "small letters, digits and `_`, at most 80, beginning with a letter"
        elif name == "modules":
            advice = "a module is named as in the checkpoint, as `backbone.layers.3.mixer.in_proj`"
        self.say(kind, f"{_named(path)} cannot be `{shown(value)}`", self.places.value(path), advice)
        return _BAD

    def choice(self, raw: object, path: Path, choices: Sequence[Any]) -> Any:
        if type(raw) is type(choices[0]) and raw in choices:
            return raw
        if type(raw) is not type(choices[0]):
            self.wrong_type(raw, path, _WANTED[type(choices[0])])
            return _BAD
        advice = did_you_mean(raw[:80], choices) if isinstance(raw, str) else None
        listed = ", ".join(str(choice) for choice in choices)
        wanted = f"must be one of {listed}" if len(choices) > 1 else f"must be {listed}"
        given = f"`{shown(raw)}`" if isinstance(raw, str) else _number(raw)
        self.say("E0107", f"{_named(path)} {wanted}, not {given}", self.places.value(path), advice)
        return _BAD

    def array(self, args: tuple[Any, ...], raw: object, path: Path, metadata: Mapping[str, Any]) -> Any:
        if not isinstance(raw, list):
            self.wrong_type(raw, path, "an array")
            return _BAD
        entries = cast("list[object]", raw)
        tables = dataclasses.is_dataclass(args[0])
        most = MAX_RULES if tables else MAX_ENTRIES
        if len(entries) > most and path[-1] != "modules":
            message = f"{_named(path)} has {len(entries)} entries, more than {most}"
            self.say("E0106", message, self.places.value(path))
            return _BAD
        values: list[Any] = []
        for index, entry in enumerate(entries):
            if len(self.found) >= MAX_ERRORS:
                return _BAD
            if tables:
                self.given.append((*path, index))
            values.append(self.value(args[0], entry, (*path, index), metadata))
        if any(value is _BAD for value in values):
            return _BAD
        choices = metadata["choices"]
        if choices is not None and tuple(values) not in choices:
            listed = " or ".join(str(list(choice)) for choice in choices)
            self.say("E0107", f"{_named(path)} must be {listed}", self.places.value(path))
            return _BAD
        return tuple(values)

    def wrong_type(self, raw: object, path: Path, wanted: str) -> None:
        self.say("E0105", f"{_named(path)} must be {wanted}, not {_kind(raw)}", self.places.value(path))

    def pattern(self, raw: object, path: Path) -> Any:
        if not isinstance(raw, str):
            self.wrong_type(raw, path, "a string")
            return _BAD
        try:
            pattern = Pattern.parse(raw)
        except PatternError as error:
            self.know_more()
            self.say_inside(path, "E0108", error)
            return _BAD
        for doubt in pattern.doubts():
            self.say_inside(path, "W0202", doubt)
        return pattern

    def say_inside(self, path: Path, code: str, error: PatternError) -> None:
        span = self.places.inside(path, error.offset, error.length)
        self.say(code, f"{_named(path)}: {error.message}", span, error.advice)

    # Rules

    def rules(self, name: str) -> None:
        """Check the rules of [quantization] or [training], as far as they could be read."""
        count = sum(1 for path in self.given if path[:2] == (name, "rules") and len(path) == 3)
        formats = get_args(Format if name == "quantization" else TrainingFormat)
        for index in range(count):
            self.rule((name, "rules", index), formats)

    def rule(self, path: Path, formats: Sequence[str]) -> None:
        rule = dotted(path)
        chosen = self.values.get(f"{rule}.format")
        if chosen is not None:
            self.choice(chosen, (*path, "format"), formats)
        roles, modules = self.values.get(f"{rule}.roles"), self.values.get(f"{rule}.modules")
        if roles == () and modules == ():
            self.say("E0112", "a rule needs `roles` or `modules`", self.places.key(path), 'for every weight: ["*"]')
        if roles and modules:
            advice = "write two rules"
            self.say("E0112", "a rule has `roles` or `modules`, not both", self.places.key((*path, "modules")), advice)
        for index, glob in enumerate(roles or ()):
            matched = match_roles((glob,)) if len(glob) <= 80 else frozenset[str]()
            if not matched and len(glob) <= 80:  # a role of an extension, of which the model has no block
                self.know_more()
                matched = match_roles((glob,))
            span = self.places.value((*path, "roles", index))
            if not matched:
                trunk = [role for role in all_roles() if not role.startswith("mtp.")]
                nearest = did_you_mean(glob[:80], (*common_globs(), *all_roles()))
                advice = nearest or f"roles: {', '.join(trunk)}; in MTP with `mtp.`"
                self.say("E0109", f"`{shown(glob)}` matches no role", span, advice)
            elif matched <= not_linear() and chosen not in (None, "bf16"):
                self.say("E0113", f"`{glob}` cannot be {chosen}: only the weights of linears can", span)
        self.layers(path)

    def layers(self, path: Path) -> None:
        selector, pattern = self.values.get(f"{dotted(path)}.layers"), self.values.get("model.pattern")
        if selector is None or pattern is None:
            return
        if selector != "all" and self.values.get(f"{dotted(path)}.modules"):
            span = self.places.key((*path, "layers"))
            self.say("E0112", "`layers` goes with `roles`: a module name already says its layer", span)
        try:
            select_layers(selector, pattern)
        except ValueError as error:
            self.say("E0110", f"`layers`: {error}", self.places.value((*path, "layers")))

    # Places of the finished spec

    def spans(self) -> dict[str, Span]:
        spans: dict[str, Span] = {}
        for path in self.given:
            span = self.places.value(path)
            if span is not None:
                spans[dotted(path)] = span
        for path in (("model", "pattern"), ("mtp", "pattern")):
            pattern = self.values.get(dotted(path))
            for layer, offset in enumerate(pattern.offsets if pattern else ()):
                span = self.places.inside(path, offset, 1)
                if span is not None:
                    spans[f"{dotted(path)}.{layer}"] = span
        return spans


_WANTED = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def plain(hint: Any) -> Any:
    """Strip `| None`: TOML has no null, a key that may be None may be left out."""
    if isinstance(hint, UnionType):
        return next(arg for arg in get_args(hint) if arg is not NoneType)
    return hint


def _wants_text(hint: Any) -> bool:
    return hint in (str, Pattern) or (get_origin(hint) is Literal and isinstance(get_args(hint)[0], str))


def entry_class(hint: Any) -> type | None:
    """Return the class of the entries of an array of tables; None for the type of any other value."""
    entries = get_args(hint)[:1] if get_origin(hint) is tuple else ()
    return next((cast("type", entry) for entry in entries if dataclasses.is_dataclass(entry)), None)


def _homes() -> dict[str, type]:
    """Return the tables of a spec: name → class."""
    found = {name: plain(hint) for name, (hint, _, _) in spec_fields().items()}
    return {name: cls for name, cls in found.items() if get_origin(cls) is None and cls not in (str, int)}


def _title(path: Path) -> str:
    """Return how messages call a table: `[moe]`, `[[quantization.rules]]`."""
    if path and isinstance(path[-1], int):
        return f"[[{dotted(path[:-1])}]]"
    return f"[{dotted(path)}]"


def _named(path: Path) -> str:
    if isinstance(path[-1], int):
        return f"entry {path[-1] + 1} of `{path[-2]}`"
    return f"`{path[-1]}`"


def _kind(raw: object) -> str:
    names: dict[type, str] = {
        bool: "a boolean",
        int: "an integer",
        float: "a float",
        str: "a string",
        list: "an array",
        dict: "a table",
        NoneType: "null",
    }
    return names.get(type(raw), "a date or time")


def _number(raw: object) -> str:
    if isinstance(raw, int) and abs(raw) >= 10**15:
        return f"a number of {math.floor(math.log10(abs(raw))) + 1} digits"
    return str(raw)


def _out_of_bounds(value: float, metadata: Mapping[str, Any]) -> str | None:
    """Return what `value` should have been, or None where it is within its bounds."""
    minimum, above, maximum = metadata["minimum"], metadata["above"], metadata["maximum"]
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if minimum is not None and value < minimum:
        return f"at least {minimum}"
    if above is not None and value <= above:
        return f"more than {above}"
    if maximum is not None and value > maximum:
        return f"at most {maximum}"
    return None
