"""The OpenAI-compatible endpoint over plain HTTP, with the deterministic engine."""

from __future__ import annotations

import http.client
import json
import threading
from pathlib import Path
from typing import Any, Container, Dict, Iterator, List, Optional, Sequence
from urllib.parse import quote, urlsplit

import pytest
from local.harness import WAIT_S, Api, HeldEngine, datum, serving

from tinkex.local import LocalServer
from tinkex.local.engines.engine import EngineError, Finished
from tinkex.local.scheduling.batches import SamplingLimits
from tinkex.types import SampleRequest

ROOTS = ("/v1", "/oai/api/v1")
CHAT = [{"role": "user", "content": "hi"}]


class OpenAI:
    """Sends requests to the endpoint through Flask's test client."""

    def __init__(self, api: Api, root: str = "/v1") -> None:
        self.client = api.client
        self.root = root

    def post(self, path: str, expect: int = 200, /, **body: Any) -> Any:
        answer = self.client.post(f"{self.root}/{path}", json=body)
        assert answer.status_code == expect, answer.text
        return answer.get_json()

    def complete(self, expect: int = 200, /, **body: Any) -> Any:
        body = {"model": "deterministic", "prompt": "hello", "seed": 1, **body}
        return self.post("completions", expect, **body)

    def chat(self, expect: int = 200, /, **body: Any) -> Any:
        body = {"model": "deterministic", "messages": CHAT, "seed": 1, "max_tokens": 5, **body}
        return self.post("chat/completions", expect, **body)

    def stream(self, path: str, **body: Any) -> List[Any]:
        """Return the chunks of a stream, without its end marker."""
        body = {"model": "deterministic", "seed": 1, "stream": True, **body}
        answer = self.client.post(f"{self.root}/{path}", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.content_type.startswith("text/event-stream")
        events = [event for event in answer.text.split("\n\n") if event]
        assert all(event.startswith("data: ") for event in events)
        assert events.pop() == "data: [DONE]"
        return [json.loads(event[len("data: ") :]) for event in events]

    def refused(self, param: Optional[str], **body: Any) -> str:
        error = self.complete(400, **body)["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
        return str(error["message"])


@pytest.fixture
def openai(api: Api) -> OpenAI:
    return OpenAI(api)


def drawn(api: Api, text: str, **params: Any) -> List[int]:
    """Return the tokens that the Tinker protocol draws for the same prompt."""
    made = api.submit_sample(
        api.sampler(api.session()),
        0,
        prompt={"chunks": [{"type": "encoded_text", "tokens": [ord(c) for c in text]}]},
        sampling_params={"seed": 1, **params},
    )
    tokens: List[int] = api.result(made)["sequences"][0]["tokens"]
    return tokens


def read(tokens: Sequence[int]) -> str:
    return "".join(map(chr, tokens))


# Models


@pytest.mark.parametrize("root", ROOTS)
def test_models_are_the_base_model_and_the_checkpoints_for_sampling(api: Api, root: str) -> None:
    model = api.model()
    api.save(model, 1, "not-for-sampling")
    path = api.save(model, 2, "first", "save_weights_for_sampler")
    listed = api.client.get(f"{root}/models").get_json()
    assert listed["object"] == "list"
    assert [entry["id"] for entry in listed["data"]] == ["deterministic", path]
    assert {entry["object"] for entry in listed["data"]} == {"model"}
    for name in (path, quote(path, safe="")):
        assert api.client.get(f"{root}/models/{name}").get_json()["id"] == path
    missing = api.client.get(f"{root}/models/other")
    assert missing.status_code == 404
    assert missing.get_json()["error"]["code"] == "model_not_found"


def test_a_checkpoint_is_named_by_its_path_or_by_base_and_path(api: Api, openai: OpenAI) -> None:
    model = api.model()
    for seq_id in (1, 3, 5):
        api.result(api.submit_pass(model, seq_id, [datum()]))
        api.result(api.step(model, seq_id + 1))
    path = api.save(model, 7, "trained", "save_weights_for_sampler")
    base = openai.complete(logprobs=0)
    trained = openai.complete(model=path, logprobs=0)
    both = openai.complete(model=f"deterministic;{path}", logprobs=0)
    assert trained["model"] == path
    assert trained["choices"] == both["choices"]
    pairs = zip(*(r["choices"][0]["logprobs"]["token_logprobs"] for r in (base, trained)))
    assert all(before < after for before, after in pairs)  # each step raises all logprobs
    for name in ("other", f"other;{path}", "tinker://nothing", f"{path}x", "deterministic;x", ";"):
        error = openai.complete(404, model=name)["error"]
        assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "missing" in openai.refused("model", model=None)


def test_a_checkpoint_saved_again_is_another_model(api: Api, openai: OpenAI) -> None:
    model = api.model()
    body = {"model_id": model, "path": "x", "overwrite": True}
    path = api.result(api.post("save_weights_for_sampler", seq_id=1, **body))["path"]
    before = openai.complete(model=path, logprobs=0)
    api.result(api.submit_pass(model, 2, [datum()]))
    api.result(api.step(model, 3))
    assert api.result(api.post("save_weights_for_sampler", seq_id=4, **body))["path"] == path
    assert openai.complete(model=path, logprobs=0)["choices"] != before["choices"]


# Completions


def test_a_completion_is_the_text_of_the_tokens_that_a_sampler_draws(
    api: Api, openai: OpenAI
) -> None:
    response = openai.complete(max_tokens=7)
    choice = response["choices"][0]
    assert choice["text"] == read(drawn(api, "hello", max_tokens=7))
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    assert response["object"] == "text_completion"
    assert response["id"].startswith("cmpl-")
    assert response["usage"] == {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    assert len(openai.complete()["choices"][0]["text"]) == 16  # OpenAI's default


@pytest.mark.parametrize(
    "prompt", ["hi", ["hi"], [104, 105], [[104, 105]]], ids=["text", "texts", "tokens", "lists"]
)
def test_prompts_may_be_text_or_tokens(openai: OpenAI, prompt: Any) -> None:
    response = openai.complete(prompt=prompt, max_tokens=3, echo=True)
    assert response["choices"][0]["text"][:2] == "hi"
    assert response["choices"] == openai.complete(prompt="hi", max_tokens=3, echo=True)["choices"]


def test_a_list_of_prompts_gets_n_choices_each(
    api: Api, openai: OpenAI, engine: HeldEngine
) -> None:
    prompts = ["one", [116, 119, 111], "three"]
    response = openai.complete(prompt=prompts, n=2, max_tokens=4)
    assert [choice["index"] for choice in response["choices"]] == list(range(6))
    single = [openai.complete(prompt=p, n=2, max_tokens=4)["choices"] for p in prompts]
    texts = [choice["text"] for choices in single for choice in choices]
    assert [choice["text"] for choice in response["choices"]] == texts
    assert len(set(texts)) == 6
    assert response["usage"]["prompt_tokens"] == 3 + 3 + 5
    assert response["usage"]["completion_tokens"] == 24


def test_a_stop_string_ends_the_text_and_is_left_out(api: Api, openai: OpenAI) -> None:
    tokens = drawn(api, "hello", max_tokens=20, stop=[])
    stop = read(tokens[5:7])
    response = openai.complete(max_tokens=20, stop=["never", stop])
    assert response["choices"][0]["text"] == read(tokens[:5])
    assert response["choices"][0]["finish_reason"] == "stop"
    assert response["usage"]["completion_tokens"] == 7


def until_the_end(api: Api) -> Dict[str, Any]:
    """Return a prompt and a seed with which the model ends by itself, but not immediately."""
    for seed in range(200):
        tokens = drawn(api, "hello", max_tokens=40, seed=seed)
        if tokens[-1] == 0 and len(tokens) > 3:
            return {"seed": seed, "text": read(tokens[:-1])}
    raise AssertionError("no seed ends")


def test_the_end_token_adds_no_text_with_and_without_stop_strings(api: Api, openai: OpenAI) -> None:
    found = until_the_end(api)
    for stop in (None, "never", ["never", "ever"]):
        response = openai.complete(seed=found["seed"], max_tokens=40, stop=stop, logprobs=1)
        choice = response["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (found["text"], "stop")
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        assert response["usage"]["completion_tokens"] == len(found["text"]) + 1


def test_logprobs_of_completions(api: Api, openai: OpenAI) -> None:
    choice = openai.complete(max_tokens=3, logprobs=2, temperature=0)["choices"][0]
    columns = choice["logprobs"]
    assert "".join(columns["tokens"]) == choice["text"]
    assert columns["text_offset"] == [0, 1, 2]
    for token, logprob, top in zip(
        columns["tokens"], columns["token_logprobs"], columns["top_logprobs"]
    ):
        assert len(top) == 2
        assert top[token] == logprob == max(top.values())
    without = openai.complete(max_tokens=3, logprobs=0, temperature=0)["choices"][0]["logprobs"]
    assert without["token_logprobs"] == columns["token_logprobs"]
    assert without["top_logprobs"] == [None, None, None]


def test_echo_scores_the_prompt(api: Api, openai: OpenAI) -> None:
    """Evaluation harnesses request the log-probabilities of a given text in this way."""
    choice = openai.complete(prompt="abcd", max_tokens=1, echo=True, logprobs=1)["choices"][0]
    columns = choice["logprobs"]
    assert "".join(columns["tokens"]) == choice["text"]
    assert choice["text"].startswith("abcd")
    assert columns["text_offset"] == [0, 1, 2, 3, 4]
    assert columns["token_logprobs"][0] is None
    assert columns["top_logprobs"][0] is None
    made = api.submit_sample(
        api.sampler(api.session()),
        0,
        prompt={"chunks": [{"type": "encoded_text", "tokens": [97, 98, 99, 100]}]},
        prompt_logprobs=True,
    )
    expected = api.result(made)["prompt_logprobs"][1:]
    assert columns["token_logprobs"][1:4] == pytest.approx(expected)
    for token, logprob, top in zip(
        columns["tokens"][1:], columns["token_logprobs"][1:], columns["top_logprobs"][1:]
    ):
        assert top[token] == logprob
    assert (
        openai.complete(prompt="abcd", max_tokens=1, echo=True)["choices"][0]["text"]
        == (choice["text"])
    )


def test_without_tokens_only_the_prompt_is_scored(openai: OpenAI) -> None:
    response = openai.complete(prompt="abcd", max_tokens=0, echo=True, logprobs=1)
    choice = response["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("abcd", "length")
    assert len(choice["logprobs"]["tokens"]) == 4
    assert response["usage"]["completion_tokens"] == 0
    assert openai.complete(max_tokens=0)["choices"][0]["text"] == ""
    chunks = openai.stream("completions", prompt="abcd", max_tokens=0, echo=True)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["abcd", ""]


# Chat


def test_a_chat_completion(openai: OpenAI) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
    ]
    response = openai.chat(messages=messages)
    prompt = "system: be brief\nuser: hi\nassistant: "
    message = response["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["content"] == openai.complete(prompt=prompt, max_tokens=5)["choices"][0]["text"]
    assert response["object"] == "chat.completion"
    assert response["id"].startswith("chatcmpl-")
    assert response["usage"]["prompt_tokens"] == len(prompt)
    newer = openai.chat(messages=messages, max_completion_tokens=5, max_tokens=None)
    assert newer["choices"] == response["choices"]


def test_logprobs_of_a_chat(openai: OpenAI) -> None:
    choice = openai.chat(logprobs=True, top_logprobs=3, temperature=0)["choices"][0]
    entries = choice["logprobs"]["content"]
    assert (
        bytes(b for entry in entries for b in entry["bytes"]).decode()
        == (choice["message"]["content"])
    )
    for entry in entries:
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["token"] == entry["token"]
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]
    assert openai.chat(logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert openai.chat(400, top_logprobs=3)["error"]["param"] == "top_logprobs"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hi", "messages"),
        (["hi"], "messages[0]"),
        ([{"role": "robot", "content": "hi"}], "messages[0].role"),
        ([*CHAT, {"role": "user"}], "messages[1].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0]",
        ),
    ],
)
def test_invalid_messages_are_refused(openai: OpenAI, messages: Any, param: str) -> None:
    assert openai.chat(400, messages=messages)["error"]["param"] == param


# Streams


def test_a_stream_is_the_completion_token_by_token(openai: OpenAI) -> None:
    full = openai.complete(max_tokens=12, n=2, logprobs=2)
    chunks = openai.stream("completions", prompt="hello", max_tokens=12, n=2, logprobs=2)
    assert len(chunks) == 24
    assert all("usage" not in chunk for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in full["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert [part["finish_reason"] for part in mine] == [None] * 11 + ["length"]
        for name, values in choice["logprobs"].items():
            assert [v for part in mine for v in part["logprobs"][name]] == values


def test_a_chat_streams_role_then_text_then_usage(openai: OpenAI) -> None:
    full = openai.chat(logprobs=True, top_logprobs=1)
    chunks = openai.stream(
        "chat/completions",
        messages=CHAT,
        max_tokens=5,
        logprobs=True,
        top_logprobs=1,
        stream_options={"include_usage": True},
    )
    last = chunks.pop()
    assert last["choices"] == []
    assert last["usage"] == full["usage"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk["usage"] for chunk in chunks] == [None] * 6
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"]["role"] == "assistant"
    message = full["choices"][0]
    assert "".join(c["delta"]["content"] for c in choices) == message["message"]["content"]
    entries = [entry for c in choices[1:] for entry in c["logprobs"]["content"]]
    assert entries == message["logprobs"]["content"]
    assert [c["finish_reason"] for c in choices] == [None] * 5 + ["length"]


def test_an_echo_streams_the_prompt_first(openai: OpenAI) -> None:
    asked = {"prompt": ["ab", "cd"], "max_tokens": 3, "echo": True}
    for logprobs in (None, 1):
        full = openai.complete(**asked, logprobs=logprobs)
        chunks = openai.stream("completions", **asked, logprobs=logprobs)
        for choice in full["choices"]:
            mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
            assert mine[0]["text"] == choice["text"][:2]
            assert "".join(part["text"] for part in mine) == choice["text"]
            if logprobs is not None:
                found = [x for part in mine for x in part["logprobs"]["token_logprobs"]]
                assert found == choice["logprobs"]["token_logprobs"]


def test_no_part_of_a_stop_string_is_streamed(api: Api, openai: OpenAI) -> None:
    tokens = drawn(api, "hello", max_tokens=20, stop=[])
    for stops in ([read(tokens[5:9])], [read(tokens[2:4]) + "x", read(tokens[4:6])]):
        full = openai.complete(max_tokens=20, stop=stops, logprobs=0)
        chunks = openai.stream("completions", prompt="hello", max_tokens=20, stop=stops, logprobs=0)
        parts = [chunk["choices"][0] for chunk in chunks]
        assert "".join(part["text"] for part in parts) == full["choices"][0]["text"]
        assert parts[-1]["finish_reason"] == full["choices"][0]["finish_reason"] == "stop"
        for stop in stops:
            assert not any(part["text"].endswith(stop[:1]) for part in parts)
        names = [t for part in parts if part["logprobs"] for t in part["logprobs"]["tokens"]]
        assert "".join(names) == full["choices"][0]["text"]


class Broken(HeldEngine):
    """An engine that fails after the first slice."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def sample(
        self,
        sampler_id: str,
        requests: Sequence[SampleRequest],
        dropped: Container[int] = (),
    ) -> Iterator[List[Finished]]:
        yield next(super().sample(sampler_id, requests, dropped))
        raise self.error


def test_a_failure_in_the_middle_of_a_stream_is_an_event(tmp_path: Path) -> None:
    with serving(tmp_path, Broken(ValueError("NaN in the logits"))) as api:
        body = {"model": "deterministic", "prompt": "hello", "seed": 1, "stream": True}
        events = api.client.post("/v1/completions", json=body).text.strip().split("\n\n")
        assert len(events) == 9
        error = json.loads(events[-1][len("data: ") :])["error"]
        assert error["type"] == "server_error"
        assert "NaN in the logits" in error["message"]
        full = OpenAI(api).complete(500, prompt="a")
        assert "NaN in the logits" in full["error"]["message"]


def test_a_request_that_the_engine_refuses_is_the_clients_fault(tmp_path: Path) -> None:
    with serving(tmp_path, Broken(EngineError("too hot"))) as api:
        error = OpenAI(api).complete(422, max_tokens=20)["error"]
        assert (error["type"], error["message"]) == ("invalid_request_error", "too hot")


# Refusals


def test_unsupported_parameters_are_refused_by_name(openai: OpenAI) -> None:
    for name, value in {
        "presence_penalty": 0.5,
        "frequency_penalty": -1,
        "logit_bias": {"50256": -100},
        "suffix": "end",
        "best_of": 3,
        "tools": [{"type": "function"}],
        "response_format": {"type": "json_object"},
    }.items():
        assert name in openai.refused(name, **{name: value})
    assert "unknown" in openai.refused("max_token", max_token=3)
    assert openai.chat(400, prompt="x")["error"]["param"] == "prompt"


def test_parameters_without_effect_are_accepted(openai: OpenAI) -> None:
    plain = openai.complete(max_tokens=3)["choices"]
    taken = openai.complete(
        max_tokens=3,
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        suffix=None,
        best_of=1,
        user="me",
        metadata={"a": "b"},
        top_p=1,
        n=1,
        tools=[],
    )
    assert taken["choices"] == plain


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", "many"),
        ("max_tokens", True),
        ("n", 0),
        ("n", 1.5),
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 2),
        ("seed", "x"),
        ("stop", ""),
        ("stop", [1]),
        ("stop", 5),
        ("logprobs", -1),
        ("logprobs", 1 << 40),
        ("echo", 1),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("prompt", None),
        ("prompt", []),
        ("prompt", ""),
        ("prompt", {}),
        ("prompt", [[]]),
        ("prompt", ["a", 1]),
        ("prompt", [1.5]),
        ("prompt", [-1]),
    ],
)
def test_values_out_of_range_are_refused_by_name(openai: OpenAI, name: str, value: Any) -> None:
    assert name in openai.refused(name, **{name: value})


def test_requests_beyond_the_context_length_are_refused(tmp_path: Path) -> None:
    with serving(tmp_path, HeldEngine(context_length=10)) as api:
        openai = OpenAI(api)
        error = openai.complete(400, prompt="12345", max_tokens=6)["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
        error = openai.complete(400, prompt="1234567890")["error"]
        assert error["code"] == "context_length_exceeded"
        assert len(openai.complete(prompt="12345")["choices"][0]["text"]) == 5  # all there is
        assert openai.chat(400)["error"]["param"] == "messages"


def test_a_token_beyond_the_vocabulary_is_refused(openai: OpenAI) -> None:
    assert "vocabulary" in openai.refused(None, prompt=[1, 1 << 30])


def test_too_many_samples_are_refused(openai: OpenAI) -> None:
    assert "1024" in openai.refused("n", n=2000)
    assert "2048" in openai.refused("prompt", prompt=["a"] * 3, n=1000)
    assert openai.chat(400, n=2000)["error"]["param"] == "n"


def test_errors_have_the_form_of_openai(tmp_path: Path, api: Api) -> None:
    for answer, status in [
        (api.client.post("/v1/completions", data="{", content_type="application/json"), 400),
        (api.client.post("/v1/completions", data="[]", content_type="application/json"), 400),
        (api.client.post("/v1/completions", data="x", content_type="text/plain"), 415),
        (api.client.get("/v1/models", headers={"Host": "evil.example"}), 421),
        (api.client.post("/v1/completions", json={}, headers={"Origin": "http://evil"}), 403),
        (api.client.get("/v1/files"), 404),
        (api.client.post("/oai/api/v1/embeddings", json={}), 404),
        (api.client.delete("/v1/models"), 404),
    ]:
        assert answer.status_code == status, answer.text
        assert set(answer.get_json()["error"]) == {"message", "type", "param", "code"}
    with serving(tmp_path / "small", max_body_bytes=100) as small:
        answer = small.client.post("/v1/completions", json={"prompt": "x" * 200})
        assert answer.status_code == 413
        assert "error" in answer.get_json()


@pytest.mark.parametrize("root", ROOTS)
def test_the_key_may_be_a_bearer_token_or_x_api_key(tmp_path: Path, root: str) -> None:
    with serving(tmp_path, api_key="tml-right") as api:
        for headers in ({"Authorization": "Bearer tml-right"}, {"X-API-Key": "tml-right"}):
            assert api.client.get(f"{root}/models", headers=headers).status_code == 200
        for headers in ({}, {"Authorization": "Bearer tml-wrong"}, {"X-API-Key": "tml-wrong"}):
            answer = api.client.get(f"{root}/models", headers=headers)
            assert answer.status_code == 401
            assert answer.get_json()["error"]["code"] == "invalid_api_key"
        # The protocol's own routes still accept the key only in X-API-Key.
        bearer = {"Authorization": "Bearer tml-right"}
        assert api.client.get("/api/v1/client/config", headers=bearer).status_code == 401


def test_too_many_requests_get_429(tmp_path: Path) -> None:
    with serving(tmp_path, max_held_polls=0) as api:
        answer = api.client.post("/v1/completions", json={"model": "deterministic", "prompt": "a"})
        assert answer.status_code == 429
        assert answer.headers["Retry-After"] == "1"
        assert answer.get_json()["error"]["type"] == "rate_limit_error"


# The engine is shared


def test_the_endpoint_responds_during_training(api: Api, openai: OpenAI) -> None:
    model = api.model()
    made = [api.submit_pass(model, n, [datum(n)]) for n in range(1, 20)]
    responses = [openai.complete(max_tokens=20) for _ in range(3)]
    assert responses[0]["choices"] == responses[2]["choices"]
    for one in made:
        assert "error" not in api.result(one)


def test_requests_for_one_model_share_a_batch(api: Api, engine: HeldEngine) -> None:
    model = api.model()
    held = api.hold(model, 1)
    assert engine.holding.wait(WAIT_S)
    found: List[Any] = []
    clients = [
        threading.Thread(target=lambda: found.append(OpenAI(api).complete(prompt=["a", "b"])))
        for _ in range(3)
    ]
    for client in clients:
        client.start()
    while sum(len(lane.queued) for lane in api.backend.scheduler._lanes.values()) < 6:
        assert not engine.let_go.wait(0.01)
    engine.let_go.set()
    api.result(held)
    for client in clients:
        client.join(WAIT_S)
    assert len(found) == 3
    assert [entry for entry in engine.log if entry.startswith("sample")] == ["sample 6"]


def test_requests_of_the_endpoint_and_of_tinker_clients_share_a_batch(
    api: Api, openai: OpenAI, engine: HeldEngine
) -> None:
    model = api.model()
    path = api.save(model, 1, "x", "save_weights_for_sampler")
    sampler = api.sampler(api.session(), model_path=path)
    alone = api.result(api.submit_sample(sampler, 0))
    expected = openai.complete(model=path)["choices"]
    held = api.hold(model, 2)
    assert engine.holding.wait(WAIT_S)
    engine.log.clear()
    found: Dict[str, Any] = {}

    def stream() -> None:
        found["stream"] = OpenAI(api).stream("completions", prompt="hello", model=path)

    def complete() -> None:
        found["whole"] = OpenAI(api).complete(model=f"deterministic;{path}")

    clients = [threading.Thread(target=stream), threading.Thread(target=complete)]
    for client in clients:
        client.start()
    made = api.submit_sample(sampler, 1)
    while sum(len(lane.queued) for lane in api.backend.scheduler._lanes.values()) < 3:
        assert not engine.let_go.wait(0.01)
    engine.let_go.set()
    api.result(held)
    assert api.result(made) == alone
    for client in clients:
        client.join(WAIT_S)
    assert found["whole"]["choices"] == expected
    streamed = "".join(chunk["choices"][0]["text"] for chunk in found["stream"])
    assert streamed == expected[0]["text"]
    assert [entry for entry in engine.log if entry.startswith("sample")] == ["sample 3"]


def test_unused_samplers_are_unloaded_to_make_room(tmp_path: Path) -> None:
    limits = SamplingLimits(gather_s=0, gather_most_s=0, max_loaded=2)
    with serving(tmp_path, limits=limits) as api:
        openai, model = OpenAI(api), api.model()
        paths = [api.save(model, n, f"x{n}", "save_weights_for_sampler") for n in range(1, 6)]
        for _ in range(2):
            for path in paths:
                openai.complete(model=path)
        api.save(model, 6, "last")  # by now the engine thread has done all earlier work
        assert len(list((tmp_path / "samplers").iterdir())) == 2


def test_a_deleted_checkpoint_is_no_longer_a_model(api: Api, openai: OpenAI) -> None:
    model = api.model()
    path = api.save(model, 1, "x", "save_weights_for_sampler")
    openai.complete(model=path)
    api.client.delete(f"/api/v1/training_runs/{model}/checkpoints/sampler_weights/x")
    openai.complete(404, model=path)


# Over sockets


class Stepwise(HeldEngine):
    """Waits before each slice but the first, and records which requests are in progress."""

    def __init__(self) -> None:
        super().__init__()
        self.sliced = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)
        self.dropped: List[int] = []
        self.ended = threading.Event()

    def sample(
        self,
        sampler_id: str,
        requests: Sequence[SampleRequest],
        dropped: Any = (),
    ) -> Iterator[List[Finished]]:
        try:
            for finished in super().sample(sampler_id, requests, dropped):
                self.sliced.release()
                yield finished
                assert self.go_on.acquire(timeout=WAIT_S)
        finally:
            self.dropped = sorted(dropped)
            self.ended.set()


def send(server: LocalServer, **body: Any) -> http.client.HTTPConnection:
    parts = urlsplit(server.url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=WAIT_S)
    body = {"model": "deterministic", "prompt": "hello", "seed": 1, **body}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection


def open_stream(server: LocalServer, **body: Any) -> http.client.HTTPResponse:
    connection = send(server, stream=True, **body)
    response = connection.getresponse()
    connection.close()  # the socket closes with the response
    return response


def test_tokens_are_sent_as_they_are_drawn() -> None:
    engine = Stepwise()
    with LocalServer(engine) as server:
        response = open_stream(server, max_tokens=20)
        for tokens in (8, 8, 4):  # per slice; the engine waits in between
            for _ in range(tokens):
                assert response.readline().startswith(b"data: {")
                assert response.readline() == b"\n"
            engine.go_on.release()
        assert response.readline() == b"data: [DONE]\n"
        response.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_cancels_its_samples(stream: bool) -> None:
    engine = Stepwise()
    with LocalServer(engine) as server:
        connection = send(server, max_tokens=20_000, stream=stream)
        if stream:
            response = connection.getresponse()
            assert response.readline().startswith(b"data: {")
            response.close()
        assert engine.sliced.acquire(timeout=WAIT_S)
        connection.close()
        while not engine.ended.is_set():
            engine.go_on.release()
            engine.sliced.acquire(timeout=0.05)
        assert engine.dropped == [0]


def test_a_client_that_hangs_up_while_it_waits_for_the_engine_is_noticed() -> None:
    """The samples of such a request, queued behind other work, are never begun."""
    engine = Stepwise()
    with LocalServer(engine) as server:
        running = send(server, max_tokens=20_000)
        assert engine.sliced.acquire(timeout=WAIT_S)
        waiting = send(server, max_tokens=20_000)
        backend = server._backend
        queue = backend.scheduler._lanes["base"]
        while not queue.queued:
            assert not engine.ended.wait(0.01)
        waiting.close()
        while queue.queued:
            assert not engine.ended.wait(0.01)
        running.close()
        engine.go_on.release(100_000)
        assert engine.ended.wait(WAIT_S)
        assert engine.log.count("sample 1") == 1


def test_closing_the_server_ends_a_stream() -> None:
    engine = Stepwise()
    with LocalServer(engine) as server:
        response = open_stream(server, max_tokens=20_000)
        assert response.readline().startswith(b"data: {")
        closing = threading.Thread(target=server.close)
        closing.start()
        rest = response.read()
        response.close()
        assert b"the server was closed" in rest
        engine.go_on.release(100_000)
        closing.join(WAIT_S)
