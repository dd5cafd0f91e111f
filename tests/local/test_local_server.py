"""The server with its sockets: start, port, key, held polls, and a clean end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import pytest
from local.harness import Api, HeldEngine, held_datum, serving
from support.threads import promptly, wait_until

from tinkex import ServiceClient
from tinkex.errors import LocalServerError
from tinkex.local import LocalServer, load_engine
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.engines.engine import EngineInfo
from tinkex.local.http.threads import HttpThreads
from tinkex.local.settings import ServerSettings
from tinkex.types import ForwardBackwardRequest
from tinkex.wire.proto_codec import PROTOBUF


def send(
    server: LocalServer,
    route: str,
    body: Any = None,
    *,
    content_type: str = "application/json",
    headers: Optional[Dict[str, str]] = None,
) -> Tuple[int, Any]:
    data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{server.url}/api/v1/{route}",
        data=data,
        headers={"Content-Type": content_type, **(headers or {})},
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def post(server: LocalServer, route: str, **body: Any) -> Any:
    status, answer = send(server, route, body)
    assert status == 200, answer
    return answer


def own_threads() -> List[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("tinkex-")]


def start_model(server: LocalServer) -> str:
    session = post(server, "create_session")["session_id"]
    made = post(
        server, "create_model", session_id=session, model_seq_id=0, base_model="deterministic"
    )
    return str(post(server, "retrieve_future", request_id=made["request_id"])["model_id"])


def test_the_server_serves_and_leaves_nothing_behind() -> None:
    with LocalServer(load_engine("deterministic")) as server:
        assert send(server, "healthz") == (200, {"status": "ok"})
        model = start_model(server)
        made = post(server, "optim_step", model_id=model, seq_id=1, adam_params={})
        assert "metrics" in post(server, "retrieve_future", request_id=made["request_id"])
        folder, url = server.data_dir, server.url
        assert folder.exists()
    assert own_threads() == []
    assert not folder.exists()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{url}/api/v1/healthz", timeout=5)


def test_a_data_folder_given_by_the_caller_is_kept(tmp_path: Path) -> None:
    for expected in (0, 1):
        with LocalServer(DeterministicEngine(), data_dir=tmp_path) as server:
            assert len(send(server, "training_runs")[1]["training_runs"]) == expected
            start_model(server)
    assert (tmp_path / "tinkex.sqlite3").exists()


def test_a_body_of_several_megabytes_arrives_whole() -> None:
    with LocalServer(DeterministicEngine()) as server:
        model = start_model(server)
        tokens = list(range(1, 10_001))
        from tinkex.types import Datum, ModelInput

        data = [Datum(ModelInput.from_ints(tokens), {"target_tokens": tokens})] * 40
        body = PROTOBUF.encode_forward_backward(
            ForwardBackwardRequest(model, 1, data, "cross_entropy")
        )
        assert len(body) > 4_000_000
        status, made = send(server, "forward_backward", body, content_type=PROTOBUF.content_type)
        assert status == 200
        output = post(server, "retrieve_future", request_id=made["request_id"])
        assert len(output["loss_fn_outputs"]) == 40


def test_a_taken_port_is_named() -> None:
    with LocalServer(DeterministicEngine()) as first:
        port = int(first.url.rpartition(":")[2])
        second = LocalServer(DeterministicEngine(), port=port)
        with pytest.raises(LocalServerError, match=f"port {port} on 127.0.0.1 is in use") as taken:
            second.start()
        assert "--port" in str(taken.value)
        second.close()
        assert send(first, "healthz")[0] == 200


def test_an_invalid_port_or_host_is_refused() -> None:
    with pytest.raises(LocalServerError, match="port is 70000; it must be an integer, 0 to 65535"):
        LocalServer(DeterministicEngine(), port=70000).start()
    with pytest.raises(LocalServerError, match="port is 'http'; it must be an integer"):
        LocalServer(DeterministicEngine(), port="http").start()  # type: ignore[arg-type]
    with pytest.raises(LocalServerError, match=r"cannot bind to 192\.0\.2\.1") as refused:
        LocalServer(DeterministicEngine(), host="192.0.2.1", api_key="k").start()
    assert refused.value.hint == "Give an address of this machine (--host, host=...)."
    assert own_threads() == []


def test_a_failed_start_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "file").write_text("")
    server = LocalServer(DeterministicEngine(), data_dir=tmp_path / "file")
    with pytest.raises(LocalServerError, match="data directory"):
        server.start()
    monkeypatch.setattr("tinkex.local.state.database._SCHEMA", "nonsense")
    with pytest.raises(LocalServerError, match="data directory"):
        LocalServer(DeterministicEngine()).start()
    monkeypatch.undo()
    kept = tmp_path / "kept"
    monkeypatch.setattr("tinkex.local.http.serving.HttpServer", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        LocalServer(DeterministicEngine(), data_dir=kept).start()
    monkeypatch.undo()
    LocalServer(DeterministicEngine(), data_dir=kept).close()
    with LocalServer(DeterministicEngine(), data_dir=kept):  # the lock was released
        pass
    (kept / "server.lock").unlink()
    (kept / "tinkex.sqlite3").unlink()
    kept.rmdir()
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_server_can_be_started_only_once() -> None:
    server = LocalServer(DeterministicEngine())
    with pytest.raises(LocalServerError, match="not started"):
        _ = server.url
    with server, pytest.raises(LocalServerError, match="started before"):
        server.start()
    server.close()  # a second time does nothing
    with pytest.raises(LocalServerError, match="started before"):
        server.start()


def test_beyond_loopback_a_key_is_needed() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.1"):
        with pytest.raises(LocalServerError, match="everybody on the network") as problem:
            LocalServer(DeterministicEngine(), host=host)
        assert "--api-key" in str(problem.value)
    with LocalServer(DeterministicEngine(), host="0.0.0.0", api_key="tml-secret") as server:
        assert send(server, "healthz")[0] == 200
        assert send(server, "create_session", {})[0] == 401


def test_a_key_is_required_everywhere_but_on_healthz(tmp_path: Path) -> None:
    with serving(tmp_path, api_key="tml-secret") as api:
        assert api.get("healthz") == {"status": "ok"}
        assert "is missing" in api.get("sessions", 401)["detail"]
        assert "is missing" in api.get("no/such/route", 401)["detail"]
        wrong = api.client.get("/api/v1/sessions", headers={"X-API-Key": "tml-wrongé"})
        assert wrong.status_code == 401
        assert "is not this server's" in wrong.get_json()["detail"]
        assert "secret" not in wrong.text
        right = api.client.get("/api/v1/sessions", headers={"X-API-Key": "tml-secret"})
        assert right.status_code == 200


def test_missing_routes_answer_in_json(api: Api) -> None:
    assert "detail" in api.get("nothing", 404)
    assert "detail" in api.post("billing", 404)
    assert "detail" in api.get("create_session", 405)
    assert api.get("client/config")["sample_max_concurrent_requests"] == 100
    assert api.post("client/config", sdk_version="x") == api.get("client/config")
    assert api.post("client/dynamic_config", sdk_version="x")["sample_cancel_enabled"] is False
    assert api.get("get_server_capabilities")["supported_models"] == [
        {
            "model_name": "deterministic",
            "max_context_length": 32768,
            "trainable": True,
            "sampleable": True,
        }
    ]


class Aliased(DeterministicEngine):
    """A model with an alias."""

    @property
    def info(self) -> EngineInfo:
        return dataclasses.replace(super().info, aliases=("organization/deterministic",))


def test_a_model_is_listed_once_and_found_by_its_aliases(tmp_path: Path) -> None:
    with LocalServer(Aliased(), data_dir=tmp_path) as server:
        _, found = send(server, "get_server_capabilities")
        assert [model["model_name"] for model in found["supported_models"]] == ["deterministic"]
        _, session = send(server, "create_session", {"tags": []})
        for seq_id, name in enumerate(("deterministic", "organization/deterministic")):
            body = {
                "session_id": session["session_id"],
                "sampling_session_seq_id": seq_id,
                "base_model": name,
            }
            assert send(server, "create_sampling_session", body)[0] == 200


def test_a_checkpoint_trained_under_another_name_of_the_model_is_accepted(tmp_path: Path) -> None:
    class Renamed(DeterministicEngine):
        @property
        def info(self) -> EngineInfo:
            return dataclasses.replace(
                super().info, model_name="/models/one", aliases=("deterministic",)
            )

    def create(server: LocalServer, **source: str) -> Tuple[int, Any]:
        _, session = send(server, "create_session", {"tags": []})
        body = {"session_id": session["session_id"], "sampling_session_seq_id": 0, **source}
        return send(server, "create_sampling_session", body)

    with LocalServer(DeterministicEngine(), data_dir=tmp_path) as server:
        with ServiceClient(base_url=server.url) as service:
            trainer = service.create_lora_training_client("deterministic")
            path = trainer.save_weights_for_sampler("a").result(20).path
    with LocalServer(Renamed(), data_dir=tmp_path) as server:
        assert create(server, model_path=path)[0] == 200
    other = DeterministicEngine(model_name="another")
    with LocalServer(other, data_dir=tmp_path) as server:
        status, refused = create(server, model_path=path)
        assert (status, "was trained from deterministic" in refused["detail"]) == (400, True)


def test_each_response_is_logged_if_requested(tmp_path: Path) -> None:
    lines: List[str] = []
    with LocalServer(DeterministicEngine(), data_dir=tmp_path, access_log=lines.append) as server:
        send(server, "healthz?signature=secret")
        wait_until(lambda: len(lines) == 1, "it is logged")  # logged after the response
        send(server, "nowhere")
        wait_until(lambda: len(lines) == 2, "it is logged")
        host, port = server.url.rpartition("/")[2].split(":")
        with socket.create_connection((host, int(port)), timeout=20) as raw:
            raw.sendall(b"GET /\x1b[31m HTTP/1.1\r\nHost: x\r\nContent-Length: no\r\n\r\n")
            assert b" 400 " in raw.recv(1000)
            while raw.recv(1000):
                pass  # until the server has hung up
    said = [line.split(" ", 2)[2].rpartition(" ms")[0].rpartition(" ")[0] for line in lines]
    assert said == [
        "GET /api/v1/healthz 200",
        "GET /api/v1/nowhere 404",
        r"GET /\x1b[31m 400",
    ]


def test_no_response_is_logged_by_default(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with LocalServer(DeterministicEngine(), data_dir=tmp_path) as server:
        send(server, "healthz")
    assert capfd.readouterr() == ("", "")


def test_an_unexpected_error_is_a_500_and_logged(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend: Any = api.backend  # type: ignore[attr-defined]  # see harness
    monkeypatch.setattr(backend.store, "sessions", lambda *page: 1 / 0)
    assert "ZeroDivisionError" in api.get("sessions", 500)["detail"]
    assert "GET /api/v1/sessions failed" in caplog.text


def test_close_releases_held_polls_and_ends_within_two_seconds() -> None:
    server = LocalServer(DeterministicEngine())
    server.start()
    model = start_model(server)
    made = post(server, "optim_step", model_id=model, seq_id=2, adam_params={})  # 1 never arrives
    futures = server._backend.futures
    wait, held = futures.wait, threading.Semaphore(0)

    def counted_wait(request_id: str, timeout_s: float) -> Any:
        if timeout_s > 0:
            held.release()
        return wait(request_id, timeout_s)

    futures.wait = counted_wait
    answers: List[Any] = []
    polls = [
        threading.Thread(
            target=lambda: answers.append(
                post(server, "retrieve_future", request_id=made["request_id"])
            )
        )
        for _ in range(4)
    ]
    for thread in polls:
        thread.start()
    for _ in polls:
        assert held.acquire(timeout=20)
    with promptly():
        server.close()
    for thread in polls:
        thread.join(20)
    assert [answer["type"] for answer in answers] == ["try_again"] * 4
    assert own_threads() == []


def test_close_does_not_wait_for_an_engine_in_a_long_turn() -> None:
    engine = HeldEngine()
    server = LocalServer(engine)
    server.start()
    model = start_model(server)
    body = PROTOBUF.encode_forward_backward(
        ForwardBackwardRequest(model, 1, [held_datum()], "cispo")
    )
    send(server, "forward_backward", body, content_type=PROTOBUF.content_type)
    assert engine.holding.wait(20)
    with promptly():
        server.close()
    assert own_threads() == ["tinkex-engine"]
    (thread,) = [t for t in threading.enumerate() if t.name == "tinkex-engine"]
    engine.let_go.set()
    thread.join(20)
    assert not thread.is_alive()


def test_heartbeats_get_through_in_spite_of_many_held_polls() -> None:
    with LocalServer(DeterministicEngine(), settings=ServerSettings(max_held_polls=150)) as server:
        model = start_model(server)
        made = post(server, "optim_step", model_id=model, seq_id=2, adam_params={})
        threads = [
            threading.Thread(
                target=lambda: send(server, "retrieve_future", {"request_id": made["request_id"]})
            )
            for _ in range(150)
        ]
        for thread in threads:
            thread.start()
        for _ in range(20):
            post(server, "session_heartbeat", session_id=model.partition(":")[0])
        post(server, "optim_step", model_id=model, seq_id=1, adam_params={})
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()


def test_a_client_that_hangs_up_does_not_disturb_others(caplog: pytest.LogCaptureFixture) -> None:
    with LocalServer(DeterministicEngine()) as server:
        port = int(server.url.rpartition(":")[2])
        for request in (b"", b"POST /api/v1/create_session HTTP/1.1\r\n", b"nonsense\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(request)
        assert send(server, "healthz")[0] == 200
    assert caplog.text == ""


class Task:
    """A task as waitress passes it to its dispatcher."""

    def __init__(self, until: threading.Event) -> None:
        self.until = until
        self.begun = threading.Event()
        self.cancelled = False

    def service(self) -> None:
        self.begun.set()
        self.until.wait(20)

    def cancel(self) -> None:
        self.cancelled = True


def test_all_waiting_connections_are_accepted_in_one_round() -> None:
    begun, connected, looked = threading.Event(), threading.Event(), threading.Event()
    accepted = []

    def accept_once() -> None:  # in the thread that accepts
        begun.set()
        assert connected.wait(20)
        server._http.handle_accept()
        accepted.append(len(server._http.active_channels))
        looked.set()

    with LocalServer(DeterministicEngine()) as server, contextlib.ExitStack() as clients:
        server._http.trigger.pull_trigger(accept_once)
        assert begun.wait(20)
        for _ in range(20):
            address = ("127.0.0.1", server._port)
            clients.enter_context(socket.create_connection(address, timeout=20))
        connected.set()
        assert looked.wait(20)
    assert accepted == [20]


def test_http_threads_grow_with_the_load_up_to_their_cap() -> None:
    until = threading.Event()
    threads = HttpThreads(limit=3)
    tasks = [Task(until) for _ in range(4)]
    for task in tasks:
        threads.add_task(task)
    for task in tasks[:3]:
        assert task.begun.wait(20)
    assert not tasks[3].begun.is_set()
    assert len(own_threads()) == 3
    until.set()
    assert tasks[3].begun.wait(20)
    assert threads.shutdown(timeout=20)
    assert own_threads() == []


def test_http_threads_without_work_end() -> None:
    threads = HttpThreads(limit=3, idle_s=0.0)
    done = threading.Event()
    done.set()
    for _ in range(3):
        task = Task(done)
        threads.add_task(task)
        assert task.begun.wait(20)
    for thread in [t for t in threading.enumerate() if t.name.startswith("tinkex-http-")]:
        thread.join(20)
    assert own_threads() == []


def test_a_task_that_raises_does_not_end_its_thread(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Bad(Task):
        def service(self) -> None:
            super().service()
            raise RuntimeError("no such luck")

    done = threading.Event()
    done.set()
    threads = HttpThreads(limit=1)
    threads.add_task(Bad(done))
    after = Task(done)
    threads.add_task(after)
    assert after.begun.wait(20)
    assert threads.shutdown(timeout=20)
    assert "no such luck" in caplog.text


def test_a_shutdown_cancels_tasks_that_have_not_begun(caplog: pytest.LogCaptureFixture) -> None:
    until = threading.Event()
    threads = HttpThreads(limit=2)
    assert not threads.is_busy
    running, another, waiting = Task(until), Task(until), Task(until)
    for task in (running, another):
        threads.add_task(task)
        assert task.begun.wait(20)
    threads.add_task(waiting)
    assert threads.is_busy
    assert not threads.shutdown(timeout=0.01)
    assert waiting.cancelled
    late = Task(until)
    threads.add_task(late)
    assert late.cancelled
    assert "tinkex-http-0, tinkex-http-1" in caplog.text
    until.set()
    assert threads.shutdown(timeout=20)


def test_a_request_that_outlives_the_server_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    class Late(Task):
        def service(self) -> None:
            super().service()
            raise OSError("Bad file descriptor")

    until = threading.Event()
    threads = HttpThreads(limit=1)
    task = Late(until)
    threads.add_task(task)
    assert task.begun.wait(20)
    assert not threads.shutdown(timeout=0.01)
    until.set()
    assert threads.shutdown(timeout=20)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_an_engine_without_its_libraries_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forget_the_torch_engine(monkeypatch)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(LocalServerError, match="needs torch, which is not installed") as problem:
        load_engine("smollm2-135m")
    assert 'pip install "tinkex[local]"' in str(problem.value)


def test_a_missing_module_of_tinkex_is_not_reported_as_a_package_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forget_the_torch_engine(monkeypatch)
    monkeypatch.setitem(sys.modules, "tinkex.local.engines.torch_engine", None)
    with pytest.raises(ImportError, match=r"tinkex\.local\.engines"):
        load_engine("smollm2-135m")


def forget_the_torch_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith("tinkex.local.engines.torch_engine"):
            monkeypatch.delitem(sys.modules, name)


def test_if_no_thread_can_be_started_the_existing_ones_take_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    until = threading.Event()
    threads = HttpThreads(limit=3)
    first, second = Task(until), Task(until)
    threads.add_task(first)
    assert first.begun.wait(20)

    def full(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", full)
        threads.add_task(second)
    until.set()
    assert second.begun.wait(20)
    assert threads.shutdown(timeout=20)


def test_close_works_after_the_socket_thread_has_ended_by_itself() -> None:
    # The thread may see the stop before it is woken; the socket that wakes it must still be open
    # then.
    server = LocalServer(DeterministicEngine())
    server.start()
    server._stop.set()
    server._http.pull_trigger()
    assert server._thread is not None
    server._thread.join(20)
    server.close()
    assert own_threads() == []
    assert not server._http.sockets
