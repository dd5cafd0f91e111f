"""The server that ServiceClient.local starts ends with its client, whether closed or forgotten."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any, List

import pytest
import requests

from tinkex import ServiceClient
from tinkex.errors import LocalServerError
from tinkex.local import LocalServer
from tinkex.local.engines.deterministic import DeterministicEngine

#: The warning about a forgotten client.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed ServiceClient:ResourceWarning")

WAIT_S = 60.0


def local(**settings: Any) -> ServiceClient:
    return ServiceClient.local("deterministic", **settings)


def own_threads() -> List[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("tinkex-")]


class Watched:
    """Objects that must be freed once nothing can reach the server of *service*."""

    def __init__(self, service: ServiceClient) -> None:
        server = service._server
        self.thread = server._thread
        self.engine_thread = server._backend.engine_thread._thread
        self.folder = server.data_dir
        self.engine_is_gone = threading.Event()
        weakref.finalize(server._engine, self.engine_is_gone.set)

    def assert_running(self) -> None:
        gc.collect()
        assert self.thread.is_alive()
        assert self.engine_thread.is_alive()

    def assert_gone(self) -> None:
        for thread in (self.thread, self.engine_thread):
            thread.join(WAIT_S)
            assert not thread.is_alive()
        # An HTTP thread that is still ending may hold a reference until then.
        deadline = time.monotonic() + WAIT_S
        while not self.engine_is_gone.wait(0.05) and time.monotonic() < deadline:
            gc.collect()
        assert self.engine_is_gone.is_set()


def test_a_rerun_notebook_cell_leaves_one_server() -> None:
    service = local()
    trainer = service.create_lora_training_client("deterministic", rank=4)
    watched = [Watched(service)]
    for _ in range(3):
        service = local()
        trainer = service.create_lora_training_client("deterministic", rank=4)
        watched.append(Watched(service))
        gc.collect()
    for old in watched[:-1]:
        old.assert_gone()
        assert not old.folder.exists()
    assert own_threads().count("tinkex-engine") == own_threads().count("tinkex-server") == 1
    assert trainer.save_state("a").result(WAIT_S).path
    service.close()
    watched[-1].assert_gone()


def test_a_server_lives_as_long_as_a_client_of_it() -> None:
    service = local()
    watched = Watched(service)
    sampler = service.create_lora_training_client("deterministic").create_sampling_client(
        service.create_lora_training_client("deterministic", rank=4)
        .save_weights_for_sampler("a").result(WAIT_S).path
    )  # fmt: skip
    del service
    watched.assert_running()
    assert sampler.get_base_model() == "deterministic"
    del sampler
    gc.collect()
    watched.assert_gone()


def test_a_closed_client_does_not_keep_the_model_in_memory() -> None:
    service = local()
    watched = Watched(service)
    trainer = service.create_lora_training_client("deterministic", rank=4)
    service.close()
    watched.assert_gone()
    del service, trainer


def test_a_dropped_server_lives_on_for_its_other_clients() -> None:
    service = local()
    watched = Watched(service)
    with ServiceClient(base_url=service.config.base_url) as other:
        del service
        gc.collect()
        trainer = other.create_lora_training_client("deterministic", rank=4)
        assert trainer.save_state("a").result(WAIT_S).path
        watched.assert_running()
    watched.assert_gone()


def test_a_dropped_server_sends_the_response_to_the_request_that_ended_its_last_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = LocalServer(DeterministicEngine())
    server.start()
    backend, http, thread = server._backend, server._http, server._thread
    session_id = backend.create_session({})
    finish, serve_once = backend.finish_session, http.serve_once
    ended, served = threading.Event(), threading.Event()

    def finish_slowly(*args: Any) -> None:
        finish(*args)
        ended.set()
        served.wait(WAIT_S)

    def serve_after_the_end(timeout_s: float) -> None:
        if ended.is_set():
            served.set()
        serve_once(timeout_s)

    monkeypatch.setattr(backend, "finish_session", finish_slowly)
    monkeypatch.setattr(http, "serve_once", serve_after_the_end)
    server.drop()
    url = f"{server.url}/api/v1/sessions/{session_id}/finish"
    assert requests.post(url, json={}, timeout=WAIT_S).ok
    assert served.is_set()
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_a_folder_that_this_process_uses_is_reported_as_such(tmp_path: Path) -> None:
    service = local(data_dir=str(tmp_path))
    with pytest.raises(LocalServerError, match="another server of this process") as refused:
        local(data_dir=str(tmp_path))
    assert "service.close()" in str(refused.value)
    service.close()
    local(data_dir=str(tmp_path)).close()


def test_a_folder_that_another_process_uses_is_reported_as_such(tmp_path: Path) -> None:
    script = f"""
import tinkex
tinkex.ServiceClient.local("deterministic", data_dir={str(tmp_path)!r})
print("ready", flush=True)
input()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(LocalServerError, match="another tinkex server"):
            local(data_dir=str(tmp_path))
        process.communicate(b"\n", timeout=WAIT_S)
    local(data_dir=str(tmp_path)).close()


def test_the_folder_of_a_dropped_client_can_be_used_at_once(tmp_path: Path) -> None:
    for _ in range(3):
        service = local(data_dir=str(tmp_path))
        service.create_lora_training_client("deterministic", rank=4)
        del service
        # The client is garbage in a cycle; the next server finds this out, and waits for the end of
        # the old one.
        last = local(data_dir=str(tmp_path))
        assert last.create_rest_client().list_training_runs().result(WAIT_S).training_runs
        last.close()
