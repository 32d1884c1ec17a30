"""
results/gsm8k.sh and gsm8k.py: a run folder becomes a line, lines a table whose numbers are known,
and the script goes on where it was stopped.
"""
import json
import os
import subprocess
import time

import numpy as np
import pytest

import gsm8k
from tree import InputError, run_command, write_jsonl

HERE = os.path.dirname(os.path.abspath(__file__))


def scored(correct, flexible=None):
    """Rows of a file of scores, in which correct[k] are the marks of problem k's completions."""
    rows = []
    for k, marks in enumerate(correct):
        rows.append(dict(id=f"q{k}", question=f"{k} + 1", answer=str(k + 1), steps=2 + k % 2,
                         completions=[""] * len(marks), correct=marks,
                         flexible=(flexible or correct)[k], truncated=[False] * len(marks),
                         tokens=[9] * len(marks)))
    return rows


def run_folder(out, name, correct, log=()):
    """A run folder of this name with its scores and its log."""
    folder = out / name
    folder.mkdir(parents=True)
    write_jsonl(str(folder / "scores.jsonl"), scored(correct))
    write_jsonl(str(folder / "log.jsonl"), log)
    return folder


def marks(seed, share, problems=40, samples=4):
    """(problems, 1 + samples) random marks as lists of bool."""
    return (np.random.default_rng(seed).random((problems, 1 + samples)) < share).tolist()


STEPS = [dict(step=1, tokens=100, solved=0.25, dead=0.5, solved_at_0=0.0, solved_at_2=0.5),
         dict(step=2, tokens=230, solved=0.5, dead=0.0, solved_at_2=0.5)]


@pytest.fixture
def out(tmp_path):
    """What gsm8k.sh leaves: the student, two rates of an arm, two seeds of two arms."""
    run_folder(tmp_path, "student", marks(0, 0.1))
    run_folder(tmp_path, "choose_optimal_1e-4_100", marks(1, 0.2), STEPS)
    run_folder(tmp_path, "choose_optimal_1e-3_100", marks(2, 0.6), STEPS)
    for seed in (0, 1):
        run_folder(tmp_path, f"final_optimal_0.001_{seed}", marks(3 + seed, 0.5), STEPS)
        run_folder(tmp_path, f"final_grpo_0.0001_{seed}", marks(5 + seed, 0.1), STEPS)
    (tmp_path / "final_expectation_0.001_0").mkdir()  # not scored yet
    return tmp_path


def test_a_line_holds_the_run(out):
    """Every mark can be read back, and the log's means by depth, null where there was no sample."""
    lines = gsm8k.collect(str(out))
    assert len(lines) == 7
    [line] = [line for line in lines if line["stage"] == "final" and line["arm"] == "optimal"
              and line["seed"] == 1]
    assert line["lr"] == 1e-3 and line["updates"] == 2 and line["tokens"] == 230
    assert line["dead"] == [0.5, 0.0]
    assert line["solved_at_0"] == [0.0, None] and line["solved_at_2"] == [0.5, 0.5]
    read_back = []
    for text in line["correct"]:
        read_back.append([mark == "1" for mark in text])
    assert np.array_equal(np.transpose(read_back), marks(4, 0.5))
    assert line["steps"] == [2, 3] * 20


def test_the_rate_is_the_best_on_val(out):
    """Of equals the lowest, for the highest is the one that does harm."""
    lines = gsm8k.collect(str(out), "choose_optimal_*")
    assert gsm8k.best_rate(lines) == 1e-3
    for line in lines:
        line["correct"] = lines[0]["correct"]
    assert gsm8k.best_rate(lines) == 1e-4
    with pytest.raises(InputError, match="no scored run choose_grpo"):
        gsm8k.collect(str(out), "choose_grpo_*")


def test_the_order_of_scores_does_not_matter(out):
    """Several ranks write their rows in any order, and the table was refused."""
    path = out / "student" / "scores.jsonl"
    text = path.read_text()
    before = gsm8k.collect(str(out), "student")
    path.write_text("".join(text.splitlines(keepends=True)[::-1]))
    assert gsm8k.collect(str(out), "student") == before
    path.write_text(text)


def test_scores_by_hand():
    """Of two problems with a greedy answer and four samples."""
    line = dict(correct=["10", "10", "00", "10", "00"], flexible=["11", "10", "00", "10", "00"])
    assert gsm8k.score(line, "greedy").tolist() == [1, 0]
    assert gsm8k.score(line, "flexible").tolist() == [1, 1]
    assert gsm8k.score(line, "mean@4").tolist() == [0.5, 0]
    assert gsm8k.score(line, "pass@4").tolist() == [1, 0]


def test_the_tables_numbers(out):
    """Means are over problems and seeds, and a difference is paired by problem."""
    lines = gsm8k.collect(str(out))
    sampled = {}
    for name, seeds in dict(student=[0], optimal=[3, 4], grpo=[5, 6]).items():
        share = {0: 0.1, 3: 0.5, 4: 0.5, 5: 0.1, 6: 0.1}
        runs = [np.array(marks(seed, share[seed]))[:, 1:].mean(1) for seed in seeds]
        sampled[name] = np.mean(runs, axis=0)
    text = gsm8k.table(lines)
    for name, values in sampled.items():
        [row] = [row for row in text.splitlines() if row.startswith(f"| {name} |")][:1]
        assert f"{100 * values.mean():.1f} [" in row
    difference = sampled["optimal"] - sampled["grpo"]
    half = 1.96 * difference.std(ddof=1) / np.sqrt(len(difference))
    low = 100 * (difference.mean() - half)
    high = 100 * (difference.mean() + half)
    [row] = [row for row in text.splitlines() if row.startswith("| optimal minus grpo")]
    assert f"{100 * difference.mean():+.1f} [{low:+.1f}, {high:+.1f}]" in row
    assert "expectation" not in text  # it has no scores


def test_what_survives_a_correction_is_bold_and_cut_samples_are_counted(out):
    """`optimal` is right in half of its samples and the others in a tenth; GRPO is not told apart
    from the student. Here a quarter of the student's samples is cut, of which none is right."""
    path = out / "student" / "scores.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["truncated"][1] = True
        row["correct"][1] = False
    write_jsonl(str(path), rows)
    text = gsm8k.table(gsm8k.collect(str(out)))
    cells = {}
    for line in text.splitlines():
        name, *numbers = [part.strip() for part in line.split("|")[1:-1]] or [""]
        cells.setdefault(name, numbers)
    assert all(cell.startswith("**+") for cell in cells["optimal minus student"][2:4])
    assert not any("**" in cell for cell in cells["grpo minus student"])
    right = np.mean([row["correct"][2:] for row in rows])
    assert cells["student"][-2:] == ["25.0", f"{100 * right:.1f}"]


def test_where_every_sample_is_cut_none_has_ended(out):
    """There is no share of right ones among none."""
    path = out / "student" / "scores.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["truncated"] = [True] * 5
        row["correct"] = [False] * 5
    write_jsonl(str(path), rows)
    text = gsm8k.table(gsm8k.collect(str(out)))
    [line] = [line for line in text.splitlines() if line.startswith("| student | – ")]
    assert line.endswith("| 100.0 | – |")


def test_rollouts_are_counted_by_depth_and_third():
    """Each third of the updates over two runs; a depth that a third has not drawn has no point."""
    first = dict(solved_at_0=[0, 0, 1, None, 0.5, 0.5], solved_at_10=[None, None, None, None, 1, 1])
    second = dict(solved_at_0=[1, 0, 0], solved_at_2=[0.25, None, None])
    assert gsm8k.solved_by_depth([first, second], 0) == [(0, pytest.approx(1 / 3)), (2, 0.25)]
    assert gsm8k.solved_by_depth([first, second], 1) == [(0, 0.5)]
    assert gsm8k.solved_by_depth([first, second], 2) == [(0, pytest.approx(1 / 3)), (10, 1.0)]


def test_the_command_writes_table_and_picture(out, monkeypatch, capsys):
    """Beside the file of runs; the table is printed as well."""
    pytest.importorskip("matplotlib")
    path = str(out / "found.jsonl")
    for flags in (["collect", str(out)], ["table"]):
        monkeypatch.setattr("sys.argv", ["gsm8k.py", *flags, "--lines", path])
        gsm8k.main()
    assert (out / "found.md").read_text() == capsys.readouterr().out
    assert (out / "found.png").stat().st_size > 1000


def test_scores_of_other_problems_are_refused(out, monkeypatch, capsys):
    """A run that was scored on the first few would be paired with the wrong problems."""
    run_folder(out, "final_grpo_0.0001_2", marks(7, 0.1, problems=8), STEPS)
    path = str(out / "found.jsonl")
    monkeypatch.setattr("sys.argv", ["gsm8k.py", "collect", str(out), "--lines", path])
    gsm8k.main()
    monkeypatch.setattr("sys.argv", ["gsm8k.py", "table", "--lines", path])
    with pytest.raises(SystemExit) as end:
        run_command(gsm8k.main)
    assert end.value.code == 2
    assert "on [8, 40] problems" in capsys.readouterr().err


def test_runs_at_two_rates_are_refused(out):
    """As they are left where the choice was made again."""
    run_folder(out, "final_grpo_0.001_0", marks(8, 0.1), STEPS)
    with pytest.raises(InputError, match="grpo has final runs at the rates"):
        gsm8k.table(gsm8k.collect(str(out)))


def test_an_arms_name_may_have_an_underscore(out):
    run_folder(out, "choose_optimal_tree_1e-4_100", marks(9, 0.9), STEPS)
    lines = gsm8k.collect(str(out), "choose_optimal_*")
    assert [line["arm"] for line in lines].count("optimal_tree") == 1


# ---- The script ----------------------------------------------------------------------------------
@pytest.fixture
def script(tmp_path):
    """script(steps, *parts) starts it: a process, which ends with the test."""
    started = []

    def start(steps, *parts):
        started.append(start_script(tmp_path, steps, *parts))
        return started[-1]

    yield start
    for process in started:
        process.terminate()  # its training is told, too
        process.communicate()


def wait_until(ready, process):
    """For a process that is at work."""
    deadline = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)


def start_script(tmp_path, steps, *parts):
    """With the embedded student, on problems written as GSM8K is."""
    source = tmp_path / "source"
    if not source.exists():
        source.mkdir()
        for split, count in dict(train=303, test=2).items():
            rows = []
            for k in range(count):
                rows.append(dict(question=f"Ava has {k} apples, doubles them. How many?",
                                 answer=f"Ava has {k} * 2 = {2 * k}.\n#### {2 * k}"))
            write_jsonl(str(source / f"{split}.jsonl"), rows)
    settings = dict(os.environ, SOURCE=str(source), OUT=str(tmp_path / "run"), SFT_STEPS=str(steps),
                    MODEL=os.path.join(HERE, "..", "data", "arithmetic", "student"),
                    RESULTS=str(tmp_path), JOBS="2")
    return subprocess.Popen(["bash", os.path.join(HERE, "gsm8k.sh"), *parts], env=settings,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_script_goes_on_where_it_was_stopped(tmp_path, script):
    """It stops the training at work, which saves first. The held-out problems are no training
    problems; and what is done is not done again."""
    first = script(100_000, "data", "student")
    run = tmp_path / "run"
    wait_until((run / "student/checkpoint").exists, first)
    first.terminate()
    first.communicate()
    assert first.returncode == 143
    steps = (run / "student/log.jsonl").read_text().count("\n")
    assert steps >= 10 and not (run / "student.done").exists()
    ids = {}
    for name in ("fit", "fit_traces", "val"):
        ids[name] = [json.loads(line)["id"] for line in (run / f"data/{name}.jsonl").open()]
    assert ids["fit"] == ids["fit_traces"] == ["train-1", "train-2", "train-3"]
    assert len(ids["val"]) == 300 and not set(ids["val"]) & set(ids["fit"])

    other = script(50, "data")  # what was made with other settings is not taken for done
    assert "expected the same, or another OUT" in other.communicate()[1]
    assert other.returncode == 2

    second = script(100_000, "trees")  # nothing is built on half of a student
    assert "trees needs student, which is not done" in second.communicate()[1]
    assert second.returncode == 2

    third = script(100_000, "data", "student")
    wait_until(lambda: (run / "student/log.jsonl").read_text().count("\n") > steps, third)
    third.terminate()
    assert "data is done" in third.communicate()[0]
    numbers = [json.loads(line)["step"] for line in (run / "student/log.jsonl").open()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert [line.split()[0] for line in (run / "seconds.txt").open()] == [
        "data", "student", "student"]

    (run / "student.done").touch()
    fourth = script(100_000, "trees", "choose")  # two runs side by side, both of which are stopped
    wait_until(lambda: len(list(run.glob("choose_*/log.jsonl"))) == 2, fourth)
    fourth.terminate()
    fourth.communicate()  # ends when nobody can write to its output any more
    assert fourth.returncode == 143 and not (run / "choose.done").exists()
    names = sorted(path.name for path in run.glob("choose_*"))
    assert names == ["choose_grpo_1e-4_100", "choose_grpo_3e-4_100"]


def test_an_unknown_part_is_one_sentence(tmp_path, script):
    ended = script(1, "data", "trian")
    assert "there is no part trian" in ended.communicate()[1] and ended.returncode == 2
    assert not (tmp_path / "run").exists()
