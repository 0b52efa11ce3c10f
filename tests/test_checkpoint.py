"""Saving and resuming: the same run goes on, nothing is forgotten, and only its own file is taken."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau, StepLR

import dpdl
from dpdl.errors import CheckpointError, StepError
from tests.small_run import FEATURES, network, refused, released, same, small_run, train_on, weights_of

STEPS = 9  # in passes of 3


def start(**settings: Any) -> dpdl.Private:
    return small_run(**{"batch_size": 4, "steps": STEPS, "noise_multiplier": 1.0, **settings})


def train_until(private: dpdl.Private, step: int, scheduler: LRScheduler | None = None) -> list[dict[str, Any]]:
    """Train up to a logical step; returns what each step released. The scheduler moves after each step."""
    history = []
    while private.optimizer.steps_taken < step:
        for batch in private.loader:
            taken = private.optimizer.steps_taken
            train_on(private, batch)
            if private.optimizer.steps_taken > taken:
                history.append({name: g.clone() for name, g in released(private).items()})
                if scheduler is not None:
                    scheduler.step()
            if private.optimizer.steps_taken == step:
                break
    return history


def saved(path: Path, private: dpdl.Private, **more: Any) -> Path:
    dpdl.save_checkpoint(path, private.model, private.optimizer, **more)
    return path


def loaded(path: Path, private: dpdl.Private, **more: Any) -> dict[str, Any]:
    return dpdl.load_checkpoint(path, private.model, private.optimizer, **more)


# ── going on ────────────────────────────────────────────────────────────────────────────────────────

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
}


@pytest.mark.parametrize("stop_at", [1, 3, 4, 8], ids=lambda s: f"after {s}")
@pytest.mark.parametrize("physical", [None, 2], ids=["whole", "twos"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, optimizer: str, physical: int | None, stop_at: int
) -> None:
    settings = {"optimizer": OPTIMIZERS[optimizer], "max_physical_batch_size": physical}

    def scheduled(private: dpdl.Private) -> LRScheduler:
        return OneCycleLR(private.optimizer, max_lr=0.2, total_steps=STEPS + 1)

    whole = start(**settings)
    history = train_until(whole, STEPS, scheduled(whole))

    first = start(**settings)
    scheduler = scheduled(first)
    train_until(first, stop_at, scheduler)
    path = saved(tmp_path / "run.pt", first, scheduler=scheduler)

    second = start(**settings)
    scheduler = scheduled(second)
    loaded(path, second, scheduler=scheduler)
    assert second.optimizer.steps_taken == stop_at
    assert same(history[stop_at:], train_until(second, STEPS, scheduler))
    assert same(weights_of(whole.model), weights_of(second.model))
    assert same(whole.optimizer.inner.state_dict(), second.optimizer.inner.state_dict())
    assert whole.optimizer.ledger.to_json() == second.optimizer.ledger.to_json()
    assert len(second.loader) == 3


def test_a_run_that_stopped_between_the_parts_of_a_batch_repeats_that_batch(tmp_path: Path) -> None:
    """Nothing of the half batch was released, so it may be drawn again."""
    settings = {"batch_size": 12, "max_physical_batch_size": 5}
    whole, first, second = start(**settings), start(**settings), start(**settings)
    train_until(whole, STEPS)
    train_on(first, next(iter(first.loader)))
    assert first.optimizer.steps_taken == 0
    loaded(saved(tmp_path / "run.pt", first), second)
    train_until(second, STEPS)
    assert same(weights_of(whole.model), weights_of(second.model))


def test_an_interrupted_batch_can_be_saved_around(tmp_path: Path) -> None:
    """Ctrl-C mostly falls between drawing and stepping; nothing of that batch was released yet."""
    whole, first, second = start(), start(), start()
    train_until(whole, STEPS)
    train_until(first, 2)
    x, _ = next(iter(first.loader))
    first.model(x)
    loaded(saved(tmp_path / "run.pt", first), second)
    assert second.optimizer.steps_taken == 2


def test_a_saved_pass_goes_on_in_its_middle_and_the_next_one_is_whole(tmp_path: Path) -> None:
    first, second = start(), start()
    train_until(first, 2)
    loaded(saved(tmp_path / "run.pt", first), second)
    lengths = []
    for _ in range(3):
        before = second.optimizer.steps_taken
        for batch in second.loader:
            train_on(second, batch)
        lengths.append(second.optimizer.steps_taken - before)
    assert lengths == [1, 3, 3]


@pytest.mark.parametrize(
    "make",
    [
        lambda o: StepLR(o, 2),
        lambda o: OneCycleLR(o, 0.1, total_steps=20),
        lambda o: ReduceLROnPlateau(o),
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 5]),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
        lambda o: torch.optim.lr_scheduler.SequentialLR(o, [StepLR(o, 2), StepLR(o, 3)], [3]),
    ],
    ids=["step", "one cycle", "plateau", "multi step", "cosine", "sequential"],
)
def test_schedulers_read_back_with_weights_only(tmp_path: Path, make: Callable[[Any], LRScheduler]) -> None:
    first, second = start(), start()
    path = saved(tmp_path / "run.pt", first, scheduler=make(first.optimizer))
    loaded(path, second, scheduler=make(second.optimizer))


def test_what_counted_before_still_counts(tmp_path: Path) -> None:
    first, second = start(), start()
    train_until(first, 3)
    loaded(saved(tmp_path / "run.pt", first, extra={"epoch": 1, "best": torch.ones(2)}), second)
    assert second.optimizer.epsilon(1e-5) == first.optimizer.epsilon(1e-5) > 0
    # Counts of clipped and non-finite examples are private and un-noised; the file holds none of them.
    assert second.optimizer.diagnostics.examples == 0


def test_what_a_report_had_to_say_is_still_said_after_resuming(tmp_path: Path) -> None:
    first, second = start(self_check=False), start()
    train_until(first, 1)
    loaded(saved(tmp_path / "run.pt", first), second)
    train_until(second, 2)
    assert "was not checked" in str(second.optimizer.report(1e-5))


def test_extra_comes_back(tmp_path: Path) -> None:
    first, second = start(), start()
    extra = {"epoch": 3, "names": ["a"], "best": torch.arange(3)}
    assert same(loaded(saved(tmp_path / "run.pt", first, extra=extra), second), extra)


# ── randomness ──────────────────────────────────────────────────────────────────────────────────────


def test_a_secure_run_never_repeats_noise_however_often_it_is_resumed(tmp_path: Path) -> None:
    """Same weights, same step, every example drawn: releases differ by fresh noise alone."""
    first = start(insecure_seed=None, batch_size=12)
    train_until(first, 1)
    path = saved(tmp_path / "run.pt", first)
    releases = [train_until(first, 2)[0]]
    for _ in range(2):
        resumed = start(insecure_seed=None, batch_size=12)
        loaded(path, resumed)
        releases.append(train_until(resumed, 2)[0])
    flat = [torch.cat([g.flatten() for g in release.values()]) for release in releases]
    for i in range(3):
        for j in range(i):
            assert not torch.isclose(flat[i], flat[j], atol=1e-9, rtol=0.0).any()


@pytest.mark.parametrize("other_seed", [99, None], ids=["another seed", "secure"])
def test_a_seeded_run_goes_on_with_its_own_seed_whatever_the_new_one(tmp_path: Path, other_seed: int | None) -> None:
    whole, first, second = start(), start(), start(insecure_seed=other_seed)
    history = train_until(whole, STEPS)
    train_until(first, 4)
    loaded(saved(tmp_path / "run.pt", first), second)
    assert same(history[4:], train_until(second, STEPS))


def test_a_secure_run_stays_secure_and_an_insecure_one_insecure(tmp_path: Path) -> None:
    for seed in (None, 5):
        first, second = start(insecure_seed=seed), start(insecure_seed=seed)
        loaded(saved(tmp_path / "run.pt", first), second)
        assert second.optimizer.report(1e-5).secure_randomness is (seed is None)


def test_no_key_is_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[bytes] = []

    def urandom(size: int) -> bytes:
        keys.append(real(size))
        return keys[-1]

    real = os.urandom
    monkeypatch.setattr("dpdl.secure_random.os.urandom", urandom)
    private = start(insecure_seed=None)
    train_until(private, 2)
    streams = (private.optimizer._run.noise, private.optimizer._run.sampling)
    secrets = keys + [stream._key for stream in streams]
    assert len(secrets) >= 3
    written = saved(tmp_path / "run.pt", private).read_bytes()
    for secret in secrets:
        for shape in (secret, secret[::-1], secret.hex().encode(), repr(list(secret)).encode()):
            assert shape not in written
            assert shape[: len(shape) // 2] not in written


def test_loading_an_older_state_into_a_live_run_does_not_forget_what_it_released(tmp_path: Path) -> None:
    """'Back to the best checkpoint' within one run: the releases since then have happened."""
    private = start()
    train_until(private, 2)
    path = saved(tmp_path / "run.pt", private)
    train_until(private, 6)
    with contextlib.suppress(CheckpointError, StepError):
        loaded(path, private)
    assert private.optimizer.ledger.releases >= 6


# ── the file ────────────────────────────────────────────────────────────────────────────────────────


def test_the_file_reads_with_weights_only_and_its_weights_load_into_the_plain_model(tmp_path: Path) -> None:
    private = start()
    train_until(private, 1)
    state = torch.load(saved(tmp_path / "run.pt", private), weights_only=True)
    plain = network()
    plain.load_state_dict(state["model"])
    assert same(weights_of(plain), weights_of(private.model))


@pytest.mark.parametrize(
    "extra",
    [{"path": Path("x")}, {"accuracy": np.float64(0.9)}, {"curve": np.arange(3)}, {"function": print}],
    ids=["path", "numpy scalar", "numpy array", "function"],
)
def test_an_extra_that_could_not_be_read_back_is_refused_when_saving(tmp_path: Path, extra: dict[str, Any]) -> None:
    """Not when loading: by then the run is lost."""
    private = start()
    path = saved(tmp_path / "run.pt", private)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="extra"):
        saved(path, private, extra=extra)
    assert path.read_bytes() == before


def test_settings_given_as_numpy_numbers_do_not_make_the_file_unreadable(tmp_path: Path) -> None:
    first, second = (start(optimizer=lambda p: torch.optim.SGD(p, lr=np.float64(0.1))) for _ in range(2))
    loaded(saved(tmp_path / "run.pt", first), second)


class WithExtraState(nn.Linear):
    def __init__(self) -> None:
        super().__init__(FEATURES, 2, dtype=torch.float64)

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 3}


def test_modules_with_extra_state_resume(tmp_path: Path) -> None:
    first, second = start(model=WithExtraState()), start(model=WithExtraState())
    loaded(saved(tmp_path / "run.pt", first), second)


@pytest.mark.parametrize("broken", ["torch.save", "os.fsync", "os.replace"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    private = start()
    path = saved(tmp_path / "run.pt", private)
    before = path.read_bytes()
    train_until(private, 1)

    def no_space(*args: Any, **kwargs: Any) -> None:
        if broken == "torch.save":
            args[1].write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"dpdl.checkpoint.{broken}", no_space)
    with pytest.raises(CheckpointError, match=r"run\.pt could not be written: .*No space left"):
        saved(path, private)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["run.pt"]
    monkeypatch.undo()
    loaded(path, start())


def test_saving_changes_nothing(tmp_path: Path) -> None:
    private = start()
    train_until(private, 2)
    before = (weights_of(private.model), private.optimizer.state_dict())
    saved(tmp_path / "run.pt", private)
    assert same(before, (weights_of(private.model), private.optimizer.state_dict()))


# ── files that are not this run's ───────────────────────────────────────────────────────────────────


def nothing_changed(private: dpdl.Private, path: Path, *words: str, **more: Any) -> None:
    with refused(private, CheckpointError, *words):
        loaded(path, private, **more)
    train_on(private, next(iter(private.loader)))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"noise_multiplier": 0.5}, "another plan"),
        ({"max_grad_norm": 9.0}, "another plan"),
        ({"steps": 900}, "another plan"),
        ({"batch_size": 6}, "another plan"),
        ({"model": nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 2)).double()}, "another model"),
        ({"model": nn.Linear(FEATURES, 2).double()}, "another model"),
        ({"optimizer": lambda p: torch.optim.Adam([{"params": [q]} for q in p])}, "optimizer"),
        ({"optimizer": lambda p: torch.optim.Adam(p)}, "optimizer"),
    ],
    ids=["noise", "clip", "steps", "rate", "shapes", "names", "groups", "kind of optimizer"],
)
def test_a_file_of_another_run_is_refused(tmp_path: Path, settings: dict[str, Any], word: str) -> None:
    other = start(**settings)
    train_until(other, 1)
    nothing_changed(start(), saved(tmp_path / "run.pt", other), word)


@pytest.mark.parametrize("saved_with", [True, False])
def test_a_scheduler_on_one_side_only_is_refused(tmp_path: Path, saved_with: bool) -> None:
    first, second = start(), start()
    path = saved(tmp_path / "run.pt", first, scheduler=StepLR(first.optimizer, 2) if saved_with else None)
    scheduler = None if saved_with else StepLR(second.optimizer, 2)
    nothing_changed(second, path, "scheduler", "load_checkpoint", scheduler=scheduler)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    nothing_changed(start(), tmp_path / "nowhere.pt", "no checkpoint", "nowhere.pt")


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    for content in (b"", b"hello", b"\x80\x02}q\x00.", os.urandom(400), b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        nothing_changed(start(), path, "run.pt")
    nothing_changed(start(), tmp_path, str(tmp_path.name))


Change = Callable[[dict[str, Any]], Any]

CHANGES: dict[str, Change] = {
    "a list": lambda state: [],
    "only a schema": lambda state: {"schema": state["schema"]},
    "another schema": lambda state: {**state, "schema": "dpdl.checkpoint/2"},
    "no weights": lambda state: {**state, "model": 3},
    "text for weights": lambda state: {**state, "model": {**state["model"], "0.weight": "text"}},
    "no optimizer": lambda state: {**state, "optimizer": 3},
    "a plain optimizer": lambda state: {
        **state,
        "optimizer": {k: v for k, v in state["optimizer"].items() if k != "dpdl"},
    },
    "no groups": lambda state: {**state, "optimizer": {"dpdl": state["optimizer"]["dpdl"]}},
    "no plan": lambda state: with_private(state, plan=3),
    "an empty plan": lambda state: with_private(state, plan="{}"),
    "an empty ledger": lambda state: with_private(state, ledger="{}"),
    "no ledger": lambda state: with_private(state, ledger=None),
    "a missing ledger": lambda state: without_private(state, "ledger"),
    "a negative place": lambda state: with_private(state, steps_in_pass=-1),
    "a place in words": lambda state: with_private(state, steps_in_pass="2"),
    "a place past all releases": lambda state: with_private(state, steps_in_pass=10**6),
    "no streams": lambda state: with_private(state, randomness=None),
    "empty streams": lambda state: with_private(state, randomness={}),
    "missing streams": lambda state: without_private(state, "randomness"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_states_that_lack_something_are_refused(tmp_path: Path, change: Change) -> None:
    private = start()
    train_until(private, 2)
    path = saved(tmp_path / "run.pt", private)
    torch.save(change(torch.load(path, weights_only=True)), path)
    nothing_changed(start(), path)


def with_private(state: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**state, "optimizer": {**state["optimizer"], "dpdl": {**state["optimizer"]["dpdl"], **changes}}}


def without_private(state: dict[str, Any], name: str) -> dict[str, Any]:
    private = {k: v for k, v in state["optimizer"]["dpdl"].items() if k != name}
    return {**state, "optimizer": {**state["optimizer"], "dpdl": private}}


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    private = start()
    train_until(private, 2)
    path = saved(tmp_path / "run.pt", private)
    whole = path.read_bytes()
    fresh = start()
    for length in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:length])
        with refused(fresh, CheckpointError):
            loaded(path, fresh)


def test_flipped_bits_are_noticed(tmp_path: Path) -> None:
    """A ledger's count of 19 that reads as 11 would be spending forgotten."""
    private = start()
    train_until(private, 2)
    path = saved(tmp_path / "run.pt", private)
    whole = path.read_bytes()
    true = (weights_of(private.model), private.optimizer.state_dict())
    generator = np.random.default_rng(0)
    wrong: list[str] = []
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[generator.integers(len(whole))] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        fresh = start()
        try:
            loaded(path, fresh)
        except CheckpointError:
            continue
        except Exception as error:
            wrong.append(type(error).__name__)
            continue
        if not same(true, (weights_of(fresh.model), fresh.optimizer.state_dict())):
            wrong.append("taken for good")
    assert not wrong, {kind: wrong.count(kind) for kind in set(wrong)}
