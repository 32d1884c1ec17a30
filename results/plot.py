"""
Write down what was measured: pictures, tables and conclusions. Pictures need matplotlib, which
nothing else here does.

    python results/plot.py tree [--trees data/arithmetic/trees.jsonl] [--id train-416]
    python results/plot.py run out/RUN [out/RUN ...]
    python results/plot.py sweep [--sweep results/sweep.jsonl] [--readme README.md]

tree    tree.png in this folder, or --out
run     run.png in the run's folder, in the first one where several are compared
sweep   sweep.md, sweep.png and curves.png beside sweep.jsonl; gradients.md and gradients.png, where
        gradients.jsonl is there; and in --readme what stands between the two markers
"""
import json
import os
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
from sweep import (BEYOND, FINE_TUNED, PLANNED_ROWS, RATES, REFERENCES, ROWS, SETS,  # noqa: E402
                   UPDATES_ROWS, chosen_rate, first_lines, parse_line, rate_scores)
from tree import InputError, arguments, read_jsonl, read_trees, run_command  # noqa: E402

PLANNED = [  # comparisons named before the runs were made; each on both sets, in both METRICS
    ("expectation", "grpo"), ("optimal", "expectation"), ("optimal", "optimal_question"),
    ("expectation", "flat"), ("expectation", "optimistic"), ("expectation", "pessimistic"),
    ("expectation", "qp_hard"), ("tree_opo_kl", "expectation"), ("gkd", "optimal")]
METRICS = {"greedy": "#0072B2", "mean@16": "#D55E00"}  # and their colours
ROW_COLOURS = dict(zip(PLANNED_ROWS, [  # told apart by the colour-blind (Okabe and Ito)
    "#000000", "#D55E00", "#0072B2", "#0072B2", "#56B4E9", "#E69F00", "#CC79A7", "#009E73",
    "#8B4513", "#888888"]))
SCORES = [*METRICS, "pass@16"]  # shares, given in percent
FIGURES = {  # of a line of the log: title and form of their mean over seeds
    "lr": ("learning rate", "g"), "updates": ("updates", ".0f"), "tokens": ("tokens", ".0f"),
    "search": ("search", ".0f"), "entropy": ("entropy", ".3f"), "sat": ("constraints", ".1%"),
    "sat_triplet": ("triplets", ".1%"), "adv_var": ("variance", ".3f")}
BEGIN = "<!-- results -->"
END = "<!-- end of results -->"
RULE = """A row is "ahead" where the Holm-corrected p of the paired t-test over seeds is below \
0.05, "probably ahead" where only the difference's own 95 % interval excludes 0; else the two are \
"not told apart". All planned comparisons are one family of tests. Brackets are 95 % intervals."""
MARKS = {"ahead": "**", "probably ahead": "*", "not told apart": ""}
SHORT_RULE = """The planned comparisons, in points, with 95 % intervals. Bold: a Holm-corrected p \
of the paired t-test over seeds below 0.05, all 36 tests being one family. Italic: only the \
interval excludes 0. Else the two are not told apart."""
NOTES = """Accuracies in %, on test: mean and 95 % t-interval over seeds. Entropy: mean of -log p \
of the sampled tokens in a run's last tenth, on the prefixes that the row trains on. Tokens: \
of the completions, which the student generates and for `off_policy` the teacher. Search: generated \
by the teacher for the tree of one problem; a run of U updates draws 4 U groups, each from the tree \
of one of the set's problems. For `mcts_reinforce`, which draws none, and `tree_opo_kl_tuned` it has \
searched 500 problems of the set (all 250 of the hard one) and is fine-tuned on what it found, once \
for all their runs."""


def subplots(*shape, **settings):
    """matplotlib's, drawn to files alone."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(*shape, **settings)


# ---- One tree, one run ---------------------------------------------------------------------------
def lay_out(tree):
    """(P,) the height of each node, and the number of leaves. Leaves take the next free place from
    above, a parent stands in the middle of its children."""
    children = [[] for _ in tree.parent]
    for node in range(1, len(tree.parent)):
        children[tree.parent[node]].append(node)
    height = np.zeros(len(tree.parent))
    leaves = 0

    def place(node):
        nonlocal leaves
        for child in children[node]:
            place(child)
        if children[node]:
            height[node] = height[children[node]].mean()
        else:
            height[node] = leaves
            leaves += 1

    place(0)
    return height, leaves


def draw_tree(tree, path):
    """One prefix tree as in Fig. 1: shallow prefixes yellow, deep ones green; the share is the
    teacher's success rate."""
    depth = tree.depth()
    deepest = depth.max()
    height, leaves = lay_out(tree)
    figure, axes = subplots(figsize=(11, 0.8 + 0.42 * leaves))
    from matplotlib import colormaps
    yellow_to_green = colormaps["summer_r"]
    for node, parent in enumerate(tree.parent):
        if parent >= 0:
            axes.plot([depth[parent], depth[node]], [height[parent], height[node]],
                      color="0.75", linewidth=1.2, zorder=1)
    for node, visits in enumerate(tree.visits):
        rate = 100 * tree.value[node] / max(visits, 1)
        box = dict(boxstyle="round,pad=0.35", edgecolor="0.4", linewidth=0.6,
                   facecolor=yellow_to_green(depth[node] / max(deepest, 1)))
        axes.text(depth[node], height[node], f"{tree.steps[node] or 'Q'}\n{rate:.0f} % of {visits}",
                  ha="center", va="center", fontsize=7.5, zorder=2, bbox=box)
    problem = tree.problem
    axes.set_title(f"Q: {problem['question']}   (answer {problem['answer']})", fontsize=9)
    axes.set_xlim(-0.4, deepest + 0.4)
    axes.set_ylim(leaves - 0.4, -0.6)
    axes.axis("off")
    figure.savefig(path, dpi=130, bbox_inches="tight")


def draw_runs(folders, path):
    """Reward of the rollouts and held-out accuracy of runs, over steps."""
    figure, (left, right) = subplots(1, 2, figsize=(9, 3.2))
    for folder in folders:
        log = list(read_jsonl(os.path.join(folder, "log.jsonl"), lambda row, number: row))
        name = os.path.basename(os.path.normpath(folder))
        # a row is a step, which has no reward if it learns from solutions, or an evaluation
        steps = [row for row in log if row.get("reward") is not None]
        scores = [row for row in log if "eval_accuracy" in row]
        width = min(10, len(steps))
        if steps:
            reward = [row["reward"] for row in steps]
            smooth = np.convolve(reward, np.ones(width) / width, "valid")
            left.plot([row["step"] for row in steps[width - 1:]], smooth)
        accuracy = [100 * row["eval_accuracy"] for row in scores]
        right.plot([row["step"] for row in scores], accuracy, marker="o", label=name)
    tidy(left, xlabel="step", ylabel="reward of rollouts (mean of 10 steps)")
    tidy(right, xlabel="step", ylabel="held-out greedy accuracy, %", ylim=(0, 100))
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


# ---- The sweep: figures over seeds. finished is {Job: its line of sweep.jsonl}. ------------------
def read_sweep(path):
    """The log, and to each line "search": the tokens of the teacher's search a problem, from
    search.json beside it; 0 for the rows on questions that do without."""
    finished = first_lines(read_jsonl(path, parse_line))
    search = {}
    beside = Path(path).with_name("search.json")
    if beside.exists():
        search = json.loads(beside.read_text("utf-8"))
    for job, line in finished.items():
        if job.row in REFERENCES:
            line["lr"] = None
            continue
        line["search"] = search.get(job.set)
        if "--group question" in ROWS[job.row] and FINE_TUNED not in ROWS[job.row]:
            line["search"] = 0
    return finished


def runs_of(finished, name, row, stage="final"):
    """{seed: the line} of a row on a set, at the rate that was chosen for it."""
    if row in REFERENCES:
        wanted = (name, row, "reference", 0.0)
    else:
        wanted = (name, row, stage, chosen_rate(rate_scores(finished, name, row)))
    return {job.seed: line for job, line in finished.items() if job[:4] == wanted}


def sets_run(finished):
    """The sets of which there are final runs; all sets where there are none."""
    run = {job.set for job in finished if job.stage == "final"}
    return [name for name in SETS if name in run] or list(SETS)


def points(runs, metric):
    """{seed: a score in percent}."""
    return {seed: 100 * line["scores"][metric] for seed, line in runs.items()}


def interval(values):
    """Mean of a sample and the half-width of its 95 % t-interval; nan where it is too small."""
    values = np.array(values, float)
    if len(values) < 2:
        return values.sum() if len(values) else np.nan, np.nan
    return values.mean(), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


def holm(p_values):
    """Holm's correction (1979): the k-th smallest of m p-values times m - k + 1, never falling with
    k, at most 1.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    m = len(p_values)
    corrected = [1.0] * m
    largest = 0.0
    for place, k in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, (m - place) * p_values[k])
        corrected[k] = min(1.0, largest)
    return corrected


class Comparison(NamedTuple):
    """A planned comparison on one set in one metric, paired by seed."""
    first: str
    second: str
    set: str
    metric: str
    seeds: int
    difference: float  # first minus second, points
    half: float        # of its 95 % t-interval; nan where there are no two seeds
    p: float           # of the paired t-test
    holm: float = 1.0  # the same, Holm-corrected

    def strength(self):
        """Of the evidence that the two differ."""
        if self.holm < 0.05:
            return "ahead"
        if abs(self.difference) > self.half:  # never where that is nan
            return "probably ahead"
        return "not told apart"

    def verdict(self):
        """The same words for the same strength of evidence."""
        rows = [self.first, self.second]
        strength = self.strength()
        if self.seeds < 2:
            return f"{self.first} and {self.second} are not measured"
        if strength == "not told apart":
            return f"{self.first} and {self.second} are not told apart"
        if self.difference < 0:
            rows.reverse()
        return f"{rows[0]} is {strength} of {rows[1]}"

    def span(self):
        """Difference and interval, as text."""
        if self.seeds < 2:
            return "–"
        low = self.difference - self.half
        high = self.difference + self.half
        return f"{self.difference:+.1f} [{low:+.1f}, {high:+.1f}]"

    def sentence(self):
        """What was found, for the conclusions."""
        return (f"On {self.set} in {self.metric}, {self.verdict()}: {self.first} minus "
                f"{self.second} is {self.span()} points.")


def compare(finished, first, second, name, metric):
    """One Comparison, before Holm's correction. What is not measured has p = 1."""
    a = points(runs_of(finished, name, first), metric)
    b = points(runs_of(finished, name, second), metric)
    seeds = sorted(a.keys() & b.keys())
    differences = [a[seed] - b[seed] for seed in seeds]
    p = 1.0
    if len(seeds) > 1 and np.any(differences):
        p = stats.ttest_1samp(differences, 0).pvalue  # the t-test of pairs
    return Comparison(first, second, name, metric, len(seeds), *interval(differences), float(p))


def compare_planned(finished):
    """Every planned comparison, corrected as one family: [Comparison]."""
    found = []
    for (first, second), name, metric in product(PLANNED, SETS, METRICS):
        found.append(compare(finished, first, second, name, metric))
    corrected = holm([one.p for one in found])
    return [one._replace(holm=p) for one, p in zip(found, corrected)]


# ---- The sweep: tables and sentences -------------------------------------------------------------
def cell(runs, key):
    """A figure of a row's runs, as text: the mean over seeds, of a score with its interval."""
    if key == "seeds":
        return str(len(runs))
    values = []
    for line in runs.values():
        figures = line | line.get("means", {}) | line["scores"]
        if figures.get(key) is not None:
            values.append(figures[key])
    mean, half = interval(values)
    if np.isnan(mean):
        return "–"
    if key in SCORES and np.isnan(half):
        return f"{100 * mean:.1f}"
    if key in SCORES:
        return f"{100 * mean:.1f} ± {100 * half:.1f}"
    return format(mean, FIGURES[key][1])


def markdown(header, rows):
    """A table as lines."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def table(finished, rows, keys, sets=None, stage="final"):
    """A line for each row that was run; for each set that was run the figures `keys`."""
    sets = sets or sets_run(finished)
    header = ["row"]
    for name in sets:
        titles = [FIGURES[key][0] if key in FIGURES else key for key in keys]
        header += [f"{name}: {title}" for title in titles]
    lines = []
    for row in rows:
        runs = [runs_of(finished, name, row, stage) for name in sets]
        if any(runs):
            lines.append([row, *(cell(of_set, key) for of_set, key in product(runs, keys))])
    if not lines:
        return ["Not run.", ""]
    return markdown(header, lines)


def comparison_table(comparisons):
    """Every planned comparison."""
    rows = []
    for one in comparisons:
        rows.append([one.first, one.second, one.set, one.metric, str(one.seeds), one.span(),
                     f"{one.p:.2g}", f"{one.holm:.2g}", one.verdict()])
    return markdown(["first", "second", "set", "metric", "seeds", "first minus second, points",
                     "p", "Holm p", "in words"], rows)


def rates_table(finished):
    """The scores on val that chose the learning rates; the chosen one is bold."""
    rates = sorted([*RATES, *BEYOND.values()])
    lines = []
    for name, row in product(SETS, ROWS):
        scored = rate_scores(finished, name, row)
        cells = dict.fromkeys(rates, "–")
        for lr in scored:
            cells[lr] = f"{100 * scored[lr]:.1f}"
        best = chosen_rate(scored)
        if best:
            cells[best] = f"**{cells[best]}**"
        if scored:
            lines.append([name, row, *cells.values()])
    return markdown(["set", "row", *(f"{lr:g}" for lr in rates)], lines)


def conclusions(comparisons):
    """A line for each planned pair and set, with a sentence a metric."""
    return [f"* {one.sentence()}" for one in comparisons if one.seeds > 1] + [""]


def short_table(comparisons):
    """The same for README: a line a planned pair, a column a set and metric; then what is not run.
    """
    measured = [one for one in comparisons if one.seeds > 1]
    known = {(one.set, one.metric) for one in measured}
    columns = [key for key in product(SETS, METRICS) if key in known]
    rows = []
    for first, second in PLANNED:
        marked = dict.fromkeys(columns, "–")
        for one in measured:
            if (one.first, one.second) == (first, second):
                mark = MARKS[one.strength()]
                marked[one.set, one.metric] = f"{mark}{one.span()}{mark}"
        rows.append([f"{first} minus {second}", *marked.values()])
    header = ["points"] + [f"{name}: {metric}" for name, metric in columns]
    lines = markdown(header, [row for row in rows if {*row[1:]} - {"–"}])
    missing = len(comparisons) - len(measured)
    if missing:
        lines += [f"{missing} of the {len(comparisons)} planned tests have not been run; they are "
                  "in sweep.md and count in the correction.", ""]
    return lines


# ---- The sweep: pictures -------------------------------------------------------------------------
def tidy(axes, **settings):
    """Labels and limits, a faint grid, no frame at the top and the right."""
    axes.set(**settings)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_dots(finished, path):
    """Accuracies of every row on test, mean and 95 % interval over seeds; a panel a set."""
    run = {job.row for job in finished if job.stage == "final"}
    rows = [row for row in ROWS if row in run]
    sets = sets_run(finished)
    figure, [panels] = subplots(1, len(sets), figsize=(2 + 4 * len(sets), 1.4 + 0.28 * len(rows)),
                                sharey=True, squeeze=False)
    for axes, name in zip(panels, sets):
        for shift, (metric, colour) in zip((-0.12, 0.12), METRICS.items()):
            axes.plot([], [], "o", color=colour, label=metric)
            for place, row in enumerate(rows):
                runs = runs_of(finished, name, row)
                mean, half = interval(list(points(runs, metric).values()))
                axes.errorbar(mean, place + shift, xerr=half, fmt="o", markersize=4, color=colour)
        tidy(axes, title=name, ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)),
             yticklabels=rows, xlabel="test accuracy, % (mean and 95 % interval over seeds)")
    panels[-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def draw_curves(finished, path):
    """The planned rows' greedy accuracy on val over generated tokens: median and range over seeds.
    Rows on questions are dashed."""
    sets = sets_run(finished)
    figure, [panels] = subplots(1, len(sets), figsize=(1.5 + 5.5 * len(sets), 4.6), sharey=True,
                                squeeze=False)
    for axes, name in zip(panels, sets):
        for row, colour in ROW_COLOURS.items():
            runs = runs_of(finished, name, row).values()
            curves = [np.array(line["val"]) for line in runs]  # of (tokens, accuracy)
            if not curves:
                continue
            x = np.linspace(0, min(curve[-1, 0] for curve in curves), 60)
            y = 100 * np.array([np.interp(x, *curve.T) for curve in curves])  # (seeds, 60)
            style = "--" if "--group question" in ROWS[row] else "-"
            axes.plot(x / 1000, np.median(y, axis=0), style, color=colour, label=row)
            axes.fill_between(x / 1000, y.min(axis=0), y.max(axis=0), color=colour, alpha=0.1,
                              linewidth=0)
        tidy(axes, title=name, xlabel="generated tokens, thousands",
             ylabel="greedy accuracy on val, %", ylim=(0, 100))
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


# ---- The command ---------------------------------------------------------------------------------
def replace_results(path, lines):
    """Put lines between the two markers of a Markdown file."""
    before, begin, rest = Path(path).read_text("utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise InputError(f"{path} has no {BEGIN} that {END} follows; expected both, around what "
                         "this command writes")
    Path(path).write_text("\n".join([before + BEGIN, *lines, END + after]), "utf-8")


def write_gradients(folder):
    """gradients.md and gradients.png, where gradients.jsonl is there. Returns their conclusions."""
    path = f"{folder}/gradients.jsonl"
    if not os.path.exists(path):
        return []
    import gradients  # and with it torch
    lines = gradients.write_summary(path)
    found = []
    for label in gradients.distinct(lines, "label"):
        cells = [f"{line['estimator']} {gradients.cell(line, 'efficiency')}" for line in lines
                 if line["label"] == label and line["estimator"] in ROWS.keys() - {"flat"}]
        found.append(f"* On {label}, how many times fewer groups than flat give as accurate a "
                     f"gradient: {', '.join(cells)}.")
    return [*found, ""]


def write_sweep(path, readme):
    """Tables, pictures and conclusions of a sweep, beside its file and in README."""
    finished = read_sweep(path)
    folder = os.path.dirname(os.path.abspath(path))
    draw_dots(finished, f"{folder}/sweep.png")
    draw_curves(finished, f"{folder}/curves.png")
    comparisons = compare_planned(finished)
    said = [RULE, "", *conclusions(comparisons), *write_gradients(folder)]
    lines = ["# The sweep", "", NOTES, ""]
    for name in sets_run(finished):
        keys = ["lr", "seeds", *SCORES, "entropy", "updates", "tokens", "search"]
        lines += table(finished, [*REFERENCES, *ROWS], keys, [name])
    lines += ["## Planned comparisons", "", *comparison_table(comparisons),
              "## Conclusions", "", *said,
              "## Equal updates", "",
              *table(finished, UPDATES_ROWS, ["lr", "updates", "tokens", *SCORES], stage="updates"),
              "## Constraints satisfied, and variance of the advantages", "",
              *table(finished, ROWS, ["sat", "sat_triplet", "adv_var"]),
              "## Learning rates: (greedy + mean@2) / 2 on val, %", "", *rates_table(finished)]
    Path(folder, "sweep.md").write_text("\n".join(lines), "utf-8")
    to = os.path.relpath(folder, os.path.dirname(os.path.abspath(readme)))
    replace_results(readme, [
        *table(finished, [*REFERENCES, *ROWS], ["lr", *METRICS]),
        f"![Test accuracy, %, of every row]({to}/sweep.png)", "",
        SHORT_RULE, "", *short_table(comparisons),
        f"[Learning curves]({to}/curves.png), [all tables]({to}/sweep.md)."])
    print("\n".join(lines))


def main():
    parser = arguments("Write down what was measured: pictures, tables, conclusions.")
    add = parser.add_argument
    add("what", choices=("tree", "run", "sweep"))
    add("folders", nargs="*", help="run folders")
    add("--trees", default="data/arithmetic/trees.jsonl", help="prefix trees, JSONL")
    add("--id", help="the problem; default the first")
    add("--sweep", default=os.path.join(HERE, "sweep.jsonl"),
        help="what sweep.py wrote; what is made of it comes beside it")
    add("--readme", default=os.path.join(os.path.dirname(HERE), "README.md"),
        help="the file whose results are replaced")
    add("--out", default="tree.png", help="the picture of a tree; README's is results/tree.png")
    args = parser.parse_args()
    if args.what == "sweep":
        write_sweep(args.sweep, args.readme)
    elif args.what == "run":
        if not args.folders:
            raise InputError("no run folder is named; expected one or more that train.py wrote")
        draw_runs(args.folders, os.path.join(args.folders[0], "run.png"))
    else:
        trees = [tree for tree in read_trees(args.trees) if args.id in (None, tree.problem["id"])]
        if not trees:
            raise InputError(f"no problem of {args.trees} has the id {args.id}")
        draw_tree(trees[0], args.out)


if __name__ == "__main__":
    run_command(main)
