"""Datums of texts, completions, preferences and samples."""

from __future__ import annotations

from typing import Any, List, Tuple

import numpy as np
import pytest
from hypothesis import given, strategies as st

pytest.importorskip("transformers")

from support import chat_templates as templates
from support.chat_templates import byte_tokenizer, spaced_tokenizer

from tinkex.data import (
    Completion,
    Conversation,
    Preference,
    Text,
    chat_datum,
    completion_datum,
    example_datum,
    preference_data,
    sampled_datum,
    text_datum,
    weighted_tokens,
)
from tinkex.errors import InvalidInputError
from tinkex.types import Datum, ModelInput, SampledSequence

TOKENIZER = byte_tokenizer(templates.CHATML)
USER = {"role": "user", "content": "1+1?"}


def reply(content: str) -> Any:
    return {"role": "assistant", "content": content}


def split(datum: Datum, tokenizer: Any) -> Tuple[str, str]:
    """Return the text with weight 0, and the text with weight 1."""
    shown = weighted_tokens(datum, tokenizer)
    assert {weight for _, weight in shown} <= {0.0, 1.0}
    return "".join(t for t, w in shown if not w), "".join(t for t, w in shown if w)


def test_a_completion_is_learnt_with_the_end_of_sequence() -> None:
    datum = completion_datum("1+1=", " two", TOKENIZER)
    assert split(datum, TOKENIZER) == ("1+1=", " two<|im_end|>")
    assert datum == example_datum(Completion("1+1=", " two"), TOKENIZER)
    targets = datum.loss_fn_inputs["target_tokens"].values.tolist()
    assert datum.model_input.to_ints()[1:] == targets[:-1]
    assert targets == [*TOKENIZER.encode("1+1= two")[1:], TOKENIZER.eos_token_id]
    assert datum.loss_fn_inputs["weights"].values.tolist() == [0.0] * 3 + [1.0] * 5


@pytest.mark.parametrize("prompt", ["say", "say it", ""])
def test_a_prompt_begins_with_the_tokenizers_start_token(prompt: str) -> None:
    tokenizer = spaced_tokenizer("")
    datum = completion_datum(prompt, " hello", tokenizer)
    ids = datum.model_input.to_ints()
    head = tokenizer.encode(prompt)
    assert head[0] == tokenizer.bos_token_id
    assert ids[: len(head)] == head
    assert tokenizer.decode(ids[1:]).strip() == f"{prompt} hello".strip()
    assert datum.loss_fn_inputs["weights"].values.tolist() == [
        *[0.0] * (len(head) - 1),
        *[1.0] * (len(ids) - len(head) + 1),
    ]


def test_a_completion_inside_a_token_is_encoded_separately() -> None:
    datum = completion_datum("a\n", "\nb", TOKENIZER)
    assert split(datum, TOKENIZER) == ("a\n", "\nb<|im_end|>")
    assert datum.model_input.to_ints()[:2] == TOKENIZER.encode("a\n")
    with pytest.raises(InvalidInputError, match="begins or ends inside a token"):
        completion_datum("say ", "hello", spaced_tokenizer(""))


def test_all_of_a_text_is_learnt_except_its_first_token() -> None:
    datum = text_datum("héllo", TOKENIZER)
    assert split(datum, TOKENIZER) == ("h", "éllo<|im_end|>")
    assert datum == example_datum(Text("héllo"), TOKENIZER)
    assert split(text_datum("a", TOKENIZER), TOKENIZER) == ("a", "<|im_end|>")
    bos = spaced_tokenizer("")
    assert text_datum("a", bos).model_input.to_ints()[0] == bos.bos_token_id
    endless = byte_tokenizer("")
    endless.eos_token = None
    assert split(text_datum("ab", endless), endless) == ("a", "b")
    with pytest.raises(InvalidInputError, match="has nothing to learn"):
        text_datum("a", endless)


def test_a_completion_in_the_form_of_messages_is_learnt() -> None:
    prompt = [USER, reply("2"), {"role": "user", "content": "2+2?"}]
    more = [reply("4"), {"role": "user", "content": "ok"}, reply("bye")]
    datum = example_datum(Completion(prompt, more), TOKENIZER)
    assert split(datum, TOKENIZER)[1] == "4<|im_end|>bye<|im_end|>"
    datum = example_datum(Completion(prompt, more), TOKENIZER, learn="last")
    assert split(datum, TOKENIZER)[1] == "bye<|im_end|>"
    datum = example_datum(Conversation([*prompt, *more]), TOKENIZER)
    assert datum == chat_datum([*prompt, *more], TOKENIZER)


def test_a_preference_becomes_two_datums_with_the_same_prompt() -> None:
    chosen, rejected = preference_data(Preference(" two", " three", "1+1="), TOKENIZER)
    assert split(chosen, TOKENIZER) == ("1+1=", " two<|im_end|>")
    assert split(rejected, TOKENIZER) == ("1+1=", " three<|im_end|>")
    thinking = byte_tokenizer(templates.QWEN3)  # earlier messages are not learnt
    head = [USER, reply("2"), USER]
    chosen, rejected = preference_data(Preference([reply("2")], [reply("3")], head), thinking)
    assert split(chosen, thinking)[1] == "<think>\n\n</think>\n\n2<|im_end|>"
    assert split(rejected, thinking)[1] == "<think>\n\n</think>\n\n3<|im_end|>"
    assert split(chosen, thinking)[0] == split(rejected, thinking)[0]


def test_preferences_without_a_prompt_are_learnt_from_where_they_differ() -> None:
    chosen, rejected = preference_data(Preference("ab cd", "ab xy", ""), TOKENIZER)
    assert split(chosen, TOKENIZER) == ("ab ", "cd<|im_end|>")
    assert split(rejected, TOKENIZER) == ("ab ", "xy<|im_end|>")
    shorter, longer = preference_data(Preference("ab", "abc", ""), TOKENIZER)
    assert split(shorter, TOKENIZER) == ("ab", "<|im_end|>")
    assert split(longer, TOKENIZER) == ("ab", "c<|im_end|>")


def test_a_preference_cannot_become_a_single_datum() -> None:
    with pytest.raises(InvalidInputError, match="preference_data"):
        example_datum(Preference("a", "b", "c"), TOKENIZER)
    with pytest.raises(InvalidInputError, match="a dict is not an example"):
        example_datum({"text": "a"}, TOKENIZER)  # type: ignore[arg-type]


def test_text_and_messages_do_not_mix() -> None:
    with pytest.raises(InvalidInputError, match="a prompt or completion is a list, not text"):
        example_datum(Completion("1+1=", [reply("2")]), TOKENIZER)
    with pytest.raises(InvalidInputError, match="a prompt or completion is an int, not text"):
        completion_datum("1+1=", 2, TOKENIZER)  # type: ignore[arg-type]


def test_long_examples_are_cut_and_reported() -> None:
    cuts: List[int] = []
    full = completion_datum("1+1=", " two", TOKENIZER, max_tokens=8, on_cut=cuts.append)
    assert full.model_input.length == 8
    assert cuts == []
    cut = completion_datum("1+1=", " two", TOKENIZER, max_tokens=5, on_cut=cuts.append)
    assert split(cut, TOKENIZER) == ("1+1=", " t")
    assert cut.model_input.length == 5
    assert cuts == [8]
    with pytest.raises(InvalidInputError, match="nothing to learn in its first 3 of 8 tokens"):
        completion_datum("1+1=", " two", TOKENIZER, max_tokens=3, on_cut=cuts.append)
    assert cuts == [8]
    with pytest.raises(InvalidInputError, match="max_tokens is 0"):
        text_datum("ab", TOKENIZER, max_tokens=0)
    pair = preference_data(Preference(" two", " 3", "1+1="), TOKENIZER, max_tokens=6)
    assert [datum.model_input.length for datum in pair] == [6, 6]


def test_a_sampled_sequence_is_trained_on_with_its_advantage() -> None:
    sequence = SampledSequence("stop", np.array([7, 8, 9], np.int32), np.float32([-1, -2, -3]))
    datum = sampled_datum(ModelInput.from_ints([5, 6]), sequence, 0.5)
    assert datum.model_input.to_ints() == [5, 6, 7, 8]
    assert datum.loss_fn_inputs["target_tokens"].values.tolist() == [6, 7, 8, 9]
    assert datum.loss_fn_inputs["logprobs"].values.tolist() == [0, -1, -2, -3]
    assert datum.loss_fn_inputs["advantages"].values.tolist() == [0, 0.5, 0.5, 0.5]
    assert {tensor.dtype for tensor in datum.loss_fn_inputs.values()} == {"int64", "float32"}
    each = sampled_datum([5, 6], sequence, [1, 2, 3])
    assert each.loss_fn_inputs["advantages"].values.tolist() == [0, 1, 2, 3]
    assert [weight for _, weight in weighted_tokens(each, TOKENIZER)] == [0, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("prompt", "sequence", "advantage", "message"),
    [
        ([], ([7], [-1]), 1, "the prompt has 0 tokens and the sequence 1"),
        ([5], ([], []), 1, "the prompt has 1 tokens and the sequence 0"),
        ([5], ([7], None), 1, "1 tokens and no logprobs"),
        ([5], ([7], [-1, -2]), 1, "1 tokens and 2 logprobs"),
        ([5], ([7], [-1]), [1, 2], r"advantage has shape \(2,\)"),
        ([5], ([7], [-1]), float("nan"), "advantage is not finite"),
        ([5], ([7], [-1]), "much", "advantage is not a number"),
    ],
)
def test_samples_that_cannot_be_trained_on_are_refused(
    prompt: Any, sequence: Any, advantage: Any, message: str
) -> None:
    tokens, logprobs = sequence
    given = None if logprobs is None else np.array(logprobs, np.float32)
    sampled = SampledSequence("stop", np.array(tokens, np.int32), given)
    with pytest.raises(InvalidInputError, match=message):
        sampled_datum(prompt, sampled, advantage)


def test_weights_are_shown_only_if_each_token_has_one_target() -> None:
    plain = Datum(ModelInput.from_ints([65, 66]), {"target_tokens": [66, 67]})
    assert [weight for _, weight in weighted_tokens(plain, TOKENIZER)] == [0, 1, 1]
    for targets in ([66], [[66, 67], [66, 67]]):
        datum = Datum(ModelInput.from_ints([65, 66]), {"target_tokens": targets})
        with pytest.raises(InvalidInputError, match="one target token for each input token"):
            weighted_tokens(datum, TOKENIZER)


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), st.booleans())
def test_the_texts_of_tokens_join_to_the_text(text: str, spaced: bool) -> None:
    tokenizer = _SPACED if spaced else TOKENIZER
    if len(tokenizer.encode(text, add_special_tokens=False)) < 2:
        text += "ab"
    shown = weighted_tokens(text_datum(text, tokenizer), tokenizer)
    ids = [*([1] if spaced else []), *tokenizer.encode(text, add_special_tokens=False)]
    assert len(shown) == len(ids) + 1
    expected = tokenizer.decode([*ids, tokenizer.eos_token_id])
    assert "".join(text for text, _ in shown) == expected


_SPACED = spaced_tokenizer("")
