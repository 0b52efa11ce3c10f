"""Losses in which an example reaches another are refused, or said not to have been checked; others are confirmed."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpdl.errors import LossError, PrivacyWarning
from dpdl.execution import Execution, LossReduction
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.boundary import Passage, visit_gradients
from dpdl.per_sample.runner import PerSampleRunner

CLASSES = 4
TOKENS = 6
SIZES = (8, 12, 7)  # of the batches, one after another

Loss = Callable[..., Tensor]


class Sequences(nn.Module):
    """[N, 5] to [N, TOKENS, CLASSES]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, TOKENS * CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.linear(x)
        return scores.view(-1, TOKENS, CLASSES)


class TwoHeads(nn.Module):
    """[N, 5] to two outputs [N, CLASSES], by name or not."""

    def __init__(self, *, named: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.named = nn.Linear(5, CLASSES), nn.Linear(5, CLASSES), named

    def forward(self, x: Tensor) -> Any:
        return {"a": self.a(x), "b": self.b(x)} if self.named else (self.a(x), self.b(x))


def labels(size: int) -> Tensor:
    return torch.randint(0, CLASSES, (size,))


class Run:
    """A model trained with a loss, as far as the backward goes.

    Args:
        loss: of the outputs of as many forwards as are asked for, and of the targets.
        targets: makes those of N examples.
    """

    def __init__(
        self,
        loss: Loss,
        *,
        declared: LossReduction = "mean",
        model: nn.Module | None = None,
        targets: Callable[[int], Any] = labels,
        forwards: int = 1,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.model = model or nn.Linear(5, CLASSES)
        self.loss, self.targets, self.forwards = loss, targets, forwards
        self.runner = PerSampleRunner(self.model, Execution(engine="loop", loss_reduction=declared))

    def batch(self, size: int) -> None:
        passages: list[Passage] = []
        inputs = torch.randn(size, 5)
        targets = self.runner.begin_batch(self.targets(size), size)
        trainable = dict(self.model.named_parameters())
        outputs = [
            self.runner.forward(ExampleBatch.from_call((inputs + i,), {}), trainable, passages.append)
            for i in range(self.forwards)
        ]
        self.loss(*outputs, targets).backward()
        visit_gradients(passages, lambda part: None)

    def is_confirmed(self) -> bool:
        return not any("could not be checked" in note for note in self.runner.notes)


def own(o: Tensor, y: Tensor) -> Tensor:
    """Each example's own loss."""
    return F.cross_entropy(o, y, reduction="none")


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────


def anchored(o: Tensor, y: Tensor) -> Tensor:
    """From the first row to all others: the first half of the batch sees the same anchor."""
    return (o - o[0].detach()).square().mean()


def baseline(o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o - o[:2].mean(0).detach(), y)


def pairs(o: Tensor, y: Tensor) -> Tensor:
    first, second = o.view(-1, 2, CLASSES).unbind(1)
    return (first - second).square().mean()


def listwise(o: Tensor, y: Tensor) -> Tensor:
    """Within blocks of four rows."""
    return -F.log_softmax(o[:, 0].view(-1, 4), 1)[:, 0].mean()


def over_the_maximum(o: Tensor, y: Tensor) -> Tensor:
    losses = own(o, y)
    return (losses / losses.max().detach()).mean()


def nt_xent(o: Tensor, y: Tensor) -> Tensor:
    """As in SimCLR, with a mask [N, N] that no example is marked in."""
    z = F.normalize(o, dim=1)
    similarities = (z @ z.t() / 0.5).masked_fill(torch.eye(len(o), dtype=torch.bool), -1e9)
    return F.cross_entropy(similarities, torch.arange(len(o)).roll(len(o) // 2))


def supervised_contrastive(o: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(o, dim=1)
    others = ~torch.eye(len(o), dtype=torch.bool)
    e = torch.exp(z @ z.t() / 0.5) * others
    alike = (e * ((y[:, None] == y[None]) & others)).sum(1)
    return -(torch.log(alike + 1e-3) - torch.log(e.sum(1))).mean()


def ranked(o: Tensor, y: Tensor) -> Tensor:
    return F.margin_ranking_loss(o[0::2, 0], o[1::2, 0], torch.ones(len(o) // 2))


def over_the_count(o: Tensor, y: Tensor) -> Tensor:
    """A mean over what is not padding, the count being a Python number."""
    return F.cross_entropy(o, y, ignore_index=0, reduction="sum") / int((y != 0).sum())


def views_of_both(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """SimCLR over two forwards."""
    z, n = F.normalize(torch.cat([a, b]), dim=1), len(a)
    similarities = (z @ z.t()).masked_fill(torch.eye(2 * n, dtype=torch.bool), -1e9)
    return F.cross_entropy(similarities, torch.cat([torch.arange(n, 2 * n), torch.arange(n)]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "loss",
    [anchored, baseline, pairs, listwise, over_the_maximum, nt_xent, supervised_contrastive, ranked, over_the_count],
)
def test_a_loss_in_which_examples_meet_is_refused(loss: Loss, seed: int) -> None:
    with pytest.raises(LossError, match="neither a mean nor a sum"):
        Run(loss, seed=seed).batch(12)


@pytest.mark.parametrize(
    "reduced", [lambda x: x.max(), lambda x: (x - x[0].detach()).square().sum(), lambda x: x[::2] @ x[1::2]]
)
def test_a_loss_in_which_examples_meet_is_refused_as_a_sum(reduced: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(LossError, match="neither a mean nor a sum"):
        Run(lambda o, y: reduced(own(o, y)), declared="sum").batch(12)


def test_views_of_other_examples_are_refused() -> None:
    with pytest.raises(LossError, match="neither a mean nor a sum"):
        Run(views_of_both, forwards=2).batch(8)


def test_a_sum_over_a_gradient_of_ones_is_no_mean() -> None:
    """`losses.backward(torch.ones(N))`: what is handed over belongs to the loss."""
    run = Run(own)
    inputs, targets = torch.randn(8, 5), run.runner.begin_batch(labels(8), 8)
    trainable = dict(run.model.named_parameters())
    output = run.runner.forward(ExampleBatch.from_call((inputs,), {}), trainable, lambda passage: None)
    with pytest.raises(LossError, match="is a sum"):
        own(output, targets).backward(torch.ones(8))


# ── what is not confirmed ─────────────────────────────────────────────────────────────────────────────────────


def counted_by_numpy(o: Tensor, y: Tensor) -> Tensor:
    counts = np.bincount(y.numpy(), minlength=CLASSES) + 1.0
    return (own(o, y) * torch.tensor(1 / counts)[y]).mean()


def counted_in_a_list(o: Tensor, y: Tensor) -> Tensor:
    counts = Counter(y.tolist())
    return F.cross_entropy(
        o, y, weight=torch.tensor([1 / (1 + counts[i]) for i in range(CLASSES)]), reduction="none"
    ).mean()


def counted_one_by_one(o: Tensor, y: Tensor) -> Tensor:
    counts = Counter(int(label) for label in y)
    return (own(o, y) * torch.tensor([1 / (1.0 + counts[i]) for i in range(CLASSES)])[y]).mean()


def ranks_by_numpy(o: Tensor, y: Tensor) -> Tensor:
    ranks = np.argsort(np.argsort(o.detach().numpy()[:, 0]))
    return (torch.from_numpy(1 / (1 + ranks)) * own(o, y)).mean()


def scaled_by_a_number(o: Tensor, y: Tensor) -> Tensor:
    return own(o, y).mean() * (1.5 / float(y.float().mean() + 1.0))


@pytest.mark.parametrize(
    "loss", [counted_by_numpy, counted_in_a_list, counted_one_by_one, ranks_by_numpy, scaled_by_a_number]
)
def test_a_statistic_that_comes_back_as_a_constant_is_not_confirmed(loss: Loss) -> None:
    run = Run(loss)
    for size in SIZES:
        run.batch(size)
    assert not run.is_confirmed()


def numbers_read_beside_it(o: Tensor, y: Tensor) -> Tensor:
    """Accuracy for a log: the loss has constants, but they are always the same."""
    (o.detach().argmax(1).numpy() == y.numpy()).mean()
    (o.argmax(1) == y).sum().item()
    return F.cross_entropy(o, y, weight=torch.ones(CLASSES) * 0.5, reduction="none", label_smoothing=0.1).sum() / len(y)


def read_for_an_index(o: Tensor, y: Tensor) -> Tensor:
    """A list of constants, and labels that point into it."""
    rows = [torch.eye(CLASSES)[i] for i in range(CLASSES)]
    return F.mse_loss(o, torch.stack([rows[label] for label in y]))


def test_numbers_that_are_only_logged_do_not_stand_in_the_way() -> None:
    run = Run(numbers_read_beside_it)
    for size in SIZES:
        run.batch(size)
    assert run.is_confirmed()


def one_by_one(o: Tensor, y: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(a, b) for a, b in zip(o, y, strict=True)]).mean()


def boxes(o: Tensor, y: list[Tensor]) -> Tensor:
    losses = [F.mse_loss(row.expand_as(own_boxes), own_boxes) for row, own_boxes in zip(o, y, strict=True)]
    return torch.stack(losses).mean()


def dropped_out(o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.dropout(o, 0.5), y)


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (read_for_an_index, labels),
        (one_by_one, labels),
        (boxes, lambda size: [torch.randn(1 + i % 3, CLASSES) for i in range(size)]),
        (dropped_out, labels),
    ],
)
def test_what_cannot_be_shown_is_neither_refused_nor_warned_of(loss: Loss, targets: Callable[[int], Any]) -> None:
    """Examples keep apart, as far as can be seen; whether it is a mean is not known."""
    run = Run(loss, targets=targets)
    for size in SIZES:
        run.batch(size)
    assert not run.is_confirmed()


def test_a_loss_that_cannot_be_run_again_is_warned_of_once() -> None:
    run = Run(lambda o, y: F.cross_entropy(o, y) + o.as_subclass(Tensor).square().mean())  # the second is foreign
    with pytest.warns(PrivacyWarning, match="taken on trust"):
        run.batch(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.batch(12)
    assert not run.is_confirmed()


def test_a_hook_that_mixes_examples_on_the_way_back_is_not_confirmed() -> None:
    def hooked(o: Tensor, y: Tensor) -> Tensor:
        o.register_hook(lambda gradient: gradient - gradient.mean(0, keepdim=True))
        return F.cross_entropy(o, y)

    run = Run(hooked)
    with pytest.warns(PrivacyWarning, match="taken on trust"):
        run.batch(8)
    run.batch(12)
    assert not run.is_confirmed()


# ── what is confirmed ─────────────────────────────────────────────────────────────────────────────────────────


def tokens(size: int) -> Tensor:
    return torch.randint(0, CLASSES, (size, TOKENS))


def mean_over_own_tokens(o: Tensor, y: Tensor) -> Tensor:
    real = (y != 0).float()
    losses = F.cross_entropy(o.transpose(1, 2), y, reduction="none")
    return ((losses * real).sum(1) / real.sum(1).clamp(min=1)).mean()


def ctc(o: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
    scores = F.log_softmax(o, 2).transpose(0, 1)
    return F.ctc_loss(scores, y[0], torch.full((len(o),), TOKENS), y[1], zero_infinity=True)


def weighted_without_gradient(o: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        weights = torch.softmax(o, 1).gather(1, y[:, None]).squeeze(1)
    return (weights * own(o, y)).mean()


def sampled(o: Tensor, y: Tensor) -> Tensor:
    """The reparametrisation of a variational autoencoder, with noise for each example."""
    return (o + torch.randn_like(o) - F.one_hot(y, CLASSES)).square().sum(1).mean()


def policy(o: Tensor, y: Tensor) -> Tensor:
    actions = torch.distributions.Categorical(logits=o)
    surprise: Tensor = -actions.log_prob(actions.sample())
    return (surprise * y).mean()


def adversarial(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    real, fake = torch.ones(len(a)), torch.zeros(len(b))
    scores = torch.cat([a, b])[:, 0]
    return 2 * F.binary_cross_entropy_with_logits(scores, torch.cat([real, fake]))


def ignoring(o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o, y, ignore_index=0, reduction="none").mean()


def squeezed(o: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(o[:, :1].squeeze(), (y > 1).float())


def divergence(o: Tensor, y: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(o, 1), F.one_hot(y, CLASSES) * 0.8 + 0.05, reduction="batchmean")


def token_mean(o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o.view(-1, CLASSES), y.view(-1))


def padded_labels(size: int) -> tuple[Tensor, Tensor]:
    return torch.randint(1, CLASSES, (size, 3)), torch.randint(1, 4, (size,))


def by_name(o: dict[str, Tensor], y: Tensor) -> Tensor:
    return F.cross_entropy(o["a"], y) + F.mse_loss(o["b"], o["a"].detach())


def asking(o: Tensor, y: Tensor) -> Tensor:
    return o.sum() if torch.isnan(o).any() else F.cross_entropy(o, y)


HONEST: dict[str, dict[str, Any]] = {
    "cross entropy": {"loss": F.cross_entropy},
    "label smoothing": {"loss": lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1)},
    "labels to ignore, by example": {"loss": ignoring},
    "squared": {"loss": lambda o, y: F.mse_loss(o, F.one_hot(y, CLASSES).float())},
    "absolute": {"loss": lambda o, y: F.l1_loss(o[:, 0], y.float())},
    "huber": {"loss": lambda o, y: F.huber_loss(o[:, 0], y.float())},
    "squeezed logits": {"loss": squeezed},
    "divergence": {"loss": divergence},
    "tokens": {"loss": token_mean, "model": Sequences, "targets": tokens},
    "own tokens": {"loss": mean_over_own_tokens, "model": Sequences, "targets": tokens},
    "ctc": {"loss": ctc, "model": Sequences, "targets": padded_labels},
    "two outputs": {"loss": lambda o, y: F.cross_entropy(o[0], y) + o[1].square().mean(), "model": TwoHeads},
    "outputs by name": {"loss": by_name, "model": lambda: TwoHeads(named=True)},
    "detached": {"loss": lambda o, y: (own(o, y) * (1 - torch.exp(-own(o, y).detach())) ** 2).mean()},
    "regularised": {"loss": lambda o, y: F.cross_entropy(o, y) + 0.01 * o.square().sum() / len(o)},
    "without gradient": {"loss": weighted_without_gradient},
    "class weights of each example": {"loss": lambda o, y: (own(o, y) * torch.arange(1.0, 5.0)[y]).mean()},
    "selected": {"loss": lambda o, y: F.cross_entropy(o[y > 0], y[y > 0], reduction="sum") / len(y)},
    "sampled": {"loss": sampled},
    "policy": {"loss": policy},
    "critic": {"loss": lambda a, b, y: F.softplus(-a[:, 0]).mean() + F.softplus(b[:, 0]).mean(), "forwards": 2},
    "critic of both": {"loss": adversarial, "forwards": 2},
    "own triplets": {"loss": lambda a, p, n, y: F.triplet_margin_loss(a, p, n, margin=9.0), "forwards": 3},
    "asks first": {"loss": asking},
    "classes as many as examples": {"loss": lambda o, y: (own(o, y) * torch.ones(4)[y]).mean(), "sizes": (4, 8)},
}


@pytest.mark.parametrize("name", HONEST)
def test_a_mean_of_each_examples_own_loss_is_confirmed(name: str) -> None:
    case = dict(HONEST[name])
    sizes, model = case.pop("sizes", SIZES), case.pop("model", None)
    run = Run(**case, model=model() if model else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing that is tried may be heard of
        for size in sizes:
            run.batch(size)
            assert run.is_confirmed(), size


def test_a_loss_is_computed_again_as_autocast_computed_it() -> None:
    run = Run(lambda o, y: F.cross_entropy(o @ torch.arange(12.0).view(CLASSES, 3), y % 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inputs, targets = torch.randn(8, 5), run.runner.begin_batch(labels(8), 8)
        trainable = dict(run.model.named_parameters())
        output = run.runner.forward(ExampleBatch.from_call((inputs,), {}), trainable, lambda passage: None)
        loss = run.loss(output, targets)
    loss.backward()
    run.runner.begin_batch((inputs, targets), 1)  # ends the check
    assert run.is_confirmed()


def test_the_random_numbers_of_training_are_left_alone() -> None:
    run = Run(sampled)
    run.batch(8)
    state = torch.get_rng_state()
    inputs, targets = run.runner.begin_batch((torch.ones(8, 5), torch.ones(8, dtype=torch.long)), 8)
    output = run.runner.forward(
        ExampleBatch.from_call((inputs,), {}), dict(run.model.named_parameters()), lambda p: None
    )
    F.cross_entropy(output, targets).backward()
    assert torch.equal(state, torch.get_rng_state())
