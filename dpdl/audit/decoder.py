"""A decoder that learns to give inputs back from what was sent: how much of them an observer recovers.

    result = decoder_attack((x_public, z_public), (x_private, z_sent))
    print(result)          # recovered variance 0.81 ...

The attacker has examples of its own and knows the client's part, as a server does that hands weights on, a client that
got them, or anybody where the part is public [1]: it computes activations of its examples, protected as the client's
are (noise it draws itself), and learns the way back. Of the private examples it has what was sent, and nothing else.

Private: the held-out examples, which only the measurement sees.

References:
    [1] He, Zhang, Lee, Model Inversion Attacks Against Collaborative Inference, ACSAC 2019 (decoders from activations;
        black-box and white-box attackers).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpdl.audit.verdict import A_FAILURE_PROVES_NOTHING
from dpdl.errors import ParameterError
from dpdl.per_sample.randomness import isolated_randomness

__all__ = ["DecoderResult", "Progress", "decoder_attack", "recovered_variance"]

Progress = Callable[[int, int, float], None]
"""Told (epochs done, epochs, recovered variance of the attacker's own examples that are set aside)."""

VALIDATION_SHARE = 0.1  # of the public pairs: chooses the epoch, so that no figure is chosen by the private ones
HIDDEN = 512


def no_progress(done: int, epochs: int, recovered: float) -> None:
    """Tell nobody."""


@dataclass(frozen=True, kw_only=True)
class DecoderResult:
    """What a decoder recovered.

    Attributes:
        recovered: share of the private examples' variance that the decoder explains; 1 is all of it, 0 is what their
            mean would do, less is worse than that.
        epoch: after which epoch the decoder was taken; 0 is the constant that it began with.
        epochs: how many were trained.
        public, private: how many examples it learned from, and was measured on.
        decoder: the decoder itself, from activations to inputs.

    Guarantee:
        None: of one attack, a lower bound on what can be recovered.
    """

    recovered: float
    epoch: int
    epochs: int
    public: int
    private: int
    decoder: nn.Module

    def __str__(self) -> str:
        return (
            f"decoder attack: {self.recovered:.1%} of the variance of {self.private} private examples recovered, after "
            f"{self.epoch} of {self.epochs} epochs on {self.public} public ones; {A_FAILURE_PROVES_NOTHING}"
        )


def decoder_attack(
    public: tuple[Tensor, Tensor],
    private: tuple[Tensor, Tensor],
    *,
    decoder: nn.Module | None = None,
    epochs: int = 20,
    batch_size: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
    progress: Progress = no_progress,
) -> DecoderResult:
    """Train a decoder on public pairs of inputs and activations; measure it on what was sent of private ones.

    Args:
        public: (x, z), shapes [n, ...] and [n, ...], floating point, n >= 20: the attacker's own examples, and
            activations of them as the client would release them.
        private: (x, z), shaped alike but for the number of rows, at least 2: z as it was sent, x to compare with.
        decoder: from standardised z, shape [n, features], to [n, pixels]; copied, not changed. By default one hidden
            layer of 512 units whose output begins as the mean of the public inputs.
        epochs: passes over the public pairs, >= 1.
        batch_size: rows a step, >= 1.
        lr: Adam's learning rate, > 0.
        seed: of initial weights and shuffling; torch's generators stay as they are.
        progress: told after each epoch.

    Returns:
        The share recovered of the private examples, by the decoder of the epoch that was best on a tenth of the
        attacker's own pairs.

    Guarantee:
        None: it is an attack, a lower bound on what can be recovered. Another decoder, more public examples or more
        epochs may recover more, and one that recovers nothing proves nothing.

    Raises:
        ParameterError: shapes, counts or settings do not fit; a number is not finite; the private examples are all the
            same, so that there is no variance to recover.

    References:
        As [1] above.
    """
    x, z = _pairs("public", *public)
    target, sent = _pairs("private", *private)
    _refuse(x, z, target, sent, epochs=epochs, batch_size=batch_size, lr=lr)
    mean, spread = z.mean(dim=0), z.std(dim=0).clamp_min(torch.finfo(z.dtype).eps)
    z, sent = (z - mean) / spread, (sent - mean) / spread
    with isolated_randomness(z.device):
        torch.manual_seed(seed)
        order = torch.randperm(len(x)).to(x.device)
        own, aside = order[_aside(len(x)) :], order[: _aside(len(x))]
        begun = _default_decoder(z, x[own]) if decoder is None else copy.deepcopy(decoder)
        best, epoch = _trained(begun, (x[own], z[own]), (x[aside], z[aside]), epochs, batch_size, lr, progress)
    best = nn.Sequential(_Standardise(mean, spread), best).eval()
    with torch.no_grad():
        guesses = best(sent * spread + mean)
    return DecoderResult(
        recovered=recovered_variance(target, guesses),
        epoch=epoch,
        epochs=epochs,
        public=len(x),
        private=len(target),
        decoder=best,
    )


def recovered_variance(x: Tensor, guesses: Tensor) -> float:
    """The share of the variance of x, over rows, that guesses explain: 1 - |x - guesses|^2 / |x - mean of x|^2.

    Args:
        x: shape [n, ...], n >= 2.
        guesses: shaped as x.

    Returns:
        At most 1. The mean of x as everybody's guess gives 0.

    Raises:
        ParameterError: shapes differ, or all rows of x are the same.

    Example:
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> recovered_variance(x, torch.tensor([[0.0], [1.0]]))
        0.5
    """
    if x.shape != guesses.shape:
        raise ParameterError(f"guesses must be shaped as x, {tuple(x.shape)}, got {tuple(guesses.shape)}.")
    x, guesses = x.double(), guesses.double()
    spread = float((x - x.mean(dim=0)).square().sum())
    if not spread > 0:
        raise ParameterError(f"The {len(x)} rows of x are all the same: there is no variance to recover.")
    return 1 - float((x - guesses).square().sum()) / spread


class _Standardise(nn.Module):
    """(z - mean) / spread, by the attacker's own activations."""

    mean: Tensor
    spread: Tensor

    def __init__(self, mean: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("spread", spread)

    def forward(self, z: Tensor) -> Tensor:
        return (z.reshape(len(z), -1) - self.mean) / self.spread


def _default_decoder(z: Tensor, x: Tensor) -> nn.Module:
    last = nn.Linear(HIDDEN, x.shape[1], dtype=x.dtype, device=x.device)
    with torch.no_grad():  # it begins as the best constant: noise can then only be learned, not inherited
        last.weight.zero_()
        last.bias.copy_(x.mean(dim=0))
    first = nn.Linear(z.shape[1], HIDDEN, dtype=z.dtype, device=z.device)
    return nn.Sequential(first, nn.ReLU(), last)


def _trained(
    decoder: nn.Module,
    own: tuple[Tensor, Tensor],
    aside: tuple[Tensor, Tensor],
    epochs: int,
    batch_size: int,
    lr: float,
    progress: Progress,
) -> tuple[nn.Module, int]:
    """The decoder as it was after the epoch in which it was best on the pairs aside, and which that was."""
    x, z = own
    optimizer = torch.optim.Adam(decoder.parameters(), lr=lr)

    def score() -> float:
        decoder.eval()
        with torch.no_grad():
            found = recovered_variance(aside[0], decoder(aside[1]))
        decoder.train()
        return found if math.isfinite(found) else -math.inf

    best, epoch, state = score(), 0, copy.deepcopy(decoder.state_dict())
    for number in range(1, epochs + 1):
        for rows in torch.randperm(len(x)).to(x.device).split(batch_size):
            optimizer.zero_grad()
            (decoder(z[rows]) - x[rows]).square().mean().backward()
            optimizer.step()
        if (now := score()) > best:
            best, epoch, state = now, number, copy.deepcopy(decoder.state_dict())
        progress(number, epochs, now)
    decoder.load_state_dict(state)
    return decoder, epoch


def _aside(n: int) -> int:
    return max(2, round(VALIDATION_SHARE * n))


def _pairs(name: str, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """As two matrices of one dtype."""
    for what, rows in (("x", x), ("z", z)):
        if rows.ndim == 0 or not rows.is_floating_point():
            raise ParameterError(
                f"{what} of the {name} pairs must be floating point with rows first, got {rows.dtype}."
            )
        if not bool(torch.isfinite(rows).all()):
            raise ParameterError(f"{what} of the {name} pairs is not finite everywhere. Leave such rows out.")
    if len(x) != len(z):
        raise ParameterError(f"The {name} pairs have {len(x)} inputs and {len(z)} activations. Give one for each.")
    dtype = torch.promote_types(torch.promote_types(x.dtype, z.dtype), torch.float32)
    return x.detach().reshape(len(x), -1).to(dtype), z.detach().reshape(len(z), -1).to(dtype)


def _refuse(x: Tensor, z: Tensor, target: Tensor, sent: Tensor, *, epochs: int, batch_size: int, lr: float) -> None:
    if x.shape[1] != target.shape[1] or z.shape[1] != sent.shape[1]:
        raise ParameterError(
            f"Public pairs have rows of {x.shape[1]} and {z.shape[1]} numbers, private ones of {target.shape[1]} and "
            f"{sent.shape[1]}. Give the same kind of inputs, and activations of the same part."
        )
    if len(x) < 20 or len(target) < 2:
        raise ParameterError(f"At least 20 public and 2 private pairs are needed, got {len(x)} and {len(target)}.")
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ParameterError(f"{name} must be a whole number >= 1, got {value!r}.")
    if not 0 < lr < math.inf:
        raise ParameterError(f"lr must be > 0 and finite, got {lr!r}.")
