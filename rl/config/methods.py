"""Every method by the name that YAML gives it, one record each.

A record says what a method is, which settings are its own, what it needs and what it does to the
objective. Choices in `--help`, checks, the table of docs/methods.md and the stages read these records: a
method is added by a function in the file that owns its stage and one record here. A function of the
user's own (`advantage: path/to/file.py:function`) gets a record too: `method_of` makes it.
Axes: D data set, P prompts, N rollouts (flat rows), K rows kept, T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, TypeVar

from transformers.utils import logging

from rl.config.diffusion_settings import DiffusionSettings
from rl.config.own import choice, is_own, load_own, nearest
from rl.config.settings import LanguageSettings
from rl.objective import (
    advantages,
    hapo,
    losses,
    posterior_baseline,
    prompt_history,
    sequence_losses,
    token_selection,
    tree_advantages,
)
from samplers import allocation, downsampling, stopping
from samplers.prior import FeaturesPrior, StrataPrior, pooled_prior
from samplers.selection import (
    PosteriorMeanSelector,
    ThompsonSelector,
    UniformSelector,
    mopps,
)
from samplers.selection.bands import OnlineBandSelector, StaticBandSelector
from samplers.selection.diverse import DiverseSelector
from samplers.starts import Starts

T = TypeVar("T")
M = TypeVar("M", bound="Method")
logger = logging.get_logger(__name__)
Settings = LanguageSettings | DiffusionSettings


# -- records


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method: what YAML calls it, what it is, and what must be known to combine it with others."""

    name: str
    help: str
    """One sentence: what it does."""
    function: Callable[..., Any] | None = None
    """What does it; None where the stage then does nothing."""
    source: str = ""
    """Authors or name of the paper, with its arXiv number."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Setting of its own -> the parameter of `function` that it is given as; "": its stage reads it."""
    needs: tuple[str, ...] = ()
    """Settings that must be written for it to work."""
    fits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Setting -> the values of it that this goes with; settings that are not here may have any."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Setting -> the value it has here where it is left out."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Parameter of `function` -> the column of the rollouts that it is given."""
    reads_success: bool = False
    """Whether it depends on which rollouts succeed."""
    reads_posterior: bool = False
    """Whether an advantage reads the parameters of the posterior."""
    language_only: bool = False
    """Whether diffusion models do not have it."""
    budgets: str | None = None
    """How unequal budgets change the objective under it; None: they do not."""

    def has(self, setting: str) -> bool:
        """Whether a setting is one of its own."""
        return setting in self.settings or setting in self.needs

    @property
    def file(self) -> str:
        """The file that has `function`, as a path from the root of the repository."""
        code: Any = self.function
        while isinstance(code, partial):
            code = code.func
        if is_own(self.name):
            return self.name.partition(":")[0]
        return "" if code is None else f"{code.__module__.replace('.', '/')}.py"


@dataclass(frozen=True, kw_only=True)
class SelectorMethod(Method):
    """Which prompts are rolled out: `function(posterior, *, keys, ...) -> Selector`."""

    column: str = ""
    """What `selection_column` of the data set must hold for it; empty: it reads none."""


@dataclass(frozen=True, kw_only=True)
class StartMethod(Method):
    """Where rollouts begin: `function(keys, ...) -> Starts`."""

    reads_column: bool = False
    """Whether prompts may have reference solutions, in `starts_column`."""


@dataclass(frozen=True, kw_only=True)
class AllocatorMethod(Method):
    """How many rollouts each prompt gets: `function(std_P, total, *, minimum, maximum) -> budget_P`."""

    scale: Callable[..., Any] | None = None
    """(a_P, b_P) -> std_P of the posterior; None: `function` takes a_P and b_P themselves."""
    pilot_scale: Callable[..., Any] | None = None
    """The same of counts of pilots alone, where it differs."""
    by_std: bool = False
    """Whether the scale is the reward's std, which `allocation_scale` names."""
    minimum: int = 0
    """Fewest rollouts of a prompt that it can work with."""
    wants_lengths: bool = False
    """Whether the planner must be told how long each prompt's rollouts are."""


@dataclass(frozen=True, kw_only=True)
class AdvantageMethod(Method):
    """From rewards to advantages: `function(reward_N, prompt_N, ...) -> advantage_N or advantage_NT`."""

    by_success: bool = False
    """Given successes in [0, 1] (`samplers/success.py`) in the place of rewards."""
    binary: bool = False
    """Takes successes of 0 and 1 alone; any other stops the run."""
    within_group: bool = False
    """Compares with the prompt's other rollouts: a lone one gets 0."""
    never_negative: bool = False
    """Accepts or leaves out, and pushes nothing away."""
    per_token: bool = False
    """Differs between the tokens of a row."""
    charges_kl: bool = False
    """Charges the KL to the reference token by token, so that rewards stay as they are."""

    @property
    def has_std(self) -> bool:
        """Whether it divides by a std."""
        return "std_eps" in self.settings


@dataclass(frozen=True, kw_only=True)
class DownSamplingMethod(Method):
    """Which rows train: `function(column, ..., *, ...) -> rows_K`, increasing."""

    by_passing: bool = False
    """Given 1 for a pass and 0 else in the place of rewards."""
    compares_again: bool = False
    """Whether the rows it keeps are compared with each other once more."""


@dataclass(frozen=True, kw_only=True)
class LossMethod(Method):
    """`function(logprob_NT, old_logprob_NT, advantage, weight_NT, *, denominator) -> (loss, sums)`."""

    one_ratio_per_row: bool = False
    """Weights and advantages must be constant within a row."""
    row_ratio: bool = False
    """Its ratio is of the whole row, so that the KL's is by default too."""
    wants_heterogeneity: bool = False
    """Whether it reads how far each token's entropy is from the step's quantile."""
    positive_only: bool = False
    """Has no signal that pushes away, and takes no negative advantage."""


@dataclass(frozen=True, kw_only=True)
class BaselineMethod(Method):
    """What a sample of a diffusion model is compared with."""

    within: str = ""
    """branch or prompt, if it compares with others of the same one in the same step."""
    over_steps: bool = False
    """Remembers rewards of earlier steps, and is in units of what it remembers."""
    of_tree: bool = False
    """Credits the steps of one chain apart: `function` is of `rl/objective/tree_advantages.py`."""


@dataclass(frozen=True, kw_only=True)
class PilotUse(Method):
    """What becomes of pilots."""

    trains: bool
    """Whether they are trained on."""


def _named(*methods: M) -> dict[str, M]:
    return {method.name: method for method in methods}


def required(value: T | None) -> T:
    """A setting that `validate` has seen to."""
    assert value is not None
    return value


# -- which prompts are rolled out

_CANDIDATES = {"selection_score": "score", "selection_candidates": "candidates"}
_BAND = {"band_low": "low", "band_high": "high", "band_short": "short"}

SELECTORS: dict[str, SelectorMethod] = _named(
    SelectorMethod(
        name="uniform",
        function=UniformSelector,
        settings={"seed": "seed"},
        help="Every prompt once per epoch, in an order drawn by the seed.",
    ),
    SelectorMethod(
        name="vade",
        function=ThompsonSelector,
        settings=_CANDIDATES,
        reads_success=True,
        source="VADE, arXiv:2511.18902",
        help="Draws a pass rate for each prompt from its posterior and takes the best scores.",
    ),
    SelectorMethod(
        name="mopps",
        function=mopps,
        settings={"selection_target": "target", "selection_candidates": "candidates"},
        reads_success=True,
        source="MoPPS, arXiv:2507.04632",
        help="Takes the prompts whose drawn pass rates lie closest to a target.",
    ),
    SelectorMethod(
        name="posterior_mean",
        function=PosteriorMeanSelector,
        settings={"selection_score": "score"},
        reads_success=True,
        help="Takes the prompts of the best expected score, without exploring.",
    ),
    SelectorMethod(
        name="band",
        function=OnlineBandSelector,
        settings=_BAND,
        reads_success=True,
        help="Takes prompts whose mean pass rate, as learned so far, lies in a band.",
    ),
    SelectorMethod(
        name="static_band",
        function=StaticBandSelector,
        settings=_BAND,
        needs=("selection_column",),
        column="pass rates in [0, 1]",
        help="Takes prompts whose pass rate in a column of the data set lies in a band.",
    ),
    SelectorMethod(
        name="diverse",
        function=DiverseSelector,
        settings=_CANDIDATES | {"selection_gamma": "gamma"},
        needs=("selection_column", "selection_gamma"),
        column="embeddings, equally long lists",
        reads_success=True,
        source="PDTS, arXiv:2504.19139",
        help="Takes prompts of good scores whose embeddings lie far apart.",
    ),
)


# -- what is expected of a prompt before it is visited

_LEARNS = {"posterior_prior_decay": "decay", "posterior_kappa": "kappa"}

PRIORS: dict[str, Method] = _named(
    Method(name="flat", help="Any pass rate, Beta(1, 1) for every prompt."),
    Method(
        name="pooled",
        function=pooled_prior,
        settings=_LEARNS,
        help="The pass rate of all prompts, as learned so far.",
    ),
    Method(
        name="column",
        function=StrataPrior,
        settings=_LEARNS | {"posterior_prior_column": ""},
        needs=("posterior_prior_column",),
        help="The pass rate of prompts with the same value in columns of the data set.",
    ),
    Method(
        name="features",
        function=FeaturesPrior,
        settings=_LEARNS
        | {
            "posterior_prior_penalty": "penalty",
            "posterior_prior_components": "",
            "posterior_prior_column": "",
        },
        source="after MPTS, arXiv:2501.11039",
        help="What prompts of similar features earn, by ridge regression.",
    ),
)


# -- where rollouts begin

_STARTS = {
    "starts_delta": "delta",
    "starts_until": "until",
    "starts_fraction": "first_fraction",
    "starts_max_fraction": "max_fraction",
    "starts_step": "step",
    "starts_plain_share": "plain_share",
    "starts_memory_tokens": "memory_tokens",
    "starts_at": "",
}

STARTS: dict[str, StartMethod] = _named(
    StartMethod(name="none", help="Every rollout begins at the end of its prompt."),
    StartMethod(
        name="traces",
        function=Starts,
        settings=_STARTS,
        reads_success=True,
        language_only=True,
        source="Prefix Sampling, arXiv:2605.05112; PrefixRL, arXiv:2601.18795",
        help="Along the prompt's own latest success while it hardly passes, along its latest failure "
        "while it hardly fails.",
    ),
    StartMethod(
        name="column",
        function=Starts,
        settings=_STARTS,
        needs=("starts_column",),
        reads_success=True,
        reads_column=True,
        language_only=True,
        source="AdaPrefix-GRPO, arXiv:2607.07674",
        help="The same, and along the reference solution of `starts_column` until the prompt passes.",
    ),
)


# -- how many rollouts each prompt gets

_KNAPSACK = "Knapsack RL, arXiv:2509.25849"

ALLOCATORS: dict[str, AllocatorMethod] = _named(
    AllocatorMethod(
        name="uniform",
        function=allocation.uniform,
        scale=allocation.posterior_std,
        help="The same number for every prompt.",
    ),
    AllocatorMethod(
        name="neyman",
        function=allocation.neyman,
        scale=allocation.posterior_std,
        by_std=True,
        settings={"allocation_scale": ""},
        reads_success=True,
        help="In proportion to the std of the prompt's reward.",
    ),
    AllocatorMethod(
        name="cost_aware",
        function=allocation.neyman,
        scale=allocation.posterior_std,
        by_std=True,
        settings={"allocation_scale": ""},
        wants_lengths=True,
        reads_success=True,
        help="Neyman, with fewer rollouts where they are long.",
    ),
    AllocatorMethod(
        name="leave_one_out",
        function=allocation.leave_one_out,
        scale=allocation.posterior_std,
        by_std=True,
        settings={"allocation_scale": ""},
        minimum=2,
        reads_success=True,
        source="VIP, arXiv:2602.01601",
        help="Least gradient variance under leave-one-out advantages.",
    ),
    AllocatorMethod(
        name="dr_grpo",
        function=allocation.dr_grpo,
        scale=allocation.posterior_std,
        by_std=True,
        settings={"allocation_scale": ""},
        minimum=3,
        reads_success=True,
        source="VIP, arXiv:2602.01601",
        help="Least gradient variance under advantages minus the group's mean.",
    ),
    AllocatorMethod(
        name="gvm",
        function=allocation.neyman,
        scale=allocation.gvm,
        pilot_scale=allocation.gvm_plug_in,
        settings={"gvm_alpha": "alpha", "gvm_beta": "beta"},
        reads_success=True,
        source="GVM-RAFT, arXiv:2505.02391",
        help="Least gradient variance of the EM objective over accepted rollouts: more for rare passes.",
    ),
    AllocatorMethod(
        name="log",
        function=allocation.neyman,
        scale=allocation.log_std,
        reads_success=True,
        help="Least gradient variance of the log objective.",
    ),
    AllocatorMethod(
        name="accepted",
        function=allocation.neyman,
        scale=allocation.accepted_std,
        reads_success=True,
        help="Least gradient variance of the mean objective where accepted rollouts alone train.",
    ),
    AllocatorMethod(
        name="reinforce_ada",
        function=allocation.neyman,
        scale=allocation.reinforce_ada_std,
        reads_success=True,
        source="Reinforce-Ada, arXiv:2510.04996",
        help="As many rollouts as it takes to see some pass.",
    ),
    AllocatorMethod(
        name="inverse_pass_rate",
        function=allocation.inverse_pass_rate,
        scale=allocation.mean_pass_rate,
        minimum=2,
        reads_success=True,
        help="In proportion to 1 / p, p being the expected pass rate, from 2 up to budget_max; prompts "
        "that pass at least half of the time count as p = 1/2.",
    ),
    AllocatorMethod(
        name="knapsack",
        function=allocation.knapsack,
        scale=allocation.mean_pass_rate,
        minimum=2,
        reads_success=True,
        source=_KNAPSACK,
        help="Most value of groups that are mixed, at the expected pass rates.",
    ),
    AllocatorMethod(
        name="knapsack_posterior",
        function=allocation.knapsack_posterior,
        minimum=2,
        reads_success=True,
        source=_KNAPSACK,
        help="The same, on average over the posterior.",
    ),
    AllocatorMethod(
        name="knapsack_released",
        function=allocation.knapsack_released,
        scale=allocation.passed_share,
        pilot_scale=allocation.mean_pass_rate,  # of counts, which are 0 where no pilot passed
        minimum=2,
        defaults={"posterior_prior": "flat"},  # under it a mean is the share of what is remembered
        reads_success=True,
        source=_KNAPSACK,
        help="The released code's: what is spare explores prompts that never passed.",
    ),
)

SCALES: dict[str, Method] = _named(
    Method(
        name="posterior_std",
        function=allocation.posterior_std,
        help="The root of the expected p(1 - p) under the posterior.",
    ),
    Method(
        name="plug_in_std",
        function=allocation.plug_in_std,
        help="sqrt(p(1 - p)) at the mean pass rate.",
    ),
    Method(
        name="mean_std",
        function=allocation.mean_std,
        help="The expected sqrt(p(1 - p)) under the posterior.",
    ),
    Method(
        name="thompson_std",
        function=allocation.thompson_std,
        help="sqrt(p(1 - p)) at a pass rate drawn from the posterior.",
    ),
)

PILOT_USES: dict[str, PilotUse] = _named(
    PilotUse(name="pool", trains=True, help="Pilots are ordinary rollouts and train."),
    PilotUse(name="discard", trains=False, help="Pilots are counted and not trained on."),
)


# -- when a group ends before its budget

_ENDS = "ends groups by what they have earned"

STOPPINGS: dict[str, Method] = _named(
    Method(name="none", help="Every group has its budget."),
    Method(
        name="positive",
        function=stopping.positive,
        settings={"stopping_needed": "needed"},
        needs=("stopping_round_size",),
        defaults={"stopping_needed": 1},
        reads_success=True,
        budgets=_ENDS,
        source="Reinforce-Ada, arXiv:2510.04996",
        help="Ends a group once enough of it passed.",
    ),
    Method(
        name="balanced",
        function=stopping.balanced,
        settings={"stopping_needed": "keep"},
        needs=("stopping_round_size",),
        defaults={"stopping_needed": 4},
        reads_success=True,
        budgets=_ENDS,
        source="Reinforce-Ada, arXiv:2510.04996",
        help="Ends a group once enough of it passed and enough failed.",
    ),
    Method(
        name="early",
        function=stopping.early,
        settings={"stopping_threshold": "threshold"},
        needs=("stopping_round_size",),
        reads_success=True,
        budgets=_ENDS,
        help="Ends a group that is unlikely to become mixed.",
    ),
    Method(
        name="early_unbiased",
        function=stopping.early_unbiased,
        settings={"stopping_threshold": "threshold", "stopping_rho": "rho"},
        needs=("stopping_round_size",),
        reads_success=True,
        help="The same, but some go on by lot and weigh more, which keeps the objective.",
    ),
)


# -- advantages of full groups

MEAN = "weighs a prompt of n rollouts by (n - 1) / n"
STD = "weighs a prompt of n rollouts by what its std is likely to be, which depends on n"
_STDS = {"std_correction": "correction", "std_eps": "eps"}
_WHITENED = "REINFORCE++, arXiv:2501.03262"

ADVANTAGES: dict[str, AdvantageMethod] = _named(
    AdvantageMethod(
        name="leave_one_out",
        function=advantages.leave_one_out,
        within_group=True,
        source="RLOO, arXiv:2402.14740",
        help="Reward minus the mean of the prompt's other rollouts.",
    ),
    AdvantageMethod(
        name="grpo",
        function=advantages.grpo,
        settings=_STDS | {"scale_rewards": "scale"},
        within_group=True,
        budgets=STD,
        source="GRPO, arXiv:2402.03300",
        help="Reward minus the prompt's mean, divided by the prompt's std.",
    ),
    AdvantageMethod(
        name="centred",
        function=advantages.centred,
        within_group=True,
        budgets=MEAN,
        source="Dr.GRPO, arXiv:2503.20783",
        help="Reward minus the prompt's mean.",
    ),
    AdvantageMethod(
        name="raft",
        function=advantages.raft,
        by_success=True,
        never_negative=True,
        source="GVM-RAFT, arXiv:2505.02391",
        help="1 for rollouts that are accepted, 0 for the others.",
    ),
    AdvantageMethod(
        name="maxrl",
        function=advantages.maxrl,
        by_success=True,
        binary=True,
        within_group=True,
        fits={"objective": ("mean", "flat")},
        budgets="weighs a prompt of n rollouts by (1 - (1 - p)^(n - 1)) / p, p being its pass rate",
        source="MaxRL, arXiv:2602.02710",
        help="Success minus the prompt's pass rate, divided by it: with objective mean it ascends the "
        "first n - 1 terms of the log of the pass rate. Rewards must pass or fail.",
    ),
    AdvantageMethod(
        name="posterior",
        function=posterior_baseline.posterior_leave_one_out,
        by_success=True,
        reads_posterior=True,
        source="SPO, arXiv:2509.13232, for one rollout",
        help="Success minus what the prompt's posterior expects, given the group's other rollouts too. "
        "Groups of one, and groups that are all alike, train.",
    ),
    AdvantageMethod(
        name="batch_whitened",
        function=advantages.batch_whitened,
        settings=_STDS,
        source=_WHITENED,
        help="Reward minus the step's mean, divided by the step's std.",
    ),
    AdvantageMethod(
        name="batch_whitened_tokens",
        function=advantages.batch_whitened_tokens,
        columns={
            "logprob_NT": "logprob_NT",
            "reference_logprob_NT": "reference_logprob_NT",
            "mask_NT": "mask_NT",
        },
        settings=_STDS | {"reward_kl": "beta"},
        per_token=True,
        charges_kl=True,
        source=_WHITENED,
        help="The same for each token, whose return is charged the KL from there on.",
    ),
    AdvantageMethod(
        name="batch_scaled",
        function=advantages.batch_scaled,
        settings=_STDS,
        within_group=True,
        budgets=MEAN,
        source=_WHITENED,
        help="Reward minus the prompt's mean, divided by the step's std.",
    ),
    AdvantageMethod(
        name="stratified",
        function=advantages.stratified,
        columns={"stratum_N": "stratum_N"},
        settings=_STDS | {"stratum_alpha": "alpha", "stratum_fallback": "fallback"},
        within_group=True,
        budgets=STD,
        source="Stratified GRPO, arXiv:2510.06214",
        help="Grpo among rollouts that used tools alike, blended with grpo of the prompt.",
    ),
    AdvantageMethod(
        name="token_level",
        function=hapo.token_level_group,
        columns={"length_N": "length_N"},
        within_group=True,
        budgets=STD,
        source="HAPO, arXiv:2509.16591",
        help="Reward minus the mean over the prompt's tokens, divided by their std.",
    ),
)

AGGREGATIONS: dict[str, Method] = _named(
    Method(name="sum_then_normalize", help="Rewards are weighted and summed, then compared."),
    Method(
        name="normalize_then_sum",
        function=advantages.normalised_sum,
        settings=_STDS,
        source="GDPO, arXiv:2601.05242",
        help="Each reward is compared within the prompt by itself; their weighted sum is divided by its "
        "std over the step.",
    ),
)
"""How several rewards become one advantage."""

_HISTORY = {"history_steps": ""}
_DDPO = "DDPO, arXiv:2305.13301"
_BRANCH_GRPO = "BranchGRPO, arXiv:2509.06040"

BASELINES: dict[str, BaselineMethod] = _named(
    BaselineMethod(
        name="prompt",
        function=advantages.centred,
        within="prompt",
        budgets=MEAN,
        help="The mean of the prompt's samples.",
    ),
    BaselineMethod(
        name="history",
        function=prompt_history.history_standardised,
        settings=_HISTORY,
        over_steps=True,
        source="B2-DiffuRL, arXiv:2503.11240",
        help="The mean and std of the prompt's samples of this step and earlier ones.",
    ),
    BaselineMethod(
        name="buffer",
        function=prompt_history.buffer_standardised,
        settings=_HISTORY,
        over_steps=True,
        source=_DDPO,
        help="The mean and std of the prompt's last rewards.",
    ),
    BaselineMethod(
        name="siblings",
        function=advantages.leave_one_out,
        within="branch",
        help="The mean of the other samples of its branch.",
    ),
    BaselineMethod(
        name="branch",
        function=tree_advantages.branch_mean,
        within="branch",
        of_tree=True,
        help="At each step, the mean of the samples that share the state before it.",
    ),
    BaselineMethod(
        name="leave_one_out",
        function=tree_advantages.leave_branch_out,
        within="prompt",
        of_tree=True,
        help="At each step, the mean of the prompt's samples that do not share the step.",
    ),
    BaselineMethod(
        name="depth",
        function=tree_advantages.depth_normalised,
        within="prompt",
        of_tree=True,
        source=_BRANCH_GRPO,
        help="At each step, the mean and std of the prompt's nodes at that depth.",
    ),
    BaselineMethod(
        name="parent",
        function=tree_advantages.parent_difference,
        within="branch",
        of_tree=True,
        help="At each step, what the samples after it gain over those after the state before it.",
    ),
)

OBJECTIVES: dict[str, Method] = _named(
    Method(name="mean", help="The pass rate, summed over prompts."),
    Method(name="log", reads_success=True, help="The log of the pass rate, summed over prompts."),
    Method(
        name="em",
        reads_success=True,
        language_only=True,
        fits={"advantage": ("raft",)},
        budgets="weighs a prompt of pass rate p by 1 - (1 - p)^n, the chance that any of its n passes",
        source="GVM-RAFT, arXiv:2505.02391",
        help="The log of the pass rate, by accepted rollouts alone.",
    ),
    Method(
        name="flat",
        budgets="counts every rollout alike, so a prompt weighs by its budget",
        help="The mean over rollouts, whatever the budgets make of it.",
    ),
)


def scale_of(config: LanguageSettings) -> str:
    """`scale_rewards` as one of `advantages.SCALES`; TRL's true and false, from YAML or typed, too."""
    given = config.scale_rewards
    known: dict[Any, str] = {None: "group", True: "group", False: "none"}
    known |= {"true": "group", "false": "none"}
    return known.get(given.lower() if isinstance(given, str) else given, str(given))


# -- which rows train

_KEEP = {"rows_per_prompt": "keep"}
_FRACTIONS = {"row_fraction_initial": "", "row_fraction_final": ""}

DOWN_SAMPLERS: dict[str, DownSamplingMethod] = _named(
    DownSamplingMethod(name="none", help="All rows train."),
    DownSamplingMethod(
        name="d3s",
        function=downsampling.d3s,
        columns={"advantage_N": "advantage_N"},
        settings=_FRACTIONS,
        source="D3S, arXiv:2509.22115",
        help="The rows of the batch whose advantages vary most.",
    ),
    DownSamplingMethod(
        name="d3s_two_stage",
        function=downsampling.d3s_two_stage,
        columns={"advantage_N": "advantage_N", "prompt_N": "prompt_N"},
        settings=_FRACTIONS,
        source="D3S, arXiv:2509.22115",
        help="The same within each prompt first, then across prompts.",
    ),
    DownSamplingMethod(
        name="max_variance",
        function=downsampling.max_variance,
        columns={"value_N": "advantage_N", "prompt_N": "prompt_N"},
        settings=_KEEP,
        needs=("rows_per_prompt",),
        source="D3S, arXiv:2509.22115",
        help="The rows of each prompt whose advantages vary most.",
    ),
    DownSamplingMethod(
        name="pods",
        function=downsampling.max_variance,
        columns={"value_N": "reward_N", "prompt_N": "prompt_N"},
        settings=_KEEP | dict.fromkeys(_STDS, ""),
        needs=("rows_per_prompt",),
        compares_again=True,
        language_only=True,
        fits={
            "advantage": tuple(
                name
                for name, method in ADVANTAGES.items()
                if not (
                    method.never_negative
                    or method.per_token
                    or method.binary
                    or method.reads_posterior
                )
            )
        },
        source="PODS, arXiv:2504.13818",
        help="The rows of each prompt whose rewards vary most, compared with each other once more.",
    ),
    DownSamplingMethod(
        name="half",
        function=downsampling.half,
        columns={"value_N": "reward_N", "prompt_N": "prompt_N"},
        settings=_KEEP,
        needs=("rows_per_prompt",),
        help="The best and the worst rows of each prompt, half and half.",
    ),
    DownSamplingMethod(
        name="balanced",
        function=downsampling.balanced,
        columns={"reward_N": "passed_N", "prompt_N": "prompt_N"},
        settings=_KEEP,
        needs=("rows_per_prompt",),
        by_passing=True,
        reads_success=True,
        source="Reinforce-Ada, arXiv:2510.04996",
        help="Rows of each prompt that passed and that failed, half and half.",
    ),
)


# -- which of their tokens train

TOKEN_SELECTIONS: dict[str, Method] = _named(
    Method(name="none", help="All tokens train."),
    Method(
        name="d3s",
        function=token_selection.top_tokens,
        columns={"advantage_N": "advantage", "entropy_NT": "entropy_NT", "mask_NT": "mask_NT"},
        settings={"token_scope": "scope"},
        source="D3S, arXiv:2509.22115",
        help="The tokens of largest |advantage| times entropy.",
    ),
    Method(
        name="entropy",
        function=token_selection.top_entropy,
        columns={"entropy_NT": "entropy_NT", "mask_NT": "mask_NT"},
        settings={"token_scope": "scope"},
        source="Wang et al. 2025, arXiv:2506.01939",
        help="The tokens of largest entropy.",
    ),
)


# -- losses, and the presets that fill settings left unset

_CLIPS = {"epsilon": "epsilon_low", "epsilon_high": "epsilon_high"}
_DUAL = _CLIPS | {"delta": "dual_clip"}
_MASK = {"mask_NT": "mask_NT"}  # a row's ratio is over every decision, also those of weight 0
_ROW_RATIO = {"epsilon": 3e-4, "epsilon_high": 4e-4}
_GSPO = "GSPO, arXiv:2507.18071"

LOSSES: dict[str, LossMethod] = _named(
    LossMethod(
        name="raft",
        function=losses.raft,
        source="RAFT, arXiv:2504.11343",
        help="Log-likelihood of accepted rollouts.",
    ),
    LossMethod(
        name="raft_pp",
        function=losses.raft_pp,
        settings=_CLIPS,
        positive_only=True,
        source="RAFT++, arXiv:2505.02391",
        help="Clipped ratios of accepted rollouts.",
    ),
    LossMethod(
        name="grpo",
        function=losses.clipped_surrogate,
        settings=_DUAL,
        source="GRPO, arXiv:2402.03300",
        help="Clipped ratios of tokens times advantages.",
    ),
    LossMethod(
        name="dapo",
        function=losses.clipped_surrogate,
        settings=_DUAL,
        defaults={"length_weight": "token_mean", "epsilon_high": 0.28},
        source="DAPO, arXiv:2503.14476",
        help="The same with a higher upper clip, every token counting alike.",
    ),
    LossMethod(
        name="dr_grpo",
        function=losses.clipped_surrogate,
        settings=_DUAL,
        defaults={"length_weight": "token_sum", "advantage": "centred"},
        source="Dr.GRPO, arXiv:2503.20783",
        help="The same without division by lengths and stds.",
    ),
    LossMethod(
        name="cispo",
        function=losses.cispo,
        settings={"ratio_cap": "ratio_cap"},
        defaults={"length_weight": "token_mean"},
        source="MiniMax-M1, arXiv:2506.13585",
        help="Capped ratios as constant weights of the log-likelihood.",
    ),
    LossMethod(
        name="sapo",
        function=losses.sapo,
        source="SAPO, arXiv:2511.20347",
        help="A smooth gate of the ratio in the place of a clip.",
    ),
    LossMethod(
        name="gspo",
        function=sequence_losses.gspo,
        settings=_DUAL,
        defaults=_ROW_RATIO,
        columns=_MASK,
        one_ratio_per_row=True,
        row_ratio=True,
        source=_GSPO,
        help="One clipped ratio per rollout, the mean over its tokens.",
    ),
    LossMethod(
        name="gspo_token",
        function=sequence_losses.gspo_token,
        settings=_DUAL,
        defaults=_ROW_RATIO,
        columns=_MASK,
        row_ratio=True,
        source=_GSPO,
        help="The same, with advantages that may differ between tokens.",
    ),
    LossMethod(
        name="luspo",
        function=sequence_losses.gspo,
        settings=_DUAL,
        defaults=_ROW_RATIO | {"length_weight": "row_sum"},
        columns=_MASK,
        one_ratio_per_row=True,
        row_ratio=True,
        source="LUSPO, arXiv:2602.05261",
        help="Gspo with rollouts that count by their length.",
    ),
    LossMethod(
        name="vespo",
        function=sequence_losses.vespo,
        defaults={"length_weight": "token_mean"},
        columns=_MASK,
        source="VESPO, arXiv:2602.10693",
        help="A smooth weight of the whole rollout's ratio in the place of a clip.",
    ),
    LossMethod(
        name="rloo",
        function=sequence_losses.rloo,
        settings=_CLIPS,
        columns=_MASK,
        one_ratio_per_row=True,
        source="RLOO, arXiv:2402.14740",
        help="The whole rollout's ratio, clipped.",
    ),
    LossMethod(
        name="hapo",
        function=hapo.hapo,
        settings=_DUAL,
        defaults={
            "length_weight": "token_mean",
            "epsilon_high": 0.28,
            "delta": 10.0,
            "advantage": "token_level",
        },
        columns={"h_NT": "heterogeneity_NT"},
        wants_heterogeneity=True,
        source="HAPO, arXiv:2509.16591",
        help="Clips and advantages that depend on each token's entropy.",
    ),
)

_RAFT = {"advantage": "raft", "objective": "em", "length_weight": "row_mean", "epsilon_high": 0.2}

PRESETS: dict[str, Method] = _named(
    Method(
        name="grpo",
        defaults={
            "advantage": "grpo",
            "loss": "grpo",
            "objective": "mean",
            "length_weight": "row_mean",
            "epsilon_high": 0.2,
        },
        source="GRPO, arXiv:2402.03300",
        help="Group-relative advantages, clipped ratios, mean objective.",
    ),
    Method(
        name="raft",
        defaults=_RAFT | {"loss": "raft"},
        source="RAFT, arXiv:2504.11343",
        help="Accepted rollouts, their log-likelihood, EM objective.",
    ),
    Method(
        name="raft++",
        defaults=_RAFT | {"loss": "raft_pp"},
        source="RAFT++, arXiv:2505.02391",
        help="Accepted rollouts, clipped ratios, EM objective.",
    ),
)


def default_correction(config: LanguageSettings) -> str:
    """The default of `importance_correction`: TRL's for vLLM.

    After a filter vLLM's log-probabilities are those of a narrower distribution, and the ratio of a row
    falls with its length: there it is left to who asks for it.
    """
    filtered = config.top_k or config.top_p != 1 or config.min_p or config.repetition_penalty != 1
    if config.engine != "vllm" or filtered:
        return "none"
    return "token_truncate" if config.loss == "vespo" else "sequence_mask"


# -- all of them, and functions of the user's own

METHODS: dict[str, Mapping[str, Method]] = {
    "trainer": PRESETS,
    "selector": SELECTORS,
    "posterior_prior": PRIORS,
    "starts": STARTS,
    "allocator": ALLOCATORS,
    "allocation_scale": SCALES,
    "pilot_use": PILOT_USES,
    "stopping": STOPPINGS,
    "advantage": ADVANTAGES,
    "multi_objective_aggregation": AGGREGATIONS,
    "baseline": BASELINES,
    "objective": OBJECTIVES,
    "down_sampling": DOWN_SAMPLERS,
    "token_selection": TOKEN_SELECTIONS,
    "loss": LOSSES,
}
"""Setting that names a method -> the records it may name."""


@dataclass(frozen=True, kw_only=True)
class OwnStage:
    """What a function of the user's own is given in a stage."""

    record: type[Method]
    """The kind of record that it gets."""
    positional: int = 0
    """How many arguments come first, whatever the parameters are called."""
    given: tuple[str, ...] = ()
    """What it may name besides columns and settings."""
    columns: tuple[str, ...] = ()
    """Columns that it may name besides `COLUMNS`."""


OWN_STAGES: dict[str, OwnStage] = {
    "selector": OwnStage(
        record=SelectorMethod, given=("posterior", "keys", "num_prompts", "column_D")
    ),
    "allocator": OwnStage(record=AllocatorMethod, positional=2, given=("minimum", "maximum")),
    "stopping": OwnStage(record=Method, positional=1),
    "advantage": OwnStage(record=AdvantageMethod, positional=2, columns=("reference_logprob_NT",)),
    "down_sampling": OwnStage(
        record=DownSamplingMethod,
        given=("progress", "row_fraction"),
        columns=("advantage_N", "passed_N"),
    ),
    "token_selection": OwnStage(
        record=Method, given=("fraction",), columns=("advantage", "advantage_N", "entropy_NT")
    ),
    "loss": OwnStage(
        record=LossMethod,
        positional=4,
        given=("denominator",),
        columns=("entropy_NT", "reference_logprob_NT", "heterogeneity_NT", "elements"),
    ),
}
"""Stages that take `path/to/file.py:function`."""

COLUMNS = (
    *("reward_N", "reward_NF", "success_N", "prompt_N", "length_N", "truncated_N", "stratum_N"),
    *("seed_N", "mask_NT", "token_NT", "logprob_NT"),
)
"""Columns of rollouts that a function of the user's own may name in every stage that has rollouts."""

BY_PLANNER = ("selector", "allocator", "stopping")
"""Stages before there are rollouts."""


def method_of(config: Any, stage: str) -> Any:
    """The record of the method that setting `stage` names: one of `METHODS`, or of a file of the user's.

    Raises:
        ValueError: if there is no such method, file or function.
    """
    name = getattr(config, stage) or ""
    if stage in OWN_STAGES and is_own(name):
        return own_method(config, stage, load_own(name, what=stage), name)
    if name not in METHODS[stage]:
        choice(stage, name, METHODS[stage])
    return METHODS[stage][name]


def own_method(config: Any, stage: str, function: Callable[..., Any], name: str = "") -> Any:
    """The record of a function that is not one of ours: what it is given is what its parameters name.

    A parameter with the name of a column of the rollouts is given that, and one with the name of a
    setting its value, beside what every function of the stage is given.

    Raises:
        ValueError: naming a parameter without default that nothing here has.
    """
    name = name or getattr(function, "__name__", type(function).__name__)
    known = inspect.signature(function).parameters
    names = [*known][OWN_STAGES[stage].positional :]
    columns = [n for n in names if n in COLUMNS or n in OWN_STAGES[stage].columns]
    settings = {f.name for f in fields(config)}
    for each in names:
        empty = known[each].default is inspect.Parameter.empty
        variadic = known[each].kind in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        )
        if empty and not variadic and each not in (*columns, *settings, *OWN_STAGES[stage].given):
            here = [*OWN_STAGES[stage].given, *([] if stage in BY_PLANNER else COLUMNS)]
            here += OWN_STAGES[stage].columns
            raise ValueError(
                f"{stage} {name} wants {each!r}, which is none of {', '.join(here)}, and no setting."
                f"{nearest(each, [*here, *settings])}"
            )
    reads = stage in ("allocator", "stopping") or {"posterior", "success_N", "passed_N"} & {*names}
    more: dict[str, Any] = {"by_std": True} if stage == "allocator" else {}
    return OWN_STAGES[stage].record(
        name=name,
        function=function,
        help="A function of your own.",
        columns={} if stage in BY_PLANNER else {n: n for n in columns},
        settings={n: n for n in names if n in settings and n not in columns},
        reads_success=bool(reads),
        **more,
    )


def kept_to(check: Callable[..., None], config: Any, method: Method) -> None:
    """Test a function of the user's own on made-up rollouts.

    Raises:
        ValueError: saying which part of its contract it breaks.
    """
    try:
        check(required(method.function), **settings_of(config, method))
    except AssertionError as error:
        raise ValueError(f"{method.name} is not what a run needs: {error}") from error


def reads_success(config: Any) -> dict[str, str]:
    """The stages of `config` that depend on which rollouts succeed -> their methods."""
    stages = ("selector", "starts", "allocator", "stopping", "objective", "down_sampling")
    found = {}
    for stage in (each for each in stages if hasattr(config, each)):
        method = method_of(config, stage)
        if method.reads_success:
            found[stage] = method.name
    if config.retire_above is not None:
        found["retire_above"] = str(config.retire_above)
    return found


def settings_of(config: Any, method: Method) -> dict[str, Any]:
    """Settings of a method, by the names of its function's parameters."""
    special = {"scale_rewards": scale_of}
    return {
        name: special[setting](config) if setting in special else getattr(config, setting)
        for setting, name in method.settings.items()
        if name
    }
