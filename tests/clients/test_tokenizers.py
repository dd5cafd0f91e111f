"""Which tokenizer is loaded, and what happens if there is none.  Needs no transformers."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest

from tinkex.clients import tokenizers
from tinkex.errors import ConfigError, TinkexError


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "_cache", {})


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> List[str]:
    """The names that were requested of a stand-in for transformers."""
    names: List[str] = []

    class AutoTokenizer:
        @staticmethod
        def from_pretrained(name: str, trust_remote_code: object = None) -> Dict[str, Any]:
            assert trust_remote_code is False  # without it, a question on the terminal
            names.append(name)
            if name.startswith("coded"):
                raise ValueError("Please pass the argument `trust_remote_code=True` to allow it.")
            if name.startswith("missing"):
                raise OSError(f"{name} is not a local folder\nand a long explanation")
            if name.startswith("silent"):
                raise ValueError
            return {"name": name}

    module = types.ModuleType("transformers")
    module.AutoTokenizer = AutoTokenizer  # type: ignore[attr-defined]  # a stand-in
    monkeypatch.setitem(sys.modules, "transformers", module)
    return names


@pytest.mark.parametrize(
    ("base_model", "tokenizer_id", "expected"),
    [
        ("Qwen/Qwen3-8B", None, "Qwen/Qwen3-8B"),
        ("org/model/variant", None, "org/model"),
        ("org/model:fast", None, "org/model"),
        ("meta-llama/Llama-3.1-8B", None, "thinkingmachineslabinc/meta-llama-3-instruct-tokenizer"),
        ("smollm2-135m", "/models/smollm2", "/models/smollm2"),
        ("anything", "org/tok", "org/tok"),
        ("meta-llama/Llama-3.1-8B", "org/tok", "org/tok"),
    ],
)
def test_which_name_is_loaded(base_model: str, tokenizer_id: Optional[str], expected: str) -> None:
    assert tokenizers.tokenizer_name(base_model, tokenizer_id) == expected


@pytest.mark.parametrize("given", ["base_model", "tokenizer_id"])
def test_a_folder_is_used_unchanged(tmp_path: Path, given: str) -> None:
    folder = tmp_path / "my:model"
    folder.mkdir()
    names = {"base_model": "org/m", given: str(folder)}
    assert tokenizers.tokenizer_name(**names) == str(folder)


def test_a_folder_directly_below_the_root_is_not_a_name_with_a_variant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenizers.os.path, "isdir", {"/models/qwen"}.__contains__)
    assert tokenizers.tokenizer_name("/models/qwen") == "/models/qwen"


def test_a_tokenizer_is_loaded_once_and_each_caller_gets_a_copy(loaded: List[str]) -> None:
    first, second = tokenizers.load_tokenizer("org/m"), tokenizers.load_tokenizer("org/m")
    assert first == second == {"name": "org/m"}
    assert first is not second
    assert loaded == ["org/m"]


def test_a_tokenizer_that_cannot_be_loaded_is_named_and_tried_again(loaded: List[str]) -> None:
    for _ in range(2):
        with pytest.raises(TinkexError, match="'missing/tok' cannot be loaded") as caught:
            tokenizers.load_tokenizer("m", "missing/tok")
        assert "long explanation" not in str(caught.value)
    assert loaded == ["missing/tok"] * 2


def test_a_tokenizer_with_code_of_its_own_is_refused_with_the_remedy(loaded: List[str]) -> None:
    with pytest.raises(TinkexError, match="'coded/tok' needs code from its own") as caught:
        tokenizers.load_tokenizer("coded/tok")
    assert "from_pretrained('coded/tok', trust_remote_code=True)" in str(caught.value)


def test_the_engine_without_a_model_has_none_and_the_hub_is_not_asked(loaded: List[str]) -> None:
    with pytest.raises(TinkexError, match="'deterministic' has no tokenizer"):
        tokenizers.load_tokenizer("deterministic")
    assert loaded == []


def test_a_tokenizer_that_fails_without_a_message_is_named_too(loaded: List[str]) -> None:
    with pytest.raises(TinkexError, match="'silent/tok' cannot be loaded: ValueError"):
        tokenizers.load_tokenizer("silent/tok")


def test_without_transformers_the_error_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="transformers") as caught:
        tokenizers.load_tokenizer("m")
    assert "pip install" in str(caught.value)
