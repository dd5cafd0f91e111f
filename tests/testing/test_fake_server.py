"""FakeServer: its responses, its journal, its restarts and its end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, TimeoutError as FutureTimeoutError
from typing import List

import pytest
import requests
from support.threads import race

from tinkex import ServiceClient, TrainingClient, types
from tinkex.errors import (
    APIConnectionError,
    InvalidInputError,
    LocalServerError,
    NotFoundError,
    SessionLostError,
)
from tinkex.testing import CharacterTokenizer, FakeServer, Journal, faults

ADAM = types.AdamParams(1e-3)
DATA = [types.Datum(types.ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3]})]


def train(trainer: TrainingClient, steps: int) -> List[float]:
    """Take *steps* and return their losses."""
    done = [trainer.train_step(DATA, "cross_entropy", ADAM) for _ in range(steps)]
    return [step.forward_backward.metrics["loss:sum"] for step in done]


def new_run(service: ServiceClient) -> TrainingClient:
    return service.create_lora_training_client("deterministic", rank=4)


def test_losses_fall_and_are_the_same_each_time(service: ServiceClient) -> None:
    losses = train(new_run(service), 4)
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 4
    assert train(new_run(service), 4) == losses


def test_samples_decode_to_text(service: ServiceClient) -> None:
    tokenizer = CharacterTokenizer()
    sampler = service.create_sampling_client(base_model="deterministic")
    prompt = types.ModelInput.from_ints(tokenizer.encode("Why is the sky blue?"))
    params = types.SamplingParams(max_tokens=64, temperature=1.0, stop=[])
    response = sampler.sample(prompt, 8, params).result()
    for sequence in response.sequences:
        tokens = list(sequence.tokens)
        text = tokenizer.decode(tokens)
        assert text.encode("utf-8").decode("utf-8") == text  # no lone surrogate
        assert tokenizer.encode(text) == [token for token in tokens if token != 0]


def test_any_of_its_names_can_be_trained() -> None:
    with (
        FakeServer(["Qwen/Qwen3-8B", "qwen"], vocab_size=151_936) as server,
        ServiceClient(base_url=server.url) as service,
    ):
        for name in ("Qwen/Qwen3-8B", "qwen"):
            datum = types.Datum(
                types.ModelInput.from_ints([151_000, 1]), {"target_tokens": [1, 151_935]}
            )
            service.create_lora_training_client(name).forward([datum], "cross_entropy").result()


def test_the_server_starts_in_well_under_a_tenth_of_a_second() -> None:
    with FakeServer():
        pass  # now everything is imported
    spent = []
    for _ in range(3):
        before = time.process_time()
        with FakeServer():
            spent.append(time.process_time() - before)
    assert min(spent) < 0.06, spent  # CPU time, as the machine may be busy


def test_the_server_imports_no_machine_learning_library() -> None:
    script = (
        "import sys\n"
        "from tinkex import ServiceClient, types\n"
        "from tinkex.testing import FakeServer\n"
        "with FakeServer() as server, ServiceClient(base_url=server.url) as service:\n"
        "    service.create_lora_training_client('deterministic').get_info()\n"
        "print(sorted({'torch', 'transformers', 'peft', 'safetensors'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[]\n", done.stderr


def test_the_threads_and_the_folder_are_gone_after_close() -> None:
    before = set(threading.enumerate())
    server = FakeServer()
    server.start()
    folder = server._folder
    assert folder is not None
    assert folder.exists()
    server.close()
    server.close()
    assert set(threading.enumerate()) <= before
    assert not folder.exists()


def test_the_server_can_be_used_only_while_it_runs() -> None:
    server = FakeServer()
    for use in (lambda: server.url, server.live_sessions, server.restart):
        with pytest.raises(LocalServerError, match="start"):
            use()
    with server, pytest.raises(LocalServerError, match="make a new one"):
        server.start()
    with pytest.raises(LocalServerError, match="make a new one"):
        server.start()


@pytest.mark.parametrize("models", [[], [1], ""])
def test_models_are_names(models: List[object]) -> None:
    with pytest.raises(InvalidInputError, match="models"):
        FakeServer(models)  # type: ignore[arg-type]  # on purpose


# The journal


def test_the_journal_records_every_request(fake: FakeServer, service: ServiceClient) -> None:
    trainer = new_run(service)
    trainer.optim_step(ADAM).result()
    (create,) = fake.journal.requests_to("create_session")
    assert create.method == "POST"
    assert create.json()["type"] == "create_session"
    assert create.headers["content-type"] == "application/json"
    (step,) = fake.journal.requests_to("POST /api/v1/optim_step")
    assert step.json()["model_id"] == trainer.model_id
    assert fake.journal.requests_to("GET optim_step") == []
    everything = fake.journal.requests
    assert [request.index for request in everything] == list(range(len(everything)))
    assert fake.journal.requests_to("*") == everything


def test_the_journal_counts_executed_work(fake: FakeServer, service: ServiceClient) -> None:
    trainer = new_run(service)
    train(trainer, 2)
    trainer.forward(DATA, "cross_entropy").result()
    path = trainer.save_state("one").result().path
    trainer.load_state(path).result()
    sampler = trainer.save_weights_and_get_sampling_client()
    sampler.sample(types.ModelInput.from_ints([1]), 1, types.SamplingParams(max_tokens=1)).result()
    assert fake.journal.executed(trainer) == [
        "create",
        *["forward_backward", "optim_step"] * 2,
        "forward",
        "save",
        "load",
        "export",
    ]
    assert fake.journal.executed_steps(trainer.model_id) == 2
    assert fake.journal.executed(sampler) == ["sample"]


def test_failed_work_does_not_count_as_executed(fake: FakeServer, service: ServiceClient) -> None:
    trainer = new_run(service)
    with pytest.raises(Exception, match="no_such_loss"):
        trainer.forward_backward(DATA, "no_such_loss").result()
    assert fake.journal.executed(trainer) == ["create"]


def test_duplicates_are_resent_work_requests(fake: FakeServer, service: ServiceClient) -> None:
    trainer = new_run(service)
    train(trainer, 1)
    assert fake.journal.duplicates() == []
    fake.inject("optim_step", faults.Drop(after_work=True))
    train(trainer, 1)
    (group,) = fake.journal.duplicates()
    assert [request.path for request in group] == ["/api/v1/optim_step"] * 2
    assert group[0].body == group[1].body
    assert fake.journal.executed_steps(trainer) == 2


def test_a_journal_takes_entries_from_many_threads() -> None:
    journal = Journal()

    def add() -> None:
        for _ in range(100):
            journal.add_request("POST", "/api/v1/asample", "", {}, b"")
            journal.add_executed("run", "optim_step")

    race(*[add] * 8)
    assert [request.index for request in journal.requests] == list(range(800))
    assert journal.executed_steps("run") == 800


def test_live_sessions_are_those_that_have_not_ended(fake: FakeServer) -> None:
    assert fake.live_sessions() == []
    with ServiceClient(base_url=fake.url) as first:
        with ServiceClient(base_url=fake.url) as second:
            assert set(fake.live_sessions()) == {first.session_id, second.session_id}
        assert fake.live_sessions() == [first.session_id]
    assert fake.live_sessions() == []


# Restarts and expiry


def test_a_restart_with_state_keeps_checkpoints(fake: FakeServer, service: ServiceClient) -> None:
    trainer = new_run(service)
    train(trainer, 3)
    path = trainer.save_state("kept").result().path
    losses = train(trainer, 1)
    url = fake.url
    fake.restart()
    assert fake.url == url
    with pytest.raises(SessionLostError):
        train(trainer, 1)
    with ServiceClient(base_url=url) as again:
        resumed = again.create_training_client_from_state_with_optimizer(path)
        assert train(resumed, 1) == losses


def test_calls_during_a_restart_wait_for_it(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    restarting, go_on, start = threading.Event(), threading.Event(), fake._start_locked

    def start_later() -> None:
        restarting.set()
        assert go_on.wait(10)
        start()

    monkeypatch.setattr(fake, "_start_locked", start_later)
    fake.restart_soon()
    assert restarting.wait(10)
    with ThreadPoolExecutor(1) as pool:
        injected = pool.submit(fake.inject, "optim_step", faults.Drop())
        with pytest.raises(FutureTimeoutError):
            injected.result(0.05)
        go_on.set()
        assert injected.result(10).struck == []
    assert fake.live_sessions() == []


def test_a_restart_without_state_knows_nothing(fake: FakeServer, service: ServiceClient) -> None:
    trainer = new_run(service)
    path = trainer.save_state("lost").result().path
    fake.restart(keep_state=False)
    with ServiceClient(base_url=fake.url) as again:
        assert again.create_rest_client().list_training_runs().result().training_runs == []
        with pytest.raises(NotFoundError):
            again.create_training_client_from_state(path)


def test_sessions_expire_on_demand(fake: FakeServer, service: ServiceClient) -> None:
    trainer = new_run(service)
    fake.expire_sessions()
    assert fake.live_sessions() == []
    with pytest.raises(SessionLostError):
        trainer.optim_step(ADAM).result()
    with ServiceClient(base_url=fake.url) as again:
        assert fake.live_sessions() == [again.session_id]
        train(new_run(again), 1)


def test_nothing_answers_after_close(fake: FakeServer) -> None:
    url = fake.url
    fake.close()
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/api/v1/healthz", timeout=5)
    with pytest.raises(APIConnectionError):
        ServiceClient(base_url=url, startup_timeout_s=0.1)
