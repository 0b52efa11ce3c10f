"""The watchdog: bounds, not estimates; a budget that holds; batches that it did not draw."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from accountants import Gaussian, NeighboringRelation, PRVAccountant, SampledWithoutReplacement
from dpdl.compat.deepee import PrivacyWatchdog, PrivacyWrapper, UniformDataLoader
from dpdl.compat.deepee.dataloader import UniformWORSubsampler
from dpdl.compat.deepee.watchdog import PrivacyBudgetExhausted
from dpdl.errors import ParameterError
from tests.compat.deepee.training import dataset, network, release

N, B, DELTA = 64, 4, 1e-3


def bound(event: object, count: int) -> float:
    accountant = PRVAccountant(relation=NeighboringRelation.REPLACE_ONE)
    return accountant.compose(event * count).epsilon(DELTA)  # type: ignore[operator]


DRAWN = SampledWithoutReplacement(B, N, Gaussian(2.0))


def run(
    steps: int,
    *,
    loader: DataLoader[tuple[torch.Tensor, ...]] | None = None,
    epsilon: float = 8.0,
    abort: bool = False,
    save: bool = False,
    path: Path | None = None,
    report: int = 100,
) -> PrivacyWrapper:
    loader = loader or UniformDataLoader(dataset(N), B)
    watchdog = PrivacyWatchdog(loader, epsilon, DELTA, report_every_n_steps=report, abort=abort, save=save, path=path)
    model = PrivacyWrapper(network(), B, 1.0, 2.0, watchdog=watchdog)
    optimizer = torch.optim.SGD(model.wrapped_model.parameters(), lr=0.1)
    while model._steps_taken < steps:
        for x, y in loader:
            release(model, x, y)
            optimizer.step()
            model.prepare_next_batch()
            if model._steps_taken == steps:
                break
    return model


def train_on(model: PrivacyWrapper, loader: UniformDataLoader) -> None:
    """A pass over the loader."""
    for x, y in loader:
        release(model, x, y)
        model.prepare_next_batch()


# ── what is reported ────────────────────────────────────────────────────────────────────────────────


def test_epsilon_is_the_certified_bound_of_the_draws_that_happened() -> None:
    model = run(20)
    assert model.current_epsilon == bound(DRAWN, 20)
    assert [entry.event for entry in model.ledger.entries] == [DRAWN]


def test_the_limit_of_no_noise_and_of_no_step() -> None:
    loader = UniformDataLoader(dataset(N), B)
    model = PrivacyWrapper(network(), B, 1.0, 2.0, watchdog=PrivacyWatchdog(loader, 1.0, DELTA))
    assert model.current_epsilon == 0.0
    silent = PrivacyWrapper(network(), B, 1.0, 0.0, watchdog=PrivacyWatchdog(loader, 1.0, DELTA, fallback_to_rdp=True))
    release(silent, *next(iter(loader)))
    assert silent.current_epsilon == float("inf")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_loader_over_the_sampler_counts_as_drawn(workers: int) -> None:
    loader = DataLoader(dataset(N), batch_sampler=UniformWORSubsampler(dataset(N), B), num_workers=workers)
    model = run(2 * N // B, loader=loader)
    assert model.current_epsilon == bound(DRAWN, 2 * N // B)


def test_batches_from_elsewhere_claim_no_amplification(caplog: pytest.LogCaptureFixture) -> None:
    model = run(3)
    for _ in range(2):
        release(model, *dataset(N)[:B])
        model.prepare_next_batch()
    assert [(entry.event, entry.count) for entry in model.ledger.entries] == [(DRAWN, 3), (Gaussian(2.0), 2)]
    assert model.current_epsilon > bound(Gaussian(2.0), 2) > bound(DRAWN, 5)
    assert sum("did not come from the watched loader" in record.message for record in caplog.records) == 1


def test_another_loader_claims_no_amplification_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = run(3, loader=DataLoader(dataset(N), batch_size=B, shuffle=True))
    assert [record.levelname for record in caplog.records if "without replacement" in record.message] == ["CRITICAL"]
    assert model.current_epsilon == bound(Gaussian(2.0), 3)


def test_a_loader_of_another_batch_size_buys_nothing() -> None:  # D11
    loader = UniformDataLoader(dataset(N), 2 * B)
    model = PrivacyWrapper(network(), B, 1.0, 2.0, watchdog=PrivacyWatchdog(loader, 1.0, DELTA))
    x, y = next(iter(loader))
    with pytest.raises(ParameterError, match="batch size"):
        model(x)
    release(model, x[:B], y[:B])
    assert model.ledger.entries[0].event == Gaussian(2.0)


def test_the_ledger_has_the_noise_that_was_added_when_settings_change() -> None:
    loader = UniformDataLoader(dataset(N), B)
    model = PrivacyWrapper(network(), B, 1.0, 2.0, watchdog=PrivacyWatchdog(loader, 8.0, DELTA))
    for sigma, (x, y) in zip((2.0, 4.0), loader, strict=False):
        model.noise_multiplier = sigma
        release(model, x, y)
        model.prepare_next_batch()
    assert [entry.event for entry in model.ledger.entries] == [DRAWN, SampledWithoutReplacement(B, N, Gaussian(4.0))]


def test_reports_come_as_often_as_asked_and_never_below_the_bound(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dpdl.compat.deepee")
    run(6, report=3)
    lines = [record.message for record in caplog.records if "Privacy spent" in record.message]
    assert [line.split(":")[0] for line in lines] == ["Privacy spent at 3 steps", "Privacy spent at 6 steps"]
    assert all(0 <= float(line.split()[-1]) - bound(DRAWN, k) < 0.01 for line, k in zip(lines, (3, 6), strict=True))


def test_without_a_watchdog_there_is_no_epsilon_but_a_ledger() -> None:
    model = PrivacyWrapper(network(), B, 1.0, 2.0)
    with pytest.raises(ValueError, match="PrivacyWatchdog must be attached"):
        _ = model.current_epsilon
    release(model, *dataset(N)[:B])
    assert model.ledger.epsilon(DELTA) == bound(Gaussian(2.0), 1)


def test_the_epsilon_is_returned_if_asked_for() -> None:
    loader = UniformDataLoader(dataset(N), B)
    model = PrivacyWrapper(network(), B, 1.0, 2.0, watchdog=PrivacyWatchdog(loader, 8.0, DELTA))
    returned = []
    for asked, (x, y) in zip((True, False), loader, strict=False):
        release(model, x, y)
        returned.append(model.prepare_next_batch(return_privacy_spent=asked))
    assert returned == [bound(DRAWN, 1), None]


# ── the budget ──────────────────────────────────────────────────────────────────────────────────────


def test_the_training_ends_with_the_last_step_that_fits(tmp_path: Path) -> None:  # D7: deepee stops after overspending
    budget = bound(DRAWN, 7) * 1.0001
    loader = UniformDataLoader(dataset(N), B)
    path = tmp_path / "model.pt"
    watchdog = PrivacyWatchdog(loader, budget, DELTA, abort=True, save=True, path=path)
    model = PrivacyWrapper(network(), B, 1.0, 2.0, watchdog=watchdog)
    x, y = next(iter(loader))
    with pytest.raises(PrivacyBudgetExhausted) as stop:
        train_on(model, loader)
    assert model._steps_taken == 7
    assert model.current_epsilon <= budget < bound(DRAWN, 8)
    for part in ("Epsilon spent is", "epsilon allowed is", "delta", "not taken"):
        assert part in str(stop.value)
    saved = torch.load(path, weights_only=True)
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.wrapped_model.state_dict().items())
    # Whoever goes on all the same is refused before anything leaves.
    with pytest.raises(PrivacyBudgetExhausted):
        release(model, x, y)
    assert model.ledger.releases == 7


def test_a_first_step_that_does_not_fit_is_not_taken() -> None:
    loader = UniformDataLoader(dataset(N), B)
    watchdog = PrivacyWatchdog(loader, bound(DRAWN, 1) / 2, DELTA, abort=True)
    model = PrivacyWrapper(network(), B, 1.0, 2.0, watchdog=watchdog)
    with pytest.raises(PrivacyBudgetExhausted):
        release(model, *next(iter(loader)))
    assert model.ledger.releases == 0
    assert all(p.grad is None for p in model.parameters())


def test_a_foreign_batch_that_does_not_fit_is_refused_where_a_drawn_one_would() -> None:
    budget = bound(DRAWN, 3) * 1.01
    assert budget < bound(Gaussian(2.0), 1)
    loader = UniformDataLoader(dataset(N), B)
    watchdog = PrivacyWatchdog(loader, budget, DELTA, abort=True)
    model = PrivacyWrapper(network(), B, 1.0, 2.0, watchdog=watchdog)
    with pytest.raises(PrivacyBudgetExhausted):
        release(model, *dataset(N)[:B])


def test_without_abort_it_warns_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    model = run(8, epsilon=bound(DRAWN, 4) * 1.0001, report=4)
    warnings = [record.message for record in caplog.records if "exhausted" in record.message]
    assert len(warnings) == 2  # before the fifth step, and with the report of the eighth
    assert model._steps_taken == 8


@pytest.mark.parametrize(
    "target",
    [
        (0.0, DELTA),
        (-1.0, DELTA),
        (None, DELTA),
        (1.0, 0.0),
        (1.0, 1.0),
        (1.0, 1.2),
        (1.0, None),
        (float("inf"), DELTA),
    ],
)
def test_targets_that_promise_nothing_are_refused(target: tuple[float, float]) -> None:  # D11
    with pytest.raises(ValueError, match=r"epsilon|delta"):
        PrivacyWatchdog(UniformDataLoader(dataset(N), B), *target)


def test_a_place_to_save_to_is_looked_for_before_training(tmp_path: Path) -> None:
    loader = UniformDataLoader(dataset(N), B)
    for path in (None, tmp_path / "missing" / "model.pt"):
        with pytest.raises(ValueError, match="path"):
            PrivacyWatchdog(loader, 1.0, DELTA, abort=True, save=True, path=path)


def test_an_epsilon_that_protects_nobody_is_an_error_unless_asked_for() -> None:
    loader = UniformDataLoader(dataset(N), B)
    x, y = next(iter(loader))
    model = PrivacyWrapper(network(), B, 1.0, 0.01, watchdog=PrivacyWatchdog(loader, 1.0, DELTA))
    with pytest.raises(RuntimeError, match="implausible"):
        release(model, x, y)
    assert model.ledger.releases == 0
    watchdog = PrivacyWatchdog(loader, 1.0, DELTA, fallback_to_rdp=True)
    model = PrivacyWrapper(network(), B, 1.0, 0.01, watchdog=watchdog)
    release(model, x, y)
    epsilon = model.prepare_next_batch(return_privacy_spent=True)
    assert epsilon is not None
    assert epsilon > 500


def test_an_orphan_says_so() -> None:
    with pytest.raises(RuntimeError, match="must be attached to a PrivacyWrapper"):
        PrivacyWatchdog(UniformDataLoader(dataset(N), B), 1.0, DELTA).inform(1)


def test_reports_reach_stderr_where_nobody_configured_logging() -> None:
    program = (
        "from dpdl.compat.deepee import PrivacyWatchdog, UniformDataLoader\n"
        "class Wrapper: noise_multiplier = 1.0\n"
        "w = PrivacyWatchdog(UniformDataLoader(list(range(64)), 4), 100.0, 1e-3, report_every_n_steps=1)\n"
        "w.wrapper = Wrapper\n"
        "w.inform(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert "INFO:Privacy spent at 1 steps: " in done.stderr
