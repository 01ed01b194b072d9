"""docs/spec.md says what the schema says."""

from __future__ import annotations

from support.golden import GOLDEN, assert_golden
from support.spec_reference import reference


def test_the_reference_is_that_of_the_schema() -> None:
    docs = GOLDEN.parents[1] / "docs"
    assert (docs / "spec.md").is_file()
    assert_golden("../../docs/spec.md", reference())
