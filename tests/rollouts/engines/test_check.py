"""check_engine on engines of diffusion models: the real one passes, broken ones are named."""

from dataclasses import replace

import pytest
import torch

from rollouts.diffusion.engine import DiffusersEngine
from rollouts.engines.check import check_engine
from rollouts.step_plan import StepPlan
from tests.tiny_pipelines import ENGINE_SETTINGS, embeddings, image_prompts, tiny_pipeline

CHAIN = StepPlan(num_steps=3, rule="ddim", level=1.0, stochastic=(0, 1))
TREE = replace(CHAIN, splits=((1, 2),))


class Real:
    """The engine of the project over a tiny pipeline; broken ones change what it returns."""

    def __init__(self):
        settings = {"encode": embeddings("sd")} | ENGINE_SETTINGS["sd"]
        self._engine = DiffusersEngine(tiny_pipeline("sd"), **settings)

    def generate(self, prompts, budget_P, *, seeds_N, params, version=0):
        made = self._engine.generate(
            prompts, budget_P, seeds_N=seeds_N, params=params, version=version
        )
        return self.changed(made)

    def changed(self, made):
        return made

    def load_weights(self, model):
        self._engine.load_weights(model)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [CHAIN, TREE, replace(CHAIN, stochastic=())])
def test_the_engine_of_diffusion_models_passes(plan):
    check_engine(Real(), image_prompts(3), plan)


class MeansOverElements(Real):
    def changed(self, made):
        return replace(made, logprob_NT=made.logprob_NT / made.tree.latent_M[0].numel())


class HalvedLogProbs(Real):
    def changed(self, made):
        return replace(made, logprob_NT=made.logprob_NT / 2)


class OtherVersion(Real):
    def changed(self, made):
        return replace(made, version=made.version + 1)


class OtherSeeds(Real):
    def changed(self, made):
        return replace(made, seed_N=made.seed_N + 1)


class NoiseEverywhere(Real):
    def changed(self, made):
        return replace(made, mask_NT=torch.ones_like(made.mask_NT))


class SeedsThatDependOnTheBatch(Real):
    def generate(self, prompts, budget_P, *, seeds_N, params, version=0):
        shifted_N = seeds_N + int(budget_P.sum())
        made = super().generate(
            prompts, budget_P, seeds_N=shifted_N, params=params, version=version
        )
        return replace(made, seed_N=seeds_N)


class SiblingsApart(Real):
    """Every sample is a chain of its own."""

    def generate(self, prompts, budget_P, *, seeds_N, params, version=0):
        chain = replace(params, splits=())
        made = super().generate(prompts, budget_P, seeds_N=seeds_N, params=chain, version=version)
        return replace(made, tree=replace(made.tree, plan=params))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "plan", "message"),
    [
        (MeansOverElements, CHAIN, "must be sums over the .* elements of a latent"),
        (HalvedLogProbs, CHAIN, "must be sums over the .* elements of a latent"),
        (OtherVersion, CHAIN, "version must be passed through: asked with 7, got 8"),
        (OtherSeeds, CHAIN, "seed_N must be the seeds asked for"),
        (NoiseEverywhere, CHAIN, "mask_NT must be False on denoising steps that draw no noise"),
        (SeedsThatDependOnTheBatch, CHAIN, "prompt and seed must determine a rollout"),
        (SiblingsApart, TREE, "siblings share their states up to a split"),
    ],
)
def test_check_engine_catches_what_is_wrong_with_chains(broken, plan, message):
    with pytest.raises(AssertionError, match=message):
        check_engine(broken(), image_prompts(3), plan)


def test_plans_and_prompts_that_test_nothing_are_refused():
    with pytest.raises(ValueError, match="needs a plan with shared_start=False"):
        check_engine(Real(), image_prompts(2), replace(CHAIN, shared_start=True))
    with pytest.raises(ValueError, match="at least 2 prompts of different keys, got 1 prompts"):
        check_engine(Real(), image_prompts(1), CHAIN)
