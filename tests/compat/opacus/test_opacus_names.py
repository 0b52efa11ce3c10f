"""The public names and arguments of Opacus, where it is installed."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

MODULES = (
    "",
    ".privacy_engine",
    ".accountants",
    ".accountants.utils",
    ".data_loader",
    ".distributed",
    ".grad_sample",
    ".grad_sample.utils",
    ".layers",
    ".optimizers",
    ".schedulers",
    ".utils.batch_memory_manager",
    ".utils.fast_gradient_clipping_utils",
    ".utils.module_utils",
    ".utils.per_sample_gradients_utils",
    ".utils.uniform_sampler",
    ".validators",
    ".validators.errors",
    ".validators.module_validator",
)
GUIDE = Path(__file__).parents[3] / "docs" / "compat_opacus.md"


def _public(module: Any) -> set[str]:
    listed = getattr(module, "__all__", None)
    return set(
        listed
        if listed is not None
        else (n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__ and n[0] != "_")
    )


@pytest.mark.parametrize("path", MODULES)
def test_every_public_name_is_here_or_in_the_guide(path: str) -> None:
    pytest.importorskip("opacus")
    theirs, ours = importlib.import_module(f"opacus{path}"), importlib.import_module(f"dpdl.compat.opacus{path}")
    guide = GUIDE.read_text()
    missing = {name for name in _public(theirs) if not hasattr(ours, name) and f"`{name}`" not in guide}
    assert not missing


@pytest.mark.parametrize(
    "name",
    [
        ".privacy_engine.PrivacyEngine.__init__",
        ".privacy_engine.PrivacyEngine.make_private",
        ".privacy_engine.PrivacyEngine.make_private_with_epsilon",
        ".privacy_engine.PrivacyEngine.save_checkpoint",
        ".privacy_engine.PrivacyEngine.load_checkpoint",
        ".privacy_engine.PrivacyEngine.get_epsilon",
        ".accountants.utils.get_noise_multiplier",
        ".optimizers.DPOptimizer.__init__",
        ".data_loader.DPDataLoader.__init__",
        ".data_loader.DPDataLoader.from_data_loader",
        ".grad_sample.GradSampleModule.__init__",
        ".grad_sample.GradSampleModuleFastGradientClipping.__init__",
        ".utils.batch_memory_manager.BatchMemoryManager.__init__",
        ".validators.ModuleValidator.validate",
        ".schedulers.StepNoise.__init__",
        ".schedulers.LambdaGradClip.__init__",
    ],
)
def test_every_argument_is_taken(name: str) -> None:
    pytest.importorskip("opacus")
    theirs, ours = (_arguments(package + name) for package in ("opacus", "dpdl.compat.opacus"))
    assert theirs <= ours, theirs - ours


def _arguments(path: str) -> set[str]:
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return set(inspect.signature(found).parameters) - {"kwargs"}
    raise AssertionError(path)


def test_the_guide_has_a_row_for_each_refusal() -> None:
    guide = GUIDE.read_text()
    for word in ("adaptive", "rand_on_empty", "poisson_sampling=False", "secure_mode", "ghost_fsdp", "_module."):
        assert word in guide, word
