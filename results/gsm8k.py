"""
What results/gsm8k.sh found: its runs as lines of one file, and their table and picture.

    python results/gsm8k.py rate OUT --arm optimal   # of its rates the best on val
    python results/gsm8k.py collect OUT              # the run folders -> gsm8k.jsonl
    python results/gsm8k.py table                    # gsm8k.jsonl -> gsm8k.md and gsm8k.png

A line is a run that was scored: the student as it was before, a run that chose a rate on val, or a
final one on the test. `correct` and `flexible` hold a text for each completion, the greedy one
first, in which every problem of `ids` is a 1 or a 0; `steps` says how many steps each one takes.
"""
import os
import sys
from itertools import combinations
from pathlib import Path

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import evaluate  # noqa: E402
from tree import (InputError, arguments, get_field, read_jsonl, run_command,  # noqa: E402
                  write_jsonl)

ARMS = ("grpo", "expectation", "optimal")
KINDS = {  # of a score: (field, which completions, how they are put together)
    "greedy": ("correct", slice(0, 1), np.mean),
    "flexible": ("flexible", slice(0, 1), np.mean),
    "mean@4": ("correct", slice(1, None), np.mean),
    "flexible mean@4": ("flexible", slice(1, None), np.mean),
    "pass@4": ("correct", slice(1, None), np.max)}
SMOOTH = 5  # steps of a run that a point of the picture is the mean of


# ---- Runs ----------------------------------------------------------------------------------------
def summarise(folder):
    """A run folder with its scores as a line of the file; the folder's name says which run it is:
    student, or STAGE_ARM_RATE_SEED."""
    if folder.name == "student":
        line = dict(stage="student", arm="student")
    else:
        stage, arm, rate, seed = folder.name.split("_")
        log = list(read_jsonl(str(folder / "log.jsonl"), lambda row, number: row))
        line = dict(stage=stage, arm=arm, lr=float(rate), seed=int(seed), updates=len(log),
                    tokens=log[-1]["tokens"])
        names = set().union(*log)
        by_depth = [name for name in names if name.startswith("solved_at_")]
        for name in ["solved", "dead", *sorted(by_depth, key=depth_of)]:
            line[name] = [row.get(name) for row in log]  # one a step
    rows = evaluate.read_scores(str(folder / "scores.jsonl"))
    line["ids"] = [row["id"] for row in rows]
    line["steps"] = [row["steps"] for row in rows]
    for field in ("correct", "flexible"):
        flags = np.array([row[field] for row in rows], int)  # (problems, 1 + samples)
        line[field] = ["".join(map(str, column)) for column in flags.T]
    return line


def depth_of(name):
    """"solved_at_12" -> 12."""
    return int(name.rpartition("_")[2])


def collect(out, names="*"):
    """The lines of the runs in a folder that have been scored."""
    folders = sorted(path.parent for path in Path(out).glob(f"{names}/scores.jsonl"))
    if not folders:
        raise InputError(f"{out} has no scored run {names}. Expected the folder of gsm8k.sh")
    return [summarise(folder) for folder in folders]


def best_rate(lines):
    """The rate with the highest mean@4 on val, of the runs of one arm; the lowest of equals."""
    scored = {line["lr"]: score(line, "mean@4").mean() for line in lines}
    return max(sorted(scored), key=scored.get)


def score(line, kind):
    """(problems,) of one run, from 0 to 1."""
    field, completions, combine = KINDS[kind]
    flags = np.array([list(text) for text in line[field]], int)  # (1 + samples, problems)
    return combine(flags[completions], axis=0)


def runs_of(lines, arm):
    """Its final runs; of "student" the one that was not trained."""
    return [line for line in lines if line["arm"] == arm and line["stage"] != "choose"]


def scores(lines, arm, kind):
    """(problems,) the mean over the runs of an arm."""
    return np.mean([score(line, kind) for line in runs_of(lines, arm)], axis=0)


# ---- The table -----------------------------------------------------------------------------------
def percent(mean, low, high):
    """A score and its 95 % interval."""
    return f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def points(mean, low, high):
    """A difference and its 95 % interval."""
    return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def markdown(rows):
    """A table; the first row is its header."""
    header, *others = rows
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *others]) + "\n"


def score_table(lines, arms):
    """A row an arm: how it was trained, and its scores on the test."""
    rows = [["arm", "learning rate", "seeds", "updates", "tokens", *KINDS]]
    for arm in arms:
        runs = runs_of(lines, arm)
        row = [arm, "–", "–", "–", "–"]
        if arm != "student":
            updates = np.mean([line["updates"] for line in runs])
            tokens = np.mean([line["tokens"] for line in runs])
            row = [arm, f"{runs[0]['lr']:g}", f"{len(runs)}", f"{updates:.0f}", f"{tokens:,.0f}"]
        for kind in KINDS:
            values = scores(lines, arm, kind)
            row.append(percent(*evaluate.mean_interval(values, range(len(values)))))
        rows.append(row)
    return markdown(rows)


def difference_table(lines, arms):
    """A row for each two of the arms, paired by problem."""
    rows = [["difference, points", *KINDS]]
    for before, after in combinations(arms, 2):
        row = [f"{after} minus {before}"]
        for kind in KINDS:
            change = scores(lines, after, kind) - scores(lines, before, kind)
            row.append(points(*evaluate.normal_interval(change, range(len(change)))))
        rows.append(row)
    return markdown(rows)


def steps_table(lines, arms):
    """A row an arm: its mean@4 on the problems of so many steps."""
    steps = np.array(runs_of(lines, arms[0])[0]["steps"])
    numbers, counts = np.unique(steps, return_counts=True)
    header = ["mean@4, by steps"]
    for number, count in zip(numbers, counts):
        header.append(f"{number} ({count} problems)")
    rows = [header]
    for arm in arms:
        values = scores(lines, arm, "mean@4")
        row = [arm]
        for number in numbers:
            row.append(f"{100 * values[steps == number].mean():.1f}")
        rows.append(row)
    return markdown(rows)


def table(lines):
    """The arms' scores, their differences, and mean@4 by number of steps, as Markdown.
    InputError where the runs on the test are not all of the same problems, or the student is
    missing."""
    ids = {tuple(line["ids"]) for line in lines if line["stage"] != "choose"}
    if not runs_of(lines, "student") or len(ids) > 1:
        counts = sorted(len(problems) for problems in ids)
        raise InputError(f"the runs were scored on {counts} problems of the test. Expected the "
                         "student's scores and others on the same problems")
    arms = [arm for arm in ("student", *ARMS) if runs_of(lines, arm)]
    [problems] = ids
    parts = [f"{len(problems)} problems of the test. Intervals are 95 % over problems, for these "
             "seeds, and not corrected for their number.\n"]
    for part in (score_table, difference_table, steps_table):
        parts.append(part(lines, arms))
    return "\n".join(parts)


# ---- The picture ---------------------------------------------------------------------------------
def smooth(values):
    """The mean of each SMOOTH neighbours, of what is a number; nan where nothing is."""
    values = np.array(values, float)
    means = []
    for end in range(SMOOTH, len(values) + 1):
        known = values[end - SMOOTH:end]
        known = known[np.isfinite(known)]
        means.append(known.mean() if len(known) else np.nan)
    return np.array(means)


def draw(lines, path):
    """Share of solved rollouts by depth of prefix, a panel an arm, over the steps of its first run;
    then mean@4 on the test, with intervals."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    arms = [arm for arm in ARMS if runs_of(lines, arm)]
    width = 3.2 * (len(arms) + 1)
    figure, [panels] = plt.subplots(1, len(arms) + 1, squeeze=False, figsize=(width, 3.2))
    for arm, axes in zip(arms, panels):
        run = runs_of(lines, arm)[0]
        depths = [name for name in run if name.startswith("solved_at_")]
        for number, name in enumerate(depths):
            curve = smooth(run[name])
            colour = plt.get_cmap("viridis")(number / max(len(depths) - 1, 1))
            axes.plot(np.arange(len(curve)) + SMOOTH, 100 * curve, color=colour,
                      label=f"{name.removeprefix('solved_at_')} steps")
        axes.set(title=arm, xlabel="update", ylabel="rollouts solved, %", ylim=(0, 100))
        axes.legend(title="prefix of", fontsize=7, title_fontsize=7)
    for place, arm in enumerate(["student", *arms]):
        values = scores(lines, arm, "mean@4")
        mean, low, high = evaluate.mean_interval(values, range(len(values)))
        panels[-1].plot([place, place], [100 * low, 100 * high], color="#0072B2")
        panels[-1].plot(place, 100 * mean, "o", color="#0072B2")
    panels[-1].set(title="test", ylabel="mean@4, %", ylim=(0, None))
    panels[-1].set_xticks(range(len(arms) + 1), ["student", *arms], rotation=20)
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


# ---- The command ---------------------------------------------------------------------------------
def parse_line(row, number):
    """A line of the file, checked: read_jsonl's `parse`."""
    for name in ("stage", "arm"):
        get_field(row, name, str, "a name, in a line that this script wrote")
    return row


def main():
    parser = arguments("The runs of results/gsm8k.sh: choose a rate, collect them, draw a table.")
    add = parser.add_argument
    add("what", choices=("rate", "collect", "table"))
    add("folder", nargs="?", metavar="OUT", help="that of results/gsm8k.sh; for rate and collect")
    add("--arm", choices=ARMS, default="expectation", help="whose rate")
    add("--lines", default=os.path.join(HERE, "gsm8k.jsonl"), help="the file of runs")
    args = parser.parse_args()
    if args.what == "table":
        lines = list(read_jsonl(args.lines, parse_line))
        text = table(lines)
        stem = os.path.splitext(args.lines)[0]
        Path(f"{stem}.md").write_text(text, "utf-8")
        draw(lines, f"{stem}.png")
        print(text, end="")
        return
    if not args.folder:
        raise InputError(f"{args.what} reads run folders. Expected OUT, the folder of gsm8k.sh")
    if args.what == "rate":
        print(f"{best_rate(collect(args.folder, f'choose_{args.arm}_*')):g}")
    else:
        write_jsonl(args.lines, collect(args.folder))


if __name__ == "__main__":
    run_command(main)
