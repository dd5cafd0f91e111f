"""What a model engine does for the embedded server.

An engine holds one base model, many LoRA adapters over it (one per training run) and samplers
(frozen adapters, or the base itself).  It knows nothing of HTTP, sessions, queues or threads:
the scheduler calls it from one thread only, so an engine needs no locks.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import (
    Any,
    Callable,
    Container,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Protocol,
    Sequence,
    Tuple,
    Union,
)

from tinkex.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    SampleRequest,
    SampleResponse,
)

#: One finished request of a sampling batch: its index, and its result or what went wrong.
Finished = Tuple[int, Union[SampleResponse, "EngineError"]]


class EngineError(Exception):
    """The engine cannot execute a request; the engine itself remains usable.

    *category* is ``"user"`` if another request would work, ``"server"`` if the engine failed.
    """

    def __init__(self, message: str, category: str = "user") -> None:
        super().__init__(message)
        self.category = category


@dataclasses.dataclass(frozen=True)
class EngineInfo:
    """What clients learn about the base model.

    Attributes:
        model_name: the name clients ask for.
        aliases: other names that clients may use.
        tokenizer_id: what transformers' AutoTokenizer loads (a name or a folder), or None.
        arch: architecture name, for information.
        context_length: most tokens of prompt and continuation together.
        vocab_size: token ids lie below this.
        eos_tokens: a sequence ends at any of these.
    """

    model_name: str
    arch: str
    context_length: int
    vocab_size: int
    tokenizer_id: Optional[str] = None
    aliases: Tuple[str, ...] = ()
    eos_tokens: Tuple[int, ...] = ()


class SampledToken(NamedTuple):
    """A token that was just drawn.

    Attributes:
        sequence: which of the request's continuations it belongs to, from 0.
        token: its id.
        logprob: its log-probability, as in ``SampledSequence.logprobs_np``.
        top: the likeliest tokens with their log-probabilities, if requested.
        stop_reason: why the sequence ends with it; None if it continues.
    """

    sequence: int
    token: int
    logprob: float
    top: Sequence[Tuple[int, float]]
    stop_reason: Optional[str]


@dataclasses.dataclass(frozen=True)
class StreamingRequest(SampleRequest):
    """A sample request of a caller within the server, who can follow its tokens.

    Attributes:
        on_token: called for each token, on the engine's thread: it must not block or raise.
        stop_at_eos: end-of-sequence tokens end a sequence even if ``stop`` lists strings.
    """

    on_token: Optional[Callable[[SampledToken], None]] = None
    stop_at_eos: bool = False


class Engine(Protocol):
    """One base model with its adapters and samplers.  Called from one thread only.

    Every method may raise EngineError; the state is then as it was before the call.
    """

    @property
    def info(self) -> EngineInfo:
        """What this engine serves.  Safe from any thread."""

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, of transformers; None if each token t reads ``chr(t)``.

        Safe from any thread.
        """

    def adapted(self, lora: LoraConfig) -> Dict[str, int]:
        """Return what an adapter of *lora* changes: names of layers, and how many there are.

        ``*`` stands for the numbers in a name.  Safe from any thread.
        """

    def create(self, model_id: str, lora: LoraConfig) -> None:
        """Make a fresh adapter (its delta is zero) with a fresh optimizer."""

    def unload(self, model_id: str) -> None:
        """Forget an adapter and its optimizer; nothing happens if it is unknown."""

    def forward_backward(
        self,
        model_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, Union[float, str]],
        *,
        forward_only: bool = False,
    ) -> ForwardBackwardOutput:
        """Compute loss and logprobs of each datum; add the gradient to what is accumulated.

        *data* is checked by the server beforehand only for being well-formed; the engine
        checks vocabulary, context length, input names and shapes, before it computes anything.
        """

    def optim_step(self, model_id: str, params: AdamParams) -> Dict[str, float]:
        """Take one Adam step with the accumulated gradient, clear it, and return metrics."""

    def save(self, model_id: str, folder: Path, *, with_optimizer: bool) -> None:
        """Write the adapter (PEFT's format), and optionally the optimizer, into *folder*."""

    def export(self, model_id: str, folder: Path) -> None:
        """Write the adapter into *folder*, named as in exports of the hosted service."""

    def load(self, model_id: str, folder: Path, *, with_optimizer: bool) -> None:
        """Replace the adapter of *model_id* by a saved one; its optimizer too, or a fresh one.

        An accumulated gradient is dropped.
        """

    def lora_config(self, folder: Path) -> LoraConfig:
        """Return the configuration of a saved adapter."""

    def create_sampler(self, sampler_id: str, folder: Optional[Path]) -> None:
        """Make a sampler of the adapter saved in *folder*; of the base model if None."""

    def unload_sampler(self, sampler_id: str) -> None:
        """Forget a sampler; nothing happens if it is unknown."""

    def sample(
        self,
        sampler_id: str,
        requests: Sequence[SampleRequest],
        dropped: Container[int] = (),
    ) -> Iterator[List[Finished]]:
        """Run *requests* as one batch, in slices of a few tokens.

        Each step of the iterator does a slice of work and yields what finished during it
        (often nothing), so that the scheduler can do other work in between; closing the
        iterator abandons the rest.  An invalid request fails alone.  The tokens of a
        StreamingRequest are reported one by one while a slice is done.

        Requests that are appended to *requests* while others are not finished join the batch with
        the next slice.

        The work on an index that appears in *dropped* ends with the slice; it gets no result.
        """

    def interrupt(self) -> None:
        """Make the call in progress, and every later one, fail soon with EngineError.

        The one method for any thread: the server calls it when it is closed, since a process
        cannot end in good order while a thread of it computes.
        """

    def close(self) -> None:
        """Release the model."""
