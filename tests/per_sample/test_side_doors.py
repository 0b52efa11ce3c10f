"""Ways of writing a model that lead past what engines watch: right, or refused; never silently wrong.

The oracle is plain autograd on one example at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dpdl
from dpdl.clipping import flat_weights
from dpdl.errors import ModelError
from dpdl.execution import EngineName, Execution
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.boundary import Passage, visit_gradients
from dpdl.per_sample.runner import PerSampleRunner
from tests.per_sample.case import ENGINES
from tests.small_run import small_run


class Run:
    """A model's norms, batch after batch, by one runner."""

    def __init__(self, model: nn.Module, engine: EngineName = "auto") -> None:
        self.model = model
        self.runner = PerSampleRunner(model, Execution(engine=engine, loss_reduction="sum"))

    def norms(self, x: Tensor) -> Tensor:
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        passages: list[Passage] = []
        output = self.runner.forward(ExampleBatch.from_call((x,), {}), parameters, passages.append)
        output.square().sum().backward()
        norms: list[Tensor] = []
        visit_gradients(passages, lambda part: norms.append(part.norms()))
        return torch.cat(norms)


def alone(model: nn.Module, x: Tensor) -> Tensor:
    found = []
    for row in x:
        model.zero_grad()
        model(row.unsqueeze(0)).square().sum().backward()
        squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
        found.append(torch.stack(squares).sum().sqrt())
    model.zero_grad()
    return torch.stack(found)


def is_right_or_refused(model: nn.Module, inputs: list[Tensor], engine: EngineName) -> bool:
    """Also after a refusal: the run goes on with the next batch."""
    run = Run(model, engine)
    for x in inputs:
        try:
            measured = run.norms(x)
        except ModelError:
            continue
        if not torch.allclose(measured, alone(model, x), rtol=1e-4):
            return False
    return True


# ── several sequences in one row ──────────────────────────────────────────────────────────────────────────────


class Packed(nn.Module):
    """Sequences without their padding, one after another in one row, each attended to by itself.

    Args:
        ends_by: "lengths" cuts the row by the sequences' lengths; "places" sees a new one where positions start again.
    """

    def __init__(self, ends_by: str) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(11, 6), nn.Embedding(8, 6)
        self.mix, self.last = nn.Linear(6, 6), nn.Linear(6, 2)
        self.ends_by = ends_by

    def forward(self, tokens: Tensor) -> Tensor:
        lengths = (tokens != 0).sum(1).tolist()
        row = torch.cat([some[:length] for some, length in zip(tokens, lengths, strict=True)])  # [all tokens]
        places = torch.cat([torch.arange(length) for length in lengths])
        h = self.embed(row) + self.places(places)
        sequence = (places == 0).cumsum(0) - 1
        if self.ends_by == "places":
            allowed = sequence[:, None] == sequence[None, :]
            h = torch.softmax((h @ h.t()).masked_fill(~allowed, -math.inf), 1) @ self.mix(h)
            return torch.stack([self.last(h[sequence == n]).tanh().sum(0) for n in range(len(tokens))])
        mixed = self.mix(h).tanh()
        return torch.stack([self.last(part.mean(0)) for part in mixed.split(lengths)])


def tokens(lengths: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = torch.randint(1, 11, (len(lengths), 8), generator=generator)
    for row, length in zip(rows, lengths, strict=True):
        row[length:] = 0
    return rows


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("ends_by", ["lengths", "places"])
@pytest.mark.parametrize(
    "batches",
    [
        [[8] * 6, [8, 2, 8, 6, 8, 4]],  # the first without padding; 36 rows for 6 examples in the second
        [[8, 8], [5, 7], [3, 3], [1, 7]],  # two examples: an even count passes for one row each
        [[4] * 5, [1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1]],
    ],
)
def test_packed_sequences_are_right_or_refused(batches: list[list[int]], ends_by: str, engine: EngineName) -> None:
    torch.manual_seed(0)
    assert is_right_or_refused(Packed(ends_by).double(), [tokens(lengths) for lengths in batches], engine)


def test_packed_sequences_train_under_auto() -> None:
    torch.manual_seed(0)
    run = Run(Packed("lengths").double())
    for lengths in ([8] * 6, [8, 2, 8, 6, 8, 4], [1, 2, 3, 4, 5, 6]):
        torch.testing.assert_close(run.norms(tokens(lengths)), alone(run.model, tokens(lengths)))


# ── state that is written to ──────────────────────────────────────────────────────────────────────────────────


class Centred(nn.Module):
    """Keeps a running mean of its inputs, written past version counters.

    Args:
        holder: "parameter" or "buffer".
        first_at: the number of examples from which it does.
    """

    def __init__(self, holder: str, *, first_at: int = 0, through_data: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.first_at, self.through_data = first_at, through_data
        if holder == "parameter":
            self.center = nn.Parameter(torch.zeros(4), requires_grad=False)
        elif holder == "buffer":
            self.register_buffer("center", torch.zeros(4))
        else:
            self.center = self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        if len(x) >= self.first_at:
            with torch.no_grad():
                center = self.center.data if self.through_data else self.center
                center.mul_(0.9).add_(0.1 * x.mean(0))
        return self.layer(x)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("holder", ["parameter", "buffer", "weight"])
def test_writes_through_data_are_refused_and_leave_the_model_as_it_was(holder: str, engine: EngineName) -> None:
    model = Centred(holder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"center|layer.weight|'weight'"):
        Run(model, engine).norms(torch.randn(5, 4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_parameter_written_in_a_branch_that_is_met_later_is_refused_and_named() -> None:
    model = Centred("weight", first_at=9, through_data=False)
    run = Run(model, "tape")
    run.norms(torch.randn(8, 4))
    with pytest.raises(ModelError, match=r"\['center'\].*hold what was written, and have to be loaded again"):
        run.norms(torch.randn(9, 4))


def test_nothing_is_spent_where_a_parameter_was_written_to() -> None:
    dataset = TensorDataset(torch.randn(9, 4), torch.arange(9) % 3)
    private = small_run(Centred("weight", through_data=False), dataset=dataset, batch_size=9, noise_multiplier=1.0)
    x, _ = next(iter(private.loader))
    with pytest.raises(ModelError):
        private.model(x)
    assert private.optimizer.epsilon(1e-5) == 0


class OnAView(nn.Module):
    """Uses a slice of a parameter that was taken when the model was built."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.last = nn.Linear(3, 2)
        self.part = self.weight[:3]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(x, self.part))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stored_view_of_a_parameter_is_refused_rather_than_left_untrained(engine: EngineName) -> None:
    with pytest.raises(ModelError, match=r"weight"):
        Run(OnAView(), engine).norms(torch.randn(5, 4))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("place", ["registered", "none", "there"])
def test_a_buffer_that_is_made_later_is_refused_by_name_and_taken_out_again(place: str, engine: EngineName) -> None:
    """With no new shape that would be looked at: after some calls."""

    class MadeLater(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.begun = nn.Linear(4, 2), False
            if place != "registered":
                self.register_buffer("kept", None if place == "none" else torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            if self.begun and place == "registered":
                self.register_buffer("kept", x.detach().mean((0, 1)).clone())
            elif self.begun:
                self.kept = x.detach().mean((0, 1)).clone()
            return self.layer(x)

    model = MadeLater()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    run = Run(model, engine)
    run.norms(torch.randn(5, 4))
    model.begun = True
    with pytest.raises(ModelError, match="kept"):
        run.norms(torch.randn(5, 4))
    after = dict(model.named_buffers())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_a_buffer_that_the_user_adds_between_steps_stays() -> None:
    model = nn.Linear(4, 2)
    run = Run(model, "tape")
    run.norms(torch.randn(5, 4))
    model.register_buffer("of_the_user", torch.ones(1))
    run.norms(torch.randn(5, 4))
    assert torch.equal(model.of_the_user, torch.ones(1))


# ── kinds of numbers ──────────────────────────────────────────────────────────────────────────────────────────


class Spectral(nn.Module):
    """Multiplies spectra by complex numbers, as Fourier neural operators do."""

    def __init__(self, *, trained: bool, contracts: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        shape = (3, 4) if contracts else (4,)
        self.filter = nn.Parameter(torch.randn(shape, dtype=torch.complex128), requires_grad=trained)
        self.contracts = contracts

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.fft(self.layer(x))
        if self.contracts:
            return torch.einsum("ni,oi->no", spectrum, self.filter).abs()
        return torch.fft.ifft(spectrum * self.filter).real


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("contracts", [True, False])
def test_complex_parameters_are_refused_by_name_or_constants(contracts: bool, engine: EngineName) -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    with pytest.raises(ModelError, match="'filter' of the model is complex"):
        Run(Spectral(trained=True, contracts=contracts).double(), engine).norms(x)
    model = Spectral(trained=False, contracts=contracts).double()
    torch.testing.assert_close(Run(model, engine).norms(x), alone(model, x))


@pytest.mark.parametrize("engine", ["auto", "tape", "loop"])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_lookups_with_sparse_gradients_are_right(kind: Callable[..., nn.Module], engine: EngineName) -> None:
    class Lookup(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.last = kind(9, 4, sparse=sparse), nn.Linear(4, 2)

        def forward(self, words: Tensor) -> Tensor:
            return self.last(self.table(words)).tanh()

    words = torch.randint(9, (6, 3))
    torch.testing.assert_close(Run(Lookup(True), engine).norms(words), alone(Lookup(False), words))


@pytest.mark.parametrize("compiled", [torch.jit.script, lambda m: torch.jit.trace(m, torch.randn(2, 4))])
def test_parts_compiled_by_torch_jit_are_refused_by_name(compiled: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), compiled(nn.Linear(4, 3)))
    with pytest.raises(ModelError, match=r"module '1' is compiled by torch\.jit"):
        dpdl.per_sample_norms(model, lambda o, _: o.sum(), torch.randn(5, 4), None)
    with pytest.raises(ModelError, match=r"module '1' is compiled by torch\.jit"):
        dpdl.check(model, torch.randn(5, 4))


class Growing(nn.Module):
    """Lengthens a table of positions when it needs a longer one."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layer, self.way = nn.Linear(1, 2), way
        self.register_buffer("table", torch.zeros(2))
        self.register_buffer("table_of_none", None)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if length > len(self.table):
            longer = torch.arange(length).to(x)
            if self.way == "new":
                self.register_buffer("longer_table", longer)
            elif self.way == "none":
                self.table_of_none = longer
            elif self.way == "replace":
                self.table = longer
            elif self.way == "data":
                self.table.data = longer
            else:
                self.table.resize_(length).copy_(longer)
        return self.layer((x + torch.arange(length).to(x)).unsqueeze(2)).sum(1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", ["new", "none", "replace", "data", "resize"])
@pytest.mark.parametrize("later", [False, True])
def test_a_buffer_that_grows_is_refused_by_name(way: str, later: bool, engine: EngineName) -> None:
    run = Run(Growing(way), engine)
    if later:
        run.norms(torch.randn(5, 2))
    with pytest.raises(ModelError, match="table"):
        run.norms(torch.randn(5, 4))
    assert {name: len(buffer) for name, buffer in run.model.named_buffers()} == {"table": 2}


# ── long sums ─────────────────────────────────────────────────────────────────────────────────────────────────

LONG = 50_257


@pytest.mark.parametrize("inwards", [True, False])
def test_norms_of_equal_numbers_in_long_rows_do_not_fall_short(inwards: bool) -> None:
    """Rounding goes one way where all terms are equal, and adds up: clipping then leaves too much."""
    inner, outer = (LONG, 8) if inwards else (8, LONG)
    layer = nn.Linear(inner, outer, bias=False)
    nn.init.zeros_(layer.weight)
    x = torch.full((2, 2, inner), 0.1)
    norms = dpdl.per_sample_norms(layer, lambda o, _: (0.1 * o).sum(), x, None, engine="tape", loss_reduction="sum")
    true = 2 * float(x[0, 0, 0]) * 0.1 * math.sqrt(inner * outer)  # two positions, each 0.01 everywhere
    weights = flat_weights(norms, max_grad_norm=1.0)
    assert float(weights.double().max()) * true <= 1 + 1e-7


def test_norms_of_many_equal_rows_in_a_bag_do_not_fall_short() -> None:
    bag = nn.EmbeddingBag(20_000, 4, mode="sum")
    words = torch.arange(20_000).expand(2, -1).contiguous()
    norms = dpdl.per_sample_norms(bag, lambda o, _: (0.1 * o).sum(), words, None, engine="tape", loss_reduction="sum")
    true = float(torch.tensor(0.1)) * math.sqrt(20_000 * 4)
    assert float(flat_weights(norms, max_grad_norm=1.0).double().max()) * true <= 1 + 1e-7


@pytest.mark.parametrize("engine", ["auto", "tape", "vmap", "loop"])
def test_a_forward_that_depends_on_the_size_of_the_batch_is_refused_in_words(engine: EngineName) -> None:
    class Divided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) / x.shape[0]

    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    with pytest.raises(ModelError, match="disagrees" if engine == "tape" else "how many examples"):
        dpdl.per_sample_gradients(Divided(), F.cross_entropy, x, y, engine=engine)


def test_a_loss_that_goes_backward_by_itself_too_counts_both() -> None:
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.tensor([0, 1, 0, 1])

    def loss(outputs: Tensor, classes: Tensor) -> Tensor:
        value = F.cross_entropy(outputs, classes)
        value.backward(retain_graph=True)
        return value

    once = dpdl.per_sample_gradients(model, F.cross_entropy, x, y)
    twice = dpdl.per_sample_gradients(model, loss, x, y)
    for name, gradient in once.items():
        torch.testing.assert_close(twice[name], 2 * gradient)
