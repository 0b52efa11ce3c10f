"""Every public name, and what its code has: parameters, annotations, the errors that it raises.

Public is what `__all__` of these packages lists, what the guides import besides, and of public classes the methods and
properties without a leading underscore.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import accountants

PACKAGES = (
    "dpdl",
    "dpdl.audit",
    "dpdl.budget",
    "dpdl.clipping",
    "dpdl.compat.deepee",
    "dpdl.compat.deepee.dataloader",
    "dpdl.compat.deepee.errors",
    "dpdl.compat.deepee.privacy_accounting",
    "dpdl.compat.deepee.snooper",
    "dpdl.compat.deepee.surgery",
    "dpdl.compat.deepee.watchdog",
    "dpdl.compat.opacus",
    "dpdl.compat.opacus.accountants",
    "dpdl.compat.opacus.accountants.utils",
    "dpdl.compat.opacus.data_loader",
    "dpdl.compat.opacus.distributed",
    "dpdl.compat.opacus.errors",
    "dpdl.compat.opacus.grad_sample",
    "dpdl.compat.opacus.layers",
    "dpdl.compat.opacus.optimizers",
    "dpdl.compat.opacus.schedulers",
    "dpdl.compat.opacus.utils.batch_memory_manager",
    "dpdl.compat.opacus.utils.fast_gradient_clipping_utils",
    "dpdl.compat.opacus.utils.module_utils",
    "dpdl.compat.opacus.utils.per_sample_gradients_utils",
    "dpdl.compat.opacus.utils.uniform_sampler",
    "dpdl.compat.opacus.validators",
    "dpdl.compat.opacus.validators.errors",
    "dpdl.data",
    "dpdl.errors",
    "dpdl.federated",
    "dpdl.federated.flower",
    "dpdl.integrations.accelerate",
    "dpdl.integrations.lightning",
    "dpdl.integrations.transformers",
    "dpdl.models",
    "dpdl.noise",
    "dpdl.optim",
    "dpdl.report",
    "dpdl.sampling",
    "dpdl.split",
    "dpdl.tradeoff",
    "dpdl.validation",
    "accountants",
    "accountants.events",
)
SINGLE = (  # public by the guides, of modules that hold more
    "accountants.adaptive.filters.order_for_plan",
    "dpdl.federated.noisy_moments.NoisyMoments",
    "dpdl.federated.normalisation.combined_moments",
    "dpdl.federated.plot.plot_federated",
    "dpdl.privacy_report.rounded_up",
    "dpdl.secure_random.RandomStream",
    "dpdl.federated.accountable.AccountableClient",
    "dpdl.split.cost.Workload",
    "dpdl.split.cost.compare",
    "dpdl.split.door.Once",
    "dpdl.split.manifest_of_run.manifest_of",
    "dpdl.split.network_cost.measure_network",
    "dpdl.split.nopeek.HEURISTIC",
    "dpdl.split.nopeek.NoPeek",
    "dpdl.split.nopeek.NoPeekOutlet",
    "dpdl.split.part_training.PartTraining",
    "dpdl.split.report.save_report",
    "dpdl.split.signing_keys.read_private_key",
    "dpdl.split.signing_keys.read_public_key",
)
OPTIONAL = {"dpdl.federated.flower": "flwr"}

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Public:
    """A public name: a module's, or a public class's."""

    name: str  # dotted, where it is defined
    value: Any  # a function, class, property, or a constant
    owner: type | None  # of a method or property
    doc: str


def project(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).split(".")[0] in {"dpdl", "accountants"}


def function_of(value: Any) -> Any:
    """What holds the code and the annotations."""
    if isinstance(value, property):
        return value.fget
    if isinstance(value, functools.cached_property):
        return value.func
    return getattr(value, "__func__", value)


@functools.cache
def public_names() -> dict[str, Public]:
    found: dict[str, Public] = {}
    listed = {name: name.rpartition(".")[0] for name in SINGLE}
    for package in PACKAGES:
        if package in OPTIONAL and importlib.util.find_spec(OPTIONAL[package]) is None:
            continue
        listed.update({f"{package}.{name}": package for name in importlib.import_module(package).__all__})
    for full, package in listed.items():
        module, name = importlib.import_module(package), full.removeprefix(f"{package}.")
        value = getattr(module, name)
        if name.startswith("_") or isinstance(value, ModuleType):
            continue
        if inspect.isclass(value) and project(value):
            found.update({public.name: public for public in of_class(value)})
        elif inspect.isfunction(value):
            full = f"{value.__module__}.{value.__qualname__}"
            found[full] = Public(full, value, None, inspect.getdoc(value) or "")
        else:
            found[f"{package}.{name}"] = Public(f"{package}.{name}", value, None, comment_of(module, name))
    return found


def of_class(cls: type) -> Iterator[Public]:
    full = f"{cls.__module__}.{cls.__qualname__}"
    doc = inspect.cleandoc(cls.__doc__ or "")
    yield Public(full, cls, None, "" if doc.startswith(f"{cls.__name__}(") else doc)  # dataclasses write their own
    for base in filter(project, cls.__mro__):
        for name, value in vars(base).items():
            code = function_of(value)
            if (name.startswith("_") and name != "__call__") or not (inspect.isfunction(code) and project(code)):
                continue
            yield Public(
                f"{base.__module__}.{base.__qualname__}.{name}", value, base, inspect.cleandoc(code.__doc__ or "")
            )


def comment_of(module: ModuleType, name: str) -> str:
    """The comment of a constant: on its line, or above it; followed to the module that assigns it."""
    lines, tree = source_of(module.__name__)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == name for alias in node.names):
            return comment_of(importlib.import_module(node.module), name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            near = [lines[node.lineno - 2], *lines[node.lineno - 1 : node.end_lineno]]
            return " ".join(line.partition("#")[2] for line in near if "#" in line).strip()
    return ""


@functools.cache
def source_of(module: str) -> tuple[list[str], ast.Module]:
    text = inspect.getsource(sys.modules[module])
    return text.splitlines(), ast.parse(text)


# ── what the code has ───────────────────────────────────────────────────────────────────────────────


def annotated(public: Public) -> dict[str, str]:
    """Parameters, or a dataclass's fields, and their annotations as text; "return" too."""
    value = public.value
    if inspect.isclass(value):
        if dataclasses.is_dataclass(value):
            return {f.name: str(f.type) for f in dataclasses.fields(value) if not f.name.startswith("_") and f.init}
        if issubclass(value, tuple) and hasattr(value, "_fields"):
            return {name: str(inspect.get_annotations(value)[name]) for name in value._fields}
        value = vars(value).get("__init__") or next(
            (vars(base)["__init__"] for base in value.__mro__ if project(base) and "__init__" in vars(base)), None
        )
    code = function_of(value)
    if not (inspect.isfunction(code) and project(code)):
        return {}
    signature = inspect.signature(code)
    texts = {
        name: str(parameter.annotation)
        for name, parameter in signature.parameters.items()
        if name not in {"self", "cls"} and not name.startswith("_") and parameter.kind not in VARIADIC
    }
    return texts | ({} if inspect.isclass(public.value) else {"return": str(signature.return_annotation)})


def from_elsewhere(public: Public) -> bool:
    """Whether another library's class has this method, and its arguments."""
    name = public.name.rsplit(".", 1)[-1]
    return public.owner is not None and any(
        name in vars(base) for base in public.owner.__mro__ if not project(base) and base is not object
    )


@functools.cache
def raised_in(module: str) -> dict[str, frozenset[type]]:
    """For each function of a file, as `f` or `Class.f`, the project's exceptions that calling it may raise."""
    functions: dict[str, ast.FunctionDef] = {}
    for node in source_of(module)[1].body:
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = node
        elif isinstance(node, ast.ClassDef):
            functions.update({f"{node.name}.{f.name}": f for f in node.body if isinstance(f, ast.FunctionDef)})
    found: dict[str, set[type]] = {name: set() for name in functions}
    changed = True
    while changed:
        before = {name: len(classes) for name, classes in found.items()}
        for name, function in functions.items():
            for statement in function.body:
                found[name] |= raised_by(statement, sys.modules[module], name.rpartition(".")[0], found)
        changed = any(len(found[name]) != count for name, count in before.items())
    return {name: frozenset(classes) for name, classes in found.items()}


def raised_by(node: ast.AST, module: ModuleType, cls: str, known: dict[str, set[type]]) -> set[type]:
    if isinstance(node, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
        return set()  # runs at another time
    found: set[type] = set()
    if isinstance(node, ast.Try):
        for statement in node.body:
            found |= raised_by(statement, module, cls, known)
        caught = tuple(kind for handler in node.handlers for kind in classes_of(handler.type, module))
        found = {kind for kind in found if not issubclass(kind, caught)} if caught else found
        rest: list[ast.AST] = [*node.handlers, *node.orelse, *node.finalbody]
    else:
        rest = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.Raise):
        raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        found |= {kind for kind in classes_of(raised, module) if issubclass(kind, accountants.PrivacyError)}
    if isinstance(node, ast.Call):
        for callee in callees(node.func, cls):
            found |= known.get(callee, set())
    for child in rest:
        found |= raised_by(child, module, cls, known)
    return found


def classes_of(node: ast.AST | None, module: ModuleType) -> list[type]:
    if isinstance(node, ast.Tuple):
        return [kind for element in node.elts for kind in classes_of(element, module)]
    value = getattr(module, node.id, getattr(builtins, node.id, None)) if isinstance(node, ast.Name) else None
    return [value] if inspect.isclass(value) and issubclass(value, BaseException) else []


def callees(function: ast.expr, cls: str) -> list[str]:
    if isinstance(function, ast.Name):
        name = cls if function.id == "cls" else function.id
        return [name]
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        owner = cls if function.value.id in {"self", "cls"} else function.value.id
        return [f"{owner}.{function.attr}"]
    return []


def raised(public: Public) -> frozenset[type]:
    value = public.value
    if inspect.isclass(value):
        makers = [vars(value).get(name) for name in ("__init__", "__post_init__", "__new__")]
    else:
        makers = [function_of(value)]
    return frozenset().union(
        *(
            raised_in(code.__module__).get(code.__qualname__, frozenset())
            for code in makers
            if inspect.isfunction(code) and project(code)
        )
    )


def short(public: Public) -> str:
    return (
        public.value.__qualname__
        if public.owner is None and hasattr(public.value, "__qualname__")
        else ".".join(public.name.split(".")[-2:])
    )
