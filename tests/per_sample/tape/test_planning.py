"""Where calls carry the examples: measured, also where shapes alone would mislead, and again when the model changes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dpdl
from dpdl.errors import EngineMismatchError, ModelError
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.self_check import refuse_mismatch
from dpdl.per_sample.tape import TapeEngine
from dpdl.per_sample.tape.refusal import TapeRefusal
from tests.per_sample.tape.against_autograd import (
    Answers,
    Numbers,
    Using,
    assert_same,
    check,
    dtypes,
    examples_and_positions,
    measured,
    sizes,
    truth,
)

Forward = Callable[[Any, Tensor], Tensor]


def layers(forward: Callable[..., Any], width: int = 4, **more: Any) -> nn.Module:
    """A model of two linear layers, a norm, positions, a scale, and whatever else."""
    members: dict[str, Any] = {
        "first": nn.Linear(width, width),
        "second": nn.Linear(width, width),
        "norm": nn.LayerNorm(width),
        "scale": Numbers(5)(width),
        **more,
    }
    return Using(forward, **members)


def through(m: Any, rows: Tensor) -> Tensor:
    """Every kind of rule, on whatever axis the examples lie."""
    return m.second(torch.tanh(m.norm(m.first(rows)) * m.scale)) + m.scale


ROWS: dict[str, Forward] = {
    "examples first, rows of one together": lambda m, x: through(m, x.flatten(0, 1)).unflatten(0, (len(x), -1)),
    "positions first, rows of one apart": lambda m, x: (
        through(m, x.transpose(0, 1).flatten(0, 1)).unflatten(0, (-1, len(x))).transpose(0, 1)
    ),
    "time first": lambda m, x: through(m, x.transpose(0, 1)).transpose(0, 1),
    "examples third": lambda m, x: through(m, x.movedim(0, 1).unsqueeze(0)).squeeze(0).movedim(1, 0),
    "repeated rows": lambda m, x: through(m, x.repeat_interleave(2, 0)).unflatten(0, (len(x), 2)),
    "repeated batch": lambda m, x: through(m, x.repeat(2, 1, 1)).unflatten(0, (2, len(x))).transpose(0, 1),
    "one row an example": lambda m, x: through(m, x[:, 0]),
    "all in one axis": lambda m, x: through(m, x.reshape(-1, x.shape[-1])).reshape(x.shape),
    "cat of the batch with itself": lambda m, x: (
        through(m, torch.cat([x, x.sin()])).unflatten(0, (2, len(x))).transpose(0, 1)
    ),
    "stack in front": lambda m, x: through(m, torch.stack([x, x.sin(), x.cos()])).transpose(0, 1),
    "stack in front, flattened": lambda m, x: (
        through(m, torch.stack([x, x.sin(), x.cos()]).flatten(0, 1)).unflatten(0, (3, len(x))).transpose(0, 1)
    ),
}


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=8, deadline=None)
@given(nt=examples_and_positions(), dtype=dtypes)
def test_wherever_the_examples_lie(name: str, nt: tuple[int, int], dtype: torch.dtype) -> None:
    check(layers(ROWS[name]), Numbers()(*nt, 4), dtype=dtype)


@settings(max_examples=8, deadline=None)
@given(n=st.integers(1, 4), k=sizes, dtype=dtypes)
def test_windows(n: int, k: int, dtype: torch.dtype) -> None:
    """[N, k * 2, k * 2, d] in N * k * k windows of 2 * 2, with a bias for each position in a window."""

    def forward(m: Any, x: Tensor) -> Tensor:
        size, _, side, d = len(x), *x.shape[1:]
        windows = x.view(size, side // 2, 2, side // 2, 2, d).transpose(2, 3).reshape(-1, 4, d)
        scores = torch.softmax(m.first(windows) @ m.second(windows).mT + m.bias, -1)
        out = m.norm(scores @ windows) + m.positions
        return out.view(size, side // 2, side // 2, 2, 2, d).transpose(2, 3).reshape(x.shape)

    model = layers(forward, bias=Numbers(1)(4, 4), positions=Numbers(2)(4, 4))
    check(model, Numbers()(n, 2 * k, 2 * k, 4), dtype=dtype)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@settings(max_examples=4, deadline=None)
@given(nt=examples_and_positions(), dtype=dtypes)
def test_recurrent_layers_with_time_first(
    kind: type[nn.RNNBase], batch_first: bool, nt: tuple[int, int], dtype: torch.dtype
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if batch_first:
            return m.head(m.rnn(m.inner(x))[0])
        return m.head(m.rnn(m.inner(x.transpose(0, 1)))[0]).transpose(0, 1)

    rnn = kind(4, 3, batch_first=batch_first)
    check(Using(forward, rnn=rnn, head=nn.Linear(3, 2), inner=nn.Linear(4, 4)), Numbers()(*nt, 4), dtype=dtype)


def test_attention_with_time_first() -> None:
    for n in (1, 4):
        attention = nn.MultiheadAttention(4, 2)
        model = Using(lambda m, x: m.a(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1), a=attention)
        check(model, Numbers()(n, 4, 4))


@settings(max_examples=8, deadline=None)
@given(n=sizes, dtype=dtypes)
def test_a_batch_of_examples_that_are_all_alike(n: int, dtype: torch.dtype) -> None:
    """Rows in an order that only the values tell apart, and no value differs: the survey exchanges an example."""
    for name in ("positions first, rows of one apart", "repeated batch", "examples first, rows of one together"):
        check(layers(ROWS[name]), torch.ones(n, 3, 4) * torch.arange(1.0, 5.0), dtype=dtype)


@pytest.mark.parametrize("name", ["positions first, rows of one apart", "stack in front, flattened"])
def test_rows_that_nothing_tells_apart_are_right_or_refused_by_the_check(name: str) -> None:
    """A first batch of zeros says nothing on the order of rows."""
    model, dull, x = layers(ROWS[name]).double(), torch.zeros(3, 4, 4).double(), Numbers()(3, 4, 4)
    engine = TapeEngine(model)
    trainable = dict(model.named_parameters())
    try:
        refuse_mismatch(engine, ExampleBatch.from_call((dull,), {}), trainable)
    except (EngineMismatchError, TapeRefusal):
        return
    measured(model, (dull,), engine=engine)
    assert_same(measured(model, (x,), engine=engine), truth(model, (x,)), torch.float64)


class LayerDrop(nn.Module):
    """Each layer is skipped now and then, for the whole batch."""

    def __init__(self, chance: Callable[[], bool]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 2)
        self.chance = chance

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not self.chance():
                x = x + torch.tanh(layer(x))
        return self.head(x)


def random_chance() -> bool:
    return random.random() < 0.5


def torchs_chance() -> bool:
    return bool(torch.rand(()) < 0.5)


@pytest.mark.parametrize("draw", [torchs_chance, random_chance])
def test_layers_skipped_at_random(draw: Callable[[], bool]) -> None:
    """By torch's generator, exactly; by another, exactly or not at all."""
    random.seed(0)
    kept: list[bool] = []

    def chance() -> bool:
        kept.append(draw())
        return kept[-1]

    model = LayerDrop(chance).double()
    engine, x = TapeEngine(model), Numbers()(3, 3, 4)
    seen = set()
    for _ in range(12):
        try:
            found = measured(model, (x,), engine=engine)
        except TapeRefusal:
            assert draw is random_chance
            return
        run = list(kept[-3:])
        seen.add(tuple(run))
        replay = iter(run * len(x))
        model.chance = lambda replay=replay: next(replay)  # type: ignore[misc]
        true = truth_in_place(model, x)
        model.chance = chance
        assert_same(found, true, torch.float64)
    assert len(seen) > 2


def truth_in_place(model: nn.Module, x: Tensor) -> Answers:
    """`truth` for a model whose closures must not be copied."""
    rows = {name: [] for name, _ in model.named_parameters()}  # type: ignore[var-annotated]
    outputs = []
    for n in range(len(x)):
        output = model(x[n : n + 1])
        outputs.append(output.detach())
        cotangent = Numbers(1234)(len(x), *output.shape[1:])[n : n + 1]
        gradients = torch.autograd.grad((output * cotangent).sum(), list(model.parameters()), allow_unused=True)
        for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
            rows[name].append(torch.zeros_like(p) if g is None else g)
    gradients_of = {name: torch.stack(parts).detach() for name, parts in rows.items()}
    weights = torch.linspace(1, 2, len(x), dtype=torch.float64)
    weights[1] = 0
    return Answers(
        outputs=[torch.cat(outputs)],
        gradients=gradients_of,
        norms=torch.stack([g.flatten(1).square().sum(1) for g in gradients_of.values()]).sum(0).sqrt(),
        weighted={name: torch.einsum("n,n...->...", weights, g) for name, g in gradients_of.items()},
    )


def again_and_again(model: nn.Module, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
    """One engine, one call after another, then all once more in the other order."""
    model = model.double()
    engine = TapeEngine(model)
    for args, named in [*calls, *reversed(calls)]:
        assert_same(measured(model, args, named, engine=engine), truth(model, args, named), torch.float64)


def test_control_flow_that_follows_the_sequence_length() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            state = torch.tanh(m.first(x[:, t]) + m.second(state))
        return m.norm(state) if x.shape[1] > 2 else m.scale * state

    numbers = Numbers()
    again_and_again(layers(forward), [((numbers(3, t, 4),), {}) for t in (2, 5, 1, 3)])


def test_sizes_of_batches_and_images_that_change() -> None:
    numbers = Numbers()
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
    )
    again_and_again(model, [((numbers(n, 2, h, w),), {}) for n, h, w in ((3, 5, 5), (1, 3, 6), (5, 5, 5), (2, 7, 4))])


def test_forms_of_arguments_that_change() -> None:
    def forward(m: Any, x: Tensor, mask: Tensor | None = None, *, twice: bool = False) -> Tensor:
        if mask is not None:
            x = x * mask.unsqueeze(-1)
            x = m.norm(x)
        x = m.first(x)
        return m.second(torch.tanh(x)) if twice else x

    numbers = Numbers()
    x, mask = numbers(3, 3, 4), (numbers(3, 3) > 0).double()
    again_and_again(
        layers(forward),
        [((x,), {}), ((x, mask), {}), ((x,), {"mask": mask}), ((x,), {"twice": True}), ((x[:, 0],), {"twice": False})],
    )


def test_models_that_return_dicts_and_tuples() -> None:
    def nested(m: Any, x: Tensor) -> Any:
        h = m.first(x)
        return {"logits": m.second(torch.tanh(h)), "hidden": (h, m.norm(h)), "count": torch.ones(len(x)).long(), "k": 3}

    check(layers(nested), Numbers()(4, 4, 4))
    check(layers(lambda m, x: (m.first(x), None, m.second(x).sum((1, 2)))), Numbers()(4, 4, 4))


def test_a_mapping_of_inputs() -> None:
    def forward(m: Any, *, words: Tensor, features: Tensor) -> Tensor:
        return m.table(words) + m.first(features)

    numbers = Numbers()
    named = {"words": numbers.tokens(3, 3, vocabulary=5), "features": numbers(3, 3, 4)}
    check(layers(forward, table=nn.Embedding(5, 4)), named=named)


def test_unused_parameters_receive_zeros() -> None:
    true = check(layers(lambda m, x: m.first(x)), Numbers()(3, 2, 4))
    assert not any(true.gradients[name].any() for name in ("second.weight", "norm.bias", "scale"))
    check(layers(lambda m, x: x.sin()), Numbers()(3, 2, 4))  # none is used


FROZEN: dict[str, Callable[[str], bool]] = {
    "first layer": lambda name: "first" in name,
    "all but the head": lambda name: "second" not in name,
    "all but biases": lambda name: "bias" not in name,
    "norms": lambda name: "norm" in name,
    "all but the scale": lambda name: name != "scale",
    "weights of the middle": lambda name: name in ("norm.weight", "second.weight"),
}


@pytest.mark.parametrize("name", FROZEN)
@settings(max_examples=5, deadline=None)
@given(nt=examples_and_positions(), dtype=dtypes)
def test_partly_frozen(name: str, nt: tuple[int, int], dtype: torch.dtype) -> None:
    model = layers(through)
    for parameter_name, p in model.named_parameters():
        p.requires_grad_(not FROZEN[name](parameter_name))
    check(model, Numbers()(*nt, 4), dtype=dtype)


def test_unfreezing_and_freezing_later() -> None:
    model, x = layers(through).double(), Numbers()(3, 3, 4)
    engine = TapeEngine(model)
    for frozen in ("", "first", "second", "bias", ""):
        for name, p in model.named_parameters():
            p.requires_grad_(not frozen or frozen not in name)
        assert_same(measured(model, (x,), engine=engine), truth(model, (x,)), torch.float64)


def test_train_and_eval_mode() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.first(x)
        return m.second(torch.tanh(h)) if m.training else m.norm(h) * m.scale

    model, x = layers(forward).double(), Numbers()(3, 3, 4)
    engine = TapeEngine(model)
    for mode in (True, False, True, False):
        model.train(mode)
        assert_same(measured(model, (x,), engine=engine), truth(model, (x,)), torch.float64)
    model.train()
    model.norm.eval()  # a part alone
    assert_same(measured(model, (x,), engine=engine), truth(model, (x,)), torch.float64)


def test_a_part_of_the_model_that_switches_its_mode() -> None:
    """The model as a whole stays in training mode."""
    inner = Using(lambda m, x: m.a(x) if m.training else torch.tanh(m.b(m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model = Using(lambda m, x: m.head(m.inner(x)), inner=inner, head=nn.Linear(4, 2)).double()
    engine, x = TapeEngine(model), Numbers()(3, 3, 4)
    for mode in (True, False, True):
        model.inner.train(mode)
        assert_same(measured(model, (x,), engine=engine), truth(model, (x,)), torch.float64)


def test_examples_told_apart_when_there_is_only_one() -> None:
    """A first batch of one example; then of several."""
    model, numbers = layers(ROWS["positions first, rows of one apart"]).double(), Numbers()
    engine = TapeEngine(model)
    for n in (1, 4, 1, 2):
        x = numbers(n, 4, 4)
        assert_same(measured(model, (x,), engine=engine), truth(model, (x,)), torch.float64)


def test_a_reduction_over_the_batch_is_not_silently_wrong() -> None:
    for forward in (
        lambda m, x: m.first(x) - m.first(x).mean(0),
        lambda m, x: m.first(x.mean(0, keepdim=True)).expand_as(x) + m.second(x),
        lambda m, x: m.first(x).flip(0),
    ):
        with pytest.raises(ModelError):
            dpdl.per_sample_gradients(
                layers(forward).double(), lambda o, _: o.square().sum(), Numbers()(4, 4, 4), None, loss_reduction="sum"
            )


def test_state_and_random_numbers_are_left_as_they_were() -> None:
    """The survey runs the model several times; the user's generator moves as by one run."""
    model = layers(lambda m, x: F.dropout(m.first(x), 0.5), counter=nn.BatchNorm1d(4).eval()).double()
    x = Numbers()(3, 4, 4)
    torch.manual_seed(3)
    model(x)
    after_one = torch.rand(3)
    torch.manual_seed(3)
    TapeEngine(model).forward(ExampleBatch.from_call((x,), {}), dict(model.named_parameters()))
    assert torch.equal(torch.rand(3), after_one)
