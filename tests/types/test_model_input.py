from __future__ import annotations

import pickle

import numpy as np
import pytest

from tinkex.errors import InvalidInputError
from tinkex.types import DmelChunk, EncodedTextChunk, ImageAssetPointerChunk, ImageChunk, ModelInput

POINTER = ImageAssetPointerChunk("png", "https://example.org/x.png")


@pytest.mark.parametrize(
    "tokens", [[1, 2], (1, 2), range(1, 3), np.int16([1, 2]), np.uint32([1, 2])]
)
def test_tokens_come_from_any_flat_sequence_of_integers(tokens):
    chunk = EncodedTextChunk(tokens)
    assert chunk.tokens == [1, 2]
    assert chunk.tokens_np.dtype == np.int32
    assert chunk.length == 2


def test_no_tokens_are_an_empty_array_of_integers():
    assert EncodedTextChunk([]).tokens_np.dtype == np.int32
    assert ModelInput.empty().to_numpy().dtype == np.int32
    assert ModelInput.empty().length == 0


@pytest.mark.parametrize(
    "tokens",
    [
        "text",
        ["a"],
        [1.0],
        [True],
        [[1, 2]],
        [[1], [2, 3]],
        1,
        None,
        [None],
        [-1],
        [2**31],
        [2**70],
    ],
    ids=repr,
)
def test_what_is_no_token_sequence_is_refused(tokens):
    with pytest.raises(InvalidInputError):
        EncodedTextChunk(tokens)


def test_text_is_refused_with_the_remedy():
    with pytest.raises(InvalidInputError) as caught:
        ModelInput.from_ints("Hello")
    assert "tokenizer.encode" in caught.value.hint


def test_the_largest_token_id_fits():
    assert ModelInput.from_ints([2**31 - 1]).to_ints() == [2**31 - 1]


def test_appending_makes_a_new_input_and_joins_text():
    start = ModelInput.from_ints([1])
    longer = start.append_int(2)
    assert start.to_ints() == [1]
    assert longer.to_ints() == [1, 2]
    assert len(longer.chunks) == 1
    assert len(longer.append(EncodedTextChunk([3])).chunks) == 2
    assert ModelInput.empty().append_int(5).to_ints() == [5]
    assert longer.append(ImageChunk(b"x", "png", 4)).append_int(9).length == 2 + 4 + 1


def test_a_list_of_chunks_equals_a_tuple_of_them():
    chunk = EncodedTextChunk([1])
    chunks = [chunk]
    made = ModelInput(chunks)
    chunks.append(chunk)
    assert made == ModelInput((chunk,))
    assert hash(made) == hash(ModelInput((EncodedTextChunk([1]),)))


def test_an_image_has_the_length_it_was_given_or_none():
    assert ImageChunk(b"x", "png", 5).length == 5
    for chunk in (ImageChunk(b"x", "png"), POINTER):
        with pytest.raises(InvalidInputError, match="expected_tokens"):
            _ = chunk.length


def test_only_text_has_token_ids():
    with pytest.raises(InvalidInputError, match="ImageChunk"):
        ModelInput([EncodedTextChunk([1]), ImageChunk(b"x", "png", 5)]).to_ints()


@pytest.mark.parametrize(
    ("container", "length"),
    [
        (bytes([0, 2, 7, 80]), 7),
        (bytes([254, 3, 1, 0xAC, 0x02]), 300),  # LEB128 of 300
        (bytes([0, 0]), 0),
    ],
)
def test_the_length_of_audio_is_its_first_dimension(container, length):
    assert DmelChunk(container).length == length


@pytest.mark.parametrize(
    "container", [b"", b"\xfe", b"\x00", b"\x00\x01", b"\x08\x01\x01", b"\x00\x01" + b"\x80" * 20]
)
def test_a_broken_audio_container_is_refused(container):
    with pytest.raises(InvalidInputError, match="dmel"):
        _ = DmelChunk(container).length


@pytest.mark.parametrize(
    "chunk",
    [
        ImageChunk(b"\x00\xff", "png", 3),
        ImageChunk(b"", "jpeg"),
        POINTER,
        DmelChunk(b"\x00\x01\x05"),
    ],
    ids=repr,
)
def test_chunks_go_through_json(chunk):
    assert ModelInput.from_json(ModelInput([chunk]).to_json()) == ModelInput([chunk])


def test_the_json_form_of_text_holds_the_buffer_itself():
    chunk = EncodedTextChunk(np.int32([1, 2]))
    encoded = ModelInput([chunk]).to_json()
    assert encoded["chunks"][0]["tokens"] is chunk.tokens_np


@pytest.mark.parametrize(
    "payload",
    [
        None,
        [],
        {},
        {"chunks": None},
        {"chunks": [None]},
        {"chunks": [{}]},
        {"chunks": [{"type": "video"}]},
        {"chunks": [{"type": "encoded_text"}]},
        {"chunks": [{"type": "encoded_text", "tokens": ["a"]}]},
        {"chunks": [{"type": "image", "data": 5, "format": "png"}]},
        {"chunks": [{"type": "image", "data": "!!", "format": "png"}]},
        {"chunks": [{"type": "image", "data": "aa==", "format": "png", "expected_tokens": "3"}]},
        {"chunks": [{"type": "image", "data": "aa==", "format": "png", "expected_tokens": -3}]},
        {"chunks": [{"type": "image_asset_pointer", "format": "png"}]},
        {"chunks": [{"type": "dmel", "dmel": None}]},
    ],
    ids=repr,
)
def test_a_malformed_json_form_is_refused(payload):
    with pytest.raises(InvalidInputError):
        ModelInput.from_json(payload)


def test_it_pickles():
    made = ModelInput([EncodedTextChunk([1]), ImageChunk(b"x", "png")])
    assert pickle.loads(pickle.dumps(made)) == made
