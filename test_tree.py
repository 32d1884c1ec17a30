"""Prefix trees against slow and obvious references, and what a user may do wrong. Each test tells
of the bug it guards against."""
import doctest
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tree
from advantage import order_constraints
from tree import InputError, Tree, read_problems, read_trees, sample_group

FINAL = ("The answer is 4.", "So \\boxed{4}", "#### 4", "Final answer: 4")  # these bear the answer
STEPS = ("3 + 4 = 7", "3 + 4 = 8", "twice that is 14", "לכן שבע", "だから七 ≈ 7", *FINAL)
PROBLEM = {"id": "p", "question": "How many?", "answer": "4"}
EXAMPLE = Tree(PROBLEM, steps=["", "a", "b", "c", "d", "e"], parent=[-1, 0, 0, 2, 3, 3],
               visits=[8, 2, 6, 5, 2, 3], value=[4.0, 0.0, 4.0, 4.0, 2.0, 0.0])


def node(parent, step="", visits=1, value=0.0, **more):
    return {"parent": parent, "step": step, "visits": visits, "value": value, **more}


def search(*nodes, **fields):
    return {**PROBLEM, "nodes": list(nodes), **fields}


def trace(*steps, reward=1, **fields):
    return {**PROBLEM, "steps": list(steps), "reward": reward, **fields}


def root_alone(**fields):
    return Tree({**PROBLEM, **fields}, [""], [-1], [1], [0.0])


def write(folder, *lines, name="rows.jsonl"):
    """A file of these lines: objects, text or bytes. Returns its path."""
    path = os.path.join(folder, name)
    with open(path, "wb") as out:
        for line in lines:
            if isinstance(line, dict):
                line = json.dumps(line, ensure_ascii=False)
            if isinstance(line, str):
                line = line.encode()
            out.write(line + b"\n")
    return path


def read(path):
    with open(path, "rb") as file:
        return file.read()


def prefixes(t):
    """The tree as the obvious thing: {(step, step, ...): (visits, value)}."""
    found = {}
    for k in range(len(t.parent)):
        steps = tuple(t.steps[v] for v in t.path(k)[1:])
        found[steps] = (t.visits[k], t.value[k])
    return found


# ---- Building ------------------------------------------------------------------------------------
def random_row(rng):
    """A search or a trace of one of two problems, of few steps, so that many prefixes are equal."""
    name = rng.choice("ab")
    fields = {"id": name, "question": f"{name}?"}
    if rng.random() < 0.4:
        steps = rng.choices(STEPS, k=rng.randint(1, 5))
        return trace(*steps, reward=rng.choice([0, 1, 0.5]), **fields)
    nodes = [node(-1, visits=9, value=4.0)]
    for k in range(1, rng.randint(1, 15)):
        visits = rng.randint(0, 3)
        value = rng.choice([0, visits, visits / 2])
        terminal = rng.random() < 0.2
        nodes.append(node(rng.randrange(k), rng.choice(STEPS), visits, value, terminal=terminal))
    return search(*nodes, **fields)


def reference(rows):
    """{problem: {prefix: (visits, value)}}, by walking from every node to the root."""
    found = {}
    for row in rows:
        nodes = row.get("nodes")
        if nodes is None:
            nodes = [node(-1, "", 1, row["reward"])]
            for k, step in enumerate(row["steps"], 1):
                nodes.append(node(k - 1, step, 1, row["reward"], terminal=k == len(row["steps"])))
        prefix = {-1: ()}  # node -> its steps, None where it is left out
        for k, at in enumerate(nodes):
            above = prefix[at["parent"]]
            is_over = at.get("terminal") or at["visits"] == 0 or at["step"] in FINAL
            if above is None or is_over:
                prefix[k] = None
                continue
            prefix[k] = (*above, at["step"]) if k else ()
            counts = found.setdefault(row["id"], {})
            visits, value = counts.get(prefix[k], (0, 0.0))
            counts[prefix[k]] = (visits + at["visits"], value + at["value"])
    return found


@pytest.mark.parametrize("seed", range(60))
def test_build_is_the_set_of_text_prefixes_with_summed_statistics(tmp_path, seed):
    """A node was merged with the wrong parent, counted twice, or kept below one left out."""
    rng = random.Random(seed)
    rows = [random_row(rng) for _ in range(rng.randint(1, 8))]
    trees = read_trees(write(tmp_path, *rows))
    assert {t.problem["id"]: prefixes(t) for t in trees} == reference(rows)
    assert trees == tree.build(rows)
    for t in trees:
        assert len(prefixes(t)) == len(t.steps)  # each prefix once
        assert t.parent[0] == -1
        assert all(0 <= t.parent[k] < k for k in range(1, len(t.parent)))  # parents come first
        assert t.depth().tolist() == [len(t.path(k)) - 1 for k in range(len(t.parent))]
    out = os.path.join(tmp_path, "out", "trees.jsonl")
    tree.write_trees(out, trees)
    assert read_trees([out]) == trees  # trees of trees are those trees


@pytest.mark.parametrize("steps, kept", [
    (["#### Step 1: add", "3+4=7", "The answer is 7."], 2),
    (["3+4=7", "The answer is:", "\\[ \\boxed{7} \\]"], 2),
    (["3+4=7", "**Final Answer:**", "\\[ \\boxed{7} \\]"], 2),
    (["3+4=7", "The answer is 7.", "Check: 7-4=3."], 1),  # nothing is left to do after the answer
])
def test_a_marker_without_an_answer_is_no_answer(steps, kept):
    """A heading, or an announcement of the answer, cut the prefixes behind it out of the tree."""
    [t] = tree.build([trace(*steps)])
    assert t.steps == ["", *steps[:kept]]


def test_a_search_is_known_by_its_nodes(tmp_path):
    """The project's own problems have a field "steps", their number: such a search was read as a
    trace. Fields of a problem reach the tree and its file, for a reward may read them."""
    row = search(node(-1), node(0, "a"), node(1, "4", reward=1), steps=4, level=None, tests=["x"],
                 settings={"seed": 0})
    path = write(tmp_path, row)
    assert tree.read_solutions(path) == [("How many?", ["a", "4"])]
    [t] = read_trees(path)
    assert t.problem == {**PROBLEM, "steps": 4, "level": None, "tests": ["x"]}
    tree.write_trees(path, [t])
    assert read_trees(path) == [t]


def test_solutions_to_learn_from(tmp_path):
    """What a rollout wrote behind its last node was lost, and the solution stopped before its
    answer. A trace is learnt as it is, right or wrong; of a search only what is right."""
    found = search(
        node(-1, visits=3), node(0, "a", reward=1, rest="So.\n\nThe answer is 4."), node(1, "b"),
        node(2, "It is 4.", reward=1, terminal=True), node(0, "c", reward=0))
    path = write(tmp_path, found, trace("x", "It is 5.", reward=0))
    assert [steps for _, steps in tree.read_solutions(path)] == [
        ["a", "So.\n\nThe answer is 4."], ["a", "b", "It is 4."], ["x", "It is 5."]]
    with pytest.raises(InputError, match="no solution in .* came to a right answer"):
        tree.read_solutions(write(tmp_path, search(node(-1), node(0, "c", reward=0))))


@pytest.mark.parametrize("field", ["question", "answer"])
def test_one_id_for_two_problems_is_refused(tmp_path, field):
    """Trees of another question, or graded by another answer, were merged under the old id."""
    other = trace("a", "b", **{field: "5"})
    with pytest.raises(InputError, match=f'two {field}s have the id "p"'):
        read_trees([write(tmp_path, trace("a", "b")), write(tmp_path, other, name="other")])


def test_160_000_prefixes_and_trees_of_20_000_nodes(tmp_path):
    """Quadratic look-ups, or whole prefixes stored as text, took hours and gigabytes."""
    rows = []
    for i in range(7000):
        nodes = [node((k - 1) // 2, f"step {k}") for k in range(1, 20)]
        rows.append(search(node(-1, visits=20), *nodes, id=f"train-{i}"))
    wide = [node(0, f"step {k}") for k in range(20_000)]
    deep = [node(k, f"step {k}") for k in range(20_000)]
    rows += [search(node(-1), *wide, id="wide"), search(node(-1), *deep, id="deep")]
    trees = read_trees(write(tmp_path, *rows))
    assert sum(len(t.parent) for t in trees[:-2]) == 140_000
    assert trees[-1].depth().max() == 20_000
    start = time.monotonic()
    for t in trees[-2:]:
        t.ids = [[k] for k in range(len(t.parent))]
        for group in ("tree", "trace"):
            for chosen in sample_group(t, 8, group, tree.rng(0)):
                assert t.prefix_ids(chosen)[-1] == chosen
    assert tree.show(trees[-2], 80).count("\n") == 20_000
    assert time.monotonic() - start < 3


# ---- Groups, packing -----------------------------------------------------------------------------
def test_draws_are_those_of_earlier_runs():
    """A run that is resumed, or repeated with a newer version, draws the same."""
    order = [tree.shuffled(place, 5, seed=3) for place in range(10)]
    assert order == [1, 3, 4, 2, 0, 0, 4, 3, 2, 1]
    assert sample_group(EXAMPLE, 4, "tree", tree.rng(0, 1)).tolist() == [4, 5, 2, 1]
    assert sample_group(EXAMPLE, 4, "trace", tree.rng(0, 1)).tolist() == [3, 4, 2, 0]


def test_each_key_has_a_stream_of_its_own():
    """numpy pads a seed with zeros: (a, b) and (a, b, 0) were one stream. A word is as good a key
    as a number, and the same in every process."""
    keys = [(0,), (0, 0), (0, 0, 0), (1,), (1, 0), (0, 1), (2, 1), (2, 1, 0), (2, 1, 0, 0), (1, 2),
            (2, "pass"), (2, "pass", 0), (2, "group"), (2, "group", 0), (2, 0, "group"), (2, ""),
            (2 ** 63, 1), (2, 2 ** 31), (2, "1")]
    streams = {tuple(tree.rng(*key).integers(2 ** 62, size=2)) for key in keys}
    assert len(streams) == len(keys)
    assert all(tree.rng(*key).random() == tree.rng(*key).random() for key in keys)
    code = "import tree; print(tree.rng(2, 'pass', 7).random())"
    assert float(python("-c", code).stdout) == tree.rng(2, "pass", 7).random()


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("group", ["question", "trace", "tree"])
def test_groups(group, size, root):
    """Repeats where there were prefixes enough, a trace that ran over two branches."""
    pools = {"question": [{0}], "tree": [{0, 1, 2, 3, 4, 5}],
             "trace": [{0, 1}, {0, 2, 3, 4}, {0, 2, 3, 5}]}
    for seed in range(30):
        nodes = sample_group(EXAMPLE, size, group, tree.rng(seed), root=root).tolist()
        assert len(nodes) == size
        assert nodes == sample_group(EXAMPLE, size, group, tree.rng(seed), root=root).tolist()
        fitting = [pool for pool in pools[group] if pool >= set(nodes)]
        assert fitting
        if group != "question" and not root:
            assert 0 not in nodes
            fitting = [pool - {0} for pool in fitting]
        too_few = any(len(pool) < size for pool in fitting)
        assert len(set(nodes)) == size or too_few
        # the bare question has nothing else to offer, whatever is asked
        assert sample_group(root_alone(), size, group, tree.rng(seed), root).tolist() == [0] * size


def test_groups_are_uniform():
    """Over prefixes in a tree, over leaves in a trace; the place in a group tells no depth."""
    rng = tree.rng(0)
    n = 4000
    drawn = np.array([sample_group(EXAMPLE, 6, "tree", rng) for _ in range(n)])
    assert abs(np.mean(drawn[:, 0] < drawn[:, 1]) - 0.5) < 0.05
    share = np.bincount(drawn[:, :3].ravel(), minlength=6) / n
    np.testing.assert_allclose(share, np.full(6, 1 / 2), atol=0.03)
    drawn = np.array([sample_group(EXAMPLE, 1, "trace", rng) for _ in range(n)])
    share = np.bincount(drawn.ravel(), minlength=6) / n
    expected = [1 / 6 + 1 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 12, 1 / 12]
    np.testing.assert_allclose(share, expected, atol=0.03)


@pytest.mark.parametrize("seed", range(30))
def test_tokenize_drops_and_never_cuts(seed):
    """A prefix cut at the limit is another prefix with the old one's statistics. One that is too
    long takes along what is below it, and no more."""
    rng = random.Random(seed)
    trees = tree.build([random_row(rng) for _ in range(6)])
    pieces = {}
    for text in ("a?", "b?", *STEPS):
        pieces[text] = [rng.randrange(99) for _ in range(rng.randint(0, 6))]

    def encode(question, steps=()):
        return [pieces[question], *(pieces[step] for step in steps)]

    for limit in range(0, 25, 3):
        kept, dropped = tree.tokenize(trees, encode, limit)
        expected = {}
        lost = 0
        for t in trees:
            short = {}
            for steps, counts in prefixes(t).items():
                ids = sum((pieces[text] for text in (t.problem["question"], *steps)), [])
                if len(ids) <= limit:
                    short[steps] = (ids, counts)
                else:
                    lost += 1
            if short:
                expected[t.problem["id"]] = short
        found = {}
        for t in kept:
            assert all(0 <= t.parent[k] < k for k in range(1, len(t.parent)))
            items = enumerate(prefixes(t).items())
            found[t.problem["id"]] = {key: (t.prefix_ids(k), counts) for k, (key, counts) in items}
        assert found == expected and dropped == lost


TOKENS = st.lists(st.integers(0, 2), max_size=5)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(TOKENS, TOKENS), max_size=6))
def test_pack_against_its_definition(pairs):
    """A token saw another sample's completion, a prefix was laid down twice, positions counted
    along the row."""
    starts = [prefix for prefix, _ in pairs]
    ends = [completion for _, completion in pairs]
    row = tree.pack(starts, ends)
    distinct = set()
    for prefix in starts:
        distinct |= {tuple(prefix[:k + 1]) for k in range(len(prefix))}
    n = len(distinct) + sum(map(len, ends))
    assert len(row.ids) == len(row.position) == n and row.mask.shape == (n, n)
    assert set(np.concatenate([[], *row.paths]).tolist()) == set(range(n))
    places = []  # of all sequences
    own = []     # of the completions: nobody else's
    for prefix, completion, path in zip(starts, ends, row.paths):
        assert row.ids[path].tolist() == prefix + completion
        assert row.position[path].tolist() == list(range(len(path)))
        for k, place in enumerate(path):  # it sees its own sequence up to itself, and nothing else
            assert set(np.flatnonzero(row.mask[place])) == set(path[:k + 1])
        places += path.tolist()
        own += path[len(prefix):].tolist()
    assert all(places.count(place) == 1 for place in own)
    assert tree.pack(starts).ids.tolist() == tree.pack(starts, [[] for _ in starts]).ids.tolist()


@pytest.mark.parametrize("row_tokens", [0, 12, 1000])
def test_micro_batches_hold_every_sample_once(row_tokens):
    """A sample was lost or came twice; a batch was larger than the limit; groups were mixed."""
    rng = random.Random(0)
    for _ in range(50):
        samples = []
        for k in range(rng.randint(0, 20)):
            prefix = rng.choices(range(3), k=rng.randint(1, 8))
            completion = rng.choices(range(3), k=rng.randint(0, 5))
            samples.append(SimpleNamespace(
                group=rng.randint(0, 3), prefix_ids=prefix, completion_ids=completion, k=k))
        met = []
        for batch in tree.micro_batches(samples, micro_tokens=40, row_tokens=row_tokens):
            longest = max(len(row.ids) for row in batch.rows)
            assert len(batch.rows) == 1 or len(batch.rows) * longest <= 40
            waiting = iter(batch.samples)
            for row in batch.rows:
                members = [next(waiting) for _ in row.paths]
                for sample, path in zip(members, row.paths):
                    assert row.ids[path].tolist() == sample.prefix_ids + sample.completion_ids
                assert len({sample.group for sample in members}) == 1
                assert len(members) == 1 or len(row.ids) <= row_tokens
            met += [sample.k for sample in batch.samples]
        assert sorted(met) == list(range(len(samples)))


def test_the_example_in_the_docstring_is_true():
    done = doctest.testmod(tree)
    assert done.failed == 0 and done.attempted > 0


# ---- Showing -------------------------------------------------------------------------------------
@pytest.mark.parametrize("width", [30, 80, 200])
def test_show_fits_the_terminal(width):
    """Lines of 116 columns were wrapped; children stood under the wrong parent."""
    lines = tree.show(EXAMPLE, width).splitlines()
    drawn = [line[:11].rstrip() for line in lines]
    assert drawn == ["How many?", "│  a", "│  b", "│  │  c", "│  │  │  d", "│  │  │  e"]
    assert re.search(r"c +5 visits +80%$", lines[3])
    assert all(len(line) <= max(width, 40) for line in lines)


def test_show_obeys_no_model():
    """Model text moved the cursor, rang the bell, hid a line or turned the writing direction."""
    evil = "\x1b[2J\x1b]0;title\x07 a\x9b31m\r\x08\u202eb\u2066\n\x7f שלום"
    problem = {"id": evil, "question": evil, "answer": evil}
    drawn = tree.show(Tree(problem, ["", evil], [-1, 0], [1, 0], [1.0, 0.0]), 100)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", drawn)
    assert drawn.count("\n") == 1 and "שלום" in drawn


# ---- Problems ------------------------------------------------------------------------------------
def test_problems_as_they_are_published(tmp_path):
    """An answer kept its solution, an instance of a template was taken for a duplicate, MATH
    without an answer of its own was refused, fields that a reward would read were lost."""
    path = write(
        tmp_path,
        {"question": " Ann? ", "answer": "3 + 4 = <<3+4=7>>7\nTwice is 1,414.\n#### 1,414"},
        {"id": 7, "instance": 0, "question": "q", "answer": "a\n#### -3"},
        {"id": 7, "instance": 1, "question": "q", "answer": "#### 1/2"}, "",
        {"unique_id": "test/1", "problem": "Find $x$.", "answer": "\\frac{1}{2}", "level": 5},
        {"problem": "1+1?", "solution": "It is $\\boxed{2}$.", "type": "Algebra"},
        {"id": "ours", "question": "q" * 100_000, "answer": 38, "steps": 4, "tests": [1, None]})
    gsm8k, first, second, math, boxed, ours = read_problems(path)
    assert gsm8k == {"id": "rows-1", "question": "Ann?", "answer": "1,414",
                     "solution": "3 + 4 = <<3+4=7>>7\nTwice is 1,414."}
    assert (first["id"], first["template"], first["answer"]) == ("7-0", "7", "-3")
    assert (second["id"], second["template"], second["answer"]) == ("7-1", "7", "1/2")
    assert math == {"unique_id": "test/1", "id": "test/1", "question": "Find $x$.",
                    "answer": "\\frac{1}{2}", "level": 5}
    assert (boxed["question"], boxed["answer"], boxed["type"]) == ("1+1?", "2", "Algebra")
    assert ours == {"id": "ours", "question": "q" * 100_000, "answer": "38", "steps": 4,
                    "tests": [1, None]}
    assert read_problems(path, limit=2) == [gsm8k, first]
    tree.write_jsonl(path, [gsm8k, first, second, math, boxed, ours])
    assert read_problems(path) == [gsm8k, first, second, math, boxed, ours]  # our form stays


def test_gsm8k_as_people_have_it(tmp_path):
    """A Windows export, numbers as answers, "####" twice, U+2028 in a text: tracebacks and lost
    steps."""
    path = write(
        tmp_path, '\ufeff{"question": "Tom?", "answer": "3+4=7\\r\\n#### 7"}\r',
        {"id": 0, "question": "3+4?", "answer": 7}, {"id": 1, "question": "1/2?", "answer": 0.5},
        {"id": 2, "question": "seven?", "answer": 7.0, "level": None},
        {"id": 3, "question": "Tom?", "answer": "A list:\n#### step\n3+4=7\n#### 7"},
        {"id": 4, "question": "Line\u2028sep?", "answer": "a\u2028b\n#### 7"})
    windows, number, half, whole, twice, sep = read_problems(path)
    assert (windows["answer"], windows["solution"]) == ("7", "3+4=7")
    assert (number["answer"], half["answer"], whole["answer"]) == ("7", "0.5", "7.0")
    assert (twice["answer"], twice["solution"]) == ("7", "A list:\n#### step\n3+4=7")
    assert (sep["question"], sep["solution"]) == ("Line\u2028sep?", "a\u2028b")


@pytest.mark.parametrize("answer", [
    "1,234", "-3", "1/2", "$5.00", "\\frac{1}{2}", "\\{1, 2\\}", "\\emptyset", "½", "∅", "שלוש",
    "(A)", 0, -0.0, 1e22])
def test_answers_that_can_be_graded_are_read(tmp_path, answer):
    """Also beside text from right to left, an id like a path, and a question of 100 kB."""
    row = {"id": "../\\é", "question": "כמה? " * 20_000, "answer": answer}
    [problem] = read_problems(write(tmp_path, row))
    assert problem == {**row, "question": row["question"].strip(), "answer": str(answer)}


# ---- Bad input -----------------------------------------------------------------------------------
GONE = "the field is missing"
NAN = float("nan")
RAW = ['{"id": "p", "nodes": [{"par', "[1, 2]", '"abc"', b'{"id": "\xff"}', "[" * 99_999, "NaN",
       b"\0\0\0", b"\x1f\x8b\x08", '{"a": 1}{"a": 2}',
       '{"id": "z", "question": "half \\ud83e", "answer": "1", "steps": ["a"], "reward": 1}',
       '{"id": "z", "question": "q", "answer": 1e999, "steps": ["a"], "reward": 1}',
       '{"id": "z", "question": "q", "answer": "1", "level": 1' + "0" * 5000 + "}"]
SEARCH = search(node(-1), node(0, "a"), node(1, "b"), node(1, "c"))
TRACE = trace("a", "b")
NUMBERS = [-1, 0.5, True, "1", 10 ** 400, GONE]
SPOILT = [  # a good row, where in it, and what must not stand there
    (SEARCH, "id", [None, True, ["p"], " ", 1.5, GONE]),
    (SEARCH, "question", [5, " ", GONE]),
    (SEARCH, "answer", [None, True, ["\x1b[31m"], " ", GONE]),
    (SEARCH, "nodes", [{"0": {}}, [], [7], GONE]),
    (SEARCH, "nodes 0 step", ["Let me think."]),
    (SEARCH, "nodes 0 parent", [0]),
    (SEARCH, "nodes 1 parent", [9, 2, 1, -1, 0.0, False, "0", GONE]),  # a cycle, a second root ...
    (SEARCH, "nodes 1 step", [3, "", " ", "a\n\nb", "a\n \t\r\nb", GONE]),
    (SEARCH, "nodes 1 visits", NUMBERS),
    (SEARCH, "nodes 1 value", [-0.5, 1.5, True, "1", NAN, 10 ** 400, GONE]),
    (TRACE, "steps", ["abc", ["a", 1], ["a", ""], ["a\n\nb"], GONE]),
    (TRACE, "reward", [True, 2, -1, NAN, "1", GONE]),
    (PROBLEM, "id", [None, True, [1], "first", "", 0.5]),  # the one before is the first
    (PROBLEM, "question", [None, "", GONE]),
    (PROBLEM, "answer", [["1"], None, True, NAN, "7\n####", GONE]),
    (PROBLEM, "answer", [".", "\\text{}", "\\boxed{}", "\\boxed{5"])]  # not gradable


def spoil(row, where, value):
    """A copy of the row with this value, or without one, at a place such as "nodes 1 step"."""
    row = json.loads(json.dumps(row))
    place = row
    *way, last = where.split()
    for key in way:
        place = place[int(key) if key.isdigit() else key]
    place[last] = value
    if value is GONE:
        del place[last]
    return row


def bad_lines():
    """A reader, a line that it must refuse, and the words of which the message has one or more."""
    for line in RAW:
        yield read_trees, line, [""]
        yield read_problems, line, [""]
    for row, where, values in SPOILT:
        reader = read_problems if row is PROBLEM else read_trees
        for value in values:
            field = where.split()[-1]
            line = spoil(row, where, value)
            if isinstance(value, list) and value:
                value = value[-1]
            found = "not JSON compliant" if value is NAN else json.dumps(value)[:20]
            yield reader, line, [f'"{field}"', f"the {field}", found]


@pytest.mark.parametrize("reader, line, words", list(bad_lines()))
def test_bad_input_is_named(tmp_path, reader, line, words):
    """They ended in tracebacks, in garbage that was trained on, or in errors without a line. What
    is no JSON is told as Python tells it."""
    path = write(tmp_path, {**TRACE, "id": "first"}, line)
    with pytest.raises(InputError) as caught:
        reader(path)
    said = str(caught.value)
    assert said.startswith(f"{path}, line 2: ")
    assert "; expected " in said or line in RAW or "not JSON compliant" in said
    assert any(word in said for word in words)
    assert len(said) < len(path) + 500 and said.isprintable()


@pytest.mark.parametrize("reader", [read_trees, read_problems])
def test_no_file_no_line_and_nesting(tmp_path, reader):
    """Never an empty data set. Some nesting can be read but not shown again."""
    blank = write(tmp_path, "", " ", name="blank")
    for path in (f"{tmp_path}/missing", str(tmp_path), write(tmp_path, name="empty"), blank):
        with pytest.raises((InputError, OSError), match=re.escape(path)):
            reader(path)
    for depth in range(800, 1000, 7):
        with pytest.raises(InputError):
            reader(write(tmp_path, '{"question": ' + "[" * depth + "]" * depth + "}"))


# ---- Files ---------------------------------------------------------------------------------------
def test_files_keep_every_character_and_outlive_a_failed_write(tmp_path):
    """Unicode's line separators cut a line in two, and a run that died while writing took the last
    run's trees along."""
    problem = {"id": "id\u2028\x85é", "question": "כמה?\nשحال؟ \x1b[31m", "answer": "٣"}
    steps = ["", "צעד\u2028אחד\r\n½", "🧮 x"]
    t = Tree(problem, steps, [-1, 0, 1], [3, 2, 1], [1.5, 1.0, 0.0])
    out = os.path.join(tmp_path, "trees.jsonl")
    tree.write_trees(out, [t])
    assert read_trees(out) == [t] and "כמה".encode() in read(out)
    with pytest.raises(TypeError):
        tree.write_jsonl(out, [{}, {"a": object()}])
    assert read_trees(out) == [t]
    tree.write_trees(out, [t])  # over what the dead run left behind
    assert os.listdir(tmp_path) == ["trees.jsonl"]


def parse_n(row, number):
    return tree.get_field(row, "n", int, "a number")


@pytest.mark.parametrize("before, rows, after", [
    (b"", [], b""),
    (b'{"n": 1}\n{"n": 2}\n', [1, 2], b'{"n": 1}\n{"n": 2}\n'),
    (b'{"n": 1}\n\n{"n": 2', [1], b'{"n": 1}\n\n'),     # a killed writer
    (b'{"n": 1}\n\0\0\0', [1], b'{"n": 1}\n'),         # a machine that lost its power
    (b'{"n": 1}\n{"m": 2}\n{"n', None, None),          # somebody else's, however they end
    (b"my\nnotes", None, None),
    (b'{"n": 1}', None, None)])
def test_an_output_is_continued_only_if_it_is_ours(tmp_path, before, rows, after):
    """The last line of a file that was not ours was cut off before the file was refused."""
    path = os.path.join(tmp_path, "folder", "out.jsonl")
    assert tree.continue_jsonl(path, parse_n) == []
    with open(path, "wb") as file:
        file.write(before)
    if rows is None:
        with pytest.raises(InputError, match=re.escape(path)):
            tree.continue_jsonl(path, parse_n)
        assert read(path) == before
        return
    assert tree.continue_jsonl(path, parse_n) == rows
    assert read(path) == after
    tree.append_jsonl(path, {"n": 9})
    assert tree.continue_jsonl(path, parse_n) == [*rows, 9]


def append_many(path):
    for n in range(20):
        tree.append_jsonl(path, {"n": n, "text": "x" * 30_000})


def test_ranks_append_whole_lines_to_one_file(tmp_path):
    path = os.path.join(tmp_path, "out.jsonl")
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=append_many, args=[path]) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert sorted(tree.read_jsonl(path, parse_n)) == sorted([*range(20)] * 3)


def python(*args, **how):
    """Run Python in another process; stdout, stderr and returncode."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "", **how}
    root = os.path.dirname(os.path.abspath(tree.__file__))
    return subprocess.run([sys.executable, *args], capture_output=True, encoding="utf-8", cwd=root,
                          env=environment)


def test_a_folder_is_locked_once(tmp_path):
    """Two runs that started within the same seconds shared a folder and mixed their logs."""
    held = tree.lock(f"{tmp_path}/run")
    code = "import sys, tree; tree.run_command(lambda: tree.lock(sys.argv[1]) and None)"
    for spelling in (f"{tmp_path}/run", f"{tmp_path}/run/", f"{tmp_path}/./run"):
        other = python("-c", code, spelling)
        assert other.returncode == 2 and "another process writes" in other.stderr
    held.close()
    assert python("-c", code, f"{tmp_path}/run/").returncode == 0


# ---- The command ---------------------------------------------------------------------------------
def run(*args, **how):
    return python(tree.__file__, *args, **how)


def test_the_command_merges_files_and_draws(tmp_path):
    """A terminal that cannot draw boxes is no error. Searches that found no step trained as if they
    were trees, and nobody said so."""
    out = os.path.join(tmp_path, "trees.jsonl")
    one = write(tmp_path, trace("a", "b", reward=0))
    two = write(tmp_path, trace("a", "c"), name="two.jsonl")
    done = run(one, two, "--out", out, "--show", "--id", "p", COLUMNS="60")
    assert done.returncode == 0
    assert "│  a" in done.stdout and "1 problems, 2 distinct prefixes, 2.0 a problem" in done.stdout
    assert "0 have no prefix but the question" in done.stdout
    barren = write(tmp_path, search(node(-1)), search(node(-1), id="q"), name="barren")
    assert "1 have no prefix but the question" in run(one, barren).stdout
    assert max(map(len, done.stdout.splitlines()[:3])) == 60
    assert prefixes(*read_trees(out)) == {(): (2, 1.0), ("a",): (2, 1.0)}
    assert run(out, "--show", PYTHONIOENCODING="ascii").returncode == 0
    assert run(two, "--out", out).returncode == 0  # trees of an earlier run are written anew
    assert "(default: None)" not in run("--help").stdout


def test_what_a_run_has_to_work_with():
    """A chain has no siblings, and a group of 8 on fewer prefixes repeats them: nobody said how
    many there were."""
    wide = Tree(PROBLEM, [""] + [f"step {k}" for k in range(7)], [-1] + [0] * 7, [7] + [1] * 7,
                [3.5] + [0.5] * 7)
    chain = Tree(PROBLEM, ["", "a", "b"], [-1, 0, 1], [1, 1, 0], [1.0, 0.0, 0.0])
    assert tree.summary([EXAMPLE, wide, chain, root_alone()]).splitlines() == [
        "4 problems, 18 distinct prefixes, 4.5 a problem",
        "50.0% of the trees are chains, without a branch",
        "25.0% have 8 prefixes or more, enough for a group of 8",
        "14.1% of groups of 8 can hold a triplet, if the rewards are such",
        "1 have no prefix but the question",
        "depth   prefixes   teacher's success (of visits)",
        "    0          4   50.0%",
        "    1         10   46.9%",
        "    2          2   80.0%",
        "    3          2   40.0%"]


def test_a_group_can_hold_a_triplet_where_some_rewards_make_one():
    """Against order_constraints for each of the 2^5 rewards of 200 groups of five."""
    random_numbers = np.random.default_rng(0)
    seen = []
    for _ in range(200):
        parent = [-1] + [int(random_numbers.integers(node)) for node in range(1, 9)]
        group = random_numbers.integers(0, 9, 5).tolist()  # nodes may be drawn again
        some = False
        for solved in itertools.product([0, 1], repeat=5):
            constraints = order_constraints(group, parent, solved)
            some = some or len(constraints.triplet) + len(constraints.dropped) > 0
        assert tree.can_hold_triplet(Tree(PROBLEM, parent=parent), group) == some
        seen.append(some)
    assert 40 < sum(seen) < 160


def test_the_order_of_searches_does_not_matter(tmp_path):
    """They stand in the order in which they ended, and --seed drew other groups."""
    rows = [search(node(-1), node(0, "a"), id=name) for name in ("p2", "p10", "p1")]
    outs = []
    for k, order in enumerate((rows, rows[::-1])):
        outs.append(os.path.join(tmp_path, f"trees{k}.jsonl"))
        assert run(write(tmp_path, *order, name=f"s{k}"), "--out", outs[k]).returncode == 0
    assert [t.problem["id"] for t in read_trees(outs[:1])] == ["p1", "p2", "p10"]
    first, second = [open(path).read() for path in outs]
    assert first == second


def test_a_wrong_out_destroys_nothing(tmp_path):
    """A search of many hours was replaced by its own trees; so was another one."""
    one = write(tmp_path, SEARCH)
    two = write(tmp_path, SEARCH, name="two.jsonl")
    notes = write(tmp_path, "my notes", name="notes")
    fifo = f"{tmp_path}/fifo"
    os.mkfifo(fifo)
    os.symlink(one, f"{tmp_path}/link")
    files = [one, two, notes, fifo, f"{tmp_path}/link", str(tmp_path)]
    for out in [*files, f"{one}/below"]:
        failed = run(one, "--out", out)
        assert failed.returncode == 2 and re.fullmatch(r"tree\.py: [^\n]+\n", failed.stderr)
    assert read(one) == read(two) and read(notes) == b"my notes\n" and os.path.exists(fifo)
    assert run(f"{tmp_path}/./rows.jsonl", "--out", one).returncode == 2


def test_a_mistake_is_one_sentence_and_status_2(tmp_path):
    """They were tracebacks, and moved the cursor. Under torchrun each rank ends like this."""
    good = write(tmp_path, TRACE)
    bad = write(tmp_path, '{"id": "\x1b[31m', name="bad")
    for flags in ([bad], [good, "--id", "other"], ["\x1b[31m\n"], ["--\x1b[31m"], [b"\xff"],
                  [good, "--i", "p"], ["--id"]):
        failed = run(*flags, RANK="1")
        assert failed.returncode == 2
        assert re.fullmatch(r"tree\.py: [^\n\x1b]+\n", failed.stderr), failed.stderr


def test_a_full_disk_leaves_the_old_file(tmp_path):
    out = write(tmp_path, search(node(-1, depth=0)), name="out.jsonl")
    before = read(out)
    long = write(tmp_path, trace(*["step"] * 999))
    command = [sys.executable, tree.__file__, long, "--out", out]
    failed = subprocess.run(command, capture_output=True, preexec_fn=limit_file_size)
    assert failed.returncode == 2 and failed.stderr.count(b"\n") == 1
    assert read(out) == before


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (999, 999))


def test_a_closed_pipe_and_ctrl_c_are_no_tracebacks(tmp_path):
    command = '(sleep 0.3; "$0" "$1" "$2" --show; echo "status $?" >&2) | true'
    out = write(tmp_path, TRACE)
    closed = subprocess.run(["bash", "-c", command, sys.executable, tree.__file__, out],
                            capture_output=True)
    assert closed.stderr == b"status 0\n"
    code = "import os, signal, tree; tree.run_command(lambda: os.kill(os.getpid(), signal.SIGINT))"
    stopped = python("-c", code)
    assert (stopped.returncode, stopped.stderr) == (130, "")


@pytest.mark.parametrize("text, kind, fits", [
    ("3", int, True), ("0", int, False), ("9", int, False), ("1.5", int, False),
    ("1.5", float, True), ("nan", float, False), ("inf", float, False), ("x", float, False)])
def test_numbers_of_flags_have_limits(text, kind, fits):
    """nan passed every comparison, and a mistake was a traceback."""
    parser = tree.arguments("A script.")
    parser.add_argument("--n", type=tree.at_least(1, kind, high=8))
    if fits:
        assert parser.parse_args(["--n", text]).n == kind(text)
    else:
        with pytest.raises(InputError, match="argument --n: "):
            parser.parse_args(["--n", text])
