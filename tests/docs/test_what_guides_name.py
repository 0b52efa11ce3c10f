"""What guides must name, and what they name must be there."""

from __future__ import annotations

import builtins
import re
from pathlib import Path

import pytest

import accountants
from dpdl import errors
from tests.docs.blocks import DOCS, page_name, pages

# Pages about other libraries' errors, and two that have tests of their own in tests/misuse/.
OTHERS = {"compat_opacus.md", "compat_deepee.md", "errors.md", "misuse.md"}


def test_the_guide_to_accounting_names_every_event() -> None:
    things = {name: getattr(accountants, name) for name in accountants.__all__}
    events = {
        name for name, thing in things.items() if isinstance(thing, type) and issubclass(thing, accountants.Event)
    }
    guide = (DOCS / "accounting.md").read_text()
    assert not {name for name in events - {"Event", "Composed", "Repeated"} if f"`{name}" not in guide}


@pytest.mark.parametrize("path", [path for path in pages() if page_name(path) not in OTHERS], ids=page_name)
def test_every_error_that_a_page_names_is_there(path: Path) -> None:
    named = set(re.findall(r"\b[A-Z][a-z]\w*Error\b", path.read_text()))
    assert not {name for name in named if not hasattr(errors, name) and not hasattr(builtins, name)}
