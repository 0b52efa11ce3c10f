"""Folds frozen normalisations into the convolution or linear layer before them, where nothing else sees the difference.

    scale = weight / sqrt(running_var + eps)
    (W x + b - running_mean) * scale + bias = (scale W) x + (b - running_mean) * scale + bias

That no one else uses the layer's output is shown for all inputs at once, by torch.fx's symbolic trace in both modes; a
model that cannot be traced is left as it is. A layer or normalisation that trains is left too: folded, it would compute
the same, but with another scale of its gradients it would learn, and be clipped, differently.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from dpdl.per_sample.batch import ExampleBatch
from dpdl.validation.frozen_batch_norm import FrozenBatchNorm
from dpdl.validation.measurement import MODES, InputShapes, in_mode, input_shapes
from dpdl.validation.replacement import Replacement, hooks_of, modules_and_paths

__all__ = ["Folding", "fold_parameters", "plan_folding"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS: tuple[type[nn.Module], ...] = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)

# What symbolic tracing raises where a model's way depends on values, or on what a proxy is not.
TRACING_FAILS = (fx.proxy.TraceError, AttributeError, KeyError, NameError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, kw_only=True)
class Folding:
    """What comes of one frozen normalisation.

    Attributes:
        paths: of the normalisation.
        into: path of the layer before it; "" if it stays.
        reason: why it stays; "" if it is folded.
        replacements: of the layer and the normalisation; empty if it stays.
    """

    paths: tuple[str, ...]
    into: str = ""
    reason: str = ""
    replacements: tuple[Replacement, ...] = ()


def plan_folding(model: nn.Module, batch: ExampleBatch) -> list[Folding]:
    """Each frozen normalisation of a model, and the layer that it can be folded into.

    Args:
        model: left as it is.
        batch: examples, to see the arguments and shapes that are in use.
    """
    paths = {module: found for found, module in modules_and_paths(model)}
    norms = [module for module in paths if isinstance(module, FrozenBatchNorm)]
    if not norms:
        return []
    graphs = _graphs(model, batch)
    shapes = input_shapes(model, norms, batch)
    foldings = []
    for norm in norms:
        if isinstance(graphs, str):
            foldings.append(Folding(paths=paths[norm], reason=graphs))
            continue
        found = {_layer_before(graph, model, norm, paths, shapes) for graph in graphs}
        layer = found.pop() if len(found) == 1 else "what is before it depends on the mode"
        if isinstance(layer, str):
            foldings.append(Folding(paths=paths[norm], reason=layer))
            continue
        replacements = (
            Replacement(paths=paths[layer], module=layer, replacement=_folded(layer, norm)),
            Replacement(paths=paths[norm], module=norm, replacement=_identity(norm)),
        )
        foldings.append(Folding(paths=paths[norm], into=paths[layer][0], replacements=replacements))
    return foldings


def fold_parameters(layer: nn.Module, norm: FrozenBatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer that computes both, worked out in float64, in the layer's dtype."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    if isinstance(bias, Tensor):
        shift = shift + bias.double() * scale
    if isinstance(layer, TRANSPOSED):  # [in, out / groups, *kernel]
        groups = layer.groups
        grouped = weight.double().unflatten(0, (groups, -1))
        scaled = (grouped * scale.view(groups, 1, -1, *[1] * (weight.ndim - 2))).flatten(0, 1)
    else:  # [out, ...]
        scaled = weight.double() * scale.view(-1, *[1] * (weight.ndim - 1))
    return scaled.to(weight.dtype), shift.to(weight.dtype)


def _folded(layer: nn.Module, norm: FrozenBatchNorm) -> nn.Module:
    with torch.no_grad():
        weight, bias = fold_parameters(layer, norm)
    twin = copy.deepcopy(layer)
    twin.weight = nn.Parameter(weight, requires_grad=False)
    twin.bias = nn.Parameter(bias, requires_grad=False)
    return twin


def _identity(norm: nn.Module) -> nn.Identity:
    identity = nn.Identity()
    identity.training = norm.training
    return identity


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, FrozenBatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _graphs(model: nn.Module, batch: ExampleBatch) -> list[fx.Graph] | str:
    """The model's graph in each mode; a reason if there is none that holds for every call."""
    args, kwargs = batch.call_arguments()
    try:
        arguments = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        return f"the model's arguments cannot be told ({error})"
    if set(arguments) != set(inspect.signature(model.forward).parameters):
        return "the model has arguments that the example batch leaves out, and may take another way with them"
    graphs = []
    for mode in MODES:
        with in_mode(model, mode):
            try:
                graphs.append(_Tracer().trace(model))
            except TRACING_FAILS as error:
                return f"the model's graph cannot be traced ({type(error).__name__}: {str(error).splitlines()[0]})"
    return graphs


def _layer_before(
    graph: fx.Graph,
    model: nn.Module,
    norm: FrozenBatchNorm,
    paths: dict[nn.Module, tuple[str, ...]],
    shapes: InputShapes,
) -> nn.Module | str:
    """The layer that a normalisation can be folded into, or why there is none."""
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target in paths[norm]]
    if len(calls) != 1:
        return f"it is called {len(calls)} times"
    before = calls[0].args[0] if calls[0].args else None
    if not isinstance(before, fx.Node) or before.op != "call_module":
        return "no layer is right before it"
    layer = model.get_submodule(str(before.target))
    if type(layer) not in LAYERS:
        return f"before it is a {type(layer).__name__}"
    name = f"'{before.target}'"
    if len(before.users) > 1:
        return f"the output of {name} is used elsewhere, too"
    if sum(node.op == "call_module" and node.target in paths[layer] for node in graph.nodes) > 1:
        return f"{name} is called several times"
    own = {*layer.parameters(), *norm.parameters()}
    if any(p.requires_grad for p in own):
        return f"it or {name} is trained, and folded would be trained differently"
    tied = Counter(p for module in model.modules() for p in module._parameters.values() if p is not None)
    if any(tied[p] > 1 for p in own):
        return f"a parameter of it or of {name} is tied to another"
    inside = {f"{path}." for module in (layer, norm) for path in paths[module]}
    if any(node.op == "get_attr" and str(node.target).startswith(tuple(inside)) for node in graph.nodes):
        return f"its parameters, or those of {name}, are used by themselves"
    if parametrize.is_parametrized(layer) or hooks_of(layer) or hooks_of(norm):
        return f"it or {name} has hooks or parametrizations"
    if isinstance(layer, nn.Linear) and any(len(shape) != 2 for shape in shapes[norm]):
        return f"{name} has its features on the last axis, not on the one that is normalised"
    return layer
