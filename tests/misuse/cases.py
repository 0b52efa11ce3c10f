"""All cases: importing this module fills the list."""

from tests.misuse import (
    cases_data,
    cases_facades,
    cases_gradients,
    cases_ledgers,
    cases_losses,
    cases_models,
    cases_numbers,
    cases_order,
    cases_parameters,
    cases_processes,
    cases_saving,
)
from tests.misuse.case import Case, listed

__all__ = ["CASES"]

CASES: tuple[Case, ...] = listed(
    cases_order.ORDER,
    cases_gradients.GRADIENTS,
    cases_parameters.WHOSE,
    cases_parameters.KINDS,
    cases_data.BATCHES,
    cases_data.LOADERS,
    cases_data.VALUES,
    cases_models.MIXING,
    cases_models.FORMS,
    cases_models.LAYERS,
    cases_losses.LOSSES,
    cases_numbers.PLANS,
    cases_numbers.CLAIMS,
    cases_saving.RESUMING,
    cases_ledgers.LEDGERS,
    cases_processes.COPIES,
    cases_facades.DEEPEE,
    cases_facades.OPACUS,
)
