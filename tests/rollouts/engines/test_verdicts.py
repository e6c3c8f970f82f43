"""Engines end the rollouts they are told to, and draw all others as if they had not been asked."""

import itertools
from dataclasses import replace

import pytest
import torch

from rollouts.batch import concatenate
from rollouts.engines.check import check_engine
from rollouts.engines.contract import SamplingParams, TakesVerdicts, asked_at
from rollouts.engines.transformers import TransformersEngine
from tests.tiny_lm import EOS, PIECES, tiny_model, tiny_prompts, tiny_tokenizer

PARAMS = SamplingParams(max_completion_length=14, verdict_every=3)


def engine(**settings):
    model = tiny_model()
    model.generation_config.eos_token_id = [EOS, 5]
    return TransformersEngine(model, tiny_tokenizer(), **settings)


def even(prompts, ids_N):
    """An arbitrary rule: the tokens add up to an even number."""
    return [sum(ids) % 2 == 0 for ids in ids_N]


def never(prompts, ids_N):
    return [False] * len(ids_N)


def rows(rollouts):
    pairs = zip(rollouts.token_NT, rollouts.mask_NT, strict=True)
    return [tokens[mask].tolist() for tokens, mask in pairs]


def test_questions_are_a_fixed_number_of_tokens_apart_and_then_an_eighth_of_the_length():
    assert asked_at(14, 3) == [3, 6, 9, 12]
    assert asked_at(12, 3) == [3, 6, 9]  # the last token ends a rollout anyway
    assert asked_at(3, 3) == [] and asked_at(4, 1) == [1, 2, 3]
    long = asked_at(10_000, 8)
    assert long[:9] == [8, 16, 24, 32, 40, 48, 56, 64, 72] and len(long) < 60
    assert all(b - a == max(8, a // 8) for a, b in itertools.pairwise(long))
    # A rollout's tokens are read some nine times in all.
    assert sum(long) < 10 * 10_000
    with pytest.raises(ValueError, match="verdict_every must be at least 1, got 0"):
        SamplingParams(max_completion_length=4, verdict_every=0)


@pytest.mark.parametrize("most", [256, 7])
def test_a_decided_rollout_ends_there_and_the_others_are_as_without_verdicts(most):
    made, prompts = engine(max_batch_rows=most), tiny_prompts(3, 5, 4)
    assert isinstance(made, TakesVerdicts) and made.takes_verdicts
    asked = {"budget_P": [8, 0, 8], "seeds_N": list(range(16))}
    whole = made.generate(prompts, **asked, params=PARAMS)
    assert whole.decided_N is None
    ended = made.generate(prompts, **asked, params=replace(PARAMS, over=even))
    again = made.generate(prompts, **asked, params=replace(PARAMS, over=never))
    assert rows(again) == rows(whole) and not again.decided_N.any()
    assert 3 < ended.decided_N.sum() < 16
    for row, tokens in enumerate(rows(whole)):
        ends = [at for at in asked_at(len(tokens), 3) if sum(tokens[:at]) % 2 == 0]
        length = ends[0] if ends else len(tokens)
        assert rows(ended)[row] == tokens[:length]
        assert bool(ended.decided_N[row]) == bool(ends)
        assert bool(ended.truncated_N[row]) == (bool(whole.truncated_N[row]) and not ends)
        torch.testing.assert_close(
            ended.logprob_NT[row, :length], whole.logprob_NT[row, :length], atol=1e-5, rtol=0
        )
    # The column goes where the rows go.
    picked = ended.take(torch.tensor([3, 0]))
    assert picked.decided_N.tolist() == ended.decided_N[[3, 0]].tolist()
    assert concatenate([ended, ended]).decided_N.tolist() == ended.decided_N.tolist() * 2
    with pytest.raises(ValueError, match="decided_N must be torch.bool"):
        replace(ended, decided_N=ended.decided_N.long())


def test_those_that_run_are_asked_about_with_their_prompts_and_starts():
    seen = []

    def over(prompts, ids_N):
        seen.append([(p.key, tuple(ids)) for p, ids in zip(prompts, ids_N, strict=True)])
        return [len(ids) == 5 for ids in ids_N]

    prompts = [p.started(s) for p, s in zip(tiny_prompts(3, 4), ((), (7, 8)), strict=True)]
    params = replace(PARAMS, over=over)
    found = engine().generate(prompts, [4, 4], seeds_N=range(8), params=params)
    assert len(seen[0]) == sum(len(row) > 3 for row in rows(found)) + sum(
        len(row) == 3 and bool(decided)
        for row, decided in zip(rows(found), found.decided_N, strict=True)
    )
    for question, drawn in zip(seen, (3, 6, 9, 12), strict=False):
        for key, ids in question:
            start = next(p.start_ids for p in prompts if p.key == key)
            assert ids[: len(start)] == start and len(ids) == len(start) + drawn
    # Three tokens after a start of two are five: those and no others are decided.
    assert found.decided_N.tolist() == [
        bool(p) and len(row) == 3 and row[-1] not in (EOS, 5)
        for p, row in zip(found.prompt_N.tolist(), rows(found), strict=True)
    ]


def test_what_ends_with_a_question_is_not_asked_about():
    def over(prompts, ids_N):
        assert not any(ids[-1] in (EOS, 5) for ids in ids_N)
        return [True] * len(ids_N)

    params = replace(PARAMS, over=over, verdict_every=1)
    found = engine().generate(tiny_prompts(3), [64], seeds_N=range(64), params=params)
    assert (found.length_N == 1).all() and not found.truncated_N.any()
    ends_N = torch.isin(found.token_NT[:, 0], torch.tensor([EOS, 5]))
    assert ends_N.any() and torch.equal(found.decided_N, ~ends_N)
    last = int(found.token_NT[found.decided_N, 0][0])
    stopping = replace(params, stop=(PIECES[last],))
    again = engine().generate(tiny_prompts(3), [64], seeds_N=range(64), params=stopping)
    stops_N = again.token_NT[:, 0] == last
    assert torch.equal(again.token_NT, found.token_NT)
    assert stops_N.any() and not again.decided_N[stops_N].any()


@pytest.mark.slow
def test_the_contract_test_passes_it_with_filters_and_in_batches():
    made, prompts = engine(max_batch_rows=5), tiny_prompts(3, 5, 4)
    check_engine(made, prompts, SamplingParams(max_completion_length=9))
    check_engine(made, prompts, SamplingParams(max_completion_length=9, top_k=6, temperature=0.8))
