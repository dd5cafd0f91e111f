"""docs/data.md: its table of formats, and its code blocks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

pytest.importorskip("transformers")

from support.chat_templates import MARKED, byte_tokenizer

from tinkex.data import example_datum, parse_example, preference_data

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\|[^|]*\| `(\{.*\})` \| `(\w+)` \|", PAGE, re.MULTILINE)


def test_each_row_of_the_table_of_formats_is_right() -> None:
    assert len(ROWS) == 6
    tokenizer = byte_tokenizer(MARKED)
    for line, kind in ROWS:
        example = parse_example(json.loads(line))
        assert type(example).__name__ == kind
        if kind == "Preference":
            preference_data(example, tokenizer)  # type: ignore[arg-type]
        else:
            example_datum(example, tokenizer)


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chats.jsonl").write_text("\n".join(line for line, _ in ROWS[:4]))
    monkeypatch.chdir(tmp_path)
    batches: List[Any] = []

    def forward_backward(batch: Any, loss: str) -> Any:
        batches.append((loss, batch))
        return SimpleNamespace(result=lambda: None)

    trainer = SimpleNamespace(
        get_tokenizer=lambda: byte_tokenizer(MARKED), forward_backward=forward_backward
    )
    names: Dict[str, Any] = {"trainer": trainer}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    [(loss, batch)] = batches
    assert loss == "cross_entropy"
    assert len(batch) == 4
    assert names["learnt"] == "4<|im_end|>"
    assert names["cuts"] == []
