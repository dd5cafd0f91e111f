"""The official client 0.38, as published, against the embedded server: two black boxes.

``tox -e interop`` runs it.  To run it by hand, in an environment with ``tinker`` and pytest::

    python -m venv interop && interop/bin/python -m pip install tinker==0.38.0 pytest
    TINKEX_INTEROP_PYTHON=python interop/bin/python -m pytest tests/interop

conftest.py says what the environment variables are for.
"""

from __future__ import annotations

from typing import Any, Iterator, List

import pytest
from interop.official import official

tinker = official("0.38")
types = tinker.types


@pytest.fixture(scope="module")
def service(base_url: str) -> Iterator[Any]:
    with tinker.ServiceClient(base_url=base_url, api_key="tml-local") as client:
        yield client


@pytest.fixture(scope="module")
def base_model(service: Any) -> str:
    return str(service.get_server_capabilities().supported_models[0].model_name)


@pytest.fixture(scope="module")
def trainer(service: Any, base_model: str) -> Any:
    return service.create_lora_training_client(base_model=base_model, rank=8)


TOKENS = [72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100, 33]


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


def test_info_names_the_base_model_and_the_rank(trainer: Any, base_model: str) -> None:
    info = trainer.get_info()
    assert info.model_data.model_name == base_model
    assert info.is_lora
    assert info.lora_rank == 8


def test_training_lowers_the_loss(trainer: Any) -> None:
    losses = train(trainer, 4)
    assert losses[-1] < losses[0]


def test_forward_returns_logprobs_of_each_datum(trainer: Any) -> None:
    output = trainer.forward([datum(), datum()], "cross_entropy").result()
    logprobs = [one["logprobs"].to_numpy() for one in output.loss_fn_outputs]
    assert [one.shape for one in logprobs] == [(len(TOKENS) - 1,)] * 2
    assert output.metrics["loss:sum"] == pytest.approx(-sum(float(p.sum()) for p in logprobs))


def test_reinforcement_losses_run(trainer: Any) -> None:
    before = trainer.forward([datum()], "cross_entropy").result()
    logprobs = before.loss_fn_outputs[0]["logprobs"].tolist()
    length = len(TOKENS) - 1
    example = types.Datum(
        model_input=types.ModelInput.from_ints(TOKENS[:-1]),
        loss_fn_inputs={
            "target_tokens": TOKENS[1:],
            "logprobs": logprobs,
            "advantages": [1.0] * length,
        },
    )
    result = trainer.forward_backward([example], "importance_sampling").result()
    assert result.metrics["loss:sum"] == pytest.approx(-length, rel=1e-3)  # ratio 1 everywhere
    for loss in ("ppo", "cispo", "dro"):
        assert trainer.forward_backward([example], loss).result().loss_fn_outputs


def test_a_batch_in_many_chunks_gives_a_complete_result(trainer: Any) -> None:
    data = [datum() for _ in range(1500)]  # more than fit into one request
    output = trainer.forward(data, "cross_entropy").result()
    assert len(output.loss_fn_outputs) == 1500


def test_a_bad_request_fails_and_the_run_continues(trainer: Any) -> None:
    with pytest.raises(tinker.TinkerError, match="nonsense"):
        trainer.forward_backward([datum()], "nonsense").result()
    train(trainer, 1)


def test_a_saved_state_is_loaded_with_its_optimizer(service: Any, trainer: Any) -> None:
    path = trainer.save_state("state-1").result().path
    assert path.startswith("tinker://")
    resumed = service.create_training_client_from_state_with_optimizer(path)
    ahead = train(trainer, 2)
    assert train(resumed, 2) == pytest.approx(ahead, rel=1e-6)
    fresh = service.create_training_client_from_state(path)
    assert train(fresh, 1) == pytest.approx(ahead[:1], rel=1e-6)


def test_samples_from_saved_weights(service: Any, trainer: Any) -> None:
    path = trainer.save_weights_for_sampler(name="sampler-1").result().path
    sampler = service.create_sampling_client(model_path=path)
    asked = types.SamplingParams(max_tokens=6, seed=1, temperature=1.0, stop=[])
    prompt = types.ModelInput.from_ints(TOKENS)
    answer = sampler.sample(prompt=prompt, num_samples=3, sampling_params=asked).result()
    assert [len(one.tokens) for one in answer.sequences] == [6, 6, 6]
    assert all(one.stop_reason == "length" for one in answer.sequences)
    assert all(len(one.logprobs) == 6 for one in answer.sequences)


def test_samples_from_the_current_weights(trainer: Any) -> None:
    sampler = trainer.save_weights_and_get_sampling_client()
    asked = types.SamplingParams(max_tokens=5, temperature=0.0, stop=[])
    futures = [sampler.sample(types.ModelInput.from_ints(TOKENS), 1, asked) for _ in range(16)]
    tokens = [future.result().sequences[0].tokens for future in futures]
    assert tokens == [tokens[0]] * 16


def test_prompt_logprobs_equal_a_forward_pass(service: Any, trainer: Any) -> None:
    sampler = trainer.save_weights_and_get_sampling_client()
    logprobs = sampler.compute_logprobs(types.ModelInput.from_ints(TOKENS)).result()
    forward = trainer.forward([datum()], "cross_entropy").result()
    assert logprobs[0] is None
    assert logprobs[1:] == pytest.approx(
        forward.loss_fn_outputs[0]["logprobs"].tolist(), rel=1e-3, abs=1e-4
    )
    answer = sampler.sample(
        prompt=types.ModelInput.from_ints(TOKENS),
        num_samples=1,
        sampling_params=types.SamplingParams(max_tokens=1),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
    ).result()
    assert answer.topk_prompt_logprobs[0] is None
    assert [len(row) for row in answer.topk_prompt_logprobs[1:]] == [3] * (len(TOKENS) - 1)


def test_samples_from_the_base_model(service: Any, base_model: str) -> None:
    sampler = service.create_sampling_client(base_model=base_model)
    asked = types.SamplingParams(max_tokens=4, stop=[])
    answer = sampler.sample(types.ModelInput.from_ints(TOKENS), 1, asked).result()
    assert len(answer.sequences[0].tokens) == 4


def test_runs_and_checkpoints_are_listed_and_deleted(service: Any, trainer: Any) -> None:
    rest = service.create_rest_client()
    run_id = trainer.get_info().model_id
    trainer.save_state("listed").result()
    trainer.save_weights_for_sampler(name="listed").result()
    run = rest.get_training_run(run_id).result()
    assert run.last_checkpoint.checkpoint_id == "weights/listed"
    assert run.last_sampler_checkpoint.checkpoint_id == "sampler_weights/listed"
    assert run_id in [
        one.training_run_id for one in rest.list_training_runs().result().training_runs
    ]

    def listed() -> List[str]:
        return [one.checkpoint_id for one in rest.list_checkpoints(run_id).result().checkpoints]

    assert {"weights/listed", "sampler_weights/listed"} <= set(listed())
    path = run.last_checkpoint.tinker_path
    rest.publish_checkpoint_from_tinker_path(path).result()
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    info = rest.get_weights_info_by_tinker_path(path).result()
    assert (info.is_lora, info.lora_rank) == (True, 8)
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert "weights/listed" not in listed()
    assert "sampler_weights/listed" in listed()


def test_sessions_are_listed_with_their_runs_and_samplers(service: Any, trainer: Any) -> None:
    rest = service.create_rest_client()
    run_id = trainer.get_info().model_id
    session_id = run_id.partition(":")[0]
    assert session_id in rest.list_sessions().result().sessions
    assert run_id in rest.get_session(session_id).result().training_run_ids


def test_closing_the_client_ends_its_session(base_url: str, base_model: str) -> None:
    import urllib.error
    import urllib.request

    with tinker.ServiceClient(base_url=base_url, api_key="tml-local") as client:
        training = client.create_lora_training_client(base_model=base_model, rank=4)
        session_id = training.get_info().model_id.partition(":")[0]
    beat = urllib.request.Request(
        f"{base_url}/api/v1/session_heartbeat",
        data=f'{{"session_id": "{session_id}"}}'.encode(),
        headers={"Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError) as failure:
        urllib.request.urlopen(beat, timeout=10)
    with failure.value as answer:
        assert answer.code == 410
