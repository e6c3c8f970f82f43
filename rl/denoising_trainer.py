"""DenoisingTrainer: `RolloutTrainer` for diffusion models, with pictures and an average of weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import TrainerCallback

from rl.config.diffusion import DenoisingConfig
from rl.policies.denoiser import image_prompts, load_denoiser, load_image_rewards, save_lora
from rl.policies.diffusion import DiffusionPolicy
from rl.policies.pipeline import place, read_pipeline, set_scheduler
from rl.ranks import Ranks
from rl.run import tracking
from rl.run.changed_settings import refuse_decisive
from rl.run.end import EvaluationBudget
from rl.run.pictures import diversity, save_grid, thinned
from rl.stages.denoising_objective import denoising_objective_of
from rl.stages.objective import Objective
from rl.stages.planning import make_denoising_planner
from rl.stages.records import Batch, Scored
from rl.stages.validate import evaluate
from rl.trainer import RolloutTrainer
from rollouts.prompts import Prompt, PromptReport
from samplers.planner import Planner


class DenoisingTrainer(RolloutTrainer):
    """Trains the denoiser of a text-to-image pipeline of diffusers on samples that its rewards like.

    Args:
        model: a pipeline, which is moved to the device of the run, or a folder or hub id to read one
            from, in float32 and without its safety checker. A scheduler that the rule cannot use
            is replaced where no engine is given, as by recipes/train.py.
        reward_funcs: one or several: image rewards, their names, or `path/to/file.py:function`.
        args: the settings.
        train_dataset: rows with a text `prompt`; other columns go to the rewards as metadata.
        eval_dataset: rows of the same form, which may be those of training, or None.
        peft_config: a LoraConfig for the denoiser, or its arguments, which then alone trains; on the
            attention if it names no modules. Without it a LoRA that the pipeline has loaded does.
        engine: a `DiffusersEngine` of your own around the same pipeline.

    The rest is as for `RolloutTrainer`. `save_model` writes the whole pipeline.
    """

    args: DenoisingConfig  # type: ignore[assignment]
    policy: DiffusionPolicy  # type: ignore[assignment]
    saves_processor = False

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: DenoisingConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        assert isinstance(args.plan, dict)
        rule = args.plan["rule"]
        if isinstance(model, str | Path):
            model = read_pipeline(str(model), rule=rule, device=args.device)
        else:
            place(model, args.device)
            if kwargs.get("engine") is None:
                set_scheduler(model, rule)
        device = args.reward_device or args.device
        reward_funcs = load_image_rewards(reward_funcs, args.reward_weights, device=device)
        settings: Any = args  # a sibling of RolloutConfig
        super().__init__(model, reward_funcs, settings, train_dataset, eval_dataset, **kwargs)
        self.evaluations = 0
        """Of the denoiser for training rollouts so far, in rows; a guidance pair is one."""
        _warn_of_missing_columns(self.prompts, self.eval_prompts)
        if self.eval_prompts:
            self.policy.engine.check(self.eval_prompts, [])
        self.pipeline = self.policy.engine.pipeline
        if (most := self.args.max_evaluations) is not None:
            budget = EvaluationBudget(lambda: self.evaluations, most, setting="max_evaluations")
            self.add_callback(budget)
            self.progress.count(budget, "evaluations")
        self._average: EMAModel | None = None
        if self.args.ema_decay:
            self._average = EMAModel(self._trained(), decay=self.args.ema_decay)
            self.add_callback(_Average(self))

    # -- what differs from language models

    def _load(self, model: Any, processor: Any, peft_config: Any) -> tuple[Any, Any]:
        return load_denoiser(model, processor, peft_config)

    def _load_rewards(self, rewards: Any, weights: list[float] | None, *_: Any) -> list[Any]:
        return load_image_rewards(rewards, weights)

    def _prompts_of(
        self, rows: Any, *, args: Any, processor: Any, model: Any
    ) -> tuple[list[Prompt], PromptReport]:
        return image_prompts(rows, args)

    def _check_held_out(
        self, rewards: list[Any], prompts: list[Prompt], held_out: list[Prompt]
    ) -> None:
        """Validation on training prompts is allowed: no sample is an answer to be memorised."""

    def _make_starts(self, model: Any, processor: Any) -> None:
        return None  # where a chain branches is a setting of its plan

    def _make_planner(self, keys: list[str], **given: Any) -> Planner:
        return make_denoising_planner(self.args, keys, **given)

    def _make_policy(
        self, model: Any, processor: Any, rewards: list[Any], engine: Any
    ) -> DiffusionPolicy:
        return DiffusionPolicy(
            self.args,
            denoiser=model,
            pipeline=processor,
            rewards=rewards,
            engine=engine,
            whole=self._whole,
            prompts=self.prompts,
        )

    def _make_ranks(self) -> Ranks:
        return Ranks(self.accelerator, by_hand=True)

    def _make_objective(self, **own: Any) -> Objective:
        return denoising_objective_of(self.args, self.prompts, **own)

    def _trained(self) -> list[torch.nn.Parameter]:
        assert self.model is not None
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place of those that train, where an average is kept."""
        if self._average is None:
            yield
            return
        weights = self._trained()
        self._average.store(weights)
        self._average.copy_to(weights)
        try:
            yield
        finally:
            self._average.restore(weights)

    # -- logging and validation

    def _close(self, batch: Batch, learned: dict[str, float]) -> None:
        plan = self.args.step_plan(self.state.global_step)
        for visit in batch.visits:
            for proposal in visit.proposals:
                roots = int(proposal.budget_P.sum()) // plan.leaves_per_root
                self.evaluations += plan.evaluations(roots)
        super()._close(batch, learned)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what generation has cost so far."""
        if self.steps_since_log and "learning_rate" in logs:
            logs["denoiser_evaluations"] = float(self.evaluations)
        super().log(logs, start_time)

    def show(self, batch: Batch, *, step: int) -> None:
        """A picture of the step's samples: a row for each prompt, siblings side by side.

        How unlike each other they are is logged at every step.
        """
        self.steps_since_log[-1] |= diversity_of(batch)
        every = self.args.images_every
        if not batch.visits or not every or (step > 1 and step % every):
            return
        visit = batch.visits[0]
        save_grid(
            Path(str(self.args.output_dir)) / "images" / f"train-{step:06d}.png",
            [str(prompt.prompt) for prompt in visit.prompts],
            visit.rounds[0],
        )

    def validate(self, prompts: list[Prompt], *, name: str = "") -> dict[str, float]:
        """Rewards of samples with the noise of training and without any, and pictures of them."""
        step, folder = self.state.global_step, Path(str(self.args.output_dir)) / "images"
        data_set = f"{name}-" if name else ""

        def seen(name: str, scored: Scored) -> dict[str, float]:
            texts = [str(prompt.prompt) for prompt in prompts]
            if self.ranks.is_main:
                save_grid(folder / f"{data_set}{name}-{step:06d}.png", texts, scored)
            found = diversity(thinned(scored.shown_N), scored.rollouts.prompt_N.numpy())
            extra = {} if name == "sampled" else {f"{name}_reward": float(scored.reward_N.mean())}
            return extra | {f"{name}_diversity": found}

        with self.averaged():
            found = evaluate(self.sampling, self.policy, prompts, version=step, seen=seen)
        return found | {"denoiser_evaluations": float(self.evaluations)}

    # -- checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The pipeline, as diffusers saves it; inside a checkpoint the denoiser's weights alone.

        A trained adapter is added to the weights, so that the pipeline is loaded as any other, and
        written apart, in the folder `lora`, for the pipeline it was trained on:

            pipeline.load_lora_weights("final/lora", weight_name="pytorch_lora_weights.safetensors")
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        if self.ranks.is_main:
            folder: str = output_dir or str(self.args.output_dir)
            denoiser: Any = self.policy.engine.denoiser
            with tracking.no_progress_bars(), self.averaged():
                with adapter_added(denoiser):
                    self.pipeline.save_pretrained(folder)
                if getattr(denoiser, "peft_config", None):
                    save_lora(self.pipeline, denoiser, Path(folder) / "lora")

    def _run_state(self) -> dict[str, Any]:
        state = super()._run_state() | {"evaluations": self.evaluations}
        if self._average is not None:
            shadow = [weight.cpu().numpy() for weight in self._average.shadow_params]
            state["average"] = {
                "steps": self._average.optimization_step,
                "weights": {str(i): weight for i, weight in enumerate(shadow)},
            }
        return state

    def _load_state(self, state: dict[str, Any], folder: str) -> int:
        refuse_decisive(self, state["settings"], folder)
        if (self._average is not None) != ("average" in state):
            had = "with" if "average" in state else "without"
            raise ValueError(
                f"{folder} was made {had} an average of weights, this run has ema_decay="
                f"{self.args.ema_decay}; write the value it had, or another output_dir"
            )
        if self._average is not None:
            average = state["average"]
            self._average.optimization_step = average["steps"]
            for i, weight in enumerate(self._average.shadow_params):
                weight.copy_(torch.as_tensor(average["weights"][str(i)]))
        self.evaluations = state["evaluations"]
        return super()._load_state(state, folder)


def _warn_of_missing_columns(prompts: list[Prompt], held_out: list[Prompt]) -> None:
    """Warn if rewards get columns in training that they do not get in validation."""
    columns = {name for prompt in prompts for name in prompt.columns}
    lacking = sorted(columns - {name for prompt in held_out for name in prompt.columns})
    if held_out and lacking:
        warnings.warn(
            f"eval_dataset has no column {', '.join(lacking)}, which train_dataset has: a reward that "
            "reads it fails at the first validation",
            stacklevel=3,
        )


def diversity_of(batch: Batch) -> dict[str, float]:
    """How unlike each other a step's samples of one prompt are; nothing if no prompt has two."""
    found = []
    for scored in batch.rounds:
        prompt_N = scored.rollouts.prompt_N.numpy()
        if len(prompt_N) > len(np.unique(prompt_N)):
            found.append(diversity(thinned(scored.shown_N), prompt_N))
    return {"diversity": float(np.mean(found))} if found else {}


@contextmanager
def adapter_added(denoiser: torch.nn.Module) -> Iterator[None]:
    """In this block `state_dict` is that of the denoiser without an adapter that does the same.

    An adapter renames the weights it adapts, and diffusers would draw them anew when it loads them.
    """

    def add(_: Any, state: dict[str, torch.Tensor], *__: Any) -> None:
        adapted: dict[str, dict[str, torch.Tensor]] = {}
        for name, module in denoiser.named_modules():
            if isinstance(module, BaseTunerLayer):
                merged = copy.deepcopy(module)
                merged.merge()
                adapted[f"{name}."] = merged.get_base_layer().state_dict()
        for name in list(state):
            if name.startswith(tuple(adapted)):
                del state[name]
        for name, weights in adapted.items():
            state.update({f"{name}{leaf}": weight for leaf, weight in weights.items()})

    handle = denoiser.register_state_dict_post_hook(add)
    try:
        yield
    finally:
        handle.remove()


class _Average(TrainerCallback):
    """Moves the average after every optimizer step of the trainer's."""

    def __init__(self, trainer: DenoisingTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, *_: Any, **__: Any) -> None:
        average = self._trainer._average
        assert average is not None
        average.step(self._trainer._trained())
