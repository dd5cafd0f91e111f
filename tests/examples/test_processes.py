"""The examples with several servers or processes, with the deterministic engine."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict

import pytest
import requests
from support.programs import PATIENCE_S, REPOSITORY, run_example, started

from tinkex.testing import FakeServer, faults

MODEL = ["--model", "deterministic"]


def sessions(fake: FakeServer) -> int:
    """Return how many sessions were created; all must have ended."""
    assert fake.live_sessions() == []
    return len(fake.journal.requests_to("create_session"))


def test_two_services_keep_their_own_sessions() -> None:
    with FakeServer() as teacher, FakeServer() as student:
        options = ["--teacher", "deterministic", "--student", "deterministic"]
        urls = ["--teacher-url", teacher.url, "--student-url", student.url]
        stdout = run_example("two_services.py", *options, *urls)
        assert (sessions(teacher), sessions(student)) == (1, 1)
        assert len(teacher.journal.requests_to("asample")) == 8
        assert teacher.journal.requests_to("optim_step") == []
        assert student.journal.requests_to("asample") == []
        assert len(student.journal.requests_to("optim_step")) == 5
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", stdout)]
    assert losses[-1] < losses[0]
    assert "teacher: 128 tokens sampled, 0 trained" in stdout
    assert "student: 0 tokens sampled, 720 trained" in stdout
    found = re.findall(r"session (\S+) on (\S+)", stdout)
    assert [url for _, url in found] == [teacher.url, student.url]
    assert found[0][0] != found[1][0]


def test_two_services_on_embedded_servers() -> None:
    options = ["--teacher", "deterministic", "--student", "deterministic", "--steps", "2"]
    assert run_example("two_services.py", *options).count("session ") == 2


def test_rollouts_in_worker_processes_use_one_session() -> None:
    with FakeServer() as fake:
        stdout = run_example("rollouts.py", *MODEL, "--base-url", fake.url, "--steps", "2")
        assert sessions(fake) == 1
        assert len(fake.journal.requests_to("asample")) == 2 * 8
        assert len(fake.journal.requests_to("optim_step")) == 2
    rewards = [float(reward) for reward in re.findall(r"reward ([\d.]+)", stdout)]
    assert len(rewards) == 2
    assert all(0 < reward < 1 for reward in rewards)
    workers = [int(pid) for pid in re.findall(r"\d+", stdout.splitlines()[-1].split(":")[1])]
    assert workers
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_flask_worker_serves_concurrent_requests_with_one_session() -> None:
    script = [str(REPOSITORY / "examples" / "flask_worker.py"), *MODEL, "--port", "0"]
    with FakeServer() as fake, started(script, fake.url) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]

        def post(body: Dict[str, Any]) -> requests.Response:
            return requests.post(f"{url}/sample", json=body, timeout=PATIENCE_S)

        held = fake.inject("asample", faults.Hold(), times=3)
        last = fake.inject("asample", faults.Hold(), call=4)
        with ThreadPoolExecutor(4) as pool:
            posted = [pool.submit(post, {"prompt": [1, 2, 3 + i], "seed": 0}) for i in range(4)]
            last.wait(PATIENCE_S)  # all four are being served
            held.release()
            last.release()
            replies = [future.result() for future in posted]
        assert [reply.status_code for reply in replies] == [200] * 4
        assert len({tuple(reply.json()["tokens"]) for reply in replies}) == 4
        (session,) = fake.live_sessions()
        status = requests.get(f"{url}/status", timeout=PATIENCE_S).json()
        assert status == {"session": session, "in_flight": 0}

        assert post({"text": "Hello"}).status_code == 400
        assert post({"prompt": ["Hello"]}).status_code == 400
        process.terminate()
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, stdout, stderr) == (0, "", "")
        assert sessions(fake) == 1


def test_each_example_reports_a_model_that_the_server_lacks(tmp_path: Path) -> None:
    names = "dpo evaluate_openai flask_worker resumable rl rollouts sample_many supervised_chat"
    with FakeServer() as fake, ExitStack() as stack:
        processes = {}
        for name in [*names.split(), "training_loop"]:
            script = str(REPOSITORY / "examples" / f"{name}.py")
            options = ["--model", "missing", "--base-url", fake.url]
            if "--out" in Path(script).read_text():
                options += ["--out", str(tmp_path / name)]
            processes[name] = stack.enter_context(started([script, *options]))
        for name, process in processes.items():
            _, stderr = process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 1, name
            assert stderr.startswith("Error: "), stderr
            assert "base model 'missing' is not served here" in stderr
            assert "Traceback" not in stderr
            assert "Warning" not in stderr
        assert sessions(fake) == len(processes)
