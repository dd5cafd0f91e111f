"""zstd compression of request bodies, where ``zstandard`` is installed (the ``zstd`` extra)."""

from __future__ import annotations

import functools

from tinkex._runtime.late_import import import_late


@functools.cache
def can_compress() -> bool:
    """True if ``zstandard`` is installed; it is imported when this is first asked."""
    try:
        import_late("zstandard")
    except ImportError:
        return False
    return True


def compress(body: bytes) -> bytes:
    """Return *body* as one zstd frame.  Only where `can_compress` is true."""
    frame: bytes = import_late("zstandard").ZstdCompressor().compress(body)
    return frame
