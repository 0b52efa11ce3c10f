"""`make_private`: model, optimizer and loader become one private run."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from accountants import NeighboringRelation
from dpdl.account import FollowedAccount
from dpdl.clipping import flat_weights
from dpdl.errors import LoaderError, ModelError, WrapError
from dpdl.execution import Execution
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.loader import PrivateLoader
from dpdl.model import PrivateModel
from dpdl.optim import PrivateOptimizer
from dpdl.per_sample.isolation import find_batch_norms, refuse_mixing
from dpdl.per_sample.runner import PerSampleRunner
from dpdl.placement import Placement
from dpdl.plan import BATCH_SIZE_TOLERANCE, PrivacyPlan
from dpdl.ranks import Ranks, described
from dpdl.run_state import RunState, new_run_id
from dpdl.secure_random import RandomStream
from dpdl.sharding import Shards
from dpdl.sharding_checks import placement_of
from dpdl.turns import Turns
from dpdl.uniform_loader import uniform_loader_sizes
from dpdl.watchdog import Watchdog

__all__ = ["Private", "make_private", "private_parameters"]

_private_objects: weakref.WeakSet[Any] = weakref.WeakSet()
# By id, every parameter that some private run trains: a second run would not know what the first has spent. Whatever
# wraps parameters itself (`dpdl.split`) looks here, and adds its own.
private_parameters: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


class Private(NamedTuple):
    """What `make_private` returns: use these three, and no longer what they were made from.

    Attributes:
        model: takes and gives what yours does, and computes per-sample gradients.
        optimizer: its `step` clips, adds noise, and records what was spent.
        loader: its batches are Poisson samples.
    """

    model: PrivateModel
    optimizer: PrivateOptimizer
    loader: PrivateLoader


def make_private(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Any],
    plan: PrivacyPlan,
    *,
    execution: Execution | None = None,
    ledger: Ledger | LedgerFile | None = None,
    run_name: str | None = None,
    watchdog: Watchdog | None = None,
) -> Private:
    """Couple a model, its optimizer and a loader into a run that carries out `plan`, and nothing else.

    The training loop stays as it was: iterate the loader, zero_grad, forward, loss, backward, step.

    Args:
        model: a module that keeps examples apart. It is wrapped, not copied.
        optimizer: built from the model's parameters; those it does not hold are not trained.
        loader: an ordinary `DataLoader` over the private data; its sampler is replaced by Poisson sampling.
        plan: the guarantee.
        execution: speed and memory.
        ledger: where the dataset's releases add up, if this run is not the only one or there is a budget. Each step
            is recorded there before it is taken, and refused if it would overspend.
        run_name: what to call this run in it.
        watchdog: told after each step; it reports, saves and stops.

    Returns:
        (model, optimizer, loader).

    Guarantee:
        The weights after any number of `optimizer.step()` satisfy `optimizer.epsilon(delta)` at `delta` for
        the plan's relation, under the assumptions that the report names.

    Raises:
        ModelError: batch normalisation in training mode, or nothing to train.
        LoaderError: the loader does not treat examples alike, or is not the plan's.
        WrapError: an object is private already, or of a kind that cannot be.
        LedgerError: the ledger is of another neighbouring relation.

    References:
        Abadi et al., Deep Learning with Differential Privacy, 2016. arXiv:1607.00133, Algorithm 1.
    """
    execution = execution or Execution()
    _refuse_wrong_types(model, optimizer, loader, plan)
    _refuse_wrong_extras(ledger, watchdog)
    _refuse_used_objects(model, optimizer)
    _refuse_models_that_cannot(model)
    _refuse_several_devices(model)
    _refuse_used_parameters(model)
    _refuse_optimizers_that_cannot(optimizer)
    _refuse_foreign_parameters(model, optimizer)
    refuse_mixing(find_batch_norms(model))
    steps_per_pass = _steps_per_pass(loader, plan)

    plan = replace(plan, dataset_size=len(loader.dataset))  # type: ignore[arg-type]  # known to be sized by now
    ranks = Ranks.of_this_run() if execution.data_parallel else Ranks()
    placement = placement_of(model, optimizer, ranks, data_parallel=execution.data_parallel)
    _refuse_saving_alone(placement, watchdog)
    kept_by_first = ranks.first_says("the ledger", lambda: None if ledger is None else ledger.id)
    ranks.agree(
        "make_private",
        {} if ranks.size == 1 else _what_ranks_share(model, optimizer, loader, plan, execution, watchdog),
        refused=_another_file(ledger, kept_by_first),
    )
    ranks.same_start(model)
    seed = execution.insecure_seed
    randomness = RandomStream(ranks.shared_key()) if seed is None else RandomStream.from_insecure_seed(seed)
    account = FollowedAccount(ledger) if isinstance(ledger, LedgerFile) and not ranks.is_first else ledger
    run_id = ranks.first_says("the run's name", lambda: new_run_id(run_name))
    own = Ledger(relation=NeighboringRelation(plan.relation), within=account, run=run_id)
    run = RunState(plan, randomness=randomness, ledger=own)
    turns = Turns(clip=partial(flat_weights, max_grad_norm=plan.max_grad_norm), sensitivity=plan.max_grad_norm)
    runner = PerSampleRunner(model, execution)

    def begin_batch(batch: Any, size: int) -> Any:
        placement.begin_batch()
        return runner.begin_batch(batch, size)

    private_loader = PrivateLoader(
        loader,
        plan=plan,
        steps_per_pass=steps_per_pass,
        max_physical_batch_size=execution.max_physical_batch_size,
        turns=turns,
        run=run,
        share=ranks.share,
        begin_batch=begin_batch,
    )
    private_optimizer = PrivateOptimizer(
        optimizer,
        model=model,
        plan=plan,
        turns=turns,
        run=run,
        ranks=ranks,
        accumulate_dtype=execution.accumulate_dtype,
        notes=lambda: runner.notes,
        on_load=private_loader.resume_pass,
        placement=placement,
    )
    private_model = PrivateModel(
        model, runner=runner, turns=turns, trainable=private_optimizer.trainable, placement=placement
    )
    _private_objects.add(model)
    _private_objects.add(optimizer)
    private_parameters.update({id(p): p for p in private_optimizer.trainable().values()})
    private = Private(private_model, private_optimizer, private_loader)
    if watchdog is not None:
        watchdog.attach(private_model, private_optimizer)
    return private


def _what_ranks_share(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Any],
    plan: PrivacyPlan,
    execution: Execution,
    watchdog: Watchdog | None,
) -> dict[str, Any]:
    """What must be the same for all ranks of a data-parallel run."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {
        "plan": plan.to_json(),
        "execution": str(replace(execution, max_physical_batch_size=None, chunk_size=None, engine="auto")),
        "model": [
            (name, str(p.dtype), list(p.shape), id(p) in held, str(getattr(p, "placements", "whole")))
            for name, p in model.named_parameters()
        ],
        "optimizer": type(optimizer).__name__,
        "data": described(loader.dataset),
        "watchdog": watchdog is not None,
    }


def _another_file(ledger: Ledger | LedgerFile | None, first: str | None) -> WrapError | None:
    """Why a rank's ledger cannot be followed, if it is not the file that rank 0 writes."""
    if not isinstance(ledger, LedgerFile) or ledger.id == first:
        return None
    return WrapError(
        f"{ledger.path} is not the ledger file of rank 0. Rank 0 writes the dataset's ledger for all ranks: give the "
        "others the same file, or none."
    )


def _refuse_wrong_types(model: object, optimizer: object, loader: object, plan: object) -> None:
    for name, value, kind in (
        ("model", model, nn.Module),
        ("optimizer", optimizer, torch.optim.Optimizer),
        ("plan", plan, PrivacyPlan),
    ):
        if not isinstance(value, kind):
            raise WrapError(
                f"{name} must be a {kind.__name__}, got {type(value).__name__}. "
                "The order is make_private(model, optimizer, loader, plan)."
            )
    if isinstance(loader, PrivateLoader):
        raise WrapError("The loader is private already. Pass the DataLoader that it was made from.")


def _refuse_wrong_extras(ledger: object, watchdog: object) -> None:
    if ledger is not None and not isinstance(ledger, (Ledger, LedgerFile)):
        raise WrapError(f"ledger must be a Ledger or a LedgerFile, got {type(ledger).__name__}. Give LedgerFile(path).")
    if isinstance(ledger, Ledger) and ledger.within is not None:
        raise WrapError(
            f"ledger lies within another one ({ledger.within.name}), as a run's own ledger does: a checkpoint would "
            "not know of that. Give make_private the outer one; to hold one run to less, give Watchdog(budget=...)."
        )
    if watchdog is not None and not isinstance(watchdog, Watchdog):
        raise WrapError(f"watchdog must be a Watchdog, got {type(watchdog).__name__}.")


def _refuse_saving_alone(placement: Placement, watchdog: Watchdog | None) -> None:
    if watchdog is not None and watchdog.save_to is not None and isinstance(placement, Shards):
        raise WrapError(
            "Watchdog(save_to=...) saves on rank 0 alone, which has no more than its slices of a sharded model. Leave "
            "save_to out, and call dpdl.save_checkpoint on all ranks together."
        )


def _refuse_used_objects(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for name, value, kind in (("model", model, PrivateModel), ("optimizer", optimizer, PrivateOptimizer)):
        if isinstance(value, kind) or value in _private_objects:
            raise WrapError(
                f"The {name} is part of a private run already; a second one would not know what the first has "
                "spent. Go on with what make_private returned, or start anew with copy.deepcopy of the plain "
                "model and a new optimizer."
            )


def _refuse_used_parameters(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if private_parameters.get(id(p)) is p:
            raise WrapError(
                f"Parameter '{name}' is trained by a private run already; a second one would not know what the first "
                "has spent. Go on with what make_private returned, or start anew with copy.deepcopy."
            )


def _refuse_models_that_cannot(model: nn.Module) -> None:
    whole = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.jit.ScriptModule)
    for path, child in model.named_modules():
        where = f"module '{path}'" if path else "the model"
        if isinstance(child, whole):
            raise ModelError(
                f"{where} is a {type(child).__name__}, inside of which gradients cannot be taken example by example. "
                "Pass the plain module that it was made from."
            )
        for name, p in child.named_parameters(recurse=False):
            if isinstance(p, nn.parameter.UninitializedParameter):
                raise ModelError(
                    f"Parameter '{name}' of {where} ({type(child).__name__}) has no shape yet. Run the model once on a "
                    "batch that is not private, then build the optimizer."
                )
            if p.is_meta:
                raise ModelError(
                    f"Parameter '{name}' of {where} is on the meta device: it has a shape and no values. Load the "
                    "weights before the optimizer is built."
                )
            if p.is_complex() or p.is_sparse:
                raise ModelError(
                    f"Parameter '{name}' of {where} is {'complex' if p.is_complex() else 'sparse'}; clipping and noise "
                    "are of dense real tensors. Use real parameters (view_as_real)."
                )
        if isinstance(child, (nn.Embedding, nn.EmbeddingBag)) and child.sparse:
            raise ModelError(
                f"{where} ({type(child).__name__}) gives sparse gradients, and noise is dense. Set sparse=False."
            )


def _refuse_several_devices(model: nn.Module) -> None:
    devices: dict[torch.device, str] = {}
    for name, p in model.named_parameters():
        devices.setdefault(p.device, name)
    if len(devices) > 1:
        listed = ", ".join(f"'{name}' on {device}" for device, name in devices.items())
        raise ModelError(
            f"The model's parameters are on several devices ({listed}); the private step runs on one. Move the model "
            "to one device before you build the optimizer."
        )


def _refuse_optimizers_that_cannot(optimizer: torch.optim.Optimizer) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise WrapError(
            "LBFGS evaluates the loss several times a step, each of which would have to be released with noise. "
            "Use a first-order optimizer such as SGD or Adam."
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise WrapError("SparseAdam needs sparse gradients, and noise is dense. Use Adam.")


def _refuse_foreign_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    names = {id(p): n for n, p in model.named_parameters()}
    for index, group in enumerate(optimizer.param_groups):
        for position, p in enumerate(group["params"]):
            if id(p) not in names:
                raise WrapError(
                    f"Parameter {position} of the optimizer's group {index} (shape {tuple(p.shape)}) is not a "
                    "parameter of the model, so its gradients could not be protected. Build the optimizer from "
                    "model.parameters(), and other parameters' optimizer apart."
                )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(p.requires_grad and id(p) in held for p in model.parameters()):
        raise ModelError(
            "The optimizer holds no parameter that requires a gradient: nothing would be trained. Unfreeze "
            "parameters with requires_grad_(True) before make_private."
        )


def _steps_per_pass(loader: DataLoader[Any], plan: PrivacyPlan) -> int:
    size, batch_size, batches = uniform_loader_sizes(loader)
    if plan.dataset_size is not None and plan.dataset_size != size:
        raise LoaderError(
            f"The plan was made for {plan.dataset_size} examples, but the loader's dataset has {size}. Make the "
            "plan from this loader, e.g. with PrivacyPlan.for_loader."
        )
    expected = plan.sample_rate * size
    if abs(expected - plan.expected_batch_size) > BATCH_SIZE_TOLERANCE * expected:
        raise LoaderError(
            f"The plan divides by expected_batch_size {plan.expected_batch_size:g}, but its sample rate "
            f"{plan.sample_rate:g} draws {expected:g} of the loader's {size} examples a step. Make the plan from "
            "this loader, e.g. with PrivacyPlan.for_loader."
        )
    return batches if batch_size == plan.expected_batch_size else math.ceil(size / plan.expected_batch_size)
