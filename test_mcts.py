"""The search with a fake policy, counted by hand. Then the command with a tiny random model: side
by side, restarted, killed, on two ranks. Each test tells of the bug it guards against."""
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from operator import attrgetter
from types import SimpleNamespace
from unittest.mock import patch
from zlib import crc32

import numpy as np
import pytest
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import evaluate
import mcts
import tree
from mcts import Node
from test_evaluate import tiny_folder
from tree import InputError

tqdm.set_lock(threading.RLock())  # its own is shared with children, and stays held by one killed
RIGHT = "The answer is 3."
WRONG = "The answer is 4."
PROBLEM = {"id": "p", "question": "q", "answer": "3"}
ANSWERS = [(RIGHT,), (WRONG,)]


# ---- The search with a fake policy ---------------------------------------------------------------
def steps_to(nodes, k):
    steps = []
    while k > 0:
        steps.append(nodes[k].step)
        k = nodes[k].parent
    return tuple(steps[::-1])


def columns(nodes, *names):
    return [attrgetter(*names)(at) for at in nodes]


def step(text):
    """A reply: a step that is whole."""
    return text + "\n\n", False


def end(*steps):
    """A reply: steps to the end of the solution."""
    return "\n\n".join(steps), True


def cut(*steps):
    """A reply: steps up to the limit of tokens."""
    return "\n\n".join(steps), False


def ends_right(text):
    return float(text.endswith(RIGHT))


def drive(policy, grade=ends_right, seed=0, **settings):
    """Search with policy(steps so far, whether one step is wanted) -> (text, ended).

    A step's "ids" are its text. Returns the nodes, and what was asked for: the steps so far,
    whether one step was wanted, and the replies.
    """
    args = SimpleNamespace(rollouts=16, max_depth=5, branch=5, c_uct=2.0)
    vars(args).update(settings)
    searching = mcts.search(["Q"], lambda step: [step], grade, np.random.default_rng(seed), args)
    asked = []
    replies = None
    while True:
        try:
            request = searching.send(replies)
        except StopIteration as stop:
            return stop.value, asked
        assert request.prefix_ids[0] == "Q"
        assert request.count == (args.branch if request.stop_at_blank else 1)
        steps = tuple(request.prefix_ids[1:])
        replies = [mcts.Reply(*policy(steps, request.stop_at_blank)) for _ in range(request.count)]
        asked.append((steps, request.stop_at_blank, replies))


def scripted(next_steps, continuations):
    """A policy by dictionary: what follows each prefix, given in turn, again and again."""
    turns = {}
    for one_step, table in ((True, next_steps), (False, continuations)):
        for prefix, replies in table.items():
            turns[prefix, one_step] = itertools.cycle(replies)
    return lambda prefix, one_step: next(turns[prefix, one_step])


def chatter(rng):
    """A policy that ends, goes on, or is cut by the limit anywhere, in few different steps."""
    def policy(prefix, one_step):
        steps = []
        while not steps or not one_step:
            luck = rng.random()
            if luck < 0.05:
                return cut(*steps)
            if luck < 0.1:
                return cut(*steps, "a fragm")
            if luck < 0.3:
                last = rng.choice([RIGHT, WRONG, "a", ""])
                return end(*steps, str(last))
            steps.append(str(rng.choice(["a", "b"])))
            if luck > 0.95:
                steps[-1] = WRONG
        return step(steps[0])
    return policy


def count_by_hand(asked, depth):
    """What the continuations alone account for: {steps: visits} and {steps: value}."""
    visits = Counter()
    value = Counter()
    for path, one_step, replies in asked:
        if one_step:
            continue
        [(text, ended)] = replies
        steps = [step for step in text.split("\n\n") if step]
        if not ended:
            steps = steps[:-1]
        for step in steps:
            if len(path) == depth or path[-1:] in ANSWERS:
                break
            path += (step,)
        for k in range(len(path) + 1):
            visits[path[:k]] += 1
            value[path[:k]] += ended and text.endswith(RIGHT)
    return visits, value


@pytest.mark.parametrize("seed", range(100))
def test_visits_are_rollouts_and_value_is_their_reward(seed):
    """Counted again from what was asked and replied: a visit lost or doubled, a reward given to
    another solution, a node expanded twice."""
    rng = np.random.default_rng(seed)
    depth = int(rng.integers(1, 6))
    rollouts = int(rng.integers(1, 60))
    branch = int(rng.integers(1, 6))
    policy = chatter(rng)
    nodes, asked = drive(policy, seed=seed, rollouts=rollouts, max_depth=depth, branch=branch)
    visits = Counter()
    value = Counter()
    for k, at in enumerate(nodes):
        steps = steps_to(nodes, k)
        visits[steps] += at.visits
        value[steps] += at.value
    # Beside the continuations there are only rollouts to the end of a solution. It was sampled as a
    # step, or as the last of a continuation, whose reward is then backed up at each visit.
    counted_visits, counted_value = count_by_hand(asked, depth)
    for steps in counted_visits | visits:
        more_visits = visits[steps] - counted_visits[steps]
        more_value = value[steps] - counted_value[steps]
        assert 0 <= more_value <= more_visits
        if steps[-1:] in ANSWERS and counted_visits[steps] <= 1:
            reward = steps[-1] == RIGHT
            if counted_visits[steps] == 1:
                reward = counted_value[steps]
            assert value[steps] == visits[steps] * reward
    assert nodes[0].visits == rollouts
    expanded = [steps for steps, one_step, _ in asked if one_step]
    assert len(set(expanded)) == len(expanded)
    assert all(len(steps) < depth for steps in expanded)


@pytest.mark.parametrize("seed", range(50))
def test_the_nodes_are_a_tree_of_solutions(seed):
    """A node below an end; equal steps apart; a reward without its answer."""
    nodes, _ = drive(chatter(np.random.default_rng(seed)), seed=seed, rollouts=40, max_depth=4)
    for k, at in enumerate(nodes):
        steps = steps_to(nodes, k)
        children = [nodes[child] for child in at.children]
        assert at.depth == len(steps) <= 4
        assert "a fragm" not in steps
        assert all(child.parent == k for child in children)
        assert len(set(columns(children, "step", "terminal"))) == len(children)
        if at.terminal:
            assert not children
            assert at.reward is not None
        elif at.depth < 4:  # what is cut has no reward
            assert at.value == sum(child.value for child in children)
        if at.reward == 1:
            assert end(*steps, at.rest)[0].strip().endswith(RIGHT)


def node(parent, step="", depth=1, **fields):
    return Node(parent, step, [], "", depth, **fields)


def test_uct_by_hand():
    """ln 10 = 2.3026. With c = 2, 5/6 + 2 sqrt(ln 10 / 6) = 2.072 and 1/3 + 2 sqrt(ln 10 / 3) =
    2.086. With c = 1, 1.453 and 1.209. The tenth rollout was cut, and is nowhere below."""
    rng = np.random.default_rng(0)
    nodes = [node(-1, depth=0, visits=10, value=6.0, expanded=True, children=[1, 2]),
             node(0, "a", visits=6, value=5.0),
             node(0, "b", visits=3, value=1.0)]
    assert mcts.uct(nodes[1], nodes[0], 2.0) == pytest.approx(2.072, abs=5e-4)
    assert mcts.uct(nodes[2], nodes[0], 2.0) == pytest.approx(2.086, abs=5e-4)
    assert mcts.select(nodes, 2.0, rng) == 2
    assert mcts.select(nodes, 1.0, rng) == 1
    # Below b, 3/4 + 2 sqrt(ln 3 / 2) = 2.232 and 2 sqrt(ln 3) = 2.096. With ln 10, the root's, it
    # would be the other.
    nodes.append(node(2, "d", 2, visits=2, value=1.5))
    nodes.append(node(2, "e", 2, visits=1))
    nodes[2].expanded = True
    nodes[2].children = [3, 4]
    assert mcts.select(nodes, 2.0, rng) == 3


def test_unvisited_children_come_first_at_random():
    """Whatever the value of the visited: UCT of a child without visits is infinite, and ties are no
    reason to take the first."""
    nodes = [node(-1, depth=0, visits=5, expanded=True, children=[1, 2, 3]),
             node(0, "a", visits=5, value=5.0),
             node(0, "b"),
             node(0, "c")]
    rng = np.random.default_rng(0)
    chosen = Counter(mcts.select(nodes, 0.0, rng) for _ in range(100))
    assert set(chosen) == {2, 3}
    assert 25 < chosen[2] < 75


def test_a_fork_may_select_by_another_rule():
    """As someone would write it who wants the rarest child, whatever its value."""
    nodes = [node(-1, depth=0, visits=10, value=6.0, expanded=True, children=[1, 2]),
             node(0, "a", visits=7, value=7.0),
             node(0, "b", visits=3, value=0.0)]

    def rarest(child, parent, c):
        return -child.visits

    rng = np.random.default_rng(0)
    assert mcts.select(nodes, 0.0, rng) == 1
    with patch.object(mcts, "uct", rarest):
        assert mcts.select(nodes, 0.0, rng) == 2


def test_expansion_merges_equal_steps_and_drops_what_is_no_step():
    """Spaces made two nodes of one step; a step cut by the limit became a node; text behind the
    blank line became part of it, or ended the solution."""
    merged = [step("a"), cut(" a \n \nb"), step("\n\na"), end("a \n\t\r\nb")]
    dropped = [cut("\n\ncut"), end("")]
    policy = scripted({(): [*merged, *dropped, end("c d"), step(RIGHT)]},
                      {("a",): [end("b", RIGHT)]})
    nodes, asked = drive(policy, rollouts=3, branch=8)
    assert [one_step for _, one_step, _ in asked] == [True, False]  # an end is not continued
    children = [nodes[child] for child in nodes[0].children]
    found = columns(children, "step", "terminal", "reward", "visits")
    assert found == [("a", False, None, 1), ("c d", True, 0.0, 1), (RIGHT, True, 1.0, 1)]


def test_below_the_last_level_the_rollout_runs_to_its_end():
    """At depth 5 the rollout was once cut, so that long solutions could not succeed; or its further
    steps became nodes. From the last level, which is not expanded, each rollout is a new one."""
    policy = scripted({(): [step("a")], ("a",): [step("b")]},
                      {("a",): [end("b", "c", RIGHT)], ("a", "b"): [end(WRONG), end("c", RIGHT)]})
    nodes, asked = drive(policy, max_depth=2)
    assert columns(nodes, "step", "visits", "value") == [("", 16, 9), ("a", 16, 9), ("b", 16, 9)]
    assert [one_step for _, one_step, _ in asked] == [True, False, True] + [False] * 15
    row = mcts.to_row(PROBLEM, nodes, {})
    assert [at["reward"] for at in row["nodes"]] == [None, None, 1.0]
    assert [at.get("rest") for at in row["nodes"]] == [None, None, "c\n\n" + RIGHT]


@pytest.mark.parametrize("depth", [3, 9])
def test_a_small_world_is_sampled_once_and_no_more(depth):
    """Eight solutions: ended ones and exhausted subtrees were sampled again and again. All rollouts
    are used, and those that find nothing new go to the better ends."""
    next_steps = {(): [step("a"), step("b")]}
    continuations = {}
    for first in "ab":
        next_steps[first,] = [step("a"), step("b")]
        continuations[first,] = [end("a", WRONG)]
        for second in "ab":
            next_steps[first, second] = [end(RIGHT), end(WRONG)]
            continuations[first, second] = [end(RIGHT)]
    nodes, asked = drive(scripted(next_steps, continuations), rollouts=200, max_depth=depth)
    more = drive(scripted(next_steps, continuations), rollouts=1000, max_depth=depth)
    assert nodes[0].visits == 200 and more[0][0].visits == 1000
    assert more[1] == asked
    visits = Counter()
    for at in nodes:
        if at.depth == 3:
            visits[at.step] += at.visits
            assert at.visits >= 1
    assert sum(visits.values()) == 200
    assert nodes[0].value == visits[RIGHT] > visits[WRONG]


def test_an_end_may_be_selected_again():
    """At no cost: nothing more is asked for, and its reward is backed up once more. Found by hand:
    1 + 2 sqrt(ln n / right) < 2 sqrt(ln n / wrong) at n = 5 and 10 visits, with c = 2."""
    policy = scripted({(): [step(RIGHT), step(WRONG)]}, {})
    nodes, asked = drive(policy)
    assert len(asked) == 1
    assert columns(nodes, "step", "visits", "value") == [("", 16, 13), (RIGHT, 13, 13),
                                                         (WRONG, 3, 0)]


@pytest.mark.parametrize("success", [0.3, 0.8])
def test_the_roots_value_is_unbiased_where_each_rollout_is_a_new_sample(success):
    """As where solutions are longer than max_depth: whichever prefix UCT prefers, the next rollout
    from it succeeds with the same probability. (Where ends are selected again, or prefixes differ,
    UCT's preference for the better ones and the merging of equal steps both move the mean.)"""
    rng = np.random.default_rng(0)

    def policy(prefix, one_step):
        steps = rng.choice(["a", "b"], 4 - len(prefix)).tolist()
        if one_step:
            return step(steps[0])
        return end(*steps, RIGHT if rng.random() < success else WRONG)

    values = []
    for seed in range(400):
        nodes, _ = drive(policy, seed=seed, max_depth=3)
        values.append(nodes[0].value / nodes[0].visits)
    assert abs(np.mean(values) - success) < 3 * np.std(values) / len(values) ** 0.5


def test_a_truncated_continuation_fails_and_its_cut_step_is_no_node():
    """A fragment was once a node, and a right answer before the limit a success."""
    policy = scripted({(): [step("a")]}, {("a",): [cut("b", "c", RIGHT)]})
    nodes, _ = drive(policy, rollouts=1)
    assert columns(nodes, "step", "visits", "value") == [("", 1, 0), ("a", 1, 0), ("b", 1, 0),
                                                         ("c", 1, 0)]
    assert nodes[-1].reward == 0


def test_a_search_without_a_usable_step_uses_all_rollouts():
    """Each expansion ran into the limit: the search closed after 1 of 16 rollouts, with value 0,
    though the policy solves half of what it may complete."""
    nodes, asked = drive(lambda prefix, one_step: cut("endless"))
    assert columns(nodes, "step", "visits") == [("", 16)]
    assert [one_step for _, one_step, _ in asked] == [True] + [False] * 16
    nodes, asked = drive(scripted({(): [cut("endless")]}, {(): [cut("endless"), end(RIGHT)]}))
    assert columns(nodes, "step", "visits", "value") == [("", 16, 15), (RIGHT, 15, 15)]
    assert len(asked) == 3


def test_a_step_may_end_one_solution_and_go_on_in_another():
    """The text ends behind "b" in one sample, another step follows in the next. Merged, the way on
    hung below an end, was chosen again though it had ended, and was lost to the trees."""
    next_steps = {(): [step("a")], ("a", "b"): [end(RIGHT)]}
    continuations = {("a", "b"): [end(RIGHT)]}
    first_ends = scripted(next_steps | {("a",): [end("b")]},
                          continuations | {("a",): [end("b", RIGHT)]})
    first_goes_on = scripted(next_steps | {("a",): [step("b")]},
                             continuations | {("a",): [end("b"), end("b", RIGHT)]})
    for policy in (first_ends, first_goes_on):
        nodes, _ = drive(policy, rollouts=6)
        assert not any(nodes[at.parent].terminal for at in nodes[1:])
        [found] = tree.build([mcts.to_row(PROBLEM, nodes, {})])
        assert found.steps == ["", "a", "b"]
        solved = [at.value for at in nodes if at.step == RIGHT]
        assert nodes[0].value == sum(solved) > 0


ANNOUNCED = [
    ["3+4=7", "Check: 7-4=3.", "The answer is:", "\\[ \\boxed{7} \\]"],
    ["3+4=7", "The answer is:", "\\[ \\boxed{7} \\]"],
    ["4+3=7", "**Final Answer:**", "\\[ \\boxed{7} \\]"],
]
HEADING = [
    ["#### Step 1: add", "3+4=7", "The answer is \\boxed{7}."],
    ["First, add.", "3+4=7", "The answer is \\boxed{7}."],
]
MENTIONED = [
    ["Add: the answer is the sum.", "3+4=7", "The answer is \\boxed{7}."],
    ["First, add.", "3+4=7", "The answer is \\boxed{7}."],
]


def always_right(solutions, rng):
    """A policy that goes on as one of the solutions does."""
    def policy(prefix, one_step):
        fitting = [steps for steps in solutions if tuple(steps[:len(prefix)]) == prefix]
        steps = fitting[rng.integers(len(fitting))][len(prefix):]
        if one_step and len(steps) > 1:
            return step(steps[0])
        return end(*steps)
    return policy


def is_seven(text):
    return evaluate.is_correct(text, "7", strict=True)


@pytest.mark.parametrize("solutions", [ANNOUNCED, HEADING, MENTIONED])
def test_a_teacher_that_is_always_right_scores_100_percent(solutions):
    """A marker without an answer behind it was taken for the end: the teacher scored 76 to 90 %,
    and solutions that stop before their answer were learned by heart."""
    for seed in range(30):
        policy = always_right(solutions, np.random.default_rng(seed))
        nodes, _ = drive(policy, is_seven, seed)
        assert nodes[0].value == nodes[0].visits
        for k, at in enumerate(nodes):
            if at.terminal:
                assert is_seven(end(*steps_to(nodes, k))[0])


def test_what_follows_an_answer_is_kept():
    """The reward was for all that was written, and the solution that was learned by heart stopped
    at its first answer."""
    policy = scripted({(): [step("3+4=7")]},
                      {("3+4=7",): [end("The answer is 8.", "No, the answer is 7.")]})
    nodes, _ = drive(policy, is_seven, rollouts=1)
    assert columns(nodes[1:], "step", "rest", "value") == [
        ("3+4=7", "", 1), ("The answer is 8.", "No, the answer is 7.", 1)]
    assert nodes[2].terminal


# ---- The command with a tiny model ---------------------------------------------------------------
def third_right(text, problem):
    """In place of the grader: a third of what the tiny model says is right."""
    return crc32((text + problem["answer"]).encode()) % 3 == 0


def write_problems(path, *more):
    """Nine problems in the tiny model's words, and whatever else a test wants."""
    rows = []
    for k in range(9):
        question = f"Ann has {k} pens ." + " How many ?" * (k % 4)
        rows.append({"id": f"p{k}", "question": question, "answer": str(k)})
    tree.write_jsonl(path, [*rows, *more])


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """The folder of a random model whose solutions end, branch and are cut often."""
    folder = str(tmp_path_factory.mktemp("tiny") / "model")
    tiny_folder(folder)
    return folder


@pytest.fixture
def place(tmp_path, tiny_model):
    """A folder with problems and the model, for each test its own."""
    write_problems(f"{tmp_path}/data.jsonl")
    os.symlink(tiny_model, tmp_path / "model")
    return str(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model):
    """The lines of a run that nothing stopped."""
    folder = str(tmp_path_factory.mktemp("whole"))
    write_problems(f"{folder}/data.jsonl")
    os.symlink(tiny_model, f"{folder}/model")
    return run(folder, "out")


def flags(place, out, *more):
    return [*f"--model {place}/model --data {place}/data.jsonl --out {place}/{out}".split(),
            *"--rollouts 8 --max_depth 3 --branch 3 --max_new_tokens 20".split(), *more]


def run(place, out, *more, grader=third_right):
    """The command in this process. Returns the lines of its output file."""
    with patch.object(sys, "argv", ["mcts.py", *flags(place, out, *more)]), \
            patch.object(mcts, "is_solved", grader):
        mcts.main()
    return read(f"{place}/{out}").decode().splitlines()


def read(path):
    with open(path, "rb") as file:
        return file.read()


def test_side_by_side_is_node_for_node_alone(place):
    """Pooling changed a search: a seed by place in the batch, a completion given to its neighbour,
    an answer graded against the last problem's."""
    alone = run(place, "alone", "--parallel", "1", "--batch_size", "1", "--limit", "6")
    searches = [json.loads(line)["nodes"] for line in alone]
    visits = sum(nodes[0]["visits"] for nodes in searches)
    value = sum(nodes[0]["value"] for nodes in searches)
    assert len(searches) == 6
    assert sum(map(len, searches)) > 40
    assert 0.1 < value / visits < 0.9
    together = run(place, "together", "--limit", "6")
    assert sorted(together) == sorted(alone)
    in_turns = run(place, "in_turns", "--parallel", "4", "--batch_size", "5", "--limit", "6")
    assert sorted(in_turns) == sorted(alone)
    other = run(place, "other", "--seed", "1", "--limit", "1")
    assert json.loads(other[0])["nodes"] != searches[0]


def test_no_two_draws_share_their_randomness(place):
    """numpy pads a seed with zeros: (seed, problem) for the selection and (seed, problem, 0) for a
    completion were one stream."""
    states = []
    search = mcts.search
    add = evaluate.Decoder.add

    def note(rng):
        states.append(rng.bit_generator.state["state"]["state"])

    def spy_search(prompt_ids, encode_step, grade, rng, args):
        note(rng)
        return search(prompt_ids, encode_step, grade, rng, args)

    def spy_add(decoder, completion):
        note(tree.rng(*completion.seed))
        add(decoder, completion)

    with patch.object(mcts, "search", spy_search), patch.object(evaluate.Decoder, "add", spy_add):
        run(place, "out", "--limit", "3")
    assert len(set(states)) == len(states) > 30


def test_a_reward_may_read_a_field_of_the_problem(place):
    """A fork's reward wants more than the answer: fields were dropped on the way to it, and on the
    way to the output file."""
    problem = {"id": "mine", "question": "Ann has 1 pen .", "answer": "1", "steps": 2, "bonus": 0.5}
    tree.write_jsonl(f"{place}/data.jsonl", [problem])
    [line] = run(place, "out", grader=lambda text, problem: problem["bonus"])
    search = json.loads(line)
    assert {at["reward"] for at in search["nodes"]} == {None, 0.0, 0.5}
    assert problem.items() <= search.items()


def test_it_says_what_it_took_and_what_has_no_prefix(place, capsys):
    """Finished searches were taken from the file without a word; roots alone trained as trees."""
    sampled = []
    add = evaluate.Decoder.add

    def note(decoder, completion):
        sampled.append(completion)
        add(decoder, completion)

    with patch.object(evaluate.Decoder, "add", note):
        run(place, "out", "--limit", "5")
    tokens = sum(len(completion.ids) for completion in sampled)
    assert f"{tokens / 5:.0f} tokens generated a problem" in capsys.readouterr().out
    run(place, "out")
    said = capsys.readouterr().out
    assert "5 of 9 problems are taken from" in said
    assert re.search("9 searches in .*, [0-3] of them without any prefix", said)
    searches = [json.loads(line)["nodes"] for line in run(place, "short", "--max_new_tokens", "1")]
    roots_alone = [nodes[0] for nodes in searches if len(nodes) == 1]
    barren = 0
    for nodes in searches:
        barren += all(at["terminal"] or at["visits"] == 0 for at in nodes[1:])
    assert roots_alone and all(root["visits"] == 8 for root in roots_alone)
    assert f" {barren} of them without any prefix" in capsys.readouterr().out


# ---- One file, one kind of search ----------------------------------------------------------------
def test_a_restart_does_what_is_missing_and_no_more(place, whole):
    """Killed within a line: the torn search was kept, lost, or done twice, or the whole ones were
    done again."""
    text = ("\n".join(whole) + "\n").encode()
    for size in (len(whole[0]) + 9, len(text) - 1, len(text)):
        with open(f"{place}/killed", "wb") as file:
            file.write(text[:size])
        check_restart(place, "killed", whole)


def check_restart(place, out, whole):
    """Run again what was stopped. Whole lines stay, what is missing comes. Returns what stayed."""
    kept = read(f"{place}/{out}").decode().split("\n")[:-1]
    again = run(place, out)
    assert again[:len(kept)] == kept
    assert sorted(again) == sorted(whole)
    return kept


def refusal(place, out, *more):
    """What the command says that refuses an output file, which it must leave as it is."""
    before = read(f"{place}/{out}")
    said = None
    try:
        run(place, out, *more)
    except InputError as error:  # pytest.raises would keep the lock with the traceback
        said = str(error)
    assert said is not None and read(f"{place}/{out}") == before
    return said


def test_other_settings_are_another_file(place):
    """Two kinds of search were mixed in one file. Settings that differ late looked alike in the
    message, which therefore names what differs."""
    long = "Say it in words of one syllable, " * 9
    run(place, "out", "--limit", "2", "--instruction", long)
    for name, value in (("rollouts", 5), ("temperature", 0.9), ("seed", 1), ("branch", 4)):
        said = refusal(place, "out", f"--{name}", str(value), "--instruction", long)
        assert name in said and str(value) in said
    assert "its prompt is" in refusal(place, "out", "--instruction", long + "7")
    assert "its prompt is" in refusal(place, "out")


def test_an_instruction_stands_behind_the_question(place):
    """A base model could not be told to mark its answer."""
    prompts = []
    add = evaluate.Decoder.add

    def spy(decoder, completion):
        prompts.append(decoder.tokenizer.decode(completion.prompt))
        add(decoder, completion)

    with patch.object(evaluate.Decoder, "add", spy):
        run(place, "out", "--limit", "1", "--instruction", "The answer is 7")
    assert prompts and all("The answer is 7" in prompt for prompt in prompts)


def test_a_teacher_that_was_trained_further_is_another(place):
    """The model was known by its folder's name: its searches went on with other weights."""
    run(place, "out", "--limit", "2")
    os.rename(f"{place}/model", f"{place}/moved")
    os.symlink(os.path.realpath(f"{place}/moved"), f"{place}/model")
    assert len(run(place, "out", "--limit", "3", "--model", f"{place}/moved")) == 3
    os.remove(f"{place}/model")
    tiny_folder(f"{place}/model")
    model = AutoModelForCausalLM.from_pretrained(f"{place}/model")
    with torch.no_grad():
        model.get_output_embeddings().weight[5, 5] += 0.5
    model.save_pretrained(f"{place}/model")
    assert "weights" in refusal(place, "out")


def test_the_same_problems_under_another_name_go_on(place):
    """`--data ./data.jsonl` was refused after `--data data.jsonl`."""
    run(place, "out", "--limit", "2")
    os.rename(f"{place}/data.jsonl", f"{place}/renamed.jsonl")
    assert len(run(place, "out", "--data", f"{place}/renamed.jsonl")) == 9


@pytest.mark.parametrize("field", ["question", "answer"])
def test_another_problem_under_an_old_id_is_refused(place, field):
    """A gold that was corrected, or a question: the old search was kept."""
    run(place, "out", "--limit", "3")
    rows = [json.loads(line) for line in read(f"{place}/data.jsonl").splitlines()]
    rows[1][field] = "8"
    tree.write_jsonl(f"{place}/data.jsonl", rows)
    said = refusal(place, "out")
    assert "p1" in said and "\n" not in said


@pytest.mark.parametrize("text", ['{"id": "p0", "question": "q", "answer": "1"}\n{"id": "p',
                                  "a letter\nto a friend", '{"a": 1}\n{"torn'])
def test_a_file_of_somebody_else_is_left_alone(place, text):
    """Its last line was cut off before the file was refused."""
    with open(f"{place}/out", "w") as file:
        file.write(text)
    refusal(place, "out")


def test_two_runs_do_not_write_one_file(place):
    """Two starts within the seconds of loading searched everything twice. The lock is held while
    completions are sampled, and a second run ends before its model is loaded."""
    add = evaluate.Decoder.add
    refused = []

    def meanwhile(decoder, completion):
        with pytest.raises(InputError, match="another process"), \
                patch.object(evaluate, "load", side_effect=AssertionError("a model was loaded")):
            run(place, "out")
        refused.append(True)
        add(decoder, completion)

    with patch.object(evaluate.Decoder, "add", meanwhile):
        run(place, "out", "--limit", "1")
    assert refused


# ---- What stops it -------------------------------------------------------------------------------
def child(argv, log):
    sys.stdout = open(log, "w", buffering=1)
    sys.stderr = sys.stdout
    sys.argv = ["mcts.py", *argv]
    mcts.is_solved = third_right
    tree.run_command(mcts.main)


def start(place, out, *more):
    """The command in a process of its own, forked: it need not import torch again."""
    arguments = (flags(place, out, *more), f"{place}/log")
    process = multiprocessing.get_context("fork").Process(target=child, args=arguments)
    process.start()
    return process


@pytest.mark.filterwarnings("ignore:.*multi-threaded")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_at_any_moment_it_loses_nothing(place, whole, number):
    """A finished search was lost, a torn one kept, one done twice, or a traceback shown."""
    size = random.Random(number).uniform(1, sum(map(len, whole)))
    process = start(place, "out", "--parallel", "2")
    while process.is_alive():
        if os.path.exists(f"{place}/out") and os.path.getsize(f"{place}/out") >= size:
            break
        time.sleep(0.001)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode in (0, 130, -number)
    assert b"Traceback" not in read(f"{place}/log")
    check_restart(place, "out", whole)


@pytest.mark.filterwarnings("ignore:.*multi-threaded")
def test_a_full_disk_is_one_sentence(place, whole):
    """And what was there before is searched no second time."""
    half = sum(map(len, whole)) // 2
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (half, before[1]))
    process = start(place, "full")
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    process.join(60)
    assert process.exitcode == 2
    said = read(f"{place}/log").decode()
    assert re.search(r"\nmcts\.py: [^\n]*too large[^\n]*\n$", said)
    kept = check_restart(place, "full", whole)
    assert 0 < len(kept) < 9


BAD_FLAGS = """
--limit -1 | --limit x | --seed -1 | --temperature nan | --temperature 0 | --temperature inf
--c_uct nan | --c_uct -1 | --rollouts 0 | --max_depth 0 | --branch 0 | --parallel 0
--batch_size -3 | --max_new_tokens 0 | --max_new_tokens 1.5 | --chat_template_kwargs no
--data FOLDER | --data FOLDER/none | --data FOLDER/empty | --data FOLDER/torn | --data FOLDER/trace
--out FOLDER | --out FOLDER/ | --out /dev/full | --out FOLDER/torn/below
--lim 3 | --nothing | --skip_bad | --model FOLDER/none
"""


@pytest.mark.parametrize("more", re.split(r" \| |\n", BAD_FLAGS.strip()))
def test_bad_flags_and_files_are_one_sentence_before_any_model_is_loaded(place, capsys, more):
    """A batch of 0 was a traceback after minutes of loading; a limit of -1 searched one problem."""
    for name, text in (("empty", ""), ("torn", '{"id": "p'), ("trace", '{"id": "p"}\n')):
        with open(f"{place}/{name}", "w") as file:
            file.write(text)
    more = more.replace("FOLDER", place).split()
    argv = ["mcts.py", *flags(place, "out", *more)]
    loading = AssertionError("a model was loaded")
    with patch.object(AutoModelForCausalLM, "from_pretrained", side_effect=loading):
        with patch.object(sys, "argv", argv), pytest.raises(SystemExit) as exit:
            tree.run_command(mcts.main)
    said = capsys.readouterr().err
    assert exit.value.code == 2
    assert re.fullmatch(r"mcts\.py: [^\n]+\n", said)
    assert str(loading) not in said


def test_a_question_beyond_the_context(place):
    """It was completed all the same, in garbage, or took all memory."""
    write_problems(f"{place}/data.jsonl", {"id": "x", "question": "Ann has " * 400, "answer": "1"})
    with pytest.raises(InputError, match="tokens.*256"):
        run(place, "out")
    assert not os.path.exists(f"{place}/out")


def test_learned_positions_are_counted_before_the_search(place):
    """A prefix and its completion went beyond the positions of GPT-2: an IndexError, or on a GPU a
    failure of everything. The longest prefix has max_depth sampled steps."""
    tokenizer = AutoTokenizer.from_pretrained(f"{place}/model")
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64,
                        bos_token_id=3, eos_token_id=3)
    GPT2LMHeadModel(config).save_pretrained(f"{place}/gpt2")
    tokenizer.save_pretrained(f"{place}/gpt2")
    gpt2 = ["--limit", "2", "--model", f"{place}/gpt2"]
    with pytest.raises(InputError, match="tokens.*64"):
        run(place, "out", *gpt2)
    assert len(run(place, "out", *gpt2, "--max_new_tokens", "8")) == 2


def test_a_policy_that_has_diverged_ends_in_a_sentence(place):
    """Log-probs that were not finite were searched on, with garbage."""
    os.remove(f"{place}/model")
    tiny_folder(f"{place}/model")
    model = AutoModelForCausalLM.from_pretrained(f"{place}/model")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(3e38)
    model.save_pretrained(f"{place}/model")
    with pytest.raises(InputError, match="finite"):
        run(place, "out")
    assert not os.path.exists(f"{place}/out")


def test_two_ranks_search_what_one_would(place, whole):
    """With torchrun, after a kill: a problem searched by both ranks or by none, two lines in one, a
    torn line cut off while another rank wrote."""
    with open(f"{place}/ranks", "w") as file:
        file.write(whole[4] + "\n" + whole[2][:30])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               __file__, *flags(place, "ranks")]
    here = os.path.dirname(os.path.abspath(mcts.__file__))
    environment = {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert sorted(read(f"{place}/ranks").decode().splitlines()) == sorted(whole)
    assert done.stdout.count("9 searches in") == 1


if __name__ == "__main__":  # the command with that grader, for the ranks
    mcts.is_solved = third_right
    tree.run_command(mcts.main)
