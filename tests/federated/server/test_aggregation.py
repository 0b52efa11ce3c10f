"""One client moves the sum by at most max_weight times the clipping norm, whatever it sends; the rest is arithmetic."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpdl.federated.aggregation import ACCEPTED, MALFORMED, NOT_FINITE, ClippedUpdates, WeighedUpdates
from dpdl.federated.global_model import GlobalModel
from tests.federated.server.small_federation import norm_of, reply, update, zeros

S, W = 0.7, 2.0
MODEL = GlobalModel(zeros(scalar=True))


def clipped(**changes: Any) -> ClippedUpdates:
    return ClippedUpdates(MODEL, **{"max_update_norm": S, "max_weight": W, **changes})


def sum_of(replies: list[Any], **changes: Any) -> dict[str, Tensor]:
    updates = clipped(**changes)
    for each in replies:
        updates.add(each)
    return updates.total().tensors


def one_by_one(contributions: list[tuple[dict[str, Tensor], float]]) -> dict[str, list[float]]:
    """The weighted sum of clipped updates in plain Python floats."""
    total = {name: [0.0] * tensor.numel() for name, tensor in zeros(scalar=True).items()}
    for change, weight in contributions:
        norm = norm_of(change)
        for name, tensor in change.items():
            for i, value in enumerate(tensor.flatten().tolist()):
                total[name][i] += min(weight, W) * value * (1.0 if norm <= S else S / norm)
    return total


def test_the_sum_is_that_of_clipped_and_weighed_updates() -> None:
    sent = [
        (update(size, like=zeros(scalar=True), seed=i), weight)
        for i, (size, weight) in enumerate([(0.1, 1.0), (5.0, 0.5), (0.7, 2.0), (100.0, 7.0), (0.0, 1.0)])
    ]
    found = sum_of([reply(f"c{i}", change, weight=weight) for i, (change, weight) in enumerate(sent)])
    for name, expected in one_by_one(sent).items():
        assert found[name].dtype == torch.float64
        assert found[name].flatten().tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_what_is_counted() -> None:
    updates = clipped(quantile=0.9)
    like = zeros(scalar=True)
    outcomes = [
        updates.add(reply("a", update(0.1, like=like))),
        updates.add(reply("b", update(3.0, like=like), weight=9)),
        updates.add(reply("c", {**like, "scale": torch.tensor(math.nan)})),
        updates.add(reply("d", {"weight": torch.zeros(3, 4)})),
        updates.add(reply("e", like)),
    ]
    assert outcomes == [ACCEPTED, ACCEPTED, NOT_FINITE, MALFORMED, ACCEPTED]
    total = updates.total()
    assert (total.examples, total.clipped, total.non_finite, updates.lowered) == (3, 1, 1, 1)
    assert total.sensitivity == W * S
    assert updates.centred_bits == pytest.approx(0.1 - 0.9 + 0.1)
    assert "has no 'bias'" in updates.problem


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in zeros(scalar=True).items() if key != name}


LIKE = zeros(scalar=True)
BAD: dict[str, Any] = {
    "lacks a tensor": without("scale"),
    "has one that the model has not": {**LIKE, "more": torch.ones(2)},
    "another shape": {**LIKE, "bias": torch.ones(3)},
    "broadcastable": {**LIKE, "weight": torch.ones(4)},
    "whole numbers": {**LIKE, "bias": torch.ones(2, dtype=torch.int64)},
    "complex": {**LIKE, "bias": torch.ones(2, dtype=torch.complex64)},
    "sparse": {**LIKE, "weight": torch.ones(3, 4).to_sparse()},
    "on the meta device": {**LIKE, "bias": torch.ones(2, device="meta")},
    "no tensor": {**LIKE, "bias": [1.0, 2.0]},
    "no dict": [torch.ones(3)],
    "none": None,
    "nan": {**LIKE, "bias": torch.tensor([1.0, math.nan])},
    "infinite": {**LIKE, "bias": torch.tensor([1.0, math.inf])},
    "infinite in 0-d": {**LIKE, "scale": torch.tensor(-math.inf)},
    "a norm beyond float64": {**LIKE, "bias": torch.full((2,), 1e200, dtype=torch.float64)},
}


@pytest.mark.parametrize("kind", BAD)
def test_an_update_that_is_none_counts_as_zero(kind: str) -> None:
    good = reply("good", update(0.3, like=LIKE))
    updates = clipped()
    updates.add(good)
    assert updates.add(reply("bad", BAD[kind])) in (MALFORMED, NOT_FINITE)
    assert updates.problem
    assert updates.total().examples == 1
    alone = sum_of([good])
    assert all(torch.equal(tensor, alone[name]) for name, tensor in updates.total().tensors.items())


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, -math.inf, "1", None, True, 10**400, torch.tensor(1.0)])
def test_a_weight_that_is_none_counts_as_zero(weight: Any) -> None:
    for updates in (clipped(), WeighedUpdates(MODEL)):
        assert updates.add(reply("a", update(0.3, like=LIKE), weight=weight)) == MALFORMED
        assert "weight" in updates.problem


def test_a_zero_update_is_an_update() -> None:
    updates = clipped()
    assert updates.add(reply("a", LIKE)) == ACCEPTED
    assert updates.centred_bits == 0.5
    assert all((tensor == 0).all() for tensor in updates.total().tensors.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_floating_point_dtype_is_added_in_float64(dtype: torch.dtype) -> None:
    change = {name: tensor.to(dtype) for name, tensor in update(0.5, like=LIKE).items()}
    found = sum_of([reply(f"c{i}", change) for i in range(3)])
    for name, tensor in change.items():
        assert found[name].flatten().tolist() == pytest.approx([3 * v for v in tensor.double().flatten().tolist()])


def test_nothing_of_a_reply_is_kept() -> None:
    change = update(0.5, like=LIKE)
    updates = clipped()
    updates.add(reply("a", change))
    before = {name: tensor.clone() for name, tensor in updates.total().tensors.items()}
    for tensor in change.values():
        tensor.fill_(9.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in updates.total().tensors.items())


def test_a_buffer_that_is_sent_along_is_left_out_and_counted() -> None:
    model = GlobalModel({**zeros(), "bn.num_batches_tracked": torch.tensor(7)})
    updates = ClippedUpdates(model, max_update_norm=1.0, max_weight=1.0)
    assert updates.add(reply("a", {**update(0.5), "bn.num_batches_tracked": torch.tensor(1000)})) == ACCEPTED
    assert (updates.excluded, updates.clipped) == (1, 0)
    assert norm_of(updates.total().tensors) == pytest.approx(0.5)


# ── the property ────────────────────────────────────────────────────────────────────────────────────

FLOATS = st.floats(width=32) | st.floats() | st.sampled_from([0.0, -0.0, 1e-300, 1e38, -3e38, math.nan, math.inf])
WEIGHTS = st.floats() | st.integers() | st.sampled_from([0, 1, 2, 1e300, math.nan, -1.0])


@st.composite
def contributions(draw: st.DrawFn) -> tuple[dict[str, Tensor], Any]:
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    change = {
        name: torch.tensor(
            draw(st.lists(FLOATS, min_size=tensor.numel(), max_size=tensor.numel())), dtype=torch.float64
        )
        .reshape(tensor.shape)
        .to(dtype)
        for name, tensor in LIKE.items()
    }
    return change, draw(WEIGHTS)


@settings(max_examples=80, deadline=None)
@given(sent=st.lists(contributions(), min_size=1, max_size=4), which=st.integers(0, 3))
def test_removing_one_client_moves_the_sum_by_at_most_max_weight_times_the_norm(
    sent: list[tuple[dict[str, Tensor], Any]], which: int
) -> None:
    which %= len(sent)
    replies = [reply(f"c{i}", change, weight=weight) for i, (change, weight) in enumerate(sent)]
    everybody = clipped(quantile=0.8)
    others = clipped(quantile=0.8)
    for i, each in enumerate(replies):
        everybody.add(each)
        if i != which:
            others.add(each)
    moved = {name: tensor - others.total().tensors[name] for name, tensor in everybody.total().tensors.items()}
    rounding = 2.0**-52 * len(sent) * W * S  # of the sums, which the noise's grid covers
    assert norm_of(moved) <= everybody.total().sensitivity + 20 * rounding
    assert abs(everybody.centred_bits - others.centred_bits) <= 0.8 + 1e-12


@settings(max_examples=80, deadline=None)
@given(sent=contributions())
def test_one_contribution_is_never_longer_than_the_sensitivity(sent: tuple[dict[str, Tensor], Any]) -> None:
    total = sum_of([reply("a", sent[0], weight=sent[1])])
    assert norm_of(total) <= W * S  # to the last bit: the norm is lowered by more than rounding adds


def test_a_long_update_is_never_longer_than_the_sensitivity() -> None:
    model = GlobalModel({"w": torch.zeros(1_000_000)})
    for seed in range(3):
        change = {"w": torch.randn(1_000_000, generator=torch.Generator().manual_seed(seed)) ** 9}
        updates = ClippedUpdates(model, max_update_norm=1.0, max_weight=1.0)
        updates.add(reply("a", change))
        norm = math.sqrt(math.fsum(updates.total().tensors["w"].square().tolist()))
        assert 1 - 1e-8 < norm <= 1


# ── without a plan ──────────────────────────────────────────────────────────────────────────────────


def test_the_weighed_mean_is_the_mean_by_weight() -> None:
    updates = WeighedUpdates(MODEL)
    sent = [(update(3.0, like=LIKE, seed=1), 2.0), (update(5.0, like=LIKE, seed=2), 991), (LIKE, 0.0)]
    for i, (change, weight) in enumerate(sent):
        updates.add(reply(f"c{i}", change, weight=weight))
    mean = updates.mean()
    assert mean is not None
    for name in LIKE:
        expected = sum(change[name].double() * weight for change, weight in sent) / 993
        assert torch.allclose(mean[name], torch.as_tensor(expected))


def test_a_mean_of_nothing_is_none() -> None:
    updates = WeighedUpdates(MODEL)
    assert updates.mean() is None
    updates.add(reply("a", update(1.0, like=LIKE), weight=0))
    assert updates.mean() is None


def test_larger_weights_are_lowered_where_a_limit_is_given() -> None:
    updates = WeighedUpdates(MODEL, max_weight=1.0)
    updates.add(reply("a", update(1.0, like=LIKE, seed=1), weight=100))
    updates.add(reply("b", update(1.0, like=LIKE, seed=2), weight=1))
    mean = updates.mean()
    assert mean is not None
    halves = [update(1.0, like=LIKE, seed=seed) for seed in (1, 2)]
    assert torch.allclose(mean["bias"], (halves[0]["bias"].double() + halves[1]["bias"].double()) / 2)
