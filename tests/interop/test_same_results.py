"""Scripts give the same results with the official SDK and with ``import tinkex as tinker``."""

from __future__ import annotations

import functools
from typing import Any, Iterator, Mapping, Tuple

import pytest
from compat.programs import SCRIPTS, STYLES, run_with_tinker, run_with_tinkex
from interop.conftest import PYTHON

tinker = pytest.importorskip("tinker", reason="the official client is not installed")

#: Clients of the JSON era know only the older style.
KNOWN = STYLES if hasattr(tinker.ServiceClient, "__exit__") else STYLES[:1]


def differences(ours: Any, theirs: Any, at: str = "") -> Iterator[Tuple[str, Any, Any]]:
    """Yield the places where two results differ; floats may differ by 1e-6."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping) and ours.keys() == theirs.keys():
        for key in ours:
            yield from differences(ours[key], theirs[key], f"{at}.{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, (one, other) in enumerate(zip(ours, theirs)):
            yield from differences(one, other, f"{at}[{index}]")
    elif type(ours) is float and type(theirs) is float:
        if ours != pytest.approx(theirs, rel=1e-6, abs=1e-6):
            yield at, ours, theirs
    elif type(ours) is not type(theirs) or ours != theirs:
        yield at, ours, theirs


@functools.lru_cache(None)
def printed_with_tinkex(script: str, style: str, url: str) -> Mapping[str, Any]:
    return run_with_tinkex(script, style, url, PYTHON)


def results(printed: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: value for name, value in printed.items() if name != "stderr"}


@pytest.mark.parametrize("style", KNOWN)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_gives_the_same_results_with_both_packages(
    script: str, style: str, base_url: str
) -> None:
    theirs = results(run_with_tinker(script, style, base_url))
    ours = results(printed_with_tinkex(script, style, base_url))
    assert list(differences(ours, theirs)) == []
    assert len(ours) >= 3


def test_a_difference_is_detected() -> None:
    assert list(differences({"a": [1.0, 2.0]}, {"a": [1.0, 2.00001]})) == [(".a[1]", 2.0, 2.00001)]
    assert list(differences({"a": [1.0]}, {"a": [1.0, 2.0]})) != []
    assert list(differences({"a": 1}, {"a": True})) != []
