"""What a quantized checkpoint says of itself: a record for programs, and the model card that tells it to people.

Neither has a time or an absolute path, so that the same checkpoint and options give the same bytes. The card holds
names that others chose (folders, options): they stand in code spans, which neither Markdown nor HTML reads.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from n3c.ir.json_file import is_count, read_json
from n3c.ir.text import escaped

if TYPE_CHECKING:  # these load numpy
    from n3c.backends.safetensors.layout import Shard
    from n3c.backends.safetensors.selfcheck import Checked

RECORD, CARD = "n3c_record.json", "README.md"
SOURCE_CARD = "README.source.md"
"""The card of the checkpoint that was quantized, in the result."""
_MOST_BYTES = 1 << 26
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Provenance:
    """Who made a checkpoint of what."""

    name: str = ""
    """That of the spec."""
    spec_sha256: str = ""
    """Of its canonical text, with the formats that were chosen."""
    source: str = ""
    """What the source is called: a hub id, or a folder."""
    command: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    in_transformers: bool = True
    """Whether transformers has such a model."""


def record(
    provenance: Provenance,
    shards: Sequence[Shard],
    ledger: Sequence[Mapping[str, Any]],
    checked: Sequence[Checked],
    files: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """Return the record of a checkpoint; `files` are the rows of `source` and of the result itself, `files`."""
    formats: dict[str, dict[str, int]] = {}
    for line in ledger:
        entry = formats.setdefault(line["format"], {"weights": 0, "bytes": 0})
        entry["weights"] += 1
        entry["bytes"] += line["bytes"]
    weights = [weight for shard in shards for weight in shard.weights]
    return {
        "schema": 1,
        "kind": "quantized",
        "name": provenance.name,
        "spec_sha256": provenance.spec_sha256,
        "command": list(provenance.command),
        "versions": dict(provenance.versions),
        "source": {"name": provenance.source, "files": list(files["source"])},
        "tensors": {
            "count": sum(len(shard.offsets) for shard in shards),
            "bytes": sum(shard.size - len(shard.header) for shard in shards),
        },
        "weights": {"count": len(weights), "elements": sum(prod(weight.shape) for weight in weights)},
        "formats": dict(sorted(formats.items())),
        "errors": [
            {
                "role": entry.role,
                "format": entry.format,
                "weights": entry.weights,
                "relative_error": float(f"{entry.relative_error:.6g}"),
            }
            for entry in checked
        ],
        "files": list(files["files"]),
    }


def model_card(record: Mapping[str, Any], in_transformers: bool = True) -> str:
    """Return README.md for a record, which names transformers as the library where that has the model."""
    source, versions = record["source"]["name"], record["versions"]
    lines = ["---", *(["library_name: transformers"] if in_transformers else [])]
    if re.fullmatch(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+", source):
        lines.append(f"base_model: {json.dumps(source)}")
    lines += ["tags:", "- n3c", "- modelopt", "---", f"# {record['name']}", ""]
    lines.append(f"Quantized by n3c {versions.get('n3c', '')} from {code(source)}, in ModelOpt's layout:")
    lines += ["", "| format | weights | bytes |", "|---|---|---|"]
    lines += [f"| {name} | {entry['weights']:,} | {entry['bytes']:,} |" for name, entry in record["formats"].items()]
    errors = [entry for entry in record["errors"] if entry["relative_error"]]
    if errors:
        lines += ["", "Read back, Σ (dequantized − w)² / Σ w² over a sample:", ""]
        lines += ["| role | format | weights | relative error |", "|---|---|---|---|"]
        keys = ("role", "format", "weights", "relative_error")
        lines += [f"| {' | '.join(str(entry[key]) for key in keys)} |" for entry in errors]
    lines += ["", f"Command: {code(shlex.join(record['command']))}", ""]
    lines.append(f"`{RECORD}` has the counts, versions, and SHA-256 of every file and of those of the source;")
    lines.append(f"`n3c verify` compares them. The card of the source, if it had one, is `{SOURCE_CARD}`.")
    return "\n".join(lines) + "\n"


def code(text: str) -> str:
    """Return any text as a Markdown code span on one line, which it cannot leave."""
    line = escaped(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{space}{line}{space}{fence}"


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a checkpoint; None without one that can be read."""
    try:
        data = read_json(folder / RECORD, _MOST_BYTES)
    except (OSError, ValueError):
        return None
    return cast("dict[str, Any]", data) if _is_record(data) else None


def _is_record(data: object) -> bool:
    try:
        return all(_is_row(row) for row in cast("dict[str, list[Any]]", data)["files"])
    except (KeyError, TypeError):
        return False


def _is_row(row: Any) -> bool:
    """Whether a row names a file of the folder itself, its size and its hash; KeyError or TypeError for no row."""
    named = isinstance(row["path"], str) and Path(row["path"]).name == row["path"]
    return named and is_count(row["bytes"]) and _SHA256.fullmatch(row["sha256"]) is not None
