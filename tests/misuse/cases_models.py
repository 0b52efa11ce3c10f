"""Models that mix examples or keep state from them, and models that peers compute wrongly."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from dpdl.errors import ExampleMixingError, ModelError
from tests.misuse.case import Trial, misuse
from tests.misuse.cases_parameters import assert_exact
from tests.small_run import CLASSES, FEATURES, N, examples, network, small_run, step_once

X, Y = examples()
MIXING = "Models that mix examples"
FORMS = "Forms of models"
LAYERS = "Models that peers get wrong"


class Then(nn.Module):
    """A layer, a function of its output, a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, 4), nn.Linear(4, CLASSES)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


def with_layer(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 4), layer, nn.Linear(4, CLASSES)).double()


def assert_model_refused(trial: Trial, model: nn.Module, *, saying: str = "") -> None:
    """When it is wrapped, or when the first batch goes forward."""
    with trial.refused(model, saying=saying):
        private = small_run(model)
        x, _ = next(iter(private.loader))
        private.model(x)


@misuse(
    MIXING,
    tried="BatchNorm",
    peer="Opacus: an error that names no layer; fastDP: no check at all",
    refused=ExampleMixingError,
)
def batch_norm(trial: Trial) -> None:
    assert_model_refused(trial, with_layer(nn.BatchNorm1d(4)), saying="'1'")


@misuse(
    MIXING, tried="BatchNorm without affine parameters", peer="Opacus: accepted silently", refused=ExampleMixingError
)
def batch_norm_without_parameters(trial: Trial) -> None:
    assert_model_refused(trial, with_layer(nn.BatchNorm1d(4, affine=False)))


@misuse(
    MIXING,
    tried="BatchNorm without running statistics",
    peer="deepee: accepted, and normalises otherwise in eval mode (D9)",
    refused=ExampleMixingError,
)
def batch_norm_without_statistics(trial: Trial) -> None:
    assert_model_refused(trial, with_layer(nn.BatchNorm1d(4, track_running_stats=False)))


@misuse(
    MIXING,
    tried="BatchNorm with frozen parameters, in training mode",
    peer="Opacus: accepted silently; its running mean is updated with raw data",
    refused=ExampleMixingError,
)
def batch_norm_frozen_in_training_mode(trial: Trial) -> None:
    assert_model_refused(trial, with_layer(nn.BatchNorm1d(4).requires_grad_(False)))


@misuse(MIXING, tried="model.train() on a model whose BatchNorm was frozen by eval()", refused=ExampleMixingError)
def batch_norm_put_back_into_training(trial: Trial) -> None:
    model = with_layer(nn.BatchNorm1d(4))
    model[1].eval()  # type: ignore[index,operator]
    private = small_run(model)
    with trial.refused(private):
        private.model.train()


@misuse(
    MIXING,
    tried="SyncBatchNorm",
    peer="deepee (D8): passes the check, crashes the converter",
    refused=ExampleMixingError,
)
def sync_batch_norm(trial: Trial) -> None:
    assert_model_refused(trial, with_layer(nn.SyncBatchNorm(4)))


@misuse(
    MIXING,
    tried="InstanceNorm with running statistics",
    peer="Opacus: accepted; statistics leak",
    refused=ExampleMixingError,
)
def instance_norm_with_statistics(trial: Trial) -> None:
    layer = nn.Sequential(nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten())
    assert_model_refused(trial, with_layer(layer))


@misuse(MIXING, tried="x - x.mean(0) in forward", peer="Opacus: accepted silently", refused=ExampleMixingError)
def centred_over_the_batch(trial: Trial) -> None:
    assert_model_refused(trial, Then(lambda h: h - h.mean(0)).double())


@misuse(MIXING, tried="attention over the batch's examples", refused=ExampleMixingError)
def attention_over_the_batch(trial: Trial) -> None:
    assert_model_refused(trial, Then(lambda h: torch.softmax(h @ h.T, 1) @ h).double())


@misuse(MIXING, tried="experts with a capacity that the batch shares", refused=ExampleMixingError)
def shared_expert_capacity(trial: Trial) -> None:
    def routed(h: Tensor) -> Tensor:
        place = (h[:, :1] > 0).long().cumsum(0)
        return torch.where(place <= 1, h, torch.zeros_like(h))

    assert_model_refused(trial, Then(routed).double())


@misuse(
    MIXING,
    tried="activations scaled by the number of examples in the batch",
    refused=ModelError,
)
def scaled_by_the_batch_size(trial: Trial) -> None:
    assert_model_refused(trial, Then(lambda h: h * len(h)).double())


@misuse(MIXING, tried="a moving average of activations in a buffer", refused=ExampleMixingError)
def a_buffer_of_statistics(trial: Trial) -> None:
    class Centred(nn.Module):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, h: Tensor) -> Tensor:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
            return h - self.mean

    assert_model_refused(trial, with_layer(Centred()))


@misuse(MIXING, tried="a moving average of activations in a Python attribute", refused=ModelError)
def an_attribute_of_statistics(trial: Trial) -> None:
    class Remembering(nn.Module):
        mean: Tensor | float = 0.0

        def forward(self, h: Tensor) -> Tensor:
            centred = h - self.mean
            self.mean = h.mean(0).detach()
            return centred

    assert_model_refused(trial, with_layer(Remembering()))


@misuse(MIXING, tried="spectral_norm in training mode, which writes to a buffer", refused=ModelError)
def spectral_norm(trial: Trial) -> None:
    assert_model_refused(trial, with_layer(nn.utils.spectral_norm(nn.Linear(4, 4))))


@misuse(MIXING, tried="Embedding(max_norm=...), which rewrites its table by what is looked up", refused=ModelError)
def renormalised_embeddings(trial: Trial) -> None:
    model = nn.Sequential(nn.Embedding(7, 4, max_norm=0.1), nn.Flatten(), nn.Linear(4 * FEATURES, CLASSES))
    tokens = torch.arange(N * FEATURES).reshape(N, FEATURES) % 7
    with trial.refused(model):
        private = small_run(model, dataset=TensorDataset(tokens, Y))
        private.model(next(iter(private.loader))[0])


# ── forms ───────────────────────────────────────────────────────────────────────────────────────────


@misuse(FORMS, tried="a ScriptModule", refused=ModelError)
def a_script_module(trial: Trial) -> None:
    model = torch.jit.trace(network(), X)
    assert_model_refused(trial, model)


@misuse(FORMS, tried="nn.DataParallel", refused=ModelError)
def data_parallel(trial: Trial) -> None:
    assert_model_refused(trial, nn.DataParallel(network()))


@misuse(
    FORMS,
    tried="a model compiled before make_private",
    peer="Opacus + inductor: slower, hits the recompile limit",
    refused=ModelError,
)
def a_compiled_model(trial: Trial) -> None:
    assert_model_refused(trial, torch.compile(network()))  # type: ignore[arg-type]


@misuse(FORMS, tried="private_model.compile()", refused=ModelError)
def compiling_in_place(trial: Trial) -> None:
    private = small_run()
    with trial.refused(private):
        private.model.compile()


@misuse(
    FORMS,
    tried="torch.compile(private_model)",
    refused=ModelError,
    fails="torch._dynamo's InternalTorchDynamoError (RecursionError) comes out of the first call",
)
def compiling_the_private_model(trial: Trial) -> None:
    private = small_run()
    compiled = torch.compile(private.model)
    x, _ = next(iter(private.loader))
    with trial.refused(private):
        compiled(x)


@misuse(FORMS, tried="training in eval mode", peer="Opacus: 'No activations detected'", harmless="exact")
def training_in_eval_mode(trial: Trial) -> None:
    model = with_layer(nn.Dropout(0.5)).eval()
    assert_exact(model)


@misuse(FORMS, tried="gradients of the private model by torch.func", refused=ModelError)
def functional_gradients(trial: Trial) -> None:
    private = small_run()
    x, y = next(iter(private.loader))
    values = {name: p.detach() for name, p in private.model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(private.model, parameters, (x,)), y)

    with trial.refused(private):
        torch.func.grad(loss)(values)


# ── layers ──────────────────────────────────────────────────────────────────────────────────────────


@misuse(
    LAYERS,
    tried="convolutions with circular, reflected or replicated padding",
    peer="Opacus: gradients wrong by 24 to 50 %, silently",
    harmless="exact",
)
def padded_convolutions(trial: Trial) -> None:
    for mode in ("circular", "reflect", "replicate"):
        convolution = nn.Conv1d(1, 2, 3, padding=1, padding_mode=mode)
        model = nn.Sequential(nn.Unflatten(1, (1, FEATURES)), convolution, nn.Flatten(), nn.Linear(6, CLASSES))
        assert_exact(model.double())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.RNN(1, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x.unsqueeze(2))[0][:, -1])


@misuse(LAYERS, tried="plain nn.RNN", peer="Opacus: passes the validator, fails at backward", harmless="exact")
def plain_rnn(trial: Trial) -> None:
    assert_exact(Recurrent().double())


@misuse(
    LAYERS,
    tried="ReLU(inplace=True) and `h += x`",
    peer="Opacus: RuntimeError about views and BackwardHookFunction",
    harmless="exact",
)
def in_place_operations(trial: Trial) -> None:
    def added(h: Tensor) -> Tensor:
        h += 1
        return F.relu(h, inplace=True)

    assert_exact(Then(added).double())
    assert_exact(with_layer(nn.ReLU(inplace=True)))


@misuse(
    LAYERS,
    tried="non-reentrant activation checkpointing",
    peer="Opacus: fails in hooks and ghost mode",
    harmless="exact",
)
def activation_checkpointing(trial: Trial) -> None:
    assert_exact(Then(lambda h: checkpoint(torch.tanh, h, use_reentrant=False)).double())  # type: ignore[arg-type]


@misuse(
    LAYERS,
    tried="dropout in a module of one's own, with a raw parameter",
    peer="Opacus: vmap randomness error",
    harmless="it trains; each example has a mask of its own",
)
def dropout_in_a_custom_module(trial: Trial) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, h: Tensor) -> Tensor:
            return F.dropout(h * self.scale, 0.5, self.training)

    private = small_run(with_layer(Scaled()))
    step_once(private)
    assert private.optimizer.steps_taken == 1
    x, _ = next(iter(private.loader))
    same_rows = torch.ones_like(x).as_subclass(Tensor)
    assert len(private.model(same_rows).detach().unique(dim=0)) > 1


@misuse(
    LAYERS,
    tried="several inputs, keyword arguments and tuples of outputs",
    peer="Opacus: TypeError and index errors (#777); deepee: single tensors only",
    harmless="exact for the sum of the outputs' losses",
)
def several_inputs_and_outputs(trial: Trial) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)

        def forward(self, x: Tensor, *, z: Tensor) -> OrderedDict[str, tuple[Tensor, Tensor]]:
            return OrderedDict(both=(self.a(x), self.b(z)))

    model = Two().double()
    private = small_run(model, max_grad_norm=1e9)
    x, y = next(iter(private.loader))
    first, second = private.model(x, z=2 * x)["both"]
    (F.cross_entropy(first, y) + F.cross_entropy(second, y)).backward()
    private.optimizer.step()
    x, y = x.as_subclass(Tensor), y.as_subclass(Tensor)
    twin = Two().double()
    twin.load_state_dict(network_before(model, private.optimizer.inner))
    first, second = twin(x, z=2 * x)["both"]
    (F.cross_entropy(first, y) + F.cross_entropy(second, y)).backward()
    for (name, p), q in zip(private.model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def network_before(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The weights before the first step of plain SGD with momentum."""
    rate = optimizer.param_groups[0]["lr"]
    return {name: p.detach() + rate * p.grad for name, p in model.named_parameters() if p.grad is not None}


@misuse(
    LAYERS,
    tried="a module with a constant buffer and trainable parameters",
    peer="Opacus: NotImplementedError",
    harmless="exact",
)
def a_constant_buffer(trial: Trial) -> None:
    class Masked(nn.Module):
        mask: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 2.0]))

        def forward(self, h: Tensor) -> Tensor:
            return self.inner(h * self.mask)

    assert_exact(with_layer(Masked()))
