"""The pages of `inspect --html` and `diff --html` in headless Chromium: what can be clicked, typed and printed."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from n3c.compiler import diff, inspect
from support.command import n3c, write_small
from support.specs import QUANTIZED

pytestmark = pytest.mark.browser

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api: Any = importlib.import_module("playwright.sync_api")  # in the environment of `make test-browser` alone
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the pages of Super, a build, and a difference."""
    folder = tmp_path_factory.mktemp("pages")
    inspect("super", html=folder / "super.html")
    spec = write_small(folder, extra=QUANTIZED)
    assert n3c("build", spec, "--target", "torch", "-o", folder / "out").code == 0
    inspect(folder / "out", html=folder / "build.html")
    diff("tiny", "tiny-moe", html=folder / "diff.html")
    return folder


class Opened:
    """An open page, with what it complained about and asked for."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.page = browser.new_page(viewport={"width": 1180, "height": 900}, **options)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", self.hear)
        self.page.on("pageerror", self.hear)
        self.page.on("request", self.note)
        self.page.goto(file.as_uri())

    def hear(self, said: Any) -> None:
        """Keep a message or an error."""
        self.said.append(getattr(said, "text", None) or str(said))

    def note(self, request: Any) -> None:
        """Keep what is asked for."""
        self.asked.append(request.url)

    def background(self) -> str:
        """Return the color behind the page."""
        color = self.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert isinstance(color, str)
        return color

    def close(self, file: Path) -> None:
        """Close the page; nothing was said, and nothing asked for but the file."""
        assert (self.said, self.asked) == ([], [file.as_uri()])
        self.page.close()


@pytest.fixture
def opened(browser: Any, pages: Path) -> Iterator[Any]:
    file = pages / "super.html"
    opened = Opened(browser, file)
    yield opened.page
    opened.close(file)


@pytest.mark.parametrize("name", ["super", "build", "diff"])
def test_pages_are_silent_in_both_themes_and_fit_every_width(browser: Any, pages: Path, name: str) -> None:
    file = pages / f"{name}.html"
    colors = set[str]()
    for scheme in ("light", "dark"):
        opened = Opened(browser, file, color_scheme=scheme)
        colors.add(opened.background())
        for width in (1180, 768, 375):
            opened.page.set_viewport_size({"width": width, "height": 800})
            assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        opened.close(file)
    assert len(colors) == 2


def test_the_switch_changes_the_theme_and_back(browser: Any, pages: Path) -> None:
    file = pages / "super.html"
    opened = Opened(browser, file, color_scheme="light")
    light = opened.background()
    opened.page.click("#theme")
    assert opened.background() != light
    opened.page.click("#theme")
    assert opened.background() == light
    opened.close(file)


def test_arrows_move_between_blocks_and_tell_what_each_holds(opened: Any) -> None:
    opened.focus("a.cell")
    assert opened.text_content("#detail").startswith("backbone.embeddings: embedding, 536,870,912 parameters")
    for _ in range(2):
        opened.keyboard.press("ArrowRight")
    assert opened.text_content("#detail").startswith("backbone.layers.1: MoE, 2,873,102,336 parameters, 1.65 GB (nvfp4")
    opened.keyboard.press("End")
    assert opened.text_content("#detail").startswith("mtp.layers.1: MoE")
    assert opened.evaluate("document.querySelectorAll('a.cell[tabindex=\"0\"]').length") == 1
    opened.hover("a.cell[data-label='backbone.layers.7']")
    assert opened.text_content("#detail").startswith("backbone.layers.7: attention")


def test_a_click_on_a_block_opens_its_kind(opened: Any) -> None:
    cell = opened.locator("a.cell[data-label='backbone.layers.0']")
    kind = opened.locator(cell.get_attribute("href"))
    assert kind.get_attribute("open") is None
    cell.click()
    assert kind.get_attribute("open") is not None
    assert "18560 × 4096" in kind.inner_text()


def test_segments_fold_and_open_for_the_keyboard(opened: Any) -> None:
    cell = opened.locator("a.cell[data-label='backbone.layers.0']")
    opened.click(".ribbon details:nth-child(2) summary")
    assert not cell.is_visible()
    opened.focus("a.cell")
    opened.keyboard.press("ArrowRight")
    assert cell.is_visible()


def test_the_ledger_filters_by_words(opened: Any) -> None:
    rows = opened.locator("#weights tbody tr:visible")
    everything = rows.count()
    opened.fill("input[data-filters=weights]", "fp8 layers.3.")
    texts = rows.all_inner_texts()
    assert 0 < len(texts) < everything
    assert all("fp8" in text and "layers.3." in text for text in texts)
    assert opened.text_content(".controls:has([data-filters=weights]) > span") == f"{len(texts)} of {everything}"
    opened.fill("input[data-filters=weights]", "")
    assert rows.count() == everything


def test_tables_sort_by_number_and_by_text_both_ways(opened: Any) -> None:
    def column(table: str, index: int) -> list[str]:
        values = opened.evaluate(
            f"[...document.querySelectorAll('{table} tbody tr')].map(r => r.cells[{index}].textContent)"
        )
        assert isinstance(values, list)
        return values

    opened.click("#weights thead th:nth-child(6) button")
    assert (column("#weights", 5)[0], column("#weights", 5)[-1]) == ("512 B", "2.82 GB")
    opened.click("#weights thead th:nth-child(6) button")
    assert column("#weights", 5)[0] == "2.82 GB"
    assert opened.get_attribute("#weights thead th:nth-child(6)", "aria-sort") == "descending"
    opened.click("#weights thead th:nth-child(1) button")
    assert column("#weights", 0) == sorted(column("#weights", 0))


def test_context_and_batch_say_what_fits(opened: Any) -> None:
    outputs = opened.locator("#need output")
    assert outputs.all_inner_texts() == ["1 × 8,192 tokens: 79.26 GB", "fits H100 SXM and larger"]
    opened.fill("#need input[type=number]", "64")
    assert "64 × 8,192 tokens" in outputs.all_inner_texts()[0]
    opened.fill("#need input[type=number]", "4096")
    assert outputs.all_inner_texts()[1] == "fits no single GPU"


def test_print_hides_controls_and_opens_kinds(opened: Any) -> None:
    opened.emulate_media(media="print")
    opened.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert not opened.locator("nav").is_visible()
    assert not opened.locator("#theme").is_visible()
    assert opened.locator("#v1 table").is_visible()
    assert len(opened.pdf()) > 10_000


def test_without_scripts_everything_is_there(browser: Any, pages: Path) -> None:
    file = pages / "super.html"
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(file.as_uri())
    assert page.locator("a.cell").count() == 93
    assert page.locator("#weights tbody tr").count() > 700
    assert not page.locator("#theme").is_visible()
    assert not page.locator("#need").is_visible()
    page.click("#v1 summary")
    assert page.locator("#v1 table").is_visible()
    context.close()
