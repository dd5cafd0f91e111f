"""The OpenAI-compatible endpoint with real tokenizers: characters, chat templates, logprobs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Iterator, List

import pytest
from flask.testing import FlaskClient
from local.torch_engine.test_stopping import TOKENIZERS, split
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tinkex.local.app import create_app
from tinkex.local.backend import Backend
from tinkex.local.engines.engine import SampledToken
from tinkex.local.engines.torch_engine import TorchEngine
from tinkex.local.engines.torch_engine.builtin_models import SPECIAL_TOKENS
from tinkex.local.openai.choices import Choice, read_prompt
from tinkex.local.openai.text import TokenDecoder, TokenizerText, token_name
from tinkex.local.state.store import Store

END = "<|end|>"


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found = TOKENIZERS[request.param]()
    found.add_special_tokens([END])
    return found


def text_of(tokenizer: Tokenizer) -> TokenizerText:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    return TokenizerText(fast, [tokenizer.token_to_id(END)])


def token(number: int, reason: Any = None) -> SampledToken:
    return SampledToken(0, number, -1.0, [], reason)


def test_text_is_streamed_in_complete_characters(tokenizer: Tokenizer) -> None:
    random.seed(5)
    text = text_of(tokenizer)
    for _ in range(50):
        given = "b" + "".join(random.choices("ab  cd.é€😀", k=60))
        prompt, tokens = split(tokenizer, "b", given[1:])
        decoder = TokenDecoder(text, prompt)
        parts = [decoder.push(number) for number in tokens]
        assert not any("\ufffd" in part for part in parts)
        assert "".join(parts) == given[1:]
        assert decoder.flush() == ""


def test_no_part_of_a_stop_string_is_returned(tokenizer: Tokenizer) -> None:
    random.seed(6)
    text = text_of(tokenizer)
    for _ in range(50):
        given = "".join(random.choices("ab cd.é€😀", k=40))
        prompt, tokens = split(tokenizer, "b", given)
        stop = given[20:23]
        choice = Choice(text, prompt, ["zzz", stop])
        shown = ""
        for place, number in enumerate(tokens):
            shown += choice.take(token(number, "length" if place == len(tokens) - 1 else None)).text
            assert given.startswith(shown)
            assert stop not in shown
        assert shown == given[: given.index(stop)]
        assert choice.finished


def test_an_incomplete_character_at_the_end_is_shown_as_by_decoders() -> None:
    tokenizer = TOKENIZERS["byte-level"]()
    tokenizer.add_special_tokens([END])
    tokens = tokenizer.encode("b€").ids
    choice = Choice(text_of(tokenizer), tokens[:1])
    parts = [choice.take(token(number)).text for number in tokens[1:-2]]
    parts.append(choice.take(token(tokens[-2], "length")).text)
    assert "".join(parts) == tokenizer.decode(tokens[1:-1]) == "\ufffd"


def test_special_tokens_are_not_shown_but_listed(tokenizer: Tokenizer) -> None:
    text = text_of(tokenizer)
    end = tokenizer.token_to_id(END)
    prompt, tokens = split(tokenizer, "b", "cd")
    choice = Choice(text, prompt)
    deltas = [choice.take(token(n)) for n in (*tokens, end, *tokens)]
    deltas.append(choice.take(token(end, "stop")))
    assert "".join(delta.text for delta in deltas) in ("cdcd", "cd cd")  # it may add a blank
    listed = [entry.token for delta in deltas for entry in delta.entries]
    assert listed == [*tokens, end, *tokens]
    assert deltas[-1].finish_reason == "stop"


def test_the_names_of_tokens_join_to_the_text(tokenizer: Tokenizer) -> None:
    text = text_of(tokenizer)
    tokens = text.encode("b c€😀 ab")
    raw = b"".join(text.bytes_of(number) for number in tokens)
    assert raw.decode().strip() == "b c€😀 ab"
    names = [token_name(text.bytes_of(number)) for number in tokens]
    assert len(set(names)) >= len(set(tokens)) - 1  # a blank may be encoded in two ways


def test_offsets_of_prompt_tokens_are_those_of_their_text(tokenizer: Tokenizer) -> None:
    text = text_of(tokenizer)
    tokens = text.encode("b c. ab")
    delta = read_prompt(text, tokens, [None] + [-1.0] * (len(tokens) - 1), [None] * len(tokens))
    assert delta.text == "b c. ab"
    assert [entry.token for entry in delta.entries] == tokens
    for entry in delta.entries:
        name = token_name(text.bytes_of(entry.token))
        assert delta.text[entry.offset :].startswith((name, name.lstrip()))


# With the engine


@pytest.fixture
def client(tmp_path: Path, engine: TorchEngine) -> Iterator[FlaskClient]:
    backend = Backend(engine, Store(tmp_path))
    backend.start()
    try:
        yield create_app(backend).test_client()
    finally:
        backend.close(timeout_s=20)


def post(client: FlaskClient, path: str, expect: int = 200, /, **body: Any) -> Any:
    answer = client.post(f"/v1/{path}", json={"model": "tiny-random", "seed": 1, **body})
    assert answer.status_code == expect, answer.text
    return answer


def chunks(answer: Any) -> List[Any]:
    events = answer.text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    return [json.loads(event[len("data: ") :]) for event in events[:-1]]


def test_a_stream_joins_to_the_text_that_the_tokenizer_decodes(
    client: FlaskClient, engine: TorchEngine
) -> None:
    """The model's text is random bytes, most of which form no character."""
    for seed in range(5):
        asked = {"prompt": "hello", "max_tokens": 100, "seed": seed, "logprobs": 2}
        full = post(client, "completions", **asked).get_json()["choices"][0]
        names = full["logprobs"]["tokens"]
        raw = b"".join(
            bytes.fromhex(name[6:].replace("\\x", ""))
            if name.startswith("bytes:")
            else name.encode()
            for name in names
            if name not in SPECIAL_TOKENS
        )
        assert full["text"] == raw.decode("utf-8", "replace")
        streamed = [
            c["choices"][0] for c in chunks(post(client, "completions", **asked, stream=True))
        ]
        assert "".join(part["text"] for part in streamed) == full["text"]
        assert [
            n for part in streamed if part["logprobs"] for n in part["logprobs"]["tokens"]
        ] == names


def test_logprobs_of_a_prompt_are_those_of_a_forward_pass(
    client: FlaskClient, engine: TorchEngine
) -> None:
    asked = {"prompt": "hello", "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    columns = post(client, "completions", **asked).get_json()["choices"][0]["logprobs"]
    tokens = engine.tokenizer.encode("hello")
    made = post(client, "completions", **{**asked, "prompt": tokens}).get_json()
    assert made["choices"][0]["logprobs"] == columns
    assert columns["tokens"][:5] == list("hello")
    for token_, logprob, top in list(
        zip(columns["tokens"], columns["token_logprobs"], columns["top_logprobs"])
    )[1:]:
        assert top[token_] == logprob
        assert logprob <= max(top.values())
    # Greedy sampling: the chosen token is the likeliest, with exactly the same logprob.
    assert columns["token_logprobs"][-1] == max(columns["top_logprobs"][-1].values())


def test_a_chat_uses_the_template_of_the_model(client: FlaskClient, engine: TorchEngine) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hé"},
    ]
    prompt = engine.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    response = post(client, "chat/completions", messages=messages, max_tokens=20).get_json()
    tokens = engine.tokenizer.encode(prompt)
    assert response["usage"]["prompt_tokens"] == len(tokens)
    same = post(client, "completions", prompt=tokens, max_tokens=20).get_json()["choices"][0]
    assert response["choices"][0]["message"]["content"] == same["text"]


def test_a_failing_or_missing_template_is_an_error_of_the_request(
    client: FlaskClient, engine: TorchEngine
) -> None:
    messages = [{"role": "user", "content": "hi"}]
    engine.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    error = post(client, "chat/completions", 400, messages=messages).get_json()["error"]
    assert error["param"] == "messages"
    assert "roles must alternate" in error["message"]
    engine.tokenizer.chat_template = None
    error = post(client, "chat/completions", 400, messages=messages).get_json()["error"]
    assert "no chat template" in error["message"]


def test_template_options_are_passed_on(client: FlaskClient, engine: TorchEngine) -> None:
    engine.tokenizer.chat_template = (
        "{{ messages[0]['content'] }}{{ extra }}{% if add_generation_prompt %}>{% endif %}"
    )
    messages = [{"role": "user", "content": "hi"}]

    def prompt_tokens(**options: Any) -> int:
        made = post(client, "chat/completions", messages=messages, max_tokens=1, **options)
        return int(made.get_json()["usage"]["prompt_tokens"])

    assert prompt_tokens() == 3
    assert prompt_tokens(add_generation_prompt=False) == 2
    assert prompt_tokens(chat_template_kwargs={"extra": "abc"}) == 6


def test_stop_strings_and_the_end_of_the_sequence_both_end_a_text(client: FlaskClient) -> None:
    asked = {"prompt": "hello", "max_tokens": 60}
    text = post(client, "completions", **asked).get_json()["choices"][0]["text"]
    stop = next(text[i : i + 2] for i in range(3, 50) if "\ufffd" not in text[i : i + 2])
    choice = post(client, "completions", **asked, stop=stop).get_json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")
