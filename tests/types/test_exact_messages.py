"""Messages read and written without dataclasses-json have the same result as with it."""

from __future__ import annotations

import dataclasses
import typing
import warnings
from datetime import datetime, timezone
from typing import Any, Dict, List, Type

import pytest
from hypothesis import given, strategies as st
from support.properties import several

from tinkex import types
from tinkex.types import Checkpoint, CheckpointsListResponse, Cursor
from tinkex.types._exact import CODERS, reader_of, writer_of
from tinkex.types._wire import Wire

TIMES = ["2026-11-22T15:04:05.5Z", "2026-11-22T15:04:05+01:30", "2026-11-22 15:04:05"]


def messages() -> List[Type[Wire]]:
    found = [getattr(types, name) for name in types.__all__]
    return sorted(
        {
            one
            for one in found
            if isinstance(one, type) and issubclass(one, Wire) and reader_of(one) is not None
        },
        key=lambda one: one.__name__,
    )


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Draw JSON that fits *hint*, or nearly fits it."""
    inner = [one for one in typing.get_args(hint) if one is not type(None)]
    if typing.get_origin(hint) is typing.Union:
        return values_of(inner[0])
    if typing.get_origin(hint) is list:
        return st.lists(st.none() | values_of(inner[0]), max_size=3)
    if dataclasses.is_dataclass(hint):
        return objects_of(hint)
    return {
        str: st.text(max_size=3),
        int: st.integers(-5, 5) | st.booleans(),
        bool: st.booleans(),
        float: st.integers(-5, 5) | st.floats(-1, 1),
    }[hint]


def objects_of(cls: type) -> st.SearchStrategy[Dict[str, Any]]:
    """Draw JSON objects for *cls*, in which fields may be missing, null, or unknown."""
    hints = typing.get_type_hints(cls)
    values: Dict[str, st.SearchStrategy[Any]] = {"unknown": st.just({"x": None})}
    for field in dataclasses.fields(cls):
        if CODERS in field.metadata:
            coded = [{}, {"a": 1}, {"a": "b"}, {"type": "x"}, [], ["x"], *TIMES]
            values[field.name] = st.sampled_from(coded)
        else:
            values[field.name] = values_of(hints[field.name])
    usual = st.fixed_dictionaries(values)
    rare = st.fixed_dictionaries({}, optional={k: st.none() | v for k, v in values.items()})
    return usual | rare


def outcome(read: Any, payload: Any) -> Any:
    try:
        return read(payload)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("cls", messages(), ids=lambda cls: cls.__name__)
@several(15)
@given(data=st.data())
def test_a_message_is_read_and_written_as_by_dataclasses_json(
    cls: Type[Wire], data: st.DataObject
) -> None:
    payload = data.draw(objects_of(cls))

    def slowly(value: Any) -> Any:
        return Wire.from_wire.__func__(cls, value)  # type: ignore[attr-defined]

    quick = outcome(slowly, payload)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr("tinkex.types._wire.reader_of", lambda cls: None)
        assert outcome(slowly, payload) == quick
    if isinstance(quick, Wire):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tinkex.types._wire.writer_of", lambda cls: None)
            expected = quick.to_wire()
        assert quick.to_wire() == expected


def test_a_long_list_is_read_and_written_without_dataclasses_json(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = datetime(2026, 11, 22, 15, 4, 5, 250, tzinfo=timezone.utc)
    rows = [
        Checkpoint(f"weights/{n}", "training", now, f"tinker://r/weights/{n}", n, n % 2 == 0, {})
        for n in range(2000)
    ]
    listed = CheckpointsListResponse(rows, Cursor(0, 2000, 2000))

    def refuse(*args: Any, **how: Any) -> Any:
        raise AssertionError("this takes half a millisecond for each row")

    monkeypatch.setattr(Wire, "from_dict", refuse)
    monkeypatch.setattr(Wire, "to_dict", refuse)
    assert CheckpointsListResponse.from_wire(listed.to_wire()) == listed


def test_values_of_other_types_are_left_to_dataclasses_json() -> None:
    payload = {"offset": "1", "limit": 2.0, "total_count": True}
    assert Cursor.from_wire(payload) == Cursor(1, 2, 1)
    odd: Any = Cursor("1", 2.5, 3)  # type: ignore[arg-type]
    assert odd.to_wire() == {"offset": "1", "limit": 2.5, "total_count": 3}
    assert writer_of(Cursor) is not None
