"""The official SDK's path to its clients, as in ``tinker.lib.public_interfaces.APIFuture``."""

from __future__ import annotations

from typing import Any

import tinkex


def __getattr__(name: str) -> Any:
    return getattr(tinkex, name)
