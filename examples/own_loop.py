"""VADE, GVM and D3S in a plain PyTorch loop: `python examples/own_loop.py`, a few seconds.

The policy answers prompt i with one of 10 tokens, of which those below i % 11 are wrong: none for some
prompts, all for others. Replace `policy` by your model and its draws by your engine's rollouts.

Axes: D prompts, N rollouts, K rows kept, V tokens.
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project beside this folder

from rl.objective.advantages import leave_one_out
from rl.objective.losses import clipped_surrogate
from rl.objective.weights import objective_weight
from samplers import BetaPosterior, Planner, allocation, downsampling
from samplers.selection import ThompsonSelector


def main(steps: int = 60) -> list[float]:
    """Train; the exact pass rate over all prompts, before each step and at the end."""
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Embedding(200, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    is_right = torch.arange(10) >= (torch.arange(200) % 11)[:, None]  # (prompt, token)

    posterior = BetaPosterior(200)
    planner = Planner(
        posterior,
        ThompsonSelector(posterior),  # VADE chooses the prompts
        allocation.neyman,  # and, by GVM's scale, gives each its budget
        scale=allocation.gvm,
        keys=[f"prompt {i}" for i in range(200)],
        prompts_per_step=32,
        rollouts_per_step=256,
        minimum=2,  # one alone has nothing to be compared with
    )
    pass_rates = []
    for step in range(steps + 1):
        with torch.no_grad():
            logprob_DV = policy(torch.arange(200)).log_softmax(-1)
        pass_rates.append(float((logprob_DV.exp() * is_right).sum(1).mean()))
        if step == steps:
            break
        proposal = planner.propose()
        prompt_N = torch.tensor(proposal.prompt_N)
        index_N = torch.tensor(proposal.index_P)[prompt_N]
        draws = [torch.Generator().manual_seed(seed) for seed in proposal.seed_N.tolist()]
        probs_NV = logprob_DV[index_N].exp()
        token_N = torch.cat(
            [p.multinomial(1, generator=g) for p, g in zip(probs_NV, draws, strict=True)]
        )
        reward_N = is_right[index_N, token_N].float()
        planner.observe(proposal, reward_N.numpy(), proposal.prompt_N)  # before any is dropped

        # Budgets differ: this advantage and these weights keep them out of the objective.
        advantage_N = leave_one_out(reward_N, prompt_N)  # on full groups, then D3S drops rows
        share = downsampling.row_fraction(step / steps)
        rows_K = torch.from_numpy(downsampling.d3s(advantage_N.numpy(), row_fraction=share))
        index_K, token_K = index_N[rows_K], token_N[rows_K]
        weight_K = objective_weight("mean", reward_N[rows_K], prompt_N[rows_K], num_prompts=32)
        loss, _ = clipped_surrogate(
            policy(index_K).log_softmax(-1).gather(1, token_K[:, None]),
            logprob_DV[index_K, token_K][:, None],
            advantage_N[rows_K],
            weight_K[:, None],  # 1 / rows of the prompt
            denominator=32,  # prompts; stated by the caller: parts of a batch add up
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step:2d}: pass rate {pass_rates[-1]:.3f}, rewards {reward_N.mean():.3f}")
    return pass_rates


if __name__ == "__main__":
    main()
