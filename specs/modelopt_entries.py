"""What ModelOpt's quantization configs are made of: names of formats, of modules, bits, and wildcards.

What the entries of such a config have in common, wherever they stand; `modelopt` puts them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from n3c.ir.diagnostics import did_you_mean
from n3c.ir.formats import FORMATS, NVFP4_BLOCK

from .places import shown
from .spellings import released_name

ALGORITHMS = {format_.modelopt: format_.name for format_ in FORMATS.values() if format_.modelopt}
"""ModelOpt's name of a format → ours."""
MIXED = "MIXED_PRECISION"
MAX_GLOBS = 256
"""Most wildcards of a config."""
WILD = frozenset("*?[")
"""The characters of wildcards."""
_OF_REGULAR_EXPRESSIONS = frozenset("\\^$()|+{}")
"""Characters that neither names nor wildcards have; nor does either begin with a dot."""

REQUANTIZE = "quantize the unquantized checkpoint with n3c, or take one in one of these formats"
_AWQ = (
    "its weights belong to inputs that are multiplied by `pre_quant_scale`, which n3c does not compute:"
    " take a checkpoint that was quantized without"
)
IN_BF16 = "n3c has embeddings, convolutions and norms in BF16: take a checkpoint in which they are"


class QuantizationError(ValueError):
    """A quantization config that cannot become rules; `path` is where in it."""

    def __init__(self, message: str, path: tuple[str, ...], advice: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.advice = advice


def upper(value: object) -> str:
    """Return a name as ModelOpt spells it, whose letter case readers ignore; empty for what is no string."""
    return value.upper() if isinstance(value, str) else ""


def format_of_algorithm(algorithm: object, path: tuple[str, ...]) -> str:
    """Return the format that a `quant_algo` means; QuantizationError for what n3c has no format for."""
    name = upper(algorithm)
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    wanted = f"supported are {', '.join(ALGORITHMS)} and {MIXED}"
    advice = _AWQ if "AWQ" in name or "SVD" in name else did_you_mean(name[:80], ALGORITHMS) or REQUANTIZE
    raise QuantizationError(f"quantization algorithm `{shown(str(algorithm))}`: {wanted}", path, advice)


def refuse_awq(entry: Mapping[str, object], path: tuple[str, ...]) -> None:
    """Raise QuantizationError where weights go with scaled inputs."""
    if entry.get("pre_quant_scale"):
        raise QuantizationError("quantized with `pre_quant_scale`", (*path, "pre_quant_scale"), _AWQ)


def require_block(entry: Mapping[str, object], chosen: str, path: tuple[str, ...]) -> None:
    """Refuse blocks of another size than NVFP4's."""
    size = entry.get("group_size")
    if FORMATS[chosen].blocked and size is not None and size != NVFP4_BLOCK:
        message = f"`group_size` is {shown(str(size))}: NVFP4 has {NVFP4_BLOCK} weights a scale"
        raise QuantizationError(message, (*path, "group_size"), REQUANTIZE)


def module_name(name: str) -> str:
    """Return a module name as released checkpoints spell it.

    ModelOpt 0.47 with transformers 5 ends each name with a dot, a null and a mangled sentinel.
    """
    return released_name(name.split(".\0", 1)[0])


def parents(module: str) -> list[str]:
    """Return `module` and the modules around it that a config may name instead."""
    names = [module]
    while "." in names[-1]:
        names.append(names[-1].rpartition(".")[0])
    return names


@dataclass(frozen=True, slots=True)
class Chosen:
    """The formats that a config gives."""

    default: str | None
    """That of every linear; None: only what is named is quantized."""
    names: Mapping[str, str]
    """Module, or parent of modules → format."""
    globs: Mapping[str, str]

    def named(self, module: str) -> str | None:
        """Return the format of a module that the config names, itself, by a parent or by a wildcard."""
        for name in parents(module):
            if name in self.names:
                return self.names[name]
        return next((format_ for glob, format_ in self.globs.items() if fnmatchcase(module, glob)), None)


def split_wildcards(default: str | None, formats: Mapping[str, str], key: str) -> Chosen:
    """Return formats by names and by wildcards."""
    for name in formats:
        require_readable(name, key)
    globs = {name: format_ for name, format_ in formats.items() if WILD & set(name)}
    require_few(globs, key)
    return Chosen(default, {name: chosen for name, chosen in formats.items() if name not in globs}, globs)


def require_readable(name: str, key: str) -> None:
    """Refuse names that are patterns of a kind that readers take differently."""
    if name.startswith(("re:", ".")) or _OF_REGULAR_EXPRESSIONS & set(name.split(".\0", 1)[0]):
        message = f"`{shown(name)}` is a regular expression"
        raise QuantizationError(message, (key,), "name the modules, or write wildcards, as `*.mixer.in_proj`")
    if len(name) > 200 and WILD & set(name.split(".\0", 1)[0]):
        raise QuantizationError(f"`{shown(name[:60])}…` is a wildcard of more than 200 characters", (key,))


def require_few(globs: Sequence[str] | Mapping[str, str], key: str) -> None:
    """Raise QuantizationError for more wildcards than a model can be matched with."""
    if len(globs) > MAX_GLOBS:
        raise QuantizationError(f"`{key}` has more than {MAX_GLOBS} wildcards", (key,), "name the modules")
