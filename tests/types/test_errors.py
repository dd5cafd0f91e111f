"""The error tree: branches, facts, text, pickles."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from tinkex import errors
from tinkex.errors import (
    APIConnectionError,
    APIError,
    APIStatusError,
    InvalidInputError,
    NoProgressError,
    OperationTimeoutError,
    RateLimitError,
    RequestFailedError,
    TinkexError,
    status_error_type,
)

EVERY_TYPE = sorted(
    {
        item
        for item in vars(errors).values()
        if inspect.isclass(item) and issubclass(item, TinkexError)
    },
    key=lambda item: item.__name__,
)
FACTS = {
    "status": 429,
    "request_id": "req-1",
    "session_id": "s-1",
    "category": "user",
    "attempts": 3,
    "elapsed_s": 1.5,
    "retryable": True,
    "hint": "Try later.",
}


def test_every_error_is_in_the_docstring_tree():
    assert len(EVERY_TYPE) >= 24
    for error_type in EVERY_TYPE:
        assert error_type is TinkexError or f" {error_type.__name__} " in f"{errors.__doc__} "


@pytest.mark.parametrize(
    ("child", "parent"),
    [
        (InvalidInputError, ValueError),
        (NoProgressError, OperationTimeoutError),
        (errors.APITimeoutError, APIConnectionError),
        (errors.ResponseDecodeError, APIError),
        (RateLimitError, APIStatusError),
        (APIStatusError, APIError),
    ],
)
def test_branches(child, parent):
    assert issubclass(child, parent)


@pytest.mark.parametrize("error_type", EVERY_TYPE)
def test_every_error_pickles_and_copies_with_all_its_facts(error_type):
    error = error_type("it failed", **FACTS)
    if isinstance(error, APIStatusError):
        error = error_type("it failed", body={"detail": "x"}, retry_after_s=2.5, **FACTS)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is error_type
        assert vars(twin) == vars(error)
        assert str(twin) == str(error)
        assert twin.args == error.args
        assert twin.retryable is True


def test_facts_are_none_where_unknown():
    error = TinkexError("it failed")
    assert {name: getattr(error, name) for name in FACTS} == {
        **dict.fromkeys(FACTS),
        "retryable": False,
    }


def test_the_text_names_the_ids_once_and_ends_in_the_hint():
    assert str(TinkexError("it failed")) == "it failed"
    error = TinkexError("it failed", request_id="req-1", session_id="s-1", hint="Try later.")
    assert str(error) == "it failed (request req-1, session s-1)\n  Try later."
    assert str(TinkexError("req-1 failed", request_id="req-1")) == "req-1 failed"
    assert str(TinkexError("it failed", request_id=17)) == "it failed (request 17)"


@pytest.mark.parametrize(
    ("error_type", "retryable"),
    [
        (APIConnectionError, True),
        (errors.APITimeoutError, True),
        (RateLimitError, True),
        (errors.InternalServerError, True),
        (errors.ConflictError, False),
        (RequestFailedError, False),
        (InvalidInputError, False),
    ],
)
def test_some_errors_may_be_retried_unless_they_say_otherwise(error_type, retryable):
    assert error_type("x").retryable is retryable
    assert error_type("x", retryable=not retryable).retryable is not retryable


@pytest.mark.parametrize(
    ("status", "name"),
    [
        (400, "BadRequestError"),
        (401, "AuthenticationError"),
        (402, "BillingError"),
        (403, "PermissionDeniedError"),
        (404, "NotFoundError"),
        (409, "ConflictError"),
        (410, "APIStatusError"),
        (422, "UnprocessableEntityError"),
        (429, "RateLimitError"),
        (500, "InternalServerError"),
        (503, "InternalServerError"),
        (599, "InternalServerError"),
    ],
)
def test_a_status_has_its_class(status, name):
    assert status_error_type(status).__name__ == name


def test_the_official_names_exist():
    assert errors.TinkerError is TinkexError
    assert errors.APIResponseValidationError is errors.ResponseDecodeError
    assert APIStatusError("x", status=418).status_code == 418
