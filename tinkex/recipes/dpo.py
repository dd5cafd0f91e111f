"""Direct preference optimization (DPO, Rafailov et al. 2023): learn from pairs of replies.

The loss of a pair is ``-log sigmoid(margin)``, where ``margin = beta * (chosen - rejected)``, and
either reply counts with its log-probability less that under the reference.
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
    """Do the steps of *run* that are left, one for each of *batches*.  Blocks.  Needs torch.

    Metrics of a step are means over its pairs: ``loss``, ``accuracy`` (the margin is positive) and
    ``margin``; and ``heldout_loss`` and ``heldout_accuracy`` where they were measured.

    Args:
        batches: of pairs, such as `Batches`; the same each time.
        beta: how strongly the reference holds the model back.
        reference: path of the checkpoint whose model is the reference; by default what the run
            began with, its *start_from* or the base model.
        run, schedule, accumulation, heldout, eval_every, log: as for `train_supervised`.

    Returns:
        The held-out loss at the end; None without *heldout*.

    Raises:
        TinkexError: a request has failed, or the run could not be saved.
    """
    if not beta > 0:
        raise InvalidInputError(f"beta is {beta}; it must be positive")
    scorer = _Reference(run, reference or run.record.spec["start_from"])
    scored: List[Datum] = []  # of the held-out pairs

    def measure() -> Callable[[], Mapping[str, float]]:
        # Once: the reference stays the same while the model is trained.
        if not scored:
            scored.extend(scorer.score(heldout))
        data = [datum for pair in heldout for datum in pair]
        future = run.trainer.forward(data, "cross_entropy")
        return lambda: _heldout_metrics(beta, scored, future.result().loss_fn_outputs)

    evaluations = Evaluations(batches, measure if len(heldout) else None, eval_every)

    def source(first: int) -> Iterator[List[List[Datum]]]:
        for batch in evaluations.batches_from(first):
            # It blocks, but not the training: the pipeline takes a batch once the steps before are
            # queued.
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
    """Return the loss for `TrainingClient.forward_backward_custom`: the sum over pairs.

    Data alternate between chosen and rejected replies, with ``weights`` and ``reference_logprob``.
    """

    def loss(data: Sequence[Datum], logprobs: Sequence[torch.Tensor]) -> Any:
        import torch

        # One number a datum, shape (2 * pairs,): sums over the learnt tokens, less the reference's.
        ratios = torch.stack(
            [
                (row * datum.loss_fn_inputs["weights"].to_torch()).sum() - _reference_of(datum)
                for datum, row in zip(data, logprobs)
            ]
        )
        margins = beta * (ratios[::2] - ratios[1::2])
        # logsigmoid, because log(sigmoid(x)) is -inf for a margin below about -100 in float32.
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
        """Return the data of *pairs*, chosen and rejected alternating, with their references."""
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
        if self._client is None or self._session is not service:  # another one after a loss
            base_model = self._run.record.spec["base_model"]
            if self._path is None:  # a new adapter changes nothing until it is trained
                self._client = service.create_lora_training_client(base_model, rank=1, seed=0)
            else:
                self._client = service.create_training_client_from_state(self._path, base_model)
            self._session = service
        return self._client


def _logprob_of(datum: Datum, output: Mapping[str, Any]) -> float:
    """Return the log-probability of the learnt tokens of *datum*."""
    weights = datum.loss_fn_inputs["weights"].to_numpy()
    # In float64: a margin is a small difference of sums over hundreds of tokens.
    return float(np.dot(weights, output["logprobs"].to_numpy().astype(np.float64)))


def _reference_of(datum: Datum) -> float:
    """Return the log-probability under the reference, which `_Reference.score` has added."""
    return float(datum.loss_fn_inputs[_REFERENCE].to_numpy()[0])
