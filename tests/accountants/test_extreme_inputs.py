"""Values that no run has: answered, soundly and soon, or refused by name; never another exception, never a warning."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator

import mpmath
import numpy as np
import pytest

from accountants import arguments
from accountants.accountant import Accountant
from accountants.adaptive.individual import IndividualAccountant
from accountants.adaptive.odometer import PrivacyOdometer
from accountants.errors import ParameterError, UnsupportedEventError
from accountants.events import (
    ZCDP,
    BallsInBins,
    Composed,
    DiscreteGaussian,
    EpsilonDelta,
    Event,
    Gaussian,
    Group,
    Laplace,
    MatrixFactorization,
    PoissonSampled,
    RandomizedResponse,
    RepeatAndSelect,
    Repeated,
    SampledWithoutReplacement,
    Shuffled,
    Skellam,
    SkellamVector,
    TruncatedPoissonSampled,
    participation_sensitivity,
)
from accountants.gdp_accountant import GDPAccountant
from accountants.prv_accountant import PRVAccountant
from accountants.rdp_accountant import RDPAccountant
from accountants.tuning import Repetitions
from accountants.zcdp_accountant import ZCDPAccountant, zcdp_delta, zcdp_epsilon

HUGE = 10**400
LONGER = 10**5000  # Python refuses to write it out
ONE = Gaussian(1.0)


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


COUNTED: dict[str, Callable[[int], object]] = {
    "repeated": lambda n: ONE * n,
    "compose": lambda n: PRVAccountant().compose(ONE, n),
    "odometer": lambda n: PrivacyOdometer(delta=1e-5).compose(ONE, n),
    "group": lambda n: Group(ONE, n),
    "bins": lambda n: BallsInBins(n, ONE),
    "batches": lambda n: Shuffled(n, ONE),
    "data set": lambda n: SampledWithoutReplacement(1, n, ONE),
    "truncated": lambda n: TruncatedPoissonSampled(0.1, n, 10, ONE),
    "steps": lambda n: MatrixFactorization(1.0, 1, n),
    "bands": lambda n: MatrixFactorization(1.0, n, 1),
    "categories": lambda n: RandomizedResponse(0.5, n),
    "grid units": lambda n: DiscreteGaussian(1.0, n),
    "separation": lambda n: participation_sensitivity([[1.0]], min_separation=n, max_participations=1),
    "examples": lambda n: IndividualAccountant(size=n),
    "levels": lambda n: IndividualAccountant(size=1, levels=n),
}


@pytest.mark.parametrize("make", COUNTED.values(), ids=COUNTED)
@pytest.mark.parametrize("count", [10**15 + 1, HUGE, LONGER], ids=["1e15+1", "1e400", "1e5000"])
def test_counts_beyond_all_runs_are_refused_by_name(make: Callable[[int], object], count: int) -> None:
    with pytest.raises(ParameterError, match="must be at most") as error:
        make(count)
    assert len(str(error.value)) < 300


def test_products_of_counts_are_counts() -> None:
    with pytest.raises(ParameterError, match="count must be at most"):
        (ONE * 10**10) * 10**10
    with pytest.raises(ParameterError, match="size must be at most"):
        Group(Group(ONE, 10**10), 10**10)
    nested = Repeated(Composed((Repeated(Laplace(1.0), 10**10), ONE)), 10**10)
    with pytest.raises(UnsupportedEventError, match=r"10\^15"):
        PRVAccountant().compose(nested)


@pytest.mark.parametrize("value", [HUGE, -HUGE, LONGER], ids=["1e400", "-1e400", "1e5000"])
def test_reals_beyond_a_double_are_refused(value: int) -> None:
    with pytest.raises(ParameterError, match="noise_multiplier must be a number") as error:
        Gaussian(value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("delta", [1e-310, 5e-324, 9e-301])
def test_deltas_below_the_range_of_a_double_s_inverse_are_refused(delta: float) -> None:
    with pytest.raises(ParameterError, match="at least 1e-300"):
        ZCDPAccountant().compose(ONE).epsilon(delta)
    assert 30 < ZCDPAccountant().compose(ONE).epsilon(1e-300) < 40


ACCOUNTANTS = (PRVAccountant, RDPAccountant, ZCDPAccountant, GDPAccountant)
SCALES = (1e-5, 1e-7, 1e-100, 1e-200, 5e-324, 1e10, 1e100, 1e300)
RATES = (1e-11, 1e-20, 1e-200, 5e-324)
MECHANISMS: dict[str, Callable[[float], Event]] = {
    "gaussian": Gaussian,
    "laplace": Laplace,
    "both": lambda s: Gaussian(s) + Laplace(1.0),
    "sampled gaussian": lambda s: PoissonSampled(0.01, Gaussian(s)),
    "sampled laplace": lambda s: PoissonSampled(0.01, Laplace(s)),
    "group": lambda s: Group(PoissonSampled(0.1, Gaussian(s)), 3),
    "shuffled": lambda s: Shuffled(10, Laplace(s)),
    "bins": lambda s: BallsInBins(10, Gaussian(s)),
    "truncated": lambda s: TruncatedPoissonSampled(0.01, 10, 1000, Gaussian(s)),
    "discrete gaussian": DiscreteGaussian,
    "skellam": Skellam,
    "skellam vector": lambda s: SkellamVector(s, 2, 1),
    "matrix": lambda s: MatrixFactorization(s, 2, 10, 0.1),
    "selected": lambda s: RepeatAndSelect(Gaussian(s), 10, math.inf),
}
GUARANTEES = {"zcdp": ZCDP, "pure": EpsilonDelta, "approximate": lambda e: EpsilonDelta(e, 1e-10)}


def bounds(accountant: Accountant, event: Event) -> tuple[float, float]:
    """(lower, upper) on epsilon at 1e-6; (0, inf) where the accountant takes no such event. Delta answers too."""
    try:
        accountant.compose(event, 10)
        accountant.delta(1.0)
        if isinstance(accountant, GDPAccountant):
            return 0.0, float(accountant.epsilon(1e-6))
        low, high = accountant.interval(1e-6)
    except UnsupportedEventError:
        return 0.0, math.inf
    assert 0 <= low <= high
    return low, high


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("make", MECHANISMS.values(), ids=MECHANISMS)
def test_every_noise_scale_is_answered(make: Callable[[float], Event], scale: float) -> None:
    event = make(scale)
    for kind in ACCOUNTANTS:
        low, high = bounds(kind(), event)
        if scale < 1e-6 and kind is PRVAccountant and make is not Skellam:
            assert high == math.inf or high > 1e3
        if scale > 1e9 and not isinstance(event, Composed):
            assert low <= 1e-6
            assert high < 0.2 or high == math.inf or isinstance(event, RepeatAndSelect)
    assert Event.from_json(event.to_json()) == event


@pytest.mark.parametrize("relation", ["zero_out", "replace_one"])
@pytest.mark.parametrize("scale", [1e-5, 5e-324, 1e300])
@pytest.mark.parametrize("make", MECHANISMS.values(), ids=MECHANISMS)
def test_and_under_the_other_relations(make: Callable[[float], Event], scale: float, relation: str) -> None:
    bounds(PRVAccountant(relation=relation), make(scale))


@pytest.mark.parametrize("size", [5e-324, 1e-300, 1e-10, 1e7, 1e100, 1e308])
@pytest.mark.parametrize("make", GUARANTEES.values(), ids=GUARANTEES)
def test_every_guarantee_is_answered(make: Callable[[float], Event], size: float) -> None:
    for kind in ACCOUNTANTS:
        low, high = bounds(kind(), make(size))
        assert low <= 10 * size
        assert high >= (math.inf if size > 1e99 else 0)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(
    "event",
    [ONE, Laplace(1.0), DiscreteGaussian(1.0), RandomizedResponse(0.5, 10**15), EpsilonDelta(0.5, 1e-3)],
    ids=lambda event: type(event).__name__,
)
def test_every_sample_rate_is_answered_as_next_to_nothing(event: Event, rate: float) -> None:
    bounds(RDPAccountant(), PoissonSampled(rate, event))
    low, high = bounds(PRVAccountant(), PoissonSampled(rate, event))
    assert low == 0 or rate >= 1e-12
    assert high < 1e-3
    for wrapped in (Group(PoissonSampled(rate, ONE), 3), TruncatedPoissonSampled(rate, 10, 10**15, ONE)):
        assert bounds(PRVAccountant(), wrapped)[1] < 1e-3


def test_what_is_computed_instead_proves_no_lower_bound() -> None:
    """At a clamped scale or rate the tight delta is above that of the event, so only 0 is known below."""
    for event in (Laplace(1e12), PoissonSampled(1e-15, ONE), BallsInBins(4, Gaussian(1e12)), DiscreteGaussian(1e12)):
        low, high = PRVAccountant().compose(event).delta_interval(0.0)
        assert low == 0 < high < 1e-6
    low, high = PRVAccountant().compose(Laplace(1e8)).delta_interval(0.0)
    assert 0 < low <= -math.expm1(-0.5e-8) <= high


def test_a_long_skellam_falls_back_to_its_curve_and_a_long_discrete_gaussian_to_rho() -> None:
    assert PRVAccountant().compose(DiscreteGaussian(1e7)).epsilon(1e-6) == pytest.approx(
        RDPAccountant().compose(ZCDP(0.5e-14)).epsilon(1e-6), rel=1e-9, abs=1e-12
    )
    wide = PRVAccountant().compose(DiscreteGaussian(2.0, 10**9)).epsilon(1e-6)
    assert wide == pytest.approx(RDPAccountant().compose(ZCDP(0.125)).epsilon(1e-6), rel=1e-9)
    skellam = PRVAccountant().compose(Skellam(1e10, 10**5)).epsilon(1e-6)
    assert skellam == pytest.approx(RDPAccountant().compose(Gaussian(1.0)).epsilon(1e-6), rel=1e-3)
    with pytest.raises(UnsupportedEventError, match="too many to list"):
        PRVAccountant().compose(PoissonSampled(0.1, Skellam(1e10)))


def test_a_large_group_of_answers_is_bounded_by_its_largest_loss() -> None:
    event = RandomizedResponse(0.999)
    one = PRVAccountant(relation="replace_one").compose(event).epsilon(1e-100)
    group = PRVAccountant(relation="replace_one").compose(Group(event, 5000)).epsilon(1e-100)
    assert group == pytest.approx(5000 * one, rel=1e-6)


def test_the_delta_of_a_large_group_is_the_sum() -> None:
    for epsilon, delta, size in ((0.1, 1e-9, 30), (1e-12, 1e-9, 1000), (0.0, 1e-9, 1000)):
        with mpmath.workdps(40):
            total = float(delta * mpmath.fsum(mpmath.exp(i * mpmath.mpf(epsilon)) for i in range(size)))
        proved = PRVAccountant().compose(Group(EpsilonDelta(epsilon, delta), size)).delta(size * epsilon * (1 + 1e-9))
        assert total * (1 - 1e-9) <= proved <= total * (1 + 1e-6)


SOON = [
    DiscreteGaussian(1e7), DiscreteGaussian(1.0, 10**9), DiscreteGaussian(1e4), Skellam(1e10) * 10,
    Skellam(1e13, 10**6), Skellam(1e6), Group(RandomizedResponse(0.99), 10**5), Group(RandomizedResponse(0.9, 3), 60),
    Group(EpsilonDelta(1e-9, 1e-30), 10**15), SkellamVector(1e300, 2e200, 1e200), SkellamVector(1e300, 1e151, 1e150),
    EpsilonDelta(1e308) * 10, ZCDP(1e308) * 10, PoissonSampled(0.01, ONE) * 10**15, ONE * 10**15,
]  # fmt: skip


@pytest.mark.parametrize("event", SOON, ids=lambda event: repr(event)[:60])
def test_what_cannot_be_listed_is_answered_within_seconds(event: Event) -> None:
    start = time.monotonic()
    assert PRVAccountant(relation="replace_one").compose(event).epsilon(1e-6) >= 0
    assert time.monotonic() - start < 30


def test_a_sampled_group_that_makes_too_long_a_mixture_is_refused() -> None:
    for noise in (ONE, DiscreteGaussian(1.0)):
        with pytest.raises(UnsupportedEventError, match="sampled group of 100000"):
            PRVAccountant().compose(Group(PoissonSampled(0.1, noise), 10**5))


def test_zcdp_s_root_finders_take_every_rho() -> None:
    for rho in (5e-324, 1e-200, 1e99):
        assert zcdp_epsilon(rho, 1e-300) >= 0
        assert 0 <= zcdp_delta(rho, 1e-300) <= 1
        assert 0 <= zcdp_delta(rho, 1e300) <= 1


def test_draws_end_and_laws_have_sane_parameters() -> None:
    for change in ({"mean": 1e12, "shape": 1.0}, {"mean": 1e7, "shape": math.inf}, {"mean": 5, "shape": 1e7}):
        with pytest.raises(ParameterError, match="at most 1e"):
            Repetitions(**change)
    law = Repetitions(mean=1e6, shape=math.inf)
    assert abs(law.draw(insecure_rng=np.random.default_rng(0)) - 1e6) < 5e3


NOT_NUMBERS = [{}, {1, 2}, "12", b"1", [1j], ["1"], [True, 1.0], np.array([True]), [HUGE], [[1.0], [1.0, 2.0]], [None]]


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize(
    "take",
    [
        lambda v: arguments.reals("x", v, remedy="R."),
        lambda v: arguments.probabilities("x", v, remedy="R."),
        lambda v: arguments.orders(v),
        lambda v: Repetitions(mean=5, shape=1.0).rdp(lambda a: a, v),
        lambda v: participation_sensitivity(v, min_separation=1, max_participations=1),
        lambda v: IndividualAccountant(size=1, orders=v),
        lambda v: IndividualAccountant(size=1).step(v, max_grad_norm=1, noise_multiplier=1, sample_rate=1),
        lambda v: IndividualAccountant(size=1).epsilon(1e-5, indices=v),
    ],
    ids=["reals", "probabilities", "orders", "tuning", "matrix", "individual orders", "norms", "indices"],
)
def test_arrays_of_something_else_are_refused(take: Callable[[object], object], value: object) -> None:
    with pytest.raises(ParameterError):
        take(value)


def test_arrays_of_numbers_are_taken() -> None:
    assert arguments.reals("x", [1, 2.5], remedy="R.").tolist() == [1.0, 2.5]
    assert arguments.reals("x", np.float32(0.5), remedy="R.").shape == ()
    assert arguments.reals("x", [math.nan], remedy="R.", nan_allowed=True).shape == (1,)
    assert arguments.probabilities("x", [0, 1], remedy="R.").dtype == np.float64
    assert arguments.orders([]).shape == (0,)
    for refused in ([math.nan], [-0.1], [1.1]):
        with pytest.raises(ParameterError, match="x must be"):
            arguments.probabilities("x", refused, remedy="R.")
    for refused in ([1.0], [math.inf]):
        with pytest.raises(ParameterError, match="orders must be"):
            arguments.orders(refused)


def nested_json(levels: int) -> str:
    inner = '{"kind": "poisson_sampled", "sample_rate": 0.5, "event": '
    document = inner * levels + '{"kind": "gaussian", "noise_multiplier": 1.0}' + "}" * levels
    return '{"schema_version": 1, "event": ' + document + "}"


def test_events_within_events_end() -> None:
    event: Event = ONE
    for _ in range(99):
        event = PoissonSampled(0.9, event)
    assert event.depth == 100
    assert Event.from_json(event.to_json()) == event
    with pytest.raises(ParameterError, match="more than 100 events within each other"):
        PoissonSampled(0.9, event)
    for levels in (100, 250, 2000, 100_000):
        with pytest.raises(ParameterError, match="more than 100 events within each other"):
            Event.from_json(nested_json(levels))
    with pytest.raises(ParameterError):
        Event.from_json('{"schema_version": 1, "event": ' + "[" * 500 + "]" * 500 + "}")


def test_infinity_is_written_as_json_can() -> None:
    event = RepeatAndSelect(ONE, 10, math.inf)
    text = event.to_json()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(text, parse_constant=refuse)["event"]["shape"] == "inf"
    assert Event.from_json(text) == event
    with pytest.raises(ParameterError, match="not JSON"):
        Event.from_json(text.replace('"inf"', "Infinity"))


@pytest.mark.parametrize(
    "text",
    [
        '{"schema_version": 1.0, "event": {"kind": "gaussian", "noise_multiplier": 1.0}}',
        '{"schema_version": 1, "event": {"kind": []}}',
        '{"schema_version": 1, "event": {"kind": {}}}',
        '{"schema_version": 1, "event": {"kind": "repeated", "count": 2, "event": {}}}',
        '{"schema_version": 1, "event": {"kind": "gaussian", "noise_multiplier": "inf"}}',
        '{"schema_version": 1, "event": {"kind": "gaussian", "noise_multiplier": ' + "9" * 5000 + "}}",
    ],
    ids=["float version", "list", "dict", "empty", "inf", "long"],
)
def test_documents_that_to_json_never_wrote_are_refused(text: str) -> None:
    with pytest.raises(ParameterError):
        Event.from_json(text)


def test_a_composed_sum_reads_back_as_itself() -> None:
    accountant = RDPAccountant().compose(ONE + Laplace(2.0))
    assert accountant.event == Composed((ONE, Laplace(2.0)))
    assert Event.from_json(accountant.event.to_json()) == accountant.event
    accountant.compose(ONE + Laplace(2.0)).compose(ONE + ONE, 3)
    assert Event.from_json(accountant.event.to_json()) == accountant.event
