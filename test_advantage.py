"""Every test tells the claim of the paper, or the bug, that it guards. Fast code is checked against slow obvious code."""
import doctest
import itertools

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

import advantage
from advantage import (ESTIMATORS, Constraints, NoSolution, advantages, ancestors, order_constraints, project, qp_hard, qp_soft,
                       satisfaction, value)

METHODS = ["flat", "grpo", "expectation", "optimistic", "pessimistic", "loo", "rloo", "treepo", "treerl", "treerpo", "ema", "shrink", "mc", "teacher",
           "qp_hard", "qp_soft"]
properties = settings(deadline=None, max_examples=200, derandomize=True, database=None)


def random_group(seed, size=16, samples=16, levels=(0.0, 1.0)):
    """(node, parent, rewards) of a mixed group: a bushy random tree, two failures in three, some samples at the same node."""
    rng = np.random.default_rng(seed)
    parent = np.array([-1] + [rng.integers(0, min(v, 6)) for v in range(1, size)])
    node, r = rng.integers(0, size, samples), np.zeros(samples)
    while np.ptp(r) == 0:
        r = np.where(rng.random(samples) < 0.65, levels[0], rng.choice(levels, samples))
    return node, parent, r


def groups(*levels):
    return st.builds(random_group, st.integers(0, 10 ** 6), st.integers(6, 20), st.integers(4, 20), st.just(levels or (0.0, 1.0)))


def side_information(parent, seed=0):
    """What some methods ask for, at random: the student has been at about half of the nodes."""
    rng, size = np.random.default_rng(seed), len(parent)
    return dict(teacher=rng.random(size), mc=rng.random(size), history=np.where(rng.random(size) < 0.5, rng.random(size), np.nan))


def centred(x):
    return np.asarray(x) - np.mean(x)


def gap(a, rows):
    return a[rows[:, 1]] - a[rows[:, 0]]


# ---- the paper's own example ----

# Figure 5: Q-A, Q-A-B, Q-E-F, Q-A-B-C (fails), Q-A-B-C (succeeds), Q-A-J, Q-H, Q-E, in the order of Table 5
Q, A, AB, ABC, AJ, E, EF, H = range(8)
FIG5 = dict(node=[A, AB, EF, ABC, ABC, AJ, H, E], parent=[-1, Q, A, AB, A, Q, E, Q], rewards=[1, 0, 0, 0, 1, 1, 1, 1])


@pytest.mark.parametrize("kind, a, ab, abc, aj, e, ef, h", [
    ("expectation", 3 / 5, 1 / 3, 1 / 2, 1, 1 / 2, 0, 1),
    ("optimistic", 1, 1, 1, 1, 1, 0, 1),
    ("pessimistic", 0, 0, 0, 1, 0, 0, 1),  # the paper prints 0 for Q-A-J: one rollout, one success, so 1
])
def test_table_4(kind, a, ab, abc, aj, e, ef, h):
    assert value(kind, **FIG5) == pytest.approx([a, ab, ef, abc, abc, aj, h, e], abs=1e-15)


@pytest.mark.parametrize("kind, expected", [
    ("expectation", [7 / 10, -1 / 6, 0, -1 / 4, 3 / 4, 1 / 2, 1 / 2, 3 / 4]),  # printed 3/5 for Q-E
    ("optimistic", [1 / 2, -1 / 2, 0, -1 / 2, 1 / 2, 1 / 2, 1 / 2, 1 / 2]),    # printed -1/2 for Q-E-F, 1 for Q-H
    ("pessimistic", [1, 0, 0, 0, 1, 1 / 2, 1 / 2, 1]),                         # printed 1 for Q-A-J and Q-H, 1/2 for Q-E
])
def test_table_5_before_and_after_centring(kind, expected):
    assert FIG5["rewards"] - value(kind, **FIG5) / 2 == pytest.approx(expected, abs=1e-15)
    assert advantages(kind, **FIG5) == pytest.approx(centred(expected), abs=1e-15)


def test_figure_5_has_one_pair_and_no_triplet():
    """App. C: Q-A-B fails, its extension Q-A-B-C succeeds, and the example "doesn't fully capture all C_triplet conditions"."""
    c = order_constraints(**FIG5)
    assert c.pair.tolist() == [[1, 4]] and c.triplet.shape == (0, 2) and c.dropped == 0


def test_worked_examples_in_docstrings_do_not_drift():
    assert doctest.testmod(advantage).failed == 0 and doctest.testmod(advantage).attempted >= 2


# ---- the order ----

def slow_constraints(node, parent, r):
    """Sec. 3.2, word by word, as loops over i, j, k; every contradictory row included."""
    def is_prefix(u, v):
        return v != 0 and (parent[v] == u or is_prefix(u, parent[v]))

    def succeeded(p):
        return any(node[m] == p and r[m] == 1 for m in range(len(r)))

    pair, triplet, n = set(), set(), range(len(r))
    for i, j in itertools.product(n, n):
        if is_prefix(node[i], node[j]) and r[i] == 0 and r[j] == 1:
            pair.add((i, j))
        for k in n:
            if (node[i] != node[j] and parent[node[i]] == parent[node[j]] and r[i] == r[j] == 0 and not succeeded(node[i])
                    and not succeeded(node[j]) and is_prefix(node[i], node[k]) and r[k] == 1):
                triplet.add((i, j))
    return pair, triplet


@properties
@given(groups(0.0, 0.5, 1.0))
def test_constraints_match_the_obvious_triple_loop(group):
    """Duplicates count by node, S(p) by exact start, (i, j) once however many witnesses k; a contradictory row is one whose reverse is there, too."""
    pair, triplet = slow_constraints(*group)
    kept = {(i, j) for i, j in triplet if (j, i) not in triplet}
    c = order_constraints(*group)
    assert c.pair.tolist() == sorted(map(list, pair)) and c.triplet.tolist() == sorted(map(list, kept))
    assert c.dropped == len(triplet) - len(kept)
    assert order_constraints(*group, drop_contradictions=False).triplet.tolist() == sorted(map(list, triplet))


@properties
@given(groups())
def test_what_is_kept_has_chains_of_one_link(group):
    """(A1) holds by construction: nobody is both above and below, so there is no cycle, and a margin never adds up."""
    c = order_constraints(*group)
    rows = np.concatenate(c[:2])
    assert not set(rows[:, 0]) & set(rows[:, 1])


@properties
@given(groups())
def test_ancestors_match_a_walk_to_the_root(group):
    parent = group[1]
    expected = np.zeros((len(parent), len(parent)), bool)
    for j in range(len(parent)):
        i = parent[j]
        while i >= 0:
            expected[i, j], i = True, parent[i]
    assert (ancestors(parent) == expected).all()


def test_which_estimators_keep_which_constraints():
    """Pairs never separate the estimators. Of triplets some keep all; flat, grpo, rloo and pessimistic none, since ties do not count."""
    share = {(m, part): [] for m in METHODS for part in ("pair", "triplet")}
    for node, parent, r in map(random_group, range(300)):
        c = order_constraints(node, parent, r)
        for m in METHODS:
            a = advantages(m, node, parent, r, **side_information(parent))
            for part in ("pair", "triplet"):
                if len(getattr(c, part)):
                    share[m, part].append(satisfaction(a, getattr(c, part)))
    mean = {key: np.mean(x) for key, x in share.items()}
    assert len(share["flat", "triplet"]) > 100
    assert all(mean[m, "pair"] == 1 for m in METHODS)
    assert all(mean[m, "triplet"] == 1 for m in ("expectation", "optimistic", "treerpo", "qp_hard", "qp_soft"))
    assert all(mean[m, "triplet"] == 0 for m in ("flat", "grpo", "pessimistic", "rloo"))
    assert all(0 < mean[m, "triplet"] < 1 for m in ("loo", "treepo", "treerl", "ema", "shrink", "mc", "teacher"))


def test_none_is_reinforce_without_a_baseline():
    """Sec. 3.1's objective: neither centred nor zero where all samples succeed, as a teacher's do."""
    assert advantages("none", [0, 0], [-1], [1, 1]).tolist() == [1, 1] and advantages("none", [0, 0], [-1], [1, 0]).tolist() == [1, 0]


def test_satisfaction_is_strict_and_nan_without_rows():
    c = Constraints(pair=np.array([[0, 2], [1, 2]]), triplet=np.array([[0, 1]]), dropped=0)
    assert satisfaction([0, 0, 1], c) == 2 / 3 and satisfaction([0, 0, 1], c.pair) == 1 and satisfaction([0, 0, 1], c.triplet) == 0
    assert np.isnan(satisfaction([0, 0, 1], np.zeros((0, 2), int))) and np.isnan(satisfaction([0, 0, 1], []))


# ---- the values ----

@properties
@given(groups(0.0, 0.25, 1.0), st.data())
def test_values_match_loops_over_subtrees(group, data):
    node, parent, r = group
    teacher = data.draw(st.lists(st.floats(0, 1), min_size=len(parent), max_size=len(parent)))
    below = ancestors(parent) | np.eye(len(parent), dtype=bool)
    for k, p in enumerate(node):
        mine = [r[m] for m in range(len(r)) if below[p, node[m]]]
        for root in (p, max(parent[p], 0), 0):  # the own subtree, the parent's, the whole group
            others = [r[m] for m in range(len(r)) if below[root, node[m]] and m != k]
            if others:
                break
        assert value("expectation", *group)[k] == pytest.approx(np.mean(mine))
        assert value("optimistic", *group)[k] == max(mine) and value("pessimistic", *group)[k] == min(mine)
        assert value("expectation", *group, leave_one_out=True)[k] == pytest.approx(np.mean(others))
        assert value("teacher", *group, teacher=teacher)[k] == teacher[node[k]]


def test_leave_one_out_falls_back_to_the_parent_then_to_the_group():
    """Question -> A -> B -> C. B is alone below A's sample, which is its company. C has none at B: the group's, not A's. One alone: V = 0."""
    assert value("expectation", [2, 1, 0, 0], [-1, 0, 1], [1, 0, 1, 1], leave_one_out=True)[0] == 0
    assert value("expectation", [3, 1, 0, 0], [-1, 0, 1, 2], [1, 0, 1, 1], leave_one_out=True)[0] == pytest.approx(2 / 3)
    assert value("expectation", [1], [-1, 0], [1], leave_one_out=True) == [0]


def test_prefixes_without_relatives_turn_expectation_into_flat_at_half_the_step():
    """What drawing a group from many problems does: every V is the sample's own reward, Tree-OPO is flat GRPO with 1 - alpha of the step."""
    args = [1, 2, 3, 4], [-1, 0, 0, 0, 0], [1, 0, 0, 1]
    assert advantages("expectation", *args, alpha=0.5) == pytest.approx(advantages("flat", *args) / 2)


# ---- the other baselines, on the group of figure 5: A 1, A-B 0, E-F 0, A-B-C 0, A-B-C 1, A-J 1, H 1, E 1 ----

HISTORY = [0.5, np.nan, 0.25, np.nan, np.nan, np.nan, 1, 0]  # of Q, A, AB, ABC, AJ, E, EF, H


@pytest.mark.parametrize("method, expected, options", [
    # the other seven have 4 successes where the own one counts, else 5
    ("rloo", [3 / 7, -5 / 7, -5 / 7, -5 / 7, 3 / 7, 3 / 7, 3 / 7, 3 / 7], {}),
    # means below Q 5/8, A 3/5, A-B 1/3, A-B-C 1/2, E 1/2; A-J, H and E-F hold one sample each and do not count
    ("treepo", [1 - 49 / 80, -187 / 360, -9 / 16, -247 / 480, 1 - 247 / 480, 1 - 49 / 80, 1 - 5 / 8, 1 - 9 / 16], {}),
    # V without the own reward: A 2/4, A-B 1/2, E-F its parent's 1, A-B-C 1 and 0, A-J its parent's 2/4, H the group's 4/7, E 0
    ("treerl", [2 - 4 / 7 - 1 / 2, -5 / 7 - 1 / 2, -5 / 7 - 1, -5 / 7 - 1, 2 - 4 / 7, 2 - 4 / 7 - 1 / 2, 2 - 8 / 7, 2 - 4 / 7], {}),
    # A-B-C (0 + 1) / 2, A-B (0 + 1/2) / 2, A (1 + 1/4 + 1) / 3, E (1 + 0) / 2; E-F, A-J and H are their sample's reward
    ("treerpo", [5 / 8, -1 / 8, 0, -1 / 4, 3 / 4, 1 / 2, 1 / 2, 3 / 4], {}),
    # A-B-C has A-B's history, A, A-J and E the question's
    ("ema", [3 / 4, -1 / 8, -1 / 2, -1 / 8, 7 / 8, 3 / 4, 1, 3 / 4], dict(history=HISTORY)),
    # the question has no history either: A, A-J and E have the others' 4/7
    ("ema", [5 / 7, -1 / 8, -1 / 2, -1 / 8, 7 / 8, 5 / 7, 1, 5 / 7], dict(history=[np.nan] + HISTORY[1:])),
    # for A-B 5/7, A (3 + 10/7) / 6 = 31/42, A-B (1 + 31/21) / 4 = 13/21; for A (2 + 8/7) / 6 = 11/21, which A-J, alone, keeps; for A-B-C's failure
    # A 31/42, A-B 13/21, A-B-C (1 + 26/21) / 3 = 47/63; for its success A 11/21, A-B (0 + 22/21) / 4 = 11/42, A-B-C (0 + 11/21) / 3 = 11/63; for
    # E-F 5/7, E (1 + 10/7) / 3 = 17/21; for E (0 + 8/7) / 3 = 8/21; for H 4/7
    ("shrink", [31 / 42, -13 / 42, -17 / 42, -47 / 126, 1 - 11 / 126, 31 / 42, 5 / 7, 17 / 21], {}),
    ("mc", [3 / 4, -1 / 8, -1 / 2, 0, 1, 3 / 4, 1, 7 / 8], dict(mc=[np.nan, 0.5, 0.25, 0, 0.5, 0.25, 1, 0])),
])
def test_other_baselines_by_hand(method, expected, options):
    """At alpha 1/2, where there is one."""
    node, parent, r = (np.array(x) for x in FIG5.values())
    assert ESTIMATORS[method](node, parent, r.astype(float), 0.5, **options) == pytest.approx(expected, abs=1e-15)
    assert advantages(method, **FIG5, **options) == pytest.approx(centred(expected), abs=1e-15)


@properties
@given(groups(0.0, 0.25, 1.0), st.integers(0, 99), st.sampled_from([0.5, 1.0]))
def test_other_baselines_match_slow_obvious_ones(group, seed, alpha):
    node, parent, r = group
    side, N = side_information(parent, seed), range(len(r))
    below = ancestors(parent) | np.eye(len(parent), dtype=bool)

    def path(v):
        return [] if v < 0 else path(parent[v]) + [v]

    def mean(x):
        return sum(x) / len(x) if x else 0.0

    def members(v, without=None):
        return [r[m] for m in N if below[v, node[m]] and m != without]

    def vote(v):  # TreeRPO, top down
        return mean([r[m] for m in N if node[m] == v] + [vote(c) for c in range(len(parent)) if parent[c] == v and members(c)])

    def shrunk(v, k):
        others = members(v, k)
        return mean(others) if v == 0 else (sum(others) + 2 * shrunk(parent[v], k)) / (len(others) + 2)

    for k, p in enumerate(node):
        past = [side["history"][v] for v in path(p) if not np.isnan(side["history"][v])] or [mean(members(0, k))]
        loo = next(mean(members(v, k)) for v in (p, max(parent[p], 0), 0) if members(v, k))
        slow = dict(rloo=r[k] - mean(members(0, k)), treepo=mean([r[k] - mean(members(v)) for v in path(p) if len(members(v)) > 1]),
                    treerl=(r[k] - mean(members(0, k))) + (r[k] - loo), treerpo=r[k] - alpha * vote(p), ema=r[k] - alpha * past[-1],
                    shrink=r[k] - alpha * shrunk(p, k), mc=r[k] - alpha * side["mc"][p])
        for method, a in slow.items():
            options = {name: side[name] for name in ESTIMATORS[method].__kwdefaults__ or {} if name in side}
            assert ESTIMATORS[method](node, parent, r, alpha, **options)[k] == pytest.approx(a, abs=1e-12), method


@properties
@given(groups())
def test_shrink_lies_between_loo_and_rloo(group):
    """Without pull it is the mean of the nearest company up the tree, which is "loo" but for that one's shortcut to the group; with much, "rloo"."""
    assert advantages("shrink", *group, alpha=1, shrink=1e9) == pytest.approx(advantages("rloo", *group), abs=1e-6)
    node, parent, r = [1, 1, 2, 2, 2, 0], [-1, 0, 0], [0, 1, 1, 1, 0, 0]
    assert advantages("shrink", node, parent, r, alpha=1, shrink=1e-9) == pytest.approx(advantages("loo", node, parent, r, alpha=1), abs=1e-6)


# ---- Lemma 3.1, by enumeration ----

def expected_gradient(estimate, node):
    """
    A policy of two binary tokens with three logits: of the first token, and of the second after 0 and after 1. Samples start at the question
    (node 0), after token 0 (node 1) or after token 1 (node 2). Returns E[1/K sum_k a_k grad log pi(c_k | p_k)] and grad E[1/K sum_k r_k], both
    (3,) and exact.
    """
    p, reward = 1 / (1 + np.exp(-np.array([0.3, -0.7, 1.1]))), np.array([[0, 1], [1, 1 / 4]])
    starts = {0: list(itertools.product([0, 1], [0, 1])), 1: [(0, 0), (0, 1)], 2: [(1, 0), (1, 1)]}
    mean, exact = np.zeros(3), np.zeros(3)
    for tokens in itertools.product(*(starts[v] for v in node)):
        prob, r, score = 1.0, np.zeros(len(node)), np.zeros((len(node), 3))
        for k, (x, y) in enumerate(tokens):
            for logit, token in [(0, x)] * (node[k] == 0) + [(1 + x, y)]:
                prob *= p[logit] if token else 1 - p[logit]
                score[k, logit] += token - p[logit]
            r[k] = reward[x, y]
        mean += prob * estimate(r) @ score / len(node)
        exact += prob * r @ score / len(node)
    return mean, exact


TOY = [0, 0, 1, 1, 2], [-1, 0, 0]


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_lemma_3_1_holds_for_values_that_ignore_the_own_reward(alpha):
    node, parent = TOY
    for kwargs in (dict(kind="teacher", teacher=[0.9, 0.2, 0.4]), dict(kind="expectation", leave_one_out=True)):
        mean, exact = expected_gradient(lambda r: r - alpha * value(node=node, parent=parent, rewards=r, **kwargs), node)
        assert mean == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("method", ["loo", "rloo", "ema", "shrink", "mc", "teacher", "treerl"])
def test_lemma_3_1_holds_for_estimators_that_ignore_the_own_reward(method):
    """Before the door centres, which costs 1 / N for all alike. treerl is 2 r - V: twice the gradient. Half of the nodes have no history."""
    side = dict(teacher=[0.9, 0.2, 0.4], mc=[0.9, 0.2, 0.4], history=[np.nan, 0.3, np.nan])
    options = {name: side[name] for name in ESTIMATORS[method].__kwdefaults__ or {} if name in side}
    mean, exact = expected_gradient(lambda r: ESTIMATORS[method](*map(np.array, TOY), r, 0.7, **options), TOY[0])
    assert mean == pytest.approx((2 if method == "treerl" else 1) * exact, abs=1e-12)


@properties
@given(groups(), st.integers(0, 99))
def test_which_baselines_ignore_the_own_reward(group, seed):
    """Where r_k flips, b = r_k - a_k stays. Of treerl, which counts r_k twice, b = 2 r_k - a_k. treepo and treerpo, like V_E, hold r_k."""
    node, parent, r = group
    k, side = seed % len(r), side_information(parent, seed)
    flipped = np.where(np.arange(len(r)) == k, 1 - r, r)
    for method in ("loo", "rloo", "ema", "shrink", "mc", "teacher", "treerl", "treepo", "treerpo"):
        options, scale = {n: side[n] for n in ESTIMATORS[method].__kwdefaults__ or {} if n in side}, 1 + (method == "treerl")
        before, after = (scale * x[k] - ESTIMATORS[method](node, parent, x, 0.7, **options)[k] for x in (r, flipped))
        assert (before == pytest.approx(after, abs=1e-12)) == (method not in ("treepo", "treerpo")), method


def test_own_reward_in_the_value_shrinks_the_gradient():
    """V_E as printed: of n samples in its subtree, p_k's own has weight 1/n, and 1 - alpha/n is left of its gradient; of a lone one's, 1 - alpha."""
    for node, n in (([2], 1), ([1, 1, 1], 3), ([0, 1, 2, 1], None)):
        mean, exact = expected_gradient(lambda r: r - 0.5 * value("expectation", node, TOY[1], r), node)
        if n:
            assert mean == pytest.approx((1 - 0.5 / n) * exact, abs=1e-12)
        else:  # the mixture is no multiple of the gradient any more: its direction is off
            assert mean @ exact / np.linalg.norm(mean) / np.linalg.norm(exact) < 1 - 1e-4
    for kind in ("optimistic", "pessimistic"):
        mean, exact = expected_gradient(lambda r: r - 0.5 * value(kind, *TOY, r), TOY[0])
        assert np.abs(mean - exact).max() > 1e-2


def test_centring_by_the_group_mean_keeps_one_minus_one_over_n():
    """The group mean holds the own reward, too, as in GRPO: the direction is right, the step is shorter by 1 / N."""
    mean, exact = expected_gradient(lambda r: advantages("flat", *TOY, r), TOY[0])
    assert mean == pytest.approx((1 - 1 / 5) * exact, abs=1e-12)


def test_lemma_3_2_the_expected_reward_minimises_the_variance():
    """Var[r - V(p)] over p and r is least at V = E[r | p], for Bernoulli rewards at three prefixes of equal weight."""
    p = np.array([0.2, 0.5, 0.9])

    def variance(v):
        second = (p * (1 - v) ** 2 + (1 - p) * v ** 2).mean()
        return second - (p - v).mean() ** 2
    rng = np.random.default_rng(0)
    assert all(variance(p) <= variance(rng.random(3)) for _ in range(200))


# ---- the programs ----

@properties
@given(groups(), st.sampled_from([None, "ball"]))
def test_convex_program_at_margin_zero_returns_centred_rewards(group, norm):
    """Eq. 1 and Theorem 3.4 as printed do nothing to binary rewards: they keep every row, and the ball is twice too large to bind."""
    assert project(group[2], order_constraints(*group), norm=norm) == pytest.approx(centred(group[2]), abs=1e-12)


@properties
@given(groups(), st.floats(0.01, 1))
def test_staged_target_keeps_every_row_by_itself(group, alpha):
    """r - alpha V_E satisfies every row that is not contradictory, so the convex program does nothing to it, either. A teacher's V differs."""
    staged = group[2] - alpha * value("expectation", *group)
    assert project(staged, order_constraints(*group), norm="ball") == pytest.approx(centred(staged), abs=1e-12)


@properties
@given(groups(), st.integers(0, 99))
def test_theorem_3_4_variance_never_grows_at_margin_zero(group, seed):
    target, c = np.random.default_rng(seed).normal(size=len(group[0])), order_constraints(*group)
    rows = np.concatenate(c[:2])
    a = project(target, c, norm="ball")
    assert gap(a, rows).min(initial=0) >= -1e-10 and abs(a.mean()) < 1e-12
    if gap(target, rows).min(initial=0) < -1e-6:
        assert a.var() < target.var()
    else:
        assert a.var() <= target.var() + 1e-12


@properties
@given(groups(), st.floats(1e-3, 0.5))
def test_a_margin_makes_the_variance_grow(group, margin):
    """The other half of Theorem 3.4, "enforces positive margins", excludes the first: with a triplet, a = r0 + d with d orthogonal to r0."""
    r, c = group[2], order_constraints(*group)
    d = project(r, c, margin) - centred(r)
    assert d @ centred(r) == pytest.approx(0, abs=1e-12)
    assert (d @ d > 0) == (len(c.triplet) > 0)


def slow_projection(t, rows, m):
    """Least-distance programming (Lawson & Hanson 1974, ch. 23) with every row at once: min |E u - e|, u >= 0, e = (0, ..., 0, 1)."""
    E = np.zeros((len(t) + 1, len(rows)))
    for k, (i, j) in enumerate(rows):
        E[i, k], E[j, k], E[-1, k] = -1, 1, m[k] - (t[j] - t[i])
    if not len(rows):
        return t
    e = np.eye(len(t) + 1)[-1]
    residual = E @ scipy.optimize.lsq_linear(E, e, bounds=(0, np.inf), method="bvls", tol=1e-15).x - e
    return t - residual[:-1] / residual[-1]


@properties
@given(groups(), st.integers(0, 99), st.sampled_from([(0.0, 0.0), (0.1, 0.0), (0.3, 0.2)]))
def test_projection_matches_the_slow_one(group, seed, margins):
    """The guess and the active set change the time, not the result. Random targets, so that rows really bind."""
    target, c = np.random.default_rng(seed).normal(size=len(group[0])), order_constraints(*group)
    m = np.repeat(margins, [len(c.triplet), len(c.pair)])
    slow = slow_projection(centred(target), np.concatenate([c.triplet, c.pair]), m)
    assert project(target, c, *margins) == pytest.approx(slow, abs=1e-9)


def test_redundant_rows_do_not_derail_the_projection():
    """Two proven, two unproven siblings: the fourth row depends on three. scipy's nnls (1.15 to 1.17) returned [-0.23, 0.13, -0.22, 0.32] here."""
    family = Constraints(np.zeros((0, 2), int), np.array([[0, 2], [0, 3], [1, 2], [1, 3]]), 0)
    target = np.array([0.25, -0.15, -0.8, -0.4])
    a = project(target, family, margin=0.01)
    assert a == pytest.approx(slow_projection(centred(target), family.triplet, np.full(4, 0.01)), abs=1e-9)
    assert gap(a, family.triplet).min() >= 0.01 - 1e-10


@properties
@given(st.integers(0, 10 ** 6), st.integers(3, 10), st.sampled_from([0.0, 0.1]))
def test_projection_on_any_acyclic_order_matches_the_slow_one(seed, n, margin):
    """Of 0 -> 1 -> 2, the repair of one row breaks the next. Our own rows never do that, a fork's may."""
    rng = np.random.default_rng(seed)
    rows = np.argwhere(np.triu(rng.random((n, n)) < 0.4, 1))
    target = rng.normal(size=n)
    slow = slow_projection(centred(target), rows, np.full(len(rows), margin))
    assert project(target, Constraints(np.zeros((0, 2), int), rows, 0), margin) == pytest.approx(slow, abs=1e-9)


@properties
@given(groups(), st.sampled_from([0.0, 0.01, 0.2]))
def test_hard_program_is_grpo_with_nudges(group, margin):
    """SLSQP, exact and pencil and paper agree: a = s r0 + d, where d moves the x proven and y unproven of a family by margin / (x + y) a row."""
    r, c = group[2], order_constraints(*group)
    d = np.zeros(len(r))
    for i, j in c.triplet:
        step = margin / ((c.triplet[:, 0] == i).sum() + (c.triplet[:, 1] == j).sum())
        d[i], d[j] = d[i] - step, d[j] + step
    by_hand = np.sqrt((len(r) - d @ d) / (centred(r) @ centred(r))) * centred(r) + d
    assert qp_hard(r, c, margin, solver="exact") == pytest.approx(by_hand, abs=1e-10)
    assert qp_hard(r, c, margin) == pytest.approx(by_hand, abs=1e-6)
    if not len(c.triplet):
        assert by_hand == pytest.approx(advantages("grpo", *group), abs=1e-10)


@properties
@given(groups(), st.integers(0, 99), st.sampled_from([0.01, 0.2]))
def test_hard_program_on_staged_targets_agrees_with_slsqp(group, seed, margin):
    """With the teacher's V triplets are broken for real, and the sphere is not convex: the root must be the optimum that SLSQP finds."""
    teacher, c = np.random.default_rng(seed).random(len(group[1])), order_constraints(*group)
    target = group[2] - 0.5 * value("teacher", *group, teacher=teacher)
    a = qp_hard(target, c, margin, solver="exact")
    assert a @ a == pytest.approx(len(a)) and abs(a.mean()) < 1e-12
    assert gap(a, c.triplet).min(initial=1) >= margin - 1e-10 and gap(a, c.pair).min(initial=0) >= -1e-10
    assert qp_hard(target, c, margin) == pytest.approx(a, abs=1e-6)


@properties
@given(groups(), st.integers(0, 99), st.sampled_from([1e-3, 0.2]), st.sampled_from([0.3, 1.0, 10.0]))
def test_soft_program_has_zero_gradient(group, seed, margin, lam):
    """Strictly convex and smooth, so a vanishing gradient is proof, whatever solver found it. Random targets, so that the penalty acts."""
    target, c = centred(np.random.default_rng(seed).normal(size=len(group[0]))), order_constraints(*group)
    a = qp_soft(target, c, lam, margin)
    gradient = 2 * (a - target)
    for i, j in np.concatenate(c[:2]):
        short = max(0, a[i] - a[j] + margin)
        gradient[i], gradient[j] = gradient[i] + 2 * lam * short, gradient[j] - 2 * lam * short
    assert np.abs(gradient).max() < 1e-4 and abs(a.mean()) < 1e-12


def test_targets_of_the_door():
    node, parent, r = random_group(2)
    c, teacher = order_constraints(node, parent, r), np.linspace(0, 1, len(parent))
    for target, expected in (("reward", r), ("staged", r - 0.7 * value("expectation", node, parent, r)), ("teacher", r - 0.7 * teacher[node])):
        for method, program in (("qp_hard", qp_hard), ("qp_soft", qp_soft)):
            a = advantages(method, node, parent, r, alpha=0.7, target=target, teacher=teacher, margin=0.05)
            assert a == pytest.approx(program(expected, c, margin=0.05), abs=1e-12)


def test_soft_program_on_one_triplet_by_hand():
    """A and B fail, A-C succeeds: A and B share 2 lam delta / (1 + 2 lam) of the margin."""
    node, parent, r = [1, 2, 3], [-1, 0, 0, 1], [0, 0, 1]
    lam, margin = 1.0, 1e-3
    step = lam * margin / (1 + 2 * lam)
    assert advantages("qp_soft", node, parent, r) == pytest.approx(centred(r) + [-step, step, 0], abs=1e-6)


def test_512_samples_and_thirty_thousand_rows():
    """Pairs on a chain grow as N^2, triplets of a star, too; a solver with one column per row would be out of memory or patience."""
    rng = np.random.default_rng(0)
    chain, star = np.arange(-1, 40), np.array([-1] + [0] * 150 + list(range(1, 151)))
    for parent in (chain, star):
        node, r = rng.integers(0, len(parent), 512), (rng.random(512) < 0.3).astype(float)
        c = order_constraints(node, parent, r)
        a = advantages("qp_hard", node, parent, r, solver="exact")
        assert a @ a == pytest.approx(512) and len(np.concatenate(c[:2])) > 2000
        assert gap(a, c.triplet).min(initial=1) >= 0.01 - 1e-10 and gap(a, c.pair).min(initial=1) > 0


@pytest.mark.parametrize("target", ["reward", "staged", "teacher"])
def test_smaller_programs_have_the_same_solution(target):
    """SLSQP sees the rows that bind, and one sample of each class. With all rows and samples it took seconds; a row left out would show here."""
    for seed, deep in itertools.product(range(3), (False, True)):
        rng = np.random.default_rng(seed)
        parent = np.array([-1] + [rng.integers(max(0, v - 3) if deep else 0, v) for v in range(1, 60)])
        node, r, teacher = rng.integers(0, 60, 256), (rng.random(256) < 0.3).astype(float), rng.random(60)
        t = r - 0.5 * {"reward": 0, "staged": value("expectation", node, parent, r), "teacher": teacher[node]}[target]
        c = order_constraints(node, parent, r)
        rows = np.concatenate(c[:2])
        a = qp_hard(t, c)
        assert a == pytest.approx(qp_hard(t, c, solver="exact"), abs=1e-6) and gap(a, c.triplet).min(initial=1) > 0.01 - 1e-8
        a = qp_soft(t, c, margin=0.1)
        short = np.maximum(0, 0.1 - gap(a, rows))
        push = np.bincount(rows[:, 1], short, 256) - np.bincount(rows[:, 0], short, 256)
        assert a - centred(t) == pytest.approx(push, abs=1e-5)  # the gradient of the whole program is 0


def test_programs_without_solution_say_so():
    """Contradictory margins, a margin too wide for the norm, and rows that turn the target around are no answers, though solvers return numbers."""
    both = Constraints(np.zeros((0, 2), int), np.array([[0, 1], [1, 0]]), 0)
    one = Constraints(np.zeros((0, 2), int), np.array([[0, 1]]), 0)
    for program in (lambda: project([0, 0, 1], both, margin=0.01), lambda: project([0, 0, 1], one, margin=5.0, norm="ball"),
                    lambda: project([1, 0], one, norm="sphere"), lambda: project([1, 1], one, norm="sphere"),
                    lambda: qp_hard([0, 0, 1], both), lambda: qp_hard([0, 0, 1], one, margin=5.0)):
        with pytest.raises(NoSolution):
            program()
    assert project([0.5, 0, 1], both) == pytest.approx([-0.25, -0.25, 0.5])  # without a margin the two demand equality


@pytest.mark.parametrize("method, failures, fallback, like", [
    ("qp_hard", 0, "none", "qp_hard"), ("qp_hard", 1, "soft", "qp_soft"), ("qp_hard", 2, "centred", "flat"), ("qp_soft", 2, "centred", "flat")])
def test_a_solver_that_fails_falls_back_and_is_reported(monkeypatch, method, failures, fallback, like):
    """result.x of a failed SLSQP looks like an answer: the status must be read, and the caller must be able to count."""
    left, minimize = [failures], scipy.optimize.minimize

    def moody(*args, **kwargs):
        left[0] -= 1
        return scipy.optimize.OptimizeResult(x=args[1], success=False, message="no") if left[0] >= 0 else minimize(*args, **kwargs)

    group, info = ([1, 2, 3], [-1, 0, 0, 1], [0, 0, 1]), {}
    expected = advantages(like, *group)
    monkeypatch.setattr(advantage, "minimize", moody)
    assert advantages(method, *group, info=info) == pytest.approx(expected)
    assert info == {"dead": False, "fallback": fallback}


# ---- what every method must keep ----

@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reward", [0, 1, 0.1, True])
def test_equal_rewards_give_zeros_exactly(method, reward):
    """A standard deviation with epsilon 1e-8 once turned twelve equal rewards into advantages of 0.08; a teacher's V would turn them into more."""
    info = {}
    a = advantages(method, [0, 1, 1, 2] * 3, [-1, 0, 0], [reward] * 12, **side_information([-1, 0, 0]), info=info)
    assert (a == 0).all() and a.dtype == np.float64 and info == {"dead": True, "fallback": "none"}


@pytest.mark.parametrize("method", METHODS)
@settings(properties, max_examples=40)
@given(groups(), st.integers(0, 99))
def test_order_of_samples_and_names_of_nodes_do_not_matter(method, group, seed):
    node, parent, r = group
    rng = np.random.default_rng(seed)
    side, shuffle = side_information(parent, seed), rng.permutation(len(node))
    a = advantages(method, *group, **side)
    assert advantages(method, node[shuffle], parent, r[shuffle], **side) == pytest.approx(a[shuffle], abs=1e-6)
    assert abs(a.mean()) < 1e-12

    order = [0]  # old node at every new place: any order in which parents come first
    while len(order) < len(parent):
        order.append(rng.choice([v for v in range(len(parent)) if v not in order and parent[v] in order]))
    new = np.argsort(order)
    renamed = np.array([-1] + [new[parent[v]] for v in order[1:]])
    assert advantages(method, new[node], renamed, r, **{k: x[order] for k, x in side.items()}) == pytest.approx(a, abs=1e-6)


@properties
@given(groups(0.1, 0.2, 0.5), st.floats(0, 0.4))
def test_adding_a_constant_to_rewards_changes_nothing(group, shift):
    node, parent, r = group
    for method in ("flat", "grpo", "expectation", "optimistic", "pessimistic", "loo", "rloo", "treepo", "treerl", "treerpo", "shrink"):
        assert advantages(method, node, parent, r + shift) == pytest.approx(advantages(method, *group), abs=1e-9)
    c = order_constraints(node, parent, (r == 0.5).astype(float))
    for program in (qp_hard, qp_soft, project):
        assert program(r + shift, c) == pytest.approx(program(r, c), abs=1e-5)


@properties
@given(groups())
def test_grpo_has_unit_variance_and_alpha_zero_is_flat(group):
    assert advantages("grpo", *group).var() == pytest.approx(1)
    for method in ("expectation", "optimistic", "pessimistic", "loo", "treerpo", "ema", "shrink", "mc", "teacher"):
        assert advantages(method, *group, alpha=0, **side_information(group[1])) == pytest.approx(advantages("flat", *group))


# ---- the seam and the errors ----

def test_a_new_baseline_is_one_function(monkeypatch):
    """With side information of its own, which all other methods ignore, and which nobody may misspell."""
    def critic(node, parent, rewards, alpha, *, critics=None):
        return rewards - alpha * np.asarray(critics)

    monkeypatch.setitem(ESTIMATORS, "critic", critic)
    assert advantages("critic", [1, 2], [-1, 0, 0], [0, 1], critics=[0.2, 0.4]) == pytest.approx([-0.45, 0.45])
    assert advantages("flat", [1, 2], [-1, 0, 0], [0, 1], critics=[0.2, 0.4]) == pytest.approx([-0.5, 0.5])
    with pytest.raises(ValueError, match="option is 'critik', expected one of .*critics"):
        advantages("critic", [1, 2], [-1, 0, 0], [0, 1], critik=[0.2, 0.4])


def test_arguments_are_left_alone():
    node, parent, r = np.array([1, 2, 3]), np.array([-1, 0, 0, 1]), np.array([0.0, 0.0, 1.0])
    side = side_information(parent)
    for method in METHODS:
        advantages(method, node, parent, r, **side)[:] = 9
    assert all(np.array_equal(side[k], x, equal_nan=True) for k, x in side_information(parent).items())
    assert node.tolist() == [1, 2, 3] and parent.tolist() == [-1, 0, 0, 1] and r.tolist() == [0, 0, 1]


GOOD = dict(method="expectation", node=[1, 2, 3], parent=[-1, 0, 0, 1], rewards=[0, 0, 1])


@pytest.mark.parametrize("bad, message", [
    (dict(method="expectaton"), r"method is 'expectaton', expected one of .*'expectation'"),
    (dict(alpha=1.5), r"alpha is 1.5, expected a number in \[0, 1\]"),
    (dict(alpha="0.5"), r"alpha is '0.5', expected a number"),
    (dict(alpha=float("nan")), r"alpha is nan"),
    (dict(rewards=[0, 1]), r"len\(node\) is 3, expected len\(rewards\), 2"),
    (dict(rewards=[0, -1, 1]), r"rewards\[1\] is -1, expected a finite number in \[0, 1\]"),
    (dict(rewards=[0, 1, 2]), r"rewards\[2\] is 2,"),
    (dict(rewards=[0, float("nan"), 1]), r"rewards\[1\] is nan, expected a finite number"),
    (dict(rewards=["no", "no", "yes"]), r"rewards is .*'yes'.*, expected a vector of float"),
    (dict(rewards=[]), r"rewards is .*, not empty"),
    (dict(rewards=[[0, 0, 1]]), r"rewards is .*, expected a vector"),
    (dict(node=[1, 2, 4]), r"node\[2\] is 4, expected a node of the tree, 0 to 3"),
    (dict(node=[-1, 2, 3]), r"node\[0\] is -1"),
    (dict(node=[1.0, 2.0, 3.0]), r"node is .*, expected a vector of int"),
    (dict(parent=[0, 0, 0, 1]), r"parent\[0\] is 0, expected -1 at node 0 and an earlier node everywhere else"),
    (dict(parent=[-1, 0, -1, 1]), r"parent\[2\] is -1"),
    (dict(parent=[-1, 2, 0, 1]), r"parent\[1\] is 2"),
    (dict(parent=[-1, 0, 0, 3]), r"parent\[3\] is 3"),
    (dict(parent=[]), r"parent is .*, not empty"),
    (dict(method="teacher"), r"teacher is None, expected a number for each of the tree's 4 nodes"),
    (dict(method="teacher", teacher=[0.5]), r"teacher is \[0.5\], expected a number for each of the tree's 4 nodes"),
    (dict(method="ema"), r"history is None, expected a number for each of the tree's 4 nodes"),
    (dict(method="ema", history=[float("nan"), 2, 0, 0]), r"history\[1\] is 2.0, expected a finite number in \[0, 1\]"),
    (dict(method="mc"), r"mc is None, expected a number for each of the tree's 4 nodes"),
    (dict(method="mc", mc=[0, 1, 0, float("nan")]), r"mc\[3\] is nan, expected a finite number"),
    (dict(method="shrink", shrink=0), r"shrink is 0, expected a number > 0"),
    (dict(method="teacher", teacher=[0.5, 7, 0, 0]), r"teacher\[1\] is 7.0, expected a finite number in \[0, 1\]"),
    (dict(method="qp_hard", solver="osqp"), r"solver is 'osqp', expected 'slsqp' or 'exact'"),
    (dict(method="qp_hard", target="rewards"), r"target is 'rewards', expected 'reward', 'staged' or 'teacher'"),
    (dict(method="qp_hard", margin=-1), r"margin is -1, expected a number >= 0"),
    (dict(method="qp_soft", lam=-1.0), r"lam is -1.0, expected a number >= 0"),
    (dict(colour="red"), r"option is 'colour', expected one of"),
])
def test_wrong_input_is_named_with_its_value(bad, message):
    with pytest.raises(ValueError, match=message):
        advantages(**{**GOOD, **bad})


def test_wrong_input_behind_the_door_is_named_too():
    c = order_constraints([1, 2, 3], [-1, 0, 0, 1], [0, 0, 1])
    for call, message in [
        (lambda: value("mean", [0], [-1], [1]), "kind is 'mean'"),
        (lambda: value("optimistic", [0], [-1], [1], leave_one_out=True), "kind is 'optimistic', expected 'expectation' where"),
        (lambda: satisfaction([0, 1], c), r"constraints\[0\] is \[0 2\], expected two indices of the 2 entries of a"),
        (lambda: satisfaction([0, 1, np.inf], c), r"a\[2\] is inf"),
        (lambda: project([0, 0, 1], c, norm="cube"), "norm is 'cube'"),
        (lambda: qp_hard([0, 0, 1], c, pair_margin=float("nan")), "pair_margin is nan"),
        (lambda: qp_soft([0, None, 1], c), "rewards is .*None"),
        (lambda: ancestors([-1, 5]), r"parent\[1\] is 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
