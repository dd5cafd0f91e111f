"""tinkex: a threaded, synchronous SDK for the Tinker API.

Fine-tune open-weight language models with LoRA adapters, and sample from them, on someone
else's GPUs.  Names are imported when first used; importing the package starts nothing.

PYTEST_DONT_REWRITE
"""

# The last line of the docstring is for pytest.  Since the package has a plugin (tinkex.testing), a
# program that had imported tinkex when it started pytest would be warned otherwise.

from tinkex._runtime.late_import import names_in_stub
from tinkex._version import __version__ as __version__

__title__ = "tinkex"
__all__, __getattr__, __dir__ = names_in_stub(__spec__)
