"""From settings to the stages of a run: planner, rewards, `Line`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from rl.config.language import RolloutConfig
from rl.config.methods import (
    advantage_after_of,
    advantage_of,
    allocator_of,
    down_sampler_of,
    kl_of,
    loss_columns_of,
    loss_of,
    micro_batches_of,
    reads_success,
    selector_of,
    stopping_of,
    token_selector_of,
)
from rl.logprobs.reference import Reference
from rl.logprobs.scorer import Scorer
from rl.ranks import Ranks
from rl.run.tracking import no_progress_bars
from rl.stages.draw import GroupBuffer
from rl.stages.line import Line, Memory
from rollouts.batch import TokenRollouts
from rollouts.engines.contract import Engine, SamplingParams, num_positions
from rollouts.engines.model_limits import check_prompts, num_embeddings
from rollouts.engines.transformers import TransformersEngine
from rollouts.prompts import Prompt, PromptReport, ensure_pad_token, make_prompts
from rollouts.rewards.classifier import ClassifierReward
from rollouts.rewards.contract import RewardFunction, RewardResult, check_columns, score
from rollouts.rewards.text import load_reward, names_model
from samplers.allocation import Allocator, Scale
from samplers.ledger import Ledger
from samplers.planner import Planner
from samplers.posterior import BetaPosterior
from samplers.refill import Refill

logger = logging.get_logger(__name__)


def make_planner(
    config: RolloutConfig,
    keys: list[str],
    *,
    columns: Callable[[str], list[Any]] | None = None,
    allocate: Allocator | None = None,
    scale: Scale | None = None,
    wrap: Callable[[Allocator], Allocator] = lambda allocator: allocator,
    full_marks: float = 1.0,
    evidence: float = 1.0,
) -> Planner:
    """The planner that `config` describes, over the data set whose prompt keys are `keys`.

    Args:
        config: the settings.
        keys: one key per data-set row.
        columns: a column of the data set by its name, for selectors that need one.
        allocate, scale: an integer solver and a scale of your own, instead of those `config` names.
        wrap: makes of the solver the one to use, for example with budgets in whole branches.
        full_marks: the largest reward there is, if rewards are fractions of one.
        evidence: what a rollout counts as in the posterior.

    Raises:
        ValueError: if a step has more prompts than the data set, or a selector's column is not
            there or not what it needs.
    """
    if len(keys) < config.prompts_per_step:
        raise ValueError(
            f"prompts_per_step={config.prompts_per_step} exceeds the {len(keys)} prompts of the data "
            f"set; write prompts_per_step: {len(keys)} or less"
        )
    posterior = BetaPosterior(
        len(keys),
        decay_chosen=config.posterior_decay_chosen,
        decay_rest=config.posterior_decay_rest,
    )
    named, named_scale = allocator_of(config)
    assert config.budget_min is not None
    stopping = stopping_of(config)
    return Planner(
        posterior,
        selector_of(config, posterior, keys, columns),
        wrap(allocate or named),
        keys=keys,
        prompts_per_step=config.prompts_per_step,
        rollouts_per_step=config.rollouts_per_step,
        scale=scale or named_scale,
        minimum=config.budget_min,
        maximum=config.budget_max,
        pilot=config.pilot_rollouts,
        estimate=config.pilot_estimate,  # type: ignore[arg-type]
        pilots=config.pilot_use,  # type: ignore[arg-type]
        stopping=stopping,
        wave=config.stopping_wave if stopping else None,
        run_seed=config.seed,
        success_above=config.success_above,
        full_marks=full_marks,
        evidence=evidence,
    )


def make_line(
    config: RolloutConfig,
    *,
    prompts: list[Prompt],
    planner: Planner,
    engine: Engine | None,
    model: PreTrainedModel,
    policy: Callable[[], AbstractContextManager[PreTrainedModel]],
    processor: PreTrainedTokenizerBase,
    rewards: list[RewardFunction],
    accelerator: Accelerator,
) -> Line:
    """The line of `config` over these prompts; `config` names its methods, the rest is given.

    Without an engine, the one `config` names: `TransformersEngine` on the training model, or vLLM,
    which gathers sharded weights itself and one by one.

    Raises:
        RewardError: if a reward function needs a column the prompts do not have.
    """
    check_columns(rewards, prompts)
    for reward in rewards:
        if isinstance(reward, ClassifierReward):
            reward.to(accelerator.device)
            reward.chat_template_kwargs |= config.chat_template_kwargs or {}  # type: ignore[arg-type]
    warn_of_rounding(config, model, accelerator)
    tokenizer = processor
    generating = policy
    if engine is None and config.engine == "vllm":
        engine = _vllm(config, model, tokenizer, accelerator)
        generating = lambda: nullcontext(model)  # noqa: E731
    elif engine is None:
        rows = config.generation_batch_size
        engine = TransformersEngine(model, tokenizer, max_batch_rows=rows)
    sampling = SamplingParams(
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        stop=tuple(config.stop or ()),
    )
    micro_batches = micro_batches_of(config)
    memory = Memory()
    return Line(
        prompts=prompts,
        planner=planner,
        engine=engine,
        policy=policy,
        generating=generating,
        sampling=sampling,
        validations={
            "greedy": (1, replace(sampling, temperature=0.0)),
            "sampled": (config.eval_rollouts_per_prompt, sampling),
        },
        tokenizer=tokenizer,
        reward=reward_of(config, rewards, tokenizer, memory),
        advantage=advantage_of(config),
        advantage_after=advantage_after_of(config),
        down_sample=down_sampler_of(config),
        buffer=_buffer(config, planner),
        history=None,
        objective=config.objective or "",
        length_weight=config.length_weight or "",
        decisions=lambda rollouts: rollouts.mask_NT,
        select_tokens=token_selector_of(config),
        reference=Reference(model, accelerator, moves=config.sync_ref_model)
        if config.beta or config.reward_kl
        else None,
        score=Scorer(
            temperature=config.temperature,
            pad_id=_pad_id(tokenizer, model),
            fused=config.fused_logprobs,
            autocast=accelerator.mixed_precision != "no",
        ),
        micro_batches=micro_batches,
        cut=lambda rollouts: [rollouts.take(rows) for rows in micro_batches(rollouts)],
        loss=loss_of(config),
        loss_columns=loss_columns_of(config),
        kl=kl_of(config),
        ledger=Ledger(),
        memory=memory,
        ranks=Ranks(accelerator),
        config=config,
    )


def warn_of_rounding(
    config: RolloutConfig, model: torch.nn.Module, accelerator: Accelerator
) -> None:
    """Say that weights are too coarse for the learning rate: it is lost in most of them.

    An update of Adam is about as large as the learning rate; bfloat16 keeps 8 bits of a weight, so that
    1e-6 is lost in any above 5e-4. DeepSpeed, and FSDP with mixed precision, keep copies in float32.
    """
    plain = accelerator.state.deepspeed_plugin is None
    plain &= not (
        getattr(accelerator.state, "fsdp_plugin", None) and accelerator.mixed_precision != "no"
    )
    if not plain:
        return
    lost, kinds = [], set()
    for weight in model.parameters():
        if weight.requires_grad and weight.numel() and not weight.is_meta:
            some = weight.detach().flatten()[:4096]
            lost.append((some + config.learning_rate == some).float().mean().item())
            kinds |= {str(weight.dtype).removeprefix("torch.")} if lost[-1] > 0.5 else set()
    share = sum(lost) / max(len(lost), 1)
    if share > 0.5:
        logger.warning(
            f"learning_rate={config.learning_rate:g} is less than what {' and '.join(sorted(kinds))} "
            f"can add to {share:.0%} of the weights that train, so that hardly anything will be learnt: "
            "load the model in float32 (dtype: float32) and write bf16: true to compute in half "
            "precision all the same, or train an adapter (use_peft: true)"
        )


def _pad_id(tokenizer: Any, model: Any) -> int:
    """What padding of the update holds: the pad token, or any id if that has no embedding."""
    num_ids = num_embeddings(model)
    pad = tokenizer.pad_token_id
    return pad if num_ids is None or pad < num_ids else 0


def reward_of(
    config: RolloutConfig,
    rewards: list[RewardFunction],
    tokenizer: PreTrainedTokenizerBase,
    memory: Memory,
) -> Callable[..., tuple[list[str], RewardResult]]:
    """`reward(prompts, rollouts, *, max_failed_share) -> (texts, result)`: decode, then score.

    The texts are what was generated, to the space: a tokenizer's `clean_up_tokenization_spaces`, which
    would take spaces before punctuation away, is not applied. Special tokens are left out, or not, by
    `skip_special_tokens`.
    """
    scored = partial(
        score,
        rewards,
        weights=config.reward_weights,
        timeout=config.reward_timeout,
        retries=config.reward_retries,
    )

    def reward(
        prompts: list[Prompt], rollouts: TokenRollouts, *, max_failed_share: float
    ) -> tuple[list[str], RewardResult]:
        pairs = zip(rollouts.token_NT, rollouts.mask_NT, strict=True)
        ids = [token_T[mask_T].tolist() for token_T, mask_T in pairs]
        texts = tokenizer.batch_decode(
            ids,
            skip_special_tokens=config.skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        shared = {"trainer_state": memory.trainer_state}
        result = scored(prompts, texts, ids, max_failed_share=max_failed_share, shared=shared)
        return texts, result

    return reward


def _vllm(config: RolloutConfig, model: Any, tokenizer: Any, accelerator: Accelerator) -> Engine:
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


def warn_of_success(config: RolloutConfig, num_rewards: int) -> None:
    """Warn how success is read where several rewards are added up and a method depends on it."""
    reads = reads_success(config)
    if num_rewards > 1 and reads and config.success_above is None:
        logger.warning(
            f"{', '.join(f'{name}: {value}' for name, value in reads.items())}: success is a rollout's "
            f"share of the largest sum of the {num_rewards} rewards if each lies in [0, 1]; write "
            "success_above for a line of your own"
        )


def column_of(prompts: Sequence[Prompt]) -> Callable[[str], list[Any]]:
    """`column(name)`: one value per prompt; ValueError where a row has none."""

    def column(name: str) -> list[Any]:
        for row, prompt in enumerate(prompts):
            if prompt.columns.get(name) is None:
                known = ", ".join(sorted(prompt.columns)) or "none"
                raise ValueError(
                    f"selection_column {name!r} is missing in row {row} of the data set, whose "
                    f"columns are {known}"
                )
        return [prompt.columns[name] for prompt in prompts]

    return column


def _buffer(config: RolloutConfig, planner: Planner) -> GroupBuffer | None:
    if not config.refill:
        return None
    return GroupBuffer(
        Refill(
            config.prompts_per_step,
            max_drawn=config.refill_max_draws * config.prompts_per_step,
            at_cap=config.refill_at_cap,  # type: ignore[arg-type]
            max_age=config.refill_max_age,
            decide=planner.admit,
        )
    )


def load_policy(
    model: PreTrainedModel | str,
    tokenizer: PreTrainedTokenizerBase | None,
    peft_config: Any = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, loaded in float32 if it is a folder or hub id, and its tokenizer if none is given.

    With `peft_config` it has an adapter, which alone trains. Dropout is off.

    Raises:
        ValueError: if the tokenizer has no pad token, the model does not say where its own is, nothing
            of the model trains, or it has an adapter already and is given another.
    """
    source = model if isinstance(model, str) else model.config._name_or_path
    if tokenizer is None:
        if not source:
            raise ValueError("this model was not loaded from anywhere; give its tokenizer too")
        tokenizer = pretrained(AutoTokenizer, source)
    policy: PreTrainedModel = (
        pretrained(AutoModelForCausalLM, model, dtype=torch.float32)
        if isinstance(model, str)
        else model
    )
    if peft_config is not None:
        policy = _with_adapter(policy, peft_config)
    without_dropout(policy)
    require_trainable(policy)
    return policy, ensure_pad_token(tokenizer)


def pretrained(kind: Any, source: str, *, trust_remote_code: bool = False, **settings: Any) -> Any:
    """`kind.from_pretrained(source)`; without leave, no code of the folder runs and nobody is asked.

    Raises:
        ValueError: saying what to write, if the folder comes with code of its own and that was not
            allowed.
    """
    try:
        # A download shows how far it is; a folder is read in no time.
        with no_progress_bars() if Path(source).is_dir() else nullcontext():
            return kind.from_pretrained(source, trust_remote_code=trust_remote_code, **settings)
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{source} comes with Python code of its own, which was not run. If you trust it, write "
            "trust_remote_code: true in a recipe; in Python, load model and tokenizer by "
            "from_pretrained(..., trust_remote_code=True) and give both"
        ) from None


def _with_adapter(policy: Any, peft_config: Any) -> PreTrainedModel:
    """The model with a new adapter, its own weights frozen."""
    from peft import get_peft_model

    if getattr(policy, "peft_config", None):
        raise ValueError(
            f"the model has adapters already ({', '.join(policy.peft_config)}) and is given a "
            "peft_config: one adapter on top of another could not be loaded again. Leave peft_config "
            "out to go on with the adapter, or give model.merge_and_unload() for a new one"
        )
    if getattr(peft_config, "lora_dropout", 0.0):
        logger.warning(
            f"lora_dropout={peft_config.lora_dropout} is not applied: dropout is off in reinforcement "
            "learning, as it would make noise of every probability ratio"
        )
    return get_peft_model(policy, peft_config)  # type: ignore[return-value]


def require_trainable(policy: torch.nn.Module) -> None:
    """Say before any rollout that nothing would be learnt.

    Raises:
        ValueError: if no weight has `requires_grad`.
    """
    if any(weight.requires_grad for weight in policy.parameters()):
        return
    adapters = getattr(policy, "peft_config", None)
    what = (
        "its adapter was loaded for inference: load it with PeftModel.from_pretrained(model, folder, "
        "is_trainable=True)"
        if adapters
        else "requires_grad is False for all of its weights: call model.requires_grad_(True), or give a "
        "peft_config"
    )
    raise ValueError(f"nothing of the {type(policy).__name__} trains; {what}")


def prompt_maker(
    config: RolloutConfig, tokenizer: PreTrainedTokenizerBase, model: Any
) -> Callable[[Any], tuple[list[Prompt], PromptReport]]:
    """`make(rows) -> (prompts, report)`: `make_prompts` with the lengths and keys of `config`."""
    limits = [num_positions(model)]
    limits += [config.vllm_max_model_length] if config.engine == "vllm" else []

    def make(rows: Any) -> tuple[list[Prompt], PromptReport]:
        if rows is None:
            raise ValueError("train_dataset is missing: give rows with a column 'prompt'")
        prompts, report = make_prompts(
            rows,
            tokenizer,
            max_prompt_length=config.max_prompt_length,
            overlong=config.overlong_prompts,  # type: ignore[arg-type]
            id_column=config.id_column,
            chat_template_kwargs=config.chat_template_kwargs,  # type: ignore[arg-type]
            duplicates=config.duplicates,  # type: ignore[arg-type]
            num_positions=min((n for n in limits if n is not None), default=None),
            max_completion_length=config.max_completion_length,
        )
        check_prompts(model, prompts, max_completion_length=config.max_completion_length)
        return prompts, report

    return make


def load_rewards(
    rewards: RewardFunction | str | Sequence[RewardFunction | str],
    weights: list[float] | None,
    processing_classes: Any = None,
) -> list[RewardFunction]:
    """The reward functions behind names, paths, callables and reward models.

    Args:
        rewards: one or several.
        weights: one per reward, or None.
        processing_classes: the tokenizers of reward models, one per reward (None for other rewards);
            of one reward also alone. Default: those the models were saved with.

    Raises:
        ValueError: if there is none, or `weights` or `processing_classes` has another length.
    """
    rewards = [rewards] if isinstance(rewards, str) or callable(rewards) else list(rewards)
    if not rewards:
        raise ValueError("reward_funcs is empty; name at least one reward function")
    if weights is not None and len(weights) != len(rewards):
        raise ValueError(
            f"reward_weights has {len(weights)} entries for {len(rewards)} reward functions"
        )
    if not isinstance(processing_classes, list | tuple):
        given = processing_classes is not None
        processing_classes = [processing_classes] * (1 if given else len(rewards))
    if len(processing_classes) != len(rewards):
        raise ValueError(
            f"reward_processing_classes has {len(processing_classes)} entries for {len(rewards)} reward "
            "functions; give one each, None where it is no model"
        )
    pairs = zip(rewards, processing_classes, strict=True)
    return [_load_reward(reward, tokenizer) for reward, tokenizer in pairs]


def _load_reward(reward: RewardFunction | str, tokenizer: Any) -> RewardFunction:
    """A reward function; a reward model becomes one."""
    if isinstance(reward, str) and names_model(reward):
        return ClassifierReward.load(reward, tokenizer)
    function = load_reward(reward) if isinstance(reward, str) else reward
    if isinstance(function, torch.nn.Module):
        return ClassifierReward(function, tokenizer)
    return function


def without_dropout(model: torch.nn.Module) -> None:
    """Turn dropout off, LoRA's included, in place: it would make every probability ratio noise.

    That of modules, and rates that modules keep as plain numbers: `attention_dropout`, `layerdrop`,
    `drop_prob`, `resid_pdrop` and whatever else has "drop" in its name. Noise by another name, such as
    that of a router, is found by `fidelity.settle`; its numbers may matter to evaluation too.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name.lower() and isinstance(value, float):
                setattr(module, name, 0.0)


def refuse_overlap(prompts: list[Prompt], held_out: list[Prompt]) -> None:
    """Raise if a prompt is trained on and validated with, by its key or by what the policy reads."""
    keys = {prompt.key for prompt in prompts}
    tokens = {prompt.token_ids for prompt in prompts}
    shared = [p for p in held_out if p.key in keys or p.token_ids in tokens]
    if shared:
        raise ValueError(
            f"{len(shared)} prompts are both in train_dataset and eval_dataset, such as key "
            f"{shared[0].key}; validation must be held out: remove them from one of the two"
        )


@dataclass(frozen=True, kw_only=True)
class PolicyKind:
    """What a trainer does differently for each kind of policy; everything else is shared."""

    load: Callable[..., tuple[Any, Any]]  # (model, processor, peft_config) -> (module, processor)
    load_rewards: Callable[..., list[Any]]  # (names or functions, weights)
    prompt_maker: Callable[..., Callable[[Any], tuple[list[Prompt], PromptReport]]]
    refuse_overlap: Callable[[list[Prompt], list[Prompt]], None]
    make_planner: Callable[..., Planner]
    make_line: Callable[..., Line]
    saves_processor: bool  # with every checkpoint


LANGUAGE = PolicyKind(
    load=load_policy,
    load_rewards=load_rewards,
    prompt_maker=prompt_maker,
    refuse_overlap=refuse_overlap,
    make_planner=make_planner,
    make_line=make_line,
    saves_processor=True,
)
"""Causal language models of transformers."""
