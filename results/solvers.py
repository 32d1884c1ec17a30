"""
What each method of advantage.py costs: milliseconds for one group, as median [lowest, highest] over
random groups of the same size.

    python results/solvers.py                            # trees as a search grows them
    python results/solvers.py --trees search deep wide   # and two that have many constraints

A third of the samples succeed. With shaped rewards constraints are violated for real, and all
samples differ: the hard case for the programs.
"""
import dataclasses
import os
import sys
import time

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import tree  # noqa: E402
from advantage import ESTIMATORS, Group, advantages, metrics, order_constraints  # noqa: E402
from tree import at_least  # noqa: E402

# ---- Random groups -------------------------------------------------------------------------------
def search_tree(rng, size, max_depth=5, branch=5):
    """(P,) parents: each new node below a random one that has room for it."""
    parent = [-1]
    depth = [0]
    children = [0]
    while len(parent) < size:
        node = rng.integers(len(parent))
        if depth[node] < max_depth and children[node] < branch:
            parent.append(node)
            depth.append(depth[node] + 1)
            children[node] += 1
            children.append(0)
    return np.array(parent)

def deep_tree(rng, size):
    """(P,) parents: two or three long chains, for many pairs."""
    parent = [-1]
    for node in range(1, size):
        parent.append(rng.integers(max(0, node - 2), node))
    return np.array(parent)

def wide_tree(rng, size):
    """(P,) parents: half of the nodes below the question, one more below each, for triplets."""
    half = size // 2
    return np.concatenate([[-1], np.zeros(half, int), np.arange(1, half)])

def random_group(rng, samples, trees):
    """Samples at distinct prefixes where there are enough; never all solved, never none."""
    if trees == "search":
        parent = search_tree(rng, 48)
    elif trees == "deep":
        parent = deep_tree(rng, 2 * samples)
    else:
        parent = wide_tree(rng, 2 * samples)
    node = rng.choice(len(parent), samples, replace=samples > len(parent))
    rewards = np.zeros(samples)
    while np.ptp(rewards) == 0:
        rewards = (rng.random(samples) < 0.35).astype(float)
    return Group(node, parent, rewards, teacher=rng.random(len(parent)),
                 mc=rng.random(len(parent)), logps=-30 * rng.random(len(node)),
                 lengths=rng.integers(1, 100, len(node)))

def shaped(group):
    """The same group with half of the teacher's V taken from each reward."""
    return dataclasses.replace(group, rewards=group.rewards - group.teacher[group.node] / 2)

# ---- Timing --------------------------------------------------------------------------------------
def run_method(method, group):
    """Whether a fallback stood in."""
    _, used = advantages(method, **vars(group))
    return used != method

def run_metrics(_, group):
    """The constraints and how many are satisfied."""
    metrics(group.rewards, group)
    return False

def time_groups(run, method, groups):
    """Milliseconds of `run` over the groups (median and range), and how often it fell back."""
    run(method, groups[0])  # warm up
    times = []
    fallbacks = 0
    for group in groups:
        start = time.perf_counter()
        fallbacks += run(method, group)
        times.append(1000 * (time.perf_counter() - start))
    return dict(ms=float(np.median(times)), low=min(times), high=max(times), fallbacks=fallbacks)

def time_all(groups):
    """Yields one row for each method, for the programs on shaped rewards, and for the metrics."""
    for method in ESTIMATORS:
        yield dict(method=method, **time_groups(run_method, method, groups))
    for method in ("qp_hard", "qp_soft"):
        row = time_groups(run_method, method, [shaped(group) for group in groups])
        yield dict(method=f"{method}, shaped", **row)
    yield dict(method="metrics", **time_groups(run_metrics, None, groups))

def print_table(rows, sizes):
    """One line for each method, one column for each size of a group."""
    print(f"{'milliseconds':<16}" + "".join(f"{f'N = {size}':>30}" for size in sizes))
    for method in dict.fromkeys(row["method"] for row in rows):
        line = f"{method:<16}"
        for row in rows:
            if row["method"] == method:
                cell = f"{row['ms']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
                if row["fallbacks"]:
                    cell += f" {row['fallbacks']}!"  # programs that had no solution
                line += f"{cell:>30}"
        print(line)

def main():
    parser = tree.arguments("What each method of advantage.py costs.")
    parser.add_argument("--trees", nargs="+", default=["search"],
                        choices=["search", "deep", "wide"], help="kinds of trees")
    parser.add_argument("--sizes", type=at_least(2), nargs="+", default=[8, 32, 128],
                        help="samples of a group")
    parser.add_argument("--groups", type=at_least(1), default=10, help="groups of each size")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--out", help="write the rows to this JSONL file")
    args = parser.parse_args()

    all_rows = []
    for trees in args.trees:
        rows = []
        for size in args.sizes:
            rng = tree.rng(args.seed, size)
            groups = [random_group(rng, size, trees) for _ in range(args.groups)]
            order = [order_constraints(g.node, g.parent, g.solved) for g in groups]
            pairs = np.median([len(c.pair) for c in order])
            triplets = np.median([len(c.triplet) for c in order])
            print(f"{trees} trees, {size} samples: {pairs:.0f} pairs, {triplets:.0f} triplets")
            for row in time_all(groups):
                rows.append(dict(row, trees=trees, samples=size, pairs=pairs, triplets=triplets,
                                 groups=args.groups, seed=args.seed))
        print_table(rows, args.sizes)
        all_rows += rows
    if args.out:
        tree.write_jsonl(args.out, all_rows)

if __name__ == "__main__":
    tree.run_command(main)
