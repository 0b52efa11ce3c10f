"""The blocks of code on a page, found by a Markdown parser: fenced in a language, or indented."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

__all__ = ["DOCS", "ROOT", "Block", "blocks_of", "page_name", "pages"]

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BUILT = ("_build", "_static")
INDENTED = "(indented)"


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of code.

    Attributes:
        page: its page, as `page_name` says it.
        line: of the page, where its text begins, from 0.
        language: what the fence says; "" for a fence without a language, "(indented)" without a fence.
        text: the block's lines.
        section: the page's last heading of level two before it, or "".
    """

    page: str
    line: int
    language: str
    text: str
    section: str

    @property
    def first_line(self) -> str:
        """How lists of exceptions name a block: line numbers change too often."""
        return self.text.strip("\n").split("\n")[0].strip()

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line + 1}"


def pages() -> list[Path]:
    """Every page that readers see: those of docs/, the README and CONTRIBUTING."""
    found = (path for path in DOCS.rglob("*.md") if path.relative_to(DOCS).parts[0] not in BUILT)
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(found)]


def page_name(path: Path) -> str:
    """Relative to docs/, or README.md and CONTRIBUTING.md."""
    return path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()


def blocks_of(path: Path) -> list[Block]:
    """In the order of the page; those within lists and quotes as well."""
    section, found = "", []
    tokens = MarkdownIt("commonmark").parse(path.read_text())
    for position, token in enumerate(tokens):
        if token.type == "heading_open" and token.tag == "h2":
            section = tokens[position + 1].content
        if token.type not in ("fence", "code_block") or token.map is None:
            continue
        fenced = token.type == "fence"
        found.append(
            Block(
                page=page_name(path),
                line=token.map[0] + fenced,
                language=token.info.strip() if fenced else INDENTED,
                text=token.content,
                section=re.sub(r"[`*]", "", section),
            )
        )
    return found
