"""Pipelines of `tests/more_pipelines.py`: the rows of `recipes/images/PIPELINES.md`."""

import ast
import inspect
import re
import textwrap
import warnings
from pathlib import Path

import diffusers
import pytest
import torch

from rollouts.diffusion.engine import DiffusersEngine
from rollouts.diffusion.pipeline_arguments import CANNOT_RUN
from rollouts.diffusion.text_encoder import OUTPUTS
from rollouts.diffusion.tree import seeded_generator
from rollouts.step_plan import StepPlan
from tests.more_pipelines import CASES, ENCODERS, add_encoder, encoder, make
from tests.tiny_pipelines import PIPELINES, image_prompts, tiny_pipeline

torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()

SIZE = dict(guidance_scale=3.0, height=32, width=32)
TABLE = Path(__file__).parents[2] / "recipes" / "images" / "PIPELINES.md"


def plan(name, **settings):
    return StepPlan(num_steps=3, rule=CASES[name].rule, level=0.7, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_draws_trees_and_replays_them_exactly(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # its guidance is read
        ours = DiffusersEngine(make(name), encode=encoder(name), **SIZE | CASES[name].settings)
    tree = plan(name, stochastic=(0, 1), splits=((1, 2),), trained=(0, 1))
    ours.check(image_prompts(2), [tree])
    rollouts = ours.generate(image_prompts(2), [2, 4], seeds_N=range(6), params=tree)
    assert ours.evaluations == tree.evaluations(3)
    logprob_NT = ours.logprobs(rollouts)
    assert torch.equal(logprob_NT, rollouts.logprob_NT)
    logprob_NT.sum().backward()
    gradients = [p.grad is not None and bool(p.grad.any()) for p in ours.denoiser.parameters()]
    assert sum(gradients) >= len(gradients) - 2  # the last block's text stream goes nowhere


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_a_pipeline_reads_prompts_as_its_own_call_does(name):
    pipeline = make(name)
    given = add_encoder(pipeline)
    settings = SIZE | CASES[name].settings | {"pipeline_kwargs": given}
    prompts, silent = image_prompts(2), plan(name, stochastic=())
    ours = DiffusersEngine(pipeline, **settings)
    rollouts = ours.generate(prompts, [1, 1], seeds_N=[7, 8], params=silent)
    found = rollouts.tree.latent_M[rollouts.node_NS[:, -1]]
    kind = "latent"
    if name == "Flux2KleinPipeline":  # what it returns as latents is what its VAE takes
        found, kind = torch.from_numpy(ours.decode(rollouts)), "np"
    together = [[0, 1]] if settings.get("batch_size") != 1 else [[0], [1]]
    expected = [
        pipeline(
            prompt=[prompts[i].prompt for i in rows],
            **SIZE,
            **given,
            num_inference_steps=3,
            generator=[seeded_generator(7 + i, "root", 0) for i in rows],
            output_type=kind,
            return_dict=False,
        )[0]
        for rows in together
    ]
    if kind == "np":
        expected = [torch.from_numpy((image * 255).round().astype("uint8")) for image in expected]
    assert torch.equal(found, torch.cat(expected))


def assigned(kind):
    """Names that the call of a pipeline gives to what its `encode_prompt` returns."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind.__call__)))
    for node in ast.walk(tree):
        call = node.value if isinstance(node, ast.Assign) else None
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "self.encode_prompt":
            return [ast.unparse(name) for name in node.targets[0].elts]
    raise AssertionError(kind)


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_encode_prompt_returns_is_what_the_call_takes_it_for(name):
    kind = getattr(diffusers, name)
    accepted = inspect.signature(kind.__call__).parameters
    for ours, theirs in zip(OUTPUTS[name], assigned(kind), strict=True):
        assert ours in accepted if ours else theirs not in accepted
        short = {"text_embeddings": "prompt_embeds", "cross_attn_mask": "prompt_attention_mask"}
        theirs = theirs.replace("uncond_", "negative_")
        for old, new in short.items():
            theirs = theirs.replace(old, new)
        assert ours is None or ours == theirs


@pytest.mark.parametrize("name", CANNOT_RUN)
def test_a_pipeline_that_cannot_be_run_is_refused_with_the_reason(name):
    around = tiny_pipeline("sd")
    around.__class__ = type(name, (type(around),), {})
    with pytest.raises(ValueError, match=f"{name} cannot be run by windows of its steps: "):
        DiffusersEngine(around, encode=lambda prompts: {})


def test_the_table_says_what_was_run():
    text = TABLE.read_text()
    tiny = {type(tiny_pipeline(name)).__name__ for name in PIPELINES}
    rows = dict(re.findall(r"^\| `(\w+)` \| (yes|no|refused)", text, flags=re.M))
    runs = {name for name, encodes in rows.items() if encodes != "refused"}
    assert runs == {*CASES, *tiny}
    assert {name for name, encodes in rows.items() if encodes == "yes"} == {*OUTPUTS}
    assert {*OUTPUTS} <= {*ENCODERS, *tiny}
    assert {name for name, encodes in rows.items() if encodes == "refused"} == {*CANNOT_RUN}


@pytest.mark.slow
def test_videos_are_decoded_frame_by_frame_as_the_pipeline_does():
    pipeline = make("WanPipeline")
    torch.manual_seed(2)
    pipeline.vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1] * 4,
        latents_std=[0.9] * 4,
    ).eval()
    call = SIZE | CASES["WanPipeline"].settings["pipeline_kwargs"]
    prompts = image_prompts(2)
    expected = pipeline(
        **encoder("WanPipeline")(prompts),
        **call,
        num_inference_steps=3,
        generator=[seeded_generator(seed, "root", 0) for seed in (7, 8)],
        output_type="np",
        return_dict=False,
    )[0]
    settings = SIZE | CASES["WanPipeline"].settings
    ours = DiffusersEngine(pipeline, encode=encoder("WanPipeline"), **settings)
    silent = plan("WanPipeline", stochastic=())
    videos = ours.decode(ours.generate(prompts, [1, 1], seeds_N=[7, 8], params=silent))
    assert videos.shape == (2, 5, 32, 32, 3) and videos.dtype == "uint8"
    assert (videos == (expected * 255).round().astype("uint8")).all()
