"""Catalog: finds the base model, run, checkpoint or sampler that a request names."""

from __future__ import annotations

from typing import List, Optional

from tinkex.local.engines.engine import EngineInfo
from tinkex.local.errors import HTTPError, invalid_input_rejected
from tinkex.local.state.checkpoints import KIND_OF
from tinkex.local.state.encryption import is_encrypted
from tinkex.local.state.rows import CheckpointRow, RunRow, SamplerRow
from tinkex.local.state.store import Store
from tinkex.types import ParsedCheckpointTinkerPath


class Catalog:
    """Looks names up in the store; an HTTPError says what is missing.  Thread-safe."""

    def __init__(self, store: Store, info: EngineInfo) -> None:
        self._store = store
        self._info = info

    def check_base_model(self, name: Optional[str]) -> None:
        """Raise HTTPError 400 if *name* is not the model of this server."""
        served = self._model_names()
        if name not in served:
            raise HTTPError(
                400, f"base model {name!r} is not served here; this server has {', '.join(served)}"
            )

    def _model_names(self) -> List[str]:
        return [self._info.model_name, *self._info.aliases]

    def checkpoint_at(self, path: str, *, kind: Optional[str] = None) -> CheckpointRow:
        """Return the checkpoint at a ``tinker://`` path.

        Raises:
            HTTPError: 400 if *path* is not such a path, or not of *kind*; 404 if there is no such
                checkpoint.
        """
        with invalid_input_rejected():
            parsed = ParsedCheckpointTinkerPath.from_tinker_path(path)
        found_kind = KIND_OF[parsed.checkpoint_type]
        if kind is not None and found_kind != kind:
            raise HTTPError(
                400, f"{path} is a {parsed.checkpoint_type} checkpoint; this needs .../{kind}/..."
            )
        # A checkpoint id is <kind>/<name> (docs/protocol.md, "Paths").
        name = parsed.checkpoint_id.partition("/")[2]
        return self.checkpoint(parsed.training_run_id, found_kind, name)

    def checkpoint(self, run_id: str, kind: str, name: str) -> CheckpointRow:
        """Return a checkpoint; HTTPError 404 names what is missing, the run or the checkpoint."""
        row = self._store.checkpoints.find(run_id, kind, name)
        if row is not None:
            return row
        self.get_run(run_id)
        names = [f"{c.kind}/{c.name}" for c in self._store.checkpoints.of_run(run_id)[:20]]
        raise HTTPError(
            404,
            f"training run {run_id} has no checkpoint {kind}/{name} in {self._store.data_dir}; "
            f"it has {', '.join(names) or 'none'}",
        )

    def loadable_at(self, path: str, *, kind: Optional[str] = None) -> CheckpointRow:
        """Return the checkpoint at a ``tinker://`` path if the engine can load it.

        Raises:
            HTTPError: as for `checkpoint_at`, and 400 if the checkpoint was trained from another
                base model, or is encrypted.
        """
        checkpoint = self.checkpoint_at(path, kind=kind)
        run = self._store.run(checkpoint.run_id)
        if run is not None and run.base_model not in self._model_names():
            raise HTTPError(
                400,
                f"{checkpoint.tinker_path} was trained from {run.base_model}; this server has "
                f"{self._info.model_name}",
            )
        if is_encrypted(self._store.checkpoints.folder_of(checkpoint)):
            raise HTTPError(
                400,
                f"{checkpoint.tinker_path} is encrypted, and this server has no key to read it; "
                "load a checkpoint that save_state or save_weights_for_sampler saved",
            )
        return checkpoint

    def get_run(self, run_id: str) -> RunRow:
        """Return a training run, loaded or not; HTTPError 404 if it is unknown."""
        row = self._store.run(run_id)
        if row is None:
            raise HTTPError(
                404,
                f"training run {run_id} is unknown; this server keeps its runs in "
                f"{self._store.data_dir}",
            )
        return row

    def get_model(self, model_id: str) -> RunRow:
        """Return the run of a model; HTTPError 404 if it is unknown."""
        run = self._store.run(model_id)
        if run is None:
            raise HTTPError(404, f"model {model_id} is unknown; create_model returns the id")
        return run

    def get_sampler(self, sampler_id: str) -> SamplerRow:
        """Return a sampling session; HTTPError 404 if it is unknown."""
        row = self._store.sampler(sampler_id)
        if row is None:
            raise HTTPError(
                404,
                f"sampling session {sampler_id} is unknown; create_sampling_session returns the id",
            )
        return row
