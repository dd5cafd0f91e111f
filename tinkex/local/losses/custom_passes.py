"""Passes with a custom loss: logprobs from the engine, the loss and its gradient from the graph.

Any function of the logprobs has the same gradient as ``sum(-w * logprobs)`` with
``w = -d loss / d logprobs``, which is the engine's cross_entropy with these weights: so any engine
can be used, and the result is exact.  Runs on the engine thread, as one request.
"""

from __future__ import annotations

import threading
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np

from tinkex.local.engines.engine import Engine, EngineError
from tinkex.local.errors import HTTPError
from tinkex.local.losses.evaluation import loss_of_datum
from tinkex.local.losses.program import LossProgram
from tinkex.types import Datum, ForwardBackwardOutput, TensorData


class CustomLosses:
    """The losses that clients created, by id, for the life of their sessions.  Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _made
        self._made: Dict[str, Tuple[bytes, LossProgram]] = {}

    def add(self, loss_id: str, digest: bytes, program: LossProgram) -> bool:
        """Keep a loss; return False if it was created before, from a body of the same *digest*.

        Raises:
            HTTPError: 409 if it was created from another body.
        """
        with self._lock:
            known = self._made.get(loss_id)
            if known is None:
                self._made[loss_id] = (digest, program)
                return True
        # Outside the lock, since an entry never changes.  A resent request gets its first response;
        # the same seq_id with another body is a conflict, as everywhere in the protocol.
        if known[0] != digest:
            raise HTTPError(409, f"{loss_id} was created with another body; use the next seq_id")
        return False

    def find(self, loss_id: object) -> Optional[LossProgram]:
        """Return a loss, or None."""
        with self._lock:
            known = self._made.get(loss_id) if isinstance(loss_id, str) else None
        return None if known is None else known[1]

    def drop_session(self, session_id: str) -> None:
        """Forget the losses of a session."""
        with self._lock:
            # Ids are "<session>:loss:<seq_id>".
            for loss_id in [one for one in self._made if one.startswith(f"{session_id}:")]:
                del self._made[loss_id]


def run_custom_pass(
    engine: Engine,
    model_id: str,
    data: Sequence[Datum],
    program: LossProgram,
    *,
    forward_only: bool,
) -> ForwardBackwardOutput:
    """Compute the loss of every datum; unless *forward_only*, add its gradient to the run's."""
    # This pass is for the log-probabilities: its weights are 0, and its loss is not used.
    plain = [_weighted(datum, None) for datum in data]
    output = engine.forward_backward(model_id, plain, "cross_entropy", {}, forward_only=True)
    total = 0.0
    sums: Dict[str, float] = {}
    weighted: List[Datum] = []
    for index, (datum, fields) in enumerate(zip(data, output.loss_fn_outputs)):
        try:
            loss, gradient, metrics = loss_of_datum(
                program,
                fields["logprobs"].to_numpy(),
                datum.loss_fn_inputs,
                backward=not forward_only,
            )
        except EngineError as error:
            raise EngineError(f"datum {index}: {error}", error.category) from error
        total += loss
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value
        # The derivative of -w * lp by lp is -w.
        weighted.append(_weighted(datum, TensorData.from_numpy(-gradient)))
    # Only now, when no datum can fail any more: a failed pass must add no gradient.
    if not forward_only:
        output = engine.forward_backward(model_id, weighted, "cross_entropy", {})
    means = {name: v / len(data) if name.endswith(":mean") else v for name, v in sums.items()}
    own = {
        name: value
        for name, value in output.metrics.items()
        if name not in ("loss:sum", "weights:sum")  # of cross_entropy
    }
    return ForwardBackwardOutput(
        output.loss_fn_outputs, {**own, **means, "loss:sum": total}, output.loss_fn_output_type
    )


def _weighted(datum: Datum, weights: Optional[TensorData]) -> Datum:
    targets = datum.loss_fn_inputs["target_tokens"]
    if weights is None:
        weights = TensorData.from_numpy(np.zeros(tuple(targets.shape), np.float32))
    return Datum(datum.model_input, {"target_tokens": targets, "weights": weights})
