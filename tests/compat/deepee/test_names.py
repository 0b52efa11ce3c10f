"""deepee 0.1.9's names and signatures, written down from its source, and the table of what differs."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import dpdl.compat.deepee

ROOT = Path(__file__).parents[3]

# Where deepee has it: its parameters with their defaults. "self" left out.
SIGNATURES = {
    "PrivacyWrapper": "base_model, num_replicas, L2_clip, noise_multiplier, secure_rng=False, seed=None, watchdog=None",
    "PrivacyWrapper.forward": "x",
    "PrivacyWrapper.clip_and_accumulate": "reduce='mean'",
    "PrivacyWrapper.noise_gradient": "",
    "PrivacyWrapper.update_clones": "",
    "PerSampleGradientWrapper": "base_model, num_replicas",
    "PerSampleGradientWrapper.forward": "x",
    "PerSampleGradientWrapper.calculate_per_sample_gradients": "",
    "UniformDataLoader": "dataset, batch_size, num_workers=0, pin_memory=True",
    "ModelSnooper": "",
    "ModelSnooper.snoop": "model",
    "ModelSurgeon": "converter",
    "ModelSurgeon.operate": "model",
    "SurgicalProcedures.BN_to_IN": "module",
    "SurgicalProcedures.BN_to_BN_nostats": "module",
    "SurgicalProcedures.IN_to_IN_nostats": "module",
    "SurgicalProcedures.BN_to_GN": "module, num_groups='default'",
    "SurgicalProcedures.BN_to_LN": "module, normalized_shape",
    "PrivacyWatchdog": "dataloader, target_epsilon, target_delta, report_every_n_steps=100, abort=False, save=False, "
    "path=None, fallback_to_rdp=False",
    "PrivacyWatchdog.calc_epsilon": "steps_taken",
    "PrivacyWatchdog.inform": "steps_taken",
    "PrivacyWatchdog.abort_training": "epsilon_spent, save=False, path=None",
    "dataloader.UniformWORSubsampler": "dataset, batch_size",
    "snooper.Validator": "name, val_func, message",
    "snooper.Validator.validate": "model",
    "snooper.IN_running_stats_off": "model",
    "snooper.BN_running_stats_off": "model",
    "surgery.replace_all_modules": "root, target_class, converter",
    "privacy_accounting.compute_mu_uniform": "epoch, noise_multi, n, batch_size",
    "privacy_accounting.delta_eps_mu": "eps, mu",
    "privacy_accounting.eps_from_mu": "mu, delta",
    "privacy_accounting.compute_eps_uniform": "epoch, noise_multi, n, batch_size, delta",
    "privacy_accounting.compute_rdp": "q, noise_multiplier, steps, orders",
    "privacy_accounting.get_privacy_spent": "orders, rdp, delta",
}
# deepee's docstring has the argument; its code has not.
SIGNATURES["PrivacyWrapper.prepare_next_batch"] = "return_privacy_spent=False"

PLACES = {
    "wrapper": ["PrivacyWrapper", "PerSampleGradientWrapper"],
    "watchdog": ["PrivacyWatchdog", "PrivacyBudgetExhausted"],
    "snooper": ["ModelSnooper", "Validator", "BadModuleError", "IN_running_stats_off", "BN_running_stats_off"],
    "surgery": ["ModelSurgeon", "SurgicalProcedures", "replace_all_modules"],
    "dataloader": ["UniformDataLoader", "UniformWORSubsampler"],
    "privacy_accounting": ["compute_eps_uniform", "compute_rdp", "get_privacy_spent"],
}


def resolve(dotted: str) -> Any:
    thing: Any = dpdl.compat.deepee
    for name in dotted.split("."):
        if not hasattr(thing, name):
            thing = importlib.import_module(f"{thing.__name__}.{name}")
            continue
        thing = getattr(thing, name)
    return thing


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_deepees(name: str) -> None:
    parameters = inspect.signature(resolve(name)).parameters.values()
    written = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters if p.name != "self"]
    assert ", ".join(written) == SIGNATURES[name]


@pytest.mark.parametrize("module", PLACES)
def test_submodules_are_where_deepee_has_them(module: str) -> None:
    found = importlib.import_module(f"dpdl.compat.deepee.{module}")
    assert set(PLACES[module]) <= set(found.__all__)


def test_every_defect_has_its_row_in_the_guide() -> None:
    text = (ROOT / "docs" / "compat_deepee.md").read_text()
    rows = re.findall(r"^\|.*\|$", text, re.MULTILINE)
    missing = [number for number in range(1, 13) if not any(f"D{number} " in row for row in rows)]
    assert not missing
