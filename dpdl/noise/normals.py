"""Normals good enough for the guarantee: full tails, on a grid, from a cryptographic stream.

    normals = standard_normals(stream, 1000, step=step)

Private: every value drawn.

Why not `torch.randn`. It is not cryptographic, and in float32 it never exceeds 5.768 on the CPU (24-bit
uniforms). Bounded noise betrays an example: an output beyond the bound is possible with it and impossible without.
At sample rate q and noise multiplier s, the largest normal z adds at least q * Phi(1/s - z) to delta at each step;
for z = 5.768, s = 1, q = 0.01 and 10,000 steps that is 9e-5.

How they are made. A value is rint(A) + V, a whole number of units of 2^-35 (`UNIT`):

- A is half of a Box-Muller pair [1], standard normal. With the radius R = sqrt(-2 ln u) and the angle 2 phi,

      R cos(2 phi) = 2k - R,   R sin(2 phi) = 2k tan(phi),   k = R / (1 + tan^2 phi),

  u uniform to 95 bits and phi to 64: one logarithm, one root and one tangent for two coordinates.
- V is uniform on the 2^32 grid points between -1/16 and 1/16 (w = 1/8 their width), one for each coordinate.

V is noise on top of the normal and independent of the data: adding it to what a Gaussian mechanism releases is
post-processing, so privacy is that of A alone. It costs variance, 1 + w^2 / 12 = 1.0013 in all, and buys that A
need not be exact: P[rint(A) + V = z] is 2^-32 times A's mass in a window of width w about z, whose sides are
all that small errors of A cross.

What is proved. The ideal, rint(exact normal) + V, is the exact Gaussian mechanism's release, rounded and
blurred. The T d values that T steps over d coordinates draw are jointly within

      tv = T d 2^-80 + sqrt(T d) 2^-43

of the ideal in total variation, so that a plan which claims (epsilon, delta) of exact Gaussians has
delta + (1 + e^epsilon) tv: for epsilon = 3 and 10,000 steps, delta + 3e-7 with a million parameters and, the errors
all at their limits and none of them averaging out, delta + 8e-6 with a billion.

- Exact arithmetic: T d 2^-87, the tail's share. Moving a coordinate by x costs |x| / w once V is added. A radius is
  that of some u in the true one's cell, 2^-95 wide, so |dR| <= 2^-95 / (u R), whose mean over u is 2^-95 times
  the largest R, 16.7; the cell at u = 0, where R has no upper limit, adds 2^-95. (The angle's grain, 2^-63 pi, is
  symmetric and enters squared, below 2^-100.) Inside its cell u is placed by the angle, so that values are
  resolved to 14.8, where u = 2^-159; u = 0 stands for 2^-200 and gives `MAX_NORMAL`, 16.7.
- Floating point. With numpy's log and tan good to 4 units in the last place, each coordinate is within
  x = 2^-48 R of the one whose u and phi are exact (near R = 0, also 1.5 * 2^-53 / R, and never above 2^-25). For u
  below 2^-40 that is charged as above: 2^-40 * 8 * 2^-48 * 2 / w = 2^-81 a pair. For the others, the window of a
  pair's output is a square of side w, and only points within x of its sides change sides: a fraction
  4 x / w of its mass, to be increased by a quarter for the density's slope and the neighbourhood of 0. Its mean
  square is chi^2 < 2^-84; chi^2 of independent pairs adds up, and tv <= sqrt(chi^2) / 2.
- Attacks on floating point [2, 3] tell neighbours apart by which doubles the noise, or its sum with the data, can
  take. Here both are whole numbers of units (`dpdl.noise.gaussian` brings the sum to the grid before it adds), and
  the bound above is on the probability of each.

What is assumed: AES is a pseudo-random function; float64 is IEEE's; log and tan are as good as said.

Cost. 6 ms a million on one thread of an AMD EPYC with AVX-512: AES 1.9, the tangent 1.0, the root 0.6, the
logarithm 0.5, conversions and passes 2; adding them to a sum takes 2.5 more. `torch.randn` takes 3.4 in
float32 and 17 in float64 (`python -m benchmarks.noise`).

References:
    [1] Box and Muller, A Note on the Generation of Random Normal Deviates, 1958.
    [2] Mironov, On Significance of the Least Significant Bits for Differential Privacy, 2012.
    [3] Holohan and Braghin, Secure Random Sampling in Differential Privacy, 2021. arXiv:2107.10138.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpdl.errors import ParameterError
from dpdl.secure_random import RandomStream

__all__ = ["LONGEST_CHUNK", "MAX_NORMAL", "UNIT", "ChunkDrawer", "standard_normals", "total_variation", "whole_normals"]

UNIT = 2.0**-35  # the grid, in standard deviations
_SMALLEST_SQUARE = 2.0**-400  # added to u^2, which is 0 or at least 2^-318, so that u = 0 has a radius too
MAX_NORMAL = math.sqrt(-math.log(_SMALLEST_SQUARE)) + 2.0**31 * UNIT

# Pairs worked on at once, even since a pair has 3.5 words. With 2^12, 2^13, ..., 2^17 a million normals take 9.0, 7.4,
# 6.4, 5.9, 5.9 and 6.1 ms on an AMD EPYC with 1 MiB of L2. Above 2^15 torch would use threads, which stall
# on a machine that is busy elsewhere: they would have to meet after every pass.
_CHUNK_PAIRS = 1 << 15
LONGEST_CHUNK = 2 * _CHUNK_PAIRS

_HALF = torch.tensor(0.5, dtype=torch.float64, device="cpu")
_SMALLEST = torch.tensor(_SMALLEST_SQUARE, dtype=torch.float64, device="cpu")


def total_variation(count: int) -> float:
    """An upper bound on how far `count` values are, jointly, from the ideal at the head of this module."""
    return count * 2.0**-80 + math.sqrt(count) * 2.0**-43


def standard_normals(stream: RandomStream, count: int, *, step: int) -> Tensor:
    """Independent standard normals for one step, from the stream's message `step`.

    Args:
        stream: source of randomness; its message `step` must serve nothing else.
        count: how many.
        step: the message number, >= 0.

    Returns:
        Normals, shape [count], float64, on the CPU, multiples of `UNIT` in [-MAX_NORMAL, MAX_NORMAL]. The
        same stream, count and step give the same values; another count gives others.

    Guarantee:
        See the head of this module: T d of them are jointly within
        T d 2^-80 + sqrt(T d) 2^-43 of the ideal in total variation.

    Raises:
        ParameterError: count is negative.

    Example:
        >>> standard_normals(RandomStream.from_insecure_seed(7), 3, step=0)
        tensor([ 0.1108, -0.2700,  0.7106], dtype=torch.float64)
    """
    normals = np.empty(max(count, 0))
    begin = 0
    for whole in whole_normals(stream, count, step=step):
        end = begin + len(whole)
        np.multiply(whole, UNIT, out=normals[begin:end])
        begin = end
    return torch.from_numpy(normals)


def whole_normals(stream: RandomStream, count: int, *, step: int) -> Iterator[NDArray[np.float64]]:
    """The values of `standard_normals` in order, a chunk at a time, as whole numbers of `UNIT`.

    Yields:
        Arrays of whole numbers, shape [at most LONGEST_CHUNK], float64. **The next chunk overwrites the last.**
    """
    if count < 0:
        raise ParameterError(f"count must be >= 0, got {count}.")
    drawer = ChunkDrawer(stream, count, step=step)
    for begin in range(0, count, LONGEST_CHUNK):
        yield drawer.draw(begin)


class ChunkDrawer:
    """Draws the chunks of `whole_normals`, in any order. One thread may use it; several have one each.

    Args:
        stream, count, step: as for `standard_normals`.
    """

    def __init__(self, stream: RandomStream, count: int, *, step: int) -> None:
        self._stream, self._count, self._step = stream, count, step
        pairs = min((count + 1) // 2, _CHUNK_PAIRS)
        self._out = np.empty((2, pairs))
        self._scratch = np.empty((3, pairs))

    def draw(self, begin: int) -> NDArray[np.float64]:
        """The chunk from value `begin` on, a multiple of `LONGEST_CHUNK`. **The next one overwrites it.**"""
        first = begin // 2
        length = min((self._count + 1) // 2 - first, _CHUNK_PAIRS)
        words = self._stream.words(-(-7 * length // 2), message=self._step, start=7 * first // 2)
        chunk = self._out[:, :length] if length == self._out.shape[1] else np.empty((2, length))
        _fill_normals(chunk, words.view(np.int64), self._scratch[:, :length])
        return chunk.reshape(-1)[: self._count - begin]


def _fill_normals(out: NDArray[np.float64], words: NDArray[np.int64], scratch: NDArray[np.float64]) -> None:
    """Turn words into whole numbers of `UNIT`, [cosine or sine, pair], in `out`.

    The words are a radius and an angle for each pair, then 32-bit halves: two blurs V and 32 more
    bits of radius. All passes are in place, so that a chunk stays in cache. Each operation is numpy's or torch's,
    whichever is faster in float64: numpy's logarithm takes a third of the time of torch's, its tangent a third.
    """
    pairs = out.shape[1]
    radius_words, angle_words = words[: 2 * pairs].reshape(2, pairs)
    halves = words[2 * pairs :].view(np.int32)[: 3 * pairs].reshape(3, pairs)
    radius, angle, other = scratch
    radius_, angle_, other_ = (torch.from_numpy(row) for row in scratch)

    # u = |radius| 2^-63, and the radius's 96 bits include a sign, which squaring drops.
    np.copyto(radius, radius_words)
    np.copyto(angle, angle_words)
    np.copyto(other, halves[2])
    torch.add(other_, angle_, alpha=2.0**-64, out=other_)  # places u within its cell of width 2^-95
    torch.add(radius_, other_, alpha=2.0**-32, out=radius_)
    torch.addcmul(_SMALLEST, radius_, radius_, value=2.0**-126, out=radius_)  # u^2
    np.log(radius, out=radius)
    np.multiply(radius, -(UNIT**-2), out=radius)
    np.sqrt(radius, out=radius)  # R, in units

    np.multiply(angle, math.pi * 2.0**-64, out=angle)  # phi in [-pi/2, pi/2]
    np.tan(angle, out=angle)
    torch.addcmul(_HALF, angle_, angle_, value=0.5, out=other_)
    np.divide(radius, other, out=other)  # 2k
    np.subtract(other, radius, out=out[0])
    np.multiply(angle, other, out=out[1])
    np.rint(out, out=out)

    blur = scratch[:2]
    np.copyto(blur, halves[:2])
    np.add(out, blur, out=out)
