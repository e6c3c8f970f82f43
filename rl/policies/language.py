"""A causal language model as a policy: a decision is a token.

Axes: P prompts, N rollouts, K rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from rl.config.language import RolloutConfig
from rl.logprobs import micro_batches
from rl.logprobs.from_logits import ends, head_inputs
from rl.logprobs.head_gradient import head_gradient_norm
from rl.logprobs.reference import Reference
from rl.logprobs.scorer import Scorer
from rl.objective.hapo import EntropyPivot
from rl.policies.contract import ScoredDecisions, Whole
from rl.policies.loading import warn_of_rounding
from rl.policies.prompt_features import hidden_features
from rollouts.batch import Rollouts, TokenRollouts
from rollouts.engines.contract import (
    Engine,
    GeneratesTogether,
    Rests,
    SamplingParams,
    TakesVerdicts,
)
from rollouts.engines.model_limits import num_embeddings
from rollouts.engines.transformers import TransformersEngine
from rollouts.prompts import Prompt
from rollouts.rewards.classifier import ClassifierReward
from rollouts.rewards.contract import RewardFunction, RewardResult, check_columns, score
from rollouts.rewards.verdicts import Verdicts, decided_of, undecided

logger = logging.get_logger(__name__)


class LanguagePolicy:
    """Generates with an engine, rewards decoded texts, scores tokens. See `contract.Policy`.

    Args:
        config: the settings.
        model: the model that trains, before it is wrapped.
        tokenizer: of the model.
        rewards: the reward functions.
        engine: generates the rollouts. None: the engine that `config` names, on this model.
        whole: opens a context with the unwrapped model and whole weights.
        accelerator: places reward models and the reference.
        prompts: of the data set, whose columns the rewards need.
        trainer_state: returns the state of the trainer, for reward functions that ask for it.

    Raises:
        RewardError: if a reward function needs a column the prompts do not have.
        ValueError: if `beta` or `reward_kl` asks for a reference policy that cannot be had.
    """

    def __init__(
        self,
        config: RolloutConfig,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rewards: list[RewardFunction],
        engine: Engine | None,
        whole: Whole,
        accelerator: Accelerator,
        prompts: list[Prompt],
        trainer_state: Callable[[], Any],
    ) -> None:
        check_columns(rewards, prompts)
        for reward in rewards:
            if isinstance(reward, ClassifierReward):
                reward.to(accelerator.device)
                reward.chat_template_kwargs |= config.chat_template_kwargs or {}  # type: ignore[arg-type]
        warn_of_rounding(config, model, accelerator)
        self._config = config
        self._rewards = rewards
        self._trainer_state = trainer_state
        self.tokenizer = tokenizer
        self.whole = whole
        self.generating: Whole = whole
        """The model as the engine wants it."""
        if engine is None and config.engine == "vllm":
            engine = _vllm(config, model, tokenizer, accelerator)
            self.generating = lambda: nullcontext(model)  # it gathers sharded weights one by one
        elif engine is None:
            rows = config.generation_batch_size
            engine = TransformersEngine(model, tokenizer, max_batch_rows=rows)
        self.engine = engine
        self.verdicts = _verdicts(
            config,
            rewards,
            self.engine,
            self._texts,
            columns=sorted({name for prompt in prompts for name in prompt.columns}),
            says=accelerator.is_main_process,
        )
        """Ends rollouts whose reward is decided, from the second step on; None: finishes them all."""
        self.sampling = SamplingParams(
            max_completion_length=config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            stop=tuple(config.stop or ()),
            over=None if self.verdicts is None else self.verdicts.over,
            verdict_every=config.verdict_every or 1,
        )
        self.validations = {
            "greedy": (1, replace(self.sampling, temperature=0.0)),
            "sampled": (config.eval_rollouts_per_prompt, self.sampling),
        }
        needs_reference = config.beta or config.reward_kl
        self.reference = (
            Reference(model, accelerator, moves=config.sync_ref_model) if needs_reference else None
        )
        self.scorer = Scorer(
            temperature=config.temperature,
            pad_id=_pad_id(tokenizer, model),
            fused=config.fused_logprobs,
            autocast=accelerator.mixed_precision != "no",
            share_prompts=config.share_prompts,
            max_tokens=config.micro_batch_tokens,
        )
        self.pivot: EntropyPivot | None = None
        """Of the last step's entropies, around which the next step's temperature moves."""
        self._loaded_version: int | None = None  # of the weights the engine has

    @property
    def in_eval(self) -> bool:
        """Whether the update runs in evaluation mode, for models that add noise in training mode."""
        return self.scorer.in_eval

    @property
    def generates_with_trained_model(self) -> bool:
        return isinstance(self.engine, TransformersEngine)

    # -- rollouts

    def params(self, version: int) -> SamplingParams:
        """The sampling settings; with `adaptive_temperature_tau`, around the last step's entropies."""
        tau = self._config.adaptive_temperature_tau
        if not tau or self.pivot is None:
            return self.sampling
        signed = self._config.hapo_sign == "signed"
        adaptive = self.pivot.adaptive_temperature(tau, signed=signed)
        return replace(self.sampling, adaptive_temperature=adaptive)

    def rows_together(self, params: SamplingParams) -> int:
        return 1

    def start_seeds(
        self, prompts: list[Prompt], draw_P: np.ndarray, params: SamplingParams
    ) -> None:
        return None

    def generate(
        self,
        prompts: list[Prompt],
        budget_P: np.ndarray,
        *,
        seeds_N: np.ndarray,
        params: SamplingParams,
        version: int,
        start_seeds_P: np.ndarray | None = None,
    ) -> TokenRollouts | None:
        """Rollouts under the weights of `version`; None for a budget of 0. Every rank calls this.

        Before the first optimizer step every rollout is finished, so that `reward` can compare verdicts
        with rewards before any verdict is used.
        """
        if not version:
            params = replace(params, over=None)
        with self.generating() as model:
            self.load_weights(model, version=version)
            if not len(seeds_N) and not self._generates_together:
                return None
            rollouts = self.engine.generate(
                prompts, budget_P, seeds_N=seeds_N, params=params, version=version
            )
        if self.verdicts is not None and rollouts.decided_N is None:
            none_N = torch.zeros(len(rollouts), dtype=torch.bool)
            rollouts = replace(rollouts, decided_N=none_N)
        return rollouts if len(seeds_N) else None

    @property
    def _generates_together(self) -> bool:
        """Whether every rank must call the engine, also for no rows (vLLM over several processes)."""
        return isinstance(self.engine, GeneratesTogether) and self.engine.generates_together

    def load_weights(self, model: Any, *, version: int) -> None:
        """Give the engine the weights of `version`, unless it has them. Every rank calls this."""
        if self._loaded_version != version:
            self.engine.load_weights(model)
            self._loaded_version = version

    def rest(self) -> None:
        """Let the engine free its memory, if it can; it loads the weights before it generates again."""
        if isinstance(self.engine, Rests):
            self.engine.rest()
        self._loaded_version = None

    def reward(
        self, prompts: list[Prompt], rollouts: Rollouts, *, max_failed_share: float
    ) -> tuple[list[str], RewardResult]:
        """Decode the completions and score the texts.

        The texts are what was generated, to the space, with its start in front where it has one: a
        tokenizer's `clean_up_tokenization_spaces`, which would take spaces before punctuation away, is
        not applied. Special tokens are left out, or not, by `skip_special_tokens`. A row that a verdict
        ended has the verdict as its reward.

        Raises:
            RewardError: as `score` does, and if a verdict on a rollout of the first step is wrong.
        """
        assert isinstance(rollouts, TokenRollouts)
        rows = zip(prompts, rollouts.token_NT, rollouts.mask_NT, strict=True)
        ids = [[*p.start_ids, *token_T[mask_T].tolist()] for p, token_T, mask_T in rows]
        texts = self._texts(ids)
        settings: dict[str, Any] = {
            "timeout": self._config.reward_timeout,
            "retries": self._config.reward_retries,
            "max_failed_share": max_failed_share,
            "shared": {"trainer_state": self._trainer_state()},
        }
        if self.verdicts is None:
            weights = self._config.reward_weights
            return texts, score(self._rewards, prompts, texts, ids, weights=weights, **settings)
        result = self.verdicts.score(prompts, texts, ids, rollouts.decided_N, **settings)
        if not rollouts.version:
            self.verdicts.check(prompts, ids, result, every=self.sampling.verdict_every)
        return texts, result

    def _texts(self, ids: list[list[int]]) -> list[str]:
        """Completions as rewards get them."""
        return self.tokenizer.batch_decode(
            ids,
            skip_special_tokens=self._config.skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )

    def prompt_features(self, prompts: list[Prompt]) -> np.ndarray:
        """(P, 2 C) hidden states of prompts under the weights of now. Every rank calls this."""
        with self.whole() as model:
            return hidden_features(model, prompts, pad_id=self.scorer.pad_id)

    # -- learning

    def score(
        self, model: torch.nn.Module, rollouts: Rollouts, *, entropy: bool = False
    ) -> ScoredDecisions:
        """Log-probabilities of the tokens under `model`, and their entropies if asked for."""
        assert isinstance(rollouts, TokenRollouts)
        if not entropy:
            return ScoredDecisions(logprob_NT=self.scorer.logprobs(model, rollouts))
        logprob_NT, entropy_NT = self.scorer.statistics(
            model, rollouts, differentiable=torch.is_grad_enabled()
        )
        return ScoredDecisions(logprob_NT=logprob_NT, entropy_NT=entropy_NT)

    def reference_logprobs(self, model: torch.nn.Module, rollouts: Rollouts) -> Tensor:
        """(N, T) log-probabilities under the reference policy."""
        assert self.reference is not None and isinstance(rollouts, TokenRollouts)
        with self.reference.of(model) as reference:
            return self.scorer.logprobs(reference, rollouts)

    def trainable(self, rollouts: Rollouts) -> Tensor:
        """(N, T) bool: every token the policy drew."""
        return rollouts.mask_NT

    def micro_batches(self, rollouts: Rollouts) -> list[Tensor]:
        """Rows that are scored together, by their number or tokens; siblings together if it pays."""
        assert isinstance(rollouts, TokenRollouts)
        usual = micro_batches_of(self._config, rollouts)
        if self.scorer.width is None or not len(rollouts):
            return usual
        together = micro_batches_of(self._config, rollouts, by_prompt=True)
        if self.scorer.share_prompts == "always":
            return together
        ways = [together, usual]
        return min(
            ways, key=lambda way: sum(self.scorer.cost(rollouts.take(row_B)) for row_B in way)
        )

    def cut(self, rollouts: Rollouts) -> list[Rollouts]:
        """The micro-batches of an update."""
        return [rollouts.take(rows) for rows in self.micro_batches(rollouts)]

    def observe_entropies(self, pivot: EntropyPivot) -> None:
        """Remember the step's entropies for the next step's temperature."""
        self.pivot = pivot

    @torch.no_grad()
    def head_gradient_norms(self, rollouts: TokenRollouts) -> list[float]:
        """Gradient norm at the LM head of each row. Every rank calls this, to gather the head."""
        found: list[float] = []
        with self.whole() as model:
            head = model.get_output_embeddings()
            size = self._config.per_device_train_batch_size
            for start in range(0, len(rollouts), size):
                rows = torch.arange(start, min(start + size, len(rollouts)))
                part = rollouts.take(rows).to(head.weight.device)
                norm_N = head_gradient_norm(
                    head_inputs(
                        model,
                        part,
                        pad_id=self.scorer.pad_id,
                        right_padded=self.scorer.right_padded,
                    ),
                    part.token_NT,
                    part.mask_NT,
                    head.weight,
                    bias_V=head.bias,
                    temperature=self._config.temperature,
                )
                found += norm_N.tolist()
        return found

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The entropies that the next step's temperature depends on."""
        return {"pivot": None if self.pivot is None else self.pivot.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` exactly."""
        pivot = state["pivot"]
        self.pivot = None if pivot is None else EntropyPivot.from_state(pivot)
        self._loaded_version = None


def _pad_id(tokenizer: Any, model: Any) -> int:
    """The token id that pads an update: the pad token, or 0 if the pad token has no embedding."""
    num_ids = num_embeddings(model)
    pad = tokenizer.pad_token_id
    return pad if num_ids is None or pad < num_ids else 0


def _verdicts(
    config: RolloutConfig,
    rewards: list[RewardFunction],
    engine: Engine,
    decode: Callable[[list[list[int]]], list[str]],
    *,
    columns: list[str],
    says: bool,
) -> Verdicts | None:
    """What ends decided rollouts; None, with a warning where some reward could decide, if nothing can.

    Args:
        config: the settings.
        rewards: the reward functions.
        engine: generates the rollouts.
        decode: texts of lists of token ids.
        columns: names of the data set's columns.
        says: whether this process warns.
    """
    if not config.verdict_every or all(decided_of(reward) is None for reward in rewards):
        return None
    why = ""
    if missing := undecided(rewards, config.reward_weights):
        why = f"reward {missing[0]} has a weight and no `decided`"
    elif config.reward_kl:
        why = "reward_kl depends on every token"
    elif not (isinstance(engine, TakesVerdicts) and engine.takes_verdicts):
        why = f"{type(engine).__name__} does not say takes_verdicts = True"
    if not why:
        return Verdicts(
            rewards,
            decode,
            weights=config.reward_weights,
            timeout=config.reward_timeout,
            columns=columns,
        )
    if says:
        logger.warning(
            f"No rollout is ended early by a verdict, because {why} (docs/verdicts.md; verdict_every: 0 "
            "says that this is meant)"
        )
    return None


def _vllm(config: RolloutConfig, model: Any, tokenizer: Any, accelerator: Accelerator) -> Engine:
    """The vLLM engine that `config` describes."""
    from rollouts.engines.vllm import vllm_engine

    return vllm_engine(
        model,
        tokenizer,
        accelerator,
        mode=config.vllm_mode,
        base_url=config.vllm_address,
        server_timeout=config.vllm_server_timeout,
        group_port=config.vllm_group_port,
        tensor_parallel_size=config.vllm_tensor_parallel_size,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        max_model_length=config.vllm_max_model_length,
        enable_sleep_mode=config.vllm_enable_sleep_mode,
        filtered_logprobs=config.old_logprobs == "trainer",
    )


def micro_batches_of(
    config: RolloutConfig, rollouts: TokenRollouts, *, by_prompt: bool = False
) -> list[Tensor]:
    """Cut rows into micro-batches by their number or tokens; with `by_prompt` siblings stay together."""
    length_K, most = ends(rollouts.mask_NT), config.micro_batch_tokens
    if most is None:
        rows = config.per_device_train_batch_size
        if by_prompt:
            return micro_batches.by_prompts(rollouts.prompt_N, length_K, rows)
        return micro_batches.by_rows(length_K, rows)
    prompt_length_K = torch.tensor(
        [len(rollouts.prompt_ids[p]) for p in rollouts.prompt_N.tolist()], dtype=torch.int64
    )
    if by_prompt:
        return micro_batches.by_tokens_of_prompts(
            rollouts.prompt_N, prompt_length_K, length_K, most
        )
    return micro_batches.by_tokens(prompt_length_K, length_K, most)
