"""The report of run folders: what the tables say, what is drawn, and runs that are not whole."""

import io
import json
import math
import re
import struct

import numpy as np
import pytest
from rich.console import Console

from recipes.report import pictures, run_folder
from recipes.report import report as module
from recipes.report.report import report
from recipes.report.run_folder import (
    Run,
    change,
    curve_of,
    grouped,
    mean_over_tokens,
    named,
    paired,
    read_run,
    rollouts_until,
    seeds_apart,
    smooth,
    tokens_until,
    values_of,
)
from tests import tiny

pytestmark = pytest.mark.slow  # whole runs

PICTURES = ["learning", "budgets", "posterior", "groups"]


def fake_run(
    folder, *, steps=60, planned=None, speed=1.0, adaptive=True, seed=0, validate_every=10
):
    """A run folder as a run writes it: 400 prompts, 24 a step, 8 rollouts each on average."""
    rng = np.random.default_rng(seed)
    ease = rng.normal(-1.6, 1.8, size=400)
    believed = np.full(400, 0.5)
    total = dict.fromkeys(("rollouts_drawn", "tokens_drawn", "tokens_trained", "updates"), 0)
    total |= {"tokens_filtered": 0, "seconds_rollout": 0.0, "seconds_update": 0.0}
    folder.mkdir(parents=True)
    settings = {"max_steps": planned or steps, "allocator": "gvm" if adaptive else "uniform"}
    settings |= {"learning_rate": 1e-4, "seed": seed, "output_dir": str(folder)}
    about = {"settings": settings, "prompts": 400, "validation_prompts": 101}
    (folder / "run.json").write_text(json.dumps(about))
    log, decisions = [], []

    def validate(step, rate):
        share = float(np.clip(rate.mean() + rng.normal(0, 0.01), 0, 1))
        greedy = float(np.clip(share + 0.06, 0, 1))
        line = {"step": step, "eval_greedy_accuracy": greedy, "eval_pass_rate": share}
        log.append(line | {"eval_pass_rate_se": 0.03, "epoch": step / 17})

    for step in range(1, steps + 1):
        rate = 1 / (1 + np.exp(-ease - speed * 3.2 * (1 - math.exp(-step / 25))))
        if step == 1:
            validate(0, rate)
        chosen = rng.choice(400, size=24, replace=False)
        budget = np.full(24, 8)
        if adaptive:
            std = np.sqrt(believed[chosen] * (1 - believed[chosen])) + 0.05
            budget = 2 + rng.multinomial(24 * 6, std / std.sum())
        before = believed[chosen].copy()
        right = rng.binomial(budget, rate[chosen])
        believed[chosen] = (1 + right) / (2 + budget)
        mixed = (right > 0) & (right < budget)
        tokens = 60 * int(budget.sum())
        total["rollouts_drawn"] += int(budget.sum())
        total["tokens_drawn"] += tokens
        total["tokens_trained"] += tokens // 2
        total["tokens_filtered"] += tokens - tokens // 2
        total["updates"] += 1
        total["seconds_rollout"] += 2.5
        total["seconds_update"] += 1.25
        line = {
            "step": step,
            "loss": -0.1,
            "groups/mixed_share": float(mixed.mean()),
            "groups/all_pass_share": float((right == budget).mean()),
            "groups/all_fail_share": float((right == 0).mean()),
            "reward": float(right.sum() / budget.sum()),
        }
        if mixed.any():
            line["reward_trained"] = float(right[mixed].sum() / budget[mixed].sum())
        log.append(line | {f"ledger_total/{name}": value for name, value in total.items()})
        decisions.append(
            {
                "step": step,
                "prompts": [f"key{i}" for i in chosen],
                "budgets": budget.tolist(),
                "reward_sums": right.astype(float).tolist(),
                "pass_rates_before": before.tolist(),
                "posterior_histogram": np.histogram(believed, 20, (0, 1))[0].tolist(),
            }
        )
        if step % validate_every == 0:
            validate(step, rate)
    if steps == (planned or steps):
        log.append({"step": steps, "train_runtime": 3.0, "train_loss": -0.1})
    write_lines(folder / "metrics.jsonl", log if steps else [])
    write_lines(folder / "steps.jsonl", decisions)
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def reported(*folders, width=140, **settings):
    """The page's text and what was printed."""
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    page = report(folders, console=console, **settings)
    return page, page.read_text(encoding="utf-8"), console.export_text()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("runs") / "gvm")


@pytest.fixture(scope="module")
def of_run(run):
    return reported(run)


@pytest.fixture
def words(monkeypatch):
    """Leaves out the pictures, which take most of the time, where a test is about words."""
    monkeypatch.setattr(module, "draw", lambda groups, page: {})


def test_a_run_becomes_a_page_and_four_pictures_in_its_folder(run, of_run):
    page, text, _ = of_run
    assert page == run / "report.html"
    for name in PICTURES:
        data = (run / f"report-{name}.png").read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert width == 1575 and height > 500  # 10.5 inches at 150 dpi
    assert text.count("data:image/png;base64,") == 4


def test_the_page_needs_nothing_but_itself(of_run):
    _, text, _ = of_run
    assert "<script" not in text and "http" not in text
    assert all(src.startswith("data:") for src in re.findall(r'src="([^"]*)"', text))
    for tag in ("table", "tr", "td", "th", "div", "details", "figure", "body", "html"):
        assert len(re.findall(f"<{tag}[ >]", text)) == text.count(f"</{tag}>")


def test_the_table_says_what_was_spent_and_learned(run, of_run):
    _, text, printed = of_run
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    reward = [row["reward"] for row in metrics if "reward" in row]  # 60 lines: a tenth is 6
    passed = [row["eval_pass_rate"] for row in metrics if "eval_pass_rate" in row]
    for expected in (
        "11,520",  # rollouts: 60 steps * 24 prompts * 8
        "691,200",  # tokens: 60 each
        "345,600",  # half of them trained
        "225",  # seconds: 60 * (2.5 + 1.25)
        f"{np.mean(reward[:6]):.3f} → {np.mean(reward[-6:]):.3f}",
        f"{passed[0]:.1%} → {passed[-1]:.1%}",
        f"{100 * (passed[-1] - passed[0]):+.1f} ± 4.2 points",  # 100 * sqrt(2) * 0.03
    ):
        assert expected in printed
        assert expected in text
    assert "learning_rate" in text and "0.0001" in text  # settings of run.json
    assert "note:" not in printed


def test_a_standard_narrow_terminal_shows_every_number_whole(run, words):
    printed = reported(run, width=80)[2]
    cost = printed.split("Seconds by phase")[0]
    assert re.search(r"tokens generated +691,200 *\n", cost)  # a wide table lies on its side
    assert "…" not in printed
    assert all(number in printed for number in ("11,520", "691,200", "345,600", " gvm "))


def test_a_run_may_have_any_name_on_a_narrow_terminal(tmp_path, words):
    cost = reported(fake_run(tmp_path / "run", steps=2), width=80)[2].split("Seconds by phase")[0]
    assert re.search(r"tokens generated +23,040 *\n", cost)


def test_a_narrow_terminal_shows_the_means_where_all_runs_do_not_fit(tmp_path, words):
    folders = [fake_run(tmp_path / f"gvm-seed{seed}", steps=2, seed=seed) for seed in range(1, 7)]
    printed = reported(*folders, width=80, group_seeds=True)[2]
    cost = printed.split("Seconds by phase")[0].split("Cost")[1]
    assert "gvm (mean of 6)" in cost and "gvm-seed1" not in cost
    assert re.search(r"tokens generated +23,040 *\n", cost)
    assert "gvm-seed1" in reported(*folders, width=200, group_seeds=True)[2]


def test_the_error_of_a_difference_by_hand(tmp_path):
    folder = fake_run(tmp_path / "run", steps=0)
    lines = [
        {"step": 0, "eval_pass_rate": 0.2, "eval_pass_rate_se": 0.03, "eval_greedy_accuracy": 0.5},
        {"step": 9, "eval_pass_rate": 0.6, "eval_pass_rate_se": 0.04, "eval_greedy_accuracy": 0.8},
    ]
    write_lines(folder / "metrics.jsonl", lines)
    run = read_run(folder, "run")
    # sqrt(0.03^2 + 0.04^2) = 0.05
    assert change(run, "validation", "eval_pass_rate") == pytest.approx((0.2, 0.6, 0.05))
    # 101 prompts: 0.5 * 0.5 / 100 + 0.8 * 0.2 / 100 = 0.0041
    greedy = change(run, "validation", "eval_greedy_accuracy")
    assert greedy == pytest.approx((0.5, 0.8, math.sqrt(0.0041)))
    assert change(run, "log", "reward") is None


def test_one_validation_is_a_value_and_not_a_difference(tmp_path):
    rows = reported(fake_run(tmp_path / "one", steps=1))[2].split("Learning, first → last")[1]
    assert "%" in rows and "→" not in rows and " points" not in rows.split("Pass rate and")[0]
    assert all((tmp_path / "one" / f"report-{name}.png").exists() for name in PICTURES)


def test_rollouts_come_from_the_budgets_and_without_them_from_the_ledger(run):
    read = read_run(run, "gvm")
    step_S = np.array([0, 1, 10, 60, 999])
    assert rollouts_until(read, step_S).tolist() == [0, 192, 1920, 11520, 11520]
    read.steps = []
    assert rollouts_until(read, step_S).tolist() == [0, 192, 1920, 11520, 11520]


def test_a_running_mean_by_hand_and_against_its_definition():
    assert smooth(np.array([3.0, 0.0, 6.0, 0.0]), 3).tolist() == [1.5, 3.0, 2.0, 3.0]
    assert smooth(np.array([3.0, 0.0]), 9).tolist() == [1.5, 1.5]  # wider than the curve
    value_S = np.random.default_rng(0).random(31)
    near = [value_S[max(0, i - 3) : i + 4].mean() for i in range(31)]
    np.testing.assert_allclose(smooth(value_S, 7), near, rtol=1e-12)
    np.testing.assert_array_equal(smooth(value_S, 1), value_S)


def test_curves_of_seeds_end_where_the_first_of_them_ends(tmp_path):
    runs = [
        read_run(fake_run(tmp_path / name, steps=steps, seed=steps), name)
        for name, steps in (("a-seed1", 5), ("a-seed2", 3))
    ]
    step_S, value_RS = values_of(runs, "log", "reward")
    assert step_S.tolist() == [1, 2, 3] and value_RS.shape == (2, 3)
    assert value_RS[1, 2] == runs[1].log[2]["reward"]
    assert values_of(runs, "log", "nothing") is None


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["gvm-seed1", "gvm-seed22"], ["gvm (mean of 2)"]),
        (["gvm_s1", "gvm_s2", "raft_s1"], ["gvm (mean of 2)", "raft_s1"]),
        (["qwen-7", "qwen-14"], ["qwen-7", "qwen-14"]),  # sizes, not seeds
    ],
)
def test_runs_without_settings_are_grouped_by_trailing_seeds(run, names, labels):
    runs = [read_run(run, name) for name in names]
    for each in runs:
        each.about = {"settings": {}}
    assert list(grouped(runs, group_seeds=True)) == labels
    assert list(grouped(runs, group_seeds=False)) == names


def run_of(folder, name, log=({"step": 1, "loss": 0.1},), validation=(), **settings):
    return Run(
        folder=folder,
        name=name,
        about={"settings": settings},
        log=list(log),
        validation=list(validation),
    )


def test_seeds_are_grouped_by_their_settings_whatever_their_names(tmp_path):
    runs = [
        run_of(tmp_path, "monday", seed=1, output_dir="a", learning_rate=1e-4),
        run_of(tmp_path, "month-end", seed=2, output_dir="b", learning_rate=1e-4),
        run_of(tmp_path, "x-seed1", seed=1, learning_rate=2e-4),
        run_of(tmp_path, "x-seed2", seed=2, learning_rate=3e-4),
        run_of(tmp_path, "again", seed=1, learning_rate=1e-4),
    ]
    groups = grouped(runs, group_seeds=True)
    assert list(groups) == ["mon (mean of 2)", "x-seed1", "x-seed2", "again"]
    assert seeds_apart(groups) == [
        "x: its runs are no seeds of one experiment, they differ in learning_rate"
    ]
    alone = grouped(runs[:2], group_seeds=False)
    assert list(alone) == ["monday", "month-end"]
    assert seeds_apart(alone) == [
        "monday, month-end differ by their seed alone; --group-seeds shows their mean"
    ]


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (["gvm-seed1", "gvm-seed22"], "gvm"),
        (["a/1", "a/2"], "a"),
        (["run-s1", "run-s2"], "run"),
        (["1", "2"], "1"),
    ],
)
def test_the_label_of_a_group_is_what_its_names_share(names, label):
    assert run_folder._common(names) == label


def validation_of(*pairs):
    return [{"step": step, "eval_pass_rate": rate} for step, rate in pairs]


def tokens_of(*pairs):
    return [{"step": s, "loss": 0.0, "ledger_total/tokens_drawn": n} for s, n in pairs]


def test_curves_of_validation_go_on_to_each_runs_last(tmp_path):
    runs = [
        run_of(tmp_path, "a", validation=validation_of((0, 0.1), (10, 0.2), (17, 0.5))),
        run_of(tmp_path, "b", validation=validation_of((0, 0.3), (10, 0.4), (13, 0.7))),
    ]
    step_RS, value_RS = curve_of(runs, "validation", "eval_pass_rate")
    assert step_RS.tolist() == [[0, 10, 17], [0, 10, 13]]
    assert value_RS.tolist() == [[0.1, 0.2, 0.5], [0.3, 0.4, 0.7]]
    step_RS, _ = curve_of(runs[:1], "validation", "eval_pass_rate")
    assert step_RS.tolist() == [[0, 10, 17]]
    assert curve_of(runs, "validation", "eval_hard_pass_rate") is None


def test_the_mean_of_a_curve_over_tokens_by_hand(tmp_path):
    # Tokens 0, 100, 300 at steps 0, 1, 3; pass rates .2, .4, .8: up to 200 tokens the curve rises to
    # .4 at 100 and to .6 at 200, so its mean is (100 * .3 + 100 * .5) / 200 = .4.
    run = run_of(
        tmp_path,
        "a",
        log=tokens_of((1, 100), (3, 300)),
        validation=validation_of((0, 0.2), (1, 0.4), (3, 0.8)),
    )
    assert tokens_until(run, np.array([0, 1, 2, 9])).tolist() == [0, 100, 200, 300]
    assert mean_over_tokens(run, "eval_pass_rate", 200) == pytest.approx(0.4)
    assert mean_over_tokens(run, "eval_pass_rate", 0) is None
    assert mean_over_tokens(run, "eval_hard_pass_rate", 200) is None
    assert mean_over_tokens(run_of(tmp_path, "b"), "eval_pass_rate", 200) is None


def test_paired_differences_by_hand(tmp_path):
    old = [run_of(tmp_path, f"old{seed}", seed=seed, at=seed / 10) for seed in (1, 2, 3)]
    new = [
        run_of(tmp_path, f"new{seed}", seed=seed, at=rate) for seed, rate in ((2, 0.5), (1, 0.2))
    ]

    def values(a, b):
        return a.about["settings"]["at"], b.about["settings"]["at"]

    # Seeds 1 and 2: .1 and .3; mean .2, standard deviation .1 sqrt 2, error .1.
    assert paired(old, new, values) == pytest.approx((0.2, 0.1, 2))
    mean, error, pairs = paired(old, new[:1], values)
    assert (mean, pairs) == (pytest.approx(0.3), 1) and math.isnan(error)
    assert paired(old, [run_of(tmp_path, "other", seed=9, at=1.0)], values) is None


def test_experiments_are_compared_with_the_first_paired_by_seed(tmp_path, words):
    folders = [
        fake_run(tmp_path / f"{name}{seed}", steps=20, seed=seed, speed=speed, adaptive=name == "b")
        for name, speed in (("a", 0.5), ("b", 2.0))
        for seed in (1, 2, 3)
    ]
    printed = reported(*folders, group_seeds=True)[2]
    table = printed.split("Differences, paired by seed")[1]
    assert re.search(r"b \(mean of 3\) − a \(mean of 3\) +\+[\d.]+ ± [\d.]+ points, 3 seeds", table)


def test_the_headline_says_what_was_learned_and_spent(tmp_path, words):
    folder = fake_run(tmp_path / "gvm", steps=20)
    _, text, printed = reported(folder)
    first = printed.splitlines()[0]
    assert re.fullmatch(
        r"gvm: validation pass rate [\d.]+% → [\d.]+% \(\+[\d.]+ ± 4\.2 points\); after 20 steps, "
        r"3,840 rollouts, 230,400 tokens",
        first,
    )
    assert first in text and text.index(first) < text.index("<h2>")


def test_notes_stand_at_the_end_and_their_number_at_the_start(tmp_path, words):
    folder = fake_run(tmp_path / "gvm", steps=20, planned=30)
    _, text, _ = reported(folder)
    assert text.index("<h2>Cost</h2>") < text.index("still running, or stopped")
    assert text.index('<a href="#notes">1 note</a>') < text.index("<h2>Cost</h2>")


def test_several_validation_sets_are_shown_by_name(tmp_path):
    validation = [
        {"step": step, f"eval_{name}_pass_rate": rate, f"eval_{name}_greedy_accuracy": rate}
        for step in (0, 9)
        for name, rate in (("easy", 0.9), ("hard", 0.1 + step / 100))
    ]
    folder = fake_run(tmp_path / "run", steps=9, validate_every=100)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [row for row in lines if "eval_pass_rate" not in row] + validation
    write_lines(folder / "metrics.jsonl", kept)
    run = read_run(folder, "run")
    assert len(run.validation) == 2 and run_folder.sets_of([run]) == ["easy", "hard"]
    _, _, printed = reported(folder, width=200)
    assert "pass rate on easy 90.0% → 90.0%" in printed.splitlines()[0]
    assert "hard pass rate" in printed and "10.0% → 19.0%" in printed
    titles = [axes.get_title() for axes in pictures.learning_figure({"run": [run]}).axes]
    assert "validation: easy" in titles and "validation: hard" in titles


def test_details_have_a_panel_for_each_reward_and_metric(tmp_path):
    log = [
        {"step": s, "loss": 0.1, "kl": 0.01 * s, "rewards/right/mean": 0.5, "grad_norm": 1.0}
        for s in (1, 2)
    ]
    titles = [
        axes.get_title()
        for axes in pictures.details_figure({"a": [run_of(tmp_path, "a", log=log)]}).axes
    ]
    assert titles == [
        "reward: right",
        "KL to the reference, nats per token",
        "norm of the gradient",
        "loss",
    ]
    assert pictures.details_figure({"a": [run_of(tmp_path, "a")]}) is None


def test_completions_of_the_first_a_middle_and_the_last_table_are_shown(tmp_path, words):
    import pyarrow
    import pyarrow.parquet

    folder = fake_run(tmp_path / "run", steps=4)
    (folder / "completions").mkdir()
    for step in range(1, 6):
        table = pyarrow.Table.from_pylist([{"step": step, "completion": f"text {step}"}])
        pyarrow.parquet.write_table(table, folder / "completions" / f"step-{step:06d}.parquet")
    assert [row["step"] for row in read_run(folder, "run").completions] == [1, 3, 5]


def test_several_runs_are_compared_on_one_page(tmp_path):
    folders = [
        fake_run(tmp_path / "gvm-seed1", steps=12),
        fake_run(tmp_path / "gvm-seed2", steps=9, planned=12, seed=1),
        fake_run(tmp_path / "uniform", steps=12, adaptive=False),
    ]
    page, text, printed = reported(*folders, group_seeds=True)
    assert page == tmp_path / "comparison.html"
    assert (tmp_path / "comparison-learning.png").exists()
    for name in ("gvm-seed1", "gvm-seed2", "uniform", "gvm (mean of 2)"):
        assert f"<td>{name}</td>" in text and f" {name} " in printed
    assert "gvm-seed2: ends at step 9 of 12" in printed
    assert "gvm (mean of 2): runs end at steps 9 to 12" in printed
    differ = text.split("Those that differ")[1].split("</table>")[0]
    assert "allocator" in differ and "learning_rate" not in differ


def test_a_run_that_ended_early_by_itself_is_told_from_one_that_was_stopped(tmp_path):
    folder = fake_run(tmp_path / "spent", steps=9, planned=12)
    assert "spent: ends at step 9 of 12: still running, or stopped" in reported(folder)[2]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 9, "train_runtime": 3.0}) + "\n")
    assert "spent: ended at step 9, by its budget or a callback" in reported(folder)[2]


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    folders = [fake_run(tmp_path / parent / "gvm", steps=0) for parent in ("a", "b")]
    assert [name for _, name in named(folders)] == ["a/gvm", "b/gvm"]


def test_a_run_without_a_finished_step_shows_its_settings(tmp_path):
    folder = fake_run(tmp_path / "fresh", steps=0, planned=50)
    (folder / "metrics.jsonl").unlink()
    (folder / "steps.jsonl").unlink()
    _, text, printed = reported(folder)
    assert f"{folder}: no step is finished yet" in printed
    assert f"{folder}: metrics.jsonl is missing" in text
    assert "learning_rate" in text and "<img" not in text


def test_what_a_killed_run_left_is_shown(tmp_path):
    folder = fake_run(tmp_path / "killed", steps=20, planned=100)
    for name in ("metrics.jsonl", "steps.jsonl"):
        with open(folder / name, "a") as file:
            file.write('{"step": 21, "loss": -0.')
    (folder / "run.json").write_text('{"settings": {')
    _, text, printed = reported(folder)
    assert f"{folder}: the last line of metrics.jsonl is torn" in printed
    assert f"{folder}: the last line of steps.jsonl is torn" in printed
    assert f"{folder}: run.json is torn" in printed
    assert "3,840" in printed  # 20 steps * 192
    assert text.count("data:image/png") == 4


def test_costs_that_stop_before_the_run_are_said_to(tmp_path, words):
    folder = fake_run(tmp_path / "rare", steps=10)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if "loss" not in line or json.loads(line)["step"] <= 8]
    (folder / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    _, _, printed = reported(folder)
    assert "tokens, updates and seconds are those of its last log line, step 8 of 10" in printed
    assert "1,920" in printed  # rollouts of all 10 steps


@pytest.mark.parametrize("name", ["metrics.jsonl", "steps.jsonl"])
def test_a_missing_file_leaves_out_only_its_own_pictures(tmp_path, name):
    folder = fake_run(tmp_path / "part", steps=6)
    (folder / name).unlink()
    _, text, printed = reported(folder)
    assert f"{folder}: {name} is missing" in printed
    shown = ["budgets", "posterior"] if name == "metrics.jsonl" else ["learning", "groups"]
    assert re.findall(r'<img alt="(\w+)"', text) == shown


def test_completions_are_escaped_and_the_newest_whole_table_is_used(tmp_path, words):
    import pyarrow
    import pyarrow.parquet

    folder = fake_run(tmp_path / "run", steps=4)
    (folder / "completions").mkdir()
    for step, text in ((2, "old"), (3, "<script>alert('x')</script> & [bold]")):
        table = pyarrow.Table.from_pylist([{"step": step, "completion": text, "reward": 0.5}])
        pyarrow.parquet.write_table(table, folder / "completions" / f"step-{step:06d}.parquet")
    (folder / "completions" / "step-000004.parquet").write_bytes(b"PAR1torn")
    _, text, printed = reported(folder)
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; [bold]" in text
    assert "<script" not in text and "<td>old</td>" in text  # the first table, beside the newest
    assert "step-000004.parquet cannot be read" in printed


def test_names_and_settings_cannot_inject_anything(tmp_path, words):
    folder = fake_run(tmp_path / "<b>[red]", steps=2)
    _, text, printed = reported(folder)
    assert "<b>" not in text and "&lt;b&gt;[red]" in text
    assert "<b>[red]" in printed


def test_pictures_of_an_earlier_report_do_not_stay_behind(tmp_path):
    folder = fake_run(tmp_path / "run", steps=0)
    (folder / "report-budgets.png").write_bytes(b"old")
    assert "<img" not in reported(folder)[1]
    assert not (folder / "report-budgets.png").exists()


def test_without_matplotlib_the_tables_are_still_there(tmp_path, monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'matplotlib'")

    monkeypatch.setattr(module, "draw", missing)
    _, text, printed = reported(fake_run(tmp_path / "run", steps=3))
    assert "no pictures: No module named 'matplotlib'; pip install 'apportion[recipes]'" in printed
    assert "576" in text


def test_curves_have_colours_of_their_own_however_many_there_are():
    for number in (1, 7, 8, 20):
        colours = pictures._colours({str(i): [] for i in range(number)})
        assert len({str(colour) for colour in colours.values()}) == number


def test_what_is_no_run_is_refused_by_name(tmp_path, run):
    with pytest.raises(ValueError, match="name at least one run folder"):
        report([])
    with pytest.raises(ValueError, match=r"gvn is not a folder; .* has gvm"):
        report([run.parent / "gvn"])
    with pytest.raises(ValueError, match=f"{tmp_path} holds no run"):
        report([tmp_path])
    with pytest.raises(ValueError, match="gvm is given twice"):
        report([run, run.parent / "." / "gvm"])


def test_the_command_line(tmp_path, run, words, capsys):
    module.main([str(run), "--output", str(tmp_path / "new" / "page.html")])
    assert (tmp_path / "new" / "page.html").exists()
    assert "Learning, first → last" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: .*nowhere is not a folder"):
        module.main([str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit):
        module.main(["--help"])
    assert "--group-seeds" in capsys.readouterr().out


def test_steps_that_generate_nothing_have_a_place_in_the_report(tmp_path):
    tiny.run(
        tmp_path / "run",
        data=tiny.rows("a"),
        reward=tiny.small_digit,
        trainer="grpo",
        allocator="uniform",
        refill=True,
        refill_min_prompts=5,
        refill_max_age=3,
        prompts_per_step=3,
        max_steps=8,
    )
    assert any(not row["budgets"] for row in tiny.lines(tmp_path / "run"))
    report([str(tmp_path / "run")])
    assert (tmp_path / "run" / "report-budgets.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["greedy", "deterministic"])
def test_the_learning_curves_are_named_after_the_validation_there_was(tmp_path, name):
    validation = [
        {"step": step, "eval_pass_rate": 0.4, f"eval_{name}_accuracy": 0.5} for step in (0, 9)
    ]
    run = Run(folder=tmp_path, name="a", validation=validation)
    figure = pictures.learning_figure({"a": [run]})
    legend = figure.axes[1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["pass rate", f"{name} accuracy"]
    assert len(figure.axes[0].get_lines()) == 2


def test_a_diffusion_run_shows_its_evaluations_and_where_its_full_size_samples_are(tmp_path):
    from PIL import Image

    run = tmp_path / "run"
    (run / "images" / "sampled-000001").mkdir(parents=True)
    for name in ("sampled-000001", "deterministic-000001"):
        Image.new("RGB", (8, 8)).save(run / "images" / f"{name}.png")
    line = {"step": 1, "loss": 0.1, "reward": 0.5, "denoiser_evaluations": 1234.0}
    line |= {"ledger_total/tokens_drawn": 1600, "ledger_total/tokens_trained": 400}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    page = report([run], console=Console(file=io.StringIO())).read_text()
    for text in ("denoiser evaluations", "1,234", "denoising steps generated", "1,600"):
        assert text in page
    assert page.count('<a href="images/sampled-000001">in full size</a>') >= 1  # first, and last
    assert "images/deterministic-000001" not in page
