"""Runs: both dialects, saving, loading, and refused requests."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Dict

import numpy as np
import pytest
from local.harness import CODECS, WAIT_S, Api, HeldEngine, datum, serving

from tinkex.local.engines.engine import EngineError
from tinkex.types import (
    Datum,
    ForwardBackwardRequest,
    GetInfoResponse,
    ImageChunk,
    LoraConfig,
    ModelInput,
)
from tinkex.wire.codec import Codec
from tinkex.wire.json_codec import JSON
from tinkex.wire.proto_codec import PROTOBUF


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_the_result_of_a_pass_has_the_accepted_encoding(api: Api, codec: Codec) -> None:
    model = api.model()
    other = PROTOBUF if codec is JSON else JSON
    made = api.submit_pass(model, 1, [datum(), datum(9)], codec=other)
    answer = api.poll(made, accept=f"{codec.content_type}, application/json")
    assert answer.content_type == codec.content_type
    output = codec.decode_output(answer.data)
    assert [o["logprobs"].shape for o in output.loss_fn_outputs] == [(3,), (3,)]
    total = -sum(float(o["logprobs"].values.sum()) for o in output.loss_fn_outputs)
    assert output.metrics["loss:sum"] == pytest.approx(total, rel=1e-6)


def test_both_dialects_compute_the_same(api: Api) -> None:
    model = api.model()
    results = [
        api.result(api.submit_pass(model, i, codec=codec)) for i, codec in enumerate(CODECS, 1)
    ]
    assert results[0] == results[1]


def test_failures_and_pending_responses_are_always_json(tmp_path: Path) -> None:
    with serving(tmp_path, retrieve_hold_s=0.0) as api:
        session = api.session()
        api.submit_model(session)
        pending = api.poll(api.step(f"{session}:train:0", 2), accept="application/x-protobuf")
        assert pending.get_json()["type"] == "try_again"
    api2_dir = tmp_path / "other"
    with serving(api2_dir) as api:
        model = api.model()
        lame = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3, 4]})
        made = api.submit_pass(model, 1, [lame])
        api.result(made)
        assert api.poll(made, accept="application/x-protobuf").get_json()["category"] == "user"


def test_a_compressed_body_is_read(api: Api) -> None:
    zstandard = pytest.importorskip("zstandard")
    model = api.model()
    body = PROTOBUF.encode_forward_backward(
        ForwardBackwardRequest(model, 1, [datum()], "cross_entropy")
    )
    headers = {"Content-Encoding": "zstd"}

    def send(data: bytes) -> int:
        return api.client.post(
            "/api/v1/forward_backward",
            data=data,
            content_type=PROTOBUF.content_type,
            headers=headers,
        ).status_code

    assert send(b"not zstd") == 400
    assert send(zstandard.compress(body)) == 200
    assert "metrics" in api.result(f"{model}:1")
    headers["Content-Encoding"] = "br"
    assert send(body) == 415


def test_forward_leaves_no_gradient(api: Api) -> None:
    model = api.model()
    first = api.result(api.submit_pass(model, 1))["metrics"]["loss:sum"]
    api.result(api.step(model, 2))
    body = JSON.encode_forward_backward(
        ForwardBackwardRequest(model, 3, [datum()], "cross_entropy")
    )
    forward = api.client.post("/api/v1/forward", data=body, content_type="application/json")
    after_a_step = api.result(forward.get_json())["metrics"]["loss:sum"]
    assert after_a_step < first
    api.result(api.step(model, 4))  # there is no gradient to step with
    again = api.result(api.submit_pass(model, 5))["metrics"]["loss:sum"]
    assert again == after_a_step


def test_info_of_a_run(api: Api) -> None:
    model = api.model()
    info = api.post("get_info", model_id=model)
    assert info["model_id"] == model
    assert info["model_data"]["model_name"] == "deterministic"
    assert (info["is_lora"], info["lora_rank"]) == (True, 8)
    assert info["optimizer_config"] == {"type": "adamw"}
    assert "unknown" in api.post("get_info", 404, model_id="no:train:0")["detail"]


def test_info_of_a_run_lists_the_adapted_layers(tmp_path: Path) -> None:
    class Layered(HeldEngine):
        def adapted(self, lora: LoraConfig) -> Dict[str, int]:
            return {"layers.*.up_proj": 12} if lora.train_mlp else {}

    with serving(tmp_path, Layered()) as api:
        info = api.post("get_info", model_id=api.model())
        assert info["adapted_modules"] == {"layers.*.up_proj": 12}
        assert GetInfoResponse.from_wire(info).adapted_modules == {"layers.*.up_proj": 12}


def test_creating_the_same_run_twice_is_one_run(api: Api, engine: HeldEngine) -> None:
    session = api.session()
    assert api.submit_model(session) == api.submit_model(session)
    api.post(
        "create_model", 409, session_id=session, model_seq_id=0, base_model="deterministic"
    )  # another body: no lora_config
    assert len(api.get("training_runs")["training_runs"]) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base_model": "gpt"}, "this server has deterministic"),
        ({"lora_config": {"rank": 0}}, "rank is 0"),
        ({"lora_config": {"rank": "many"}}, "lora_config"),
        ({"optimizer_config": {"type": "dimuon"}}, "has adamw"),
        ({"base_model": None}, "'base_model' is missing"),
        ({"model_seq_id": True}, "model_seq_id"),
        ({"model_seq_id": -1}, "starts at 0"),
    ],
)
def test_an_invalid_run_is_refused(api: Api, changes: dict, says: str) -> None:
    body = {"session_id": api.session(), "model_seq_id": 0, "base_model": "deterministic"}
    assert says in api.post("create_model", 400, **{**body, **changes})["detail"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "empty"),
        ([Datum(ModelInput.empty(), {"target_tokens": []})], "datum 0: model_input is empty"),
        ([datum(), datum(500_000)], "datum 1: model_input holds token 500000"),
        (
            [Datum(ModelInput.from_ints([1]), {"target_tokens": [200_000]})],
            "datum 0: target_tokens holds token 200000",
        ),
        (
            [Datum(ModelInput.from_ints([1]), {"target_tokens": [-3]})],
            "datum 0: target_tokens holds token -3",
        ),
        (
            [Datum(ModelInput.from_ints(np.ones(40_000, np.int32)), {"target_tokens": [1]})],
            "reads at most 32768",
        ),
    ],
)
def test_an_invalid_batch_is_refused(api: Api, data: list, says: str) -> None:
    model = api.model()
    assert says in api.submit_pass(model, 1, data, expect=400)["detail"]
    assert "metrics" in api.result(api.submit_pass(model, 2))


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("optim_step", {"adam_params": {"beta1": 1.0}}, "beta1"),
        ("optim_step", {"adam_params": {"learning_rate": "x"}}, "learning_rate"),
        ("optim_step", {"optimizer_params": {"type": "dimuon"}}, "adamw"),
        ("optim_step", {"optimizer_params": {}, "adam_params": {}}, "one of them"),
        ("optim_step", {}, "'adam_params' is missing"),
        ("save_weights", {}, "'path' is missing"),
        ("save_weights", {"path": "a/b"}, "not a checkpoint name"),
        ("save_weights", {"path": "../b"}, "not a checkpoint name"),
        ("save_weights", {"path": ".hidden"}, "not a checkpoint name"),
        ("save_weights", {"path": "tinker://x/weights/y"}, "not a checkpoint name"),
        ("save_weights", {"path": "a", "ttl_seconds": 5}, "ttl_seconds"),
        (
            "save_weights_for_sampler",
            {"kind": "nonsense", "sampling_session_seq_id": 0},
            "snapshot, inflight",
        ),
        ("save_weights_for_sampler", {}, "sampling_session_seq_id"),
        ("save_weights_for_sampler", {"path": "a", "kind": "inflight"}, "no name"),
        ("save_weights_external", {"path": "a", "age_encryption_recipients": ["age1x"]}, "age_"),
        ("load_weights", {"path": "weights/a"}, "not a checkpoint path"),
        ("load_weights", {"path": "tinker://a/b/c"}, "does not name a checkpoint"),
        ("load_weights", {"path": "tinker://a/sampler_weights/c", "optimizer": True}, "needs"),
    ],
)
def test_the_fault_of_a_request_is_named_and_the_run_continues(
    api: Api, path: str, body: dict, says: str
) -> None:
    model = api.model()
    assert says in api.post(path, 400, model_id=model, seq_id=1, **body)["detail"]
    assert "metrics" in api.result(api.step(model, 2))


def test_requests_need_a_model_and_a_number(api: Api) -> None:
    model = api.model()
    assert "unknown" in api.step("no:train:0", 1, expect=404)["detail"]
    assert "numbered from 1" in api.step(model, 0, expect=400)["detail"]
    assert "'seq_id' is missing" in api.post("optim_step", 400, model_id=model)["detail"]
    for body, message in ((b"{", "not JSON"), (b"[]", "JSON object")):
        answer = api.client.post("/api/v1/optim_step", data=body, content_type=JSON.content_type)
        assert (answer.status_code, message in answer.get_json()["detail"]) == (400, True)


def test_a_resumed_run_continues_like_the_one_it_came_from(api: Api) -> None:
    session = api.session()
    model = api.model(session)
    api.result(api.submit_pass(model, 1))
    api.result(api.step(model, 2))
    path = api.save(model, 3, "after-one")
    assert path == f"tinker://{model}/weights/after-one"

    def resume(number: int, optimizer: bool) -> str:
        made = api.post(
            "load_weights",
            session_id=session,
            model_seq_id=number,
            path=path,
            optimizer=optimizer,
        )
        assert api.result(made)["model_id"] == f"{session}:train:{number}"
        return f"{session}:train:{number}"

    resumed, fresh = resume(1, True), resume(2, False)
    assert api.post("get_info", model_id=resumed)["lora_rank"] == 8
    losses, steps = [], []
    for run, seq in ((model, 4), (resumed, 1), (fresh, 1)):
        losses.append(api.result(api.submit_pass(run, seq))["metrics"]["loss:sum"])
        steps.append(api.result(api.step(run, seq + 1))["metrics"]["optimizer_steps:max"])
    assert losses == [losses[0]] * 3
    assert steps == [2.0, 2.0, 1.0]


def test_weights_can_be_loaded_into_an_existing_run(api: Api) -> None:
    model = api.model()
    path = api.save(model, 1, "start")
    before = api.result(api.submit_pass(model, 2))["metrics"]
    api.result(api.step(model, 3))
    made = api.post("load_weights", model_id=model, seq_id=4, path=path, optimizer=False)
    assert api.result(made) == {"path": path, "model_id": model, "type": "load_weights"}
    assert api.result(api.submit_pass(model, 5))["metrics"] == before


def test_loading_a_missing_checkpoint_lists_the_existing_ones(api: Api) -> None:
    model = api.model()
    api.save(model, 1, "a")
    body = {"model_id": model, "seq_id": 2, "path": f"tinker://{model}/weights/b"}
    detail = api.post("load_weights", 404, **body)["detail"]
    assert "no checkpoint weights/b" in detail
    assert "weights/a" in detail
    body = {"model_id": model, "seq_id": 3, "path": "tinker://x:train:0/weights/b"}
    assert "training run x:train:0 is unknown" in api.post("load_weights", 404, **body)["detail"]


def test_a_checkpoint_name_is_used_once_unless_overwritten(api: Api) -> None:
    model = api.model()
    path = api.save(model, 1, "a")
    assert "exists" in api.post("save_weights", 409, model_id=model, seq_id=2, path="a")["detail"]
    assert api.save(model, 3, "a", "save_weights_for_sampler")  # the same name with another kind
    api.result(api.submit_pass(model, 4))
    api.result(api.step(model, 5))
    made = api.post("save_weights", model_id=model, seq_id=6, path="a", overwrite=True)
    assert api.result(made)["path"] == path
    loaded = api.post("load_weights", session_id=model.partition(":")[0], model_seq_id=1, path=path)
    api.result(loaded)
    old, new = (
        api.result(api.submit_pass(f"{model[:-1]}{n}", seq))["metrics"]
        for n, seq in ((0, 7), (1, 1))
    )
    assert old == new  # the weights that overwrote the first ones were loaded


def test_two_queued_saves_with_the_same_name_are_caught_too(api: Api, engine: HeldEngine) -> None:
    model = api.model()
    held = api.hold(model, 1)
    assert engine.holding.wait(20)
    saves = [api.post("save_weights", model_id=model, seq_id=n, path="a") for n in (2, 3)]
    engine.let_go.set()
    api.result(held)
    assert "path" in api.result(saves[0])
    failure = api.result(saves[1])
    assert failure["category"] == "user"
    assert "exists" in failure["error"]


def test_a_save_that_fails_leaves_nothing(api: Api, engine: HeldEngine, tmp_path: Path) -> None:
    def half(model_id: str, folder: Path, *, with_optimizer: bool) -> None:
        (folder / "half").write_text("x")
        raise EngineError("the disk is full", "server")

    model = api.model()
    engine.save = half  # type: ignore[method-assign]  # a disk that fills up
    made = api.post("save_weights", model_id=model, seq_id=1, path="a")
    assert api.result(made) == {"error": "the disk is full", "category": "server"}
    assert api.get(f"training_runs/{model}/checkpoints")["checkpoints"] == []
    assert not list((tmp_path / "checkpoints").rglob("*half*"))
    assert not list((tmp_path / "checkpoints").rglob("*.tmp"))
    del engine.save  # type: ignore[method-assign]
    assert api.save(model, 2, "a")


def test_an_unloaded_model_is_gone(api: Api, engine: HeldEngine) -> None:
    model = api.model()
    gap = api.step(model, 7)
    made = api.post("unload_model", model_id=model)
    assert api.result(made) == {"model_id": model, "type": "unload_model"}
    assert "was unloaded" in api.result(gap)["error"]
    assert "was unloaded" in api.step(model, 1, expect=404)["detail"]
    assert api.get(f"training_runs/{model}")["training_run_id"] == model  # still recorded


def test_a_repeated_unload_counts_once(api: Api, engine: HeldEngine) -> None:
    model = api.model()
    held = {"request_id": api.hold(model, 1)}
    assert engine.holding.wait(20)
    first = api.post("unload_model", model_id=model)
    assert api.post("unload_model", model_id=model) == first  # while the first is queued
    engine.let_go.set()
    api.result(held)
    done = {"model_id": model, "type": "unload_model"}
    assert api.result(first) == done
    assert api.post("unload_model", model_id=model) == first  # and after it is done
    assert api.result(first) == done
    assert engine.log.count("unload 0") <= 1


def test_a_poll_is_held_until_the_result_is_ready(api: Api, engine: HeldEngine) -> None:
    model = api.model()
    request_id = api.hold(model, 1)
    assert engine.holding.wait(20)
    results: list = []
    poll = threading.Thread(target=lambda: results.append(api.result(request_id)))
    poll.start()
    assert not results
    engine.let_go.set()
    poll.join(20)
    assert "metrics" in results[0]


def test_polls_beyond_the_cap_get_429(tmp_path: Path) -> None:
    engine = HeldEngine()
    with serving(tmp_path, engine, max_held_polls=1) as api:
        model = api.model()
        request_id = api.hold(model, 1)
        assert engine.holding.wait(20)
        wait, is_held = api.backend.futures.wait, threading.Event()

        def wait_and_tell(request_id: str, timeout_s: float) -> Any:
            if timeout_s > 0:
                is_held.set()
            return wait(request_id, timeout_s)

        api.backend.futures.wait = wait_and_tell
        held = threading.Thread(target=lambda: api.result(request_id))
        held.start()
        assert is_held.wait(WAIT_S)
        refused = api.poll(request_id)
        assert refused.status_code == 429
        assert refused.headers["Retry-After"] == "1"
        engine.let_go.set()
        held.join(WAIT_S)
        assert "metrics" in api.result(request_id)


def test_an_unknown_request_is_not_found(api: Api) -> None:
    assert "nothing" in api.post("retrieve_future", 404, request_id="nothing")["detail"]
    api.post("retrieve_future", 400)


def test_settings_of_losses_reach_the_engine(api: Api) -> None:
    model = api.model()
    # Tokens that are not candidates have a log-probability near -15, so the ratio is over 2.
    rl = Datum(
        ModelInput.from_ints([1, 2]),
        {"target_tokens": [2, 3], "logprobs": [-16.0, -16.0], "advantages": [1.0, 1.0]},
    )
    for seq_id, config, bound in ((1, {}, 1.2), (2, {"clip_high_threshold": 1.5}, 1.5)):
        asked = ForwardBackwardRequest(model, seq_id, [rl], "ppo", config)
        made = api.client.post(
            "/api/v1/forward_backward",
            data=PROTOBUF.encode_forward_backward(asked),
            content_type=PROTOBUF.content_type,
        )
        loss = api.result(made.get_json())["metrics"]["loss:sum"]
        assert loss == pytest.approx(-2 * bound)


def test_a_body_without_a_valid_run_is_refused(api: Api) -> None:
    model = api.model()
    bodies = (
        (b"\xff\xff", PROTOBUF.content_type),
        (b"{", JSON.content_type),
        (b"[]", JSON.content_type),
        (b'{"model_id": 5, "seq_id": 1}', JSON.content_type),
    )
    for body, content_type in bodies:
        answer = api.client.post("/api/v1/forward_backward", data=body, content_type=content_type)
        assert answer.status_code == 400, body
    assert "metrics" in api.result(api.submit_pass(model, 1))  # no seq_id was used up


def test_a_checkpoint_of_another_base_model_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path, HeldEngine(model_name="other")) as api:
        session = api.session()
        api.result(api.submit_model(session, base_model="other"))
        path = api.save(f"{session}:train:0", 1, "a")
    with serving(tmp_path) as api:
        session = api.session()
        load = {"session_id": session, "model_seq_id": 0, "path": path}
        says = f"{path} was trained from other; this server has deterministic"
        assert api.post("load_weights", 400, **load)["detail"] == says
        body = {"session_id": session, "sampling_session_seq_id": 0, "model_path": path}
        assert api.post("create_sampling_session", 400, **body)["detail"] == says


def test_a_run_whose_weights_cannot_be_loaded_does_not_exist(api: Api, tmp_path: Path) -> None:
    session = api.session()
    model = api.model(session)
    path = api.save(model, 1, "a")
    (state,) = (tmp_path / "checkpoints").rglob("deterministic.json")
    state.write_text("broken")
    made = api.post("load_weights", session_id=session, model_seq_id=1, path=path)
    failure = api.result(made)
    assert failure["category"] == "user"
    assert "not a checkpoint of the deterministic engine" in failure["error"]
    runs = api.get("training_runs")["training_runs"]
    assert [run["training_run_id"] for run in runs] == [model]


def test_a_checkpoint_deleted_while_its_loading_is_queued_fails_the_load(
    api: Api, engine: HeldEngine
) -> None:
    model = api.model()
    path = api.save(model, 1, "a")
    held = api.hold(model, 2)
    assert engine.holding.wait(20)
    load = api.post("load_weights", model_id=model, seq_id=3, path=path)
    api.client.delete(f"/api/v1/training_runs/{model}/checkpoints/weights/a")
    engine.let_go.set()
    api.result(held)
    failure = api.result(load)
    assert failure["error"] == f"checkpoint {path} was deleted before it was loaded"


def test_without_zstandard_a_compressed_body_is_a_415(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    answer = api.client.post(
        "/api/v1/forward_backward",
        data=b"x",
        content_type=PROTOBUF.content_type,
        headers={"Content-Encoding": "zstd"},
    )
    assert answer.status_code == 415
    assert "uncompressed" in answer.get_json()["detail"]


def test_images_are_refused_by_name(api: Api) -> None:
    model = api.model()
    picture = Datum(ModelInput((ImageChunk(b"x", "png", 3),)), {"target_tokens": [1, 2, 3]})
    detail = api.submit_pass(model, 1, [datum(), picture], expect=400)["detail"]
    assert "datum 1" in detail
    assert "text tokens only" in detail
    chunk = {"type": "image", "data": "eA==", "format": "png", "expected_tokens": 3}
    body = api.sample_body(api.sampler(model.partition(":")[0]), 0, prompt={"chunks": [chunk]})
    assert "ImageChunk" in api.post("asample", 400, **body)["detail"]


def test_the_error_about_a_loss_without_a_public_definition_names_alternatives(api: Api) -> None:
    problem = api.submit_pass(api.model(), 1, [datum()], "stable_reinforce", expect=400)
    assert "its definition is not public" in problem["detail"]
    assert "importance_sampling, ppo, cispo or gspo" in problem["detail"]


def test_gspo_accepts_inputs_for_the_response_tokens_only(api: Api) -> None:
    model = api.model()
    response = Datum(
        ModelInput.from_ints([1, 2, 3, 4]),
        {
            "target_tokens": [4, 5],
            "logprobs": [-15.0, -15.0],
            "advantages": [1.0, 1.0],
            "sequence_ratio_mask": [1.0, 1.0],
        },
    )
    result = api.result(api.submit_pass(model, 1, [response], "gspo"))
    assert len(result["loss_fn_outputs"][0]["logprobs"]["data"]) == 2
