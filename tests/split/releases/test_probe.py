"""Batch normalisation, contrastive terms and means behind the cut are found with made-up rows, not private ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpdl.errors import ExampleMixingError, LossError, ModelError, ParameterError
from dpdl.secure_random import RandomStream
from dpdl.split.probe import Send, probe_rows

SHAPE = (6,)


def summed(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum")


def contrastive(outputs: Tensor, labels: Tensor) -> Tensor:
    """NT-Xent: rows of one label attract, all others repel."""
    unit = F.normalize(outputs, dim=1)
    near = (unit @ unit.T / 0.5).masked_fill(torch.eye(len(unit), dtype=torch.bool), -torch.inf)
    alike = (labels[:, None] == labels).float().fill_diagonal_(0)
    return -(F.log_softmax(near, dim=1).masked_fill(alike == 0, 0) * alike).sum()


def batch_normalised(outputs: Tensor, labels: Tensor) -> Tensor:
    return summed((outputs - outputs.mean(0)) / (outputs.std(0) + 1), labels)


def hardest_first(outputs: Tensor, labels: Tensor) -> Tensor:
    """Only the worst row of the batch counts."""
    return F.cross_entropy(outputs, labels, reduction="none").max()


def server(top: nn.Module, loss=summed) -> Send:  # type: ignore[no-untyped-def]
    def send(rows: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        leaf = rows.requires_grad_()
        loss(top(leaf), labels).backward()
        assert leaf.grad is not None
        return leaf.grad

    return send


def top(*middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.ReLU(), nn.Linear(8, 5))


def probe(send: Send, seed: int = 0, **arguments: object):  # type: ignore[no-untyped-def]
    return probe_rows(send, SHAPE, classes=5, stream=RandomStream.from_insecure_seed(seed), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_are_treated_one_by_one_pass(seed: int, dtype: torch.dtype) -> None:
    result = probe(server(top(nn.LayerNorm(8)).to(dtype)), seed, dtype=dtype)
    assert result.batches == 7
    assert result.difference < 1e-5


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    "send",
    [
        server(top(nn.BatchNorm1d(8))),
        server(top(), contrastive),
        server(top(), batch_normalised),
        server(top(), hardest_first),
    ],
    ids=["BatchNorm", "contrastive", "normalised by the batch", "maximum over the batch"],
)
def test_whatever_mixes_rows_is_found_whichever_rows_are_made_up(send: Send, seed: int) -> None:
    with pytest.raises(ExampleMixingError):
        probe(send, seed)


@pytest.mark.parametrize("rows", [4, 8, 64, 256])
def test_it_is_found_among_many_rows_too(rows: int) -> None:
    with pytest.raises(ExampleMixingError, match="mixes examples"):
        probe(server(top(nn.BatchNorm1d(8))), rows=rows)


def test_a_frozen_batch_norm_passes() -> None:
    assert probe(server(top(nn.BatchNorm1d(8)).eval())).difference < 1e-5


def test_a_mean_is_named_as_such() -> None:
    with pytest.raises(LossError, match="reduction='sum'"):
        probe(server(top(), F.cross_entropy))


def test_random_numbers_are_told_from_mixing() -> None:
    with pytest.raises(ExampleMixingError, match="fixed random numbers"):
        probe(server(top(nn.Dropout(0.5))))


def test_a_head_that_starts_at_zero_shows_nothing_and_is_refused() -> None:
    net = top(nn.BatchNorm1d(8))  # mixes rows, and nobody could see it
    nn.init.zeros_(net[-1].weight)  # type: ignore[arg-type, index, union-attr]
    with pytest.raises(ModelError, match="shows nothing"):
        probe(server(net))


def test_a_batch_that_shows_nothing_is_followed_by_another() -> None:
    batches: list[Tensor] = []

    def sleepy(rows: Tensor, labels: Tensor | None) -> Tensor:
        batches.append(rows)
        return torch.zeros_like(rows) if len(batches) < 3 else rows

    assert probe(sleepy).batches == 9
    assert not torch.equal(batches[0], batches[1])


def test_a_gradient_of_one_row_alone_shows_nothing_of_others() -> None:
    chosen: list[Tensor] = []

    def largest(rows: Tensor, labels: Tensor | None) -> Tensor:
        """One row of each of the three first batches has a gradient, and keeps it: nothing is seen to mix."""
        if len(chosen) < 3:
            chosen.append(rows[0])
        return rows * (rows == chosen[-1]).all(1, keepdim=True)

    with pytest.raises(ModelError, match="shows nothing"):
        probe(largest)


def test_what_is_not_a_gradient_for_each_row_is_refused() -> None:
    for wrong in (lambda rows, labels: rows[:1], lambda rows, labels: rows * torch.nan, lambda rows, labels: None):
        with pytest.raises(ModelError):
            probe(wrong)


def test_labels_are_left_out_where_the_other_side_has_its_own() -> None:
    def send(rows: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is None
        return 2 * rows

    assert probe_rows(send, (3, 2), scale=0.1).difference == 0


def test_made_up_rows_are_as_large_as_they_are_asked_to_be_and_new_each_time() -> None:
    seen: list[Tensor] = []

    def send(rows: Tensor, labels: Tensor | None) -> Tensor:
        seen.append(rows.clone())
        return rows

    for number in range(2):
        probe_rows(send, (400,), rows=32, scale=3.0, stream=RandomStream.from_insecure_seed(0), number=number)
    assert torch.allclose(seen[0].norm(dim=1), torch.full((32,), 3.0), rtol=0.2)
    assert not torch.isclose(seen[0], seen[7], atol=1e-7).all(1).any()


def test_nothing_of_torchs_own_generator_is_used_up() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    probe(lambda rows, labels: rows)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("arguments", [{"rows": 3}, {"scale": 0.0}, {"dtype": torch.float16}])
def test_arguments_out_of_range_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ParameterError, match="rows >= 4"):
        probe(lambda rows, labels: rows, **arguments)
