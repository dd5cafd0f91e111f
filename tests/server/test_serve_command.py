"""``tinkex serve`` as a process: ready line, signals, errors."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Tuple

import pytest
import requests
from click.testing import CliRunner

from tinkex.cli.serve import default_data_dir, serve

SERVE = [sys.executable, "-c", "from tinkex.cli.serve import serve; serve()"]
ARGUMENTS = ["--model", "deterministic", "--port", "0"]


def start(data_dir: Path, *options: str) -> Tuple[subprocess.Popen, str]:
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(
        [*SERVE, *ARGUMENTS, "--data-dir", str(data_dir), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert process.stdout is not None
    ready = process.stdout.readline()
    found = re.search(r"TINKER_BASE_URL=(http://127\.0\.0\.1:\d+)", ready)
    assert found, ready
    return process, found.group(1)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)], ids=["SIGINT", "SIGTERM"]
)
def test_it_is_ready_when_it_says_so_and_ends_when_told(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process, url = start(tmp_path)
    with process, urllib.request.urlopen(f"{url}/api/v1/healthz", timeout=20) as answer:
        assert answer.status == 200
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
        assert process.returncode == code
        assert out == ""
        assert "Traceback" not in err
    assert (tmp_path / "tinkex.sqlite3").exists()


def test_it_answers_for_the_hosts_that_it_is_told_of_and_no_others(tmp_path: Path) -> None:
    process, url = start(tmp_path, "--allow-host", "a.example", "--allow-host", "b.example")
    with process:
        for host, status in (("a.example", 200), ("B.example:80", 200), ("c.example", 421)):
            headers = {"Host": host}
            assert requests.get(f"{url}/api/v1/healthz", headers=headers).status_code == status
        process.terminate()
        process.communicate(timeout=20)
    result = CliRunner().invoke(serve, [*ARGUMENTS, "--allow-host", "http://a.example"])
    assert result.exit_code == 1
    assert "not the name of a host" in result.output


def test_errors_are_one_message_and_exit_code_1(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(serve, ["--model", "deterministic", "--port", port])
    assert result.exit_code == 1
    assert f"port {port} on 127.0.0.1 is in use" in result.output
    result = CliRunner().invoke(serve, [*ARGUMENTS, "--host", "0.0.0.0"])
    assert result.exit_code == 1
    assert "--api-key" in result.output
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(serve, [*ARGUMENTS, "--data-dir", str(tmp_path / "file" / "x")])
    assert result.exit_code == 1
    assert "cannot use the data directory" in result.output


def test_data_lives_in_the_users_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_data_dir() == tmp_path / "tinkex" / "server"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_data_dir() == tmp_path / ".local" / "share" / "tinkex" / "server"
