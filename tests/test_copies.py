"""One run, one key, one ledger: copies, forks and swapped plans release nothing that is not accounted."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpdl.errors import PrivacyError
from tests.small_run import released, small_run, step_once


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_is_refused_or_cannot_release_anything(copied: Any) -> None:
    """Two holders of one key draw the same noise; a copy without a ledger forgets what was spent."""
    private = small_run(noise_multiplier=1.0)
    step_once(private)
    with pytest.raises((TypeError, PrivacyError), match=r"copied|copy"):
        copied(private.optimizer)
    step_once(private)  # and the original is unharmed (not so in some peers)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_runs_do_not_draw_the_same_noise() -> None:
    """Workers that inherit one wrapped run would release differences free of noise."""
    private = small_run(insecure_seed=None, noise_multiplier=1.0)

    def release_in_child() -> bytes:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(PrivacyError, TypeError):
                step_once(private)
                os.write(write, flat(released(private)).numpy().tobytes())
            os._exit(0)
        os.close(write)
        content = os.read(read, 1 << 16)
        os.close(read)
        os.waitpid(child, 0)
        return content

    first, second = release_in_child(), release_in_child()
    assert not first or first != second


def test_the_plan_of_a_run_cannot_be_exchanged() -> None:
    """Noise and ledger would follow different plans."""
    private = small_run(noise_multiplier=1.0)
    with contextlib.suppress(AttributeError, PrivacyError):
        private.optimizer.plan = replace(private.optimizer.plan, noise_multiplier=1e-9)  # type: ignore[misc]
    step_once(private)
    noise = flat(released(private)) - flat(noiseless())
    assert float(noise.std()) > 0.3


def noiseless() -> dict[str, Tensor]:
    private = small_run()
    step_once(private)
    return released(private)
