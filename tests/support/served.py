"""``tinkex serve`` in a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Iterator, Optional

ROOT = Path(__file__).resolve().parents[2]
_SERVE = "from tinkex.cli.serve import serve; serve()"


@contextlib.contextmanager
def tinkex_serve(
    data_dir: Path,
    *options: str,
    model: str,
    python: str = sys.executable,
    cwd: Optional[Path] = None,
    **variables: str,
) -> Iterator[str]:
    """Serve *model* on a free port, and yield the URL; no request may end in a traceback.

    *python* is an interpreter that has the server's dependencies; *variables* are added to this
    process's environment.
    """
    command = [python, "-c", _SERVE, "--model", model, "--port", "0", "--data-dir", str(data_dir)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    log = data_dir / "stderr.txt"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [*command, *options],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            cwd=cwd,
        ) as server,
    ):
        try:
            assert server.stdout is not None
            ready = server.stdout.readline()
            found = re.search(r"http://\S+", ready)
            assert found, f"the server did not start: {ready!r}, {log.read_text()!r}"
            yield found.group()
        finally:
            server.terminate()
        assert server.wait(30) == 0
    assert "Traceback" not in log.read_text(), log.read_text()
