"""The official client 0.24.1, of the JSON era, against the embedded server: two black boxes.

Creators return clients, passes are JSON, ``forward`` is a separate route, and a run from a
checkpoint is created in three steps.  Sampling results are requested in either encoding.
"""

from __future__ import annotations

import json
from typing import Any, List

import pytest
from interop.official import official
from interop.recorder import Recorder

tinker = official("0.24")
types = tinker.types

TOKENS = [72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100, 33]
PROMPT = types.ModelInput.from_ints(TOKENS)


@pytest.fixture
def service(recorder: Recorder) -> Any:
    return tinker.ServiceClient(base_url=recorder.url, api_key="tml-local")


@pytest.fixture
def trainer(service: Any) -> Any:
    model = service.get_server_capabilities().supported_models[0].model_name
    return service.create_lora_training_client(base_model=model, rank=8)


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


def sent(recorder: Recorder, route: str) -> Any:
    """Return the only body that was sent to *route*."""
    (one,) = recorder.exchanges(route)
    assert one.headers["content-type"] == "application/json"
    return one.json()


def test_the_client_is_recognized_by_its_requests(
    service: Any, trainer: Any, recorder: Recorder
) -> None:
    bodies = [one.json() for one in recorder.exchanges("client/config")]
    assert {"sdk_version": tinker.__version__} in bodies
    assert len({json.dumps(one) for one in bodies}) == 1
    assert recorder.exchanges("client/dynamic_config") == []
    created = sent(recorder, "create_model")
    assert set(created) == {"session_id", "model_seq_id", "base_model", "lora_config", "type"}


@pytest.mark.parametrize("results_in", ["application/json", "application/x-protobuf"])
def test_the_client_trains_in_json(trainer: Any, recorder: Recorder, results_in: str) -> None:
    if results_in == "application/json":  # like a server that knows no other encoding
        recorder.accept_only(results_in)
    losses = train(trainer, 4)
    assert losses[-1] < losses[0]
    first = recorder.exchanges("forward_backward")[0]
    assert first.headers["content-type"] == "application/json"
    body = first.json()
    assert set(body) == {"forward_backward_input", "model_id", "seq_id"}
    assert len(body["forward_backward_input"]["data"]) == 2
    polls = [one for one in recorder.exchanges("retrieve_future") if b":train:0:1" in one.body]
    assert {one.answer_type for one in polls} == {results_in}
    accepted = polls[0].headers["accept"]
    assert accepted.split(", ") == ["application/x-protobuf", "application/json"]


def test_forward_is_a_separate_route(trainer: Any, recorder: Recorder) -> None:
    output = trainer.forward([datum()], "cross_entropy").result()
    logprobs = output.loss_fn_outputs[0]["logprobs"].to_numpy()
    assert logprobs.shape == (len(TOKENS) - 1,)
    assert output.metrics["loss:sum"] == pytest.approx(-float(logprobs.sum()), rel=1e-6)
    assert set(sent(recorder, "forward")) == {"forward_input", "model_id", "seq_id"}


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "dro"])
def test_reinforcement_losses_run(trainer: Any, loss: str) -> None:
    length = len(TOKENS) - 1
    before = trainer.forward([datum()], "cross_entropy").result().loss_fn_outputs[0]["logprobs"]
    example = types.Datum(
        model_input=types.ModelInput.from_ints(TOKENS[:-1]),
        loss_fn_inputs={
            "target_tokens": TOKENS[1:],
            "logprobs": before.tolist(),
            "advantages": [1.0] * length,
        },
    )
    result = trainer.forward_backward([example], loss).result()
    assert result.metrics["loss:sum"] == pytest.approx(result.metrics["loss:sum"])
    assert result.loss_fn_outputs[0]["logprobs"].tolist() == pytest.approx(before.tolist())


def test_a_run_from_a_checkpoint_is_created_in_three_steps(
    service: Any, trainer: Any, recorder: Recorder
) -> None:
    train(trainer, 2)
    path = trainer.save_state("state").result().path
    ahead = train(trainer, 2)
    recorder.clear()
    resumed = service.create_training_client_from_state_with_optimizer(path)
    routes = [one.route for one in recorder.exchanges() if one.route != "session_heartbeat"]
    steps = [route for route in routes if route not in ("retrieve_future", "get_info")]
    assert steps == ["weights_info", "create_model", "load_weights"]
    loading = sent(recorder, "load_weights")
    assert (loading["seq_id"], loading["optimizer"]) == (1, True)
    assert train(resumed, 2) == pytest.approx(ahead, rel=1e-6)
    fresh = service.create_training_client_from_state(path)
    assert train(fresh, 1) == pytest.approx(ahead[:1], rel=1e-6)


def test_weights_are_loaded_into_a_run(trainer: Any) -> None:
    train(trainer, 1)
    path = trainer.save_state("there").result().path
    ahead = train(trainer, 2)
    trainer.load_state_with_optimizer(path).result()
    assert train(trainer, 2) == pytest.approx(ahead, rel=1e-6)


@pytest.mark.parametrize("results_in", ["application/json", "application/x-protobuf"])
def test_samples_and_their_logprobs(
    service: Any, trainer: Any, recorder: Recorder, results_in: str
) -> None:
    if results_in == "application/json":
        recorder.accept_only(results_in)
    path = trainer.save_weights_for_sampler(name="sampler").result().path
    sampler = service.create_sampling_client(model_path=path)
    asked = types.SamplingParams(max_tokens=6, seed=1, stop=[])
    answer = sampler.sample(prompt=PROMPT, num_samples=3, sampling_params=asked).result()
    assert [len(one.tokens) for one in answer.sequences] == [6, 6, 6]
    assert all(len(one.logprobs) == 6 for one in answer.sequences)
    again = sampler.sample(
        prompt=PROMPT,
        num_samples=3,
        sampling_params=asked,
        include_prompt_logprobs=True,
        topk_prompt_logprobs=2,
    ).result()
    assert [one.tokens for one in again.sequences] == [one.tokens for one in answer.sequences]
    scores = sampler.compute_logprobs(PROMPT).result()
    assert scores[0] is None
    assert again.prompt_logprobs[1:] == pytest.approx(scores[1:], rel=1e-6)
    assert again.topk_prompt_logprobs[0] is None
    assert [len(row) for row in again.topk_prompt_logprobs[1:]] == [2] * (len(TOKENS) - 1)


def test_many_concurrent_samples(trainer: Any) -> None:
    sampler = trainer.save_weights_and_get_sampling_client()
    asked = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[])
    futures = [sampler.sample(PROMPT, 1, asked) for _ in range(64)]
    tokens = [future.result().sequences[0].tokens for future in futures]
    assert tokens == [tokens[0]] * 64


def test_samples_of_the_base_model(service: Any) -> None:
    model = service.get_server_capabilities().supported_models[0].model_name
    sampler = service.create_sampling_client(base_model=model)
    asked = types.SamplingParams(max_tokens=4, stop=[])
    assert len(sampler.sample(PROMPT, 1, asked).result().sequences[0].tokens) == 4


def test_checkpoint_management(service: Any, trainer: Any) -> None:
    rest = service.create_rest_client()
    run_id = trainer.get_info().model_id
    path = trainer.save_state("kept").result().path
    trainer.save_weights_for_sampler(name="shown").result()
    run = rest.get_training_run(run_id).result()
    assert run.last_checkpoint.tinker_path == path
    assert rest.get_training_run_by_tinker_path(path).result() == run
    rest.publish_checkpoint_from_tinker_path(path).result()
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    info = rest.get_weights_info_by_tinker_path(path).result()
    assert (info.is_lora, info.lora_rank) == (True, 8)
    rest.delete_checkpoint_from_tinker_path(path).result()
    left = [one.checkpoint_id for one in rest.list_checkpoints(run_id).result().checkpoints]
    assert left == ["sampler_weights/shown"]
    session_id = run_id.partition(":")[0]
    assert session_id in rest.list_sessions().result().sessions
    assert run_id in rest.get_session(session_id).result().training_run_ids


def test_the_archive_of_a_checkpoint_has_a_signed_url(service: Any, trainer: Any) -> None:
    import tarfile
    import urllib.request

    path = trainer.save_weights_for_sampler(name="whole").result().path
    rest = service.create_rest_client()
    signed = rest.get_checkpoint_archive_url_from_tinker_path(path).result()
    with urllib.request.urlopen(signed.url, timeout=10) as answer:  # without a key
        with tarfile.open(fileobj=answer, mode="r|*") as archive:
            assert [one for one in archive if one.isfile()]


def test_a_bad_request_fails_and_the_run_continues(trainer: Any) -> None:
    with pytest.raises(tinker.TinkerError, match="nonsense"):
        trainer.forward_backward([datum()], "nonsense").result()
    train(trainer, 1)


FLAGS = (
    {"proto_write_fwdbwd": True},
    {"fwd_via_fwdbwd": True},
    {"proto_write_fwdbwd": True, "fwd_via_fwdbwd": True},
)


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: " ".join(flags))
def test_requests_caused_by_flags_are_understood(
    recorder: Recorder, trainer: Any, flags: Any
) -> None:
    expected = trainer.forward([datum()], "cross_entropy").result()
    recorder.set_flags(**flags)
    other = tinker.ServiceClient(base_url=recorder.url, api_key="tml-local")
    base = trainer.get_info().model_data.model_name
    second = other.create_lora_training_client(base_model=base, rank=8)
    output = second.forward([datum()], "cross_entropy").result()
    assert output.metrics == pytest.approx(expected.metrics)
    assert train(second, 1) == pytest.approx([2 * expected.metrics["loss:sum"]])
    binary = [
        one.route
        for one in recorder.exchanges()
        if one.headers.get("content-type") == "application/x-protobuf"
    ]
    if not flags.get("proto_write_fwdbwd"):
        assert binary == []
    else:  # the other flag sends forward the same way
        assert binary == ["forward_backward"] * len(flags)


def test_lost_responses_are_recovered(trainer: Any, recorder: Recorder) -> None:
    """The server has done the work; the client repeats the request with the same number."""
    expected = train(trainer, 3)
    base = trainer.get_info().model_data.model_name
    service = tinker.ServiceClient(base_url=recorder.url, api_key="tml-local")
    second = service.create_lora_training_client(base_model=base, rank=8)
    for route in ("forward_backward", "optim_step", "retrieve_future"):
        recorder.drop(route)
    assert train(second, 3) == pytest.approx(expected)
    assert len([one for one in recorder.exchanges() if one.status == 0]) == 3


def test_telemetry_is_accepted(base_url: str) -> None:
    import os
    import subprocess
    import sys

    program = (
        "import tinker, time\n"
        f"service = tinker.ServiceClient(base_url={base_url!r}, api_key='tml-local')\n"
        "service.get_server_capabilities()\n"
        "service.create_lora_training_client('deterministic', rank=4)\n"
        "telemetry = service.get_telemetry()\n"
        "print(telemetry is not None)\n"
    )
    environment = {**os.environ, "TINKER_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.lower())
    assert "telemetry" not in done.stderr.lower()
