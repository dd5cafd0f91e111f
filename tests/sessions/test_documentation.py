"""docs/sessions.md quotes every log line about sessions exactly."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Iterator, List

ROOT = Path(__file__).resolve().parents[2]
#: The modules of _sessions/ about sessions and heartbeats.
MODULES = (
    "session.py",
    "runtime.py",
    "manager.py",
    "heartbeat.py",
    "registry.py",
    "session_record.py",
    "session_table.py",
    "beat_queue.py",
)
LEVELS = {"info", "warning", "error", "log"}


def log_formats() -> Iterator[str]:
    """Return the format of every message that a user may see."""
    for path in (ROOT / "tinkex" / "_sessions" / name for name in MODULES):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            called, _, level = ast.unparse(call.func).partition(".")
            if called == "logger" and level in LEVELS:
                texts = [a.value for a in call.args if isinstance(a, ast.Constant)]
                yield next(text for text in texts if isinstance(text, str))


def as_pattern(text: str) -> str:
    return "".join(
        ".*" if re.fullmatch(r"%[.0-9]*[sdf]", part) else re.escape(part)
        for part in re.split(r"(%[.0-9]*[sdf])", text)
    )


def quoted() -> List[str]:
    page = (ROOT / "docs" / "sessions.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)


def test_every_log_line_is_explained_and_every_quoted_line_exists() -> None:
    patterns = {as_pattern(text) for text in log_formats()}
    lines = [line for line in quoted() if " " in line]
    assert len(patterns) >= 10
    for pattern in patterns:
        assert any(re.fullmatch(pattern, line) for line in lines), f"not explained: {pattern}"
    for line in lines:
        assert any(re.fullmatch(pattern, line) for pattern in patterns), f"no such line: {line}"


def test_the_page_gives_the_right_defaults_of_settings() -> None:
    from tinkex.config import Config

    page = (ROOT / "docs" / "sessions.md").read_text(encoding="utf-8")
    config = Config("http://localhost")
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", page, flags=re.MULTILINE)
    assert len(rows) >= 4
    for name, default in rows:
        value = getattr(config, name)
        assert default == (str(value) if isinstance(value, bool) else f"{value:g}"), name
