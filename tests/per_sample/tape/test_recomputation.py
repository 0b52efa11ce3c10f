"""Activation checkpointing and hooks on saved tensors under the tape; and that a pass leaves nothing behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import dpdl
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.tape import TapeEngine
from dpdl.per_sample.tape.recomputation import saved_tensors_are_hooked
from tests.per_sample.tape.against_autograd import (
    Numbers,
    Using,
    assert_same,
    check,
    cotangents_of,
    dtypes,
    examples_and_positions,
    measured,
    truth,
    weights_of,
)

REENTRANT = {"reentrant": True, "not reentrant": False}

# Parts of models, from 4 features to 4; what they hold is made by `members`.
BLOCKS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": lambda m, x: m.first(x),
    "two layers": lambda m, x: m.second(torch.tanh(m.first(x))),
    "a layer twice": lambda m, x: m.first(torch.tanh(m.first(x))),
    "in place activation": lambda m, x: m.second(torch.relu_(m.first(x))),
    "norm and scale": lambda m, x: m.norm(m.first(x)) * m.scale + m.scale,
    "by vmap": lambda m, x: torch.addcmul(m.first(x), x, m.scale),
    "derived weight": lambda m, x: F.linear(x, m.first.weight / m.first.weight.norm(), m.first.bias),
    "view and computed": lambda m, x: F.linear(x, m.first.weight.t()) * F.linear(x, m.first.weight.exp()),
    "parametrised": lambda m, x: m.normed(x),
    "convolution": lambda m, x: m.conv(x.mT).mT,
    "recurrent": lambda m, x: m.rnn(x)[0],
    "attention": lambda m, x: m.attention(x, x, x, need_weights=False)[0],
    "token in place": lambda m, x: _with_token(m, x),
    "expanded token": lambda m, x: torch.cat([m.scale.expand(len(x), 1, 4), m.first(x)], 1)[:, 1:] + m.scale,
    "embedding": lambda m, x: m.table((x > 0).long().sum(-1)) * x,
    "einsum": lambda m, x: torch.einsum("nti,oi->nto", x, m.first.weight),
}


def _with_token(m: Any, x: Tensor) -> Tensor:
    z = m.first(x)
    z[:, 0] = m.scale
    return torch.tanh(z)


def members() -> dict[str, Any]:
    return {
        "first": nn.Linear(4, 4),
        "second": nn.Linear(4, 4),
        "norm": nn.LayerNorm(4),
        "scale": Numbers(5)(4),
        "normed": parametrizations.weight_norm(nn.Linear(4, 4)),
        "conv": nn.Conv1d(4, 4, 3, padding=1),
        "rnn": nn.GRU(4, 4, batch_first=True),
        "attention": nn.MultiheadAttention(4, 2, batch_first=True),
        "table": nn.Embedding(5, 4),
        "stem": nn.Linear(4, 4),
        "head": nn.Linear(4, 2),
    }


def within(block: Callable[[Any, Tensor], Tensor], reentrant: bool) -> nn.Module:
    """A checkpointed block between two layers."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(checkpoint(lambda h: block(m, h), m.stem(x), use_reentrant=reentrant))

    return Using(forward, **members())


@pytest.mark.parametrize("kind", REENTRANT)
@pytest.mark.parametrize("name", BLOCKS)
@settings(max_examples=2, deadline=None)
@given(nt=examples_and_positions(), dtype=dtypes)
def test_checkpointed_blocks(name: str, kind: str, nt: tuple[int, int], dtype: torch.dtype) -> None:
    check(within(BLOCKS[name], REENTRANT[kind]), Numbers()(*nt, 4), dtype=dtype, fewer_too=False)


@pytest.mark.parametrize("kind", REENTRANT)
def test_a_block_used_twice(kind: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        for _ in range(2):
            x = checkpoint(lambda h: torch.tanh(m.first(h)) * m.scale, x, use_reentrant=REENTRANT[kind])
        return m.head(x)

    check(Using(forward, **members()), Numbers()(4, 4, 4))


@pytest.mark.parametrize("kind", REENTRANT)
def test_a_weight_used_inside_and_outside(kind: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        x = checkpoint(lambda h: torch.tanh(m.first(h)), x, use_reentrant=REENTRANT[kind])
        return m.first(x) * m.first.weight[0]

    check(Using(forward, **members()), Numbers()(4, 4, 4))


def test_a_weight_derived_outside_of_the_block() -> None:
    """The block takes the derived weight as an argument, or closes over it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        weight = m.first.weight.exp()
        x = checkpoint(F.linear, m.stem(x), weight, use_reentrant=False)
        return checkpoint(lambda h: F.linear(torch.tanh(h), weight), x, use_reentrant=False)

    check(Using(forward, **members()), Numbers()(3, 4, 4))


@pytest.mark.parametrize("inner", REENTRANT)
@pytest.mark.parametrize("outer", REENTRANT)
def test_nested(outer: str, inner: str) -> None:
    def deep(m: Any, h: Tensor) -> Tensor:
        h = torch.tanh(m.first(h))
        h = checkpoint(lambda z: torch.tanh(m.second(z)) * m.scale, h, use_reentrant=REENTRANT[inner])
        return m.norm(h)

    check(within(deep, REENTRANT[outer]), Numbers()(4, 4, 4))


def test_checkpoint_sequential() -> None:
    parts = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)])
    for reentrant in REENTRANT.values():
        model = Using(
            lambda m, x, reentrant=reentrant: m.head(
                checkpoint_sequential(m.parts, 2, m.stem(x), use_reentrant=reentrant)
            ),
            parts=parts,
            stem=nn.Linear(4, 4),
            head=nn.Linear(4, 2),
        )
        check(model, Numbers()(3, 4, 4))


@pytest.mark.parametrize("kind", REENTRANT)
def test_the_first_layer_is_checkpointed(kind: str) -> None:
    """Data without a gradient goes in: torch's reentrant kind then has no gradients at all, in plain training too."""
    model = Using(
        lambda m, x: m.head(checkpoint(lambda h: torch.tanh(m.first(h)), x, use_reentrant=REENTRANT[kind])), **members()
    )
    x = Numbers()(3, 4, 4)
    if kind == "not reentrant":
        check(model, x)
    else:
        with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
            true = truth(model, (x,))
        assert not true.gradients["first.weight"].any()


@pytest.mark.parametrize("kind", REENTRANT)
def test_dropout_is_the_same_when_it_is_recomputed(kind: str) -> None:
    """sum_i w_i dropout(x)_i: the gradient is the mask that the forward used."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = x + 0 * m.bias
        return checkpoint(lambda h: F.dropout(h, 0.5) * m.weight, x, use_reentrant=REENTRANT[kind])

    model = Using(forward, weight=torch.ones(40).double(), bias=torch.zeros(40).double())
    x = 1 + Numbers()(5, 40).abs()
    torch.manual_seed(0)
    batch = ExampleBatch.from_call((x,), {})
    for _ in range(3):
        forward_pass = TapeEngine(model).forward(batch, dict(model.named_parameters()))
        (output,) = forward_pass.outputs
        (part,) = forward_pass.pull_back({0: torch.ones_like(output)})
        kept = output != 0
        assert 60 < int(kept.sum()) < 140  # of 200, half
        torch.testing.assert_close(part.materialize()["weight"], output, rtol=1e-12, atol=0)


def test_a_block_that_does_not_preserve_the_random_state_is_exact_without_randomness() -> None:
    model = Using(
        lambda m, x: m.head(
            checkpoint(lambda h: torch.tanh(m.first(h)), m.stem(x), use_reentrant=False, preserve_rng_state=False)
        ),
        **members(),
    )
    check(model, Numbers()(3, 4, 4))


HOOKS: dict[str, Callable[[], Any]] = {
    "save_on_cpu": save_on_cpu,
    "in half as many bits": lambda: saved_tensors_hooks(lambda t: t, lambda t: t),
    "copied": lambda: saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
    "to numpy and back": lambda: saved_tensors_hooks(
        lambda t: (t.detach().numpy().copy(), t.requires_grad), lambda p: torch.from_numpy(p[0])
    ),
}


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("name", BLOCKS)
def test_hooks_on_saved_tensors(name: str, hooks: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.stem(x)
        with HOOKS[hooks]():
            h = torch.tanh(BLOCKS[name](m, h))
        return m.head(h)

    check(Using(forward, **members()), Numbers()(4, 4, 4), fewer_too=False)


def test_hooks_around_all_of_the_model() -> None:
    model, x = within(BLOCKS["two layers"], False).double(), Numbers()(3, 4, 4)
    true = truth(model, (x,))
    with save_on_cpu():
        assert_same(measured(model, (x,)), true, torch.float64)


def test_blocks_are_recomputed_and_saved_tensors_let_go() -> None:
    """As plain checkpointing: each block runs twice, and what it saves is not kept in between."""
    runs = [0]

    def block(m: Any, h: Tensor) -> Tensor:
        runs[0] += 1
        return m.second(torch.tanh(m.first(h)))

    for reentrant in REENTRANT.values():
        model = within(block, reentrant).double()
        engine, batch = TapeEngine(model), ExampleBatch.from_call((Numbers()(4, 4, 4),), {})
        measured(model, (Numbers()(4, 4, 4),), engine=engine)  # knows the way from here on
        runs[0] = 0
        forward = engine.forward(batch, dict(model.named_parameters()))
        assert runs[0] == 1
        (part,) = forward.pull_back({0: torch.ones_like(forward.outputs[0])})
        assert runs[0] == 2
        part.norms()
        assert runs[0] == 2


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: Using(lambda m, x: m.head(BLOCKS["two layers"](m, m.stem(x))), **members()),
    "views and vmap": lambda: Using(
        lambda m, x: BLOCKS["view and computed"](m, x) + BLOCKS["by vmap"](m, x), **members()
    ),
    "tokens": lambda: Using(lambda m, x: BLOCKS["expanded token"](m, x) + _with_token(m, x), **members()),
    "recurrent": lambda: Using(lambda m, x: BLOCKS["recurrent"](m, x), **members()),
    "checkpointed": lambda: within(BLOCKS["two layers"], False),
    "checkpointed, reentrant": lambda: within(BLOCKS["two layers"], True),
    "convolution": lambda: Using(lambda m, x: BLOCKS["convolution"](m, x), **members()),
}


@pytest.mark.parametrize(
    "used",
    ["all", pytest.param("norms only", marks=pytest.mark.slow), pytest.param("forward only", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", MODELS)
def test_no_more_tensors_live_after_many_steps(name: str, used: str) -> None:
    model, x = MODELS[name]().double(), Numbers()(3, 4, 4)
    engine, trainable = TapeEngine(model), dict(model.named_parameters())

    def steps(count: int) -> int:
        for _ in range(count):
            forward = engine.forward(ExampleBatch.from_call((x,), {}), trainable)
            if used == "forward only":
                continue
            cotangents = cotangents_of([tuple(forward.outputs[0].shape)])
            (part,) = forward.pull_back({0: cotangents[0]})
            part.norms()
            if used == "all":
                part.weighted_sum(weights_of(3))
                part.materialize()
            del part
        forward = None
        return live_tensors()

    after_few = steps(5)
    assert steps(20) <= after_few


def test_memory_is_let_go_without_the_garbage_collector() -> None:
    """No cycle holds a pass: its tensors go when the last one who asks lets go."""
    model, x = MODELS["plain"]().double(), Numbers()(3, 4, 4)
    engine, trainable = TapeEngine(model), dict(model.named_parameters())
    engine.forward(ExampleBatch.from_call((x,), {}), trainable)
    gc.collect()
    gc.disable()
    try:
        seen = []
        kept = model.second.register_forward_hook(lambda _m, args, _o: seen.append(weakref.ref(args[0])))
        forward = engine.forward(ExampleBatch.from_call((x,), {}), trainable)
        kept.remove()
        assert seen[-1]() is not None
        (part,) = forward.pull_back({0: torch.ones_like(forward.outputs[0])})
        part.norms()
        part.weighted_sum(weights_of(3))
        del part, forward
        assert seen[-1]() is None
    finally:
        gc.enable()


def test_stray_forwards_leave_nothing_for_the_next_pass() -> None:
    """A pass that is never gone back through does not enter the gradients of another."""
    model, x = MODELS["views and vmap"]().double(), Numbers()(3, 4, 4)
    engine, trainable = TapeEngine(model), dict(model.named_parameters())
    true = truth(model, (x,))
    stray = [engine.forward(ExampleBatch.from_call((2 * x,), {}), trainable) for _ in range(3)]
    assert_same(measured(model, (x,), engine=engine), true, torch.float64)
    del stray
    assert_same(measured(model, (x,), engine=engine), true, torch.float64)


def test_two_passes_at_a_time() -> None:
    """Interleaved: each goes back to what it recorded itself."""
    for name in MODELS:
        model, x = MODELS[name]().double(), Numbers()(3, 4, 4)
        engine, trainable = TapeEngine(model), dict(model.named_parameters())
        batches = [x, x.flip(0).sin()]
        forwards = [engine.forward(ExampleBatch.from_call((batch,), {}), trainable) for batch in batches]
        for forward, batch in reversed(list(zip(forwards, batches, strict=True))):
            cotangents = cotangents_of([tuple(forward.outputs[0].shape)])
            (part,) = forward.pull_back({0: cotangents[0]})
            true = truth(model, (batch,))
            torch.testing.assert_close(part.norms(), true.norms, rtol=1e-10, atol=0)


def test_several_passes_are_one_gradient() -> None:
    """Their sum is joined before norms: not the sum of norms."""
    for name in MODELS:
        model, x = MODELS[name]().double(), Numbers()(3, 4, 4)
        engine, trainable = TapeEngine(model), dict(model.named_parameters())
        batches = [x, x.sin()]
        trues = [truth(model, (batch,)) for batch in batches]
        forwards = [engine.forward(ExampleBatch.from_call((batch,), {}), trainable) for batch in batches]
        passes = [(f, {0: cotangents_of([tuple(f.outputs[0].shape)])[0]}) for f in forwards]
        (part,) = engine.gradients(passes)
        summed = {n: trues[0].gradients[n] + trues[1].gradients[n] for n in trainable}
        norms = torch.stack([g.flatten(1).square().sum(1) for g in summed.values()]).sum(0).sqrt()
        torch.testing.assert_close(part.norms(), norms, rtol=1e-10, atol=0, msg=name)
        found = part.weighted_sum(weights_of(3))
        for n, g in summed.items():
            torch.testing.assert_close(found[n], torch.einsum("n,n...->...", weights_of(3), g), rtol=1e-9, atol=1e-12)


def test_a_checkpointed_model_by_the_public_way() -> None:
    model, x = within(BLOCKS["derived weight"], False).double(), Numbers()(4, 4, 4)
    true = truth(model, (x,))
    found = dpdl.per_sample_gradients(
        model, lambda o, _: (o * cotangents_of([tuple(o.shape)])[0]).sum(), x, None, engine="tape", loss_reduction="sum"
    )
    for name, expected in true.gradients.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tells", [True, False], ids=["asked", "found out, as under torch 2.6"])
def test_hooks_on_saved_tensors_are_noticed(tells: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not tells:
        monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks", raising=False)
    assert not saved_tensors_are_hooked()
    with torch.autograd.graph.save_on_cpu(), torch.no_grad():
        assert saved_tensors_are_hooked()
    assert not saved_tensors_are_hooked()
