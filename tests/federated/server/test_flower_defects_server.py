"""Defects found in the server-side differential privacy of Flower 1.41 (F1 to F10), as tests that ours passes.

Each test says what was found there. Flower is not needed to run them.
"""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from accountants import PoissonSampled
from dpdl.federated.adaptive_clipping import AdaptiveClipping
from dpdl.federated.client_level_plan import ClientLevelPlan
from dpdl.federated.client_sampling import FixedSizeClients
from dpdl.federated.server_optimizers import FedAdam, FedAvgM
from tests.federated.server.small_federation import names, norm_of, plan, reply, server, std_is, update, zeros

DELTA = 1e-5


def adapted(start: float, rounds: int) -> list[float]:
    """Clipping norms of rounds in which 40 clients' norms are uniform on [0.5, 1.5], at the quantile 0.5."""
    adaptive = AdaptiveClipping(quantile=0.5, learning_rate=0.5, bit_noise_multiplier=2.0)
    ours = server(
        state={"w": torch.zeros(1)},
        plan=plan(clients=40, rounds=rounds, max_update_norm=start, adaptive_clipping=adaptive),
    )
    seen = []
    for number in range(1, rounds + 1):
        ours.open_round(names(40))
        sizes = zip(names(40), np.linspace(0.5, 1.5, 40), strict=True)
        summary = ours.close_round(
            [reply(name, {"w": torch.tensor([float(size)])}, round=number) for name, size in sizes]
        )
        seen.append(summary.next_max_update_norm)
    return seen


@pytest.mark.parametrize("start", [0.1, 1.1])
def test_f1_adaptive_clipping_comes_to_its_quantile_and_does_not_run_away(start: float) -> None:
    """There C is multiplied by exp(-lr (clipped fraction - quantile)): 0.1 fell to 0.0002, 1.1 rose to 280."""
    assert adapted(start, 60)[-1] == pytest.approx(1.0, abs=0.2)
    assert adapted(0.1, 1)[0] > 0.1  # all were clipped: it must grow
    assert adapted(30.0, 1)[0] < 30.0  # none was: it must fall


def test_f2_the_noise_is_of_the_norm_that_clipped() -> None:
    """There the noise was computed with the norm after its update: up to 10 % too little."""
    large = {"w": torch.zeros(20_000)}
    adaptive = AdaptiveClipping(learning_rate=3.0, bit_noise_multiplier=100.0)
    ours = server(state=large, plan=plan(noise_multiplier=2.0, max_update_norm=0.7, adaptive_clipping=adaptive))
    ours.open_round(names(10))
    summary = ours.close_round([reply(name, large) for name in names(10)])
    assert summary.max_update_norm == 0.7
    assert not 0.63 < summary.next_max_update_norm < 0.77
    z_delta = (2.0**-2 - (2 * 100.0) ** -2) ** -0.5
    noise = ours.state["w"] * 10
    assert std_is(z_delta * 0.7, noise)
    assert not std_is(0.9 * z_delta * 0.7, noise)
    assert not std_is(1.1 * z_delta * 0.7, noise)


def test_f3_a_client_with_most_of_the_examples_moves_the_sum_by_no_more_than_the_noise_is_for() -> None:
    """There one client with 991 of 1,000 examples had an effective noise multiplier of 0.108 for a claimed 1.0."""
    for weights in ([991.0] + [1.0] * 9, [1.0] * 10):
        moved = []
        for replying in (names(10), names(10)[1:]):
            ours = server(plan=plan(max_update_norm=0.5, noise_multiplier=0.0))
            ours.open_round(names(10))
            ours.close_round(
                [reply(name, update(9.0, seed=i), weight=weights[int(name[-1])]) for i, name in enumerate(replying)]
            )
            moved.append(ours.state)
        both = server(plan=plan(max_update_norm=0.5, noise_multiplier=1.0))
        both.open_round(names(10))
        std = both.close_round().noise_std
        # The whole sum, in which one client is there or not, in units of the noise: 1 / z at most.
        effective = std / 10 / max(norm_of(state) / 10 for state in (update(0.5), update(0.5)))
        assert effective >= 1.0 - 1e-6
        heavy = server(plan=plan(max_update_norm=0.5))
        heavy.open_round(names(10))
        heavy.close_round([reply("client-0", update(9.0), weight=weights[0])])
        assert norm_of(heavy.state) * 10 <= std * (1 + 1e-6)


def test_f4_tensors_without_dimensions_are_clipped_and_noised() -> None:
    """There they were neither: 2.0 stayed 2.0 under a norm of 1, and under noise of 100."""
    state = {"scale": torch.zeros(()), "w": torch.zeros(2)}
    ours = server(state=state, plan=plan())
    ours.open_round(names(10))
    ours.close_round([reply("client-0", {"scale": torch.tensor(2.0), "w": torch.zeros(2)})])
    assert float(ours.state["scale"]) == pytest.approx(0.1)
    drawn = []
    for seed in range(300):
        ours = server(state=state, plan=plan(noise_multiplier=100.0), seed=seed)
        ours.open_round(names(10))
        ours.close_round()
        drawn.append(float(ours.state["scale"]))
    assert std_is(100.0 / 10, torch.tensor(drawn))


def test_f5_whole_numbers_are_not_averaged_and_do_not_use_up_the_norm() -> None:
    """There noise on them was cut to 0, and a counter of batches shrank an update of norm 0.5 to 0.0125."""
    state = {**zeros(), "norm.num_batches_tracked": torch.tensor(1000)}
    ours = server(state=state, plan=plan(noise_multiplier=0.0))
    assert ours.excluded == ("norm.num_batches_tracked",)
    change = update(0.5)
    ours.open_round(names(10))
    summary = ours.close_round([reply("client-0", {**change, "norm.num_batches_tracked": torch.tensor(40)})])
    assert norm_of({name: ours.state[name] for name in zeros()}) * 10 == pytest.approx(0.5, rel=1e-5)
    assert int(ours.state["norm.num_batches_tracked"]) == 1000
    assert (summary.private.clipped, summary.private.excluded_tensors) == (0, 1)


def test_f6_a_zero_update_is_one_and_nan_counts_as_zero() -> None:
    """There a zero update ended the round with ZeroDivisionError, and NaN passed unclipped."""
    ours = server(plan=plan())
    ours.open_round(names(10))
    poisoned = {**zeros(), "bias": torch.tensor([math.nan, 1.0])}
    summary = ours.close_round(
        [reply("client-0", zeros()), reply("client-1", poisoned), reply("client-2", update(1.0))]
    )
    assert summary.private.counts == {"accepted": 2, "not finite": 1, "lost": 7}
    assert norm_of(ours.state) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("answering", [10, 7, 1])
def test_f7_dropouts_change_neither_the_noise_nor_what_one_client_can_do(answering: int) -> None:
    """There fewer replies were a warning, and the mean over fewer clients had a larger sensitivity."""
    large = {"w": torch.zeros(20_000)}
    ours = server(state=large, plan=plan(noise_multiplier=1.0, max_update_norm=0.5))
    ours.open_round(names(10))
    summary = ours.close_round([reply(name, large) for name in names(answering)])
    assert std_is(0.05, ours.state["w"])
    assert (summary.noise_std, summary.denominator) == (0.5, 10)
    alone = server(plan=plan(max_update_norm=0.5))
    alone.open_round(names(10))
    alone.close_round([reply("client-0", update(9.0))])
    assert norm_of(alone.state) == pytest.approx(0.05, rel=1e-5)  # a tenth of the norm, whoever else replies


def test_f9_randomness_is_nobody_elses_and_metrics_go_nowhere() -> None:
    """There cohorts came of random.sample and noise of numpy's global generator, and metrics were passed on bare."""
    chosen, states = set(), set()
    for _ in range(8):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
        ours = server(plan=plan(cohort=5, noise_multiplier=1.0), seed=None)
        picked = ours.open_round(names(10))
        summary = ours.close_round([reply(picked[0], update(1.0), metrics={"loss": 0.123456})])
        chosen.add(picked)
        states.add(float(ours.state["bias"][0]))
        assert "0.123456" not in f"{summary}{summary.to_publish()}{ours.state_dict()}"
    assert len(chosen) > 1
    assert len(states) == 8


@pytest.mark.parametrize(
    ("changes", "optimizer"),
    [
        ({}, None),
        ({}, FedAdam()),
        ({}, FedAvgM()),
        ({"adaptive_clipping": AdaptiveClipping()}, None),
    ],
)
def test_f10_amplification_adaptive_clipping_and_other_optimizers_are_accounted(
    changes: dict[str, Any], optimizer: Any
) -> None:
    """There a claim needs no amplification and plain FedAvg: 96.1 where Poisson sampling would claim 1.21 (RDP)."""
    its_plan = ClientLevelPlan(
        clients=1000, sample_rate=0.01, rounds=100, noise_multiplier=1.0, max_update_norm=1.0, **changes
    )
    ours = server(plan=its_plan, optimizer=optimizer)
    for _ in range(100):
        ours.open_round(names(1000))
        ours.close_round()
    assert [(type(entry.event), entry.count) for entry in ours.ledger.entries] == [(PoissonSampled, 100)]
    assert 0.7 < ours.epsilon(DELTA) < 1.21


def test_f10_a_cohort_of_fixed_size_is_accounted_or_says_why_it_is_not_amplified() -> None:
    settings = {"clients": 1000, "rounds": 100, "noise_multiplier": 1.0, "max_update_norm": 1.0, "cohort": 10}
    bare = ClientLevelPlan(**settings, sampling="fixed_size")  # type: ignore[arg-type]
    amplified = ClientLevelPlan(**settings, sampling="fixed_size", relation="zero_out")  # type: ignore[arg-type]
    assert bare.client_sampling == FixedSizeClients(10)
    assert "keeps another one out" in str(bare)
    assert amplified.epsilon(DELTA) < 10 < 90 < bare.epsilon(DELTA)
