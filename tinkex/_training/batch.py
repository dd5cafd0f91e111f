"""The batch of a pass: cutting it into requests, and reading their results.

Servers report results differently; the outputs returned here look the same for all.  No threads.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import (
    TYPE_CHECKING,
    Collection,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    TypeVar,
    Union,
)

from tinkex._results.notices import NaNWarning
from tinkex._runtime.late_import import np
from tinkex._transport.request import Reply
from tinkex._transport.server_flags import ServerFlags
from tinkex.errors import (
    ClientClosedError,
    InvalidInputError,
    ResponseDecodeError,
    SequenceLostError,
    SessionLostError,
    TinkexError,
)
from tinkex.types import Datum, ForwardBackwardOutput, ForwardBackwardRequest, TensorData
from tinkex.types.tensor_data import first_where
from tinkex.wire.chunking import split
from tinkex.wire.codec import PROTOBUF_CONTENT_TYPE, Codec, codec_for
from tinkex.wire.json_codec import JSON

if TYPE_CHECKING:
    import numpy.typing as npt

E = TypeVar("E", bound=BaseException)

#: After these errors the run itself is lost, so its gradient and batches no longer matter.
RUN_LOST = (ClientClosedError, SequenceLostError, SessionLostError)

#: The most bytes of JSON per byte of a datum's buffers, and for its field names.
_JSON_GROWTH = 4
_JSON_OVERHEAD = 2000

#: How servers refer to an example of a batch: in a sentence, or as the location of a bad field.
_INDEX = re.compile(r'(\bdatum |\bdata\[|\bdata\.|"data", ?)(\d+)')


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss that the server computes, and its settings."""

    name: str
    config: Mapping[str, Union[float, str]] = dataclasses.field(default_factory=dict)


class Chunk(NamedTuple):
    """The datums of one request.

    Attributes:
        nbytes: their total size in bytes.
        first: index of the first datum in the caller's batch.
    """

    data: List[Datum]
    nbytes: int
    first: int

    @property
    def stop(self) -> int:
        """Index, in the caller's batch, after the last datum."""
        return self.first + len(self.data)


def cut(
    data: Sequence[Datum],
    flags: ServerFlags,
    codec: Optional[Codec],
    first: int = 0,
    breaks: Collection[int] = (),
) -> List[Chunk]:
    """Cut *data*, which is a batch from its index *first* on, into requests as large as possible.

    A new request begins at each index of the batch that is in *breaks*.

    The server limits the bytes of request bodies, so datums are measured in the encoding in which
    they will be sent, or in the larger of both encodings while *codec* is not known (None).
    """
    limit = flags.fwdbwd_max_chunk_bytes_count
    sizes = nbytes = [datum.nbytes for datum in data]
    # Measuring JSON means writing it, so it is done only for batches that may exceed the limit.
    json_at_most = _JSON_GROWTH * sum(nbytes) + _JSON_OVERHEAD * len(data)
    if (codec is None or codec.name == JSON.name) and json_at_most > limit:
        sizes = [_json_size(datum) for datum in data]
    own_breaks = {index - first for index in breaks}
    parts = split(sizes, flags.fwdbwd_max_chunk_len, limit, own_breaks)
    return [Chunk(list(data[part]), sum(nbytes[part]), first + part.start) for part in parts]


def check_encoding(chunks: Sequence[Chunk], codec: Optional[Codec]) -> None:
    """Raise InvalidInputError, with the index, if a datum of *chunks* cannot be encoded.

    For batches in several requests, some of which would otherwise be sent before the bad one is
    found.  *codec* is None while the server's encoding is not known; protobuf will be tried first.
    """
    codec = codec or codec_for(PROTOBUF_CONTENT_TYPE)
    for chunk in chunks:
        try:
            # In protobuf this copies no arrays: the parts refer to the datums' own.
            codec.forward_backward_parts(ForwardBackwardRequest("", 1, chunk.data, ""))
        except InvalidInputError as error:
            raise _with_index(error, chunk, codec) from error


def _with_index(error: InvalidInputError, chunk: Chunk, codec: Codec) -> InvalidInputError:
    """Return *error*, raised by encoding *chunk*, with the index of the datum at fault."""
    for index, datum in enumerate(chunk.data, chunk.first):
        try:
            codec.forward_backward_parts(ForwardBackwardRequest("", 1, [datum], ""))
        except InvalidInputError as found:
            return InvalidInputError(f"data[{index}]: {found.message}", hint=found.hint)
    return error  # it is about the chunk as a whole, such as its size


def _json_size(datum: Datum) -> int:
    try:
        return max(JSON.size_of(datum), datum.nbytes)
    except InvalidInputError:  # it has no JSON form, so it will not be sent as JSON
        return datum.nbytes


def in_indices_of_batch(error: E, first: int, stop: int) -> E:
    """Return *error*, which is about ``data[first:stop]`` of a batch, in the caller's terms.

    Indices in its message count from the start of the request; they are changed to count from the
    start of the batch.
    """
    # The first request starts where the batch does, and the loss of a run is not about an example.
    if not isinstance(error, TinkexError) or isinstance(error, RUN_LOST) or first == 0:
        return error

    def moved(found: re.Match[str]) -> str:
        return f"{found.group(1)}{int(found.group(2)) + first}"

    translated = copy.copy(error)
    message, count = _INDEX.subn(moved, error.message)
    translated.message = message if count else f"{message} (in data[{first}:{stop}] of the batch)"
    translated.args = (translated.message,)
    translated.__cause__ = error.__cause__
    return translated


def read_pass(
    reply: Reply, chunk: Chunk, loss: Loss, nan_warning: NaNWarning
) -> ForwardBackwardOutput:
    """Decode the result of a pass over *chunk*.

    If the server does not report ``loss:sum``, it is computed from the logprobs, for the two losses
    that need nothing else: see `cross_entropy` and `importance_sampling`.  Logprobs that are NaN or
    null stay NaN, with one warning.

    Raises:
        ResponseDecodeError: the result is malformed, or does not have one output per datum.
    """
    data = chunk.data
    output = codec_for(reply.content_type).decode_output(reply.body)
    if len(output.loss_fn_outputs) != len(data):
        raise ResponseDecodeError(
            f"the server returned {_count(output.loss_fn_outputs, 'output')} for a batch of "
            f"{_count(data, 'datum')}",
            hint="The result was damaged in transit, or the server is at fault. A backward pass "
            "was still done: making the same call again would add its gradient twice.",
        )
    with_logprobs = [i for i, o in enumerate(output.loss_fn_outputs) if "logprobs" in o]
    logprobs = [output.loss_fn_outputs[i]["logprobs"].values for i in with_logprobs]
    # Searched only until the warning is shown, because searching every result takes time.
    found = None if nan_warning.shown else first_where(np.isnan, logprobs)
    if found is not None:
        nan_warning.show(f"data[{chunk.first + with_logprobs[found]}]")
    if loss.name in _LOSSES and "loss:sum" not in output.metrics:
        loss_sum = _LOSSES[loss.name](data, output.loss_fn_outputs)
        if loss_sum is not None:
            output.metrics["loss:sum"] = loss_sum
    return output


def _count(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def cross_entropy(
    data: Sequence[Datum], outputs: Sequence[Mapping[str, TensorData]]
) -> Optional[float]:
    """Return -sum(weights * logprobs) of *data*; None if *outputs* do not fit.

    Without weights, all weights are 1.  Where a weight is 0, the logprob is ignored, even if it is
    NaN.
    """
    total = 0.0
    for datum, logprobs in _with_logprobs(data, outputs):
        weights = np.ones(0 if logprobs is None else logprobs.shape)
        if "weights" in datum.loss_fn_inputs:
            weights = datum.loss_fn_inputs["weights"]._dense().astype(np.float64)
        if logprobs is None or weights.shape != logprobs.shape:
            return None
        counted = weights != 0  # selected, because 0 times NaN is NaN
        total -= float(np.dot(weights[counted], logprobs[counted]))
    return total


def importance_sampling(
    data: Sequence[Datum], outputs: Sequence[Mapping[str, TensorData]]
) -> Optional[float]:
    """Return -sum(exp(logprobs - the sampler's) * advantages); None if *outputs* do not fit.

    Where an advantage is 0, the logprobs are ignored.
    """
    total = 0.0
    for datum, logprobs in _with_logprobs(data, outputs):
        sampled = datum.loss_fn_inputs.get("logprobs")
        advantages = datum.loss_fn_inputs.get("advantages")
        if logprobs is None or sampled is None or advantages is None:
            return None
        if not sampled.shape == advantages.shape == logprobs.shape:
            return None
        gains = advantages._dense().astype(np.float64)
        # Selected as in `cross_entropy`: 0 times NaN, or times an infinite ratio, is NaN.
        counted = gains != 0
        steps = logprobs[counted] - sampled._dense().astype(np.float64)[counted]
        with np.errstate(over="ignore", invalid="ignore"):  # an overflowing ratio is infinite
            total -= float(np.dot(np.exp(steps), gains[counted]))
    return total


_LOSSES = {"cross_entropy": cross_entropy, "importance_sampling": importance_sampling}


def _with_logprobs(
    data: Sequence[Datum], outputs: Sequence[Mapping[str, TensorData]]
) -> Iterator[Tuple[Datum, Optional[npt.NDArray[np.float64]]]]:
    """Yield each datum with the logprobs of its output, or None if it has none."""
    for index, datum in enumerate(data):
        found = outputs[index].get("logprobs") if len(outputs) == len(data) else None
        # As float64, because sums over many tokens lose digits in float32.
        yield datum, None if found is None else found._dense().astype(np.float64)
