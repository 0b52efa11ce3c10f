"""Private training with Hugging Face accelerate: devices, mixed precision, `save_state`; no wrapping for data parallel.

accelerator = Accelerator(mixed_precision="bf16")
model, optimizer, loader, run = prepare_private(accelerator, model, optimizer, loader, plan)
for x, y in loader:
    optimizer.zero_grad()
    accelerator.backward(F.cross_entropy(model(x), y))
    optimizer.step()
print(run.optimizer.report(delta=1e-5))

`accelerator.prepare` would wrap the model in DistributedDataParallel, exchange the loader's sampler, and put autocast
around a method that the private model does not have. The order that works: the plain model is given its device and
its autocast; the three become private; the private optimizer is given its gradient scaler and its place in
`save_state`. Between processes, the private run does what DistributedDataParallel would do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from dpdl.errors import ParameterError, WrapError
from dpdl.execution import Execution
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.loader import PrivateLoader
from dpdl.model import PrivateModel
from dpdl.plan import PrivacyPlan
from dpdl.private import Private, make_private

__all__ = ["Accelerated", "DeviceBatches", "prepare_private"]

# accelerate's names of what it may be started with: processes that each hold the whole model
WHOLE_MODELS = ("NO", "MULTI_CPU", "MULTI_GPU")


class DeviceBatches:
    """The private loader, with batches on a device.

    Args:
        loader: what `make_private` returned.
        device: where the model is.
    """

    def __init__(self, loader: PrivateLoader, device: torch.device) -> None:
        self._loader = loader
        self._device = device

    @property
    def dataset(self) -> Any:
        """The dataset that batches are drawn from."""
        return self._loader.dataset

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            yield tree_map(lambda leaf: leaf.to(self._device) if isinstance(leaf, Tensor) else leaf, batch)


class Accelerated(NamedTuple):
    """What `prepare_private` returns.

    Attributes:
        model: the private model.
        optimizer: accelerate's wrapper of the private optimizer.
        loader: the private loader, with batches on the accelerator's device.
        run: what `make_private` returned; `run.optimizer` has epsilon, report and ledger.
    """

    model: PrivateModel
    optimizer: Any
    loader: DeviceBatches
    run: Private


def prepare_private(
    accelerator: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Any],
    plan: PrivacyPlan,
    *,
    execution: Execution | None = None,
    ledger: Ledger | LedgerFile | None = None,
) -> Accelerated:
    """`make_private` and `accelerator.prepare`, in the order in which they work together.

    None of the three may have been prepared before. A learning-rate scheduler is made from `run.optimizer` and may be
    prepared as usual. `accelerator.save_state` and `load_state` keep weights, optimizer, plan, ledger and position.

    Args:
        accelerator: an `accelerate.Accelerator`.
        model, optimizer, loader, plan, execution, ledger: as for `make_private`.

    Guarantee:
        That of `make_private`.

    Raises:
        ParameterError: the accelerator is set to what a private run cannot do.
        WrapError: an object was prepared before.
        PrivacyError: as `make_private`.
    """
    _refuse_settings(accelerator)
    for name, value in (("model", model), ("optimizer", optimizer), ("loader", loader)):
        if getattr(value, "_is_accelerate_prepared", False) or type(value).__module__.startswith("accelerate."):
            raise WrapError(f"The {name} was prepared by accelerate already. Pass prepare_private the plain one.")
    model = accelerator.prepare_model(model, evaluation_mode=True)  # device and autocast, no wrapping
    run = make_private(model, optimizer, loader, plan, execution=execution, ledger=ledger)
    return Accelerated(
        model=run.model,
        optimizer=accelerator.prepare_optimizer(run.optimizer, device_placement=False),
        loader=DeviceBatches(run.loader, accelerator.device),
        run=run,
    )


def _refuse_settings(accelerator: Any) -> None:
    kind = accelerator.distributed_type.name
    compiled = accelerator.state.dynamo_plugin.backend.name
    refusals = (
        (
            accelerator.gradient_accumulation_steps != 1,
            f"gradient_accumulation_steps={accelerator.gradient_accumulation_steps}",
            "Make the plan's batch as large as it should be, and set Execution(max_physical_batch_size=...).",
        ),
        (
            kind not in WHOLE_MODELS,
            f"distributed_type {kind}",
            "Use one process, or several that each hold the whole model (MULTI_GPU, MULTI_CPU).",
        ),
        (compiled != "NO", f"dynamo_backend {compiled}", "Compile a copy for prediction."),
        (
            accelerator.mixed_precision == "fp8",
            "mixed_precision='fp8'",
            "Its scales are state from private data. Use 'bf16'.",
        ),
    )
    for refused, what, remedy in refusals:
        if refused:
            raise ParameterError(f"accelerate cannot train privately with {what}. {remedy}")
