"""Every conversion is reported, with what was carried over and by how much outputs moved."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from dpdl.errors import ParameterError
from dpdl.validation import fix, fix_report
from tests.small_run import FEATURES, examples, same, small_run, weights_of
from tests.validation.mixers import CentredOverBatch, model_with
from tests.validation.small_resnet import images, resnet
from tests.validation.test_conversions import seen_data
from tests.validation.test_fix_refusals import NormThenAct

X, Y = examples()

# ── the report ──────────────────────────────────────────────────────────────────────────────────────


def test_the_report_names_what_was_replaced_and_by_how_much_outputs_moved() -> None:
    model = resnet()
    fixed = fix(model, images())
    report = fix_report(fixed)
    assert [c.paths for c in report.conversions] == [
        ("stem.1",),
        *((f"blocks.{i}.bn{j}",) for i in (0, 1) for j in (1, 2)),
        ("norm",),
    ]
    first = report.conversions[0]
    assert first.before.startswith("BatchNorm2d(16")
    assert first.after.startswith("GroupNorm(16, 16")
    assert first.carried_over == ("scale", "shift", "float32", "on cpu", "trained", "epsilon", "training mode")
    for mode, change in (("eval", report.change.eval), ("train", report.change.train)):
        before, after = (copy.deepcopy(each).train(mode == "train")(images()).detach() for each in (model, fixed))
        assert change.max_abs == pytest.approx(float((after - before).abs().max()), rel=1e-4)
        assert change.relative == pytest.approx(change.max_abs / float(before.abs().max()), rel=1e-4)
    x = model.stem[0](images()).detach()
    moved = (fixed.stem[1](x) - copy.deepcopy(model.stem[1])(x)).detach().abs().max()
    assert first.change.train.max_abs == pytest.approx(float(moved), rel=1e-4)
    for words in ("6 replaced", "'stem.1': BatchNorm2d(16", "-> GroupNorm(16, 16", "scale, shift", "kept apart now"):
        assert words in str(report)


def test_what_is_not_repaired_is_named() -> None:
    model = nn.Sequential(nn.BatchNorm1d(FEATURES), CentredOverBatch()).double()
    report = fix_report(fix(model, X))
    assert [finding.module for finding in report.remaining] == ["1"]
    assert "Not repaired" in str(report)


def test_without_an_example_batch_the_report_says_that_nothing_was_run() -> None:
    report = fix_report(fix(resnet()))
    assert report.change is None
    assert report.remaining is None
    assert "Not run" in str(report)
    assert "Nothing was replaced" in str(fix_report(fix(nn.Linear(2, 2))))


def test_the_report_is_found_by_the_model_and_its_private_model(caplog: pytest.LogCaptureFixture) -> None:
    model = model_with(nn.BatchNorm1d(FEATURES))
    with caplog.at_level(logging.INFO, logger="dpdl"):
        fixed = fix(model)
    assert "'body.bad'" in caplog.text
    private = small_run(fixed)
    assert fix_report(private.model) is fix_report(fixed)
    assert "fix_report" not in fixed.__dict__
    with pytest.raises(ParameterError, match=r"did not come from dpdl\.fix"):
        fix_report(model)


def test_notes_say_what_to_look_out_for() -> None:
    def note(model: nn.Module, *args: Tensor, **options: object) -> str:
        return fix_report(fix(model, *args, **options)).conversions[0].note

    assert "public data" in note(seen_data(nn.BatchNorm2d(4)), batch_norm="frozen")
    assert "initial" not in note(seen_data(nn.BatchNorm2d(4)), batch_norm="frozen")
    assert "initial" in note(nn.BatchNorm2d(4), batch_norm="frozen")
    few = note(nn.BatchNorm2d(4), torch.randn(2, 4, 2, 2), num_groups=4)
    assert few == "each statistic is of 4 values only: consider fewer groups"
    assert note(nn.BatchNorm1d(4), torch.randn(2, 4)) == "each statistic is of 4 values only"
    assert "[N, C, L]" in note(nn.BatchNorm1d(4), batch_norm="instance")
    assert "constant" in note(nn.BatchNorm1d(1))
    assert not note(nn.BatchNorm2d(32))


def test_fixing_leaves_no_trace() -> None:
    model = resnet()
    model.dropout = nn.Dropout()
    random_state, before = torch.get_rng_state(), weights_of(model)
    fixed = fix(model, images(), inplace=True, batch_norm="frozen")
    assert torch.equal(random_state, torch.get_rng_state())
    assert same(before, weights_of(fixed))  # running statistics too
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in fixed.modules())


def test_random_numbers_are_the_same_before_and_after_and_what_is_frozen_stays_so() -> None:
    model = nn.Sequential(NormThenAct(3), nn.Dropout(), nn.Conv2d(3, 3, 1), seen_data(nn.BatchNorm2d(3)))
    model[0].training = model[3].training = False  # the dropouts stay in training mode
    changes = fix_report(fix(model, images())).change
    assert changes.eval.max_abs == 0
    assert changes.train.max_abs == 0


def test_a_forward_that_writes_to_a_parameter_leaves_it_alone() -> None:
    model = nn.Sequential(nn.Embedding(20, 4, max_norm=1.0), nn.Flatten(), nn.BatchNorm1d(12))
    model[0].weight.data.mul_(10)
    before = weights_of(model)["0.weight"]
    fixed = fix(model, torch.arange(12).view(4, 3), inplace=True)
    assert torch.equal(fixed[0].weight, before)
    assert [finding.module for finding in fix_report(fixed).remaining] == ["0"]
