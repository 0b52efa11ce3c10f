"""Rounds of an image federation that are saved as they are played, and gone on with in another process.

    saved = begin(federation, settings, data=..., data_path=...)     # or, later:
    saved = gone_on(federation, SavedRun.read(file), data="...")     # ledgers are where they were
    ended = play(federation, saved, file=file, progress=True, stop=interrupted)

Clients come back with their ledgers: what they have spent is spent. The server comes back from the file, and with it
every round that was closed. A round that a process was killed in is played anew, and what it has spent is spent twice:
once for nothing, since clients have other noise the second time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from dpdl.claims import AdversaryReport
from dpdl.errors import BudgetExceededError, CheckpointError, PlanExhaustedError
from dpdl.federated.history import History
from dpdl.federated.image_federation import FederationSettings, ImageFederation
from dpdl.federated.runner import run_federated
from dpdl.federated.saved_run import SavedRun

__all__ = ["EndedRun", "begin", "gone_on", "play"]

_NAMED = 5  # clients that are named in a line


@dataclass(frozen=True, kw_only=True)
class EndedRun:
    """A run that has come to its end, or to a stop.

    Attributes:
        saved: as it is in the file.
        report: what is promised to whom.
        why: why not all rounds were played; "" if they were.
    """

    saved: SavedRun
    report: AdversaryReport
    why: str = ""


def begin(federation: ImageFederation, settings: FederationSettings, *, data: str, data_path: str | None) -> SavedRun:
    """A run without rounds.

    Args:
        federation: what the settings describe.
        settings: with which it is to be resumed.
        data: the data's name.
        data_path: where it was read from.
    """
    plan = federation.server.plan
    return SavedRun(
        settings=settings,
        data=data,
        data_path=data_path,
        server=federation.server.state_dict(),
        history=History(delta=settings.delta, secret_participation=plan is not None and plan.amplified),
    )


def gone_on(federation: ImageFederation, saved: SavedRun, *, data: str, not_the_data: str | None = None) -> SavedRun:
    """Bring a saved run into a federation that was made with its settings, over its ledgers.

    Args:
        federation: its server goes on from the saved state.
        saved: the run.
        data: the name of the data that is there now.
        not_the_data: why rounds that were begun and not answered ended, if it was not their data.

    Raises:
        CheckpointError: it is finished, of other data, or clients wait for their owner's word; nothing was changed.
        ParameterError: that word is not one line of text.
    """
    if saved.finished:
        raise CheckpointError(
            f"The run is finished, after {saved.server['round']} of {saved.settings.rounds} rounds: there is "
            "nothing to resume. Begin another one, in another --output."
        )
    if data != saved.data:
        raise CheckpointError(f"The run was of {saved.data!r}, and this is {data!r}. Resume it with its own data.")
    left = federation.left_off()
    if left and not_the_data is None:
        names = ", ".join([*left][:_NAMED]) + (f" and {len(left) - _NAMED} more" if len(left) > _NAMED else "")
        raise CheckpointError(
            f"A round was begun and not answered by {names}. If the data did not bring that about, say what did: "
            "--resume --not-the-data 'power cut'. The report cites it."
        )
    federation.server.load_state_dict(saved.server)
    for client in left.values():
        client.go_on(not_the_data=not_the_data)
    return saved


def play(
    federation: ImageFederation,
    saved: SavedRun,
    *,
    file: Path,
    progress: bool | Console,
    stop: Callable[[], bool],
) -> EndedRun:
    """Play the rounds that are left; the file is up to date before the first, after each, and at the end.

    Args:
        federation: its server is where the saved run is.
        saved: by `begin` or `gone_on`.
        file: where to save.
        progress: as of `run_federated`.
        stop: asked after each round; True ends the run, which can then be resumed.

    Raises:
        BudgetExceededError, PlanExhaustedError: there is no room for even the first round of all.
        CheckpointError: the file cannot be written.
    """
    server, settings, delta = federation.server, saved.settings, saved.settings.delta
    played = server.round
    spent = federation.spent(_asked(federation, saved.history, played), delta)
    saved.write(file)

    def stop_after_saving() -> bool:
        replace(saved, server=server.state_dict()).write(file)
        return stop()

    later, why = replace(saved.history, rounds=(), notes=()), ""
    try:
        result = run_federated(
            server,
            federation.clients,
            rounds=settings.rounds - played,
            evaluate=federation.evaluate,
            progress=progress,
            delta=delta,
            stop=stop_after_saving,
        )
        later, why = result.history, result.stopped or ""
    except (BudgetExceededError, PlanExhaustedError) as error:
        if not played:
            raise
        why = str(error)
    history = saved.history.followed_by(later, played=played, spent=spent)
    if why and stop() and server.round < settings.rounds:
        why = f"Stopped after {server.round} of {settings.rounds} rounds, as asked."
    report = federation.report(_asked(federation, history, server.round), delta)
    report = replace(report, notes=tuple(dict.fromkeys([*report.notes, *saved.notes])))
    ended = replace(
        saved,
        server=server.state_dict(),
        history=history,
        notes=report.notes,
        finished=server.round >= settings.rounds or not stop(),
    )
    ended.write(file)
    return EndedRun(saved=ended, report=report, why=why)


def _asked(federation: ImageFederation, history: History, played: int) -> tuple[str, ...]:
    """Who was asked, in the order of the first time; all clients, if some rounds are not told of."""
    if len(history.rounds) < played:
        return tuple(federation.clients)
    return tuple(dict.fromkeys(name for record in history.rounds for name in record.chosen))
