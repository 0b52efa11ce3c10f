"""Classes made from torch's normalisations that do more: the normalisation, and what comes after it.

Libraries derive from BatchNorm2d to put dropout or an activation behind it (`BatchNormAct2d` of timm). A replacement
that forgets those would change the network. Which parts run, and in which order, cannot be read off a class, so it is
tried: on random numbers, the module must compute what torch's normalisation followed by its own children computes.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dpdl.errors import ModelError
from dpdl.per_sample.randomness import isolated_randomness

__all__ = ["convert_whole"]

PLAIN: tuple[type[_NormBase], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
CARRIED_OVER = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
EXAMPLES, EXTENT = 3, 4  # of the random inputs: how many, and their length along each axis of positions
TOLERANCE = 1e-5  # relative; both sides are computed in float64


def convert_whole(module: _NormBase, converter: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """`converter(module)`, followed by whatever the module's class does after normalising.

    Args:
        module: a batch or instance normalisation, of torch's own or a class made from one.
        converter: from the normalisation to its replacement, or to itself to leave it.

    Returns:
        The replacement; or, if there are parts behind it, a Sequential of it under the name "norm" and the parts
        under their own names.

    Raises:
        ModelError: the class does something else, which the replacement would lose.
    """
    norm = converter(module)
    if norm is module:
        return module
    own = {*module._parameters, *module._buffers} - CARRIED_OVER
    kind = next((kind for kind in PLAIN if isinstance(module, kind)), None)
    if kind is None or own:
        holds = f" and holds {sorted(own)}" if own else ""
        raise ModelError(
            f"{type(module).__name__} is none of torch's own normalisations{holds}; a replacement would lose what it "
            "adds. Replace it by hand, or by a converter of your own with replace_modules(model, converter)."
        )
    unchanged = type(module).forward is kind.forward and "forward" not in module.__dict__
    if unchanged and not module._modules:
        return norm
    parts = dict(module.named_children())
    if not _is_normalisation_then_parts(module, kind):
        raise ModelError(
            f"{type(module).__name__} computes something else than {kind.__name__}"
            + (f" followed by its parts {sorted(parts)}" if parts else "")
            + "; a replacement would lose that. Replace it by hand, or by a converter of your own with "
            "replace_modules(model, converter)."
        )
    if not parts:
        return norm
    whole = nn.Sequential(OrderedDict([("norm", norm), *parts.items()]))
    whole.training = module.training
    return whole


def _is_normalisation_then_parts(module: _NormBase, kind: type[_NormBase]) -> bool:
    twin = copy.deepcopy(module).double()
    device = next((t.device for t in (*twin.parameters(), *twin.buffers())), torch.device("cpu"))
    with isolated_randomness(device), torch.no_grad():
        torch.manual_seed(0)  # nothing private: which numbers are tried is of no consequence
        for tensor in (*twin.parameters(), *twin.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
        for training in (False, True):
            twin.train(training)
            for shape in _shapes(kind, twin.num_features):
                x = torch.randn(shape, dtype=torch.float64, device=device)
                if not _same(twin, kind, x):
                    return False
    return True


def _same(twin: _NormBase, kind: type[_NormBase], x: Tensor) -> bool:
    plain = copy.deepcopy(twin)

    def expected() -> Any:
        y = kind.forward(plain, x.clone())
        for child in plain.children():
            y = child(y)
        return y

    outcomes = []
    for compute in (lambda: copy.deepcopy(twin)(x.clone()), expected):
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):  # the same dropout for both
            try:
                outcomes.append(compute())
            except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
                return False  # a part that is not called like this: a list, or with more arguments
    given, wanted = outcomes
    return isinstance(given, Tensor) and given.shape == wanted.shape and torch.allclose(given, wanted, rtol=TOLERANCE)


def _shapes(kind: type[_NormBase], channels: int) -> list[tuple[int, ...]]:
    positions = {"1": [1], "2": [2], "3": [3]}.get(kind.__name__[-2], [2])
    if kind is nn.BatchNorm1d:
        positions = [0, 1]
    return [(EXAMPLES, channels, *[EXTENT] * axes) for axes in positions]
