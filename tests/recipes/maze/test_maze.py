"""The embedded task `maze`: levels, warm-start paths, reward, verdicts, tokenizer, a whole run."""

import itertools
import json

import pytest

from recipes.maze.mazes import WORD, WORDS, draw, read, shortest_path, walk
from recipes.maze.pictures import FAILED, REACHED, picture
from recipes.maze.task import TASK, prepare
from recipes.maze.tasks import LEVELS, goal_reached, problems, warm_start_rows
from recipes.train import main
from rollouts import check_verdicts
from samplers.keys import step_generator


@pytest.fixture(scope="module")
def rows():
    return problems(0, train=5, validation=3)


@pytest.fixture(scope="module")
def solutions(rows):
    return warm_start_rows(0, size=400, held_out=rows[1], seed=3)


def contents(rows):
    return [read(row["prompt"]).content for row in rows]


def test_no_maze_is_twice_in_the_prompts_or_held_out_and_seen_before(rows, solutions):
    train, validation = map(contents, rows)
    assert len({*train, *validation}) == len(train) + len(validation) == 8 * len(LEVELS)
    assert not set(contents(solutions)) & set(validation)


def test_every_level_has_its_share_of_the_prompts(rows):
    for part, count in zip(rows, (5, 3), strict=True):
        names = [row["level"] for row in part]
        assert {level.name: count for level in LEVELS} == {n: names.count(n) for n in names}
        assert all(row["level"] == f"size {read(row['prompt']).size}" for row in part)


@pytest.mark.slow
def test_the_smallest_level_trains_on_what_validation_leaves():
    train, validation = problems(0, train=100, validation=28)
    counts = [sum(r["level"] == level.name for r in train) for level in LEVELS]
    assert counts == [32, *[100] * 6] and len(validation) == 28 * 7
    with pytest.raises(ValueError, match="'size 5' has 60 mazes, so validation must be less"):
        problems(0, train=1, validation=60)


@pytest.mark.slow
def test_the_prompts_are_a_function_of_the_seed_and_validation_is_not_one_of_train(rows):
    assert problems(0, train=5, validation=3) == rows
    assert problems(0, train=1, validation=3)[1] == rows[1]
    assert not {r["prompt"] for r in problems(1, train=5, validation=3)[0]} & {
        r["prompt"] for r in rows[0] if r["level"] != "size 5"
    }


def test_the_paths_of_the_warm_start_are_careful_and_guess_as_declared(solutions):
    assert sum(level.warm_start_share for level in LEVELS) == pytest.approx(1.0, abs=1e-12)
    for level in LEVELS:
        rows = [row for row in solutions if row["level"] == level.name]
        assert len(rows) == round(400 * level.warm_start_share)
        if not rows:
            continue
        for row in rows:
            outcome = walk(read(row["prompt"]), row["completion"])[1]
            assert (outcome == 0.0) == ("s" in row["kinds"])
            assert row["completion"].count("~") == row["kinds"].count("g") + row["kinds"].count("s")
        # What is not careful guesses its first move with probability `guess`, so that many do.
        shares = (1 - level.careful) * level.guess
        first = sum(row["completion"].startswith("~") for row in rows) / len(rows)
        error = (shares * (1 - shares) / len(rows)) ** 0.5
        assert abs(first - shares) < 4 * error  # false alarms: 6 in 100,000


@pytest.mark.slow
def test_a_verdict_equals_the_final_reward_wherever_it_is_given():
    # Every path of up to four of a small maze's cells, and every beginning of it, by characters too.
    draws = step_generator(0, "verdicts", 0)
    for maze in (draw(5, loops=0.5, generator=draws) for _ in range(6)):
        for length in range(5):
            for path in map("".join, itertools.product(maze.ways, repeat=length)):
                (reward,) = goal_reached(prompts=[maze.text], completions=[path], level=["x"])
                cells = [maze.start, *WORD.findall(path)]
                legal = [b in maze.ways[a] for a, b in itertools.pairwise(cells)]
                goal = cells.index(maze.goal) if maze.goal in cells else None
                assert reward == float(goal is not None and all(legal[:goal]))
                for end in range(len(path) + 1):
                    assert goal_reached.decided(maze.text, path[:end]) in (None, reward)


def test_verdicts_keep_their_contract_on_words_of_every_kind():
    # Paths that go on after walls and goals, in cells, passages and other words, cut at characters.
    draws = step_generator(1, "verdicts", 0)
    maze = draw(5, loops=0.5, generator=draws)
    words = [*maze.ways, *[w for w in WORD.findall(maze.text) if len(w) == 3], "G", "x"]
    paths = ["".join(draws.choice(words, size=6)) for _ in range(60)]
    paths += [shortest_path(maze) + tail for tail in ("", ">", "v", "x", maze.start, "G")]
    check_verdicts(goal_reached, [maze.text] * len(paths), paths)


def test_a_verdict_comes_with_the_word_that_decides():
    text = "c5>c5vc6v\nGd6Sd5"
    assert goal_reached.decided(text, "") is None
    assert goal_reached.decided(text, "c5c6") is None
    assert goal_reached.decided(text, "c5c6d6") is None  # a passage d6> may follow, which is a wall
    assert goal_reached.decided(text, "c5c6d6d5") == 1.0
    assert goal_reached.decided(text, "c5d6") == 0.0
    assert goal_reached(prompts=[text] * 2, completions=["c5c6", "c5c6d6"]) == [0.0, 1.0]


def test_the_tokenizer_has_one_token_for_a_word_and_gives_every_text_back(rows, solutions):
    tokenizer = TASK.build_tokenizer()
    assert len(tokenizer) == len(WORDS) + 3
    texts = [row["prompt"] for row in rows[0]] + [r["prompt"] + r["completion"] for r in solutions]
    ids = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(ids) == texts
    assert list(map(len, ids)) == [len(WORD.findall(text)) for text in texts]
    assert max(map(len, ids)) <= 100
    # A completion that begins with ">" or "v" would join the start's name: neither is a word.
    apart = tokenizer(texts[-1][:-2])["input_ids"] + tokenizer(texts[-1][-2:])["input_ids"]
    assert apart == ids[-1]


@pytest.mark.slow
def test_a_picture_shows_walls_path_start_and_goal():
    from matplotlib.figure import Figure

    text = "c5>c5vc6v\nGd6Sd5"
    # Two walls outside for each of the four cells, and the inner one from both its sides.
    for path, colour, more in (("c5c6d6", REACHED, 0), ("c5d6", FAILED, 1), ("", FAILED, 1)):
        ax = Figure().subplots()
        picture(ax, text, path)
        moves = len(walk(read(text), path)[0]) - 1
        assert len(ax.lines) == 8 + 2 + moves + more + 2
        assert {line.get_color() for line in ax.lines[10 : 10 + moves]} <= {colour}


@pytest.mark.slow
def test_a_whole_run_with_its_pictures(tmp_path):
    tiny = {
        "folder": str(tmp_path / "model"),
        "train": 2,
        "validation": 2,
        "warm_start": {"steps": 2, "rows": 40, "hidden_size": 16, "num_layers": 1, "num_heads": 2},
    }
    run = tmp_path / "run"
    trainer = main(
        [
            *("--config", "maze/raft_uniform", "--task_settings", json.dumps(tiny)),
            *("--output_dir", str(run), "--max_steps", "2", "--eval_steps", "2"),
            *("--prompts_per_step", "3", "--max_completion_length", "6", "--use_cpu", "true"),
            *("--eval_rollouts_per_prompt", "1"),
        ]
    )
    assert trainer.model.config.model_type == "qwen3"
    assert {prompt.columns["level"] for prompt in trainer.prompts} == {x.name for x in LEVELS}
    assert [p.name for p in sorted((run / "validation").iterdir())] == [
        "step-000000.parquet",
        "step-000002.parquet",
    ]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "held-out prompts, steps 0 and 2" in page
    assert (run / "report-run-paths.png").is_file()
    folder, *_ = prepare(tiny, seed=1)
    assert folder == tmp_path / "model"
