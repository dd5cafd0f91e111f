"""Every error tinkex raises, in one tree.

::

    TinkexError
      ConfigError                     a setting is wrong or missing; nothing was sent
        CredentialError               there is no usable key or token
      InvalidInputError (ValueError)  an argument is wrong; nothing was sent
      BudgetExceededError             a request might exceed the budget; nothing was sent
      BackpressureError               too many results are unread; nothing was sent
      ClientClosedError               the client was closed, or crossed a fork
      DownloadCancelledError          a download was cancelled; the partial files are kept
      LocalServerError                the embedded server could not start or load its model
      RunFolderError                  a run folder is in use, damaged, or another run's
      APIError                        the server, or the connection to it, failed
        APIConnectionError            no response: DNS, refused, reset, TLS
          APITimeoutError             no response in time
        ResponseDecodeError           a response that violates the protocol
        UnsupportedError              the server is too old and ignored part of the request
        APIStatusError                a response with an error status
          BadRequestError 400, AuthenticationError 401, BillingError 402,
          PermissionDeniedError 403, NotFoundError 404, ConflictError 409,
          UnprocessableEntityError 422, RateLimitError 429, InternalServerError 5xx
          RouteMissingError           404, 405 or 501: the server lacks the route
      RequestFailedError              the server accepted the work, and the work failed
      ResultExpiredError              the work may be done, but its result is gone
      SessionLostError                work failed because the session had ended
      SequenceLostError               client and server disagree on a run's seq_ids
      IncompleteGradientError         part of a batch was added to the run's gradient, part was not
      OperationTimeoutError           operation_timeout_s passed
        NoProgressError               no contact with the server for no_progress_timeout_s

Details are also attributes: ``status``, ``request_id``, ``session_id``, ``category``, ``attempts``,
``elapsed_s``, ``retryable``, ``hint`` (None if unknown).  All errors can be pickled.  No error
contains an API key.
"""

from __future__ import annotations

from typing import Any, Dict, Optional, Tuple, Type, TypeVar

_E = TypeVar("_E", bound="TinkexError")


class TinkexError(Exception):
    """Root of the tree.

    Attributes:
        message: what happened, without the hint.
        status: HTTP status of the response, if there was one.
        request_id: id of the server-side work, if it was accepted.
        session_id: the session that the work belonged to.
        category: how the server classed the failure: ``"user"``, ``"server"`` or ``"unknown"``.
        attempts: how many times the request was sent.
        elapsed_s: seconds from the first attempt to the failure.
        retryable: True if the same call may succeed later.
        hint: what to do about the error.
    """

    retryable: bool = False

    def __init__(
        self,
        message: str,
        *,
        status: Optional[int] = None,
        request_id: Optional[str] = None,
        session_id: Optional[str] = None,
        category: Optional[str] = None,
        attempts: Optional[int] = None,
        elapsed_s: Optional[float] = None,
        retryable: Optional[bool] = None,
        hint: Optional[str] = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.request_id = request_id
        self.session_id = session_id
        self.category = category
        self.attempts = attempts
        self.elapsed_s = elapsed_s
        if retryable is not None:
            self.retryable = retryable
        self.hint = hint

    def __str__(self) -> str:
        facts = [
            f"{name} {value}"
            for name, value in (("request", self.request_id), ("session", self.session_id))
            if value is not None and str(value) not in self.message
        ]
        text = f"{self.message} ({', '.join(facts)})" if facts else self.message
        return f"{text}\n  {self.hint}" if self.hint else text

    def __reduce__(self) -> Tuple[Any, ...]:
        # By default exceptions pickle only their args, without the keyword arguments.
        return _rebuild, (type(self), self.message), self.__dict__


def _rebuild(cls: Type[_E], message: str) -> _E:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    return error


class ConfigError(TinkexError):
    """A setting is wrong or missing.  Nothing was sent."""


class CredentialError(ConfigError):
    """There is no usable key or token: none found, expired, or the credential command failed."""


class InvalidInputError(TinkexError, ValueError):
    """An argument is wrong.  Nothing was sent, and no seq_id was used."""


class BudgetExceededError(TinkexError):
    """The request might exceed the client's ``budget``.  Nothing was sent.

    Attributes:
        unit: the unit of the amounts below, ``"USD"`` or ``"tokens"``.
        used: cost of finished requests.
        reserved: the most that requests in progress may still cost; shrinks as results arrive.
        adds: the most that this request may cost.
        limit: the budget.
    """

    unit: str = "tokens"
    used: float = 0
    reserved: float = 0
    adds: float = 0
    limit: float = 0


class BackpressureError(TinkexError):
    """``max_unread`` results are unread, and ``on_backpressure`` is ``"raise"``.

    Nothing was sent.
    """

    retryable = True


class ClientClosedError(TinkexError):
    """The client was closed, or belongs to the parent process of a fork."""


class DownloadCancelledError(TinkexError):
    """A download was cancelled by its caller; repeating the call resumes it."""


class LocalServerError(TinkexError):
    """The embedded server could not start, or could not load its model.

    Attributes:
        data_dir: the data directory, if it is the reason; ``__cause__`` is then the system's error,
            e.g. BlockingIOError if another server uses the directory.
    """

    data_dir: Optional[str] = None


class RunFolderError(TinkexError):
    """A run folder cannot be used: it is in use, another run's, damaged, or not writable."""


class APIError(TinkexError):
    """The server, or the connection to it, failed.

    Attributes:
        maybe_taken: True if the server may have accepted the request although no response arrived.
    """

    maybe_taken: bool = False


class APIConnectionError(APIError):
    """No response from the server.  ``__cause__`` holds the transport's own error."""

    retryable = True


class APITimeoutError(APIConnectionError):
    """No response from the server in time."""


class ResponseDecodeError(APIError):
    """The server's response violates the protocol."""


class UnsupportedError(APIError):
    """The server is too old for a part of the request, and ignored that part."""


class APIStatusError(APIError):
    """The server responded with an error status.

    Attributes:
        body: the decoded response (JSON value, or text of at most 500 characters), or None.
        retry_after_s: seconds to wait before a retry, if the server requested it.
    """

    def __init__(
        self, message: str, *, body: Any = None, retry_after_s: Optional[float] = None, **facts: Any
    ) -> None:
        super().__init__(message, **facts)
        self.body = body
        self.retry_after_s = retry_after_s

    @property
    def status_code(self) -> Optional[int]:
        """The same as ``status``, under the official SDK's name."""
        return self.status


class BadRequestError(APIStatusError):
    """400: the request is malformed."""


class AuthenticationError(APIStatusError):
    """401: there is no key, or the key is not valid on this server."""


class BillingError(APIStatusError):
    """402: the account has insufficient funds."""


class PermissionDeniedError(APIStatusError):
    """403: the key has no permission for this."""


class NotFoundError(APIStatusError):
    """404: no such object, or no such route."""


class ConflictError(APIStatusError):
    """409: the request conflicts with the server's state."""


class UnprocessableEntityError(APIStatusError):
    """422: the request is well-formed, but its content is not valid."""


class RateLimitError(APIStatusError):
    """429: too many requests."""

    retryable = True


class InternalServerError(APIStatusError):
    """5xx: the server failed."""

    retryable = True


class RouteMissingError(APIStatusError):
    """The server lacks the route (404, 405 or 501).  Not raised for a missing object."""


class RequestFailedError(TinkexError):
    """The server accepted the work, and the work failed.  ``category`` says who caused it."""


class ResultExpiredError(TinkexError):
    """The work may be done, but the server no longer has its result."""


class SessionLostError(TinkexError):
    """Work failed because its session had ended.  ``hint`` explains how to resume."""


class IncompleteGradientError(TinkexError):
    """Part of a batch was added to the run's gradient, or may have been; the rest was not.

    Weights and optimizer state are unchanged and can be saved.  The run takes no optimizer step
    until you repeat the same call, which adds the rest, or load a checkpoint, which discards the
    gradient: see `TrainingClient.forward_backward`.
    """


class SequenceLostError(TinkexError):
    """Client and server disagree on a run's seq_ids: the server expects one that was already used.

    ``hint`` explains how to continue from the last checkpoint.
    """


class OperationTimeoutError(TinkexError):
    """``operation_timeout_s`` passed; the work may still finish on the server."""


class NoProgressError(OperationTimeoutError):
    """No contact with the server for ``no_progress_timeout_s``."""


class ExperimentalWarning(FutureWarning):
    """The official SDK's warning about calls that may change; exists only for warning filters."""


_BY_STATUS: Dict[int, Type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    402: BillingError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    422: UnprocessableEntityError,
    429: RateLimitError,
}


def a_type(value: object) -> str:
    """Return the type of *value* with its article, for a message: ``"a list"``, ``"an int"``."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def status_error_type(status: int) -> Type[APIStatusError]:
    """Return the error class for the HTTP *status* (400 or above)."""
    if status >= 500:
        return InternalServerError
    return _BY_STATUS.get(status, APIStatusError)


# The official SDK's names, so that `except` clauses written for it carry over.
TinkerError = TinkexError
APIResponseValidationError = ResponseDecodeError
