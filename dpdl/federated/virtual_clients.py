"""Clients that exist when they are asked for: thousands of them in one process.

    clients = VirtualClients(make_client, 1000)     # nothing is made yet
    run_federated(server, clients, rounds=10)       # makes those that are chosen

`make_client(index, number)` makes client `index` of `number`; the same function can serve Flower, whose nodes have the
same two numbers. A client is made once and kept, because it may hold a ledger in memory, and a client that was made
anew would have forgotten what it spent. With `keep`, only so many are held: for clients whose ledgers are files.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence

from accountants import arguments
from dpdl.errors import LedgerError, ParameterError
from dpdl.federated.messages import Client
from dpdl.ledger_file import LedgerFile

__all__ = ["VirtualClients"]


class VirtualClients(Mapping[str, Client]):
    """A mapping from names to clients, each of which is made when it is first asked for.

    Args:
        make_client: given a client's index and the number of clients, makes it, under the name that it has here.
        number: how many there are.
        names: one a client; "client-0", "client-1", ... by default.
        keep: how many clients to hold; None for all. One that is let go is made anew when it is asked for again, which
            is refused of a client that keeps a ledger in memory.

    Raises:
        ParameterError: a name stands twice, is missing or empty, or an argument is out of range.

    Example:
        >>> clients = VirtualClients(make_client, 1000)              # doctest: +SKIP
        >>> clients["client-7"].name, len(clients), clients.made     # doctest: +SKIP
        ('client-7', 1000, ('client-7',))
    """

    def __init__(
        self,
        make_client: Callable[[int, int], Client],
        number: int,
        *,
        names: Sequence[str] | None = None,
        keep: int | None = None,
    ) -> None:
        number = arguments.positive_whole("number", number, remedy="Give a number of clients such as 10.")
        given = [f"client-{index}" for index in range(number)] if names is None else list(names)
        if len(given) != number:
            raise ParameterError(f"names must be {number}, one a client, got {len(given)}.")
        refuse_bad_names(given)
        if keep is not None:
            keep = arguments.positive_whole("keep", keep, remedy="Give a number such as 10, or None to keep all.")
        self._make = make_client
        self._index = {name: index for index, name in enumerate(given)}
        self._keep = keep
        self._held: OrderedDict[str, Client] = OrderedDict()  # the one that was asked for longest ago first
        self._made: dict[str, None] = {}

    def __getitem__(self, name: str) -> Client:
        """The client of that name, made now if it is not held.

        Raises:
            KeyError: there is no such client.
            ParameterError: `make_client` gave it another name.
            LedgerError: a client has to be let go, and its spending would be forgotten.
        """
        index = self._index[name]
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name]
        self._make_room()
        client = self._make(index, len(self._index))
        if client.name != name:
            raise ParameterError(
                f"make_client({index}, {len(self)}) made a client with the name {client.name!r}, but it is {name!r} "
                f"here. Name it f'client-{{index}}', or give VirtualClients(..., names=...)."
            )
        self._held[name] = client
        self._made[name] = None
        return client

    def __contains__(self, name: object) -> bool:
        return name in self._index  # without making it, as a mapping's own would

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def made(self) -> tuple[str, ...]:
        """Names of the clients that were asked for so far, in that order."""
        return tuple(self._made)

    def __repr__(self) -> str:
        return f"VirtualClients({len(self)} clients, {len(self._held)} held)"

    def _make_room(self) -> None:
        if self._keep is None or len(self._held) < self._keep:
            return
        name, client = next(iter(self._held.items()))
        if not _spending_outlives(client):
            raise LedgerError(
                f"keep={self._keep} clients are held, and '{name}' would be let go, but its ledger is in memory: what "
                "it has spent would be forgotten. Give its client a LedgerFile, or leave keep out."
            )
        del self._held[name]


def refuse_bad_names(names: Sequence[str]) -> None:
    """Raise if a name is empty, not a string, or stands twice."""
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str) or not name:
            raise ParameterError(f"the name of a client must be a non-empty string, got {name!r}.")
        if name in seen:
            raise ParameterError(f"two clients have the name {name!r}. Give each its own: a ledger and noise go by it.")
        seen.add(name)


def _spending_outlives(client: Client) -> bool:
    """Whether all that the client, and what it wraps, has spent is in files. Without a ledger it spends nothing."""
    inner = getattr(client, "client", None)  # of a wrapper such as LocalUpdateDP
    ledger = getattr(client, "ledger", None)
    return (ledger is None or isinstance(ledger, LedgerFile)) and (inner is None or _spending_outlives(inner))
