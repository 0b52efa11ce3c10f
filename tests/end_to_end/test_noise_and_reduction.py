"""The noise of a run, seen from outside: its size, its freshness, and what it must not depend on.

Released gradient of a step: `p.grad * expected_batch_size`. Where the loss is constant it is noise
alone, N(0, (noise_multiplier * max_grad_norm)^2).

The bounds: the mean square of k normals has relative standard deviation sqrt(2 / k), the correlation
of two independent vectors of length k has 1 / sqrt(k); five of either are allowed, 6e-7 a test.
Seeds are fixed, so that what passes once passes always.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import accountants
import dpdl
from dpdl.errors import LossError, StepError
from tests.end_to_end.recorded_run import Record, numbered_loader, train
from tests.oracles import one_at_a_time
from tests.per_sample.case import cross_entropy_sum, normal, tokens

EXAMPLES, INPUTS, OUTPUTS = 40, 50, 100
X = normal(EXAMPLES, INPUTS, seed=91)
Y = tokens(EXAMPLES, vocabulary=OUTPUTS, seed=92)
DEVIATIONS = 5.0


class Twins(nn.Module):
    """Two parameters of one shape, a third that nothing uses, a fourth that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(INPUTS, OUTPUTS, bias=False)
        self.right = nn.Linear(INPUTS, OUTPUTS, bias=False)
        self.unused = nn.Linear(INPUTS, OUTPUTS, bias=False)
        self.frozen = nn.Linear(INPUTS, OUTPUTS, bias=False).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x).tanh() + self.frozen(x)


def constant_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.0 * outputs.sum()


def twins(dtype: torch.dtype) -> Twins:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(93)
        return Twins().to(dtype)


def private_run(
    *,
    x: Tensor = X,
    steps: int = 4,
    expected: int = EXAMPLES,
    noise_multiplier: float = 1.0,
    max_grad_norm: float = 1.0,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = constant_loss,
    dtype: torch.dtype = torch.float32,
    on_start: Callable[[dpdl.Private], None] = lambda private: None,
    **execution: object,
) -> Record:
    model = twins(dtype)
    plan = dpdl.PrivacyPlan(
        sample_rate=expected / EXAMPLES,
        expected_batch_size=expected,
        steps=steps,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
    )
    private = dpdl.make_private(
        model,
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        numbered_loader(x.to(dtype), Y, batch_size=expected),
        plan,
        execution=dpdl.Execution(**execution),  # type: ignore[arg-type]
    )
    on_start(private)
    return train(private, loss_fn, steps=steps)


def sums(record: Record, *, expected: int = EXAMPLES) -> Tensor:
    """Each step's released sum, all parameters in a row, [steps, 3 * INPUTS * OUTPUTS], float64."""
    return torch.stack(
        [torch.cat([g.double().flatten() for g in step.values()]) * expected for step in record.released]
    )


def has_std(sample: Tensor, std: float) -> bool:
    """Whether the root mean square is `std`, within five of its own standard deviations."""
    k = sample.numel()
    assert DEVIATIONS * math.sqrt(2 / k) < 0.15, "too few to tell 0.9 and 1.1 apart from 1"
    return abs(float(sample.square().mean()) / std**2 - 1) <= DEVIATIONS * math.sqrt(2 / k)


def assert_has_std(sample: Tensor, std: float) -> None:
    assert has_std(sample, std), f"std is {float(sample.square().mean().sqrt()):.4g}, not {std:.4g}"
    assert not has_std(0.9 * sample, std)
    assert not has_std(1.1 * sample, std)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def independent(a: Tensor, b: Tensor) -> bool:
    return abs(correlation(a, b)) <= DEVIATIONS / math.sqrt(a.numel())


@pytest.mark.parametrize("physical", [None, 7, 1], ids=["whole", "sevens", "ones"])
@pytest.mark.parametrize(("noise_multiplier", "max_grad_norm"), [(1.0, 1.0), (0.5, 3.0), (4.0, 0.1)])
def test_noise_has_the_planned_standard_deviation(
    noise_multiplier: float, max_grad_norm: float, physical: int | None
) -> None:
    record = private_run(
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        max_physical_batch_size=physical,
        insecure_seed=94,
    )
    for step in sums(record):
        assert_has_std(step, noise_multiplier * max_grad_norm)


@pytest.mark.parametrize("engine", ["loop", "vmap", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_noise_is_the_same_size_for_every_engine_and_dtype(engine: str, dtype: torch.dtype) -> None:
    record = private_run(engine=engine, dtype=dtype, insecure_seed=95, noise_multiplier=2.0, steps=2)
    assert all(g.dtype == dtype for step in record.released for g in step.values())
    assert_has_std(sums(record), 2.0)


def test_noise_is_normal() -> None:
    """Kolmogorov-Smirnov, 60,000 draws: a uniform or a normal of 0.9 or 1.1 the scale is rejected."""
    sample = sums(private_run(insecure_seed=96)).flatten().numpy()
    assert scipy.stats.kstest(sample, "norm").pvalue > 1e-4
    for scale in (0.9, 1.1):
        assert scipy.stats.kstest(scale * sample, "norm").pvalue < 1e-6
    uniform = math.sqrt(12) * (scipy.stats.norm.cdf(sample) - 0.5)
    assert scipy.stats.kstest(uniform, "norm").pvalue < 1e-6


@pytest.mark.parametrize("seed", [97, None], ids=["insecure_seed", "secure"])
def test_noise_is_fresh_for_every_step_and_every_parameter(seed: int | None) -> None:
    record = private_run(insecure_seed=seed, loss_fn=reseeding_constant_loss)
    pieces = [g.double().flatten() for step in record.released for g in step.values()]
    assert len(pieces) == 4 * 3
    assert all(independent(a, b) for a, b in itertools.combinations(pieces, 2))
    assert not independent(pieces[0], pieces[0])


def reseeding_constant_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """A user who reseeds torch at every step must not get the same noise at every step."""
    torch.manual_seed(0)
    return constant_loss(outputs, targets)


def test_noise_ignores_torchs_seed_unless_one_is_asked_for() -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(sums(private_run()).flatten())
    assert independent(*runs)
    assert_has_std(runs[0], 1.0)


def test_an_insecure_seed_repeats_a_run_and_another_one_does_not() -> None:
    first, again, other = (sums(private_run(insecure_seed=seed)).flatten() for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert independent(first, other)


@pytest.mark.parametrize("expected", [EXAMPLES, 10], ids=["full", "sampled"])
@pytest.mark.parametrize("physical", [1, 3, 1000])
def test_physical_batch_size_changes_nothing_that_is_released(physical: int, expected: int) -> None:
    """Same draws, same noise, same sum; only the order of additions differs."""
    whole, parts = (
        private_run(
            max_physical_batch_size=size,
            insecure_seed=98,
            loss_fn=F.cross_entropy,
            dtype=torch.float64,
            accumulate_dtype=torch.float64,
            max_grad_norm=0.3,
            expected=expected,
        )
        for size in (None, physical)
    )
    assert [b.tolist() for b in whole.batches] == [b.tolist() for b in parts.batches]
    torch.testing.assert_close(sums(parts), sums(whole), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", ["loop", "vmap", "auto"])
@pytest.mark.parametrize("physical", [None, 4], ids=["whole", "fours"])
def test_mean_and_sum_losses_release_the_same_gradient(engine: str, physical: int | None) -> None:
    mean, total = (
        private_run(
            loss_fn=loss_fn,
            loss_reduction=reduction,
            engine=engine,
            max_physical_batch_size=physical,
            insecure_seed=99,
            max_grad_norm=0.3,
            expected=10,
        )
        for loss_fn, reduction in ((F.cross_entropy, "mean"), (cross_entropy_sum, "sum"))
    )
    # Noise of std 0.3 and a sum of norm up to 10 * 0.3; float32 rounding is 1e-7 of that.
    torch.testing.assert_close(sums(mean, expected=10), sums(total, expected=10), rtol=1e-4, atol=1e-5)


def mean_by_hand(outputs: Tensor, targets: Tensor) -> Tensor:
    """Dividing by the realised batch size makes every example's share depend on how many there are."""
    return cross_entropy_sum(outputs, targets) / max(len(targets), 1)


def test_a_mean_divided_by_hand_releases_what_a_mean_does() -> None:
    by_hand, mean = (
        private_run(loss_fn=loss_fn, insecure_seed=105, max_grad_norm=0.3, expected=10)
        for loss_fn in (mean_by_hand, F.cross_entropy)
    )
    torch.testing.assert_close(sums(by_hand, expected=10), sums(mean, expected=10), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("loss_fn", "declared"),
    [(F.cross_entropy, "sum"), (cross_entropy_sum, "mean"), (mean_by_hand, "sum")],
)
@pytest.mark.parametrize("physical", [None, 4], ids=["whole", "fours"])
def test_a_wrong_declaration_is_refused_before_anything_is_released(
    loss_fn: Callable[[Tensor, Tensor], Tensor], declared: str, physical: int | None
) -> None:
    seen: list[dpdl.Private] = []
    with pytest.raises(LossError):
        private_run(
            loss_fn=loss_fn,
            loss_reduction=declared,
            max_physical_batch_size=physical,
            insecure_seed=106,
            on_start=seen.append,
        )
    assert seen[0].optimizer.epsilon(1e-5) == 0.0
    assert all(p.grad is None for p in seen[0].model.parameters())
    start = twins(torch.float32).state_dict()
    assert all(torch.equal(value, start[key]) for key, value in seen[0].model.state_dict().items())


def test_beneath_the_noise_is_the_clipped_sum_without_the_example_that_is_not_a_number() -> None:
    """Two runs with one seed, one of them on a constant loss: their difference is the clipped sum."""
    x = X.clone()
    x[7] = math.nan
    data, noise = (
        private_run(
            x=x,
            loss_fn=loss_fn,
            insecure_seed=100,
            max_grad_norm=9.0,
            dtype=torch.float64,
            accumulate_dtype=torch.float64,
        )
        for loss_fn in (F.cross_entropy, constant_loss)
    )
    assert all(torch.isfinite(sums(run)).all() for run in (data, noise))
    good = torch.arange(EXAMPLES) != 7
    gradients = one_at_a_time.per_sample_gradients(twins(torch.float64), F.cross_entropy, x[good], Y[good])
    assert 0 < int((one_at_a_time.norms_of(gradients) > 9.0).sum()) < EXAMPLES - 1
    true = one_at_a_time.clipped_sum_of(gradients, 9.0)
    measured = {  # at the first step only: later ones are at other weights
        name: (g - noise.released[0][name]) * EXAMPLES for name, g in data.released[0].items()
    }
    error, name = one_at_a_time.worst_error(measured, true)
    assert error <= 1e-9, (name, error)


def test_an_unused_parameter_gets_noise_and_a_frozen_one_gets_nothing() -> None:
    """Whether a parameter is used may depend on private data, so it cannot be left without noise."""
    record = private_run(insecure_seed=101, loss_fn=F.cross_entropy)
    assert all(set(step) == {"left.weight", "right.weight", "unused.weight"} for step in record.released)
    unused = torch.stack([step["unused.weight"].double() for step in record.released]) * EXAMPLES
    assert_has_std(unused, 1.0)
    frozen = [weights["frozen.weight"] for weights in record.weights]
    assert all(torch.equal(frozen[0], f) for f in frozen)


def test_a_plain_gradient_is_not_applied_by_freezing_its_parameter() -> None:
    """The wrapped optimizer steps on whatever has a gradient, trainable or not."""
    model = twins(torch.float32)
    plan = dpdl.PrivacyPlan(
        sample_rate=1.0, expected_batch_size=EXAMPLES, steps=1, noise_multiplier=1.0, max_grad_norm=1.0
    )
    private = dpdl.make_private(
        model,
        torch.optim.SGD(list(model.parameters()), lr=0.1),
        numbered_loader(X.float(), Y, batch_size=EXAMPLES),
        plan,
    )
    before = model.left.weight.detach().clone()
    for x, y, _ in private.loader:
        F.cross_entropy(private.model(x), y).backward()
        (model.left.weight.grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), [model.left.weight])
        model.left.weight.requires_grad_(False)
        with pytest.raises(StepError, match="left"):
            private.optimizer.step()
        break
    assert torch.equal(model.left.weight, before)


@pytest.mark.parametrize("physical", [None, 2], ids=["whole", "twos"])
@pytest.mark.parametrize(("loss_fn", "reduction"), [(F.cross_entropy, "mean"), (cross_entropy_sum, "sum")])
def test_an_empty_batch_is_a_step_of_pure_noise_and_is_accounted(
    loss_fn: Callable[[Tensor, Tensor], Tensor], reduction: str, physical: int | None
) -> None:
    steps, delta = 30, 1e-5
    optimizers: list[dpdl.PrivateOptimizer] = []
    record = private_run(
        steps=steps,
        expected=1,
        loss_fn=loss_fn,
        loss_reduction=reduction,
        insecure_seed=103,
        max_physical_batch_size=physical,
        on_start=lambda private: optimizers.append(private.optimizer),
    )
    empty = [number for number, rows in enumerate(record.batches) if len(rows) == 0]
    assert 3 <= len(empty) <= 27  # each with probability (1 - 1/40)^40 = 0.36
    for number in empty:
        assert_has_std(sums(record, expected=1)[number], 1.0)
        if number > 0:
            moved = record.weights[number]["left.weight"] - record.weights[number - 1]["left.weight"]
            assert_has_std(moved.double() / 0.1, 1.0)

    spent = optimizers[0].epsilon(delta)
    question = {"noise_multiplier": 1.0, "sample_rate": 1 / EXAMPLES, "delta": delta}
    assert spent == pytest.approx(accountants.epsilon(**question, steps=steps), rel=1e-3)
    assert spent > 1.02 * accountants.epsilon(**question, steps=steps - len(empty))


def test_epsilon_is_zero_before_the_first_step_and_grows_with_each() -> None:
    seen: list[float] = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(optimizers[0].epsilon(1e-5))
        return F.cross_entropy(outputs, targets)

    optimizers: list[dpdl.PrivateOptimizer] = []
    private_run(
        loss_fn=loss_fn,
        insecure_seed=104,
        expected=4,
        on_start=lambda private: optimizers.append(private.optimizer),
    )
    seen.append(optimizers[0].epsilon(1e-5))
    assert seen[0] == 0.0
    assert all(earlier < later for earlier, later in itertools.pairwise(seen))
