"""The letters of sizes: one for each, with one meaning in ops, generated code and documentation.

Of a plain linear [out, in] the two sizes are written out. In equations of Mamba-2, A, B, C and D are tensors, as in
its paper.
"""

from __future__ import annotations

GENERAL = {
    "B": "sequences",
    "S": "tokens of each",
    "D": "hidden size",
    "V": "vocabulary",
}
"""Letter → meaning, of every model."""
MAMBA = {
    "H": "heads",
    "P": "channels of a head",
    "N": "state size",
    "G": "groups of heads that share B and C",
    "R": "heads of a group",
    "X": "channels of the convolution",
    "W": "taps of the convolution",
    "Q": "tokens of a chunk",
}
MOE = {
    "E": "experts",
    "K": "experts of each token",
    "I": "inner width of an expert",
    "L": "width of the experts",
    "U": "inner width of the shared expert",
    "T": "tokens of all sequences, B * S",
    "M": "choices of experts, T * K",
}
ATTENTION = {
    "J": "query heads",
    "Y": "key and value heads",
    "Z": "channels of a head",
    "C": "tokens that the cache holds",
}
MLP = {"F": "inner width"}

TABLES = {"": GENERAL, "M": MAMBA, "E": MOE, "*": ATTENTION, "-": MLP}
"""Symbol of a block kind → its letters; the empty symbol has those of every model."""
