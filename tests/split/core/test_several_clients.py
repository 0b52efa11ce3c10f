"""Clients in turn, with each kind of weight synchronisation, and SplitFed: each is plain training in that order."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import dpdl
from accountants import NeighboringRelation
from dpdl.errors import ChannelError, ParameterError
from dpdl.split.channel import Packet
from dpdl.split.direct_channel import DirectChannel
from dpdl.split.session import SplitRun
from dpdl.split.splitfed import SplitFed, average
from dpdl.split.weight_sync import TurnTaking, WeightShelf
from tests.split.core.networks import Case, cases
from tests.split.core.runs import RATE, SEED, Mechanism, batches, known_noise, plan_of, run_of
from tests.split.core.whole_network import Sums, clipped_sums, distance, parameters, step

NAMES = ("north", "south", "east")
VANILLA = next(case for case in cases() if case.name == "vanilla")


def clients(*, shared: bool) -> tuple[list[Case], dict[str, SplitRun]]:
    """Three clients with data of their own; one server for all, or a copy for each."""
    found, runs = [], {}
    top = copy.deepcopy(VANILLA.modules["top"])
    for number, name in enumerate(NAMES):
        case = VANILLA.fresh()
        generator = torch.Generator().manual_seed(number)
        data = {
            "x": torch.randn(60, 4, generator=generator).double(),
            "y": torch.randint(3, (60,), generator=generator),
        }
        case = replace(
            case, data=data, modules={"bottom": case.modules["bottom"], "top": top} if shared else case.modules
        )
        if shared and runs:
            graph = case.graph(case.modules)
            bottom = torch.optim.SGD(case.modules["bottom"].parameters(), lr=RATE)
            execution = dpdl.Execution(insecure_seed=SEED, accumulate_dtype=torch.float64)
            servers = runs["north"].servers
            runs[name] = SplitRun(
                graph, {"client": bottom}, data, plan_of(), client=name, servers=servers, execution=execution
            )
        else:
            runs[name] = run_of(case, plan_of(), client=name)
        found.append(case)
    return found, runs


def whole_steps(case: Case, rows: Sequence[Sequence[int]], first: int) -> None:
    """Plain steps of the whole network on these batches, from that position on."""
    for number, batch in enumerate(rows, start=first):
        sums = clipped_sums(case, batch, part=dict.fromkeys(("bottom", "top"), 0.7 / 2**0.5), joint=None)
        noise = {name: known_noise(number, name, p) for name, p in parameters(case).items()}
        step(case, sums, noise, divisor=6, rate=RATE)


@pytest.mark.parametrize("sync", ["peer_to_peer", "server", "none"])
def test_turns_are_plain_training_on_one_clients_rows_after_the_others(
    sync: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Mechanism(noise=known_noise).use(monkeypatch)
    found, runs = clients(shared=True)
    shelf = WeightShelf()
    shelves = {name: DirectChannel(shelf.handle) for name in NAMES} if sync == "server" else None
    whole = [copy.deepcopy(case) for case in found]
    turns = TurnTaking({name: run.client for name, run in runs.items()}, sync=sync, shelf=shelves)
    turns.run(rounds=2, steps=3)
    top = whole[0].modules["top"]
    bottom = whole[0].modules["bottom"]
    for number in (0, 1):
        for case, run in zip(whole, runs.values(), strict=True):
            own = bottom if sync != "none" else case.modules["bottom"]
            one = replace(case, modules={"bottom": own, "top": top})
            whole_steps(one, batches(run, 6)[3 * number : 3 * number + 3], 3 * number)
    last = found[-1]
    expected = replace(whole[-1], modules={"bottom": bottom, "top": top}) if sync != "none" else whole[-1]
    expected = replace(expected, modules={**expected.modules, "top": top})
    assert distance(_plain(last), _plain(expected)) < 1e-10
    if sync == "none":
        for case, one in zip(found, whole, strict=True):
            mine = {name: p.detach() for name, p in case.modules["bottom"].named_parameters()}
            assert distance(mine, dict(one.modules["bottom"].named_parameters())) < 1e-10


def _plain(case: Case) -> Sums:
    return {name: p.detach() for name, p in parameters(case).items()}


@pytest.mark.parametrize("version", [1, 2])
def test_splitfed_is_plain_training_and_an_average(version: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Mechanism(noise=known_noise).use(monkeypatch)
    found, runs = clients(shared=version == 2)
    shares = {"north": 1.0, "south": 2.0, "east": 5.0}
    whole = [copy.deepcopy(case) for case in found]
    top = whole[0].modules["top"]
    fed = SplitFed(runs, version=version, factors=shares, insecure_seed=3)
    for number in (0, 1):
        order = fed.order()
        assert sorted(order) == sorted(NAMES)
        fed.round(steps=3)
        for name in order:
            case = whole[NAMES.index(name)]
            one = case if version == 1 else replace(case, modules={"bottom": case.modules["bottom"], "top": top})
            whole_steps(one, batches(runs[name], 6)[3 * number : 3 * number + 3], 3 * number)
        with torch.no_grad():
            for part in ("bottom", "top") if version == 1 else ("bottom",):
                for values in zip(*(case.modules[part].parameters() for case in whole), strict=True):
                    mean = sum(p * share for p, share in zip(values, shares.values(), strict=True)) / 8
                    for p in values:
                        p.copy_(mean)
    for case, one in zip(found, whole, strict=True):
        expected = one if version == 1 else replace(one, modules={"bottom": one.modules["bottom"], "top": top})
        assert distance(_plain(case), _plain(expected)) < 1e-10


def test_each_client_spends_on_its_own_records_alone() -> None:
    ledgers = {name: dpdl.Ledger(relation=NeighboringRelation.ADD_OR_REMOVE) for name in NAMES[:2]}
    first = run_of(VANILLA.fresh(), plan_of(noise_multiplier=1.0), client="north", ledger=ledgers["north"])
    case = VANILLA.fresh()
    second = SplitRun(
        case.graph(case.modules),
        {"client": torch.optim.SGD(case.modules["bottom"].parameters(), lr=RATE)},
        case.data,
        plan_of(noise_multiplier=2.0),
        client="south",
        servers=first.servers,
        ledger=ledgers["south"],
    )
    TurnTaking({"north": first.client, "south": second.client}, sync="peer_to_peer").run(rounds=1, steps=4)
    assert [ledger.releases for ledger in ledgers.values()] == [4, 4]
    at_server = {client.name: client.run.steps_taken for client in first.servers["server"].party.clients}
    assert at_server == {"north": 4, "south": 4}


def test_several_clients_that_do_not_fit() -> None:
    _, runs = clients(shared=False)
    north = runs["north"].client
    with pytest.raises(ParameterError, match="at least two"):
        TurnTaking({"north": north}, sync="none")
    with pytest.raises(ParameterError, match="sync must be"):
        TurnTaking({"north": north, "south": runs["south"].client}, sync="gossip")  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="shelf is a channel"):
        TurnTaking({"north": north, "south": runs["south"].client}, sync="server")
    with pytest.raises(ParameterError, match="one copy of the other parties"):
        SplitFed(runs, version=2)
    _, together = clients(shared=True)
    with pytest.raises(ParameterError, match="copy of the other parties for each"):
        SplitFed(together, version=1)
    with pytest.raises(ParameterError, match="positive"):
        SplitFed(runs, version=1, factors={"north": 1.0, "south": 0.0, "east": 1.0})
    with pytest.raises(ChannelError, match="left weights"):
        WeightShelf().handle(Packet(kind="get weights"))


def test_average_is_weighted_and_keeps_whole_numbers() -> None:
    one, two = {"w": torch.tensor([1.0]), "n": torch.tensor(3)}, {"w": torch.tensor([4.0]), "n": torch.tensor(3)}
    mean = average([one, two], [2.0, 1.0])
    assert mean["w"].item() == pytest.approx(2.0)
    assert mean["n"].item() == 3
