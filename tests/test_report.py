"""What a run claims: never more than was proved, with everything named that weakens it."""

from __future__ import annotations

import json
import math
import re
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import dpdl
from dpdl.errors import LossError, ParameterError, PrivacyWarning
from dpdl.privacy_report import rounded_up
from tests.small_run import CLASSES, FEATURES, small_run, train_on

DELTA = 1e-5


def trained(steps: int = 1, **settings: Any) -> dpdl.Private:
    private = small_run(**{"noise_multiplier": 1.5, "batch_size": 6, "insecure_seed": None, **settings})
    for batch in private.loader:
        train_on(private, batch)
        if private.optimizer.steps_taken == steps:
            break
    return private


# ── the sentence ────────────────────────────────────────────────────────────────────────────────────


def test_the_sentence_says_what_was_proved_and_under_which_assumptions_on_sampling() -> None:
    private = trained()
    text = str(private.optimizer.report(delta=DELTA))
    assert text.startswith(f"epsilon <= {rounded_up(private.optimizer.epsilon(DELTA))} at delta = 1e-05, ")
    for words in (
        "adding or removing one example",
        "1 of 10 planned steps",
        "Poisson sampling at rate 0.5",
        "Gaussian noise of 1.5 times the clipping norm 1",
    ):
        assert words in text


def test_before_the_first_step_nothing_is_spent() -> None:
    report = small_run(noise_multiplier=1.0).optimizer.report(DELTA)
    assert (report.epsilon, report.epsilon_lower, report.steps) == (0.0, 0.0, 0)


def test_the_report_is_of_what_happened_not_of_what_was_planned() -> None:
    private = trained(steps=1)
    report = private.optimizer.report(DELTA)
    assert report.epsilon == private.optimizer.ledger.epsilon(DELTA) < private.optimizer.plan.epsilon(DELTA)
    assert (report.steps, report.planned_steps) == (1, 10)


def test_without_noise_there_is_no_guarantee_and_the_report_says_so_first() -> None:
    report = trained(noise_multiplier=0.0).optimizer.report(DELTA)
    assert report.epsilon == math.inf
    assert str(report).startswith("NO GUARANTEE: epsilon is infinite")
    assert "epsilon <=" not in str(report)


def test_an_insecure_seed_is_named() -> None:
    secure, insecure = (trained(insecure_seed=seed).optimizer.report(DELTA) for seed in (None, 7))
    assert secure.secure_randomness
    assert "seed" not in str(secure)
    assert not insecure.secure_randomness
    assert "insecure_seed" in str(insecure)
    assert "7" not in "".join(insecure.notes), "the seed itself must not be published"


class RowByRow(nn.Module):
    """Python decides for each row: neither the tape nor vmap can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.positive(row) if row.sum() > 0 else self.negative(row) for row in x])


def test_an_engine_that_was_fallen_back_to_is_named_with_the_reason() -> None:
    private = trained(model=RowByRow().double(), engine="auto")
    assert private.model.engine_name == "loop"
    report = str(private.optimizer.report(DELTA))
    reasons = r"[Ee]ngine loop, because tape cannot run the model: .*(positive|negative).*vmap cannot run the model: "
    assert re.search(reasons, report)
    assert "vmap" not in str(trained(model=RowByRow().double(), engine="loop").optimizer.report(DELTA))


def test_a_loss_that_was_not_checked_is_named() -> None:
    # Three steps: a single one may have drawn fewer than two examples.
    checked, unchecked = (trained(3, self_check=check).optimizer.report(DELTA) for check in (True, False))
    assert checked.notes == ()
    assert "mean over examples was declared and was not checked (self_check=False)" in str(unchecked)


def test_a_loss_that_cannot_be_followed_is_named() -> None:
    private = small_run(noise_multiplier=1.0)
    x, y = next(iter(private.loader))
    output = private.model(x)
    torch.autograd.backward(F.cross_entropy(output, y))
    private.optimizer.step()
    assert "could not be checked" in str(private.optimizer.report(DELTA))


@pytest.mark.parametrize("first_batch", ["all zero gradients", "all NaN"])
def test_a_first_batch_that_shows_nothing_of_the_loss_does_not_count_as_a_check(first_batch: str) -> None:
    """A sum under loss_reduction="mean" must still be found at the next batch."""
    private = small_run(noise_multiplier=1.0)
    factor = 0.0 if first_batch == "all zero gradients" else math.nan
    x, y = next(iter(private.loader))
    (factor * F.cross_entropy(private.model(x), y, reduction="sum")).backward()
    private.optimizer.step()
    assert "could not be checked" in str(private.optimizer.report(DELTA))
    x, y = next(iter(private.loader))
    with pytest.raises(LossError, match="is a sum over the 12 examples"):
        F.cross_entropy(private.model(x), y, reduction="sum").backward()


def test_notes_start_with_a_capital_and_end_with_one_full_stop() -> None:
    text = str(trained(insecure_seed=3, self_check=False).optimizer.report(DELTA))
    assert ".." not in text
    assert all(sentence[0].isupper() for sentence in re.split(r"\. (?=[A-Za-z])", text)[1:])


# ── rounding ────────────────────────────────────────────────────────────────────────────────────────


@given(st.one_of(st.floats(0.0, 1e6), st.integers(0, 10**5).map(lambda k: k / 100)), st.integers(0, 6))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_displayed_bound_is_still_a_bound(value: float, digits: int) -> None:
    shown = Fraction(rounded_up(value, digits))
    assert Fraction(value) <= shown <= Fraction(value) + Fraction(2, 10**digits)


@pytest.mark.parametrize("value", [0.35000000000000003, 0.41000000000000003, 0.7000000000000001, 1.1, 2.675, 1e300])
def test_a_displayed_bound_is_still_a_bound_a_rounding_error_above_a_cent(value: float) -> None:
    assert Fraction(rounded_up(value)) >= Fraction(value)


def test_infinity_is_displayed_as_such() -> None:
    assert rounded_up(math.inf) == "inf"


@pytest.mark.parametrize("delta", [1.00000049e-5, 1.23456789e-6, 0.000123456789])
def test_the_delta_that_is_displayed_is_not_smaller_than_the_one_that_was_proved(delta: float) -> None:
    report = trained().optimizer.report(delta)
    shown = re.search(r"delta = (\S+),", str(report))
    assert shown is not None
    assert Fraction(shown[1]) >= Fraction(delta)


# ── delta ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ask", ["epsilon", "report"])
@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, math.nan, "1e-5", None])
def test_a_delta_that_is_no_probability_is_refused(ask: str, delta: Any) -> None:
    with pytest.raises(ParameterError, match="delta"):
        getattr(small_run(noise_multiplier=1.0).optimizer, ask)(delta)


@pytest.mark.parametrize("ask", ["epsilon", "report"])
def test_a_delta_of_one_over_n_is_warned_of(ask: str) -> None:
    with pytest.warns(PrivacyWarning, match="1/n"):
        getattr(small_run(noise_multiplier=1.0).optimizer, ask)(0.1)


def test_a_delta_of_one_over_n_is_warned_of_where_only_the_loader_knows_n() -> None:
    known = small_run(noise_multiplier=1.0)
    plan = dpdl.PrivacyPlan(sample_rate=1.0, expected_batch_size=12, steps=3, noise_multiplier=1.0, max_grad_norm=1.0)
    model = nn.Linear(FEATURES, CLASSES).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private = dpdl.make_private(model, optimizer, known.loader._loader, plan)
    with pytest.warns(PrivacyWarning, match="1/n"):
        private.optimizer.report(0.1)


# ── JSON ────────────────────────────────────────────────────────────────────────────────────────────

NUMBERS = ("epsilon", "epsilon_lower", "delta", "sample_rate", "noise_multiplier", "max_grad_norm")
TEXTS = ("claim", "relation", "unit", "sampling", "mechanism", "accountant")


def strict(text: str) -> dict[str, Any]:
    """JSON as the standard has it, without NaN and Infinity."""
    values = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert isinstance(values, dict)
    return values


def test_json_holds_the_claim_and_all_that_it_rests_on() -> None:
    report = trained().optimizer.report(DELTA)
    values = strict(report.to_json())
    assert values["schema"] == "dpdl.report/2"
    assert values["claim"] == str(report)
    assert all(isinstance(values[name], float) for name in NUMBERS)
    assert all(isinstance(values[name], str) and values[name] for name in TEXTS)
    assert values["epsilon_lower"] <= values["epsilon"] == report.epsilon
    assert values["unit"] == "example"
    assert isinstance(values["steps"], int)
    assert values["secure_randomness"] is True
    assert set(values["versions"]) == {"dpdl", "torch", "numpy", "scipy", "python"}
    assert values["assumptions"]
    assert all(isinstance(text, str) for text in [*values["assumptions"], *values["notes"]])


def test_the_distance_of_the_noise_from_exact_gaussians_is_stated_for_the_run_at_hand() -> None:
    private = small_run(noise_multiplier=1.0, steps=9)
    for batch in private.loader:
        train_on(private, batch)
    report = private.optimizer.report(DELTA)
    numbers = sum(p.numel() for p in private.model.parameters())
    count = report.steps * numbers
    assert count > 0
    more = (1 + math.exp(report.epsilon)) * (count * 2**-80 + count**0.5 * 2**-43)
    (stated,) = [text for text in report.assumptions if "exact Gaussians" in text]
    assert f"{report.steps} steps of {numbers} numbers" in stated
    assert float(stated.rsplit(" ", 1)[1]) == pytest.approx(more, rel=0.5)


def test_json_has_no_infinity_where_there_is_no_guarantee() -> None:
    values = strict(trained(noise_multiplier=0.0).optimizer.report(DELTA).to_json())
    assert values["epsilon"] == "inf"
    assert values["claim"].startswith("NO GUARANTEE")


def test_json_names_no_key_and_no_seed() -> None:
    private = small_run(noise_multiplier=1.0, insecure_seed=987654321)
    train_on(private, next(iter(private.loader)))
    assert "987654321" not in private.optimizer.report(DELTA).to_json()
