"""Activity: the server's recent losses, samples and tokens, for its web page.

In memory and bounded; repeats nothing that the store or the scheduler knows.  The engine thread
adds what it has done, HTTP threads read.
"""

from __future__ import annotations

import threading
import time
import uuid
from array import array
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any, Callable, Deque, Dict, List, Mapping, NamedTuple, Optional

from tinkex.local.state.series import Curve, TokenRate
from tinkex.types import SampledSequence, SampleRequest, SampleResponse

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    TokenArray = npt.NDArray[np.int32]
    FloatArray = npt.NDArray[np.float32]
else:  # numpy is imported once there are tokens
    FloatArray = TokenArray = Any

#: Most runs whose losses are kept, the most recently trained: 120 KB each.
MOST_RUNS = 64

#: Most samples that are kept, the latest.
MOST_SAMPLES = 20

#: Tokens that are kept of a sample: the end of the prompt, and the start of the continuation.
_PROMPT_TOKENS = 200
_SAMPLED_TOKENS = 300


class KeptSample(NamedTuple):
    """The first sequence of a response.

    Attributes:
        version: later samples have greater versions.
        at: seconds since the epoch.
        model: a base model, a ``tinker://`` path, or the id of a run.
        prompt: the last tokens of the prompt.
        tokens: the first tokens that were sampled.
        logprobs: log-probabilities of *tokens*, or None.
        prompt_length, length: number of tokens in the whole prompt and the whole continuation.
        sequences: how many sequences the response has.
    """

    version: int
    at: float
    model: str
    prompt: TokenArray
    tokens: TokenArray
    logprobs: Optional[FloatArray]
    prompt_length: int
    length: int
    sequences: int


class RunProgress(NamedTuple):
    """A run, with the part of its curve that the reader does not have.

    Attributes:
        steps: steps of the optimizer.
        tokens: tokens of all forward_backward passes.
        loss: loss per token of the last step; None if it had no pass.
        at: when it was last trained, in seconds since the epoch.
        stride: how many steps each point stands for.
        start: index of the first point.
        point_steps, point_losses: the points from *start* on.
    """

    steps: int
    tokens: int
    loss: Optional[float]
    at: float
    stride: int
    start: int
    point_steps: array[int]
    point_losses: array[float]


class Recent(NamedTuple):
    """What is new to a reader.

    Attributes:
        version: to be passed to the next call of `since`.
        runs: runs that were trained since the last call, by id.
        samples: samples that were drawn since the last call, oldest first.
        trained, sampled: tokens in each of the last seconds, oldest first.
        total_trained, total_sampled: tokens since the server started.
    """

    version: int
    runs: Dict[str, RunProgress]
    samples: List[KeptSample]
    trained: List[float]
    sampled: List[float]
    total_trained: int
    total_sampled: int


class _Run:
    def __init__(self) -> None:
        self.curve = Curve()
        self.version = 0
        self.steps = 0
        self.tokens = 0
        self.at = 0.0
        self.loss: Optional[float] = None
        self.loss_sum = 0.0  # of the passes since the last step
        self.loss_weight = 0.0


class Activity:
    """Remembers losses, samples and tokens.  Thread-safe; no I/O.

    Args:
        clock: returns monotonic seconds.
        wall: returns seconds since the epoch.

    Attributes:
        epoch: identifies this object: a version means nothing to another object.
        clock: the *clock* above.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self.epoch = uuid.uuid4().hex[:8]
        self.clock = clock
        self._wall = wall
        # Guards everything below.  Held for microseconds, or, by a reader that has nothing yet, for
        # as long as it takes to copy the arrays of all curves.
        self._lock = threading.Lock()
        self._version = 0
        self._runs: OrderedDict[str, _Run] = OrderedDict()  # least recently trained first
        self._samples: Deque[KeptSample] = deque(maxlen=MOST_SAMPLES)
        self._trained = TokenRate()
        self._sampled = TokenRate()
        self._total_trained = 0
        self._total_sampled = 0

    def note_pass(
        self, run_id: str, tokens: int, metrics: Mapping[str, float], started: float
    ) -> None:
        """Note a forward_backward pass over *tokens* that began at *started* (of `clock`)."""
        loss = metrics.get("loss:sum")
        # The first positive sum is used: weights of a custom loss may be negative, and are then no
        # basis for a loss per token.
        weights = (metrics.get("weights:sum"), metrics.get("tokens:sum"), float(tokens))
        weight = next((one for one in weights if one is not None and one > 0), 0.0)
        now, at = self.clock(), self._wall()
        with self._lock:
            run = self._touched_locked(run_id, at)
            run.tokens += tokens
            if loss is not None and weight:
                run.loss_sum += loss
                run.loss_weight += weight
            self._trained.add(tokens, started, now)
            self._total_trained += tokens

    def note_step(self, run_id: str) -> None:
        """Note an optimizer step.  Its loss is the mean over the passes since the previous step."""
        at = self._wall()
        with self._lock:
            run = self._touched_locked(run_id, at)
            run.steps += 1
            run.loss = run.loss_sum / run.loss_weight if run.loss_weight else None
            if run.loss is not None:
                run.curve.add(run.steps, run.loss, run.version)
            run.loss_sum = run.loss_weight = 0.0

    def note_sample(
        self, model: str, request: SampleRequest, response: SampleResponse, started: float
    ) -> None:
        """Note a response that was worked on since *started* (of `clock`)."""
        tokens = sum(sequence.length for sequence in response.sequences)
        now = self.clock()
        # A request for log-probabilities alone has to sample one token, which is not worth showing.
        scores = request.prompt_logprobs and request.sampling_params.max_tokens == 1
        kept = None if scores or not response.sequences else response.sequences[0]
        # Copied before taking the lock, so that readers do not wait for the copy.
        made = None if kept is None else _kept(model, request, kept, len(response.sequences))
        at = self._wall()
        with self._lock:
            self._version += 1
            if made is not None:
                self._samples.append(made._replace(version=self._version, at=at))
            self._sampled.add(tokens, started, now)
            self._total_sampled += tokens

    def since(self, version: int) -> Recent:
        """Return what has happened since *version*; everything, if it is 0."""
        now = self.clock()
        with self._lock:
            return Recent(
                self._version,
                {
                    run_id: _progress(run, version)
                    for run_id, run in self._runs.items()
                    if run.version > version
                },
                [sample for sample in self._samples if sample.version > version],
                self._trained.window(now),
                self._sampled.window(now),
                self._total_trained,
                self._total_sampled,
            )

    def _touched_locked(self, run_id: str, at: float) -> _Run:
        run = self._runs.get(run_id)
        if run is None:
            run = self._runs[run_id] = _Run()
            if len(self._runs) > MOST_RUNS:
                self._runs.popitem(last=False)
        self._runs.move_to_end(run_id)
        self._version += 1
        run.version = self._version
        run.at = at
        return run


def _progress(run: _Run, version: int) -> RunProgress:
    curve = run.curve
    start = curve.start_after(version)
    # Slices of an `array` are copies, so the caller can read them without the lock.
    return RunProgress(
        run.steps,
        run.tokens,
        run.loss,
        run.at,
        curve.stride,
        start,
        curve.steps[start:],
        curve.losses[start:],
    )


def _kept(
    model: str, request: SampleRequest, sequence: SampledSequence, sequences: int
) -> KeptSample:
    # Engines accept text only, so every prompt converts to tokens.
    prompt, logprobs = request.prompt.to_numpy(), sequence.logprobs_np
    # Copies, since views would keep the arrays of the whole response in memory.  The caller sets
    # the first two fields under the lock, where versions are given out.
    return KeptSample(
        0,
        0.0,
        model,
        prompt[-_PROMPT_TOKENS:].copy(),
        sequence.tokens_np[:_SAMPLED_TOKENS].copy(),
        None if logprobs is None else logprobs[:_SAMPLED_TOKENS].copy(),
        len(prompt),
        sequence.length,
        sequences,
    )
