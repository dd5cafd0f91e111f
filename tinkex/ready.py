"""Ready: lets what a blocking creator returns pass for the future it once was."""

from __future__ import annotations

from typing import Optional, TypeVar

S = TypeVar("S", bound="Ready")


class Ready:
    """Has ``result``, so that scripts for the official SDK's newer style run unchanged."""

    def result(self: S, timeout: Optional[float] = None) -> S:
        """Return this client itself, at once; *timeout* has no effect."""
        return self
