"""Accountants by name."""

from __future__ import annotations

from dpdl.compat.opacus.accountants.accountant import IAccountant
from dpdl.compat.opacus.accountants.gdp import GaussianAccountant
from dpdl.compat.opacus.accountants.prv import PRVAccountant
from dpdl.compat.opacus.accountants.rdp import RDPAccountant
from dpdl.errors import ParameterError

__all__ = ["create_accountant", "register_accountant"]

_ACCOUNTANTS: dict[str, type[IAccountant]] = {"rdp": RDPAccountant, "gdp": GaussianAccountant, "prv": PRVAccountant}


def register_accountant(mechanism: str, accountant: type[IAccountant], force: bool = False) -> None:
    """Make an accountant of your own known by name.

    Args:
        mechanism: the name.
        accountant: the class.
        force: replace one of that name.

    Raises:
        ParameterError: the name is taken and `force` is not set.
    """
    if mechanism in _ACCOUNTANTS and not force:
        raise ParameterError(f"The accountant {mechanism!r} is registered already. To replace it, set force=True.")
    _ACCOUNTANTS[mechanism] = accountant


def create_accountant(mechanism: str) -> IAccountant:
    """A new accountant, by the name of its mechanism.

    Raises:
        ParameterError: there is none of that name.
    """
    if mechanism not in _ACCOUNTANTS:
        raise ParameterError(f"There is no accountant {mechanism!r}; there are {sorted(_ACCOUNTANTS)}.")
    return _ACCOUNTANTS[mechanism]()
