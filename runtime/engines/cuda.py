"""Whether there is a GPU, and whether it has memory left: the errors that all engines on GPUs raise."""

from __future__ import annotations

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError


def require_cuda() -> None:
    """Raise N3CError (E0801, exit code 4) where PyTorch finds no GPU."""
    import torch

    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else "; this PyTorch is built for the CPU only"
        help_ = "`--device cpu` runs the same model on the CPU; `n3c doctor` shows what is installed"
        raise N3CError(Diagnostic("E0801", f"no CUDA GPU is at hand{built}", help=help_), ExitCode.TARGET)


def no_memory(index: int, wanted: str, more: str = "") -> N3CError:
    """Return the error (E0815, exit code 4) for a GPU that has no room for what is `wanted`."""
    import torch

    free, total = torch.cuda.mem_get_info(index)
    message = f"GPU {index} has no room for {wanted}: {free:,} of {total:,} bytes are free"
    help_ = "a smaller serving.max_seq_len or batch size needs less (`n3c inspect SPEC` counts)"
    return N3CError(Diagnostic("E0815", message, help="; ".join(filter(None, (help_, more)))), ExitCode.TARGET)
