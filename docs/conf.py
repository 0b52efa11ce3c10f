"""The documentation site: Sphinx, MyST for the pages, autodoc for the docstrings.

    make docs        # builds docs/_build/html; a warning is an error

Pages are plain Markdown that reads as well on GitHub: links between pages are relative paths, and nothing is included
but the README's head. What Sphinx needs besides is done here: names are found under their public path, links that leave
docs/ lead to a page of the site, and a name in backticks is a link where there is something to link to.
"""

from __future__ import annotations

import abc
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

ROOT = Path(__file__).parents[1]

project = "dpdl"
author = "the authors of dpdl"
release = version = importlib.metadata.version("dpdl")
html_title = f"dpdl {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
nitpicky = True

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b6e4f", "color-brand-content": "#0b6e4f"},
    "dark_css_variables": {"color-brand-primary": "#52a67c", "color-brand-content": "#6fc196"},
}

# ── pages ───────────────────────────────────────────────────────────────────────────────────────────

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4  # as GitHub makes them, so that links to headings work in both
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True

# ── docstrings ──────────────────────────────────────────────────────────────────────────────────────

napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Guarantee", ("Attributes", "params_style")]
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
default_role = "py:obj"  # a name in backticks

# Optional packages whose integrations are documented without them.
OPTIONAL = ("accelerate", "flwr", "grpc", "lightning", "nvflare", "peft", "pytorch_lightning", "ray", "transformers")


API_PAGES = [path.read_text() for path in sorted((ROOT / "docs" / "api").glob("*.md"))]


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


autodoc_mock_imports = [package for package in OPTIONAL if not _installed(package)]

PUBLIC = (
    "dpdl",
    "dpdl.audit",
    "dpdl.budget",
    "dpdl.clipping",
    "dpdl.data",
    "dpdl.errors",
    "dpdl.federated",
    "dpdl.federated.flower",
    "dpdl.models",
    "dpdl.noise",
    "dpdl.optim",
    "dpdl.report",
    "dpdl.sampling",
    "dpdl.split",
    "dpdl.tradeoff",
    "dpdl.validation",
    "accountants",
)


def as_plain_text(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """The library's docstrings are plain text: indented paragraphs are formulas, stars and bars are stars and bars."""
    written: list[str] = []
    indent = 0  # of the last line of text
    references = False  # whether we are in their section
    verbatim: int | None = None  # what the formula that we are in is indented by
    for line in lines:
        text = line.lstrip()
        depth = len(line) - len(text)
        if not text:
            written.append(line)
            continue
        if verbatim is not None and depth < verbatim:
            verbatim = None
        begins = bool(written) and not written[-1] and depth > indent and not text.startswith(">>>")
        if verbatim is None and begins:
            verbatim = depth
            written += [" " * indent + "::", ""]
        if verbatim is None:
            indent = depth
            line = _escaped(line)
            references = text == "References:" or (references and depth > 0)
            if references and text.startswith("["):
                line = f"{line[:depth]}- {line[depth:]}"
            elif references and text != "References:":
                line = line[:4] + "  " + text  # goes on in the list's item
        written.append(line)
    lines[:] = written
    if what == "module" and name in PUBLIC:
        lines += _table_of(name)


def _table_of(module: str) -> list[str]:
    """The module's public names, each with the first line of its docstring."""
    names = [name for name in importlib.import_module(module).__all__ if _has_a_page(module, name)]
    return ["", ".. autosummary::", "   :nosignatures:", "", *(f"   {name}" for name in names), ""]


def _has_a_page(module: str, name: str) -> bool:
    """Whether a name is documented with its module, and not, as the API page says, with another one."""
    home = next((text for text in API_PAGES if f"automodule:: {module}\n" in text), "")
    options = home.partition(f"automodule:: {module}\n")[2].split("```")[0]
    return name not in re.split(r"[\s,]+", options)


def _escaped(line: str) -> str:
    """Stars and bars outside of backticks mean nothing to docutils."""
    if line.lstrip().startswith((">>>", "...")):
        return line
    parts = line.split("`")
    parts[::2] = [re.sub(r"(?<!\\)([*|])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


# ── names ───────────────────────────────────────────────────────────────────────────────────────────


def _public_paths() -> dict[str, str]:
    """Where a public thing is documented, by where it is defined: annotations and docstrings say the latter."""
    paths: dict[str, str] = {}
    for module_name in PUBLIC:
        if module_name.endswith(".flower") and not _installed("flwr"):
            continue  # documented from mocks; its annotations are not resolved
        module = importlib.import_module(module_name)
        for name in module.__all__:
            thing = getattr(module, name)
            home = f"{getattr(thing, '__module__', module_name)}.{getattr(thing, '__qualname__', name)}"
            paths.setdefault(home, f"{module_name}.{name}")
    return paths


PUBLIC_PATHS = _public_paths()
# Bare names that are links: classes, and the functions of `dpdl` itself. `delta` is an argument nearly everywhere.
BY_NAME = {
    name: path
    for package, name, path in ((*path.rpartition(".")[::2], path) for path in reversed(list(PUBLIC_PATHS.values())))
    if name[0].isupper() or package == "dpdl"
}


def _candidates(target: str) -> Iterator[str]:
    """Public paths that a reference may mean: the thing itself, a member of it, or a bare name."""
    home, _, member = target.rpartition(".")
    for path, suffix in ((target, ""), (home, f".{member}")):
        if path in PUBLIC_PATHS:
            yield PUBLIC_PATHS[path] + suffix
        if path in BY_NAME:
            yield BY_NAME[path] + suffix


def resolve_name(
    app: Sphinx, env: BuildEnvironment, node: nodes.Element, contnode: nodes.TextElement
) -> nodes.reference | nodes.TextElement | None:
    """A reference that Sphinx could not resolve: by its public path, or as plain text if it is nobody's.

    Plain text without a word are names in backticks (most are arguments and fields, which have no place of their own),
    private types, and types of other packages. What a page refers to on purpose, with a role, is reported.
    """
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    domain = env.domains["py"]
    for path in _candidates(target):
        found = domain.resolve_xref(env, node["refdoc"], app.builder, "obj", path, node, contnode)
        if found is not None:
            return found
    in_docstring = node.get("py:module") is not None or node.get("py:class") is not None
    return contnode if in_docstring else None


# ── links ───────────────────────────────────────────────────────────────────────────────────────────

# Files of the repository that have a page here, as pages name them.
PAGES_OF_FILES = {"../CONTRIBUTING.md": "contributing.md", "../README.md": "index.md", "../CHANGELOG.md": "changes.md"}


def keep_links_inside(app: Sphinx, docname: str, source: list[str]) -> None:
    """On the site, a link to a file outside of docs/ leads to the page that shows it, or is the file's name."""
    depth = docname.count("/")
    text = source[0]
    for file, page in PAGES_OF_FILES.items():
        text = text.replace(f"]({'../' * depth}{file}", f"]({'../' * depth}{page}")
    source[0] = re.sub(rf"\[([^\]]*)\]\({re.escape('../' * (depth + 1))}(?!\.)[^)]*\)", r"\1", text)


def keep_included_links_inside(app: Sphinx, relative: Path, parent: str, content: list[str]) -> None:
    """The same for an included file of the repository's root, whose links are relative to that."""
    if relative.suffix == ".md":
        content[0] = content[0].replace("](docs/", "](")
        for file, page in PAGES_OF_FILES.items():
            content[0] = content[0].replace(f"]({file.removeprefix('../')}", f"]({page}")


def hide_empty_bases(app: Sphinx, domain: str, objtype: str, content: nodes.Element) -> None:
    """Where nothing is left of the bases, neither is their heading."""
    for paragraph in list(content.findall(nodes.paragraph)):
        if paragraph.astext().strip() == "Bases:":
            paragraph.parent.remove(paragraph)


def hide_private_bases(app: Sphinx, name: str, obj: Any, options: Any, bases: list[Any]) -> None:
    """`object`, `ABC` and private classes say nothing to a reader."""
    hidden = (object, abc.ABC)
    bases[:] = [base for base in bases if base not in hidden and not getattr(base, "__name__", "").startswith("_")]


def skip_inherited_tuple_fields(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Fields of named tuples document themselves as "Alias for field number n"."""
    doc = inspect.getdoc(obj) or ""
    return True if doc.startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    """What Sphinx calls."""
    app.connect("missing-reference", resolve_name)
    app.connect("source-read", keep_links_inside)
    app.connect("include-read", keep_included_links_inside)
    app.connect("autodoc-process-docstring", as_plain_text, priority=400)  # before napoleon's sections
    app.connect("object-description-transform", hide_empty_bases)
    app.connect("autodoc-process-bases", hide_private_bases)
    app.connect("autodoc-skip-member", skip_inherited_tuple_fields)
