"""Checkpoints: plain names, nothing forgotten, nothing weaker."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from dpdl.compat.opacus import PrivacyEngine
from dpdl.compat.opacus.schedulers import ExponentialNoise, StepGradClip
from dpdl.errors import CheckpointError, PrivacyWarning
from tests.compat.opacus.small_run import network, private, step


def _trained(sigma: float = 1.0) -> tuple[PrivacyEngine, Any, Any]:
    engine = PrivacyEngine()
    model, optimizer, batches = private(engine, noise_multiplier=sigma)
    for batch in batches:
        step(model, optimizer, batch)
    return engine, model, optimizer


def _saved(path: Any, sigma: float = 1.0, **more: Any) -> tuple[PrivacyEngine, Any, Any]:
    engine, model, optimizer = _trained(sigma)
    engine.save_checkpoint(path=path, module=model, optimizer=optimizer, checkpoint_dict={"epoch": 3}, **more)
    return engine, model, optimizer


def test_a_run_goes_on_with_all_that_it_had(tmp_path: Path) -> None:
    engine, model, _ = _saved(tmp_path / "run.pt")
    again = PrivacyEngine()
    other, optimizer, batches = private(again, noise_multiplier=1.0)
    extra = again.load_checkpoint(path=tmp_path / "run.pt", module=other, optimizer=optimizer)
    assert extra["epoch"] == 3
    assert again.accountant.history == engine.accountant.history == [(1.0, 1.0, 1)]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    for batch in batches:
        step(other, optimizer, batch)
    assert again.accountant.history == [(1.0, 1.0, 2)]


def test_weights_load_into_the_plain_model_without_trust(tmp_path: Path) -> None:
    _, model, _ = _saved(tmp_path / "run.pt")
    weights = torch.load(tmp_path / "run.pt", weights_only=True)["module_state_dict"]
    plain = network()
    plain.load_state_dict(weights)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))


def test_streams_and_schedulers_work() -> None:
    engine, model, optimizer = _trained()
    noise, clip = ExponentialNoise(optimizer, gamma=1.0), StepGradClip(optimizer, step_size=1, gamma=1.0)
    noise.step()
    file = io.BytesIO()
    engine.save_checkpoint(
        path=file, module=model, optimizer=optimizer, noise_scheduler=noise, grad_clip_scheduler=clip
    )
    file.seek(0)
    again = PrivacyEngine()
    other, fresh, _ = private(again, noise_multiplier=1.0)
    first, second = ExponentialNoise(fresh, gamma=0.5), StepGradClip(fresh, step_size=3, gamma=0.5)
    again.load_checkpoint(path=file, module=other, optimizer=fresh, noise_scheduler=first, grad_clip_scheduler=second)
    assert (first.state_dict(), second.state_dict()) == (noise.state_dict(), clip.state_dict())


def test_less_noise_than_was_saved_is_refused(tmp_path: Path) -> None:
    _saved(tmp_path / "run.pt", sigma=1.0)
    again = PrivacyEngine()
    model, optimizer, _ = private(again, noise_multiplier=0.5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=r"noise_multiplier=1.0 or more"):
        again.load_checkpoint(path=tmp_path / "run.pt", module=model, optimizer=optimizer)
    assert again.accountant.history == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_more_noise_is_warned_of(tmp_path: Path) -> None:
    _saved(tmp_path / "run.pt", sigma=1.0)
    again = PrivacyEngine()
    model, optimizer, _ = private(again, noise_multiplier=2.0)
    with pytest.warns(PrivacyWarning, match="other settings"):
        again.load_checkpoint(path=tmp_path / "run.pt", module=model, optimizer=optimizer)
    assert again.accountant.history == [(1.0, 1.0, 1)]


def test_spending_is_not_forgotten_by_loading(tmp_path: Path) -> None:
    _saved(tmp_path / "run.pt", sigma=1.0)
    engine, model, optimizer = _trained(sigma=3.0)
    with pytest.raises(CheckpointError, match="would forget"):
        engine.load_checkpoint(path=tmp_path / "run.pt", module=model, optimizer=optimizer)
    assert engine.accountant.history == [(3.0, 1.0, 1)]


def test_other_files_are_refused(tmp_path: Path) -> None:
    engine = PrivacyEngine()
    model, optimizer, _ = private(engine)
    torch.save({"module_state_dict": {}}, tmp_path / "other.pt")
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 torn")
    torch.save({"code": io.BytesIO}, tmp_path / "code.pt")
    for name in ("other.pt", "torn.pt", "code.pt", "missing.pt"):
        with pytest.raises(CheckpointError):
            engine.load_checkpoint(path=tmp_path / name, module=model, optimizer=optimizer)


def test_an_optimizer_left_out_is_warned_of(tmp_path: Path) -> None:
    _saved(tmp_path / "run.pt")
    engine = PrivacyEngine()
    model, _, _ = private(engine)
    with pytest.warns(PrivacyWarning, match="left as it is"):
        engine.load_checkpoint(path=tmp_path / "run.pt", module=model)
