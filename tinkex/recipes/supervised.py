"""Supervised training: cross-entropy on examples, with a held-out loss.

The loop is short on purpose: copy it, and change what you need.
"""

from __future__ import annotations

from typing import Callable, Dict, Iterator, List, Mapping, Optional, Sequence

from tinkex.recipes.batches import split_batch
from tinkex.recipes.evaluation import Evaluation, Evaluations, learnt_weight, logged
from tinkex.recipes.schedules import Schedule
from tinkex.runs import Run, RunStep
from tinkex.types import Datum

#: Called with the index of a step and its metrics; `Logger.log` is one.
Log = Callable[[int, Mapping[str, float]], None]


def train_supervised(
    run: Run,
    batches: Sequence[List[Datum]],
    schedule: Schedule,
    *,
    accumulation: int = 1,
    heldout: Sequence[Datum] = (),
    eval_every: Optional[int] = None,
    log: Optional[Log] = None,
) -> Optional[float]:
    """Do the remaining steps of *run*, one for each of *batches*.  Blocks.

    Metrics of a step, written to the run's journal and passed to *log*: ``loss`` before the step,
    in nats per token to learn; ``tokens``, the number of tokens to learn; ``learning_rate``;
    ``grad_norm`` if the server reports it; and ``heldout_loss``, also before the step, if it was
    measured.  The final held-out loss is passed only to *log*, as a metric of step
    ``len(batches)``.

    Args:
        run: from `ServiceClient.open_run`.
        batches: batches of data for cross-entropy, such as `Batches`; the same each time the
            program runs.
        schedule: from `constant`, `linear` or `cosine`, or a function of your own.
        accumulation: passes per step, into which each batch is split; their gradients add up.
        heldout: data to measure the held-out loss on; if empty, it is not measured.
        eval_every: steps between two measurements; None measures only at the start and the end.
        log: called after each step.

    Returns:
        The held-out loss at the end; None without *heldout*.

    Raises:
        TinkexError: a request failed, or the run could not be saved.
    """

    def measure() -> Callable[[], Mapping[str, float]]:
        # Read run.trainer each time, because the run replaces it after a lost session.
        evaluation = Evaluation(run.trainer, heldout)
        return lambda: {"heldout_loss": evaluation.result()}

    evaluations = Evaluations(batches, measure if len(heldout) else None, eval_every)

    def source(first: int) -> Iterator[List[List[Datum]]]:
        for batch in evaluations.batches_from(first):
            yield split_batch(batch, accumulation)

    def metrics(step: RunStep[List[List[Datum]]]) -> Dict[str, float]:
        assert step.result is not None
        # The server returns sums over tokens (docs/protocol.md, "Passes"); compute the mean.
        tokens = sum(learnt_weight(part) for part in step.batch)
        return {
            "loss": step.result.metrics["loss:sum"] / tokens,
            "tokens": tokens,
            "learning_rate": schedule(step.index).learning_rate,
            **evaluations.result(step.index),
        }

    for step in run.pipeline(source, "cross_entropy", schedule, metrics=metrics):
        with step:  # so that open_run(on_session_loss="resume") works
            if log is not None:
                log(step.index, logged(step.metrics))
    final = evaluations.result(len(batches))
    if final and log is not None:
        log(len(batches), final)
    return final.get("heldout_loss")
