"""SIGTERM with exit_on_sigterm: the step is finished and saved, the session ends, code 143."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import List

import pytest
import requests
from support.programs import PATIENCE_S, environment
from support.threads import wait_until

from tinkex import ServiceClient, read_run
from tinkex.errors import APIConnectionError, InvalidInputError, SessionLostError
from tinkex.local import LocalServer
from tinkex.runs.connection import Connection

SCRIPT = """
import sys
from tinkex import AdamParams, Datum, ModelInput, ServiceClient
batch = [Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3]})]
adam = AdamParams(learning_rate=0.01)
with ServiceClient(base_url=sys.argv[1]) as service:
    with service.open_run(sys.argv[2], "deterministic", rank=4, exit_on_sigterm=True) as run:
        def wait(where):
            print(where, flush=True)
            sys.stdin.readline()
        if sys.argv[3] == "before":
            wait("before the loop")
        if sys.argv[3] == "pipeline":
            for step in run.pipeline([batch] * 20, "cross_entropy", adam, depth=3):
                if step.index == 4:
                    wait("in the pipeline")
        for step in run.steps([batch] * 20):
            run.trainer.forward_backward(batch, "cross_entropy").result()
            if sys.argv[3] == "step" and step.index == 4:
                wait("in a step")
            run.trainer.optim_step(adam).result()
            step.log(done=True)
        print("not reached")
print("not reached")
"""


@pytest.fixture
def script(local: LocalServer, tmp_path: Path) -> List[str]:
    return [sys.executable, "-W", "error", "-c", SCRIPT, local.url, str(tmp_path)]


@pytest.mark.parametrize(("where", "steps"), [("before", [0]), ("step", [5]), ("pipeline", [6, 7])])
def test_sigterm_finishes_and_saves_the_step(
    script: List[str], where: str, steps: List[int], local: LocalServer, tmp_path: Path
) -> None:
    process = started([*script, where])
    process.terminate()
    if where != "before":
        wait_until_it_is_caught(process)
    stdout, stderr = process.communicate("go on\n", timeout=PATIENCE_S)
    assert (process.returncode, stdout, stderr) == (143, "", "")
    record = read_run(tmp_path)
    assert len(record.steps) in steps
    assert [saved.steps for saved in record.checkpoints] == [n for n in [len(record.steps)] if n]
    (session_id,) = requests.get(f"{local.url}/api/v1/sessions", timeout=10).json()["sessions"]
    beat = {"session_id": session_id}
    reply = requests.post(f"{local.url}/api/v1/session_heartbeat", json=beat, timeout=10)
    assert "the client ended it: interrupted" in reply.text


def test_the_second_sigterm_exits_immediately(script: List[str], tmp_path: Path) -> None:
    process = started([*script, "step"])
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < deadline:
        process.terminate()  # signals that arrive together count as one
        wait_until_it_is_caught(process)
    stdout, stderr = process.communicate(timeout=1)  # stdin gets no line that would let it continue
    # A third signal, while it exits, has the system's default effect.
    assert process.returncode in (143, -signal.SIGTERM)
    assert (stdout, stderr) == ("", "")
    assert read_run(tmp_path).checkpoints == []


def test_only_the_main_thread_handles_signals(service: ServiceClient, tmp_path: Path) -> None:
    errors: List[Exception] = []

    def open_there() -> None:
        try:
            service.open_run(tmp_path, "deterministic", exit_on_sigterm=True)
        except InvalidInputError as error:
            errors.append(error)

    thread = threading.Thread(target=open_there)
    thread.start()
    thread.join(PATIENCE_S)
    assert "main thread" in str(errors[0])


def test_the_previous_handler_is_restored(service: ServiceClient, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with service.open_run(tmp_path, "deterministic", exit_on_sigterm=True):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_does_not_wait_for_a_new_session(
    service: ServiceClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def fail(connection: Connection) -> None:
        tried.append(connection)
        raise APIConnectionError("down")

    monkeypatch.setattr(Connection, "_start_anew", fail)
    monkeypatch.setattr(
        "tinkex.runs.connection.time.sleep",
        lambda pause_s: signal.raise_signal(signal.SIGTERM) if pause_s else None,
    )

    def lose_the_session() -> None:
        with service.open_run(
            tmp_path, "deterministic", exit_on_sigterm=True, on_session_loss="resume"
        ) as run:
            for step in run.steps([1, 2]):
                with step:
                    raise SessionLostError("lost")

    with pytest.raises(SystemExit, match="143"):
        lose_the_session()
    assert len(tried) == 1


def started(command: List[str]) -> subprocess.Popen[str]:
    """Start the script; return once it is waiting."""
    process = subprocess.Popen(
        command,
        env=environment(None),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def wait_until_it_is_caught(process: subprocess.Popen[str]) -> None:
    """Wait until Python has taken the signal, so that it is no longer pending."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        pytest.skip("needs /proc")

    def is_caught() -> bool:
        return process.poll() is not None or not any(
            int(line.split()[1], 16)
            for line in status.read_text().splitlines()
            if line.startswith(("SigPnd", "ShdPnd"))
        )

    wait_until(is_caught, "the signal is caught")
