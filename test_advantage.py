"""Each test tells the claim of the paper, or the bug, that it guards. Fast code is checked against
slow obvious code, quadratic programs against an exact solution."""
import dataclasses
import doctest
import itertools
import time
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx

import advantage
from advantage import (COMPARING, ESTIMATORS, Constraints, Group, NoSolution, advantages, centred,
                       in_subtree, metrics, order_constraints, qp_hard, qp_soft, satisfaction)

METHODS = list(COMPARING)
WEIGHTED = ["opo", "optimal", "optimal_tree"]  # the only ones whose advantages are not centred
PROGRAMS = ["qp_hard", "qp_hard_staged", "qp_soft"]
properties = settings(deadline=None, max_examples=60, derandomize=True, database=None)


# ---- Groups to test with ------------------------------------------------------------------------
def random_group(seed, size=16, samples=16, shaped=False):
    """A bushy random tree, a third of the samples solved, some samples at the same node. Rewards
    are 1 and 0, or, if shaped, quarters from -1 to 2 that know nothing of `solved`."""
    rng = np.random.default_rng(seed)
    parent = [-1]
    for v in range(1, size):
        parent.append(rng.integers(0, min(v, 6)))
    solved = np.zeros(samples, bool)
    while solved.all() or not solved.any():
        solved = rng.random(samples) < 0.35
    rewards = solved.astype(float)
    while shaped and (np.ptp(rewards) == 0 or set(rewards) <= {0, 1}):
        rewards = rng.integers(-4, 9, samples) / 4
    return Group(rng.integers(0, size, samples), np.array(parent), rewards, solved,
                 teacher=rng.random(size), mc=rng.random(size),
                 logps=-30 * rng.random(samples), lengths=rng.integers(1, 100, samples))

seeds = st.integers(0, 10 ** 6)
groups = st.builds(random_group, seeds, st.integers(6, 20), st.integers(4, 20))
shaped_groups = st.builds(random_group, seeds, st.integers(6, 20), st.integers(4, 20),
                          shaped=st.just(True))

def run(method, group, **changes):
    """The advantages of a group, some of its fields changed."""
    a, used = advantages(method, **{**vars(group), **changes})
    assert used == method
    return a

def constraints_of(group):
    return order_constraints(group.node, group.parent, group.solved)

def before_centring(method, group):
    """What an estimator has before it subtracts the group's mean, such as r - alpha V."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(advantage, "centred", lambda a: a)
        return ESTIMATORS[method](group)

def numbers(text):
    """"7/10 -1/6 0" as floats."""
    return np.array([float(Fraction(word)) for word in text.split()])

def gap(a, rows):
    """a_j - a_i of each row (i, j)."""
    return a[rows[:, 1]] - a[rows[:, 0]]

def is_below(parent, v, root):
    """Whether node v is root or lies below it, by walking up."""
    while v >= 0:
        if v == root:
            return True
        v = parent[v]
    return False


# ---- The paper's own example --------------------------------------------------------------------
# Figure 5: Q-A, Q-A-B, Q-E-F, Q-A-B-C (fails), Q-A-B-C (succeeds), Q-A-J, Q-H, Q-E, as in Table 5
Q, A, AB, ABC, AJ, E, EF, H = range(8)
FIGURE_5 = Group(node=[A, AB, EF, ABC, ABC, AJ, H, E], parent=[-1, Q, A, AB, A, Q, E, Q],
                 rewards=[1, 0, 0, 0, 1, 1, 1, 1], mc=[np.nan, 0.5, 0.25, 0, 0.5, 0.25, 1, 0])

@pytest.mark.parametrize("value, expected", [
    # of A, AB, EF, ABC, ABC, AJ, H, E
    ("V_expectation", "3/5 1/3 0 1/2 1/2 1 1 1/2"),
    ("V_optimistic", "1 1 0 1 1 1 1 1"),
    ("V_pessimistic", "0 0 0 0 0 1 1 0"),  # printed 0 for Q-A-J: one rollout, one success
])
def test_table_4(value, expected):
    V = getattr(advantage, value)(FIGURE_5)
    assert V == approx(numbers(expected), abs=1e-15)

@pytest.mark.parametrize("method, expected", [
    # printed 3/5 for Q-E
    ("expectation", "7/10 -1/6 0 -1/4 3/4 1/2 1/2 3/4"),
    # printed -1/2 for Q-E-F and 1 for Q-H
    ("optimistic", "1/2 -1/2 0 -1/2 1/2 1/2 1/2 1/2"),
    # printed 1 for Q-A-J and Q-H, 1/2 for Q-E
    ("pessimistic", "1 0 0 0 1 1/2 1/2 1"),
])
def test_table_5_before_and_after_centring(method, expected):
    expected = numbers(expected)
    assert before_centring(method, FIGURE_5) == approx(expected, abs=1e-15)
    assert run(method, FIGURE_5) == approx(centred(expected), abs=1e-15)

def test_figure_5_has_one_pair_and_no_triplet():
    """App. C: Q-A-B fails, its extension Q-A-B-C succeeds, and the example "doesn't fully capture
    all C_triplet conditions"."""
    c = constraints_of(FIGURE_5)
    assert c.pair.tolist() == [[1, 4]]
    assert c.triplet.shape == (0, 2)
    assert c.dropped.shape == (0, 2)

def test_worked_examples_in_docstrings_do_not_drift():
    result = doctest.testmod(advantage)
    assert result.failed == 0
    assert result.attempted >= 3


# ---- The order ----------------------------------------------------------------------------------
def slow_constraints(group):
    """Sec. 3.2, word by word, as loops over i, j, k; every contradictory row included."""
    node = group.node
    parent = group.parent
    solved = group.solved
    samples = range(len(node))

    def is_prefix(i, j):
        return node[i] != node[j] and is_below(parent, node[j], node[i])

    def is_sibling(i, j):
        return node[i] != node[j] and parent[node[i]] == parent[node[j]]

    def succeeded(i):  # S(p_i): a sample that starts exactly at p_i did
        return any(solved[node == node[i]])

    pair = set()
    triplet = set()
    for i, j in itertools.permutations(samples, 2):
        if is_prefix(i, j) and not solved[i] and solved[j]:
            pair.add((i, j))
        if is_sibling(i, j) and not succeeded(i) and not succeeded(j):
            for k in samples:
                if is_prefix(i, k) and solved[k]:
                    triplet.add((i, j))
    return pair, triplet

@properties
@given(shaped_groups)
def test_constraints_match_the_obvious_triple_loop(group):
    """Duplicates count by node, S(p) by exact start, (i, j) once however many witnesses k has. A
    contradictory row is one whose reverse is there, too. Rewards do not matter."""
    pair, triplet = slow_constraints(group)
    dropped = {(i, j) for i, j in triplet if (j, i) in triplet}
    c = constraints_of(group)
    assert list(map(tuple, c.pair)) == sorted(pair)
    assert list(map(tuple, c.triplet)) == sorted(triplet - dropped)
    assert list(map(tuple, c.dropped)) == sorted(dropped)

@properties
@given(groups)
def test_what_is_kept_has_chains_of_one_link(group):
    """(A1) holds by construction: nobody is both above and below, so there is no cycle, and a
    margin never adds up."""
    rows = constraints_of(group).rows
    assert not set(rows[:, 0]) & set(rows[:, 1])

@properties
@given(groups)
def test_subtrees_match_a_walk_to_the_root(group):
    inside = in_subtree(group)
    for v, k in np.ndindex(*inside.shape):
        assert inside[v, k] == is_below(group.parent, group.node[k], v)

def test_which_estimators_keep_which_constraints():
    """Pairs never separate the estimators. Of triplets some keep all, some none, as ties do not
    count."""
    pair = {method: [] for method in METHODS}
    triplet = {method: [] for method in METHODS}
    for group in map(random_group, range(150)):
        c = constraints_of(group)
        for method in METHODS:
            a = run(method, group)
            if len(c.pair):
                pair[method].append(satisfaction(a, c.pair))
            if len(c.triplet):
                triplet[method].append(satisfaction(a, c.triplet))
    assert len(triplet["flat"]) > 50
    for method in METHODS:
        assert np.mean(pair[method]) == 1, method
    for method in ("expectation", "optimistic", "treerpo", "optimal_tree", *PROGRAMS):
        assert np.mean(triplet[method]) == 1, method
    for method in ("flat", "grpo", "pessimistic", "rloo", "v_sae", "opo", "optimal"):
        assert np.mean(triplet[method]) == 0, method
    for method in ("loo", "treepo", "treerl", "mc", "teacher"):
        assert 0 < np.mean(triplet[method]) < 1, method

def test_satisfaction_is_strict_and_nan_without_rows():
    a = np.array([0, 0, 1])
    assert satisfaction(a, np.array([[0, 2], [1, 2], [0, 1]])) == 2 / 3
    assert satisfaction(a, np.array([[0, 1]])) == 0
    assert np.isnan(satisfaction(a, np.zeros((0, 2), int)))

def test_metrics_of_one_group_by_hand():
    """A and B fail, A-C and B-D succeed, and so does a sample at E: pairs (A, A-C) and (B, B-D),
    the triplets (A, B) and (B, A) contradict each other, and E has no part in it."""
    group = Group(node=[1, 2, 3, 4, 5], parent=[-1, 0, 0, 1, 2, 0], rewards=[0, 0, 1, 1, 1])
    row = metrics(np.array([-2, 0, 1, 0, 1]), group)
    assert row["reward"] == 3 / 5
    assert row["dead"] == 0
    assert row["dropped"] == 2
    assert row["sat"] == row["sat_pair"] == 1 / 2
    assert np.isnan(row["sat_triplet"])
    assert row["sat_all"] == 2 / 4
    assert row["adv_var"] == approx(6 / 5)
    assert row["adv_var_scaled"] == approx(6 / 5 / (4 / 5) ** 2)

def test_metrics_where_there_is_nothing_to_measure():
    """A dead group has no variance, and advantages that are all 0 no scale. Neither is a nan, which
    would spoil the mean over groups."""
    dead = Group(node=[1, 2], parent=[-1, 0, 0], rewards=[1, 1])
    row = metrics(np.zeros(2), dead)
    assert row["dead"] == 1
    assert "adv_var" not in row and "adv_var_scaled" not in row
    alone = Group(node=[1, 2], parent=[-1, 0, 0], rewards=[0, 1], alpha=1)
    row = metrics(run("expectation", alone), alone)
    assert row["adv_var"] == 0
    assert "adv_var_scaled" not in row


# ---- The values ---------------------------------------------------------------------------------
@properties
@given(shaped_groups)
def test_values_match_loops_over_subtrees(group):
    """V_E is of rewards, V_O and V_P of `solved`. A value without the own reward is of the nearest
    company: in the own subtree, in the parent's, in the whole group."""
    samples = range(len(group.node))

    def members(root):
        return [m for m in samples if is_below(group.parent, group.node[m], root)]

    for k, p in enumerate(group.node):
        mine = members(p)
        assert advantage.V_expectation(group)[k] == approx(np.mean(group.rewards[mine]))
        assert advantage.V_optimistic(group)[k] == any(group.solved[mine])
        assert advantage.V_pessimistic(group)[k] == all(group.solved[mine])
        for root in (p, max(group.parent[p], 0), 0):
            others = [m for m in members(root) if m != k]
            if others:
                break
        expected = np.mean(group.rewards[others])
        assert advantage.V_leave_one_out(group)[k] == approx(expected)

def test_leave_one_out_falls_back_to_the_parent_then_to_the_group():
    """Question -> A -> B -> C. A sample at B is alone there and has A's for company. One at C has
    none at B, so the group's, not A's. One alone in its group has V = 0."""
    at_b = Group(node=[2, 1, 0, 0], parent=[-1, 0, 1], rewards=[1, 0, 1, 1])
    assert advantage.V_leave_one_out(at_b)[0] == 0
    at_c = Group(node=[3, 1, 0, 0], parent=[-1, 0, 1, 2], rewards=[1, 0, 1, 1])
    assert advantage.V_leave_one_out(at_c)[0] == approx(2 / 3)
    assert advantage.V_leave_one_out(Group([1], [-1, 0], [1])) == [0]

def test_prefixes_without_relatives_turn_expectation_into_flat_at_half_the_step():
    """What drawing a group from many problems does: every V is the sample's own reward, and
    Tree-OPO is flat GRPO with 1 - alpha of the step."""
    group = Group(node=[1, 2, 3, 4], parent=[-1, 0, 0, 0, 0], rewards=[1, 0, 0, 1], alpha=0.5)
    assert run("expectation", group) == approx(run("flat", group) / 2)

@pytest.mark.parametrize("method, expected", [
    # the other seven have 4 successes where the own one counts, else 5
    ("rloo", "3/7 -5/7 -5/7 -5/7 3/7 3/7 3/7 3/7"),
    # means below Q 5/8, A 3/5, AB 1/3, ABC 1/2, E 1/2; AJ, H and EF have one sample: not counted
    ("treepo", "31/80 -187/360 -9/16 -247/480 233/480 31/80 3/8 7/16"),
    # V without the own reward: A 2/4, AB 1/2, EF its parent's 1, ABC 1 and 0, AJ its parent's 2/4,
    # H the group's 4/7, E 0; of the group 4/7 and 5/7, as in rloo
    ("treerl", "13/14 -17/14 -12/7 -12/7 10/7 13/14 6/7 10/7"),
    # ABC (0 + 1) / 2, AB (0 + 1/2) / 2, A (1 + 1/4 + 1) / 3, E (1 + 0) / 2; EF, AJ, H their sample
    ("treerpo", "5/8 -1/8 0 -1/4 3/4 1/2 1/2 3/4"),
    ("mc", "3/4 -1/8 -1/2 0 1 3/4 1 7/8"),
    # means A 1, AB 0, EF 0, ABC 1/2, AJ 1, H 1, E 1: A is worth more than AB, which extends it, and
    # E more than EF; both pools have the mean 1/2, which suits ABC and AJ
    ("v_sae", "3/4 -1/4 -1/4 -1/4 3/4 1/2 1/2 3/4"),
])
def test_other_baselines_by_hand(method, expected):
    """On the group of Figure 5, at alpha 1/2."""
    expected = numbers(expected)
    assert before_centring(method, FIGURE_5) == approx(expected, abs=1e-15)
    assert run(method, FIGURE_5) == approx(centred(expected), abs=1e-15)

@settings(properties, max_examples=40)
@given(shaped_groups, st.sampled_from([0.5, 1.0]))
def test_other_baselines_match_slow_obvious_ones(group, alpha):
    group = dataclasses.replace(group, alpha=alpha)
    node = group.node
    parent = group.parent

    def rewards_below(v, but=None):
        samples = [k for k in range(len(node)) if k != but and is_below(parent, node[k], v)]
        return group.rewards[samples]

    def mean_without(k):  # of the nearest company, as V_leave_one_out has it
        for root in (node[k], max(parent[node[k]], 0), 0):
            others = rewards_below(root, but=k)
            if len(others):
                return others.mean()

    def vote(v):  # TreeRPO, top down
        votes = list(group.rewards[node == v])
        for child in np.flatnonzero(parent == v):
            if len(rewards_below(child)):
                votes.append(vote(child))
        return np.mean(votes)

    def mean_on_path(v):  # TreePO
        means = []
        while v >= 0:
            below = rewards_below(v)
            if len(below) > 1:
                means.append(below.mean())
            v = parent[v]
        return np.mean(means)

    methods = ("rloo", "loo", "treerl", "treepo", "treerpo", "mc", "teacher")
    fast = {method: before_centring(method, group) for method in methods}
    for k, r in enumerate(group.rewards):
        p = node[k]
        others = rewards_below(0, but=k).mean()
        loo = mean_without(k)
        assert fast["rloo"][k] == approx(r - others)
        assert fast["loo"][k] == approx(r - alpha * loo)
        assert fast["treerl"][k] == approx((r - others) + (r - loo))
        assert fast["treepo"][k] == approx(r - mean_on_path(p))
        assert fast["treerpo"][k] == approx(r - alpha * vote(p))
        assert fast["mc"][k] == r - alpha * group.mc[p]
        assert fast["teacher"][k] == r - alpha * group.teacher[p]


# ---- Lemmas 3.1 and 3.2, by enumeration ---------------------------------------------------------
# A policy of two binary tokens with three logits: of the first token, and of the second after 0 and
# after 1. Samples start at the question (node 0), after token 0 (node 1) or after token 1 (node 2).
TOY_PARENT = [-1, 0, 0]
TOY_NODE = [0, 0, 1, 1, 2]
TOY_ENDINGS = [[(0, 0), (0, 1), (1, 0), (1, 1)], [(0, 0), (0, 1)], [(1, 0), (1, 1)]]
TOY_REWARD = [[0, 1], [1, 1 / 4]]  # of the first and the second token

ONE = 1 / (1 + np.exp([-0.3, 0.7, -1.1]))  # (3,) the probability of token 1

def token_probability(logit, token):
    if token == 1:
        return ONE[logit]
    return 1 - ONE[logit]

class ToySample(NamedTuple):
    probability: float
    reward: float
    score: np.ndarray  # (3,) grad log pi

def toy_sample(node, tokens):
    """One completion; its prefix is given, and has no probability."""
    first, second = tokens
    probability = token_probability(1 + first, second)
    score = np.zeros(3)
    score[1 + first] = second - ONE[1 + first]
    if node == 0:
        probability *= token_probability(0, first)
        score[0] = first - ONE[0]
    return ToySample(probability, TOY_REWARD[first][second], score)

def expected_gradient(estimate, node):
    """E[1/K sum_k a_k grad log pi(c_k | p_k)] and grad E[1/K sum_k r_k], both (3,) and exact.
    `estimate` makes advantages of rewards."""
    mean = np.zeros(3)
    exact = np.zeros(3)
    for completions in itertools.product(*[TOY_ENDINGS[v] for v in node]):
        samples = [toy_sample(v, tokens) for v, tokens in zip(node, completions)]
        rewards = np.array([sample.reward for sample in samples])
        scores = np.array([sample.score for sample in samples])
        weight = np.prod([sample.probability for sample in samples]) / len(node)
        mean += weight * estimate(rewards) @ scores
        exact += weight * rewards @ scores
    return mean, exact

def toy_estimate(method, node=TOY_NODE, alpha=0.7):
    """The estimator on the toy, before it centres."""
    values = np.array([0.9, 0.2, 0.4])

    def estimate(rewards):
        group = Group(node, TOY_PARENT, rewards, alpha=alpha, teacher=values, mc=values)
        return before_centring(method, group)
    return estimate

@pytest.mark.parametrize("method", ["none", "loo", "rloo", "mc", "teacher", "treerl"])
def test_lemma_3_1_holds_for_estimators_that_ignore_the_own_reward(method):
    """Before centring, which costs 1 / N for all alike. treerl is 2 r - V: twice the gradient."""
    mean, exact = expected_gradient(toy_estimate(method), TOY_NODE)
    if method == "treerl":
        exact = 2 * exact
    assert mean == approx(exact, abs=1e-12)

@properties
@given(groups, st.integers(0, 99))
def test_which_baselines_ignore_the_own_reward(group, seed):
    """Where r_k flips, b = r_k - a_k stays. Of treerl, which counts r_k twice, b = 2 r_k - a_k.
    treepo and treerpo hold r_k, as V_E does."""
    k = seed % len(group.rewards)
    flipped = group.rewards.copy()
    flipped[k] = 1 - flipped[k]
    other = dataclasses.replace(group, rewards=flipped, solved=None)
    counted = dict(rloo=1, loo=1, mc=1, teacher=1, treerl=2, treepo=1, treerpo=1)
    for method, times in counted.items():
        before = times * group.rewards[k] - before_centring(method, group)[k]
        after = times * flipped[k] - before_centring(method, other)[k]
        ignores = method not in ("treepo", "treerpo")
        assert (abs(after - before) < 1e-12) == ignores, method

@pytest.mark.parametrize("node, n", [([2], 1), ([1, 1, 1], 3)])
def test_own_reward_in_the_value_shrinks_the_gradient(node, n):
    """V_E as printed: of n samples in its subtree, p_k's own has weight 1/n, and 1 - alpha/n is
    left of its gradient; of a lone one's, 1 - alpha."""
    mean, exact = expected_gradient(toy_estimate("expectation", node, alpha=0.5), node)
    assert mean == approx((1 - 0.5 / n) * exact, abs=1e-12)

def test_own_reward_in_the_value_turns_the_gradient():
    """Where subtrees differ in size, the result is no multiple of the gradient any more."""
    node = [0, 1, 2, 1]
    mean, exact = expected_gradient(toy_estimate("expectation", node, alpha=0.5), node)
    cosine = mean @ exact / np.linalg.norm(mean) / np.linalg.norm(exact)
    assert cosine < 1 - 1e-4
    for method in ("optimistic", "pessimistic"):
        mean, exact = expected_gradient(toy_estimate(method, alpha=0.5), TOY_NODE)
        assert np.abs(mean - exact).max() > 1e-2

def test_centring_by_the_group_mean_keeps_one_minus_one_over_n():
    """The group mean holds the own reward, too, as in GRPO: the direction is right, the step is
    shorter by 1 / N."""
    mean, exact = expected_gradient(
        lambda rewards: advantages("flat", TOY_NODE, TOY_PARENT, rewards)[0], TOY_NODE)
    assert mean == approx((1 - 1 / 5) * exact, abs=1e-12)

def test_lemma_3_2_the_expected_reward_minimises_the_variance():
    """Var[r - V(p)] over p and r is least at V = E[r | p], for Bernoulli rewards at three prefixes
    of equal weight."""
    p = np.array([0.2, 0.5, 0.9])

    def variance(v):
        second_moment = np.mean(p * (1 - v) ** 2 + (1 - p) * v ** 2)
        return second_moment - np.mean(p - v) ** 2

    rng = np.random.default_rng(0)
    for _ in range(200):
        assert variance(p) <= variance(rng.random(3))


# ---- The baseline that minimises the variance of the gradient -----------------------------------
@properties
@given(shaped_groups, st.sampled_from([0.3, 1.0]))
def test_weighted_baselines_match_loops(group, alpha):
    group = dataclasses.replace(group, alpha=alpha)
    samples = range(len(group.node))

    def weighted_mean(x, w, members):
        return sum(w[j] * x[j] for j in members) / sum(w[j] for j in members)

    surprisal = [0.001 - logp for logp in group.logps]
    staged = []
    for k in samples:
        below = [j for j in samples if is_below(group.parent, group.node[j], group.node[k])]
        V = weighted_mean(group.rewards, surprisal, below)
        staged.append(group.rewards[k] - alpha * V)
    opo = group.rewards - weighted_mean(group.rewards, group.lengths, samples)
    optimal = group.rewards - weighted_mean(group.rewards, surprisal, samples)
    optimal_tree = staged - weighted_mean(staged, surprisal, samples)
    assert run("opo", group) == approx(opo, abs=1e-12)
    assert run("optimal", group) == approx(optimal, abs=1e-12)
    assert run("optimal_tree", group) == approx(optimal_tree, abs=1e-12)

def test_weighted_baselines_by_hand():
    """A fails, A-B succeeds, C fails, with surprisals of 1, 3, 2 and twice as many tokens. The
    baseline is 3/6 in all. V is 3/4 at A, 1 at A-B and 0 at C."""
    w = np.array([1, 3, 2])
    group = Group(node=[1, 2, 3], parent=[-1, 0, 1, 0], rewards=[0, 1, 0], logps=1e-3 - w,
                  lengths=2 * w, alpha=1)
    assert run("opo", group) == approx(numbers("-1/2 1/2 -1/2"))
    assert run("optimal", group) == approx(numbers("-1/2 1/2 -1/2"))
    assert run("optimal_tree", group) == approx(numbers("-3/4 0 0") + 1 / 8)  # (3/4 1 + 0 + 0) / 6

@properties
@given(shaped_groups, st.floats(0.1, 10))
def test_only_ratios_of_weights_matter(group, scale):
    """Log-probs `scale` times as large change nothing, but for the small constant in w, and with
    equal weights it is the mean: where all completions are certain, for instance."""
    longer = dict(logps=1e-3 - scale * (1e-3 - group.logps), lengths=scale * group.lengths)
    for method in WEIGHTED:
        assert run(method, group, **longer) == approx(run(method, group), abs=1e-9)
    equal = dict(logps=0 * group.logps, lengths=0 * group.lengths + 7)
    assert run("opo", group, **equal) == approx(run("flat", group), abs=1e-12)
    assert run("optimal", group, **equal) == approx(run("flat", group), abs=1e-12)
    assert run("optimal_tree", group, **equal) == approx(run("expectation", group), abs=1e-12)

@properties
@given(shaped_groups)
def test_weighted_baselines_are_centred_in_their_weights(group):
    """sum w a = 0, and the own reward costs the factor 1 - w_k / sum w."""
    weights = dict(opo=group.lengths, optimal=1e-3 - group.logps, optimal_tree=1e-3 - group.logps)
    for method, w in weights.items():
        assert w @ run(method, group) == approx(0, abs=1e-9)
    for method in ("opo", "optimal"):
        w = weights[method]
        others = (w @ group.rewards - w * group.rewards) / (w.sum() - w)
        expected = (1 - w / w.sum()) * (group.rewards - others)
        assert run(method, group) == approx(expected, abs=1e-9)

# A softmax policy over four actions: those that it rarely takes are the ones that fail.
BANDIT_POLICY = np.array([0.6, 0.25, 0.1, 0.05])
BANDIT_REWARD = np.array([1, 0.5, 0, -0.5])
BANDIT_SCORE = np.eye(4) - BANDIT_POLICY  # [y, x]: d log pi(y) / d logit x
BANDIT_NORM = (BANDIT_SCORE ** 2).sum(1)  # (4,) |grad log pi(y)|^2
BANDIT_BEST = ((BANDIT_POLICY * BANDIT_NORM) @ BANDIT_REWARD) / (BANDIT_POLICY @ BANDIT_NORM)

def bandit_variance(baseline):
    """The trace of Var[(r - b) grad log pi], by enumeration, and the mean, (4,)."""
    gradients = (BANDIT_REWARD - baseline)[:, None] * BANDIT_SCORE
    mean = BANDIT_POLICY @ gradients
    return BANDIT_POLICY @ (gradients ** 2).sum(1) - mean @ mean, mean

def test_greensmith_baseline_minimises_the_variance_of_the_gradient():
    """E[w r] / E[w] with w = |grad log pi|^2. Every baseline has the same mean, and the mean
    reward, which minimises Var[r - b] (Lemma 3.2), is not the best one."""
    least, gradient = bandit_variance(BANDIT_BEST)
    for other in np.linspace(-1, 2, 301):
        variance, mean = bandit_variance(other)
        assert mean == approx(gradient, abs=1e-12)
        assert variance == approx(least + BANDIT_POLICY @ BANDIT_NORM * (other - BANDIT_BEST) ** 2)
    mean_reward = BANDIT_POLICY @ BANDIT_REWARD
    assert BANDIT_BEST < mean_reward - 0.2
    assert bandit_variance(mean_reward)[0] > 1.2 * least

def test_baseline_of_optimal_converges_to_greensmiths():
    """Where w is the squared norm. With the surprisal for w it comes nearer than the mean does."""
    actions = np.random.default_rng(0).choice(4, size=100_000, p=BANDIT_POLICY)
    rewards = BANDIT_REWARD[actions]

    def baseline(method, **fields):
        a, _ = advantages(method, np.zeros(len(actions), int), [-1], rewards, **fields)
        return (rewards - a)[0]

    assert baseline("optimal", logps=1e-3 - BANDIT_NORM[actions]) == approx(BANDIT_BEST, abs=0.01)
    surprisal = baseline("optimal", logps=np.log(BANDIT_POLICY)[actions])
    mean = baseline("flat")
    assert abs(surprisal - BANDIT_BEST) < abs(mean - BANDIT_BEST)
    assert bandit_variance(surprisal)[0] < bandit_variance(mean)[0]

def test_optimal_makes_the_gradient_of_a_group_less_noisy_than_flat():
    """Groups of 8, by Monte Carlo. The own reward shrinks both gradients, so the variance is
    divided by what is left of the squared gradient."""
    _, gradient = bandit_variance(0)
    rng = np.random.default_rng(0)
    noise = {}
    for method in ("flat", "optimal"):
        estimates = []
        for _ in range(4000):
            actions = rng.choice(4, size=8, p=BANDIT_POLICY)
            logps = np.log(BANDIT_POLICY)[actions]
            a, _ = advantages(method, [0] * 8, [-1], BANDIT_REWARD[actions], logps=logps)
            estimates.append(a @ BANDIT_SCORE[actions] / 8)
        along = np.mean(estimates, axis=0) @ gradient / np.linalg.norm(gradient)
        noise[method] = np.var(estimates, axis=0).sum() / along ** 2
    assert noise["optimal"] < 0.95 * noise["flat"]


# ---- The programs, against an exact solution ----------------------------------------------------
def project(target, rows, margins):
    """The point nearest to target (N,) with a_j - a_i >= margin in each row: least-distance
    programming (Lawson & Hanson 1974, ch. 23), min |E u - e| with u >= 0, e = (0, ..., 0, 1).
    Each row moves its i and its j against each other, so the mean stays."""
    target = np.asarray(target, float)
    if len(rows) == 0:
        return target
    N = len(target)
    E = np.zeros((N + 1, len(rows)))
    E[:N] = (np.eye(N)[rows[:, 1]] - np.eye(N)[rows[:, 0]]).T
    E[N] = margins - gap(target, rows)
    e = np.eye(N + 1)[N]
    # Not scipy's nnls: 1.15 to 1.17 err where rows depend on each other (scipy#25389).
    u = scipy.optimize.lsq_linear(E, e, bounds=(0, np.inf), method="bvls", tol=1e-15).x
    residual = E @ u - e
    if np.linalg.norm(residual) < 1e-9:
        raise NoSolution("the rows contradict each other at these margins")
    return target - residual[:N] / residual[N]

def margins_of(c, margin):
    """0 on pairs, the margin on triplets, in the order of c.rows."""
    return np.repeat([0.0, margin], [len(c.pair), len(c.triplet)])

def exact_hard(target, c, margin):
    """
    Eq. 1 with |a|^2 = N, exactly. Let K be the polyhedron of the rows, t the centred target, P(s)
    the point of K nearest to s t. |P(s)| never falls as s > 0 grows. Where a = P(s) is on the
    sphere, <s t - a, b - a> <= 0 for all b in K, hence s <t, b - a> <= <a, b> - N <= 0 for those
    on the sphere: the one root s solves the program, though it is not convex.
    """
    t = centred(target)
    margins = margins_of(c, margin)

    def excess(s):
        return np.linalg.norm(project(s * t, c.rows, margins)) - np.sqrt(len(t))

    s = scipy.optimize.brentq(excess, 0, 1e3 / np.linalg.norm(t), xtol=1e-13, rtol=1e-13)
    return project(s * t, c.rows, margins)

@properties
@given(seeds, st.integers(2, 12))
def test_the_exact_projection_is_isotonic_regression_on_a_chain(seed, n):
    """Where a_k = max over i <= k of min over j >= k of the mean of target i to j."""
    target = np.random.default_rng(seed).normal(size=n)
    chain = np.stack([np.arange(n - 1), np.arange(1, n)], axis=1)
    a = project(target, chain, np.zeros(n - 1))
    for k in range(n):
        lowest = []
        for i in range(k + 1):
            lowest.append(min(target[i:j].mean() for j in range(k + 1, n + 1)))
        assert a[k] == approx(max(lowest), abs=1e-9)

def test_redundant_rows_do_not_derail_the_exact_projection():
    """Two proven, two unproven siblings: the fourth row depends on three. scipy's nnls returned
    [-0.23, 0.13, -0.22, 0.32] here. Rows 0 -> 2, 0 -> 3 and 1 -> 2, 1 -> 3 bind alike."""
    family = np.array([[0, 2], [0, 3], [1, 2], [1, 3]])
    target = np.array([0.25, -0.15, -0.8, -0.4])
    a = project(target, family, np.full(4, 0.01))
    assert a == approx(np.array([-0.28, -0.28, -0.27, -0.27]), abs=1e-9)

@properties
@given(groups)
def test_convex_program_at_margin_zero_returns_centred_rewards(group):
    """Eq. 1 and Theorem 3.4 as printed do nothing to binary rewards: they keep every row, and the
    ball |a|^2 <= N is twice too large to bind."""
    r0 = centred(group.rewards)
    rows = constraints_of(group).rows
    assert project(r0, rows, np.zeros(len(rows))) == approx(r0, abs=1e-12)
    assert r0 @ r0 <= len(r0) / 4

@properties
@given(groups, st.floats(0.01, 1))
def test_staged_target_keeps_every_row_by_itself(group, alpha):
    """r - alpha V_E satisfies every row that is not contradictory, so the convex program does
    nothing to it, either. With the teacher's V it would."""
    staged = group.rewards - alpha * advantage.V_expectation(group)
    assert gap(staged, constraints_of(group).rows).min(initial=1) >= 0

@properties
@given(groups, st.integers(0, 99))
def test_theorem_3_4_variance_never_grows_at_margin_zero(group, seed):
    target = centred(np.random.default_rng(seed).normal(size=len(group.node)))
    rows = constraints_of(group).rows
    a = project(target, rows, np.zeros(len(rows)))
    assert gap(a, rows).min(initial=0) >= -1e-10
    assert abs(a.mean()) < 1e-12
    assert a.var() <= target.var() + 1e-12
    if gap(target, rows).min(initial=0) < -1e-6:
        assert a.var() < target.var()

@properties
@given(groups, st.floats(1e-3, 0.5))
def test_a_margin_makes_the_variance_grow(group, margin):
    """The other half of Theorem 3.4, "enforces positive margins", excludes the first: with a
    triplet, a = r0 + d with d orthogonal to r0."""
    r0 = centred(group.rewards)
    c = constraints_of(group)
    d = project(r0, c.rows, margins_of(c, margin)) - r0
    assert d @ r0 == approx(0, abs=1e-12)
    assert (d @ d > 1e-12) == (len(c.triplet) > 0)

@properties
@given(groups, st.sampled_from([0.0, 0.01, 0.2]))
def test_hard_program_is_grpo_with_nudges(group, margin):
    """SLSQP agrees with pencil and paper: a = s r0 + d, where d moves the x proven and y unproven
    of a family by margin / (x + y) a row."""
    r0 = centred(group.rewards)
    c = constraints_of(group)
    d = np.zeros(len(r0))
    for i, j in c.triplet:
        step = margin / (np.sum(c.triplet[:, 0] == i) + np.sum(c.triplet[:, 1] == j))
        d[i] -= step
        d[j] += step
    by_hand = np.sqrt((len(r0) - d @ d) / (r0 @ r0)) * r0 + d
    assert qp_hard(group.rewards, c, margin) == approx(by_hand, abs=1e-6)
    if len(c.triplet) == 0:
        assert by_hand == approx(run("grpo", group), abs=1e-10)

@settings(properties, max_examples=40)
@given(shaped_groups, st.sampled_from([0.01, 0.2]))
def test_hard_program_on_any_rewards_agrees_with_the_exact_solution(group, margin):
    """Shaped rewards break rows for real, and the sphere is not convex: SLSQP must find the
    optimum, or the caller must hear that it did not."""
    c = constraints_of(group)
    try:
        a = qp_hard(group.rewards, c, margin)
    except NoSolution:
        return
    assert a == approx(exact_hard(group.rewards, c, margin), abs=1e-6)
    assert a @ a == approx(len(a))
    assert abs(a.mean()) < 1e-9
    assert gap(a, c.triplet).min(initial=1) >= margin - 1e-8
    assert gap(a, c.pair).min(initial=1) >= -1e-8

def test_hard_program_hardly_ever_gives_up():
    """On shaped rewards, too, else the fallback would be what is trained with."""
    solved = 0
    for seed in range(100):
        group = random_group(seed, shaped=True)
        solved += advantages("qp_hard", **vars(group))[1] == "qp_hard"
    assert solved >= 95

@pytest.mark.parametrize("scale", [1e-4, 1e6])
def test_the_hard_program_does_not_see_the_scale_of_rewards(scale):
    """SLSQP gives up where the objective is of the order of a million."""
    for seed in range(20):
        group = random_group(seed, shaped=True)
        c = constraints_of(group)
        expected = exact_hard(group.rewards, c, margin=0.01)
        assert qp_hard(scale * (group.rewards + 3), c) == approx(expected, abs=1e-6)

@properties
@given(groups, st.floats(0.1, 0.9))
def test_qp_hard_staged_is_the_program_on_staged_rewards(group, alpha):
    """Algorithm 1. Where no margin binds it is r - alpha V_E with unit deviation."""
    group = dataclasses.replace(group, alpha=alpha)
    c = constraints_of(group)
    staged = centred(group.rewards - alpha * advantage.V_expectation(group))
    a = run("qp_hard_staged", group)
    normalised = staged / staged.std()
    if gap(normalised, c.triplet).min(initial=1) >= group.margin:
        assert a == approx(normalised, abs=1e-6)
    assert gap(a, c.triplet).min(initial=1) >= group.margin - 1e-8

@properties
@given(groups, st.integers(0, 99), st.sampled_from([1e-3, 0.2]), st.sampled_from([0.3, 1.0, 10.0]))
def test_soft_program_has_zero_gradient(group, seed, margin, lam):
    """Strictly convex and smooth, so a vanishing gradient is proof, whatever solver found it.
    Random targets, so that the penalty acts."""
    target = centred(np.random.default_rng(seed).normal(size=len(group.node)))
    c = constraints_of(group)
    a = qp_soft(target, c, lam, margin)
    gradient = 2 * (a - target)
    for i, j in c.rows:
        short = max(0, a[i] - a[j] + margin)
        gradient[i] += 2 * lam * short
        gradient[j] -= 2 * lam * short
    assert np.abs(gradient).max() < 1e-4
    assert abs(a.mean()) < 1e-6

def test_soft_program_on_one_triplet_by_hand():
    """A and B fail, A-C succeeds: A and B share 2 lam delta / (1 + 2 lam) of the margin."""
    group = Group(node=[1, 2, 3], parent=[-1, 0, 0, 1], rewards=[0, 0, 1])
    lam = 1.0
    margin = 1e-3
    step = lam * margin / (1 + 2 * lam)
    expected = centred(group.rewards) + [-step, step, 0]
    assert run("qp_soft", group) == approx(expected, abs=1e-6)

@pytest.mark.parametrize("shape", ["deep", "wide"])
def test_the_programs_on_64_samples(shape):
    """Pairs on a chain grow as N^2, triplets of a star, too."""
    rng = np.random.default_rng(0)
    parent = list(range(-1, 20))
    if shape == "wide":
        parent = [-1] + [0] * 30 + list(range(1, 16))
    node = rng.integers(0, len(parent), 64)
    rewards = rng.random(64) < 0.3
    group = Group(node, parent, rewards)
    c = constraints_of(group)
    assert len(c.rows) > 40
    a = run("qp_hard", group)
    assert a @ a == approx(64)
    assert gap(a, c.triplet).min(initial=1) >= 0.01 - 1e-8
    a = run("qp_soft", group)
    short = np.maximum(0, 1e-3 - gap(a, c.rows))
    push = np.bincount(c.rows[:, 1], short, 64) - np.bincount(c.rows[:, 0], short, 64)
    assert a - centred(group.rewards) == approx(push, abs=1e-5)  # the gradient is 0

NO_ROWS = np.zeros((0, 2), int)
ONE_ROW = Constraints(pair=NO_ROWS, triplet=np.array([[0, 1]]), dropped=NO_ROWS)
BOTH_WAYS = Constraints(pair=NO_ROWS, triplet=np.array([[0, 1], [1, 0]]), dropped=NO_ROWS)

@pytest.mark.parametrize("rewards, constraints, margin", [
    ([0, 0, 1], BOTH_WAYS, 0.01),  # margins that contradict each other
    ([0, 0, 1], ONE_ROW, 5.0),     # a margin too wide for the norm
    ([1, 1, 1], ONE_ROW, 0.01),    # no direction to go to
])
def test_programs_without_solution_say_so(rewards, constraints, margin):
    """Solvers return numbers all the same."""
    with pytest.raises(NoSolution):
        qp_hard(np.array(rewards), constraints, margin)

@pytest.mark.parametrize("method, failures, expected", [
    ("qp_hard", 0, "qp_hard"), ("qp_hard", 1, "qp_soft"), ("qp_hard", 2, "flat"),
    ("qp_hard_staged", 1, "expectation"), ("qp_soft", 1, "flat")])
def test_a_solver_that_fails_falls_back_and_is_reported(monkeypatch, method, failures, expected):
    """result.x of a failed SLSQP looks like an answer: the status must be read, and the caller must
    be able to count."""
    group = Group(node=[1, 2, 3], parent=[-1, 0, 0, 1], rewards=[0, 0, 1])
    like = run(expected, group)
    minimize = scipy.optimize.minimize
    calls = []

    def moody(objective, start, **options):
        calls.append(start)
        if len(calls) <= failures:
            return scipy.optimize.OptimizeResult(x=start, success=False, message="no")
        return minimize(objective, start, **options)

    monkeypatch.setattr(advantage, "minimize", moody)
    a, used = advantages(method, **vars(group))
    assert used == expected
    assert a == approx(like)


# ---- The projected values of App. A.7 -----------------------------------------------------------
@properties
@given(shaped_groups)
def test_projected_values_are_the_nearest_that_rise_along_the_tree(group):
    """Against the exact projection of the mean rewards at the distinct prefixes, each counted once,
    with a row for every prefix and extension."""
    prefixes = np.unique(group.node)
    means = np.array([group.rewards[group.node == p].mean() for p in prefixes])
    rows = []
    for i, j in itertools.permutations(range(len(prefixes)), 2):
        if is_below(group.parent, prefixes[j], prefixes[i]):
            rows.append([i, j])
    expected = project(means, np.array(rows).reshape(-1, 2), np.zeros(len(rows)))
    values = advantage.V_sae(group)
    for p, value in zip(prefixes, expected):
        assert values[group.node == p] == approx(value, abs=1e-9)

def test_theorem_a_7_projected_values_come_nearer_to_values_of_the_class():
    """For true values that rise along the tree the projection errs less than the means do, whatever
    the rewards. On a tree where a wrong step leads down, no such thing holds."""
    parent = np.array([-1, 0, 1, 1, 0, 4])
    true = np.array([0.1, 0.3, 0.7, 0.4, 0.2, 0.9])
    rng = np.random.default_rng(0)
    for _ in range(100):
        group = Group(np.arange(6), parent, (rng.random(6) < true).astype(float))
        after = np.linalg.norm(advantage.V_sae(group) - true)
        before = np.linalg.norm(group.rewards - true)
        assert after <= before + 1e-12


# ---- What every method must keep ----------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reward", [0, 1, 0.1, -2.5, True])
def test_equal_rewards_give_zeros_exactly(method, reward):
    """A standard deviation with epsilon 1e-8 once turned twelve equal rewards into advantages of
    0.08; a teacher's V would turn them into more."""
    a, used = advantages(method, [0, 1, 1, 2] * 3, [-1, 0, 0], [reward] * 12,
                         teacher=[0.1, 0.2, 0.3], mc=[0.1, 0.2, 0.3])
    assert (a == 0).all()
    assert a.dtype == np.float64
    assert used == method

def test_none_is_reinforce_without_a_baseline():
    """Sec. 3.1's objective: neither centred nor zero where all samples succeed, as a teacher's
    do."""
    assert advantages("none", [0, 0], [-1], [1, 1])[0].tolist() == [1, 1]
    assert advantages("none", [0, 0], [-1], [1, 0])[0].tolist() == [1, 0]

@pytest.mark.parametrize("method", METHODS)
@settings(properties, max_examples=15)
@given(groups, st.integers(0, 99))
def test_order_of_samples_and_names_of_nodes_do_not_matter(method, group, seed):
    rng = np.random.default_rng(seed)
    a = run(method, group)
    if method not in WEIGHTED:
        assert abs(a.mean()) < 1e-12

    order = rng.permutation(len(group.node))
    shuffled = run(method, group, node=group.node[order], rewards=group.rewards[order],
                   solved=group.solved[order], logps=group.logps[order],
                   lengths=group.lengths[order])
    assert shuffled == approx(a[order], abs=1e-6)

    old = [0]  # the old name of each new node: any order in which parents come first
    while len(old) < len(group.parent):
        ready = [v for v in range(len(group.parent)) if v not in old and group.parent[v] in old]
        old.append(rng.choice(ready))
    new = np.argsort(old)
    parent = [-1]
    for v in old[1:]:
        parent.append(new[group.parent[v]])
    renamed = run(method, group, node=new[group.node], parent=np.array(parent),
                  teacher=group.teacher[old], mc=group.mc[old])
    assert renamed == approx(a, abs=1e-6)

@settings(properties, max_examples=40)
@given(shaped_groups, st.floats(-2, 2))
def test_adding_a_constant_to_rewards_changes_nothing(group, shift):
    for method in METHODS:
        before, used = advantages(method, **vars(group))
        changed = dataclasses.replace(group, rewards=group.rewards + shift)
        after, used_after = advantages(method, **vars(changed))
        if used == used_after:
            assert after == approx(before, abs=1e-5), method

@properties
@given(groups)
def test_grpo_has_unit_variance_and_alpha_zero_is_flat(group):
    assert run("grpo", group).var() == approx(1)
    flat = run("flat", group)
    for method in ("expectation", "optimistic", "pessimistic", "loo", "treerpo", "mc", "teacher",
                   "v_sae"):
        assert run(method, group, alpha=0) == approx(flat)
    assert run("qp_hard_staged", group, alpha=0) == approx(run("qp_hard", group))
    assert run("optimal_tree", group, alpha=0) == approx(run("optimal", group))

@pytest.mark.parametrize("method", ESTIMATORS)
def test_alpha_changes_those_that_have_a_v_and_no_others(method):
    """Beside the others train.py refuses --alpha."""
    group = random_group(0)
    first, second = [advantages(method, **{**vars(group), "alpha": alpha})[0]
                     for alpha in (0.25, 0.75)]
    assert np.array_equal(first, second) == (method in advantage.WITHOUT_V)

def test_arguments_are_left_alone():
    """What comes back may be changed by its owner, "none" and its rewards included."""
    node = np.array([1, 2, 3])
    parent = np.array([-1, 0, 0, 1])
    rewards = np.array([0.0, 0.0, 1.0])
    values = np.array([0.1, 0.2, 0.3, 0.4])
    logps = np.array([-1.0, -2.0, -3.0])
    for method in ESTIMATORS:
        a, _ = advantages(method, node, parent, rewards, teacher=values, mc=values, logps=logps,
                          lengths=-logps)
        a[:] = 9
    assert node.tolist() == [1, 2, 3]
    assert parent.tolist() == [-1, 0, 0, 1]
    assert rewards.tolist() == [0, 0, 1]
    assert values.tolist() == [0.1, 0.2, 0.3, 0.4]
    assert logps.tolist() == [-1, -2, -3]

@pytest.mark.parametrize("method", METHODS)
def test_a_tree_of_20_000_nodes_costs_no_more_than_its_group(method):
    """An array of P x P took 40 seconds a step here. About a millisecond is what is needed."""
    rng = np.random.default_rng(0)
    size = 20_000
    parent = np.maximum(np.arange(size) - 1 - rng.integers(0, 1000, size), 0)
    parent[0] = -1
    group = Group(rng.choice(size, 8, replace=False), parent, [0, 1, 0, 0, 1, 0, 1, 0],
                  teacher=rng.random(size), mc=rng.random(size), logps=-np.ones(8),
                  lengths=np.ones(8))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        metrics(run(method, group), group)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.1


# ---- What forks do ------------------------------------------------------------------------------
# A fails, A-B succeeds with a long completion, its sibling C fails.
FORK = dict(node=[1, 2, 3], parent=[-1, 0, 1, 0], lengths=[50, 200, 100], logps=[-10, -30, -20])

def test_a_fork_with_a_constant_baseline(monkeypatch):
    """If everything were centred afterwards this would silently be `flat`. In a dead group it says
    that all is well, or that nothing is."""
    def half(g):
        return g.rewards - 0.5

    monkeypatch.setitem(ESTIMATORS, "half", half)
    assert advantages("half", rewards=[0, 1, 0], **FORK)[0].tolist() == [-0.5, 0.5, -0.5]
    assert advantages("half", rewards=[1, 1, 1], **FORK)[0].tolist() == [0.5, 0.5, 0.5]

def test_a_fork_with_a_length_penalty(monkeypatch):
    """0.8 for a long right completion, which is solved all the same: the constraints stay. Where
    success was read off r == 1 they were gone without a word."""
    def shorter(g):
        rewards = np.where(g.solved & (g.lengths > 150), 0.8, g.rewards)
        return advantage.expectation(dataclasses.replace(g, rewards=rewards))

    monkeypatch.setitem(ESTIMATORS, "shorter", shorter)
    a, _ = advantages("shorter", rewards=[0, 1, 0], **FORK)
    assert a == approx(centred(np.array([-0.2, 0.4, 0])))

    penalised = Group(rewards=[0, 0.8, 0], solved=[False, True, False], **FORK)
    c = constraints_of(penalised)
    assert c.pair.tolist() == [[0, 1]]
    assert c.triplet.tolist() == [[0, 2]]
    assert advantage.V_optimistic(penalised).tolist() == [1, 1, 0]
    for method in ("expectation", "optimistic", *PROGRAMS):
        row = metrics(run(method, penalised), penalised)
        assert row["sat"] == row["sat_triplet"] == 1, method

def test_a_fork_with_negative_rewards(monkeypatch):
    """-1 for a wrong answer, -0.5 for none: all methods take it, and so does a new one."""
    def cautious(g):
        a = advantage.flat(g)
        return np.where(a < 0, a / 2, a)

    monkeypatch.setitem(ESTIMATORS, "cautious", cautious)
    group = Group(rewards=[-1, 1, -0.5], teacher=np.zeros(4), mc=np.zeros(4), **FORK)
    a = run("cautious", group)
    assert a == approx([-5 / 12, 7 / 6, -1 / 6])
    for method in METHODS:
        a = run(method, group)
        assert a[1] == a.max() > 0
    assert run("flat", group) == approx([-5 / 6, 7 / 6, -1 / 3])

def test_a_fork_with_a_value_of_its_own(monkeypatch):
    """The mean reward in the subtree of the parent, which is never of one sample alone. Here it is
    1/3 at A and at C, below the question, and 1/2 at A-B, below A."""
    def V_parent(g):
        inside = in_subtree(g)[g.parent[g.node]]
        return inside @ g.rewards / inside.sum(1)

    monkeypatch.setitem(ESTIMATORS, "parent", advantage.staged(V_parent))
    a, _ = advantages("parent", rewards=[0, 1, 0], alpha=0.5, **FORK)
    assert a == approx(centred(numbers("-1/6 3/4 -1/6")))

def test_a_fork_with_an_entropy_bonus(monkeypatch):
    """r - tau log pi, which the sampler's log-probs are there for: also where all rewards are
    equal, since it is in ESTIMATORS only."""
    def entropy(g):
        return centred(g.rewards - 0.01 * g.needed("logps"))

    monkeypatch.setitem(ESTIMATORS, "entropy", entropy)
    a, _ = advantages("entropy", rewards=[0, 1, 0], **FORK)
    assert a == approx([-13 / 30, 23 / 30, -1 / 3])
    a, _ = advantages("entropy", rewards=[0, 0, 0], **FORK)
    assert a == approx([-0.1, 0.1, 0])

def test_a_fork_whose_estimator_fails(monkeypatch):
    """Without a fallback of its own it is not replaced by another, and a nan is not trained on."""
    def infeasible(g):
        raise NoSolution("mine")

    monkeypatch.setitem(ESTIMATORS, "infeasible", infeasible)
    monkeypatch.setitem(ESTIMATORS, "nan", lambda g: g.rewards * np.nan)
    monkeypatch.setitem(ESTIMATORS, "scalar", lambda g: g.rewards.mean())
    with pytest.raises(NoSolution, match="mine"):
        advantages("infeasible", rewards=[0, 1, 0], **FORK)
    for method in ("nan", "scalar"):
        with pytest.raises(ValueError, match=f"{method} returned .*, expected 3 finite numbers"):
            advantages(method, rewards=[0, 1, 0], **FORK)


# ---- Errors -------------------------------------------------------------------------------------
GOOD = dict(method="expectation", node=[1, 2, 3], parent=[-1, 0, 0, 1], rewards=[0, 0, 1])

@pytest.mark.parametrize("bad, message", [
    (dict(method="expectaton"), r"method is 'expectaton', expected one of .*expectation"),
    (dict(rewards=[0, 1]), r"node is \[1, 2, 3\], expected 2 numbers"),
    (dict(rewards=[]), r"expected 0 numbers, at least one"),
    (dict(rewards=[[0, 0, 1]]), r"expected 1 numbers"),
    (dict(rewards=[0, float("nan"), 1]), r"rewards are .*nan.*, expected finite numbers"),
    (dict(rewards=[0, float("inf"), 1]), r"rewards are .*inf.*, expected finite numbers"),
    (dict(rewards=["no", "no", "yes"]), r"could not convert string to float"),
    (dict(node=[1, 2, 4]), r"node is \[1 2 4\], expected nodes of the tree, 0 to 3"),
    (dict(node=[-1, 2, 3]), r"node is \[-1  2  3\], expected nodes"),
    (dict(parent=[0, 0, 0, 1]), r"parent is \[0 0 0 1\], expected -1 and then earlier nodes"),
    (dict(parent=[-1, 0, -1, 1]), r"parent is \[-1  0 -1  1\]"),
    (dict(parent=[-1, 2, 0, 1]), r"parent is \[-1  2  0  1\]"),
    (dict(parent=[-1, 0, 0, 3]), r"parent is \[-1  0  0  3\]"),
    (dict(parent=[]), r"parent is \[\], expected 0 numbers, at least one"),
    (dict(solved=[True]), r"solved is \[True\], expected 3 numbers"),
    (dict(logps=[-1.0, -2.0]), r"logps is \[-1.0, -2.0\], expected 3 numbers"),
    (dict(lengths=[3]), r"lengths is \[3\], expected 3 numbers"),
    (dict(teacher=[0.5]), r"teacher is \[0.5\], expected 4 numbers"),
    (dict(method="mc", mc=[0, 1, 0, float("nan")]), r"mc returned .*nan.*, expected 3 finite"),
    (dict(method="mc"), r"mc is None, expected an array"),
    (dict(method="teacher"), r"teacher is None, expected an array"),
    (dict(method="opo", logps=[-1, -2, -3]), r"lengths is None, expected an array"),
    (dict(method="optimal", lengths=[1, 2, 3]), r"logps is None, expected an array"),
    (dict(method="optimal_tree"), r"logps is None, expected an array"),
    (dict(method="optimal", logps=[-1, -2, np.nan]), r"optimal returned .*nan.*, expected 3"),
    (dict(alpha=float("nan")), r"expectation returned .*nan.*, expected 3 finite numbers"),
])
def test_wrong_input_is_named_with_its_value(bad, message):
    with pytest.raises(ValueError, match=message):
        advantages(**{**GOOD, **bad})

def test_a_misspelt_field_is_an_error():
    with pytest.raises(TypeError, match="techer"):
        advantages(**GOOD, techer=[0, 0, 0, 0])


# ---- Steps instead of samples -------------------------------------------------------------------
@properties
@given(seeds, st.integers(1, 8), st.sampled_from([0.0, 0.5, 1.0]))
def test_gae_matches_the_sum_over_future_differences(seed, steps, lam):
    """A_k = sum over l of (gamma lam)^l delta_(k + l). lam = 1 is the discounted return less V,
    lam = 0 the one-step difference."""
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=steps)
    values = rng.normal(size=steps)
    a, targets = advantage.gae(rewards, values, gamma=0.95, lam=lam)
    following = [*values[1:], 0]
    for k in range(steps):
        expected = 0
        discounted = 0
        for later in range(k, steps):
            delta = rewards[later] + 0.95 * following[later] - values[later]
            expected += (0.95 * lam) ** (later - k) * delta
            discounted += 0.95 ** (later - k) * rewards[later]
        assert a[k] == approx(expected)
        assert targets[k] == approx(a[k] + values[k])
        if lam == 1:
            assert targets[k] == approx(discounted)
