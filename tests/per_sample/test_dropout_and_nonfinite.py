"""Random masks in training mode, and examples whose gradient is not a number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpdl
from tests.oracles import one_at_a_time as oracle
from tests.per_sample.case import ENGINES, N, normal
from tests.per_sample.small_models import BY_NAME

pytestmark = pytest.mark.parametrize("engine", ENGINES)

NOT_FINITE = (float("nan"), float("inf"), -float("inf"))
P = 0.5
FEATURES = 400  # two examples agree in a whole mask with probability 2^-400


class Masked(nn.Module):
    """sum_i w_i dropout(x)_i: the gradient of an example is its own dropped-out input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(FEATURES, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, P, self.training) @ self.weight


def total(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs * targets).sum()


def test_each_example_has_a_dropout_mask_of_its_own(engine: str) -> None:
    torch.manual_seed(71)
    x, ones = normal(N, FEATURES, seed=71), torch.ones(N, dtype=torch.float64)
    rows = dpdl.per_sample_gradients(Masked(), total, x, ones, engine=engine, loss_reduction="sum")["weight"]
    kept = rows != 0
    torch.testing.assert_close(rows, torch.where(kept, x / (1 - P), 0.0), rtol=1e-12, atol=0.0)
    assert len({tuple(mask.tolist()) for mask in kept}) == N
    # 2,000 coin flips have standard deviation 22.4; five of them on either side.
    assert abs(int(kept.sum()) - N * FEATURES * P) <= 5 * (N * FEATURES * P * (1 - P)) ** 0.5


def test_dropout_follows_torchs_own_seed(engine: str) -> None:
    x, ones = normal(N, FEATURES, seed=71), torch.ones(N, dtype=torch.float64)

    def rows(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return dpdl.per_sample_gradients(Masked(), total, x, ones, engine=engine, loss_reduction="sum")["weight"]

    assert torch.equal(rows(1), rows(1))
    assert not torch.equal(rows(1), rows(2))


def test_norm_and_clipped_gradient_belong_to_the_same_dropout_mask(engine: str) -> None:
    """Another mask in the second pass would release a gradient longer than the limit.

    Example n has features of its own, so that its clipped gradient can be read off the sum.
    """
    per_example = FEATURES // N
    x = torch.zeros(N, N, per_example, dtype=torch.float64)
    x[torch.arange(N), torch.arange(N)] = normal(N, per_example, seed=72).abs() + 1.0
    ones = torch.ones(N, dtype=torch.float64)
    for seed in range(5):
        torch.manual_seed(seed)
        summed = dpdl.clipped_sum(
            Masked(), total, x.flatten(1), ones, engine=engine, loss_reduction="sum", max_grad_norm=0.1
        )["weight"]
        norms = summed.view(N, per_example).norm(dim=1)
        torch.testing.assert_close(norms, torch.full_like(norms, 0.1), rtol=1e-9, atol=0.0)


def test_dropout_is_off_in_eval_mode(engine: str) -> None:
    x, ones = normal(N, FEATURES, seed=71), torch.ones(N, dtype=torch.float64)
    rows = dpdl.per_sample_gradients(Masked().eval(), total, x, ones, engine=engine, loss_reduction="sum")
    torch.testing.assert_close(rows["weight"], x, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("mlp_tanh", "tanh_cnn") for value in NOT_FINITE),
        *((name, value) for name in ("linear_mse_sum", "language_model_tied") for value in (*NOT_FINITE, 1e308)),
    ],
)
def test_a_non_finite_example_weighs_nothing_and_harms_nobody(engine: str, name: str, value: float) -> None:
    case = BY_NAME[name]
    bad, good = 2, [0, 1, 3, 4]
    if name == "language_model_tied":  # tokens are integers: spoil the loss instead
        inputs, targets = case.batch()
        spoil = torch.zeros(N, 1, 1, dtype=torch.float64)
        spoil[bad] = value

        class Spoiled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = case.module()

            def forward(self, words: Tensor, spoiler: Tensor) -> Tensor:
                return self.inner(words) * (1.0 + spoiler)

        model: nn.Module = Spoiled()
        inputs = (inputs, spoil)
    else:
        model = case.module()
        inputs, targets = case.batch()
        inputs[bad] = value  # type: ignore[index]
    true = oracle.per_sample_gradients(model, case.loss_fn, inputs, targets)
    assert not torch.isfinite(oracle.norms_of(true)[bad])
    max_grad_norm = float(oracle.norms_of({n: g[good] for n, g in true.items()}).median())
    expected = oracle.clipped_sum_of({n: g[good] for n, g in true.items()}, max_grad_norm)
    measured = dpdl.clipped_sum(
        model,
        case.loss_fn,
        inputs,
        targets,
        engine=engine,
        loss_reduction=case.loss_reduction,
        max_grad_norm=max_grad_norm,
    )
    error, parameter = oracle.worst_error(measured, expected)
    assert error <= 1e-9, (parameter, error)

    norms = dpdl.per_sample_norms(
        model, case.loss_fn, inputs, targets, engine=engine, loss_reduction=case.loss_reduction
    )
    assert not torch.isfinite(norms[bad])
    assert torch.isfinite(norms[good]).all()


def test_a_batch_of_nothing_but_nan_sums_to_zero(engine: str) -> None:
    case = BY_NAME["mlp_tanh"]
    inputs, targets = case.batch()
    summed = dpdl.clipped_sum(
        case.module(), case.loss_fn, inputs * float("nan"), targets, engine=engine, max_grad_norm=1.0
    )
    assert all(not t.any() for t in summed.values())


def test_clipping_keeps_huge_and_tiny_gradients_in_proportion(engine: str) -> None:
    """Norms that overflow when squared in float32, or underflow, are still clipped, not dropped or kept."""
    x = torch.tensor([[1e25, 0.0, 0.0], [0.0, 1e-25, 0.0], [0.0, 0.0, 1.0]])
    summed = dpdl.clipped_sum(
        nn.Linear(3, 1, bias=False),
        lambda o, y: (o * y).sum(),
        x,
        torch.ones(3, 1),
        engine=engine,
        loss_reduction="sum",
        max_grad_norm=0.5,
    )["weight"].flatten()
    torch.testing.assert_close(summed[1:], torch.tensor([1e-25, 0.5]).to(summed.dtype), rtol=1e-5, atol=0.0)
    # A norm of 1e25 is finite: either clipped to the limit, or, where its square overflows, left out.
    assert float(summed[0]) == pytest.approx(0.5, rel=1e-5) or float(summed[0]) == 0.0


def test_choosing_the_engine_draws_nothing_from_torchs_generator(engine: str) -> None:
    """Otherwise the first batch of a run would have other masks than the same batch in a run under way."""
    model = Masked()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    data = TensorDataset(normal(4, FEATURES, seed=7), torch.ones(4, dtype=torch.float64))
    plan = dpdl.PrivacyPlan(
        sample_rate=1.0, expected_batch_size=4, steps=2, noise_multiplier=1.0, max_grad_norm=1.0, dataset_size=4
    )
    execution = dpdl.Execution(engine=engine, loss_reduction="sum")  # type: ignore[arg-type]
    private = dpdl.make_private(model, optimizer, DataLoader(data, batch_size=4), plan, execution=execution)
    outputs = []
    for _ in range(2):
        for x, ones in private.loader:
            torch.manual_seed(3)
            outputs.append(private.model(x))
            total(outputs[-1], ones).backward()
            private.optimizer.step()
    first, second = outputs
    assert torch.equal(first, second)
