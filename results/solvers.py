"""
What each method of advantage.py costs: milliseconds for one group, as median [min, max] over random groups, and how far the two solvers
of the hard program lie apart.

    python results/solvers.py            # trees of 48 nodes as a search grows them: up to 5 children, 5 levels
    python results/solvers.py --dense    # trees of 2 N nodes, deep and wide in turn: at N = 512 20,000 pairs or 4,000 triplets

qp_hard stands there as the door runs it, with the exact solver, and near r - alpha V of the teacher: the hardest case, since the targets
of all nodes differ. qp_soft likewise.
"""
import argparse
import json
import os
import sys
import time

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from advantage import ESTIMATORS, advantages, order_constraints, satisfaction  # noqa: E402
from tree import run_command  # noqa: E402


def search_tree(rng, size):
    """(P,) parents: a new node below a random one that has fewer than 5 children and is above level 5."""
    parent, depth, children = [-1], [0], [0]
    while len(parent) < size:
        p = rng.choice([v for v in range(len(parent)) if depth[v] < 5 and children[v] < 5])
        parent, depth, children = parent + [int(p)], depth + [depth[p] + 1], children + [0]
        children[p] += 1
    return np.array(parent)


def random_group(rng, n, kind):
    """(node, parent, rewards, side information) of n samples, distinct prefixes where there are enough; about a third succeed, never all or none."""
    parent = {"search": lambda: search_tree(rng, 48), "wide": lambda: np.r_[-1, np.zeros(n, int), 1:n],
              "deep": lambda: np.r_[-1, [rng.integers(max(0, v - 2), v) for v in range(1, 2 * n)]]}[kind]()
    node, r = rng.choice(len(parent), n, replace=n > len(parent)), np.zeros(n)
    while np.ptp(r) == 0:
        r = (rng.random(n) < 0.35).astype(float)
    return node, parent, r, {name: rng.random(len(parent)) for name in ("teacher", "history", "mc")}


def works():
    """Name -> callable(node, parent, rewards, side information, info); the methods of the registry first."""
    def door(method, **options):
        return lambda node, parent, r, side, info: advantages(method, node, parent, r, info=info, **side, **options)
    return {**{method: door(method) for method in ESTIMATORS},
            "qp_hard exact": door("qp_hard", solver="exact"), "qp_hard exact teacher": door("qp_hard", target="teacher", solver="exact"),
            "qp_hard teacher": door("qp_hard", target="teacher"), "qp_soft teacher": door("qp_soft", target="teacher"),
            "order_constraints": lambda node, parent, r, side, info: order_constraints(node, parent, r),
            "with satisfaction": lambda node, parent, r, side, info: satisfaction(r, order_constraints(node, parent, r))}


def shown(c):
    return f"{c['ms']:.2f} [{c['low']:.2f}, {c['high']:.2f}]"


def main():
    parser = argparse.ArgumentParser(description="What each method costs.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 32, 128, 512], help="samples of a group")
    parser.add_argument("--groups", type=int, default=10, help="random groups of each size")
    parser.add_argument("--dense", action="store_true", help="deep and wide trees instead of a search's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="append the figures to this JSONL file")
    args = parser.parse_args()
    rows, cells, apart = works(), {}, {}
    for n in args.sizes:
        rng = np.random.default_rng([args.seed, n])
        groups = [random_group(rng, n, ("deep", "wide")[g % 2] if args.dense else "search") for g in range(args.groups)]
        parts = np.array([[len(part) for part in order_constraints(*g[:3])[:2]] for g in groups])  # (groups, 2)
        print(f"N = {n}: {np.median(parts[:, 0]):.0f} pairs [{parts[:, 0].min()}, {parts[:, 0].max()}], "
              f"{np.median(parts[:, 1]):.0f} triplets [{parts[:, 1].min()}, {parts[:, 1].max()}]", flush=True)
        for name, work in rows.items():
            work(*groups[0], {})  # warm
            times, failed = [], 0
            for group in groups:
                info, start = {}, time.perf_counter()
                work(*group, info)
                times.append(1e3 * (time.perf_counter() - start))
                failed += info.get("fallback", "none") != "none"
            cells[name, n] = dict(method=name, n=n, ms=float(np.median(times)), low=min(times), high=max(times), fallbacks=failed)
        apart[n] = max(np.abs(rows["qp_hard" + end](*g, {}) - rows["qp_hard exact" + end](*g, {})).max() for g in groups for end in ("", " teacher"))
    print(f"\n{'milliseconds':<22}" + "".join(f"{f'N = {n}':>26}" for n in args.sizes))
    for name in rows:
        line = [cells[name, n] for n in args.sizes]
        print(f"{name:<22}" + "".join(f"{shown(c):>26}" for c in line) + (
            f"   fallbacks: {sum(c['fallbacks'] for c in line)}" if any(c["fallbacks"] for c in line) else ""))
    print(f"{'slsqp - exact, largest':<22}" + "".join(f"{apart[n]:>26.1e}" for n in args.sizes))
    if args.out:
        with open(args.out, "a", encoding="utf-8") as out:
            for cell in cells.values():
                out.write(json.dumps(dict(cell, dense=args.dense, groups=args.groups, seed=args.seed, apart=float(apart[cell["n"]]))) + "\n")


if __name__ == "__main__":
    run_command(main)
