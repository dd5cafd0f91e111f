"""Held-out loss: measured once, or repeatedly during training."""

from __future__ import annotations

from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterator,
    Mapping,
    Optional,
    Sequence,
    TypeVar,
)

from tinkex._runtime.numeric import as_int
from tinkex.futures import APIFuture
from tinkex.types import Datum, ForwardBackwardOutput

if TYPE_CHECKING:
    from tinkex.clients.training import TrainingClient

B = TypeVar("B")

#: Submits the requests of a measurement, and returns a function that waits for its metrics.
Measure = Callable[[], Callable[[], Mapping[str, float]]]


def learnt_weight(data: Sequence[Datum]) -> float:
    """Return the sum of the weights of *data*, usually the number of tokens to learn.

    In a datum without weights, each target token has a weight of 1.
    """
    total = 0.0
    for datum in data:
        inputs = datum.loss_fn_inputs
        weights = inputs.get("weights")
        total += len(inputs["target_tokens"]) if weights is None else weights.to_numpy().sum()
    return float(total)


class Evaluation:
    """A measurement of the loss, with the weights after all requests that *trainer* has queued.

    Args:
        trainer: the training client to measure with.
        data: examples for cross-entropy; all are read here.
    """

    def __init__(self, trainer: TrainingClient, data: Sequence[Datum]) -> None:
        batch = list(data)
        self._weight = learnt_weight(batch)
        # Forward only, so that nothing is added to the run's gradient (docs/protocol.md, "Passes").
        self._future: APIFuture[ForwardBackwardOutput] = trainer.forward(batch, "cross_entropy")

    def result(self) -> float:
        """Return the mean loss per token to learn, in nats.  Blocks; raises TinkexError."""
        loss: float = self._future.result().metrics["loss:sum"]
        return loss / self._weight


def evaluate(trainer: TrainingClient, data: Sequence[Datum]) -> float:
    """Return the mean cross-entropy of *data*, in nats per token to learn.  Blocks.

    Raises:
        TinkexError: the pass failed.
    """
    return Evaluation(trainer, data).result()


class Evaluations:
    """Measures during training: before the first step, every *every* steps, and after the last.

    A measurement is submitted between two steps and read with the later one: so it is exact, and
    training does not wait for it.  For one thread.

    Args:
        batches: the batches of the run.
        measure: makes one measurement; None measures nothing.
        every: steps between two measurements; None measures only at the start and the end.
    """

    def __init__(
        self, batches: Sequence[Any], measure: Optional[Measure], every: Optional[int]
    ) -> None:
        self._batches = batches
        self._measure = measure
        self._every = None if every is None else as_int("eval_every", every, 1, text=False)
        self._submitted: Dict[int, Callable[[], Mapping[str, float]]] = {}

    def batches_from(self, first: int) -> Iterator[Any]:
        """Yield the batches from *first* on, for `Run.pipeline`; submit measurements when due."""
        # The pipeline takes a batch only after it has queued all earlier steps, and a run's
        # requests are executed in order: a measurement submitted here sees the weights after
        # exactly *index* steps.
        for index in range(first, len(self._batches) + 1):
            if self._is_due(index):
                assert self._measure is not None
                # After a lost session the loop may return to this index: the new measurement
                # replaces the one that was lost.
                self._submitted[index] = self._measure()
            if index < len(self._batches):
                yield self._batches[index]

    def result(self, index: int) -> Dict[str, float]:
        """Return the metrics measured before step *index*; an empty dict if none were.

        Blocks; raises TinkexError.
        """
        submitted = self._submitted.pop(index, None)
        return {} if submitted is None else dict(submitted())

    def _is_due(self, index: int) -> bool:
        if self._measure is None:
            return False
        last = index == len(self._batches)
        return last or index == 0 or (self._every is not None and index % self._every == 0)


def logged(metrics: Mapping[str, Any]) -> Dict[str, float]:
    """Return the *metrics* of a step in the journal that are meant for loggers, as floats.

    This leaves out sums over the batch, and the server's own count of steps.
    """
    return {n: float(value) for n, value in metrics.items() if ":" not in n and n != "step"}
