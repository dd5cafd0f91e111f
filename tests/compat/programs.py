"""Runs the scripts of this folder, unchanged or with tinkex in place of the official SDK.

Standard library only: the interop tests use this module, too, in the official SDK's environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Mapping

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("supervised", "reinforcement", "checkpoints")
STYLES = ("older", "newer")

#: The only line that differs.
OFFICIAL, OURS = "\nimport tinker\n", "\nimport tinkex as tinker\n"


def source(script: str) -> str:
    """Return the text of a script, which must import the official SDK in exactly one line."""
    text = (Path(__file__).parent / "scripts" / f"{script}.py").read_text()
    assert text.count(OFFICIAL) == 1
    return text


def run_with_tinkex(
    script: str, style: str, url: str, python: str = sys.executable
) -> Mapping[str, Any]:
    """Run *script* with ``import tinkex as tinker``; return what it printed."""
    text = source(script).replace(OFFICIAL, OURS)
    return _run(text, style, url, python, {"PYTHONPATH": str(ROOT)})


def run_with_tinker(script: str, style: str, url: str) -> Mapping[str, Any]:
    """Run *script* unchanged, with the official SDK of this environment."""
    return _run(source(script), style, url, sys.executable, {})


def _run(
    text: str, style: str, url: str, python: str, variables: Mapping[str, str]
) -> Mapping[str, Any]:
    environment = {
        **os.environ,
        "SCRIPT_STYLE": style,
        "TINKER_BASE_URL": url,
        "TINKER_API_KEY": "tml-local",
        "TINKER_TELEMETRY": "0",
        # Scripts of the official SDK do not close their clients.
        "PYTHONWARNINGS": "default,ignore:unclosed ServiceClient:ResourceWarning",
        **variables,
    }
    done = subprocess.run(
        [python, "-c", text], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"it ended with {done.returncode}:\n{done.stderr}"
    results: Mapping[str, Any] = json.loads(done.stdout)
    return {**results, "stderr": done.stderr}
