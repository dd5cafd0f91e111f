"""Ctrl-C ends every example with one line and no traceback."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
from support.programs import REPOSITORY

import tinkex

EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_ctrl_c_ends_an_example_with_one_line(
    example: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for package in ("flask", "waitress", "rich"):
        pytest.importorskip(package)
    service = mock.Mock(side_effect=KeyboardInterrupt)
    service.local.side_effect = KeyboardInterrupt
    monkeypatch.setattr(tinkex, "ServiceClient", service)
    monkeypatch.setattr(sys, "argv", [str(example)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(example), run_name="__main__")
    code = end.value.code  # a string is written to stderr when the process ends
    assert code
    assert "Interrupted" in f"{code}{capsys.readouterr().out}"
