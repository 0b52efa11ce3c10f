"""What every page of the library has in common: one document frame, one style sheet, texts escaped.

A page is a file of its own. It has no script, no link and no font, forbids itself to load or run anything, follows the
reader's light or dark theme, fits a phone, and prints. What is said by colour is said by words and signs as well.

Names come from other parties and from users: whoever puts text into a page calls `text` first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["bulleted", "document", "numbered", "table", "text"]

# Colours are named by what they say. Each is read on the grounds that it stands on, in both themes (tests measure it).
_STYLE = """
:root { color-scheme: light dark; --ground: #f6f7f5; --card: #ffffff; --ink: #1a2421; --soft: #56635e; --line: #d8ded9;
  --good: #0b6e4f; --bad: #a3121c; --bad-ground: #fdeaea; --warn: #7a4b00; --warn-ground: #fff4df;
  --curve: #1c5d99; --shade: #dfeaf4; }
@media (prefers-color-scheme: dark) { :root { --ground: #111614; --card: #19201d; --ink: #e7edea; --soft: #a3b0aa;
  --line: #313b36; --good: #6fd3ae; --bad: #ff9a9a; --bad-ground: #431418; --warn: #f2c372;
  --warn-ground: #35270c; --curve: #8fc1f0; --shade: #1d3143; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.05rem; margin: 2.2rem 0 .6rem; }
p { margin: 0; }
ul, ol { margin: 0; padding-left: 1.5rem; }
li + li { margin-top: .2rem; }
.summary { color: var(--soft); margin-bottom: 1.5rem; }
.alarm { background: var(--bad-ground); border: 2px solid var(--bad); border-radius: .5rem; padding: .9rem 1.1rem;
  margin-bottom: 1.5rem; }
.alarm h2 { margin: 0 0 .3rem; color: var(--bad); }
table { width: 100%; border-collapse: separate; border-spacing: 0; background: var(--card); border-radius: .5rem;
  border: 1px solid var(--line); overflow: hidden; }
th, td { text-align: left; vertical-align: top; padding: .8rem .9rem; border-bottom: 1px solid var(--line); }
tbody:last-child tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-size: .85rem; font-weight: 600; }
tbody th { font-weight: 650; min-width: 8rem; border-right: 1px solid var(--line); }
.promise { min-width: 13rem; }
.promise strong { display: block; font-size: 1.1rem; white-space: nowrap; }
.promise span, .why p + p { color: var(--soft); font-size: .9rem; }
.why p + p { margin-top: .35rem; }
.kept .promise strong { color: var(--good); }
.none td { background: var(--bad-ground); }
.none .promise { border-left: .4rem solid var(--bad); }
.none .promise strong { color: var(--bad); font-weight: 800; letter-spacing: .04em; }
.open { background: var(--warn-ground); border-left: .4rem solid var(--warn); border-radius: .3rem;
  padding: .8rem 1.1rem; }
.open h2 { margin: 0 0 .3rem; color: var(--warn); }
.over { color: var(--soft); font-size: .9rem; margin-bottom: .5rem; }
.claim { font-size: 2.4rem; font-weight: 750; letter-spacing: -.01em; }
.claim small { font-size: 1.1rem; font-weight: 500; letter-spacing: 0; color: var(--soft); white-space: nowrap; }
.claim.missing { color: var(--bad); }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
caption { text-align: left; padding: 0 0 .4rem; }
table + .soft { margin-top: .5rem; }
table + table { margin-top: 1rem; }
.narrow { max-width: 30rem; }
.tiles { display: grid; grid-template-columns: repeat(3, 1fr); gap: .9rem; margin: 0 0 1rem; }
.tiles > div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .9rem 1rem; }
.tiles strong { display: block; font-size: 1.5rem; line-height: 1.3; }
.pair { display: grid; grid-template-columns: minmax(0, 30rem) minmax(0, 1fr); gap: 1.25rem; align-items: start; }
.pair > div > * + * { margin-top: 1rem; }
.compact th, .compact td { padding: .45rem .8rem; }
.compact td.number, .compact th.number { text-align: right; font-variant-numeric: tabular-nums; }
.numbers tbody th, .numbers td { white-space: nowrap; }
.claimed > * { background: var(--shade); }
.contradicted td { background: var(--bad-ground); }
.contradicted td strong { color: var(--bad); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem; }
svg { display: block; width: 100%; height: auto; font: inherit; font-size: 13px; }
svg text { fill: var(--soft); }
svg .value { fill: var(--ink); font-weight: 650; }
.axis { stroke: var(--soft); fill: none; }
.grid { stroke: var(--line); fill: none; }
.curve { stroke: var(--curve); stroke-width: 2.5; fill: none; }
.planned { stroke: var(--curve); stroke-width: 2; stroke-dasharray: 3 5; fill: none; }
.guess { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 1 4; stroke-linecap: round; fill: none; }
.reach { fill: var(--shade); stroke: none; }
.dot { fill: var(--curve); stroke: var(--card); stroke-width: 2; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; color: var(--soft);
  font-size: .9rem; margin-bottom: .3rem; }
.legend li + li { margin: 0; }
.legend svg { display: inline-block; width: 2rem; height: .8rem; vertical-align: middle; margin-right: .4rem; }
code { font: .85em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
footer { margin-top: 2.5rem; color: var(--soft); font-size: .9rem; }
footer p + p { margin-top: .4rem; }
@media (max-width: 46rem) { .tiles, .pair { grid-template-columns: minmax(0, 1fr); } .claim { font-size: 2rem; }
  .claim small { display: block; white-space: normal; }
  main { padding: 1.5rem 1rem 3rem; } .compact th, .compact td { padding: .4rem .5rem; }
  .compact tbody th { min-width: 0; }
  table.wide, .wide caption, .wide tbody, .wide tr, .wide th, .wide td { display: block; width: 100%; }
  .wide thead { display: none; } .wide caption { padding: .5rem; }
  .wide tbody th { border-right: 0; background: var(--ground); }
  .wide td[data-of]::before { content: attr(data-of) ": "; color: var(--soft); font-size: .85rem; } }
@media print { :root { --ground: #ffffff; --card: #ffffff; --ink: #000000; --soft: #444444; --line: #bbbbbb;
    --good: #0b6e4f; --bad: #a3121c; --bad-ground: #fdeaea; --warn: #7a4b00; --warn-ground: #fff4df;
    --curve: #1c5d99; --shade: #dfeaf4; }
  html { font-size: 11px; } body { background: none; font-size: 1rem; } main { padding: 0; max-width: none; }
  .pair { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); break-inside: avoid; }
  .alarm, .none td, .open, .contradicted td, .claimed > *, .reach { print-color-adjust: exact; }
  table { overflow: visible; }
  tr, figure, .alarm, .open, .tiles, .tiles > div { break-inside: avoid; } h2 { break-after: avoid; }
  thead { display: table-header-group; } }
""".strip()


def document(title: str, parts: Iterable[str]) -> str:
    """A complete HTML document in one piece, for a file in UTF-8.

    Args:
        title: plain text.
        parts: markup, in order; empty ones are left out.
    """
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{text(title)}</title>",
            f"<style>\n{_STYLE}\n</style>",
            "</head>",
            "<body>",
            "<main>",
            *(part for part in parts if part),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def text(words: str) -> str:
    """Any text as markup that shows it. What cannot be printed (line breaks, marks that turn the direction of writing)
    is shown as Python writes it, so that no name can look like something else."""
    return escape(words if words.isprintable() else repr(words)[1:-1])


def bulleted(texts: Iterable[str]) -> str:
    """A list of texts."""
    return _list(texts, "ul")


def numbered(texts: Iterable[str]) -> str:
    """A list of texts that others refer to by number."""
    return _list(texts, "ol")


def _list(texts: Iterable[str], kind: str) -> str:
    return f"<{kind}>{''.join(f'<li>{text(each)}</li>' for each in texts)}</{kind}>"


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "", marked: int | None = None
) -> str:
    """A table whose first column names its rows.

    Args:
        caption: plain text.
        head: names of the columns, plain text.
        rows: markup, cell by cell.
        kind: classes: "compact"; "numbers" if all but the first column are numbers; "wide" if rows become blocks on a
            phone.
        marked: which row is the claim's own.
    """
    number = ' class="number"' if "numbers" in kind.split() else ""
    heads = "".join(f'<th scope="col"{number if i else ""}>{text(name)}</th>' for i, name in enumerate(head))
    body = []
    for at, (first, *cells) in enumerate(rows):
        held = "".join(
            f'<td{number} data-of="{text(name)}">{cell}</td>' for name, cell in zip(head[1:], cells, strict=True)
        )
        own = ' class="claimed"' if at == marked else ""
        body.append(f'<tr{own}><th scope="row">{first}</th>{held}</tr>')
    return (
        f'<table class="{text(kind)}"><caption>{text(caption)}</caption>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n'
        + "\n".join(body)
        + "\n</tbody></table>"
    )
