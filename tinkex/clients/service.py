"""ServiceClient: one session on the server, and the starting point of every program."""

from __future__ import annotations

import os
import sys
import weakref
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, Callable, List, Mapping, Optional, Type, Union

from tinkex import types
from tinkex._api.encoding_choice import server_dialect
from tinkex._runtime.awaiting import in_thread, result_of
from tinkex._runtime.numeric import as_seconds
from tinkex._sessions.manager import SessionManager, default_manager
from tinkex._sessions.runtime import Runtime, outcome_of
from tinkex._sessions.session import STATUSES
from tinkex._transport.server_state import ServerDialect
from tinkex.clients.sampling import SamplingClient
from tinkex.config import Config, check_config
from tinkex.errors import InvalidInputError
from tinkex.futures import APIFuture
from tinkex.metrics import Metrics
from tinkex.retry import RetryConfig
from tinkex.types.checkpoint_path import session_url
from tinkex.usage import Usage

# Modules that many programs never need are imported where they are used.
if TYPE_CHECKING:
    from tinkex._sessions.telemetry import Reporter
    from tinkex._training.create_run import FromCheckpoint, NewAdapter
    from tinkex._training.custom_loss import LossHandle, PerDatumLossFn
    from tinkex.clients.rest import RestClient
    from tinkex.clients.training import TrainingClient
    from tinkex.runs.run import Run
    from tinkex.types import GetServerCapabilitiesResponse, OptimizerConfig

UserMetadata = Optional[Mapping[str, str]]


class ServiceClient:
    """A session on a Tinker server; creates the other clients.  Thread-safe.

    The constructor blocks until the server has created the session; a heartbeat thread then keeps
    the session alive.  Use the client as a context manager, or close it::

        with ServiceClient(base_url="http://localhost:8080") as service:
            trainer = service.create_lora_training_client("smollm2-135m", rank=8)

    Args:
        user_metadata: strings to keep with the session, by name.
        project_id: the project that the session belongs to.
        display_name: a name for the session, shown to users.
        base_url, api_key: the server's address and your key; by default ``TINKER_BASE_URL`` and
            ``TINKER_API_KEY``.
        default_headers_overrides: headers to send with every request.
        config: all settings at once, instead of the keywords.
        manager: keeps the session alive; by default one manager for all clients of the process.
        settings: any other setting of `Config`.

    Raises:
        ConfigError: a setting is invalid.
        APIError: the server cannot be reached (reported within 20 s), or refuses the session; no
            threads or connections are left behind.
    """

    def __init__(
        self,
        user_metadata: UserMetadata = None,
        project_id: Optional[str] = None,
        *,
        config: Optional[Config] = None,
        manager: Optional[SessionManager] = None,
        default_headers_overrides: Optional[Mapping[str, str]] = None,
        **settings: Any,
    ) -> None:
        settings.update(
            user_metadata=user_metadata,
            project_id=project_id,
            extra_headers=default_headers_overrides or settings.get("extra_headers"),
        )
        if config is None:
            config = Config.resolve(**settings)
        elif any(value is not None for value in settings.values()):
            raise InvalidInputError("give either config or single settings, not both")
        settings.clear()  # the key: some tools show the locals of a traceback
        self._runtime = Runtime(check_config(config), manager or default_manager())
        self._server: Any = None
        self._local: Optional[Mapping[str, Optional[str]]] = None
        self._server_dropper: Any = None

    @classmethod
    def local(
        cls,
        model: str = "smollm2-135m",
        *,
        data_dir: Optional[str] = None,
        device: str = "auto",
        progress: Optional[Callable[[str], None]] = None,
        **settings: Any,
    ) -> ServiceClient:
        """Start the embedded server in this process and return a client of it.

        The server speaks real HTTP on an ephemeral port.  It stops, and frees the model and
        *data_dir*, when the client is closed, or when the client and all clients created from it
        have been garbage-collected, e.g. after a notebook cell was run again.  Blocks until the
        model is loaded, which may download it first.  Needs ``pip install "tinkex[local]"``.

        Args:
            model: ``"smollm2-135m"``, ``"tiny-random"``, ``"deterministic"`` (no ML library
                needed), a Hugging Face name, or a folder.
            data_dir: the folder for runs and checkpoints; None is a temporary folder that is
                removed when the server stops.
            device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
            progress: called with one line of text before each slow step, such as a download; by
                default the lines are written to stderr.
            settings: settings of the client, as for the constructor.

        Raises:
            LocalServerError: the model cannot be loaded, a package is not installed, or *data_dir*
                is in use, by this process or another.
        """
        # An upward import, as in open_run: this method is a convenience.
        from tinkex.local import LocalServer, load_engine
        from tinkex.local.server import check_folder

        check_folder(data_dir)  # first, because loading the model takes long
        engine = load_engine(model, device, progress=progress or _write_to_stderr)
        server = LocalServer(engine, data_dir=data_dir)
        try:
            server.start()
            settings = {"base_url": server.url, **settings}
            client = cls(**settings)
        except BaseException:
            server.close()
            raise
        client._server = server
        # Run journals record these arguments, to start the same server again.
        client._local = {
            "model": os.path.abspath(model) if os.path.isdir(model) else model,
            "data_dir": None if data_dir is None else str(server.data_dir.absolute()),
        }
        # Tied to the runtime rather than to this client: clients created from it refer to the
        # runtime and may still use the server.  Not run at exit, where lifecycle.py closes client
        # and server.
        client._server_dropper = weakref.finalize(client._runtime, server.drop)
        client._server_dropper.atexit = False
        return client

    @property
    def session_id(self) -> str:
        """The server's id of this session."""
        return self._runtime.session.session_id

    def get_session_id(self) -> str:
        """The same as `session_id`."""
        return self.session_id

    @property
    def holder(self) -> ServiceClient:
        """This client itself; in the official SDK a separate object holds the session."""
        return self

    @property
    def config(self) -> Config:
        """The settings in force."""
        return self._runtime.config

    @property
    def server_dialect(self) -> ServerDialect:
        """A printable snapshot of what is known about the server's protocol variant."""
        return server_dialect(self._runtime.transport)

    def inflight(self) -> List[APIFuture[Any]]:
        """Return this client's unsettled futures; each describes its state with ``status()``."""
        self._runtime.ensure_not_forked("inflight")
        return self._runtime.poller.inflight()

    def metrics(self) -> Metrics:
        """Return counters and latencies of this client's work so far.  Does not block."""
        self._runtime.ensure_not_forked("metrics")
        counts, latencies = self._runtime.recorder.snapshot()
        # A future in parts stands for other futures, which are counted themselves.
        futures = [f for f in self._runtime.poller.inflight() if not f.in_parts]
        sent = sum(future.was_sent for future in futures)
        tokens = self._runtime.ledger.snapshot().tokens
        return Metrics(
            in_flight=sent,
            queued=len(futures) - sent,
            **counts,
            tokens_trained=tokens.trained,
            tokens_prefilled=tokens.prefilled,
            tokens_sampled=tokens.sampled,
            latencies=latencies,
        )

    def usage(self) -> Usage:
        """Return the tokens used so far, by client, tag and model.  Does not block.

        The tag is the ``usage_tag`` of the client that used the tokens.  A forward pass counts as
        prefill; a custom loss computed here counts as prefill and training.  Work cancelled after
        its submission began counts in full, and so does lost work, because the server may have
        done it.
        """
        self._runtime.ensure_not_forked("usage")
        return self._runtime.ledger.snapshot()

    def get_telemetry(self) -> Optional[Reporter]:
        """Return the reporter of this session, or None if telemetry is off (the default)."""
        return self._runtime.telemetry

    def get_server_capabilities(self) -> GetServerCapabilitiesResponse:
        """Return the base models that the server offers.  Blocks."""
        return self.create_rest_client().get_server_capabilities().result()

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: Optional[int] = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: UserMetadata = None,
        optimizer: Optional[OptimizerConfig] = None,
    ) -> TrainingClient:
        """Create a fresh LoRA adapter over *base_model* and return its client.  Blocks.

        Args:
            base_model: a name that the server offers; see `get_server_capabilities`.
            rank: the adapter's rank, at least 1.
            seed: the seed of the adapter's initial values.
            train_mlp, train_attn, train_unembed: which layers to train; at least one.  To merge an
                adapter with ``train_unembed`` into a model whose output layer is tied to its
                embedding (``tie_word_embeddings``: SmolLM2, small Qwen3 and Llama 3.2, Gemma), use
                `tinkex.local.merge_adapter`; PEFT alone would change the embedding, too.
            user_metadata: strings to keep with the run, by name.
            optimizer: `AdamOptimizerConfig` (the default), `DimuonOptimizerConfig`, or, for an
                optimizer that only the server knows, a mapping or object with a ``type``.
        """
        return self.create_lora_training_client_future(
            base_model, rank, seed, train_mlp, train_attn, train_unembed, user_metadata, optimizer
        ).result()

    def create_lora_training_client_future(
        self,
        base_model: str,
        rank: int = 32,
        seed: Optional[int] = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: UserMetadata = None,
        optimizer: Optional[OptimizerConfig] = None,
    ) -> APIFuture[TrainingClient]:
        """Like `create_lora_training_client`, without blocking."""
        from tinkex._training.create_run import NewAdapter

        lora = types.LoraConfig(rank, seed, train_unembed, train_mlp, train_attn)
        return self._create_run(NewAdapter(base_model, lora, user_metadata, optimizer))

    def create_training_client_from_state(
        self,
        path: str,
        base_model: Optional[str] = None,
        user_metadata: UserMetadata = None,
        weights_access_token: Optional[str] = None,
        optimizer: Optional[OptimizerConfig] = None,
    ) -> TrainingClient:
        """Create a run from the weights at *path*, with a fresh optimizer.  Blocks.

        *optimizer* as for `create_lora_training_client`.
        """
        return self.create_training_client_from_state_future(
            path, base_model, user_metadata, weights_access_token, optimizer
        ).result()

    def create_training_client_from_state_future(
        self,
        path: str,
        base_model: Optional[str] = None,
        user_metadata: UserMetadata = None,
        weights_access_token: Optional[str] = None,
        optimizer: Optional[OptimizerConfig] = None,
    ) -> APIFuture[TrainingClient]:
        """Like `create_training_client_from_state`, without blocking."""
        from tinkex._training.create_run import FromCheckpoint

        return self._create_run(
            FromCheckpoint(path, False, base_model, user_metadata, weights_access_token, optimizer)
        )

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: Optional[str] = None,
        user_metadata: UserMetadata = None,
        weights_access_token: Optional[str] = None,
    ) -> TrainingClient:
        """Create a run from the weights and optimizer state at *path*.  Blocks."""
        return self.create_training_client_from_state_with_optimizer_future(
            path, base_model, user_metadata, weights_access_token
        ).result()

    def create_training_client_from_state_with_optimizer_future(
        self,
        path: str,
        base_model: Optional[str] = None,
        user_metadata: UserMetadata = None,
        weights_access_token: Optional[str] = None,
    ) -> APIFuture[TrainingClient]:
        """Like `create_training_client_from_state_with_optimizer`, without blocking."""
        from tinkex._training.create_run import FromCheckpoint

        return self._create_run(
            FromCheckpoint(path, True, base_model, user_metadata, weights_access_token)
        )

    def _create_run(self, source: Union[NewAdapter, FromCheckpoint]) -> APIFuture[TrainingClient]:
        from tinkex.clients.training import TrainingClient

        return TrainingClient.create_future(self._runtime, source)

    def open_run(
        self,
        folder: Union[str, os.PathLike[str]],
        base_model: str,
        *,
        rank: int = 32,
        seed: Optional[int] = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        start_from: Optional[str] = None,
        user_metadata: UserMetadata = None,
        optimizer: Optional[OptimizerConfig] = None,
        config: Optional[Mapping[str, Any]] = None,
        state: Optional[Mapping[str, Any]] = None,
        save_every: Optional[int] = 100,
        save_minutes: Optional[float] = None,
        ttl_seconds: Optional[int] = 30 * 86400,
        keep: Optional[int] = 2,
        on_session_loss: str = "raise",
        max_session_losses: int = 5,
        exit_on_sigterm: bool = False,
        accept_changes: bool = False,
    ) -> Run:
        """Begin a training run kept in *folder*, or continue the run already there.  Blocks.

        Run the same program again after any interruption: it restores weights and optimizer state
        from the last checkpoint, and continues with the batch after it::

            with service.open_run("runs/poems", "my-model", save_every=50) as run:
                for step in run.steps(batches):
                    done = run.trainer.train_step(step.batch, "cross_entropy", AdamParams())
                    step.log(done.forward_backward.metrics)

        The folder holds the journal, ``journal.jsonl``; checkpoints are on the server.

        Args:
            folder: created if it does not exist; used by one process at a time.
            base_model, rank, seed, train_mlp, train_attn, train_unembed, user_metadata, optimizer:
                as for `create_lora_training_client`.  Without a *seed*, one is chosen and recorded.
            start_from: begin with the weights of this checkpoint and a fresh optimizer; the
                checkpoint determines rank and layers.
            config: your own settings, such as the learning rate, as JSON values.
            state: the initial contents of `Run.state`.
            save_every, save_minutes: save when this many steps, or minutes, have passed since the
                last checkpoint; checked after each step.  None disables the check.  The last step
                is saved when the run is closed.
            ttl_seconds: how long the server keeps the checkpoints, except for the one made when the
                run is closed; None means for ever.
            keep: how many of the newest checkpoints stay on the server; older ones are deleted.
                None keeps all.
            on_session_loss: what to do when the session is lost: ``"raise"``, or ``"resume"`` to
                continue from the last checkpoint in a new session, for which the loop's body must
                be inside ``with step:``.
            max_session_losses: with ``"resume"``, how many new sessions to open without a new
                checkpoint in between before SessionLostError is raised.
            exit_on_sigterm: on SIGTERM, finish the step, save, and exit with code 143; on a second
                SIGTERM, exit immediately.  Works in the main thread only.
            accept_changes: continue even if *config* has changed.

        Raises:
            RunFolderError: the folder is in use, damaged or not writable, or holds a run with
                another model, other settings or another *config*; or the server no longer has any
                of the run's checkpoints.
            InvalidInputError: an argument is invalid.
            TinkexError: the run could not be created or loaded.
        """
        from tinkex.runs.run import Run
        from tinkex.runs.saver import SavePolicy
        from tinkex.runs.source import RunSource

        layers = {"train_mlp": train_mlp, "train_attn": train_attn, "train_unembed": train_unembed}
        return Run(
            self,
            os.fspath(folder),
            RunSource(base_model, start_from, rank, seed, layers, user_metadata, optimizer),
            SavePolicy(save_every, save_minutes, ttl_seconds, keep),
            config=config,
            state=state,
            on_session_loss=on_session_loss,
            max_session_losses=max_session_losses,
            exit_on_sigterm=exit_on_sigterm,
            accept_changes=accept_changes,
        )

    def create_sampling_client(
        self,
        model_path: Optional[str] = None,
        base_model: Optional[str] = None,
        retry_config: Optional[RetryConfig] = None,
        record_stability_info: bool = False,
    ) -> SamplingClient:
        """Return a client that samples from a checkpoint or a base model.  Blocks.

        Args:
            model_path: the path of a checkpoint saved for sampling, as the server returned it.
            base_model: a name that the server offers.  If *model_path* is also given, the client
                samples from the checkpoint.
            retry_config: limits and retries of this client alone.
            record_stability_info: have the server keep data about each sample, to which later
                training can refer by the sample's sequence_id.
        """
        return self.create_sampling_client_future(
            model_path, base_model, retry_config, record_stability_info
        ).result()

    def create_sampling_client_future(
        self,
        model_path: Optional[str] = None,
        base_model: Optional[str] = None,
        retry_config: Optional[RetryConfig] = None,
        record_stability_info: bool = False,
    ) -> APIFuture[SamplingClient]:
        """Like `create_sampling_client`, without blocking."""
        return SamplingClient.create_future(
            self._runtime,
            model_path=model_path,
            base_model=base_model,
            retry_config=retry_config,
            record_stability_info=record_stability_info,
        )

    def create_custom_loss(self, fn: PerDatumLossFn, input_ranks: Mapping[str, int]) -> LossHandle:
        """Trace a loss for `TrainingClient.forward_backward_custom`.  Blocks.  Needs torch.

        If the server supports traced losses, it computes the loss itself, in one pass; otherwise
        the loss is computed here.

        Args:
            fn: called as ``fn(logprobs, ...)`` for one datum; returns a scalar tensor and a dict of
                metrics named ``custom/<name>:sum`` or ``:mean``.  The other parameters, at most 15,
                are loss inputs of the datum.  It may call only functions of torch, math and
                operator.
            input_ranks: the number of dimensions of every parameter: 0, 1 or 2.

        Raises:
            InvalidInputError: *fn* cannot be traced, or the same loss was already created in this
                session.
            ConfigError: torch is not installed.
        """
        from tinkex._training.loss_tracing import LossRegistry

        fresh = LossRegistry(self._runtime)
        registry: LossRegistry = vars(self).setdefault("_registry", fresh)  # atomic: one for all
        return registry.create(fn, input_ranks)

    def copy_weights(
        self,
        path: str,
        *,
        ttl_seconds: Optional[int] = None,
        weights_access_token: Optional[str] = None,
    ) -> APIFuture[str]:
        """Copy a checkpoint into this client's project; the result is the path of the copy.

        Args:
            path: the path of the checkpoint.
            ttl_seconds: how long the server keeps the copy; None means for ever.
            weights_access_token: gives access to another user's checkpoint.

        The future raises RouteMissingError if the server has no such route.
        """
        project_id = self.config.project_id or None
        return self.create_rest_client()._copy_weights(
            path, project_id, ttl_seconds, weights_access_token
        )

    def get_console_url(self) -> str:
        """Return the URL of the session's page in the hosted service's console."""
        return session_url(self.session_id)

    def create_rest_client(self) -> RestClient:
        """Return a client for runs, checkpoints and sessions.  Does not block."""
        self._runtime.ensure_open("create_rest_client")
        from tinkex.clients.rest import RestClient

        return RestClient(self._runtime)

    def close(
        self, status: str = "success", detail: Optional[str] = None, timeout_s: float = 5.0
    ) -> Future[None]:
        """End the session, and the embedded server if there is one.

        Outstanding futures fail with ClientClosedError.  Blocks for at most about *timeout_s*
        seconds; idempotent and thread-safe.

        Args:
            status: the outcome to report: ``"success"``, ``"errored"`` or ``"interrupted"``.
            detail: the reason, as text.

        Returns:
            A completed future (scripts for the official SDK call ``.result()`` on it).
        """
        if status not in STATUSES:
            raise InvalidInputError(f"status is {status!r}; it must be one of {STATUSES}")
        seconds = as_seconds("timeout_s", timeout_s)
        if seconds is None:
            raise InvalidInputError(f"timeout_s is {timeout_s!r}; it must be a number of seconds")
        try:
            self._runtime.close(status, detail, timeout_s=seconds)
        finally:  # also after Ctrl-C
            server, self._server = self._server, None
            if server is not None:
                self._server_dropper.detach()  # it would keep the server, and so the model, alive
                server.close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def __enter__(self) -> ServiceClient:
        self._runtime.ensure_open("with ServiceClient")
        return self

    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close(*outcome_of(exc_type))

    def __repr__(self) -> str:
        state = "closed" if self._runtime.closed else "open"
        return f"<ServiceClient {self.session_id} at {self.config.base_url}, {state}>"

    # Awaitable variants, under the official SDK's names.
    create_lora_training_client_async = result_of(create_lora_training_client_future)
    create_training_client_from_state_async = result_of(create_training_client_from_state_future)
    create_training_client_from_state_with_optimizer_async = result_of(
        create_training_client_from_state_with_optimizer_future
    )
    create_sampling_client_async = result_of(create_sampling_client_future)
    get_server_capabilities_async = in_thread(get_server_capabilities)


def _write_to_stderr(line: str) -> None:
    if sys.stderr is not None:  # it is None in a program without a console
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
