"""The table of cases, for the terminal and for docs/misuse.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.misuse.case import Case, Outcome

__all__ = ["Row", "markdown", "rows_of"]

HEAD = """# What happens if

Ways to use the library wrongly, and what comes of each. Every row is tried by a test (`tests/misuse/`): an error comes
before anything is spent and leaves weights, optimizer and ledger as they were; "harmless" rows show by their results
that they are. Errors are those of [errors.md](errors.md). Written by
`python -m tests.misuse --markdown docs/misuse.md`.

{counts}
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the page, as far as it must be up to date.

    Attributes:
        tried: what was done.
        kind: the error's class, "harmless", or "FAILS".
    """

    tried: str
    kind: str


def markdown(outcomes: Mapping[str, Outcome], cases: Sequence[Case]) -> str:
    """The page; outcomes by the cases' names."""
    kinds = [case.kind for case in cases]
    harmless, failing = kinds.count("harmless"), kinds.count("FAILS")
    counts = f"{len(cases)} ways: {len(cases) - harmless - failing} refused, {harmless} harmless."
    if failing:
        counts += f" {failing} are not held yet: marked FAILS, with what is wrong."
    lines = [HEAD.format(counts=counts)]
    for group in dict.fromkeys(case.group for case in cases):
        lines.append(f"\n## {group}\n\n| tried | what happens | elsewhere |\n| --- | --- | --- |\n")
        for case in cases:
            if case.group == group:
                outcome = outcomes[case.name]
                lines.append(
                    f"| {_cell(case.tried)} | **{outcome.kind}**: {_cell(outcome.text)} | {_cell(case.peer)} |\n"
                )
    return "".join(lines)


def rows_of(page: str) -> Iterator[Row]:
    """What a page says."""
    for match in re.finditer(r"^\| (.+?) \| \*\*(\w+)\*\*: .* \| .* \|$", page, re.MULTILINE):
        yield Row(tried=match[1], kind=match[2])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def row_of(case: Case) -> Row:
    """What the page must say of a case."""
    return Row(tried=_cell(case.tried), kind=case.kind)
