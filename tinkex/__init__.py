"""tinkex: a threaded, synchronous SDK for the Tinker API.

Fine-tune open-weight language models with LoRA adapters, and sample from them, on someone
else's GPUs.  Names are imported on first use; importing the package starts nothing.

PYTEST_DONT_REWRITE
"""

# The last line of the docstring is for pytest: the package has a plugin (tinkex.testing), so pytest
# would otherwise warn a program that imports tinkex before it starts pytest.

from tinkex._runtime.late_import import names_in_stub
from tinkex._version import __version__ as __version__

__title__ = "tinkex"
__all__, __getattr__, __dir__ = names_in_stub(__spec__)
