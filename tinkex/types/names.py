"""Names for plain strings, so that annotations written for the official SDK carry over."""

from __future__ import annotations

import enum
from typing import Literal

#: Id of a training run.
ModelID = str
#: Id of an accepted request.
RequestID = str
#: Name of a loss; a server may offer more losses than the documented ones.
LossFnType = str

CheckpointType = Literal["training", "sampler", "external"]
StopReason = Literal["length", "stop"]
TensorDtype = Literal["int64", "float32"]
SamplingClientKind = Literal["snapshot", "inflight"]
CustomLossInputRank = Literal[0, 1, 2]


class RequestErrorCategory(str, enum.Enum):
    """The cause of a failed request.  Equal to the string in ``RequestFailedError.category``."""

    Unknown = "unknown"
    Server = "server"
    User = "user"

    def __str__(self) -> str:
        return str(self.value)
