"""Models of every shape and way of calling release the plain gradient, or are refused in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dpdl.errors import ModelError
from tests.oracles import one_at_a_time
from tests.small_run import (
    CLASSES,
    FEATURES,
    N,
    examples,
    network,
    one_step,
    plain_gradient,
    refused,
    small_run,
    train_on,
)

X, Y = examples()
each_engine = pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(
        self, batch: dict[str, Any], *, temperature: Tensor, flags: tuple[bool, str] = (True, "a")
    ) -> dict[str, Any]:
        logits = self.layer(batch["inputs"]["x"]) / temperature
        return {"heads": [logits, logits.sigmoid()], "name": flags[1]}


class Echo(nn.Module):
    """Returns its input beside the output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), x


class Logits(NamedTuple):
    logits: Tensor
    loss: Tensor | None


class WithLoss(nn.Module):
    """As in transformers: given labels, it returns its own loss, a mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Logits:
        logits = self.layer(x)
        return Logits(logits, None if labels is None else F.cross_entropy(logits, labels))


class Shared(nn.Module):
    """One weight in two modules, and a parameter without an axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES)
        self.second = nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.last = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).tanh())) * self.gain


WAYS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "nested dict, keywords, a tensor without an axis": (
        Nested,
        lambda m: F.cross_entropy(m({"inputs": {"x": X}}, temperature=torch.tensor(2.0, dtype=X.dtype))["heads"][0], Y),
    ),
    "the input comes back": (Echo, lambda m: F.cross_entropy(m(X)[0], Y) + m(X)[1].sum() * 0),
    "its own loss": (WithLoss, lambda m: m(X, labels=Y).loss),
    "its logits": (WithLoss, lambda m: F.cross_entropy(m(X).logits, Y)),
    "shared and scalar parameters": (Shared, lambda m: F.cross_entropy(m(X), Y)),
    "two losses on one output": (network, lambda m: two_losses(m(X))),
}
COMPILED: dict[str, Callable[[], nn.Module]] = {
    "a wrapper": lambda: torch.compile(network(), backend="eager"),
    "in place": lambda: compiled_in_place(network()),
    "a part": lambda: nn.Sequential(torch.compile(network(), backend="eager")),
}


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def two_losses(output: Tensor) -> Tensor:
    return F.cross_entropy(output, Y) + 0.1 * output.square().sum(1).mean()


@each_engine
@pytest.mark.parametrize("way", [way for way in WAYS if way != "the input comes back"])
def test_gradients_are_those_of_the_plain_model_however_it_is_called(way: str, engine: str) -> None:
    build, loss = WAYS[way]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(61)
        model = build().double()
    expected = plain_gradient(model, loss)
    error, name = one_at_a_time.worst_error(one_step(model, loss, engine=engine), expected)
    assert error < 1e-9, name


@each_engine
@pytest.mark.parametrize("way", COMPILED)
def test_a_compiled_model_is_refused_with_the_remedy(way: str, engine: str) -> None:
    with pytest.raises(ModelError, match=r"compiled by torch.compile.*_orig_mod"):
        small_run(COMPILED[way]().double(), engine=engine)


@each_engine
def test_a_model_that_returns_its_input_leaves_the_users_tensor_alone(engine: str) -> None:
    private = small_run(Echo().double(), engine=engine)
    x, y = next(iter(private.loader))
    output, echoed = private.model(x)
    assert not x.requires_grad
    torch.testing.assert_close(echoed.detach(), x)
    F.cross_entropy(output, y).backward()
    private.optimizer.step()


@dataclass
class Output:
    logits: Tensor


class OwnOutputClass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Output:
        return Output(self.layer(x))


@each_engine
def test_an_output_that_cannot_be_taken_apart_is_refused_by_its_name(engine: str) -> None:
    private = small_run(OwnOutputClass().double(), engine=engine)
    x, _ = next(iter(private.loader))
    with refused(private, ModelError, "Output", "tuple", "dict"):
        private.model(x)


@each_engine
def test_an_input_that_requires_a_gradient_is_refused(engine: str) -> None:
    private = small_run(engine=engine)
    x, _ = next(iter(private.loader))
    encoder = nn.Linear(FEATURES, FEATURES, dtype=torch.float64)
    with refused(private, ModelError, "requires a gradient", "detach()"):
        private.model(encoder(x))


class Random(nn.Module):
    """A variational layer: it draws in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean(x)
        return mean + 0.1 * torch.randn_like(mean)


@each_engine
def test_a_model_that_always_draws_random_numbers_trains(engine: str) -> None:
    private = small_run(Random().double(), engine=engine)
    train_on(private, next(iter(private.loader)))
    assert private.optimizer.steps_taken == 1


UNTAKEN: dict[str, Callable[[], nn.Module]] = {
    "DataParallel": lambda: nn.DataParallel(network()),
    "ScriptModule": lambda: torch.jit.script(network()),
    "LazyLinear": lambda: nn.LazyLinear(CLASSES, dtype=torch.float64),
    "sparse": lambda: nn.Sequential(nn.Embedding(9, CLASSES, sparse=True), nn.Flatten(1)).double(),
    "complex": lambda: Complex(),
}


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(FEATURES, CLASSES, dtype=torch.cdouble))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.cdouble) @ self.weight).abs()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Lazy modules")
@pytest.mark.parametrize("kind", UNTAKEN)
def test_modules_that_no_engine_takes_are_refused_by_name_before_anything_is_spent(kind: str) -> None:
    dataset = TensorDataset(torch.arange(N).remainder(9), Y) if kind == "sparse" else None
    spent = []

    def wrap_and_train() -> None:
        private = small_run(UNTAKEN[kind](), dataset=dataset, noise_multiplier=1.0)
        try:
            train_on(private, next(iter(private.loader)))
        finally:
            spent.append(private.optimizer.steps_taken)

    with pytest.raises(ModelError) as caught:
        wrap_and_train()
    assert not any(spent)
    assert kind.removeprefix("Lazy").lower() in str(caught.value).lower()


# ── precision ───────────────────────────────────────────────────────────────────────────────────────


class Many(Dataset[Any]):
    """Equal examples whose gradients vanish beside their sum in half precision."""

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((1,), 1.0), torch.tensor(0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("engine", "physical"), [("auto", None), ("vmap", 512), ("loop", 512)])
def test_sums_of_half_precision_gradients_are_taken_in_float32(
    dtype: torch.dtype, engine: str, physical: int | None
) -> None:
    """4,096 ones: adding them up in float16 stops at 2,048, in bfloat16 at 256."""
    model = nn.Linear(1, 1, bias=False).to(dtype)
    loader = DataLoader(Many(), batch_size=4096)
    private = small_run(
        model,
        loader=loader,
        engine=engine,
        max_grad_norm=100.0,
        loss_reduction="sum",
        max_physical_batch_size=physical,
        accumulate_dtype=torch.float32,
        self_check=False,
    )
    for x, _ in private.loader:
        private.model(x.to(dtype)).sum().backward()
        private.optimizer.step()
    assert model.weight.grad is not None
    assert model.weight.grad.dtype == dtype
    assert float(model.weight.grad) * 4096 == pytest.approx(4096, rel=1e-2)


class CalledSparse(nn.Module):
    """An attribute that only shares its name with that of nn.Embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.sparse = True

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_a_module_with_an_attribute_named_sparse_trains() -> None:
    private = small_run(CalledSparse().double())
    train_on(private, next(iter(private.loader)))
    assert private.optimizer.steps_taken == 1
