"""RunSource: what a run is made from, the first time and from its checkpoints."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import TYPE_CHECKING, Any, Dict, Mapping, Optional

from tinkex.errors import InvalidInputError
from tinkex.types.optimizer import optimizer_config_to_wire

if TYPE_CHECKING:
    from tinkex.clients.service import ServiceClient
    from tinkex.clients.training import TrainingClient
    from tinkex.types import OptimizerConfig

#: Seeds are drawn below this: all servers take them.
SEEDS = 2**31


@dataclasses.dataclass
class RunSource:
    """Makes the training runs of a run folder; fields as for `ServiceClient.open_run`.

    ``layers`` are the arguments *train_mlp*, *train_attn* and *train_unembed*.
    """

    base_model: str
    start_from: Optional[str]
    rank: int
    seed: Optional[int]
    layers: Dict[str, bool]
    user_metadata: Optional[Mapping[str, str]]
    optimizer: Optional[OptimizerConfig]

    def spec(self, earlier: Mapping[str, Any]) -> Dict[str, Any]:
        """Return all of it as JSON; what is not given is as in *earlier*, from the journal.

        A seed is chosen if there is none, so that a run that is killed before its first checkpoint
        starts again with the same weights.
        """
        if self.start_from is not None:
            # The checkpoint decides on rank, seed and layers.
            own: Dict[str, Any] = {}
        else:
            if self.seed is None:
                # SystemRandom does not depend on a seed that the program has set, and does not
                # advance the generator that it uses.
                self.seed = earlier.get("seed", random.SystemRandom().randrange(SEEDS))
            own = {"rank": self.rank, "seed": self.seed, **self.layers}
        return {
            "base_model": self.base_model,
            "start_from": self.start_from,
            **own,
            "optimizer": as_json("optimizer", optimizer_config_to_wire(self.optimizer)),
        }

    def create(self, service: ServiceClient) -> TrainingClient:
        """Make the run for the first time.  Blocks."""
        if self.start_from is not None:
            return service.create_training_client_from_state(
                self.start_from, self.base_model, self.user_metadata, optimizer=self.optimizer
            )
        return service.create_lora_training_client(
            self.base_model,
            self.rank,
            self.seed,
            user_metadata=self.user_metadata,
            optimizer=self.optimizer,
            **self.layers,
        )

    def restore(self, service: ServiceClient, path: str) -> TrainingClient:
        """Make a run that continues from the checkpoint at *path*.  Blocks."""
        # With the optimizer's moments: without them the next steps would differ from those of a run
        # that was not interrupted.
        return service.create_training_client_from_state_with_optimizer(
            path, self.base_model, self.user_metadata
        )


def as_json(what: str, value: Any) -> Any:
    """Return *value* as it comes back from JSON; InvalidInputError if it cannot be written."""
    try:
        # There and back: tuples become lists, as in the journal, which it is compared with; and the
        # copy does not change with the caller's value.
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{what} cannot be written as JSON: {error}") from error
