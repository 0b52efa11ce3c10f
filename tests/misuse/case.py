"""A way to use the library wrongly, and how it is shown to be refused before anything is spent, or to be harmless.

    @misuse("Order of calls", tried="two steps on one batch", refused=StepError)
    def second_step(trial: Trial) -> None:
        private = small_run()
        train_on(private, next(iter(private.loader)))
        with trial.refused(private):
            private.optimizer.step()

A refused case fails unless each of its `trial.refused` blocks raises an error of the declared class and leaves all that
it was given as it was: weights, buffers, optimizer, ledger, files. A harmless case shows by its assertions that it is.
"""

from __future__ import annotations

import copy
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import dpdl
from dpdl.errors import PrivacyWarning
from dpdl.ledger_file import LedgerFile
from tests.small_run import everything_that_counts, same, weights_of

__all__ = ["Case", "Outcome", "Trial", "first_sentence", "listed", "misuse"]

SEED = 3  # of models and data that a case makes up

Kept = dpdl.Private | nn.Module | Optimizer | dpdl.Ledger | LedgerFile | Path


class Trial:
    """What a case reports to.

    Args:
        expected: the class of error (or warning) that the case is to bring.
        folder: an empty one, for files.
    """

    def __init__(self, expected: type[Exception] | None, folder: Path) -> None:
        self._expected = expected
        self.folder = folder
        self.caught: list[str] = []

    @contextmanager
    def refused(self, *kept: Kept, saying: str = "") -> Iterator[None]:
        """The block raises an error of the case's class whose text has `saying`, and changes nothing of `kept`."""
        assert self._expected is not None, "the case is declared harmless"
        before = [_snapshot(thing) for thing in kept]
        try:
            yield
        except self._expected as error:
            text = str(error)
        else:
            raise AssertionError("nothing was refused")
        assert saying in text, f"{saying!r} is missing from: {text}"
        self.caught.append(re.sub(r"\.(run\.pt)\.\w+", r"\1", text.replace(f"{self.folder}{os.sep}", "")))
        after = [_snapshot(thing) for thing in kept]
        assert same(before, after), "the refusal changed something"

    @contextmanager
    def warned(self) -> Iterator[None]:
        """The block warns that it is weaker than it looks."""
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            yield
        texts = [str(one.message) for one in found if issubclass(one.category, PrivacyWarning)]
        assert texts, "nothing was warned of"
        self.caught += texts


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a case.

    Attributes:
        kind: the name of the error's class, or "harmless".
        text: the error's first sentence, or how it is harmless.
    """

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way to use the library wrongly.

    Attributes:
        name: of the function that tries it.
        group: what it has to do with.
        tried: what it is.
        peer: what a peer does with it, where that is known.
        refused: the error that it brings; None if it is harmless.
        harmless: how it is harmless; empty if it is refused.
        fails: why the library does not hold this yet; empty if it does.
        attempt: tries it.
    """

    name: str
    group: str
    tried: str
    peer: str
    refused: type[Exception] | None
    harmless: str
    fails: str
    attempt: Callable[[Trial], None] = field(repr=False)

    @property
    def kind(self) -> str:
        """The declared outcome's kind."""
        if self.fails:
            return "FAILS"
        return "harmless" if self.refused is None else self.refused.__name__

    def outcome_as_declared(self) -> Outcome:
        """Without trying it: an error's text is left out."""
        return Outcome(kind=self.kind, text=self.fails or self.harmless)

    def run(self) -> Outcome:
        """Try it.

        Raises:
            AssertionError: the outcome is not the declared one.
        """
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            trial = Trial(self.refused, Path(folder))
            self.attempt(trial)
        if self.refused is None:
            return Outcome(kind="harmless", text=self.harmless)
        assert trial.caught, "the case tried nothing"
        return Outcome(kind=self.refused.__name__, text=first_sentence(trial.caught[0]))


_cases: dict[str, Case] = {}


def misuse(
    group: str,
    *,
    tried: str,
    peer: str = "",
    refused: type[Exception] | None = None,
    harmless: str = "",
    fails: str = "",
) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Put a function on the list of cases; arguments as in `Case`."""
    assert (refused is None) != (harmless == ""), "a case is refused, or harmless somehow"

    def listed_case(attempt: Callable[[Trial], None]) -> Callable[[Trial], None]:
        name = attempt.__name__.replace("_", " ")
        assert name not in _cases, f"two cases are called {name!r}"
        _cases[name] = Case(
            name=name,
            group=group,
            tried=tried,
            peer=peer,
            refused=refused,
            harmless=harmless,
            fails=fails,
            attempt=attempt,
        )
        return attempt

    return listed_case


def listed(*groups: str) -> tuple[Case, ...]:
    """All cases, group by group."""
    return tuple(sorted(_cases.values(), key=lambda case: groups.index(case.group)))


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence."""
    line = " ".join(text.split())
    end = re.search(r"[.?!](?= [A-Z])|\.$", line)
    return line if end is None else line[: end.end()]


def _snapshot(thing: Kept) -> Any:
    if isinstance(thing, dpdl.Private):
        within = thing.optimizer.ledger.within
        outer = _snapshot(within) if isinstance(within, (dpdl.Ledger, LedgerFile)) else None
        return [everything_that_counts(thing), outer]
    if isinstance(thing, nn.Module):
        return weights_of(thing)
    if isinstance(thing, Optimizer):
        return copy.deepcopy(thing.state_dict())
    if isinstance(thing, dpdl.Ledger):
        return thing.to_json()
    if isinstance(thing, LedgerFile):
        return thing.path.read_bytes()
    return thing.read_bytes()
