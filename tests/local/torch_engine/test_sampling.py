"""Sampling equals transformers' generate and a fresh forward pass; it repeats and stops."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import numpy as np
import pytest
import torch
from local.torch_engine.reference import Reference, give_random_delta, make_data, relative_error
from transformers import AutoModelForCausalLM

from tinkex.local.engines.engine import EngineError, StreamingRequest
from tinkex.local.engines.torch_engine import decoding, sampling, stopping
from tinkex.local.engines.torch_engine.drawing import draw
from tinkex.types import ModelInput, SampleRequest, SampleResponse, SamplingParams, TensorData

EOS = 256


def prompt_of(length: int, seed: int = 0) -> ModelInput:
    return ModelInput.from_ints(np.random.default_rng(seed).integers(0, 256, length))


def request(length: int = 6, seed: int = 0, samples: int = 1, **params: Any) -> SampleRequest:
    params.setdefault("max_tokens", 12)
    params.setdefault("stop", [])
    return SampleRequest(prompt_of(length, seed), samples, SamplingParams(**params))


def run_all(engine: Any, sampler: str, requests: Sequence[SampleRequest]) -> Dict[int, Any]:
    found: Dict[int, Any] = {}
    for finished in engine.sample(sampler, requests):
        for index, result in finished:
            assert index not in found
            found[index] = result
    assert found.keys() == set(range(len(requests)))
    return found


@pytest.fixture
def samplers(run: Any, tmp_path: Path) -> Any:
    """An engine with the samplers "base" and "tuned" (a random adapter)."""
    give_random_delta(run, "m", tmp_path / "tuned")
    run.create_sampler("base", None)
    run.create_sampler("tuned", tmp_path / "tuned")
    return run


def test_greedy_sampling_equals_generate(samplers: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(samplers.info.tokenizer_id, dtype=torch.float32)
    requests = [
        request(length, seed=length, temperature=0.0, max_tokens=40) for length in (1, 5, 30, 31)
    ]
    answers = run_all(samplers, "base", requests)
    for index, asked in enumerate(requests):
        ids = torch.tensor(asked.prompt.to_numpy().astype(np.int64))[None]
        mask = torch.ones_like(ids)
        expected = model.generate(
            ids, attention_mask=mask, max_new_tokens=40, do_sample=False, eos_token_id=-1
        )
        assert answers[index].sequences[0].tokens == expected[0, ids.shape[1] :].tolist()
        assert answers[index].sequences[0].stop_reason == "length"


@pytest.mark.parametrize("params", [{}, {"temperature": 0.7, "top_k": 20, "top_p": 0.8}])
def test_logprobs_of_samples_equal_a_fresh_forward_pass(
    samplers: Any, params: Dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    """This makes the ratio of importance sampling 1 at the first step."""
    requests = [
        request(n, seed=n, samples=2, max_tokens=m, **params) for n, m in ((3, 30), (40, 9))
    ]
    answers = run_all(samplers, "tuned", requests)
    worst = 0.0
    for index, asked in enumerate(requests):
        for sequence in answers[index].sequences:
            tokens = np.concatenate([asked.prompt.to_numpy(), sequence.tokens_np])
            data = make_data([len(tokens) - 1])[0]
            inputs = {**data.loss_fn_inputs, "target_tokens": tokens[1:].astype(np.int64)}
            datum = type(data)(ModelInput.from_ints(tokens[:-1]), inputs)
            output = samplers.forward_backward("m", [datum], "cross_entropy", {}, forward_only=True)
            fresh = output.loss_fn_outputs[0]["logprobs"].to_numpy()[asked.prompt.length - 1 :]
            worst = max(worst, float(np.abs(fresh - sequence.logprobs_np).max()))
    record_property("largest_logprob_difference", worst)
    assert worst < 1e-4


def test_a_seed_decides_the_sample_whatever_else_is_in_the_batch(samplers: Any) -> None:
    mine = request(9, samples=3, seed=1, temperature=0.9)
    mine = SampleRequest(mine.prompt, 3, SamplingParams(max_tokens=20, seed=42, stop=[]))
    alone = run_all(samplers, "base", [mine])[0]
    others = [request(n, seed=n, samples=2, temperature=1.5, max_tokens=n) for n in (2, 17, 30)]
    crowded = run_all(samplers, "base", [others[0], others[1], mine, others[2]])[2]
    assert [s.tokens for s in alone.sequences] == [s.tokens for s in crowded.sequences]
    for one, other in zip(alone.sequences, crowded.sequences):
        assert np.abs(one.logprobs_np - other.logprobs_np).max() < 1e-4
    texts = {tuple(s.tokens) for s in alone.sequences}
    assert len(texts) == 3  # the samples of a request differ from each other
    other_seed = SampleRequest(mine.prompt, 3, SamplingParams(max_tokens=20, seed=43, stop=[]))
    assert run_all(samplers, "base", [other_seed])[0].sequences[0].tokens not in [
        list(t) for t in texts
    ]


def test_without_a_seed_samples_differ(samplers: Any) -> None:
    answers = run_all(samplers, "base", [request(max_tokens=20), request(max_tokens=20)])
    assert answers[0].sequences[0].tokens != answers[1].sequences[0].tokens


def test_samples_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    numbers = np.random.default_rng(0).random(4000).tolist()

    def shares(**params: Any) -> List[float]:
        tokens, _ = draw(
            logits.repeat(len(numbers), 1), [SamplingParams(**params)] * len(numbers), numbers
        )
        return [tokens.count(token) / len(tokens) for token in range(4)]

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(top_p=0.81) == pytest.approx([0.526, 0.316, 0.158, 0], abs=0.03)
    assert shares(top_p=0.79) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(top_p=1e-6) == [1, 0, 0, 0]
    assert shares(top_k=3, top_p=0.6) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(temperature=0.5)[0] == pytest.approx(0.25 / 0.365, abs=0.03)
    assert shares(temperature=1e-30) == shares(temperature=1e-300) == [1, 0, 0, 0]
    assert shares(temperature=1e300) == pytest.approx([0.25] * 4, abs=0.03)
    assert shares(temperature=0.0) == [1, 0, 0, 0]


def test_a_wide_nucleus_is_found_by_sorting_everything() -> None:
    logits = torch.zeros(1, 1000)
    tokens = {draw(logits, [SamplingParams(top_p=0.999)], [u / 500])[0][0] for u in range(500)}
    assert len(tokens) > 450


def test_impossible_tokens_are_never_drawn_at_any_temperature() -> None:
    logits = torch.tensor([[0.0, -torch.inf, -torch.inf, -1.0]])
    for temperature in (1e-300, 1e-30, 1e30, 1e300):
        found = draw(logits, [SamplingParams(temperature=temperature)], [0.3])
        assert found[0] == [0]


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(number: float) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -1.0, -torch.inf]])
    tokens, logprobs = draw(logits, [SamplingParams()], [number])
    assert tokens == ([1] if number == 0 else [2])
    assert np.isfinite(logprobs).all()


def test_logprobs_are_those_of_the_model_itself() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    for params in (SamplingParams(temperature=0.1, top_k=1), SamplingParams(temperature=0)):
        assert draw(logits, [params], [0.9])[1] == pytest.approx([float(np.log(0.5))])


def expected_stop(tokens: List[int], decode: Any, strings: Sequence[str]) -> int:
    """Return after how many of *tokens* their text contains one of *strings*."""
    for count in range(1, len(tokens) + 1):
        if any(string in decode(tokens[:count]) for string in strings):
            return count
    return len(tokens)


def test_stop_strings_may_span_tokens(samplers: Any) -> None:
    asked = request(10, seed=4, max_tokens=30)
    free = SampleRequest(asked.prompt, 1, SamplingParams(max_tokens=30, seed=5, stop=[]))
    tokens = run_all(samplers, "base", [free])[0].sequences[0].tokens
    decode = samplers._vocabulary.text
    ascii_runs = [i for i in range(29) if all(32 < t < 127 for t in tokens[i : i + 2])]
    assert ascii_runs, "the random text has no two printable characters in a row; change the seed"
    at = ascii_runs[-1]
    string = decode(tokens[at : at + 2])
    stopped = SampleRequest(
        asked.prompt, 1, SamplingParams(max_tokens=30, seed=5, stop=["never there", string])
    )
    sequence = run_all(samplers, "base", [stopped])[0].sequences[0]
    count = expected_stop(tokens, decode, [string])
    assert sequence.tokens == tokens[:count]
    assert sequence.stop_reason == "stop"
    single = SampleRequest(asked.prompt, 1, SamplingParams(max_tokens=30, seed=5, stop=string))
    assert run_all(samplers, "base", [single])[0].sequences[0].tokens == tokens[:count]


def test_stop_tokens_end_a_sequence_and_are_part_of_it(samplers: Any) -> None:
    prompt = prompt_of(10, 4)
    free = SampleRequest(prompt, 1, SamplingParams(max_tokens=30, seed=5, stop=[]))
    tokens = run_all(samplers, "base", [free])[0].sequences[0].tokens
    stop = tokens[9]
    stopped = SampleRequest(prompt, 1, SamplingParams(max_tokens=30, seed=5, stop=[999, stop]))
    sequence = run_all(samplers, "base", [stopped])[0].sequences[0]
    assert sequence.tokens == tokens[: tokens.index(stop) + 1]
    assert sequence.stop_reason == "stop"
    assert len(sequence.logprobs_np) == len(sequence.tokens)


def test_the_end_of_sequence_token_stops_unless_stop_is_given(
    samplers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompt_of(10, 4)
    free = SampleRequest(prompt, 1, SamplingParams(max_tokens=30, seed=5, stop=[]))
    tokens = run_all(samplers, "base", [free])[0].sequences[0].tokens
    ends = stopping.Vocabulary(samplers._vocabulary.tokenizer, frozenset({tokens[6]}))
    monkeypatch.setattr(samplers, "_vocabulary", ends)
    default = SampleRequest(prompt, 1, SamplingParams(max_tokens=30, seed=5))
    sequence = run_all(samplers, "base", [default])[0].sequences[0]
    assert sequence.tokens == tokens[: tokens.index(tokens[6]) + 1]
    assert run_all(samplers, "base", [free])[0].sequences[0].tokens == tokens


def test_the_models_own_end_token_is_known(samplers: Any) -> None:
    assert samplers._vocabulary.eos_tokens == {EOS}


def test_max_tokens_none_runs_to_the_end_of_the_context(samplers: Any) -> None:
    context = samplers.info.context_length
    asked = SampleRequest(prompt_of(context - 5), 1, SamplingParams(stop=[]))
    sequence = run_all(samplers, "base", [asked])[0].sequences[0]
    assert (len(sequence.tokens), sequence.stop_reason) == (5, "length")


def test_long_prompts_in_pieces_give_the_results_of_whole_ones(
    samplers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        SampleRequest(prompt_of(n, n), 1, SamplingParams(8, seed=1, stop=[]), prompt_logprobs=True)
        for n in (200, 190, 33, 5)
    ]
    batched = run_all(samplers, "tuned", requests)
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 32)
    pieces = run_all(samplers, "tuned", requests)
    for index in batched:
        one, other = batched[index], pieces[index]
        assert one.sequences[0].tokens == other.sequences[0].tokens
        difference = np.abs(one.prompt_logprobs_np[1:] - other.prompt_logprobs_np[1:])
        assert difference.max() < 1e-4


def test_requests_that_do_not_fit_into_memory_together_run_in_turn(
    samplers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request(8, seed=n, samples=4, max_tokens=10) for n in range(3)]
    requests = [
        SampleRequest(r.prompt, 4, SamplingParams(10, seed=n, stop=[]))
        for n, r in enumerate(requests)
    ]
    together = run_all(samplers, "base", requests)
    monkeypatch.setattr(sampling, "BATCH_TOKENS", 5 * 18)
    in_waves = run_all(samplers, "base", requests)
    for index in together:
        expected = [s.tokens for s in together[index].sequences]
        assert [s.tokens for s in in_waves[index].sequences] == expected


def test_requests_that_join_while_others_run_are_drawn_as_if_alone(
    samplers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their prompts are longer or shorter than those of the rows, some of which have ended."""
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 32)
    wanted = [request(8, seed=1, samples=2, max_tokens=60), request(20, seed=2, max_tokens=5)]
    wanted += [request(100, seed=3, samples=3, max_tokens=30), request(3, seed=4, max_tokens=9)]
    wanted = [
        dataclasses.replace(
            asked,
            sampling_params=dataclasses.replace(asked.sampling_params, seed=seed),
            prompt_logprobs=seed % 2 == 0,
        )
        for seed, asked in enumerate(wanted)
    ]
    alone = [run_all(samplers, "tuned", [asked])[0] for asked in wanted]
    requests = wanted[:2]
    found: Dict[int, Any] = {}
    for slices, finished in enumerate(samplers.sample("tuned", requests)):
        if slices in (2, 4):
            requests.append(wanted[len(requests)])
        found.update(finished)
    assert found.keys() == {0, 1, 2, 3}
    for index, one in enumerate(alone):
        assert [s.tokens for s in found[index].sequences] == [s.tokens for s in one.sequences]
        for mine, theirs in zip(found[index].sequences, one.sequences):
            assert np.abs(mine.logprobs_np - theirs.logprobs_np).max() < 1e-4
        if one.prompt_logprobs_np is not None:
            difference = found[index].prompt_logprobs_np[1:] - one.prompt_logprobs_np[1:]
            assert np.abs(difference).max() < 1e-4


def test_a_faulty_or_dropped_request_that_joins_later_changes_nothing(samplers: Any) -> None:
    asked = request(8, seed=1, temperature=0.0, max_tokens=60)
    expected = run_all(samplers, "base", [asked])[0].sequences[0].tokens
    requests, dropped = [asked], set()
    found: Dict[int, Any] = {}
    for slices, finished in enumerate(samplers.sample("base", requests, dropped)):
        if slices == 1:
            requests.append(SampleRequest(prompt_of(4), 0))
            requests.append(request(5, max_tokens=40))
        if slices == 2:
            dropped.add(2)
        found.update(finished)
    assert found.keys() == {0, 1}
    assert "num_samples" in str(found[1])
    assert found[0].sequences[0].tokens == expected


def test_running_rows_continue_between_the_pieces_of_joining_prompts(
    samplers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 32)
    reported: List[int] = []
    follow = StreamingRequest(
        prompt_of(5),
        1,
        SamplingParams(max_tokens=200, stop=[]),
        on_token=lambda sampled: reported.append(sampled.token),
    )
    requests: List[Any] = [follow]
    counts: List[int] = []
    for slices, _ in enumerate(samplers.sample("base", requests)):
        if slices == 1:
            requests += [request(30, seed=n, max_tokens=2) for n in range(4)]  # one piece each
        counts.append(len(reported))
    steps = [after - before for before, after in zip(counts, counts[1:])]
    assert steps[1:9] == [0, 8] * 4


def test_prompt_logprobs_and_top_k_equal_the_model(samplers: Any) -> None:
    prompt = prompt_of(300, 8)  # more positions than a chunk of logits
    asked = SampleRequest(
        prompt,
        1,
        SamplingParams(max_tokens=3, stop=[], seed=1),
        prompt_logprobs=True,
        topk_prompt_logprobs=4,
        topk_sample_logprobs=3,
    )
    answer: SampleResponse = run_all(samplers, "base", [asked])[0]
    sequence = answer.sequences[0]
    tokens = np.concatenate([prompt.to_numpy(), sequence.tokens_np]).astype(np.int64)
    table = Reference(samplers.info.tokenizer_id).logits(tokens, {}, 1).log_softmax(-1)
    own = table[range(len(tokens) - 1), tokens[1:]].detach().numpy()
    assert np.isnan(answer.prompt_logprobs_np[0])
    assert relative_error(answer.prompt_logprobs_np[1:], own[:299]) < 1e-4
    assert relative_error(sequence.logprobs_np, own[299:]) < 1e-4
    top = table.topk(4)
    topk = answer.topk_prompt_logprobs_np
    assert answer.topk_prompt_logprobs[0] is None
    assert relative_error(topk.logprobs[1:], top.values[:299].detach()) < 1e-4
    assert (topk.token_ids[1:] == top.indices[:299].numpy()).mean() > 0.99
    sampled = sequence.topk_logprobs_np
    assert sampled.token_ids.shape == (3, 3)
    assert relative_error(sampled.logprobs, table.topk(3).values[299:302].detach()) < 1e-4


def test_only_the_last_n_prompt_logprobs_are_returned_if_requested(samplers: Any) -> None:
    prompt = prompt_of(40, 8)
    params = SamplingParams(max_tokens=1)
    full = SampleRequest(prompt, 1, params, prompt_logprobs=True, topk_prompt_logprobs=2)
    last = SampleRequest(
        prompt,
        1,
        params,
        prompt_logprobs=True,
        topk_prompt_logprobs=2,
        prompt_logprobs_last_n=7,
    )
    answers = run_all(samplers, "base", [full, last])
    found = answers[1].prompt_logprobs_np
    assert np.isnan(found[:33]).all()
    assert np.abs(found[33:] - answers[0].prompt_logprobs_np[33:]).max() < 1e-4
    assert [row is None for row in answers[1].topk_prompt_logprobs] == [True] * 33 + [False] * 7


def test_target_prompt_logprobs_have_the_requested_shape(samplers: Any) -> None:
    prompt = prompt_of(6, 8)
    targets = np.array([[1, 2], [3, -1], [-1, -1], [7, 8], [9, 10]])
    asked = SampleRequest(
        prompt,
        1,
        SamplingParams(max_tokens=1),
        target_prompt_logprobs=TensorData(targets.ravel(), "int64", (5, 2)),
    )
    table = Reference(samplers.info.tokenizer_id).logits(prompt.to_numpy(), {}, 1).log_softmax(-1)
    expected = np.where(
        targets >= 0, table[:5].gather(1, torch.tensor(np.maximum(targets, 0))).detach().numpy(), 0
    )
    answer = run_all(samplers, "base", [asked])[0]
    assert relative_error(answer.target_prompt_logprobs.to_numpy(), expected) < 1e-4
    assert answer.prompt_logprobs_np is None
    sparse = TensorData(
        [1, 2, 3, 7, 8, 9, 10], "int64", (5, 2), [0, 2, 3, 3, 5, 7], [0, 1, 0, 0, 1, 0, 1]
    )
    asked = SampleRequest(prompt, 1, SamplingParams(max_tokens=1), target_prompt_logprobs=sparse)
    found = run_all(samplers, "base", [asked])[0].target_prompt_logprobs
    assert found.is_sparse
    assert relative_error(found.to_numpy(), expected) < 1e-4


def test_samplers_with_different_weights_coexist(samplers: Any, tmp_path: Path) -> None:
    asked = [request(12, temperature=0.0, max_tokens=20)]
    base = run_all(samplers, "base", asked)[0].sequences[0].tokens
    tuned = run_all(samplers, "tuned", asked)[0].sequences[0].tokens
    assert base != tuned
    assert run_all(samplers, "base", asked)[0].sequences[0].tokens == base
    # A sampler is frozen: training the run it came from does not change it.
    samplers.forward_backward("m", make_data([30]), "cross_entropy", {})
    from tinkex.types import AdamParams

    samplers.optim_step("m", AdamParams(learning_rate=0.1))
    assert run_all(samplers, "tuned", asked)[0].sequences[0].tokens == tuned


def test_other_work_may_run_between_the_slices(samplers: Any) -> None:
    asked = [request(7, temperature=0.0, max_tokens=40)]
    expected = run_all(samplers, "tuned", asked)[0].sequences[0].tokens
    found = None
    slices = 0
    for finished in samplers.sample("tuned", asked):
        slices += 1
        assert not torch.is_inference_mode_enabled()
        samplers.forward_backward("m", make_data([10], seed=slices), "cross_entropy", {})
        run_all(samplers, "base", [request(3, max_tokens=2)])
        for _, result in finished:
            found = result.sequences[0].tokens
    assert found == expected
    assert slices >= 5


def test_finished_requests_are_returned_while_longer_ones_continue(samplers: Any) -> None:
    steps = samplers.sample("base", [request(4, max_tokens=60), request(4, max_tokens=3)])
    order = [[index for index, _ in finished] for finished in steps]
    assert [index for finished in order for index in finished] == [1, 0]
    assert len([finished for finished in order if finished]) == 2


def test_a_faulty_request_fails_alone(samplers: Any) -> None:
    context = samplers.info.context_length
    bad = {
        "empty": SampleRequest(ModelInput.empty()),
        "token 260": SampleRequest(ModelInput.from_ints([1, 260])),
        "context": request(8, max_tokens=context),
        "max_tokens": request(8, max_tokens=0),
        "temperature": request(8, temperature=-1.0),
        "top_p": request(8, top_p=0.0),
        "num_samples": SampleRequest(prompt_of(3), 0),
        "empty string": request(8, stop=["x", ""]),
        "last_n": SampleRequest(prompt_of(4), prompt_logprobs=True, prompt_logprobs_last_n=4),
        "alt_tokens": SampleRequest(prompt_of(4), prompt_alt_tokens_k=2),
        "one row per": SampleRequest(
            prompt_of(4), target_prompt_logprobs=TensorData([[1], [2]], "int64")
        ),
        "topk_sample": SampleRequest(prompt_of(4), topk_sample_logprobs=1000),
    }
    full = SampleRequest(prompt_of(context), 1, SamplingParams())
    requests = [*bad.values(), full, request(5)]
    answers = run_all(samplers, "base", requests)
    for index, words in enumerate(bad):
        assert isinstance(answers[index], EngineError), words
        assert answers[index].category == "user"
        assert words in str(answers[index])
    assert "Shorten the prompt" in str(answers[len(bad)])
    assert len(answers[len(bad) + 1].sequences[0].tokens) == 12


def test_unloading_a_sampler_frees_it_and_fails_its_running_requests(samplers: Any) -> None:
    def count() -> int:
        return sum(p.numel() for p in samplers._network.model.parameters())

    before = count()
    steps = samplers.sample("tuned", [request(max_tokens=100), request(max_tokens=2)])
    results: Dict[int, Any] = dict(next(steps))
    results.update(next(steps))
    samplers.unload_sampler("tuned")
    samplers.unload_sampler("tuned")
    for finished in steps:
        results.update(finished)
    assert "unloaded" in str(results[0])
    assert len(results[1].sequences[0].tokens) == 2
    assert count() < before
    with pytest.raises(EngineError, match="no sampler tuned"):
        next(samplers.sample("tuned", [request()]))


def test_abandoning_a_batch_leaves_the_engine_usable(samplers: Any) -> None:
    steps = samplers.sample("base", [request(max_tokens=100)])
    next(steps)
    steps.close()
    assert len(run_all(samplers, "base", [request()])[0].sequences[0].tokens) == 12


@pytest.mark.parametrize("after", [0, 1, 3], ids=["before", "at the start", "in the middle"])
def test_a_dropped_request_ends_and_the_others_continue_unchanged(
    samplers: Any, after: int
) -> None:
    requests = [request(seed=n, samples=2, max_tokens=64, temperature=0.0) for n in (1, 2, 3)]
    alone = run_all(samplers, "base", requests)
    dropped = {1} if after == 0 else set()
    found: Dict[int, Any] = {}
    for slices, finished in enumerate(samplers.sample("base", requests, dropped), 1):
        if slices == after:
            dropped.add(1)
        found.update(finished)
    assert found.keys() == {0, 2}
    for index in found:
        for mine, theirs in zip(found[index].sequences, alone[index].sequences):
            assert mine.tokens == theirs.tokens


def test_a_batch_of_dropped_requests_ends_early(samplers: Any) -> None:
    dropped: set = set()
    requests = [request(max_tokens=400), request(max_tokens=400, seed=1)]
    slices = 0
    for finished in samplers.sample("base", requests, dropped):
        assert finished == []
        slices += 1
        dropped |= {0, 1}
    assert slices < 5
