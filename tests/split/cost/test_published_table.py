"""The benchmark's networks are those of the papers, and its stored figures are what it counts."""

from __future__ import annotations

import json

import pytest

from benchmarks.environment import RESULTS
from benchmarks.split_cost import PUBLISHED_GB, PUBLISHED_TFLOPS, forward_ratio, gigabytes, measured, tflops
from benchmarks.split_cost_networks import resnet50, vgg16

STORED = json.loads((RESULTS / "split_cost.json").read_text())["networks"]


def test_resnet_50_has_its_weights_and_the_stored_bytes() -> None:
    model = resnet50(classes=100, stem="7x7")
    # torchvision's has 25,557,032 with 1,000 classes; 900 outputs of 2,048 weights and a bias fewer
    assert sum(p.numel() for p in model.parameters()) == 25_557_032 - 900 * 2_049
    found = gigabytes(measured(model, 2))
    stored = STORED["ResNet-50, stem 7x7, cut after the stem's pooling"]["second_table"]
    for scheme, row in found.items():
        assert row["fitted"] == pytest.approx(stored[scheme]["fitted"], rel=1e-3)
        assert row["gigabytes"] == pytest.approx(stored[scheme]["gigabytes"], rel=1e-3)
        assert row["gigabytes"][0] == pytest.approx(PUBLISHED_GB[scheme][0])  # fitted
    assert found["federated"]["gigabytes"][1] > 1.2 * PUBLISHED_GB["federated"][1]  # not reproduced


def test_vgg_16_has_its_weights_and_the_published_ratios() -> None:
    model = vgg16(classes=10)
    convolutions = 14_714_688  # torchvision's `features`
    assert sum(p.numel() for p in model.parameters()) == convolutions + 513 * 4096 + 4097 * 4096 + 4097 * 10
    ratio = forward_ratio(model, 1)
    assert ratio == pytest.approx((313_196_544 + 512 * 4096 + 4096 * 4096 + 40_960) / (32 * 32 * 27 * 64))
    table = tflops(measured(model, 1), ratio=ratio)["tflops"]
    for scheme, row in STORED["VGG-16, hidden 4096, cut after 1 convolution"]["first_table"]["tflops"].items():
        assert table[scheme] == pytest.approx(row, rel=1e-3)
    assert table["federated"] == pytest.approx(PUBLISHED_TFLOPS["federated"], rel=2e-3)
    assert table["split, three forward passes"] == pytest.approx(PUBLISHED_TFLOPS["split"], rel=0.05)
    assert table["split"][0] < 0.7 * PUBLISHED_TFLOPS["split"][0]  # what is really counted
