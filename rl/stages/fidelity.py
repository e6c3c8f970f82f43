"""Check that the update sees the probabilities that rollouts were drawn with.

A ratio of the policy to itself is 1 before any update. Where it is not, every advantage is
multiplied by noise, and nothing in the rewards shows it for hundreds of steps. There are two checks:
`settle` compares, before the first rollout, the trainer's log-probabilities with those of a plain
forward pass over each sequence by itself; and `Fidelity.require` compares the log-probabilities of
each step's first update with those the engine recorded.

Axes: N rollouts, T tokens, R rows of the probe.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from rl.config.methods import Settings
from rl.logprobs.from_logits import innermost
from rl.logprobs.scorer import Scorer
from rl.policies.contract import Policy
from rl.policies.language import LanguagePolicy
from rl.ranks import Ranks
from rl.stages.records import Batch
from rollouts.batch import DenoisingRollouts, Rollouts, TokenRollouts
from rollouts.engines.model_limits import ids_of
from rollouts.engines.probes import (
    computes_rounded,
    distance,
    plain_logits,
    rows_of,
    spread_of,
    tolerance,
)
from rollouts.engines.transformers import TransformersEngine

logger = logging.get_logger(__name__)

EXACT, ROUNDED = 1e-3, 0.05
"""Largest mean |log-probability of the trainer - of the engine|, in nats per decision, by default:
where both compute in float32 (seen: 1e-7 to 1e-5; dropout of a tenth: 0.01 to 0.1), and where one does
not. Of a diffusion model, nats per element of a latent. Project defaults."""

CAUSES = (
    "dropout or another noise that is on in training, an adapter or weights that were added or "
    "changed after the engine was made, a model that ignores the attention mask or keeps state outside "
    "its cache, or an engine that computes in another precision"
)


class MismatchError(ValueError):
    """The trainer's probabilities of rollouts are not those they were drawn with."""


class Fidelity:
    """Compares the log-probabilities of the first update with those the engine recorded.

    Args:
        config: the settings.
        policy: whose precision and engine suggest a limit, where `max_mismatch` gives none.
        ranks: the processes.
    """

    def __init__(self, config: Settings, policy: Policy, ranks: Ranks) -> None:
        self._config = config
        self._policy = policy
        self._ranks = ranks
        self._has_warned = False

    def limit(self, model: torch.nn.Module) -> float:
        """Most that `mismatch` may be: `max_mismatch`, or what the precision suggests."""
        if self._config.max_mismatch is not None:
            return self._config.max_mismatch
        rounded = self._ranks.computes_in_half or computes_rounded(model)
        own = self._policy.generates_with_trained_model
        return EXACT if own and not rounded else ROUNDED

    def fresh(self, batch: Batch, rows: Rollouts) -> torch.Tensor | None:
        """(N,) bool: rows drawn at this step; None: all. Groups that waited, and rows that are replayed,
        have an older policy."""
        waits = self._config.refill_max_age or self._config.replay_share
        if not waits or not isinstance(rows, TokenRollouts):
            return None
        seeds = [
            scored.rollouts.seed_N
            for scored in batch.rounds
            if isinstance(scored.rollouts, TokenRollouts)
        ]
        made = torch.cat(seeds) if seeds else torch.zeros(0, dtype=torch.int64)
        return torch.isin(rows.seed_N, made.to(rows.seed_N.device))

    def require(self, model: torch.nn.Module, batch: Batch, sums: dict[str, float]) -> None:
        """Stop before the first update of a step whose rollouts are not the policy's.

        Every rank calls this. Not checked where log-probabilities are meant to differ: under
        `adaptive_temperature_tau` they are recorded at another temperature. With
        `importance_correction`, which is for engines that differ, it is a warning, once.

        Args:
            model: as it is trained.
            batch: what the step trains on.
            sums: `mismatch` and `mismatch_count` of this rank, over the rows of the first update.

        Raises:
            MismatchError: if the mean over all ranks is above `limit`; naming likely causes.
        """
        config, limit = self._config, self.limit(model)
        total = self._ranks.sums(sums)
        if config.adaptive_temperature_tau or not total.get("mismatch_count"):
            return
        found = total["mismatch"] / total["mismatch_count"] / batch.rollouts.elements
        if found <= limit:
            return
        is_latent = isinstance(batch.rollouts, DenoisingRollouts)
        of_what = "element of a latent" if is_latent else "token"
        said = (
            f"the trainer's log-probabilities differ from those the engine recorded by {found:.2g} nats "
            f"per {of_what} before any update, more than max_mismatch={limit:g}. Likely causes: {CAUSES}"
        )
        if config.importance_correction != "none":
            if not self._has_warned:
                logger.warning(
                    f"{said}. importance_correction={config.importance_correction!r} weighs tokens by it"
                )
            self._has_warned = True
            return
        raise MismatchError(
            f"{said}. Nothing was learnt from these rollouts. If the difference is known and small "
            "enough, write importance_correction: token_truncate, or a larger max_mismatch (.inf: no "
            "limit)"
        )


def settle(policy: Policy, ranks: Ranks) -> None:
    """Choose once, before the first rollout, how the trainer runs the model. Every rank calls this.

    In training mode with padding on the left, as fast kernels want it, if that gives the
    log-probabilities of a plain forward pass in evaluation mode over each row by itself; else with
    padding on the right, which a causal model cannot see, or in evaluation mode, which has no noise; or
    both. Rows are those of `rollouts.engines.probes`: some ten short forward passes of random tokens.

    Then whether rollouts of a prompt share one copy of it, if `share_prompts` asks for it.

    Skipped for denoisers, whose replay `Fidelity.require` checks; and where only gathering sharded
    weights for it would make them whole.

    Raises:
        ValueError: if none of the four gives them, with how far off each was.
    """
    if not isinstance(policy, LanguagePolicy) or policy.scorer.is_settled:
        return
    scorer = policy.scorer
    scorer.is_settled = True
    if policy.generating is not policy.whole and ranks.is_sharded:
        if scorer.share_prompts != "never" and ranks.is_main:
            logger.warning(NOT_SHARED.format("the weights are sharded, and vLLM takes them so"))
        return
    found: tuple[dict[str, bool], list[str], int | None] = ({}, [], None)
    error: Exception | None = None
    with policy.whole() as model:
        try:
            if isinstance(policy.engine, TransformersEngine):
                # First, as a model that keeps state in its modules scores otherwise afterwards.
                policy.load_weights(model, version=-1)
                policy.engine.check_model()
            ways, note = _settled(scorer, model, policy.tokenizer)
            scorer.right_padded, scorer.in_eval = ways["right_padded"], ways["in_eval"]
            width, refusal = _shared(scorer, model)
            found = (ways, [said for said in (note, refusal) if said is not None], width)
        except Exception as caught:
            error = caught
    ways, notes, scorer.width = ranks.gather(found, error=error)[0]
    scorer.right_padded, scorer.in_eval = ways["right_padded"], ways["in_eval"]
    for note in notes if ranks.is_main else ():
        logger.warning(note)


NOT_SHARED = (
    "share_prompts has no effect, each rollout is scored with its own copy of the prompt: {}"
)


def _shared(scorer: Scorer, policy: Any) -> tuple[int | None, str | None]:
    """The model's width if its prompts are shared, and why they are not if they should be."""
    if scorer.share_prompts == "never":
        return None, None
    modes = [(module, module.training) for module in policy.modules()]
    try:
        policy.train(not scorer.in_eval)
        reason = scorer.refuses_to_share(policy)
    finally:
        for module, mode in modes:
            module.training = mode
    if reason is not None:
        return None, NOT_SHARED.format(reason)
    return innermost(policy).config.hidden_size, None


def _settled(score: Scorer, policy: Any, tokenizer: Any) -> tuple[dict[str, bool], str | None]:
    """The first way that is right, and what there is to say of it."""
    usual = {"right_padded": False, "in_eval": False}
    rows = rows_of(policy, ids_of(tokenizer))
    if not rows:
        return usual, None
    modes = [(module, module.training) for module in policy.modules()]
    try:
        policy.eval()
        plain = plain_logits(policy, rows)
        if any(logits.isnan().any() for logits in plain):
            return usual, None  # the run's first prompts will be refused for it
        off: dict[str, float] = {}
        for in_eval in (False, True):
            for right_padded in (False, True):
                way = {"right_padded": right_padded, "in_eval": in_eval}
                name = f"{'evaluation' if in_eval else 'training'} mode, "
                name += f"padded {'right' if right_padded else 'left'}"
                policy.train(not in_eval)
                off[name] = _off(score, policy, rows, plain, right_padded=right_padded)
                if off[name] <= tolerance(policy, autocast=score.autocast):
                    note = (
                        None if way == usual else f"the policy is updated in {name}: {_said(off)}"
                    )
                    return way, note
    finally:
        for module, mode in modes:
            module.training = mode
    raise ValueError(
        f"{type(innermost(policy)).__name__} cannot be trained here: its log-probabilities in a "
        f"batch are not those of each row by itself ({_said(off)}, in units of what log-probabilities "
        f"differ by). Likely causes: {CAUSES}"
    )


def _said(off: dict[str, float]) -> str:
    return "; ".join(f"{name}: off by {value:.2g}" for name, value in off.items())


@torch.no_grad()
def _off(
    score: Scorer,
    policy: Any,
    rows: list[tuple[torch.Tensor, torch.Tensor]],
    plain: list[torch.Tensor],
    *,
    right_padded: bool,
) -> float:
    """The distance of a way of scoring from the plain one: the larger of two tries, as noise differs."""
    length = [len(completion) - row % 2 for row, (_, completion) in enumerate(rows)]
    mask_RT = torch.arange(max(length)) < torch.tensor(length)[:, None]
    token_RT = torch.stack([completion for _, completion in rows])[:, : max(length)]
    rollouts = TokenRollouts(
        prompt_N=torch.arange(len(rows)),
        mask_NT=mask_RT,
        logprob_NT=torch.zeros(mask_RT.shape),
        version=0,
        token_NT=token_RT.contiguous(),
        truncated_N=torch.zeros(len(rows), dtype=torch.bool),
        seed_N=torch.arange(len(rows)),
        prompt_ids=tuple(tuple(prompt.tolist()) for prompt, _ in rows),
    ).to(plain[0].device)
    scaled = [logits / score.temperature for logits in plain]
    logprob_RTV = torch.stack([logits[: max(length)].log_softmax(dim=-1) for logits in scaled])
    expected_RT = logprob_RTV.gather(2, rollouts.token_NT[:, :, None])[:, :, 0]
    active_RT = rollouts.mask_NT
    before = score.right_padded, score.pad_id
    # An ordinary token as padding: the pad token's embedding is often 0, and hides what the model sees
    # of it until the update has moved a bias.
    score.right_padded, score.pad_id = right_padded, int(rows[0][0][0])
    try:
        tries = [score.logprobs(policy, rollouts) for _ in range(2)]
    finally:
        score.right_padded, score.pad_id = before
    spread = spread_of(scaled)
    return max(distance(one[active_RT].float(), expected_RT[active_RT], spread) for one in tries)


def to_update(policy: Policy, model: torch.nn.Module) -> None:
    """Training mode, or evaluation mode but for modules that recompute their activations.

    Those look whether they train, and so stay in training mode. What they hold does not, and their own
    dropout is off: `loading.without_dropout` has set their rates to 0, and rates that they read from
    the model's configuration are 0 in a copy of their own.
    """
    model.train()
    if not policy.in_eval:
        return
    whole = innermost(model)
    for module in whole.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))
        config = getattr(module, "config", None)
        if module.training and module is not whole and isinstance(config, PreTrainedConfig):
            rates = [
                n for n, v in vars(config).items() if "drop" in n and isinstance(v, float) and v
            ]
            if rates:
                module.config = copy.copy(config)
                for name in rates:
                    setattr(module.config, name, 0.0)
