"""The package `openai`, as published, against the embedded server."""

from __future__ import annotations

import threading
from typing import Any, Iterator, List

import pytest
from field.conftest import KEY, MODEL

from tinkex import ServiceClient, types
from tinkex.local import LocalServer

pytest.importorskip("torch")
pytest.importorskip("openai")

CHAT: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé?"}]


@pytest.fixture
def client(server: LocalServer) -> Iterator[Any]:
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def test_models(client: Any, server: LocalServer) -> None:
    assert next(iter(client.models.list())).id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL


def test_the_path_of_the_hosted_service(server: LocalServer) -> None:
    import openai

    with openai.OpenAI(base_url=f"{server.url}/oai/api/v1", api_key=KEY) as hosted:
        made = hosted.completions.create(model=MODEL, prompt="a", max_tokens=2)
        assert made.usage is not None
        assert made.usage.completion_tokens == 2


def test_a_stream_is_the_completion(client: Any) -> None:
    asked: Any = {"model": MODEL, "prompt": "hello", "max_tokens": 30, "seed": 1, "n": 2}
    full = client.completions.create(**asked, logprobs=2)
    streamed = ["", ""]
    for chunk in client.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in full.choices]
    assert [len(choice.logprobs.tokens) for choice in full.choices] == [30, 30]
    assert full.usage.total_tokens == 5 + 60


def test_a_chat_streams(client: Any) -> None:
    asked: Any = {"model": MODEL, "messages": CHAT, "max_completion_tokens": 20, "seed": 1}
    full = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    text, usage, reasons = "", None, []
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options=options):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons.append(choice.finish_reason)
        usage = chunk.usage
    assert text == full.choices[0].message.content
    assert usage == full.usage
    assert reasons[-1] == full.choices[0].finish_reason
    assert len(full.choices[0].logprobs.content[0].top_logprobs) == 2


def test_errors_have_their_class_and_parameter(client: Any, server: LocalServer) -> None:
    import openai

    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt="a", presence_penalty=1)
    assert refused.value.param == "presence_penalty"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="tinker://a:train:0/sampler_weights/b", prompt="a")
    assert missing.value.code == "model_not_found"
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong") as other:
        with pytest.raises(openai.AuthenticationError):
            other.models.list()


def test_a_checkpoint_answers_while_its_run_trains_on(client: Any, server: LocalServer) -> None:
    text = list(b"hello hello hello")
    datum = types.Datum(
        types.ModelInput.from_ints(text[:-1]),
        {"target_tokens": text[1:], "weights": [1.0] * (len(text) - 1)},
    )
    with ServiceClient(base_url=server.url, api_key=KEY) as service:
        training = service.create_lora_training_client(base_model=MODEL, rank=32)

        def train(steps: int) -> None:
            for _ in range(steps):
                training.forward_backward([datum], "cross_entropy")
                training.optim_step(types.AdamParams(learning_rate=0.005)).result()

        train(30)
        path = training.save_weights_for_sampler("learnt").result().path
        going_on = threading.Thread(target=train, args=(30,))
        going_on.start()
        texts: List[str] = []
        for model in (path, f"{MODEL};{path}"):
            made = client.completions.create(
                model=model, prompt="hello he", max_tokens=9, temperature=0
            )
            texts.append(made.choices[0].text)
        assert texts == ["llo hello"] * 2
        assert path in [model.id for model in client.models.list()]
        going_on.join()
