"""Saving and resuming: what would forget spending, repeat noise, or promise less than before."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dpdl
from accountants import NeighboringRelation
from dpdl.budget import Budget
from dpdl.errors import CheckpointError
from dpdl.ledger_file import LedgerFile
from tests.misuse.case import Trial, misuse
from tests.small_run import examples, network, same, sgd, small_run, step_once, weights_of

RESUMING = "Saving and resuming"

Change = Callable[[dict[str, Any]], object]


def noisy(**settings: Any) -> dpdl.Private:
    return small_run(**{"noise_multiplier": 1.0, **settings})


def with_ledger(
    ledger: LedgerFile | dpdl.Ledger | None, *, model: nn.Module | None = None, noise_multiplier: float = 1.0
) -> dpdl.Private:
    """A secure run on the usual data, recorded in a ledger."""
    model = network() if model is None else model
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*examples()), batch_size=12)
    plan = dpdl.PrivacyPlan.for_loader(loader, steps=10, noise_multiplier=noise_multiplier, max_grad_norm=1.0)
    execution = dpdl.Execution(accumulate_dtype=torch.float64)
    return dpdl.make_private(model, sgd(model.parameters()), loader, plan, execution=execution, ledger=ledger)


@misuse(
    RESUMING,
    tried="resuming with another noise multiplier, clipping norm, rate, length or relation",
    peer="Opacus: sigma and C are not saved; continues under another sigma, silently",
    refused=CheckpointError,
)
def resuming_under_another_plan(trial: Trial) -> None:
    saved = noisy()
    step_once(saved)
    path = trial.folder / "run.pt"
    dpdl.save_checkpoint(path, saved.model, saved.optimizer)
    for change in ({"noise_multiplier": 0.5}, {"max_grad_norm": 2.0}, {"steps": 11}, {"batch_size": 6}):
        other = noisy(**change)
        with trial.refused(other, path, saying="another plan"):
            dpdl.load_checkpoint(path, other.model, other.optimizer)


@misuse(
    RESUMING,
    tried="loading a plain optimizer's state into the private one, which would forget the spending",
    refused=CheckpointError,
)
def a_plain_optimizers_state(trial: Trial) -> None:
    private = noisy()
    step_once(private)
    state = sgd(network().parameters()).state_dict()
    with trial.refused(private):
        private.optimizer.load_state_dict(state)


@misuse(
    RESUMING,
    tried="going back to an earlier state again and again, to train on the same noise or for free",
    harmless="what was spent stays spent, and the noise is another one (of a secure run)",
)
def replaying_a_state(trial: Trial) -> None:
    private = with_ledger(None)
    step_once(private)
    state = copy.deepcopy(private.optimizer.state_dict())
    start = weights_of(private.model)
    ends = []
    for taken in (2, 3, 4):
        private.model.load_state_dict(start)
        private.optimizer.load_state_dict(state)
        step_once(private)
        ends.append(weights_of(private.model))
        assert private.optimizer.ledger.releases == taken
    assert not same(ends[0], ends[1])
    assert not same(ends[1], ends[2])


@misuse(
    RESUMING,
    tried="a secure run resumed twice from one checkpoint, side by side",
    harmless="both are counted in the dataset's ledger, and draw different noise",
)
def resuming_twice(trial: Trial) -> None:
    with LedgerFile(trial.folder / "data.ledger") as ledger:
        first = with_ledger(ledger)
        step_once(first)
        path = trial.folder / "run.pt"
        dpdl.save_checkpoint(path, first.model, first.optimizer)
        second, third = with_ledger(ledger), with_ledger(ledger)
        for private in (second, third):
            dpdl.load_checkpoint(path, private.model, private.optimizer)
            step_once(private)
        assert ledger.releases == 3
        assert not same(weights_of(second.model), weights_of(third.model))


@misuse(RESUMING, tried="resuming without the ledger file that the run was kept in", refused=CheckpointError)
def resuming_without_the_ledger(trial: Trial) -> None:
    path = trial.folder / "run.pt"
    with LedgerFile(trial.folder / "data.ledger") as ledger:
        first = with_ledger(ledger)
        step_once(first)
        dpdl.save_checkpoint(path, first.model, first.optimizer)
    second = with_ledger(None)
    with trial.refused(second, path):
        dpdl.load_checkpoint(path, second.model, second.optimizer)


@misuse(RESUMING, tried="resuming under a weaker budget", refused=CheckpointError)
def resuming_under_a_weaker_budget(trial: Trial) -> None:
    strict, weak = (
        dpdl.Ledger(relation=NeighboringRelation.ADD_OR_REMOVE, budget=Budget(epsilon=epsilon, delta=1e-5))
        for epsilon in (50.0, 100.0)
    )
    first = with_ledger(strict)
    step_once(first)
    path = trial.folder / "run.pt"
    dpdl.save_checkpoint(path, first.model, first.optimizer)
    for ledger in (weak, None):
        second = with_ledger(ledger)
        with trial.refused(second, path):
            dpdl.load_checkpoint(path, second.model, second.optimizer)


@misuse(RESUMING, tried="a checkpoint of another model, or of another kind of optimizer", refused=CheckpointError)
def a_checkpoint_of_another_model(trial: Trial) -> None:
    first = noisy()
    path = trial.folder / "run.pt"
    dpdl.save_checkpoint(path, first.model, first.optimizer)
    larger = noisy(model=nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double())
    adam = noisy(optimizer=lambda p: torch.optim.Adam(p))
    for private in (larger, adam):
        with trial.refused(private, path):
            dpdl.load_checkpoint(path, private.model, private.optimizer)


@misuse(RESUMING, tried="a checkpoint with a flipped byte, or cut short", refused=CheckpointError)
def a_damaged_checkpoint(trial: Trial) -> None:
    private = noisy()
    path = trial.folder / "run.pt"
    dpdl.save_checkpoint(path, private.model, private.optimizer)
    whole = path.read_bytes()
    for damaged in (whole[:-1000], whole[:1500] + bytes([whole[1500] ^ 1]) + whole[1501:], b"", b"weights"):
        path.write_bytes(damaged)
        with trial.refused(private):
            dpdl.load_checkpoint(path, private.model, private.optimizer)


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@misuse(
    RESUMING,
    tried="a checkpoint with a pickle that runs code",
    peer="Opacus: loads with weights_only=False",
    refused=CheckpointError,
)
def a_checkpoint_that_runs_code(trial: Trial) -> None:
    private = noisy()
    path = trial.folder / "run.pt"
    with path.open("wb") as file:
        pickle.dump(Bomb(), file)
    with trial.refused(private, path):
        dpdl.load_checkpoint(path, private.model, private.optimizer)
    torch.save({"schema": "dpdl.checkpoint/1", "extra": Bomb()}, path)
    with trial.refused(private, path):
        dpdl.load_checkpoint(path, private.model, private.optimizer)
    assert not Path("exploded").exists()


@misuse(RESUMING, tried="objects of one's own in a checkpoint's extra", refused=CheckpointError)
def objects_in_a_checkpoint(trial: Trial) -> None:
    private = noisy()
    path = trial.folder / "run.pt"
    dpdl.save_checkpoint(path, private.model, private.optimizer)
    with trial.refused(private, path):
        dpdl.save_checkpoint(path, private.model, private.optimizer, extra={"path": Path("x")})


@misuse(RESUMING, tried="a saved state with an edited ledger: fewer steps, or none", refused=CheckpointError)
def an_edited_state(trial: Trial) -> None:
    private = noisy()
    step_once(private)
    state = private.optimizer.state_dict()
    edits: list[Change] = [
        lambda s: s.pop("ledger"),
        lambda s: s.update(ledger="{}"),
        lambda s: s.update(ledger=s["ledger"].replace('"count": 1', '"count": -1')),
        lambda s: s.update(ledger=s["ledger"].replace('"count": 1', '"count": 0')),
        lambda s: s.update(steps_in_pass=99),
        lambda s: s.update(plan=s["plan"].replace('"noise_multiplier": 1.0', '"noise_multiplier": 0.5')),
        lambda s: s.pop("randomness"),
        lambda s: s.update(randomness={}),
    ]
    for edit in edits:
        edited = copy.deepcopy(state)
        edit(edited["dpdl"])
        with trial.refused(private):
            private.optimizer.load_state_dict(edited)


@misuse(
    RESUMING,
    tried="a saved state whose ledger has steps of another noise, rate or relation than its plan",
    refused=CheckpointError,
)
def a_state_whose_steps_are_not_the_plans(trial: Trial) -> None:
    private = noisy()
    step_once(private)
    state = private.optimizer.state_dict()
    ledger = state["dpdl"]["ledger"]
    for old, new in (
        ('"noise_multiplier": 1.0', '"noise_multiplier": 1e12'),
        ('"sample_rate": 1.0', '"sample_rate": 0.0'),
        ("add_or_remove", "replace_one"),
    ):
        assert old in ledger
        other = noisy()
        edited = {**state, "dpdl": {**state["dpdl"], "ledger": ledger.replace(old, new)}}
        with trial.refused(other):
            other.optimizer.load_state_dict(edited)


@misuse(
    RESUMING,
    tried="a saved state whose plain optimizer's part is broken: no groups, texts for numbers, wrong shapes",
    refused=CheckpointError,
)
def a_broken_state_of_the_plain_optimizer(trial: Trial) -> None:
    private = noisy()
    step_once(private)
    state = private.optimizer.state_dict()
    edits: list[Change] = [
        lambda s: s.update(state=None),
        lambda s: s.update(param_groups=[0]),
        lambda s: s["param_groups"][0].update(params=3),
        lambda s: s["param_groups"][0].update(params=[0, 0, 0, 0]),
        lambda s: s["param_groups"][0].pop("lr"),
        lambda s: s["param_groups"][0].update(lr="fast"),
        lambda s: s["state"].update({0: 1}),
        lambda s: s["state"][0].update(momentum_buffer=torch.zeros(1, 7)),
    ]
    for edit in edits:
        other = noisy()
        edited = copy.deepcopy(state)
        edit(edited)
        with trial.refused(other):
            other.optimizer.load_state_dict(edited)


@misuse(
    RESUMING,
    tried="the weights loaded into a plain model",
    peer="Opacus: keys start with _module.",
    harmless="keys are the plain model's",
)
def weights_in_a_plain_model(trial: Trial) -> None:
    private = noisy()
    step_once(private)
    plain = network()
    plain.load_state_dict(private.model.state_dict())
    assert same(weights_of(plain), weights_of(private.model))
