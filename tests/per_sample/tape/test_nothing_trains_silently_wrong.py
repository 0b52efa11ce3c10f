"""Rules that are broken on purpose are refused before the first step; and what could spoil right ones does not.

Every kind of rule is broken in several ways: a factor near one, examples exchanged, rows in another order, a cross term
left out, norms alone, sums alone. Where a broken rule passes, so would a wrong one of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpdl
from dpdl.errors import EngineMismatchError, ModelError
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.self_check import refuse_mismatch
from dpdl.per_sample.tape import TapeEngine, gradients, recorder, rowwise
from dpdl.per_sample.tape.batch_axis import BatchAxis
from dpdl.per_sample.tape.contribution import Contribution, Materialized
from dpdl.per_sample.tape.refusal import TapeRefusal
from dpdl.per_sample.tape.rules import embedding, products
from tests.per_sample.tape.against_autograd import (
    Numbers,
    check,
    prepared,
)
from tests.per_sample.tape.families import FAMILIES, Family

Break = Callable[[pytest.MonkeyPatch, Family], None]
each_family = pytest.mark.parametrize("name", FAMILIES)


def contributions() -> Iterator[type[Contribution]]:
    waiting = list(Contribution.__subclasses__())
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        yield kind


def received(change: Callable[[Tensor], Tensor]) -> Break:
    """All that any source receives, changed."""

    def broken(patch: pytest.MonkeyPatch, _: Family) -> None:
        original = recorder.Recorder.receive
        patch.setattr(
            recorder.Recorder,
            "receive",
            lambda self, source, part: original(self, source, Materialized(change(part.materialize()))),
        )

    return broken


def answer(method: str, change: Callable[[Tensor], Tensor]) -> Break:
    """One of the answers of all contributions, changed."""

    def broken(patch: pytest.MonkeyPatch, family: Family) -> None:
        def changed(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda self, *args: change(original(self, *args))

        if family.derived and method == "norms_squared":
            patch.setattr(gradients, "squared_norms", lambda rows: change(rows.flatten(1).square().sum(1)))
            original = rowwise.RowwisePullBack.norms_squared
            patch.setattr(
                rowwise.RowwisePullBack,
                "norms_squared",
                lambda self, part: (change(original(self, part)[0]), original(self, part)[1]),
            )
            return
        for kind in contributions():
            patch.setattr(kind, method, changed(getattr(kind, method)))

    return broken


BREAKS: dict[str, Break] = {
    "a factor": received(lambda rows: rows * 1.01),
    "a sign": received(lambda rows: -rows),
    "the next example's": received(lambda rows: rows.roll(1, 0)),
    "the mean over examples": received(lambda rows: rows.mean(0, keepdim=True).expand_as(rows)),
    "nothing": received(torch.zeros_like),
    "a number off": received(lambda rows: rows + 0.01 * rows.norm()),
    "norms by a factor": answer("norms_squared", lambda squares: squares * 0.99),
    "norms of other examples": answer("norms_squared", lambda squares: squares.roll(1, 0)),
    "sums by a factor": answer("weighted_sum", lambda total: total * 1.01),
}


@contextmanager
def refused_by_name(family: Family) -> Iterator[None]:
    """The check names the parameter; the tape itself, where it sees examples mixed, the first that it meets."""
    with pytest.raises((EngineMismatchError, TapeRefusal)) as refusal:
        yield
    names = [family.parameter]
    if refusal.type is TapeRefusal:
        names = [name for name, _ in family.module().named_parameters()]
    assert any(name in str(refusal.value) for name in names)


def check_of(family: Family, dtype: torch.dtype) -> None:
    """The first batch's check."""
    module, (x,) = prepared(family.module(), (family.inputs(4),), dtype)
    refuse_mismatch(TapeEngine(module), ExampleBatch.from_call((x,), {}), dict(module.named_parameters()))


@each_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_what_is_right_passes_the_check(name: str, dtype: torch.dtype) -> None:
    check_of(FAMILIES[name], dtype)
    check(FAMILIES[name].module(), FAMILIES[name].inputs(4), dtype=dtype)


@each_family
@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_rule_is_refused_by_name(name: str, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[name]
    BREAKS[broken](monkeypatch, family)
    with refused_by_name(family):
        check_of(family, torch.float64)


@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.parametrize("name", ["linear", "convolution", "tied embedding", "layer norm", "LSTM", "derived"])
def test_a_broken_rule_is_refused_in_float32(name: str, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[name]
    BREAKS[broken](monkeypatch, family)
    with refused_by_name(family):
        check_of(family, torch.float32)


def reading(patch: pytest.MonkeyPatch, axis: Callable[[BatchAxis], BatchAxis]) -> None:
    """Rules take rows by another axis than was measured."""
    patch.setattr(
        recorder._RecordedCall,
        "front",
        lambda self, tensor, measured: axis(measured).to_front(self.widened(tensor), self.examples),
    )


def test_rows_in_the_wrong_order_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_order(axis: BatchAxis) -> BatchAxis:
        return BatchAxis(position=axis.position, order="example" if axis.order == "inner" else "inner")

    reading(monkeypatch, other_order)
    with refused_by_name(FAMILIES["rows apart"]):
        check_of(FAMILIES["rows apart"], torch.float64)


def test_the_wrong_axis_for_the_examples_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many positions as examples: the positions' axis fits as well."""
    reading(monkeypatch, lambda axis: BatchAxis(position=1 - axis.position))
    module = FAMILIES["linear"].module()
    batch = ExampleBatch.from_call((Numbers()(2, 2, 4),), {})
    with refused_by_name(FAMILIES["linear"]):
        refuse_mismatch(TapeEngine(module), batch, dict(module.named_parameters()))


def without_cross_terms(patch: pytest.MonkeyPatch) -> None:
    """Several uses of one weight: norms as if they were uses of several."""

    class Apart(Contribution):
        def __init__(self, parts: list[Contribution]) -> None:
            self.parts = parts

        def _norms_squared(self) -> Tensor:
            return torch.stack([part.norms_squared() for part in self.parts]).sum(0)

        def weighted_sum(self, weights: Tensor) -> Tensor:
            return torch.stack([part.weighted_sum(weights) for part in self.parts]).sum(0)

        def materialize(self) -> Tensor:
            return torch.stack([part.materialize() for part in self.parts]).sum(0)

        def rows(self, index: Tensor) -> Contribution:
            return Apart([part.rows(index) for part in self.parts])

        def double(self) -> Contribution:
            return Apart([part.double() for part in self.parts])

    patch.setattr(gradients, "_joined", lambda parts: Apart(list(parts)))


def views_as_if_disjoint(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gradients, "disjoint", lambda *_: True)


def tied_without_its_cross_term(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        embedding.Tied,
        "norms_squared",
        lambda self: self._lookups.norms_squared() + self._products.norms_squared(),
    )


def gram_without_its_off_diagonal(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: products.OuterProducts, a: Tensor, g: Tensor) -> Tensor:
        return (a.square().sum(2) * g.square().sum(2)).sum(1)

    patch.setattr(products, "gram_is_cheaper", lambda *_: True)
    patch.setattr(products.OuterProducts, "_gram_norms", wrong)


@pytest.mark.parametrize(
    ("name", "drop"),
    [
        ("a layer twice", without_cross_terms),
        ("LSTM cell", without_cross_terms),
        ("in place", without_cross_terms),
        ("tied embedding", without_cross_terms),
        ("tied embedding", tied_without_its_cross_term),
        ("overlapping views", views_as_if_disjoint),
        ("linear", gram_without_its_off_diagonal),
        ("matmul", gram_without_its_off_diagonal),
        ("LSTM", gram_without_its_off_diagonal),
    ],
)
def test_a_dropped_cross_term_is_refused(
    name: str, drop: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes norms, and no sum."""
    drop(monkeypatch)
    with refused_by_name(FAMILIES[name]):
        check_of(FAMILIES[name], torch.float64)


@pytest.mark.parametrize("broken", [None, *BREAKS])
def test_a_private_run_does_not_take_its_first_step(broken: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    numbers = Numbers()
    data = TensorDataset(numbers(8, 4).float(), numbers(8, 2).float())
    loader = DataLoader(data, batch_size=8)
    plan = dpdl.PrivacyPlan.for_loader(loader, steps=2, noise_multiplier=1.0, max_grad_norm=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    private = dpdl.make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loader,
        plan,
        execution=dpdl.Execution(engine="tape", insecure_seed=1),
    )
    if broken is not None:
        BREAKS[broken](monkeypatch, FAMILIES["linear"])

    def step() -> None:
        for x, y in private.loader:
            private.optimizer.zero_grad()
            nn.functional.mse_loss(private.model(x), y).backward()
            private.optimizer.step()

    if broken is None:
        step()
        assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())
        return
    with pytest.raises(ModelError, match=r"2\.(weight|bias)"):
        step()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
