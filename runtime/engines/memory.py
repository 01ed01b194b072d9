"""The machine's memory: whether a batch fits, and what an allocation that fails is told as."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from n3c.backends.machine import available_memory_bytes
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.passes.serving import Served

TOKEN_BYTES = 48
"""What a token of a prompt takes as a number of Python, in its list and in the array that it comes from."""
_FAILED = ("DefaultCPUAllocator", "Failed to allocate memory", "bad_alloc")
"""What PyTorch's and ONNX Runtime's errors say of an allocation that failed; their classes say nothing."""


def require_memory(served: Served, batch: int, context: int) -> None:
    """Raise N3CError (E0815, exit code 4) where the machine cannot hold `batch` sequences of `context` prompt tokens.

    Counted are weights and states in their own types, caches as long as the build's, and the prompts: engines hold
    more. Where the system does not tell how much memory is free, nothing is refused.
    """
    available = available_memory_bytes()
    weights = sum(entry.bytes for entry in served.program.ledger)
    sequence = served.plan.bytes_at(served.plan.max_seq_len) + TOKEN_BYTES * context
    needed = weights + batch * sequence
    if available is not None and needed > available:
        raise no_memory(
            f"{batch:,} sequences need {needed / 1e9:,.1f} GB of memory, of which {weights / 1e9:,.1f} GB for weights;"
            f" {available / 1e9:,.1f} GB are free"
        )


@contextmanager
def memory_told(wanted: str) -> Generator[None]:
    """Raise N3CError (E0815, exit code 4) where an allocation for what is `wanted` fails, on the CPU or a GPU."""
    try:
        yield
    except Exception as error:  # ONNX Runtime's own classes share no base but Exception
        import torch

        failed = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not failed and not any(text in str(error) for text in _FAILED):
            raise
        raise no_memory(f"there is no memory for {wanted}: {str(error).splitlines()[0]}") from error


def no_memory(message: str) -> N3CError:
    """Return the error (E0815, exit code 4)."""
    help_ = "a smaller batch size, context or serving.max_seq_len needs less (`n3c inspect SPEC` counts)"
    return N3CError(Diagnostic("E0815", message, help=help_), ExitCode.TARGET)
