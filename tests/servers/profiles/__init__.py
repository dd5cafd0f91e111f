"""Imitations of the other servers of the protocol; see tests/servers/README.md."""

from __future__ import annotations

from servers.profiles.profile import Profile
from servers.profiles.server import ProfiledServer
from servers.profiles.table import NAMES, profile_named

__all__ = ["NAMES", "Profile", "ProfiledServer", "profile_named"]
