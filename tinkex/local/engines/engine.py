"""The protocol of a model engine, as the embedded server uses it.

An engine holds one base model, many LoRA adapters on it (one per training run) and samplers (frozen
adapters, or the base itself).  It knows nothing of HTTP, sessions, queues or threads: the scheduler
calls it from one thread only, so an engine needs no locks.
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

#: One finished request of a sampling batch: its index, and its response or error.
Finished = Tuple[int, Union[SampleResponse, "EngineError"]]


class EngineError(Exception):
    """The engine cannot execute a request; the engine itself remains usable.

    *category* is ``"user"`` if the request is at fault, ``"server"`` if the engine is.
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
        arch: name of the architecture, for information only.
        context_length: maximum number of tokens of prompt and continuation together.
        vocab_size: token ids are less than this.
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
        sequence: number of the request's continuation that the token belongs to, from 0.
        token: its id.
        logprob: its log-probability, as in ``SampledSequence.logprobs_np``.
        top: the likeliest tokens with their log-probabilities, if requested.
        stop_reason: why the sequence ends with this token; None if it goes on.
    """

    sequence: int
    token: int
    logprob: float
    top: Sequence[Tuple[int, float]]
    stop_reason: Optional[str]


@dataclasses.dataclass(frozen=True)
class StreamingRequest(SampleRequest):
    """A sample request made inside the server, by a caller that can watch each token being drawn.

    Attributes:
        on_token: called for each token, on the engine's thread: it must not block or raise.
        stop_at_eos: whether end-of-sequence tokens end a sequence even if ``stop`` is set.
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
        """The model's transformers tokenizer; None if each token t decodes to ``chr(t)``.

        Safe from any thread.
        """

    def adapted(self, lora: LoraConfig) -> Dict[str, int]:
        """Return what an adapter of *lora* changes: layer names, with the number of layers of each.

        ``*`` stands for the layer's number in a name.  Safe from any thread.
        """

    def create(self, model_id: str, lora: LoraConfig) -> None:
        """Create a fresh adapter (its delta is zero) with a fresh optimizer."""

    def unload(self, model_id: str) -> None:
        """Forget an adapter and its optimizer; do nothing if it is unknown."""

    def forward_backward(
        self,
        model_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, Union[float, str]],
        *,
        forward_only: bool = False,
    ) -> ForwardBackwardOutput:
        """Compute loss and logprobs of each datum; accumulate the gradient unless *forward_only*.

        The server checks *data* only cheaply and in part.  Before it computes anything, the engine
        checks vocabulary, context length, input names and shapes.
        """

    def optim_step(self, model_id: str, params: AdamParams) -> Dict[str, float]:
        """Take one Adam step with the accumulated gradient, clear it, and return metrics."""

    def save(self, model_id: str, folder: Path, *, with_optimizer: bool) -> None:
        """Write the adapter (in PEFT's format), and optionally the optimizer, into *folder*."""

    def export(self, model_id: str, folder: Path) -> None:
        """Write the adapter into *folder*, its weights named as in the hosted service's exports."""

    def load(self, model_id: str, folder: Path, *, with_optimizer: bool) -> None:
        """Replace the adapter of *model_id* with a saved one.

        The optimizer becomes the saved one if *with_optimizer*, else a fresh one.  An accumulated
        gradient is dropped.
        """

    def lora_config(self, folder: Path) -> LoraConfig:
        """Return the configuration of a saved adapter."""

    def create_sampler(self, sampler_id: str, folder: Optional[Path]) -> None:
        """Create a sampler of the adapter saved in *folder*, or of the base model if None."""

    def unload_sampler(self, sampler_id: str) -> None:
        """Forget a sampler; do nothing if it is unknown."""

    def sample(
        self,
        sampler_id: str,
        requests: Sequence[SampleRequest],
        dropped: Container[int] = (),
    ) -> Iterator[List[Finished]]:
        """Run *requests* as one batch, in slices of a few tokens.

        Each step of the iterator does a slice of work and yields the requests that finished during
        it (often none), so that the scheduler can do other work in between; closing the iterator
        abandons the rest.  An invalid request fails alone.  The tokens of a StreamingRequest are
        reported one by one during the slice.

        Requests appended to *requests* while others are unfinished join the batch with the next
        slice.

        A request whose index is added to *dropped* stops with the current slice and gets no result.
        """

    def interrupt(self) -> None:
        """Make the call in progress, and every later one, fail soon with EngineError.

        Safe from any thread.  The server calls it when it closes, since a process cannot exit
        cleanly while one of its threads computes.
        """

    def close(self) -> None:
        """Release the model."""
