"""
Draw the README's pictures from measured files. Needs matplotlib, which nothing else here does.

    python results/plot.py tree [--trees data/arithmetic/trees.jsonl] [--id train-12]
    python results/plot.py run out/RUN [out/RUN ...]
    python results/plot.py sweep [--sweep results/sweep.jsonl]

tree    tree.png in this folder, or --out
run     run.png in the run's folder, in the first one where several are compared
sweep   sweep.png, sweep_table2.png, sweep_all.png, figure4.png and sweep.md, beside sweep.jsonl
"""
import os
import sys

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullLocator
from scipy import stats

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from tree import InputError, arguments, read_jsonl, read_trees, run_command  # noqa: E402

YELLOW_TO_GREEN = plt.get_cmap("summer_r")
SETS = {"easy": "easy: 2 to 5 steps", "hard": "hard: 6 to 8 steps, sparse reward"}
# Rows of sweep.jsonl: their names in the paper, and colours that the colour-blind tell apart
# (Okabe and Ito).
TABLE_1 = {
    "grpo": ("GRPO, questions", "#000000"),
    "flat": ("flat", "#56B4E9"),
    "trace": ("trace", "#009E73"),
    "expectation": ("Tree-OPO, expectation", "#D55E00"),
    "optimistic": ("optimistic", "#E69F00"),
    "pessimistic": ("pessimistic", "#CC79A7"),
    "qp_hard": ("QP, hard", "#0072B2"),
}
TABLE_2 = {
    "reinforce_kl": ("REINFORCE KL", "#0072B2"),
    "reinforce_kl_baseline": ("REINFORCE KL + baseline", "#56B4E9"),
    "actor_critic": ("actor-critic", "#009E73"),
    "mcts_reinforce": ("MCTS-driven REINFORCE", "#CC79A7"),
    "gkd": ("GKD", "#E69F00"),
    "tree_opo_kl": ("Tree-OPO + KL", "#000000"),
    "off_policy": ("off-policy, teacher samples", "#888888"),
}
FURTHER = {
    "qp_soft": "QP, soft",
    "mc": "V by fresh rollouts",
    "loo": "V without own reward",
    "teacher": "V of the search",
    "grpo_clipped": "GRPO, two clipped epochs, KL",
    "tree_opo_clipped": "Tree-OPO, two clipped epochs, KL",
    "rloo": "RLOO, questions",
    "treepo": "TreePO",
    "treerl": "TreeRL",
    "treerpo": "TreeRPO",
    "ema": "V by moving average",
    "shrink": "V shrunk",
}
LABELS = {row: label for row, (label, _) in (TABLE_1 | TABLE_2).items()} | FURTHER
COLOURS = {"Table 1": "#0072B2", "Table 2": "#D55E00", "further": "#009E73"}
HEADER = ("row", "in sweep.py", "seeds", "greedy, %", "one more run", "sampled, %",
          "against GRPO, points", "against expectation, points", "constraints satisfied, %",
          "variance of advantages", "peak memory, MB", "seconds")
FOOTER = """
Accuracy: mean and half-width of its 95 % t-interval over seeds; one more run, with another seed, \
falls within the half-width beside it. Differences: greedy accuracy, paired by seed, t-test; the \
p-values are not
corrected for the number of rows. Constraints: mean ± standard deviation over groups. Memory and \
seconds: mean over seeds, training alone.
"""


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
    figure, axes = plt.subplots(figsize=(11, 0.8 + 0.42 * leaves))
    for node, parent in enumerate(tree.parent):
        if parent >= 0:
            axes.plot([depth[parent], depth[node]], [height[parent], height[node]],
                      color="0.75", linewidth=1.2, zorder=1)
    for node, visits in enumerate(tree.visits):
        rate = 100 * tree.value[node] / max(visits, 1)
        box = dict(boxstyle="round,pad=0.35", edgecolor="0.4", linewidth=0.6,
                   facecolor=YELLOW_TO_GREEN(depth[node] / max(deepest, 1)))
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
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
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
            left.plot([row["step"] for row in steps[width - 1:]], smooth, label=name)
        else:
            left.plot([], [], label=name)
        right.plot([row["step"] for row in scores],
                   [100 * row["eval_accuracy"] for row in scores], marker="o")
    left.set(xlabel="step", ylabel="reward of rollouts (mean of 10 steps)")
    right.set(xlabel="step", ylabel="held-out greedy accuracy, %", ylim=(0, 100))
    left.legend(fontsize=7)
    left.grid(alpha=0.3)
    right.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


# ---- The sweep: figures over seeds ---------------------------------------------------------------
def read_sweep(path):
    """(set, row) -> {seed: the run's line}; of two lines on one run the later holds."""
    runs = {}
    for run in read_jsonl(path, lambda row, number: row):
        runs.setdefault((run["set"], run["row"]), {})[run["seed"]] = run
    return runs


def interval(values, one_more=False):
    """Mean and half-width of its 95 % t-interval, the seeds being the sample; with `one_more` the
    half-width of where one more seed falls. nan where there are too few values."""
    values = np.array([value for value in values if value is not None], float)
    if len(values) == 0:
        return np.nan, np.nan
    if len(values) == 1:
        return values[0], np.nan
    spread = 1 / len(values) + one_more
    t = stats.t.ppf(0.975, len(values) - 1)
    return values.mean(), t * values.std(ddof=1) * np.sqrt(spread)


def over_seeds(curves, points=60):
    """Curves [(x, y), ...], one a seed, on one grid: x, mean and half-width of the 95 % interval,
    (points,) each. Pairs whose y is None are left out; None where no pair is left."""
    kept = []
    for curve in curves:
        pairs = np.array([(x, y) for x, y in curve if y is not None], float)
        if len(pairs):
            kept.append(pairs)
    if not kept:
        return None
    start = max(pairs[0, 0] for pairs in kept)
    end = min(pairs[-1, 0] for pairs in kept)
    x = np.linspace(start, end, points)
    on_grid = np.array([np.interp(x, *pairs.T) for pairs in kept])  # (seeds, points)
    mean, half = np.transpose([interval(column) for column in on_grid.T])
    return x, mean, half


def percent(seeds, key):
    """A share of every seed's run, in percent."""
    return [100 * run[key] for run in seeds.values()]


# ---- The sweep: pictures -------------------------------------------------------------------------
def label_ends(axes, ends, gap, top=100):
    """Names beside the right ends (y, name, colour) of lines, at least `gap` apart and at most at
    `top`."""
    ends = sorted(ends)
    _, right = axes.get_xlim()
    places = np.array([y for y, _, _ in ends], float)
    for _ in range(500):  # neighbours that are too close push each other away
        for k in range(len(ends) - 1):
            short = max(0, gap - (places[k + 1] - places[k]))
            places[k] -= short / 2
            places[k + 1] += short / 2
        places[-1:] = np.minimum(places[-1:], top)
    for (y, name, colour), place in zip(ends, places):
        axes.plot([right * 1.003, right * 1.03, right * 1.045], [y, place, place], color=colour,
                  linewidth=0.7, clip_on=False)
        axes.text(right * 1.055, place, name, color=colour, fontsize=9, va="center")


def tidy(axes, **settings):
    """Labels and limits, a faint grid, no frame at the top and the right."""
    axes.set(**settings)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_curves(runs, table, path):
    """Held-out greedy accuracy over generated tokens, mean and 95 % interval over seeds; one panel
    a set. Tree-OPO's line is the widest."""
    figure, panels = plt.subplots(1, 2, figsize=(12.5, 4.4))
    for axes, (name, title) in zip(panels, SETS.items()):
        ends = []
        for row, (label, colour) in table.items():
            curves = []
            for run in runs.get((name, row), {}).values():
                curves.append([(x / 1000, 100 * y) for x, y in run["evaluations"]])
            curve = over_seeds(curves)
            if curve is None:
                continue
            x, mean, half = curve
            style = dict(linewidth=1.5, zorder=2)
            if row == "expectation":
                style = dict(linewidth=2.6, zorder=3)
            axes.plot(x, mean, color=colour, **style)
            axes.fill_between(x, mean - half, mean + half, color=colour, alpha=0.13, linewidth=0)
            ends.append((mean[-1], label, colour))
        right = axes.dataLim.xmax if ends else 1
        tidy(axes, title=title, xlabel="generated tokens, thousands", xlim=(0, right),
             ylabel="held-out greedy accuracy, %", ylim=(0, 100))
        label_ends(axes, ends, gap=4.6)
    figure.tight_layout(w_pad=3)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def table_name(row):
    """Where a row of the sweep stands in the paper."""
    if row in TABLE_1:
        return "Table 1"
    return "Table 2" if row in TABLE_2 else "further"


def rows_of(runs):
    """The rows that were run, in the order of the tables; those without a name come last."""
    present = {row for _, row in runs}
    named = [row for row in LABELS if row in present]
    return named + sorted(present - set(LABELS))


def draw_dots(runs, path):
    """Final greedy accuracy of every row, mean and 95 % interval over seeds; sorted by the hard
    set."""
    rows = rows_of(runs)
    score = {}
    for name in SETS:
        for row in rows:
            score[name, row] = interval(percent(runs.get((name, row), {}), "greedy"))

    def height(row):
        means = [score["hard", row][0], score["easy", row][0]]
        return np.nan_to_num(means).tolist()

    rows.sort(key=height)
    figure, panels = plt.subplots(1, 2, figsize=(10, 1.2 + 0.25 * len(rows)), sharey=True)
    for axes, (name, title) in zip(panels, SETS.items()):
        untrained = []
        for place, row in enumerate(rows):
            mean, half = score[name, row]
            axes.errorbar(mean, place, xerr=half, fmt="o", markersize=5, linewidth=1.4,
                          color=COLOURS[table_name(row)])
            for run in runs.get((name, row), {}).values():
                _, accuracy = run["evaluations"][0]
                untrained.append(100 * accuracy)
        if untrained:
            title += f"\n(untrained: {np.mean(untrained):.0f} %)"
        left, right = axes.get_xlim()
        axes.set_xlim(max(left, -2), min(right, 102))
        tidy(axes, title=title, ylim=(-0.7, len(rows) - 0.3), yticks=range(len(rows)),
             yticklabels=[LABELS.get(row, row) for row in rows],
             xlabel="final greedy accuracy, %\n(mean and 95 % interval over seeds)")
    for table, colour in COLOURS.items():
        panels[0].plot([], [], "o", color=colour, label=table)
    panels[0].legend(loc="lower left", bbox_to_anchor=(-0.02, 1.08), ncol=3, frameon=False,
                     fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")


def draw_figure4(runs, path):
    """The paper's Fig. 4 on both sets: satisfied constraints, variance of the advantages, reward;
    mean over seeds, smoothed."""
    figure, panels = plt.subplots(2, 3, figsize=(12, 6))
    for line, (name, title) in zip(panels, SETS.items()):
        satisfied, variance, reward = line
        draw_progress(satisfied, runs, name, "sat", "constraints satisfied, %", 100)
        draw_progress(variance, runs, name, "adv_var", "variance of advantages")
        draw_progress(reward, runs, name, "reward", "group average reward")
        variance.set(title=title, yscale="log")
        variance.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}",
                           minor_locator=NullLocator())
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    legends = [axes.get_legend_handles_labels() for axes in panels.flat]
    longest = max(legends, key=lambda legend: len(legend[0]))  # GRPO has no constraints
    figure.legend(*longest, loc="upper center", ncol=6, frameon=False)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def draw_progress(axes, runs, name, key, label, scale=1):
    """A figure of the training log over generated tokens, for the rows of Table 1 but GRPO."""
    for row, (text, colour) in TABLE_1.items():
        if row == "grpo":
            continue
        curves = []
        for run in runs.get((name, row), {}).values():
            tokens = np.array(run["curves"]["tokens"]) / 1000
            values = [None if y is None else scale * y for y in run["curves"][key]]
            curves.append(list(zip(tokens, values)))
        curve = over_seeds(curves, 30)
        if curve is None:
            continue
        x, mean, _ = curve
        window = np.ones(5)
        smooth = np.convolve(mean, window, "same")
        count = np.convolve(np.ones(30), window, "same")  # the ends have fewer points
        axes.plot(x, smooth / count, color=colour, label=text,
                  linewidth=2.4 if row == "expectation" else 1.5)
    tidy(axes, xlabel="generated tokens, thousands", ylabel=label)


# ---- The sweep: table ----------------------------------------------------------------------------
def number(mean, half, digits=1):
    """A mean and what it is known to, as text."""
    if np.isnan(mean):
        return "–"
    if np.isnan(half):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def against(seeds, others):
    """How many points of greedy accuracy a row is above another, paired by seed, and p."""
    both = sorted(set(seeds) & set(others))
    if len(both) < 2 or seeds is others:
        return "–"
    a = np.array([100 * seeds[seed]["greedy"] for seed in both])
    b = np.array([100 * others[seed]["greedy"] for seed in both])
    text = f"{np.mean(a - b):+.1f}"
    p = np.nan
    if np.ptp(a - b) > 0:
        p = stats.ttest_rel(a, b).pvalue
    return text if np.isnan(p) else f"{text} (p = {p:.2g})"


def line_of(row, seeds, grpo, expectation):
    """A row of the sweep as a line of the table."""
    def mean_of(key):
        mean, _ = interval([run[key] for run in seeds.values()])
        return mean

    def inside(key):  # a mean over the run's steps
        mean, _ = interval([run["means"][key] for run in seeds.values()])
        return mean

    greedy = percent(seeds, "greedy")
    one_more = "–"
    if len(seeds) > 1:
        _, half = interval(greedy, one_more=True)
        one_more = f"± {half:.1f}"
    cells = [LABELS.get(row, row), f"`{row}`", str(len(seeds)), number(*interval(greedy)),
             one_more, number(*interval(percent(seeds, "sampled"))),
             against(seeds, grpo), against(seeds, expectation),
             number(100 * inside("sat"), 100 * inside("sat_sd")),
             number(inside("adv_var"), np.nan, 3),
             f"{mean_of('peak_memory_mb'):.0f}", f"{mean_of('seconds'):.0f}"]
    return "| " + " | ".join(cells) + " |"


def table_of(runs):
    """The sweep as Markdown: one table a set."""
    lines = []
    for name, title in SETS.items():
        lines += [f"**{title}**", "", "| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
        grpo = runs.get((name, "grpo"), {})
        expectation = runs.get((name, "expectation"), {})
        for row in rows_of(runs):
            if (name, row) in runs:
                lines.append(line_of(row, runs[name, row], grpo, expectation))
        lines.append("")
    return "\n".join(lines) + FOOTER


def draw_sweep(path):
    """Every picture of a sweep, and its table, beside its file."""
    runs = read_sweep(path)
    folder = os.path.dirname(os.path.abspath(path))
    draw_curves(runs, TABLE_1, f"{folder}/sweep.png")
    ours = {"expectation": TABLE_1["expectation"]}
    draw_curves(runs, TABLE_2 | ours, f"{folder}/sweep_table2.png")
    draw_dots(runs, f"{folder}/sweep_all.png")
    draw_figure4(runs, f"{folder}/figure4.png")
    table = table_of(runs)
    with open(f"{folder}/sweep.md", "w", encoding="utf-8") as out:
        out.write(table)
    print(table)


def main():
    parser = arguments("Draw the README's pictures.")
    add = parser.add_argument
    add("what", choices=("tree", "run", "sweep"), help="to draw")
    add("folders", nargs="*", help="run folders")
    add("--trees", default="data/arithmetic/trees.jsonl", help="prefix trees, JSONL")
    add("--id", help="the problem; default the first")
    add("--sweep", default=os.path.join(HERE, "sweep.jsonl"),
        help="what sweep.py wrote; the pictures come beside it")
    add("--out", default="tree.png", help="the picture of a tree; README's is results/tree.png")
    args = parser.parse_args()
    if args.what == "sweep":
        draw_sweep(args.sweep)
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
