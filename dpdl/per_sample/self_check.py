"""The first batch's check of an engine against one-at-a-time autograd, on a few examples."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dpdl.errors import EngineMismatchError, ModelError
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.engine import Engine, FrozenCall, is_differentiable
from dpdl.per_sample.loop import LoopEngine
from dpdl.per_sample.module_state import BorrowedState, OwnAttributes
from dpdl.per_sample.randomness import isolated_randomness

__all__ = ["first_finite", "refuse_mismatch", "tolerance_of"]

# Examples compared, and the factor on the dtype's resolution by which two exact engines may differ
# (a deep float32 network: 1e-4 seen, 1e-3 allowed; a wrong rule is off by its whole value).
EXAMPLES = 2
RESOLUTIONS = 1e4
LARGEST_TOLERANCE = 0.1  # for models in half precision
LOOKED_AT = 8  # examples, until enough are found that are finite: a batch may be large


def refuse_mismatch(engine: Engine, batch: ExampleBatch, trainable: Mapping[str, Tensor]) -> None:
    """Compare an engine on the first rows of `batch` with the model's plain forward and the loop's gradients.

    All back-propagate the same fixed cotangents. Modules are in eval mode during the comparison, so that
    dropout does not tell two right engines apart.

    Raises:
        EngineMismatchError: naming the outputs or parameters that differ, with the relative error.
    """
    finite = first_finite(batch, EXAMPLES)
    if not len(finite):
        return  # nothing to compare
    rows = batch.rows(finite)
    full_precision = torch.autocast(batch.device.type, enabled=False)  # rules are told apart best without rounding
    with _evaluating(engine.module), full_precision:
        if _draws_random_numbers(engine, rows, trainable):
            return  # in eval mode too: its outputs cannot be compared
        _refuse_other_outputs(engine, rows, trainable)
        _refuse_other_ways_to_parameters(engine.module, rows, trainable)
        if not isinstance(engine, LoopEngine):
            _refuse_other_gradients(engine, rows, trainable)


def first_finite(batch: ExampleBatch, count: int) -> Tensor:
    """Positions of the first `count` examples whose numbers are all finite, or of as many as there are."""
    found = torch.zeros(0, dtype=torch.long, device=batch.device)
    for start in range(0, batch.size, LOOKED_AT):
        rows = batch.rows(slice(start, start + LOOKED_AT))
        finite = torch.ones(rows.size, dtype=torch.bool, device=batch.device)
        for leaf in rows.row_leaves:
            if is_differentiable(leaf):
                finite &= torch.isfinite(leaf).flatten(1).all(1) if leaf.ndim > 1 else torch.isfinite(leaf)
        found = torch.cat([found, start + finite.nonzero().flatten()])
        if len(found) >= count:
            break
    return found[:count]


def _draws_random_numbers(engine: Engine, rows: ExampleBatch, trainable: Mapping[str, Tensor]) -> bool:
    call = FrozenCall(engine.module, trainable)
    before = torch.get_rng_state()
    with torch.enable_grad(), isolated_randomness(rows.device):  # the model may differentiate inside
        call(trainable, rows.copy())
        return not torch.equal(before, torch.get_rng_state())


def _refuse_other_outputs(engine: Engine, rows: ExampleBatch, trainable: Mapping[str, Tensor]) -> None:
    forward = engine.forward(rows.copy(), trainable)
    with torch.enable_grad():
        plain = forward.layout.leaves(FrozenCall(engine.module, trainable)(trainable, rows.copy()))
    for i, (got, expected) in enumerate(zip(forward.outputs, plain, strict=True)):
        if forward.layout.axes[i] is None or not is_differentiable(got):
            continue
        error = _relative_error(got, expected, expected.detach().double().norm())
        if error > tolerance_of(expected.dtype):
            raise EngineMismatchError(
                f"The model's output {i} for {rows.size} examples together is not that for each alone "
                f"(relative error {error:.1e}): its forward depends on how many examples there are. Remove "
                "what looks at the batch size (x.shape[0], squeeze(), reductions over the batch)."
            )


def _refuse_other_ways_to_parameters(module: nn.Module, rows: ExampleBatch, trainable: Mapping[str, Tensor]) -> None:
    """Raise if a parameter has a gradient in plain PyTorch, but not where parameters are handed in.

    A view of it that was stored before, say: engines that exchange parameters would leave it untrained.
    """
    one = rows.rows(slice(0, 1))
    # Backward reaches those of other optimizers too, and hooks: one that updates at once would take a step on this
    # one example's gradient.
    kept = [(p, p.grad) for p in module.parameters()]
    hooks = [each for p in module.parameters() for each in (p._backward_hooks, p._post_accumulate_grad_hooks) if each]
    of_users = [dict(each) for each in hooks]
    try:
        for p, _ in kept:
            p.grad = None
        for each in hooks:
            each.clear()
        args, kwargs = one.copy().call_arguments()
        with torch.enable_grad(), BorrowedState(module), isolated_randomness(rows.device):
            outputs = [t for t in tree_leaves(module(*args, **kwargs)) if is_differentiable(t) and t.requires_grad]
            if not outputs:
                return
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        found = {name: p.grad for name, p in trainable.items() if p.grad is not None}
        reached = {name for name, g in found.items() if bool((g.to_dense() if g.is_sparse else g).any())}
    finally:
        for p, gradient in kept:
            p.grad = gradient
        for each, users in zip(hooks, of_users, strict=True):
            each.update(users)
    loop = LoopEngine(module)
    forward = loop.forward(one.copy(), trainable)
    ones = {i: torch.ones_like(leaf) for i, leaf in enumerate(forward.outputs) if is_differentiable(leaf)}
    (part,) = forward.pull_back(ones)
    missing = sorted(name for name in reached if not bool(part.materialize()[name].any()))
    if missing:
        raise ModelError(
            f"The model uses the parameters {missing} by a way that was stored before the forward (a view of the "
            "parameter kept as an attribute, say), so they would not be trained. Derive it in forward."
        )


def _refuse_other_gradients(engine: Engine, rows: ExampleBatch, trainable: Mapping[str, Tensor]) -> None:
    wrong = _disagreements(engine, rows, trainable)
    if wrong and any(p.dtype != torch.float64 for p in trainable.values()):
        # Near a kink (ReLU, max pooling) rounding alone can change a gradient much. In float64 a right engine agrees.
        with suppress(RuntimeError, TypeError):  # not every model can be copied or widened
            wrong = _disagreements_in_double(engine, rows, trainable)
    if wrong:
        listed = ", ".join(f"{name} (relative error {error:.1e})" for name, error in wrong.items())
        raise EngineMismatchError(
            f"Engine '{engine.name}' disagrees with one-at-a-time autograd on {listed}. Training "
            "would not follow the model. Use Execution(engine='loop'), and please report the module."
        )


def _disagreements(engine: Engine, rows: ExampleBatch, trainable: Mapping[str, Tensor]) -> dict[str, float]:
    """Parameters on which an engine and the loop disagree, with the relative error."""
    got, norms = _gradients(engine, rows, trainable)
    expected, true_norms = _gradients(LoopEngine(engine.module, accumulate_dtype=torch.float64), rows, trainable)
    scale = torch.sqrt(sum((g.detach().double().square().sum() for g in expected.values()), start=torch.zeros(())))
    errors = {name: _relative_error(got[name], reference, scale) for name, reference in expected.items()}
    wrong = {name: error for name, error in errors.items() if error > tolerance_of(trainable[name].dtype)}
    error = _relative_error(norms, true_norms, true_norms.norm())
    if not wrong and error > max(tolerance_of(p.dtype) for p in trainable.values()):
        wrong = dict.fromkeys(["the norms of " + ", ".join(trainable)], error)
    return wrong


def _disagreements_in_double(engine: Engine, rows: ExampleBatch, trainable: Mapping[str, Tensor]) -> dict[str, float]:
    """The same for a copy of the model in float64."""
    module = copy.deepcopy(engine.module).double()
    parameters = dict(module.named_parameters())
    doubled = tuple(leaf.double() if leaf.is_floating_point() else leaf for leaf in rows.row_leaves)
    return _disagreements(
        type(engine)(module, accumulate_dtype=torch.float64),
        rows.with_row_leaves(doubled, size=rows.size),
        {name: parameters[name] for name in trainable},
    )


def _relative_error(got: Tensor, expected: Tensor, scale: Tensor) -> float:
    """L2 distance over `scale`; 0 where the expected value is not finite (such examples are left out)."""
    if not bool(torch.isfinite(expected).all()):
        return 0.0
    return float((got.double() - expected.double()).detach().norm() / scale.clamp_min(torch.finfo(torch.float32).tiny))


def tolerance_of(dtype: torch.dtype) -> float:
    """By how much, relative to their length, numbers of a dtype may differ that two right ways have led to."""
    return min(RESOLUTIONS * torch.finfo(dtype).eps, LARGEST_TOLERANCE)


def _gradients(engine: Engine, rows: ExampleBatch, trainable: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """A weighted sum over examples for each parameter, and the norms of the examples' whole gradients."""
    forward = engine.forward(rows.copy(), trainable)
    generator = torch.Generator().manual_seed(0)
    cotangents = {
        i: torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device, leaf.dtype)
        for i, leaf in enumerate(forward.outputs)
        if is_differentiable(leaf)
    }
    # Unequal weights, so that gradients attributed to the wrong example do not cancel out.
    weights = torch.arange(1, rows.size + 1, dtype=torch.float64) / rows.size
    total: dict[str, Tensor] = {}
    norms: list[Tensor] = []
    for part in forward.pull_back(cotangents):
        norms.append(part.norms().double())
        seen = sum(len(n) for n in norms)
        part_sum = part.weighted_sum(weights[seen - len(norms[-1]) : seen])
        for name, tensor in part_sum.items():
            total[name] = total[name] + tensor if name in total else tensor
    return total, torch.cat(norms)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """In eval mode, each forward beginning with the module as it was; what it keeps in between is forgotten."""
    modes = [(child, child.training) for child in module.modules()]
    own = OwnAttributes(module)
    forgetting = module.register_forward_pre_hook(lambda *_: own.restore(), prepend=True)
    module.eval()
    try:
        yield
    finally:
        forgetting.remove()
        own.restore()
        for child, training in modes:
            child.training = training
