"""The official client 0.38: tokens, compression, custom losses, ends of sessions, lost answers."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, Iterator, List

import pytest
from interop.conftest import serving
from interop.official import official
from interop.recorder import Recorder

tinker = official("0.38")
types = tinker.types

TOKENS = [72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100, 33]
PROMPT = types.ModelInput.from_ints(TOKENS)


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Recorder]:
    """A recorder in front of a server that requires a key."""
    with serving(tmp_path, "--api-key", "tml-local") as url, Recorder(url) as found:
        yield found


def open_service(recorder: Recorder, **settings: Any) -> Any:
    return tinker.ServiceClient(base_url=recorder.url, api_key="tml-local", **settings)


def new_trainer(service: Any) -> Any:
    model = service.get_server_capabilities().supported_models[0].model_name
    return service.create_lora_training_client(base_model=model, rank=8).result()


def datum() -> Any:
    return types.Datum(
        model_input=types.ModelInput.from_ints(TOKENS[:-1]),
        loss_fn_inputs={"target_tokens": TOKENS[1:], "weights": [1.0] * (len(TOKENS) - 1)},
    )


def train(trainer: Any, steps: int) -> List[float]:
    losses = []
    for _ in range(steps):
        passed = trainer.forward_backward([datum(), datum()], "cross_entropy")
        stepped = trainer.optim_step(types.AdamParams(learning_rate=1e-2))
        losses.append(passed.result().metrics["loss:sum"])
        stepped.result()
    return losses


def test_a_key_is_exchanged_for_a_token(recorder: Recorder) -> None:
    recorder.set_flags(pjwt_auth_enabled=True)
    with open_service(recorder) as service:
        trainer = new_trainer(service)
        assert train(trainer, 2)[1] > 0
        rest = tinker.RestClient(base_url=recorder.url, api_key="tml-local")
        assert rest.whoami().result().user_urn == "tml:user:local"
    (exchanged, *_) = recorder.exchanges("auth/token")
    assert exchanged.headers["x-api-key"] == "tml-local"
    assert exchanged.json() == {}
    keys = {one.headers["x-api-key"] for one in recorder.exchanges("forward_backward")}
    assert len(keys) == 1
    assert keys.pop().startswith("eyJ")


def test_a_token_that_the_server_calls_invalid_is_exchanged_once_more(
    guarded: Recorder,
) -> None:
    recorder = guarded
    recorder.set_flags(pjwt_auth_enabled=True)
    given: List[str] = []

    def forged_at_first(body: bytes) -> bytes:
        token = json.loads(body)["jwt"]
        given.append(token)
        if len(given) > 1:
            return body
        head, claims, signature = token.split(".")
        forged = base64.urlsafe_b64encode(b"x" * 32).decode().rstrip("=")
        assert forged != signature
        return json.dumps({"jwt": f"{head}.{claims}.{forged}"}).encode()

    recorder.change("auth/token", forged_at_first)
    with open_service(recorder) as service:
        train(new_trainer(service), 1)
    refused = [one for one in recorder.exchanges() if one.status == 401]
    assert [one.headers["x-api-key"] == given[0] for one in refused] == [False]  # it was forged
    assert refused[0].headers["x-api-key"].rpartition(".")[0] == given[0].rpartition(".")[0]
    assert {one.status for one in recorder.exchanges("auth/token")} == {200}


def test_batches_are_compressed(recorder: Recorder) -> None:
    with open_service(recorder) as service:
        expected = train(new_trainer(service), 2)
    recorder.set_flags(proto_compress_fwdbwd=True)
    recorder.clear()
    with open_service(recorder) as service:
        assert train(new_trainer(service), 2) == pytest.approx(expected)
    sent = recorder.exchanges("forward_backward")
    assert [one.headers.get("content-encoding") for one in sent] == ["zstd"] * 2
    assert all(one.body[:4] == b"\x28\xb5\x2f\xfd" for one in sent)  # a zstd frame


def test_a_custom_loss_is_computed_on_the_client(recorder: Recorder) -> None:
    """The loss is minus the log-likelihood: the same loss and training as cross entropy."""
    pytest.importorskip("torch", reason="custom losses need torch in the client's environment")

    def loss(data: Any, logprobs: Any) -> Any:
        total = -sum((one * 1.0).sum() for one in logprobs)
        return total, {"mine:sum": 3.0}

    with open_service(recorder) as service:
        expected = train(new_trainer(service), 3)
        trainer = new_trainer(service)
        losses = []
        for _ in range(3):
            output = trainer.forward_backward_custom([datum(), datum()], loss).result()
            trainer.optim_step(types.AdamParams(learning_rate=1e-2)).result()
            assert output.metrics["mine:sum"] == 3.0
            losses.append(output.metrics["loss:sum"])
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("status", ["success", "errored", "interrupted"])
def test_the_end_of_a_session_is_reported(recorder: Recorder, status: str) -> None:
    service = open_service(recorder)
    session_id = new_trainer(service).get_info().model_id.partition(":")[0]
    service.close(status, "in the test").result()
    (exchange,) = recorder.exchanges(f"sessions/{session_id}/finish")
    assert exchange.json() == {"reason": {"type": status}, "detail": "in the test"}
    assert exchange.status == 200
    rest = tinker.RestClient(base_url=recorder.url, api_key="tml-local")
    found = rest.search_sessions(types.SessionSearchRequest(session_id=session_id)).result()
    (session,) = found.sessions
    assert session.status.type == "client_finished"
    assert session.status.reason.type == status


def test_an_exception_ends_the_session_as_errored(recorder: Recorder) -> None:
    def fail() -> None:
        with open_service(recorder) as service:
            new_trainer(service)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    finished = [one for one in recorder.exchanges() if one.route.endswith("/finish")]
    assert [one.json()["reason"] for one in finished] == [{"type": "errored"}]


def test_lost_responses_are_recovered(recorder: Recorder) -> None:
    """The server has done the work; the client repeats the request with the same number."""
    with open_service(recorder) as service:
        expected = train(new_trainer(service), 3)
        second = new_trainer(service)
        for route in ("forward_backward", "optim_step", "retrieve_future"):
            recorder.drop(route)
        assert train(second, 3) == pytest.approx(expected)
        assert len([one for one in recorder.exchanges() if one.status == 0]) == 3
        again = [one.json()["seq_id"] for one in recorder.exchanges("optim_step")]
        assert sorted(again) == [2, 2, 2, 4, 4, 6, 6]  # two runs, and one lost answer


def test_a_lost_save_and_a_lost_sample_are_recovered(recorder: Recorder) -> None:
    with open_service(recorder) as service:
        trainer = new_trainer(service)
        for route in ("save_weights_for_sampler", "asample", "save_weights"):
            recorder.drop(route)
        sampler = trainer.save_weights_and_get_sampling_client().result()
        asked = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[])
        tokens = [sampler.sample(PROMPT, 1, asked).result().sequences[0].tokens for _ in "ab"]
        assert tokens[0] == tokens[1]
        path = trainer.save_state("once").result().path
        assert path.endswith("/weights/once")
        assert len([one for one in recorder.exchanges() if one.status == 0]) == 3


def test_optimizers_that_a_run_does_not_have_are_refused(recorder: Recorder) -> None:
    with open_service(recorder) as service:
        trainer = new_trainer(service)
        with pytest.raises(tinker.TinkerError, match="dimuon"):
            trainer.optim_step(types.DimuonParams(learning_rate=0.1)).result()
        train(trainer, 1)  # the run continues


def test_all_sampling_options(recorder: Recorder) -> None:
    import numpy as np

    asked = types.SamplingParams(max_tokens=3, temperature=0.0, stop=[])
    targets = np.array([[token, -1] for token in TOKENS[1:]], dtype=np.int64)
    with open_service(recorder) as service:
        sampler = new_trainer(service).save_weights_and_get_sampling_client().result()
        answer = sampler.sample(
            PROMPT,
            1,
            asked,
            include_prompt_logprobs=True,
            topk_prompt_logprobs=2,
            topk_sample_logprobs=2,
            target_prompt_logprobs=types.TensorData.from_numpy(targets),
            prompt_alt_tokens_k=2,
        ).result()
        last = sampler.compute_logprobs(PROMPT, prompt_logprobs_last_n=2).result()
    assert answer.prompt_logprobs[0] is None
    assert [len(row) for row in answer.topk_prompt_logprobs[1:]] == [2] * (len(TOKENS) - 1)
    assert [len(row) for row in answer.sequences[0].topk_logprobs] == [2] * 3
    given = answer.target_prompt_logprobs.to_numpy()
    assert given[:, 0].tolist() == pytest.approx(answer.prompt_logprobs[1:])
    assert given[:, 1].tolist() == [0.0] * (len(TOKENS) - 1)
    assert answer.prompt_alt_tokens.tokens.to_numpy().shape == (len(TOKENS) - 1, 2)
    assert last[-2:] == pytest.approx(answer.prompt_logprobs[-2:])
    assert last[:-2] == [None] * (len(TOKENS) - 2)
