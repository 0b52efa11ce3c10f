"""Try all ways to use the library wrongly, and print what came of each.

    python -m tests.misuse [--markdown docs/misuse.md] [WORDS ...]

With words, only cases whose name or group has one of them. The exit status is 1 if an outcome is not the declared one.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.misuse.case import Case, Outcome
from tests.misuse.cases import CASES
from tests.misuse.page import markdown

COLOURS = {"harmless": "green", "FAILS": "bold red", "UNEXPECTED": "bold white on red"}


def outcome_of(case: Case) -> Outcome:
    """What comes of a case; an outcome of its own kind where it is not the declared one."""
    try:
        outcome = case.run()
    except Exception as error:
        if case.fails:
            return Outcome(kind="FAILS", text=case.fails)
        return Outcome(kind="UNEXPECTED", text=f"{type(error).__name__}: {error}")
    if case.fails:
        return Outcome(kind="UNEXPECTED", text=f"does not fail any more ({outcome})")
    return outcome


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.misuse", description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only cases whose name or group has one of these")
    parser.add_argument("--markdown", type=Path, help="write the page here")
    arguments = parser.parse_args()
    wanted = [
        case
        for case in CASES
        if not arguments.words or any(word.lower() in f"{case.group} {case.name}".lower() for word in arguments.words)
    ]
    if arguments.markdown and arguments.words:
        parser.error("the page has all cases: leave the words out")
    logging.getLogger("dpdl").setLevel(logging.CRITICAL + 1)
    warnings.simplefilter("ignore")
    console = Console()
    outcomes: dict[str, Outcome] = {}
    for case in track(wanted, description="trying", console=console, transient=True):
        outcomes[case.name] = outcome_of(case)
    table = Table("tried", "what happened", title=f"{len(wanted)} ways to use dpdl wrongly", show_lines=False)
    for group in dict.fromkeys(case.group for case in wanted):
        table.add_section()
        table.add_row(f"[bold]{group}[/bold]", "")
        for case in wanted:
            if case.group == group:
                outcome = outcomes[case.name]
                colour = COLOURS.get(outcome.kind, "cyan")
                table.add_row(case.tried, f"[{colour}]{outcome.kind}[/]: {outcome.text}".replace("[(", "\\[("))
    console.print(table)
    unexpected = [name for name, outcome in outcomes.items() if outcome.kind == "UNEXPECTED"]
    for name in unexpected:
        console.print(f"[bold red]unexpected:[/] {name}: {outcomes[name].text}")
    if arguments.markdown and not unexpected:
        arguments.markdown.write_text(markdown(outcomes, CASES))
        console.print(f"written: {arguments.markdown}")
    return int(bool(unexpected))


if __name__ == "__main__":
    raise SystemExit(main())
