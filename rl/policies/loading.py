"""Load a language model, its prompts and its rewards, and warn of what would not train well."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
from rl.config.methods import reads_success
from rollouts.engines.contract import num_positions
from rollouts.engines.model_limits import check_prompts
from rollouts.prompts import Prompt, PromptReport, ensure_pad_token, make_prompts
from rollouts.rewards.classifier import ClassifierReward
from rollouts.rewards.contract import RewardError, RewardFunction, check_columns
from rollouts.rewards.text import load_reward, names_model

logger = logging.get_logger(__name__)


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
    """Refuse, before any rollout, a model of which nothing trains.

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


def language_prompts(
    rows: Any, config: RolloutConfig, tokenizer: PreTrainedTokenizerBase, model: Any
) -> tuple[list[Prompt], PromptReport]:
    """`make_prompts` of data-set rows, with the lengths and keys of `config`, checked for the model."""
    if rows is None:
        raise ValueError("train_dataset is missing: give rows with a column 'prompt'")
    limits = [num_positions(model)]
    limits += [config.vllm_max_model_length] if config.engine == "vllm" else []
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


def check_held_out(
    rewards: list[RewardFunction], prompts: list[Prompt], held_out: list[Prompt]
) -> None:
    """Refuse validation prompts that are trained on, or that lack a column a reward needs.

    Raises:
        ValueError: if a prompt is in both sets.
        RewardError: naming the function and the column.
    """
    refuse_overlap(prompts, held_out)
    try:
        check_columns(rewards, held_out)
    except RewardError as error:
        raise RewardError(f"eval_dataset: {error}") from error


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


def warn_of_success(config: RolloutConfig, num_rewards: int) -> None:
    """Warn how success is read where several rewards are added up and a method depends on it."""
    reads = reads_success(config)
    if num_rewards > 1 and reads and config.success_above is None:
        logger.warning(
            f"{', '.join(f'{name}: {value}' for name, value in reads.items())}: success is a rollout's "
            f"share of the largest sum of the {num_rewards} rewards if each lies in [0, 1]; write "
            "success_above for a line of your own"
        )


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Switch the progress bars of transformers, datasets and diffusers off, and back as they were."""
    import datasets

    bars = [
        (
            logging.is_progress_bar_enabled(),
            logging.disable_progress_bar,
            logging.enable_progress_bar,
        ),
        (
            not datasets.are_progress_bars_disabled(),
            datasets.disable_progress_bars,
            datasets.enable_progress_bars,
        ),
    ]
    if "diffusers" in sys.modules:  # a run of a language model does without it
        from diffusers.utils import logging as of_diffusers

        bars.append(
            (
                of_diffusers.is_progress_bar_enabled(),
                of_diffusers.disable_progress_bar,
                of_diffusers.enable_progress_bar,
            )
        )
    shown = [(switch_off, switch_on) for enabled, switch_off, switch_on in bars if enabled]
    for switch_off, _ in shown:
        switch_off()
    try:
        yield
    finally:
        for _, switch_on in shown:
            switch_on()
