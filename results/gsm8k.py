"""
What results/gsm8k.sh found: its runs as lines of one file, and their table and picture.

    python results/gsm8k.py rate OUT --arm optimal   # of its rates the best on val
    python results/gsm8k.py collect OUT              # the run folders -> gsm8k.jsonl
    python results/gsm8k.py table                    # gsm8k.jsonl -> gsm8k.md and gsm8k.png

A line is a run that was scored: the student as it was before, a run that chose a rate on val, or a
final one on the test. `correct`, `flexible` and `truncated` hold a text for each completion, the
greedy one first, with a 1 or a 0 for every problem of `ids`: ["0110", ...] says that the greedy
answers to the second and the third are right. `steps` says how many steps each problem takes.
"""
import os
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.stats import norm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import evaluate  # noqa: E402
from plot import holm, markdown, subplots, tidy  # noqa: E402
from tree import (InputError, arguments, get_field, read_jsonl, run_command,  # noqa: E402
                  write_jsonl)

ARMS = ("grpo", "expectation", "optimal")
KINDS = {  # of a score: (grading, which completions, how their marks are put together)
    "greedy": ("correct", slice(0, 1), np.mean),
    "flexible": ("flexible", slice(0, 1), np.mean),
    "mean@4": ("correct", slice(1, None), np.mean),
    "flexible mean@4": ("flexible", slice(1, None), np.mean),
    "pass@4": ("correct", slice(1, None), np.max)}
AT_DEPTH = "solved_at_"  # of the log, and the number of steps in the prefix


# ---- Runs ----------------------------------------------------------------------------------------
def collect(out, names="*"):
    """The lines of the runs in a folder that have been scored."""
    folders = sorted(path.parent for path in Path(out).glob(f"{names}/scores.jsonl"))
    if not folders:
        raise InputError(f"{out} has no scored run {names}. Expected the folder of gsm8k.sh")
    return [summarise(folder) for folder in folders]


def summarise(folder):
    """A run folder with its scores as a line of the file."""
    line = dict(stage="student", arm="student")
    if folder.name != "student":
        line = summarise_training(folder)
    rows = evaluate.read_scores(str(folder / "scores.jsonl"))
    rows.sort(key=lambda row: (len(row["id"]), row["id"]))  # several ranks write in any order
    line["ids"] = [row["id"] for row in rows]
    line["steps"] = [row["steps"] for row in rows]
    for field in ("correct", "flexible", "truncated"):
        line[field] = []
        for completion in zip(*[row[field] for row in rows]):
            line[field].append("".join("1" if mark else "0" for mark in completion))
    return line


def summarise_training(folder):
    """What the folder's name, STAGE_ARM_RATE_SEED, and its log say."""
    stage, rest = folder.name.split("_", 1)
    arm, rate, seed = rest.rsplit("_", 2)  # an arm's name may have "_" itself
    log = list(read_jsonl(str(folder / "log.jsonl"), lambda row, number: row))
    line = dict(
        stage=stage,
        arm=arm,
        lr=float(rate),
        seed=int(seed),
        updates=len(log),
        tokens=log[-1]["tokens"])
    names = [name for name in set().union(*log) if name.startswith(AT_DEPTH)]
    names.sort(key=lambda name: (len(name), name))  # 2 before 12
    for name in ["solved", "dead", *names]:
        line[name] = [row.get(name) for row in log]  # one a step
    return line


def marks(line, field):
    """(1 + samples, problems) the 1s and 0s of a field of one run."""
    return np.array([list(text) for text in line[field]], int)


def score(line, kind):
    """(problems,) of one run, from 0 to 1."""
    field, completions, combine = KINDS[kind]
    return combine(marks(line, field)[completions], axis=0)


def best_rate(lines):
    """The rate with the highest mean@4 on val, of the runs of one arm; the lowest of equals."""
    scored = {}
    for line in lines:
        scored[line["lr"]] = score(line, "mean@4").mean()
    return max(sorted(scored), key=scored.get)


def runs_of(lines, arm):
    """Its final runs; of "student" the one that was not trained."""
    return [line for line in lines if line["arm"] == arm and line["stage"] != "choose"]


def scores(lines, arm, kind):
    """(problems,) the mean over the runs of an arm."""
    runs = runs_of(lines, arm)
    return np.mean([score(line, kind) for line in runs], axis=0)


def score_interval(lines, arm, kind):
    """Its mean and the 95 % interval over problems."""
    values = scores(lines, arm, kind)
    return evaluate.mean_interval(values, range(len(values)))


# ---- The table -----------------------------------------------------------------------------------
def cell(figures, form):
    """A mean and the ends of its interval as text, in percent."""
    mean, low, high = [format(100 * figure, form) for figure in figures]
    return f"{mean} [{low}, {high}]"


def score_table(lines, arms):
    """A row an arm: how it was trained, and its scores on the test."""
    rows = []
    for arm in arms:
        row = [arm, *training(runs_of(lines, arm))]
        for kind in KINDS:
            row.append(cell(score_interval(lines, arm, kind), ".1f"))
        shares = [marks(line, "truncated")[1:].mean() for line in runs_of(lines, arm)]
        cut = np.mean(shares)
        right = scores(lines, arm, "mean@4").mean()
        row.append(f"{100 * cut:.1f}")
        row.append(f"{100 * right / (1 - cut):.1f}" if cut < 1 else "–")
        rows.append(row)
    return markdown(["arm", "learning rate", "seeds", "updates", "tokens", *KINDS, "samples cut",
                     "right of those that ended"], rows)


def training(runs):
    """The four cells of an arm that say how it was trained."""
    if runs[0]["arm"] == "student":
        return ["–"] * 4
    updates = np.mean([line["updates"] for line in runs])
    tokens = np.mean([line["tokens"] for line in runs])
    return [f"{runs[0]['lr']:g}", str(len(runs)), f"{updates:.0f}", f"{tokens:,.0f}"]


def difference_table(lines, arms):
    """A row for each two of the arms, paired by problem. Bold is what is told from 0 by Holm's
    correction for all differences of the table."""
    cells = []
    p_values = []
    pairs = list(combinations(arms, 2))
    for before, after in pairs:
        for kind in KINDS:
            change = scores(lines, after, kind) - scores(lines, before, kind)
            mean, low, high = evaluate.normal_interval(change, range(len(change)))
            cells.append(cell((mean, low, high), "+.1f"))
            half = (high - low) / 2
            deviation = max(half / 1.96, 1e-12)  # 0 where all changes are equal
            p_values.append(2 * norm.sf(abs(mean) / deviation))
    for k, p in enumerate(holm(p_values)):
        if p < 0.05:
            cells[k] = f"**{cells[k]}**"
    rows = []
    for (before, after), row in zip(pairs, np.reshape(cells, (-1, len(KINDS)))):
        rows.append([f"{after} minus {before}", *row])
    return markdown(["difference, points", *KINDS], rows)


def steps_table(lines, arms):
    """A row an arm: its mean@4 on the problems of so many steps."""
    steps = np.array(runs_of(lines, arms[0])[0]["steps"])
    numbers, counts = np.unique(steps, return_counts=True)
    header = ["mean@4, by steps"]
    for number, count in zip(numbers, counts):
        header.append(f"{number} ({count} problems)")
    rows = []
    for arm in arms:
        values = scores(lines, arm, "mean@4")
        row = [arm]
        for number in numbers:
            row.append(f"{100 * values[steps == number].mean():.1f}")
        rows.append(row)
    return markdown(header, rows)


def table(lines):
    """The arms' scores, their differences, and mean@4 by number of steps, as Markdown.
    InputError where these would not be of the same problems, or of one rate an arm."""
    arms = [arm for arm in ("student", *ARMS) if runs_of(lines, arm)]
    if "student" not in arms:
        raise InputError("the student has no scores on the test. Expected those of gsm8k.sh score")
    ids = {tuple(line["ids"]) for line in lines if line["stage"] != "choose"}
    if len(ids) > 1:
        counts = sorted(len(problems) for problems in ids)
        raise InputError(f"the runs were scored on {counts} problems of the test, not all the "
                         "same. Expected scores on the same problems")
    for arm in arms:
        rates = {line.get("lr") for line in runs_of(lines, arm)}
        if len(rates) > 1:
            raise InputError(f"{arm} has final runs at the rates {sorted(rates)}. Expected the "
                             "chosen one alone: move the folders of the others away")
    [problems] = ids
    lines_of_text = [
        f"{len(problems)} problems of the test; percent. Intervals are 95 % over problems, for "
        "these seeds, and not corrected for their number. Bold is a difference whose p is below "
        "0.05 after Holm's correction for all of them. Cut are samples that did not end by "
        "themselves; they count as wrong.", ""]
    for part in (score_table, difference_table, steps_table):
        lines_of_text += part(lines, arms)
    return "\n".join(lines_of_text)


# ---- The picture ---------------------------------------------------------------------------------
def solved_by_depth(runs, part):
    """Of one third of the updates, 0 to 2: (depth of prefix, mean share of solved rollouts) of each
    depth that was drawn in it, over the runs of an arm."""
    depths = set()
    for run in runs:
        names = [name for name in run if name.startswith(AT_DEPTH)]
        depths |= {int(name.removeprefix(AT_DEPTH)) for name in names}
    points = []
    for depth in sorted(depths):
        shares = []
        for run in runs:
            steps = run.get(f"{AT_DEPTH}{depth}", [])
            thirds = np.array_split(np.array(steps, float), 3)
            shares += thirds[part].tolist()
        if not np.isnan(shares).all():
            points.append((depth, np.nanmean(shares)))
    return points


def draw(lines, path):
    """Share of solved rollouts by depth of prefix, early and late in training, a panel an arm; then
    mean@4 on the test, with intervals."""
    arms = [arm for arm in ARMS if runs_of(lines, arm)]
    count = len(arms) + 1
    figure, panels = subplots(1, count, squeeze=False, figsize=(3.2 * count, 3.2))
    for arm, axes in zip(arms, panels[0]):
        draw_depths(axes, runs_of(lines, arm))
    panels[0][0].legend(title="of the updates", fontsize=7, title_fontsize=7)
    deepest = max(axes.dataLim.xmax for axes in panels[0][:-1])
    for axes in panels[0][:-1]:
        axes.set_xlim(-0.5, deepest + 0.5)
    draw_scores(panels[0][-1], lines, ["student", *arms])
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def draw_depths(axes, runs):
    """A line for each third of an arm's updates."""
    from matplotlib import colormaps
    colours = colormaps["viridis"]([0.0, 0.5, 0.9])
    for part, label in enumerate(("first third", "second third", "last third")):
        points = solved_by_depth(runs, part)
        depths = [depth for depth, _ in points]
        percent = [100 * share for _, share in points]
        axes.plot(depths, percent, "o-", markersize=4, color=colours[part], label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    tidy(axes, title=runs[0]["arm"], xlabel="steps in the prefix", ylabel="rollouts solved, %",
         ylim=(-3, 103))


def draw_scores(axes, lines, arms):
    """Every arm on the test."""
    for place, arm in enumerate(arms):
        interval = np.array(score_interval(lines, arm, "mean@4"))
        mean, low, high = 100 * interval
        axes.plot([place, place], [low, high], color="#0072B2")
        axes.plot(place, mean, "o", color="#0072B2")
    tidy(axes, title="test", ylabel="mean@4, %", ylim=(0, None))
    axes.set_xticks(range(len(arms)), arms, rotation=20)


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
        lines = collect(args.folder, f"choose_{args.arm}_*")
        print(f"{best_rate([line for line in lines if line['arm'] == args.arm]):g}")
    else:
        write_jsonl(args.lines, collect(args.folder))


if __name__ == "__main__":
    run_command(main)
