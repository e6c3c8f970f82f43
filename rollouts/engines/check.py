"""Test an engine of your own against the engine contract. Run it once, in a test.

Axes: P prompts, N rollouts, T decisions (tokens or denoising steps).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rollouts.batch import DenoisingRollouts, Rollouts, TokenRollouts
from rollouts.engines.contract import Engine, SamplingParams, asked_at
from rollouts.prompts import Prompt
from rollouts.step_plan import StepPlan

Origin = tuple[tuple[int, ...] | str, int]
"""What determines a rollout: its prompt and its seed."""


def check_engine(
    engine: Engine[Any, Any],
    prompts: Sequence[Prompt],
    params: SamplingParams | StepPlan,
    *,
    logprob_tolerance: float = 1e-4,
    same_rollouts: float = 1.0,
) -> None:
    """Test that an engine keeps the contract of `Engine`.

    It draws a few uneven batches (a budget of zero among them) and the same rollouts again in other
    company. Of tokens it also draws a few hundred one-token completions and compares their
    frequencies with their log-probabilities: an engine that reports those of another temperature does
    not pass. Of denoising steps it compares the spread of the log-probabilities of the first step with
    that of the Gaussian they are of: an engine that averages over the elements does not pass. An engine
    that takes starts (`TakesStarts`) is given some, and must draw what follows them. One that takes
    verdicts (`TakesVerdicts`) must end exactly the rollouts that it is told to, and change no other.

    Example::

        check_engine(MyEngine(model), prompts[:3], SamplingParams(max_completion_length=16))
        check_engine(MyDiffusion(pipeline), prompts[:3], StepPlan(num_steps=4, ...))

    Args:
        engine: the engine.
        prompts: at least two, different, and better of different lengths.
        params: how to draw; its type says what kind of rollouts the engine makes. Test with the
            settings you train with; of tokens also once without filters (top_k, top_p, min_p), since
            only then can frequencies be checked. A plan may branch, and must not share its start.
        logprob_tolerance: largest difference between the log-probabilities of one rollout drawn
            in two batches; of a denoising step the difference for each element of a latent. The
            default suits float32; low precision needs 1e-2 to 1e-1.
        same_rollouts: share of repeated rollouts that must come out the same: token for token, or
            with latents closer than 1e-3 of their spread. In low precision the company of a rollout
            moves its logits enough to flip a token now and then, so 1 is for float32.

    Raises:
        AssertionError: if the engine breaks the contract; the message says which part.
        ValueError: if the prompts or the plan cannot put it to the test.
    """
    denoises = isinstance(params, StepPlan)
    if len({_named(prompt, denoises) for prompt in prompts}) < 2:
        raise ValueError(
            f"check_engine needs at least 2 prompts of different "
            f"{'keys' if denoises else 'tokens'}, got {len(prompts)} prompts"
        )
    unit = 1  # rollouts that come together
    if isinstance(params, StepPlan):
        if params.shared_start:
            raise ValueError("check_engine needs a plan with shared_start=False")
        unit = params.leaves_per_root

    def drawn(
        some: Sequence[Prompt],
        budget: list[int],
        seeds: list[int],
        version: int = 0,
        **changes: Any,
    ) -> tuple[Any, list[Origin]]:
        settings = replace(params, **changes)
        rollouts = engine.generate(
            some,
            torch.tensor(budget),
            seeds_N=torch.tensor(seeds, dtype=torch.int64),
            params=settings,
            version=version,
        )
        kind = DenoisingRollouts if denoises else TokenRollouts
        _require(
            isinstance(rollouts, kind),
            f"generate must return {kind.__name__}, got {type(rollouts).__name__}",
        )
        _check_rows(rollouts, some, budget, seeds, version)
        if isinstance(settings, StepPlan):
            _check_denoising(rollouts, settings)
        else:
            _check_tokens(rollouts, some, settings)
        pairs = zip(rollouts.prompt_N.tolist(), rollouts.seed_N.tolist(), strict=True)
        return rollouts, [(_named(some[p], denoises), seed) for p, seed in pairs]

    # Uneven budgets, and large, unordered seeds.
    budget = [unit * (1 + 2 * (p % 2)) for p in range(len(prompts))]
    seeds = [(2**61 - 1) * (i + 3) % (2**63 - 25) for i in range(sum(budget))]
    batch = drawn(prompts, budget, seeds, version=7)

    # The same rollouts in other company: backwards, without the first prompt, beside more.
    slots = list(torch.tensor(seeds).split(budget))
    again_budget = [n + unit for n in budget[:0:-1]] + [0]
    again_seeds = [s for slot in slots[:0:-1] for s in (*slot.tolist(), *range(5, 5 + unit))]
    again = drawn(prompts[::-1], again_budget, again_seeds)
    _check_same_rollouts(batch, again, logprob_tolerance, same_rollouts)
    # And each prompt's first rollout alone.
    for prompt, slot in zip(prompts, slots, strict=True):
        alone = drawn([prompt], [unit], slot[:unit].tolist())
        _check_same_rollouts(batch, alone, logprob_tolerance, same_rollouts)

    if isinstance(params, StepPlan):
        if params.stochastic and params.level > 0:
            num_roots = 64
            many, _ = drawn(prompts[:1], [num_roots * unit], list(range(num_roots * unit)))
            _check_first_densities(many, unit)
        return
    num_draws = 512
    many, _ = drawn(prompts[:1], [num_draws], list(range(num_draws)), max_completion_length=1)
    _check_first_tokens(many, params, logprob_tolerance)

    if getattr(engine, "takes_starts", False):
        _check_starts(engine, prompts, params, batch[0], logprob_tolerance, same_rollouts)

    if getattr(engine, "takes_verdicts", False):
        _check_verdicts(engine, prompts, params, logprob_tolerance, same_rollouts)

    nothing, _ = drawn(prompts, [0] * len(prompts), [])
    _require(len(nothing) == 0, "a request for no rollouts must return a batch without rows")


def _check_starts(
    engine: Engine[Any, Any],
    prompts: Sequence[Prompt],
    params: SamplingParams,
    whole: TokenRollouts,
    tolerance: float,
    share: float,
) -> None:
    """Check that a start of k tokens is a longer prompt, and leaves k tokens less to draw.

    Prompt p starts with the first tokens of its own first rollout: one, two, ... where it has as many,
    so that one call mixes starts of several lengths.
    """
    most = params.max_completion_length
    if most < 2:
        return  # leaves no room for a start
    started, longer = [], []
    for p, prompt in enumerate(prompts):
        row = int((whole.prompt_N == p).nonzero()[0])
        drawn = whole.token_NT[row][whole.mask_NT[row]]
        start = tuple(drawn[: min(1 + p % 3, len(drawn) - 1, most - 1)].tolist())
        started.append(prompt.started(start))
        longer.append(replace(prompt, token_ids=prompt.token_ids + start))
    seeds = list(range(len(prompts)))

    def make(some: Sequence[Prompt], settings: SamplingParams, seeds: list[int]) -> TokenRollouts:
        seeds_N = torch.tensor(seeds, dtype=torch.int64)
        return engine.generate(some, [1] * len(some), seeds_N=seeds_N, params=settings)

    batch = make(started, params, seeds)
    _require(
        batch.prompt_ids == tuple(tuple(prompt.token_ids) for prompt in started),
        "prompt_ids must hold the token ids of the prompts and, after them, of their starts",
    )
    room_N = torch.tensor([most - len(prompt.start_ids) for prompt in started])
    _require(
        (batch.length_N <= room_N).all()
        and (batch.length_N[batch.truncated_N] == room_N[batch.truncated_N]).all(),
        f"a start counts towards max_completion_length={most}: at most {room_N.tolist()} tokens may be "
        f"drawn, got {batch.length_N.tolist()}",
    )
    for p, prompt in enumerate(longer):
        # Stop strings that begin in the start would tell the two apart.
        settings = replace(params, max_completion_length=int(room_N[p]), stop=())
        one = make([started[p]], replace(params, stop=()), seeds[p : p + 1])
        other = make([prompt], settings, seeds[p : p + 1])
        origin: list[Origin] = [(tuple(prompt.token_ids), seeds[p])]
        _check_same_rollouts((one, origin), (other, origin), tolerance, share)


def _check_verdicts(
    engine: Engine[Any, Any],
    prompts: Sequence[Prompt],
    params: SamplingParams,
    tolerance: float,
    share: float,
) -> None:
    """Check that verdicts end the rollouts they are about where they are given, and change no other.

    The rule that ends rollouts here is arbitrary: their tokens add up to a multiple of 3.
    """
    most, each = params.max_completion_length, 4

    def is_over(ids: Sequence[int]) -> bool:
        return sum(ids) % 3 == 0

    def over(some: Sequence[Prompt], ids_N: Sequence[Sequence[int]]) -> list[bool]:
        return [is_over(ids) for ids in ids_N]

    def never(some: Sequence[Prompt], ids_N: Sequence[Sequence[int]]) -> list[bool]:
        return [False] * len(ids_N)

    budget, every = [each] * len(prompts), max(1, min(2, most - 1))
    seeds_N = torch.arange(each * len(prompts))

    def make(function: Any) -> TokenRollouts:
        settings = replace(params, over=function, verdict_every=every)
        return engine.generate(prompts, budget, seeds_N=seeds_N, params=settings)

    whole, ended = make(never), make(over)
    for rollouts in (whole, ended):
        _check_tokens(rollouts, prompts, replace(params, over=over, verdict_every=every))
    assert whole.decided_N is not None and ended.decided_N is not None
    _require(
        not whole.decided_N.any(),
        "decided_N must be False for rollouts that `over` never answered True for",
    )
    same, expected = 0, []
    for row in range(len(whole)):
        tokens = whole.token_NT[row][whole.mask_NT[row]].tolist()
        ends = [at for at in asked_at(len(tokens), every) if is_over(tokens[:at])]
        length = ends[0] if ends else len(tokens)
        expected.append(length)
        found_T = ended.token_NT[row][ended.mask_NT[row]]
        logprob_T = whole.logprob_NT[row, :length]
        same += (
            found_T.tolist() == tokens[:length]
            and bool(ended.decided_N[row]) == bool(ends)
            and bool(ended.truncated_N[row]) == (not ends and bool(whole.truncated_N[row]))
            and bool(((ended.logprob_NT[row, :length] - logprob_T).abs() <= tolerance).all())
        )
    _require(
        same >= share * len(whole),
        f"a verdict must end its rollout where it is given, and change nothing else: of {len(whole)} "
        f"rollouts {same} came out as they must, their lengths being {ended.length_N.tolist()} and not "
        f"{expected}",
    )


def _named(prompt: Prompt, denoises: bool) -> tuple[int, ...] | str:
    return prompt.key if denoises else tuple(prompt.token_ids)


def _require(condition: bool | Tensor, message: str) -> None:
    # Not `assert`, which `python -O` removes.
    if not condition:
        raise AssertionError(message)


def _check_rows(
    rollouts: Any, prompts: Sequence[Prompt], budget: list[int], seeds: list[int], version: int
) -> None:
    """Check what holds for a batch of either kind, whatever was drawn."""
    _require(
        len(rollouts) == sum(budget),
        f"budgets {budget} ask for {sum(budget)} rollouts, generate returned {len(rollouts)}",
    )
    expected = torch.arange(len(prompts)).repeat_interleave(torch.tensor(budget)).tolist()
    _require(
        rollouts.prompt_N.tolist() == expected,
        f"rows must be ordered by prompt with budget_P[p] rows of prompt p: for budgets {budget} "
        f"prompt_N must be {expected}, got {rollouts.prompt_N.tolist()}",
    )
    _require(
        rollouts.seed_N.tolist() == seeds,
        f"seed_N must be the seeds asked for, in order, {seeds[:4]}..., "
        f"got {rollouts.seed_N.tolist()[:4]}...",
    )
    _require(
        rollouts.version == version,
        f"version must be passed through: asked with {version}, got {rollouts.version}",
    )
    _require(
        rollouts.logprob_NT.isfinite().all(),
        "logprob_NT must be finite",
    )
    _require(
        not rollouts.logprob_NT[~rollouts.mask_NT].any(),
        "logprob_NT must be exactly 0 wherever mask_NT is False",
    )


def _check_tokens(
    rollouts: TokenRollouts, prompts: Sequence[Prompt], params: SamplingParams
) -> None:
    """Check what holds for one batch of completions, whatever was drawn."""
    _require(
        rollouts.prompt_ids == tuple(tuple(prompt.token_ids) for prompt in prompts),
        "prompt_ids must hold the token ids of the prompts asked for, in order",
    )
    # Tokens that others wrote (tool output) may lie inside a row: the mask is False there.
    mask_NT, length_N = rollouts.mask_NT, rollouts.length_N
    limit = params.max_completion_length
    _require(
        mask_NT[:, :1].all(),
        "mask_NT must be True from the first token of a completion to its last, but where others "
        f"wrote (tool output): rows {(~mask_NT[:, :1]).any(1).nonzero().flatten().tolist()} begin "
        "with a token that is not the policy's",
    )
    _require(
        (length_N >= 1).all() and (length_N <= limit).all(),
        f"completions must have 1 to max_completion_length={limit} tokens, "
        f"got lengths {length_N.tolist()}",
    )
    decided_N = rollouts.decided_N
    _require(
        (decided_N is not None) == (params.over is not None),
        "decided_N must be set if and only if params.over is",
    )
    _require(
        decided_N is None or not (decided_N & rollouts.truncated_N).any(),
        "a rollout that a verdict ended must not be marked as truncated",
    )
    # Engines may count what others wrote towards the limit.
    end_N = (mask_NT * torch.arange(1, mask_NT.shape[1] + 1)).amax(1) if len(rollouts) else length_N
    _require(
        (end_N[rollouts.truncated_N] >= limit).all(),
        f"truncated_N marks rollouts that the length limit of {limit} ended, but it is True for "
        f"rollouts of lengths {end_N[rollouts.truncated_N].tolist()}",
    )
    logprob_NT = rollouts.logprob_NT
    entropy_NT = rollouts.entropy_NT
    _require(
        (entropy_NT is not None) == params.record_entropy,
        f"entropy_NT must be set if and only if record_entropy is, which is "
        f"{params.record_entropy}",
    )
    if entropy_NT is not None:
        _require(
            entropy_NT.isfinite().all() and (entropy_NT >= -1e-5).all(),
            "entropy_NT must be finite and not negative",
        )
        _require(
            not entropy_NT[~mask_NT].any(),
            "entropy_NT must be exactly 0 wherever mask_NT is False",
        )
    # A certain token has log-probability 0, up to rounding.
    _require(
        (logprob_NT <= 1e-5).all(),
        f"log-probabilities must not be above 0, got {logprob_NT.max() if len(rollouts) else 0}",
    )


def _check_denoising(rollouts: DenoisingRollouts, plan: StepPlan) -> None:
    """Check what holds for one batch of denoising chains, whatever was drawn."""
    tree, node_NS = rollouts.tree, rollouts.node_NS
    _require(tree.plan == plan, f"tree.plan must be the plan asked for, got {tree.plan}")
    quiet_T = torch.ones(plan.num_steps, dtype=torch.bool)
    quiet_T[list(plan.stochastic)] = False
    _require(
        not rollouts.mask_NT[:, quiet_T].any(),
        f"mask_NT must be False on denoising steps that draw no noise: the plan draws it at steps "
        f"{plan.stochastic}",
    )
    _require(
        torch.equal(tree.parent_M[node_NS[:, 1:]], node_NS[:, :-1])
        and (tree.parent_M[node_NS[:, 0]] == -1).all(),
        "node_NS must follow parent_M from a root to the finished sample",
    )
    _require(
        (tree.step_M[node_NS] == torch.arange(plan.num_steps + 1)).all(),
        f"node_NS must hold the states after 0 .. {plan.num_steps} denoising steps, by step_M",
    )
    for step in range(plan.num_steps + 1):
        num_states = len(rollouts) // plan.leaves_per_root * plan.states_at(step)
        _require(
            len(node_NS[:, step].unique()) == num_states,
            f"siblings share their states up to a split, as the plan says: after {step} denoising "
            f"steps there must be {num_states} states, got {len(node_NS[:, step].unique())}",
        )
    _require(tree.latent_M[node_NS[:, -1]].isfinite().all(), "finished latents must be finite")


def _check_same_rollouts(
    batch: tuple[Rollouts, list[Origin]],
    again: tuple[Rollouts, list[Origin]],
    tolerance: float,
    share: float,
) -> None:
    """Check that rollouts of `again` with the prompt and seed of one of `batch` are that one."""
    (first, first_origins), (second, second_origins) = batch, again
    row_by_origin = {origin: row for row, origin in enumerate(first_origins)}
    num_pairs, num_same, worst = 0, 0, 0.0
    for there, origin in enumerate(second_origins):
        here = row_by_origin.get(origin)
        if here is None:
            continue
        num_pairs += 1
        if not _is_same(first, here, second, there):
            continue
        num_same += 1
        one_T = first.logprob_NT[here][first.mask_NT[here]]
        other_T = second.logprob_NT[there][second.mask_NT[there]]
        difference_T = (one_T - other_T).abs()
        worst = max(worst, float(difference_T.max()) if len(difference_T) else 0.0)
    assert num_pairs, "the second batch repeats no rollout of the first"
    _require(
        num_same >= share * num_pairs,
        f"prompt and seed must determine a rollout, whatever is generated beside it: of "
        f"{num_pairs} rollouts drawn again in other company, {num_same} came out the same",
    )
    elements = _elements(first)
    _require(
        worst <= tolerance * elements,
        f"a rollout's log-probabilities must not depend on what is generated beside it: they "
        f"differ by up to {worst:.2g}, above logprob_tolerance={tolerance}"
        + (f" for each of {elements} elements" if elements > 1 else ""),
    )


def _is_same(first: Any, here: int, second: Any, there: int) -> bool:
    """Whether two rows are one rollout."""
    if isinstance(first, DenoisingRollouts):
        one, other = (
            rollouts.tree.latent_M[rollouts.node_NS[row]].double()
            for rollouts, row in ((first, here), (second, there))
        )
        return bool((one - other).abs().max() <= 1e-3 * one.std())
    one, other = first.mask_NT[here], second.mask_NT[there]
    if not torch.equal(first.token_NT[here][one], second.token_NT[there][other]):
        return False
    _require(
        first.truncated_N[here] == second.truncated_N[there],
        "the same rollout is truncated in one batch and not in another",
    )
    return True


def _elements(rollouts: Rollouts) -> int:
    """Values that the log-probability of one decision is a sum over."""
    if isinstance(rollouts, DenoisingRollouts):
        return rollouts.tree.latent_M[0].numel()
    return 1


def _check_first_densities(many: DenoisingRollouts, unit: int) -> None:
    """Check the spread of Gaussian log-densities: with d elements their variance is d / 2.

    -|e|^2 / 2 of d standard normal numbers has mean -d / 2 and variance d / 2, whatever the std of the
    noise, which all roots share.
    """
    step = many.tree.plan.stochastic[0]
    roots = many.logprob_NT[::unit, step]
    if not many.mask_NT[::unit, step].all():
        return  # its std is 0 there
    elements, count = _elements(many), len(roots)
    _require(
        len(roots.unique()) > 1,
        f"different seeds must give different rollouts: {count} seeds all have log-probability "
        f"{float(roots[0]):.6g} at the first denoising step with noise",
    )
    ratio = float(roots.var()) / (elements / 2)
    # Standard error of the logarithm of a sample variance: 2 / (n - 1), and the excess kurtosis
    # 12 / d of a chi-square over n.
    error = (2 / (count - 1) + 12 / elements / count) ** 0.5
    _require(
        abs(math.log(ratio)) <= 6 * error,
        f"log-probabilities must be sums over the {elements} elements of a latent: of {count} seeds "
        f"their variance is {float(roots.var()):.4g} at the first denoising step with noise, expected "
        f"{elements / 2:.4g}",
    )


def _check_first_tokens(many: TokenRollouts, params: SamplingParams, tolerance: float) -> None:
    """Check one-token completions of one prompt: frequencies must agree with probabilities."""
    num_draws = len(many)
    tokens, index_N, count = many.token_NT[:, 0].unique(return_inverse=True, return_counts=True)
    logprob_N = many.logprob_NT[:, 0].double()
    if params.temperature == 0:
        _require(
            len(tokens) == 1,
            f"temperature 0 must always draw the same token, got {tokens.tolist()} for one prompt",
        )
        return

    mean = torch.zeros(len(tokens), dtype=torch.float64).index_add(0, index_N, logprob_N) / count
    spread = float((logprob_N - mean[index_N]).abs().max())
    _require(
        spread <= tolerance,
        f"the same token after the same prompt must have the same log-probability; "
        f"it differs by up to {spread:.2g}, above logprob_tolerance={tolerance}",
    )
    probability = mean.exp()
    if many.entropy_NT is not None:
        _check_first_entropies(many.entropy_NT[:, 0], probability, params, tolerance)
    _require(
        probability.sum() <= 1 + len(tokens) * tolerance,
        f"the probabilities of the different first tokens of one prompt add up to "
        f"{float(probability.sum()):.4g}, above 1",
    )
    filtered = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    filtered = filtered or params.repetition_penalty != 1
    if len(tokens) == 1 and not filtered:
        # How surprising that all draws agree, if each were a draw of its own.
        chance = math.exp((num_draws - 1) * float(mean[0]))
        _require(
            chance > 1e-9,
            f"different seeds must give different rollouts: {num_draws} seeds all drew token "
            f"{int(tokens[0])}, whose probability is {float(probability[0]):.4g}",
        )
        raise ValueError(
            f"the first prompt is followed by one token almost surely (probability "
            f"{float(probability[0]):.6g}), which tests no seed; put another prompt first"
        )
    if filtered:
        return
    # Six standard errors of a binomial count: a correct engine fails about 2e-9 per token.
    error = (num_draws * probability * (1 - probability)).clamp(min=1).sqrt()
    excess = (count - num_draws * probability).abs() / error
    likely = num_draws * probability >= 5
    _require(
        not (excess[likely] > 6).any(),
        f"tokens are not drawn as often as their log-probabilities say: of {num_draws} draws, "
        f"tokens {tokens[likely][excess[likely] > 6].tolist()} came "
        f"{count[likely][excess[likely] > 6].tolist()} times instead of "
        f"{[round(float(x), 1) for x in (num_draws * probability)[likely][excess[likely] > 6]]}",
    )


def _check_first_entropies(
    entropy_N: Tensor, probability: Tensor, params: SamplingParams, tolerance: float
) -> None:
    """Check that entropies of one context agree and reach what the tokens seen add up to."""
    spread = float(entropy_N.max() - entropy_N.min())
    _require(
        spread <= tolerance,
        f"the same prompt must have the same entropy; it differs by up to {spread:.2g}, above "
        f"logprob_tolerance={tolerance}",
    )
    if params.adaptive_temperature is not None:
        return  # probabilities and entropies are of different temperatures
    # No token adds less than 0, so those that were never drawn only add to this.
    least = float(torch.special.entr(probability.clamp(max=1)).sum())
    slack = tolerance * (1 + len(probability))
    _require(
        float(entropy_N.max()) >= least - slack,
        f"entropy_NT must be over the whole vocabulary at `temperature`, before any filter: it is "
        f"{float(entropy_N.max()):.4g} where the tokens seen add up to {least:.4g}",
    )
