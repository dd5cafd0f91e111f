"""Checks of sampling requests before they are sent, and of their results.  Pure."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Optional, Sequence

from tinkex import types
from tinkex._runtime.late_import import np
from tinkex.errors import (
    InvalidInputError,
    ResponseDecodeError,
    UnprocessableEntityError,
    UnsupportedError,
    a_type,
)
from tinkex.types._numbers import as_kept, holds_nan
from tinkex.types.tokens import hint_for_model_input

if TYPE_CHECKING:
    from tinkex.types import SampleRequest, SampleResponse

_OLD_SERVER = "Leave it out, or use a newer server."


def check_request(request: SampleRequest) -> None:
    """Raise InvalidInputError if *request* is not valid."""
    if not isinstance(request.prompt, types.ModelInput):
        raise InvalidInputError(
            f"the prompt is {a_type(request.prompt)}, not a ModelInput",
            hint=hint_for_model_input(request.prompt),
        )
    length = request.prompt.length
    if length == 0:
        raise InvalidInputError("the prompt has no tokens")
    if not isinstance(request.sampling_params, types.SamplingParams):
        raise InvalidInputError(
            f"sampling_params is {a_type(request.sampling_params)}, not SamplingParams"
        )
    request.check()
    if request.target_prompt_logprobs is not None:
        _check_targets(request.target_prompt_logprobs, length)
    last_n = request.prompt_logprobs_last_n
    if last_n is not None and last_n >= length:
        raise InvalidInputError(
            f"prompt_logprobs_last_n is {last_n}; it must lie in 1 .. len(prompt) - 1"
        )


def _check_targets(targets: Any, length: int) -> None:
    if not isinstance(targets, types.TensorData):
        raise InvalidInputError(
            f"target_prompt_logprobs is of type {type(targets).__name__}, not TensorData",
            hint="TensorData(...) takes lists and numpy arrays.",
        )
    fits = targets.dtype == "int64" and len(targets.shape) == 2 and targets.shape[0] == length - 1
    if not fits:
        raise InvalidInputError(
            f"target_prompt_logprobs is {targets.dtype} of shape {targets.shape}; it must be int64 "
            f"of shape ({length - 1}, k): a row for each of the {length} prompt tokens but the "
            "first"
        )


def unsupported_by(
    error: UnprocessableEntityError, request: SampleRequest
) -> Optional[UnsupportedError]:
    """Return the error for options that an older server refuses; None if *error* is another."""
    # Pydantic's error for an unknown field names the field and the kind of error.
    options = [
        field.name
        for field in dataclasses.fields(request)
        if field.default is not dataclasses.MISSING
        and getattr(request, field.name) != field.default
        and field.name in error.message
    ]
    if not options or "extra_forbidden" not in error.message:
        return None
    return UnsupportedError(
        f"the server refuses {' and '.join(options)}: it is too old for that",
        status=error.status,
        hint=_OLD_SERVER,
    )


def check_counts(response: SampleResponse, request: SampleRequest, *, sequences: bool) -> None:
    """Raise ResponseDecodeError if *response* has fewer or more items than *request* asks for.

    Args:
        sequences: whether the sequences matter: they do not if only prompt logprobs are wanted.
    """
    found, asked = len(response.sequences), request.num_samples
    if sequences and found != asked:
        raise ResponseDecodeError(
            f"the server returned {found} {'sequence' if found == 1 else 'sequences'}; "
            f"num_samples is {asked}",
            hint="The result was damaged on its way, or the server is at fault.",
        )
    # The first token has no logprob, so a prompt of one token may come back without any.
    length = request.prompt.length
    if request.prompt_logprobs and length > 1 and response.prompt_logprobs_np is None:
        raise ResponseDecodeError(
            f"the server returned no prompt logprobs for the {length} prompt tokens, although they "
            "were requested"
        )


def complete_response(
    response: SampleResponse, request: SampleRequest, sequence_ids: Sequence[str]
) -> SampleResponse:
    """Return *response* in the form that callers see from every server.

    It then has one row of prompt logprobs per prompt token, and its sequences have the
    *sequence_ids* from the response to the submission (some servers send none).

    Raises:
        UnsupportedError: the server ignored an option that it is too old to know.
        ResponseDecodeError: the number of rows does not fit the prompt.
    """
    length = request.prompt.length
    last_n = request.prompt_logprobs_last_n
    logprobs = response.prompt_logprobs_np
    # Servers send last_n values, or all of them with the others null (docs/protocol.md, "Sample
    # results").  Pad them first: `align_prompt_logprobs` accepts only n or n - 1 rows.
    if last_n is not None and logprobs is not None and len(logprobs) == last_n:
        padded = np.concatenate([np.full(length - last_n, np.nan, np.float32), logprobs])
        response = dataclasses.replace(response, prompt_logprobs_np=padded)
    response = align_prompt_logprobs(response, length)
    _check_support(response, request)
    if len(sequence_ids) == len(response.sequences):
        pairs = zip(response.sequences, sequence_ids)
        named = [sequence.named(name) for sequence, name in pairs]
        response = dataclasses.replace(response, sequences=named)
    return response


def align_prompt_logprobs(response: SampleResponse, prompt_length: int) -> SampleResponse:
    """Return *response* with one row per prompt token, NaN (no top-k cells) at position 0.

    Raises:
        ResponseDecodeError: for n prompt tokens, there are neither n nor n - 1 rows.
    """
    # Some servers send n values, some n - 1, because the first token has no context.  The codecs
    # cannot align them, because they do not know n.
    logprobs, topk = response.prompt_logprobs_np, response.topk_prompt_logprobs_np
    if logprobs is None and topk is None:
        return response
    if logprobs is not None:
        missing = _missing_rows("prompt_logprobs", len(logprobs), prompt_length)
        logprobs = np.concatenate([np.full(missing, np.nan, np.float32), logprobs])
        # Some servers send a number for the first token (docs/servers.md).  The array is a copy, so
        # it may be changed.
        logprobs[:1] = np.nan
    if topk is not None:
        missing = _missing_rows("topk_prompt_logprobs", len(topk.token_ids), prompt_length)
        if missing:
            from tinkex.types.sampling import TOPK_SENTINEL, TopkLogprobs

            k = topk.token_ids.shape[1]
            topk = TopkLogprobs(
                np.concatenate([np.zeros((1, k), np.int32), topk.token_ids]),
                np.concatenate([np.full((1, k), TOPK_SENTINEL, np.float32), topk.logprobs]),
            )
    return dataclasses.replace(response, prompt_logprobs_np=logprobs, topk_prompt_logprobs_np=topk)


def _missing_rows(what: str, rows: int, prompt_length: int) -> int:
    if prompt_length - rows not in (0, 1):
        raise ResponseDecodeError(
            f"the server sent {rows} rows of {what} for a prompt of {prompt_length} tokens"
        )
    return prompt_length - rows


def _check_support(response: SampleResponse, request: SampleRequest) -> None:
    # A server that does not know a field ignores it: the response lacks what was requested, or, for
    # prompt_logprobs_last_n, has values before the last n.
    length = request.prompt.length
    logprobs, last_n = response.prompt_logprobs_np, request.prompt_logprobs_last_n or length
    # A prompt of one token has no position to report, so nothing can be missing.
    ignored = {
        "topk_prompt_logprobs": request.topk_prompt_logprobs
        and length > 1
        and response.topk_prompt_logprobs_np is None,
        "topk_sample_logprobs": request.topk_sample_logprobs
        and any(s.length and s.topk_logprobs_np is None for s in response.sequences),
        "prompt_alt_tokens_k": request.prompt_alt_tokens_k
        and length > 1
        and response.prompt_alt_tokens is None,
        "target_prompt_logprobs": request.target_prompt_logprobs is not None
        and length > 1
        and response.target_prompt_logprobs is None,
        "prompt_logprobs_last_n": logprobs is not None
        and not bool(np.all(np.isnan(logprobs[: length - last_n]))),
    }
    names = [name for name, is_ignored in ignored.items() if is_ignored]
    if names:
        raise UnsupportedError(
            f"the server has ignored {' and '.join(names)}: it is too old for that",
            hint=_OLD_SERVER,
        )


def has_unknown_logprobs(response: SampleResponse, request: SampleRequest) -> bool:
    """Return whether a logprob is NaN that should be a number."""
    prompt = response.prompt_logprobs_np
    if prompt is not None:
        # NaN is right for the first token, and before the last n.
        asked = request.prompt_logprobs_last_n or len(prompt) - 1
        if holds_nan(prompt[len(prompt) - asked :]):
            return True
    kept = [as_kept(sequence, "logprobs_np") for sequence in response.sequences]
    return any(logprobs is not None and holds_nan(logprobs) for logprobs in kept)
