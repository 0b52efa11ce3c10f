"""A checkpoint in safetensors is the same checkpoint; without the package there is one clear error."""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

import dpdl
from dpdl.checkpoint_format import read_tree, write_tree
from dpdl.errors import CheckpointError
from tests.small_run import everything_that_counts, refused, same, small_run, step_once, weights_of


def start() -> dpdl.Private:
    return small_run(
        noise_multiplier=1.0, batch_size=4, steps=9, optimizer=lambda p: torch.optim.AdamW(p, lr=np.float64(0.05))
    )


def trained(steps: int = 2) -> dpdl.Private:
    private = start()
    for _ in range(steps):
        step_once(private)
    return private


def saved(path: Path, private: dpdl.Private, **more: Any) -> Path:
    dpdl.save_checkpoint(path, private.model, private.optimizer, **more)
    return path


TREE = {
    "ordered": OrderedDict([("b", torch.zeros(2, 0)), ("a", torch.tensor(3))]),
    "by number": {0: (1, 2.5), 1: [None, True, "text", float("inf"), 1e-310]},
    "shared": [torch.arange(6).view(2, 3).t(), torch.tensor([True]), torch.ones(2, dtype=torch.bfloat16)],
    "empty": [{}, (), [], ""],
}


@pytest.mark.parametrize("name", ["tree.pt", "tree.safetensors"])
def test_a_tree_reads_back_with_the_same_kinds_of_containers(tmp_path: Path, name: str) -> None:
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    path = tmp_path / name
    write_tree(TREE, path, named=path)
    read = read_tree(path, named=path)
    assert same(TREE, read)
    assert type(read["ordered"]) is OrderedDict
    assert read["shared"][2].dtype is torch.bfloat16


def test_a_run_resumed_from_safetensors_is_the_uninterrupted_one(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    first = trained()
    scheduler = OneCycleLR(first.optimizer, max_lr=0.1, total_steps=20)
    extra = {"epoch": 3, "best": torch.arange(3)}
    path = saved(tmp_path / "run.safetensors", first, scheduler=scheduler, extra=extra)
    second = start()
    scheduler = OneCycleLR(second.optimizer, max_lr=0.1, total_steps=20)
    assert same(extra, dpdl.load_checkpoint(path, second.model, second.optimizer, scheduler=scheduler))
    for private in (first, second):
        step_once(private)
    assert same(weights_of(first.model), weights_of(second.model))
    before, after = everything_that_counts(first), everything_that_counts(second)
    assert before["ledger"] == after["ledger"]
    assert same(before["optimizer"], after["optimizer"])


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = saved(tmp_path / "run.safetensors", trained())
    whole = path.read_bytes()
    fresh = start()
    generator = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[generator.integers(len(whole))] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        with refused(fresh, CheckpointError, "run.safetensors"):
            dpdl.load_checkpoint(path, fresh.model, fresh.optimizer)
    for length in range(0, len(whole), len(whole) // 20):
        path.write_bytes(whole[:length])
        with refused(fresh, CheckpointError):
            dpdl.load_checkpoint(path, fresh.model, fresh.optimizer)
    with refused(fresh, CheckpointError, "no checkpoint"):
        dpdl.load_checkpoint(tmp_path / "nowhere.safetensors", fresh.model, fresh.optimizer)


def test_what_the_format_cannot_hold_is_refused_when_saving(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    private = trained()
    path = saved(tmp_path / "run.safetensors", private)
    before = path.read_bytes()
    for extra in ({"path": Path("x")}, {"curve": np.arange(3)}, {"function": print}, {"set": {1}}):
        with refused(private, CheckpointError, "extra"):
            saved(path, private, extra=extra)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.safetensors"]


def test_without_the_package_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = trained(0)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    path = tmp_path / "run.safetensors"
    with refused(private, CheckpointError, "dpdl[safetensors]"):
        saved(path, private)
    path.write_bytes(b"anything")
    with refused(private, CheckpointError, "dpdl[safetensors]"):
        dpdl.load_checkpoint(path, private.model, private.optimizer)
