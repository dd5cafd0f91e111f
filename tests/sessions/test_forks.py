"""Forks and other processes: exactly one process ends a session."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
from sessions.processes import Script
from support.scripted_server import Answer, Received
from support.session_server import BEAT, CAPABILITIES, POLL, SessionServer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX only")

#: Ends a child without the exit hooks, as multiprocessing does, and reports its failure.
FORK = """
def fork(work):
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)

def join(pid):
    assert os.waitpid(pid, 0)[1] == 0, "the child failed"

"""


def run(server: SessionServer, folder: Path, body: str, **environment: str) -> str:
    """Run a script that must succeed silently; return its output."""
    server.serve_work()
    ended = Script(folder, FORK + body, server.url, **environment).wait()
    assert ended.err == ""
    assert ended.code == 0
    return ended.out


def test_a_forked_child_cannot_use_the_client_of_its_parent(
    server: SessionServer, tmp_path: Path
) -> None:
    body = """
import time
service = connect()
trainer = service.create_lora_training_client("m")
sampler = service.create_sampling_client(base_model="m")
rest = service.create_rest_client()
future = service.create_lora_training_client_future("m")
pending = sampler._runtime.poller.new_future("never")

def child():
    began = time.monotonic()
    for use in (
        lambda: service.create_lora_training_client("m"),
        lambda: service.create_sampling_client(base_model="m"),
        lambda: service.create_rest_client(),
        lambda: service.get_server_capabilities(),
        lambda: service.inflight(),
        lambda: trainer.optim_step(types.AdamParams()),
        lambda: trainer.get_info(),
        lambda: sampler.sample(PROMPT),
        lambda: rest.list_training_runs(),
        lambda: pending.result(30),
        service.__enter__,
    ):
        try:
            use()
        except errors.ClientClosedError as error:
            assert "fork" in str(error) and "in the child process" in str(error), error
        else:
            raise AssertionError("the parent's client can be used")
    service.close()
    repr(service), repr(trainer)
    assert threading.active_count() == 1, threading.enumerate()
    assert time.monotonic() - began < 10  # nothing waits

join(fork(child))
future.result(50)
print(sample(sampler))
service.close()
"""
    assert run(server, tmp_path, body) == "[7]\n"
    assert server.reasons() == ["success"]
    server.assert_ended_once()


def test_a_forked_child_neither_sends_heartbeats_nor_ends_the_session(
    server: SessionServer, tmp_path: Path
) -> None:
    body = """
service = connect()
gate, opener = os.pipe()

def child():
    os.close(opener)
    os.read(gate, 1)  # lives until the parent lets it go

pid = fork(child)
service.close()
threading.Event().wait(0.5)  # in which the child would beat eight times
os.close(opener)
join(pid)
"""
    run(server, tmp_path, body)
    server.assert_ended_once()


def test_a_child_that_exits_first_leaves_the_parents_session_alone(
    server: SessionServer, tmp_path: Path
) -> None:
    def answer_after_a_beat(_: Received) -> Answer:
        server.wait_for(BEAT, len(server.requests(BEAT)) + 1)
        return Answer(body={"supported_models": []})

    # The interval is also the timeout of a heartbeat, after which its connection is given up.
    body = """
with connect(heartbeat_interval_s=1.0) as service:
    sampler = service.create_sampling_client(base_model="m")
    sample(sampler)
    service.get_server_capabilities()  # answered after a heartbeat: connections are open
    pid = os.fork()
    if pid == 0:
        sys.exit(7)  # leaves the with block, and the exit hooks run
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    service.create_sampling_client(base_model="m")
    service.get_server_capabilities()
    print(sample(sampler), len(service.inflight()))
"""
    server.serve_work()
    server.on(CAPABILITIES, answer_after_a_beat)
    ended = Script(tmp_path, body, server.url).wait()
    assert (ended.code, ended.out, ended.err) == (0, "[7] 0\n", "")
    assert server.reasons() == ["success"]
    server.assert_ended_once()
    # The child must not have broken the parent's connections.
    for route in (BEAT, POLL, "POST /api/v1/create_sampling_session"):
        assert len({r.connection for r in server.requests(route)}) == 1, route


def test_a_child_can_create_its_own_client(server: SessionServer, tmp_path: Path) -> None:
    body = """
service = connect()

def child():
    with connect() as own:
        assert own.session_id == "s1"
        print(sample(own.create_sampling_client(base_model="m")), flush=True)
        assert sorted(t.name for t in threading.enumerate()).count("tinkex-heartbeat") == 1

join(fork(child))
with service:
    print(sample(service.create_sampling_client(base_model="m")))
"""
    assert run(server, tmp_path, body) == "[7]\n[7]\n"
    for session_id in ("s0", "s1"):
        assert server.reasons(session_id) == ["success"]
        server.assert_ended_once(session_id)


def test_the_session_of_a_child_that_leaves_its_client_open_ends_at_its_exit(
    server: SessionServer, tmp_path: Path
) -> None:
    body = """
service = connect()
pid = os.fork()
if pid == 0:
    own = connect()
    sys.exit(0)
os.waitpid(pid, 0)
service.close("errored")
"""
    run(server, tmp_path, body)
    assert server.reasons("s0") == ["errored"]
    assert server.reasons("s1") == ["success"]
    assert server.details("s1") == ["the process ended without closing the client"]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_session_of_a_multiprocessing_child_that_leaves_its_client_open_ends(
    server: SessionServer, tmp_path: Path, method: str, fails: bool
) -> None:
    body = f"""
import io, multiprocessing
kept = []

def work():
    kept.append(connect())
    if {fails}:
        sys.stderr = io.StringIO()
        raise ValueError("oh")

if __name__ == "__main__":
    with connect():
        process = multiprocessing.get_context({method!r}).Process(target=work)
        process.start()
        process.join()
        print(process.exitcode)
"""
    assert run(server, tmp_path, body) == f"{int(fails)}\n"
    assert server.reasons("s0") == ["success"]
    # Python 3.13 has forgotten the exception by the time it runs the exit hooks.
    errored = fails and sys.version_info < (3, 13)
    assert server.reasons("s1") == ["errored" if errored else "success"]
    server.assert_ended_once("s1")


def test_forks_while_work_is_in_flight(server: SessionServer, tmp_path: Path) -> None:
    body = """
stop = threading.Event()
with connect() as service, connect() as other:
    samplers = [s.create_sampling_client(base_model="m") for s in (service, other)]

    def work(sampler):
        while not stop.is_set():
            sample(sampler)

    workers = [threading.Thread(target=work, args=(s,)) for s in samplers * 2]
    for worker in workers:
        worker.start()

    def child():
        try:
            samplers[0].sample(PROMPT)
        except errors.ClientClosedError:
            pass
        with connect() as own:
            sample(own.create_sampling_client(base_model="m"))

    for _ in range(12):
        join(fork(child))
    stop.set()
    for worker in workers:
        worker.join()
print("fine")
"""
    assert run(server, tmp_path, body) == "fine\n"
    for number in range(14):
        assert server.reasons(f"s{number}") == ["success"]
        server.assert_ended_once(f"s{number}")


def test_a_child_does_not_stop_the_embedded_server(tmp_path: Path) -> None:
    pytest.importorskip("flask")
    body = """
with ServiceClient.local("deterministic") as service:
    sampler = service.create_sampling_client(base_model="deterministic")
    before = sample(sampler)
    pid = os.fork()
    if pid == 0:
        sys.exit(0)
    os.waitpid(pid, 0)
    assert service._server.data_dir.is_dir()
    assert sample(sampler) == before
    print("fine")
"""
    ended = Script(tmp_path, body, "").wait()
    assert (ended.code, ended.out, ended.err) == (0, "fine\n", "")


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("form", ["pickle", "handle", "handle with the key"])
def test_other_processes_sample_with_a_pickled_client_or_a_handle(
    server: SessionServer, tmp_path: Path, method: str, form: str
) -> None:
    body = f"""
import base64, pickle
import multiprocessing

FORM = {form!r}

def work(given):
    sampler = given if FORM == "pickle" else tinkex.SamplingClient.from_sampler_handle(given)
    return os.getpid(), sample(sampler)

import tinkex

if __name__ == "__main__":
    with connect(api_key="tml-parent") as service:
        sampler = service.create_sampling_client(base_model="m")
        given = sampler
        if FORM != "pickle":
            given = sampler.get_sampler_handle(include_api_key="key" in FORM)
        handle = sampler.get_sampler_handle()
        assert handle.encode() in pickle.dumps(sampler)
        assert b"tml-parent" not in base64.urlsafe_b64decode(handle)
        os.environ["TINKER_API_KEY"] = "tml-child"
        if FORM == "handle":  # the child's key is for its own server only
            os.environ["TINKER_BASE_URL"] = os.environ["SERVER"]
        context = multiprocessing.get_context({method!r})
        with context.Pool(2) as pool:
            results = pool.map(work, [given] * 6, chunksize=1)
        assert all(pid != os.getpid() and tokens == [7] for pid, tokens in results), results
        assert sample(sampler) == [7]
    print("fine")
"""
    assert run(server, tmp_path, body) == "fine\n"
    keys = [r.headers["x-api-key"] for r in server.requests("POST /api/v1/asample")]
    child = "tml-parent" if "key" in form else "tml-child"
    assert keys == [child] * 6 + ["tml-parent"]
    numbers = [r.json()["seq_id"] for r in server.requests("POST /api/v1/asample")]
    assert len(set(numbers)) == 7  # clones number their samples in separate blocks
    assert server.reasons() == ["success"]  # from the process that opened it
    server.assert_ended_once()


def test_a_pickled_client_in_the_same_process_shares_the_session(
    server: SessionServer, tmp_path: Path
) -> None:
    body = """
import pickle
with connect() as service:
    sampler = service.create_sampling_client(base_model="m")
    clone = pickle.loads(pickle.dumps(sampler))
    assert clone._runtime is sampler._runtime
    print(sample(clone))
try:
    clone.sample(PROMPT)
except errors.ClientClosedError:
    print("closed with it")
"""
    assert run(server, tmp_path, body) == "[7]\nclosed with it\n"
    assert server.reasons() == ["success"]


def test_short_lived_clones_keep_the_session_alive(server: SessionServer, tmp_path: Path) -> None:
    """Each task of a pool unpickles its own client and drops it."""
    body = """
from tinkex import SamplingClient
with connect(api_key="k") as service:
    handle = service.create_sampling_client(base_model="m").get_sampler_handle()
    def child():
        def task():
            for _ in range(15):
                sample(SamplingClient.from_sampler_handle(handle))
                gc.collect()
        failed = []
        threading.excepthook = failed.append
        threads = [threading.Thread(target=task) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed, failed[0]
    join(fork(child))
print("fine")
"""
    assert run(server, tmp_path, body) == "fine\n"
    assert server.reasons() == ["success"]


def test_an_invalid_handle_is_refused() -> None:
    import tinkex

    for handle in ("", "nonsense", "e30=", "W10="):
        with pytest.raises(tinkex.InvalidInputError, match="not a sampler handle"):
            tinkex.SamplingClient.from_sampler_handle(handle)
    assert not [t for t in threading.enumerate() if t.name.startswith("tinkex-")]
