"""Op definitions: documented, with shape rules that refuse what does not fit."""

from __future__ import annotations

import pytest

from n3c.ir import ops
from n3c.ir.types import DType, TensorType
from n3c.runtime.engines.reference.ops import EVALUATORS

F32, BF16, I64 = DType.F32, DType.BF16, DType.I64


def t(*dims: int | str, dtype: DType = F32) -> TensorType:
    return TensorType(dtype, dims)


def test_every_op_is_documented_and_evaluated() -> None:
    assert set(EVALUATORS) == set(ops.OPS)
    for op in ops.OPS.values():
        assert op.doc, op.name


X = t("B", "S", 8)
BAD: list[tuple[ops.OpDef, list[TensorType | None], dict[str, ops.Attribute], str]] = [
    (ops.linear, [X, t(4, 9, dtype=BF16)], {}, "does not fit"),
    (ops.linear, [X], {}, "takes 2 operands"),
    (ops.linear, [X, None], {}, "needs operand `weight`"),
    (ops.linear, [X, t(4, 8)], {"eps": 1.0}, "has attributes"),
    (ops.add, [X, t("B", "S", 9)], {}, "cannot add"),
    (ops.split, [X], {"sizes": (4, 5)}, "cannot split"),
    (ops.embedding, [X, t(10, 8)], {}, "must be i64"),
    (ops.rms_norm, [X, t(7)], {"eps": 1e-5}, "does not fit"),
    (ops.gated_rms_norm, [X, X, t(8)], {"groups": 3, "eps": 1e-5}, "does not divide"),
    (
        ops.dequantize_nvfp4,
        [t(4, 24, dtype=DType.F4E2M1), t(4, 1, dtype=DType.F8E4M3), t()],
        {},
        "not a multiple of 16",
    ),
    (ops.dequantize_nvfp4, [t(4, 32, dtype=DType.F4E2M1), t(4, 1, dtype=DType.F8E4M3), t()], {}, "does not fit"),
    (ops.dequantize_nvfp4, [t(4, 32), t(4, 2, dtype=DType.F8E4M3), t()], {}, "must be f4e2m1"),
    (ops.dequantize_fp8, [t(2, 4, 8, dtype=DType.F8E4M3), t()], {}, "does not fit"),
    (ops.causal_conv1d, [X, t(7, 1, 4), None], {}, "does not fit"),
    (ops.causal_conv1d_update, [X, t("B", 8, 4), t(8, 1, 4), None], {}, "window"),
    (ops.attention, [X, t("B", "S", 4), t("B", "S", 4)], {"num_heads": 4, "num_kv_heads": 4}, "head_dim"),
    (ops.experts, [X, t("B", "S", 2, dtype=I64), t("B", "S", 2), t(4, 16, 8), t(4, 16, 8)], {}, "does not fit up"),
]


@pytest.mark.parametrize(
    ("op", "operands", "attributes", "reason"), BAD, ids=lambda value: getattr(value, "name", None)
)
def test_shape_rules_refuse(
    op: ops.OpDef, operands: list[TensorType | None], attributes: dict[str, ops.Attribute], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        op.infer(operands, attributes)


def test_nvfp4_codes_may_be_bytes() -> None:
    scale, scale_2 = t(3, 4, 2, dtype=DType.F8E4M3), t(3)
    packed = ops.dequantize_nvfp4.infer([t(3, 4, 32, dtype=DType.F4E2M1), scale, scale_2], {})
    as_bytes = ops.dequantize_nvfp4.infer([t(3, 4, 16, dtype=DType.I8), scale, scale_2], {})
    assert packed == as_bytes == (t(3, 4, 32),)


def test_type_sizes() -> None:
    assert t(3, 5, dtype=DType.F4E2M1).bytes == 8
    assert t("B", 4).bind({"B": 2}).bytes == 32
    with pytest.raises(ValueError, match="symbolic"):
        _ = t("B", 4).bytes
    assert str(t("B", 4, dtype=BF16)) == "bf16[B, 4]"
