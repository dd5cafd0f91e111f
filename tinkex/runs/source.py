"""RunSource: creates a run's training client, at first and from its checkpoints."""

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

#: Seeds are drawn below this limit, because every server accepts those.
SEEDS = 2**31


@dataclasses.dataclass
class RunSource:
    """Creates the training clients of a run folder; fields as for `ServiceClient.open_run`.

    ``layers`` holds the arguments *train_mlp*, *train_attn* and *train_unembed*.
    """

    base_model: str
    start_from: Optional[str]
    rank: int
    seed: Optional[int]
    layers: Dict[str, bool]
    user_metadata: Optional[Mapping[str, str]]
    optimizer: Optional[OptimizerConfig]

    def spec(self, earlier: Mapping[str, Any]) -> Dict[str, Any]:
        """Return the fields as JSON values; *earlier* is the spec in the journal.

        If no seed was given, the one in *earlier* is used, or else one is drawn, so that a run that
        is killed before its first checkpoint starts again with the same weights.
        """
        if self.start_from is not None:
            # The checkpoint determines the rank, the seed and the layers.
            own: Dict[str, Any] = {}
        else:
            if self.seed is None:
                # SystemRandom is independent of the program's seed, and does not advance its
                # generator.
                self.seed = earlier.get("seed", random.SystemRandom().randrange(SEEDS))
            own = {"rank": self.rank, "seed": self.seed, **self.layers}
        return {
            "base_model": self.base_model,
            "start_from": self.start_from,
            **own,
            "optimizer": as_json("optimizer", optimizer_config_to_wire(self.optimizer)),
        }

    def create(self, service: ServiceClient) -> TrainingClient:
        """Create the run for the first time.  Blocks."""
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
        """Create a run that continues from the checkpoint at *path*.  Blocks."""
        # With the optimizer's state: without it, the next steps would differ from those of an
        # uninterrupted run.
        return service.create_training_client_from_state_with_optimizer(
            path, self.base_model, self.user_metadata
        )


def as_json(what: str, value: Any) -> Any:
    """Return *value* after a round trip through JSON; InvalidInputError if JSON cannot hold it."""
    try:
        # The round trip turns tuples into lists, as in the journal that the value is compared with,
        # and makes a copy that does not change with the caller's value.
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{what} cannot be written as JSON: {error}") from error
