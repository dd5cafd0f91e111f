"""The engine built on torch, transformers and peft; importing it needs the extra ``local``."""

import os
import sys

# Import torch so that its OpenMP threads sleep while they wait for one another.  By default they
# spin, which pays only while they have every core to themselves: once anything else wants a core
# (the client's threads, another program), the spinning threads keep the one they wait for from
# running.  Measured on two cores with one busy neighbour, a small matrix product then takes 12
# times as long.  The OpenMP library reads the setting once, when torch loads it.
_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
if "torch" not in sys.modules and not any(name in os.environ for name in _SETTINGS):
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        import torch  # noqa: F401
    finally:
        # Child processes must not inherit it.
        del os.environ["OMP_WAIT_POLICY"]

from tinkex.local.engines.torch_engine.engine import TorchEngine  # noqa: E402

__all__ = ["TorchEngine"]
