"""A client that claims what a test tells it to, and what tests of reports ask again and again."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import dp_accounting
from dp_accounting.pld import PLDAccountant

from accountants import Gaussian, NeighboringRelation, PoissonSampled
from dpdl.claims import AdversaryReport, Claim
from dpdl.federated.messages import FitReply, FitRequest, Refusal
from dpdl.federated.report import ADVERSARIES, federated_report
from dpdl.federated.server import FederatedServer
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile

DELTA = 1e-5
ADD_OR_REMOVE, REPLACE_ONE = NeighboringRelation.ADD_OR_REMOVE, NeighboringRelation.REPLACE_ONE
STEP = PoissonSampled(0.1, Gaussian(1.2))


class Told:
    """A client that claims what a test tells it to; a record's epsilon is that of its ledger, if it has one."""

    def __init__(
        self,
        name: str,
        *,
        record: float | None = None,
        ledger: Ledger | LedgerFile | None = None,
        bare: Sequence[str] = (),
        relation: str = "adding or removing one record",
        unprotected: Sequence[str] = (),
        **said: Any,
    ) -> None:
        self.name, self.record, self.bare, self.relation, self.said = name, record, bare, relation, said
        self.unprotected = tuple(unprotected)
        if ledger is not None:
            self.ledger = ledger

    def answer(self, request: FitRequest) -> FitReply | Refusal:
        raise NotImplementedError

    def report(self, delta: float) -> AdversaryReport:
        ledger: Ledger | LedgerFile | None = getattr(self, "ledger", None)
        epsilon = self.record if ledger is None else ledger.epsilon(delta)
        claims = [
            Claim(
                against=adversary,
                unit="record",
                because=f"of {self.name}" if self.name.isprintable() else "said",
                epsilon=None if adversary in self.bare else epsilon,
                delta=delta,
                relation=self.relation,
            )
            for adversary in ADVERSARIES
        ]
        return AdversaryReport(title="told", adversaries=ADVERSARIES, claims=tuple(claims), **self.said)


def ledger_of(steps: int, **settings: Any) -> Ledger:
    ledger = Ledger(**{"relation": ADD_OR_REMOVE, **settings})
    for _ in range(steps):
        ledger.record(STEP)
    return ledger


def claims(report: AdversaryReport, adversary: str, unit: str) -> list[Claim]:
    return [claim for claim in report.against(adversary) if claim.unit.startswith(unit)]


def only(report: AdversaryReport, adversary: str, unit: str) -> Claim:
    (claim,) = claims(report, adversary, unit)
    return claim


def report_of(*clients: Any, server: FederatedServer | None = None, **settings: Any) -> AdversaryReport:
    return federated_report(server=server, clients=clients, delta=DELTA, **settings)


def pld_epsilon(poisson: Sequence[tuple[float, float, int]], relation: str = "ADD_OR_REMOVE_ONE") -> float:
    return _pld_epsilon(tuple(poisson), relation)


@functools.cache
def _pld_epsilon(poisson: tuple[tuple[float, float, int], ...], relation: str) -> float:
    """Google's accountant: (noise multiplier, rate, steps), composed."""
    accountant = PLDAccountant(getattr(dp_accounting.NeighboringRelation, relation), value_discretization_interval=1e-3)
    for noise, rate, steps in poisson:
        inner: Any = dp_accounting.GaussianDpEvent(noise)
        accountant.compose(inner if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, inner), steps)
    return float(accountant.get_epsilon(DELTA))
