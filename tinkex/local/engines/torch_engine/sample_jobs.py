"""Sample requests, checked: what is to be done for each, and the results so far."""

from __future__ import annotations

import dataclasses
from typing import Any, FrozenSet, List, Optional, Sequence, Tuple

import numpy as np
import numpy.typing as npt

from tinkex.local.engines.engine import EngineError, EngineInfo, StreamingRequest
from tinkex.local.engines.inputs import check_sample, check_values, prompt_targets
from tinkex.local.engines.torch_engine.generated_text import GeneratedText
from tinkex.local.engines.torch_engine.prompt_scores import PromptScores, as_asked
from tinkex.types import SampledSequence, SampleRequest, SampleResponse, TensorData, TopkLogprobs


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What sampling needs to know of the tokenizer."""

    tokenizer: Any
    eos_tokens: FrozenSet[int]

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Vocabulary:
        """Collect the end-of-sequence tokens of model and tokenizer."""
        eos = getattr(model.generation_config, "eos_token_id", None)
        if eos is None:
            eos = tokenizer.eos_token_id
        listed = [] if eos is None else eos if isinstance(eos, (list, tuple)) else [eos]
        return cls(tokenizer, frozenset(int(token) for token in listed))

    def text(self, tokens: Sequence[int]) -> str:
        """Decode *tokens*, special ones included, nothing cleaned up."""
        decoded: str = self.tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return decoded


@dataclasses.dataclass(frozen=True)
class StopRule:
    """When a sequence ends: at a token, or as soon as its text holds a string."""

    tokens: FrozenSet[int]
    strings: Tuple[str, ...] = ()

    @classmethod
    def of(cls, stop: Any, vocabulary: Vocabulary) -> StopRule:
        """Read ``SamplingParams.stop``."""
        if stop is None:
            return cls(vocabulary.eos_tokens)
        items = [stop] if isinstance(stop, str) else list(stop)
        strings = tuple(item for item in items if isinstance(item, str))
        if any(not item for item in strings):
            raise EngineError("stop holds an empty string; leave it out")
        return cls(frozenset(int(i) for i in items if not isinstance(i, str)), strings)

    def follow(
        self, prompt: npt.NDArray[np.int32], vocabulary: Vocabulary
    ) -> Optional[GeneratedText]:
        """Return the text to give to `reached`; None if no string has to be looked for."""
        if not self.strings:
            return None
        keep = max(len(string) for string in self.strings) - 1
        return GeneratedText(prompt.tolist(), vocabulary.text, keep)

    def reached(self, token: int, text: Optional[GeneratedText]) -> bool:
        """True if the newest *token* ends the sequence; adds it to *text*."""
        if token in self.tokens:
            return True
        if text is None:
            return False
        recent = text.append(token)
        return any(string in recent for string in self.strings)


@dataclasses.dataclass(eq=False)
class Job:
    """A checked request and its results so far; nothing is to come of it once it is *dropped*."""

    index: int
    request: SampleRequest
    prompt: npt.NDArray[np.int32]
    stop: StopRule
    limit: int
    open_sequences: int
    sequences: List[Optional[SampledSequence]]
    prompt_scores: Optional[PromptScores]
    dropped: bool = False

    @property
    def length(self) -> int:
        """Tokens of the prompt and its longest continuation."""
        return self.prompt.size + self.limit


def check_request(
    index: int, request: SampleRequest, vocabulary: Vocabulary, info: EngineInfo
) -> Job:
    check_values(request)
    prompt, room = check_sample(request, info)
    params = request.sampling_params
    limit = room if params.max_tokens is None else params.max_tokens
    if limit > room:
        raise EngineError(
            f"a prompt of {prompt.size} tokens and max_tokens {limit}: the context of "
            f"{info.model_name} holds {info.context_length} tokens. Shorten the prompt or lower "
            "max_tokens"
        )
    if request.prompt_alt_tokens_k:
        raise EngineError("prompt_alt_tokens_k is not supported by this server; leave it at 0")
    targets = prompt_targets(request, info)
    scores: Optional[PromptScores] = None
    if request.prompt_logprobs or request.topk_prompt_logprobs or targets is not None:
        scores = PromptScores(request, prompt, targets)
    stop = StopRule.of(params.stop, vocabulary)
    if isinstance(request, StreamingRequest) and request.stop_at_eos:
        stop = dataclasses.replace(stop, tokens=stop.tokens | vocabulary.eos_tokens)
    count = request.num_samples
    return Job(index, request, prompt, stop, limit, count, [None] * count, scores)


def response_of(job: Job) -> SampleResponse:
    sequences = [sequence for sequence in job.sequences if sequence is not None]
    scores, request = job.prompt_scores, job.request
    if scores is None:
        return SampleResponse(sequences)
    topk: Optional[TopkLogprobs] = None
    if request.topk_prompt_logprobs:
        topk = TopkLogprobs(scores.top_tokens, scores.top_logprobs)
    targets: Optional[TensorData] = None
    if scores.target_logprobs is not None and request.target_prompt_logprobs is not None:
        targets = as_asked(request.target_prompt_logprobs, scores.target_logprobs)
    return SampleResponse(
        sequences,
        prompt_logprobs_np=scores.logprobs if request.prompt_logprobs else None,
        topk_prompt_logprobs_np=topk,
        target_prompt_logprobs=targets,
    )
