"""The engine of torch, transformers and peft; importing it needs the extra ``local``."""

from tinkex.local.torch_engine.engine import TorchEngine

__all__ = ["TorchEngine"]
