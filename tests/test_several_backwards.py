"""Several forwards and backwards over one batch: an example's contributions are added up, and clipped once."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from dpdl.errors import LossError, ModelError, PlanExhaustedError, PrivacyWarning, StepError
from tests.oracles import one_at_a_time, several_contributions
from tests.oracles.several_contributions import Term
from tests.several_ways import DATA, DATASET, FAKE, PLAIN, WAYS, A, B, Batch, Y, critic, one_release, three
from tests.small_run import CLASSES, FEATURES, N, network, refused, released, same, small_run

each_engine = pytest.mark.parametrize("engine", ["loop", "vmap", "auto"])


@pytest.mark.parametrize(
    "cut", [{}, {"max_physical_batch_size": 5}, {"chunk_size": 5}], ids=["whole", "parts", "chunks"]
)
@pytest.mark.parametrize("way", WAYS)
@each_engine
def test_contributions_are_summed_for_each_example_and_clipped_once(engine: str, way: str, cut: dict[str, int]) -> None:
    private = WAYS[way].run(engine=engine, **cut)
    true = WAYS[way].clipped_sum()
    error, name = one_at_a_time.worst_error(one_release(private, WAYS[way].train), true)
    assert error < 1e-9, name
    assert private.optimizer.diagnostics.examples == N


@pytest.mark.parametrize("way", WAYS)
def test_the_clip_is_neither_idle_nor_always_at_work(way: str) -> None:
    private = WAYS[way].run()
    one_release(private, WAYS[way].train)
    assert 0 < private.optimizer.diagnostics.clipped < N


def test_the_release_is_bounded_however_often_one_goes_backward() -> None:
    private = PLAIN.run(max_grad_norm=1e-3)

    def often(model: nn.Module, batch: Batch) -> None:
        for _ in range(7):
            F.cross_entropy(model(batch[0]), batch[2]).backward()

    total = torch.cat([g.flatten() for g in one_release(private, often).values()])
    assert 0 < float(total.norm()) <= N * 1e-3


def test_a_non_finite_contribution_takes_its_example_out_and_no_other() -> None:
    broken = A.clone()
    broken[4] = float("nan")
    data = (broken, B, Y, FAKE)
    private = small_run(dataset=TensorDataset(*data), max_grad_norm=WAYS["three"].clip)
    rows = [n for n in range(N) if n != 4]
    kept = [tensor[rows] for tensor in DATA]
    true = WAYS["three"].clipped_sum(kept)
    assert one_at_a_time.worst_error(one_release(private, three), true)[0] < 1e-9
    assert private.optimizer.diagnostics.non_finite == 1


@each_engine
def test_a_loss_that_sums_over_examples(engine: str) -> None:
    private = WAYS["critic"].run(engine=engine, loss_reduction="sum")

    def train(model: nn.Module, batch: Batch) -> None:
        model(batch[0])[:, 0].sum().backward()
        (-model(batch[3])[:, 0].sum()).backward()

    true = WAYS["critic"].clipped_sum()
    assert one_at_a_time.worst_error(one_release(private, train), true)[0] < 1e-9


def test_training_several_times_in_eval_mode_is_training() -> None:
    private = WAYS["critic"].run()
    private.model.eval()
    true = WAYS["critic"].clipped_sum()
    assert one_at_a_time.worst_error(one_release(private, critic), true)[0] < 1e-9


# ── plain torch's habits ────────────────────────────────────────────────────────────────────────────


def test_a_graph_is_freed_by_backward_unless_it_is_retained() -> None:
    private = PLAIN.run()
    batch = next(iter(private.loader))
    output = private.model(batch[0])
    output.sum(1).mean().backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.mean().backward()
    private.optimizer.step()
    assert private.optimizer.steps_taken == 1


@pytest.mark.parametrize("by", ["optimizer", "optimizer, to zero", "model"])
def test_zero_grad_drops_what_came_backward_and_step_says_so(by: str) -> None:
    private = PLAIN.run()
    a, _, y, _ = next(iter(private.loader))
    output = private.model(a)
    F.cross_entropy(output, y).backward(retain_graph=True)
    if by == "model":
        private.model.zero_grad()
    else:
        private.optimizer.zero_grad(set_to_none=by == "optimizer")
    with refused(private, StepError, "zero_grad()", "12 examples", "before backward()"):
        private.optimizer.step()
    F.cross_entropy(output, y).backward()
    private.optimizer.step()
    true = PLAIN.clipped_sum()
    assert one_at_a_time.worst_error(released(private), true)[0] < 1e-9


def test_zero_grad_drops_earlier_backwards_and_no_forward() -> None:
    private = PLAIN.run()

    def train(model: nn.Module, batch: Batch) -> None:
        a, b, y, _ = batch
        dropped, kept = model(b).square().sum(1).mean(), F.cross_entropy(model(a), y)
        dropped.backward()
        private.optimizer.zero_grad()
        kept.backward()

    true = PLAIN.clipped_sum()
    assert one_at_a_time.worst_error(one_release(private, train), true)[0] < 1e-9


def test_zero_grad_keeps_what_closed_parts_have_added_up() -> None:
    private = WAYS["critic"].run(max_physical_batch_size=5)
    for batch in private.loader:
        critic(private.model, batch)
        private.optimizer.step()
        if private.optimizer.steps_taken == 0:
            private.optimizer.zero_grad()
    true = WAYS["critic"].clipped_sum()
    assert one_at_a_time.worst_error(released(private), true)[0] < 1e-9


@pytest.mark.parametrize("engine", ["loop", "vmap", "auto"])
def test_switching_to_eval_before_the_step_changes_nothing(engine: str) -> None:
    """What was drawn and how the model ran is settled by the forward."""
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES)).double()
    switched, usual = (small_run(copy.deepcopy(model), dataset=DATASET, engine=engine) for _ in range(2))
    for private in (switched, usual):
        torch.manual_seed(5)
        batch = next(iter(private.loader))
        F.cross_entropy(private.model(batch[0]), batch[2]).backward()
        if private is switched:
            private.model.eval()
            torch.rand(3)
        private.optimizer.step()
        assert private.model.training == (private is usual)
    assert same(released(switched), released(usual))


@pytest.mark.parametrize("engine", ["loop", "vmap", "auto"])
def test_autocast_around_the_step_does_not_reach_the_sums(engine: str) -> None:
    inside, outside = (small_run(network(torch.float32), dataset=DATASET, engine=engine) for _ in range(2))
    for private in (inside, outside):
        batch = next(iter(private.loader))
        F.cross_entropy(private.model(batch[0].float()), batch[2]).backward()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=private is inside):
            private.optimizer.step()
    assert same(released(inside), released(outside))


def test_a_gradient_handed_to_backward_and_written_to_afterwards_is_refused() -> None:
    private = PLAIN.run(loss_reduction="sum")
    output = private.model(next(iter(private.loader))[0])
    ones = torch.ones_like(output)
    output.backward(ones)
    ones.zero_()
    with refused(private, StepError, "output.backward(gradient.clone())"):
        private.optimizer.step()


def test_a_step_that_is_never_reached_by_backward_is_refused() -> None:
    private = PLAIN.run()
    batch = next(iter(private.loader))
    for rows in batch[:2]:
        private.model(rows)
    with refused(private, StepError, "before backward()"):
        private.optimizer.step()


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────


def test_every_forward_has_as_many_rows_as_the_batch() -> None:
    private = PLAIN.run()
    batch = next(iter(private.loader))
    private.model(batch[0])
    with refused(private, StepError, "24 examples", "has 12"):
        private.model(torch.cat(list(batch[:2])))


@pytest.mark.parametrize("when", ["after the step", "in the next batch"])
def test_an_earlier_output_cannot_join_a_later_step(when: str) -> None:
    private = PLAIN.run()
    a, b, y, _ = next(iter(private.loader))
    kept = F.cross_entropy(private.model(b), y)
    F.cross_entropy(private.model(a), y).backward()
    private.optimizer.step()
    if when == "in the next batch":
        next(iter(private.loader))
    with refused(private, StepError, "earlier batch"):
        kept.backward()


@each_engine
def test_a_graph_of_the_gradients_is_refused_in_words(engine: str) -> None:
    private = PLAIN.run(engine=engine)
    a, _, y, _ = next(iter(private.loader))
    with refused(private, StepError, "create_graph", "one example at a time"):
        F.cross_entropy(private.model(a), y).backward(create_graph=True)
    with refused(private, StepError, "before backward()"):
        private.optimizer.step()


def test_a_penalty_on_the_gradient_of_the_outputs_is_taken() -> None:
    def loss_of(output: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(output, y, reduction="none")
        (slope,) = torch.autograd.grad(each.sum(), output, create_graph=True)
        return (each + slope.square().sum(1)).mean()

    private = PLAIN.run()
    term: Term = lambda m, e: loss_of(m(e[0]), e[2])  # noqa: E731
    true = several_contributions.clipped_sum(network(), [term], DATA, PLAIN.clip)
    got = one_release(private, lambda m, batch: loss_of(m(batch[0]), batch[2]).backward())
    assert one_at_a_time.worst_error(got, true)[0] < 1e-9


def test_freezing_between_two_forwards_is_refused() -> None:
    private = PLAIN.run()
    a, b, y, _ = next(iter(private.loader))
    F.cross_entropy(private.model(a), y).backward()
    private.model[0].requires_grad_(False)
    with refused(private, StepError, "0.weight", "between steps"):
        F.cross_entropy(private.model(b), y).backward()


def test_past_the_plan_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    private = PLAIN.run(steps=1)
    batch = next(iter(private.loader))
    critic(private.model, batch)
    monkeypatch.setattr(type(private.optimizer._run.ledger), "count", lambda *_: 1)
    monkeypatch.setattr("dpdl.turns.visit_gradients", lambda *_, **__: pytest.fail("gradients were computed"))
    with pytest.raises(PlanExhaustedError):
        private.optimizer.step()


def test_a_step_that_fails_leaves_the_batch_open_and_nothing_spent() -> None:
    """Weights written to between forward and step: the outputs were others'."""
    private = PLAIN.run(engine="vmap")
    a, _, y, _ = next(iter(private.loader))
    output = private.model(a)
    F.cross_entropy(output, y).backward(retain_graph=True)
    with torch.no_grad():
        private.model[0].weight.mul_(2)
    with refused(private, ModelError, "another output", "write to neither weights nor batch"):
        private.optimizer.step()
    with refused(private, StepError, "before backward()"):
        private.optimizer.step()
    with refused(private, StepError, "again"):
        F.cross_entropy(output, y).backward()
    F.cross_entropy(private.model(a), y).backward()
    private.optimizer.step()
    assert private.optimizer.steps_taken == 1


# ── the loss's declaration ──────────────────────────────────────────────────────────────────────────


def test_each_backward_is_held_to_the_declaration() -> None:
    private = PLAIN.run()
    a, b, y, _ = next(iter(private.loader))
    F.cross_entropy(private.model(a), y).backward()
    with refused(private, LossError, "loss_reduction"):
        private.model(b).square().sum().backward()


def test_a_loss_that_compares_examples_of_two_forwards_is_refused() -> None:
    private = PLAIN.run()
    a, b, _, _ = next(iter(private.loader))
    left, right = private.model(a), private.model(b)
    with refused(private, LossError, "neither a mean nor a sum"):
        F.cross_entropy(left @ right.t(), torch.arange(len(a))).backward()


def test_a_refused_loss_is_refused_again() -> None:
    private = PLAIN.run()
    a, _, _, _ = next(iter(private.loader))
    loss = private.model(a).square().sum()
    for _ in range(2):
        with refused(private, LossError):
            loss.backward()
    assert all(p.grad is None for p in private.model.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_the_report_says_nothing_of_losses_that_could_be_checked(way: str) -> None:
    private = WAYS[way].run()
    one_release(private, WAYS[way].train)
    assert "could not be checked" not in " ".join(private.optimizer.report(1e-5).to_dict()["notes"])


def test_a_second_loss_that_cannot_be_run_again_is_noted() -> None:
    private = PLAIN.run()

    def train(model: nn.Module, batch: Batch) -> None:
        F.cross_entropy(model(batch[0]), batch[2]).backward()
        foreign = model(batch[1]).as_subclass(Tensor)  # no longer followed
        (foreign.square().sum(1).mean() + model(batch[0]).view(4, 3, CLASSES)[0].sum() * 0).backward()

    with pytest.warns(PrivacyWarning, match="taken on trust"):
        one_release(private, train)
    assert "could not be checked" in " ".join(private.optimizer.report(1e-5).to_dict()["notes"])


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("engine", ["loop", "vmap", "auto"])
def test_memory_after_many_steps_is_that_after_a_few(engine: str) -> None:
    steps = 150
    model = nn.Linear(FEATURES, CLASSES).double()
    private = small_run(model, dataset=TensorDataset(*(t[:2] for t in DATA)), batch_size=2, steps=steps, engine=engine)
    counts = {}
    while private.optimizer.steps_taken < steps:
        for batch in private.loader:
            critic(private.model, batch)
            private.model(batch[1])
            private.optimizer.step()
            if private.optimizer.steps_taken in (10, steps):
                del batch
                counts[private.optimizer.steps_taken] = live_tensors()
    assert counts[steps] <= counts[10]


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_the_step_frees_what_forwards_kept_although_losses_are_held(engine: str) -> None:
    """Without the garbage collector's help."""
    private = PLAIN.run(engine=engine, self_check=False)
    batch = next(iter(private.loader))
    gc.collect()
    gc.disable()
    try:
        output = private.model(batch[0])
        loss = F.cross_entropy(output, batch[2])
        loss.backward(retain_graph=True)
        stray = private.model(batch[1])
        (passage,) = private.optimizer._turns.open_part.passages
        kept = weakref.ref(getattr(passage._forward.pull_back, "__self__", passage._forward.pull_back))
        stray_node = weakref.ref(stray.grad_fn)
        del stray
        assert stray_node() is None
        assert kept() is not None
        private.optimizer.step()
        assert kept() is None
        gone = weakref.ref(passage)
        del passage, output, loss
        assert gone() is None
    finally:
        gc.enable()
