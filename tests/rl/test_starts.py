"""Starts through the pipeline: what is generated, rewarded, trained on, counted and refused."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from rl.config.language import RolloutConfig
from rl.stages.buffer import _started
from rl.stages.draw import _remember, roll_out
from rl.stages.planning import _LineEnds, make_starts
from rl.stages.records import Request
from rollouts.engines.transformers import TransformersEngine
from samplers.planner import Planner
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:starts. .* changes what is ascended")

WORD = "0123"
COLUMN = {
    "starts": "column",
    "starts_column": "solution",
    "starts_plain_share": 0.0,
    "allocator": "uniform",
    "trainer": "grpo",
    "posterior_decay_chosen": 1.0,
    "posterior_prior": "flat",
}


def rows(letters="a"):
    return [row | {"solution": WORD} for row in tiny.rows(letters)]


def spells(completions, **_):
    """1 if the completion is WORD and whatever follows."""
    return [float(text.replace(" ", "").startswith(WORD)) for text in completions]


def hopeless(made, *, but=()):
    """The trainer, all of whose prompts but these are known to fail."""
    others = [row for row in range(len(made.prompts)) if row not in but]
    made.planner.posterior.observe(others, [0.0] * len(others), [20] * len(others))
    return made


def trainer(folder, **settings):
    settings = COLUMN | {"data": rows(), "reward": spells, "prompts_per_step": 8} | settings
    return tiny.trainer(folder, **settings)


@pytest.mark.slow
def test_started_groups_are_drawn_rewarded_and_counted_apart(tmp_path):
    seen = []

    def reward(completions, completion_ids, answer, **_):
        seen.extend(zip(answer, completions, completion_ids, strict=True))
        return spells(completions)

    made = hopeless(trainer(tmp_path, reward=reward), but=(3, 5))
    batch = tiny.collect(made)
    (visit,) = batch.visits
    start_P, index_P = visit.proposals[0].start_P, visit.index_P
    # Half of four tokens, but for the prompts of which nothing is known.
    assert start_P.tolist() == [0 if row in (3, 5) else 2 for row in index_P.tolist()]
    begin = made.processing_class("01", add_special_tokens=False)["input_ids"]
    rollouts = visit.rounds[0].rollouts
    for p, row in enumerate(index_P.tolist()):
        plain = made.prompts[row].token_ids
        expected = plain if row in (3, 5) else (*plain, *begin)
        assert rollouts.prompt_ids[p] == visit.prompts[p].token_ids == expected

    # The reward saw the whole text, of which the batch holds what was drawn.
    assert len(seen) == 48
    for (answer, text, ids), p, tokens, mask in zip(
        seen, rollouts.prompt_N.tolist(), rollouts.token_NT, rollouts.mask_NT, strict=True
    ):
        assert answer == made.prompts[index_P[p]].columns["answer"]
        start = begin if start_P[p] else []
        assert ids == [*start, *tokens[mask].tolist()]
        assert len(ids) <= 5
        assert text.replace(" ", "").startswith("01" if start_P[p] else "")

    # What is known of the prompts without a start, and nothing else, comes from this step.
    alpha_D, beta_D = (made.planner.posterior.parameters()[i] - 1 for i in range(2))
    for row in range(8):
        assert alpha_D[row] + beta_D[row] == pytest.approx(6 if row in (3, 5) else 20, rel=1e-2)
    assert visit.proposals[0].a_P.tolist() == visit.proposals[0].b_P.tolist() == [1.0] * 8

    counts = made.ledger.metrics()
    prefilled = sum(len(prompt.token_ids) for prompt in visit.prompts)
    assert prefilled == 8 * 3 + 6 * 2
    assert counts["ledger/tokens_drawn"] == rollouts.size[1]
    assert counts["ledger/tokens_processed"] == prefilled + rollouts.size[1]
    started_N = torch.tensor(start_P)[rollouts.prompt_N] > 0
    expected = {
        "starts/share": 6 / 8,
        "starts/length": 2.0,
        "starts/reward": rollouts.reward_N[started_N].mean().item(),
        "starts/reward_without": rollouts.reward_N[~started_N].mean().item(),
    }
    found = {name: value for name, value in batch.metrics.items() if name.startswith("starts/")}
    assert found == pytest.approx(expected)


@pytest.mark.slow
def test_the_update_scores_what_was_drawn_and_nothing_of_the_start(tmp_path):
    made = hopeless(trainer(tmp_path))
    batch = tiny.collect(made)
    rollouts = batch.visits[0].rounds[0].rollouts
    with torch.no_grad():
        scored = made.policy.score(made.model, rollouts)
    torch.testing.assert_close(scored.logprob_NT, rollouts.logprob_NT, atol=2e-5, rtol=0)
    assert rollouts.length_N.max() <= 3


@pytest.mark.slow
def test_every_group_of_a_prompt_with_another_start_is_another_group(tmp_path):
    made = hopeless(trainer(tmp_path))
    row = int(tiny.collect(made).visits[0].index_P[0])
    assert made.planner.starts.fraction(row, 1) == pytest.approx(0.6)  # none passed: .5 + .2 x .5
    a_P, b_P = made.planner.starts.parameters([row], [3], np.zeros(1), np.zeros(1))
    assert (a_P.tolist(), b_P.tolist()) == ([1.0], [7.0])
    # The next group of the same band has these counts before it, which credit reads.
    groups, (visit,) = made.sampling.draw(made.policy, version=1)
    p = visit.index_P.tolist().index(row)
    assert (groups.a_P[p].item(), groups.b_P[p].item()) == (1.0, 7.0)
    assert groups.prompts[p].start_ids == visit.prompts[p].start_ids != ()


@pytest.mark.slow
def test_own_successes_and_failures_are_remembered_whole(tmp_path):
    made = hopeless(trainer(tmp_path, reward=tiny.small_digit, max_completion_length=4))
    batch = tiny.collect(made)
    (visit,) = batch.visits
    rollouts = visit.rounds[0].rollouts
    for p, row in enumerate(visit.index_P.tolist()):
        of_group = (rollouts.prompt_N == p).nonzero().flatten().tolist()
        for sign, is_of in ((1, 1.0), (-1, 0.0)):
            last = [n for n in of_group if rollouts.reward_N[n] == is_of][-1:]
            trace = made.planner.starts.trace(row, sign)
            assert (trace is None) == (not last)
            if trace is not None:
                drawn = rollouts.token_NT[last[0]][rollouts.mask_NT[last[0]]].tolist()
                assert trace.token_L.tolist() == [*visit.prompts[p].start_ids, *drawn]
                assert trace.reward == is_of and trace.version == 0


@pytest.mark.slow
def test_rows_with_text_of_others_between_are_not_remembered(tmp_path):
    made = hopeless(trainer(tmp_path))
    batch = tiny.collect(made)
    (visit,) = batch.visits
    rollouts = visit.rounds[0].rollouts
    made.planner.starts.load_state_dict(trainer(tmp_path / "b").planner.starts.state_dict())
    with_tool = rollouts.mask_NT.clone()
    with_tool[:, 0] = False
    tool = replace(rollouts, mask_NT=with_tool, logprob_NT=rollouts.logprob_NT * with_tool)
    _remember(made.planner, visit.proposals[0], visit.prompts, tool.take(tool.length_N > 0))
    assert made.planner.starts.metrics()["memory_traces"] == 0
    _remember(made.planner, visit.proposals[0], visit.prompts, rollouts)
    assert made.planner.starts.metrics()["memory_traces"] > 0


@pytest.mark.slow
def test_expected_lengths_of_whole_completions_do_not_mix_with_those_after_a_start(tmp_path):
    made = trainer(tmp_path)
    policy, sampling = made.policy, made.sampling
    plain, started = made.prompts[0], made.prompts[0].started((2, 3, 4, 5))
    made.ledger.begin(0)
    for prompt in (plain, started):
        request = Request(prompts=[prompt], budget_P=np.array([8]), seed_N=np.arange(8))
        roll_out(
            policy,
            made.ranks,
            sampling.lengths,
            request,
            policy.params(0),
            version=0,
            max_failed_share=0.0,
            ledger=made.ledger,
        )
    assert sampling.lengths.of([plain.key])[0] > 2
    assert sampling.lengths.of([plain.key + " started"])[0] == 1


def test_a_group_that_waited_has_the_prompt_it_was_drawn_with(tmp_path):
    prompt = trainer(tmp_path).prompts[0]
    assert _started(prompt, (*prompt.token_ids, 4, 5)).start_ids == (4, 5)
    assert _started(prompt, prompt.token_ids) is prompt


@pytest.mark.slow
def test_validation_never_has_a_start(tmp_path):
    seen = []

    def reward(completions, **_):
        seen.append(completions)
        return spells(completions)

    made = hopeless(trainer(tmp_path, reward=reward, eval_dataset=rows("b")))
    made.evaluate()
    assert not any(text.replace(" ", "").startswith("01") for texts in seen for text in texts[:8])
    assert made.ledger.totals.get("tokens_processed", 0) == 0


@pytest.mark.slow
def test_a_hopeless_task_trains_from_its_reference_and_not_without(tmp_path):
    """Four given tokens pass with chance 3e-5; the last of them after the others with some .07."""
    data = [row | {"solution": WORD} for row in tiny.rows("ab")]
    settings = COLUMN | {"data": data, "reward": spells, "prompts_per_step": 8, "max_steps": 15}
    settings |= {"max_empty_steps": 100, "rollouts_per_prompt": 8, "starts_plain_share": 0.2}
    settings |= {"max_completion_length": 4, "starts_fraction": 0.8, "starts_memory_tokens": 0}
    without = {"starts": "none", "starts_column": None, "starts_plain_share": 0.2}
    without |= {"starts_fraction": 0.5, "starts_memory_tokens": 2_000_000}
    without |= {"posterior_decay_chosen": 0.2}
    with_starts = tiny.run(tmp_path / "with", **settings)
    plain = tiny.run(tmp_path / "without", **(settings | without))
    weights, first = tiny.parameters(plain), tiny.model().state_dict()
    assert all(torch.equal(weights[name], first[name]) for name in first)
    assert plain.ledger.totals["rollouts_trained"] == 0

    tokens = with_starts.processing_class
    start, last = (tokens(text, add_special_tokens=False)["input_ids"] for text in ("012", "3"))
    prompt = torch.tensor([[*with_starts.prompts[0].token_ids, *start]])
    with torch.no_grad():
        before, after = (
            model(prompt).logits[0, -1].softmax(-1)[last[0]].item()
            for model in (tiny.model(), with_starts.model)
        )
    assert before < 0.15 and after > 2 * before
    logs = tiny.step_logs(tmp_path / "with")
    assert max(log.get("starts/reward", 0) for log in logs) > 0.3
    assert with_starts.ledger.totals["rollouts_trained"] > 0


# -- reference solutions and where starts may end


def config(folder, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return RolloutConfig(output_dir=str(folder), use_cpu=True, report_to="none", **settings)


def references(folder, *texts, **settings):
    prompts = [
        replace(prompt, columns={"solution": text})
        for prompt, text in zip(trainer(folder).prompts, texts, strict=False)
    ]
    settings = {"starts": "column", "starts_column": "solution"} | settings
    made = make_starts(config(folder, **settings), prompts, tiny.tokenizer(), eos_ids=[1])
    return [None if ids is None else ids.tolist() for ids in made._references]


@pytest.mark.slow
def test_references_are_read_to_their_end_or_the_first_stop(tmp_path):
    ids = tiny.tokenizer().convert_tokens_to_ids
    assert references(tmp_path, "01", None, "") == [[ids("0"), ids("1")], None, None]
    assert references(tmp_path, "0=12=3", stop=["=", "2"]) == [[ids("0")]]
    assert references(tmp_path, "0<eos>1") == [[ids("0")]]


@pytest.mark.slow
def test_a_column_without_references_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'solution' has no reference solution in any row"):
        references(tmp_path, None, "")
    with pytest.raises(ValueError, match="must hold text or None, got 5 in row 1"):
        references(tmp_path, "0", 5)
    with pytest.raises(ValueError, match="starts_column 'other' .* columns are answer, solution"):
        trainer(tmp_path, starts_column="other")


def test_lines_end_where_the_text_of_a_token_does():
    class Words:
        def decode(self, ids, **_):
            return ["a", "\n", "b\n", "\nc", "d\n "][ids[0]]

    assert _LineEnds(Words())(np.arange(5)).tolist() == [False, True, True, False, True]


# -- what is refused or warned of before the first rollout


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"starts": "column"}, "starts 'column' needs starts_column: column of reference"),
        ({"starts": "trace"}, "traces"),
        ({"starts_at": "word"}, "starts_at"),
        ({"starts_delta": 0.5}, r"starts_delta must lie in \[0, 0.5\), got 0.5"),
        ({"starts_step": 0.0}, "starts_step must be finite and above 0"),
        ({"starts_until": 1.5}, r"starts_until must lie in \[0, 1\], got 1.5"),
        ({"starts_fraction": -1.0}, r"starts_fraction must lie in \[0, 1\], got -1.0"),
        ({"starts_max_fraction": 2.0}, r"starts_max_fraction must lie in \[0, 1\]"),
        ({"starts_plain_share": 2.0}, r"starts_plain_share must lie in \[0, 1\]"),
        ({"starts_memory_tokens": -1}, "starts_memory_tokens must be at least 0"),
        (
            {"allocator": "gvm", "gvm_gradient_norm": "rms"},
            "write gvm_gradient_norm: none",
        ),
        ({"engine": "vllm", "stop": ["x"]}, "write engine: transformers, or leave stop out"),
    ],
)
def test_what_does_not_fit_starts_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **({"starts": "traces"} | settings))


def test_what_starts_do_to_the_objective_is_said(tmp_path):
    with pytest.warns(UserWarning, match="starts: traces changes what is ascended"):
        RolloutConfig(output_dir=str(tmp_path), use_cpu=True, starts="traces")


def test_a_setting_of_starts_without_them_is_warned_of(tmp_path):
    with pytest.warns(
        UserWarning, match="starts_step=0.1 has no effect: it needs starts: traces or"
    ):
        RolloutConfig(output_dir=str(tmp_path), use_cpu=True, starts_step=0.1)


def test_an_engine_that_does_not_take_starts_is_refused(tmp_path):
    class Own:
        def generate(self, prompts, budget_P, *, seeds_N, params, version=0):
            raise AssertionError

        def load_weights(self, model):
            pass

    with pytest.raises(
        ValueError, match="Own does not say takes_starts = True: write starts: none"
    ):
        trainer(tmp_path, engine=Own())
    trainer(tmp_path, engine=TransformersEngine(tiny.model(), tiny.tokenizer()))


def test_a_planner_of_ones_own_brings_its_own_starts(tmp_path):
    made = trainer(tmp_path)

    def planner(keys):
        return made.planner

    assert isinstance(made.planner, Planner)
    with pytest.raises(ValueError, match="planner chooses its own starts: give it a"):
        trainer(tmp_path, planner=planner)
    other = {
        name: RolloutConfig.__dataclass_fields__[name].default for name in COLUMN if "start" in name
    }
    assert trainer(tmp_path, planner=planner, **other).planner.starts is made.planner.starts
