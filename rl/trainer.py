"""RolloutTrainer: `transformers.Trainer` whose training step is collect + update.

Everything around a step stays the base class's: optimizers, schedules, clipping, logging, callbacks,
trackers, hub, LoRA, precision, DDP, DeepSpeed. GRPO and RAFT are presets of `RolloutConfig`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging

from rl.config.language import RolloutConfig
from rl.config.own import choice
from rl.logprobs.reference import Follow
from rl.policies import loading
from rl.policies.contract import Policy
from rl.policies.language import LanguagePolicy
from rl.ranks import Ranks
from rl.run import checkpoint, completions, failing, schedule, tracking
from rl.run.changed_settings import Compared, compare, refuse_decisive, refuse_other_optimizer
from rl.run.end import (
    Budget,
    EmptySteps,
    NoSignalError,
    no_signal,
    no_step_if_spent,
    num_steps,
    spent_budgets,
)
from rl.run.origins import DECIDED, adapter_settings, origins, own_functions
from rl.run.progress import ProgressLine
from rl.run.termination import Terminated, Termination
from rl.run.tracker_runs import TrackerRuns
from rl.stages import fidelity, metrics
from rl.stages.draw import Sampling
from rl.stages.objective import Advantage, Loss, Objective, objective_of
from rl.stages.planning import check_takes_starts, column_of, make_planner, make_starts
from rl.stages.prepare import prepare
from rl.stages.prompt_features import prompt_features
from rl.stages.records import Batch, Scored
from rl.stages.replay import make_replay
from rl.stages.validate import check_best_metric, evaluate
from rl.step import collect, mini_batches, update
from rollouts.engines.contract import Engine, end_of_sequence_ids
from rollouts.prompts import Prompt, PromptReport
from rollouts.rewards.contract import RewardFunction
from samplers.allocation import Allocator
from samplers.planner import Planner
from samplers.posterior import BetaPosterior
from samplers.selection import Selector
from samplers.starts import Starts
from samplers.success import full_marks

__all__ = ["NoSignalError", "RolloutTrainer"]

logger = logging.get_logger(__name__)


class RolloutTrainer(Trainer):
    """Trains a causal language model on rollouts that go where they carry gradient.

    Args:
        model: a model, or a folder or hub id to load one from.
        reward_funcs: one or several: functions of TRL's signature, `async def` too, names of built-in
            rewards, `path/to/file.py:function`, or reward models: classifiers of one output, as
            modules or as the folders or hub ids to load them from.
        args: the settings.
        train_dataset: rows with a `prompt` (text or messages); other columns go to the rewards.
        eval_dataset: held-out rows of the same form, or None; a dict of several such sets by name is
            validated set by set, its metrics being `eval_NAME_...`.
        processing_class: the tokenizer. Default: the model's.
        peft_config: trains an adapter instead of the weights.
        planner: `planner(keys) -> Planner` to use instead of the one `args` describes.
        engine: an engine of your own. Default: `TransformersEngine` on the training model.
        reward_processing_classes: the tokenizers of reward models, one per reward. Default: those the
            models were saved with.
        advantage: a function of your own instead of the one `args` names:
            `advantage(reward_N, prompt_N, **columns) -> (N,) or (N, T)`, for full groups, with further
            columns of `Rollouts` by the names of its parameters.
        loss: a function of your own: `loss(logprob_NT, old_logprob_NT, advantage, weight_NT, *,
            denominator, **columns)` returns a scalar, divided by `denominator` and by nothing else, and
            a dict of summed statistics.
        selector: a `Selector` of your own, or `make(posterior, keys)` that returns one.
        allocate: an `Allocator` of your own.

    Raises:
        ValueError: for anything wrong with settings or data, before any training.
    """

    args: RolloutConfig
    policy: Policy
    objective: Objective
    loss_is_scaled_for_ga = True  # the denominators are ours
    saves_processor = True
    """Whether the processing class is saved with every checkpoint."""

    def __init__(
        self,
        model: PreTrainedModel | str,
        reward_funcs: RewardFunction | str | Sequence[RewardFunction | str],
        args: RolloutConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        planner: Callable[[list[str]], Planner] | None = None,
        engine: Engine | None = None,
        reward_processing_classes: Any = None,
        advantage: Advantage | None = None,
        loss: Loss | None = None,
        selector: Selector | Callable[[BetaPosterior, list[str]], Selector] | None = None,
        allocate: Allocator | None = None,
        **kwargs: Any,
    ) -> None:
        if planner is not None and not (selector is None and allocate is None):
            raise ValueError(
                "planner makes its own selector and allocator: give them to it, or leave planner out"
            )
        if planner is not None and getattr(args, "starts", "none") != "none":
            raise ValueError(
                f"planner chooses its own starts: give it a samplers.starts.Starts instead of writing "
                f"starts: {args.starts}, or leave planner out"
            )
        set_seed(args.seed)  # adapters are drawn by it
        trained, processor = self._load(model, processing_class, peft_config)
        tokenizers = [] if reward_processing_classes is None else [reward_processing_classes]
        rewards = self._load_rewards(reward_funcs, args.reward_weights, *tokenizers)
        self._make_prompts = partial(
            self._prompts_of, args=args, processor=processor, model=trained
        )
        self.prompts, self.prompt_report = self._make_prompts(train_dataset)
        self.eval_sets = self._sets_of(eval_dataset)
        self.eval_prompts = [p for held_out in self.eval_sets.values() for p in held_out]
        for held_out in self.eval_sets.values():
            self._check_held_out(rewards, self.prompts, held_out)
        check_best_metric(args, self.eval_sets)
        args.max_steps = num_steps(args, len(self.prompts))
        ends_in_order, args.enable_jit_checkpoint = args.enable_jit_checkpoint, False
        super().__init__(
            trained,
            args,
            train_dataset=[{}],
            eval_dataset=self.eval_prompts or None,
            processing_class=processor if self.saves_processor else None,
            **kwargs,
        )
        loading.warn_of_success(args, len(rewards))
        keys = [prompt.key for prompt in self.prompts]
        self.planner = (
            planner(keys)
            if planner is not None
            else self._make_planner(
                keys,
                columns=column_of(self.prompts),
                full_marks=full_marks(args.reward_weights or [1.0] * len(rewards)),
                selector=selector,
                allocate=allocate,
                starts=self._make_starts(trained, processor),
            )
        )
        self.policy = self._make_policy(trained, processor, rewards, engine)
        check_takes_starts(self.planner, self.policy.engine)
        self.ranks = self._make_ranks()
        self.objective = self._make_objective(advantage=advantage, loss=loss)
        self.sampling = Sampling(args, self.prompts, self.planner, self.ranks)
        self.ledger = self.sampling.ledger
        self.replay = make_replay(args, self.prompts)
        self.fidelity = fidelity.Fidelity(args, self.policy, self.ranks)
        self.recipe: dict[str, Any] = {}
        """Settings besides `args` by which model, data and rewards were found, for `run.json`."""
        self._about: dict[str, Any] = {}
        self._adapters = adapter_settings(trained)
        self._origins = origins(
            trained,
            self.prompts,
            self.eval_prompts,
            rewards,
            has_reference=self.policy.reference is not None or bool(args.beta),
            own=own_functions(
                args, advantage=advantage, loss=loss, selector=selector, allocator=allocate
            ),
        )
        self.steps_since_log: list[dict[str, float]] = []
        self._empty_steps = 0
        self._saved_step = 0
        self._resumed: dict[str, Any] = {}  # the state of the checkpoint a run goes on from
        self._given: list[dict[str, Any]] = []  # what the settings give the optimizer
        args.enable_jit_checkpoint = ends_in_order
        self.termination = Termination(self.ranks) if ends_in_order else None
        if self.termination is not None:
            self.add_callback(self.termination)
        self.add_callback(_LossGoesOn(self))
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.run_folder = tracking.RunFolder(str(args.output_dir))
        self.progress = ProgressLine(args)
        if args.sync_ref_model and self.policy.reference is not None:
            self.add_callback(Follow(self.policy.reference))
        self.add_callback(self.run_folder)
        self._tracker_runs = TrackerRuns(str(args.output_dir))
        self.add_callback(self._tracker_runs)
        self.add_callback(self.progress)
        empty, drawn = lambda: self._empty_steps, lambda: self.ledger.totals["tokens_drawn"]
        self.add_callback(EmptySteps(empty, args.max_empty_steps, setting="max_empty_steps"))
        if (most := args.max_generated_tokens) is not None:
            budget = Budget(drawn, most, setting="max_generated_tokens")
            self.add_callback(budget)
            self.progress.count(budget, "tokens")

    # -- what differs for diffusion models, see `DenoisingTrainer`

    def _load(self, model: Any, processor: Any, peft_config: Any) -> tuple[Any, Any]:
        return loading.load_policy(model, processor, peft_config)

    def _load_rewards(
        self, rewards: Any, weights: list[float] | None, *tokenizers: Any
    ) -> list[Any]:
        return loading.load_rewards(rewards, weights, *tokenizers)

    def _prompts_of(
        self, rows: Any, *, args: Any, processor: Any, model: Any
    ) -> tuple[list[Prompt], PromptReport]:
        return loading.language_prompts(rows, args, processor, model)

    def _check_held_out(
        self, rewards: list[Any], prompts: list[Prompt], held_out: list[Prompt]
    ) -> None:
        loading.check_held_out(rewards, prompts, held_out)

    def _make_planner(self, keys: list[str], **given: Any) -> Planner:
        return make_planner(self.args, keys, features=self._features, **given)

    def _features(self) -> np.ndarray:
        """Of the prompts, by the policy as it is when the planner first asks: before the first step."""
        assert isinstance(self.policy, LanguagePolicy)
        return prompt_features(self.policy, self.ranks, self.prompts)

    def _make_starts(self, model: Any, processor: Any) -> Starts | None:
        eos_ids = end_of_sequence_ids(model, processor)
        return make_starts(self.args, self.prompts, processor, eos_ids=eos_ids)

    def _make_policy(self, model: Any, processor: Any, rewards: list[Any], engine: Any) -> Policy:
        return LanguagePolicy(
            self.args,
            model=model,
            tokenizer=processor,
            rewards=rewards,
            engine=engine,
            whole=self._whole,
            accelerator=self.accelerator,
            prompts=self.prompts,
            trainer_state=lambda: self.state,
        )

    def _make_ranks(self) -> Ranks:
        return Ranks(self.accelerator)

    def _make_objective(self, **own: Any) -> Objective:
        return objective_of(self.args, **own)

    def _whole(self) -> AbstractContextManager[PreTrainedModel]:
        """The unwrapped model with whole weights."""
        return self.ranks.unwrapped(self.model_wrapped)

    # -- the step

    def get_train_dataloader(self) -> DataLoader:
        """One ticket a step: what a step trains on is decided by the planner, not by a data loader."""
        tickets: Any = [{"ticket": step} for step in range(self.args.max_steps)]
        return DataLoader(tickets, batch_size=1)

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """One collection and its updates; the last optimizer step is the base class's."""
        started, step = time.perf_counter(), self.state.global_step
        sampling, policy, objective, ranks = self.sampling, self.policy, self.objective, self.ranks
        with self._kept() as last_step:
            fidelity.settle(policy, ranks)
            batch = collect(sampling, policy, objective, ranks, version=step)
            last_step.is_whole = False
            sampling.observe_gradient_norms(policy, batch.visits)
            fidelity.to_update(policy, model)
            with self.ledger.phase("update"), self.compute_loss_context_manager():
                batch = prepare(
                    batch,
                    objective,
                    policy,
                    ranks,
                    model,
                    progress=sampling.progress(step),
                    ledger=self.ledger,
                )
                if self.replay is not None:
                    mix, ledger = self.replay.mix, self.ledger
                    batch = mix(batch, objective, policy, ranks, model, step=step, ledger=ledger)
                loss, learned = update(
                    batch,
                    objective,
                    policy,
                    ranks,
                    model,
                    fidelity=self.fidelity,
                    step_optimizer=partial(self._inner_optimizer_step, model),
                )
                self._require_finite_gradient(model)
        self._close(batch, learned | {"step_time": time.perf_counter() - started})
        return loss

    def _kept(self) -> AbstractContextManager[failing.Kept]:
        """Around what may fail: undo it, then flush logs and save a checkpoint."""
        return failing.kept(
            self.stages_state,
            self._load_stages,
            flush=self._flush_log,
            save=self._save_after_failure,
        )

    def _require_finite_gradient(self, model: torch.nn.Module) -> None:
        if not self.is_deepspeed_enabled:  # which shows no gradients
            step = self.state.global_step + 1
            failing.require_finite_gradient(model, self.ranks, step=step)

    def _inner_optimizer_step(self, model: torch.nn.Module) -> None:
        if self.is_deepspeed_enabled:  # has stepped at the end of backward
            return
        self._require_finite_gradient(model)
        if self.args.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()  # type: ignore[union-attr]
        model.zero_grad()

    def _close(self, batch: Batch, learned: dict[str, float]) -> None:
        self.ledger.updates(len(mini_batches(batch, self.objective)))
        self.ledger.end()
        step = self.state.global_step + 1
        rate = {"learning_rate": self._get_learning_rate()}
        self.steps_since_log.append(batch.metrics | learned | rate)
        self._empty_steps = 0 if len(batch.rollouts) else self._empty_steps + 1
        if self.ranks.is_main:
            self.run_folder.write_step(metrics.record_of(self.planner, batch, step=step))
            for scored in batch.rounds:
                self.sampling.success_line.trained(scored.reward_N.numpy())
            self.show(batch, step=step)

    def show(self, batch: Batch, *, step: int) -> None:
        """Write some of a step's rollouts to the run folder, where the settings ask for it."""
        if self.args.completions_every and step % self.args.completions_every == 0:
            table = completions.table_of(batch, rows=self.args.completions_rows, step=step)
            if table:
                self.run_folder.write_completions(table, step=step)
                trackers: Any = self.args.report_to  # a list, once the settings are made
                callbacks = self.callback_handler.callbacks
                completions.track(table, step=step, report_to=trackers, callbacks=callbacks)

    # -- logging and validation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means over the steps since the last line, the planner's view and the ledger."""
        if self.steps_since_log and "learning_rate" in logs:
            logs |= metrics.mean_metrics(self.steps_since_log) | logs
            logs |= self.planner.metrics() | self.ledger.metrics()
            if self.sampling.buffer is not None:
                logs |= self.sampling.buffer.metrics()
            self.steps_since_log = []
        super().log(logs, start_time)

    def _sets_of(self, eval_dataset: Any) -> dict[str, list[Prompt]]:
        """Held-out prompts by the name of their set; rows that come without a name have the name ''."""
        if eval_dataset is None:
            return {}
        rows = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
        sets: dict[str, list[Prompt]] = {}
        for name, each in rows.items():
            try:
                sets[str(name)] = self._make_prompts(each)[0]
            except ValueError as error:
                if not name:
                    raise
                raise ValueError(f"eval_dataset[{name!r}]: {error}") from error
        return {name: prompts for name, prompts in sets.items() if prompts}

    def validate(self, prompts: list[Prompt], *, name: str = "") -> dict[str, float]:
        """The figures of `evaluate`, without prefix; `name` is that of the set, if it has one.

        With `completions_every`, greedy completions are written to the run folder's `validation`.
        """
        step = self.state.global_step

        def seen(kind: str, scored: Scored) -> dict[str, float]:
            if kind == "greedy" and self.args.completions_every and self.ranks.is_main:
                table = completions.validation_table(prompts, scored, step=step)
                self.run_folder.write_completions(table, step=step, folder="validation", name=name)
            return {}

        return evaluate(self.sampling, self.policy, prompts, version=step, seen=seen)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Greedy accuracy and pass rate on the held-out prompts; logged, and given to callbacks.

        Args:
            eval_dataset: rows, a dict of them by name, or the name of a set given to the trainer, in
                the place of all those given to the trainer.
            ignore_keys: not used; of the base class.
            metric_key_prefix: of each metric; that of a set with a name is followed by the name.
        """
        if eval_dataset is None:
            sets = self.eval_sets
        elif isinstance(eval_dataset, str):
            choice("eval_dataset", eval_dataset, self.eval_sets)
            sets = {eval_dataset: self.eval_sets[eval_dataset]}
        else:
            sets = self._sets_of(eval_dataset)
        if not sets:
            raise ValueError("evaluate needs held-out prompts: pass eval_dataset to the trainer")
        logs: dict[str, float] = {}
        for name, prompts in sets.items():
            with self._kept():
                fidelity.settle(self.policy, self.ranks)
                found = self.validate(prompts, name=name)
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            logs |= {f"{prefix}_{metric}": value for metric, value in found.items()}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    # -- checkpoints

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """`Trainer.train`, resuming from whole checkpoints only and with every decision restored.

        Raises:
            NoSignalError: once a run without signal has ended as any other does.
            Terminated: once a run that was sent SIGTERM has saved its last step, if settings say
                `enable_jit_checkpoint`.
            ChangedRunError: if it would go on as another run than it is.
        """
        resume = resume_from_checkpoint or self.args.resume_from_checkpoint
        find = partial(tracking.checkpoint_to_resume, self.args, resume)
        ranks, from_step, state = self.ranks, 0, {}
        folder = ranks.from_main(find)
        with ExitStack() as stack:
            with ranks.together():
                if folder is not None:
                    state = checkpoint.load_state(folder)
                    from_step = state["step"]
                    checkpoint.require_optimizer(folder)
            compared = ranks.from_main(partial(self._compare, folder, state))
            with ranks.together():
                if not tracking.is_asked(resume):
                    compared.refuse_another_run(self.args.output_dir)
                if folder is not None:
                    self._load_state(state, str(folder))
                    self.args.eval_on_start = False
                    ended_by = self._ended_by(from_step)
                    if ended_by:
                        compared.refuse_nothing_left(self.args.output_dir, ended_by)
                    if ranks.is_main:
                        compared.tell()
                        self._about["changes"] = compared.changes
            with ranks.together():
                claimed = self.run_folder.claimed
                stack.enter_context(claimed(self.args, from_step=from_step, about=self._about))
                if self.args.save_strategy != "no" and ranks.is_main:
                    tracking.require_space(self.args, self.model_wrapped)
            if self.args.save_only_model and self.args.save_strategy != "no":
                logger.warning(
                    "save_only_model: true leaves the optimizer out of checkpoints, so no run can go on "
                    "from them"
                )
            self._resumed = state
            stack.callback(self.progress.close)
            stack.enter_context(self._tracker_runs.continued(self.args, from_step=from_step))
            if self.termination is not None:
                stack.enter_context(self.termination.heeded())
            stack.enter_context(failing.flushed(self._flush_log))
            stack.enter_context(no_step_if_spent(self.args, self.callback_handler, from_step))
            result = super().train(
                resume_from_checkpoint=None if folder is None else str(folder), **kwargs
            )
        step, most = self.state.global_step, self.args.max_steps
        if self.termination is not None and self.termination.has_ended and step < most:
            logger.warning(
                f"ended by SIGTERM after step {step} of {most}, which checkpoint-{step} holds; go on "
                "with resume_from_checkpoint: true"
            )
            raise Terminated(143)
        if self._empty_steps >= self.args.max_empty_steps:
            raise no_signal(self._empty_steps, self.state.log_history)
        return result

    def _compare(self, folder: Path | None, state: dict[str, Any]) -> Compared:
        """This run against the one it goes on from, or would write over; the main process asks."""
        of_run = (self.args, self.prompts, self.eval_prompts, self.prompt_report)
        more: dict[str, Any] = {"origins": self._origins, "recipe": self.recipe}
        more["adapters"] = self._adapters
        step = state.get("step", 0)
        self._about = tracking.about(*of_run, **more, from_step=step)
        run = self.run_folder.folder if folder is None else folder.parent
        on_disk = tracking.read_about(run) if tracking.holds_run(run) else {}
        return compare(state.get("about") or on_disk, self._about, step=step)

    def _ended_by(self, step: int) -> str:
        """Which limits of the run are reached at `step`; empty if none is."""
        last = f"max_steps={self.args.max_steps}" if step >= self.args.max_steps else ""
        return " and ".join(filter(None, (last, spent_budgets(self.callback_handler))))

    def decisive_settings(self) -> dict[str, Any]:
        """Those of `args`, and what a model must be for a checkpoint to be read into it."""
        decided = {name: self._origins[name] for name in DECIDED if self._origins[name] is not None}
        return self.args.decisive_settings() | self._adapters | decided

    def _load_state(self, state: dict[str, Any], folder: str) -> int:
        refuse_decisive(self, state["settings"], folder)
        before = state.get("about", {}).get("settings", {})
        refuse_other_optimizer(self.args, before, folder)
        rate = before.get("learning_rate", self.args.learning_rate)
        if rate != self.args.learning_rate and self._deepspeed_schedules():
            raise ValueError(
                f"learning_rate was {rate}, is {self.args.learning_rate}, and the scheduler of "
                f"DeepSpeed's configuration brings the old one back from {folder}: leave `scheduler` "
                "out of it, write the old value, or another output_dir"
            )
        had = state["stages"]["objective"]["history"] is not None
        has = self.objective.history is not None
        if had != has:
            raise ValueError(
                f"{folder} was made {'with' if had else 'without'} a memory of earlier rewards, which "
                f"advantage: {self.args.advantage} {'needs' if has else 'has not'}; write the advantage "
                f"it had, {before.get('advantage')}, or another output_dir"
            )
        self._load_stages(state["stages"])
        if self.args.sync_ref_model and self.policy.reference is not None:
            self.policy.reference.load(Path(folder))
        self._empty_steps = state["empty_steps"]
        self.steps_since_log = state["steps_since_log"]
        self._saved_step = state["step"]
        return self._saved_step

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The base class's; what the settings give the optimizer is remembered before it is loaded."""
        made = super().create_scheduler(num_training_steps, optimizer)
        self._given = schedule.hyperparameters(self.optimizer)
        return made

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The base class's, then learning rate, schedule, weight decay and betas of now."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        rate = self.args.learning_rate
        before = self._resumed.get("about", {}).get("settings", {}).get("learning_rate", rate)
        schedule.apply(
            self.optimizer, self.lr_scheduler, self._given, rate=rate, rate_before=before
        )

    def _deepspeed_schedules(self) -> bool:
        """Whether the learning rate follows a schedule of DeepSpeed's own."""
        if not self.is_deepspeed_enabled:
            return False
        return "scheduler" in self.accelerator.state.deepspeed_plugin.deepspeed_config

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """The base class's; the best checkpoint is looked for where the run is, not where it was."""
        found = super()._init_training_state(*args, **kwargs)
        folder = kwargs.get("resume_from_checkpoint", args[3] if len(args) > 3 else None)
        if folder is not None:
            self.state.best_model_checkpoint = checkpoint.best_of(folder)
        return found

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """The base class's, which deletes the last checkpoint beside the best one: it stays here, as
        a run goes on from it."""
        most, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = most

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`Trainer.save_model`, without a progress bar for each file.

        Raises:
            FloatingPointError: if a weight is not finite.
        """
        self._require_finite_weights()
        with tracking.no_progress_bars():
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any = None) -> None:
        """The base class's checkpoint and the state of the stages, whole or not at all.

        Raises:
            FloatingPointError: if a weight is not finite; earlier checkpoints stay.
        """
        self._write_checkpoint(model, trial)
        if self.ranks.is_main:
            best = self.state.best_model_checkpoint
            checkpoint.rotate(self.run_folder.folder, keep=self.args.save_total_limit, best=best)

    def _write_checkpoint(self, model: torch.nn.Module, trial: Any = None) -> None:
        args, ranks, name = self.args, self.ranks, f"checkpoint-{self.state.global_step}"
        run, push = str(self.run_folder.folder), args.push_to_hub
        with ranks.together():
            self._require_finite_weights()
        losses = ranks.gather(float(self._tr_loss))
        waiting = {"loss": sum(losses) / len(losses), "since": self._globalstep_last_logged}
        with checkpoint.writing(run, name, ranks) as staging:
            args.output_dir, args.push_to_hub = str(staging), False
            try:
                super()._save_checkpoint(model, trial)
            finally:
                args.output_dir, args.push_to_hub = run, push
            best = self.state.best_model_checkpoint
            if best is not None and Path(best).parent == staging:
                self.state.best_model_checkpoint = str(Path(run) / Path(best).name)
            if ranks.is_main:
                self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
                if args.sync_ref_model and self.policy.reference is not None:
                    self.policy.reference.save(staging / name)
                checkpoint.save_state(staging / name, self._run_state() | {"waiting": waiting})
        self._saved_step = self.state.global_step
        if ranks.is_main and push:
            self._push_from_checkpoint(str(Path(run) / name))

    def save_unsaved(self) -> None:
        """A checkpoint of the last step, unless there is one; no older one is deleted for it."""
        if self.state.global_step > self._saved_step:
            self._write_checkpoint(self.model_wrapped)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _require_finite_weights(self) -> None:
        assert self.model is not None
        step = self.state.global_step
        failing.require_finite_weights(self.model.named_parameters(), step=step)

    def _save_after_failure(self, is_whole: bool) -> None:
        """A checkpoint of the steps before one that failed, if one is due and all ranks can make it.

        It is due if steps were trained that no checkpoint holds and `save_strategy` is not "no". Every
        process must have come here with whole weights: of several, one may have failed alone.
        """
        is_due = self.is_in_train and self.args.save_strategy != "no"
        if is_due and self.ranks.all_say(is_whole):
            failing.without_hiding(self.save_unsaved)

    def _flush_log(self) -> None:
        """Write the log line of the steps since the last one, if there are any.

        Nothing is gathered, as other processes may be elsewhere; of several, the loss is not known.
        """
        waiting = self.steps_since_log
        if not waiting:
            return
        logs = {"learning_rate": waiting[-1].get("learning_rate", self._get_learning_rate())}
        num_steps = self.state.global_step - self._globalstep_last_logged
        if num_steps and self.ranks.num == 1:
            logs["loss"] = float(self._tr_loss) / num_steps
        self._total_loss_scalar += float(self._tr_loss)
        self._tr_loss.zero_()
        self._globalstep_last_logged = self.state.global_step
        failing.without_hiding(lambda: self.log(logs))

    def stages_state(self) -> dict[str, Any]:
        """What later steps depend on besides the weights; a copy."""
        state = {
            "sampling": self.sampling.state_dict(),
            "policy": self.policy.state_dict(),
            "objective": self.objective.state_dict(),
        }
        return state if self.replay is None else state | {"replay": self.replay.state_dict()}

    def _load_stages(self, state: dict[str, Any]) -> None:
        self.sampling.load_state_dict(state["sampling"])
        self.policy.load_state_dict(state["policy"])
        self.objective.load_state_dict(state["objective"])
        if self.replay is not None:
            self.replay.load_state_dict(state.get("replay", {}))

    def _run_state(self) -> dict[str, Any]:
        return {
            "step": self.state.global_step,
            "about": self._about,
            "settings": self.decisive_settings(),
            "stages": self.stages_state(),
            "empty_steps": self._empty_steps,
            "steps_since_log": self.steps_since_log,
        }


class _LossGoesOn(TrainerCallback):
    """Gives a resumed run the loss of the steps before it that no log line has, once it can take it."""

    def __init__(self, trainer: RolloutTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        trainer, waiting = self._trainer, self._trainer._resumed.get("waiting")
        if waiting is not None:
            trainer._tr_loss.fill_(waiting["loss"])
            trainer._total_loss_scalar = -waiting[
                "loss"
            ]  # train_loss is of the steps made from here
            trainer._globalstep_last_logged = waiting["since"]
