"""The tape engine beside plain autograd, one example at a time, in float64: outputs, norms, sums, gradients.

The truth shares nothing with the library: a float64 copy of the model is run on batches of one, and
the gradient of <cotangent, output> is asked for. Weights and inputs are rounded to the dtype
under test first, so that only the engine's own rounding is measured.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import register_random
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.tape import TapeEngine
from dpdl.per_sample.tape.refusal import TapeRefusal

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
# How far below the truth a norm may be: rounding of the operands alone (1.4e-5 was seen, two layer norms in a row).
BELOW = {torch.float64: 1e-12, torch.float32: 3e-5}
# How far above: norms taken as a difference of large numbers are enlarged by what rounding may have taken off.
ABOVE = {torch.float64: 1e-10, torch.float32: 1e-3}

dtypes = st.sampled_from([torch.float64, torch.float32])
sizes = st.integers(1, 4)


class TorchsRandom:
    """torch's generator, for hypothesis to seed before each case: modules draw their weights from it."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> Tensor:
        return torch.get_rng_state()

    def setstate(self, state: Tensor) -> None:
        torch.set_rng_state(state)


TORCHS_RANDOM = TorchsRandom()
register_random(TORCHS_RANDOM)


class Numbers:
    """Standard normals and tokens, the same in every run."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def tokens(self, *shape: int, vocabulary: int) -> Tensor:
        return torch.randint(0, vocabulary, shape, generator=self.generator)


class Using(nn.Module):
    """A function of a module and its inputs, with these parameters or submodules.

    Args:
        function: (module, *inputs) to outputs.
        members: tensors become parameters.
    """

    def __init__(self, function: Callable[..., Any], **members: Tensor | nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, nn.Parameter(member) if isinstance(member, Tensor) else member)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.function(self, *inputs, **named)


@st.composite
def examples_and_positions(draw: st.DrawFn) -> tuple[int, int]:
    """N and T, often equal, often 1."""
    n = draw(st.integers(1, 5))
    return n, draw(st.one_of(st.just(n), st.just(1), st.integers(1, 5)))


@st.composite
def shapes(draw: st.DrawFn, least: int = 0, most: int = 3) -> tuple[int, ...]:
    return tuple(draw(st.lists(sizes, min_size=least, max_size=most)))


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What is asked of an engine.

    Attributes:
        outputs: leaves of the model's output.
        gradients: parameter name to [N, *shape].
        norms: [N].
        weighted: parameter name to sum_n weights[n] * gradient_n.
    """

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    norms: Tensor
    weighted: dict[str, Tensor]


def weights_of(examples: int) -> Tensor:
    """Unequal, one of them 0 where there are several."""
    weights = torch.linspace(1.0, 2.0, examples, dtype=torch.float64)
    if examples > 2:
        weights[1] = 0.0
    return weights


def prepared(module: nn.Module, inputs: Any, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Both rounded to a dtype; the module is a copy."""
    return copy.deepcopy(module).to(dtype), tree_map(lambda t: _cast(t, dtype), inputs)


def truth(module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any] | None = None) -> Answers:
    """By plain autograd, for a batch-first output."""
    module = copy.deepcopy(module).double()
    inputs, named = tree_map(lambda t: _cast(t, torch.float64), (inputs, dict(named or {})))
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    n_examples = next(len(t) for t in tree_leaves((inputs, named)) if isinstance(t, Tensor) and t.ndim)
    outputs: list[list[Tensor]] = []
    rows: dict[str, list[Tensor]] = {name: [] for name in trainable}
    cotangents: list[Tensor] | None = None
    for n in range(n_examples):
        args, kwargs = tree_map(lambda t, n=n: t[n : n + 1].clone() if _is_rows(t) else t, (inputs, named))
        leaves = [t for t in tree_leaves(module(*args, **kwargs)) if isinstance(t, Tensor)]
        outputs.append([leaf.detach() for leaf in leaves])
        real = [leaf for leaf in leaves if leaf.is_floating_point()]
        if cotangents is None:
            cotangents = cotangents_of([(n_examples, *leaf.shape[1:]) for leaf in real])
        loss = torch.stack([(leaf * c[n : n + 1]).sum() for leaf, c in zip(real, cotangents, strict=True)]).sum()
        module.zero_grad(set_to_none=True)
        if loss.requires_grad:
            loss.backward()  # not autograd.grad, which reentrant checkpointing refuses
        for name, p in trainable.items():
            rows[name].append(torch.zeros_like(p) if p.grad is None else p.grad)
    gradients = {name: torch.stack(parts).detach() for name, parts in rows.items()}
    return Answers(
        outputs=[torch.cat(parts) for parts in zip(*outputs, strict=True)],
        gradients=gradients,
        norms=norms_of(gradients),
        weighted={name: torch.einsum("n,n...->...", weights_of(n_examples), g) for name, g in gradients.items()},
    )


def norms_of(gradients: Mapping[str, Tensor]) -> Tensor:
    """L2 norms over all parameters, [N]."""
    return torch.stack([g.double().reshape(len(g), -1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()


def cotangents_of(shapes_of_outputs: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """What flows back into the outputs, the same for the truth and for the tape."""
    numbers = Numbers(1234)
    return [numbers(*shape) for shape in shapes_of_outputs]


def measured(
    module: nn.Module,
    inputs: tuple[Any, ...],
    named: Mapping[str, Any] | None = None,
    *,
    engine: TapeEngine | None = None,
) -> Answers:
    """By the tape: norms first, then the sum, then the gradients, as clipping asks."""
    batch = ExampleBatch.from_call(inputs, dict(named or {}))
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    forward = (engine or TapeEngine(module)).forward(batch, trainable)
    outputs = [leaf for leaf in forward.outputs if isinstance(leaf, Tensor)]
    assert not any(leaf.requires_grad for leaf in outputs)
    real = [i for i, leaf in enumerate(forward.outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    cotangents = cotangents_of([tuple(forward.outputs[i].shape) for i in real])
    with torch.no_grad():
        (part,) = forward.pull_back({i: c.to(forward.outputs[i].dtype) for i, c in zip(real, cotangents, strict=True)})
        norms = part.norms()
        weighted = part.weighted_sum(weights_of(batch.size))
        gradients = part.materialize()
    assert all(p.grad is None for p in module.parameters())
    return Answers(outputs=outputs, gradients=gradients, norms=norms, weighted=weighted)


def assert_same(found: Answers, true: Answers, dtype: torch.dtype) -> None:
    """All of the tape's answers within rounding of the truth, and no norm below it."""
    tolerance = TOLERANCE[dtype]
    for got, expected in zip(found.outputs, true.outputs, strict=True):
        assert got.shape == expected.shape
        assert relative(got, expected) <= tolerance, "outputs"
    assert set(found.gradients) == set(true.gradients) == set(found.weighted)
    # Where an example's positions, or the examples of a sum, cancel, rounding is relative to what has cancelled.
    floor = 1e-2 * float(true.norms.max())
    floor_of_sums = 1e-2 * float((weights_of(len(true.norms)) * true.norms).sum())
    for name, expected in true.gradients.items():
        got = found.gradients[name]
        assert got.shape == expected.shape, (name, got.shape, expected.shape)
        for n in range(len(expected)):
            assert relative(got[n], expected[n], floor) <= tolerance, (name, n, got[n], expected[n])
        assert found.weighted[name].shape == expected.shape[1:]
        assert relative(found.weighted[name], true.weighted[name], floor_of_sums) <= tolerance, name
    assert found.norms.shape == true.norms.shape
    error = (found.norms.double() - true.norms) / true.norms.clamp_min(max(5 * floor, 1e-30))
    assert float(error.max()) <= ABOVE[dtype], error
    assert float(error.min()) >= -BELOW[dtype], error


def relative(got: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """L2 distance over the expected norm."""
    distance = float((got.double() - expected.double()).norm())
    scale = max(float(expected.double().norm()), floor)
    return distance / scale if scale > 0 and math.isfinite(distance) else distance


def check(
    module: nn.Module,
    *inputs: Any,
    dtype: torch.dtype = torch.float64,
    named: Mapping[str, Any] | None = None,
    fewer_too: bool = True,
) -> Answers:
    """The tape is exact for this model: for the batch, and then, with what it has learned of it, for its first rows.

    Returns:
        The truth for the whole batch.
    """
    module, (inputs, named) = prepared(module, (inputs, dict(named or {})), dtype)
    engine = TapeEngine(module)
    true = truth(module, inputs, named)
    assert_same(measured(module, inputs, named, engine=engine), true, dtype)
    n_examples = len(true.norms)
    if fewer_too and n_examples > 1:
        inputs, named = tree_map(lambda t: t[: n_examples - 1] if _is_rows(t) else t, (inputs, named))
        assert_same(measured(module, inputs, named, engine=engine), truth(module, inputs, named), dtype)
    return true


def exact_or_refused(module: nn.Module, *inputs: Any, **options: Any) -> str:
    """The tape is exact for this model, or says that it cannot run it.

    Returns:
        The refusal; empty if there was none.
    """
    try:
        check(module, *inputs, **options)
    except TapeRefusal as refusal:
        return str(refusal)
    return ""


def refusal_of(module: nn.Module, *inputs: Any) -> str:
    """What the tape says of a model that it must refuse."""
    try:
        measured(module, inputs)
    except TapeRefusal as refusal:
        return str(refusal)
    raise AssertionError("not refused")


def _is_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
