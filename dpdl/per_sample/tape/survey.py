"""Measures where each call carries the examples: the model runs for two, for three, and for those three rearranged.

The axis that carries examples is the one that grows by half when two examples become three. Which rows are whose is
seen from the examples' values, which must change places in every call as they do in the batch (`rearrangement.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.isolation import with_one_exchanged
from dpdl.per_sample.module_state import BorrowedState
from dpdl.per_sample.randomness import RandomState
from dpdl.per_sample.tape.call import Call, CallNames, by_position, involved_sources, tensors_in
from dpdl.per_sample.tape.composite import body_of
from dpdl.per_sample.tape.packing import Packings, is_packed
from dpdl.per_sample.tape.plan import Plan
from dpdl.per_sample.tape.rearrangement import FEW, MORE, Origin, SeenCall, outputs_follow, plan_of
from dpdl.per_sample.tape.recomputation import saved_tensors_are_hooked
from dpdl.per_sample.tape.rules import RULES
from dpdl.per_sample.tape.sources import Sources

__all__ = ["survey"]

# Calls that put rows where the data says: along an axis, and one after another over all of a tensor.
SORTING = {"sort", "argsort", "topk", "msort"}
SCATTERING = {"masked_scatter", "masked_scatter_"}
TELL_APART = 0.05
# The three examples in the last run: in other places, or one of them exchanged.
REARRANGED = (2, 0, 1)
EXCHANGED = (0, None, 2)


def survey(module: nn.Module, batch: ExampleBatch, trainable: Mapping[str, Tensor], known: Plan) -> Plan:
    """Where each call of the model's forward that involves parameters carries the examples.

    Args:
        module: the model, in the mode in which it runs. Its buffers and torch's random state are left as they were.
        batch: at least one example.
        trainable: the parameters that are tracked.
        known: what earlier surveys have found; it decides where this one would have to guess.

    Returns:
        `known`, and what was found besides.
    """
    more = _three_examples(batch)
    random_state = RandomState(batch.device)

    def run(examples: ExampleBatch, who: Sequence[int], earlier: Mapping[Hashable, SeenCall]) -> _Survey:
        return _run(module, examples, trainable, known, random_state, who=who, earlier=earlier)

    first = run(more.rows(slice(0, FEW)), range(FEW), {})
    second = run(more, range(MORE), first.seen)
    if second.drew_random_numbers:
        # They are drawn for places in the batch, and do not move with the examples. All stay where they are but one.
        origin: Origin = EXCHANGED
        third = run(with_one_exchanged(more, EXCHANGED.index(None)), range(MORE), first.seen)
    else:
        origin = REARRANGED
        rearranged = more.rows(torch.tensor(REARRANGED, device=batch.device))
        third = run(rearranged, REARRANGED, first.seen)

    comparable = second.seen.keys() == third.seen.keys()  # nothing was skipped by chance
    calls = dict(known.calls)
    for name in first.seen.keys() & second.seen.keys():
        plan = plan_of(first.seen[name], second.seen[name], third.seen[name] if comparable else None, origin)
        if plan is not None:
            calls[name] = plan
    return Plan(
        calls=calls,
        recomputes=known.recomputes or second.recomputes,
        hidden=known.hidden or second.hidden,
        trouble=known.trouble or _movement_of_examples(first, second, third if comparable else None, origin),
    )


def _three_examples(batch: ExampleBatch) -> ExampleBatch:
    """The first three; where there are fewer, or two are alike, with others made up of them."""
    rows = batch.rows(torch.arange(MORE, device=batch.device) % batch.size)
    for position in range(1, MORE):
        if any(_same(rows, position, earlier) for earlier in range(position)):
            rows = with_one_exchanged(rows, position)
    return rows


def _same(rows: ExampleBatch, first: int, second: int) -> bool:
    return all(torch.equal(leaf[first], leaf[second]) for leaf in rows.row_leaves)


def _movement_of_examples(few: _Survey, more: _Survey, changed: _Survey | None, origin: Origin) -> str:
    """What moves rows along the axis of the examples: which example a row belongs to is then unknown."""
    for (name, a), (_, b) in zip(few.movements, more.movements, strict=False):
        if a != b:
            return f"the model uses {name} along the axis of the examples, so that rows change places with the data"
    if changed is not None and not outputs_follow(few.outputs, more.outputs, changed.outputs, origin):
        return "the model's outputs do not change places as its examples do"
    return ""


def _run(
    module: nn.Module,
    examples: ExampleBatch,
    trainable: Mapping[str, Tensor],
    known: Plan,
    random_state: RandomState,
    *,
    who: Sequence[int],
    earlier: Mapping[Hashable, SeenCall],
) -> _Survey:
    mode = _Survey(module, trainable, known, who=who, earlier=earlier)
    args, kwargs = examples.copy().call_arguments()
    with torch.enable_grad(), random_state.replayed(), BorrowedState(module):
        with mode:
            result = module(*args, **kwargs)
        mode.forget_packings()
        mode.outputs = [t.detach() for t in tree_leaves(result) if isinstance(t, Tensor)]
        mode.drew_random_numbers = random_state.has_moved()
    return mode


class _Survey(TorchFunctionMode):
    """Runs the model with parameters as constants in all calls that take data, and notes every call.

    Args:
        who: which example is at each position in the batch.
        earlier: calls of a run for another number of examples.
    """

    def __init__(
        self,
        module: nn.Module,
        trainable: Mapping[str, Tensor],
        known: Plan,
        *,
        who: Sequence[int],
        earlier: Mapping[Hashable, SeenCall],
    ) -> None:
        super().__init__()
        self.seen: dict[Hashable, SeenCall] = {}
        self.recomputes = False
        self.hidden = False
        self.drew_random_numbers = False
        self.outputs: list[Tensor] = []
        self._packings = Packings()
        self._sorted_by: list[Tensor | None] = []  # the indices that these calls gave
        self.movements: list[tuple[str, int]] = []  # calls that move rows, and over how many
        self._sources = Sources(trainable)
        self._names = CallNames()
        self._known = known
        self._who = who
        self._earlier = earlier
        # Tensors that no example has reached. Held, so that identities stay good.
        self._constants: dict[int, Tensor] = {id(t): t for t in _tensors_of(module)}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = by_position(function, args, kwargs or {})
        involved = involved_sources(args, kwargs, self._sources)
        if involved and function not in RULES and (body := body_of(function)) is not None:
            with self:
                return body(*args, **kwargs)
        if not involved:
            result = function(*args, **kwargs)
            self._packings.see(function, args, kwargs, result)
            if (name := getattr(function, "__name__", "")) in SORTING:
                index = result if name == "argsort" else result[1] if isinstance(result, tuple) else None
                self.movements.append((name, args[0].shape[_sorted_axis(args, kwargs)]))
                self._sorted_by.append(index)
            elif name in SCATTERING:
                self.movements.append((name, args[0].numel()))
                self._sorted_by.append(None)
            if all(id(t) in self._constants for t in tensors_in(args, kwargs)):
                self._constants.update({id(t): t for t in tree_leaves(result) if isinstance(t, Tensor)})
            return result
        self.recomputes |= saved_tensors_are_hooked()
        self.hidden |= not torch.is_grad_enabled()
        call = Call(function, args, kwargs, involved, self._names.name(function, involved))
        if is_packed(function, args):
            args, kwargs = self._sources.as_constants(args, kwargs)
            return function(*args, **kwargs)
        takes_data = self._takes_data(call)
        if takes_data:
            args, kwargs = self._sources.as_constants(args, kwargs)
        operands = [t.detach().clone() for t in tensors_in(args, kwargs)]
        tracked = [id(t) in self._sources for t in tensors_in(call.args, call.kwargs)]
        with torch.enable_grad():  # what is derived where gradients are off may be derived again with gradients on
            result = function(*args, **kwargs)
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        copies = [t.detach().clone() for t in outputs]
        self.seen[call.name] = SeenCall(operands=operands, outputs=copies, tracked=tracked)
        if takes_data:
            return result
        if (told_apart := self._told_apart(call, outputs)) is not None:
            return told_apart
        self._sources.derive(call, outputs)
        return result

    def _told_apart(self, call: Call, outputs: list[Tensor]) -> Tensor | None:
        """What parameters alone have filled a batch with, changed a little for each example.

        Equal rows could change places unseen.
        """
        if len(outputs) != 1 or not outputs[0].requires_grad:
            return None
        output = outputs[0]
        grown = self._grown_axis(call, output)
        if grown is None or output.shape[grown] % len(self._who):
            return None
        each = output.shape[grown] // len(self._who)
        shift = torch.tensor(self._who, dtype=output.dtype, device=output.device).repeat_interleave(each)
        return output.detach() + TELL_APART * shift.view([-1 if i == grown else 1 for i in range(output.ndim)])

    def _grown_axis(self, call: Call, output: Tensor) -> int | None:
        """The axis of a call's only output that carries the examples, from an earlier survey or an earlier run."""
        plan, before = self._known.calls.get(call.name), self._earlier.get(call.name)
        if plan is not None and len(plan.outputs) == 1:
            return None if plan.outputs[0] is None else plan.outputs[0].position
        if before is None or len(before.outputs) != 1 or before.outputs[0].ndim != output.ndim:
            return None
        grown = [i for i in range(output.ndim) if before.outputs[0].shape[i] != output.shape[i]]
        return grown[0] if len(grown) == 1 else None

    def forget_packings(self) -> None:
        """Leave out the sorting of packed sequences: their order is known."""
        kept = [i for i, index in enumerate(self._sorted_by) if index is None or not self._packings.orders_by(index)]
        self.movements = [self.movements[i] for i in kept]

    def _takes_data(self, call: Call) -> bool:
        plan = self._known.calls.get(call.name)
        if plan is not None:
            return plan.takes_examples
        others = [t for t in tensors_in(call.args, call.kwargs) if id(t) not in self._sources]
        return any(id(t) not in self._constants for t in others)


def _sorted_axis(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Along which axis torch.sort, argsort or topk sorts."""
    candidates = [a for a in args[1:] if isinstance(a, int) and not isinstance(a, bool)]
    axis = kwargs.get("dim", candidates[-1] if candidates else -1)
    position: int = axis % max(1, args[0].ndim)
    return position


def _tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and tensors that modules hold as plain attributes."""
    held = [t for child in module.modules() for t in vars(child).values() if isinstance(t, Tensor)]
    return [*module.parameters(), *module.buffers(), *held]
