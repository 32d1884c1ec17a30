"""Prefix trees against slow and obvious references, and a table of bad inputs. Each test tells of the bug it guards against."""
import contextlib
import doctest
import io
import json
import os
import random
import re
import resource
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tree
from tree import InputError, Tree, read_problems, read_trees, sample_group

FINAL = ("The answer is 4.", "So \\boxed{4}", "#### 4", "Final answer: 4")  # steps that bear the answer
STEPS = ("3 + 4 = 7", "3 + 4 = 8", "twice that is 14", "לכן שבע", "だから七 ≈ 7") + FINAL
PROBLEM = {"id": "p", "question": "How many?", "answer": "4"}
node = lambda parent, step="", visits=1, value=0.0, **more: {"parent": parent, "step": step, "visits": visits, "value": value, **more}
search = lambda *nodes, **fields: {**PROBLEM, "nodes": list(nodes), **fields}
trace = lambda *steps, reward=1, **fields: {**PROBLEM, "steps": list(steps), "reward": reward, **fields}
EXAMPLE = Tree("p", "Q", "4", ["", "a", "b", "c", "d", "e"], [-1, 0, 0, 2, 3, 3], [8, 2, 6, 5, 2, 3], [4.0, 0.0, 4.0, 4.0, 2.0, 0.0])


def write(folder, *lines, name="rows.jsonl"):
    """A file of these rows (or raw lines, text or bytes); returns its path."""
    texts = [json.dumps(line, ensure_ascii=False) if isinstance(line, dict) else line for line in lines]
    open(path := os.path.join(folder, name), "wb").writelines((text if isinstance(text, bytes) else text.encode()) + b"\n" for text in texts)
    return path


def prefixes(t):
    """The tree as the obvious thing: {(step, step, ...): (visits, value)}."""
    return {tuple(t.steps[k] for k in t.path(n)[1:]): (t.visits[n], t.value[n]) for n in range(len(t.parent))}


def random_row(rng):
    name, nodes = rng.choice("ab"), [node(-1, visits=9, value=4.0)]
    if rng.random() < 0.4:
        return trace(*rng.choices(STEPS, k=rng.randint(1, 5)), reward=rng.choice([0, 1, 0.5]), id=name, question=f"{name}?")
    for k in range(1, rng.randint(1, 15)):
        visits = rng.randint(0, 3)
        nodes.append(node(rng.randrange(k), rng.choice(STEPS), visits, rng.choice([0, visits, visits / 2]), terminal=rng.random() < 0.2))
    return search(*nodes, id=name, question=f"{name}?")


def reference(rows):
    """{problem: {prefix: (visits, value)}}, by walking from every node to the root."""
    found = {}
    for row in rows:
        nodes = row.get("nodes") or [node(k - 1, step, 1, row["reward"], terminal=k == len(row["steps"]))
                                     for k, step in enumerate(["", *row["steps"]])]
        walk = lambda at: walk(nodes[at["parent"]]) + [at] if at["parent"] >= 0 else []
        for at in nodes:
            if not any(above.get("terminal") or above["visits"] == 0 or above["step"] in FINAL for above in walk(at)):
                key, tree_of_row = tuple(above["step"] for above in walk(at)), found.setdefault(row["id"], {})
                tree_of_row[key] = tuple(np.add(tree_of_row.get(key, (0, 0.0)), (at["visits"], at["value"])))
    return found


@pytest.mark.parametrize("seed", range(60))
def test_build_is_the_set_of_text_prefixes_with_summed_statistics(tmp_path, seed):
    """Searches and traces, mixed: a node merged with the wrong parent, counted twice, or kept below one that was left out."""
    rng = random.Random(seed)
    trees = read_trees(write(tmp_path, *(rows := [random_row(rng) for _ in range(rng.randint(1, 8))])))
    assert {t.id: prefixes(t) for t in trees} == reference(rows) and trees == tree.build(rows)
    for t in trees:  # distinct, parents first
        assert len(prefixes(t)) == len(t.steps) and t.parent[0] == -1 and all(0 <= t.parent[k] < k for k in range(1, len(t.parent)))
        assert t.depth().tolist() == [len(t.path(k)) - 1 for k in range(len(t.parent))]
    tree.write_trees(trees, out := os.path.join(tmp_path, "out", "trees.jsonl"))
    assert read_trees(out) == trees  # trees of trees are those trees


def test_files_keep_every_character_and_outlive_a_failed_write(tmp_path):
    """Unicode's line separators cut a line in two; a run that died while writing took the last run's trees; a torn line stayed, or the end of somebody's notes went."""
    t = Tree("id\u2028\x85é", "כמה?\nشحال؟ \x1b[31m", "٣", ["", "צעד\u2028אחד\r\n½", "🧮 x"], [-1, 0, 1], [3, 2, 1], [1.5, 1.0, 0.0])
    tree.write_trees([t], out := os.path.join(tmp_path, "trees.jsonl"))
    assert read_trees(out) == [t] and "כמה" in open(out, encoding="utf-8").read()
    with pytest.raises(AttributeError):
        tree.write_trees([Tree("b", "q", "1"), None], out)
    assert read_trees(out) == [t]
    tree.drop_torn_line(out + ".missing")
    for before, after in ((b'{}\n{"to', b"{}\n"), (b'{"torn', b""), (b"{}\n", b"{}\n"), (b"", b""), (b"my\nnotes", b"my\nnotes")):
        open(out, "wb").write(before)
        tree.drop_torn_line(out)
        assert open(out, "rb").read() == after


def test_160_000_prefixes(tmp_path):
    """Quadratic look-ups, or whole prefixes stored as text, made the paper's 160,000 prefixes take hours and gigabytes."""
    rows = [search(node(-1, visits=20), *(node((k - 1) // 2, f"step {k}") for k in range(1, 20)), id=f"train-{i}") for i in range(8000)]
    *trees, deep = read_trees(write(tmp_path, *rows, search(node(-1), *(node(k, f"{k:0100}") for k in range(2000)), id="deep")))
    assert (len(trees), sum(len(t.parent) for t in trees)) == (8000, 160_000)
    assert (len(deep.parent), sum(map(len, deep.steps))) == (2001, 2000 * 100)  # each node holds its own step alone
    assert deep.depth().max() == 2000 and tree.show(deep, colour=False)  # and depth is no recursion error


@pytest.mark.parametrize("group", ["question", "trace", "tree"])
def test_groups(group):
    """Repeats where there were prefixes enough, a trace that ran over two branches, a group that changed from run to run."""
    pools = {"question": [{0}], "trace": [{0, 1}, {0, 2, 3, 4}, {0, 2, 3, 5}], "tree": [set(range(6))]}[group]
    for seed in range(150):
        size, root = (1, 2, 4, 8)[seed % 4], seed % 3 > 0
        draw = lambda t: sample_group(t, size, group, np.random.default_rng(seed), root=root).tolist()
        nodes = draw(EXAMPLE)
        assert len(nodes) == size and nodes == draw(EXAMPLE)
        fit = [pool for pool in pools if pool >= set(nodes)]
        assert fit and (root or group == "question" or 0 not in nodes)
        assert len(set(nodes)) == size or any(len(pool) - (not root) < size for pool in fit)  # repeats only where there are too few
        assert draw(Tree("p", "Q", "4")) == [0] * size  # the bare question has nothing else to offer, whatever is asked
    with pytest.raises(ValueError, match="forest"):
        sample_group(EXAMPLE, 8, "forest", np.random.default_rng(0))


def test_groups_are_uniform():
    """Uniform over prefixes in a tree, over leaves in a trace; a sample's place in the group says nothing of its depth."""
    rng, n = np.random.default_rng(0), 4000
    share = lambda group, size: np.bincount(np.concatenate([sample_group(EXAMPLE, size, group, rng) for _ in range(n)]), minlength=6) / n
    np.testing.assert_allclose(share("tree", 3), np.full(6, 1 / 2), atol=0.03)
    np.testing.assert_allclose(share("trace", 1), [1 / 6 + 1 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 12, 1 / 12], atol=0.03)
    assert abs(np.mean([np.diff(sample_group(EXAMPLE, 6, "tree", rng))[0] > 0 for _ in range(n)]) - 0.5) < 0.05


@pytest.mark.parametrize("seed", range(30))
def test_tokenize_drops_and_never_cuts(tmp_path, seed):
    """A prefix cut at the limit is another prefix with the old one's statistics; one too long takes along what is below it, no more."""
    trees = read_trees(write(tmp_path, *map(random_row, [rng := random.Random(seed)] * 6)))
    pieces = {text: [rng.randrange(99) for _ in range(rng.randint(0, 6))] for t in trees for text in [t.question, *t.steps]}
    encode = lambda question, steps=(): [pieces[question], *(pieces[step] for step in steps)]
    for limit in range(0, 25, 3):
        (left, dropped), wanted, lost = tree.tokenize(trees, encode, limit), {}, 0
        for t in trees:
            whole = {key: ([i for text in (t.question, *key) for i in pieces[text]], figures) for key, figures in prefixes(t).items()}
            short = {key: (ids, figures) for key, (ids, figures) in whole.items() if len(ids) <= limit}
            wanted, lost = wanted | ({t.id: short} if short else {}), lost + len(whole) - len(short)
        assert dropped == lost and all(0 <= t.parent[k] < k for t in left for k in range(1, len(t.parent)))
        assert wanted == {t.id: {key: (t.prefix_ids(k), figures) for k, (key, figures) in enumerate(prefixes(t).items())} for t in left}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(*[st.lists(st.integers(0, 2), max_size=5)] * 2), max_size=6), st.booleans())
def test_pack_against_its_definition(pairs, complete):
    """A token that sees another sample's completion, a prefix laid down twice, positions that count along the row."""
    starts, ends = [prefix for prefix, _ in pairs], [completion if complete else [] for _, completion in pairs]
    ids, position, mask, paths = tree.pack(starts, ends) if complete else tree.pack(starts)
    distinct = {tuple(prefix[:k + 1]) for prefix in starts for k in range(len(prefix))}
    assert len(ids) == len(position) == len(distinct) + sum(map(len, ends)) and mask.shape == (len(ids), len(ids))
    assert {int(k) for path in paths for k in path} == set(range(len(ids))) and len(paths) == len(pairs)
    for prefix, completion, path in zip(starts, ends, paths):
        assert ids[path].tolist() == prefix + completion and position[path].tolist() == list(range(len(path)))
        for place, k in enumerate(path):  # it sees its own sequence up to itself, and nothing else
            assert set(np.flatnonzero(mask[k]).tolist()) == set(path[:place + 1].tolist())
        assert not any(set(path[len(prefix):].tolist()) & set(other.tolist()) for other in paths if other is not path)


def test_the_example_in_the_docstring_is_true():
    assert (done := doctest.testmod(tree)).failed == 0 < done.attempted


def test_show():
    """Model text that moved the cursor, rang the bell, hid a line or turned the writing direction; children under the wrong parent."""
    plain = tree.show(EXAMPLE, False)
    assert [line[:10].rstrip() for line in plain.splitlines()[:-1]] == ["Q", "├─ a", "└─ b", "   └─ c", "      ├─ d", "      └─ e"]
    assert re.search(r"c\s+5 visits\s+80 %", plain) and "\033" not in plain
    evil = "\x1b[2J\x1b]0;title\x07 a\x9b31m\r\x08\u202eb\u2066\n\x7f שלום"
    drawn = tree.show(Tree(evil, evil, evil, ["", evil], [-1, 0], [1, 0], [1.0, 0.0]), True)
    drawn = re.sub("\033\\[(38;5;\\d+|0)m", "", drawn)  # our own colours
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", drawn) and drawn.count("\n") == 2 and "שלום" in drawn


def test_problems_as_they_are_published(tmp_path):
    """The data sets' own rows: an answer that kept its solution, an instance of a template taken for a duplicate."""
    path = write(tmp_path, {"question": " Ann has 3 pens. ", "answer": "3 + 4 = <<3+4=7>>7 #### no\nTwice is 1,414.\n#### 1,414"},
                 {"id": 7, "instance": 0, "question": "q", "answer": "a\n#### -3"}, {"id": 7, "instance": 1, "question": "q", "answer": "#### 1/2"}, "",
                 {"unique_id": "test/1", "problem": "Find $x$.", "solution": "So $\\boxed{x}$.", "answer": "\\frac{1}{2}", "level": 5, "subject": "Algebra"},
                 {"id": "ours", "question": "q" * 100_000, "answer": 38})
    gsm8k, first, second, math, ours = read_problems(path)
    assert gsm8k == {"id": "rows-1", "question": "Ann has 3 pens.", "answer": "1,414", "steps": 2}
    assert (first["id"], first["answer"], second["id"], second["answer"]) == ("7-0", "-3", "7-1", "1/2")
    assert math == {"id": "test/1", "question": "Find $x$.", "answer": "\\frac{1}{2}", "level": 5, "subject": "Algebra"}
    assert (ours["id"], ours["answer"], len(ours["question"])) == ("ours", "38", 100_000) and read_problems(path, limit=2) == [gsm8k, first]


GONE = object()  # the field is missing
RAW = ['{"id": "p", "nodes": [{"par', "[1, 2]", '"abc"', b'{"id": "\xff"}', "[" * 99_999, "NaN",
       '{"id": "z", "question": "half a pair \\ud83e", "answer": "1", "steps": ["a"], "reward": 1}', b"\0\0\0", b"\x1f\x8b\x08", '{"a": 1}{"a": 2}',
       '{"id": "z", "question": "q", "answer": 1e999, "steps": ["a"], "reward": 1}', '{"id": "z", "question": "q", "answer": "1", "level": 1' + "0" * 5000 + "}"]
SEARCH, TRACE = search(node(-1), node(0, "a"), node(1, "b"), node(1, "c")), trace("a", "b")
SPOILT = [  # a good row, where in it, and what must not stand there
    (SEARCH, "id", [None, True, ["p"], " ", 1.5, GONE]), (SEARCH, "question", [5, " ", "Other?", GONE]), (SEARCH, "nodes 0 step", ["Let me think."]),
    (SEARCH, "answer", [None, True, ["\x1b[31m"], " ", "5", GONE]), (SEARCH, "nodes", [{"0": {}}, [], [7], GONE]), (SEARCH, "nodes 0 parent", [0]),
    (SEARCH, "nodes 1 parent", [9, 2, 1, -1, 0.0, False, "0", GONE]),  # out of reach, cyclic, its own, a second root
    (SEARCH, "nodes 1 step", [3, "", " ", "a\n\nb", "a\n \nb", GONE]), (SEARCH, "nodes 1 visits", [-1, 0.5, True, "1", 10 ** 400, GONE]),
    (SEARCH, "nodes 1 value", [-0.5, 1.5, True, "1", float("nan"), float("inf"), 10 ** 400, GONE]), (SEARCH, "nodes 1 terminal", ["false", None]),
    (TRACE, "steps", ["abc", [], ["a", 1], ["a", ""], ["a\n\nb"], GONE]), (TRACE, "reward", [True, 2, -1, float("nan"), "1", GONE]), (TRACE, "answer", ["5"]),
    (PROBLEM, "answer", ["$", ".", "\\text{}", "\\boxed{}", "\\boxed{5", "5}", "5\\", "7\n#### ?"]),  # nothing to grade by
    (PROBLEM, "id", [None, True, [1], "p", "", 0.5]), (PROBLEM, "question", [None, "", GONE]), (PROBLEM, "answer", [["1"], None, True, float("nan"), "7\n####", GONE])]
TABLE = [pytest.param(reader, line, "", id=f"{reader.__name__} {line[:20]}") for reader in (read_trees, read_problems) for line in RAW]
for good, where, value in ((good, where, value) for good, where, values in SPOILT for value in values):
    *way, last = (int(key) if key.isdigit() else key for key in where.split())
    place = bad = json.loads(json.dumps(good))
    for key in way:
        place = place[key]
    place.update({last: value}) if value is not GONE else place.pop(last)
    shown = last if value is GONE else json.dumps(value[-1] if isinstance(value, list) and value else value).strip("[]")[:20]
    reader = read_problems if good is PROBLEM else read_trees
    TABLE.append(pytest.param(reader, bad, shown, id=f"{reader.__name__} {where} {'missing' if value is GONE else json.dumps(value)[:20]}"))


@pytest.mark.parametrize("reader, line, shown", TABLE)
def test_bad_input_is_named_or_skipped(tmp_path, reader, line, shown):
    """Each ended in a traceback, in garbage that was trained on, or in an error without the line to look at."""
    good = TRACE if reader is read_trees else PROBLEM
    path = write(tmp_path, good, line, {**good, "id": "last"})
    with pytest.raises(InputError) as caught:
        reader(path)
    start, said = f"{path}, line 2: ", str(caught.value)
    assert said.startswith(start) and "xpected" in said and shown.lower() in said[len(start):].lower() and said.isprintable(), said
    with contextlib.redirect_stderr(io.StringIO()) as err:  # the bad line alone is missing, is named and counted
        assert [row["id"] if reader is read_problems else row.id for row in reader(path, skip_bad=True)] == ["p", "last"]
    assert start in err.getvalue() and "1 bad line" in err.getvalue()


@pytest.mark.parametrize("answer", ["1,234", "-3", "1/2", "$5.00", "\\frac{1}{2}", "\\{1, 2\\}", "\\left\\{ x \\right.", "()", "\\emptyset", "½", "∅", "שלוש", "(A)", 0, -0.0, 1e22])
def test_answers_that_can_be_graded_are_read(tmp_path, answer):
    """With a byte-order mark, Windows' line ends, text from right to left, an id like a path, and a question of 100 kB."""
    row = {"id": "../\\é", "question": "כמה? " * 20_000, "answer": answer}
    assert read_problems(write(tmp_path, "\ufeff" + json.dumps(row) + "\r")) == [{**row, "question": row["question"].strip(), "answer": str(answer)}]


@pytest.mark.parametrize("reader", [read_trees, read_problems])
def test_no_file_no_line_and_nesting(tmp_path, reader):
    """Missing, a folder, empty, blank, or nothing but bad lines: never an empty data set. Nesting that can be read but not shown again."""
    for path in (f"{tmp_path}/missing", str(tmp_path), write(tmp_path), write(tmp_path, "", " ", name="blank"), write(tmp_path, "torn {", name="torn")):
        with pytest.raises(InputError, match=re.escape(path)):
            reader(path, skip_bad=True)
    for depth in range(800, 1000):
        with pytest.raises(InputError):
            reader(write(tmp_path, '{"question": ' + "[" * depth + "]" * depth + "}"))
    with pytest.raises(InputError):  # numbers beyond any float
        read_trees(write(tmp_path, search(node(-1, visits=10 ** 400, value=10 ** 400))))


def test_the_command(tmp_path):
    """Two files become one; no colour in a pipe; a mistake is one sentence and status 2, not a traceback; a closed pipe is no mistake."""
    env, out = {**os.environ, "PYTHONUNBUFFERED": ""}, os.path.join(tmp_path, "trees.jsonl")
    run = lambda *args, env=env, **how: subprocess.run([sys.executable, tree.__file__, *args], capture_output=True, encoding="utf-8", env=env, **how)
    done = run(write(tmp_path, trace("a", "b", reward=0)), write(tmp_path, trace("a", "c"), name="more"), "--out", out, "--show", "--id", "p")
    assert done.returncode == 0 and prefixes(*read_trees(out)) == {(): (2, 1.0), ("a",): (2, 1.0)}
    assert "\033" not in done.stdout and "└─ a" in done.stdout and "1 problems, 2 distinct prefixes" in done.stdout
    os.mkfifo(fifo := f"{tmp_path}/fifo")
    for flags in ([write(tmp_path, '{"id": "\x1b[31m', name="bad")], [out, "--id", "other"], [out, "--out", str(tmp_path)], [out, "--out", fifo], [fifo],
                  [out, "--out", f"{out}/below"], ["\x1b[31m\n"], ["--\x1b[31m"], [b"\xff"], [out, "--i", "p"], ["--id"]):
        failed = run(*flags)
        assert failed.returncode == 2 and re.fullmatch(r"tree\.py: [^\n\x1b]+\n", failed.stderr), failed.stderr
    assert os.path.exists(fifo) and run(out, "--show", env={**env, "PYTHONIOENCODING": "ascii"}).returncode == 0
    before = open(out).read()
    full = run(write(tmp_path, trace(*["step"] * 999), name="long"), "--out", out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (999, 999)))
    assert full.returncode == 2 and re.fullmatch(r"tree\.py: [^\n]+ intact\n", full.stderr) and open(out).read() == before
    command = '(sleep 0.1; "$0" "$1" "$2" --show; echo "status $?" >&2) | true'
    assert subprocess.run(["bash", "-c", command, sys.executable, tree.__file__, out], capture_output=True, env=env).stderr == b"status 0\n"
