"""The engine of torch, transformers and peft; importing it needs the extra ``local``."""

import os
import sys

# torch is imported such that its OpenMP threads sleep while they wait for one another.  By default
# they spin, which is good only while every core is theirs: once anything else wants a core (the
# client's threads, another program), the thread that is waited for cannot run because the others
# spin.  Measured on two cores with one busy neighbour, a small matrix product then takes 12 times
# as long.  The OpenMP library reads the setting once, when torch loads it.
_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
if "torch" not in sys.modules and not any(name in os.environ for name in _SETTINGS):
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        import torch  # noqa: F401
    finally:
        # Child processes of this one must not inherit it.
        del os.environ["OMP_WAIT_POLICY"]

from tinkex.local.engines.torch_engine.engine import TorchEngine  # noqa: E402

__all__ = ["TorchEngine"]
