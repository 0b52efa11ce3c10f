"""The server's rules against the papers' formulas in plain floats, and what they keep."""

import math
from collections.abc import Callable

import pytest
import torch

from dpdl.errors import CheckpointError, ParameterError
from dpdl.federated.server_optimizers import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, ServerOptimizer

UPDATES = [[0.5, -2.0, 0.0], [0.1, 1.0, 1e-9], [-0.7, 0.3, 2.0], [0.0, 0.0, 0.0]]
LR, BETA1, BETA2, TAU = 0.3, 0.8, 0.95, 0.01


def play(optimizer: ServerOptimizer, updates: list[list[float]] = UPDATES) -> list[float]:
    state = {"w": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), "n": torch.tensor(4)}
    for delta in updates:
        state = optimizer.step(state, {"w": torch.tensor(delta, dtype=torch.float64)})
    assert state["n"] == 4
    return state["w"].tolist()  # type: ignore[no-any-return]


def adaptive(second: Callable[[float, float], float]) -> list[float]:
    """Reddi et al. 2021, Algorithm 2, a coordinate at a time."""
    result = []
    for coordinate, x in enumerate([1.0, 2.0, 3.0]):
        m, v = 0.0, TAU**2
        for delta in (update[coordinate] for update in UPDATES):
            m = BETA1 * m + (1 - BETA1) * delta
            v = second(v, delta**2)
            x += LR * m / (math.sqrt(v) + TAU)
        result.append(x)
    return result


def sign(x: float) -> float:
    return (x > 0) - (x < 0)


def test_fedavg_adds_the_mean_update() -> None:
    expected = [x + LR * sum(column) for x, column in zip([1, 2, 3], zip(*UPDATES, strict=True), strict=True)]
    assert play(FedAvg(LR)) == pytest.approx(expected)


def test_fedavgm_adds_its_velocity() -> None:
    expected = []
    for x, column in zip([1.0, 2.0, 3.0], zip(*UPDATES, strict=True), strict=True):
        velocity = 0.0
        for delta in column:
            velocity = 0.9 * velocity + delta
            x += LR * velocity
        expected.append(x)
    assert play(FedAvgM(LR, 0.9)) == pytest.approx(expected)
    assert play(FedAvgM(LR, 0.0)) == pytest.approx(play(FedAvg(LR)))


@pytest.mark.parametrize(
    ("kind", "second"),
    [
        (FedAdagrad, lambda v, square: v + square),
        (FedAdam, lambda v, square: BETA2 * v + (1 - BETA2) * square),
        (FedYogi, lambda v, square: v - (1 - BETA2) * square * sign(v - square)),
    ],
)
def test_adaptive_rules_are_the_papers(kind: type, second: Callable[[float, float], float]) -> None:
    assert play(kind(LR, betas=(BETA1, BETA2), tau=TAU)) == pytest.approx(adaptive(second), rel=1e-12)


ALL = [lambda: FedAvg(LR), lambda: FedAvgM(LR), lambda: FedAdagrad(LR), lambda: FedAdam(LR), lambda: FedYogi(LR)]


@pytest.mark.parametrize("make", ALL)
def test_half_way_saved_goes_on_as_if_it_had_not_been(make: Callable[[], ServerOptimizer]) -> None:
    whole = play(make())
    first, second = make(), make()
    state = {"w": torch.tensor(play(first, UPDATES[:2]), dtype=torch.float64)}
    saved = first.state_dict()
    second.refuse_unfit(saved, state)
    second.load_state_dict(saved)
    for delta in UPDATES[2:]:
        state = second.step(state, {"w": torch.tensor(delta, dtype=torch.float64)})
    assert state["w"].tolist() == whole


@pytest.mark.parametrize("make", ALL)
def test_a_step_changes_no_tensor_in_place_and_no_dtype(make: Callable[[], ServerOptimizer]) -> None:
    state = {"w": torch.zeros(2, dtype=torch.float16), "v": torch.zeros(1)}
    delta = {"w": torch.ones(2, dtype=torch.float64), "v": torch.ones(1, dtype=torch.float64)}
    new = make().step(state, delta)
    assert state["w"].tolist() == [0, 0]
    assert delta["w"].tolist() == [1, 1]
    assert (new["w"].dtype, new["v"].dtype) == (torch.float16, torch.float32)
    assert new["w"][0] > 0


def test_a_state_that_does_not_fit_is_refused() -> None:
    like = {"w": torch.zeros(3)}
    saved = FedAdam().state_dict()
    for bad in (
        None,
        {},
        FedYogi().state_dict(),
        {**saved, "slots": {}},
        {**saved, "slots": {"first": 1, "second": 2}},
    ):
        with pytest.raises(CheckpointError):
            FedAdam().refuse_unfit(bad, like)
    trained = FedAdam()
    play(trained)
    with pytest.raises(CheckpointError, match="do not fit"):
        FedAdam().refuse_unfit(trained.state_dict(), {"w": torch.zeros(4)})


@pytest.mark.parametrize(
    "make",
    [
        lambda: FedAvg(0.0),
        lambda: FedAvg(math.nan),
        lambda: FedAvgM(1.0, 1.0),
        lambda: FedAvgM(1.0, -0.1),
        lambda: FedAdam(1.0, betas=(0.9,)),  # type: ignore[arg-type]
        lambda: FedAdam(1.0, betas=(0.9, 1.0)),
        lambda: FedYogi(1.0, tau=0.0),
        lambda: FedAdagrad(math.inf),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ParameterError):
        make()
