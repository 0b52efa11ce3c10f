"""NoPeek in a split run: the gradient it adds is that of the whole loss, it keeps its name, and refuses privacy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpdl
from dpdl.audit import distance_correlation
from dpdl.claims import NO_GUARANTEE
from dpdl.errors import ParameterError
from dpdl.split.nopeek import HEURISTIC, NoPeek, NoPeekOutlet
from dpdl.split.outlet import Leaving
from dpdl.split.session import SplitRun
from dpdl.split.topologies import multi_task, vanilla

N = 24
X = torch.randn(N, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = (X[:, 0, 0, 0] > 0).long()


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum")


def modules() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.Tanh()).double(), nn.Linear(4, 2).double()


def plan_of(*, steps: int, rate: float = 1.0, **changes: Any) -> dpdl.PrivacyPlan:
    settings = {"noise_multiplier": 0.0, "max_grad_norm": 1e6, **changes}
    return dpdl.PrivacyPlan(sample_rate=rate, expected_batch_size=rate * N, steps=steps, dataset_size=N, **settings)


def trained(
    alpha: float, steps: int = 5, rate: float = 1.0, lr: float = 0.5
) -> tuple[nn.Module, nn.Module, NoPeekOutlet, SplitRun]:
    bottom, top = modules()
    plan = plan_of(steps=steps, rate=rate)
    outlet = NoPeekOutlet(NoPeek(alpha=alpha), inputs=lambda numbers: X[numbers], plan=plan)
    optimizers = {
        "client": torch.optim.SGD(bottom.parameters(), lr=lr),
        "server": torch.optim.SGD(top.parameters(), lr=lr),
    }
    execution = dpdl.Execution(accumulate_dtype=torch.float64)
    run = SplitRun(vanilla(bottom, top, loss), optimizers, {"x": X, "y": Y}, plan, release=outlet, execution=execution)
    run.run()
    return bottom, top, outlet, run


@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
def test_full_batches_train_as_the_whole_network_does_on_loss_plus_penalty(alpha: float) -> None:
    bottom, top, outlet, _ = trained(alpha)
    expected_bottom, expected_top = (copy.deepcopy(module) for module in modules())
    whole = nn.Sequential(expected_bottom, expected_top)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.5)
    measured = []
    for _ in range(5):
        optimizer.zero_grad()
        z = expected_bottom(X)
        correlation = distance_correlation(X, z)
        measured.append(float(correlation.detach()))
        (loss(expected_top(z), Y) / N + alpha * correlation).backward()
        optimizer.step()
    for mine, theirs in zip([*bottom.parameters(), *top.parameters()], whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)
    assert outlet.correlations == pytest.approx(measured, abs=1e-12)


def test_with_two_label_holders_the_penalty_is_there_once() -> None:
    bottom, top = modules()
    tops = {"north": top, "south": copy.deepcopy(top)}
    whole = copy.deepcopy(bottom)
    plan = plan_of(steps=1)
    graph = multi_task(bottom, tops, dict.fromkeys(tops, loss))
    optimizers = {"client": torch.optim.SGD(bottom.parameters(), lr=1.0)}
    optimizers |= {party: torch.optim.SGD(module.parameters(), lr=0.0) for party, module in tops.items()}
    outlet = NoPeekOutlet(NoPeek(alpha=2.0), inputs=lambda numbers: X[numbers], plan=plan)
    execution = dpdl.Execution(accumulate_dtype=torch.float64)
    data = {"x": X, "y of north": Y, "y of south": Y}
    SplitRun(graph, optimizers, data, plan, driver="client", release={"client": outlet}, execution=execution).run()
    z = whole(X)
    (2 * loss(top(z), Y) / N + 2.0 * distance_correlation(X, z)).backward()
    for mine, before in zip(bottom.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, before - before.grad, atol=1e-12, rtol=0)


def test_it_brings_the_distance_correlation_down() -> None:
    *_, without, _ = trained(0.0, steps=60)
    *_, outlet, _ = trained(3.0, steps=60)
    assert outlet.correlations[0] == pytest.approx(without.correlations[0], abs=1e-12)
    assert outlet.correlations[-1] < without.correlations[-1] - 0.1


def test_batches_of_fewer_than_four_rows_pass_without_it() -> None:
    _, _, outlet, run = trained(1.0, steps=40, rate=0.1)
    assert 0 < len(outlet.correlations) < run.steps_taken == 40
    three = torch.ones(3, 4, requires_grad=True)
    assert NoPeek(alpha=1.0).loss(torch.ones(3, 9), three) == 0


def test_the_penalty_stops_where_nothing_is_left() -> None:
    """Independent rows whose unbiased distance correlation is below zero: no reward for going further."""
    seeds = (torch.Generator().manual_seed(seed) for seed in range(50))
    pairs = [(torch.randn(16, 30, generator=g), torch.randn(16, 5, generator=g)) for g in seeds]
    x, z = next(pair for pair in pairs if distance_correlation(*pair) < -0.02)
    rows = z.clone().requires_grad_()
    NoPeek(alpha=2.0).loss(x, rows).backward()
    assert rows.grad is not None
    assert not rows.grad.any()
    outlet = NoPeekOutlet(NoPeek(alpha=2.0), inputs=lambda numbers: x[numbers], plan=plan_of(steps=1))
    departed = outlet(leaving(z, torch.arange(16)))
    assert departed.pull_back is not None
    assert not departed.pull_back(torch.zeros(16, 5)).any()


def leaving(rows: Tensor, numbers: Tensor | None, **changes: Any) -> Leaving:
    settings: dict[str, Any] = {
        "content": "activations",
        "name": "bottom",
        "sender": "client",
        "receivers": ("server",),
        "purpose": "train",
        "step": 0,
        "session": "s",
        **changes,
    }
    return Leaving(rows=rows, row_numbers=numbers, **settings)


@pytest.mark.parametrize(
    "change", [{"content": "labels"}, {"content": "gradients"}, {"purpose": "infer"}, {"sender": "server"}]
)
def test_everything_else_leaves_as_it_is(change: dict[str, Any]) -> None:
    outlet = NoPeekOutlet(NoPeek(alpha=1.0), inputs=lambda numbers: X[numbers], plan=plan_of(steps=1))
    rows = torch.ones(5, 4)
    departed = outlet(leaving(rows, torch.arange(5), **change))
    assert departed.rows is rows
    assert departed.pull_back is None
    assert outlet.correlations == []


def test_whatever_prints_says_heuristic_and_no_formal_guarantee() -> None:
    assert HEURISTIC == "A heuristic: no formal guarantee."
    *_, outlet, run = trained(1.0)
    unused = NoPeekOutlet(NoPeek(alpha=1.0), inputs=lambda numbers: X[numbers], plan=plan_of(steps=1))
    for printed in (str(NoPeek(alpha=1.0)), str(outlet), str(unused)):
        assert HEURISTIC in printed
    assert f"{sum(outlet.correlations) / 5:.2f} in the first batches" in str(outlet)
    assert all(not claim.guaranteed for claim in run.report(delta=1e-5).claims)
    assert NO_GUARANTEE in str(run.report(delta=1e-5))


def test_a_plan_with_noise_is_refused_since_rows_meet_in_the_penalty() -> None:
    with pytest.raises(ParameterError, match="compares the rows of a batch"):
        NoPeekOutlet(
            NoPeek(alpha=1.0),
            inputs=lambda numbers: X[numbers],
            plan=plan_of(steps=1, noise_multiplier=1.0, max_grad_norm=1.0),
        )


def test_what_does_not_fit_is_refused() -> None:
    for alpha in (-1.0, float("nan"), float("inf"), True, "1"):
        with pytest.raises(ParameterError, match="alpha of NoPeek"):
            NoPeek(alpha=alpha)  # type: ignore[arg-type]
    outlet = NoPeekOutlet(NoPeek(alpha=1.0), inputs=lambda numbers: X[:3], plan=plan_of(steps=1))
    with pytest.raises(ParameterError, match="does not know which rows"):
        outlet(leaving(torch.ones(5, 4), None))
    with pytest.raises(ParameterError, match="returned 3 rows for 5 row numbers"):
        outlet(leaving(torch.ones(5, 4), torch.arange(5)))


def test_a_party_refuses_it_under_a_plan_with_noise_whatever_plan_it_was_made_for() -> None:
    bottom, top = modules()
    outlet = NoPeekOutlet(NoPeek(alpha=1.0), inputs=lambda numbers: X[numbers], plan=plan_of(steps=1))
    optimizers = {
        "client": torch.optim.SGD(bottom.parameters(), lr=0.1),
        "server": torch.optim.SGD(top.parameters(), lr=0.1),
    }
    noisy = plan_of(steps=1, noise_multiplier=1.0, max_grad_norm=1.0)
    with pytest.raises(ParameterError, match=r"'client' compares the rows of a batch \(NoPeekOutlet\)"):
        SplitRun(vanilla(bottom, top, loss), optimizers, {"x": X, "y": Y}, noisy, release={"client": outlet})
