"""What does not fit into the machine's memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.passes.serving import serve
from n3c.runtime.engines import memory
from n3c.runtime.engines.memory import TOKEN_BYTES, memory_told, require_memory
from support.specs import SMALL, spec_from_text

BEYOND = 1 << 50
"""Elements, more than any machine has addresses for."""


@pytest.mark.parametrize("allocate", [np.zeros, torch.zeros], ids=["numpy", "torch"])
def test_an_allocation_that_fails_is_told(allocate: Callable[[int], object]) -> None:
    with pytest.raises(N3CError) as caught, memory_told("the tokens"):
        allocate(BEYOND)
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.code, caught.value.exit_code) == ("E0815", ExitCode.TARGET)
    assert diagnostic.message.startswith("there is no memory for the tokens: ")
    assert "\n" not in diagnostic.message


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("x"), ValueError(), KeyboardInterrupt()])
def test_other_errors_stay_what_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, memory_told("the tokens"):
        raise error
    assert caught.value is error


def test_what_is_needed_is_counted_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(spec_from_text(SMALL))
    weights = sum(entry.bytes for entry in served.program.ledger)
    states = sum(state.bytes for state in served.plan.states)
    needed = weights + 3 * (states + 7 * TOKEN_BYTES)
    for free, fits in ((needed, True), (needed - 1, False), (None, True)):
        monkeypatch.setattr(memory, "available_memory_bytes", lambda free=free: free)
        if fits:
            require_memory(served, 3, 7)
            continue
        with pytest.raises(N3CError, match="3 sequences need"):
            require_memory(served, 3, 7)
