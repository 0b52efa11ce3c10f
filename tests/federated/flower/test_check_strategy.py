"""What the check says of strategies that are unsound in other ways than F1 to F12, and of sound ones."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("flwr")

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from flwr.clientapp.mod import LocalDpMod
from flwr.serverapp import strategy as flowers

import accountants
from accountants import Gaussian, PoissonSampled
from dpdl.errors import ParameterError
from dpdl.federated.flower import DPStrategy, Finding, check_strategy
from tests.federated.flower.task import plan, server

ROUND = 8 * PoissonSampled(1 / 8, Gaussian(1.0))  # of the official example, as notes on it measured


def found(*args: Any, code: str, **named: Any) -> list[Finding]:
    return [finding for finding in check_strategy(*args, **named) if finding.code == code]


@pytest.mark.parametrize(("rounds", "true"), [(3, 5.41), (10, 8.90), (100, 31.3)])
def test_the_official_examples_reset_is_found_and_the_true_epsilon_told(rounds: int, true: float) -> None:
    """It makes a new PrivacyEngine in each round, and reports that round's epsilon."""
    one = accountants.RDPAccountant().compose(ROUND).epsilon(1e-5)
    assert one == pytest.approx(3.79, abs=0.01)
    every = accountants.RDPAccountant().compose(ROUND * rounds).epsilon(1e-5)
    assert every == pytest.approx(true, rel=0.01)

    ours = DPStrategy(server(plan=plan()))
    (finding,) = check_strategy(ours, reported=[one] * rounds, per_round=ROUND)
    assert (finding.code, finding.severity) == ("per-round epsilon", "unsound")
    told = float(str(finding).split(f"After {rounds} rounds it is ")[1].split(" ")[0])
    assert 0.85 * every < told <= every  # the tight accountant's


def test_epsilons_that_grow_are_no_reset() -> None:
    assert not found(flowers.FedAvg(), code="per-round epsilon", reported=[3.79, 4.8, 5.41])
    assert not found(flowers.FedAvg(), code="per-round epsilon", reported=[3.79])


def test_ours_has_no_fault_of_flowers() -> None:
    state = {"scale": torch.tensor(1.0), "count": torch.tensor(3)}
    assert check_strategy(DPStrategy(server(plan=plan())), sampling="poisson", state=state, weights=[1, 100]) == ()


def test_equal_weights_are_no_finding() -> None:
    strategy = flowers.DifferentialPrivacyServerSideFixedClipping(flowers.FedAvg(), 1.0, 1.0, 3)
    assert not found(strategy, code="F3", weights=[5, 5, 5])
    assert found(strategy, code="F3", weights=[5, 5, 6])
    assert found(strategy, code="F3")  # unknown weights are not equal ones


def test_a_mended_adaptive_clipping_is_not_blamed() -> None:
    class Mended(flowers.DifferentialPrivacyServerSideAdaptiveClipping):
        def _geometric_update(self, clipped_fraction: float) -> None:
            super()._geometric_update(1 - clipped_fraction)

    assert not found(Mended(flowers.FedAvg(), 1.0, 20), code="F1")
    strategy = flowers.DifferentialPrivacyServerSideAdaptiveClipping(flowers.FedAvg(), 1.0, 20)
    assert found(strategy, code="F1")
    assert strategy.clipping_norm == 0.1  # asking has not moved it


def test_adaptive_clipping_is_accounted_with_its_bits() -> None:
    strategy = flowers.DifferentialPrivacyServerSideAdaptiveClipping(flowers.FedAvg(), 1.0, 20)
    true = accountants.PRVAccountant().compose(Gaussian(1.0) * 10).epsilon(1e-5)
    assert f"epsilon {true:.4g} at delta" in str(found(strategy, code="F10", rounds=10)[0])


def test_arrays_that_noise_passes_by_are_named() -> None:
    strategy = flowers.DifferentialPrivacyServerSideFixedClipping(flowers.FedAvg(), 1.0, 1.0, 3)
    state = {"w": torch.zeros(2), "scale": torch.tensor(1.0), "count": torch.tensor(3), "mask": torch.tensor([True])}
    (scalars,), (whole,) = (found(strategy, code=code, state=state) for code in ("F4", "F5"))
    assert (scalars.subject, whole.subject) == ("scale", "count, mask")
    record = ArrayRecord({"w": Array(np.zeros(2)), "n": Array(np.zeros(2, np.int64))})
    assert [finding.subject for finding in found(strategy, code="F5", state=record)] == ["n"]


def test_local_noise_that_is_enough_is_no_finding() -> None:
    assert not found(flowers.FedAvg(), code="F8", mods=[LocalDpMod(1.0, 2.0, 1.0, 1e-5)])
    assert found(flowers.FedAvg(), code="F8", mods=[LocalDpMod(1.0, 2.0, 1.0, 1e-5)], rounds=2)
    assert found(flowers.FedAvg(), code="F8", mods=[LocalDpMod(1.0, 1.0, 1.0, 1e-5)])  # clipped to 1: 2 apart
    assert found(flowers.FedAvg(), code="F8", mods=[LocalDpMod(1.0, 2.0, 0.0, 1e-5)])


def test_clipping_without_noise_is_no_privacy() -> None:
    strategy = flowers.DifferentialPrivacyServerSideFixedClipping(flowers.FedAvg(), 0.0, 1.0, 3)
    assert "noise_multiplier is 0" in str(found(strategy, code="F12")[0])


def test_what_cannot_be_checked_is_refused() -> None:
    with pytest.raises(ParameterError, match="one of flwr"):
        check_strategy(object())  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="sampling must be"):
        check_strategy(flowers.FedAvg(), sampling="random")  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="rounds"):
        check_strategy(flowers.FedAvg(), rounds=0)


def test_a_finding_reads_as_a_sentence() -> None:
    finding = Finding(code="F1", severity="unsound", subject="It", message="It is wrong.", remedy="Mend it.")
    assert str(finding) == "F1 (unsound), It: It is wrong. Mend it."
