"""Rollouts of diffusion models through unmodified diffusers pipelines.

A denoising chain is drawn by running windows of the pipeline's steps under a recording scheduler
(`recording_scheduler.py`); a recorded step is scored again by running the pipeline for that
one step and stopping before the action. Guidance, latent packing and sigma grids stay the pipeline's.

Branches part at the action: the children of a state are draws from one Gaussian, so a split costs
one evaluation, not one for each child (`StepPlan.evaluations`).

Axes: P prompts, N rollouts (finished samples), T denoising steps, S = T + 1 states of a chain,
M distinct states, U distinct states at one step.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from rollouts.batch import Condition, DenoisingRollouts, StateTree, rows_of
from rollouts.diffusion.pipeline_arguments import (
    CANNOT_RUN,
    missing_arguments,
    parameters,
    split_arguments,
    texts_to_leave_out,
)
from rollouts.diffusion.recording_scheduler import (
    Recording,
    draw,
    recording_scheduler,
    require_finite,
    with_shift,
)
from rollouts.diffusion.sde import gaussian_kl, gaussian_step, step_logprob
from rollouts.diffusion.text_encoder import (
    encode_with_pipeline,
    encodes_negative_apart,
    require_known_encoder,
)
from rollouts.diffusion.tree import (
    requested_trees,
    row_columns,
    seeded_generator,
    seeded_noise,
    segments,
    tree_columns,
)
from rollouts.prompts import Prompt
from rollouts.step_plan import StepPlan

Encode = Callable[[Sequence[Prompt]], Mapping[str, Condition]]
"""`encode(prompts)`: by the name of the pipeline argument that takes them (P, ...) tensors, or lists of
P tensors where the pipeline takes lists, as Z-Image does."""

_IP_ADAPTERS = ("ip_image_proj", "text_image_proj", "image_proj")
"""Kinds of `encoder_hid_dim_type` that read an image."""


class DiffusersEngine:
    """Any text-to-image pipeline of diffusers as a policy over its denoising steps.

    It runs the model that is trained, in the mode it is in; the pipeline's own scheduler is in place
    whenever no method of the engine runs. Noise is drawn on the CPU from one generator for each row
    and step, so it depends on the seeds alone, not on batch order, batch size or device.

    The model output of a row depends on the other rows of its batch in the last digits. `replay`
    and `logprobs` form the batches that `generate` formed if they are given all of its rows; the
    ratio of an unchanged policy is then exactly 1. With fewer rows it is 1 within float noise, to be
    logged as mismatch.

    Args:
        pipeline: with a `DDIMScheduler` or a `FlowMatchEulerDiscreteScheduler`, and without a safety
            checker, which would have black images rewarded.
        encode: prompts to embeddings. None: the pipeline's text encoders read `prompt.prompt`.
        guidance_scale: None takes the pipeline's default. Where the pipeline ignores it, as
            Qwen-Image's does, a warning says so.
        height: of the images, in pixels; None, with `width`, takes the pipeline's default.
        width: likewise.
        batch_size: rows of one call of the pipeline (a guidance pair is one row).
        shift: of a flow-matching scheduler, in the place of its own shift, static or dynamic. The
            pipeline gets a scheduler that has it, so that it is saved with it.
        negative_prompt: what guidance leads away from, one text for all prompts. None: the pipeline's
            default.
        negative_prompt_column: column of the prompts that holds each one's negative prompt.
        pipeline_kwargs: further arguments of every call and of `encode_prompt`, such as
            `true_cfg_scale` or `clip_skip`.

    Raises:
        ValueError: if the pipeline cannot be recorded: another scheduler, a scheduler that clips,
            dropout in the denoiser, a second denoiser, or a call without `latents`, that needs an
            image or that cannot be differentiated. If it has a safety checker, `height` and `width`
            are not a size of its images, or an argument would have no effect.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        encode: Encode | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 16,
        shift: float | None = None,
        negative_prompt: str | None = None,
        negative_prompt_column: str | None = None,
        pipeline_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.pipeline = pipeline
        self.batch_size = batch_size
        self.evaluations = 0
        """Denoiser evaluations by `generate` so far, in rows; a guidance pair counts once."""
        self.replay_evaluations = 0
        """Likewise by `replay` and `logprobs`."""
        settings = {"guidance_scale": guidance_scale, "height": height, "width": width}
        self._arguments = {name: value for name, value in settings.items() if value is not None}
        self.negative_prompt = negative_prompt
        self.negative_prompt_column = negative_prompt_column
        self._encode = encode
        if encode is None:
            require_known_encoder(pipeline)
        elif negative_prompt is not None or negative_prompt_column is not None:
            raise ValueError(
                "negative_prompt is for the pipeline's own text encoders, and encode= gives the "
                "embeddings: let it give negative_prompt_embeds"
            )
        if negative_prompt is not None and negative_prompt_column is not None:
            raise ValueError(
                f"negative_prompt={negative_prompt!r} and negative_prompt_column="
                f"{negative_prompt_column!r} say the same thing: write one"
            )
        self._pipeline_kwargs = None if pipeline_kwargs is None else dict(pipeline_kwargs)
        self._shift = shift
        further, self._encoder_arguments = split_arguments(
            pipeline, pipeline_kwargs or {}, encodes=encode is None
        )
        self._arguments |= further
        if shift is not None:
            pipeline.scheduler = with_shift(pipeline.scheduler, shift)
        self._check_pipeline()
        self._check_size(height, width)
        self._check_guidance(guidance_scale)
        self._texts_to_leave_out = texts_to_leave_out(pipeline)
        pipeline.set_progress_bar_config(disable=True)

    @property
    def denoiser(self) -> torch.nn.Module:
        """The model that is the policy."""
        for name in ("unet", "transformer"):
            if getattr(self.pipeline, name, None) is not None:
                return getattr(self.pipeline, name)
        raise ValueError(f"{type(self.pipeline).__name__} has neither a unet nor a transformer")

    @property
    def used(self) -> dict[str, Any]:
        """What the settings of a run may say of the engine, as it is; None where the pipeline decides.

        A guidance that the pipeline does not read is None too; one that was not given is the
        pipeline's own default.
        """
        guidance = self._default("guidance_scale")
        if not isinstance(guidance, int | float) or not self._reads_guidance(guidance):
            guidance = None
        return {
            "guidance_scale": guidance,
            "height": self._arguments.get("height"),
            "width": self._arguments.get("width"),
            "shift": self._shift,
            "negative_prompt": self.negative_prompt,
            "negative_prompt_column": self.negative_prompt_column,
            "pipeline_kwargs": self._pipeline_kwargs,
        }

    def load_weights(self, model: Any) -> None:
        """Take the weights of `model`; nothing to do where it is the pipeline's own denoiser."""
        model = getattr(model, "module", model)
        if model is not self.denoiser:
            self.denoiser.load_state_dict(model.state_dict())

    @torch.no_grad()
    def check(self, prompts: Sequence[Prompt], plans: Sequence[StepPlan]) -> None:
        """Find out before the first rollout what cannot be run: encode, and run no step of each plan.

        The pipeline checks its arguments and makes its timesteps; the denoiser is not evaluated.

        Args:
            prompts: at least one, of which the first is encoded; negative prompts are checked of all.
            plans: those of the run. Of one length and rule the first stands for all but the edges
                that are split and trained.

        Raises:
            ValueError: if a plan does not fit the scheduler's table, or a prompt has no negative one.
        """
        if self._encode is None:
            self._negative_prompts(prompts)
        conditions = self._conditions(prompts[:1])
        tables: dict[int, Recording] = {}
        for plan in plans:
            known = tables.get(plan.num_steps)
            recording = Recording(plan=plan, window=(0, 0))
            if known is not None:
                assert known.levels is not None and known.timesteps is not None
                recording.begin(known.levels, known.timesteps, known.prediction)
                continue
            arguments = {"output_type": "latent", "generator": [seeded_generator(0, "root", 0)]}
            self._call(recording, conditions, None, arguments)
            tables[plan.num_steps] = recording

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        budget_P: Any,
        *,
        seeds_N: Any,
        params: StepPlan,
        version: int = 0,
        start_seeds_P: Any = None,
    ) -> DenoisingRollouts:
        """`budget_P[p]` finished samples of prompt p, in trees as the plan says.

        A root and an edge that several samples share take the seed of the first of these. Under
        `params.shared_start` every root of prompt p takes `start_seeds_P[p]` instead, so that its
        samples start from one noise in every round and process that is given this seed.

        Args:
            prompts: P prompts.
            budget_P: (P,) integers, multiples of `params.leaves_per_root`.
            seeds_N: (N,) integers, ordered by prompt; different for the samples of one prompt.
            params: where noise is drawn and where the trees split.
            version: optimizer steps the policy has taken.
            start_seeds_P: (P,) integers, with `params.shared_start` and only then.

        Returns:
            Rows ordered by prompt, root, and down the tree. The mask is True where noise was drawn
            with std > 0.

        Raises:
            ValueError: if the request is malformed, the plan does not fit the scheduler's table, or
                the pipeline changes latents between its steps.
            FloatingPointError: if a latent is NaN or infinite.
        """
        plan = params
        prompt_N, seed_N = requested_trees(prompts, budget_P, seeds_N, plan)
        start_N = seed_N
        if (start_seeds_P is not None) != plan.shared_start or (
            plan.shared_start and len(start_seeds_P) != len(prompts)
        ):
            raise ValueError(
                f"start_seeds_P must be one seed for each of {len(prompts)} prompts where the plan has "
                f"shared_start, else None; got {start_seeds_P} with shared_start={plan.shared_start}"
            )
        if plan.shared_start:
            start_N = torch.as_tensor(start_seeds_P).cpu().long()[prompt_N]
        self._check_dropout()
        conditions = self._conditions(prompts)
        leaves = plan.leaves_per_root
        # Below state g of a step lie the leaves g * span .. (g + 1) * span - 1.
        span = [leaves // plan.states_at(step) for step in range(plan.num_steps + 1)]

        latents: list[Tensor] = []
        """Of each step, every distinct state."""
        logprobs: list[Tensor | None] = []
        """Of each step, that of the edge into every state; None where it drew no noise."""
        recording = None
        for first, last in segments(plan):
            parts: list[list[tuple[Tensor, Tensor | None]]] = []
            for state_U in torch.arange(len(prompt_N) // span[first]).split(self.batch_size):
                leaf_U = state_U * span[first]
                recording = self._run(
                    plan,
                    (first, last),
                    rows_of(conditions, prompt_N[leaf_U]),
                    latents=latents[first][state_U] if first else None,
                    seeds=seed_N[leaf_U].tolist(),
                    start_seeds=start_N[leaf_U].tolist(),
                    capture=plan.children_of(first) > 1,
                )
                self.evaluations += len(state_U) * (last - first)
                parts.append([(recording.steps[0].x, None)] if first == 0 else [])
                if recording.capture:
                    children = plan.children_of(first)
                    leaf_U = torch.arange(len(state_U) * children) * span[last] + leaf_U[0]
                    parts[-1].append(self._branch(recording, children, seed_N[leaf_U].tolist()))
                else:
                    parts[-1] += [(s.last_latent, s.logprob_N) for s in recording.steps]
            for chunks in zip(*parts, strict=True):
                latents.append(torch.cat([x for x, _ in chunks]).cpu())
                scores = [logprob for _, logprob in chunks if logprob is not None]
                logprobs.append(torch.cat(scores).cpu() if scores else None)

        assert recording is not None and recording.levels is not None
        assert recording.timesteps is not None
        return DenoisingRollouts(
            prompt_N=prompt_N,
            version=version,
            branch_N=torch.arange(len(prompt_N)) // leaves,
            seed_N=seed_N,
            **row_columns(latents, logprobs, span),
            tree=StateTree(
                latent_M=torch.cat(latents),
                **tree_columns(latents, span, prompt_N),
                levels=recording.levels,
                timesteps=recording.timesteps.cpu(),
                plan=plan,
                conditions=conditions,
            ),
        )

    def replay(
        self, rollouts: DenoisingRollouts, *, step: int, reference: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Mean and std of the policy at the states that the rows leave by edge `step`.

        Each distinct state is evaluated once, in the order of `rollouts.node_NS[:, step].unique()`.
        Differentiable in the denoiser's parameters where grad is enabled.

        Args:
            rollouts: rows of one batch of `generate`, or several chained.
            step: an edge that drew noise.
            reference: with the LoRA adapters off, and without a graph.

        Returns:
            (U, ...) mean and (U,) std, float32 or wider, on the denoiser's device.

        Raises:
            ValueError: if the edge is deterministic, the scheduler's table is another than when the
                rollouts were made, or there are no adapters to turn off.
        """
        state_U = rollouts.node_NS[:, step].cpu().unique()  # the tree is on the CPU
        return self._replay(rollouts.tree, state_U, step, reference)

    def logprobs(self, rollouts: DenoisingRollouts, *, reference: bool = False) -> Tensor:
        """(N, T) float64 log-probabilities of the recorded edges under the current weights, in nats.

        Only edges are evaluated that the mask has and `weight_NT`, if there is one, does not set to
        0; the others are 0. One evaluation serves all rows that leave a state. The graph of all
        evaluated edges is kept at once; `replay` takes one edge at a time.

        Args:
            rollouts: see `replay`.
            reference: with the LoRA adapters off, and without a graph.
        """
        return self._scored(rollouts, reference=reference, kl=False)[0]

    def logprobs_and_kl(self, rollouts: DenoisingRollouts) -> tuple[Tensor, Tensor]:
        """`logprobs`, and the exact KL(policy || reference) of the same edges, in nats.

        The reference is the denoiser with its LoRA adapters off. Both are (N, T) float64.
        """
        return self._scored(rollouts, reference=False, kl=True)

    def _scored(
        self, rollouts: DenoisingRollouts, *, reference: bool, kl: bool
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and, with `kl`, KLs to the reference (else 0) of the active edges."""
        active_NT = rollouts.mask_NT
        if rollouts.weight_NT is not None:
            active_NT = active_NT & (rollouts.weight_NT != 0)
        active_NT, node_NS = active_NT.cpu(), rollouts.node_NS.cpu()  # as the tree is
        device = self.pipeline._execution_device
        zero_N = torch.zeros(len(rollouts), dtype=torch.float64, device=device)
        logprob_NT, kl_NT = [], []
        for step in range(active_NT.shape[1]):
            row_K = active_NT[:, step].nonzero().flatten()
            logprob_N, kl_N = zero_N, zero_N
            if len(row_K):
                child_U, place_K = node_NS[row_K, step + 1], torch.arange(len(row_K))
                if not kl:  # an edge that rows share is scored once
                    child_U, place_K = child_U.unique(return_inverse=True)
                distinct, which_U = rollouts.tree.parent_M[child_U].unique(return_inverse=True)
                mean, std = self._replay(rollouts.tree, distinct, step, reference)
                place_K, which_U = place_K.to(device), which_U.to(device)
                x_next = rollouts.tree.latent_M[child_U].to(device)
                logprob_U = step_logprob(x_next, mean[which_U], std[which_U])
                rows = (row_K.to(device),)
                logprob_N = zero_N.index_put(rows, logprob_U[place_K])
                if kl:
                    mean_ref, _ = self._replay(rollouts.tree, distinct, step, True)
                    kl_N = zero_N.index_put(rows, gaussian_kl(mean, mean_ref, std)[which_U])
            logprob_NT.append(logprob_N)
            kl_NT.append(kl_N)
        return torch.stack(logprob_NT, dim=1), torch.stack(kl_NT, dim=1)

    @torch.no_grad()
    def decode(self, rollouts: DenoisingRollouts) -> np.ndarray:
        """The finished samples as images, (N, H, W, C) uint8, in row order; videos (N, F, H, W, C).

        By the pipeline's own decoder, which it reaches through a window of no steps. A pipeline
        without a VAE denoises pixels in [-1, 1].

        Raises:
            FloatingPointError: if an image has a NaN, or its latent a NaN or an infinity.
        """
        images, finite = [], []
        tree = rollouts.tree
        leaf_N, seed_N = rollouts.node_NS[:, -1].cpu(), rollouts.seed_N.cpu()
        for node_U, seed_U in zip(
            leaf_N.split(self.batch_size), seed_N.split(self.batch_size), strict=True
        ):
            x = tree.latent_M[node_U]
            require_finite(x, "the latents of finished samples")
            if getattr(self.pipeline, "vae", None) is None:
                if x.ndim != 4:
                    raise ValueError(
                        f"without a VAE, samples must be pixels of shape (C, H, W), got latents of "
                        f"shape {tuple(x.shape[1:])}"
                    )
                image = (x.float().permute(0, 2, 3, 1).clamp(-1, 1) / 2 + 0.5).numpy()
            else:
                end = tree.plan.num_steps
                conditions = rows_of(tree.conditions, tree.prompt_M[node_U])
                # Some decoders, such as LTX's, add noise to what they decode.
                generators = [seeded_generator(seed, "decode", end) for seed in seed_U.tolist()]
                arguments = {"output_type": "np", "generator": generators}
                image = self._call(
                    Recording(plan=tree.plan, window=(end, end)), conditions, x, arguments
                )
            finite.append(np.isfinite(image).all(axis=tuple(range(1, image.ndim))))
            images.append((np.nan_to_num(image) * 255).round().astype(np.uint8))
        if not images:
            raise ValueError("there are no rollouts to decode")
        failed = np.flatnonzero(~np.concatenate(finite)).tolist()
        if failed:
            raise FloatingPointError(
                f"the VAE made images with NaN of {len(failed)} of {len(rollouts)} rows, {failed}: "
                f"VAEs overflow in float16; load the pipeline with dtype bfloat16 or float32, or set "
                f"force_upcast=True in the VAE's config where the pipeline reads it (SDXL)"
            )
        return np.concatenate(images)

    def _replay(
        self, tree: StateTree, state_U: Tensor, step: int, reference: bool
    ) -> tuple[Tensor, Tensor]:
        self._check_dropout()
        means, stds = [], []
        with self._adapters_off() if reference else contextlib.nullcontext():
            for chunk in state_U.split(self.batch_size):
                conditions = rows_of(tree.conditions, tree.prompt_M[chunk])
                recording = self._run(
                    tree.plan, (step, step + 1), conditions, tree.latent_M[chunk], capture=True
                )
                self.replay_evaluations += len(chunk)
                if recording.std[step] == 0:
                    raise ValueError(
                        f"edge {step} is deterministic and has no log-probability; edges with noise "
                        f"are {[i for i, std in enumerate(recording.std) if std > 0]}"
                    )
                assert recording.levels is not None
                if not torch.equal(recording.levels, tree.levels):
                    raise ValueError(
                        "the scheduler's table differs from the one the rollouts were made with; "
                        "replay needs the scheduler, height and width of `generate`"
                    )
                mean, std = self._gaussian(recording)
                means.append(mean)
                stds.append(std)
        return torch.cat(means), torch.cat(stds)

    @contextlib.contextmanager
    def _adapters_off(self) -> Iterator[None]:
        denoiser: Any = self.denoiser
        if hasattr(denoiser, "disable_adapter"):  # wrapped in a PeftModel
            with torch.no_grad(), denoiser.disable_adapter():
                yield
            return
        if not getattr(denoiser, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"a reference policy needs LoRA adapters that can be turned off, but the "
                f"{type(denoiser).__name__} has none: call its add_adapter(LoraConfig(...)) first"
            )
        denoiser.disable_adapters()
        try:
            with torch.no_grad():
                yield
        finally:
            denoiser.enable_adapters()

    def _gaussian(self, recording: Recording) -> tuple[Tensor, Tensor]:
        """Mean and std of the captured step."""
        (step,) = recording.steps
        assert step.output is not None and recording.levels is not None
        return gaussian_step(
            step.output,
            step.x,
            recording.levels[step.step],
            rule=recording.plan.rule,
            level=recording.plan.level,
            prediction=recording.prediction,
        )

    def _branch(
        self, recording: Recording, children: int, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """The children of every state of a captured step, and their log-probabilities."""
        (step,) = recording.steps
        mean, std = (v.repeat_interleave(children, dim=0) for v in self._gaussian(recording))
        noise = seeded_noise(seeds, step.step, mean.shape)
        x_next, logprob = draw(mean, std, noise, dtype=step.x.dtype)
        require_finite(x_next, f"the latents that step {step.step} made")
        return x_next, logprob

    def _run(
        self,
        plan: StepPlan,
        window: tuple[int, int],
        conditions: Mapping[str, Condition],
        latents: Tensor | None,
        *,
        seeds: Sequence[int] = (),
        start_seeds: Sequence[int] = (),
        capture: bool,
    ) -> Recording:
        """Some steps of some rows: `seeds` of their edges, `start_seeds` of their noise at step 0."""
        pending = 0

        def count(module: Any, args: Any, kwargs: Any) -> None:
            nonlocal pending
            pending += len(next(filter(_of_rows, (*args, *kwargs.values()))))

        def check(num_rows: int) -> None:
            nonlocal pending
            if pending == 0 or pending % num_rows:
                raise ValueError(
                    f"the pipeline evaluated {pending} rows before a step of {num_rows}; only whole "
                    f"guidance pairs can be counted"
                )
            pending = 0

        recording = Recording(
            plan=plan,
            window=window,
            noise=lambda step, shape: seeded_noise(seeds, step, shape),
            capture=capture,
            before_step=check,
        )
        arguments: dict[str, Any] = {"output_type": "latent"}
        if latents is None:
            arguments["generator"] = [seeded_generator(seed, "root", 0) for seed in start_seeds]
        handle = self.denoiser.register_forward_pre_hook(count, with_kwargs=True)
        try:
            x = self._call(recording, conditions, latents, arguments)
        finally:
            handle.remove()
        first = recording.steps[0].x
        if latents is not None and not torch.equal(first.cpu(), latents):
            raise ValueError("the pipeline changed the latents it was given before its first step")
        if type(self.pipeline).__name__ != "Flux2KleinPipeline" and not torch.equal(
            x, recording.steps[-1].last_latent
        ):  # FLUX.2 klein returns latents as its VAE takes them, also for output_type="latent"
            raise ValueError("the pipeline changed the latents after its last step")
        return recording

    def _call(
        self,
        recording: Recording,
        conditions: Mapping[str, Condition],
        latents: Tensor | None,
        arguments: Mapping[str, Any],
    ) -> Any:
        pipeline = self.pipeline
        device = pipeline._execution_device
        scheduler = pipeline.scheduler
        ours = recording_scheduler(scheduler)
        ours.recording = recording
        pipeline.scheduler = ours
        # The function under the decorator that turns gradients off.
        call: Any = type(pipeline).__call__
        given: dict[str, Any] = {name: _moved(value, device) for name, value in conditions.items()}
        for name in self._texts_to_leave_out:
            if not name.startswith("negative_") or any(c.startswith("negative_") for c in given):
                given.setdefault(name, None)
        try:
            return call.__wrapped__(
                pipeline,
                **given,
                **self._arguments,
                **arguments,
                latents=None if latents is None else self._as_given(latents).to(device),
                num_inference_steps=recording.plan.num_steps,
                return_dict=False,
            )[0]
        finally:
            pipeline.scheduler = scheduler

    def _as_given(self, latents: Tensor) -> Tensor:
        """Latents as the pipeline takes them: those of FLUX.2 before they are packed."""
        if type(self.pipeline).__name__ not in ("Flux2Pipeline", "Flux2KleinPipeline"):
            return latents
        factor = self.pipeline.vae_scale_factor
        default = self.pipeline.default_sample_size * factor
        height, width = (
            (self._arguments.get(side) or default) // (2 * factor) for side in ("height", "width")
        )
        return latents.transpose(1, 2).unflatten(2, (height, width))

    def _conditions(self, prompts: Sequence[Prompt]) -> dict[str, Condition]:
        if self._encode is None:
            encoded: Mapping[str, Condition] = encode_with_pipeline(
                self.pipeline,
                prompts,
                negative=self._negative_prompts(prompts),
                settings=self._encoder_arguments,
            )
        else:
            encoded = self._encode(prompts)
        conditions: dict[str, Condition] = {}
        for name, value in encoded.items():
            if isinstance(value, Sequence) and all(isinstance(v, Tensor) for v in value):
                conditions[name] = [v.detach().cpu() for v in value]
            elif isinstance(value, Tensor):
                conditions[name] = value.detach().cpu()
            else:
                raise ValueError(
                    f"encode must give tensors or lists of one tensor for each prompt, got {name} of "
                    f"type {type(value).__name__}"
                )
            if len(value) != len(prompts):
                shape = tuple(value.shape) if isinstance(value, Tensor) else f"({len(value)}, ...)"
                raise ValueError(f"encode gave {name} of shape {shape} for {len(prompts)} prompts")
        scale = self._true_guidance(given=True)
        needed = (name for name in ("prompt_embeds", "pooled_prompt_embeds") if name in conditions)
        absent = [f"negative_{name}" for name in needed if f"negative_{name}" not in conditions]
        if scale > 1 and absent:
            raise ValueError(
                f"true_cfg_scale={scale} has no effect without {', '.join(absent)}, which encode must "
                f"give; it gave {', '.join(conditions)}"
            )
        return conditions

    def _negative_prompts(self, prompts: Sequence[Prompt]) -> list[str] | None:
        """What each prompt is led away from; None where nothing was said."""
        column = self.negative_prompt_column
        if column is None:
            text = self.negative_prompt
            pair = "true_cfg_scale" not in parameters(type(self.pipeline).__call__)
            if text is None and pair and encodes_negative_apart(self.pipeline):
                text = "" if self._guides_by_pair() else None  # as FLUX.2 klein does
            return None if text is None else [text] * len(prompts)
        for prompt in prompts:
            if not isinstance(prompt.columns.get(column), str):
                raise ValueError(
                    f"negative_prompt_column={column!r} must be a text of every prompt, but prompt "
                    f"{prompt.key} has {prompt.columns.get(column)!r}; its columns are "
                    f"{', '.join(prompt.columns) or 'none'}"
                )
        return [prompt.columns[column] for prompt in prompts]

    def _check_pipeline(self) -> None:
        pipeline, name = self.pipeline, type(self.pipeline).__name__
        if name in CANNOT_RUN:
            raise ValueError(f"{name} cannot be run by windows of its steps: {CANNOT_RUN[name]}")
        recording_scheduler(pipeline.scheduler)
        call = type(pipeline).__call__
        if not hasattr(call, "__wrapped__"):
            raise ValueError(
                f"the call of {name} is not a decorated function, so it cannot be run with gradients"
            )
        accepted = inspect.signature(call).parameters
        needed = ("latents", "output_type", "num_inference_steps", "generator")
        unknown = sorted({*needed, *self._arguments} - set(accepted))
        if unknown:  # by name: some calls swallow any others
            more = "; write guidance_scale: null" if "guidance_scale" in unknown else ""
            raise ValueError(f"the call of {name} takes no {', '.join(unknown)}{more}")
        if "mask_image" in accepted:
            raise ValueError(f"{name} overwrites part of the latents: its steps are not Gaussian")
        missing = missing_arguments(pipeline)
        missing += [part for part in ("controlnet", "adapter") if getattr(pipeline, part, None)]
        if missing:
            raise ValueError(
                f"{name} needs {', '.join(missing)} beside a text, and rollouts start from a text and "
                f"noise: take the text-to-image or text-to-video pipeline of this model"
            )
        if getattr(pipeline, "safety_checker", None) is not None:
            raise ValueError(
                f"{name} has a safety checker, which makes images black that would then be rewarded; "
                f"load it with safety_checker=None, requires_safety_checker=False"
            )
        self._check_denoiser()
        self._check_dropout()

    def _check_denoiser(self) -> None:
        """Refuse what would make the model of an update another than that of the rollout."""
        pipeline, denoiser, name = self.pipeline, self.denoiser, type(self.denoiser).__name__
        for second in ("transformer_2", "unet_2"):
            if getattr(pipeline, second, None) is not None:
                raise ValueError(
                    f"{type(pipeline).__name__} has two denoisers, of which {second} makes some of the "
                    f"steps and would never train, as in Wan 2.2 A14B: take a model of one denoiser"
                )
        if getattr(getattr(denoiser, "config", None), "encoder_hid_dim_type", None) in _IP_ADAPTERS:
            raise ValueError(
                f"the {name} has an IP-Adapter, which needs an image for each prompt: call the "
                f"pipeline's unload_ip_adapter() first"
            )
        if getattr(denoiser, "is_cache_enabled", False):
            raise ValueError(
                f"the {name} has a cache that carries activations from step to step, so that a step "
                f"replayed alone has another output: call its disable_cache() first"
            )
        fused = [n for n, m in denoiser.named_modules() if getattr(m, "merged_adapters", None)]
        if fused:
            raise ValueError(
                f"the {name} has a LoRA that is fused into {fused[0]} and {len(fused) - 1} other "
                f"layers, where it neither trains nor can be turned off: call the pipeline's "
                f"unfuse_lora() to keep it apart, or unload_lora_weights() to keep it in the weights"
            )

    def _check_size(self, height: int | None, width: int | None) -> None:
        if height is None and width is None:
            return
        pipeline = self.pipeline
        multiple = getattr(pipeline, "vae_scale_factor", 1) * getattr(pipeline, "patch_size", 1)
        # Of pipelines that pack latents, the image processor knows the whole factor.
        settings = getattr(getattr(pipeline, "image_processor", None), "config", None)
        multiple = max(multiple, getattr(settings, "vae_scale_factor", 1))
        if not all(side and side > 0 and side % multiple == 0 for side in (height, width)):
            raise ValueError(
                f"height and width must both be given, positive and multiples of {multiple} for "
                f"{type(pipeline).__name__}, or neither; got height={height} and width={width}"
            )

    def _check_guidance(self, guidance_scale: float | None) -> None:
        """Warn about guidance that does nothing, and refuse what cannot be done."""
        name = type(self.pipeline).__name__
        if guidance_scale is not None and not self._reads_guidance(guidance_scale):
            del self._arguments["guidance_scale"]
            apart = "true_cfg_scale" in parameters(type(self.pipeline).__call__)
            warnings.warn(
                f"guidance_scale={guidance_scale} has no effect: the model of {name} does not read it. "
                + (
                    "It is guided by pipeline_kwargs={'true_cfg_scale': ...} with a negative_prompt, or "
                    "with an encode= that gives negative_prompt_embeds, and not at all without these"
                    if apart
                    else "It was distilled to do without: write guidance_scale: 1"
                ),
                stacklevel=3,
            )
        negative = self.negative_prompt is not None or self.negative_prompt_column is not None
        if self._encode is None and self._true_guidance(given=True) > 1 and not negative:
            raise ValueError(
                f"true_cfg_scale={self._true_guidance(given=True)} needs a negative prompt: write "
                f"negative_prompt (a blank is one), or give encode="
            )
        if negative and not self._guides_by_pair():
            warnings.warn(
                f"negative_prompt has no effect: {name} is guided by a pair only with "
                + (
                    "pipeline_kwargs={'true_cfg_scale': ...} above 1"
                    if encodes_negative_apart(self.pipeline)
                    else "guidance_scale above 1"
                ),
                stacklevel=3,
            )

    def _default(self, name: str) -> Any:
        """What the call takes for an argument: as given, or its own default; None if it has none."""
        own = parameters(type(self.pipeline).__call__).get(name)
        return self._arguments.get(name, None if own is None else own.default)

    def _true_guidance(self, *, given: bool) -> float:
        """true_cfg_scale, if it is given, or as the call has it by default; else 1."""
        if given and "true_cfg_scale" not in self._arguments:
            return 1.0
        value = self._default("true_cfg_scale")
        return float(value) if isinstance(value, int | float) else 1.0

    def _guides_by_pair(self) -> bool:
        """Whether the model is evaluated at a negative prompt as well."""
        if encodes_negative_apart(self.pipeline) and self._default("true_cfg_scale") is not None:
            return self._true_guidance(given=False) > 1
        scale = self._default("guidance_scale")
        return not isinstance(scale, int | float) or scale > 1

    def _reads_guidance(self, scale: float) -> bool:
        """Whether guidance_scale changes what the pipeline does.

        Guidance-distilled models tell by `guidance_embeds` whether they read it, but a pipeline may
        guide by a pair all the same, as those of Sana, FLUX.2 klein and Bria Fibo do. A call that has
        `true_cfg_scale` guides by that.
        """
        config = getattr(self.denoiser, "config", {})
        pair = getattr(type(self.pipeline), "do_classifier_free_guidance", None)
        if pair is not None and scale > 1:
            self.pipeline._guidance_scale = scale
            try:
                if self.pipeline.do_classifier_free_guidance:
                    return True
            except AttributeError:  # it asks for what only a call sets
                return True
            finally:
                del self.pipeline._guidance_scale
            embedded = getattr(config, "time_cond_proj_dim", None) is not None  # as in LCM's UNets
            return embedded or bool(getattr(config, "guidance_embeds", False))
        call = parameters(type(self.pipeline).__call__)
        by_pair = "true_cfg_scale" not in call and any(n.startswith("negative_") for n in call)
        return pair is not None or by_pair or getattr(config, "guidance_embeds", True)

    def _check_dropout(self) -> None:
        for name, module in self.denoiser.named_modules():
            if isinstance(module, _DropoutNd) and module.p > 0:
                raise ValueError(
                    f"{name} of the denoiser has dropout {module.p}: with it the ratio of two "
                    f"evaluations is noise; set it to 0, LoRA's included"
                )


def _of_rows(value: Any) -> bool:
    """Whether an argument of a denoiser is a tensor of rows, or a list of one tensor a row."""
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(v, Tensor) for v in value)
    return isinstance(value, Tensor)


def _moved(value: Condition, device: torch.device) -> Condition:
    return [v.to(device) for v in value] if isinstance(value, list) else value.to(device)
