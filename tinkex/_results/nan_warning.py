"""NaNWarning: logs once that the logprobs of a run or of a sampler are not numbers."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


class NaNWarning:
    """The warning of one *owner*, ``"run ..."`` or ``"sampler ..."``.

    Attributes:
        shown: it was logged.  Two threads that race may both log it.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self.shown = False

    def show(self, where: str) -> None:
        """Log that the logprobs of *where* hold NaN, unless some did before."""
        if self.shown:
            return
        self.shown = True
        logger.warning(
            "%s: the server returned NaN for logprobs of %s. This usually means a token id beyond "
            "the model's vocabulary: does the tokenizer belong to the base model? "
            "(this warning is shown once)",
            self._owner,
            where,
        )
