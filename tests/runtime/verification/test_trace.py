"""What a layer adds to the residual stream, by which `n3c verify` measures what it rounds."""

from __future__ import annotations

import numpy as np
import pytest

from n3c.passes.serving import serve
from n3c.runtime.verification.trace import differences, points
from support.specs import SMALL, spec_from_text


@pytest.mark.parametrize("entry", ["prefill", "verify", "draft"])
def test_what_stands_before_a_layer(entry: str) -> None:
    """The layer before; nothing for MTP's first, which makes its input as well; states are no layers."""
    program = serve(spec_from_text(SMALL.replace('[mtp]\npattern = "*E"', '[mtp]\npattern = "*E*"'))).program
    order = points(program.entry_points[entry], program)
    assert order["mtp.layers.0"] == ""
    assert order["mtp.layers.1"] == "mtp.layers.0"
    assert entry == "draft" or order["backbone.layers.1"] == "backbone.layers.0"
    assert {before for name, before in order.items() if name in program.states} == {None}


@pytest.mark.parametrize(("before", "share", "typical"), [("before", 0.5, 0.1), ("", 1.0, 0.1), (None, 1.0, 0.0)])
def test_the_share_of_a_layer(before: str | None, share: float, typical: float) -> None:
    """Of the stream, half of which stood there before; all of it where nothing did. Only layers have a median token."""
    reference = {"layer": np.full((1, 5, 4), 2.0), "before": np.full((1, 5, 4), 1.0)}
    (found,) = differences({"layer": before}, reference, {"layer": np.full((1, 5, 4), 2.2)})
    assert (found.share, found.typical) == pytest.approx((share, typical))
    assert found.relative == pytest.approx(0.1)
