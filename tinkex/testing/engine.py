"""A deterministic engine that records its work in the journal, and its tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Container, Dict, Iterable, Iterator, List, Mapping, Sequence, Union

from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.engines.engine import EngineInfo, Finished
from tinkex.testing.journal import Journal
from tinkex.types import AdamParams, Datum, ForwardBackwardOutput, LoraConfig, SampleRequest


class RecordingEngine(DeterministicEngine):
    """A DeterministicEngine with a journal.

    Args:
        journal: gets an entry after each success.
        models: the model's name, followed by its aliases.
    """

    def __init__(self, journal: Journal, models: Sequence[str], **facts: Any) -> None:
        super().__init__(models[0], **facts)
        self._journal = journal
        self._aliases = tuple(models[1:])

    @property
    def info(self) -> EngineInfo:
        return dataclasses.replace(super().info, aliases=self._aliases)

    def create(self, model_id: str, lora: LoraConfig) -> None:
        super().create(model_id, lora)
        self._journal.add_executed(model_id, "create")

    def forward_backward(
        self,
        model_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, Union[float, str]],
        *,
        forward_only: bool = False,
    ) -> ForwardBackwardOutput:
        output = super().forward_backward(
            model_id, data, loss_fn, loss_fn_config, forward_only=forward_only
        )
        self._journal.add_executed(model_id, "forward" if forward_only else "forward_backward")
        return output

    def optim_step(self, model_id: str, params: AdamParams) -> Dict[str, float]:
        metrics = super().optim_step(model_id, params)
        self._journal.add_executed(model_id, "optim_step")
        return metrics

    def save(self, model_id: str, folder: Path, *, with_optimizer: bool) -> None:
        super().save(model_id, folder, with_optimizer=with_optimizer)
        self._journal.add_executed(model_id, "save" if with_optimizer else "export")

    def load(self, model_id: str, folder: Path, *, with_optimizer: bool) -> None:
        super().load(model_id, folder, with_optimizer=with_optimizer)
        self._journal.add_executed(model_id, "load")

    def sample(
        self, sampler_id: str, requests: Sequence[SampleRequest], dropped: Container[int] = ()
    ) -> Iterator[List[Finished]]:
        for finished in super().sample(sampler_id, requests, dropped):
            for _, result in finished:
                if not isinstance(result, Exception):
                    self._journal.add_executed(sampler_id, "sample")
            yield finished


class CharacterTokenizer:
    """Token ``t`` is the character ``chr(t)``; token 0 ends a sequence.  Immutable.

    It decodes whatever `FakeServer` samples.  With the server's default vocabulary it encodes the
    characters below U+7D00: all of Latin, Greek, Cyrillic and most of Chinese, but no emoji.
    """

    eos_token_id = 0

    def encode(self, text: str) -> List[int]:
        """Return the token ids of *text*."""
        return [ord(character) for character in text]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of *tokens*, without the end of the sequence."""
        return "".join(chr(token) for token in tokens if token != self.eos_token_id)
