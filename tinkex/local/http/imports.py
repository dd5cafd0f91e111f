"""What requests need, imported before the first one.

A module that is imported while a request is answered can fail, e.g. when no file descriptor is
left to open its file, and then each later request fails, too.
"""

from __future__ import annotations

import importlib
import importlib.util

_MODULES = (
    "tinkex.wire.json_codec",
    "tinkex.wire.proto_codec",
    "tinkex.wire.proto_writer",
    "tinkex.wire.tinker_public_pb2",
)


def import_for_requests() -> None:
    """Import it all."""
    for name in _MODULES:
        importlib.import_module(name)
    if importlib.util.find_spec("zstandard") is not None:
        importlib.import_module("zstandard")
