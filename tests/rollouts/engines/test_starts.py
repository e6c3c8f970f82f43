"""Engines that are given the beginning of a completion draw what follows it."""

from dataclasses import replace

import pytest
import torch

from rollouts.engines.check import check_engine
from rollouts.engines.contract import SamplingParams, TakesStarts, room_of
from rollouts.engines.model_limits import check_prompts
from rollouts.engines.transformers import TransformersEngine
from tests.tiny_lm import EOS, PIECES, POSITIONS, tiny_model, tiny_prompts, tiny_tokenizer

PARAMS = SamplingParams(max_completion_length=8)


def engine(**settings):
    model = tiny_model()
    model.generation_config.eos_token_id = [EOS, 5]
    return TransformersEngine(model, tiny_tokenizer(), **settings)


def started(*starts):
    """A prompt with each of these starts."""
    prompts = tiny_prompts(*range(3, 3 + len(starts)))
    return [prompt.started(start) for prompt, start in zip(prompts, starts, strict=True)]


def rows(rollouts):
    pairs = zip(rollouts.token_NT, rollouts.mask_NT, strict=True)
    return [tokens[mask].tolist() for tokens, mask in pairs]


def test_a_started_prompt_is_the_prompt_with_its_start_behind_it():
    (prompt,) = tiny_prompts(3)
    made = prompt.started((7, 8))
    assert made.token_ids == (*prompt.token_ids, 7, 8) and made.start_ids == (7, 8)
    assert (made.key, made.prompt, made.columns) == (prompt.key, prompt.prompt, prompt.columns)
    assert prompt.started(()) is prompt
    assert made.started((9,)).start_ids == (7, 8, 9)


@pytest.mark.slow
def test_a_start_is_a_longer_prompt_and_counts_towards_the_length():
    made, prompts = engine(max_batch_rows=5), started((), (7,), (8, 9, 10), (11,) * 7)
    assert isinstance(made, TakesStarts) and made.takes_starts
    budget, seeds = [3, 3, 3, 3], list(range(12))
    batch = made.generate(prompts, budget, seeds_N=seeds, params=PARAMS)
    assert batch.prompt_ids == tuple(prompt.token_ids for prompt in prompts)
    assert batch.mask_NT[:, 0].all()
    drawn = rows(batch)
    for p, prompt in enumerate(prompts):
        room = 8 - len(prompt.start_ids)
        longer = replace(prompt, start_ids=())
        alone = made.generate(
            [longer],
            [3],
            seeds_N=seeds[3 * p : 3 * p + 3],
            params=replace(PARAMS, max_completion_length=room),
        )
        at = slice(3 * p, 3 * p + 3)
        assert rows(alone) == drawn[at]
        assert alone.truncated_N.tolist() == batch.truncated_N[at].tolist()
        width = alone.mask_NT.shape[1]
        torch.testing.assert_close(alone.logprob_NT, batch.logprob_NT[at, :width])
        for row, tokens in zip(range(3 * p, 3 * p + 3), drawn[at], strict=True):
            ended = tokens[-1] in (EOS, 5)
            assert len(tokens) <= room
            assert bool(batch.truncated_N[row]) == (len(tokens) == room and not ended)


def test_what_is_drawn_after_a_start_is_as_likely_as_in_the_whole_completion():
    made = engine()
    (prompt,) = tiny_prompts(4)
    whole = made.generate([prompt], [6], seeds_N=list(range(6)), params=PARAMS)
    for row, tokens in enumerate(rows(whole)):
        for length in range(1, len(tokens)):
            some = prompt.started(tuple(tokens[:length]))
            # Any seed will do: the model's log-probabilities along the rest are compared.
            ids = torch.tensor([[*some.token_ids, *tokens[length:]]])
            with torch.no_grad():
                logprob_LV = made.model(ids).logits[0].log_softmax(-1)
            first = len(some.token_ids)
            places = torch.arange(first - 1, ids.shape[1] - 1)
            rest = logprob_LV[places, ids[0, first:]]
            recorded = whole.logprob_NT[row, length : len(tokens)]
            torch.testing.assert_close(rest, recorded, atol=1e-4, rtol=0)


def test_a_stop_string_may_begin_in_the_start():
    made = engine()
    made.model.generation_config.eos_token_id = None
    (prompt,) = tiny_prompts(4)
    seeds = list(range(40))
    last = prompt.started((PIECES.index("a"), PIECES.index("b")))
    free = made.generate([last], [40], seeds_N=seeds, params=PARAMS)
    stopped = made.generate([last], [40], seeds_N=seeds, params=replace(PARAMS, stop=("bc", "ed")))
    found = 0
    for whole, cut in zip(rows(free), rows(stopped), strict=True):
        text = "ab"
        for place, token in enumerate(whole):
            text += PIECES[token]
            if "bc" in text or "ed" in text:
                assert cut == whole[: place + 1]
                found += place == 0
                break
        else:
            assert cut == whole
    assert found  # some end with their first token, by the b of the start


def test_the_repetition_penalty_counts_the_start():
    made = engine()
    (prompt,) = tiny_prompts(4)
    params = replace(PARAMS, repetition_penalty=50.0, max_completion_length=3, temperature=0.0)
    (first,) = rows(made.generate([prompt], [1], seeds_N=[0], params=params))
    some = prompt.started(tuple(first[:2]))
    (rest,) = rows(made.generate([some], [1], seeds_N=[0], params=params))
    assert rest == first[2:]


def test_starts_that_cannot_be_are_refused():
    made = engine()
    with pytest.raises(ValueError, match="8 tokens and leaves nothing of max_completion_length=8"):
        made.generate(started((7,) * 8), [1], seeds_N=[0], params=PARAMS)
    wrong = replace(tiny_prompts(3)[0], start_ids=(99,))
    with pytest.raises(ValueError, match="is not the end of its token_ids"):
        room_of([wrong], PARAMS)


def test_a_start_takes_no_positions_besides_those_of_the_completion():
    (prompt,) = tiny_prompts(POSITIONS - 8)
    check_prompts(tiny_model(), [prompt.started((7,) * 5)], max_completion_length=8)
    with pytest.raises(ValueError, match=f"has {POSITIONS - 8} tokens"):
        check_prompts(tiny_model(), [prompt.started((7,) * 5)], max_completion_length=9)


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["", "length", "prompt_ids", "ignored"])
def test_the_contract_tests_starts(broken):
    real = engine()

    class Own:
        takes_starts = True

        def load_weights(self, model):
            real.load_weights(model)

        def generate(self, prompts, budget_P, *, seeds_N, params, version=0):
            asked = prompts
            if broken == "length":
                asked = [replace(prompt, start_ids=()) for prompt in prompts]
            if broken in ("prompt_ids", "ignored"):
                asked = [
                    replace(p, token_ids=p.token_ids[: -len(p.start_ids) or None], start_ids=())
                    for p in prompts
                ]
            made = real.generate(asked, budget_P, seeds_N=seeds_N, params=params, version=version)
            if broken == "ignored":
                made = replace(made, prompt_ids=tuple(tuple(p.token_ids) for p in prompts))
            return made

    prompts = tiny_prompts(3, 5, 4)
    if not broken:
        check_engine(Own(), prompts, PARAMS)
        return
    message = "prompt_ids must hold" if broken == "prompt_ids" else "counts towards|must determine"
    with pytest.raises(AssertionError, match=message):
        check_engine(Own(), prompts, PARAMS)
