"""Opacus's accountants, answered by the package `accountants`."""

from dpdl.compat.opacus.accountants.accountant import IAccountant
from dpdl.compat.opacus.accountants.gdp import GaussianAccountant
from dpdl.compat.opacus.accountants.prv import PRVAccountant
from dpdl.compat.opacus.accountants.rdp import RDPAccountant
from dpdl.compat.opacus.accountants.registry import create_accountant, register_accountant

__all__ = [
    "GaussianAccountant",
    "IAccountant",
    "PRVAccountant",
    "RDPAccountant",
    "create_accountant",
    "register_accountant",
]
