"""The contract test is itself tested: it passes a plain engine and catches every broken one."""

import math

import numpy as np
import pytest
import torch

from rollouts.batch import TokenRollouts
from rollouts.engines.check import check_engine
from rollouts.engines.contract import SamplingParams, asked_at, requested_rows
from tests.tiny_lm import tiny_prompts

VOCABULARY, EOS = 40, 1


class TableEngine:
    """A policy that is a table: logits depend on the last token. One rollout at a time."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.logits = 2 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)

    def generate(self, prompts, budget_P, *, seeds_N, params, version=0):
        prompt_N, seed_N = requested_rows(prompts, budget_P, seeds_N)
        rows = [
            self.rollout(prompts[p].token_ids, seed, params, row)
            for row, (p, seed) in enumerate(zip(prompt_N.tolist(), seed_N.tolist(), strict=True))
        ]
        longest = max((len(tokens) for tokens, _ in rows), default=0)
        length_N = torch.tensor([len(tokens) for tokens, _ in rows], dtype=torch.int64)
        return TokenRollouts(
            prompt_N=prompt_N,
            mask_NT=torch.arange(longest) < length_N[:, None],
            logprob_NT=padded([logprobs for _, logprobs in rows], longest, torch.float32),
            version=version,
            token_NT=padded([tokens for tokens, _ in rows], longest, torch.int64),
            truncated_N=torch.tensor([tokens[-1] != EOS for tokens, _ in rows], dtype=torch.bool),
            seed_N=seed_N,
            prompt_ids=tuple(prompt.token_ids for prompt in prompts),
        )

    def rollout(self, prompt, seed, params, row):
        generator = self.generator(seed, row)
        tokens, logprobs, last = [], [], prompt[-1]
        while len(tokens) < params.max_completion_length and last != EOS:
            logits = self.logits[last] / (params.temperature or 1)
            last = self.choose(logits, params, generator)
            tokens.append(last)
            logprobs.append(self.logprob(logits, params, row)[last].item())
        return tokens, logprobs

    def generator(self, seed, row):
        return np.random.default_rng(seed)

    def choose(self, logits, params, generator):
        if params.temperature == 0:
            return int(logits.argmax())
        if params.top_k:
            logits = logits.where(logits >= logits.topk(params.top_k).values[-1], -torch.inf)
        return drawn(logits, generator)

    def logprob(self, logits, params, row):
        return logits.log_softmax(0)

    def load_weights(self, model):
        pass


def drawn(logits, generator):
    p = logits.double().softmax(0).numpy()
    return int(generator.choice(len(p), p=p / p.sum()))


def padded(rows, longest, dtype):
    table = torch.zeros(len(rows), longest, dtype=dtype)
    for row, values in enumerate(rows):
        table[row, : len(values)] = torch.tensor(values, dtype=dtype)
    return table


def changed(rollouts, **changes):
    """Past the checks of the constructor, as a class of one's own might be."""
    for name, value in changes.items():
        object.__setattr__(rollouts, name, value)
    return rollouts


PLAIN = SamplingParams(max_completion_length=12)


@pytest.mark.parametrize(
    "params",
    [
        PLAIN,
        SamplingParams(max_completion_length=12, temperature=0.6),
        SamplingParams(max_completion_length=12, top_k=4),
        SamplingParams(max_completion_length=12, temperature=0),
        SamplingParams(max_completion_length=1),
    ],
)
def test_a_correct_engine_passes(params):
    check_engine(TableEngine(), tiny_prompts(3, 5, 2), params)


class VerdictEngine(TableEngine):
    """Draws whole rollouts and cuts them where a verdict would have ended them."""

    takes_verdicts = True

    def generate(self, prompts, budget_P, *, seeds_N, params, version=0):
        whole = super().generate(prompts, budget_P, seeds_N=seeds_N, params=params, version=version)
        if params.over is None:
            return whole
        cut = [self.cut(whole, row, prompts, params) for row in range(len(whole))]
        length_N = torch.tensor([length for length, _ in cut], dtype=torch.int64)
        mask_NT = torch.arange(whole.mask_NT.shape[1]) < length_N[:, None]
        decided_N = torch.tensor([decided for _, decided in cut], dtype=torch.bool)
        return changed(
            whole,
            mask_NT=mask_NT,
            logprob_NT=torch.where(mask_NT, whole.logprob_NT, 0.0),
            truncated_N=self.truncated(whole.truncated_N, decided_N),
            decided_N=decided_N,
        )

    def cut(self, whole, row, prompts, params):
        prompt = prompts[int(whole.prompt_N[row])]
        tokens = whole.token_NT[row][whole.mask_NT[row]].tolist()
        for at in self.asked_at(len(tokens), params.verdict_every):
            if params.over([prompt], [tokens[:at]])[0]:
                return at, True
        return len(tokens), False

    def asked_at(self, most, every):
        return asked_at(most, every)

    def truncated(self, truncated_N, decided_N):
        return truncated_N & ~decided_N


@pytest.mark.slow
def test_an_engine_that_takes_verdicts_passes():
    check_engine(VerdictEngine(), tiny_prompts(3, 5, 2), PLAIN)
    check_engine(VerdictEngine(), tiny_prompts(3, 5, 2), SamplingParams(max_completion_length=2))


class VerdictsAreForgotten(TableEngine):
    takes_verdicts = True
    says = "decided_N must be set if and only if"


class VerdictsComeLate(VerdictEngine):
    says = "a verdict must end its rollout where it is given"

    def asked_at(self, most, every):
        return asked_at(most, every)[1:]


class VerdictsTruncate(VerdictEngine):
    says = "a rollout that a verdict ended must not be marked as truncated"

    def truncated(self, truncated_N, decided_N):
        return truncated_N | decided_N


class VerdictsMoveTheOthers(VerdictEngine):
    says = "a verdict must end its rollout where it is given"

    def generate(self, prompts, budget_P, *, seeds_N, params, version=0):
        made = super().generate(prompts, budget_P, seeds_N=seeds_N, params=params, version=version)
        if made.decided_N is None or not made.decided_N.any():
            return made
        return changed(made, token_NT=(made.token_NT + 1) % VOCABULARY)


class EveryoneIsDecided(VerdictEngine):
    says = "decided_N must be False for rollouts that `over` never answered True for"

    def generate(self, prompts, budget_P, *, seeds_N, params, version=0):
        made = super().generate(prompts, budget_P, seeds_N=seeds_N, params=params, version=version)
        if made.decided_N is None:
            return made
        return changed(made, decided_N=~made.truncated_N)


# What can go wrong in an engine, each with the words that must say so.


class RowsBySlotThenPrompt(TableEngine):
    says = "rows must be ordered by prompt"

    def generate(self, prompts, budget_P, **kwargs):
        rollouts = super().generate(prompts, budget_P, **kwargs)
        slot_N = torch.cat([torch.arange(n) for n in budget_P.tolist()])
        return rollouts.take(slot_N.argsort(stable=True))


class OneRowPerPrompt(TableEngine):
    says = "rollouts, generate returned"

    def generate(self, prompts, budget_P, *, seeds_N, **kwargs):
        rollouts = super().generate(prompts, budget_P, seeds_N=seeds_N, **kwargs)
        first = (rollouts.prompt_N.diff(prepend=torch.tensor([-1])) != 0).nonzero().flatten()
        return rollouts.take(first)


class LogProbsAtTemperatureOne(TableEngine):
    says = "not drawn as often as their log-probabilities say|add up to"

    def logprob(self, logits, params, row):
        return (logits * params.temperature).log_softmax(0)


class RawLogits(TableEngine):
    says = "must not be above 0|add up to"

    def logprob(self, logits, params, row):
        return logits


class LogProbsOffTheMask(TableEngine):
    says = "exactly 0 wherever mask_NT is False"

    def generate(self, *args, **kwargs):
        rollouts = super().generate(*args, **kwargs)
        padding = ~rollouts.mask_NT
        return changed(rollouts, logprob_NT=rollouts.logprob_NT - 0.5 * padding)


class InfiniteLogProbs(TableEngine):
    says = "must be finite"

    def generate(self, *args, **kwargs):
        rollouts = super().generate(*args, **kwargs)
        return changed(rollouts, logprob_NT=rollouts.logprob_NT / 0)


class LogProbsThatDependOnTheRow(TableEngine):
    says = "must not depend on what is generated beside it"

    def logprob(self, logits, params, row):
        return logits.log_softmax(0) - 0.01 * row


class SeedsIgnored(TableEngine):
    says = "prompt and seed must determine a rollout"
    shared = np.random.default_rng(0)

    def generator(self, seed, row):
        return self.shared


class SeedsByRow(TableEngine):
    says = "prompt and seed must determine a rollout"

    def generator(self, seed, row):
        return super().generator(seed + row, row)


class OneSeedForAll(TableEngine):
    says = "different seeds must give different rollouts"

    def generator(self, seed, row):
        return super().generator(0, row)


class SeedsNotReported(TableEngine):
    says = "seed_N must be the seeds asked for"

    def generate(self, *args, **kwargs):
        rollouts = super().generate(*args, **kwargs)
        return changed(rollouts, seed_N=torch.zeros_like(rollouts.seed_N))


class VersionNotReported(TableEngine):
    says = "version must be passed through: asked with 7, got 0"

    def generate(self, *args, version=0, **kwargs):
        return super().generate(*args, **kwargs)


class AllTruncated(TableEngine):
    says = "truncated_N marks rollouts that the length limit"

    def generate(self, *args, **kwargs):
        rollouts = super().generate(*args, **kwargs)
        return changed(rollouts, truncated_N=torch.ones_like(rollouts.truncated_N))


class OneTokenTooMany(TableEngine):
    says = "must have 1 to max_completion_length=12 tokens"

    def generate(self, *args, params, **kwargs):
        longer = SamplingParams(max_completion_length=params.max_completion_length + 1)
        return super().generate(*args, params=longer, **kwargs)


class LeftPadded(TableEngine):
    says = "True from the first token of a completion to its last"

    def generate(self, *args, **kwargs):
        rollouts = super().generate(*args, **kwargs)
        flipped = {n: getattr(rollouts, n).flip(1) for n in ("mask_NT", "logprob_NT", "token_NT")}
        return changed(rollouts, **flipped)


class OtherPrompts(TableEngine):
    says = "prompt_ids must hold the token ids"

    def generate(self, *args, **kwargs):
        rollouts = super().generate(*args, **kwargs)
        return changed(rollouts, prompt_ids=rollouts.prompt_ids[::-1])


class GreedyThatDraws(TableEngine):
    says = "temperature 0 must always draw the same token"
    temperature = 0.0

    def choose(self, logits, params, generator):
        return drawn(logits, generator)


class RowsForNothing(TableEngine):
    says = "ask for 0 rollouts, generate returned 1"

    def generate(self, prompts, budget_P, *, seeds_N, **kwargs):
        if budget_P.sum() == 0:
            budget_P, seeds_N = [1] + [0] * (len(prompts) - 1), [3]
        return super().generate(prompts, budget_P, seeds_N=seeds_N, **kwargs)


class Dictionary(TableEngine):
    says = "must return TokenRollouts, got dict"

    def generate(self, *args, **kwargs):
        return {}


class WithToolOutput(TableEngine):
    """After the first token stands one that a tool wrote, which the policy reads past."""

    def generate(self, *args, **kwargs):
        rollouts = super().generate(*args, **kwargs)
        if not len(rollouts):
            return rollouts
        with_tool = {}
        for name, value in (("mask_NT", False), ("logprob_NT", 0.0), ("token_NT", 3)):
            column = getattr(rollouts, name)
            tool = torch.full_like(column[:, :1], value)
            with_tool[name] = torch.cat([column[:, :1], tool, column[:, 1:]], dim=1)
        return changed(rollouts, **with_tool)


def test_check_engine_accepts_tokens_of_others_inside_a_row():
    check_engine(WithToolOutput(), tiny_prompts(3, 5, 2), SamplingParams(max_completion_length=6))


KINDS = TableEngine.__subclasses__() + VerdictEngine.__subclasses__()
BROKEN = [engine for engine in KINDS if hasattr(engine, "says")]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda engine: engine.__name__)
def test_check_engine_catches(broken):
    temperature = getattr(broken, "temperature", 0.5)
    params = SamplingParams(max_completion_length=12, temperature=temperature)
    with pytest.raises(AssertionError, match=broken.says):
        check_engine(broken(), tiny_prompts(3, 5, 2), params)


# Engines that record entropies


class WithEntropies(TableEngine):
    def generate(self, *args, params, **kwargs):
        rollouts = super().generate(*args, params=params, **kwargs)
        last_NT = torch.cat([self.last(rollouts), rollouts.token_NT[:, :-1]], dim=1)
        entropy_NT = self.entropies(self.logits[last_NT], params, rollouts)
        return changed(rollouts, entropy_NT=entropy_NT)

    def last(self, rollouts):
        prompts = [rollouts.prompt_ids[p][-1] for p in rollouts.prompt_N.tolist()]
        width = min(1, rollouts.token_NT.shape[1])
        return torch.tensor(prompts, dtype=torch.int64).reshape(-1, 1)[:, :width]

    def entropies(self, logits_NTV, params, rollouts):
        p_NTV = (logits_NTV / (params.temperature or 1)).softmax(-1)
        return torch.special.entr(p_NTV).sum(-1) * rollouts.mask_NT


class NoEntropies(WithEntropies):
    says = "entropy_NT must be set if and only if record_entropy is, which is True"

    def entropies(self, logits_NTV, params, rollouts):
        return None


class EntropiesOffTheMask(WithEntropies):
    says = "entropy_NT must be exactly 0 wherever mask_NT is False"

    def entropies(self, logits_NTV, params, rollouts):
        return super().entropies(logits_NTV, params, rollouts) + 1.0


class NegativeEntropies(WithEntropies):
    says = "entropy_NT must be finite and not negative"

    def entropies(self, logits_NTV, params, rollouts):
        return -super().entropies(logits_NTV, params, rollouts)


class EntropiesOfOneToken(WithEntropies):
    says = "the same prompt must have the same entropy"

    def entropies(self, logits_NTV, params, rollouts):
        return -rollouts.logprob_NT  # of what was drawn, not of the distribution


class EntropiesAfterFilters(WithEntropies):
    says = "over the whole vocabulary at `temperature`, before any filter"

    def entropies(self, logits_NTV, params, rollouts):
        best_NTV = logits_NTV.topk(3).values
        return super().entropies(best_NTV, params, rollouts)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 0.0])
def test_an_engine_that_records_entropies_passes(temperature):
    params = SamplingParams(max_completion_length=12, temperature=temperature, record_entropy=True)
    check_engine(WithEntropies(), tiny_prompts(3, 5, 2), params)


@pytest.mark.parametrize(
    "broken", WithEntropies.__subclasses__(), ids=lambda engine: engine.__name__
)
def test_check_engine_catches_wrong_entropies(broken):
    params = SamplingParams(max_completion_length=12, record_entropy=True)
    with pytest.raises(AssertionError, match=broken.says):
        check_engine(broken(), tiny_prompts(3, 5, 2), params)


def test_entropies_that_nobody_asked_for_are_refused():
    with pytest.raises(AssertionError, match="record_entropy is, which is False"):
        check_engine(WithEntropies(), tiny_prompts(3, 5, 2), PLAIN)


@pytest.mark.slow
def test_frequencies_of_a_correct_engine_rarely_raise_an_alarm():
    # 6 standard errors, at most 40 tokens, 8 tables: about 6e-7 alarms expected.
    for seed in range(8):
        engine = TableEngine()
        generator = torch.Generator().manual_seed(seed)
        engine.logits = 2 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
        check_engine(engine, tiny_prompts(3, 2), SamplingParams(max_completion_length=2))


def test_a_tolerance_lets_low_precision_pass():
    with pytest.raises(AssertionError, match="must not depend on what is generated beside it"):
        check_engine(LogProbsThatDependOnTheRow(), tiny_prompts(3, 5), PLAIN)

    class Noisy(TableEngine):
        def logprob(self, logits, params, row):
            return logits.log_softmax(0) - 1e-3 * (row % 2)

    with pytest.raises(AssertionError, match="above logprob_tolerance"):
        check_engine(Noisy(), tiny_prompts(3, 5), PLAIN)
    check_engine(Noisy(), tiny_prompts(3, 5), PLAIN, logprob_tolerance=1e-2)


def test_prompts_that_test_nothing_are_refused():
    with pytest.raises(ValueError, match="at least 2 prompts of different tokens"):
        check_engine(TableEngine(), tiny_prompts(3), PLAIN)
    certain = TableEngine()
    certain.logits[:, 7] += 100
    with pytest.raises(ValueError, match="tests no seed"):
        check_engine(certain, tiny_prompts(3, 5), PLAIN)


# What is asked for


def test_requested_rows_by_hand():
    prompt_N, seed_N = requested_rows(tiny_prompts(1, 1, 1), [2, 0, 1], [7, 8, 2**62])
    assert prompt_N.tolist() == [0, 0, 2]
    assert seed_N.tolist() == [7, 8, 2**62]
    assert prompt_N.dtype == seed_N.dtype == torch.int64


def test_requests_may_be_numpy_torch_or_lists():
    prompts = tiny_prompts(1, 1)
    for budget, seeds in (
        (np.array([1, 1]), np.array([3, 4])),
        (torch.tensor([1, 1]), torch.tensor([3, 4])),
        ((1, 1), [3, 4]),
    ):
        prompt_N, seed_N = requested_rows(prompts, budget, seeds)
        assert (prompt_N.tolist(), seed_N.tolist()) == ([0, 1], [3, 4])
    assert len(requested_rows(prompts, [0, 0], [])[1]) == 0


@pytest.mark.parametrize(
    ("budget", "seeds", "message"),
    [
        ([1], [3], "budget_P has 1 entries for 2 prompts"),
        ([1, -1], [], r"budget_P must not be negative, got \[1, -1\]"),
        ([1, 2], [3, 4], "seeds_N has 2 entries, but budget_P asks for 3 rollouts"),
        ([1.0, 1.0], [3, 4], "budget_P must be 1-d integers, got torch.float32"),
        ([[1, 1]], [3, 4], r"budget_P must be 1-d integers, got torch.int64 of shape \(1, 2\)"),
        ([1, 1], [3.5, 4.0], "seeds_N must be 1-d integers"),
        ([True, True], [3, 4], "budget_P must be 1-d integers, got torch.bool"),
    ],
)
def test_malformed_requests_are_refused(budget, seeds, message):
    with pytest.raises(ValueError, match=message):
        requested_rows(tiny_prompts(1, 1), budget, seeds)


def test_no_prompt_and_an_empty_prompt_are_refused():
    with pytest.raises(ValueError, match="at least one prompt"):
        requested_rows([], [], [])
    with pytest.raises(ValueError, match="'prompt-1' has no tokens"):
        requested_rows(tiny_prompts(1, 0), [1, 1], [3, 4])


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("max_completion_length", 0, "at least 1, got 0"),
        ("temperature", -1.0, "not below 0, got -1.0"),
        ("temperature", math.nan, "must be finite"),
        ("top_p", 0.0, "above 0 and at most 1, got 0.0"),
        ("top_p", 1.5, "above 0 and at most 1, got 1.5"),
        ("top_k", -1, "0 .off. or positive, got -1"),
        ("min_p", 1.5, "between 0 and 1, got 1.5"),
        ("stop", "END", "tuple of non-empty strings, got 'END'"),
        ("stop", ("",), "tuple of non-empty strings"),
        ("adaptive_temperature", 0.1, "must be an AdaptiveTemperature or None, got 0.1"),
    ],
)
def test_sampling_settings_out_of_range_are_refused(setting, value, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**{"max_completion_length": 4, setting: value})
