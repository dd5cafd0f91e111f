"""With any chat template, the learnt tokens of a conversation are those the model must write."""

from __future__ import annotations

from typing import Any, Dict, List

import pytest
from hypothesis import given, strategies as st

pytest.importorskip("transformers")

from support import chat_templates as templates
from support.chat_templates import byte_tokenizer, spaced_tokenizer

from tinkex.data import chat_datum, weighted_tokens
from tinkex.errors import InvalidInputError
from tinkex.types import Datum


def chat(*contents: str, system: str = "") -> List[Dict[str, str]]:
    """Return a conversation of user and assistant, in turn."""
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def all_tokens(datum: Datum) -> List[int]:
    return [*datum.model_input.to_ints(), int(datum.loss_fn_inputs["target_tokens"].values[-1])]


def learnt(datum: Datum, tokenizer: Any) -> List[str]:
    """Return the text of each stretch of learnt tokens, decoded by the tokenizer alone."""
    runs: List[List[int]] = []
    before = 0.0
    weights = datum.loss_fn_inputs["weights"].values.tolist()
    for token, weight in zip(datum.loss_fn_inputs["target_tokens"].values.tolist(), weights):
        assert weight in (0.0, 1.0)
        if weight and not before:
            runs.append([])
        if weight:
            runs[-1].append(token)
        before = weight
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


def assert_continues_its_prompts(
    datum: Datum, tokenizer: Any, messages: Any, **options: Any
) -> None:
    """Check that the tokens before each learnt stretch are the prompt that the model would get."""
    weights = [0.0, *datum.loss_fn_inputs["weights"].values.tolist()]
    starts = [i for i in range(1, len(weights)) if weights[i] and not weights[i - 1]]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(starts) <= len(turns)
    for start, turn in zip(reversed(starts), reversed(turns)):
        prompt = tokenizer.apply_chat_template(
            messages[:turn], tokenize=False, add_generation_prompt=True, **options
        )
        tokens = all_tokens(datum)[:start]
        assert tokens == tokenizer.encode(prompt, add_special_tokens=False)


STYLES = [
    pytest.param(templates.CHATML, "<|im_end|>", id="chatml"),
    pytest.param(templates.MARKED, "<|im_end|>", id="marked"),
    pytest.param(templates.LLAMA3, "<|eot_id|>", id="llama3"),
    pytest.param(templates.GEMMA, "<end_of_turn>", id="gemma"),
    pytest.param(templates.PHI, "<|end|>", id="phi"),
    pytest.param(templates.PHI4, "<|end|>", id="phi4"),
    pytest.param(templates.COMMAND, "<|END_RESPONSE|><|end|>", id="command"),
    pytest.param(templates.PLAIN, "\n\n", id="plain"),
]


@pytest.mark.parametrize(("template", "end"), STYLES)
def test_replies_and_their_end_tokens_are_learnt(template: str, end: str) -> None:
    tokenizer = byte_tokenizer(template)
    messages = chat("Hello", "Hi! 😀", "What's 1+1?", "It's\n\ntwo", "Thanks")
    space = " " if template == templates.PLAIN else ""
    datum = chat_datum(messages, tokenizer)
    assert learnt(datum, tokenizer) == [f"{space}Hi! 😀{end}", f"{space}It's\n\ntwo{end}"]
    assert_continues_its_prompts(datum, tokenizer, messages)
    last = chat_datum(messages, tokenizer, learn="last")
    assert all_tokens(last) == all_tokens(datum)
    assert learnt(last, tokenizer) == [f"{space}It's\n\ntwo{end}"]
    text = tokenizer.apply_chat_template(messages[:4], tokenize=False)
    assert all_tokens(datum) == tokenizer.encode(text, add_special_tokens=False)
    assert "".join(text for text, _ in weighted_tokens(datum, tokenizer)) == text


def test_generation_marks_agree_with_the_learnt_tokens() -> None:
    tokenizer = byte_tokenizer(templates.MARKED)
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    messages = [
        *chat("1+1?", "Let me see.", "Go on"),
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two"},
    ]
    datum = chat_datum(messages, tokenizer)
    marked = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert all_tokens(datum) == marked["input_ids"]
    assert datum.loss_fn_inputs["weights"].values.tolist() == marked["assistant_masks"][1:]
    assert sum(marked["assistant_masks"]) > 60
    assert "tool_call" in "".join(learnt(datum, tokenizer))


@pytest.mark.parametrize("template", [templates.LLAMA3, templates.GEMMA])
def test_contents_that_the_template_strips_are_learnt_stripped(template: str) -> None:
    tokenizer = byte_tokenizer(template)
    [found] = learnt(chat_datum(chat(" a ", "\n b \n"), tokenizer), tokenizer)
    assert found in ("b<|eot_id|>", "b<end_of_turn>")


@pytest.mark.parametrize("contents", [("hi", "hello", "ok", "bye"), ("hi", " hello ")])
def test_a_tokenizer_that_begins_texts_with_a_space_is_split_exactly(contents: Any) -> None:
    tokenizer = spaced_tokenizer(templates.MISTRAL)
    messages = chat(*contents)
    datum = chat_datum(messages, tokenizer)
    replies = [content.strip(" ") for content in contents[1::2]]
    found = learnt(datum, tokenizer)
    assert [reply[: -len("</s>")].strip(" ") for reply in found] == replies
    assert all(reply.endswith("</s>") for reply in found)
    assert_continues_its_prompts(datum, tokenizer, messages)


def test_a_reply_that_begins_within_a_token_is_encoded_separately() -> None:
    tokenizer = byte_tokenizer(templates.CHATML)
    messages = chat("Hello", "\n\nHi", "Go on", "\nBye")
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    rendered = tokenizer.apply_chat_template(messages[:2], tokenize=False)
    ids = tokenizer.encode(prompt)
    assert tokenizer.encode(rendered)[: len(ids)] != ids  # one token for three newlines
    datum = chat_datum(messages[:2], tokenizer)
    assert learnt(datum, tokenizer) == ["\n\nHi<|im_end|>"]
    assert_continues_its_prompts(datum, tokenizer, messages[:2])
    assert learnt(chat_datum(messages, tokenizer), tokenizer) == [
        "\n\nHi<|im_end|>",
        "\nBye<|im_end|>",
    ]


def test_a_reply_inside_a_token_is_refused_if_it_cannot_be_encoded_separately() -> None:
    template = templates.MISTRAL.replace("[/INST]", "[/INST] ").replace("{{ ' ' + ", "{{ ")
    with pytest.raises(InvalidInputError, match="begins or ends inside a token"):
        chat_datum(chat("hi", "hello"), spaced_tokenizer(template))


def test_reasoning_is_learnt_if_the_template_writes_it() -> None:
    tokenizer = byte_tokenizer(templates.QWEN3)
    thinking = "<think>\nHm\n</think>\n\nTwo"
    for reply in ({"content": thinking}, {"content": "Two", "reasoning_content": "Hm"}):
        messages = [*chat("1+1?"), {"role": "assistant", **reply}]
        datum = chat_datum(messages, tokenizer)
        assert learnt(datum, tokenizer) == [f"{thinking}<|im_end|>"]
        assert_continues_its_prompts(datum, tokenizer, messages)
    longer = chat("1+1?", thinking, "2+2?", "<think>\nHmm\n</think>\n\nFour")
    datum = chat_datum(longer, tokenizer, learn="last")
    assert learnt(datum, tokenizer) == ["<think>\nHmm\n</think>\n\nFour<|im_end|>"]
    assert_continues_its_prompts(datum, tokenizer, longer)
    for messages in (longer, chat("a", "b", "c", "d")):
        with pytest.raises(
            InvalidInputError, match="changes it once other messages follow"
        ) as caught:
            chat_datum(messages, tokenizer)
        assert "messages[1]" in str(caught.value)
        assert "learn='last'" in str(caught.value)


def test_all_messages_after_the_last_user_message_keep_their_reasoning() -> None:
    tokenizer = byte_tokenizer(templates.QWEN3)
    messages = [
        *chat("1+1?", "<think>\nCall\n</think>\n\ncall"),
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "<think>\nSo\n</think>\n\nTwo"},
    ]
    datum = chat_datum(messages, tokenizer)
    assert learnt(datum, tokenizer) == [
        "<think>\nCall\n</think>\n\ncall<|im_end|>",
        "<think>\nSo\n</think>\n\nTwo<|im_end|>",
    ]
    assert_continues_its_prompts(datum, tokenizer, messages)


def test_a_last_message_with_another_ending_is_learnt_alone() -> None:
    tokenizer = byte_tokenizer(templates.HARMONY)
    start = "<|channel|>final<|message|>"
    found = chat_datum(chat("a", "b", "c", "d"), tokenizer, learn="last")
    assert learnt(found, tokenizer) == [f"{start}d<|return|>"]
    with pytest.raises(InvalidInputError, match="changes it once other messages follow"):
        chat_datum(chat("a", "b", "c", "d"), tokenizer)
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [*chat("a"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert learnt(chat_datum(messages, tokenizer), tokenizer) == [
        '<|channel|>commentary<|message|>{"x": 1}<|call|>'
    ]


def test_a_reply_that_does_not_begin_like_the_generation_prompt_is_refused() -> None:
    tokenizer = byte_tokenizer(templates.DEEPSEEK_R1)
    with pytest.raises(InvalidInputError, match="generation prompt has text that it lacks"):
        chat_datum(chat("a", "<think>\nhm\n</think>b"), tokenizer)


def test_a_switch_may_be_set_in_the_template() -> None:
    switch = (
        "{% if enable_thinking is defined and not enable_thinking %}{{ '</think>' }}{% endif %}"
    )
    template = templates.DEEPSEEK_R1.replace("<think>\n' }}", "<think>' }}" + switch)
    template = template.replace("'<|assistant|>' +", "'<|assistant|><think></think>' +")
    tokenizer = byte_tokenizer(template)
    with pytest.raises(InvalidInputError, match="has a switch for reasoning, set it"):
        chat_datum(chat("a", "b"), byte_tokenizer(templates.DEEPSEEK_R1))
    assert learnt(chat_datum(chat("a", "b"), tokenizer), tokenizer) == ["</think>b<|endoftext|>"]
    tokenizer.chat_template = "{% set enable_thinking = false %}" + tokenizer.chat_template
    assert learnt(chat_datum(chat("a", "b"), tokenizer), tokenizer) == ["b<|endoftext|>"]


def test_a_template_that_drops_part_of_a_message_is_refused() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    silent = byte_tokenizer(templates.CHATML)  # ignores tools
    with pytest.raises(InvalidInputError, match=r"messages\[1\] .* leaves out its content"):
        chat_datum([*chat("a"), call], silent)
    for_images = byte_tokenizer(
        templates.CHATML.replace(
            "message['content'] +", "(message['content'] | selectattr('text') | join) +"
        )
    )
    with pytest.raises(InvalidInputError, match="leaves out the content of messages"):
        chat_datum(chat("a", "b"), for_images)
    empty = chat("a", "", "c", "d")
    assert learnt(chat_datum(empty, silent), silent) == ["<|im_end|>", "d<|im_end|>"]


def test_a_refusal_by_the_template_is_reported_in_its_words() -> None:
    gemma, mistral = byte_tokenizer(templates.GEMMA), spaced_tokenizer(templates.MISTRAL)
    with pytest.raises(InvalidInputError, match="System role not supported") as caught:
        chat_datum(chat("a", "b", system="c"), gemma)
    assert "roles system, user, assistant" in str(caught.value)
    with pytest.raises(InvalidInputError, match="must alternate"):
        chat_datum([*chat("a", "b"), *chat("c", "d")[1:]], mistral)
    assert learnt(chat_datum(chat("a", "b"), mistral), mistral) == ["b</s>"]
    with pytest.raises(InvalidInputError, match="generation prompt has text"):
        chat_datum(chat("a", "b", system="c"), mistral)
    with pytest.raises(InvalidInputError, match="has no chat template"):
        chat_datum(chat("a", "b"), byte_tokenizer(""))


def test_an_assistant_message_at_the_start_is_not_learnt() -> None:
    tokenizer = byte_tokenizer(templates.CHATML)
    messages: List[Dict[str, Any]] = [*chat("", "Welcome", "Hi", "Bye")[1:]]
    with pytest.raises(InvalidInputError, match="no message comes before it"):
        chat_datum(messages, tokenizer)
    assert learnt(chat_datum(messages, tokenizer, learn="last"), tokenizer) == ["Bye<|im_end|>"]
    messages[0]["weight"] = 0
    assert learnt(chat_datum(messages, tokenizer), tokenizer) == ["Bye<|im_end|>"]


def test_messages_that_the_template_joins_are_refused() -> None:
    template = (
        "{% for message in messages %}{{ message.role + ': ' + message.content }}"
        "{% if not (loop.last and add_generation_prompt and message.role == 'assistant') %}"
        "{{ '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'assistant' %}"
        "{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = byte_tokenizer(template)
    assert learnt(chat_datum(chat("a", "b", "c", "d"), tokenizer), tokenizer) == [
        "b<|end|>",
        "d<|end|>",
    ]
    with pytest.raises(InvalidInputError, match=r"messages\[2\] .* continues the message before"):
        chat_datum([*chat("a", "b"), {"role": "assistant", "content": "c"}], tokenizer)


def test_messages_of_weight_0_are_not_learnt() -> None:
    tokenizer = byte_tokenizer(templates.CHATML)
    messages: List[Dict[str, Any]] = [*chat("a", "b", "c", "d", "e", "f")]
    messages[1]["weight"] = messages[5]["weight"] = 0
    messages[3]["weight"] = 1
    assert learnt(chat_datum(messages, tokenizer), tokenizer) == ["d<|im_end|>"]
    assert learnt(chat_datum(messages, tokenizer, learn="last"), tokenizer) == ["d<|im_end|>"]


def test_text_parts_are_joined() -> None:
    tokenizer = byte_tokenizer(templates.CHATML)
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    messages = [*chat("a"), {"role": "assistant", "content": parts}]
    assert learnt(chat_datum(messages, tokenizer), tokenizer) == ["Hi there<|im_end|>"]
    with pytest.raises(InvalidInputError, match="part of type 'image_url'; only text"):
        chat_datum([{"role": "user", "content": [{"type": "image_url"}]}, *messages], tokenizer)


def test_tools_reach_the_template() -> None:
    tokenizer = byte_tokenizer("{{ tools | tojson }}" + templates.CHATML)
    tools = [{"type": "function", "function": {"name": "add"}}]
    datum = chat_datum(chat("a", "b"), tokenizer, tools=tools)
    assert tokenizer.decode(all_tokens(datum)).startswith('[{"type": "function"')
    assert_continues_its_prompts(datum, tokenizer, chat("a", "b"), tools=tools)


def test_learn_is_all_or_last() -> None:
    with pytest.raises(InvalidInputError, match="learn is 'first'; it must be 'all' or 'last'"):
        chat_datum(chat("a", "b"), byte_tokenizer(templates.CHATML), learn="first")


contents = st.text(st.sampled_from("ab h\n.:<|>é😀漢") | st.characters(codec="utf-8"), max_size=12)
pieces = contents | st.sampled_from(
    ["tinkex", "<|im_end|>", "assistant", "<|im_start|>assistant\n"]
)


@given(st.lists(pieces, min_size=2, max_size=6), contents, st.sampled_from(["all", "last"]))
def test_any_content_is_learnt_unchanged(found: List[str], system: str, learn: str) -> None:
    found[1] += "!"
    messages = chat(*found, system=system)
    tokenizer = _CHATML
    datum = chat_datum(messages, tokenizer, learn=learn)
    replies = [content + "<|im_end|>" for content in found[1::2]]
    assert learnt(datum, tokenizer) == (replies if learn == "all" else replies[-1:])
    if learn == "last":
        assert_continues_its_prompts(datum, tokenizer, messages)


_CHATML = byte_tokenizer(templates.CHATML)
