"""The builder adds nodes to a function at an insertion point and replaces nodes by others."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .op_definition import Attribute, OpDef
from .program import Function, Node, Origin, Value

_NUMBER = re.compile(r"_\d+$")


@dataclass(slots=True)
class Builder:
    """Adds nodes of one origin to a function in order, in front of a node or at the end."""

    function: Function
    origin: Origin
    point: Node | None = None
    """The node in front of which nodes are inserted; None: the end of the function."""

    @classmethod
    def before(cls, function: Function, node: Node, made_by: str) -> Builder:
        """Return a builder that inserts in front of `node`, with its place in the spec, for the pass `made_by`."""
        return cls(function, node.origin.by(made_by), node)

    def emit(self, op: OpDef, *operands: Value | None, name: str, **attributes: Attribute) -> Value:
        """Add a node with one result and return that; ValueError where the operands do not fit the op."""
        return self.emit_many(op, *operands, names=[name], **attributes)[0]

    def emit_many(self, op: OpDef, *operands: Value | None, names: list[str], **attributes: Attribute) -> list[Value]:
        """Add a node and return its results, one a name; ValueError where the operands do not fit the op.

        Optional operands at the end may be left out. A name that is taken gets a number.
        """
        padded = op.padded(operands)
        types = op.infer([v.type if v else None for v in padded], attributes)
        if len(types) != len(names):
            raise ValueError(f"{op.name} gives {len(types)} results, not {len(names)}")
        node = Node(op, padded, dict(attributes), [], self.origin)
        for name, type_ in zip(names, types, strict=True):
            node.results.append(Value(self._fresh(name, node.results), type_, node))
        nodes = self.function.nodes
        nodes.insert(nodes.index(self.point) if self.point else len(nodes), node)
        return node.results

    def replace(self, node: Node, *values: Value) -> None:
        """Make what read the results of `node` read `values`, and erase it.

        A value that was named after the result that it replaces takes over its very name.
        """
        for old, new in zip(node.results, values, strict=True):
            self.function.replace(old, new)
        self.erase(node)
        for old, new in zip(node.results, values, strict=True):
            if new.node is not None and _base(new.name) == _base(old.name):
                new.name = old.name

    def erase(self, node: Node) -> None:
        """Take `node`, whose results nobody may read, out of the function."""
        if node is self.point:
            following = self.function.nodes[self.function.nodes.index(node) + 1 :]
            self.point = following[0] if following else None
        self.function.nodes.remove(node)

    def _fresh(self, name: str, others: list[Value]) -> str:
        """Return `name`, with one number after its base where it is taken: `xbc_1` becomes `xbc_2`, not `xbc_1_1`."""
        taken = {value.name for value in (*self.function.values(), *others)}
        candidate, n = name, 1
        while candidate in taken:
            candidate, n = f"{_base(name)}_{n}", n + 1
        return candidate


def _base(name: str) -> str:
    """Return a name without the number that tells it from others."""
    return _NUMBER.sub("", name)
