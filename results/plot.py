"""
Draw the README's pictures from measured files. Needs matplotlib, which nothing else here does.

    python results/plot.py tree [--trees data/arithmetic/trees.jsonl] [--id train-12]     -> results/tree.png
    python results/plot.py run out/RUN [out/RUN ...]                                      -> results/run.png
    python results/plot.py sweep [--sweep results/sweep.jsonl]    -> sweep.png, sweep_table2.png, sweep_all.png, figure4.png, sweep.md beside it
"""
import argparse
import json
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
from tree import InputError, read_jsonl, read_trees, run_command  # noqa: E402

YELLOW_TO_GREEN = plt.get_cmap("summer_r")
SETS = {"easy": "easy: 2 to 5 steps", "hard": "hard: 6 to 8 steps, sparse reward"}
TABLES = {  # rows of sweep.jsonl: their names in the paper, and colours that the colour-blind tell apart (Okabe and Ito)
    "Table 1": {"grpo": ("GRPO, questions", "#000000"), "flat": ("flat", "#56B4E9"), "trace": ("trace", "#009E73"),
                "expectation": ("Tree-OPO, expectation", "#D55E00"), "optimistic": ("optimistic", "#E69F00"), "pessimistic": ("pessimistic", "#CC79A7"),
                "qp_hard": ("QP, hard", "#0072B2")},
    "Table 2": {"reinforce_kl": ("REINFORCE KL", "#0072B2"), "reinforce_kl_baseline": ("REINFORCE KL + baseline", "#56B4E9"),
                "actor_critic": ("actor-critic", "#009E73"), "mcts_reinforce": ("MCTS-driven REINFORCE", "#CC79A7"), "gkd": ("GKD", "#E69F00"),
                "tree_opo_kl": ("Tree-OPO + KL", "#000000"), "off_policy": ("off-policy, teacher samples", "#888888")},
    "further": {"qp_soft": ("QP, soft", None), "mc": ("V by fresh rollouts", None), "loo": ("V without own reward", None), "teacher": ("V of the search", None),
                "grpo_clipped": ("GRPO, two clipped epochs, KL", None),
                "tree_opo_clipped": ("Tree-OPO, two clipped epochs, KL", None), "rloo": ("RLOO, questions", None), "treepo": ("TreePO", None),
                "treerl": ("TreeRL", None), "treerpo": ("TreeRPO", None), "ema": ("V by moving average", None), "shrink": ("V shrunk", None)},
}
LABELS = {row: label for table in TABLES.values() for row, (label, _) in table.items()}


def draw_tree(tree, path):
    """One prefix tree as in Fig. 1: shallow prefixes yellow, deep ones green; the share is the teacher's success rate."""
    depth = tree.depth()
    children = {node: [k for k, parent in enumerate(tree.parent) if parent == node] for node in range(len(depth))}
    row, rows = {}, 0

    def place(node):  # leaves take the next row, a parent stands between its children
        nonlocal rows
        if not children[node]:
            row[node], rows = rows, rows + 1
        else:
            row[node] = np.mean([place(child) for child in children[node]])
        return row[node]

    place(0)
    figure, axes = plt.subplots(figsize=(11, 0.8 + 0.42 * rows))
    for node, parent in enumerate(tree.parent):
        if parent >= 0:
            axes.plot([depth[parent], depth[node]], [row[parent], row[node]], color="0.75", linewidth=1.2, zorder=1)
    for node in range(len(depth)):
        rate = f"{100 * tree.value[node] / max(tree.visits[node], 1):.0f} %"
        text = f"{tree.steps[node] or 'Q'}\n{rate} of {tree.visits[node]}"
        axes.text(depth[node], row[node], text, ha="center", va="center", fontsize=7.5, zorder=2,
                  bbox=dict(boxstyle="round,pad=0.35", facecolor=YELLOW_TO_GREEN(depth[node] / max(depth.max(), 1)), edgecolor="0.4", linewidth=0.6))
    axes.set_title(f"Q: {tree.question}   (answer {tree.answer})", fontsize=9)
    axes.set_xlim(-0.4, depth.max() + 0.4)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.axis("off")
    figure.savefig(path, dpi=130, bbox_inches="tight")


def draw_runs(folders, path):
    """Reward of the rollouts and held-out accuracy of runs, over steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    for folder in folders:
        with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as lines:
            log = [json.loads(line) for line in lines]
        reward = np.array([row["reward"] for row in log])
        width = min(10, len(reward))
        left.plot(np.arange(width, len(reward) + 1), np.convolve(reward, np.ones(width) / width, "valid"), label=os.path.basename(folder.rstrip("/")))
        steps = sorted(int(name[5:-6]) for name in os.listdir(folder) if name.startswith("eval-") and name.endswith(".jsonl"))
        accuracy = []
        for step in steps:
            with open(os.path.join(folder, f"eval-{step}.jsonl"), encoding="utf-8") as lines:
                accuracy.append(100 * np.mean([json.loads(line)["correct"][0] for line in lines]))
        right.plot(steps, accuracy, marker="o")
    left.set(xlabel="step", ylabel="reward of rollouts (mean of 10 steps)")
    right.set(xlabel="step", ylabel="held-out greedy accuracy, %", ylim=(0, 100))
    left.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def read_sweep(path):
    runs = {}  # (set, row) -> {seed: the run's object}; of two lines on one run the later holds
    for run in read_jsonl(path, lambda row, number: row):
        runs.setdefault((run["set"], run["row"]), {})[run["seed"]] = run
    return runs


def interval(values, of="mean"):
    """Mean and half-width of its 95 % t-interval; the seeds are the sample. of="next": the half-width of where one more seed falls."""
    values = np.array([v for v in values if v is not None], float)
    if len(values) < 2:
        return (values[0] if len(values) else np.nan), np.nan
    spread = 1 / len(values) + (of == "next")
    return values.mean(), stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) * np.sqrt(spread)


def over_seeds(curves, points=60):
    """Curves of (x, y) pairs, one a seed, on one grid: x, mean, half-width of the 95 % interval; None where there is no pair."""
    curves = [np.array([(x, y) for x, y in curve if y is not None], float) for curve in curves if any(y is not None for _, y in curve)]
    if not curves:
        return None
    x = np.linspace(max(c[0, 0] for c in curves), min(c[-1, 0] for c in curves), points)
    return x, *np.array([interval(column) for column in np.transpose([np.interp(x, *c.T) for c in curves])]).T


def label_ends(axes, ends, gap, top=100):
    """Names beside the right ends (y, name, colour) of lines, at least `gap` apart and at most at `top`."""
    ends, right = sorted(ends), axes.get_xlim()[1]
    places = np.array([y for y, _, _ in ends], float)
    for _ in range(500):  # neighbours that are too close push each other away
        for k in range(len(ends) - 1):
            short = max(0, gap - (places[k + 1] - places[k]))
            places[k:k + 2] += -short / 2, short / 2
        places[-1:] = np.minimum(places[-1:], top)
    for (y, name, colour), place in zip(ends, places):
        axes.plot([right * 1.003, right * 1.03, right * 1.045], [y, place, place], color=colour, linewidth=0.7, clip_on=False)
        axes.text(right * 1.055, place, name, color=colour, fontsize=9, va="center")


def tidy(axes, **settings):
    axes.set(**settings)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_curves(runs, table, path):
    """Held-out greedy accuracy over generated tokens, mean and 95 % interval over seeds; one panel a set."""
    figure, panels = plt.subplots(1, 2, figsize=(12.5, 4.4))
    for axes, (name, title) in zip(panels, SETS.items()):
        ends = []
        for row, (label, colour) in table.items():
            if curve := over_seeds([[(x / 1000, 100 * y) for x, y in run["evaluations"]] for run in runs.get((name, row), {}).values()]):
                x, mean, half = curve
                axes.plot(x, mean, color=colour, linewidth=2.6 if row == "expectation" else 1.5, zorder=3 if row == "expectation" else 2)
                axes.fill_between(x, mean - half, mean + half, color=colour, alpha=0.13, linewidth=0)
                ends.append((mean[-1], label, colour))
        tidy(axes, title=title, xlabel="generated tokens, thousands", ylabel="held-out greedy accuracy, %", ylim=(0, 100), xlim=(0, axes.dataLim.xmax if ends else 1))
        label_ends(axes, ends, gap=4.6)
    figure.tight_layout(w_pad=3)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def draw_dots(runs, path):
    """Final greedy accuracy of every row, mean and 95 % interval over seeds; sorted by the hard set."""
    colours = {"Table 1": "#0072B2", "Table 2": "#D55E00", "further": "#009E73"}
    rows = {row: table for table in TABLES for row in TABLES[table]} | {row: "further" for _, row in runs if row not in LABELS}
    score = {(name, row): interval([100 * run["greedy"] for run in runs.get((name, row), {}).values()]) for row in rows for name in SETS}
    rows = dict(sorted(((row, table) for row, table in rows.items() if any((name, row) in runs for name in SETS)),
                       key=lambda item: [np.nan_to_num(score[name, item[0]][0]) for name in ("hard", "easy")]))
    figure, panels = plt.subplots(1, 2, figsize=(10, 1.2 + 0.25 * len(rows)), sharey=True)
    for axes, (name, title) in zip(panels, SETS.items()):
        for place, (row, table) in enumerate(rows.items()):
            axes.errorbar(score[name, row][0], place, xerr=score[name, row][1], fmt="o", markersize=5, color=colours[table], linewidth=1.4)
        untrained = [100 * run["evaluations"][0][1] for key, seeds in runs.items() if key[0] == name for run in seeds.values()]
        title += f"\n(untrained: {np.mean(untrained):.0f} %)" if untrained else ""
        left, right = axes.get_xlim()
        axes.set_xlim(max(left, -2), min(right, 102))
        tidy(axes, title=title, xlabel="final greedy accuracy, %\n(mean and 95 % interval over seeds)", ylim=(-0.7, len(rows) - 0.3),
             yticks=range(len(rows)), yticklabels=[LABELS.get(row, row) for row in rows])
    for table, colour in colours.items():
        panels[0].plot([], [], "o", color=colour, label=table)
    panels[0].legend(loc="lower left", bbox_to_anchor=(-0.02, 1.08), ncol=3, frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")


def draw_figure4(runs, path):
    """The paper's Fig. 4 on both sets: satisfied constraints, variance of the advantages, reward; mean over seeds, smoothed."""
    kinds = {"sat": "constraints satisfied, %", "adv_var": "variance of advantages", "reward": "group average reward"}
    figure, panels = plt.subplots(2, 3, figsize=(12, 6))
    for line, (name, title) in zip(panels, SETS.items()):
        for axes, (key, label) in zip(line, kinds.items()):
            for row, (text, colour) in list(TABLES["Table 1"].items())[1:]:
                curves = [run["curves"] for run in runs.get((name, row), {}).values()]
                points = [[(x / 1000, y if y is None or key != "sat" else 100 * y) for x, y in zip(c["tokens"], c[key])] for c in curves]
                if curve := over_seeds(points, 30):
                    smooth = [np.convolve(y, np.ones(5), "same") for y in (curve[1], np.ones(30))]  # the ends have fewer points
                    axes.plot(curve[0], smooth[0] / smooth[1], color=colour, label=text, linewidth=2.4 if row == "expectation" else 1.5)
            tidy(axes, title=title if key == "adv_var" else "", xlabel="generated tokens, thousands", ylabel=label)
            if key == "adv_var":
                axes.set_yscale("log")
                axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.legend(*max((axes.get_legend_handles_labels() for axes in panels.flat), key=lambda pair: len(pair[0])), loc="upper center", ncol=6, frameon=False)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def table_of(runs):
    """The sweep as Markdown: one table a set."""
    number = lambda pair, digits=1: "–" if np.isnan(pair[0]) else f"{pair[0]:.{digits}f}" + ("" if np.isnan(pair[1]) else f" ± {pair[1]:.{digits}f}")

    def against(seeds, others):
        both = sorted(set(seeds) & set(others))
        a, b = ([100 * side[seed]["greedy"] for seed in both] for side in (seeds, others))
        if len(both) < 2 or seeds is others:
            return "–"
        p = stats.ttest_rel(a, b).pvalue if np.ptp(np.subtract(a, b)) else np.nan
        return f"{np.mean(np.subtract(a, b)):+.1f}" + ("" if np.isnan(p) else f" (p = {p:.2g})")

    lines = []
    for name, title in SETS.items():
        lines += [f"**{title}**", "", "| row | in sweep.py | seeds | greedy, % | one more run | sampled, % | against GRPO, points | against expectation, points | constraints satisfied, % | "
                  "variance of advantages | peak memory, MB | seconds |", "|---|---|---|---|---|---|---|---|---|---|---|---|"]
        for row in [*LABELS, *sorted({row for _, row in runs} - set(LABELS))]:
            seeds = runs.get((name, row))
            if seeds:
                mean = lambda key, scale=1: interval([scale * run[key] for run in seeds.values()])
                inside = lambda key: interval([run["means"][key] for run in seeds.values()])[0]
                lines.append("| " + " | ".join([LABELS.get(row, row), f"`{row}`", str(len(seeds)), number(mean("greedy", 100)),
                             "–" if len(seeds) < 2 else f"± {interval([100 * run['greedy'] for run in seeds.values()], 'next')[1]:.1f}", number(mean("sampled", 100)),
                             *(against(seeds, runs.get((name, other), {})) for other in ("grpo", "expectation")),
                             number((100 * inside("sat"), 100 * inside("sat_sd"))), number((inside("adv_var"), np.nan), 3),
                             f"{mean('peak_memory_mb')[0]:.0f}", f"{mean('seconds')[0]:.0f}"]) + " |")
        lines.append("")
    return "\n".join(lines) + """
Accuracy: mean and half-width of its 95 % t-interval over seeds; one more run, with another seed, falls within the half-width beside it. Differences: greedy accuracy, paired by seed, t-test; the p-values are not
corrected for the number of rows. Constraints: mean ± standard deviation over groups. Memory and seconds: mean over seeds, training alone.
"""


def main():
    parser = argparse.ArgumentParser(description="Draw the README's pictures.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("what", choices=("tree", "run", "sweep"))
    parser.add_argument("folders", nargs="*", help="run folders")
    parser.add_argument("--trees", default="data/arithmetic/trees.jsonl", help="prefix trees, JSONL")
    parser.add_argument("--id", help="the problem; default the first")
    parser.add_argument("--sweep", default=os.path.join(HERE, "sweep.jsonl"), help="what sweep.py wrote; the pictures come beside it")
    args = parser.parse_args()
    if args.what == "sweep":
        runs, folder = read_sweep(args.sweep), os.path.dirname(os.path.abspath(args.sweep))
        draw_curves(runs, TABLES["Table 1"], f"{folder}/sweep.png")
        draw_curves(runs, TABLES["Table 2"] | {"expectation": TABLES["Table 1"]["expectation"]}, f"{folder}/sweep_table2.png")
        draw_dots(runs, f"{folder}/sweep_all.png")
        draw_figure4(runs, f"{folder}/figure4.png")
        with open(f"{folder}/sweep.md", "w", encoding="utf-8") as out:
            out.write(table_of(runs))
        return print(table_of(runs))
    if args.what == "run":
        if not args.folders:
            raise InputError("no run folder is named; expected one or more folders that train.py wrote.")
        return draw_runs(args.folders, os.path.join(HERE, "run.png"))
    trees = [tree for tree in read_trees(args.trees) if args.id in (None, tree.id)]
    if not trees:
        raise InputError(f"no problem of {args.trees} has the id {args.id}.")
    draw_tree(trees[0], os.path.join(HERE, "tree.png"))


if __name__ == "__main__":
    run_command(main)
