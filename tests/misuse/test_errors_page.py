"""docs/errors.md has every error, with when it comes and what to do, and draws the tree as it is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import accountants.errors
import dpdl.errors
from dpdl.errors import PrivacyError, PrivacyWarning
from tests.misuse.cases import CASES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "errors.md").read_text()
SECTIONS = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
BASES = {**{name: getattr(dpdl.errors, name) for name in dpdl.errors.__all__}}
INTERNAL = {"TapeRefusal"}  # an engine's, for the one that chooses engines


def classes_of_the_library() -> dict[str, tuple[str, ...]]:
    """Every class that derives from an error of ours, wherever it is written, with its bases."""
    found: dict[str, tuple[str, ...]] = {}
    known = set(BASES)
    trees = [ast.parse(path.read_text()) for name in ("dpdl", "accountants") for path in (ROOT / name).rglob("*.py")]
    for _ in range(4):  # as deep as the tree may be
        for tree in trees:
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    bases = tuple(ast.unparse(base) for base in node.bases)
                    if known & set(bases):
                        found[node.name] = bases
                        known.add(node.name)
    return found


def test_every_error_has_a_section_and_every_section_an_error() -> None:
    assert set(SECTIONS) == set(dpdl.errors.__all__)
    own = {
        name
        for name, kind in vars(accountants.errors).items()
        if isinstance(kind, type) and issubclass(kind, PrivacyError)
    }
    assert own <= set(SECTIONS)


def test_all_are_exported() -> None:
    written = {name for name, kind in vars(dpdl.errors).items() if isinstance(kind, type)}
    assert {name for name in written if issubclass(BASES.get(name, PrivacyError), (PrivacyError, PrivacyWarning))} == (
        set(dpdl.errors.__all__)
    )


@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_a_section_says_when_and_what_to_do(name: str) -> None:
    for part in ("When", "What to do"):
        text = re.search(rf"^\*\*{part}\.\*\* (.+?)(?=\n\n|\Z)", SECTIONS[name], re.MULTILINE | re.DOTALL)
        assert text is not None, part
        assert len(text[1]) > 40, part
    parents = [b.__name__ for b in BASES[name].__bases__ if b.__name__ in BASES and b is not PrivacyError]
    for parent in parents:
        assert f"A `{parent}`." in SECTIONS[name]


def test_the_tree_is_the_one_of_the_classes() -> None:
    tree = re.search(r"^```\n(PrivacyError\n.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert tree is not None
    path: list[str] = []
    drawn: dict[str, str | None] = {}
    for line in filter(None, tree[1].splitlines()):
        indent, name = re.match(r"([│├└─ ]*)(\w+)", line).groups()  # type: ignore[union-attr]
        depth = len(indent) // 4
        path[depth:] = [name]
        drawn[name] = path[depth - 1] if depth else None
    assert set(drawn) == set(dpdl.errors.__all__)
    for name, parent in drawn.items():
        mine = [base.__name__ for base in BASES[name].__bases__ if base.__name__ in BASES]
        assert mine == ([] if parent is None else [parent])


def test_errors_of_other_modules_are_in_the_facades_table() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (`\w+` \|(?: `\w+`)?) \| .+ \|$", PAGE, re.MULTILINE))
    elsewhere = {name: bases for name, bases in classes_of_the_library().items() if name not in BASES}
    assert set(rows) == set(elsewhere) - INTERNAL
    for name, written in rows.items():
        assert tuple(re.findall(r"`(\w+)`", written)) == elsewhere[name], name


def test_errors_on_the_list_of_misuses_are_on_the_page() -> None:
    for case in CASES:
        if case.refused is not None:
            assert f"`{case.refused.__name__}`" in PAGE or issubclass(case.refused, (AttributeError, TypeError))


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\((\w+\.md)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
