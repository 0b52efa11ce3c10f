"""The page of benchmarks, docs/benchmarks.md, written from what lies in benchmarks/results/.

    python -m benchmarks.page            # writes the page and its charts; nothing is measured
    python -m benchmarks.page --check    # exit code 1 if the page is not what the results give

Each section says by which command, when, on what and with which versions its figures came about, sets the target
beside the figure where there is one, and says in words what falls short. Charts carry the digest of the results that
they show, so that an old one is noticed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS
from benchmarks.page_sections import SECTIONS, Section

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "benchmarks.md"
CHARTS = DOCS / "charts"

HEAD = """# Benchmarks

Each table is one command, and its figures are those of a file in `benchmarks/results/`; this page is written from these
files by `python -m benchmarks.page`. Figures to compare are ratios within one run: the machine is small and was often
shared. What falls short of its target, or of another library, is named under each table.
"""

# What every results file should say of its making: the name here, and where it may stand.
FACTS = {
    "date": ("date",),
    "Python's version": ("python",),
    "versions of packages": ("packages",),
    "the processor": ("processor",),
    "the number of cores": ("cores", "cpu_count"),
}


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; say whether the page is up to date")
    if parser.parse_args().check:
        old = PAGE.read_text() != page() or any(drawn(section) != digest(section) for section in charted())
        print("out of date: python -m benchmarks.page" if old else "up to date")
        return int(old)
    CHARTS.mkdir(exist_ok=True)
    PAGE.write_text(page())
    for section in charted():
        draw(section)
    return 0


def page() -> str:
    """The page's text."""
    return "\n".join([HEAD, *(_section(section) for section in SECTIONS)])


def _section(section: Section) -> str:
    what = textwrap.fill(section.what, 120)
    head = f"## {section.title}\n\n{what}\n\n```console\n$ {section.command}\n```\n"
    record = results(section)
    if record is None:
        return f"{head}\nNot measured yet: `benchmarks/results/{section.file}` is not there.\n"
    chart = f"\n![{section.alt}](charts/{section.chart})\n" if section.chart else ""
    return f"{head}\n{textwrap.fill(made(record), 120)}\n{chart}\n{section.text(record)}"


def results(section: Section) -> Mapping[str, Any] | None:
    """What the section's file holds; None without one."""
    path = RESULTS / section.file
    return json.loads(path.read_text()) if path.exists() else None


def made(record: Mapping[str, Any]) -> str:
    """When, on what and with what it was measured, and what the file does not say of that."""
    facts = {**record, **record.get("environment", {})}
    parts = [f"Measured on {facts['date']}" if "date" in facts else "Measured at a date that is not on record"]
    processor = facts.get("processor", facts.get("machine", "an unnamed processor"))
    cores = facts.get("cores", facts.get("cpu_count"))
    parts.append(f"on {processor}, {cores} cores, {facts.get('accelerator') or 'no accelerator'}")
    if facts.get("torch_threads") is not None:
        parts.append(f"torch with {facts['torch_threads']} thread{'s' * (facts['torch_threads'] != 1)}")
    packages = facts.get(
        "packages", {name: facts[name] for name in ("torch", "numpy", "cryptography") if name in facts}
    )
    versions = [f"Python {facts['python']}"] if "python" in facts else []
    versions += [f"{name} {version}" for name, version in packages.items() if version is not None]
    text = f"{', '.join(parts)}; {', '.join(versions)}."
    if "remark" in facts:
        text += f" {facts['remark'][0].upper()}{facts['remark'][1:]}."
    if lacking(record):
        text += f" The file does not say: {', '.join(lacking(record))}."
    return text


def lacking(record: Mapping[str, Any]) -> list[str]:
    """Which of the facts the file does not have."""
    facts = {**record, **record.get("environment", {})}
    return [fact for fact, names in FACTS.items() if not any(facts.get(name) for name in names)]


# ── charts ──────────────────────────────────────────────────────────────────────────────────────────


def charted() -> list[Section]:
    """The sections that have a chart and results."""
    return [section for section in SECTIONS if section.chart and (RESULTS / section.file).exists()]


def digest(section: Section) -> str:
    """Of the results that a chart shows."""
    return hashlib.sha256((RESULTS / section.file).read_bytes()).hexdigest()[:16]


def drawn(section: Section) -> str | None:
    """The digest in the chart that lies in docs/; None without one."""
    path = CHARTS / str(section.chart)
    if not path.exists():
        return None
    found = path.read_text().split("results sha256 ", 1)
    return found[1][:16] if len(found) == 2 else None


def draw(section: Section) -> None:
    """Write a section's chart, the same bytes for the same results."""
    import matplotlib  # optional: the extra "plots"

    from benchmarks.page_charts import CHARTS as DRAWINGS

    with matplotlib.rc_context({"svg.hashsalt": "dpdl", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = DRAWINGS[str(section.chart)](json.loads((RESULTS / section.file).read_text()))
        metadata = {"Date": None, "Source": f"results sha256 {digest(section)}"}
        figure.savefig(CHARTS / str(section.chart), metadata=metadata)


if __name__ == "__main__":
    raise SystemExit(main())
