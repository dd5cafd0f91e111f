"""Log-probabilities of replies under the model that DPO starts from."""

from __future__ import annotations

import dataclasses
from typing import Any, List, Mapping, Optional, Sequence, Tuple

from tinkex._runtime.late_import import np
from tinkex.clients.training import TrainingClient
from tinkex.runs import Run
from tinkex.types import Datum, TensorData

#: The chosen and the rejected reply to one prompt, as from `tinkex.data.preference_data`.
Pair = Tuple[Datum, Datum]

#: The loss input that holds the log-probability under the reference.
_NAME = "reference_logprob"


class Reference:
    """Computes log-probabilities under the model at *path*, or the base model of *run*."""

    def __init__(self, run: Run, path: Optional[str]) -> None:
        self._run = run
        self._path = path
        self._session: Any = None
        self._client: Optional[TrainingClient] = None

    def score(self, pairs: Sequence[Pair]) -> List[Datum]:
        """Return the data of *pairs*, chosen and rejected by turns, with their references."""
        data = [datum for pair in pairs for datum in pair]
        outputs = self._trainer().forward(data, "cross_entropy").result().loss_fn_outputs
        return [
            dataclasses.replace(
                datum,
                loss_fn_inputs={
                    **datum.loss_fn_inputs,
                    _NAME: TensorData.from_numpy(np.array([logprob_of(datum, output)], np.float32)),
                },
            )
            for datum, output in zip(data, outputs)
        ]

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


def logprob_of(datum: Datum, output: Mapping[str, Any]) -> float:
    """Return the log-probability of what is to be learnt of *datum*."""
    weights = datum.loss_fn_inputs["weights"].to_numpy()
    return float(np.dot(weights, output["logprobs"].to_numpy().astype(np.float64)))


def reference_of(datum: Datum) -> float:
    """Return the log-probability under the reference, as `Reference.score` has noted it."""
    return float(datum.loss_fn_inputs[_NAME].to_numpy()[0])
