"""
Draw the README's pictures from measured files. Needs matplotlib, which nothing else here does.

    python results/plot.py tree [--trees data/arithmetic/trees.jsonl] [--id train-12]     -> results/tree.png
    python results/plot.py run out/RUN [out/RUN ...]                                      -> results/run.png
"""
import argparse
import json
import os
import sys

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from tree import InputError, read_trees, run_command  # noqa: E402

YELLOW_TO_GREEN = plt.get_cmap("summer_r")


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


def main():
    parser = argparse.ArgumentParser(description="Draw the README's pictures.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("what", choices=("tree", "run"))
    parser.add_argument("folders", nargs="*", help="run folders")
    parser.add_argument("--trees", default="data/arithmetic/trees.jsonl", help="prefix trees, JSONL")
    parser.add_argument("--id", help="the problem; default the first")
    args = parser.parse_args()
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
