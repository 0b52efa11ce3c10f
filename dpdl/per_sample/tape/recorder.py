"""The function mode that is active during a private forward: sees every torch call, and records those with parameters.

    a call with a parameter, or with something derived from parameters alone
      ├─ no data in it ──────────▶ runs as it is, its graph kept: its result is a source too
      ├─ a rule knows it ────────▶ runs with constants; its output is tapped
      └─ neither ────────────────▶ runs under vmap with a copy of the parameter for each example

No weight gradient is ever computed by autograd for the first two ways' data, so `p.grad` stays empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from dpdl.errors import ModelError
from dpdl.per_sample.engine import accumulation_dtype
from dpdl.per_sample.tape.attribution import Rehearsal, may_move_rows
from dpdl.per_sample.tape.batch_axis import BatchAxis
from dpdl.per_sample.tape.call import Call, CallNames, FirstUses, by_position, involved_sources, tensors_in
from dpdl.per_sample.tape.composite import body_of
from dpdl.per_sample.tape.contribution import Contribution
from dpdl.per_sample.tape.copies import ExampleCopies, copies_of, run_for_each_example, spread
from dpdl.per_sample.tape.packing import Packings, is_packed
from dpdl.per_sample.tape.plan import CallPlan, Plan
from dpdl.per_sample.tape.recomputation import keeping_saved_tensors
from dpdl.per_sample.tape.refusal import PlanIsStale, TapeRefusal
from dpdl.per_sample.tape.rules import RULES
from dpdl.per_sample.tape.rules.recurrent import packed_layers
from dpdl.per_sample.tape.rules.rule import Contributions, RuleCall
from dpdl.per_sample.tape.source import Source
from dpdl.per_sample.tape.sources import Sources
from dpdl.per_sample.tape.tap import tap

__all__ = ["Recorder"]

PARTS = 8  # of a batch, where a copy of it is to be avoided
_HOOKS = {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}


class Recorder(TorchFunctionMode):
    """Records one forward pass.

    Args:
        examples: N.
        trainable: the parameters to track, by name.
        plan: where calls carry the examples.
        accumulate_dtype: the least precise dtype of norms and sums.
    """

    def __init__(
        self, *, examples: int, trainable: Mapping[str, Tensor], plan: Plan, accumulate_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.examples = examples
        self.sources = Sources(trainable)
        self.anchor = torch.zeros((), requires_grad=True)
        self.copies: list[ExampleCopies] = []
        self.received: dict[Source, list[Contribution]] = {}
        self.norms_on_the_way = True
        self._uses: dict[str, int] = dict.fromkeys(trainable, 0)
        self.recording = True
        self.going_back = False
        self._packings = Packings()
        self.plan = plan
        self.way = 0  # which functions were called, in order
        self.moves_rows = False  # whether one of them may have rearranged examples by the data
        self.rehearsal: Rehearsal | None = None
        self._names = CallNames()
        self.accumulate_dtype = accumulate_dtype

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.way = hash((self.way, function))
        involved = involved_sources(args, kwargs, self.sources)
        of_data = not (args and id(args[0]) in self.sources)
        if self.examples > 1 and of_data and may_move_rows(function, args, kwargs, self.examples):
            self.moves_rows = True
        if not involved and function is not torch.autograd.backward:
            result = function(*args, **kwargs)
            self._packings.see(function, args, kwargs, result)
            return result
        if function in _HOOKS:
            raise TapeRefusal(
                f"a hook is put on what is made of {', '.join(involved[0].parameters)}; it may change each example's "
                "gradient in a way that is not linear"
            )
        args, kwargs = by_position(function, args, kwargs)
        rule = RULES.get(function)
        if rule is None and (body := body_of(function)) is not None:
            with self:
                return body(*args, **kwargs)
        call = Call(function, args, kwargs, involved, self._names.name(function, involved))
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        tensors = tensors_in(args, kwargs)
        if is_packed(function, args):
            return self._run_packed(call, tensors)
        plan = self.plan.calls.get(call.name)
        if plan is not None and plan.trouble:
            return self._run_out_of_use(call, plan.trouble)
        if plan is None or not plan.fits(tensors, self.examples):
            return self._run_unplanned(call, tensors)
        if not plan.takes_examples:
            with keeping_saved_tensors() if self.plan.recomputes else nullcontext():
                result = function(*args, **kwargs)
            outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            if not any(plan.outputs):
                self.sources.derive(call, outputs)
                return result
            return self._take(spread(call, plan, result, self.examples))
        if rule is not None:
            output = rule(_RecordedCall(self, call, plan, tensors), *args, **kwargs)
            if output is not NotImplemented:
                return output
        return self._take(run_for_each_example(call, plan, self.sources, self.examples))

    def _run_unplanned(self, call: Call, tensors: list[Tensor]) -> Any:
        """A call that no survey has seen may only ask for something that is not a tensor with a gradient."""
        if all(id(t) in self.sources for t in tensors):
            result = call.function(*call.args, **call.kwargs)
            if not any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(result)):
                return result
        raise PlanIsStale(str(call))

    def _run_packed(self, call: Call, tensors: list[Tensor]) -> Any:
        """A recurrent layer on packed sequences: examples are told apart by the packing, not by an axis."""
        try:
            order = self._packings.order(call.args[1])
        except KeyError as unknown:
            raise TapeRefusal(f"{call}: its sequences were packed outside of the model's forward") from unknown
        nowhere = CallPlan(operands=tuple((t.ndim, None) for t in tensors), outputs=())
        return packed_layers(_RecordedCall(self, call, nowhere, tensors), order, *call.args, **call.kwargs)

    def _run_out_of_use(self, call: Call, trouble: str) -> Any:
        """A call that mixes examples is harmless if nothing that is trained on comes of it (a matrix of similarities
        within the batch that the loss does not use): its parameters are constants, and a gradient is refused."""

        def refuse(_: tuple[Tensor, ...], __: Tensor) -> None:
            raise TapeRefusal(f"{call}: {trouble}")

        args, kwargs = self.sources.as_constants(call.args, call.kwargs)
        result = call.function(*args, **kwargs)
        leaves, spec = tree_flatten(result)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                leaves[i] = tap(leaf.clone(), self.anchor, (), refuse)
        return tree_unflatten(leaves, spec)

    def _take(self, ran: tuple[Any, list[ExampleCopies]]) -> Any:
        result, copies = ran
        self.take_copies(copies)
        return result

    def take_copies(self, copies: list[ExampleCopies]) -> None:
        """Copies of sources whose gradients are to be received."""
        self.copies += copies
        for one in copies:
            self.will_use(one.source)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, parts of the forward may run once more."""
        if not (self.plan.recomputes or self.plan.hidden):
            yield
            return
        # The parts come in another order. Uses of one weight by one operation have the same form.
        self._names = FirstUses()
        with self:
            yield

    def will_use(self, source: Source) -> None:
        """Count one use of the parameters behind a source."""
        for name in source.parameters:
            self._uses[name] += 1

    def receive(self, source: Source, contribution: Contribution) -> None:
        """Take in what a use brought. Where it is the only one, its norms are taken now: that may free memory.

        Raises:
            TapeRefusal: the source was written to after that use; its graph is now that of other values.
        """
        if self.recording:
            raise TapeRefusal("the model differentiates inside of its forward")
        if not self.going_back:
            raise ModelError(
                "A tensor from inside the private model was used in the loss: a backward came by a way that is not the "
                "model's output. Return from forward what the loss needs."
            )
        if not source.is_untouched:
            raise TapeRefusal(
                f"what is made of {', '.join(source.parameters)} is written to in place after it was used"
            )
        if self.rehearsal is not None:
            if not self.rehearsal.is_over:
                self.rehearsal.take(contribution.norms_squared(), source.parameters)
                return
            # Of copies, a few examples at a time: what is received must keep its operands, and memory its bounds.
            some = torch.arange(self.examples, device=source.tensor.device).split(-(-self.examples // PARTS))
            squares = torch.cat([contribution.rows(index).norms_squared() for index in some])
            self.rehearsal.take(squares, source.parameters)
        self.received.setdefault(source, []).append(contribution)
        if self.norms_on_the_way and source.moved and self._uses[source.parameters[0]] == 1:
            contribution.norms_squared()

    def at_least(self, tensor: Tensor) -> Tensor:
        """A tensor in the dtype in which sums are taken."""
        dtype = accumulation_dtype(tensor.dtype, self.accumulate_dtype)
        return tensor if tensor.dtype == dtype else tensor.to(dtype)


class _RecordedCall(RuleCall):
    __slots__ = ("_call", "_plan", "_recorder", "_tensors", "examples", "function")

    def __init__(self, recorder: Recorder, call: Call, plan: CallPlan, tensors: list[Tensor]) -> None:
        self.examples = recorder.examples
        self.function = call.function
        self._recorder = recorder
        self._call = call
        self._plan = plan
        self._tensors = tensors

    def source(self, tensor: Any) -> Source | None:
        return self._recorder.sources.get(id(tensor))

    def constant(self, tensor: Any) -> Any:
        source = self._recorder.sources.get(id(tensor))
        return tensor if source is None else source.constant

    def axis(self, tensor: Any) -> BatchAxis | None:
        for candidate, (_, axis) in zip(self._tensors, self._plan.operands, strict=True):
            if candidate is tensor:
                return axis
        return None

    @property
    def output_axis(self) -> BatchAxis | None:
        return self._plan.outputs[0] if self._plan.outputs else None

    def front(self, tensor: Tensor, axis: BatchAxis) -> Tensor:
        return axis.to_front(self._recorder.at_least(tensor), self.examples)

    def widened(self, tensor: Tensor) -> Tensor:
        return self._recorder.at_least(tensor)

    @property
    def anchor(self) -> Tensor:
        return self._recorder.anchor

    def uses(self, *sources: Source | None) -> None:
        for source in sources:
            if source is not None:
                self._recorder.will_use(source)

    def receive(self, source: Source, contribution: Contribution) -> None:
        with torch.no_grad():
            self._recorder.receive(source, contribution)

    def copy(self, source: Source) -> Tensor:
        copies = copies_of(source, self.examples)
        self._recorder.take_copies([copies])
        return copies.leaf

    def tap(
        self, output: Tensor, kept: tuple[Tensor, ...], contributions: Contributions, *uses: Source | None
    ) -> Tensor:
        recorder = self._recorder
        self.uses(*uses)
        if output._is_view() and not any(output is tensor for tensor in self._tensors):
            # A view of what nobody else holds (a linear layer's, say). Autograd would copy it in each backward to
            # keep its base in step; to it this is not a view.
            output = torch.ops.aten._unsafe_view(output, output.shape)

        def arrived(saved: tuple[Tensor, ...], gradient: Tensor) -> None:
            for source, contribution in contributions(saved, gradient):
                recorder.receive(source, contribution)

        return tap(output, recorder.anchor, kept, arrived)
