"""What the tape refuses on the way back goes through another engine under "auto": exactly, or not at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dpdl
from dpdl.errors import ModelError
from dpdl.execution import EngineName, Execution
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.boundary import Passage, visit_gradients
from dpdl.per_sample.runner import PerSampleRunner
from dpdl.per_sample.tape.engine import TapeEngine
from dpdl.per_sample.tape.refusal import TapeRefusal
from tests.small_run import small_run

N = 12
Between = Callable[[Tensor], Tensor]


class Model(nn.Module):
    """Two layers, and something between them."""

    def __init__(self, between: Between = torch.tanh) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


def drops(h: Tensor) -> Tensor:
    return F.dropout(h, 0.5)


@pytest.fixture
def refusing_way_back(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From the moment that something is put in this list the tape refuses at the step."""
    refusing: list[int] = []
    gradients = TapeEngine.gradients

    def maybe(self: TapeEngine, passes):  # type: ignore[no-untyped-def]
        if refusing:
            raise TapeRefusal("rows are out of order. Nothing was spent. And so on")
        yield from gradients(self, passes)

    monkeypatch.setattr(TapeEngine, "gradients", maybe)
    return refusing


def runner_of(model: nn.Module, engine: EngineName = "auto") -> PerSampleRunner:
    return PerSampleRunner(model, Execution(engine=engine, loss_reduction="sum"))


def gradients_of(
    runner: PerSampleRunner, inputs: list[Tensor], *, before_step: Callable[[], object] = lambda: None
) -> dict[str, Tensor]:
    """By one pass for each of the inputs, added up."""
    trainable = dict(runner.module.named_parameters())
    passages: list[Passage] = []
    for x in inputs:
        output = runner.forward(ExampleBatch.from_call((x,), {}), trainable, passages.append)
        output.square().sum().backward()
    before_step()
    found: list[dict[str, Tensor]] = []
    visit_gradients(passages, lambda part: found.append(part.materialize()))
    return {name: torch.cat([part[name] for part in found]) for name in trainable}


def one_at_a_time(model: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for n in range(len(inputs[0])):
        model.zero_grad()
        for x in inputs:
            model(x[n : n + 1]).square().sum().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            rows[name].append(p.grad.clone())
    model.zero_grad()
    return {name: torch.stack(some) for name, some in rows.items()}


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(N, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("passes", [1, 2])
def test_a_refused_way_back_is_gone_by_another_engine(refusing_way_back: list[int], passes: int) -> None:
    model, inputs = Model().double(), batches(passes)
    runner = runner_of(model)
    gradients_of(runner, inputs)
    assert runner.engine_name == "tape"
    refusing_way_back.append(1)
    found, true = gradients_of(runner, inputs), one_at_a_time(model, inputs)
    assert runner.engine_name == "vmap"
    assert runner.notes[0] == "engine vmap, because tape cannot run the model: rows are out of order"
    for name in true:
        torch.testing.assert_close(found[name], true[name])


def test_the_engine_that_was_asked_for_is_not_exchanged(refusing_way_back: list[int]) -> None:
    model, inputs = Model().double(), batches(1)
    runner = runner_of(model, "tape")
    gradients_of(runner, inputs)
    refusing_way_back.append(1)
    with pytest.raises(TapeRefusal):
        gradients_of(runner, inputs)


def test_passes_of_one_batch_by_two_engines_are_joined_by_the_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = Model().double(), batches(2)
    # An engine in chunks cannot be joined with one that is not.
    runner = PerSampleRunner(model, Execution(loss_reduction="sum", chunk_size=5))
    gradients_of(runner, inputs[:1])
    forward, calls = TapeEngine.forward, []

    def once(self: TapeEngine, batch, trainable):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) > 1:
            raise TapeRefusal("no more")
        return forward(self, batch, trainable)

    monkeypatch.setattr(TapeEngine, "forward", once)
    found, true = gradients_of(runner, inputs), one_at_a_time(model, inputs)
    assert runner.engine_name == "vmap"
    for name in true:
        torch.testing.assert_close(found[name], true[name])


def test_with_random_numbers_the_batch_has_to_be_run_again(refusing_way_back: list[int]) -> None:
    dataset = TensorDataset(torch.randn(64, 4), torch.arange(64) % 3)
    private = small_run(Model(drops), dataset=dataset, noise_multiplier=1.0)
    for i, (x, y) in enumerate(private.loader):
        if i == 1:
            refusing_way_back.append(1)
        if i == 3:
            break
        before = private.optimizer.epsilon(1e-5)
        F.cross_entropy(private.model(x), y).backward()
        if i == 1:
            weights = [p.detach().clone() for p in private.model.parameters()]
            with pytest.raises(ModelError, match=r"drew random numbers.*Nothing was spent.*again"):
                private.optimizer.step()
            assert private.optimizer.epsilon(1e-5) == before
            assert all(torch.equal(p, w) for p, w in zip(private.model.parameters(), weights, strict=True))
            assert private.model.engine_name == "vmap"
            F.cross_entropy(private.model(x), y).backward()
        private.optimizer.step()
        assert private.optimizer.epsilon(1e-5) > before


class Meeting(Model):
    """Examples reach each other once that has begun, in larger batches than are looked at then."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.last = nn.Linear(5, width)
        self.begun = False

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        if self.begun and len(x) > 8:
            output = output + output.mean(0) * (torch.arange(output.shape[1]) == 1)
        return output


@pytest.mark.parametrize("width", [3, 30_000])  # the second is sampled, and what is wrong in it is not in the sample
def test_outputs_that_depended_on_others_are_not_taken_over(refusing_way_back: list[int], width: int) -> None:
    model, inputs = Meeting(width).double(), batches(1)
    runner = runner_of(model)
    gradients_of(runner, inputs)
    refusing_way_back.append(1)
    model.begun = True
    with pytest.raises(ModelError, match="not what was handed out"):
        gradients_of(runner, inputs)


@pytest.mark.parametrize("large", [False, True])
def test_a_model_that_is_another_by_now_is_not_run_again(refusing_way_back: list[int], large: bool) -> None:
    model, inputs = Model().double(), batches(1)
    if large:  # so that outputs are sampled
        model.last = nn.Linear(5, 30_000).double()
    runner = runner_of(model)
    gradients_of(runner, inputs)
    refusing_way_back.append(1)

    def write() -> None:
        with torch.no_grad():
            model.first.weight.add_(0.1)

    with pytest.raises(ModelError, match="handed out"):
        gradients_of(runner, inputs, before_step=write)


def test_the_modes_and_autocast_of_the_forward_are_those_of_the_second_run(refusing_way_back: list[int]) -> None:
    class Moded(Model):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2 if self.training else 1)

    model, inputs = Moded().double(), batches(1)
    runner = runner_of(model)
    gradients_of(runner, inputs)
    refusing_way_back.append(1)
    found = gradients_of(runner, inputs, before_step=model.eval)
    assert not model.training
    model.train()
    true = one_at_a_time(model, inputs)
    for name in true:
        torch.testing.assert_close(found[name], true[name])


def test_a_model_that_unpads_trains_on_under_auto() -> None:
    """Rows without padding are computed; which those are is known to the data alone."""

    class Unpadding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.last = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            h, real = self.embed(tokens), tokens != 0
            mixed = torch.zeros_like(h)
            mixed[real] = self.mix(h[real])
            return self.last(mixed.tanh().sum(1))

    generator = torch.Generator().manual_seed(0)
    full = torch.randint(1, 9, (6, 4), generator=generator)
    padded = full.clone()
    padded[:3, 2:] = 0
    model = Unpadding().double()
    runner = runner_of(model)
    for tokens in (full, padded, full, padded):
        found, true = gradients_of(runner, [tokens]), one_at_a_time(model, [tokens])
        for name in true:
            torch.testing.assert_close(found[name], true[name])
    assert dpdl.per_sample_norms(model, lambda o, _: o.sum(), padded, None, loss_reduction="sum").shape == (6,)
