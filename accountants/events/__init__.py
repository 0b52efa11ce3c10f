"""What was released: frozen values that say which mechanism ran, never how it is accounted.

    Gaussian, Laplace                  one noisy answer
    PoissonSampled(rate, event)        the same, computed on a random subset of the examples
    Repeated(event, count)             count times, each with fresh randomness
    Composed(events)                   one after another, each with fresh randomness

Every parameter is public: it must not have been chosen by looking at the private data (a schedule fixed in
advance is fine; "stop when epsilon hits 3" is not, that needs a privacy filter).

Example:
    >>> dpsgd = 1000 * PoissonSampled(0.01, Gaussian(1.0))
    >>> dpsgd
    Repeated(event=PoissonSampled(sample_rate=0.01, event=Gaussian(noise_multiplier=1.0)), count=1000)
    >>> Event.from_json(dpsgd.to_json()) == dpsgd
    True
"""

from accountants.events.event import Composed, Event, Repeated
from accountants.events.noise import Gaussian, Laplace
from accountants.events.sampling import PoissonSampled

__all__ = ["Composed", "Event", "Gaussian", "Laplace", "PoissonSampled", "Repeated"]
