"""One part, forward and back: rows in, rows out; their gradients in, the inputs' gradients and the parts of a sum out.

The gradient of part h for row i is J_h(x_i)^T d_i, where d_i is the gradient of row i's own loss with respect to the
part's output: that of <z_i, d_i>, summed over rows, whatever d_i is. So a cut needs no more than d, and every engine
of `dpdl.per_sample` computes a part's per-sample gradients as it would those of a network that ends in that loss.

Engines answer for parameters, not for inputs. Where the part before needs them, inputs' gradients come from a plain
pass beside the engine's, on the same random numbers, whose output has to be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from dpdl.errors import EngineMismatchError, ModelError
from dpdl.execution import Execution
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.boundary import Passage, visit_gradients
from dpdl.per_sample.engine import FrozenCall, PerSampleGradients
from dpdl.per_sample.isolation import find_batch_norms, find_mixing, refuse_mixing
from dpdl.per_sample.randomness import RandomState
from dpdl.per_sample.runner import PerSampleRunner
from dpdl.per_sample.self_check import tolerance_of

__all__ = ["PartPass", "PartRunner"]


class PartRunner:
    """Runs one part.

    Args:
        name: the part's, for errors.
        module: keeps rows apart.
        trains: whether its parameters are differentiated by.
        execution: engine, dtypes and checks.

    Raises:
        ModelError: batch normalisation in training mode.
    """

    def __init__(self, name: str, module: nn.Module, *, trains: bool, execution: Execution) -> None:
        self.name, self.module, self.trains = name, module, trains
        self._execution = replace(execution, loss_reduction="sum")
        refuse_mixing(find_batch_norms(module))
        self._runner = PerSampleRunner(module, self._execution)
        self._looked_for_mixing = False

    @property
    def engine_name(self) -> str | None:
        """The engine in use; None before the first batch, and where nothing trains."""
        return self._runner.engine_name

    @property
    def _device(self) -> torch.device | None:
        """Where the module's parameters are; None without any."""
        return next((p.device for p in self.module.parameters()), None)

    def forward(
        self, inputs: Sequence[Tensor], trainable: Mapping[str, Tensor], *, needed: Sequence[bool], made_up: bool
    ) -> PartPass:
        """Run the part on N rows; N may be 0.

        Args:
            inputs: each [N, ...], without a graph.
            trainable: parameters by name; empty where the part does not train.
            needed: of which inputs the gradient will be asked for.
            made_up: whether the rows are nobody's; what is learned from them is not relied on later.

        Raises:
            ModelError: rows meet in the module, it keeps state, or it does not return rows.
        """
        inputs = [rows.to(self._device or rows.device) for rows in inputs]
        batch = ExampleBatch.from_call(tuple(inputs), {})
        refuse_mixing(find_batch_norms(self.module))
        chances = [RandomState(batch.device)]
        attached = None
        passages: dict[Passage, None] = {}
        if self.trains:
            runner = PerSampleRunner(self.module, self._execution) if made_up else self._runner
            # Engines run the module to get to know it, too; the last call is the one whose output counts.
            hook = self.module.register_forward_pre_hook(lambda *_: chances.append(RandomState(batch.device)))
            try:
                with torch.enable_grad():
                    attached = runner.forward(batch.copy(), trainable, passages.setdefault)
            finally:
                hook.remove()
            self._refuse_no_rows(attached, batch.size)
        plain, leaves = None, list(inputs)
        if not self.trains or (any(needed) and batch.size):
            if not self.trains and self._execution.self_check:
                self._refuse_mixing(batch, made_up=made_up)
            with chances[-1].replayed() if self.trains else nullcontext():
                plain, leaves = self._plain(batch, needed)
            self._refuse_no_rows(plain, batch.size)
        outputs = plain if attached is None else attached
        assert outputs is not None
        if attached is not None and plain is not None:
            self._refuse_another_output(attached.detach(), plain.detach())
        return PartPass(
            outputs=outputs.detach(),
            attached=attached,
            plain=plain,
            leaves=leaves,
            needed=tuple(needed),
            passages=passages,
        )

    def predict(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output in eval mode, without a graph."""
        modes = [(child, child.training) for child in self.module.modules()]
        self.module.eval()
        try:
            with torch.no_grad():
                outputs = self.module(*(rows.to(self._device or rows.device) for rows in inputs))
        finally:
            for child, training in modes:
                child.training = training
        self._refuse_no_rows(outputs, len(inputs[0]))
        assert isinstance(outputs, Tensor)
        return outputs

    def _plain(self, batch: ExampleBatch, needed: Sequence[bool]) -> tuple[Tensor, list[Tensor]]:
        """The output with a graph to the inputs, and those; parameters are constants."""
        some = batch if batch.size else batch.zero_rows(1)  # many modules cannot be run on no rows
        leaves = [
            leaf.detach().clone().requires_grad_(wanted and leaf.is_floating_point())
            for leaf, wanted in zip(some.row_leaves, needed, strict=True)
        ]
        call = FrozenCall(self.module, {})
        with torch.enable_grad():
            # Identities in between: a module may write to its inputs in place, which leaves do not allow.
            output = call.run({}, tuple(leaf.view_as(leaf) for leaf in leaves), {})
            if not batch.size and isinstance(output, Tensor):
                output = output[:0]
        call.refuse_written_state()
        return output, leaves

    def _refuse_mixing(self, batch: ExampleBatch, *, made_up: bool) -> None:
        if batch.size and (made_up or not self._looked_for_mixing):
            refuse_mixing(find_mixing(self.module, batch))
            self._looked_for_mixing |= not made_up

    def _refuse_no_rows(self, outputs: object, size: int) -> None:
        if not isinstance(outputs, Tensor) or outputs.ndim == 0 or len(outputs) != size:
            got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ModelError(
                f"Part '{self.name}' returned {got} for {size} rows. What crosses a cut is one tensor with the rows "
                "first: return that, and put what packs or unpacks it into another part."
            )

    def _refuse_another_output(self, attached: Tensor, plain: Tensor) -> None:
        finite = torch.isfinite(attached).flatten(1).all(1)
        distance = (attached[finite] - plain[finite]).double().norm()
        if float(distance) > tolerance_of(attached.dtype) * float(plain[finite].double().norm()):
            raise EngineMismatchError(
                f"Part '{self.name}' gives another output when it runs again for its inputs' gradient (distance "
                f"{float(distance):.1e}): it draws random numbers in another order than its engine "
                f"'{self.engine_name}', or keeps something from call to call. Move dropout to the first part, or "
                "choose Execution(engine='tape')."
            )


@dataclass(kw_only=True)
class PartPass:
    """One forward pass of a part, to be gone back through once.

    Attributes:
        outputs: [N, ...], without a graph.
    """

    outputs: Tensor
    attached: Tensor | None
    plain: Tensor | None
    leaves: list[Tensor]
    needed: tuple[bool, ...]
    passages: dict[Passage, None] = field(default_factory=dict)

    def back(self, cotangent: Tensor) -> list[Tensor | None]:
        """The gradient of sum_i <outputs_i, cotangent_i> with respect to each input that was asked about.

        Args:
            cotangent: shaped as outputs.

        Returns:
            For each input its gradient, shaped as it; None where it is not needed.
        """
        cotangent = cotangent.to(self.outputs.device, self.outputs.dtype)
        if self.attached is not None and self.attached.requires_grad:
            self.attached.backward(cotangent)
        asked = [leaf for leaf in self.leaves if leaf.requires_grad]
        found: dict[int, Tensor | None] = {}
        if self.plain is not None and self.plain.requires_grad and asked and len(self.outputs):
            gradients = torch.autograd.grad(self.plain, asked, cotangent, allow_unused=True)
            found = {id(leaf): gradient for leaf, gradient in zip(asked, gradients, strict=True)}
        results: list[Tensor | None] = []
        for leaf, wanted in zip(self.leaves, self.needed, strict=True):
            gradient = found.get(id(leaf))
            rows = leaf.detach()[: len(self.outputs)]
            results.append((torch.zeros_like(rows) if gradient is None else gradient) if wanted else None)
        self.attached = self.plain = None
        self.leaves = []
        return results

    def visit(self, visit: Callable[[PerSampleGradients], None]) -> None:
        """Show the part's per-sample gradients, in pieces, in the order of rows. After `back`, once."""
        visit_gradients(list(self.passages), visit)
        self.passages = {}
