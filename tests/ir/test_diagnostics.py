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


def test_what_a_terminal_would_obey_is_spelled_out_and_the_carets_stay_below() -> None:
    span = Span("a\x1b]0;x\x07.toml", 3, 5, 2, "\ta\x1b[\u202eb\x9bc")
    diagnostic = Diagnostic("E0102", "`\u2066\n`\x7f\t", span, help="\ud800 é \U000e0041")
    assert diagnostic.render() == (
        "a\\x1b]0;x\\x07.toml:3:5: error[E0102]: `\\u2066\\n`\\x7f\\t\n"
        "    3 | \ta\\x1b[\\u202eb\\x9bc\n"
        "      | \t      ^^^^^^^\n"
        "  help: \\ud800 é \\U000e0041"
    )
    assert diagnostic.as_json()["file"] == span.file  # JSON escapes by itself
    assert str(N3CError(diagnostic, ExitCode.SPEC)) == diagnostic.render()
