"""The search with a fake policy, by counting; then with a tiny random model: side by side, restarted, on two ranks."""
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import zlib
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import evaluate
import mcts
import tree
from mcts import Node
from tree import ANSWER_MARKER, InputError, read_trees

RIGHT, WRONG = "The answer is 3.", "The answer is 4."
right = lambda text, answer, strict=False: zlib.crc32((text + answer).encode()) % 3 == 0  # a grader that finds a third right
text_path = lambda nodes, k: text_path(nodes, nodes[k].parent) + (nodes[k].step,) if k else ()
flags = lambda folder, name, *more: [*f"--model {folder}/model --data {folder}/data.jsonl --out {folder}/{name} --rollouts 8 --max_depth 3".split(),
                                     *"--branch 3 --max_new_tokens 20".split(), *more]


def drive(policy, seed=0, **how):
    """Search with policy(steps so far, one step only?) -> (text, ended). A step's "ids" are its text.
    Returns the nodes and what was asked: (steps so far, one step only?, replies)."""
    args = SimpleNamespace(**{"rollouts": 16, "max_depth": 5, "branch": 5, "c_uct": 2.0, **how})
    searching = mcts.search(["Q"], lambda step: [step], lambda text: float(text.endswith(RIGHT)), np.random.default_rng(seed), args)
    asked, replies = [], None
    try:
        while True:
            (question, *steps), one, count = searching.send(replies)
            assert question == "Q" and count == (args.branch if one else 1)
            replies = [policy(tuple(steps), one) for _ in range(count)]
            asked.append((tuple(steps), one, replies))
    except StopIteration as end:
        return end.value, asked


def scripted(steps, whole):
    """A policy by dictionary: the next steps and the continuations of each prefix, given in turn, again and again."""
    turns = {(prefix, one): itertools.cycle(choices) for table, one in ((steps, True), (whole, False)) for prefix, choices in table.items()}
    return lambda prefix, one: next(turns[prefix, one])


def chatter(rng):
    """A policy that ends, goes on, or is cut by the limit anywhere, with so few different steps that they meet all the time."""
    def policy(prefix, one):
        steps = []
        while not (one and steps):
            luck = rng.random()
            if luck < 0.1:
                return "\n\n".join(steps + ["a fragm"][:rng.integers(2)]), False
            if luck < 0.3:
                return "\n\n".join(steps + [str(rng.choice([RIGHT, WRONG, "a", ""]))]), True
            steps.append(str(rng.choice(["a", "b"])) if luck < 0.95 else WRONG)
        return steps[0] + "\n\n", False
    return policy


@pytest.mark.parametrize("seed", range(100))
def test_visits_are_rollouts_and_value_is_their_reward(seed):
    """Counted again from what was asked and answered: a visit lost or doubled, a reward given to another solution, a node below an end."""
    rng = np.random.default_rng(seed)
    depth, rollouts = int(rng.integers(1, 6)), int(rng.integers(1, 60))
    nodes, asked = drive(chatter(rng), seed, rollouts=rollouts, max_depth=depth, branch=int(rng.integers(1, 6)))
    below = [[child for child in nodes if child.parent == k] for k in range(len(nodes))]
    counted = {}  # by text: what the continuations alone account for
    for prefix, one, replies in asked:
        if not one:
            [(text, end)], path = replies, prefix
            steps = [step for step in text.split("\n\n") if step]
            for step in steps if end else steps[:-1]:
                if len(path) == depth or path and ANSWER_MARKER.search(path[-1]):
                    break
                path += (step,)
            for k in range(len(path) + 1):
                counted[path[:k]] = np.add(counted.get(path[:k], (0, 0)), (1, end and (text or prefix[-1]).endswith(RIGHT)))
    found = {}
    for k, at in enumerate(nodes):
        found[text_path(nodes, k)] = np.add(found.get(text_path(nodes, k), (0, 0)), (at.visits, at.value))
        assert at.depth == len(text_path(nodes, k)) <= depth and at.parent < k and at.visits >= sum(child.visits for child in below[k])
        assert len({(child.step, child.terminal) for child in below[k]}) == len(below[k])  # equal steps are merged
        if at.terminal:
            assert not below[k] and at.reward is not None
        elif at.depth < depth:
            assert at.value == sum(child.value for child in below[k])  # what is cut has no reward
    assert nodes[0].visits <= rollouts and set(counted) <= set(found)
    for text, figures in found.items():  # the other rollouts: of a solution that ended with its first sampled step, once each, and of dead ends
        n, value = figures - counted.get(text, (0, 0))
        assert 0 <= value <= n
        if text and text[-1] in (RIGHT, WRONG):
            assert n <= 1 and value == n * (text[-1] == RIGHT)
    whole = [prefix for prefix, one, _ in asked if one]
    assert len(set(whole)) == len(whole) and all(len(prefix) < depth for prefix in whole)  # nothing is expanded twice
    closed = lambda k: nodes[k].terminal or nodes[k].depth == depth or text_path(nodes, k) in whole and all(closed(j) for j, at in enumerate(nodes) if at.parent == k)
    assert nodes[0].visits == rollouts or closed(0)


def test_uct_by_hand():
    """ln 10 = 2.3026. c 2: 5/6 + 2 sqrt(ln 10 / 6) = 2.072 < 1/3 + 2 sqrt(ln 10 / 3) = 2.086. c 1: 1.453 > 1.209. The closed one would win both."""
    nodes = [Node(-1, "", [], 0, visits=10, value=6, expanded=True, children=[1, 2, 3]), Node(0, "a", [], 1, visits=6, value=5.0),
             Node(0, "b", [], 1, visits=3, value=1.0), Node(0, "c", [], 1, visits=1, value=1.0, closed=True)]
    assert mcts.select(nodes, 2.0, np.random.default_rng(0)) == 2 and mcts.select(nodes, 1.0, np.random.default_rng(0)) == 1
    nodes += [Node(2, "d", [], 2, visits=2, value=1.5), Node(2, "e", [], 2, visits=1)]
    nodes[2].expanded, nodes[2].children = True, [4, 5]  # below b: 3/4 + 2 sqrt(ln 3 / 2) = 2.232 > 2 sqrt(ln 3) = 2.096
    assert mcts.select(nodes, 2.0, np.random.default_rng(0)) == 4  # with the root's ln 10 it would be the other


def test_unvisited_children_come_first_at_random():
    """Whatever the value of the visited: UCT of a child without visits is infinite, and ties are no reason to take the first."""
    nodes = [Node(-1, "", [], 0, visits=5, expanded=True, children=[1, 2, 3, 4]), Node(0, "a", [], 1, visits=5, value=5.0),
             Node(0, "b", [], 1), Node(0, "c", [], 1), Node(0, "d", [], 1, closed=True)]
    chosen = [mcts.select(nodes, 0.0, np.random.default_rng(seed)) for seed in range(100)]
    assert set(chosen) == {2, 3} and 25 < chosen.count(2) < 75


def test_expansion_merges_equal_steps_and_drops_what_is_no_step():
    """Spaces made two nodes of one step; a step cut by the limit became a node; text after the blank line became part of it."""
    policy = scripted({(): [("a\n\n", False), (" a \n \nb", False), ("\n\na\n\n", False), ("\n\ncut", False), ("", True), ("c d", True), (RIGHT + "\n\n", False)]},
                      {("a",): [("b\n\n" + RIGHT, True)]})
    nodes, asked = drive(policy, rollouts=3, branch=7)
    assert asked[0][:2] == ((), True) and len(asked) == 2  # an end needs no continuation
    assert [(at.step, at.terminal, at.reward, at.visits, at.value) for at in nodes if at.depth == 1] == [
        ("a", False, None, 1, 1.0), ("c d", True, 0.0, 1, 0.0), (RIGHT, True, 1.0, 1, 1.0)]


def test_below_the_last_level_the_rollout_runs_to_its_end():
    """At depth 5 the rollout was once cut, so that long solutions could not succeed; or its further steps became nodes."""
    policy = scripted({(): [("a\n\n", False)], ("a",): [("b\n\n", False)]}, {("a",): [("b\n\nc\n\n" + RIGHT, True)]})
    nodes, asked = drive(policy, max_depth=2)
    assert [(at.step, at.visits, at.value, at.terminal) for at in nodes] == [("", 2, 2.0, False), ("a", 2, 2.0, False), ("b", 2, 2.0, False)]
    row = json.loads(json.dumps(mcts.to_row({"id": "p", "question": "q", "answer": "3"}, nodes, {})))
    assert [(at["reward"], at.get("rest")) for at in row["nodes"]] == [(None, None), (None, None), (1.0, "c\n\n" + RIGHT)]


@pytest.mark.parametrize("depth", [3, 9])
def test_a_small_world_is_searched_once_and_no_more(depth):
    """Eight solutions, a hundred rollouts: ended ones and exhausted subtrees were drawn again and again and filled the statistics."""
    steps = {prefix: [("a\n\n", False), ("b\n\n", False)] for prefix in [(), ("a",), ("b",)]}
    steps |= {(x, y): [(RIGHT, True), (WRONG, True)] for x in "ab" for y in "ab"}
    whole = {(x, y): [(RIGHT, True)] for x in "ab" for y in "ab"} | {(x,): [("a\n\n" + WRONG, True)] for x in "ab"}
    nodes, _ = drive(scripted(steps, whole), rollouts=100, max_depth=depth)
    leaves = [at for at in nodes if at.depth == 3]
    assert nodes[0].visits == 8 == len(leaves) and nodes[0].value == 4 and all(at.visits == 1 and at.closed for at in leaves)


def test_a_truncated_continuation_fails_and_its_cut_step_is_no_node():
    """A fragment was once a node, and a right answer before the limit a success."""
    nodes, _ = drive(scripted({(): [("a\n\n", False)]}, {("a",): [("b\n\nc\n\n" + RIGHT, False)]}), rollouts=1)
    assert [(at.step, at.visits, at.value, at.terminal, at.reward) for at in nodes] == [
        ("", 1, 0.0, False, None), ("a", 1, 0.0, False, None), ("b", 1, 0.0, False, None), ("c", 1, 0.0, False, 0.0)]
    dead, asked = drive(lambda prefix, one: ("endless", False), rollouts=16)  # a policy that never closes a step
    assert len(dead) == 1 and dead[0].value == 0 and 1 <= dead[0].visits <= 16 and len(asked) <= 32


def test_a_step_may_end_one_solution_and_go_on_in_another(tmp_path):
    """EOS after "b" in one sample, another step in the next: merged, the way on hung below an end, was chosen again though ended, and was lost to the trees."""
    steps, whole = {(): [("a\n\n", False)], ("a", "b"): [(RIGHT, True)]}, {("a", "b"): [(RIGHT, True)]}
    first = scripted(steps | {("a",): [("b", True)]}, whole | {("a",): [("b\n\n" + RIGHT, True)]})
    other = scripted(steps | {("a",): [("b\n\n", False)]}, whole | {("a",): [("b", True), ("b\n\n" + RIGHT, True)]})
    for policy in (first, other):
        nodes, _ = drive(policy, rollouts=6)
        assert not any(nodes[at.parent].terminal for at in nodes[1:])
        mcts.append(path := f"{tmp_path}/{id(policy)}", mcts.to_row({"id": "p", "question": "q", "answer": "3"}, nodes, {}))
        assert ["", "a", "b"] == read_trees(path)[0].steps  # "a, b" is a prefix of a solution
        assert nodes[0].value == sum(at.value for at in nodes if at.step == RIGHT) > 0


def make_model(folder):
    """A tiny random Llama of eight words, saved: its solutions end, branch and are cut often. Beside it nine problems."""
    words = Tokenizer(models.WordLevel({word: k for k, word in enumerate(["<eos>", "<unk>", "\n\n", "\n\n\n", *"abQ "])}, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Split(Regex("\n+|."), "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>").save_pretrained(f"{folder}/model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.3,
                                 eos_token_id=0, bos_token_id=None)).save_pretrained(f"{folder}/model")
    rows = ({"id": f"p{k}", "question": "Q" + "ab Q"[k % 4] * (3 * k), "answer": str(k)} for k in range(9))
    open(f"{folder}/data.jsonl", "w").writelines(json.dumps(row) + "\n" for row in rows)


def run(folder, name, *more, grader=right):
    """The command in this process; returns the lines of its output."""
    with patch.object(sys, "argv", ["mcts.py", *flags(folder, name, *more)]), patch.object(evaluate, "is_correct", grader):
        mcts.main()
    return open(f"{folder}/{name}", encoding="utf-8").read().splitlines()


def test_side_by_side_is_node_for_node_alone(tmp_path):
    """Pooling changed a search: a seed by place in the batch, a completion given to its neighbour, an answer graded against the last problem's."""
    make_model(tmp_path)
    alone = run(tmp_path, "alone", "--parallel", "1", "--batch_size", "1")
    roots, nodes = zip(*((row["nodes"][0], len(row["nodes"])) for row in map(json.loads, alone)))
    assert len(alone) == 9 and sum(nodes) > 100 and 0.1 < sum(root["value"] for root in roots) / sum(root["visits"] for root in roots) < 0.9
    for how in (["--parallel", "7"], ["--parallel", "4", "--batch_size", "5"]):
        assert sorted(run(tmp_path, "-".join(how), *how)) == sorted(alone)
    assert run(tmp_path, "other", "--seed", "1", "--limit", "3") != alone[:3]


def test_no_two_draws_share_their_randomness(tmp_path):
    """numpy pads a seed with zeros: (seed, problem) for the selection and (seed, problem, 0) for a completion were one stream."""
    make_model(tmp_path)
    seen, search, generate = [], mcts.search, evaluate.generate
    note = lambda rng: seen.append(rng.bit_generator.state["state"]["state"])
    spy_search = lambda *given: (note(given[3]), search(*given))[1]
    spy_generate = lambda *given: ([note(np.random.default_rng(seed)) for seed in given[5]], generate(*given))[1]
    with patch.object(mcts, "search", spy_search), patch.object(evaluate, "generate", spy_generate):
        run(tmp_path, "out", "--limit", "3")
    assert len(seen) > 30 and len(set(seen)) == len(seen)


def test_a_restart_does_what_is_missing_and_no_more(tmp_path):
    """Killed within a line: the torn search was kept, lost, or done twice, or the whole ones were done again."""
    make_model(tmp_path)
    whole = run(tmp_path, "whole", "--parallel", "4")
    raw, killed = ("\n".join(whole) + "\n").encode(), f"{tmp_path}/killed"
    for cut in (10, len(whole[0]), len(raw) // 2, len(raw) - 1, len(raw)):
        open(killed, "wb").write(raw[:cut])
        again, kept = run(tmp_path, "killed", "--parallel", "3"), raw[:cut].count(b"\n")
        assert again[:kept] == whole[:kept] and sorted(again) == sorted(whole)
    for other in (["--rollouts", "5"], ["--temperature", "0.9"], ["--seed", "1"]):  # one file, one way of searching
        with pytest.raises(InputError, match="settings"):
            run(tmp_path, "killed", *other)
    assert sorted(open(killed).read().splitlines()) == sorted(whole)
    open(killed, "ab").write(b'{"id": "p')  # another rank is killed within a line while this one goes on
    mcts.append(killed, {"id": "next"})
    assert open(killed).read().splitlines() == again + ['{"id": "next"}']


def start(*more, **how):
    """The command as a process of its own."""
    return subprocess.Popen([sys.executable, mcts.__file__, *map(str, more)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, **how)


def test_stopped_at_any_moment_it_loses_nothing(tmp_path):
    """Killed, asked to end, or interrupted: a finished search was lost, a torn one kept, one done twice, or a traceback shown. 20 moments with TREE_OPO_SLOW=1."""
    make_model(tmp_path)
    whole = run(tmp_path, "whole", grader=evaluate.is_correct)
    for moment in range(20 if os.environ.get("TREE_OPO_SLOW") else 3):
        rng, number, path = random.Random(moment), (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[moment % 3], f"{tmp_path}/{moment}"
        process, size = start(*flags(tmp_path, moment, "--parallel", "2")), rng.random() * sum(map(len, whole))
        time.sleep(rng.uniform(0.4, 3) * (moment % 4 == 3))  # a quarter of them while it starts
        while moment % 4 < 3 and process.poll() is None and not (os.path.exists(path) and os.path.getsize(path) >= size):
            time.sleep(0.001)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
        assert process.returncode in (0, -9 if number == signal.SIGKILL else 128 + number) and "Traceback" not in said, said
        assert process.returncode < 128 or said.endswith(f"\nmcts.py: stopped by {number.name}; what was finished is kept.\n")
        kept = open(path, encoding="utf-8").read().split("\n")[:-1] if os.path.exists(path) else []
        again = run(tmp_path, moment, grader=evaluate.is_correct)
        assert again[:len(kept)] == kept and sorted(again) == sorted(whole)


def test_a_full_disk_is_one_sentence(tmp_path):
    """And what was there before is searched no second time."""
    make_model(tmp_path)
    whole = run(tmp_path, "whole", grader=evaluate.is_correct)
    half = sum(map(len, whole)) // 2
    process = start(*flags(tmp_path, "full"), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (half, half)))
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and re.search(r"\nmcts\.py: [^\n]+ intact\n$", said) and "Traceback" not in said, said
    kept = open(f"{tmp_path}/full", encoding="utf-8").read().split("\n")[:-1]
    again = run(tmp_path, "full", grader=evaluate.is_correct)
    assert again[:len(kept)] == kept and 0 < len(kept) < 9 and sorted(again) == sorted(whole)


BAD_FLAGS = ["--limit -1", "--limit x", "--seed -1", "--temperature nan", "--temperature 0", "--temperature inf", "--c_uct nan", "--c_uct -1", "--rollouts 0",
             "--max_depth 0", "--branch 0", "--parallel 0", "--batch_size -3", "--max_new_tokens 0", "--max_new_tokens 1.5", "--data FOLDER", "--data FOLDER/none",
             "--data FOLDER/empty", "--data FOLDER/torn", "--data FOLDER/trace", "--out FOLDER", "--out /dev/full", "--out FOLDER/torn/below", "--lim 3", "--nothing", "--model FOLDER/none"]


@pytest.mark.parametrize("more", BAD_FLAGS)
def test_bad_flags_and_files_are_one_sentence_before_any_model_is_loaded(tmp_path, capsys, more):
    """A batch of 0 was a traceback after minutes of loading; a limit of -1 searched one problem."""
    for name, text in (("empty", ""), ("torn", '{"id": "p'), ("trace", '{"id": "p", "steps": ["a"]}\n'), ("data.jsonl", '{"id": "p", "question": "q", "answer": "1"}\n')):
        open(f"{tmp_path}/{name}", "w").write(text)
    loaded = AssertionError("a model was loaded")
    with patch.object(sys, "argv", ["mcts.py", *flags(tmp_path, "out", *more.replace("FOLDER", str(tmp_path)).split())]), pytest.raises(SystemExit) as end, \
            patch.object(tree, "leave_on_signals"), patch.object(evaluate.AutoModelForCausalLM, "from_pretrained", side_effect=loaded):
        mcts.run_command(mcts.main)
    said = capsys.readouterr().err
    assert end.value.code == 2 and re.fullmatch(r"mcts\.py: [^\n]+\n", said) and str(loaded) not in said, said


def test_a_question_beyond_the_context(tmp_path, capsys):
    """100 kB for a model of 2,048 positions was completed all the same, in garbage, or took all memory; skipped, it is named and the others are searched."""
    make_model(tmp_path)
    open(f"{tmp_path}/data.jsonl", "a").write(json.dumps({"id": "long", "question": "Qab " * 25_000, "answer": "1"}) + "\n")
    with pytest.raises(InputError, match='"long" has 100000 tokens; expected 1 to 2048'):
        run(tmp_path, "out")
    assert len(run(tmp_path, "out", "--skip_bad")) == 9 and '"long" has 100000 tokens' in capsys.readouterr().err


def test_two_ranks_search_what_one_would(tmp_path):
    """With torchrun, after a kill: a problem searched by both ranks or by none, two lines in one, a torn line cut while another rank wrote."""
    make_model(tmp_path)
    whole = run(tmp_path, "whole")
    open(f"{tmp_path}/ranks", "w").write(whole[4] + "\n" + whole[2][:30])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, *flags(tmp_path, "ranks")]
    paths = {"PYTHONPATH": os.path.dirname(os.path.abspath(mcts.__file__)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(open(f"{tmp_path}/ranks").read().splitlines()) == sorted(whole) and done.stdout.count("9 searches in") == 1


if __name__ == "__main__":  # the command with that grader, for the ranks
    evaluate.is_correct = right
    mcts.run_command(mcts.main)
