"""The site, as far as it can be seen without building it: pages can be reached, public names have a page."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from tests.docs.blocks import DOCS, ROOT

API = DOCS / "api"
# Packages whose public names are documented with another page's, or are a copy of another library's.
NOT_THERE = {
    "dpdl.compat": "names of other libraries: compat_opacus.md, compat_deepee.md",
    "dpdl.integrations": "has no names of its own: integrations.md",
    "dpdl.per_sample": "its names are dpdl's",
}


def packages() -> list[str]:
    """Those directly in `dpdl` that have public names."""
    found = sorted(path.parent for path in (ROOT / "dpdl").glob("*/__init__.py"))
    return [f"dpdl.{path.name}" for path in found if "__all__ = [" in (path / "__init__.py").read_text()]


def documented() -> dict[str, list[str]]:
    """By module: the names that its page leaves out."""
    text = "\n".join(path.read_text() for path in API.glob("*.md"))
    found = re.findall(r"automodule:: (\S+)\n(?:   :exclude-members: (.*)\n)?", text)
    return {module: left_out.split(", ") if left_out else [] for module, left_out in found}


@pytest.mark.parametrize("package", ["dpdl", "accountants", *packages()])
def test_every_public_package_has_a_page(package: str) -> None:
    assert package in documented() or package in NOT_THERE or package.startswith("dpdl.compat.")


def test_a_name_that_a_page_leaves_out_is_on_another() -> None:
    there = {
        (module, name): vars(importlib.import_module(module))[name]
        for module in documented()
        if importlib.util.find_spec("flwr") or not module.endswith(".flower")
        for name in importlib.import_module(module).__all__
    }
    left_out = {(module, name) for module, names in documented().items() for name in names}
    assert left_out <= there.keys()
    shown = [thing for key, thing in there.items() if key not in left_out]
    assert all(any(thing is other for other in shown) for key, thing in there.items() if key in left_out)


def test_the_modules_of_conf_are_those_of_the_pages() -> None:
    listed = re.search(r"^PUBLIC = \((.*?)^\)", (DOCS / "conf.py").read_text(), flags=re.DOTALL | re.MULTILINE)
    assert listed is not None
    assert set(re.findall(r'"([\w.]+)"', listed[1])) == documented().keys()


def test_every_page_is_in_a_table_of_contents() -> None:
    listed: set[Path] = set()
    for path in DOCS.rglob("*.md"):
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE):
            for line in tree.splitlines():
                if line and not line.startswith(":"):
                    found = set(path.parent.glob(f"{line}.md"))
                    assert found, f"{path.name} lists {line}, which is not there"
                    listed |= found
    assert {path for path in DOCS.rglob("*.md") if "_build" not in path.parts} - listed == {DOCS / "index.md"}
