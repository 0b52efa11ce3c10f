"""Every adversary gets its claim, or NO GUARANTEE and what it sees; figures are those of the accountants."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest

from accountants import Composed, Event, Gaussian, NeighboringRelation, PoissonSampled, PRVAccountant
from dpdl.claims import AdversaryReport
from dpdl.errors import ParameterError
from dpdl.split.cut_release import CutRelease
from dpdl.split.gradient_release import GradientRelease
from dpdl.split.labels import MemoizedRandomizedResponse
from dpdl.split.part_training import PartTraining
from dpdl.split.report import GradientsReturned, RowsSent, SplitFacts, save_report, split_report
from dpdl.split.sighting import Sighting, claim_of

DELTA = 1e-5
SGD = 300 * PoissonSampled(0.02, Gaussian(1.0))
CUT = CutRelease(max_norm=1.0, noise_multiplier=4.0)
BACK = GradientRelease(max_norm=0.1, noise_multiplier=6.0)
FLIPPED = MemoizedRandomizedResponse(epsilon=2.0, classes=10)
FROZEN, PRIVATE = PartTraining.frozen(), PartTraining.private(noise_multiplier=3.0)
NOTHING = Composed(())


def epsilon(event: Event, relation: str = "replace_one") -> float:
    return PRVAccountant(relation=NeighboringRelation(relation)).compose(event).epsilon(DELTA)


def facts(**changes: object) -> SplitFacts:
    raw = RowsSent(spent=NOTHING, training=PartTraining.unprotected())
    return dataclasses.replace(SplitFacts(rows=raw, labels="clear"), **changes)  # type: ignore[arg-type]


def claims(report: AdversaryReport, adversary: str) -> dict[str, float | None]:
    """Unit to the best bound."""
    found: dict[str, float | None] = {}
    for claim in report.against(adversary):
        known = found.get(claim.unit)
        found[claim.unit] = claim.epsilon if known is None else min(known, claim.epsilon or math.inf)
    return found


def test_a_run_with_nothing_promises_nothing_to_anybody() -> None:
    report = split_report(facts(), delta=DELTA)
    assert report.adversaries == ("model consumers", "server", "other clients")
    assert not any(claim.guaranteed for claim in report.claims)
    assert str(report).count("NO GUARANTEE") == len(report.claims) == 5


def test_noise_on_weights_protects_from_consumers_and_not_from_the_server() -> None:
    report = split_report(facts(dp_sgd=SGD, unprotected=("validation loss, 12 times",)), delta=DELTA)
    assert claims(report, "model consumers") == {"record": epsilon(SGD, "add_or_remove")}
    assert claims(report, "other clients") == {"record": epsilon(SGD, "add_or_remove")}
    assert claims(report, "server") == {"record": None, "features": None, "label": None}
    assert "validation loss, 12 times" in report.not_covered
    assert "not probed" in str(report)
    assert "(3 probes)" in str(split_report(facts(dp_sgd=SGD, probes=3), delta=DELTA))


def test_noised_rows_and_flipped_labels_cover_the_record_from_everybody() -> None:
    spent = Composed((10 * Gaussian(4.0), 10 * Gaussian(3.0)))
    rows = RowsSent(spent=spent, training=PRIVATE, release=CUT)
    report = split_report(facts(rows=rows, labels=FLIPPED), delta=DELTA)
    both = epsilon(Composed((spent, FLIPPED.event)))
    assert claims(report, "server") == {"record": both, "features": epsilon(spent), "label": epsilon(FLIPPED.event)}
    assert claims(report, "model consumers") == {"record": both}  # as post-processing, though no weights were noised
    assert both > epsilon(spent) > epsilon(FLIPPED.event)
    assert len(split_report(facts(rows=rows, labels=FLIPPED, dp_sgd=SGD), delta=DELTA).against("model consumers")) == 2


def test_labels_in_clear_leave_features_protected_and_the_record_not() -> None:
    rows = RowsSent(spent=Gaussian(4.0), training=FROZEN, release=CUT)
    report = split_report(facts(rows=rows), delta=DELTA)
    assert claims(report, "server") == {"record": None, "features": epsilon(Gaussian(4.0)), "label": None}


def test_a_part_trained_without_noise_voids_the_rows_noise() -> None:
    rows = RowsSent(spent=Composed((Gaussian(64.0), Gaussian(0.0))), training=PartTraining.unprotected(), release=CUT)
    report = split_report(facts(rows=rows, labels=FLIPPED), delta=DELTA)
    assert claims(report, "server")["features"] is None
    assert "later rows tell of all earlier ones" in str(report)
    assert claims(report, "server")["label"] == epsilon(FLIPPED.event)


def test_a_u_shape_needs_both_of_its_releases() -> None:
    spent = Composed((5 * Gaussian(4.0), 5 * Gaussian(6.0), 5 * Gaussian(3.0)))
    rows = RowsSent(spent=spent, training=PRIVATE, release=CUT, gradients=BACK)
    assert claims(split_report(facts(rows=rows, labels="stay"), delta=DELTA), "server") == {"record": epsilon(spent)}
    first = dataclasses.replace(rows, gradients=None)
    report = split_report(facts(rows=first, labels="stay"), delta=DELTA)
    assert claims(report, "server") == {"record": None}
    assert "gradients of the head are sent as they are" in str(report)
    second = dataclasses.replace(rows, release=None, spent=Composed((5 * Gaussian(6.0), 5 * Gaussian(3.0))))
    report = split_report(facts(rows=second, labels="stay"), delta=DELTA)
    assert claims(report, "server") == {"record": None, "label": epsilon(second.spent)}


def test_joint_clipping_costs_the_claims_against_the_server() -> None:
    spent = Composed((Gaussian(4.0), Gaussian(6.0), Gaussian(3.0)))
    rows = RowsSent(spent=spent, training=PRIVATE, release=CUT, gradients=BACK)
    report = split_report(facts(rows=rows, labels="stay", clip="joint", dp_sgd=SGD), delta=DELTA)
    assert claims(report, "server") == {"record": None}
    assert "norms of single rows' gradients are exchanged" in str(report)
    assert claims(report, "model consumers") == {"record": epsilon(SGD, "add_or_remove")}


def test_a_feature_holder_sees_labels_through_gradients() -> None:
    rows = RowsSent(spent=NOTHING, training=FROZEN)
    spent = Composed((9 * Gaussian(6.0), 9 * Gaussian(3.0)))
    ways: list[tuple[GradientsReturned, str, float | None]] = [
        (GradientsReturned(training=PRIVATE), "part", None),
        (GradientsReturned(training=PRIVATE, release=BACK, spent=spent), "part", epsilon(spent)),
        (GradientsReturned(training=PRIVATE, release=BACK, spent=spent), "joint", None),
        (GradientsReturned(training=PartTraining.unprotected(), release=BACK, spent=spent), "part", None),
    ]
    for returned, clip, expected in ways:
        report = split_report(facts(rows=rows, labels="there", returned=returned, clip=clip), delta=DELTA)
        assert claims(report, "feature holder") == {"label": expected}
    report = split_report(facts(rows=rows, labels=FLIPPED, returned=ways[0][0]), delta=DELTA)
    assert claims(report, "feature holder") == {"label": epsilon(FLIPPED.event)}


def test_a_label_holder_who_is_the_server_sees_features() -> None:
    rows = RowsSent(spent=3 * Gaussian(4.0), training=FROZEN, release=CUT)
    report = split_report(
        facts(rows=rows, labels="there", vertical=True, returned=GradientsReturned(training=PRIVATE)), delta=DELTA
    )
    assert report.adversaries == ("model consumers", "server", "other clients", "label holder", "feature holder")
    for adversary in ("server", "label holder", "other clients"):
        assert claims(report, adversary) == {"features": epsilon(3 * Gaussian(4.0))}
    raw = RowsSent(spent=NOTHING, training=PRIVATE)
    report = split_report(facts(rows=raw, labels="there", vertical=True, dp_sgd=SGD), delta=DELTA)
    assert claims(report, "other clients") == {"features": None}  # their gradients are of the same records
    assert "of the same records" in str(report)


def test_no_figure_is_below_what_any_part_of_it_costs_and_every_adversary_is_named() -> None:
    """All combinations that there are: a protection more is never a claim less."""
    rows = [
        RowsSent(spent=NOTHING, training=PRIVATE),
        RowsSent(spent=Gaussian(4.0), training=FROZEN, release=CUT),
        RowsSent(spent=Composed((Gaussian(4.0), Gaussian(0.0))), training=PartTraining.unprotected(), release=CUT),
    ]
    least = min(epsilon(Gaussian(4.0)), epsilon(SGD, "add_or_remove"), epsilon(FLIPPED.event))
    for row, labels, dp_sgd, clip, vertical in itertools.product(
        rows, ("clear", "stay", "there", FLIPPED), (None, SGD), ("part", "joint"), (False, True)
    ):
        made = facts(rows=row, labels=labels, dp_sgd=dp_sgd, clip=clip, vertical=vertical)
        report = split_report(made, delta=DELTA)
        naked = row.release is None or clip == "joint" or row.training.trained
        server = claims(report, "server")
        assert (server.get("record", server.get("features")) is None) == (naked or labels in ("clear", "stay"))
        assert all(claim.epsilon is None or claim.epsilon >= least for claim in report.claims)


def test_an_insecure_seed_is_said() -> None:
    assert "insecure seed" in str(split_report(facts(dp_sgd=SGD, secure=False), delta=DELTA))
    assert "insecure seed" not in str(split_report(facts(dp_sgd=SGD), delta=DELTA))


def test_steps_without_noise_are_no_guarantee() -> None:
    report = split_report(facts(dp_sgd=300 * PoissonSampled(0.02, Gaussian(0.0))), delta=DELTA)
    assert claims(report, "model consumers") == {"record": None}
    assert "with no noise in it" in str(report)


def test_figures_of_two_relations_are_not_added_up() -> None:
    one = Sighting(by="server", unit="record", what="rows", event=Gaussian(4.0))
    other = dataclasses.replace(one, event=SGD, relation=NeighboringRelation.ADD_OR_REMOVE)
    with pytest.raises(ParameterError, match="add_or_remove, replace_one"):
        claim_of([one, other], delta=DELTA)
    with pytest.raises(ParameterError, match="of several"):
        claim_of([one, dataclasses.replace(one, by="others")], delta=DELTA)


def test_a_report_is_text_json_and_a_page(tmp_path: Path) -> None:
    report = split_report(facts(dp_sgd=SGD), delta=DELTA)
    for ending in ("txt", "json", "html"):
        save_report(report, tmp_path / f"report.{ending}")
        assert "NO GUARANTEE" in (tmp_path / f"report.{ending}").read_text()
    values = json.loads((tmp_path / "report.json").read_text())
    assert {claim["against"] for claim in values["claims"]} == set(report.adversaries)
    with pytest.raises(ParameterError, match=r"\.html"):
        save_report(report, tmp_path / "report.pdf")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"labels": "hidden"}, "labels must be one of"),
        ({"clip": "global"}, "'part' or 'joint'"),
        ({"rows": RowsSent(spent=NOTHING, training=FROZEN, gradients=BACK)}, "labels stay"),
        ({"labels": "stay", "returned": GradientsReturned(training=PRIVATE)}, "labels stay"),
    ],
)
def test_facts_that_contradict_each_other_are_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        facts(**wrong)
