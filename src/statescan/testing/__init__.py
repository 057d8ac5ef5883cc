"""What the test suites of this package, and of code that builds on it, check ops with.

Problems (`scan_problem`), float64 oracles written apart from the ops' references (`oracles`), the error budget
(`assert_within_budget`), checks of what is registered with `torch.library` (`recorded_calls`, `check_registration`).
"""

from __future__ import annotations

from statescan.testing.budget import assert_within_budget, unit_roundoff
from statescan.testing.cases import COMPLEX_CASES, REAL_CASES, SCAN_CASES, ScanCase, as_update, scan_problem
from statescan.testing.differentiate import Derivatives, derivatives, random_cotangents
from statescan.testing.registration import check_registration, poisoned_memory, recorded_calls, refusal

__all__ = [
    "COMPLEX_CASES",
    "REAL_CASES",
    "SCAN_CASES",
    "Derivatives",
    "ScanCase",
    "as_update",
    "assert_within_budget",
    "check_registration",
    "derivatives",
    "poisoned_memory",
    "random_cotangents",
    "recorded_calls",
    "refusal",
    "scan_problem",
    "unit_roundoff",
]
