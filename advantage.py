"""
Staged advantage estimation (Sec. 3.2, 3.3 of Tree-OPO): rewards of a group + its place in the
prefix tree -> advantages. GRPO compares completions of one question. Here each completion starts
at its own prefix, a node of one problem's tree; a `Group` holds both.

To try another baseline, write a function from a Group to advantages and name it in ESTIMATORS. What
it returns is used as it is: end with `centred` if the samples are to be compared with each other.
"""
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.optimize import lsq_linear, minimize


class NoSolution(ArithmeticError):
    """A quadratic program is infeasible, or its solver gave up."""


@dataclass
class Group:
    """N samples on a tree of P nodes. ValueError where the arrays do not fit together."""
    node: np.ndarray             # (N,) the tree node that sample k starts from
    parent: np.ndarray           # (P,) the tree: -1 at the root, parents before their children
    rewards: np.ndarray          # (N,) any finite numbers
    solved: np.ndarray = None    # (N,) whether the completion is right; by default rewards == 1
    logps: np.ndarray = None     # (N,) the sampler's log-prob of each whole completion
    lengths: np.ndarray = None   # (N,) tokens of each completion
    alpha: float = 0.5           # weight of V
    teacher: np.ndarray = None   # (P,) the search's value / visits
    mc: np.ndarray = None        # (P,) mean reward of fresh rollouts, nan where there were none
    margin: float = 1e-2         # of the hard program
    soft_margin: float = 1e-3    # of the soft program
    lam: float = 1.0             # weight of the soft program's penalty

    def __post_init__(self):
        self.rewards = np.asarray(self.rewards, float)
        if self.solved is None:
            self.solved = self.rewards == 1
        N = len(self.rewards)
        P = len(self.parent)
        sizes = dict(node=N, parent=P, rewards=N, solved=N, logps=N, lengths=N, teacher=P, mc=P)
        for name, size in sizes.items():
            x = getattr(self, name)
            if x is not None and (np.shape(x) != (size,) or size == 0):
                raise ValueError(f"{name} is {x}, expected {size} numbers, at least one")
            if x is not None:
                setattr(self, name, np.asarray(x))
        self.solved = self.solved.astype(bool)
        up = self.parent[1:]
        if self.parent[0] != -1 or (up < 0).any() or (up >= np.arange(1, P)).any():
            raise ValueError(f"parent is {self.parent}, expected -1 and then earlier nodes")
        if self.node.min() < 0 or self.node.max() >= P:
            raise ValueError(f"node is {self.node}, expected nodes of the tree, 0 to {P - 1}")
        if not np.isfinite(self.rewards).all():
            raise ValueError(f"rewards are {self.rewards}, expected finite numbers")

    def needed(self, name):
        """A field that only some estimators read. ValueError where it was not given."""
        if getattr(self, name) is None:
            raise ValueError(f"{name} is None, expected an array, which this estimator needs")
        return getattr(self, name)


# ---- The tree -----------------------------------------------------------------------------------
def in_subtree(g):
    """(P, N) bool: [v, k] is true where sample k starts at node v or below it."""
    inside = np.zeros((len(g.parent), len(g.node)), bool)
    inside[0] = True
    node = g.node
    while node.any():
        inside[node, np.arange(len(node))] = True
        node = np.maximum(g.parent[node], 0)  # all samples go one step up; the question is 0
    return inside


# ---- Values V(p_k), (N,): Sec. 3.3, Table 4. A subtree holds the sample at its root, too ---------
def V_expectation(g):
    """The mean reward in the subtree (Eq. 3)."""
    inside = in_subtree(g)[g.node]  # (N, N)
    return inside @ g.rewards / inside.sum(1)

def V_optimistic(g):
    """1 if any sample in the subtree is solved, else 0."""
    solved = in_subtree(g)[g.node] & g.solved
    return solved.any(1).astype(float)

def V_pessimistic(g):
    """0 if any sample in the subtree is not solved, else 1."""
    failed = in_subtree(g)[g.node] & ~g.solved
    return 1.0 - failed.any(1)

def V_leave_one_out(g):
    """V_E without the own reward, which breaks Lemma 3.1's premise: the mean of the others in the
    subtree; where there are none, in the parent's; where there are none, in the group; else 0."""
    inside = in_subtree(g)[g.node]  # (N, N)
    parents = in_subtree(g)[np.maximum(g.parent[g.node], 0)]
    for wider in (parents, np.ones_like(inside)):
        alone = inside.sum(1) == 1
        inside[alone] = wider[alone]
    return (inside @ g.rewards - g.rewards) / np.maximum(inside.sum(1) - 1, 1)

def V_sae(g):
    """App. A.7, Eq. 4: the mean reward of the samples that start exactly at each prefix, moved as
    little as possible so that no prefix is worth more than what extends it. The paper leaves its
    class C open; this is the order of its reverse curriculum, which a wrong step breaks."""
    prefixes, first, sample = np.unique(g.node, return_index=True, return_inverse=True)
    means = np.bincount(sample, g.rewards) / np.bincount(sample)  # (U,) one for each prefix
    path = in_subtree(g)[prefixes][:, first].T  # (U, U) [i, j]: prefix i is j or extends it
    # V_i is the sum of the steps on its path. Only the first step of a path may be negative.
    lowest = np.where(path.sum(1) == 1, -np.inf, 0)
    steps = lsq_linear(path.astype(float), means, (lowest, np.inf), method="bvls", tol=1e-15).x
    return (path @ steps).round(12)[sample]  # equal values stay ties

def mean_of_others(g):
    """(N,) the mean of the group's other rewards, 0 in a group of one."""
    return (g.rewards.sum() - g.rewards) / max(len(g.rewards) - 1, 1)


# ---- Order constraints (Sec. 3.2) ---------------------------------------------------------------
class Constraints(NamedTuple):
    pair: np.ndarray     # (M, 2) rows (i, j) of samples that demand a_i + margin <= a_j
    triplet: np.ndarray  # (T, 2) likewise
    dropped: np.ndarray  # (D, 2) rows of triplets that contradict each other, left out

    @property
    def rows(self):
        return np.concatenate([self.pair, self.triplet])

def order_constraints(node, parent, solved):
    """C_pair: p_i is a strict prefix of p_j, i failed, j succeeded.
    C_triplet: p_i and p_j are siblings where no sample succeeded, but one from further down p_i
    did. The sibling without such proof ranks higher ("less proven"). Where both have it, the paper
    demands a_i < a_j and a_j < a_i: such rows are dropped. The rest has no cycle.

    The question has children A and B, and C follows A. A and B fail, A-C succeeds. Then A-C ranks
    above A (pair), and so does B (triplet):

    >>> order_constraints(node=[1, 2, 3], parent=[-1, 0, 0, 1], solved=[0, 0, 1]).rows.tolist()
    [[0, 2], [0, 1]]

    Let B-D succeed, too. Now A and B are both proven, and the triplets (A, B) and (B, A) go:

    >>> c = order_constraints(node=[1, 2, 3, 4], parent=[-1, 0, 0, 1, 2], solved=[0, 0, 1, 1])
    >>> c.dropped.tolist()
    [[0, 1], [1, 0]]
    """
    g = Group(node, parent, rewards=solved)                        # checks the arrays
    same = g.node[:, None] == g.node                               # (N, N)
    prefix = in_subtree(g)[g.node] & ~same                         # (N, N) IsPrefix(i, j)
    sibling = (g.parent[g.node][:, None] == g.parent[g.node]) & ~same
    unsolved = ~(same & g.solved).any(1)                           # (N,) r_i = 0 and not S(p_i)
    proven = (prefix & g.solved).any(1)                            # (N,) IsPrefix(i, k) and S(p_k)
    pair = prefix & ~g.solved[:, None] & g.solved
    triplet = sibling & (unsolved & proven)[:, None] & unsolved
    return Constraints(np.argwhere(pair), np.argwhere(triplet & ~proven),
                       np.argwhere(triplet & proven))

def satisfaction(a, rows):
    """Share of the rows (i, j) with a_i < a_j, strictly (Table 1, Fig. 4a); nan without rows."""
    if len(rows) == 0:
        return float("nan")
    i, j = rows.T
    return float((a[i] < a[j]).mean())


# ---- Quadratic programs (Eq. 1, App. B) ---------------------------------------------------------
def slsqp(objective, start, constraints=()):
    """argmin of the objective, a function that returns its value and its gradient."""
    # App. B's ftol, 1e-8, leaves errors of 3e-5 in a, which would blur the nudges of qp_soft.
    result = minimize(objective, start, jac=True, method="SLSQP", constraints=constraints,
                      options={"maxiter": 1000, "ftol": 1e-12})
    if not result.success:  # result.x would look like an answer all the same
        raise NoSolution(f"SLSQP: {result.message}")
    return result.x

def qp_hard(r, constraints, margin=1e-2):
    """Eq. 1 as App. B solves it, with |a|^2 = N in place of <= N:

        min |a - r|^2   s.t.   1'a = 0,   |a|^2 = N,   a_i + margin <= a_j on triplets,
                                                       a_i <= a_j on pairs

    For binary r it is std-normalised GRPO with nudges below the margin on samples of triplets."""
    if np.std(r) < 1e-9:
        raise NoSolution(f"qp_hard: all of {r} are equal")
    start = (r - np.mean(r)) / np.std(r)  # the solution without rows
    target = start / 2  # any positive multiple of centred r has the same solution
    i, j = constraints.rows.T
    order = np.eye(len(r))[j] - np.eye(len(r))[i]  # order @ a >= margins
    margins = np.repeat([0.0, margin], [len(constraints.pair), len(constraints.triplet)])
    equal = {"type": "eq", "fun": lambda a: np.array([a.sum(), a @ a - len(a)]),
             "jac": lambda a: np.stack([np.ones(len(a)), 2 * a])}
    ordered = {"type": "ineq", "fun": lambda a: order @ a - margins, "jac": lambda a: order}
    return slsqp(lambda a: ((a - target) @ (a - target), 2 * (a - target)), start,
                 [equal, ordered])

def qp_soft(r, constraints, lam=1.0, margin=1e-3):
    """The penalised program of App. B, with one margin for pairs and triplets:

        min |a - r|^2 + lam sum over rows (i, j) of max(0, a_i - a_j + margin)^2

    on centred r. Then a is centred, too, since the penalty sees differences only."""
    r = r - np.mean(r)
    i, j = constraints.rows.T

    def objective(a):
        short = np.maximum(0, a[i] - a[j] + margin)  # (M + T,)
        slope = np.bincount(i, short, len(a)) - np.bincount(j, short, len(a))
        return (a - r) @ (a - r) + lam * short @ short, 2 * (a - r + lam * slope)

    return slsqp(objective, r)


# ---- The estimators: Group -> advantages (N,) ----------------------------------------------------
def centred(a):
    """Less the group's mean (Sec. 3.3), without division by the deviation (App. A.8)."""
    return a - a.mean()

def none(g):
    """REINFORCE (Sec. 3.1)."""
    return g.rewards

def flat(g):
    return centred(g.rewards)

def grpo(g):
    return centred(g.rewards) / g.rewards.std()  # no epsilon: see COMPARING

def staged(V):
    """The estimator r - alpha V(p), centred (Sec. 3.3), for a function V from a Group to (N,)."""
    return lambda g: centred(g.rewards - g.alpha * V(g))

expectation = staged(V_expectation)
optimistic = staged(V_optimistic)
pessimistic = staged(V_pessimistic)
v_sae = staged(V_sae)
mc = staged(lambda g: g.needed("mc")[g.node])            # fresh rollouts, App. A.9
teacher = staged(lambda g: g.needed("teacher")[g.node])  # the teacher's search; not in the paper
loo = staged(V_leave_one_out)                            # not in the paper

def hard(g):
    return centred(qp_hard(g.rewards, order_constraints(g.node, g.parent, g.solved), g.margin))

def hard_staged(g):
    """Algorithm 1: the program on r - alpha V_E."""
    return hard(replace(g, rewards=g.rewards - g.alpha * V_expectation(g)))

def soft(g):
    constraints = order_constraints(g.node, g.parent, g.solved)
    return centred(qp_soft(g.rewards, constraints, g.lam, g.soft_margin))

# Beyond the paper. Lemma 3.2 minimises the variance of the advantage. That of the update, which is
# a_k grad log pi(c_k | p_k), is least for the baseline E[w r] / E[w], w = |grad log pi(c | p)|^2
# (Greensmith, Bartlett and Baxter 2004). The next three estimate it from the group with a cheaper w
# and are not centred. The own r_k counts, as in `flat`: that shrinks a_k by 1 - w_k / sum_j w_j.
def opo(g):
    """w = tokens of the completion (OPO, Hao et al. 2025, arXiv 2505.23585)."""
    return g.rewards - np.average(g.rewards, weights=g.needed("lengths"))

def optimal(g):
    """w = -log pi(c | p), the surprisal, and a little, so that they never sum to 0."""
    w = 1e-3 - g.needed("logps")
    return g.rewards - np.average(g.rewards, weights=w)

def optimal_tree(g):
    """`optimal` on r - alpha V, where V is V_E with the same weights."""
    w = 1e-3 - g.needed("logps")
    inside = in_subtree(g)[g.node]  # (N, N)
    a = g.rewards - g.alpha * (inside @ (w * g.rewards)) / (inside @ w)
    return a - np.average(a, weights=w)

def rloo(g):
    """Kool et al. 2019; Ahmadian et al. 2024 (arXiv 2402.14740)."""
    return centred(g.rewards - mean_of_others(g))

def treepo(g):
    """TreePO (arXiv 2508.17445): r_k minus the mean reward in the subtree of a node, averaged over
    the nodes from the question to p_k, but for those where k is alone, as in their code. Departs:
    a plain average, no division by the batch's deviation, nodes instead of equal lengths."""
    inside = in_subtree(g)  # (P, N)
    size = inside.sum(1)
    means = inside @ g.rewards / np.maximum(size, 1)
    counted = inside & (size > 1)[:, None]
    return centred(g.rewards - means @ counted / counted.sum(0))

def treerl(g):
    """TreeRL (arXiv 2506.11902): (V(s) - V(question) + V(s) - V(parent of s)) / sqrt(leaves below
    s), with the completion as the only step s, and means of the others as the other V."""
    return centred(2 * g.rewards - mean_of_others(g) - V_leave_one_out(g))

def treerpo(g):
    """V after TreeRPO (arXiv 2506.05183): the mean over a node's children, samples included, one
    vote each. Departs: they compare siblings, normalised; here a completion with its prefix."""
    total = np.bincount(g.node, g.rewards, len(g.parent))
    votes = np.bincount(g.node, minlength=len(g.parent))
    on_path = np.flatnonzero(in_subtree(g).any(1))
    for v in reversed(on_path[1:]):  # children first, without the question
        total[g.parent[v]] += total[v] / votes[v]
        votes[g.parent[v]] += 1
    return centred(g.rewards - g.alpha * total[g.node] / votes[g.node])

# These compare the rewards of a group. In a dead group, where all are equal, they are not called,
# and the advantages are exactly 0. An estimator that is only in ESTIMATORS is called there, too.
COMPARING = dict(
    flat=flat, grpo=grpo, expectation=expectation, optimistic=optimistic, pessimistic=pessimistic,
    mc=mc, v_sae=v_sae, qp_hard=hard, qp_hard_staged=hard_staged, qp_soft=soft, opo=opo,
    optimal=optimal, optimal_tree=optimal_tree, loo=loo, teacher=teacher, rloo=rloo, treepo=treepo,
    treerl=treerl, treerpo=treerpo)
ESTIMATORS = dict(none=none, **COMPARING)
FALLBACK = dict(qp_hard="qp_soft", qp_hard_staged="expectation", qp_soft="flat")  # on NoSolution
WITHOUT_V = {  # train.py refuses --alpha beside these
    "none", "flat", "grpo", "qp_hard", "qp_soft", "opo", "optimal", "rloo", "treepo", "treerl"}

def advantages(method, node, parent, rewards, **fields):
    """Advantages (N,) of one group, and the method that made them: `method`, or its fallback.
    `fields` are Group's others. ValueError for a bad or missing field, or an advantage like nan."""
    if method not in ESTIMATORS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(ESTIMATORS)}")
    g = Group(node, parent, rewards, **fields)
    if method in COMPARING and np.ptp(g.rewards) < 1e-9:
        return np.zeros(len(g.rewards)), method
    try:
        a = np.array(ESTIMATORS[method](g), float)  # a copy, since it may be g.rewards itself
    except NoSolution:
        if method not in FALLBACK:
            raise
        return advantages(FALLBACK[method], node, parent, rewards, **fields)
    if np.shape(a) != g.rewards.shape or not np.isfinite(a).all():
        raise ValueError(f"{method} returned {a}, expected {len(g.rewards)} finite numbers")
    return a, method


# ---- Steps instead of samples -------------------------------------------------------------------
def gae(rewards, values, gamma=0.95, lam=0.95):
    """Generalised advantage estimation (App. B) over the K steps of one completion: advantages
    (K,), targets (K,). values (K,) are V of the state before each step; the end is worth 0.

    >>> gae([0, 1], [0.5, 0.75], gamma=1, lam=0.5)
    (array([0.375, 0.25 ]), array([0.875, 1.   ]))
    """
    rewards = np.asarray(rewards, float)
    values = np.asarray(values, float)
    delta = rewards + gamma * np.append(values[1:], 0) - values
    a = np.zeros(len(rewards) + 1)
    for k in reversed(range(len(rewards))):
        a[k] = delta[k] + gamma * lam * a[k + 1]
    return a[:-1], a[:-1] + values

def metrics(a, group):
    """What Figure 4 plots of one group with advantages a (N,). sat_all counts contradictory
    triplets, too; adv_var_scaled, over the squared mean |a|, is free of the estimator's scale."""
    c = order_constraints(group.node, group.parent, group.solved)
    row = dict(reward=float(group.rewards.mean()), solved=float(group.solved.mean()),
               dead=float(np.ptp(group.rewards) < 1e-9), dropped=len(c.dropped),
               sat=satisfaction(a, c.rows), sat_pair=satisfaction(a, c.pair),
               sat_triplet=satisfaction(a, c.triplet),
               sat_all=satisfaction(a, np.concatenate([c.rows, c.dropped])))
    if not row["dead"]:
        row["adv_var"] = float(np.var(a))
    if np.any(a) and not row["dead"]:
        row["adv_var_scaled"] = float(np.var(a) / np.abs(a).mean() ** 2)
    return row
