"""
Staged advantage estimation (SAE, Sec. 3.2-3.3 of Tree-OPO): rewards of a group + its place in the prefix tree -> advantages.

GRPO compares completions of one question. Here sample k of a group starts at its own prefix p_k, a node of one problem's tree, and prefixes differ
in difficulty: hence 1. an order that advantages should keep, 2. baselines V(p), 3. quadratic programs, 4. a table of methods, 5. GAE, 6. one door,

    advantages("expectation", node, parent, rewards)

node (N,) int is the tree node that sample k starts from; parent (P,) int is the tree, -1 at the root, parents before their children; rewards (N,)
lie in [0, 1]. The paper's are 0 or 1. Of rewards between, "succeeded" is r == 1, "failed" is r == 0, and a sample in between is neither: it counts
in the values, but makes no constraint.

Pure functions in float64 on numpy and scipy. Wrong input raises ValueError, a program without solution NoSolution.
"""
from numbers import Real
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq, minimize

TOLERANCE = 1e-12  # by how much, relative to the target, an exact solution may miss a_i + margin <= a_j: rounding, nothing else


class NoSolution(ArithmeticError):
    """A quadratic program is infeasible, or its solver gave up."""


def _require(good, name, x, expected):
    """ValueError with the argument's name, its value (the first bad entry, where good is a vector) and what was expected."""
    if not np.all(good):
        name, x = (f"{name}[{np.argmin(good)}]", x[np.argmin(good)]) if np.ndim(good) else (name, repr(x))
        raise ValueError(f"{name} is {x}, expected {expected}")


def _vector(name, x, dtype, low=-np.inf, high=np.inf):
    x = np.asarray(x)
    _require(x.ndim == 1 and x.dtype.kind in ("iu" if dtype is int else "biuf") and len(x), name, x, f"a vector of {dtype.__name__}, not empty")
    _require((low <= x) & (x <= high) & np.isfinite(x), name, x, f"a finite number in [{low}, {high}]")
    return x.astype(dtype)  # 64 bits of either


def _tree(parent):
    parent = _vector("parent", parent, int)
    _require(np.r_[parent[0] == -1, (0 <= parent[1:]) & (parent[1:] < np.arange(1, len(parent)))], "parent", parent,
             "-1 at node 0 and an earlier node everywhere else")
    return parent


def _per_node(name, x, parent, needed):
    """x as (P,) floats, in [0, 1] at the needed nodes; elsewhere they may be nan, too."""
    _require(np.shape(x) == np.shape(parent), name, x, f"a number for each of the tree's {len(parent)} nodes")
    x = np.array(x, float)
    optional = np.isnan(x) & ~np.isin(np.arange(len(x)), needed)
    _vector(name, np.where(optional, 0, x), float, 0, 1)
    return x


def _group(node, parent, rewards):
    node, parent, rewards = _vector("node", node, int), _tree(parent), _vector("rewards", rewards, float, 0, 1)
    _require(len(node) == len(rewards), "len(node)", len(node), f"len(rewards), {len(rewards)}")
    _require((0 <= node) & (node < len(parent)), "node", node, f"a node of the tree, 0 to {len(parent) - 1}")
    return node, parent, rewards


# 1. ---- who must rank above whom ------------------------------------------------------------------------------------------------------------
class Constraints(NamedTuple):
    pair: np.ndarray     # (M, 2) int, rows (i, j) of sample indices that demand a_i + delta <= a_j
    triplet: np.ndarray  # (T, 2) int, likewise: one row per (i, j), however many witnesses k the paper's (i, j, k) has
    dropped: int         # triplet rows that contradicted others and were left out


def ancestors(parent):
    """(P,) int -> (P, P) bool: [i, j] is true where node i is a strict ancestor of node j. ValueError where parent is no tree."""
    parent = _tree(parent)
    above = np.zeros((len(parent), len(parent)), bool)  # [j, i], so that it is filled row by row
    for j in range(1, len(parent)):
        above[j] = above[parent[j]]  # complete by now, since parents come first
        above[j, parent[j]] = True
    return above.T


def order_constraints(node, parent, rewards, drop_contradictions=True):
    """
    C_order of Sec. 3.2 for one group: unique rows in lexicographic order.

    C_pair: p_i is a strict prefix of p_j, i failed, j succeeded.
    C_triplet: p_i and p_j are different children of one node, i and j failed, no sample that starts exactly at p_i or p_j succeeded, and some
    sample from further down p_i did. The sibling *without* proof ranks higher ("less proven"). Where both have proof, the paper demands a_i < a_j
    and a_j < a_i: such rows are dropped and counted, unless drop_contradictions=False. What is left is tame: every row leads from "failed, proven
    further down" to "succeeded" or to "failed, unproven", so chains have one link and there is no cycle.

    The question has children A and B, and C follows A. A and B fail, A-C succeeds. Then A-C ranks above A (pair), and so does B (triplet):

    >>> order_constraints(node=[1, 2, 3], parent=[-1, 0, 0, 1], rewards=[0, 0, 1])
    Constraints(pair=array([[0, 2]]), triplet=array([[0, 1]]), dropped=0)

    Let B-D succeed, too. Now A and B are both proven, and the triplets (A, B) and (B, A), which contradict each other, are dropped:

    >>> order_constraints(node=[1, 2, 3, 4], parent=[-1, 0, 0, 1, 2], rewards=[0, 0, 1, 1])
    Constraints(pair=array([[0, 2],
           [1, 3]]), triplet=array([], shape=(0, 2), dtype=int64), dropped=2)
    """
    node, parent, rewards = _group(node, parent, rewards)
    won, lost = rewards == 1, rewards == 0
    prefix = ancestors(parent)[np.ix_(node, node)]             # (N, N) IsPrefix(i, j)
    same = node[:, None] == node                               # (N, N)
    sibling = (parent[node][:, None] == parent[node]) & ~same  # (N, N) IsSibling(i, j)
    unsolved = lost & ~(same & won).any(1)                     # (N,) r_i = 0 and not S(p_i)
    proven = (prefix & won).any(1)                             # (N,) IsPrefix(i, k) and S(p_k) for some k
    triplet = sibling & (unsolved & proven)[:, None] & unsolved
    kept = triplet & ~proven if drop_contradictions else triplet
    return Constraints(np.argwhere(prefix & lost[:, None] & won), np.argwhere(kept), int(triplet.sum() - kept.sum()))


def satisfaction(a, constraints):
    """Share of the rows (i, j) with a_i < a_j, strictly (Table 1, Fig. 4a); nan without rows. Takes a part, too: satisfaction(a, c.pair)."""
    a, i, j, _ = _program("a", a, constraints if isinstance(constraints, Constraints) else (constraints, ()))
    return float((a[i] < a[j]).mean()) if len(i) else float("nan")


# 2. ---- what a prefix is worth --------------------------------------------------------------------------------------------------------------
def _others(rewards):
    """(N,): the mean of the other rewards of the group, 0 for a group of one."""
    return (rewards.sum() - rewards) / max(len(rewards) - 1, 1)


def _inside(node, parent):
    """(P, N) bool: [v, k] is true where sample k starts in the subtree of node v, its root included."""
    return (ancestors(parent) | np.eye(len(parent), dtype=bool))[:, node]


def value(kind, node, parent, rewards, leave_one_out=False, teacher=None):
    """
    V(p_k) for every sample, (N,). Sec. 3.3, Table 4. A subtree contains its own root, hence the sample's own reward.

    expectation   V_E: the mean reward of the group's samples in the subtree of p_k (Eq. 3)
    optimistic    V_O: 1 if any of them succeeded; of fractional rewards the largest
    pessimistic   V_P: 1 if none of them failed; of fractional rewards the smallest
    teacher       teacher[node]; teacher (P,) is the search's value / visits, which knows nothing of the samples

    The own reward in V_E breaks the premise of Lemma 3.1: of n samples in a subtree, the one at its root has its gradient scaled by 1 - alpha / n.
    leave_one_out=True (expectation only) takes the mean of the others; where there are none, of the others in the parent's subtree, then of the
    whole group. A group of one has no others: V = 0.
    """
    node, parent, rewards = _group(node, parent, rewards)
    kinds = ("expectation", "optimistic", "pessimistic", "teacher")
    _require(kind in kinds, "kind", kind, f"one of {kinds}")
    _require(not leave_one_out or kind == "expectation", "kind", kind, "'expectation' where leave_one_out is true")
    if kind == "teacher":
        return _per_node("teacher", teacher, parent, node)[node]
    inside = _inside(node, parent)
    if kind == "optimistic":
        return np.where(inside, rewards, 0).max(1)[node]
    if kind == "pessimistic":
        return np.where(inside, rewards, 1).min(1)[node]
    size, total = inside.sum(1), inside @ rewards  # (P,) (P,)
    if not leave_one_out:
        return total[node] / size[node]
    at = np.where(size[node] > 1, node, np.maximum(parent[node], 0))
    at = np.where(size[at] > 1, at, 0)
    return (total[at] - rewards) / np.maximum(size[at] - 1, 1)


# 3. ---- the quadratic programs --------------------------------------------------------------------------------------------------------------
def _program(name, x, constraints, margin=0.0, pair_margin=0.0):
    """Checked: the vector (N,), the rows as two index vectors i, j (M,) and their margins (M,)."""
    x = _vector(name, x, float)
    _require(isinstance(margin, Real) and 0 <= margin < np.inf, "margin", margin, "a number >= 0")
    _require(isinstance(pair_margin, Real) and 0 <= pair_margin < np.inf, "pair_margin", pair_margin, "a number >= 0")
    pair, triplet = (np.reshape(part, (-1, 2)).astype(np.int64) for part in constraints[:2])
    rows = np.concatenate([pair, triplet])
    _require(((0 <= rows) & (rows < len(x))).all(1), "constraints", rows, f"two indices of the {len(x)} entries of {name}")
    return x, *rows.T, np.repeat([float(pair_margin), float(margin)], [len(pair), len(triplet)])


def _slsqp(program, target, start, i, j, m):
    """
    The solution (N,) of program(target, w, i, j, m) -> objective, constraints. SLSQP's time grows with N^3 and with the rows; here it solves smaller
    programs with the same solution. Rows: those that start breaks; if their solution breaks more, those too, until it breaks none. Samples: of w with
    equal targets and equal rows one stands for all, as exchanging them changes nothing and the solution is unique.
    """
    n, used, a = len(target), np.zeros(len(m), bool), start
    while a is start or (~used & (a[j] - a[i] < m - 1e-9)).any():
        used |= a[j] - a[i] < m - 1e-9
        p, q, margin = i[used], j[used], m[used]
        table = np.zeros((n, 2 * n + 1), complex)  # what tells samples apart: rows up, rows down (how many, and their margins), target
        np.add.at(table, (np.r_[p, q], np.r_[q, n + p]), np.tile(1 + 1j * margin, 2))
        table[:, -1] = target
        number = {}
        of = np.array([number.setdefault(sample.tobytes(), len(number)) for sample in table])  # (N,) its class, 0 to K - 1
        first, w = np.unique(of, return_index=True, return_counts=True)[1:]  # (K,) (K,)
        kept = (first[of[p]] == p) & (first[of[q]] == q)  # a row between two classes has its like between their first samples
        objective, constraints = program(target[first], w, of[p[kept]], of[q[kept]], margin[kept])
        # App. B's ftol is 1e-8; that leaves errors of 3e-5 in a, and would blur qp_soft's nudges, whose squares are 1e-6.
        result = minimize(objective, start[first], jac=True, method="SLSQP", constraints=constraints, options={"maxiter": 1000, "ftol": 1e-12})
        if not result.success:  # result.x would look like an answer all the same
            raise NoSolution(f"SLSQP: {result.message}")
        a = result.x[of]
    return a


def qp_hard(rewards, constraints, margin=1e-2, solver="slsqp", pair_margin=0.0):
    """
    Eq. 1 as App. B solves it, with |a|^2 = N in place of <= N:

        min |a - r|^2   s.t.   1'a = 0,   |a|^2 = N,   a_i + margin <= a_j on triplets,   a_i + pair_margin <= a_j on pairs

    rewards (N,) is r, or another target such as r - alpha V; equal ones give zeros. For binary rewards the solution is s (r - mean r) + d, where d is
    smaller than the margin and moves samples of triplets only: std-normalised GRPO with nudges. NoSolution where SLSQP fails or none exists.
    solver: "slsqp" is the paper's, "exact" is project. They agree; results/solvers.py times both.
    """
    r, i, j, m = _program("rewards", rewards, constraints, margin, pair_margin)
    _require(solver in ("slsqp", "exact"), "solver", solver, "'slsqp' or 'exact'")
    if np.ptp(r) == 0:
        return np.zeros(len(r))
    if solver == "exact":
        return project(r, constraints, margin, pair_margin, norm="sphere")

    def program(t, w, i, j, m):
        G, row = np.zeros((len(m), len(t))), np.arange(len(m))
        G[row, i], G[row, j] = -1, 1  # (M, K): G a >= m
        # Two vector-valued constraints with analytic Jacobians: one closure per row is 12 to 80 times slower.
        equal = {"type": "eq", "fun": lambda a: np.array([w @ a, w @ a ** 2 - w.sum()]), "jac": lambda a: np.stack([w, 2 * w * a])}
        order = {"type": "ineq", "fun": lambda a: G @ a - m, "jac": lambda a: G}
        return lambda a: (w @ (a - t) ** 2, 2 * w * (a - t)), [equal, order] if len(m) else [equal]

    return _slsqp(program, r, (r - r.mean()) / r.std(), i, j, m)  # starts at the solution without rows


def qp_soft(rewards, constraints, lam=1.0, margin=1e-3):
    """
    The penalised program of App. B by SLSQP, with one margin for pairs and triplets. Arguments and errors as in qp_hard.

        min |a - r|^2 + lam sum over (i, j) of max(0, a_i - a_j + margin)^2

    centred afterwards, which equals demanding 1'a = 0, since the penalty sees differences only.
    """
    r, i, j, m = _program("rewards", rewards, constraints, margin, margin)
    _require(isinstance(lam, Real) and 0 <= lam < np.inf, "lam", lam, "a number >= 0")

    def program(t, w, i, j, m):
        def objective(a):
            short = np.maximum(0, a[i] - a[j] + m)  # (M,)
            push = lam * w[i] * w[j] * short
            return w @ (a - t) ** 2 + push @ short, 2 * w * (a - t) + 2 * (np.bincount(i, push, len(a)) - np.bincount(j, push, len(a)))
        return objective, ()

    a = _slsqp(program, r, r - r.mean(), i, j, m)  # a row that is kept costs nothing
    return a - a.mean()


def project(target, constraints, margin=0.0, pair_margin=0.0, norm=None):
    """
    Eq. 1, exactly: the point nearest to target (N,) with mean 0, every row's margin, and any norm (None), |a|^2 <= N ("ball": 1-convex, App. A.3)
    or |a|^2 = N ("sphere": App. B). At margin 0 the convex program returns centred binary rewards as they are. NoSolution where none exists.

    Let K be the polyhedron of the rows, t the centred target, P(s) the point of K nearest to s t. |P(s)| never falls as s > 0 grows. Where a = P(s)
    is on the sphere, <s t - a, b - a> <= 0 for all b in K, hence s <t, b - a> <= <a, b> - N <= 0 for those on the sphere: the one root s solves the
    program, though it is not convex. In the ball it is the same root, if P(1) lies outside.
    """
    t, i, j, m = _program("target", target, constraints, margin, pair_margin)
    _require(norm in (None, "ball", "sphere"), "norm", norm, "None, 'ball' or 'sphere'")
    t, radius = t - t.mean(), len(t) ** 0.5
    nearest = _nearest(t, i, j, m)
    if norm is None or norm == "ball" and nearest @ nearest <= len(t):
        return nearest

    def excess(s):
        return np.linalg.norm(_nearest(s * t, i, j, m)) - radius

    if excess(0) > 0:
        raise NoSolution(f"margin {margin} and pair_margin {pair_margin} take more than |a|^2 = N")
    high = 1e6 * radius / max(np.linalg.norm(t), 1e-9)  # without rows, s = radius / |t|
    if excess(high) < 0:
        raise NoSolution("the rows hold the target inside the sphere, however it is scaled")
    return _nearest(brentq(excess, 0, high, xtol=1e-15, rtol=1e-15) * t, i, j, m)


def _nearest(t, i, j, m):
    """
    argmin |a - t|^2 s.t. a_j - a_i >= m (M,). Optimality: each row pushes its j up and its i down by some u >= 0 (which leaves the mean alone), and
    all rows are kept, with equality where u > 0.
    """
    n, tolerance, lack = len(t), TOLERANCE * max(1, np.abs(t).max()), m - (t[j] - t[i])  # lack (M,): what t lacks in every row
    broken = lack > tolerance

    # A guess: share what a row lacks among the rows that it meets at i or j. It is right in the case that matters: failed samples all start equal, so
    # the broken rows among siblings join each of x proven samples to each of y unproven ones, and u = lack / (x + y). No solver, at any N.
    # To check it, see that all rows are kept; equality follows, because the broken rows gain in sum no more than they lack.
    p, q = i[broken], j[broken]
    u = lack[broken] / (np.bincount(p, minlength=n)[p] + np.bincount(q, minlength=n)[q])
    a = t + np.bincount(q, u, n) - np.bincount(p, u, n)
    if (m - (a[j] - a[i]) <= tolerance).all():
        return a

    # Otherwise the dual active-set method (Goldfarb & Idnani 1983): the row that lacks most pushes until it is kept and active, while the active rows
    # give way so as to stay tight; one whose own push reaches 0 leaves. Not scipy's nnls: 1.15 to 1.17 err where rows are redundant (scipy#25389).
    a, active, u, eye = t, [], np.zeros(0), np.eye(n)
    for _ in range(100 * (n + len(m))):  # a few times n suffice
        lack = m - (a[j] - a[i])
        lack[active] = 0  # but for rounding
        new, push = lack.argmax(), 0.0
        if lack[new] <= tolerance:
            return a
        row = eye[j[new]] - eye[i[new]]
        while new not in active:
            rows = eye[j[active]] - eye[i[active]]  # (k, N)
            give = np.linalg.lstsq(rows.T, row, rcond=None)[0]
            way = row - give @ rows  # 0 where the new row depends on active ones
            leave = np.where(give > 1e-9, u / np.maximum(give, 1e-9), np.inf)
            arrive = (m[new] - row @ a) / (way @ way) if way @ way > 1e-9 else np.inf
            step = min(arrive, leave.min(initial=np.inf))
            if step == np.inf:
                raise NoSolution("the constraints contradict each other at this margin")
            a, u, push = a + step * way, u - step * give, push + step
            if step == arrive:
                active, u = active + [new], np.append(u, push)
            else:
                active.pop(leave.argmin())
                u = np.delete(u, leave.argmin())
    raise NoSolution("the projection did not settle")


# 4. ---- the methods: (node, parent, rewards, alpha, *, options with defaults) -> raw advantages (N,), which the door centres -----------------
def _treepo(node, parent, r, alpha):
    """TreePO (Li et al. 2025, arXiv 2508.17445): r_k minus the mean of a sub-group, averaged over the sub-groups of k: the samples below the
    question, below the next node towards p_k, ..., below p_k. Where k is alone does not count, as in their code. Departs: no division by the batch's
    standard deviation; a plain average, where their code weighs by size; nodes, where they cut equal lengths. r_k is in every mean."""
    inside = _inside(node, parent)
    size, counted = inside.sum(1), inside & (inside.sum(1) > 1)[:, None]
    return r - inside @ r / np.maximum(size, 1) @ counted / counted.sum(0)  # one alone has equal rewards and never gets here


def _treerpo(node, parent, r, alpha):
    """V(p_k) after TreeRPO (Yang et al. 2025, arXiv 2506.05183): the mean over a node's children, one vote each, however many samples they hold. A
    sample that starts at the node is one child, since their trees end in completions; a child without samples is none. Departs: they compare
    siblings, normalised; here it is a completion and its parent. r_k is in V."""
    total, votes = np.bincount(node, r, len(parent)), np.bincount(node, minlength=len(parent))
    for v in range(len(parent) - 1, 0, -1):
        if votes[v]:
            total[parent[v]], votes[parent[v]] = total[parent[v]] + total[v] / votes[v], votes[parent[v]] + 1
    return r - alpha * total[node] / votes[node]


def _ema(node, parent, r, alpha, *, history=None):
    """V = history (P,), say a moving average of the student's rewards at the node before this group, nan where it has not been. There the nearest
    ancestor with a history stands in, or else the mean of the group's others."""
    V = _per_node("history", history, parent, [])
    for v in range(1, len(parent)):
        V[v] = V[parent[v]] if np.isnan(V[v]) else V[v]
    return r - alpha * np.where(np.isnan(V[node]), _others(r), V[node])


def _shrink(node, parent, r, alpha, *, shrink=2.0):
    """Empirical Bayes without r_k: V(question) is the mean of the others, and V(v) = (n m + shrink V(parent)) / (n + shrink) with m the mean of the n
    others below v. That is the posterior mean under Beta(shrink V(parent), shrink (1 - V(parent))), though V(parent) has seen the n, too. 2 makes
    it uniform at V(parent) = 1/2; 8 samples are too few to estimate it, and r_k would get in. Towards 0 lies "loo", towards infinity "rloo"."""
    _require(isinstance(shrink, Real) and 0 < shrink < np.inf, "shrink", shrink, "a number > 0")
    inside = _inside(node, parent)
    n, total = inside.sum(1)[:, None] - inside, (inside @ r)[:, None] - inside * r  # (P, N) [v, k]: the others below v
    V = np.tile(_others(r), (len(parent), 1))  # (P, N) [v, k]: V(v) for sample k
    for v in range(1, len(parent)):
        V[v] = (total[v] + shrink * V[parent[v]]) / (n[v] + shrink)
    return r - alpha * V[node, np.arange(len(r))]


def _target(target, node, parent, rewards, alpha, teacher):
    """What a program stays near to: r (Eq. 1); "staged", r - alpha V_E (Alg. 1), which keeps every row already; or with the teacher's V."""
    kinds = {"staged": "expectation", "teacher": "teacher"}
    _require(target in ("reward", *kinds), "target", target, "'reward', 'staged' or 'teacher'")
    return rewards if target == "reward" else rewards - alpha * value(kinds[target], node, parent, rewards, teacher=teacher)


ESTIMATORS = {  # a new baseline is a line here, or a function above and a line here
    "none": lambda node, parent, r, alpha: r,  # REINFORCE; the door does not centre it
    "flat": lambda node, parent, r, alpha: r,
    "grpo": lambda node, parent, r, alpha: (r - r.mean()) / r.std(),  # without epsilon: equal rewards never get here
    "expectation": lambda node, parent, r, alpha: r - alpha * value("expectation", node, parent, r),
    "optimistic": lambda node, parent, r, alpha: r - alpha * value("optimistic", node, parent, r),
    "pessimistic": lambda node, parent, r, alpha: r - alpha * value("pessimistic", node, parent, r),
    "loo": lambda node, parent, r, alpha: r - alpha * value("expectation", node, parent, r, leave_one_out=True),
    "rloo": lambda node, parent, r, alpha: r - _others(r),  # Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740
    "treepo": _treepo,
    # TreeRL (Hou et al. 2025, arXiv 2506.11902): step s gets (V(s) - V(question) + V(s) - V(parent of s)) / sqrt(leaves below s). Here the one step
    # is the completion, a leaf below p_k with V = r_k: twice the usual scale. Departs: the prefix gets no credit, the student did not write it; each
    # V is the mean of the others (in their code only the question's), so r_k is in neither.
    "treerl": lambda node, parent, r, alpha: 2 * r - _others(r) - value("expectation", node, parent, r, leave_one_out=True),
    "treerpo": _treerpo,
    "ema": _ema,
    "shrink": _shrink,
    # App. A.9: mc (P,) is the mean reward of M fresh rollouts from the node, nan where there were none.
    "mc": lambda node, parent, r, alpha, *, mc=None: r - alpha * _per_node("mc", mc, parent, node)[node],
    "teacher": lambda node, parent, r, alpha, *, teacher=None: r - alpha * value("teacher", node, parent, r, teacher=teacher),
    "qp_hard": lambda node, parent, r, alpha, *, target="reward", teacher=None, margin=1e-2, solver="slsqp":
        qp_hard(_target(target, node, parent, r, alpha, teacher), order_constraints(node, parent, r), margin, solver),
    "qp_soft": lambda node, parent, r, alpha, *, target="reward", teacher=None, margin=1e-3, lam=1.0:
        qp_soft(_target(target, node, parent, r, alpha, teacher), order_constraints(node, parent, r), lam, margin),
}


# 5. ---- steps instead of samples ------------------------------------------------------------------------------------------------------------
def gae(rewards, values, gamma=0.95, lam=0.95):
    """
    Generalised advantage estimation (App. B: actor-critic with TD(lambda)) over the K reasoning steps of one completion: advantages (K,), targets (K,).

    rewards (K,), values (K,) = V of the state before each step; the end is worth 0. With delta_k = r_k + gamma V_k+1 - V_k:
    A_k = delta_k + gamma lam A_k+1, and the critic's target is A_k + V_k. lam = 1 is the discounted return less V, lam = 0 is TD(0).

    >>> gae([0, 1], [0.5, 0.75], gamma=1, lam=0.5)
    (array([0.375, 0.25 ]), array([0.875, 1.   ]))
    """
    rewards, values = _vector("rewards", rewards, float), _vector("values", values, float)
    _require(len(values) == len(rewards), "len(values)", len(values), f"len(rewards), {len(rewards)}")
    delta, a = rewards + gamma * np.r_[values[1:], 0] - values, np.zeros(len(rewards) + 1)
    for k in reversed(range(len(rewards))):
        a[k] = delta[k] + gamma * lam * a[k + 1]
    return a[:-1], a[:-1] + values


# 6. ---- the door ----------------------------------------------------------------------------------------------------------------------------
def advantages(method, node, parent, rewards, alpha=0.5, info=None, **options):
    """
    Advantages (N,) of one group: a'_k = r_k - alpha V(p_k), mean-centred (Sec. 3.3), or what else the method defines. Equal rewards:
    exact zeros (but for "none", which is r as it is).

    alpha: flat, grpo, rloo, treepo and treerl are defined without it; the programs take it where target is not "reward".
    options: keyword arguments of the estimators (teacher, history, mc, shrink, target, margin, lam, solver). A method takes those that it knows, so a
    caller may hand the same side information to all; one that no method knows is an error.
    info: a dict that is told "dead" (were all rewards equal) and "fallback": "none", or what stood in for a program without solution, "soft" (the
    soft program) or "centred" (the rewards).
    """
    node, parent, rewards = _group(node, parent, rewards)
    _require(method in ESTIMATORS, "method", method, f"one of {sorted(ESTIMATORS)}")
    _require(isinstance(alpha, Real) and 0 <= alpha <= 1, "alpha", alpha, "a number in [0, 1]")
    takes = {name: function.__kwdefaults__ or {} for name, function in ESTIMATORS.items()}
    known = set().union(*takes.values())
    for option in options:
        _require(option in known, "option", option, f"one of {sorted(known)}")
    info = {} if info is None else info
    info.update(dead=bool(np.ptp(rewards) == 0), fallback="none")
    if method == "none":  # the plain objective of Sec. 3.1, for completions that are nearly all right: a teacher's
        return rewards
    if info["dead"]:
        return np.zeros(len(rewards))
    for fallback, name in (("none", method), ("soft", "qp_soft"), ("centred", "flat")):
        try:
            a = ESTIMATORS[name](node, parent, rewards, alpha, **{k: v for k, v in options.items() if k in takes[name]})
        except NoSolution:
            continue
        info["fallback"] = fallback
        return a - a.mean()


def figures(a, node, parent, rewards):
    """What Figure 4 plots of one group's advantages (N,), as a dict; nan where there are no constraints. sat_all counts contradictory triplets, too.
    The variance falls with the estimator's scale; adv_var_scaled, over the squared mean |a|, does not."""
    c, everything = (order_constraints(node, parent, rewards, drop) for drop in (True, False))
    row = dict(reward=float(np.mean(rewards)), dead=float(np.ptp(rewards) == 0), sat=satisfaction(a, c), sat_pair=satisfaction(a, c.pair),
               sat_triplet=satisfaction(a, c.triplet), sat_all=satisfaction(a, everything), dropped=c.dropped)
    return row if row["dead"] else row | dict(adv_var=float(np.var(a)), adv_var_scaled=float(np.var(a) / np.abs(a).mean() ** 2))
