"""Ctrl-C while a program waits ends it immediately, with nothing but its own traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.scripted_server import PATIENCE_S, Answer, ScriptedServer
from support.threads import promptly
from support.tinker_routes import TinkerRoutes

import tinkex

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")

#: Waits with a limit of some seconds get a minute, so that they cannot be taken for a slow machine.
PATIENT = """
from tinkex import ServiceClient
from tinkex._runtime import lifecycle
from tinkex._sessions import session_record

lifecycle.EXIT_BUDGET_S = session_record.FINISH_S = 60.0
ServiceClient.close.__defaults__ = (*ServiceClient.close.__defaults__[:-1], 60.0)
"""

TRAIN = """
import sys
from tinkex import ServiceClient, types

datum = types.Datum(types.ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3]})
service = ServiceClient(base_url=sys.argv[1])
if sys.argv[2] == "with":
    service.__enter__()
trainer = service.create_lora_training_client("base")
future = trainer.forward_backward([datum], "cross_entropy")
print("waiting", flush=True)
if sys.argv[2] == "with":
    try:
        future.result()
    except BaseException:
        service.__exit__(*sys.exc_info())
        raise
future.result()
"""

CONSTRUCT = """
import sys
from tinkex import ServiceClient

print("waiting", flush=True)
ServiceClient(base_url=sys.argv[1])
"""


def run_until_waiting(script: str, *arguments: str) -> subprocess.Popen[str]:
    root = str(Path(tinkex.__file__).resolve().parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", PATIENT + script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root, "PYTHONWARNINGS": "default"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    return process


def interrupt(process: subprocess.Popen[str]) -> str:
    """Send SIGINT; return what the program wrote to stderr on its way out.

    The program should wait for nothing; the time allows for the interpreter on a busy machine.
    """
    try:
        with promptly():
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait(PATIENCE_S)
    assert process.returncode == -signal.SIGINT
    return errors


def assert_only_a_traceback(errors: str) -> None:
    assert errors.startswith("Traceback (most recent call last):")
    assert errors.count("Traceback") == 1
    assert errors.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize("style", ["with", "bare"])
def test_ctrl_c_during_result(server: ScriptedServer, style: str) -> None:
    routes = TinkerRoutes(server)
    routes.serve("retrieve_future", routes.retrieve, Answer(hold=None, drop=True))
    polled = "POST /api/v1/retrieve_future"
    process = run_until_waiting(TRAIN, server.url, style)
    server.wait_for(polled, 2)
    assert_only_a_traceback(interrupt(process))
    # The server learns how the program ended, even without a `with`.
    assert [f["reason"] for f in routes.finished] == [{"type": "interrupted"}]


def test_ctrl_c_during_construction(server: ScriptedServer) -> None:
    server.on("POST /api/v1/create_session", Answer(503))
    process = run_until_waiting(CONSTRUCT, server.url)
    server.wait_for("POST /api/v1/create_session")
    # The client waits at most a second for a session that may still arrive.
    assert_only_a_traceback(interrupt(process))


SAMPLE = """
import sys
import threading
from tinkex import ServiceClient, types

service = ServiceClient(base_url=sys.argv[1])
sampler = service.create_sampling_client(base_model="base")
futures = [sampler.sample(types.ModelInput.from_ints([1])) for _ in range(int(sys.argv[2]))]
print("waiting", flush=True)
if sys.argv[3] == "with":
    with service:
        futures[0].result()
futures[0].result()
"""


@pytest.mark.parametrize("style", ["with", "bare"])
def test_ctrl_c_while_hundreds_of_samples_wait_in_the_batch_poller(
    server: ScriptedServer, style: str
) -> None:
    routes = TinkerRoutes(server)
    routes.serve("client/config", Answer(body={"sample_use_retrieve_futures": True}))
    routes.serve("retrieve_futures", Answer(hold=threading.Event()))
    process = run_until_waiting(SAMPLE, server.url, "300", style)
    server.wait_for("POST /api/v1/asample", 300)
    server.wait_for("POST /api/v1/retrieve_futures")
    assert_only_a_traceback(interrupt(process))
    assert [f["reason"] for f in routes.finished] == [{"type": "interrupted"}]


UNREAD = """
import logging
import sys
from tinkex import ServiceClient, types

class Told(logging.Handler):
    def emit(self, record):
        assert "it waits forever" in record.getMessage()
        print("waiting", flush=True)

logging.getLogger("tinkex._transport.limits").addHandler(Told())
service = ServiceClient(base_url=sys.argv[1], max_unread=2, notice_after_s=0.05)
sampler = service.create_sampling_client(base_model="base")
futures = [sampler.sample(types.ModelInput.from_ints([1])) for _ in range(3)]
"""


def test_ctrl_c_while_the_only_thread_waits_for_itself_to_read(server: ScriptedServer) -> None:
    routes = TinkerRoutes(server)
    process = run_until_waiting(UNREAD, server.url)
    assert_only_a_traceback(interrupt(process))
    assert len(routes.submitted("asample")) == 2


COMPILE = """
import atexit
import sys
import threading
from tinkex import ServiceClient

service = ServiceClient(base_url=sys.argv[1])
# Stands for a module with dataclasses that a thread of ours imports after the Ctrl-C: the
# interpreter clears its note of an unhandled KeyboardInterrupt whenever source text is executed.
atexit.register(lambda: exec("compiled = True"))
print("waiting", flush=True)
threading.Event().wait()
"""


def test_ctrl_c_although_source_text_is_executed_at_exit(server: ScriptedServer) -> None:
    TinkerRoutes(server)
    process = run_until_waiting(COMPILE, server.url)
    assert_only_a_traceback(interrupt(process))
