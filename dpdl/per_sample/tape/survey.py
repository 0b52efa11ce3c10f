"""Measures where each call carries the examples: the model runs for two, for three, and for those three rearranged.

The axis that carries examples is the one that grows by half when two examples become three. Which rows are whose is
seen from the examples' values, which must be rearranged in every call as they are in the batch (`rearrangement.py`).
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
from dpdl.per_sample.randomness import RandomState
from dpdl.per_sample.tape.call import Call, CallNames, involved_sources, tensors_in
from dpdl.per_sample.tape.composite import body_of
from dpdl.per_sample.tape.module_state import BorrowedState
from dpdl.per_sample.tape.plan import Plan
from dpdl.per_sample.tape.rearrangement import FEW, MORE, SeenCall, plan_of
from dpdl.per_sample.tape.recomputation import saved_tensors_are_hooked
from dpdl.per_sample.tape.rules import RULES
from dpdl.per_sample.tape.sources import Sources

__all__ = ["survey"]

# Calls that put rows where the data says: along an axis, and one after another over all of a tensor.
SORTING = {"sort", "argsort", "topk", "msort"}
SCATTERING = {"masked_scatter", "masked_scatter_"}
TELL_APART = 0.05
REARRANGED = (2, 0, 1)  # the three examples in the last run


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
    few = more.rows(slice(0, FEW))
    rearranged = more.rows(torch.tensor(REARRANGED, device=batch.device))
    random_state = RandomState(batch.device)
    numbers = (range(FEW), range(MORE), REARRANGED)
    runs: list[_Survey] = []
    for examples, who in zip((few, more, rearranged), numbers, strict=True):
        earlier = runs[0].seen if runs else {}
        runs.append(_run(module, examples, trainable, known, random_state, who=who, earlier=earlier))
    calls = dict(known.calls)
    few_seen, more_seen, rearranged_seen = (run.seen for run in runs)
    for name in few_seen.keys() & more_seen.keys():
        # Random numbers are drawn for positions in the batch, and do not move with the examples.
        other = None if runs[1].drew_random_numbers else rearranged_seen.get(name)
        calls[name] = plan_of(few_seen[name], more_seen[name], other, REARRANGED)
    return Plan(
        calls=calls,
        recomputes=known.recomputes or runs[1].recomputes,
        hidden=known.hidden or runs[1].hidden,
        trouble=known.trouble or _movement_of_examples(runs[0].movements, runs[1].movements),
    )


def _three_examples(batch: ExampleBatch) -> ExampleBatch:
    """The first three; where there are fewer, with others made up of them."""
    rows = batch.rows(torch.arange(MORE, device=batch.device) % batch.size)
    for position in range(batch.size, MORE):
        rows = with_one_exchanged(rows, position)
    return rows


def _movement_of_examples(few: list[tuple[str, int]], more: list[tuple[str, int]]) -> str:
    """What moves rows along the axis of the examples by the data: which example a row belongs to is then unknown."""
    for (name, a), (_, b) in zip(few, more, strict=False):
        if a != b:
            return f"the model uses {name} along the axis of the examples, so that rows change places with the data"
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
    args, kwargs = examples.call_arguments()
    with torch.enable_grad(), random_state.replayed(), BorrowedState(module):
        with mode:
            module(*args, **kwargs)
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
        kwargs = kwargs or {}
        involved = involved_sources(args, kwargs, self._sources)
        if involved and function not in RULES and (body := body_of(function)) is not None:
            with self:
                return body(*args, **kwargs)
        if not involved:
            result = function(*args, **kwargs)
            if (name := getattr(function, "__name__", "")) in SORTING:
                self.movements.append((name, args[0].shape[_sorted_axis(args, kwargs)]))
            elif name in SCATTERING:
                self.movements.append((name, args[0].numel()))
            if all(id(t) in self._constants for t in tensors_in(args, kwargs)):
                self._constants.update({id(t): t for t in tree_leaves(result) if isinstance(t, Tensor)})
            return result
        self.recomputes |= saved_tensors_are_hooked()
        self.hidden |= not torch.is_grad_enabled()
        call = Call(function, args, kwargs, involved, self._names.name(function, involved))
        takes_data = self._takes_data(call)
        if takes_data:
            args, kwargs = self._sources.as_constants(args, kwargs)
        operands = [t.detach().clone() for t in tensors_in(args, kwargs)]
        tracked = [id(t) in self._sources for t in tensors_in(call.args, call.kwargs)]
        with torch.enable_grad():  # what is derived where gradients are off may be derived again with gradients on
            result = function(*args, **kwargs)
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if outputs or takes_data:
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
        before = self._earlier.get(call.name)
        if before is None or len(outputs) != 1 or len(before.outputs) != 1 or not outputs[0].requires_grad:
            return None
        few, more = before.outputs[0], outputs[0]
        grown = [i for i in range(more.ndim) if few.ndim == more.ndim and few.shape[i] != more.shape[i]]
        if len(grown) != 1 or more.shape[grown[0]] % len(self._who):
            return None
        each = more.shape[grown[0]] // len(self._who)
        shift = torch.tensor(self._who, dtype=more.dtype, device=more.device).repeat_interleave(each)
        return more.detach() + TELL_APART * shift.view([-1 if i == grown[0] else 1 for i in range(more.ndim)])

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
