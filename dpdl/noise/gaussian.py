"""The Gaussian mechanism on a clipped sum, with normals good enough for the guarantee.

    noisy = gaussian_mechanism(clipped, noise_multiplier=1.1, stream=stream, step=step)

Private: the clipped sum, and every normal drawn. Public: the noisy sum, the event, the step.

Why not `torch.randn`. It is not cryptographic, and in float32 it never exceeds 5.768 on the CPU
(24-bit uniforms). Bounded noise betrays an example: an output beyond the bound is possible with
it and impossible without. At sample rate q and noise multiplier s, the largest normal z adds at
least q * Phi(1/s - z) to delta at each step; for z = 5.768, s = 1, q = 0.01 and 10,000 steps that
is 9e-5.

How the normals are made. Each is (A + B) / sqrt(2) with A and B independent Box-Muller draws [1]:
radius sqrt(-2 ln U) with U uniform to 74 bits, angle uniform to 53 bits. Of a pair of coordinates,
one takes both draws' cosines, the other both sines.

- Tail. The largest value is 2 sqrt(75 ln 2) = 14.42 (`MAX_NORMAL`). A radius is the exact one of
  some real U, moved to the middle of its cell of width 2^-74. With the other draw exact, what
  comes out is within 2^-72 of the normal in total variation: 2^-74 for the cell at zero, where R
  has no upper limit, and 2.1 * 2^-74 for the rest, whose shift |dR| the other draw smooths: the
  sum over the cells of 2^-74 |dR| / sqrt(2 pi). (The angle's grain is symmetric and enters
  squared, below 2^-100.) A run of T steps over d coordinates uses T d radii, so a plan that
  claims (epsilon, delta) of exact Gaussians has

      delta + (1 + e^epsilon) T d 2^-72,

  which for epsilon = 3 and 10,000 steps is delta + 4.5e-11 with a million parameters and
  delta + 4.5e-8 with a billion: negligible beside delta = 1e-5.
- Floating point, which that bound leaves out. Mironov [2] and Holohan and Braghin [3] tell
  neighbours apart by which doubles the sampler can produce. The two values of one Box-Muller pair
  give away its U and angle; the sum of independent pairs [3] does not, since solving for one draw
  means guessing the 127 bits of the other. Two coordinates, 106 bits of output, come from 254
  random bits, so nearly every pair of doubles has very many origins; and the noise meets
  the sum in float64 before the result is rounded to float32, 29 bits coarser. This is a
  defence, not a proof: a proof needs a discrete mechanism on integers.
- Cost. 15 ms a million on one thread of an AMD EPYC; `torch.randn` takes 3.4 ms in float32 and 17 ms in
  float64 (`python -m benchmarks.noise`).

References:
    [1] Box and Muller, A Note on the Generation of Random Normal Deviates, 1958.
    [2] Mironov, On Significance of the Least Significant Bits for Differential Privacy, 2012.
    [3] Holohan and Braghin, Secure Random Sampling in Differential Privacy, 2021. arXiv:2107.10138.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from accountants import Gaussian
from dpdl.errors import ParameterError
from dpdl.secure_random import RandomStream
from dpdl.types import ClippedSum, NoisyGradient

__all__ = ["MAX_NORMAL", "gaussian_mechanism", "standard_normals"]

_RADIUS_BITS = 74  # 63 of the radius word and 11 that the angle word has to spare
MAX_NORMAL = 2 * math.sqrt((_RADIUS_BITS + 1) * math.log(2))  # U is at least 2^-75: half a unit
_ANGLE_BITS = 53
_SPARE_BITS = 64 - _ANGLE_BITS
_WORDS_PER_PAIR = 4  # two draws, each a radius and an angle

# Pairs worked on at once, 2 MiB of words: of the powers of two from 2^14 to 2^18 the fastest on an AMD EPYC.
_CHUNK_PAIRS = 1 << 16


def standard_normals(stream: RandomStream, count: int, *, step: int) -> Tensor:
    """Independent standard normals for one step, from the stream's message `step`.

    Args:
        stream: source of randomness; its message `step` must serve nothing else.
        count: how many.
        step: the message number, >= 0.

    Returns:
        Normals, shape [count], float64, on the CPU, each in [-MAX_NORMAL, MAX_NORMAL]. The same
        stream, count and step give the same values; another count gives others.

    Guarantee:
        See the head of this module: tails cost (1 + e^epsilon) 2^-72 of delta a coordinate and step.

    Example:
        >>> standard_normals(RandomStream.from_insecure_seed(7), 3, step=0)
        tensor([ 2.0647,  0.2266, -0.0772], dtype=torch.float64)
    """
    if count < 0:
        raise ParameterError(f"count must be >= 0, got {count}.")
    pairs = (count + 1) // 2
    normals = np.empty((2, pairs))
    for begin in range(0, pairs, _CHUNK_PAIRS):
        chunk = normals[:, begin : begin + _CHUNK_PAIRS]
        words = stream.words(_WORDS_PER_PAIR * chunk.shape[1], message=step, start=_WORDS_PER_PAIR * begin)
        _fill_normals(chunk, words.view(np.int64).reshape(2, 2, -1))
    return torch.from_numpy(normals.reshape(-1)[:count])


def _fill_normals(out: NDArray[np.float64], words: NDArray[np.int64]) -> None:
    """Turn words [radius or angle, draw, pair] into normals [cosine or sine, pair], in `out`.

    With U = (k + 1/2) 2^-74, k the 74 radius bits, (A + B) / sqrt(2) is the sum over the draws of
    sqrt(-ln U) cos(angle): the two square roots of 2 cancel.

    Torch's cos and sin are three times faster than numpy's in float64. The rest is numpy's: its
    logarithm is faster, and threads that meet after every small operation stall on a busy machine.
    """
    radius_words, angle_words = words  # [draw, pair] each
    uniform = (radius_words & (2**63 - 1)).astype(np.float64)  # small values, the tail, convert exactly
    uniform *= 2.0**-63
    spare = (angle_words & (2**_SPARE_BITS - 1)).astype(np.float64)
    spare += 0.5
    spare *= 2.0**-_RADIUS_BITS
    uniform += spare
    radius = np.sqrt(-np.log(uniform))

    angle = torch.from_numpy((angle_words >> _SPARE_BITS).astype(np.float64))  # signed, in [-2^52, 2^52)
    angle *= math.pi * 2.0 ** (1 - _ANGLE_BITS)
    for row, direction in zip(out, (angle.cos(), angle.sin()), strict=True):
        first, second = direction.numpy() * radius
        np.add(first, second, out=row)


def gaussian_mechanism(
    clipped: ClippedSum, *, noise_multiplier: float, stream: RandomStream, step: int
) -> NoisyGradient:
    """Add N(0, (noise_multiplier * sensitivity)^2) to every coordinate of a clipped sum.

    One draw serves all parameters, in the order of their names, so that no two coordinates share
    noise whatever their shapes. The sum is taken in float64 and rounded to the dtype it came in.

    Args:
        clipped: the sum over one logical batch and its L2 sensitivity.
        noise_multiplier: s >= 0, the noise's standard deviation divided by the sensitivity.
        stream: source of randomness, used for nothing but noise.
        step: the logical step, >= 0. **Two calls with one stream and step add the same noise, and
            their difference is not private**: the caller counts steps.

    Returns:
        The noisy sum (not averaged), on the devices and in the dtypes of `clipped`, and its event.

    Guarantee:
        The Gaussian mechanism of noise multiplier s for whoever is one of the sum's examples,
        within the tail bound at the head of this module. At s = 0: none, and the stream is untouched.

    Raises:
        ParameterError: noise_multiplier is negative or not finite.
        AssertionError: the sum is not finite, its dtype is narrower than float32, or the sensitivity
            is not positive: the clipping stage has broken its promise.
    """
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise ParameterError(f"noise_multiplier must be finite and >= 0, got {noise_multiplier}.")
    _check_promises(clipped, noisy=noise_multiplier > 0)
    event = Gaussian(noise_multiplier)
    if noise_multiplier == 0:
        return NoisyGradient(tensors=dict(clipped.tensors), event=event)

    std = noise_multiplier * clipped.sensitivity
    names = sorted(clipped.tensors)
    sizes = [clipped.tensors[name].numel() for name in names]
    normals = standard_normals(stream, sum(sizes), step=step).mul_(std)
    noise = dict(zip(names, normals.split(sizes), strict=True))
    noisy = {
        name: (noise[name].to(total.device).view_as(total) + total).to(total.dtype)
        for name, total in clipped.tensors.items()
    }
    return NoisyGradient(tensors=noisy, event=event)


def _check_promises(clipped: ClippedSum, *, noisy: bool) -> None:
    """Raise AssertionError (under `python -O` too) if noise could not make this sum private."""
    if not clipped.sensitivity > 0 or (noisy and math.isinf(clipped.sensitivity)):
        raise AssertionError(f"the clipped sum's sensitivity is {clipped.sensitivity}, not positive.")
    for name, total in clipped.tensors.items():
        if total.dtype not in (torch.float32, torch.float64):
            raise AssertionError(f"the clipped sum of {name} is in {total.dtype}; float32 is the least.")
        if not torch.isfinite(total).all():
            raise AssertionError(
                f"the clipped sum of {name} is not finite, so it has no sensitivity. Clipping gives "
                "a non-finite example weight zero; the sum was changed after it, or has overflowed."
            )
