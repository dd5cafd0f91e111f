"""``tinkex serve`` as a process: ready line, signals, errors."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Tuple

import pytest
import requests
from click.testing import CliRunner
from support.programs import STRICT
from support.threads import PATIENCE_S, wait_until

from tinkex import ServiceClient
from tinkex.cli.serve import default_data_dir, serve
from tinkex.errors import LocalServerError
from tinkex.local import LocalServer
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.types import Datum, ModelInput, SamplingParams

SERVE = [sys.executable, *STRICT, "-c", "from tinkex.cli.serve import serve; serve()"]
ARGUMENTS = ["--model", "deterministic", "--port", "0"]


def start(data_dir: Path, *options: str) -> Tuple[subprocess.Popen, str]:
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(
        [*SERVE, *ARGUMENTS, "--data-dir", str(data_dir), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root, "TINKEX_NO_STATUS": "1"},
    )
    assert process.stdout is not None
    ready = process.stdout.readline()
    found = re.search(r"TINKER_BASE_URL=(http://127\.0\.0\.1:\d+)", ready)
    assert found, ready
    return process, found.group(1)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)], ids=["SIGINT", "SIGTERM"]
)
def test_serve_is_ready_when_it_says_so_and_ends_at_sigterm_or_ctrl_c(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process, url = start(tmp_path)
    with process, urllib.request.urlopen(f"{url}/api/v1/healthz", timeout=PATIENCE_S) as answer:
        assert answer.status == 200
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == code
        assert out == ""
        assert "Traceback" not in err
    assert (tmp_path / "tinkex.sqlite3").exists()


def test_serve_responds_only_to_the_hosts_that_it_is_given(tmp_path: Path) -> None:
    process, url = start(tmp_path, "--allow-host", "a.example", "--allow-host", "b.example")
    with process:
        for host, status in (("a.example", 200), ("B.example:80", 200), ("c.example", 421)):
            headers = {"Host": host}
            assert requests.get(f"{url}/api/v1/healthz", headers=headers).status_code == status
        process.terminate()
        process.communicate(timeout=PATIENCE_S)
    result = CliRunner().invoke(serve, [*ARGUMENTS, "--allow-host", "http://a.example"])
    assert result.exit_code == 1
    assert "not the name of a host" in result.output


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        (signal.SIGINT, signal.SIGINT, 130),
        (signal.SIGINT, signal.SIGTERM, 130),
        (signal.SIGTERM, signal.SIGINT, 0),
        (signal.SIGTERM, signal.SIGTERM, 0),
    ],
)
def test_the_first_signal_decides_and_further_ones_are_harmless(
    tmp_path: Path, first: signal.Signals, second: signal.Signals, code: int
) -> None:
    process, url = start(tmp_path)
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    with process:
        process.send_signal(first)

        def seen() -> bool:
            process.send_signal(first)
            return not listens(address)

        wait_until(seen, "it has seen the first signal")
        for _ in range(3):
            process.send_signal(second)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code
    assert out == ""
    assert err == "stopped\n"


def listens(address: Tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) == 0


@pytest.mark.parametrize("quiet", [False, True])
def test_each_request_is_logged_unless_the_server_is_quiet(tmp_path: Path, quiet: bool) -> None:
    process, url = start(tmp_path, *(["--quiet"] if quiet else []))
    with process:
        with urllib.request.urlopen(f"{url}/api/v1/healthz?secret=1", timeout=PATIENCE_S) as answer:
            assert answer.status == 200
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{url}/nowhere%0Aelse", timeout=PATIENCE_S)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (0, "")
    if quiet:
        assert err == "stopped\n"
        return
    found, missing, _ = err.splitlines()
    line = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d GET %s %d \d+\.\d ms"
    assert re.fullmatch(line % ("/api/v1/healthz", 200), found)
    assert re.fullmatch(line % ("/nowhere%0Aelse", 404), missing)


@pytest.mark.engine
def test_training_and_sampling_print_no_warnings_from_libraries(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    process, url = start(tmp_path, "--model", "tiny-random", "--quiet")
    with process:
        with ServiceClient(base_url=url, api_key="tml-test") as service:
            trainer = service.create_lora_training_client(base_model="tiny-random", rank=4).result()
            inputs = {"target_tokens": [2, 3], "weights": [1.0, 1.0]}
            datum = Datum(ModelInput.from_ints([1, 2]), inputs)
            trainer.forward_backward([datum], "cross_entropy").result()
            sampler = trainer.save_weights_and_get_sampling_client()
            params = SamplingParams(max_tokens=20)
            sampler.sample(ModelInput.from_ints([1, 2]), 1, params).result()
        body = b'{"model": "tiny-random", "prompt": "hello"}'
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/completions", body, headers)
        urllib.request.urlopen(request, timeout=PATIENCE_S).close()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=PATIENCE_S)
    assert "Warning" not in err


def test_a_log_that_cannot_be_written_fails_no_request(tmp_path: Path) -> None:
    process, url = start(tmp_path)
    with process:
        assert process.stderr is not None
        process.stderr.close()
        for _ in range(3):
            with urllib.request.urlopen(f"{url}/api/v1/healthz", timeout=PATIENCE_S) as answer:
                assert answer.status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE_S) == 0


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


def test_a_folder_that_cannot_be_used_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    monkeypatch.setattr("tinkex.local.server.load_engine", lambda *_, **__: loaded.append(1))
    with LocalServer(DeterministicEngine(), data_dir=tmp_path):
        result = CliRunner().invoke(serve, [*ARGUMENTS, "--data-dir", str(tmp_path)])
        assert result.exit_code == 1
        assert f"{tmp_path} is in use" in result.output
        assert "choose another folder (--data-dir).\n" in result.output
        with pytest.raises(LocalServerError, match="in use by another server of this process"):
            ServiceClient.local("deterministic", data_dir=str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalServerError, match=r"data directory .*file: it is a file\n"):
        ServiceClient.local("deterministic", data_dir=str(tmp_path / "file"))
    assert loaded == []


def test_data_is_kept_in_the_users_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_data_dir() == tmp_path / "tinkex" / "server"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_data_dir() == tmp_path / ".local" / "share" / "tinkex" / "server"
