"""Settings of property tests: the same examples every time, however fast the machine is."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

#: The share of the examples to try.  tox tries all of them on one Python, and fewer on the others.
SHARE = float(os.environ.get("TINKEX_EXAMPLES", "1"))


def several(examples: int) -> settings:
    """Return the settings of a property that is tried with SHARE of *examples* examples."""
    return settings(
        max_examples=max(5, round(examples * SHARE)),
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
