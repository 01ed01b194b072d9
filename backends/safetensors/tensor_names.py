"""The tensors of a file under the names of released checkpoints, whatever program wrote it.

Routed experts that are stored as one tensor [E, out, in], as transformers has them in memory, are one tensor each:
expert e begins e / E of the way into the stored one, so nothing is read to tell them apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from n3c.specs.spellings import released_name

from .header import TensorInfo

_FUSED = re.compile(r"(.+\.mixer\.experts)\.(up_proj|down_proj)(?:\.weight)?")
_MOST_EXPERTS = 1 << 16


class AmbiguousError(ValueError):
    """A tensor that can mean two things; the message says which."""


def released_tensors(stored: Mapping[str, TensorInfo]) -> Iterator[tuple[str, TensorInfo]]:
    """Yield the tensors of a header by their released names; AmbiguousError for fused experts that are square."""
    for stored_name, info in stored.items():
        name = released_name(stored_name)
        fused = _FUSED.fullmatch(name)
        if fused is None or len(info.shape) != 3 or not 0 < info.shape[0] <= _MOST_EXPERTS:
            yield name, info
            continue
        experts, rows, columns = info.shape
        if rows == columns:
            raise AmbiguousError(
                f"tensor `{stored_name}` holds {experts} experts of [{rows}, {columns}], and does not tell rows from"
                " columns"
            )
        size = info.bytes // experts
        for expert in range(experts):
            one = replace(info, shape=(rows, columns), offset=info.offset + expert * size)
            yield f"{fused[1]}.{expert}.{fused[2]}.weight", one
