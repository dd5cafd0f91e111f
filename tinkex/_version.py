"""The package's version, in one place: setup.cfg and the wire both read it from here."""

__version__ = "0.1.0"

#: The protocol generation we speak and claim in ``sdk_version`` fields; servers pick
#: their flags by it (docs/protocol.md, "Server flags").
PROTOCOL_VERSION = "0.38.0"
