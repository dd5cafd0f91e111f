"""Which codec is chosen, and that protobuf is imported only when needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tinkex.wire.codec import codec_for


@pytest.mark.parametrize(
    ("content_type", "name"),
    [
        ("application/json", "json"),
        ("application/json; charset=utf-8", "json"),
        ("", "json"),
        ("text/plain", "json"),
        ("application/x-protobuf", "protobuf"),
        ("Application/X-Protobuf; messageType=x", "protobuf"),
        ("application/protobuf", "protobuf"),
    ],
)
def test_the_content_type_chooses(content_type, name):
    codec = codec_for(content_type)
    assert codec.name == name
    assert codec_for(codec.content_type) is codec


def test_protobuf_is_imported_only_when_it_is_used():
    script = (
        "import sys\n"
        "from tinkex.wire.codec import codec_for\n"
        "codec_for('application/json')\n"
        "assert 'google.protobuf' not in sys.modules\n"
        "codec_for('application/x-protobuf')\n"
        "assert 'google.protobuf' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=60)
