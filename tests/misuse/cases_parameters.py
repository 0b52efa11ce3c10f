"""Parameters that the optimizer has and the model has not, or the other way round; frozen, shared, replaced ones."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpdl
from dpdl.errors import LossError, ModelError, StepError, WrapError
from tests.misuse.case import Trial, misuse
from tests.oracles.one_at_a_time import clipped_sum_of, norms_of, per_sample_gradients
from tests.small_run import CLASSES, FEATURES, N, examples, network, released, sgd, small_run, step_once, weights_of

X, Y = examples()
WHOSE = "Whose parameters"
KINDS = "Kinds of parameters"


def assert_exact(model: nn.Module, x: Tensor = X, y: Tensor = Y, loss: Callable[..., Tensor] = F.cross_entropy) -> None:
    """What a step releases without noise is the clipped sum that one-at-a-time autograd gives."""
    rows = per_sample_gradients(model, loss, x, y)
    clip = float(norms_of(rows).median())
    private = small_run(model, dataset=TensorDataset(x, y), batch_size=len(x), max_grad_norm=clip)
    xs, ys = next(iter(private.loader))
    loss(private.model(xs), ys).backward()
    private.optimizer.step()
    order = (xs.reshape(len(xs), 1, -1) == x.reshape(1, len(x), -1)).all(2)  # every example is in the batch, once
    assert order.sum() == len(x)
    got = released(private)
    for name, expected in clipped_sum_of(rows, clip).items():
        torch.testing.assert_close(got[name].double(), expected, rtol=1e-7, atol=1e-9)


@misuse(
    WHOSE,
    tried="an optimizer of a parent module, with parameters that the private model lacks",
    peer="deepee (D5): un-noised gradients are applied; Opacus: parameters outside are stepped, no error",
    refused=WrapError,
)
def optimizer_of_a_parent_module(trial: Trial) -> None:
    body = network()
    parent = nn.ModuleDict({"body": body, "head": nn.Linear(2, 2).double()})
    optimizer = sgd(parent.parameters())
    loader = DataLoader(TensorDataset(X, Y), N)
    plan = dpdl.PrivacyPlan.for_loader(loader, steps=1, noise_multiplier=1.0, max_grad_norm=1.0)
    with trial.refused(parent, optimizer):
        dpdl.make_private(body, optimizer, loader, plan)


@misuse(WHOSE, tried="add_param_group on the private optimizer", refused=WrapError)
def groups_added_later(trial: Trial) -> None:
    private = small_run()
    with trial.refused(private):
        private.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(7))]})


@misuse(WHOSE, tried="a foreign parameter appended to a group of the private optimizer", refused=StepError)
def a_parameter_smuggled_into_a_group(trial: Trial) -> None:
    private = small_run()
    private.optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(7, dtype=torch.float64)))
    x, y = next(iter(private.loader))
    F.cross_entropy(private.model(x), y).backward()
    with trial.refused(private):
        private.optimizer.step()


@misuse(WHOSE, tried="a head replaced after make_private", refused=StepError)
def a_head_replaced_after_wrapping(trial: Trial) -> None:
    private = small_run()
    private.model.module[2] = nn.Linear(4, CLASSES, dtype=torch.float64)  # type: ignore[index,operator]
    x, y = next(iter(private.loader))
    F.cross_entropy(private.model(x), y).backward()
    with trial.refused(private):
        private.optimizer.step()


@misuse(
    WHOSE,
    tried="parameters replaced between building the optimizer and make_private (as adapters and loaders do)",
    peer="Opacus #820: trains nothing for 45 GPU hours, epsilon counted",
    refused=WrapError,
)
def parameters_replaced_before_wrapping(trial: Trial) -> None:
    model = network()
    optimizer = sgd(model.parameters())
    for child in (model[0], model[2]):
        child.weight, child.bias = nn.Parameter(child.weight.clone()), nn.Parameter(child.bias.clone())
    loader = DataLoader(TensorDataset(X, Y), N)
    plan = dpdl.PrivacyPlan.for_loader(loader, steps=1, noise_multiplier=1.0, max_grad_norm=1.0)
    with trial.refused(model, optimizer):
        dpdl.make_private(model, optimizer, loader, plan)


@misuse(WHOSE, tried="load_state_dict(..., assign=True) after make_private replaces all parameters", refused=ModelError)
def parameters_assigned_after_wrapping(trial: Trial) -> None:
    private = small_run()
    private.model.load_state_dict(network().state_dict(), assign=True)
    x, _ = next(iter(private.loader))
    with trial.refused(private):
        private.model(x)


@misuse(WHOSE, tried="two private runs that share parameters", refused=WrapError)
def two_runs_in_one_model(trial: Trial) -> None:
    private = small_run()
    with trial.refused(private):
        small_run(nn.Sequential(private.model.module))


@misuse(
    WHOSE,
    tried="a learnable temperature in the loss, outside of the private model",
    refused=LossError,
)
def a_parameter_in_the_loss(trial: Trial) -> None:
    private = small_run()
    temperature = nn.Parameter(torch.ones((), dtype=torch.float64))
    x, y = next(iter(private.loader))
    loss = F.cross_entropy(private.model(x) * temperature, y)
    with trial.refused(private):
        loss.backward()
    assert temperature.grad is None or not temperature.grad.any()


@misuse(WHOSE, tried="a trainable encoder in front of the private model", refused=ModelError)
def a_trainable_module_in_front(trial: Trial) -> None:
    private = small_run()
    encoder = nn.Linear(FEATURES, FEATURES).double()
    x, _ = next(iter(private.loader))
    with trial.refused(private):
        private.model(encoder(x))


@misuse(WHOSE, tried="all parameters frozen when wrapping", refused=ModelError)
def everything_frozen(trial: Trial) -> None:
    model = network().requires_grad_(False)
    with trial.refused(model):
        small_run(model)


@misuse(WHOSE, tried="all parameters frozen after wrapping", refused=ModelError)
def everything_frozen_later(trial: Trial) -> None:
    private = small_run()
    private.model.requires_grad_(False)
    x, _ = next(iter(private.loader))
    with trial.refused(private):
        private.model(x)


@misuse(
    WHOSE,
    tried="unfreezing a layer after wrapping",
    peer="Opacus: fails at the next backward; deepee: needs update_clones()",
    harmless="from the next step on the layer is clipped and noised with the others",
)
def unfreezing_later(trial: Trial) -> None:
    model = network()
    model[0].requires_grad_(False)
    private = small_run(model, noise_multiplier=1.0)
    step_once(private)
    assert set(released(private)) == {"2.weight", "2.bias"}
    model[0].requires_grad_(True)
    step_once(private)
    assert set(released(private)) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert released(private)["0.weight"].std() > 0.3  # noise of standard deviation 1


@misuse(WHOSE, tried="freezing parameters between two forwards over one batch", refused=StepError)
def freezing_between_two_forwards(trial: Trial) -> None:
    private = small_run()
    x, y = next(iter(private.loader))
    F.cross_entropy(private.model(x), y).backward()
    private.model.module[0].requires_grad_(False)  # type: ignore[index,operator]
    second = F.cross_entropy(private.model(x), y)
    with trial.refused(private):
        second.backward()


# ── kinds of parameters ─────────────────────────────────────────────────────────────────────────────


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class ClassToken(nn.Module):
    """A raw parameter beside children: fastDP drops it from training."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.read, self.head = nn.Linear(FEATURES, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.cat([self.token.expand(len(x), -1, -1), self.read(x).unsqueeze(1)], 1)
        return self.head(torch.tanh(rows).sum(1))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(FEATURES, CLASSES), nn.Linear(20, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@misuse(
    KINDS,
    tried="tied weights",
    peer="Opacus ghost: NotImplementedError",
    harmless="exact, cross terms included",
)
def tied_weights(trial: Trial) -> None:
    assert_exact(Tied().double())


@misuse(
    KINDS,
    tried="a raw nn.Parameter on a module with children (class token)",
    peer="fastDP #40: dropped from training, with a print",
    harmless="exact",
)
def a_raw_parameter(trial: Trial) -> None:
    assert_exact(ClassToken().double())


@misuse(
    KINDS,
    tried="a parameter that the forward never uses",
    peer="Opacus: ValueError that names no parameter; deepee: RuntimeError",
    harmless="it gets its noise like all others, so the release does not tell who was used",
)
def an_unused_parameter(trial: Trial) -> None:
    private = small_run(Unused().double(), noise_multiplier=1.0)
    step_once(private)
    noise = released(private)["unused.weight"]
    assert 0.8 < noise.std() < 1.2


@misuse(KINDS, tried="lazy modules that have no shape yet", refused=ModelError)
def lazy_parameters(trial: Trial) -> None:
    model = nn.Sequential(nn.LazyLinear(CLASSES))
    loader = DataLoader(TensorDataset(X, Y), N)
    plan = dpdl.PrivacyPlan.for_loader(loader, steps=1, noise_multiplier=1.0, max_grad_norm=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with trial.refused():
        dpdl.make_private(model, optimizer, loader, plan)


@misuse(KINDS, tried="complex parameters", refused=ModelError)
def complex_parameters(trial: Trial) -> None:
    model = nn.Linear(FEATURES, CLASSES, dtype=torch.complex128)
    with trial.refused(model):
        small_run(model)


@misuse(KINDS, tried="embeddings with sparse gradients", refused=ModelError)
def sparse_embeddings(trial: Trial) -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten(), nn.Linear(4 * FEATURES, CLASSES))
    with trial.refused(model):
        small_run(model)


@misuse(KINDS, tried="a dynamically quantised model, whose weights are no parameters", refused=WrapError)
def quantised_parameters(trial: Trial) -> None:
    model = network(torch.float32)
    optimizer = sgd(model.parameters())
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    loader = DataLoader(TensorDataset(X, Y), N)
    plan = dpdl.PrivacyPlan.for_loader(loader, steps=1, noise_multiplier=1.0, max_grad_norm=1.0)
    with trial.refused(model, optimizer):
        dpdl.make_private(quantised, optimizer, loader, plan)


@misuse(KINDS, tried="a model spread over two devices", refused=ModelError)
def several_devices(trial: Trial) -> None:
    model = network()
    model[2].to("meta")
    with trial.refused(model[0]):
        small_run(model)


@misuse(KINDS, tried="a model on the meta device, without data", refused=ModelError)
def a_model_without_data(trial: Trial) -> None:
    with trial.refused():
        private = small_run(network().to("meta"))
        private.model(next(iter(private.loader))[0])


@misuse(
    KINDS,
    tried="a bfloat16 model, 300 equal gradients in parts of one",
    peer="Opacus: sums and noise in bfloat16",
    harmless="added up in float32: the average is exact",
)
def sums_in_bfloat16(trial: Trial) -> None:
    size = 300
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    private = small_run(
        model,
        dataset=TensorDataset(torch.ones(size, 1, dtype=torch.bfloat16)),
        batch_size=size,
        max_physical_batch_size=1,
        accumulate_dtype=torch.float32,
    )
    for (x,) in itertools.islice(private.loader, size):
        private.model(x).mean().backward()
        private.optimizer.step()
    assert private.optimizer.steps_taken == 1
    assert float(next(iter(private.model.parameters())).grad) == 1.0  # type: ignore[arg-type]


@misuse(
    KINDS,
    tried="noise for a bfloat16 model",
    peer="Opacus: drawn and added in bfloat16",
    harmless="drawn in float32 or wider; the released average differs from a float32 run's by rounding alone",
)
def noise_in_bfloat16(trial: Trial) -> None:
    narrow, wide = (
        small_run(
            nn.Linear(50, 50).to(dtype),
            dataset=TensorDataset(torch.zeros(N, 50, dtype=dtype)),
            noise_multiplier=1.0,
            accumulate_dtype=torch.float32,
        )
        for dtype in (torch.bfloat16, torch.float32)
    )
    for private in (narrow, wide):
        (x,) = next(iter(private.loader))
        (private.model(x) * 0).mean().backward()
        private.optimizer.step()
    for name, gradient in released(wide).items():
        torch.testing.assert_close(released(narrow)[name].float(), gradient, rtol=1 / 128, atol=1e-30)
    assert 0.95 < float(released(wide)["weight"].std()) < 1.05


@misuse(
    KINDS,
    tried="model.double() after wrapping",
    peer="deepee (D10): breaks the sharing of weights, B copies",
    harmless="weights keep their names; there is one copy, which is what is trained",
)
def changing_the_dtype_after_wrapping(trial: Trial) -> None:
    private = small_run(network(torch.float32), dataset=TensorDataset(*examples()))
    names = list(private.model.state_dict())
    private.model.double()
    before = weights_of(private.model)
    step_once(private)
    assert list(private.model.state_dict()) == names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert all(not torch.equal(before[name], now) for name, now in private.model.state_dict().items())
