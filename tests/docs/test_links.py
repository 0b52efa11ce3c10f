"""Links between pages, and from the README: they lead somewhere, on GitHub and on the site."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.docs.blocks import DOCS, ROOT, page_name, pages

ON_THE_SITE = {ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"}  # by include: docs/conf.py


def links(path: Path) -> list[str]:
    """Every target that is not elsewhere in the world."""
    found: list[str] = []
    for token in inline(MarkdownIt("commonmark").enable("table").parse(path.read_text())):
        target = token.attrGet("href") or token.attrGet("src")
        if isinstance(target, str) and not re.match(r"[a-z]+:", target):
            found.append(target)
    return found


def inline(tokens: list[Token]) -> list[Token]:
    return [child for token in tokens for child in (token.children or [])]


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub and the site make them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(path.read_text())
    titles = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    return {slug(title) for title in titles}


def slug(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower().replace("`", "")).replace(" ", "-")


@pytest.mark.parametrize("path", [*pages(), ROOT / "CHANGELOG.md"], ids=page_name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in links(path):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=page_name)
def test_links_of_the_site_stay_on_it(path: Path) -> None:
    for link in links(path):
        target = (path.parent / link.partition("#")[0]).resolve()
        assert target.is_relative_to(DOCS) or target in ON_THE_SITE, f"{link} is not on the site"


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b`, c\n\n[x](gone.md) and\n\n| a |\n| --- |\n| [y](#a-b-c) ![z](no.png) |\n")
    assert links(page) == ["gone.md", "#a-b-c", "no.png"]
    assert anchors(page) == {"a-b-c"}
