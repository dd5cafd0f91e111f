"""Makes datums from examples, preferences and samples; shows as text what a datum teaches.

All of them shift the tokens: ``target_tokens[i]`` is the token after input token i.
"""

from __future__ import annotations

from typing import Any, Callable, List, Mapping, Optional, Sequence, Tuple, Union

from tinkex._runtime.late_import import np
from tinkex._runtime.numeric import as_int
from tinkex.data.chat import WeightedTokens, chat_tokens, split_tokens
from tinkex.data.examples import (
    Completion,
    Conversation,
    Example,
    Message,
    Preference,
    Text,
    as_messages,
)
from tinkex.errors import InvalidInputError, a_type
from tinkex.types import Datum, ModelInput, SampledSequence

#: Called with the number of tokens of an example that was cut to ``max_tokens``.
OnCut = Callable[[int], Any]

#: What a tokenizer writes for an incomplete character.
_INCOMPLETE = "\ufffd"
#: A character has up to 4 bytes, so at most 4 tokens make one.
_MOST_TOKENS = 4


def example_datum(
    example: Example,
    tokenizer: Any,
    *,
    learn: str = "all",
    max_tokens: Optional[int] = None,
    on_cut: Optional[OnCut] = None,
) -> Datum:
    """Return the datum of a conversation, a completion or a text, for ``cross_entropy``.

    Args:
        learn: which of the assistant's messages to learn: ``"all"``, or only the ``"last"``; if the
            example is a completion in messages, only its completion's messages count.
        tokenizer, max_tokens, on_cut: as in `chat_datum`.

    Raises:
        InvalidInputError: as in `chat_datum`; or *example* is a preference.
    """
    if isinstance(example, Conversation):
        tokens = _of_messages(example.messages, tokenizer, learn, example.tools)
    elif isinstance(example, Completion):
        tokens = _of_continuation(
            example.prompt, example.completion, tokenizer, learn, example.tools
        )
    elif isinstance(example, Text):
        tokens = _of_text("", example.text, tokenizer)
    elif isinstance(example, Preference):
        raise InvalidInputError(
            "a preference is two datums", hint="Make them with preference_data, for DPO."
        )
    else:
        raise InvalidInputError(
            f"{a_type(example)} is not an example", hint="Make one of a dict with parse_example."
        )
    return _datum(tokens, max_tokens, on_cut)


def chat_datum(
    messages: Sequence[Message],
    tokenizer: Any,
    *,
    learn: str = "all",
    max_tokens: Optional[int] = None,
    tools: Optional[Sequence[Mapping[str, Any]]] = None,
    on_cut: Optional[OnCut] = None,
) -> Datum:
    """Return the datum of a conversation as rendered by the tokenizer's chat template.

    Weights are 1 on what the model has to write (the assistant's messages, each with the token that
    ends it) and 0 on everything else.  Messages after the last one that is learnt are left out.
    docs/data.md says what is learnt and what is refused.

    Args:
        messages: dicts with ``role`` and ``content``, and whatever else the template reads.  The
            content is a string, or a list of text parts, which are joined.  A message of the
            assistant with ``"weight": 0`` is not learnt.
        tokenizer: a transformers tokenizer with a chat template, as from
            ``trainer.get_tokenizer()``.  Only one thread at a time may use it.
        learn: which of the assistant's messages to learn: ``"all"``, or only the ``"last"``.
        max_tokens: maximum length of the model input, in tokens; a longer one is cut off at the
            end.
        tools: JSON schemas of functions, for the template.
        on_cut: called, if the model input is cut off, with its full length in tokens.

    Raises:
        InvalidInputError: the messages are malformed, the template refuses them or renders them so
            that exact weights are impossible, or nothing to learn is left.
    """
    tokens = _of_messages(messages, tokenizer, learn, tools)
    return _datum(tokens, max_tokens, on_cut)


def completion_datum(
    prompt: str,
    completion: str,
    tokenizer: Any,
    *,
    max_tokens: Optional[int] = None,
    on_cut: Optional[OnCut] = None,
) -> Datum:
    """Return the datum of a prompt and its completion, both plain text.

    Weights are 1 on the tokens of *completion* and on the end-of-sequence token after it, and 0 on
    the prompt, which begins as the tokenizer begins every text.  Other arguments are as in
    `chat_datum`.

    Raises:
        InvalidInputError: nothing to learn is left, or the tokens cannot be split exactly.
    """
    return _datum(_of_text(prompt, completion, tokenizer), max_tokens, on_cut)


def text_datum(
    text: str,
    tokenizer: Any,
    *,
    max_tokens: Optional[int] = None,
    on_cut: Optional[OnCut] = None,
) -> Datum:
    """Return the datum of plain text and the end-of-sequence token, to learn all of it.

    Arguments are as in `chat_datum`.

    Raises:
        InvalidInputError: there are fewer than two tokens.
    """
    return _datum(_of_text("", text, tokenizer), max_tokens, on_cut)


def preference_data(
    preference: Preference,
    tokenizer: Any,
    *,
    max_tokens: Optional[int] = None,
    on_cut: Optional[OnCut] = None,
) -> Tuple[Datum, Datum]:
    """Return the datums of the chosen and the rejected continuation.

    Weights are 1 on the continuations and 0 on the prompt.  Without a prompt, texts are learnt from
    the first token in which they differ.  Arguments are as in `chat_datum`.

    Raises:
        InvalidInputError: as in `chat_datum`.
    """
    both = [
        _of_continuation(preference.prompt, reply, tokenizer, "all", preference.tools)
        for reply in (preference.chosen, preference.rejected)
    ]
    if preference.prompt == "":
        for place, (one, other) in enumerate(zip(both[0].ids, both[1].ids)):
            if one != other:
                break
            both[0].weights[place] = both[1].weights[place] = 0.0
    return _datum(both[0], max_tokens, on_cut), _datum(both[1], max_tokens, on_cut)


def sampled_datum(
    prompt: Union[ModelInput, Sequence[int]],
    sequence: SampledSequence,
    advantage: Union[float, Sequence[float]],
) -> Datum:
    """Return the datum of a sampled sequence, for ``importance_sampling``, ``ppo`` and the like.

    Args:
        prompt: the tokens that *sequence* was sampled from, at least one.
        sequence: m sampled tokens, with their log-probabilities.
        advantage: one number for the sequence, or one for each of its m tokens.

    ``logprobs`` and ``advantages`` are 0 on the prompt.

    Raises:
        InvalidInputError: there is no prompt, no token or no log-probability, or *advantage* is not
            finite or has another length.
    """
    head = prompt if isinstance(prompt, ModelInput) else ModelInput.from_ints(prompt)
    tokens = np.concatenate([head.to_numpy(), np.asarray(sequence.tokens_np, dtype=np.int32)])
    before = head.length - 1  # targets that are tokens of the prompt
    if before < 0 or not sequence.length:
        raise InvalidInputError(
            f"the prompt has {head.length} tokens and the sequence {sequence.length}; "
            "there must be one or more of each"
        )
    logprobs = sequence.logprobs_np
    if logprobs is None or len(logprobs) != sequence.length:
        raise InvalidInputError(
            f"the sampled sequence has {sequence.length} tokens and "
            f"{'no' if logprobs is None else len(logprobs)} logprobs",
            hint="They are the sampler's own, and come from the server with the tokens.",
        )
    try:
        given = np.asarray(advantage, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"the advantage is not a number: {error}") from error
    if given.shape not in ((), (sequence.length,)):
        raise InvalidInputError(
            f"the advantage has shape {given.shape}; "
            f"it must be a number, or one for each of {sequence.length} tokens"
        )
    if not np.isfinite(given).all():
        raise InvalidInputError(
            f"the advantage is not finite: {advantage}",
            hint="Rewards divided by their standard deviation are not if all are the same.",
        )
    zeros = np.zeros(before, dtype=np.float32)
    return Datum(
        ModelInput.from_ints(tokens[:-1]),
        {
            "target_tokens": tokens[1:],
            "logprobs": np.concatenate([zeros, logprobs]),
            "advantages": np.concatenate([zeros, np.broadcast_to(given, sequence.length)]),
        },
    )


def weighted_tokens(datum: Datum, tokenizer: Any) -> List[Tuple[str, float]]:
    """Return the text and the weight of each token of *datum*, in order.

    Joined, the texts are the text of the datum; if several tokens together make one character, the
    last of them has it, and the others are empty.  Weights come from the input ``weights``, else
    from ``advantages``, else they are 1; the first token has weight 0, since it is not a target.

    Raises:
        InvalidInputError: the datum has images, or does not have one target token per input token.
    """
    inputs = datum.loss_fn_inputs
    ids = datum.model_input.to_ints()
    targets = inputs["target_tokens"].values.tolist() if "target_tokens" in inputs else []
    if len(targets) != len(ids) or not ids:
        raise InvalidInputError("the datum does not have one target token for each input token")
    ids.append(targets[-1])
    weights = inputs.get("weights", inputs.get("advantages"))
    after = [1.0] * len(targets) if weights is None else weights.values.tolist()
    return list(zip(_texts(ids, tokenizer), [0.0, *after]))


def _of_messages(
    messages: Sequence[Message],
    tokenizer: Any,
    learn: str,
    tools: Optional[Sequence[Mapping[str, Any]]],
    first: int = 0,
) -> WeightedTokens:
    if learn not in ("all", "last"):
        raise InvalidInputError(f"learn is {learn!r}; it must be 'all' or 'last'")
    checked = as_messages("messages", messages)
    return chat_tokens(checked, tokenizer, learn, tools=tools, first=first)


def _of_continuation(
    prompt: Any,
    continuation: Any,
    tokenizer: Any,
    learn: str,
    tools: Optional[Sequence[Mapping[str, Any]]],
) -> WeightedTokens:
    if isinstance(prompt, str):
        return _of_text(prompt, continuation, tokenizer)
    return _of_messages([*prompt, *continuation], tokenizer, learn, tools, len(prompt))


def _of_text(prompt: str, completion: str, tokenizer: Any) -> WeightedTokens:
    """Return the tokens of both and the end-of-sequence token; all after *prompt* is learnt."""
    # `completion_datum` and `text_datum` take these from the caller, unchecked.
    for text in (prompt, completion):
        if not isinstance(text, str):
            raise InvalidInputError(f"a prompt or completion is {a_type(text)}, not text")
    text = prompt + completion
    head, tail = split_tokens(tokenizer, text, [0, len(prompt), len(text)])
    start = tokenizer.bos_token_id
    if start is not None and start in tokenizer.encode(""):  # every text begins with it
        head = [start, *head]
    if tokenizer.eos_token_id is not None:
        tail = [*tail, tokenizer.eos_token_id]
    return WeightedTokens(head + tail, [0.0] * len(head) + [1.0] * len(tail))


def _datum(tokens: WeightedTokens, max_tokens: Optional[int], on_cut: Optional[OnCut]) -> Datum:
    # Inputs are all tokens but the last, targets all but the first.  So the first weight is not
    # used, and *max_tokens* inputs need one more token.
    ids, weights = tokens.ids, tokens.weights
    length = len(ids) - 1
    if max_tokens is not None:
        limit = as_int("max_tokens", max_tokens, 1)
        ids, weights = ids[: limit + 1], weights[: limit + 1]
    if not any(weights[1:]):
        cut = f" in its first {len(ids) - 1} of {length} tokens" if len(ids) <= length else ""
        raise InvalidInputError(f"an example has nothing to learn{cut}")
    if len(ids) <= length and on_cut is not None:
        on_cut(length)
    return Datum(ModelInput.from_ints(ids[:-1]), {"target_tokens": ids[1:], "weights": weights[1:]})


def _texts(ids: List[int], tokenizer: Any) -> List[str]:
    texts: List[str] = []
    before: List[int] = []  # the previous group: some decoders strip a leading space
    group: List[int] = []
    for place, token in enumerate(ids):
        group.append(token)
        head = tokenizer.decode(before)
        text = tokenizer.decode(before + group)[len(head) :]
        last = place + 1 == len(ids)
        if text.endswith(_INCOMPLETE) and len(group) < _MOST_TOKENS and not last:
            texts.append("")
            continue
        texts.append(text)
        before, group = group, []
    return texts
