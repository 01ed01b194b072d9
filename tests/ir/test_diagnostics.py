"""Diagnostics: their text and their JSON."""

from __future__ import annotations

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Severity, Span, did_you_mean


def test_rendering_points_at_the_place() -> None:
    span = Span("spec.toml", 24, 1, 10, "latent_dim = 1024")
    diagnostic = Diagnostic("E0102", "unknown key `latent_dim` in [moe]", span, help="did you mean `latent_size`?")
    assert diagnostic.render() == (
        "spec.toml:24:1: error[E0102]: unknown key `latent_dim` in [moe]\n"
        "   24 | latent_dim = 1024\n"
        "      | ^^^^^^^^^^\n"
        "  help: did you mean `latent_size`?"
    )
    assert diagnostic.as_json() == {
        "file": "spec.toml",
        "line": 24,
        "column": 1,
        "code": "E0102",
        "severity": "error",
        "message": "unknown key `latent_dim` in [moe]",
        "help": "did you mean `latent_size`?",
    }


def test_a_place_is_optional() -> None:
    diagnostic = Diagnostic("W0201", "unused", severity=Severity.WARNING)
    assert diagnostic.render() == "warning[W0201]: unused"
    assert diagnostic.as_json()["line"] is None


def test_an_error_holds_all_diagnostics() -> None:
    both = [Diagnostic("E0001", "one"), Diagnostic("E0002", "two")]
    error = N3CError(both, ExitCode.SPEC)
    assert error.exit_code == 3
    assert str(error) == "error[E0001]: one\nerror[E0002]: two"


def test_did_you_mean() -> None:
    assert did_you_mean("latent_dim", ["latent_size", "top_k"]) == "did you mean `latent_size`?"
    assert did_you_mean("zzz", ["latent_size", "top_k"]) is None
