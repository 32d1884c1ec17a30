"""
The sweep's protocol: which runs come when, how a learning rate is chosen, how logs are merged; and
what plot.py says of a log whose numbers are known.
"""
import json
import os

import numpy as np
import pytest
from scipy import stats

import plot
import sweep
from sweep import BEYOND, CHOICE, PLANNED_ROWS, RATES, ROWS, SETS, Job
from tree import InputError, read_jsonl


def line_of(job, greedy, sampled=0.3):
    """A line of the log, as `summarise` makes it."""
    scores = {"greedy": greedy, "mean@2": sampled, "mean@16": sampled, "pass@16": 0.9}
    return job._asdict() | dict(scores=scores, updates=48, tokens=30_000, seconds=9.0, entropy=0.1,
                                means=dict.fromkeys(sweep.MEANS, 0.5), flags="",
                                test_limit=200, val=[(0, 0.3), (30_000, greedy)])


def chosen(name, row, best, rates=None):
    """The stage "choose" of a row, finished, with the highest score at one rate."""
    lines = {}
    for lr in rates or RATES:
        for seed in CHOICE:
            job = Job(name, row, "choose", lr, seed)
            lines[job] = line_of(job, 0.8 if lr == best else 0.5)
    return lines


def final(name, row, accuracies, lr=5e-4, sampled=0.3):
    """The final runs of a row, seeds 0 and on, and the stage that chose their rate."""
    lines = chosen(name, row, lr)
    for seed, greedy in enumerate(accuracies):
        job = Job(name, row, "final", lr, seed)
        lines[job] = line_of(job, greedy, sampled)
    return lines


def write_log(path, finished):
    """A sweep.jsonl of these lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in finished.values()))
    return str(path)


# ---- Learning rates ------------------------------------------------------------------------------
def test_rate_within_is_chosen_at_once():
    scored = sweep.rate_scores(chosen("easy", "flat", 5e-4), "easy", "flat")
    assert scored == pytest.approx({2e-4: 0.4, 5e-4: 0.55, 1e-3: 0.4})
    assert sweep.rates_to_try(scored) == RATES
    assert sweep.chosen_rate(scored) == 5e-4


@pytest.mark.parametrize("edge, beyond", BEYOND.items())
def test_rate_at_an_edge_waits_for_the_one_beyond(edge, beyond):
    """Nothing is chosen before that has run; then the better of the two is."""
    finished = chosen("easy", "flat", edge)
    scored = sweep.rate_scores(finished, "easy", "flat")
    assert sweep.rates_to_try(scored) == [*RATES, beyond]
    assert sweep.chosen_rate(scored) is None
    finished |= chosen("easy", "flat", None, [beyond])
    assert sweep.chosen_rate(sweep.rate_scores(finished, "easy", "flat")) == edge
    finished |= chosen("easy", "flat", beyond, [beyond])
    for job in finished:  # now the rate beyond is better
        if job.lr == edge:
            finished[job]["scores"]["greedy"] = 0.7
    scored = sweep.rate_scores(finished, "easy", "flat")
    assert sweep.rates_to_try(scored) == [*RATES, beyond]
    assert sweep.chosen_rate(scored) == beyond


def test_rate_counts_with_both_seeds_only():
    finished = chosen("easy", "flat", 5e-4)
    del finished[Job("easy", "flat", "choose", 5e-4, CHOICE[1])]
    assert 5e-4 not in sweep.rate_scores(finished, "easy", "flat")
    assert sweep.chosen_rate(sweep.rate_scores(finished, "easy", "flat")) is None


# ---- The order of runs ---------------------------------------------------------------------------
def test_plan_begins_with_choices_row_by_row():
    """With an empty log nothing but the choice of rates can start, once the references have."""
    args = sweep.parse_args([])
    jobs = sweep.plan({}, args)
    references = []
    for row in ("untrained", "teacher"):
        references += [Job(name, row, "reference", 0.0, 0) for name in SETS]
    assert jobs[:4] == references
    jobs = jobs[4:]
    assert len(jobs) == len(set(jobs)) == len(ROWS) * len(SETS) * len(RATES) * len(CHOICE)
    assert jobs[:2] == [Job("easy", "grpo", "choose", 2e-4, seed) for seed in CHOICE]
    assert [job.row for job in jobs[::12]] == list(ROWS)
    for pair in plot.PLANNED:
        assert set(pair) <= set(PLANNED_ROWS)


def test_plan_of_stages():
    """Planned rows are chosen, then run; then those of equal updates; then the other rows."""
    args = sweep.parse_args(["--rows", "opo", "optimal", "grpo", "--sets", "hard", "--seeds", "2",
                             "--first_seed", "7"])
    finished = chosen("hard", "grpo", 5e-4) | chosen("hard", "optimal", 5e-4)
    finished |= chosen("hard", "opo", 5e-4)
    stages = [(job.row, job.stage, job.lr, job.seed) for job in sweep.plan(finished, args)
              if job.stage in ("final", "updates") or job.lr == 2e-4]
    assert stages == [
        *(("grpo", "choose", 2e-4, seed) for seed in CHOICE),
        *(("optimal", "choose", 2e-4, seed) for seed in CHOICE),
        ("grpo", "final", 5e-4, 7), ("grpo", "final", 5e-4, 8),
        ("optimal", "final", 5e-4, 7), ("optimal", "final", 5e-4, 8),
        ("grpo", "updates", 5e-4, 7), ("grpo", "updates", 5e-4, 8),
        ("optimal", "updates", 5e-4, 7), ("optimal", "updates", 5e-4, 8),
        *(("opo", "choose", 2e-4, seed) for seed in CHOICE),
        ("opo", "final", 5e-4, 7), ("opo", "final", 5e-4, 8)]


def test_flags_of_each_stage():
    """val alone while a rate is chosen; updates instead of tokens in their stage; never test."""
    args = sweep.parse_args(["--out", os.path.join(sweep.ROOT, "runs")])
    finished = chosen("hard", "grpo", 5e-4)
    job = Job("hard", "grpo", "choose", 5e-4, 100)
    said = sweep.train_flags(job, finished, args)
    assert "--lr 0.0005 --seed 100" in said and "--max_tokens 60000" in said
    assert said.endswith("--eval_data data/arithmetic/hard_val.jsonl --eval_every 0")
    final_job = job._replace(stage="final", seed=0)
    assert sweep.train_flags(final_job, finished, args).endswith("--eval_every 10")  # 48 updates
    said = sweep.train_flags(job._replace(stage="updates", seed=0), finished, args)
    assert "--steps 100" in said and "--max_tokens" not in said
    said = sweep.train_flags(job._replace(row="mcts_reinforce"), finished, args)
    assert "--teacher_adapter runs/hard-teacher" in said
    assert not any("test" in sweep.train_flags(job._replace(row=row), finished, args)
                   for row in ROWS)


def test_a_trial_is_not_taken_for_a_run():
    """A finished line of fewer tokens or test problems is refused, not counted."""
    finished = chosen("easy", "grpo", 5e-4)
    args = sweep.parse_args([])
    for job, line in finished.items():
        line["flags"] = sweep.train_flags(job, finished, args)
    sweep.check_settings(finished, args)
    for trial in (["--tokens", "500"], ["--test_limit", "10"]):
        with pytest.raises(InputError, match="another --log"):
            sweep.check_settings(finished, sweep.parse_args(trial))


@pytest.mark.parametrize("first", ["96", "100", "101"])
def test_seeds_that_choose_do_nothing_else(first):
    with pytest.raises(InputError, match="another --first_seed"):
        sweep.parse_args(["--first_seed", first])
    sweep.parse_args(["--first_seed", "102"])


# ---- The log -------------------------------------------------------------------------------------
def test_merged_logs_count_each_run_once(tmp_path):
    """Of two lines of one run the first counts."""
    job = Job("easy", "flat", "final", 5e-4, 0)
    other = job._replace(set="hard")
    lines = [line_of(job, 0.5), line_of(other, 0.6), line_of(job, 0.7)]
    path = tmp_path / "sweep.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    finished = sweep.first_lines(read_jsonl(str(path), sweep.parse_line))
    assert finished.keys() == {job, other}
    assert finished[job]["scores"]["greedy"] == 0.5


def test_line_of_another_file_is_refused(tmp_path):
    path = tmp_path / "sweep.jsonl"
    path.write_text('{"set": "easy", "row": "flat", "seed": 0}\n')
    with pytest.raises(InputError, match="line 1.*stage"):
        list(read_jsonl(str(path), sweep.parse_line))


def test_summary_of_a_run(tmp_path):
    """A line of the log from the files that a run leaves."""
    log = [{"step": 0, "eval_accuracy": 0.25}]
    for step in range(1, 21):
        log.append({"step": step, "tokens": 100 * step, "loss": 0.0, "entropy": step / 10,
                    "sat": None, "seconds_rollout": 1.0, "seconds_update": 0.5})
    log.append({"step": 20, "eval_accuracy": 0.75})
    scored = [{"correct": [True, False, False]}, {"correct": [False, True, False]},
              {"correct": [True, True, True]}, {"correct": [False, False, False]}]
    for name, rows in [("log", log), ("scores", scored)]:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = sweep.summarise(str(tmp_path))
    assert line["scores"] == {"greedy": 0.5, "mean@2": 0.375, "pass@2": 0.5}
    assert (line["tokens"], line["updates"], line["seconds"]) == (2000, 20, 30.0)
    assert line["entropy"] == 1.95  # of the last two steps
    assert line["val"] == [(0, 0.25), (2000, 0.75)]
    assert line["means"]["sat"] is None


# ---- Statistics and sentences --------------------------------------------------------------------
def test_holm_by_hand():
    """Holm's own procedure: reject while p(k) <= level / (m - k + 1)."""
    assert plot.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert plot.holm([0.04, 0.01, 0.02, 0.8]) == pytest.approx([0.08, 0.04, 0.06, 0.8])
    assert plot.holm([0.5, 0.6]) == [1.0, 1.0]


def test_comparison_is_paired_by_seed():
    """Seeds that only one of the rows has do not count."""
    finished = final("easy", "flat", [0.5, 0.6, 0.7]) | final("easy", "grpo", [0.48, 0.57, 0.66])
    del finished[Job("easy", "flat", "final", 5e-4, 1)]
    one = plot.compare(finished, "flat", "grpo", "easy", "greedy")
    assert one.seeds == 2
    assert one.difference == pytest.approx(3)
    assert one.p == pytest.approx(stats.ttest_rel([50, 70], [48, 66]).pvalue)
    assert one.half == pytest.approx(stats.t.ppf(0.975, 1) * 1)


@pytest.mark.parametrize("difference, holm, words", [
    (3.0, 0.01, "a is ahead of b"), (-3.0, 0.01, "b is ahead of a"),
    (3.0, 0.2, "a is probably ahead of b"), (-3.0, 0.2, "b is probably ahead of a"),
    (1.0, 1.0, "a and b are not told apart"), (np.nan, 1.0, "a and b are not measured")])
def test_same_words_for_the_same_strength(difference, holm, words):
    """Whichever row is ahead, and by whichever sign."""
    seeds = 0 if np.isnan(difference) else 5
    one = plot.Comparison("a", "b", "easy", "greedy", seeds, difference, 2.0, 0.01, holm)
    assert one.verdict() == words
    if np.isnan(difference):
        assert one.sentence().endswith("a minus b is – points.")
    else:
        assert one.sentence() == (f"On easy in greedy, {words}: a minus b is {difference:+.1f} "
                                  f"[{difference - 2:+.1f}, {difference + 2:+.1f}] points.")


def test_family_is_every_planned_test_whether_run_or_not():
    """A test that was not run still costs its share of the correction."""
    greedy = [0.60, 0.61, 0.62, 0.60, 0.61]
    finished = final("easy", "grpo", greedy) | final("easy", "expectation", np.add(greedy, [
        0.2, 0.21, 0.2, 0.21, 0.2]))
    comparisons = plot.compare_planned(finished)
    assert len(comparisons) == 36
    assert comparisons[0].holm == pytest.approx(36 * comparisons[0].p)
    assert comparisons[0].verdict() == "expectation is ahead of grpo"
    assert [one.holm for one in comparisons[1:]] == [1.0] * 35


# ---- One command ---------------------------------------------------------------------------------
@pytest.fixture
def finished():
    """A log of five rows on both sets, and what the student was before."""
    draw = np.random.default_rng(0)
    lines = {}
    for name in SETS:
        job = Job(name, "untrained", "reference", 0.0, 0)
        scores = {"greedy": 0.281, "mean@16": 0.25, "pass@16": 0.5}
        lines[job] = job._asdict() | dict(flags="", test_limit=200, scores=scores)
        for row in ["grpo", "expectation", "optimal", "gkd", "mc"]:
            lines |= final(name, row, draw.uniform(0.7, 0.9, 5))
        for seed in range(5):
            job = Job(name, "grpo", "updates", 5e-4, seed)
            lines[job] = line_of(job, 0.8)
    return lines


def test_report(finished, tmp_path):
    """Tables, pictures and README's part, twice the same."""
    pytest.importorskip("matplotlib")
    path = write_log(tmp_path / "sweep.jsonl", finished)
    (tmp_path / "search.json").write_text('{"easy": 554, "hard": 800}')
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{plot.BEGIN}\nold\n{plot.END}\nafter\n")
    plot.write_sweep(path, str(readme))
    text = readme.read_text()
    assert text.startswith(f"before\n{plot.BEGIN}\n| row |") and text.endswith("\nafter\n")
    assert "| untrained | – | 28.1 | 25.0 | – | 28.1 | 25.0 |" in text
    assert "\nold" not in text and text.count(" minus ") == 3  # planned pairs that were run
    assert "24 of the 36 planned tests have not been run" in text
    report = (tmp_path / "sweep.md").read_text()
    assert "| 554 |" in report and "**55.0**" in report
    assert report.count("* On ") == 3 * len(SETS) * 2  # planned pairs that were run
    for name in ("sweep.png", "curves.png"):
        assert os.path.getsize(tmp_path / name) > 10_000
    plot.write_sweep(path, str(readme))
    assert readme.read_text() == text


def test_a_set_that_was_not_run_has_no_column(finished, tmp_path):
    """Nor a panel; that its tests are missing is said."""
    pytest.importorskip("matplotlib")
    easy = {job: line for job, line in finished.items() if job.set == "easy"}
    path = write_log(tmp_path / "sweep.jsonl", easy)
    readme = tmp_path / "README.md"
    readme.write_text(plot.BEGIN + plot.END)
    plot.write_sweep(path, str(readme))
    text = readme.read_text()
    assert "easy: greedy" in text and "hard:" not in text
    assert "30 of the 36 planned tests have not been run" in text


def test_readme_without_markers_is_refused(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"{plot.END} {plot.BEGIN}")
    with pytest.raises(InputError, match="expected both"):
        plot.replace_results(str(readme), [])
    assert readme.read_text() == f"{plot.END} {plot.BEGIN}"
