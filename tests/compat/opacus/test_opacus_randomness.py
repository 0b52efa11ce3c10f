"""Randomness is the operating system's unless a script seeds it, which is warned of."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dpdl.compat.opacus import PrivacyEngine, randomness
from dpdl.compat.opacus.data_loader import DPDataLoader, switch_generator
from dpdl.compat.opacus.utils.uniform_sampler import (
    DistributedUniformWithReplacementSampler,
    UniformWithReplacementSampler,
)
from dpdl.errors import ParameterError, PrivacyWarning
from tests.compat.opacus.small_run import loader, network, private, step

OWN_SEED = 2**52 + 12345  # as torch takes from the operating system


@pytest.mark.parametrize(
    ("at_import", "now", "seeded"),
    [(OWN_SEED, OWN_SEED, False), (OWN_SEED, 0, True), (OWN_SEED, OWN_SEED + 1, True), (42, 42, True)],
)
def test_a_seed_is_noticed_before_and_after_the_import(
    at_import: int, now: int, seeded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # what conftest.py has put in place
    monkeypatch.setattr(randomness, "_SEED_AT_IMPORT", at_import)
    monkeypatch.setattr(torch, "initial_seed", lambda: now)
    assert randomness.Randomness(None, secure=False).is_secure is not seeded
    assert randomness.Randomness(None, secure=True).is_secure
    assert not randomness.Randomness(torch.Generator(), secure=False).is_secure


@pytest.fixture
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after torch.manual_seed."""
    monkeypatch.setattr(randomness, "_torch_was_seeded", lambda: True)


def _weights(**how: Any) -> list[torch.Tensor]:
    engine = PrivacyEngine(secure_mode=how.pop("secure_mode", False))
    data = loader(batch_size=6, generator=how.pop("data_generator", None), shuffle=True)
    model, optimizer, batches = private(engine, data=data, noise_multiplier=1.0, **how)
    for batch in batches:
        step(model, optimizer, batch)
    return [p.detach().clone() for p in model.parameters()]


def _same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_nothing_repeats_by_itself() -> None:
    assert not _same(_weights(), _weights())


@pytest.mark.usefixtures("seeded")
@pytest.mark.filterwarnings("ignore:.*can be reproduced.*")
def test_a_seed_of_torch_repeats_a_run() -> None:
    runs = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        runs.append(_weights())
    assert _same(runs[0], runs[1])
    assert not _same(runs[0], runs[2])


@pytest.mark.usefixtures("seeded")
def test_a_seeded_run_says_so() -> None:
    with pytest.warns(PrivacyWarning, match=r"torch.manual_seed.*subtract the noise"):
        _weights()


@pytest.mark.usefixtures("seeded")
def test_secure_mode_follows_no_seed_and_needs_no_package() -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append(_weights(secure_mode=True, data_generator=torch.Generator().manual_seed(3)))
    assert not _same(runs[0], runs[1])


@pytest.mark.filterwarnings("ignore:.*can be reproduced.*")
def test_generators_of_the_script_repeat_what_they_are_for() -> None:
    def run(noise: int | None, data: int | None) -> list[torch.Tensor]:
        return _weights(
            noise_generator=None if noise is None else torch.Generator().manual_seed(noise),
            data_generator=None if data is None else torch.Generator().manual_seed(data),
        )

    assert _same(run(1, 2), run(1, 2))
    assert not _same(run(1, 2), run(3, 2))
    assert not _same(run(1, 2), run(1, 4))
    assert not _same(run(None, 2), run(None, 2))


@pytest.mark.filterwarnings("ignore:.*can be reproduced.*")
def test_a_generator_gives_each_step_noise_of_its_own() -> None:
    model, optimizer, batches = private(
        data=loader(batch_size=6), noise_multiplier=1.0, noise_generator=torch.Generator().manual_seed(1)
    )
    gradients = []
    for x, y in batches:
        optimizer.zero_grad()
        (0 * F.cross_entropy(model(x), y)).backward()
        optimizer.step()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert not torch.equal(gradients[0], gradients[1])


def test_samplers() -> None:
    sampler = UniformWithReplacementSampler(num_samples=400, sample_rate=0.25)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 4
    assert all(len(set(batch)) == len(batch) for batch in batches)
    sizes = [len(b) for _ in range(50) for b in sampler]
    assert abs(sum(sizes) / len(sizes) - 100) < 5 * (400 * 0.25 * 0.75 / len(sizes)) ** 0.5
    assert len(UniformWithReplacementSampler(num_samples=49, sample_rate=1 / 49)) == 49
    for wrong in ({"num_samples": 0, "sample_rate": 0.1}, {"num_samples": 3, "sample_rate": 0.0}):
        with pytest.raises(ParameterError):
            UniformWithReplacementSampler(**wrong)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError):
        DistributedUniformWithReplacementSampler()
    with pytest.raises(NotImplementedError, match="twice max_grad_norm"):
        DPDataLoader([torch.zeros(1)], sample_rate=0.5, rand_on_empty=True)
    shuffled = switch_generator(data_loader=loader(shuffle=True), generator=torch.Generator().manual_seed(3))
    assert len(list(shuffled)) == 1
    with pytest.raises(ParameterError, match="shuffle=True"):
        switch_generator(data_loader=loader(), generator=None)


def test_copies_of_a_model_are_plain() -> None:
    start = network()
    model, _, _ = private(model=start)
    twin = copy.deepcopy(model._module)
    assert type(twin) is type(start)
