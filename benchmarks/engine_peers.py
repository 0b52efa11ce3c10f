"""The peers: Opacus in each of its modes, and `torch.func` written by hand.

Opacus is optional here; without it, its steps fail with ImportError, which is recorded. It is given what it
asks for: recurrent layers are exchanged by its own `ModuleValidator.fix`. It is handed its batch directly, so
that its loader costs nothing; dpdl's private loader is measured with the step.

References:
    [1] Yousefpour et al., Opacus: User-Friendly Differential Privacy Library in PyTorch, 2021. arXiv:2109.12298
    [2] https://pytorch.org/functorch/stable/notebooks/per_sample_grads.html
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.engine_models import Case, token_loss
from benchmarks.engine_steps import LEARNING_RATE, MAX_GRAD_NORM, NOISE_MULTIPLIER, Step

__all__ = ["CHUNKS", "OPACUS_MODES", "by_hand", "opacus_step"]

OPACUS_MODES = ("hooks", "functorch", "ew", "ghost")
CHUNKS = (4, 16, 64, 512)  # tried for by_hand; the fastest is reported


def opacus_step(case: Case, size: int, *, mode: str) -> Step:
    """A private step as Opacus's `PrivacyEngine` takes it."""
    from opacus import PrivacyEngine  # type: ignore[import-not-found, unused-ignore]  # optional peer
    from opacus.validators import ModuleValidator  # type: ignore[import-not-found, unused-ignore]

    for noise in ("Secure RNG", "Full backward hook", "Optimal order"):  # said at every step
        warnings.filterwarnings("ignore", message=noise)
    inputs, targets = case.batch(size)
    module: nn.Module = case.build()
    if not ModuleValidator.is_valid(module):
        module = ModuleValidator.fix(module)
    private, optimizer, *criterion, _ = PrivacyEngine().make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=LEARNING_RATE),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(TensorDataset(inputs, targets), batch_size=size),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=MAX_GRAD_NORM,
        poisson_sampling=False,  # the same fixed batch for everyone
        grad_sample_mode=mode,
    )

    def run() -> None:
        optimizer.zero_grad()
        outputs = private(inputs)
        if not criterion:
            case.loss(outputs, targets).backward()
        elif case.loss is token_loss:
            criterion[0](outputs.flatten(0, 1), targets.flatten(), shape=outputs.shape).backward()
        else:
            criterion[0](outputs, targets).backward()
        optimizer.step()

    return Step(run=run, module=module, batch=(inputs, targets))


def by_hand(case: Case, size: int, *, chunk: int) -> Step:
    """`vmap(grad(...))` over chunks, clipped and summed chunk by chunk, as one writes it from the tutorial [2]."""
    module, (inputs, targets) = case.build(), case.batch(size)
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss_of_one(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return case.loss(functional_call(module, values, (x[None],)), y[None])

    gradients_of_chunk = vmap(grad(loss_of_one), in_dims=(None, 0, 0), randomness="different")

    def run() -> None:
        optimizer.zero_grad()
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for x, y in zip(inputs.split(chunk), targets.split(chunk), strict=True):
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batching rule
                gradients = gradients_of_chunk(parameters, x, y)
            squares = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0)
            weights = (MAX_GRAD_NORM / squares.sqrt()).clamp(max=1.0)
            for name, g in gradients.items():
                total[name] += torch.tensordot(weights, g, dims=1)
        for name, p in module.named_parameters():
            noise = NOISE_MULTIPLIER * MAX_GRAD_NORM * torch.randn(p.shape)
            p.grad = (total[name] + noise) / size
        optimizer.step()

    return Step(run=run, module=module, batch=(inputs, targets))
