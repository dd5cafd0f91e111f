"""Direct preference optimization (DPO, Rafailov et al. 2023): learn from pairs of replies.

The loss of a pair is ``-log sigmoid(margin)`` with ``margin = beta * (chosen - rejected)``, where
*chosen* and *rejected* are the log-probabilities of the two replies under the model, minus those
under the reference.
"""

from __future__ import annotations

import dataclasses
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
)

from tinkex._runtime.late_import import np
from tinkex.errors import InvalidInputError
from tinkex.recipes.batches import split_batch
from tinkex.recipes.evaluation import Evaluations, logged
from tinkex.recipes.schedules import Schedule
from tinkex.recipes.supervised import Log
from tinkex.runs import Run, RunStep
from tinkex.types import Datum, TensorData

if TYPE_CHECKING:
    import torch

    from tinkex.clients.training import TrainingClient

#: The chosen and the rejected reply to one prompt, as from `tinkex.data.preference_data`.
Pair = Tuple[Datum, Datum]

#: The loss input that holds the log-probability under the reference.
_REFERENCE = "reference_logprob"


def train_dpo(
    run: Run,
    batches: Sequence[List[Pair]],
    schedule: Schedule,
    *,
    beta: float = 0.1,
    reference: Optional[str] = None,
    accumulation: int = 1,
    heldout: Sequence[Pair] = (),
    eval_every: Optional[int] = None,
    log: Optional[Log] = None,
) -> Optional[float]:
    """Do the remaining steps of *run*, one for each of *batches*.  Blocks.  Needs torch.

    The metrics of a step are means over its pairs: ``loss``, ``accuracy`` (the share of positive
    margins) and ``margin``; also ``heldout_loss`` and ``heldout_accuracy``, if they were measured.

    Args:
        batches: batches of pairs, such as `Batches`; the same each time the program runs.
        beta: how strongly the model is kept close to the reference.
        reference: path of the checkpoint to use as the reference; by default what the run began
            with: its *start_from*, or the base model.
        run, schedule, accumulation, heldout, eval_every, log: as for `train_supervised`.

    Returns:
        The held-out loss at the end; None without *heldout*.

    Raises:
        TinkexError: a request failed, or the run could not be saved.
    """
    if not beta > 0:
        raise InvalidInputError(f"beta is {beta}; it must be positive")
    scorer = _Reference(run, reference or run.record.spec["start_from"])
    scored: List[Datum] = []  # the held-out pairs with their reference log-probabilities

    def measure() -> Callable[[], Mapping[str, float]]:
        # Score them once: the reference does not change during training.
        if not scored:
            scored.extend(scorer.score(heldout))
        data = [datum for pair in heldout for datum in pair]
        future = run.trainer.forward(data, "cross_entropy")
        return lambda: _heldout_metrics(beta, scored, future.result().loss_fn_outputs)

    evaluations = Evaluations(batches, measure if len(heldout) else None, eval_every)

    def source(first: int) -> Iterator[List[List[Datum]]]:
        for batch in evaluations.batches_from(first):
            # Scoring blocks, but does not hold up training: the pipeline takes a batch once all
            # earlier steps are queued.
            yield [scorer.score(pairs) for pairs in split_batch(batch, accumulation)]

    def metrics(step: RunStep[List[List[Datum]]]) -> Dict[str, float]:
        assert step.result is not None
        found = step.result.metrics
        pairs = sum(map(len, step.batch)) / 2
        return {
            **{name: found[f"{name}:sum"] / pairs for name in ("loss", "accuracy", "margin")},
            "learning_rate": schedule(step.index).learning_rate,
            **evaluations.result(step.index),
        }

    for step in run.pipeline(source, dpo_loss(beta), schedule, metrics=metrics):
        with step:
            if log is not None:
                log(step.index, logged(step.metrics))
    final = evaluations.result(len(batches))
    if final and log is not None:
        log(len(batches), final)
    return final.get("heldout_loss")


def dpo_loss(beta: float) -> Callable[[Sequence[Datum], Sequence[torch.Tensor]], Any]:
    """Return the loss function for `TrainingClient.forward_backward_custom`: a sum over pairs.

    The data alternate between chosen and rejected replies; each datum has the loss inputs
    ``weights`` and ``reference_logprob``.
    """

    def loss(data: Sequence[Datum], logprobs: Sequence[torch.Tensor]) -> Any:
        import torch

        # One number per datum, shape (2 * pairs,): the log-probability of the learnt tokens, minus
        # that under the reference.
        ratios = torch.stack(
            [
                (row * datum.loss_fn_inputs["weights"].to_torch()).sum() - _reference_of(datum)
                for datum, row in zip(data, logprobs)
            ]
        )
        margins = beta * (ratios[::2] - ratios[1::2])
        # logsigmoid, because log(sigmoid(x)) in float32 is -inf for margins below about -100.
        return -torch.nn.functional.logsigmoid(margins).sum(), {
            "accuracy:sum": (margins > 0).sum(),
            "margin:sum": margins.sum(),
        }

    return loss


def _heldout_metrics(
    beta: float, data: Sequence[Datum], outputs: Sequence[Mapping[str, Any]]
) -> Dict[str, float]:
    ratios = np.array(
        [_logprob_of(d, output) - _reference_of(d) for d, output in zip(data, outputs)]
    )
    margins = beta * (ratios[::2] - ratios[1::2])
    loss = np.logaddexp(0.0, -margins).mean()  # -log sigmoid(margin), without overflow
    return {"heldout_loss": float(loss), "heldout_accuracy": float((margins > 0).mean())}


class _Reference:
    """Computes log-probabilities under the model at *path*, or the base model of *run*."""

    def __init__(self, run: Run, path: Optional[str]) -> None:
        self._run = run
        self._path = path
        self._session: Any = None
        self._client: Optional[TrainingClient] = None

    def score(self, pairs: Sequence[Pair]) -> List[Datum]:
        """Return the data of *pairs*, alternating, with their reference log-probabilities."""
        data = [datum for pair in pairs for datum in pair]
        outputs = self._trainer().forward(data, "cross_entropy").result().loss_fn_outputs
        scored = []
        for datum, output in zip(data, outputs):
            reference = TensorData.from_numpy(np.array([_logprob_of(datum, output)], np.float32))
            inputs = {**datum.loss_fn_inputs, _REFERENCE: reference}
            scored.append(dataclasses.replace(datum, loss_fn_inputs=inputs))
        return scored

    def _trainer(self) -> TrainingClient:
        service = self._run.service
        if self._client is None or self._session is not service:  # replaced after a lost session
            base_model = self._run.record.spec["base_model"]
            if self._path is None:  # an untrained adapter leaves the base model unchanged
                self._client = service.create_lora_training_client(base_model, rank=1, seed=0)
            else:
                self._client = service.create_training_client_from_state(self._path, base_model)
            self._session = service
        return self._client


def _logprob_of(datum: Datum, output: Mapping[str, Any]) -> float:
    """Return the log-probability of the learnt tokens of *datum*."""
    weights = datum.loss_fn_inputs["weights"].to_numpy()
    # In float64, because a margin is a small difference of sums over hundreds of tokens.
    return float(np.dot(weights, output["logprobs"].to_numpy().astype(np.float64)))


def _reference_of(datum: Datum) -> float:
    """Return the reference log-probability, which `_Reference.score` added."""
    return float(datum.loss_fn_inputs[_REFERENCE].to_numpy()[0])
