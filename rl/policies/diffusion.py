"""A denoiser as a policy: a decision is a denoising step, a rollout one finished sample.

Axes: P prompts, N rollouts (finished samples), T denoising steps.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl.config.diffusion import DenoisingConfig
from rl.objective import denoising_weights
from rl.objective.hapo import EntropyPivot
from rl.policies.contract import ScoredDecisions, Whole
from rl.policies.denoiser import require_adapter
from rollouts.batch import DenoisingRollouts, Rollouts
from rollouts.diffusion.engine import DiffusersEngine
from rollouts.diffusion.sde import step_noise
from rollouts.prompts import Prompt
from rollouts.rewards.contract import RewardResult, name_of
from rollouts.rewards.image import score_images
from rollouts.rewards.verdicts import decided_of
from rollouts.step_plan import StepPlan
from samplers.keys import rollout_seeds


class DiffusionPolicy:
    """Generates with the pipeline, rewards its images, scores steps. See `contract.Policy`.

    Args:
        config: the settings.
        denoiser: the model that trains, before it is wrapped.
        pipeline: of diffusers, around the denoiser.
        rewards: the image rewards.
        engine: around the same pipeline. None: the engine that `config` describes.
        whole: opens a context with the unwrapped model.
        prompts: of the data set, which the engine checks.

    Raises:
        ValueError: if the pipeline cannot be recorded, the plan does not fit its scheduler, or `beta`
            has no reference policy.
    """

    in_eval = False
    generates_with_trained_model = True
    reference = None

    def __init__(
        self,
        config: DenoisingConfig,
        *,
        denoiser: torch.nn.Module,
        pipeline: Any,
        rewards: list[Any],
        engine: DiffusersEngine | None,
        whole: Whole,
        prompts: list[Prompt],
    ) -> None:
        if config.beta:
            require_adapter(denoiser)
        if config.activation_checkpointing:  # diffusers' own; the base class asks by another name
            if config.activation_checkpointing_kwargs:
                raise ValueError(
                    f"activation_checkpointing_kwargs={config.activation_checkpointing_kwargs} is for "
                    "language models: a denoiser recomputes the blocks that diffusers chose; leave it "
                    "out"
                )
            denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
            config.activation_checkpointing = False
        if deciding := [name_of(r) for r in rewards if decided_of(r) is not None]:
            raise ValueError(
                f"reward {deciding[0]} has a `decided`, which ends unfinished completions of language "
                "models; a sample has no reward before its last denoising step: leave it out"
            )
        if engine is None:
            engine = DiffusersEngine(pipeline, **config.engine_settings())
        record_used(config, engine)
        self._config = config
        self._denoiser = denoiser
        self._rewards = rewards
        self.engine = engine
        self.whole = whole
        self.validations = validations_of(config)
        plans = [plan for _, plan in self.validations.values()]
        engine.check(prompts, [*config.step_plans(), *plans])

    # -- rollouts

    def params(self, version: int) -> StepPlan:
        """The denoising chain of training step `version`."""
        return self._config.step_plan(version)

    def rows_together(self, params: StepPlan) -> int:
        return params.leaves_per_root

    def start_seeds(
        self, prompts: list[Prompt], draw_P: np.ndarray, params: StepPlan
    ) -> np.ndarray | None:
        """(P,) seed of the first rollout of each draw, equal in all its rounds; None if not shared."""
        if not params.shared_start:
            return None
        pairs = zip(prompts, draw_P.tolist(), strict=True)
        seed = self._config.seed
        return np.concatenate(
            [rollout_seeds(seed, prompt.key, draw, [0]) for prompt, draw in pairs]
        )

    def generate(
        self,
        prompts: list[Prompt],
        budget_P: np.ndarray,
        *,
        seeds_N: np.ndarray,
        params: StepPlan,
        version: int,
        start_seeds_P: np.ndarray | None = None,
    ) -> DenoisingRollouts | None:
        """Samples under the current weights; None for a budget of 0."""
        if not len(seeds_N):
            return None
        self.engine.load_weights(self._denoiser)
        return self.engine.generate(
            prompts,
            budget_P,
            seeds_N=seeds_N,
            params=params,
            version=version,
            start_seeds_P=start_seeds_P,
        )

    def rest(self) -> None:
        """Nothing to free: the pipeline runs the model that trains."""

    def reward(
        self, prompts: list[Prompt], rollouts: Rollouts, *, max_failed_share: float
    ) -> tuple[list[np.ndarray], RewardResult]:
        """Decode the latents and score the images."""
        assert isinstance(rollouts, DenoisingRollouts)
        _require_finite(rollouts, prompts)
        image_NHWC = self.engine.decode(rollouts)
        result, _ = score_images(
            self._rewards,
            image_NHWC,
            [str(prompt.prompt) for prompt in prompts],
            [dict(prompt.columns) for prompt in prompts],
            weights=self._config.reward_weights,
            timeout=self._config.reward_timeout,
            retries=self._config.reward_retries,
            max_failed_share=max_failed_share,
        )
        return list(image_NHWC), result

    # -- learning

    def score(
        self, model: torch.nn.Module, rollouts: Rollouts, *, entropy: bool = False
    ) -> ScoredDecisions:
        """Log-probabilities of the steps that have weight and, with `beta`, their KL to the reference.

        Raises:
            TypeError: if entropies are asked for: that of a step is a constant of its noise.
        """
        assert isinstance(rollouts, DenoisingRollouts)
        if entropy:
            raise TypeError("a denoising step has no entropy to be recomputed")
        if not self._config.beta:
            return ScoredDecisions(logprob_NT=self.engine.logprobs(rollouts))
        logprob_NT, kl_NT = self.engine.logprobs_and_kl(rollouts)
        return ScoredDecisions(logprob_NT=logprob_NT, kl_NT=kl_NT)

    def reference_logprobs(self, model: torch.nn.Module, rollouts: Rollouts) -> Tensor:
        """Not needed: the KL of a denoising step is exact and comes with its score."""
        raise TypeError("the KL of a denoising step comes with its score")

    def trainable(self, rollouts: Rollouts) -> Tensor:
        """(N, T) weights of the steps that train: 1, or scaled by their noise or by distinct edges."""
        assert isinstance(rollouts, DenoisingRollouts)
        return decision_weights(self._config, rollouts)

    def micro_batches(self, rollouts: Rollouts) -> list[Tensor]:
        return [torch.arange(len(rollouts))]

    def cut(self, rollouts: Rollouts) -> list[Rollouts]:
        """The micro-batches of an update: one denoising step each, a bounded number of latents."""
        assert isinstance(rollouts, DenoisingRollouts)
        return list(cut(rollouts, states=self._config.per_device_train_batch_size))

    def observe_entropies(self, pivot: EntropyPivot) -> None:
        raise TypeError("a denoising step has no entropy")

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the chain of a step depends on its number alone."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""


def decision_weights(config: DenoisingConfig, rollouts: DenoisingRollouts) -> Tensor:
    """(N, T) weights of the steps that train: 1, or scaled by their noise or by distinct edges."""
    plan, one_N = rollouts.tree.plan, torch.ones(len(rollouts), dtype=torch.float64)
    weight_NT = denoising_weights.trained_steps(one_N, rollouts.mask_NT, plan.trained)
    if config.edge_weight == "once":
        distinct_T = torch.tensor([plan.states_at(step + 1) for step in range(plan.num_steps)])
        weight_NT = denoising_weights.once_per_edge(weight_NT, distinct_T, steps=plan.trained)
    if config.noise_weight == "none":
        return weight_NT
    # Of the whole chain but its last edge: a plan of one trained edge would have factor 1.
    std_T, _ = step_noise(rollouts.tree.levels, rule=plan.rule, level=plan.level)
    edges = range(max(plan.num_steps - 1, 1))
    return denoising_weights.noise_weighted(weight_NT, std_T, edges=edges)


def cut(rollouts: DenoisingRollouts, *, states: int) -> list[DenoisingRollouts]:
    """Micro-batches of one denoising step and at most `states` distinct latents before it.

    A row takes part once for each step it trains; its weight elsewhere is 0. Only so does the graph of
    one step at a time have to be kept.
    """
    assert rollouts.weight_NT is not None
    parts: list[DenoisingRollouts] = []
    for step in (rollouts.weight_NT != 0).any(dim=0).nonzero().flatten().tolist():
        only_T = torch.zeros(rollouts.mask_NT.shape[1], dtype=torch.bool)
        only_T[step] = True
        row_K = (rollouts.weight_NT[:, step] != 0).nonzero().flatten()
        place_K = rollouts.node_NS[row_K, step].unique(return_inverse=True)[1] // states
        for number in range(int(place_K.max()) + 1):
            rows = rollouts.take(row_K[place_K == number])
            assert rows.weight_NT is not None
            parts.append(replace(rows, weight_NT=torch.where(only_T, rows.weight_NT, 0.0)))
    return parts


def validations_of(config: DenoisingConfig) -> dict[str, tuple[int, StepPlan]]:
    """Samples of each held-out prompt: with the noise of training, and without any.

    A schedule that moves its noise along the chain has it on all edges where it ever is, so that the
    figures of all training steps are of one way to sample; with other `validation_steps` all edges do.
    """
    plan = config.step_plan(0)
    steps = config.validation_steps or plan.num_steps
    ever = {edge for each in config.step_plans() for edge in each.stochastic}
    stochastic = tuple(sorted(ever)) if steps == plan.num_steps else tuple(range(steps))
    noisy = StepPlan(num_steps=steps, rule=plan.rule, level=plan.level, stochastic=stochastic)
    still = StepPlan(num_steps=steps, rule=plan.rule, level=0.0, stochastic=())
    count = config.eval_rollouts_per_prompt
    return {"deterministic": (count, still), "sampled": (count, noisy)}


def _require_finite(rollouts: DenoisingRollouts, prompts: list[Prompt]) -> None:
    """Raise FloatingPointError before a sample that is NaN becomes an image."""
    sample_N = rollouts.tree.latent_M[rollouts.node_NS[:, -1]]
    finite_N = sample_N.isfinite().flatten(1).all(dim=1)
    if not finite_N.all():
        row = int((~finite_N).nonzero()[0])
        raise FloatingPointError(
            f"{int((~finite_N).sum())} samples are NaN or infinite, first of prompt "
            f"{prompts[row].key}; lower learning_rate or max_grad_norm, and check the model's dtype"
        )


def record_used(config: DenoisingConfig, engine: DiffusersEngine) -> None:
    """Write into the settings what the engine is run with; warn of a setting that it overrules.

    An engine of the caller's own has its own guidance and size; the settings are what `run.json`
    shows and what a resumed run is compared with.
    """
    for name, used in engine.used.items():
        said = getattr(config, name)
        if used == said:
            continue
        if said is not None:
            what = f"{name}: {said} of the settings"
            why = (
                "is not read by this model"
                if used is None
                else f"is not that of the engine that was given, which has {used}"
            )
            warnings.warn(f"{what} {why}; {used} is used and recorded", stacklevel=2)
        setattr(config, name, used)
