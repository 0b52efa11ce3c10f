"""Virtual clients are made when asked for, under their names, and never forget what they have spent."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpdl.errors import LedgerError, ParameterError
from dpdl.federated.virtual_clients import VirtualClients
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from tests.federated.runner.fakes import AddingClient


def numbered(index: int, number: int) -> AddingClient:
    return AddingClient(f"client-{index}", number=index / number)


def test_a_hundred_thousand_clients_are_named_and_none_is_made() -> None:
    def never(index: int, number: int) -> AddingClient:
        raise AssertionError("made too early")

    clients = VirtualClients(never, 100_000)
    assert len(clients) == 100_000
    assert list(clients)[99_999] == "client-99999"
    assert "client-5" in clients
    assert "client-100000" not in clients
    assert clients.made == ()


def test_a_client_is_made_once_from_its_index_and_the_number() -> None:
    clients = VirtualClients(numbered, 4)
    assert clients["client-3"].number == 0.75
    assert clients["client-3"] is clients["client-3"]
    clients["client-1"]
    assert clients.made == ("client-3", "client-1")


def test_other_names() -> None:
    wards = ["north", "south"]
    clients = VirtualClients(lambda index, _: AddingClient(wards[index], 1), 2, names=wards)
    assert clients["south"].name == "south"
    with pytest.raises(KeyError):
        clients["client-0"]


def test_a_client_that_calls_itself_otherwise_is_refused() -> None:
    clients = VirtualClients(lambda index, _: AddingClient("same", 1), 2)
    with pytest.raises(ParameterError, match=r"'same'.*'client-1'"):
        clients["client-1"]
    assert clients.made == ()


def test_with_keep_the_one_asked_for_longest_ago_goes_if_its_ledger_is_a_file(tmp_path: Path) -> None:
    def filed(index: int, _: int) -> AddingClient:
        return AddingClient(f"client-{index}", 1, ledger=LedgerFile(tmp_path / f"{index}.ledger"))

    clients = VirtualClients(filed, 3, keep=2)
    first, second = clients["client-0"], clients["client-1"]
    assert clients["client-0"] is first
    clients["client-2"]
    assert clients["client-0"] is first
    assert clients["client-1"] is not second
    assert clients.made == ("client-0", "client-1", "client-2")


def test_with_keep_a_ledger_in_memory_is_never_let_go() -> None:
    def held(index: int, _: int) -> AddingClient:
        return AddingClient(f"client-{index}", 1, ledger=Ledger(relation="add_or_remove"))

    clients = VirtualClients(held, 3, keep=1)
    first = clients["client-0"]
    with pytest.raises(LedgerError, match="client-0"):
        clients["client-1"]
    assert clients["client-0"] is first


def test_with_keep_what_a_wrapper_wraps_counts_as_well(tmp_path: Path) -> None:
    def wrapped(index: int, _: int) -> AddingClient:
        outer = AddingClient(f"client-{index}", 1, ledger=LedgerFile(tmp_path / f"{index}.ledger"))
        outer.client = AddingClient(f"client-{index}", 1, ledger=Ledger(relation="add_or_remove"))
        return outer

    clients = VirtualClients(wrapped, 2, keep=1)
    clients["client-0"]
    with pytest.raises(LedgerError, match="client-0"):
        clients["client-1"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"number": 0}, "number"),
        ({"number": 2, "names": ["a"]}, "names must be 2"),
        ({"number": 2, "names": ["a", "a"]}, "'a'"),
        ({"number": 2, "names": ["a", ""]}, "non-empty"),
        ({"number": 2, "keep": 0}, "keep"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        VirtualClients(numbered, **settings)
