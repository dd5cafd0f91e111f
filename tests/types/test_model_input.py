from __future__ import annotations

import array
import collections
import dataclasses
import operator
import pickle

import numpy as np
import pytest

from tinkex._sampling.sample_checks import check_request
from tinkex.errors import InvalidInputError
from tinkex.types import (
    Datum,
    DmelChunk,
    EncodedTextChunk,
    ImageAssetPointerChunk,
    ImageChunk,
    ModelInput,
    SampleRequest,
    SamplingParams,
)

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
def test_a_value_that_is_not_a_token_sequence_is_refused(tokens):
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


def test_an_image_has_the_given_length_or_none():
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
def test_chunks_survive_a_json_round_trip(chunk):
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


def test_a_model_input_pickles():
    made = ModelInput([EncodedTextChunk([1]), ImageChunk(b"x", "png")])
    assert pickle.loads(pickle.dumps(made)) == made


# ---- What callers hold on to ----


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize(
    "make", [ModelInput.from_ints, lambda ids: ModelInput([EncodedTextChunk(ids)])]
)
def test_later_changes_to_the_tokens_have_no_effect(make, dtype):
    buffer = np.arange(4, dtype=dtype)
    made = make(buffer)
    buffer[:] = 9
    assert made.to_ints() == [0, 1, 2, 3]


def test_tokens_are_copied_from_any_buffer():
    torch = pytest.importorskip("torch")
    buffer, shared = array.array("i", [1, 2]), torch.tensor([1, 2], dtype=torch.int32)
    made = [ModelInput.from_ints(ids) for ids in (buffer, memoryview(buffer), shared, [*buffer])]
    buffer[0] = shared[0] = 9
    assert [one.to_ints() for one in made] == [[1, 2]] * 4


def test_the_array_of_all_tokens_is_a_copy():
    for tokens in ([1, 2], np.int32([1, 2])):
        made = ModelInput.from_ints(tokens)
        made.to_numpy()[0] = 9
        assert made.to_ints() == [1, 2]


def test_images_and_audio_are_copied_from_buffers():
    buffer = bytearray(b"\0\0")
    made = [ImageChunk(buffer, "png"), ImageChunk(memoryview(buffer), "png"), DmelChunk(buffer)]
    buffer[0] = 9
    assert [made[0].data, made[1].data, made[2].dmel] == [b"\0\0"] * 3
    assert {type(made[0].data), type(made[2].dmel)} == {bytes}


def test_a_snapshot_does_not_follow_the_list_of_chunks():
    made = ModelInput.from_ints([1])
    sent = made._snapshot()
    made.chunks.append(EncodedTextChunk([2]))
    assert made.to_ints() == [1, 2]
    assert sent.to_ints() == [1]


# ---- What scripts for the official SDK give ----


def test_chunks_are_a_list():
    one, two = EncodedTextChunk([1]), EncodedTextChunk([2])
    assert operator.add(ModelInput([one]).chunks, [two]) == [one, two]


def test_a_chunk_may_be_given_its_type():
    assert EncodedTextChunk(tokens=[1], type="encoded_text") == EncodedTextChunk([1])
    assert ImageChunk(data=b"x", format="png", type="image") == ImageChunk(b"x", "png")
    pointer = ImageAssetPointerChunk("png", "https://example.org/x.png", type="image_asset_pointer")
    assert pointer == POINTER
    assert DmelChunk(dmel=b"\0\0", type="dmel") == DmelChunk(b"\0\0")
    kinds = [chunk.type for chunk in (EncodedTextChunk([1]), ImageChunk(b"", "png"), pointer)]
    assert kinds == ["encoded_text", "image", "image_asset_pointer"]
    assert dataclasses.replace(pointer, format="jpeg").type == "image_asset_pointer"


@pytest.mark.parametrize(
    "make",
    [
        lambda: EncodedTextChunk([1], type="text"),
        lambda: ImageChunk(b"", "png", type="dmel"),
        lambda: ImageAssetPointerChunk("png", "x", type="image"),
        lambda: DmelChunk(b"", type=None),
    ],
)
def test_another_type_is_refused(make):
    with pytest.raises(InvalidInputError, match="the type of this chunk is"):
        make()


def test_chunks_may_be_given_in_their_json_form():
    assert ModelInput([{"tokens": [1], "type": "encoded_text"}]) == ModelInput.from_ints([1])


@pytest.mark.parametrize("chunks", [[1, 2], 5, None, "abc", EncodedTextChunk([1]), {}, [None]])
def test_a_value_that_is_not_a_list_of_chunks_is_refused_with_the_remedy(chunks):
    with pytest.raises(InvalidInputError) as caught:
        ModelInput(chunks)
    assert "ModelInput.from_ints" in caught.value.hint


@pytest.mark.parametrize(
    "make",
    [
        lambda: ImageChunk("iVBORw0KGgo=", "png"),
        lambda: ImageChunk(b"", None),
        lambda: ImageChunk(b"", "png", -1),
        lambda: ImageChunk(b"", "png", "many"),
        lambda: ImageAssetPointerChunk("png", None),
        lambda: DmelChunk([1]),
    ],
)
def test_a_chunk_of_the_wrong_type_is_refused(make):
    with pytest.raises(InvalidInputError, match="Chunk"):
        make()


# ---- What tokenizers return ----


@pytest.mark.parametrize("ids", [[1, 2], (1, 2), np.int64([1, 2]), [[1, 2]], np.int64([[1, 2]])])
@pytest.mark.parametrize("mapping", [dict, collections.UserDict])
def test_the_only_sequence_of_an_encoding_is_used(mapping, ids):
    encoding = mapping({"input_ids": ids, "attention_mask": [1, 1]})
    assert ModelInput.from_ints(encoding).to_ints() == [1, 2]


def test_the_only_tensor_of_an_encoding_is_used():
    torch = pytest.importorskip("torch")
    for ids in (torch.tensor([1, 2]), torch.tensor([[1, 2]]), [torch.tensor([1, 2])]):
        assert ModelInput.from_ints({"input_ids": ids}).to_ints() == [1, 2]


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ({"input_ids": [[1], [2]]}, "are 2 sequences"),
        ({"input_ids": np.ones((3, 2), int)}, "are 3 sequences"),
        ({"attention_mask": [1]}, "without input_ids"),
        ({"input_ids": None}, "not a|must be a flat sequence"),
        ({"input_ids": ["a"]}, "must be a flat sequence"),
    ],
    ids=repr,
)
def test_an_encoding_without_one_token_sequence_is_refused(encoding, message):
    with pytest.raises(InvalidInputError, match=message):
        ModelInput.from_ints(encoding)


def test_a_tensor_with_a_gradient_is_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(InvalidInputError, match="not a flat sequence of integers"):
        ModelInput.from_ints(torch.ones(2, requires_grad=True))


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ([1, 2], "Make one from token ids"),
        (np.int64([1, 2]), "Make one from token ids"),
        ({"input_ids": [1, 2]}, "Make one from token ids"),
        ("text", "Encode text first"),
        ([{"role": "user", "content": "text"}], "Encode text first"),
        (None, "Encode text first"),
    ],
    ids=repr,
)
def test_the_hint_depends_on_the_value_given_as_a_model_input(given, hint):
    with pytest.raises(InvalidInputError, match="not a ModelInput") as of_datum:
        Datum(given, {})
    request = SampleRequest(given, 1, SamplingParams())
    with pytest.raises(InvalidInputError, match="not a ModelInput") as of_sample:
        check_request(request)
    for caught in (of_datum, of_sample):
        assert caught.value.hint.startswith(hint)
        assert "ModelInput.from_ints(" in caught.value.hint


@pytest.mark.parametrize(
    ("tokens", "hint"),
    [([[1, 2]], "tokens[0]"), (np.ones((2, 3), int), "each row"), ([1.0], "astype")],
    ids=repr,
)
def test_the_hint_fits_the_given_tokens(tokens, hint):
    with pytest.raises(InvalidInputError) as caught:
        ModelInput.from_ints(tokens)
    assert hint in caught.value.hint
    assert "tokenizer.encode" not in caught.value.hint


def test_chunks_are_a_list_that_can_be_extended() -> None:
    given = ModelInput.from_ints([1])
    chunks = given.chunks + [EncodedTextChunk([2])]  # noqa: RUF005  # as programs do it
    assert ModelInput(chunks).to_ints() == [1, 2]
    assert given.to_ints() == [1]
