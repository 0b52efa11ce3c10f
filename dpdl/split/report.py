"""What a split run may claim, adversary by adversary.

    facts = SplitFacts(rows=RowsSent(release=cut, spent=door.event("server"), training=training), labels="clear",
                       dp_sgd=optimizer.ledger.event)
    print(split_report(facts, delta=1e-5))

No figure stands for the whole: DP-SGD bounds what the trained weights tell, and says nothing of rows that were sent;
noise on rows bounds what they tell of features, and nothing of labels in clear. So each adversary gets its own
claims, and NO GUARANTEE, with what it sees, where nothing protects.

Units. *record*: an example with its label. *features*, *label*: one half of it, the other being fixed and possibly
known. A bound on the record holds for both halves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from accountants import Composed, Event, NeighboringRelation
from dpdl.claims import AdversaryReport, Claim
from dpdl.errors import ParameterError
from dpdl.split.cut_release import CutRelease
from dpdl.split.gradient_release import GradientRelease
from dpdl.split.labels import MemoizedRandomizedResponse
from dpdl.split.part_training import PartTraining
from dpdl.split.sighting import Sighting, claim_of

__all__ = [
    "ADVERSARIES",
    "SEED_GIVEN",
    "SEED_UNKNOWN",
    "GradientsReturned",
    "RowsSent",
    "SplitFacts",
    "save_report",
    "split_report",
]

CONSUMERS, SERVER, OTHERS = "model consumers", "server", "other clients"
LABEL_HOLDER, FEATURE_HOLDER = "label holder", "feature holder"
ADVERSARIES = (CONSUMERS, SERVER, OTHERS, LABEL_HOLDER, FEATURE_HOLDER)

_NOTHING = Composed(())
_ROW_WISE = "the other parties' parts and losses treat examples one by one"
SEED_GIVEN = "an insecure seed was given: whoever knows it can subtract all noise"
SEED_UNKNOWN = "nobody knows the insecure seed that was given: whoever does can remove the noise"
_HONEST = "every party adds its noise and keeps to its clipping norm"
_NAMES = "row numbers stay with their records"
_AS_TOLD = "parts that rows go through change as their door was told: no run has compared it"
_STATE_LEAK = "the parts they went through learn from the same rows without noise: later rows tell of all earlier ones"
_NORMS = "norms of single rows' gradients are exchanged"
_ALWAYS = ("how many rows are sent, and when", "which records take part", "sizes of messages")


@dataclass(frozen=True, kw_only=True)
class RowsSent:
    """Activations, and in a U-shape the gradients of the label side's head, that go to the server.

    Attributes:
        spent: all releases of the worst row (`ReleaseDoor.event`, `RowAccount.event`).
        training: how the parts before them change.
        release: of activations; None if they are sent as they are.
        gradients: of the second release of a U-shape; None if it has none, or sends them as they are (`labels` says).
    """

    spent: Event
    training: PartTraining
    release: CutRelease | None = None
    gradients: GradientRelease | None = None


@dataclass(frozen=True, kw_only=True)
class GradientsReturned:
    """Gradients of rows that go from a label holder to a feature holder who must not learn the labels.

    Attributes:
        spent: all releases of the worst row.
        training: how the parts that they go through change.
        release: None if they are sent as they are.
    """

    spent: Event = _NOTHING
    training: PartTraining
    release: GradientRelease | None = None


@dataclass(frozen=True, kw_only=True)
class SplitFacts:
    """What happened in a run.

    Attributes:
        rows: what the server was sent, row by row.
        labels: "clear": sent to the server as they are; "stay": with the features' owner, who computes the loss
            (U-shape); "there": they are the server's own; or the mechanism they were sent through.
        dp_sgd: the steps on all parts' weights so far, with their sampling; None if they had no noise.
        relation: under which `dp_sgd` is accounted.
        clip: "part" or "joint"; joint clipping sends norms of single rows about.
        returned: gradients to a feature holder other than the labels' owner; None if there is none.
        weights_relayed: whether other clients get this client's weights during the run.
        vertical: whether several feature holders have columns of the same records, agreed by number.
        probes: how many row-independence probes were answered well (`probe_rows`).
        unprotected: what else left as it was, in words: "validation loss, 12 times".
        secure: whether nobody knows the seeds of noise and sampling, the door's among them; otherwise every claim
            assumes that nobody does.
    """

    rows: RowsSent
    labels: Literal["clear", "stay", "there"] | MemoizedRandomizedResponse
    dp_sgd: Event | None = None
    relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE
    clip: Literal["part", "joint"] = "part"
    returned: GradientsReturned | None = None
    weights_relayed: bool = False
    vertical: bool = False
    probes: int = 0
    unprotected: tuple[str, ...] = ()
    secure: bool = True

    def __post_init__(self) -> None:
        named = ("clear", "stay", "there")
        if self.labels not in named and not isinstance(self.labels, MemoizedRandomizedResponse):
            raise ParameterError(f"labels must be one of {list(named)} or a mechanism, got {self.labels!r}.")
        if self.clip not in ("part", "joint"):
            raise ParameterError(f"clip must be 'part' or 'joint', got {self.clip!r}.")
        if self.rows.gradients is not None and self.labels != "stay":
            raise ParameterError(
                f"Gradients are released to the server where labels stay with their holder, but labels are "
                f"{self.labels!r}. Gradients that go back to a feature holder are `returned`."
            )
        if self.labels == "stay" and self.returned is not None:
            raise ParameterError(
                "Gradients are `returned` to a feature holder by whoever has the labels; here labels stay with the "
                "feature holder. Leave `returned` out."
            )


def split_report(facts: SplitFacts, *, delta: float, title: str = "Split run") -> AdversaryReport:
    """The claims against everybody who takes part or gets the model.

    Args:
        facts: what happened.
        delta: of each claim.
        title: what the report is about.

    Returns:
        A claim, or NO GUARANTEE, for each adversary that there is: a feature holder apart from the label holder only
        with `returned`.

    Guarantee:
        Each epsilon is an upper bound if what the claim `assumes` holds and the facts are so.

    Raises:
        ParameterError: what one adversary sees of one unit is accounted under several relations; or delta is out of
            range.
    """
    claims = [
        *_against_consumers(facts, delta),
        *_against_server(facts, delta),
        *_against_others(facts, delta),
        *_against_label_holder(facts, delta),
        *_against_feature_holder(facts, delta),
    ]
    if not facts.secure:
        claims = [replace(c, assumes=(*c.assumes, SEED_UNKNOWN)) if c.guaranteed else c for c in claims]
    there = tuple(name for name in ADVERSARIES if any(claim.against == name for claim in claims))
    return AdversaryReport(
        title=title,
        adversaries=there,
        claims=tuple(claims),
        not_covered=(*_ALWAYS, *facts.unprotected),
        notes=_notes(facts),
    )


def save_report(report: AdversaryReport, path: str | Path) -> None:
    """Write a report as text, JSON or a web page, by the file's ending: .txt, .json or .html.

    Args:
        report: of a run, such as `SplitRun.report` returns.
        path: the file; one that is there is replaced.

    Raises:
        ParameterError: another ending.
    """
    from dpdl.claims_page import page

    path = Path(path)
    forms = {".txt": lambda: f"{report}\n", ".json": report.to_json, ".html": lambda: page(report)}
    if path.suffix not in forms:
        raise ParameterError(f"A report's file ends in one of {sorted(forms)}, got {path.name!r}.")
    path.write_text(forms[path.suffix](), encoding="utf-8")


def _against_consumers(facts: SplitFacts, delta: float, by: str = CONSUMERS) -> list[Claim]:
    """Through the noisy steps; and where all that the server ever had was noised, as its post-processing."""
    claims = [claim_of([_trained_weights(by, facts)], delta=delta)]
    seen = _record_at_server(facts, by)
    if all(one.event is not None for one in seen):
        noised = claim_of(seen, delta=delta)
        if noised.guaranteed:
            claims = [claim for claim in claims if claim.guaranteed] + [noised]
    return claims


def _against_server(facts: SplitFacts, delta: float) -> list[Claim]:
    features = claim_of([_rows(facts, SERVER, unit="features")], delta=delta)
    if facts.labels == "there":
        return [features]
    record = claim_of(_record_at_server(facts, SERVER), delta=delta)
    if facts.labels != "stay":
        return [record, features, claim_of([_labels(facts, SERVER, unit="label")], delta=delta)]
    if facts.rows.release is None and facts.rows.gradients is not None:
        return [record, claim_of([_label_through_gradients(facts, facts.rows.gradients)], delta=delta)]
    return [record]


def _against_others(facts: SplitFacts, delta: float) -> list[Claim]:
    """Whoever else trains on the server's weights; of the same records, if vertical."""
    if not facts.vertical:
        return _against_consumers(facts, delta, OTHERS)
    rows = _rows(facts, OTHERS, unit="features")
    if rows.event is None:
        rows = replace(rows, what=f"the gradients they get are of the same records, and {rows.what}")
    return [claim_of([rows], delta=delta)]


def _against_label_holder(facts: SplitFacts, delta: float) -> list[Claim]:
    """Who has the labels and gets the rows, where that is not the features' owner."""
    return [claim_of([_rows(facts, LABEL_HOLDER, unit="features")], delta=delta)] if facts.labels == "there" else []


def _against_feature_holder(facts: SplitFacts, delta: float) -> list[Claim]:
    """Who has the features and gets gradients, where that is not the labels' owner."""
    back = facts.returned
    if back is None:
        return []
    if isinstance(facts.labels, MemoizedRandomizedResponse):
        return [claim_of([_labels(facts, FEATURE_HOLDER, unit="label")], delta=delta)]
    naked = ""
    if back.release is None:
        naked = "gradients of single rows are returned as they are; their norms and signs tell labels"
    elif _leaks(back.training):
        naked = f"{back.release}, but {_STATE_LEAK}"
    elif facts.clip == "joint":
        naked = _NORMS
    seen = Sighting(
        by=FEATURE_HOLDER,
        unit="label",
        what=naked or f"{back.release}; the parts behind them {back.training}",
        event=None if naked else back.spent,
        assumes=(_NAMES, _row_wise(facts), *_told(back.training)),
    )
    return [claim_of([seen], delta=delta)]


def _trained_weights(by: str, facts: SplitFacts) -> Sighting:
    if facts.dp_sgd is None:
        return Sighting(by=by, unit="record", what="weights are trained without noise", event=None)
    what = "DP-SGD on all parts"
    if by == OTHERS:
        relayed = "this client's weights, and " if facts.weights_relayed else ""
        what = f"they get {relayed}gradients through the server's weights; DP-SGD on all parts"
    return Sighting(
        by=by,
        unit="record",
        what=what,
        event=facts.dp_sgd,
        relation=facts.relation,
        assumes=(_HONEST, _row_wise(facts)),
    )


def _row_wise(facts: SplitFacts) -> str:
    return f"{_ROW_WISE} ({facts.probes} probes)" if facts.probes else f"{_ROW_WISE} (not probed)"


def _told(training: PartTraining) -> tuple[str, ...]:
    return () if training.checked else (_AS_TOLD,)


def _leaks(training: PartTraining) -> bool:
    return training.trained and not training.noise_multiplier


def _record_at_server(facts: SplitFacts, by: str) -> list[Sighting]:
    seen = [_rows(facts, by, unit="record")]
    return seen if facts.labels == "stay" else [*seen, _labels(facts, by, unit="record")]


def _label_through_gradients(facts: SplitFacts, gradients: GradientRelease) -> Sighting:
    """Of a U-shape whose activations are not protected: these depend on labels through the parts' steps alone."""
    naked = f"{gradients}, but {_STATE_LEAK}" if _leaks(facts.rows.training) else ""
    naked = _NORMS if facts.clip == "joint" else naked
    return Sighting(
        by=SERVER,
        unit="label",
        what=naked or f"{gradients}; the parts before them {facts.rows.training}",
        event=None if naked else facts.rows.spent,
        assumes=(_NAMES, *_told(facts.rows.training)),
    )


def _rows(facts: SplitFacts, by: str, *, unit: str) -> Sighting:
    rows = facts.rows
    naked = ""
    if rows.release is None:
        naked = "activations are sent as they are"
    elif facts.labels == "stay" and rows.gradients is None:
        naked = "gradients of the head are sent as they are"
    elif _leaks(rows.training):
        naked = f"{rows.release}, but {_STATE_LEAK}"
    elif facts.clip == "joint":
        naked = _NORMS
    if naked:
        return Sighting(by=by, unit=unit, what=naked, event=None)
    second = f"; {rows.gradients}" if rows.gradients is not None else ""
    what = f"{rows.release}{second}; the part before them {rows.training}"
    public = () if rows.training.trained else ("the part's weights know nothing of these records",)
    assumes = (_NAMES, *public, *_told(rows.training))
    return Sighting(by=by, unit=unit, what=what, event=rows.spent, assumes=assumes)


def _labels(facts: SplitFacts, by: str, *, unit: str) -> Sighting:
    if isinstance(facts.labels, MemoizedRandomizedResponse):
        return Sighting(by=by, unit=unit, what=str(facts.labels), event=facts.labels.event, assumes=(_NAMES,))
    what = "labels are sent in clear" if facts.labels == "clear" else "the label is the server's own"
    return Sighting(by=by, unit=unit, what=what, event=None)


def _notes(facts: SplitFacts) -> tuple[str, ...]:
    notes = [] if facts.secure else [SEED_GIVEN]
    if facts.dp_sgd is not None and facts.rows.release is None:
        notes.append("noise on weights says nothing of activations: whoever receives those can try to invert them")
    if facts.rows.release is not None:
        notes.append("rows are counted one by one and the worst counts; sampling amplifies nothing, since it is seen")
    if facts.vertical:
        notes.append("parties agree on row numbers, so that none of them is in doubt about who takes part")
    return tuple(notes)
