"""Events: what they accept, how they merge, and their way through JSON."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import accountants
from accountants import (
    Composed,
    Event,
    Gaussian,
    Laplace,
    NeighboringRelation,
    ParameterError,
    PoissonSampled,
    PRVAccountant,
    Repeated,
    UnsupportedEventError,
)
from accountants.events import (
    BallsInBins,
    DiscreteGaussian,
    Group,
    MatrixFactorization,
    RepeatAndSelect,
    SampledWithoutReplacement,
    Shuffled,
    TruncatedPoissonSampled,
)

simple = st.one_of(
    st.floats(0, 1e6).map(Gaussian),
    st.floats(0, 1e6).map(Laplace),
    st.tuples(st.floats(0, 1), st.floats(0, 1e6).map(Gaussian)).map(lambda pair: PoissonSampled(*pair)),
    st.tuples(st.floats(0, 1e6), st.integers(1, 9), st.integers(0, 99), st.floats(0, 1)).map(
        lambda fields: MatrixFactorization(*fields)
    ),
)
events = st.recursive(
    simple,
    lambda inner: st.one_of(
        st.tuples(inner, st.integers(0, 10**12)).map(lambda pair: Repeated(*pair)),
        st.tuples(inner, st.integers(1, 9)).map(lambda pair: Group(*pair)),
        st.tuples(st.integers(1, 9), st.integers(9, 99), inner).map(lambda sizes: SampledWithoutReplacement(*sizes)),
        st.tuples(st.floats(0, 1), st.integers(1, 9), st.integers(1, 99), inner).map(
            lambda sizes: TruncatedPoissonSampled(*sizes)
        ),
        st.tuples(st.sampled_from([Shuffled, BallsInBins]), st.integers(1, 9), inner).map(
            lambda epoch: epoch[0](*epoch[1:])
        ),
        st.lists(inner, max_size=4).map(Composed),
    ),
    max_leaves=8,
)


@given(events)
def test_json_round_trip_is_exact(event: Event) -> None:
    assert Event.from_json(event.to_json()) == event
    assert hash(Event.from_json(event.to_json())) == hash(event)


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d.update(extra=1),
        lambda d: d.update(schema_version=2),
        lambda d: d.update(schema_version=True),
        lambda d: d["event"].update(kind="gauss"),
        lambda d: d["event"].update(sensitivity=2.0),
        lambda d: d["event"].pop("noise_multiplier"),
        lambda d: d["event"].update(noise_multiplier=-1.0),
        lambda d: d["event"].update(noise_multiplier="1"),
    ],
)
def test_json_refuses_what_it_did_not_write(edit: object) -> None:
    document = json.loads(Gaussian(1.0).to_json())
    edit(document)  # type: ignore[operator]
    with pytest.raises(ParameterError):
        Event.from_json(json.dumps(document))
    with pytest.raises(ParameterError, match="not JSON"):
        Event.from_json("{")


def test_equal_neighbours_merge_and_nesting_flattens() -> None:
    step = PoissonSampled(0.01, Gaussian(1.0))
    assert Composed([step] * 3 + [Gaussian(2.0)]).events == (Repeated(step, 3), Gaussian(2.0))
    assert Composed([Composed([step, step]), 5 * step]).events == (Repeated(step, 7),)
    assert 3 * (step * 4) == step * 12
    assert Composed([step * 0]).events == ()
    assert step + step == Composed([step, step])


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan, True, np.True_, "1", None, 1j])
def test_noise_must_be_a_finite_number_from_zero(bad: object) -> None:
    with pytest.raises(ParameterError):
        Gaussian(bad)  # type: ignore[arg-type]
    with pytest.raises(ParameterError):
        Laplace(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan, False, None])
def test_sample_rate_must_be_a_probability(bad: object) -> None:
    with pytest.raises(ParameterError):
        PoissonSampled(bad, Gaussian(1.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [-1, 3.0, True, np.True_, "2", None])
def test_count_must_be_a_whole_number(bad: object) -> None:
    with pytest.raises(ParameterError):
        Gaussian(1.0) * bad  # type: ignore[operator]
    assert Gaussian(1.0) * np.int64(3) == Gaussian(1.0) * 3


def test_messages_give_value_and_remedy() -> None:
    with pytest.raises(ParameterError, match=r"got 1\.5.*expected batch size"):
        PoissonSampled(1.5, Gaussian(1.0))


def test_composition_with_a_non_event_is_refused() -> None:
    for wrong in ([1.0], "ab", Gaussian(1.0), {"a": 1}):
        with pytest.raises(ParameterError):
            Composed(wrong)  # type: ignore[arg-type]


def test_relation_accepts_its_names_and_no_others() -> None:
    assert NeighboringRelation.of("zero_out") is NeighboringRelation.ZERO_OUT
    with pytest.raises(ParameterError, match="add_or_remove"):
        NeighboringRelation.of("swap")


def test_replacement_doubles_the_sensitivity_where_that_is_proved() -> None:
    for once, twice in ((Gaussian(2.0), Gaussian(1.0)), (Laplace(4.0), Laplace(2.0))):
        replaced = PRVAccountant(relation="replace_one").compose(once, 5).interval(1e-5)
        assert replaced == PRVAccountant().compose(twice, 5).interval(1e-5)


def test_zero_out_equals_add_or_remove() -> None:
    step = PoissonSampled(0.1, Gaussian(1.0))
    assert PRVAccountant(relation="zero_out").compose(step, 9).interval(1e-5) == PRVAccountant().compose(
        step, 9
    ).interval(1e-5)


def test_several_gaussians_on_one_subset_are_one_gaussian() -> None:
    joint = PoissonSampled(0.1, Composed([Gaussian(2.0), Gaussian(2.0)]))
    single = PoissonSampled(0.1, Gaussian(math.sqrt(2.0)))
    assert accountants.rdp(joint, 4.5) == pytest.approx(accountants.rdp(single, 4.5), rel=1e-9)


def test_nested_sampling_multiplies_rates() -> None:
    nested = PoissonSampled(0.1, PoissonSampled(0.2, Gaussian(1.0)))
    assert accountants.rdp(nested, 8) == pytest.approx(accountants.rdp(PoissonSampled(0.02, Gaussian(1.0)), 8))


def test_mixed_mechanisms_on_one_subset_are_refused() -> None:
    with pytest.raises(UnsupportedEventError, match="one subset"):
        PRVAccountant().compose(PoissonSampled(0.1, Composed([Gaussian(1.0), Laplace(1.0)])))


def test_a_refused_event_leaves_the_accountant_as_it_was() -> None:
    accountant = PRVAccountant().compose(Gaussian(1.0))
    with pytest.raises(UnsupportedEventError):
        accountant.compose(PoissonSampled(0.1, Composed([Gaussian(1.0), Laplace(1.0)])))
    assert accountant.event == Composed([Gaussian(1.0)])


BATCH = SampledWithoutReplacement(10, 100, Gaussian(1.0))
TRUNCATED = TruncatedPoissonSampled(0.1, 20, 100, Gaussian(1.0))
SAMPLED = PoissonSampled(0.5, Gaussian(1.0))
TWO_KINDS = Composed([Gaussian(1.0), Laplace(1.0)])


@pytest.mark.parametrize(
    ("event", "relation", "reason"),
    [
        (BATCH, "add_or_remove", "Use relation='replace_one'"),
        (Group(BATCH, 2), "replace_one", "group of 2"),
        (Group(TRUNCATED, 3), "zero_out", "group of 3"),
        (SampledWithoutReplacement(10, 100, SAMPLED), "replace_one", "un-sampled"),
        (TruncatedPoissonSampled(0.1, 20, 100, SAMPLED), "add_or_remove", "un-sampled"),
        (Shuffled(10, SAMPLED), "add_or_remove", "un-sampled"),
        (Shuffled(10, TWO_KINDS), "add_or_remove", "one subset"),
        (Group(Shuffled(10, Laplace(1.0)), 2), "add_or_remove", "Use Gaussian"),
        (BallsInBins(10, Laplace(1.0)), "add_or_remove", "must be Gaussian"),
        (PoissonSampled(0.5, BATCH), "replace_one", "samples or batches"),
        (PoissonSampled(0.5, RepeatAndSelect(Gaussian(1.0), 3, 0)), "add_or_remove", "samples or batches"),
        (SampledWithoutReplacement(1, 9, DiscreteGaussian(1.0, 8)), "replace_one", "samples or batches"),
        (Group(Shuffled(9, DiscreteGaussian(1.0, 8)), 2), "add_or_remove", "group of 2"),
        (PoissonSampled(0.5, Group(Gaussian(1.0), 2)), "add_or_remove", "Group outermost"),
        (Group(MatrixFactorization(1.0, 2, 10, 0.5), 2), "add_or_remove", "overlapping rounds"),
    ],
)
def test_what_has_no_proof_is_refused_with_the_reason(event: Event, relation: str, reason: str) -> None:
    with pytest.raises(UnsupportedEventError, match=reason):
        PRVAccountant(relation=relation).compose(event)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SampledWithoutReplacement(101, 100, Gaussian(1.0)),
        lambda: SampledWithoutReplacement(0, 100, Gaussian(1.0)),
        lambda: SampledWithoutReplacement(1.0, 100, Gaussian(1.0)),  # type: ignore[arg-type]
        lambda: TruncatedPoissonSampled(0.1, 0, 100, Gaussian(1.0)),
        lambda: TruncatedPoissonSampled(1.1, 1, 100, Gaussian(1.0)),
        lambda: TruncatedPoissonSampled(0.1, 1, 0, Gaussian(1.0)),
        lambda: Shuffled(0, Gaussian(1.0)),
        lambda: Shuffled(3, 1.0),  # type: ignore[arg-type]
        lambda: BallsInBins(True, Gaussian(1.0)),
        lambda: Group(Gaussian(1.0), 0),
        lambda: MatrixFactorization(1.0, 0, 10),
        lambda: MatrixFactorization(1.0, 1, -1),
    ],
)
def test_sizes_must_be_counts_that_make_sense(make: object) -> None:
    with pytest.raises(ParameterError):
        make()  # type: ignore[operator]


def test_groups_of_groups_multiply() -> None:
    assert Group(Group(Gaussian(1.0), 2), 3) == Group(Gaussian(1.0), 6)


@pytest.mark.parametrize(
    "event",
    [
        SampledWithoutReplacement(10, 100, Gaussian(0.0)),
        TruncatedPoissonSampled(0.1, 20, 100, Gaussian(0.0)),
        Shuffled(3, Gaussian(0.0)),
        BallsInBins(3, Gaussian(0.0)),
        Group(Gaussian(0.0), 2),
        MatrixFactorization(0.0, 2, 10),
    ],
)
def test_without_noise_epsilon_is_infinite(event: Event) -> None:
    assert PRVAccountant(relation="replace_one").compose(event).epsilon(1e-5) == math.inf


@pytest.mark.parametrize(
    "event",
    [
        PoissonSampled(0.0, Gaussian(1.0)),
        TruncatedPoissonSampled(0.0, 2, 9, Gaussian(1.0)),
        MatrixFactorization(1.0, 2, 0),
        MatrixFactorization(1.0, 2, 10, 0.0),
        Shuffled(3, Composed([])),
        BallsInBins(3, Composed([])),
        SampledWithoutReplacement(1, 3, Composed([])),
    ],
)
def test_what_releases_nothing_costs_nothing(event: Event) -> None:
    for relation in ("zero_out", "replace_one"):
        assert PRVAccountant(relation=relation).compose(event).epsilon(1e-5) == 0
