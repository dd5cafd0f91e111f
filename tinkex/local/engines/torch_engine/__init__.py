"""The engine of torch, transformers and peft; importing it needs the extra ``local``.

Importing it before torch makes torch's threads wait passively: see `_threads`.
"""

from tinkex.local.engines.torch_engine import _threads  # first: it acts before torch is imported

from tinkex.local.engines.torch_engine.engine import TorchEngine  # isort: skip

__all__ = ["TorchEngine"]

del _threads
