"""Budget allocation: how many rollouts each prompt gets.

An allocator maps one number per prompt to one integer per prompt, and the integers sum to `total`
exactly. The number is `std_P`, the root of what one rollout leaves uncertain about the prompt's
share of the gradient; the scale functions of `samplers/allocation/scales.py`
compute it from a Beta posterior (a_P, b_P), and each belongs to an objective. A known gradient norm
multiplies it. Axes: P prompts.

    objective, estimator           exact scale, p known       scale function
    mean, baselined                sqrt(p (1 - p))            plug_in_std, mean_std, posterior_std,
                                                              thompson_std
    mean, accepted rows only       sqrt(p)                    accepted_std
    log, baselined                 sqrt((1 - p) / p)          log_std
    log (EM), accepted rows only   1 / sqrt(p + reg / p)      gvm_plug_in, gvm; inverse_sqrt, live
    the same, Reinforce-Ada Est    1 / sqrt(p + eps)          reinforce_ada_std

    variance of the gradient       allocator
    c / n                          neyman; any baseline known before the rollouts, or none
    c / (n - 1)                    leave_one_out (RLOO; VIP)
    c (n - 1) / n^2                dr_grpo
    c / n, rollouts cost unequal   cost_aware
    -                              knapsack, knapsack_posterior, knapsack_released: chance of a mixed
                                   group times value
    -                              inverse_pass_rate: as many as it takes to expect one pass
    -                              uniform
"""

from samplers.allocation.knapsack import (
    knapsack,
    knapsack_posterior,
    knapsack_released,
)
from samplers.allocation.rules import (
    Allocator,
    align_total,
    cost_aware,
    dr_grpo,
    inverse_pass_rate,
    leave_one_out,
    neyman,
    uniform,
)
from samplers.allocation.scales import (
    Scale,
    accepted_std,
    gvm,
    gvm_plug_in,
    inverse_sqrt,
    live,
    log_std,
    mean_pass_rate,
    mean_std,
    passed_share,
    plug_in_std,
    posterior_std,
    reinforce_ada_std,
    thompson_std,
)

__all__ = [
    "Allocator",
    "Scale",
    "accepted_std",
    "align_total",
    "cost_aware",
    "dr_grpo",
    "gvm",
    "gvm_plug_in",
    "inverse_pass_rate",
    "inverse_sqrt",
    "knapsack",
    "knapsack_posterior",
    "knapsack_released",
    "leave_one_out",
    "live",
    "log_std",
    "mean_pass_rate",
    "mean_std",
    "neyman",
    "passed_share",
    "plug_in_std",
    "posterior_std",
    "reinforce_ada_std",
    "thompson_std",
    "uniform",
]
