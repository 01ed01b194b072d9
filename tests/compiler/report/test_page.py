"""The pages of `inspect --html` and `diff --html` as text: well-formed, offline, small, escaped, and complete."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from n3c.compiler import diff, inspect
from n3c.compiler.report.page import data
from n3c.compiler.report.page.ribbon import pieces
from n3c.specs.load import load_spec
from n3c.specs.pattern import Pattern
from support.checkpoints import write_checkpoint
from support.command import n3c, write_small
from support.specs import QUANTIZED, SPECS

NAMES = sorted(path.stem for path in SPECS.glob("*.toml"))
VOID = {"meta", "input"}
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}'


class Tags(HTMLParser):
    """Checks that tags close in order, and keeps each with its attributes and the text in it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        """Return the attributes of every `tag` that has those given."""
        return [found for name, found in self.found if name == tag and attributes.items() <= found.items()]


def require_offline(page: str) -> Tags:
    """Assert that a page is well-formed and fetches nothing; return its tags."""
    tags = Tags(page)
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|//[a-z]|url\(|@import|\bfetch\(|XMLHttpRequest|<link|<img|<iframe", page)
    loading = {"src", "srcset", "data", "action", "onclick", "onerror"}
    assert not [found for _, found in tags.found if loading & set(found)]
    assert [found["href"] for found in tags.all("a") if not (found["href"] or "").startswith("#")] == []
    assert len(tags.all("script")) == 1
    ids = [found["id"] for _, found in tags.found if "id" in found]
    assert len(ids) == len(set(ids))
    assert {(found["href"] or "")[1:] for found in tags.all("a")} <= set(ids)
    return tags


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_spec_has_a_page(name: str) -> None:
    inspected = inspect(name)
    page = inspected.page()
    assert len(page.encode()) < 300_000
    tags = require_offline(page)
    figures = inspected.figures
    cells = [found for found in tags.all("a") if (found.get("class") or "").startswith("cell ")]
    assert [cell["data-label"] for cell in cells] == [block["label"] for block in figures["blocks"]]
    weights = sum(len(figures["variants"][block["variant"]]["weights"]) for block in figures["blocks"])
    rows = page.partition('<table id="weights"')[2].partition("</table>")[0].count("<tr>") - 1
    assert rows == weights
    for fit in figures["fits"]:
        assert fit["gpu"] in page
    for entry in figures["entries"]:
        assert f">{entry['entry']}</text>" in page


@pytest.mark.parametrize("name", NAMES)
def test_pieces_of_a_pattern_are_the_pattern(name: str) -> None:
    pattern = load_spec(SPECS / f"{name}.toml")[0].model.pattern
    found = list(pieces(pattern))
    assert "".join(Pattern.parse(text).symbols for text, _, _ in found) == pattern.symbols
    layers = [layer for _, first, last in found for layer in range(first, last + 1)]
    assert layers == list(range(len(pattern)))


def test_pieces_fold_where_groups_repeat() -> None:
    assert [text for text, _, _ in pieces(Pattern.parse("(MEM*E)2 (ME)3"))] == ["MEM*E", "MEM*E", "(ME)3"]
    assert list(pieces(Pattern.parse("M"))) == [("M", 0, 0)]


def test_a_build_shows_audits_whatever_they_name(tmp_path: Path) -> None:
    spec = write_small(tmp_path, extra=QUANTIZED)
    out = tmp_path / HOSTILE.replace("/", "")
    assert n3c("build", spec, "--target", "torch", "-o", out).code == 0
    (out / "trt").mkdir()
    linear = {"name": HOSTILE, "plan": "decode.b1.plan", "requested": "fp8", "expected": "fp8", "realised": "bf16"}
    kind = {"bytes": 2000, "ideal": 1000, "ratio": 2.0}
    time = {"predicted_us": 1500.0, "roofline_us": 1000.0, "ratio": 1.5, "bound_by": "memory"}
    audit: dict[str, Any] = {
        "linears": [linear | {"kernel": HOSTILE}, linear | {"kernel": "k", "realised": "fp8", "name": "a.1.b"}],
        "summary": {"requested": {}, "realised": {}, "mismatches": 1},
        "plans": {"decode.b1.plan": {"kernels": 3, "scratch_bytes": 4}},
        "traffic": {"entries": {"decode.b1": kind | {"context": 8, "by_kind": {HOSTILE: kind}, "worst": []}}},
        "time": {"decode.b1": {"B200": time}},
    }
    (out / "trt/audit.json").write_text(json.dumps(audit), encoding="utf-8")
    assert n3c("inspect", out, "--html", tmp_path / "page.html").code == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    tags = require_offline(page)
    assert "<script>alert" not in page
    assert "{{ 7*7 }}" in "".join(tags.texts)
    assert "1 of 2 linears are not computed in the precision that was asked for" in page
    assert "a.*.b" in page
    assert "1.5 ms" in page
    other = n3c("diff", out, out, "--html", tmp_path / "diff.html")
    assert other.code == 0
    assert "<script>alert" not in (tmp_path / "diff.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("pattern", ["M", "*", "E", "-", "M*E-|ME"])
@pytest.mark.parametrize("tied", [False, True])
def test_models_of_any_blocks_have_a_page(pattern: str, tied: bool, tmp_path: Path) -> None:
    spec = write_small(
        tmp_path,
        ("MEM*E-ME", pattern),
        ("initializer_range", f"tie_word_embeddings = {tied}\ninitializer_range".lower()),
    )
    page = inspect(spec, set=["model.max_position_embeddings=32", "serving.prefill_chunk=8"]).page()
    require_offline(page)
    require_offline(diff(spec, "tiny").page())


def test_a_page_without_plans_has_no_audit(tmp_path: Path) -> None:
    page = inspect(write_small(tmp_path)).page()
    assert 'id="audit"' not in page
    assert 'id="training"' not in page
    assert 'id="error"' not in page


def test_a_quantized_checkpoint_shows_its_error_against_the_original(tmp_path: Path) -> None:
    spec = write_small(tmp_path, extra=QUANTIZED)
    write_checkpoint(tmp_path / "a", load_spec(spec)[0], shards=1)
    assert n3c("quantize", spec, "--weights", tmp_path / "a", "-o", tmp_path / "b").code == 0
    page = tmp_path / "page.html"
    assert n3c("inspect", tmp_path / "b", "--original", tmp_path / "a", "--html", page).code == 0
    tags = require_offline(page.read_text(encoding="utf-8"))
    told = [found["title"] or "" for found in tags.all("i") if " dB, " in (found.get("title") or "")]
    assert any(re.match(r"mamba\.in_proj, layer 0: \d\d\.\d dB, .*, fp8, 1 weights", text) for text in told)
    assert any(re.match(r"moe\.experts\.up, layer 1: \d\d\.\d dB, .*nvfp4, 8 weights", text) for text in told)
    assert all(10 < float(re.findall(r"([\d.]+) dB", text)[0]) < 60 for text in told)
    wrong = n3c("inspect", spec, "--original", tmp_path / "a", "--html", tmp_path / "no.html", "--json")
    assert (wrong.code, wrong.codes) == (2, ["E0701"])
    assert not (tmp_path / "no.html").exists()


def test_a_run_shows_its_curves(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 5 / step, "expert_load": [1.0, step], "lr": float("nan")} for step in range(1, 900)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    page = inspect("tiny", run=tmp_path, html=tmp_path / "page.html").page()
    tags = require_offline(page)
    titles = [found["aria-label"] for found in tags.all("svg")]
    assert titles[-2:] == ["loss against steps", "expert_load against steps"]
    assert len(page) < len(inspect("tiny").page()) + 20_000  # long runs are thinned


@pytest.mark.parametrize(
    "metrics",
    ['{"loss": 1}', '{"step": 1, "loss": "low"}', '{"step": 1, "loss": 1' + 400 * "0" + "}", 5000 * "[", "\xff", "[]"],
    ids=["no step", "text", "a huge number", "brackets", "no JSON", "a list"],
)
def test_a_run_without_metrics(metrics: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(metrics, encoding="latin-1")
    result = n3c("inspect", "tiny", "--run", tmp_path, "--html", tmp_path / "other.html", "--json")
    assert (result.code, result.codes) == (6, ["E0625"])


def test_a_run_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endless file is read in bounded memory."""
    monkeypatch.setattr(data, "LONGEST_METRICS", 1 << 20)
    for run, code in ((tmp_path / "none", "E0601"), ("/dev/zero", "E0625")):
        result = n3c("inspect", "tiny", "--run", run, "--html", tmp_path / "other.html", "--json")
        assert (result.code, result.codes) == (6, [code])


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for command in (("inspect", "tiny"), ("diff", "tiny", "tiny-moe")):
        page.write_text("mine", encoding="utf-8")
        assert n3c(*command, "--html", page).code == 6
        assert page.read_text(encoding="utf-8") == "mine"
        assert n3c(*command, "--html", page, "--force").code == 0
        assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_an_option_of_the_page_needs_it() -> None:
    for option in ("--run", "--original"):
        assert f"{option} has no effect: it needs --html" in n3c("inspect", "tiny", option, ".").err


def test_differences_are_all_on_their_page(tmp_path: Path) -> None:
    found = diff("super", "ultra")
    page = found.page()
    assert len(page.encode()) < 300_000
    tags = require_offline(page)
    assert len([cell for cell in tags.all("span") if " changed" in (cell.get("class") or "")]) == 93 + 113
    for change in (*found.spec, *found.build):
        assert change.key in page
    for function in found.ir:
        assert function.name in page
    assert "no differences" in diff("tiny", "tiny").page()


def test_weights_that_differ_are_on_the_page(tmp_path: Path) -> None:
    spec = write_small(tmp_path, extra=QUANTIZED)
    write_checkpoint(tmp_path / "a", load_spec(spec)[0], shards=1)
    assert n3c("quantize", spec, "--weights", tmp_path / "a", "-o", tmp_path / "b").code == 0
    found = diff(tmp_path / "a", tmp_path / "b")
    page = found.page()
    require_offline(page)
    for weight in found.tensors.changed:
        assert f"<td>{weight.name}</td>" in page


def test_notebooks_get_the_page_in_a_frame() -> None:
    for result in (inspect("tiny"), diff("tiny", "tiny-moe")):
        tags = Tags(result._repr_html_())  # pyright: ignore[reportPrivateUsage]
        ((name, frame),) = tags.found
        assert (name, frame["sandbox"]) == ("iframe", "allow-scripts")
        assert frame["srcdoc"] == result.page()
