"""The pass `merge_pieces` and the backend `mermaid`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from models import SPEC, checkpoint, generated, spec_of
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.sources import load
from n3c.compiler import build, repro
from n3c.ir.verify import verify
from n3c.passes.lower.model import lower
from n3c.passes.serving import serve
from n3c.runtime.engines.reference.evaluate import evaluate
from n3c_gated_delta_net.merge_pieces import MergePieces

ONE_KEY = SPEC.replace("num_key_heads = 2", "num_key_heads = 1")
ASKED = 'passes = ["merge_pieces"]\n'


@torch.no_grad()
@pytest.mark.parametrize(("text", "changes"), [(ONE_KEY, True), (SPEC, False)])
def test_the_same_numbers_before_and_after(text: str, changes: bool, tmp_path: Path) -> None:
    spec = spec_of(text)
    stored = Checkpoint(checkpoint(generated(spec), tmp_path))
    before, after = lower(spec), lower(spec)
    assert MergePieces().run(after) is changes
    assert MergePieces().run(after) is False
    verify(after)
    parameters = {name: torch.from_numpy(load(p, stored).astype("float32")) for name, p in before.parameters.items()}
    ids = {"input_ids": torch.arange(20)[None]}
    expected, found = (evaluate(program, "forward", ids, parameters).outputs[0] for program in (before, after))
    assert torch.equal(expected, found)


def test_q_k_and_v_stay_one_piece() -> None:
    program = lower(spec_of(ONE_KEY))
    MergePieces().run(program)
    nodes = program.functions["gated_delta_net"].nodes
    assert not [node for node in nodes if node.op.name in ("concat", "split_groups")]
    qkvz = next(node for node in nodes if node.op.name == "split")
    assert qkvz.attributes["sizes"] == (2 * 16 + 128, 128)


def test_a_spec_asks_for_it() -> None:
    assert "merge_pieces" not in [report.name for report in serve(spec_of(ONE_KEY)).reports]
    names = [report.name for report in serve(spec_of(ONE_KEY + ASKED)).reports]
    assert names.index("merge_pieces") == names.index("fuse_moe") + 1


def test_flowcharts_of_a_build(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(SPEC, encoding="utf-8")
    built = build(tmp_path / "spec.toml", target="mermaid", output=tmp_path / "out")  # type: ignore[arg-type]
    assert {file["path"] for file in built.files} == {"spec.toml", "mermaid/decode.mmd", "mermaid/prefill.mmd"}
    chart = (tmp_path / "out/mermaid/decode.mmd").read_text(encoding="utf-8").splitlines()
    assert chart[0] == "flowchart TD"
    assert '  c1 <--> c1s1[("backbone.layers.0.ssm_state")]' in chart
    assert "gated_delta_update" in next(line for line in chart if line.startswith('  c1["backbone.layers.0<br/>'))
    assert dataclasses.asdict(repro(tmp_path / "out"))["diagnostics"] == ()
