"""Stop strings are found in the text that continues the prompt, with any tokenizer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tinkex.local.engines.torch_engine import TorchEngine
from tinkex.local.engines.torch_engine.builtin_models import write_tiny_random
from tinkex.local.engines.torch_engine.stopping import GeneratedText, StopRule, Vocabulary
from tinkex.types import ModelInput, SampleRequest, SamplingParams

BLANK = "\u2581"
LETTERS = "abcdefgh.\n"
Decode = Callable[[Sequence[int]], str]


def sentencepiece() -> Tokenizer:
    """Return a tokenizer like Llama 2's: characters, bytes for unknown ones, no blank in front."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [BLANK, *LETTERS, f"{BLANK}a", f"{BLANK}{BLANK}", "ab"]
    merges = [(BLANK, "a"), (BLANK, BLANK), ("a", "b")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(BLANK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    pieces = [BLANK, *LETTERS, "é", "€", "😀", f"{BLANK}a"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(BLANK, "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, "Ġa"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZERS = {"sentencepiece": sentencepiece, "metaspace": metaspace, "byte-level": byte_level}


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    class Decoder:
        def decode(self, tokens: Sequence[int], **options: Any) -> str:
            text: str = tokenizer.decode(list(tokens), skip_special_tokens=False)
            return text

    return Vocabulary(Decoder(), frozenset())


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


def split(tokenizer: Tokenizer, prompt: str, text: str) -> Tuple[List[int], List[int]]:
    """Return the token ids of *prompt*, and those that continue it to *prompt* + *text*."""
    tokens = tokenizer.encode(prompt + text).ids
    for count in range(len(tokens) + 1):
        if tokenizer.decode(tokens[:count]) == prompt:
            return tokens[:count], tokens[count:]
    raise AssertionError("a token spans the border")


def stops_after(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int], *stop: str
) -> int:
    vocabulary = vocabulary_of(tokenizer)
    rule = StopRule.of(list(stop), vocabulary)
    text = GeneratedText(list(prompt), vocabulary.text, max(map(len, stop)) - 1)
    for count, token in enumerate(tokens, 1):
        if rule.reached(token, text):
            return count
    return -1


CASES: Dict[str, Tuple[str, str, str]] = {
    "a blank first": ("b", " c d", " c"),
    "a blank first, after a blank": ("b c", "  a", "  a"),
    "a blank that is a word's": ("b", " ab", " ab"),
    "a character of four bytes": ("b", "c😀d", "😀"),
    "a character of three bytes, first": ("b€", "€d", "€d"),
    "words over several tokens": ("b", "c e. f g", "e. f"),
    "a line end": ("b", "c\n\nd", "\n\n"),
}


@pytest.mark.parametrize("case", CASES)
def test_sampling_stops_with_the_last_token_of_the_string(case: str, tokenizer: Tokenizer) -> None:
    prompt_text, text, stop = CASES[case]
    prompt, tokens = split(tokenizer, prompt_text, text)
    count = stops_after(tokenizer, prompt, tokens, "never there", stop)
    assert count > 0
    found = [tokenizer.decode(prompt + tokens[:n])[len(prompt_text) :] for n in (count - 1, count)]
    assert [stop in text for text in found] == [False, True]


def test_a_stop_string_in_the_prompt_stops_nothing(tokenizer: Tokenizer) -> None:
    prompt, tokens = split(tokenizer, "b. c", " d e")
    assert stops_after(tokenizer, prompt, tokens, "c", ". c d", "c d") == -1


def test_the_text_is_the_tokens_addition_to_the_prompt(tokenizer: Tokenizer) -> None:
    random.seed(5)
    decode = vocabulary_of(tokenizer).text
    for _ in range(100):
        text = "".join(random.choices("ab  cd.é€😀", k=40))
        tokens = tokenizer.encode(text).ids
        at = random.randrange(len(tokens))
        while "\ufffd" in decode(tokens[:at]):  # a prompt ends with a whole character
            at += 1
        expected = decode(tokens)[len(decode(tokens[:at])) :]
        generated = GeneratedText(tokens[:at], decode, keep=1000)
        found = [generated.append(token) for token in tokens[at:]]
        assert found[-1:] in ([expected], [])


def test_bytes_that_form_no_character_cost_no_more_than_others() -> None:
    longest = 0

    def decode(tokens: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return bytes(tokens).decode("utf-8", "replace")

    generated = GeneratedText([65], decode, keep=2)
    for _ in range(1000):
        generated.append(0x82)
    assert generated.append(66).endswith("B")
    assert longest < 40


def test_without_a_prompt_the_text_is_that_of_the_tokens() -> None:
    generated = GeneratedText([], lambda tokens: "".join(map(chr, tokens)), keep=3)
    assert [generated.append(ord(letter)) for letter in "abcde"] == [
        "a",
        "ab",
        "abc",
        "abcd",
        "bcde",
    ]


def test_a_sampled_first_word_ends_the_sequence(tmp_path: Path) -> None:
    write_tiny_random(tmp_path)
    words = {f"{BLANK}w{number}": number for number in range(260)}
    backend = Tokenizer(models.WordLevel(words, unk_token=f"{BLANK}w0"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=f"{BLANK}w256")
    tokenizer.save_pretrained(str(tmp_path))
    engine = TorchEngine.from_pretrained(str(tmp_path), device="cpu")
    engine.create_sampler("s", None)

    def tokens_until(stop: List[str]) -> List[int]:
        params = SamplingParams(max_tokens=12, seed=3, stop=stop)
        request = SampleRequest(ModelInput.from_ints([5, 6, 7]), 2, params)
        ((_, answer),) = [pair for finished in engine.sample("s", [request]) for pair in finished]
        assert {s.stop_reason for s in answer.sequences} <= {"stop", "length"}
        return list(answer.sequences[0].tokens)

    free = tokens_until([])
    assert len(free) == 12
    assert tokens_until([f" w{free[0]}"]) == free[:1]
    assert tokens_until(["never there", f" w{free[1]}"]) == free[:2]
    assert tokens_until([f"w{free[0]} w{free[1]}"]) == free[:2]
