"""Runs with random settings, models and optimizers, and batches that are not as they should be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpdl
from dpdl.errors import PrivacyError
from tests.misuse.fuzzing import ours
from tests.misuse.odd_values import often
from tests.oracles.one_at_a_time import clipped_sum_of, per_sample_gradients
from tests.small_run import CLASSES, N, everything_that_counts, examples, network, released, same, small_run, step_once

__all__ = ["model_call", "run"]

X, Y = examples()
SQUARES_OVERFLOW = 1e100  # near enough: the square root of the largest float64 is 1e154

MODELS: dict[str, Callable[[], nn.Module]] = {
    "sound": network,
    "narrow": lambda: network(torch.bfloat16),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES)).double(),
    "frozen": lambda: network().requires_grad_(False),
    "empty": lambda: nn.Sequential(nn.Flatten()),
    "lazy": lambda: nn.Sequential(nn.LazyLinear(CLASSES)),
    "mixing": lambda: Mixing().double(),
    "scaled": lambda: nn.utils.spectral_norm(nn.Linear(3, CLASSES)).double(),
}
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p),
    "of other parameters": lambda p: torch.optim.SGD(network().parameters(), lr=0.1),
    "none": lambda p: None,
}


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layer(x)
        return h - h.mean(0)


def run(data: st.DataObject) -> None:
    sound = {
        "engine": st.sampled_from(("auto", "vmap", "tape", "loop")),
        "max_physical_batch_size": st.sampled_from((None, 1, 5, 100)),
        "accumulate_dtype": st.sampled_from((torch.float32, torch.float64)),
        "self_check": st.booleans(),
        "loss_reduction": st.sampled_from(("mean", "mean", "sum")),
        "chunk_size": st.sampled_from((None, 3)),
        "insecure_seed": st.sampled_from((None, 0, 7)),
    }
    wanted = data.draw(st.sets(st.sampled_from(list(sound))), label="given")
    # Of odd values for switches see the case "senseless switches".
    given = {
        name: data.draw(sound[name] if name == "self_check" else often(sound[name]), label=name)
        for name in sorted(wanted)
    }
    model_name = data.draw(often(st.just("sound"), st.sampled_from(list(MODELS))), label="model")
    optimizer_name = data.draw(often(st.just("sgd"), st.sampled_from(list(OPTIMIZERS))), label="optimizer")
    clip = data.draw(st.sampled_from((0.01, 1.0)), label="max_grad_norm")
    model = MODELS[model_name]()
    dtype = torch.bfloat16 if model_name == "narrow" else torch.float64
    loader = DataLoader(TensorDataset(X.to(dtype), Y), batch_size=N)
    made = dpdl.PrivacyPlan.for_loader(loader, steps=2, noise_multiplier=0.0, max_grad_norm=clip)
    try:
        optimizer = OPTIMIZERS[optimizer_name](list(model.parameters()))
    except ValueError:  # torch's, for no parameters
        return
    private = None
    with ours() as refused:
        private = dpdl.make_private(model, optimizer, loader, made, execution=dpdl.Execution(**given))
        step_once(private)
    if private is None:
        return
    assert private.optimizer.steps_taken == (0 if refused else 1)
    if not refused:
        total = torch.cat([g.flatten().double() for g in released(private).values()])
        assert model_name in ("sound", "narrow")
        assert 0 < float(total.norm()) <= N * clip * 1.01


def model_call(data: st.DataObject) -> None:
    """A batch that is not as it should be, through a model that may or may not bear it."""
    x, y = X.clone(), Y.clone()
    row = data.draw(st.integers(0, N - 1), label="row")
    for _ in range(data.draw(st.integers(1, 2), label="changes")):
        change = data.draw(st.sampled_from(sorted(BATCH_CHANGES)), label="change")
        x = BATCH_CHANGES[change](x, row)
    change = data.draw(often(st.just("none"), st.sampled_from(sorted(TARGET_CHANGES))), label="targets")
    y = TARGET_CHANGES[change](y)
    private = small_run(max_grad_norm=0.5, engine=data.draw(st.sampled_from(("auto", "vmap", "loop")), label="engine"))
    next(iter(private.loader))
    before = everything_that_counts(private)
    try:
        F.cross_entropy(network()(x), y).backward()
        bearable = True
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        bearable = False
    try:
        with ours() as refused:
            F.cross_entropy(private.model(x), y).backward()
            private.optimizer.step()
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        assert not bearable, "the plain model bears it"
        refused = [PrivacyError()]
    if refused:
        assert same(before, everything_that_counts(private)), "a refusal changed the run"
        return
    rows = per_sample_gradients(network(), F.cross_entropy, x.detach(), y)
    finite = torch.stack([torch.isfinite(g).flatten(1).all(1) for g in rows.values()]).all(0)
    usual = x.detach().abs().flatten(1).amax(1) < SQUARES_OVERFLOW
    # Beyond that an example is left out, whatever its gradient is: lengths are taken of inputs and outputs apart.
    assert any(_is_clipped_sum(private, rows, kept) for kept in (finite, finite & usual))


def _is_clipped_sum(private: dpdl.Private, rows: dict[str, Tensor], kept: Tensor) -> bool:
    expected = clipped_sum_of({name: g[kept] for name, g in rows.items()}, 0.5) if kept.any() else {}
    got = released(private)
    return private.optimizer.diagnostics.non_finite == int((~kept).sum()) and all(
        torch.allclose(got[name].double(), expected.get(name, torch.zeros(())), rtol=1e-6, atol=1e-7) for name in got
    )


def _with(value: float) -> Callable[[Tensor, int], Tensor]:
    def put(x: Tensor, row: int) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or len(x) <= row:
            return x
        x = x.clone()
        x[row, 0] = value
        return x

    return put


BATCH_CHANGES: dict[str, Callable[[Any, int], Any]] = {
    "nothing": lambda x, row: x,
    "float32": lambda x, row: x.float(),
    "float16": lambda x, row: x.half(),
    "int": lambda x, row: x.long(),
    "bool": lambda x, row: x > 0,
    "complex": lambda x, row: x.to(torch.complex128),
    "transposed": lambda x, row: x.mT if x.ndim > 1 else x,
    "narrower": lambda x, row: x[..., :2],
    "wider": lambda x, row: x.repeat(*[1] * (x.ndim - 1), 2),
    "one less": lambda x, row: x[1:],
    "flat": lambda x, row: x.flatten(),
    "scalar": lambda x, row: x.sum(),
    "empty": lambda x, row: x[:0],
    "an axis more": lambda x, row: x.unsqueeze(1),
    "an axis in front": lambda x, row: x.unsqueeze(0),
    "not contiguous": lambda x, row: x.repeat(1, 2)[:, ::2] if x.ndim == 2 else x,
    "differentiable": lambda x, row: x.clone().requires_grad_() if x.is_floating_point() else x,
    "meta": lambda x, row: x.to("meta"),
    "nan": _with(math.nan),
    "inf": _with(math.inf),
    "huge": _with(1e300),
    "tiny": _with(1e-310),
    "large": _with(1e30),
}
TARGET_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "float": lambda y: y.double(),
    "out of range": lambda y: y + 5,
    "negative": lambda y: y - 3,
    "one less": lambda y: y[1:],
    "a column": lambda y: y.unsqueeze(1),
    "int32": lambda y: y.int(),
}
