"""Generation: one request on its way through the scheduler, and its results.

The engine thread puts tokens and outcomes into a queue; the request's HTTP thread takes them out
and turns them into text.
"""

from __future__ import annotations

import queue
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

from tinkex._runtime.inbox import Inbox
from tinkex.local.engines.engine import SampledToken, StreamingRequest
from tinkex.local.errors import HTTPError
from tinkex.local.openai.choices import Choice, Delta, read_prompt
from tinkex.local.openai.parameters import Call, Prompt
from tinkex.local.openai.samplers import Samplers
from tinkex.local.openai.text import Text
from tinkex.local.state.futures import Failure, Outcome
from tinkex.types import ModelInput, SampleResponse

#: The index of a prompt, and a token or the outcome of its request.
_Event = Tuple[int, Union[SampledToken, Outcome]]


class Part(NamedTuple):
    """A new part of the choice number *choice*."""

    choice: int
    delta: Delta


class Generation:
    """The choices of one request.

    Use `parts`, then `close`, which cancels unfinished samples.  For one thread.

    Args:
        samplers: do the work.
        text: the text side of the model.
        call: the request.
    """

    def __init__(self, samplers: Samplers, text: Text, call: Call) -> None:
        self._samplers = samplers
        self._text = text
        self._call = call
        self._events: Inbox[_Event] = Inbox()
        # The prompt is sent first, but its log-probabilities arrive with the outcome: until then,
        # `parts` holds the tokens back.
        self._scores_prompts = call.echo and call.top is not None
        self._choices = [self._choices_of(prompt) for prompt in call.prompts]
        self._open = set(range(len(call.prompts)))
        # The engine thread puts tokens and outcomes into one queue, so an outcome comes after its
        # tokens.
        puts = [self._put(index) for index in range(len(call.prompts))]
        requests = [self._request(prompt, put) for prompt, put in zip(call.prompts, puts)]
        # Last: the engine may put tokens into the queue before this returns.
        self._request_ids = samplers.submit(call.model, requests, puts)

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of all prompts."""
        return sum(len(prompt.tokens) for prompt in self._call.prompts)

    @property
    def completion_tokens(self) -> int:
        """Number of tokens of all choices so far, including the tokens that ended them."""
        return sum(choice.tokens for choices in self._choices for choice in choices)

    def parts(self, pause_s: Optional[float] = None) -> Iterator[Optional[Part]]:
        """Yield new parts until all choices are done; None after each *pause_s* without one.

        Raises:
            HTTPError: a sample failed.
        """
        if self._call.echo and not self._scores_prompts:
            for index in range(len(self._call.prompts)):
                yield from self._echoes(index, None)
        held: Dict[int, List[SampledToken]] = {}  # by prompt
        while self._open:
            try:
                index, event = self._events.get(timeout=pause_s)
            except queue.Empty:
                # Lets the caller check whether its client is gone.
                yield None
                continue
            if isinstance(event, SampledToken):
                # Tokens wait for the log-probabilities of their prompt.
                if self._scores_prompts:
                    held.setdefault(index, []).append(event)
                else:
                    yield self._taken(index, event)
                continue
            self._open.discard(index)
            if isinstance(event, Failure):
                raise HTTPError(event.status if event.category == "user" else 500, event.message)
            if self._scores_prompts and isinstance(event.value, SampleResponse):
                yield from self._echoes(index, event.value)
                for sampled in held.pop(index, []):
                    yield self._taken(index, sampled)

    def close(self) -> None:
        """Cancel unfinished samples.  A second call does nothing."""
        self._samplers.cancel([self._request_ids[index] for index in self._open])
        self._open.clear()

    def _request(
        self, prompt: Prompt, on_token: Callable[[SampledToken], None]
    ) -> StreamingRequest:
        call = self._call
        return StreamingRequest(
            ModelInput.from_ints(prompt.tokens),
            call.n,
            call.params,
            prompt_logprobs=self._scores_prompts,
            topk_prompt_logprobs=(call.top or 0) if call.echo else 0,
            topk_sample_logprobs=call.top or 0,
            on_token=on_token,
            # As OpenAI's clients expect: in the Tinker protocol, stop strings replace the model's
            # own end-of-sequence tokens.
            stop_at_eos=True,
        )

    def _choices_of(self, prompt: Prompt) -> List[Choice]:
        call = self._call
        offset = len(self._echo(prompt, None).text) if call.echo else 0
        return [
            Choice(
                self._text,
                prompt.tokens,
                call.stops,
                keep_stop=call.keep_stop,
                offset=offset,
                empty=call.empty,
            )
            for _ in range(call.n)
        ]

    def _put(self, index: int) -> Callable[[Union[SampledToken, Outcome]], None]:
        # Without `self`, so that the scheduler keeps only the queue alive.
        events = self._events
        return lambda event: events.put((index, event))

    def _taken(self, index: int, sampled: SampledToken) -> Part:
        delta = self._choices[index][sampled.sequence].take(sampled)
        return Part(index * self._call.n + sampled.sequence, delta)

    def _echoes(self, index: int, response: Optional[SampleResponse]) -> List[Part]:
        """Return the prompt number *index* as the beginning of each of its choices."""
        delta, n = self._echo(self._call.prompts[index], response), self._call.n
        return [Part(index * n + number, delta) for number in range(n)]

    def _echo(self, prompt: Prompt, response: Optional[SampleResponse]) -> Delta:
        """Return the prompt as the beginning of a choice."""
        logprobs = None if response is None else response.prompt_logprobs
        if logprobs is None and prompt.text is not None:
            return Delta(prompt.text, [])
        tops = None if response is None else response.topk_prompt_logprobs
        delta = read_prompt(self._text, prompt.tokens, logprobs, tops)
        return delta if prompt.text is None else Delta(prompt.text, delta.entries)
