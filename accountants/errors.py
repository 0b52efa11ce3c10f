"""The root of the project's exceptions, and the two that accounting raises.

    PrivacyError                      everything that this project raises on purpose
    ├── ParameterError (ValueError)   a number outside its range, a combination with no meaning
    └── UnsupportedEventError         a sound question that this accountant has no proof for

`dpdl.errors` continues the tree with what training can get wrong.
"""

from __future__ import annotations


class PrivacyError(Exception):
    """Base of every exception that this project raises on purpose."""


class ParameterError(PrivacyError, ValueError):
    """A parameter is out of range, or contradicts another; nothing was computed or spent."""


class UnsupportedEventError(PrivacyError):
    """The accountant has no proof for this event under this neighbouring relation."""
