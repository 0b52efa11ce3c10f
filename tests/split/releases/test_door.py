"""The door: each kind of content through its mechanism, in the ledger first; the rest is remembered as unprotected."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accountants import NeighboringRelation, PRVAccountant
from dpdl.errors import CheckpointError, ParameterError, StepError
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.secure_random import RandomStream
from dpdl.split.cut_release import CutRelease
from dpdl.split.door import Once, ReleaseDoor
from dpdl.split.gradient_release import GradientRelease
from dpdl.split.labels import MemoizedRandomizedResponse
from dpdl.split.outlet import Leaving
from dpdl.split.part_training import PartTraining
from dpdl.split.row_cache import RowCache
from dpdl.split.row_noise import clip_rows
from tests.split.releases.test_row_account import gdp_epsilon

REPLACE_ONE = NeighboringRelation.REPLACE_ONE
CUT = CutRelease(max_norm=1.0, noise_multiplier=4.0)
ONCE = CutRelease(max_norm=1.0, noise_multiplier=4.0, mode="release_once")


def door(**arguments: Any) -> ReleaseDoor:
    chosen = {
        "training": PartTraining.private(noise_multiplier=5.0),
        "ledger": Ledger(relation=REPLACE_ONE),
        "stream": RandomStream.from_os(),
    }
    return ReleaseDoor(**{**chosen, **arguments})


def leaving(content: str, rows: Tensor, numbers: list[int] | None, step: int = 0, **changes: Any) -> Leaving:
    values = {
        "content": content,
        "name": "bottom",
        "sender": "clinic",
        "receivers": ("server",),
        "rows": rows,
        "row_numbers": None if numbers is None else torch.tensor(numbers),
        "purpose": "train",
        "step": step,
        "session": "s",
    }
    return Leaving(**{**values, **changes})


def epsilon_of(of: ReleaseDoor, receiver: str = "server") -> float:
    return PRVAccountant(relation=REPLACE_ONE).compose(of.event(receiver)).epsilon(1e-5)


def test_a_u_shapes_two_releases_and_its_steps_compose() -> None:
    both = door(activations=CUT, gradients=GradientRelease(max_norm=0.1, noise_multiplier=6.0))
    for step in range(4):
        for content in ("activations", "gradients"):
            sent = both(leaving(content, torch.ones(3, 2), [0, 1, 2], step))
            assert not torch.equal(sent.rows, torch.ones(3, 2))
            assert (sent.pull_back is None) == (content == "gradients")
    mu = math.sqrt(4 * ((2 / 4) ** 2 + (2 / 6) ** 2 + (2 / 5) ** 2))
    assert epsilon_of(both) == pytest.approx(gdp_epsilon(mu), rel=1e-4)
    assert both.unprotected == {}


def test_gradients_go_back_through_the_clip() -> None:
    rows = torch.randn(5, 3, dtype=torch.float64)
    arrived = torch.randn(5, 3, dtype=torch.float64)
    sent = door(activations=CUT)(leaving("activations", rows, [0, 1, 2, 3, 4]))
    assert sent.pull_back is not None
    leaf = rows.clone().requires_grad_()
    clip_rows(leaf, max_norm=1.0).backward(arrived)
    assert torch.allclose(sent.pull_back(arrived), leaf.grad)  # type: ignore[arg-type]


def test_what_has_no_mechanism_leaves_as_it_is_and_is_remembered() -> None:
    open_door = door(activations=CUT)
    truth = torch.tensor([1, 2])
    assert open_door(leaving("labels", truth, [0, 1], receivers=("label server",))).rows is truth
    assert open_door(leaving("gradients", torch.ones(2, 2), [0, 1])).rows.equal(torch.ones(2, 2))
    assert open_door.unprotected == {("label server",): {"labels"}, ("server",): {"gradients"}}


@pytest.mark.parametrize("activations", [None, CUT])
def test_labels_are_flipped_whether_the_party_has_features_or_not(activations: CutRelease | None) -> None:
    plan = MemoizedRandomizedResponse(epsilon=0.1, classes=2)
    party = door(activations=activations, labels=plan)
    truth = torch.zeros(1000, dtype=torch.int64)
    first = party(leaving("labels", truth, list(range(1000)), 0, name="y")).rows
    assert 0.4 < first.float().mean() < 0.55
    assert torch.equal(party(leaving("labels", truth, list(range(1000)), 1, name="y")).rows, first)
    assert party.ledger.releases == 1


def test_labels_without_row_numbers_are_refused() -> None:
    with pytest.raises(ParameterError, match="does not know which rows"):
        door(labels=MemoizedRandomizedResponse(epsilon=1.0, classes=2))(leaving("labels", torch.tensor([1]), None))


def test_two_columns_of_labels_do_not_share_a_file(tmp_path: Path) -> None:
    plan = MemoizedRandomizedResponse(epsilon=1.0, classes=2, path=tmp_path / "labels")
    party = door(labels=plan)
    party(leaving("labels", torch.tensor([1]), [0], name="y"))
    with pytest.raises(ParameterError, match="share the file"):
        party(leaving("labels", torch.tensor([1]), [0], name="z"))


def test_rows_are_released_once_from_what_was_computed_already(tmp_path: Path) -> None:
    data = torch.randn(6, 2)
    net = nn.Linear(2, 3).requires_grad_(False)
    ledger = LedgerFile(tmp_path / "ledger", relation=REPLACE_ONE)
    sent = []
    for _ in range(2):  # processes
        once = Once(encoder=net, inputs=lambda numbers: data[numbers], cache=RowCache(tmp_path / "rows"))
        party = door(activations=ONCE, training=PartTraining.frozen(), ledger=ledger, once=once)
        for step in range(3):
            rows = party(leaving("activations", net(data[[4, 1]]), [4, 1], step)).rows
            sent.append(rows)
    assert all(torch.equal(sent[0], other) for other in sent)
    assert epsilon_of(party) == pytest.approx(gdp_epsilon(2 / 4), rel=1e-4)
    with pytest.raises(ParameterError, match="two doors"):
        party(leaving("activations", net(data[[4]]), [4], 9, name="another part"))


def test_a_frozen_encoder_and_a_head_that_trains_are_each_accounted_as_they_are() -> None:
    data, net = torch.randn(6, 2), nn.Linear(2, 3).requires_grad_(False)
    once = Once(encoder=net, inputs=lambda numbers: data[numbers], cache=RowCache())
    party = door(activations=ONCE, gradients=GradientRelease(max_norm=1.0, noise_multiplier=6.0), once=once)
    for step in range(4):
        party(leaving("activations", net(data[[4, 1]]), [4, 1], step))
        party(leaving("gradients", torch.ones(2, 3), [4, 1], step, name="middle"))
    mu = math.sqrt((2 / 4) ** 2 + 4 * ((2 / 6) ** 2 + (2 / 5) ** 2))
    assert epsilon_of(party) == pytest.approx(gdp_epsilon(mu), rel=1e-4)
    with torch.no_grad():
        net.weight.add_(1)
    with pytest.raises(CheckpointError, match="encoder has changed"):
        party(leaving("activations", net(data[[5]]), [5], 9))


def test_new_records_without_numbers_are_noised_each_time_they_are_asked_about() -> None:
    net = nn.Linear(2, 3).requires_grad_(False)
    once = Once(encoder=net, inputs=lambda numbers: torch.ones(9, 2)[numbers], cache=RowCache())
    party = door(activations=ONCE, training=PartTraining.frozen(), once=once)
    party(leaving("activations", torch.ones(2, 3), [0, 1]))
    seen = [party(leaving("activations", torch.ones(2, 3), None, i, purpose="infer")).rows for i in range(3)]
    assert not torch.equal(seen[0], seen[1])
    assert epsilon_of(party) == pytest.approx(gdp_epsilon(2 / 4 * math.sqrt(1 + 3 * 2)), rel=1e-4)


def test_of_threads_that_come_at_once_with_one_step_one_gets_its_noise() -> None:
    party = door(activations=CUT)

    def ask(_: int) -> bool:
        try:
            party(leaving("activations", torch.zeros(1, 50), [0]))
        except StepError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(16))) == 1
    assert party.ledger.releases == 1


def test_sessions_and_inference_draw_noise_of_their_own() -> None:
    party = door(activations=CUT)
    rows = torch.zeros(2, 3)
    seen = [
        party(leaving("activations", rows, [0, 1], 0, session=session, purpose=purpose)).rows
        for session in ("a", "b")
        for purpose in ("train", "infer")
    ]
    assert all(not torch.equal(seen[i], seen[j]) for i in range(4) for j in range(i))
    mu = math.sqrt(4 * (2 / 4) ** 2 + 2 * (2 / 5) ** 2)  # four releases, two steps
    assert epsilon_of(party) == pytest.approx(gdp_epsilon(mu), rel=1e-4)


def test_receivers_have_accounts_of_their_own_and_those_who_share_rows_share_one() -> None:
    party = door(gradients=GradientRelease(max_norm=1.0, noise_multiplier=6.0), training=PartTraining.frozen())
    for name, receivers in (("a", ("a",)), ("b", ("b",)), ("c", ("a", "b"))):
        party(leaving("gradients", torch.ones(1, 2), [0], name=name, receivers=receivers))
    for receiver in ("a", "b"):
        assert epsilon_of(party, receiver) == pytest.approx(gdp_epsilon(2 / 6 * math.sqrt(2)), rel=1e-4)
    assert epsilon_of(party, "nobody") == 0


def test_what_earlier_processes_released_is_known_before_anything_more_is(tmp_path: Path) -> None:
    party = door(activations=CUT, ledger=LedgerFile(tmp_path / "ledger", relation=REPLACE_ONE))
    for step in range(3):
        party(leaving("activations", torch.ones(1, 2), [0], step, receivers=("a", "b, c")))
    spent = epsilon_of(party, "a")
    later = door(activations=CUT, ledger=LedgerFile(tmp_path / "ledger", relation=REPLACE_ONE))
    for receiver in ("a", "b, c"):
        assert epsilon_of(later, receiver) == spent > 0
    assert PRVAccountant(relation=REPLACE_ONE).compose(later.event()).epsilon(1e-5) == spent
    assert epsilon_of(later, "b") == 0


def test_once_and_its_mode_go_together() -> None:
    once = Once(encoder=nn.Identity(), inputs=lambda numbers: numbers, cache=RowCache())
    for arguments in ({"activations": ONCE}, {"activations": CUT, "once": once}, {"once": once}):
        with pytest.raises(ParameterError, match="go together"):
            door(**arguments)
    with pytest.raises(ParameterError, match="replacing one"):
        door(activations=CUT, ledger=Ledger(relation=NeighboringRelation.ADD_OR_REMOVE))
