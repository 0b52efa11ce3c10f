"""Adaptive clipping: a clipping norm that follows a quantile of the clients' update norms, privately.

    AdaptiveClipping(quantile=0.5)         # half of the updates are clipped, whatever their scale turns out to be

With C_t the norm that clips round t, g the quantile and b_i = [ ||update_i|| <= C_t ] client i's bit, "not clipped",

    C_{t+1} = C_t exp(-rate (sum_i (b_i - g) + N(0, sigma_b^2)) / (expected cohort))              [1, Algorithm 1]

The *un*clipped fraction: where too many are clipped, the sum is negative and C grows. With the clipped fraction in its
place the quantile is a fixed point that repels.

**The bit's price.** It is released in the same round as the noisy sum, on the same clients, and shares its noise
multiplier. Centred, a client's bit moves the sum of bits by at most s = max(g, 1 - g); both releases together are one
Gaussian mechanism of noise multiplier z if the sum's own is

    z_delta = (z^-2 - (sigma_b / s)^-2)^(-1/2)                                                    [1, Theorem 1]

which for g = 1/2 is (z^-2 - (2 sigma_b)^-2)^(-1/2). The ledger has z: what is accounted does not depend on the split.

**Dropouts.** [1] centres bits at 1/2, so that a client that does not answer counts as half a bit, and with 30 % of them
missing no C can reach the quantile 0.9. Centred at g, those who do not answer count as nothing: C moves more slowly,
towards the same quantile. At g = 1/2 the two are the same.

C_{t+1} is computed from what was released, so it may be published, and so may the noisy fraction.

References:
    [1] Andrew, Thakkar, McMahan, Ramaswamy, Differentially Private Learning with Adaptive Clipping, 2021.
        arXiv:1905.03871
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from accountants import arguments
from dpdl.errors import ParameterError

__all__ = ["AdaptiveClipping"]

# By default the bit's noise is 1/20 of the cohort [1, section 3.1], unless that would cost the sum more than this part
# of its noise budget (a small cohort): z_delta is then z / sqrt(1 - 1/16) = 1.033 z.
COHORT_PART = 20
BUDGET_PART = 16
ROUNDING = 1e-12  # relative: z_delta is rounded up by it, beyond the error of its formula
NORM_RANGE = (1e-20, 1e20)  # in which C is kept, so that float32 sums and float64 noise exist


@final
@dataclass(frozen=True, kw_only=True)
class AdaptiveClipping:
    """How the clipping norm follows the updates [1, Algorithm 1, with bits centred at the quantile].

    Norms are L2 norms of whole updates, in the weights' own unit; bits and cohorts are numbers of clients.

    Guarantee:
        The round's noise multiplier, of the sum and the bits together, is the plan's: adapting costs no epsilon, and a
        little more noise on the sum (`update_noise_multiplier`). The norm is computed from noisy bits, and may be
        published.

    Attributes:
        quantile: g in [0, 1], the fraction of updates that shall not be clipped.
        learning_rate: > 0, by how much log C moves when all are clipped, over g.
        bit_noise_multiplier: sigma_b > 0, standard deviation of the noise on the sum of bits, in bits. By default a
            twentieth of the expected cohort, or more where that would cost the sum too much.

    Raises:
        ParameterError: a value is out of range.
    """

    quantile: float = 0.5
    learning_rate: float = 0.2
    bit_noise_multiplier: float | None = None

    def __post_init__(self) -> None:
        remedy = "Give the fraction of updates that shall not be clipped, for example 0.5."
        object.__setattr__(self, "quantile", arguments.probability("quantile", self.quantile, remedy=remedy))
        rate = arguments.non_negative("learning_rate", self.learning_rate, remedy="Give a rate such as 0.2.")
        if rate == 0:
            raise ParameterError("learning_rate must be > 0, got 0. For a fixed norm leave adaptive_clipping out.")
        object.__setattr__(self, "learning_rate", rate)
        if self.bit_noise_multiplier is not None:
            remedy = "Give a standard deviation in bits, for example a twentieth of the cohort, or leave it out."
            noise = arguments.non_negative("bit_noise_multiplier", self.bit_noise_multiplier, remedy=remedy)
            if noise == 0:
                raise ParameterError(f"bit_noise_multiplier must be > 0, got 0: the bit would be bare. {remedy}")
            object.__setattr__(self, "bit_noise_multiplier", noise)

    @property
    def bit_sensitivity(self) -> float:
        """s, by how much one client's centred bit can move their sum: max(g, 1 - g)."""
        return max(self.quantile, 1 - self.quantile)

    def bit_noise(self, *, noise_multiplier: float, cohort: float) -> float:
        """sigma_b, the standard deviation of the noise on the sum of bits.

        Args:
            noise_multiplier: z, of the whole round.
            cohort: the clients expected in a round.
        """
        if self.bit_noise_multiplier is not None:
            return self.bit_noise_multiplier
        affordable = self.bit_sensitivity * noise_multiplier * math.sqrt(BUDGET_PART)
        return max(cohort / COHORT_PART, affordable)

    def update_noise_multiplier(self, *, noise_multiplier: float, cohort: float) -> float:
        """z_delta, the noise multiplier of the sum of updates, if the round's is z; rounded up.

        Args:
            noise_multiplier: z, the round's.
            cohort: clients expected in a round.

        Raises:
            ParameterError: the bit alone would spend more than the round may.
        """
        if noise_multiplier == 0:
            return 0.0
        bit = self.bit_noise(noise_multiplier=noise_multiplier, cohort=cohort) / self.bit_sensitivity
        share = (noise_multiplier / bit) ** 2
        if not share < 1:
            raise ParameterError(
                f"bit_noise_multiplier {self.bit_noise_multiplier} is too little: the bits alone would be released "
                f"with noise multiplier {bit:.6g}, and the whole round has {noise_multiplier:.6g}. Give more than "
                f"{self.bit_sensitivity * noise_multiplier:.6g}, or leave it out."
            )
        return noise_multiplier / math.sqrt(1 - share) * (1 + ROUNDING)

    def next_norm(self, norm: float, *, noisy_bits: float, cohort: float) -> float:
        """C of the next round.

        Args:
            norm: C of this round.
            noisy_bits: the noisy sum of centred bits.
            cohort: the clients expected in a round.
        """
        low, high = NORM_RANGE
        exponent = min(max(-self.learning_rate * noisy_bits / cohort, math.log(low)), math.log(high))
        return min(max(norm * math.exp(exponent), low), high)

    def __str__(self) -> str:
        return f"the clipping norm follows the {self.quantile:g} quantile of the updates' norms"
