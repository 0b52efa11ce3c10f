"""The sentence that every attack's result ends with, so that a low figure is not read as a promise.

An attack is a lower bound on what leaks: somebody else may know more, or try harder. Only an epsilon, with the
adversary and the assumptions it is stated for, bounds from above.
"""

from __future__ import annotations

__all__ = ["A_FAILURE_PROVES_NOTHING"]

# The end of every result of an attack.
A_FAILURE_PROVES_NOTHING = "an attack that fails proves nothing: this is no formal guarantee"
