"""The decoder attack where what can be recovered is known: all, nothing, or a share by linear algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dpdl.audit import A_FAILURE_PROVES_NOTHING, decoder_attack, recovered_variance
from dpdl.errors import ParameterError


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MIX = torch.linalg.qr(normal(9, 6, 6))[0]


def encoded(x: Tensor, width: int = 6) -> Tensor:
    return torch.tanh(0.3 * x @ MIX[:, :width])


def test_an_encoder_that_loses_nothing_is_inverted_and_one_that_keeps_half_by_half() -> None:
    """Six independent coordinates: of three orthogonal combinations no decoder can explain more than half."""
    public, private = normal(0, 2000, 6), normal(1, 500, 6)
    whole = decoder_attack((public, encoded(public)), (private, encoded(private)), epochs=12)
    half = decoder_attack((public, encoded(public, 3)), (private, encoded(private, 3)), epochs=6)
    assert whole.recovered > 0.97
    assert half.recovered == pytest.approx(0.5, abs=0.04)
    assert (whole.public, whole.private) == (2000, 500)


def test_activations_of_other_records_recover_nothing() -> None:
    public, private = normal(0, 2000, 6), normal(1, 500, 6)
    found = decoder_attack((public, encoded(normal(2, 2000, 6))), (private, encoded(normal(3, 500, 6))), epochs=3)
    assert found.recovered == pytest.approx(0, abs=0.02)
    assert A_FAILURE_PROVES_NOTHING in str(found)


def test_the_epoch_is_chosen_by_public_pairs_and_may_be_none_at_all() -> None:
    """Activations that only the private rows explain: the attacker cannot know, and stays with the mean."""
    told: list[tuple[int, int]] = []
    public, private = normal(0, 100, 6), normal(1, 50, 6)
    found = decoder_attack(
        (public, normal(2, 100, 40)),
        (private, torch.cat([private, normal(3, 50, 34)], dim=1)),
        epochs=5,
        progress=lambda done, epochs, recovered: told.append((done, epochs)),
    )
    assert found.epoch == 0
    mean = public.mean(dim=0)
    assert found.recovered == pytest.approx(recovered_variance(private, mean.expand(50, 6)), abs=0.05)
    with torch.no_grad():  # the constant itself came back, not what the last epoch made of it
        assert torch.equal(found.decoder(normal(4, 1, 40)), found.decoder(normal(5, 1, 40)))
    assert told == [(number, 5) for number in range(1, 6)]


def test_the_decoder_that_comes_back_is_the_one_that_was_measured() -> None:
    public, private = normal(0, 300, 6), normal(1, 100, 6)
    found = decoder_attack((public, encoded(public)), (private, encoded(private)), epochs=3)
    with torch.no_grad():
        guesses = found.decoder(encoded(private))
    assert recovered_variance(private, guesses) == pytest.approx(found.recovered, abs=1e-5)


def test_the_share_recovered_is_that_of_the_formula_written_out() -> None:
    x, guesses = normal(0, 30, 2, 2), normal(1, 30, 2, 2)
    lost = spread = 0.0
    for i in range(30):
        for a in range(2):
            for b in range(2):
                lost += (float(x[i, a, b]) - float(guesses[i, a, b])) ** 2
                spread += (float(x[i, a, b]) - float(x[:, a, b].double().mean())) ** 2
    assert recovered_variance(x, guesses) == pytest.approx(1 - lost / spread, abs=1e-6)
    assert recovered_variance(x, x) == 1


def test_a_seed_repeats_it_and_torchs_generators_stay() -> None:
    public, private = normal(0, 100, 6), normal(1, 50, 6)
    pairs = (public, encoded(public)), (private, encoded(private))
    state = torch.get_rng_state()
    first, again = decoder_attack(*pairs, epochs=2, seed=4), decoder_attack(*pairs, epochs=2, seed=4)
    assert first.recovered == again.recovered != decoder_attack(*pairs, epochs=2, seed=5).recovered
    assert torch.equal(state, torch.get_rng_state())


def test_a_decoder_of_ones_own_is_trained_as_a_copy() -> None:
    public, private = normal(0, 500, 6), normal(1, 50, 6)
    own = nn.Linear(6, 6)
    before = own.weight.detach().clone()
    found = decoder_attack(
        (public, encoded(public)), (private, encoded(private)), decoder=own, epochs=40, lr=0.02, batch_size=50
    )
    assert found.recovered > 0.9
    assert torch.equal(own.weight, before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"public": (normal(0, 19, 6), normal(0, 19, 6))}, "At least 20 public"),
        ({"public": (normal(0, 40, 6), normal(0, 39, 6))}, "40 inputs and 39 activations"),
        ({"private": (normal(0, 40, 5), normal(0, 40, 6))}, "Public pairs have rows of 6 and 6 numbers"),
        ({"private": (torch.ones(40, 6), normal(0, 40, 6))}, "no variance to recover"),
        ({"private": (normal(0, 40, 6).log(), normal(0, 40, 6))}, "not finite everywhere"),
        ({"public": (torch.ones(40, 6, dtype=torch.uint8), normal(0, 40, 6))}, "must be floating point"),
        ({"epochs": 0}, "epochs must be a whole number >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
        ({"lr": 0.0}, "lr must be > 0"),
    ],
)
def test_what_cannot_be_attacked_is_refused(change: dict[str, object], said: str) -> None:
    settings: dict[str, object] = {"epochs": 1, **change}
    public = settings.pop("public", (normal(0, 40, 6), normal(1, 40, 6)))
    private = settings.pop("private", (normal(2, 40, 6), normal(3, 40, 6)))
    with pytest.raises(ParameterError, match=said):
        decoder_attack(public, private, **settings)  # type: ignore[arg-type]
