"""The values that programs pass, through the public clients and a real server."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, List

import numpy as np
import pytest
from support.scripted_server import PATIENCE_S, ScriptedServer
from support.tinker_routes import TinkerRoutes

import tinkex
from tinkex import ServiceClient, types as T
from tinkex.errors import InvalidInputError
from tinkex.futures import APIFuture
from tinkex.local import LocalServer
from tinkex.wire.codec import codec_for

PROMPT = T.ModelInput.from_ints([1, 2, 3])


@pytest.fixture
def sampler(service: ServiceClient) -> tinkex.SamplingClient:
    return service.create_sampling_client(base_model="deterministic")


def losses(futures: List[APIFuture[T.ForwardBackwardOutput]]) -> List[float]:
    return [future.result(30).metrics["loss:sum"] for future in futures]


# ---- A buffer that is filled again while requests are under way ----


@pytest.mark.parametrize("name", ["advantages", "logprobs"])
def test_loss_inputs_are_copied_before_the_call_returns(
    trainer: tinkex.TrainingClient, name: str
) -> None:
    def forward(values: Any) -> APIFuture[T.ForwardBackwardOutput]:
        inputs = {"target_tokens": [2, 3, 4], "logprobs": [-6.0] * 3, "advantages": [1.0] * 3}
        return trainer.forward([T.Datum(PROMPT, {**inputs, name: values})], "importance_sampling")

    want = losses([forward([-value] * 3) for value in (1.0, 2.0, 3.0)])
    buffer, futures = np.empty(3, np.float32), []
    for value in (1.0, 2.0, 3.0):
        buffer[:] = -value
        futures.append(forward(buffer))
    assert losses(futures) == want
    assert len(set(want)) == 3


def test_a_datum_may_be_reused_with_other_inputs(trainer: tinkex.TrainingClient) -> None:
    def made(weight: float) -> T.Datum:
        return T.Datum(PROMPT, {"target_tokens": [2, 3, 4], "weights": [weight] * 3})

    want = losses([trainer.forward([made(w)], "cross_entropy") for w in (1.0, 2.0, 3.0, 4.0)])
    datum, futures = made(1.0), []
    futures.append(trainer.forward([datum], "cross_entropy"))
    datum.loss_fn_inputs["weights"] = [2.0] * 3  # type: ignore[assignment]
    futures.append(trainer.forward([datum], "cross_entropy"))
    datum.loss_fn_inputs["weights"] = T.TensorData([3.0] * 3)
    futures.append(trainer.forward([datum], "cross_entropy"))
    datum.loss_fn_inputs["weights"].to_numpy()[:] = 9.0  # the caller's own array
    datum.loss_fn_inputs["weights"] = np.float32([4.0] * 3)  # type: ignore[assignment]
    futures.append(trainer.forward([datum], "cross_entropy"))
    datum.loss_fn_inputs.clear()
    assert losses(futures) == want


def test_prompts_are_copied_before_the_call_returns(
    sampler: tinkex.SamplingClient,
) -> None:
    rows = [[5, 6, 7], [8, 9, 10], [11, 12, 13]]
    params = T.SamplingParams(max_tokens=4, temperature=0)

    def sample(ids: Any) -> APIFuture[T.SampleResponse]:
        return sampler.sample(T.ModelInput.from_ints(ids), 1, params)

    want = [sample(row).result(30).sequences[0].tokens for row in rows]
    buffer, futures = np.empty(3, np.int32), []
    for row in rows:
        buffer[:] = row
        futures.append(sample(buffer))
    buffer[:] = 0
    assert [future.result(30).sequences[0].tokens for future in futures] == want
    assert len(set(map(tuple, want))) == 3


@pytest.mark.parametrize("wire", ["protobuf", "json"])
def test_a_batch_is_sent_as_it_was_when_the_call_returned(
    server: ScriptedServer, routes: TinkerRoutes, wire: str
) -> None:
    tokens, targets = np.empty(3, np.int32), np.empty(3, np.int64)
    rows = [[5, 6, 7], [8, 9, 10], [11, 12, 13]]
    with ServiceClient(base_url=server.url, wire=wire) as service:
        trainer = service.create_lora_training_client("base")
        futures = []
        for row in rows:
            tokens[:], targets[:] = row, row
            model_input = T.ModelInput.from_ints(tokens)
            datum = T.Datum(model_input, {"target_tokens": targets})
            futures.append(trainer.forward_backward([datum], "cross_entropy"))
            datum.loss_fn_inputs["target_tokens"] = [0, 0, 0]  # type: ignore[assignment]
            model_input.chunks.append(T.EncodedTextChunk([0]))  # type: ignore[attr-defined]
        tokens[:] = targets[:] = 0
        for future in futures:
            future.result(30)
    sent = [
        codec_for(received.headers["content-type"]).decode_forward_backward(received.body).data
        for received in server.requests("POST /api/v1/forward_backward")
    ]
    want = [[T.Datum(T.ModelInput.from_ints(row), {"target_tokens": row})] for row in rows]
    assert sent == want


# ---- Numbers ----


@pytest.mark.parametrize("number", [np.int64, np.array, np.float64], ids=lambda kind: kind.__name__)
def test_numpy_numbers_are_accepted_wherever_numbers_are(
    service: ServiceClient,
    trainer: tinkex.TrainingClient,
    sampler: tinkex.SamplingClient,
    number: Any,
) -> None:
    rest = service.create_rest_client()
    one = T.SamplingParams(max_tokens=1)
    data = {"target_tokens": [2, 3, 4], "logprobs": [-1.0] * 3, "advantages": [1.0] * 3}
    datum = T.Datum(PROMPT, data)
    service.create_lora_training_client("deterministic", rank=number(4), seed=number(1))
    saved = trainer.save_weights_for_sampler("a", ttl_seconds=number(3600)).result(30)
    rest.set_checkpoint_ttl_from_tinker_path(saved.path, number(7200)).result(30)
    config = {"clip_low_threshold": number(0.0)}
    trainer.forward([datum], "ppo", config).result(30)
    assert list(trainer.pipeline([], "cross_entropy", T.AdamParams(), depth=number(2))) == []
    assert len(list(sampler.sample_many([PROMPT], one, max_in_flight=number(4)))) == 1
    assert len(sampler.sample(PROMPT, number(2), one).result(number(30)).sequences) == 2
    assert sampler.compute_logprobs(PROMPT, number(1)).exception(number(30)) is None
    assert len(rest.list_training_runs(number(1), number(0)).result(30).training_runs) == 1
    found = rest.search_sessions(T.SessionSearchRequest(limit=number(1))).result(30)
    assert len(found.sessions) == 1
    with ServiceClient(
        base_url=service.config.base_url,
        connect_timeout_s=number(5),
        max_unread=number(10),
        budget=tinkex.Budget(tokens=number(1000)),
    ) as other:
        other.close(timeout_s=number(2))


def test_a_step_may_be_given_as_text_or_as_a_number(service: ServiceClient) -> None:
    results = []
    for rate in (0.01, "1e-2"):
        trainer = service.create_lora_training_client("deterministic", rank=8, seed=1)
        data = [T.Datum(PROMPT, {"target_tokens": [2, 3, 4]})]
        params = T.AdamParams(learning_rate=rate)  # type: ignore[arg-type]
        trainer.train_step(data, "cross_entropy", params)
        results.append(losses([trainer.forward(data, "cross_entropy")]))
    assert results[0] == results[1]


@pytest.mark.parametrize("timeout", ["5", [5], True])
def test_a_timeout_of_another_type_is_refused(sampler: tinkex.SamplingClient, timeout: Any) -> None:
    future = sampler.sample(PROMPT, 1, T.SamplingParams(max_tokens=1))
    with pytest.raises(InvalidInputError, match="timeout is"):
        future.result(timeout)
    future.result(30)


# ---- Paths and names from files ----


def test_a_path_read_from_a_file_may_end_with_a_newline(
    service: ServiceClient, trainer: tinkex.TrainingClient, tmp_path: Path
) -> None:
    path = trainer.save_state("mid\n").result(30).path
    assert path.endswith("/weights/mid")
    trainer.load_state(f"{path}\n").result(30)
    trainer.load_state_with_optimizer(f"  {path}\r\n").result(30)
    service.create_training_client_from_state(f"{path}\n")
    sampled = trainer.save_weights_for_sampler("mid").result(30).path
    service.create_sampling_client(f"{sampled}\n")
    service.create_sampling_client(base_model="deterministic\n")
    rest = service.create_rest_client()
    assert rest.get_training_run(f"{trainer.model_id}\n").result(30).base_model == "deterministic"
    assert rest.get_weights_info_by_tinker_path(f"{path}\n").result(30).lora_rank == 4
    assert rest.get_training_run_by_tinker_path(f"{path}\n").result(30)
    rest.delete_checkpoint_from_tinker_path(f"{path}\n").result(30)
    with pytest.raises(InvalidInputError, match=r"weights/m\\nid"):
        trainer.load_state(path.replace("mid", "m\nid"))


def test_a_download_destination_may_begin_with_a_tilde(
    service: ServiceClient,
    trainer: tinkex.TrainingClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    path = trainer.save_weights_for_sampler("fine").result(30).path
    rest = service.create_rest_client()
    assert rest.download_checkpoint(path, "~/weights") == tmp_path / "weights"
    assert any((tmp_path / "weights").iterdir())
    with pytest.raises(InvalidInputError, match="dest"):
        rest.download_checkpoint(path, None)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="overwrite"):
        rest.download_checkpoint(path, "~/weights", overwrite="perhaps")  # type: ignore[arg-type]


def test_the_data_folder_of_a_server_may_begin_with_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    with ServiceClient.local("deterministic", data_dir="~/tinkex"):
        assert (tmp_path / "tinkex" / "tinkex.sqlite3").exists()


def test_overwrite_may_be_given_as_a_word(trainer: tinkex.TrainingClient) -> None:
    trainer.save_state("mid").result(30)
    trainer.save_state("mid", overwrite="true").result(30)  # type: ignore[arg-type]
    future = trainer.save_state("mid", overwrite="false")  # type: ignore[arg-type]
    assert isinstance(future.exception(30), tinkex.TinkexError)
    with pytest.raises(InvalidInputError, match="overwrite is 'perhaps'"):
        trainer.save_state("mid", overwrite="perhaps")  # type: ignore[arg-type]


# ---- Wrong objects ----


def test_using_a_future_as_its_result_names_the_missing_call(
    sampler: tinkex.SamplingClient,
) -> None:
    future: Any = sampler.sample(PROMPT, 1, T.SamplingParams(max_tokens=1))
    for use in (
        lambda: future.sequences,
        lambda: future[0],
        lambda: list(future),
        lambda: 5 in future,
    ):
        with pytest.raises((AttributeError, TypeError), match=r"call \.result\(\)"):
            use()
    assert not hasattr(future, "sequences")
    with pytest.raises(AttributeError, match=r"'_private'$"):
        _ = future._private
    future.result(30)


def test_an_uninitialized_future_has_no_attributes() -> None:
    with pytest.raises(AttributeError):
        _ = copy.copy(object.__new__(APIFuture)).sequences


def test_a_model_name_in_place_of_a_checkpoint_path_gets_a_hint(service: ServiceClient) -> None:
    with pytest.raises(InvalidInputError) as caught:
        service.create_sampling_client("deterministic")
    assert "base_model='deterministic'" in str(caught.value.hint)


@pytest.mark.parametrize("token", ["a\nb", 5, "caf\u00e9"])
def test_a_token_that_cannot_be_sent_is_refused_and_not_shown(
    service: ServiceClient, trainer: tinkex.TrainingClient, token: Any
) -> None:
    path = "tinker://run/weights/name"
    for use in (
        lambda: service.copy_weights(path, weights_access_token=token),
        lambda: service.create_training_client_from_state(path, weights_access_token=token),
        lambda: trainer.load_state(path, token),
    ):
        with pytest.raises(InvalidInputError, match="weights_access_token") as caught:
            use()
        assert "caf" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["Http", "HTTP"])
def test_the_scheme_of_a_url_may_be_in_capitals(local: LocalServer, scheme: str) -> None:
    with ServiceClient(base_url=local.url.replace("http", scheme)) as service:
        sampler = service.create_sampling_client(base_model="deterministic")
        sampler.sample(PROMPT, 1, T.SamplingParams(max_tokens=1)).result(PATIENCE_S)
