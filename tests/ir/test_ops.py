"""Op definitions: documented, with shape rules that refuse what does not fit."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from n3c.ir import ops
from n3c.ir.op_definition import OPS, Attribute, OpDef
from n3c.ir.types import DType, TensorType
from n3c.runtime.engines.reference.ops import EVALUATORS

F32, BF16, I64 = DType.F32, DType.BF16, DType.I64


def t(*dims: int | str, dtype: DType = F32) -> TensorType:
    return TensorType(dtype, dims)


def test_every_op_is_documented_and_evaluated() -> None:
    assert set(EVALUATORS) == set(OPS)
    for op in OPS.values():
        assert op.doc, op.name


Case = tuple[OpDef, list[TensorType | None], dict[str, Attribute], str]
X, COUNTS = t("B", "S", 8), t("B", dtype=I64)
IDS, INDICES, WEIGHTS = t("B", "S", dtype=I64), t("B", "S", 2, dtype=I64), t("B", "S", 2)
UP, DOWN = t(4, 16, 8), t(4, 8, 16)
FP4, FP8 = DType.F4E2M1, DType.F8E4M3
CODES, SCALE = t(4, 32, dtype=FP4), t(4, 2, dtype=FP8)
ROUTE: dict[str, Attribute] = {
    "top_k": 2, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "scaling_factor": 1.0
}  # fmt: skip
CONV = t(8, 1, 4)
SSD: dict[str, Attribute] = {"n_groups": 2, "chunk_size": 8}
HEADS: dict[str, Attribute] = {"num_heads": 4, "num_kv_heads": 2}
QUERY, CACHE, PLACES = t("B", "S", 32), t("B", 2, 12, 8), t("L", dtype=I64)


def ssd(**changed: TensorType) -> list[TensorType | None]:
    """Operands of ssd for 4 heads of 2 channels, 2 groups of 8 states; `changed` ones by name."""
    fitting = {"x": X, "dt": t("B", "S", 4), "A": t(4), "B": t("B", "S", 16), "C": t("B", "S", 16), "D": t(4)}
    return [{**fitting, "dt_bias": t(4), **changed}[name] for name in ops.ssd.operands]


EXPERTS: dict[str, Attribute] = {"inner_format": ""}

BAD: list[Case] = [
    (ops.linear, [X], {}, "takes 2 operands"),
    (ops.linear, [X, None], {}, "needs operand `weight`"),
    (ops.linear, [X, t(4, 8)], {"eps": 1.0}, "has attributes"),
    (ops.embedding, [X, t(10, 8)], {}, "must be i64"),
    (ops.last_token, [X, t("B")], {}, "counts f32.B. do not fit"),
    (ops.add, [X, t("B", "S", 9)], {}, "cannot add"),
    (ops.concat, [X, t("B", 1, 8)], {}, "cannot concatenate"),
    (ops.concat, [t("B", "S"), t("B", "S")], {}, "static last dims"),
    (ops.split, [X], {"sizes": (4, 5)}, "cannot split"),
    (ops.rms_norm, [X, t(7)], {"eps": 1e-5}, "does not fit"),
    (ops.gated_rms_norm, [X, X, t(7)], {"groups": 2, "eps": 1e-5}, "do not fit"),
    (ops.gated_rms_norm, [X, X, t(8)], {"groups": 3, "eps": 1e-5}, "does not divide"),
    (ops.linear, [X, t(4, 9, dtype=BF16)], {}, "does not fit"),
    (ops.expert_linear, [X, INDICES, UP], {}, "expert_linear of"),
    (ops.expert_linear, [t("B", "S", 1, 9), INDICES, UP], {}, "weight .* does not fit"),
    (ops.expert_linear, [t("B", "S", 3, 8), INDICES, UP], {}, "does not fit indices"),
    (ops.dequantize_nvfp4, [t(4, 32), SCALE, t()], {}, "must be f4e2m1"),
    (ops.dequantize_nvfp4, [CODES, t(4, "K", dtype=FP8), t()], {}, "static last dim"),
    (ops.dequantize_nvfp4, [t(4, 24, dtype=FP4), t(4, 1, dtype=FP8), t()], {}, "scale .* does not fit"),
    (ops.dequantize_nvfp4, [CODES, t(4, 2), t()], {}, "scale must be f8e4m3 or i8"),
    (ops.dequantize_nvfp4, [CODES, t(4, 1, dtype=FP8), t()], {}, "scale .* does not fit"),
    (ops.dequantize_nvfp4, [CODES, SCALE, t(4)], {}, "scale_2 .* does not fit"),
    (ops.dequantize_fp8, [t(4, 8), t()], {}, "must be f8e4m3 or i8"),
    (ops.dequantize_fp8, [t(2, 4, 8, dtype=FP8), t()], {}, "does not fit"),
    (ops.route, [X, t(7)], ROUTE, "bias .* does not fit"),
    (ops.route, [X, t(8)], ROUTE | {"top_k": 9}, "top_k = 9 of 8 experts"),
    (ops.experts, [X, INDICES, WEIGHTS, t(4, 16, 9), DOWN], EXPERTS, "up .* does not fit"),
    (ops.experts, [X, INDICES, WEIGHTS, UP, UP], EXPERTS, "does not fit up"),
    (ops.experts, [X, INDICES, t("B", "S", 3), UP, DOWN], EXPERTS, "differ"),
    (ops.experts, [X, INDICES, WEIGHTS, UP, DOWN, t()], EXPERTS, "go together"),
    (ops.experts, [X, INDICES, WEIGHTS, UP, DOWN, t(4)], {"inner_format": "fp8"}, "inner_scale is f32"),
    (ops.quantize_activation, [X, t()], {"format": "bf16"}, "to nvfp4 or fp8"),
    (ops.quantize_activation, [X, t(8)], {"format": "fp8"}, "the scale of activations is f32"),
    (ops.quantize_activation, [X, t()], {"format": "nvfp4"}, "no blocks of 16"),
    (ops.combine_experts, [t("B", "S", 3, 8), WEIGHTS], {}, "do not fit"),
    (ops.causal_conv1d, [X, t(7, 1, 4), None], {}, "weight .* does not fit"),
    (ops.causal_conv1d, [X, CONV, t(7)], {}, "bias .* does not fit"),
    (ops.causal_conv1d_update, [X, t("B", 8, 3), t(8, 1, "W")], {}, "static width"),
    (ops.causal_conv1d_update, [X, t("B", 8, 4), CONV, None], {}, "window"),
    (ops.causal_conv1d_update, [X, t("B", 8, 3), CONV, None, IDS], {}, "counts .* do not fit"),
    (ops.ssd, ssd(dt=t("B", "S", 3)), SSD, "dt .* does not fit"),
    (ops.ssd, ssd(dt_bias=t(3)), SSD, "differ in heads"),
    (ops.ssd, ssd(C=t("B", "S", 8)), SSD, "B .* and C .* differ"),
    (ops.ssd, ssd(x=t("B", "S", "D")), SSD, "static widths"),
    (ops.ssd, ssd(), SSD | {"n_groups": 3}, "do not divide"),
    (ops.ssd_update, [*ssd(), t("B", 4, 2, 8), IDS], SSD, "counts .* do not fit"),
    *(
        (ops.ssd_update, [*ssd(), t(*dims)], SSD, "B, H, P, N. is ..B., 4, 2, 8")
        for dims in ((1, 4, 2, 8), ("B", 5, 2, 8), ("B", 4, 3, 8), ("B", 4, 2, 16), ("B", 4, 2))
    ),
    (ops.attention, [X, X, t("B", "S", 4)], HEADS, "attention of"),
    (ops.attention, [X, X, X], HEADS | {"num_kv_heads": 3}, "4 heads over 3"),
    (ops.attention, [X, t("B", "S", 4), t("B", "S", 4)], HEADS | {"num_kv_heads": 4}, "differ in head_dim"),
    (ops.write_cache, [t("B", "S", 16), t(3, 2, 12, 8), COUNTS], {}, "cache .* does not fit"),
    (ops.write_cache, [X, CACHE, COUNTS], {}, "cache .* does not fit"),
    (ops.write_cache, [t("B", "S", 16), CACHE, IDS], {}, "lengths .* do not fit"),
    (ops.write_cache, [t("B", "S", 16), CACHE, COUNTS, IDS], {}, "counts .* do not fit"),
    (ops.write_cache, [t("B", "S", 16), CACHE, COUNTS, None, t(2)], {}, "the scale of a cache is f32"),
    (ops.cached_attention, [QUERY, CACHE, t("B", 2, 12, 4), COUNTS, PLACES], HEADS, "caches .* differ"),
    (ops.cached_attention, [QUERY, t("B", 4, 12, 8), t("B", 4, 12, 8), COUNTS, PLACES], HEADS, "cache .* does not fit"),
    (ops.cached_attention, [X, CACHE, CACHE, COUNTS, PLACES], HEADS, "has not 4 heads"),
    (
        ops.cached_attention,
        [QUERY, t("B", 3, 12, 8), t("B", 3, 12, 8), COUNTS, PLACES],
        HEADS | {"num_kv_heads": 3},
        "4 heads over 3",
    ),
    (ops.cached_attention, [QUERY, CACHE, CACHE, IDS, PLACES], HEADS, "lengths .* do not fit"),
    (ops.cached_attention, [QUERY, CACHE, CACHE, COUNTS, t("L")], HEADS, "key_positions are"),
    (ops.cached_attention, [QUERY, CACHE, CACHE, COUNTS, PLACES, t(1)], HEADS, "the scale of a cache is f32"),
]


@pytest.mark.parametrize(
    ("op", "operands", "attributes", "reason"), BAD, ids=lambda value: getattr(value, "name", None)
)
def test_shape_rules_refuse(
    op: OpDef, operands: list[TensorType | None], attributes: dict[str, Attribute], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        op.infer(operands, attributes)


def test_every_condition_of_a_shape_rule_refuses_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each `_require` of `n3c.ir.ops` is what refuses at least one of the cases."""
    tree = ast.parse(Path(ops.__file__).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    conditions = {node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "require"}
    refused: set[int] = set()

    def recording(condition: bool, message: str) -> None:
        if not condition:
            refused.add(inspect.stack()[1].lineno)
            raise ValueError(message)

    monkeypatch.setattr(ops, "require", recording)
    for op, operands, attributes, _ in BAD:
        with pytest.raises(ValueError):
            op.infer(operands, attributes)
    assert conditions - refused == set()


def test_nvfp4_codes_may_be_bytes() -> None:
    scale, scale_2 = t(3, 4, 2, dtype=DType.F8E4M3), t(3)
    packed = ops.dequantize_nvfp4.infer([t(3, 4, 32, dtype=DType.F4E2M1), scale, scale_2], {})
    as_bytes = ops.dequantize_nvfp4.infer([t(3, 4, 2, 8, dtype=DType.I8), scale, scale_2], {})
    assert packed == as_bytes == (t(3, 4, 32),)


def test_type_sizes() -> None:
    assert t(3, 5, dtype=DType.F4E2M1).bytes == 8
    assert t("B", 4).bind({"B": 2}).bytes == 32
    with pytest.raises(ValueError, match="symbolic"):
        _ = t("B", 4).bytes
    assert str(t("B", 4, dtype=BF16)) == "bf16[B, 4]"
