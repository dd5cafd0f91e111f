"""Deferred work: finalizers inside this package postpone it; a failure does not stop the rest."""

from __future__ import annotations

import logging
from typing import Any, Callable, Dict, List

import pytest

from tinkex._runtime.lifecycle import call_from_finalizer, defer, run_deferred


def finalizer(done: List[str]) -> None:
    """Do the work of a finalizer, whose own frame does not count."""
    call_from_finalizer(done.append, "cleanup")


def called_by(module: str) -> Callable[[Callable[[], Any]], Any]:
    """Return a function of *module* that calls its argument."""
    scope: Dict[str, Any] = {"__name__": module}
    exec("def call(fn):\n    return fn()", scope)
    return scope["call"]


def test_a_finalizer_outside_the_package_acts_immediately() -> None:
    done: List[str] = []
    called_by("a_user_s_script")(lambda: finalizer(done))
    assert done == ["cleanup"]


def test_a_finalizer_that_interrupts_the_package_acts_later() -> None:
    done: List[str] = []
    called_by("tinkex._transport.transport")(lambda: finalizer(done))
    assert done == []
    run_deferred()
    run_deferred()
    assert done == ["cleanup"]


def test_a_failure_is_logged_and_the_rest_is_done(caplog: pytest.LogCaptureFixture) -> None:
    done: List[str] = []
    defer(int, "not a number")
    defer(done.append, "second")
    with caplog.at_level(logging.ERROR, "tinkex"):
        run_deferred()
    assert done == ["second"]
    assert "deferred work failed" in caplog.text
