"""The ids that servers hand out: the application's, or the same without colons.

The application's are ``<session>:train:<n>`` and ``<session>:sample:<n>``.  Both forms have the
same length, so that one can replace the other inside a protobuf body.  Pure functions.
"""

from __future__ import annotations

import re

_UUID = rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_WITH_COLONS = re.compile(rb"(" + _UUID + rb"):(train|sample):")
_PLAIN = re.compile(rb"(" + _UUID + rb")_(train|sample)_")


def inward(text: bytes) -> bytes:
    """Return *text* with the application's ids in place of plain ones."""
    return _PLAIN.sub(rb"\1:\2:", text)


def outward(text: bytes) -> bytes:
    """Return *text* with plain ids in place of the application's."""
    return _WITH_COLONS.sub(rb"\1_\2_", text)
