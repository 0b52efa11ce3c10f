"""A page as a reader meets it: tags that nest, and the words on it."""

from __future__ import annotations

from html.parser import HTMLParser

EMPTY = frozenset({"meta", "br"})


class Read(HTMLParser):
    """Checks that tags nest, and keeps what a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.feed(html)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((tuple(self.open), data.strip()))

    def seen(self, *within: str) -> list[str]:
        return [text for path, text in self.texts if "style" not in path and all(tag in path for tag in within)]

    @property
    def words(self) -> str:
        return " ".join(self.seen("body"))

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [held for name, held in self.tags if name == tag]

    def rows(self) -> list[list[str]]:
        """Cells of all rows of all tables, in order."""
        found: list[list[str]] = []
        cell: list[str] = []
        parser = HTMLParser()

        def start(tag: str, _attrs: object) -> None:
            if tag == "tr":
                found.append([])
            elif tag in ("td", "th"):
                cell.clear()

        def end(tag: str) -> None:
            if tag in ("td", "th"):
                found[-1].append(" ".join(cell))

        parser.handle_starttag = start  # type: ignore[method-assign]
        parser.handle_endtag = end  # type: ignore[method-assign]
        parser.handle_data = lambda data: cell.append(data.strip()) if data.strip() else None  # type: ignore[method-assign]
        parser.feed(self.html)
        return found
