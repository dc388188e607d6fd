"""Weight standardization and gains as module parametrizations, and the way back to plain weights.

``from hf_rotational import standardize`` finds this package, and calling it is calling its :func:`standardize`.
"""

from __future__ import annotations

import sys
from types import ModuleType

from hf_rotational.standardize.modules import fold, is_standardized, standardize
from hf_rotational.standardize.parametrization import MODES
from hf_rotational.standardize.report import StandardizationReport
from hf_rotational.standardize.state import load_raw_state_dict, raw_state_dict, raw_state_dicts

__all__ = [
    "MODES",
    "StandardizationReport",
    "fold",
    "is_standardized",
    "load_raw_state_dict",
    "raw_state_dict",
    "raw_state_dicts",
    "standardize",
]


class _CallablePackage(ModuleType):
    # The function has the name that the package has, and Python lets the package win in ``hf_rotational.standardize``.
    __call__ = staticmethod(standardize)


sys.modules[__name__].__class__ = _CallablePackage
