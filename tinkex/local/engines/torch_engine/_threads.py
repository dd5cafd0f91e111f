"""Imports torch so that its OpenMP threads sleep while they wait for one another.

By default they spin, which is good while every core is theirs alone.  As soon as anything else
wants a core (the client's own threads, another program), the one that is waited for cannot run
because the others spin: measured on two cores with one busy neighbour, a small matrix product is
12 times slower spinning than sleeping.  The OpenMP library reads the setting once, as torch loads
it; an environment that sets something else, and a torch that is there already, are left alone.
"""

import os
import sys

_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

if "torch" not in sys.modules and not any(name in os.environ for name in _CHOICES):
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        import torch  # noqa: F401
    finally:
        # Not for the processes that this one starts.
        del os.environ["OMP_WAIT_POLICY"]
