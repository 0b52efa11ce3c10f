"""Checkpoints, states and ledgers with something in them changed."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import strategies as st

import accountants
import dpdl
from dpdl.ledger_file import LedgerFile
from tests.misuse.fuzzing import ours
from tests.misuse.odd_values import as_json, changed
from tests.small_run import everything_that_counts, same, small_run, step_once

__all__ = ["checkpoint", "ledger_file", "ledger_json", "state_dict"]


@cache
def saved(suffix: str) -> tuple[bytes, dict[str, Any]]:
    """A checkpoint after a step, and what is in it."""
    private = small_run(noise_multiplier=1.0)
    step_once(private)
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"run{suffix}"
        dpdl.save_checkpoint(path, private.model, private.optimizer)
        return path.read_bytes(), everything_that_counts(private)


def damaged(data: st.DataObject, whole: bytes) -> bytes:
    """With bytes flipped, cut, put in, or exchanged."""
    content = bytearray(whole)
    way = data.draw(st.sampled_from(("flip", "flip", "cut", "put in", "blank", "double")), label="how")
    at = data.draw(st.integers(0, len(whole) - 1), label="at")
    length = data.draw(st.integers(1, 40), label="length")
    if way == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    elif way == "cut":
        del content[at : at + data.draw(st.sampled_from((1, length, len(whole))), label="cut")]
    elif way == "put in":
        content[at:at] = data.draw(st.binary(min_size=1, max_size=40), label="put in")
    elif way == "blank":
        content[at : at + length] = bytes(len(content[at : at + length]))
    else:
        content[at:at] = content[at : at + length]
    return bytes(content)


def checkpoint(data: st.DataObject) -> None:
    suffix = data.draw(st.sampled_from((".pt", ".safetensors")), label="format")
    whole, held = saved(suffix)
    content = damaged(data, whole)
    private = small_run(noise_multiplier=1.0)
    before = everything_that_counts(private)
    with TemporaryDirectory() as folder, ours() as refused:
        path = Path(folder) / f"run{suffix}"
        path.write_bytes(content)
        dpdl.load_checkpoint(path, private.model, private.optimizer)
    after = everything_that_counts(private)
    if refused:
        assert same(before, after), "a refusal changed the run"
    else:
        assert all(same(after[part], held[part]) for part in ("weights", "optimizer", "ledger"))


def state_dict(data: st.DataObject) -> None:
    private = small_run(noise_multiplier=1.0)
    step_once(private)
    state = private.optimizer.state_dict()
    state["dpdl"]["ledger"] = json.loads(state["dpdl"]["ledger"])
    state["dpdl"]["plan"] = json.loads(state["dpdl"]["plan"])
    event = copy.deepcopy(state["dpdl"]["ledger"]["entries"][0]["event"])
    state["dpdl"] = changed(data, state["dpdl"])  # of the rest see the case "a broken state of the plain optimizer"
    if _event_of(state["dpdl"]) not in (None, event):
        return  # see the case "a state whose steps are not the plans"
    for name in ("ledger", "plan"):
        if isinstance(state["dpdl"].get(name), dict):
            state["dpdl"][name] = as_json(state["dpdl"][name])
    other = small_run(noise_multiplier=1.0)
    before = everything_that_counts(other)
    with ours() as refused:
        other.optimizer.load_state_dict(state)
    if refused:
        assert same(before, everything_that_counts(other)), "a refusal changed the run"
        return
    assert other.optimizer.steps_taken >= 1, "spending was forgotten"
    assert other.optimizer.epsilon(1e-5) > 4.3


def _event_of(state: dict[str, Any]) -> Any:
    """Of the first entry, if all that leads to it is there."""
    found: Any = state.get("ledger")
    for key in ("entries", 0, "event"):
        if not isinstance(found, (dict, list)) or (isinstance(found, dict) and key not in found) or not found:
            return None
        found = found[key]
    return found


def ledger_json(data: st.DataObject) -> None:
    private = small_run(noise_multiplier=1.0)
    for _ in range(2):
        step_once(private)
    values = changed(data, json.loads(private.optimizer.ledger.to_json()))
    with ours() as refused:
        again = dpdl.Ledger.from_json(as_json(values))
        spent = again.epsilon(1e-5)
    if not refused:
        assert spent >= 0
        assert again.releases == sum(entry["count"] for entry in values["entries"])


def ledger_file(data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "data.ledger"
        with LedgerFile(path) as ledger:
            for noise in (2.0, 3.0, 2.0):
                ledger.record(accountants.Gaussian(noise), run="a")
        whole = path.read_bytes()
        path.write_bytes(damaged(data, whole))
        with ours() as refused:
            again = LedgerFile(path)
            releases = again.releases
        if not refused and releases < 3:
            lines = whole.splitlines(keepends=True)
            kept = path.read_bytes()
            assert whole.startswith(kept), "something in the middle was lost without a word"
            assert kept in {b"".join(lines[:n]) for n in range(len(lines) + 1)}
