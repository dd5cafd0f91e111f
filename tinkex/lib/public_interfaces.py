"""Where the official SDK keeps its clients: ``tinker.lib.public_interfaces.APIFuture``."""

from __future__ import annotations

from typing import Any

import tinkex


def __getattr__(name: str) -> Any:
    return getattr(tinkex, name)
