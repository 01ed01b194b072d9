"""The documents hang together: links and headings exist, every page is in the site, figures show what is counted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.command import n3c

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
DOCUMENTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def text_of(document: Path) -> str:
    """Return a document without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """Return the names of the headings, as forges and the site make them."""
    titles = re.findall(r"^#+ (.+)$", text_of(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.is_file(), target
        assert not anchor or anchor in anchors(linked), target
        if document in PAGES:  # the site has no other files
            assert linked.is_relative_to(DOCS), target


def test_every_page_is_in_the_site() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    assert sorted(re.findall(r"[\w/-]+\.md$", text, flags=re.MULTILINE)) == [
        page.relative_to(DOCS).as_posix() for page in PAGES
    ]


def test_figures_show_what_is_counted() -> None:
    counted = n3c("inspect", "super", "--json").data
    state = counted["state"]
    figure = (DOCS / "images/concept-states.svg").read_text(encoding="utf-8")
    assert f"{counted['layers']['mamba']} Mamba-2 blocks: {state['bytes_per_request']:,} bytes" in figure
    a_token = state["kv_bytes_per_token"] + state["mtp_kv_bytes_per_token"]
    assert f"{counted['layers']['attention']} attention blocks and MTP: {a_token:,} bytes a token" in figure
    page = (DOCS / "concepts.md").read_text(encoding="utf-8")
    snapshots = state["snapshots"]
    for size in (snapshots["pending_bytes"], snapshots["full_copies_bytes"]):
        assert f"{size:,} bytes a request" in page or f"instead of {size:,}" in page
