"""Held-out loss: measured once, or again and again while a run is trained."""

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

#: What measures: it submits the requests, and returns a function that waits for the metrics.
Measure = Callable[[], Callable[[], Mapping[str, float]]]


def learnt_weight(data: Sequence[Datum]) -> float:
    """Return the sum of the weights of *data*, which is the number of tokens to learn.

    A datum without weights has a weight of 1 for each target token.
    """
    total = 0.0
    for datum in data:
        inputs = datum.loss_fn_inputs
        weights = inputs.get("weights")
        total += len(inputs["target_tokens"]) if weights is None else weights.to_numpy().sum()
    return float(total)


class Evaluation:
    """A loss that is being measured, with the weights that *trainer* has after what was submitted.

    Args:
        trainer: of the run.
        data: examples for cross-entropy; read here.
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
        TinkexError: the pass has failed.
    """
    return Evaluation(trainer, data).result()


class Evaluations:
    """Measures while a run is trained: before the first step, every so often, and after the last.

    A measurement is submitted between two steps and read with the later one, so that it is exact
    and training does not wait for it.  For one thread.

    Args:
        batches: of the run's steps.
        measure: None measures nothing.
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
        """Yield the batches from *first* on, for `Run.pipeline`; submit what is due before each."""
        # The pipeline takes a batch after it has queued all steps before, and a run's requests are
        # done in order: what is submitted here sees the weights of exactly *index* steps.
        for index in range(first, len(self._batches) + 1):
            if self._is_due(index):
                assert self._measure is not None
                # If the loop went back here after a lost session, it replaces the measurement of
                # that session.
                self._submitted[index] = self._measure()
            if index < len(self._batches):
                yield self._batches[index]

    def result(self, index: int) -> Dict[str, float]:
        """Return the metrics of the weights before step *index*; empty if none were measured.

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
    """Return those of a step's *metrics* in the journal that are for loggers, as numbers.

    The others are sums over the batch, and the server's own count of steps.
    """
    return {n: float(value) for n, value in metrics.items() if ":" not in n and n != "step"}
