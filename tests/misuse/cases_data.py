"""Batches and loaders that are not what the plan accounts for, and examples that break arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import dpdl
from dpdl.errors import LoaderError, ModelError, ParameterError, StepError
from tests.misuse.case import Trial, misuse
from tests.misuse.cases_order import plain
from tests.small_run import (
    FEATURES,
    N,
    examples,
    network,
    released,
    same,
    sgd,
    small_run,
    step_once,
    train_on,
    weights_of,
)

X, Y = examples()
DATA = TensorDataset(X, Y)
BATCHES = "Batches"
LOADERS = "Loaders and samplers"
VALUES = "Values in the data"


def assert_loader_refused(trial: Trial, loader: DataLoader[Any]) -> None:
    """By the plan, and by make_private under another loader's plan."""
    model = network()
    optimizer = sgd(model.parameters())
    plan = dpdl.PrivacyPlan.for_loader(DataLoader(DATA, 4), steps=3, noise_multiplier=1.0, max_grad_norm=1.0)
    with trial.refused(model, optimizer):
        dpdl.PrivacyPlan.for_loader(loader, steps=3, noise_multiplier=1.0, max_grad_norm=1.0)
    with trial.refused(model, optimizer):
        dpdl.make_private(model, optimizer, loader, plan)


# ── batches ─────────────────────────────────────────────────────────────────────────────────────────


@misuse(
    BATCHES,
    tried="the loop goes over the shuffled DataLoader, not over the private one",
    peer="Opacus (poisson_sampling=False), fastDP, PT, dpT: trained, and accounted as Poisson sampling",
    refused=StepError,
)
def training_on_the_plain_loader(trial: Trial) -> None:
    loader = DataLoader(DATA, batch_size=4, shuffle=True)
    private = small_run(loader=loader)
    x, _ = next(iter(loader))
    with trial.refused(private):
        private.model(x)


@misuse(
    BATCHES,
    tried="a batch of one's own, of another size, while a private one is open",
    peer="Opacus: 200 examples trained on and accounted at rate 1/32",
    refused=StepError,
)
def a_foreign_batch_of_another_size(trial: Trial) -> None:
    private = small_run()
    next(iter(private.loader))
    with trial.refused(private, saying="200 examples"):
        private.model(examples(200)[0])


@misuse(
    BATCHES,
    tried="a batch of one's own, of the same size, while a private one is open",
    peer="Opacus: the same, at any size",
    refused=StepError,
    fails="it cannot be told from the private batch after an augmentation (docs/sharp_edges.md says so)",
)
def a_foreign_batch_of_the_same_size(trial: Trial) -> None:
    private = small_run()
    next(iter(private.loader))
    with trial.refused(private):
        train_on(private, (torch.zeros_like(X), Y))


@misuse(BATCHES, tried="half of the private batch", refused=StepError)
def half_of_the_batch(trial: Trial) -> None:
    private = small_run()
    x, _ = next(iter(private.loader))
    with trial.refused(private):
        private.model(x[: len(x) // 2])


@misuse(
    BATCHES,
    tried="examples on another axis than the first (time-major rows)",
    peer="Opacus: batch_first must be set by hand",
    refused=StepError,
)
def examples_on_the_second_axis(trial: Trial) -> None:
    private = small_run(nn.Linear(FEATURES, 2).double(), dataset=TensorDataset(torch.ones(N, 5, FEATURES).double(), Y))
    x, _ = next(iter(private.loader))
    with trial.refused(private):
        private.model(x.transpose(0, 1))


@misuse(
    BATCHES,
    tried="a sparse batch, which the plain model takes",
    refused=ModelError,
    fails="torch's NotImplementedError about aten::as_strided comes out of the forward",
)
def a_sparse_batch(trial: Trial) -> None:
    private = small_run()
    x, _ = next(iter(private.loader))
    assert network()(plain(x).to_sparse()).shape == (N, 2)
    with trial.refused(private):
        private.model(plain(x).to_sparse())


@misuse(
    BATCHES,
    tried="an empty draw",
    peer="Opacus: functorch and ew crash, as does a first empty batch of a dict dataset; Opacus DDP skips it",
    harmless="a step of pure noise, also if it is the first",
)
def an_empty_batch(trial: Trial) -> None:
    class Dicts(Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return N

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"x": X[index], "y": Y[index], "id": index}

    for seed in range(100):  # one whose first draw is empty
        private = small_run(dataset=Dicts(), batch_size=1, noise_multiplier=1.0, insecure_seed=seed)
        batch = next(iter(private.loader))
        if len(batch["x"]) == 0:
            break
    assert len(batch["x"]) == 0
    F.cross_entropy(private.model(batch["x"]), batch["y"]).backward()
    private.optimizer.step()
    assert private.optimizer.steps_taken == 1
    assert all(bool(torch.isfinite(g).all()) and bool(g.any()) for g in released(private).values())


@misuse(
    BATCHES,
    tried="parts of a batch whose mean gradient would be clipped, not each example's",
    peer="TF-privacy: num_microbatches clips the mean of each microbatch",
    harmless="each example is clipped, however a batch is cut: the release is that of the whole",
)
def microbatches(trial: Trial) -> None:
    cut, whole = small_run(max_physical_batch_size=5, max_grad_norm=0.2), small_run(max_grad_norm=0.2)
    for private in (cut, whole):
        step_once(private)
    for name, gradient in released(whole).items():
        torch.testing.assert_close(released(cut)[name], gradient, rtol=1e-9, atol=1e-12)


@misuse(BATCHES, tried="computing a metric by iterating the private loader, without steps", refused=StepError)
def evaluating_on_the_private_loader(trial: Trial) -> None:
    private = small_run(batch_size=4)
    batches = iter(private.loader)
    with torch.no_grad():
        private.model(next(batches)[0])
        with trial.refused(private):
            next(batches)


@misuse(
    BATCHES,
    tried="evaluating in eval mode with gradients left on, between steps",
    harmless="it evaluates: parameters are constants, nothing of it reaches the next step",
)
def evaluating_with_gradients_on(trial: Trial) -> None:
    disturbed, quiet = small_run(), small_run()
    for private in (disturbed, quiet):
        step_once(private)
        if private is disturbed:
            private.model.eval()
            F.cross_entropy(private.model(examples(7)[0]), examples(7)[1])
            private.model.train()
        step_once(private)
    assert same(weights_of(disturbed.model), weights_of(quiet.model))


# ── loaders ─────────────────────────────────────────────────────────────────────────────────────────


@misuse(LOADERS, tried="an IterableDataset", peer="Opacus: ValueError; fastDP, PT: any", refused=LoaderError)
def a_stream(trial: Trial) -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(X)

    assert_loader_refused(trial, DataLoader(Stream(), batch_size=4))


@misuse(
    LOADERS,
    tried="WeightedRandomSampler",
    peer="Opacus: replaced by a Poisson rate of 0.125 where 16 of 10,000 were asked for (#600, #813)",
    refused=LoaderError,
)
def weighted_sampling(trial: Trial) -> None:
    assert_loader_refused(trial, DataLoader(DATA, 4, sampler=WeightedRandomSampler([1.0] * N, 8)))


@misuse(LOADERS, tried="sampling with replacement", refused=LoaderError)
def sampling_with_replacement(trial: Trial) -> None:
    assert_loader_refused(trial, DataLoader(DATA, 4, sampler=RandomSampler(DATA, replacement=True, num_samples=N)))


@misuse(LOADERS, tried="DistributedSampler", refused=LoaderError)
def a_distributed_sampler(trial: Trial) -> None:
    assert_loader_refused(trial, DataLoader(DATA, 4, sampler=DistributedSampler(DATA, num_replicas=2, rank=0)))


@misuse(LOADERS, tried="a sampler over a part of the data", refused=LoaderError)
def a_subset_sampler(trial: Trial) -> None:
    assert_loader_refused(trial, DataLoader(DATA, 4, sampler=SubsetRandomSampler(range(5))))


@misuse(LOADERS, tried="a batch sampler of one's own", refused=LoaderError)
def a_batch_sampler(trial: Trial) -> None:
    class Sorted(BatchSampler):
        pass

    assert_loader_refused(trial, DataLoader(DATA, batch_sampler=Sorted(SequentialSampler(DATA), 4, False)))


@misuse(LOADERS, tried="batch_size=None", refused=LoaderError)
def no_batch_size(trial: Trial) -> None:
    assert_loader_refused(trial, DataLoader(DATA, batch_size=None))


@misuse(LOADERS, tried="an empty dataset", refused=LoaderError)
def no_data(trial: Trial) -> None:
    assert_loader_refused(trial, DataLoader(TensorDataset(X[:0], Y[:0]), 4))


@misuse(LOADERS, tried="drop_last with a batch larger than the data", refused=LoaderError)
def drop_last_drops_everything(trial: Trial) -> None:
    assert_loader_refused(trial, DataLoader(DATA, batch_size=N + 1, drop_last=True))


@misuse(LOADERS, tried="a list of tensors in place of a loader", refused=LoaderError)
def a_list_for_a_loader(trial: Trial) -> None:
    assert_loader_refused(trial, [(X, Y)])  # type: ignore[arg-type]


@misuse(
    LOADERS,
    tried="drop_last with 930 examples in batches of 10, or a partial last batch",
    peer="Opacus: 92 steps a pass, sampled at 1/93, accounted at 1/92",
    harmless="rate and steps are computed from the integers: batch size / n, and batches in a pass",
)
def partial_last_batches(trial: Trial) -> None:
    for n, drop_last, steps in ((930, True, 93), (933, True, 93), (933, False, 94)):
        loader = DataLoader(TensorDataset(torch.arange(n)), batch_size=10, drop_last=drop_last)
        plan = dpdl.PrivacyPlan.for_loader(loader, epochs=1, noise_multiplier=1.0, max_grad_norm=1.0)
        assert (plan.sample_rate, plan.steps, plan.expected_batch_size) == (10 / n, steps, 10)


@misuse(LOADERS, tried="another dataset than the one that the plan was made for", refused=LoaderError)
def a_plan_of_another_dataset(trial: Trial) -> None:
    model = network()
    optimizer = sgd(model.parameters())
    large = DataLoader(TensorDataset(*examples(200)), 4)
    plan = dpdl.PrivacyPlan.for_loader(large, steps=3, noise_multiplier=1.0, max_grad_norm=1.0)
    with trial.refused(model, optimizer):
        dpdl.make_private(model, optimizer, DataLoader(DATA, 4), plan)


@misuse(LOADERS, tried="a plan whose rate and expected batch size contradict each other", refused=ParameterError)
def rate_and_batch_size_disagree(trial: Trial) -> None:
    with trial.refused():
        dpdl.PrivacyPlan(
            sample_rate=0.01,
            expected_batch_size=256,
            steps=10,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            dataset_size=1000,
        )


@misuse(
    LOADERS,
    tried="the dataset grows while training",
    harmless="from the next pass on new examples are drawn, too, with the plan's rate; sums and noise are as planned",
)
def a_growing_dataset(trial: Trial) -> None:
    class Growing(Dataset[tuple[Tensor, Tensor]]):
        size = N

        def __len__(self) -> int:
            return self.size

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return X[index % N], Y[index % N]

    data = Growing()
    private = small_run(dataset=data)
    step_once(private)
    data.size = 10 * N
    x, y = next(iter(private.loader))
    assert len(x) == 10 * N  # the plan's rate is 1
    train_on(private, (x, y))
    assert sum(g.square().sum() for g in released(private).values()).sqrt() <= 10 * N  # clipped to 1 each
    assert private.optimizer.ledger.releases == 2


# ── values ──────────────────────────────────────────────────────────────────────────────────────────


def with_one(value: float) -> TensorDataset:
    x = X.clone()
    x[3, 1] = value
    return TensorDataset(x, Y)


def assert_left_out(value: float) -> None:
    spoilt = small_run(dataset=with_one(value), max_grad_norm=0.3)
    step_once(spoilt)
    others = [n for n in range(N) if n != 3]
    rest = small_run(dataset=TensorDataset(X[others], Y[others]), batch_size=N - 1, max_grad_norm=0.3)
    step_once(rest)
    assert spoilt.optimizer.diagnostics.non_finite == 1
    for name, gradient in released(rest).items():
        torch.testing.assert_close(released(spoilt)[name], gradient, rtol=1e-9, atol=1e-12)


@misuse(
    VALUES,
    tried="an example with a NaN",
    peer="Opacus: all weights NaN; fastDP: nan_to_num in one of its modes",
    harmless="it gets weight zero and is counted; the release is that of the others",
)
def a_nan_example(trial: Trial) -> None:
    assert_left_out(float("nan"))


@misuse(VALUES, tried="an infinite example", harmless="it gets weight zero and is counted")
def an_infinite_example(trial: Trial) -> None:
    assert_left_out(float("inf"))


@misuse(
    VALUES,
    tried="an example a billion times as large as the others",
    harmless="it is clipped: the release moves by no more than the clipping norm",
)
def an_enormous_example(trial: Trial) -> None:
    large, usual = small_run(dataset=with_one(1e9), max_grad_norm=0.3), small_run(max_grad_norm=0.3)
    step_once(large)
    step_once(usual)
    moved = torch.cat([(released(large)[n] - g).flatten() for n, g in released(usual).items()]).norm()
    assert 0 < moved <= 2 * 0.3 + 1e-9  # replaced: two clipping norms at most
