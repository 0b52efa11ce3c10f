"""Fixed features: of one image each, bounded, and what they say of edges."""

from __future__ import annotations

import pytest
import torch

from dpdl.errors import ParameterError
from dpdl.tradeoff.features import oriented_gradients


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_s_features_depend_on_no_other_image(channels: int) -> None:
    images = torch.rand(5, channels, 28, 28, generator=torch.Generator().manual_seed(0))
    whole = oriented_gradients(images)
    torch.testing.assert_close(torch.cat([oriented_gradients(image[None]) for image in images]), whole)
    changed = images.clone()
    changed[2] = 0
    assert torch.equal(oriented_gradients(changed)[[0, 1, 3, 4]], whole[[0, 1, 3, 4]])
    assert whole.flatten(1).norm(dim=1).max() <= 1 + 1e-6


def test_an_edge_lights_the_bin_of_its_direction() -> None:
    bright_right = torch.zeros(1, 1, 8, 8)
    bright_right[..., 4:] = 1
    views = [torch.rot90(bright_right, k, dims=(2, 3)) for k in range(4)]  # bright on the right, top, left, bottom
    strongest = [int(oriented_gradients(view).sum((0, 2, 3)).argmax()) for view in views]
    assert strongest == [0, 6, 4, 2]  # bins of 45 degrees, y downward


def test_a_quarter_turn_turns_the_bins() -> None:
    image = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    turned = oriented_gradients(torch.rot90(image, 1, dims=(2, 3)))
    expected = torch.rot90(oriented_gradients(image), 1, dims=(2, 3)).roll(-2, dims=1)
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=1e-4)


def test_a_flat_image_has_no_features_and_a_small_one_is_refused() -> None:
    assert oriented_gradients(torch.full((1, 1, 8, 8), 0.7)).abs().max() == 0
    with pytest.raises(ParameterError, match="at least 4 pixels"):
        oriented_gradients(torch.rand(1, 1, 3, 8))
