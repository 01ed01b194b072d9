"""The pages of docs/reference say what the code says: `make golden` writes them again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support.golden import assert_golden
from support.reference_pages import ops_page, options_page, passes_page


@pytest.mark.parametrize(("page", "made"), [("ops", ops_page), ("passes", passes_page), ("options", options_page)])
def test_a_page_is_that_of_the_code(page: str, made: Callable[[], str]) -> None:
    assert_golden(f"../../docs/reference/{page}.md", made())
