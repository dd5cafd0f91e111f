"""The ``tinker://`` paths of checkpoints (docs/protocol.md, "Paths"), and their console pages."""

from __future__ import annotations

import dataclasses
from urllib.parse import quote

from tinkex.errors import InvalidInputError

SCHEME = "tinker://"

#: The hosted service's web console.
CONSOLE = "https://tinker.thinkingmachines.ai"

#: Path segment -> checkpoint type.
KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}


def check_tinker_path(path: object) -> str:
    """Return a ``tinker://`` path, without whitespace around it; servers differ in what follows.

    A path that was read from a file or the environment often ends with a line break.

    Raises:
        InvalidInputError: *path* is none.
    """
    found = path.strip() if isinstance(path, str) else ""
    if not found.startswith(SCHEME) or len(found) == len(SCHEME) or not found.isprintable():
        raise InvalidInputError(
            f"{path!r} is not a checkpoint path",
            hint="It must start with tinker://, as in tinker://<run>/weights/<name>; "
            "save_state(...).result().path returns one.",
        )
    return found


def check_model_name(base_model: object) -> str:
    """Return the name of a base model, without whitespace around it.

    Raises:
        InvalidInputError: *base_model* is no name.
    """
    name = base_model.strip() if isinstance(base_model, str) else ""
    if not name:
        raise InvalidInputError(f"base_model is {base_model!r}; give the name of a model")
    return name


@dataclasses.dataclass(frozen=True)
class ParsedCheckpointTinkerPath:
    """A three-segment path, taken apart: ``tinker://<training_run_id>/<kind>/<name>``.

    ``checkpoint_type`` is training, sampler or external; ``checkpoint_id`` is ``<kind>/<name>``.
    """

    tinker_path: str
    training_run_id: str
    checkpoint_type: str
    checkpoint_id: str

    @classmethod
    def from_tinker_path(cls, tinker_path: str) -> ParsedCheckpointTinkerPath:
        """Take *tinker_path* apart; InvalidInputError if it has another form."""
        tinker_path = check_tinker_path(tinker_path)
        parts = tinker_path[len(SCHEME) :].split("/")
        if len(parts) != 3 or not all(parts) or parts[1] not in KINDS:
            raise InvalidInputError(
                f"{tinker_path!r} does not name a checkpoint of a training run",
                hint=f"Expected tinker://<run>/<kind>/<name> with kind one of {', '.join(KINDS)}.",
            )
        run, kind, name = parts
        return cls(tinker_path, run, KINDS[kind], f"{kind}/{name}")


def locate_checkpoint(tinker_path: str) -> ParsedCheckpointTinkerPath:
    """Take any path apart that names a run and something of it, as servers hand them out.

    Some make ``tinker://<run>/<name>``, or kinds of their own (docs/servers.md): the type is
    ``unknown`` then, and the id is all that follows the run.

    Raises:
        InvalidInputError: it names no more than a run, or not even that.
    """
    tinker_path = check_tinker_path(tinker_path)
    run, _, rest = tinker_path[len(SCHEME) :].partition("/")
    parts = rest.split("/")
    if not run or not all(parts) or (parts[0] in KINDS and len(parts) != 2):
        raise InvalidInputError(
            f"{tinker_path!r} does not name a checkpoint of a training run",
            hint="A path looks like tinker://<run>/weights/<name>; save_state(...).result().path "
            "and the list of checkpoints hold such paths.",
        )
    kind = KINDS.get(parts[0], "unknown")
    return ParsedCheckpointTinkerPath(tinker_path, run, kind, rest)


def session_url(session_id: str) -> str:
    """The page of a session."""
    return f"{CONSOLE}/sessions/{quote(session_id, safe=':')}"


def training_run_url(model_id: str) -> str:
    """The page of a training run."""
    return f"{CONSOLE}/training_runs/{quote(model_id, safe=':')}"


def checkpoint_url(tinker_path: str) -> str:
    """The page of a checkpoint.  Other servers' paths, which may have any form, make one too."""
    run, _, checkpoint = check_tinker_path(tinker_path)[len(SCHEME) :].partition("/")
    return f"{CONSOLE}/checkpoints/{quote(run, safe='')}/{quote(checkpoint, safe='')}"


def playground_url(tinker_path: str) -> str:
    """The page that samples a checkpoint."""
    path = quote(check_tinker_path(tinker_path), safe="")
    return f"{CONSOLE}/playground?mode=checkpoint&checkpoint={path}"
