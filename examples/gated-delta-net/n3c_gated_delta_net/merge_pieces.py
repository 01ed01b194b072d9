"""merge_pieces: let what is split and joined again stay in one piece.

Pattern: `split_groups` of one group is `split`; and of a `split`, neighbouring pieces that nothing but one `concat`
reads, in their order, are one piece. A gated delta net with one key head, as each of several processes may have, is
such a case: its q, k and v are one slice of the projection then. After fuse_moe, which may merge that projection with
others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

from n3c.ir import ops
from n3c.ir.program import Function, Node, Program, Value
from n3c.ir.rewrite import Builder
from n3c.passes.pipelines import Stage

from .ops import split_groups


@dataclass(frozen=True, slots=True)
class MergePieces:
    """Coarser splits in the place of splits and concatenations."""

    name: ClassVar[str] = "merge_pieces"

    def run(self, program: Program) -> bool:
        """Rewrite every function in place; return whether anything changed."""
        changed = [self._function(function) for function in program.functions.values()]
        return any(changed)

    def _function(self, function: Function) -> bool:
        changed = False
        for node in [n for n in function.nodes if n.op is split_groups and n.attributes["groups"] == 1]:
            self._split(function, node, [[piece] for piece in node.results])
            changed = True
        while pair := _joined(function):
            concat, pieces = pair
            split = pieces[0].node
            assert split is not None
            at = split.results.index(pieces[0])
            merged = [*([v] for v in split.results[:at]), pieces, *([v] for v in split.results[at + 2 :])]
            whole = self._split(function, split, merged)[at]
            function.replace(concat.results[0], whole)
            function.nodes.remove(concat)
            changed = True
        return changed

    def _split(self, function: Function, node: Node, merged: list[list[Value]]) -> list[Value]:
        """Put a `split` in the place of `node`, whose pieces are those of each list of `merged` in one."""
        sizes = tuple(sum(cast("int", v.type.dims[-1]) for v in values) for values in merged)
        build = Builder.before(function, node, self.name)
        made = build.emit_many(ops.split, node["x"], names=[values[0].name for values in merged], sizes=sizes)
        for values, piece in zip(merged, made, strict=True):
            if len(values) == 1:
                function.replace(values[0], piece)
        function.nodes.remove(node)
        return made


def _joined(function: Function) -> tuple[Node, list[Value]] | None:
    """Return a concatenation of neighbouring pieces that nothing else reads, and these; None where there is none."""
    for concat in (node for node in function.nodes if node.op is ops.concat):
        first, second = concat["x"], concat["y"]
        split = first.node
        if split is None or split.op is not ops.split or second.node is not split:
            continue
        readers = [*(v for node in function.nodes for v in node.operands), *function.outputs, *function.next_states]
        alone = all(sum(v is read for read in readers) == 1 for v in (first, second))
        if alone and split.results.index(second) == split.results.index(first) + 1:
            return concat, [first, second]
    return None


STAGE = Stage(MergePieces, lambda spec, lacking: MergePieces(), after="fuse_moe")
