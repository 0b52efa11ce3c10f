"""deepee's defects D1 to D12, and Opacus's, tried on the facades that bear their names."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dpdl.compat.deepee import ModelSnooper, PrivacyWatchdog, PrivacyWrapper, UniformDataLoader
from dpdl.compat.deepee.snooper import BadModuleError
from dpdl.compat.opacus import PrivacyEngine
from dpdl.errors import ParameterError, PrivacyError, StepError
from dpdl.validation import fix
from tests.misuse.case import Trial, misuse
from tests.small_run import N, examples, network

DEEPEE = "deepee's defects, on its facade"
OPACUS = "Opacus's defects, on its facade"
X, Y = examples()


def wrapped(**settings: object) -> PrivacyWrapper:
    return PrivacyWrapper(network(), **{"num_replicas": N, "L2_clip": 1.0, "noise_multiplier": 0.0, **settings})  # type: ignore[arg-type]


def deepee_step(model: PrivacyWrapper, x: torch.Tensor = X, *, reduce: str = "mean") -> list[torch.Tensor]:
    """The gradients that a step leaves for the optimizer."""
    F.cross_entropy(model(x), Y[: len(x)]).backward()
    model.clip_and_accumulate(reduce=reduce)  # type: ignore[arg-type]
    model.noise_gradient()
    found = [p.grad.clone() for p in model.wrapped_model.parameters() if p.grad is not None]
    model.prepare_next_batch()
    return found


@misuse(
    DEEPEE,
    tried="D1: steps without zeroing the replicas' gradients",
    peer="step t uses all earlier steps' gradients",
    harmless="each step has its own",
)
def deepee_gradients_of_earlier_steps(trial: Trial) -> None:
    model = wrapped()
    first, _, third = deepee_step(model), deepee_step(model, 10 * X), deepee_step(model)
    for a, b in zip(first, third, strict=True):
        torch.testing.assert_close(a, b)


@misuse(
    DEEPEE,
    tried="D2: reduce='sum'",
    peer="noise of standard deviation C sigma / B on a sum that moves by C",
    harmless="noise of standard deviation C sigma",
)
def deepee_noise_of_a_sum(trial: Trial) -> None:
    model = PrivacyWrapper(nn.Linear(60, 60).double(), 4, 0.5, 2.0)
    (model(torch.zeros(4, 60).double()) * 0).mean().backward()
    model.clip_and_accumulate(reduce="sum")
    model.noise_gradient()
    weight = model.wrapped_model.weight
    assert isinstance(weight, nn.Parameter)
    assert weight.grad is not None
    assert 0.95 < float(weight.grad.std()) < 1.05


@misuse(
    DEEPEE,
    tried="D5: optimizer.step() between backward() and noise_gradient()",
    peer="un-noised gradients are applied",
    refused=StepError,
)
def deepee_step_without_noise(trial: Trial) -> None:
    model = wrapped()
    optimizer = torch.optim.SGD(model.wrapped_model.parameters(), lr=0.1)
    F.cross_entropy(model(X), Y).backward()
    with trial.refused(model.wrapped_model, optimizer):
        optimizer.step()


@misuse(DEEPEE, tried="its three calls in another order", peer="guarded by flags", refused=StepError)
def deepee_calls_out_of_order(trial: Trial) -> None:
    model = wrapped()
    for call in (model.noise_gradient, model.prepare_next_batch, model.clip_and_accumulate):
        with trial.refused(model.wrapped_model):
            call()


@misuse(
    DEEPEE, tried="D8: BatchNorm, and SyncBatchNorm", peer="SyncBatchNorm passes the snooper", refused=BadModuleError
)
def deepee_batch_norm(trial: Trial) -> None:
    for layer in (nn.BatchNorm1d(4), nn.SyncBatchNorm(4)):
        model = nn.Sequential(nn.Linear(3, 4), layer)
        with trial.refused(model):
            ModelSnooper().snoop(model)


@misuse(
    DEEPEE,
    tried="D8, D9: converting BatchNorm of 48 channels",
    peer="fails on 48 channels; weights, dtype and affine are dropped",
    harmless="GroupNorm in a number of groups that divides them, with the scale and shift that were learned",
)
def deepee_conversion_of_48_channels(trial: Trial) -> None:
    model = nn.Sequential(nn.Conv2d(1, 48, 3), nn.BatchNorm2d(48)).double()
    assert isinstance(model[1], nn.BatchNorm2d)
    nn.init.constant_(model[1].weight, 3.0)
    repaired = fix(model)
    assert isinstance(repaired, nn.Sequential)
    norm = repaired[1]
    assert isinstance(norm, nn.GroupNorm)
    assert norm.weight.dtype == torch.float64
    assert bool((norm.weight == 3.0).all())


@misuse(
    DEEPEE,
    tried="D10: .to(dtype) and state_dict() after wrapping",
    peer="the sharing breaks; B + 1 copies are saved",
    harmless="one copy of each weight",
)
def deepee_copies(trial: Trial) -> None:
    model = wrapped().to(torch.float32)
    deepee_step(model, X.float())
    assert sum(v.numel() for v in model.state_dict().values()) == sum(p.numel() for p in network().parameters())


@misuse(DEEPEE, tried="D11: a watchdog of epsilon 0 or delta 0", peer="accepted", refused=ParameterError)
def deepee_senseless_watchdogs(trial: Trial) -> None:
    loader = UniformDataLoader(TensorDataset(X, Y), batch_size=4)
    for epsilon, delta in ((0.0, 1e-5), (1.0, 0.0), (-1.0, 1e-5), (1.0, 1.0)):
        with trial.refused():
            PrivacyWatchdog(loader, target_epsilon=epsilon, target_delta=delta)


@misuse(
    DEEPEE,
    tried="D7: training on after the budget is spent (abort=True)",
    peer="raises after the step",
    refused=PrivacyError,
)
def deepee_overspending(trial: Trial) -> None:
    loader = UniformDataLoader(TensorDataset(X, Y), batch_size=N)
    watchdog = PrivacyWatchdog(loader, target_epsilon=1.0, target_delta=1e-5, abort=True)
    model = wrapped(noise_multiplier=1.0, watchdog=watchdog)
    with trial.refused(model.wrapped_model, model.ledger):
        deepee_step(model)


# ── Opacus ──────────────────────────────────────────────────────────────────────────────────────────


def opacus_run(engine: PrivacyEngine, **settings: object) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader]:  # type: ignore[type-arg]
    model = network()
    arguments = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **settings}
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(X, Y), batch_size=4),
        **arguments,  # type: ignore[arg-type]
    )
    return made[0], made[1], made[2]


def opacus_step(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader) -> None:  # type: ignore[type-arg]
    x, y = next(iter(loader))
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


@misuse(
    OPACUS,
    tried="step() of the plain optimizer",
    peer="un-noised, unclipped, no error",
    refused=PrivacyError,
)
def opacus_raw_step(trial: Trial) -> None:
    model, optimizer, loader = opacus_run(PrivacyEngine())
    x, y = next(iter(loader))
    F.cross_entropy(model(x), y).backward()
    with trial.refused(model):
        optimizer.original_optimizer.step()  # type: ignore[attr-defined]


@misuse(
    OPACUS,
    tried="a batch of one's own of 200, at rate 1/3",
    peer="accepted, accounted at that rate",
    refused=PrivacyError,
)
def opacus_foreign_batch(trial: Trial) -> None:
    model, optimizer, loader = opacus_run(PrivacyEngine())
    next(iter(loader))
    with trial.refused(model):
        F.cross_entropy(model(examples(200)[0]), examples(200)[1]).backward()
        optimizer.step()


@misuse(
    OPACUS,
    tried="poisson_sampling=False",
    peer="epsilon 2.99 is reported as for Poisson sampling, no warning",
    harmless="epsilon is that of no amplification at least",
)
def opacus_shuffled(trial: Trial) -> None:
    spent = []
    for poisson in (True, False):
        engine = PrivacyEngine()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = opacus_run(engine, poisson_sampling=poisson)
            opacus_step(*run)
            spent.append(engine.get_epsilon(1e-5))
    assert spent[1] > spent[0]


@misuse(
    OPACUS,
    tried="an epsilon before the first step",
    peer="prv: 'cannot convert float NaN to integer'",
    harmless="0",
)
def opacus_epsilon_before_the_first_step(trial: Trial) -> None:
    for accountant in ("prv", "rdp", "gdp"):
        engine = PrivacyEngine(accountant=accountant)
        opacus_run(engine)
        assert engine.get_epsilon(1e-5) == 0


@misuse(
    OPACUS,
    tried="loading a checkpoint into a run of less noise",
    peer="continues under the other sigma, silently",
    refused=PrivacyError,
)
def opacus_resuming_with_less_noise(trial: Trial) -> None:
    engine = PrivacyEngine()
    model, optimizer, loader = opacus_run(engine)
    opacus_step(model, optimizer, loader)
    path = trial.folder / "run.pt"
    engine.save_checkpoint(path=path, module=model, optimizer=optimizer)
    other = PrivacyEngine()
    weak, weak_optimizer, _ = opacus_run(other, noise_multiplier=0.3)
    with trial.refused(weak, path):
        other.load_checkpoint(path=path, module=weak, optimizer=weak_optimizer)
