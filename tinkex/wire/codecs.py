"""Picks the codec for a content type; protobuf is imported when it is first asked for."""

from __future__ import annotations

from tinkex._runtime.late_import import import_late
from tinkex.wire.codec import PROTOBUF_CONTENT_TYPE, Codec


def codec_for(content_type: str) -> Codec:
    """Return the codec of an HTTP ``Content-Type`` value; JSON for whatever is not protobuf."""
    media_type = content_type.partition(";")[0].strip().lower()
    codec: Codec
    if media_type in (PROTOBUF_CONTENT_TYPE, "application/protobuf"):
        codec = import_late("tinkex.wire.proto_codec").PROTOBUF
    else:
        codec = import_late("tinkex.wire.json_codec").JSON
    return codec
