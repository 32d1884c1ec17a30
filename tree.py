"""
Prefix trees: from searches and traces to groups of prefixes, and from a group to one packed row.

1. Build. Searches (of mcts.py) and traces (of any sampler, of people) are cut into their distinct
   staged prefixes and merged by problem: the solution ABCDE yields A, AB, ABC, ABCD (Sec. 4.1).
   Steps that end a solution or bear its answer are left out, since nothing is left to do behind
   them. Failed branches are kept, with their visits and value.
2. Draw. A group is `size` prefixes of one problem's tree (Sec. 3.1, rho_D): from all over the tree,
   along one root-to-leaf trace, or the bare question `size` times.
3. Pack. The samples of a group share most of their tokens: `pack` lays each distinct one down once.

    python tree.py out/search.jsonl more_traces.jsonl --out out/trees.jsonl
    python tree.py --from_completions out/samples.jsonl --out out/trees.jsonl
    python tree.py out/trees.jsonl --show --id train-12       # without a file: the embedded trees
"""
import argparse
import json
import os
import re
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import numpy as np

from data.grade import extract_answer, is_correct

JOIN = "\n\n"  # between steps, and behind each step of a prefix
BLANK_LINE = re.compile(r"\n[ \t\r]*\n")

# ---- Commands ------------------------------------------------------------------------------------
class InputError(ValueError):
    """A user's mistake: what was found, where, and what was expected."""

def run_command(main):
    """Run a script's `main`. Bad input, a file that cannot be used and a lack of memory are told in
    one line on stderr, with status 2. Ctrl-C is status 130, and a closed pipe is no mistake."""
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        main()
    except BrokenPipeError:  # python tree.py --show | head
        os._exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, OSError, MemoryError) as error:
        message = str(error) or "out of memory"
        print(printable(f"{os.path.basename(sys.argv[0])}: {message}"), file=sys.stderr)
        sys.exit(2)

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Tells every default but None, and keeps the line breaks of the epilog."""
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)

def arguments(description, epilog=""):
    """An argparse parser that takes whole names only and raises InputError for a mistake."""
    def error(message):
        raise InputError(f"{message}; see --help")
    parser = argparse.ArgumentParser(description=description, epilog=epilog, allow_abbrev=False,
                                     formatter_class=HelpFormatter)
    parser.error = error
    return parser

def at_least(low, kind=int, high=1e15):
    """A type for argparse: a number of this kind, from `low` to `high`."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"found {text}, expected {low} to {high:g}")
        return kind(text)
    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse

def printable(text):
    """Text without what a terminal would obey: escapes, bells, marks that turn its direction."""
    return "".join(c if c.isprintable() else " " for c in text)

def shorten(value, width=60):
    """A value as an error message shows it: JSON, in one line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= width else text[:width - 3] + "..."

# ---- JSONL files, one object a line --------------------------------------------------------------
def get_field(row, name, kind, expected):
    """row[name] where it is of this type, or one of a tuple of types; else InputError."""
    value = row.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        found = shorten(value) if name in row else "missing"
        raise InputError(f'field "{name}" is {found}; expected {expected}')
    return value

def read_jsonl(path, parse, torn=False):
    """Yield parse(row, line_number) of every line; with `torn`, all but a last one without its end.
    InputError where there is no file or no line, for what is no object and what `parse` refuses."""
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}; expected JSONL, one object a line")
    parsed = None
    with open(path, "rb") as lines:  # as bytes, lines end at "\n" alone and not at U+2028
        for number, line in enumerate(lines, 1):
            if not line.strip() or (torn and not line.endswith(b"\n")):
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
                # NaN, 1e999 and half a surrogate pair could never be written again
                json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
                if not isinstance(row, dict):
                    raise InputError(f"found {shorten(row)}; expected an object")
                parsed = parse(row, number)
            except InputError as error:
                raise InputError(f"{path}, line {number}: {error}") from None
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: {error}; expected JSON") from None
            yield parsed
    if parsed is None:
        raise InputError(f"{path} has no whole line; expected JSONL, one object a line")

def make_folder(path):
    """Make the folder of an output file. InputError where its name is that of something else."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path} is no file; expected the name of one to write")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)

def write_jsonl(path, rows):
    """Write rows, aside first and then renamed: a killed run leaves no half-written file."""
    make_folder(path)
    aside = path + ".tmp"
    if os.path.lexists(aside):
        os.remove(aside)
    with open(aside, "x", encoding="utf-8") as out:  # "x" follows no link
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(aside, path)

def append_jsonl(path, row):
    """Append one whole line. Several ranks may append to one file."""
    import fcntl
    with open(path, "ab") as out:
        fcntl.flock(out, fcntl.LOCK_EX)
        out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

def continue_jsonl(path, parse):
    """The parsed rows of an output file that will be appended to; [] where there is none.

    Where `parse` refuses a line, or no line is whole, the file may be somebody else's: InputError,
    and nothing is changed. Else a last line that a killed writer left without its end is cut off.
    """
    make_folder(path)
    if not os.path.exists(path) or os.path.getsize(path) == 0:
        return []
    rows = list(read_jsonl(path, parse, torn=True))
    with open(path, "rb+") as file:
        text = file.read()
        end = text.rfind(b"\n") + 1
        if end < len(text):
            print(printable(f"{path}: cut off a last line that was torn"), file=sys.stderr)
            file.truncate(end)
    return rows

def lock(path):
    """Hold PATH.lock until this process ends; keep the returned file. InputError if it is held."""
    import fcntl
    path = os.path.realpath(path)  # one lock for out/run and out/run/
    os.makedirs(os.path.dirname(path), exist_ok=True)
    file = open(path + ".lock", "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another process writes {path}; expected it to end first") from None
    return file

# ---- Problems ------------------------------------------------------------------------------------
def parse_problem(row, number, stem="problem"):
    """A problem, in our form or as GSM8K, GSM-Symbolic and MATH are published, in our form:
    {"id", "question", "answer", ...}. All other fields pass through as they are."""
    problem = {"id": row.get("unique_id", f"{stem}-{number}"), **row}  # the former is MATH's
    if "question" not in row and "problem" in row:  # MATH
        problem["question"] = problem.pop("problem")
    if "answer" not in row and "solution" in row:  # MATH, as some publish it
        solution = get_field(row, "solution", str, "a worked solution")
        problem["answer"] = extract_answer(solution, strict=True)
    name = str(get_field(problem, "id", (str, int), "the problem's id"))
    question = get_field(problem, "question", str, "the text of the problem").strip()
    answer = str(get_field(problem, "answer", (str, int, float), "the final answer"))
    if "####" in answer:  # GSM8K: the worked solution, then #### and the answer
        solution, _, answer = answer.rpartition("####")
        problem.setdefault("solution", solution.strip())
    if "instance" in row and "template" not in row:  # GSM-Symbolic: instances of a template
        problem["template"] = name
        name = f"{name}-{row['instance']}"
    answer = answer.strip()
    if not question or not name.strip():
        raise InputError("the question or the id is blank; expected some text")
    if not is_correct(f"\\boxed{{{answer}}}", answer):
        raise InputError(f"no grader can read the answer {shorten(answer)}; expected a number, "
                         "a formula or words, with braces in pairs")
    return {**problem, "id": name, "question": question, "answer": answer}

def read_problems(path, limit=0):
    """The problems of a JSONL file, or the first `limit`. InputError, also for an id met twice."""
    stem = os.path.splitext(os.path.basename(path))[0]
    met = set()

    def parse(row, number):
        problem = parse_problem(row, number, stem)
        if problem["id"] in met:
            raise InputError(f"the id {shorten(problem['id'])} was met before; expected it once")
        met.add(problem["id"])
        return problem

    return list(islice(read_jsonl(path, parse), limit or None))

# ---- Trees ---------------------------------------------------------------------------------------
@dataclass
class Tree:
    """The distinct staged prefixes of one problem. Node 0 is the question; parents come first."""
    problem: dict      # as read_problems gives it
    steps: list        # (P,) each node's own step, "" at the root
    parent: list       # (P,) -1 at the root
    visits: list       # (P,) rollouts of the teacher through the node
    value: list        # (P,) sum of their rewards
    ids: list = None   # (P,) token ids of each node's own step, of the prompt at the root

    def path(self, node):
        """The nodes from the root to `node`, both included."""
        path = []
        while node >= 0:
            path.append(node)
            node = self.parent[node]
        return path[::-1]

    def depth(self):
        """(P,) number of steps in each prefix."""
        depth = np.zeros(len(self.parent), int)
        for node in range(1, len(depth)):
            depth[node] = depth[self.parent[node]] + 1
        return depth

    def prefix_ids(self, node):
        """The prompt's ids and those of the steps down to `node`."""
        return list(chain.from_iterable(self.ids[k] for k in self.path(node)))

def rollout(steps, reward):
    """A trace as a search of one rollout: nodes in a chain, the last one terminal."""
    nodes = [{"parent": k - 1, "step": step, "visits": 1, "value": reward}
             for k, step in enumerate(["", *steps])]
    nodes[-1].update(terminal=True, reward=reward)
    return nodes

def parse_node(node, k):
    """Node k of a search or a tree, its step stripped. Raises InputError."""
    parent = get_field(node, "parent", int, f"the number of node {k}'s parent")
    step = get_field(node, "step", str, f"the text of node {k}").strip()
    visits = get_field(node, "visits", int, f"the number of rollouts through node {k}")
    value = get_field(node, "value", (int, float), f"the rewards at node {k}, summed")
    if "terminal" in node:
        get_field(node, "terminal", bool, f"true or false at node {k}")
    is_question = k == 0 and parent == -1 and step == ""
    is_step = 0 <= parent < k and step != "" and not BLANK_LINE.search(step)
    if not (is_question or is_step) or not 0 <= value <= visits < 2 ** 53:
        raise InputError(f"node {k} is {shorten(node, 200)}; expected the question at node 0, else "
                         "an earlier parent and one step, and 0 <= value <= visits")
    return {**node, "step": step}

def parse_row(row, number):
    """A search, a tree or a trace -> (problem, nodes). Raises InputError."""
    get_field(row, "id", (str, int), "the problem's id, by which trees are merged")
    if "nodes" in row:  # asked first, for a problem may have a field "steps" of its own
        nodes = get_field(row, "nodes", list, "the nodes of a search or a tree")
        own = ("nodes", "settings")
    else:
        steps = get_field(row, "steps", list, 'the steps of a trace (a search or tree has "nodes")')
        nodes = rollout(steps, get_field(row, "reward", (int, float), "the reward, 0 to 1"))
        own = ("steps", "reward")
    if not nodes or not all(isinstance(node, dict) for node in nodes):
        raise InputError(f"the nodes are {shorten(nodes)}; expected objects, the question's first")
    problem = parse_problem({name: row[name] for name in row if name not in own}, number)
    return problem, [parse_node(node, k) for k, node in enumerate(nodes)]

def merge(sources):
    """Pairs (problem, nodes), as parse_row gives them -> [Tree], one a problem.

    Equal prefixes become one node, which sums visits and value. Left out are nodes that no rollout
    went through, those that end a solution or whose step bears the answer, and all below them.
    InputError where one id stands for two problems.
    """
    trees = {}   # problem id -> Tree
    places = {}  # (problem id, parent, step) -> node
    for problem, nodes in sources:
        name = problem["id"]
        if name not in trees:
            trees[name] = Tree(problem, [], [], [], [])
        tree = trees[name]
        for field in ("question", "answer"):
            if problem[field] != tree.problem[field]:
                found = f"{shorten(tree.problem[field])} and {shorten(problem[field])}"
                raise InputError(f"id {shorten(name)} has two {field}s, {found}; expected one")
        moved = {-1: -1}  # node of the source -> node of the tree, where it is not left out
        for k, node in enumerate(nodes):
            is_over = node["visits"] == 0 or node.get("terminal")
            has_answer = extract_answer(node["step"], strict=True) is not None
            if node["parent"] not in moved or (k > 0 and (is_over or has_answer)):
                continue
            place = (name, moved[node["parent"]], node["step"])
            if place not in places:
                places[place] = len(tree.steps)
                tree.steps.append(node["step"])
                tree.parent.append(moved[node["parent"]])
                tree.visits.append(0)
                tree.value.append(0.0)
            moved[k] = places[place]
            tree.visits[moved[k]] += node["visits"]
            tree.value[moved[k]] += node["value"]
    return list(trees.values())

def build(rows):
    """Searches, traces and trees, objects as in their files -> [Tree], one a problem."""
    return merge(parse_row(row, number) for number, row in enumerate(rows, 1))

def read_trees(paths):
    """The same from one JSONL file or a list of them. Raises InputError."""
    paths = [paths] if isinstance(paths, str) else paths
    return merge(chain.from_iterable(read_jsonl(path, parse_row) for path in paths))

def from_completions(path):
    """Any sampler's {"question", "answer", "completions": [...]}, one a line -> rows for `build`.

    Each completion is a search of one rollout. Its steps end at blank lines; it is graded strictly,
    and has reward 0 where the row's list "truncated" says so, as evaluate.py writes it.
    """
    stem = os.path.splitext(os.path.basename(path))[0]
    own = ("completions", "extracted", "correct", "flexible", "truncated", "tokens", "settings")

    def parse(row, number):
        texts = get_field(row, "completions", list, "a list of texts")
        row = {"truncated": [False] * len(texts), **row}
        truncated = get_field(row, "truncated", list, "true or false for each completion")
        if len(truncated) != len(texts) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"the completions are {shorten(texts)}, truncated is "
                             f"{shorten(truncated)}; expected lists of texts and as many bools")
        problem = parse_problem({name: row[name] for name in row if name not in own}, number, stem)
        rows = []
        for text, is_cut in zip(texts, truncated):
            steps = [step.strip() for step in BLANK_LINE.split(text) if step.strip()]
            is_solved = is_correct(text, problem["answer"], strict=True) and not is_cut
            rows.append({**problem, "nodes": rollout(steps, int(is_solved))})
        return rows

    return list(chain.from_iterable(read_jsonl(path, parse)))

def read_solutions(path):
    """The solutions to learn from in a file of traces and searches, [(question, steps)]: each trace
    and each rollout of a search that came to a right answer. InputError where there are none."""
    def parse(row, number):
        problem, nodes = parse_row(row, number)
        solutions = []
        for k, node in enumerate(nodes):
            ends_trace = "nodes" not in row and node.get("terminal")
            if k > 0 and (ends_trace or node.get("reward") == 1):
                # what the rollout wrote behind its last node, then its nodes up to the question
                steps = [node["rest"]] if node.get("rest") else []
                while k > 0:
                    steps.append(nodes[k]["step"])
                    k = nodes[k]["parent"]
                solutions.append((problem["question"], steps[::-1]))
        return solutions

    solutions = list(chain.from_iterable(read_jsonl(path, parse)))
    if not solutions:
        raise InputError(f"no solution in {path} came to a right answer; expected one or more")
    return solutions

def write_trees(path, trees):
    """Write trees as JSONL, with all fields of their problems."""
    names = ("parent", "step", "depth", "visits", "value")
    rows = []
    for tree in trees:
        columns = zip(tree.parent, tree.steps, tree.depth().tolist(), tree.visits, tree.value)
        rows.append({**tree.problem, "nodes": [dict(zip(names, node)) for node in columns]})
    write_jsonl(path, rows)

def tokenize(trees, encode, max_prompt):
    """Fill each tree's ids by encode(question, steps) -> [ids of the prompt, ids of each step], and
    drop prefixes of more than `max_prompt` tokens; they are never cut. Returns the trees that keep
    their question, and the number of prefixes dropped."""
    kept = []
    dropped = 0
    for tree in trees:
        ids = encode(tree.problem["question"], tree.steps[1:])
        length = {-1: 0}  # node -> tokens of its prefix
        moved = {-1: -1}  # node that stays -> its new number
        for node, parent in enumerate(tree.parent):
            length[node] = length[parent] + len(ids[node])
            if length[node] <= max_prompt:
                moved[node] = len(moved) - 1
        nodes = list(moved)[1:]
        dropped += len(ids) - len(nodes)
        if nodes:
            kept.append(Tree(
                problem=tree.problem,
                steps=[tree.steps[node] for node in nodes],
                parent=[moved[tree.parent[node]] for node in nodes],
                visits=[tree.visits[node] for node in nodes],
                value=[tree.value[node] for node in nodes],
                ids=[ids[node] for node in nodes]))
    return kept, dropped

# ---- Groups --------------------------------------------------------------------------------------
def rng(*key):
    """The generator of every draw. numpy takes the key (a, b, 0) for (a, b): no key ends in 0."""
    return np.random.default_rng(key)

def shuffled(place, count, seed):
    """Which of `count` items comes at `place` in endless passes, each in an order of its own."""
    epoch, place = divmod(place, count)
    return rng(seed, epoch, 0, 0, 1).permutation(count)[place]

def sample_group(tree, size, group, rng, root=True):
    """Draw a group's prefixes from one problem's tree: (size,) node numbers.

    group   "tree": distinct prefixes, uniform; "trace": prefixes of one root-to-leaf trace, whose
            leaf is uniform; "question": the bare question, `size` times, as in GRPO
    root    whether the bare question is among the prefixes of "tree" and "trace"
    Nodes repeat only where there are fewer of them than `size`.
    """
    if group == "question":
        return np.zeros(size, int)
    nodes = np.arange(len(tree.parent))
    if group == "trace":
        leaves = np.setdiff1d(nodes, tree.parent)
        nodes = np.array(tree.path(rng.choice(leaves)))
    elif group != "tree":
        raise ValueError(f"group is {group!r}; expected question, trace or tree")
    if not root and len(nodes) > 1:
        nodes = nodes[1:]
    return rng.choice(nodes, size, replace=len(nodes) < size)

# ---- Packing -------------------------------------------------------------------------------------
class Row(NamedTuple):
    """Sequences that share prefixes, laid down in one row."""
    ids: np.ndarray       # (L,) tokens
    position: np.ndarray  # (L,) each token's place in its own sequence: its position id
    mask: np.ndarray      # (L, L) bool: token i may attend to token j
    paths: list           # N arrays: the places in the row of each sequence's tokens

def pack(prefixes, completions=None):
    """Lay N sequences into one Row in which each distinct prefix token stands once.

    prefixes, completions   N lists of token ids; no completion is shared, each has its own loss

    >>> row = pack([[5, 6], [5, 6, 7]], [[8], [9]])
    >>> row.ids.tolist(), row.position.tolist()
    ([5, 6, 8, 7, 9], [0, 1, 2, 2, 3])
    >>> [path.tolist() for path in row.paths]
    [[0, 1, 2], [0, 1, 3, 4]]
    >>> row.mask.astype(int).tolist()
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
    """
    ids = []
    position = []
    parent = []  # the place of the token before, -1 at a start
    shared = {}  # (place of the token before, token) -> place of a prefix token
    paths = []
    for k, prefix in enumerate(prefixes):
        completion = completions[k] if completions else []
        path = []
        before = -1
        for n, token in enumerate([*prefix, *completion]):
            key = (before, token)
            if n < len(prefix) and key in shared:
                place = shared[key]
            else:
                place = len(ids)
                ids.append(token)
                position.append(n)
                parent.append(before)
            if n < len(prefix):
                shared[key] = place
            path.append(place)
            before = place
        paths.append(np.array(path, int))
    mask = np.eye(len(ids), dtype=bool)
    for place, before in enumerate(parent):
        if before >= 0:
            mask[place] |= mask[before]
    return Row(np.array(ids, int), np.array(position, int), mask, paths)

class MicroBatch(NamedTuple):
    """What one forward pass takes."""
    samples: list  # in the order of the rows' paths
    rows: list     # of Row

def micro_batches(samples, micro_tokens, row_tokens=0):
    """Split samples into MicroBatches of at most `micro_tokens` tokens, padding included, where one
    sample allows it. A group shares a row, halved until it has no more than `row_tokens` tokens;
    with row_tokens 0 every sample has its own."""
    groups = defaultdict(list)
    for k, sample in enumerate(samples):
        groups[sample.group if row_tokens else k].append(sample)
    waiting = list(groups.values())
    packed = []  # (samples, Row)
    while waiting:
        group = waiting.pop()
        row = pack([s.prefix_ids for s in group], [s.completion_ids for s in group])
        if len(row.ids) > min(micro_tokens, row_tokens) and len(group) > 1:
            half = len(group) // 2
            waiting += [group[half:], group[:half]]
        else:
            packed.append((group, row))
    packed.sort(key=lambda pair: -len(pair[1].ids))
    while packed:
        count = max(1, micro_tokens // len(packed[0][1].ids))  # the longest comes first
        groups, rows = zip(*packed[:count])
        yield MicroBatch(list(chain.from_iterable(groups)), list(rows))
        packed = packed[count:]

# ---- Showing -------------------------------------------------------------------------------------
YELLOW_TO_GREEN = (226, 190, 154, 118, 82, 46, 40, 34, 28, 22)  # of 256 colours, as in Fig. 1

def show(tree, colour, width):
    """The tree as text, a line a node: its step, indented, its visits, the teacher's success."""
    children = [[] for _ in tree.parent]
    for node in range(1, len(tree.parent)):
        children[tree.parent[node]].append(node)
    depth = tree.depth()
    lines = []
    stack = [0]
    while stack:
        node = stack.pop()
        stack += reversed(children[node])
        success = tree.value[node] / max(tree.visits[node], 1)
        numbers = f"{tree.visits[node]:6d} visits {success:5.0%}"
        room = max(20, width - len(numbers))
        text = "│  " * min(depth[node], room // 6)
        text += printable(tree.steps[node] or tree.problem["question"])
        line = f"{text:<{room}.{room}}{numbers}"
        if colour:
            shade = YELLOW_TO_GREEN[min(depth[node], len(YELLOW_TO_GREEN) - 1)]
            line = f"\033[38;5;{shade}m{line}\033[0m"
        lines.append(line)
    last = printable(f"answer: {tree.problem['answer']}   id: {tree.problem['id']}")
    return "\n".join([*lines, last[:width]])

def summary(trees):
    """Size and shape of the trees, and for each depth its prefixes and the teacher's success."""
    sizes = np.array([len(tree.parent) for tree in trees])
    is_chain = [len(set(tree.parent)) == len(tree.parent) for tree in trees]  # no parent twice
    depths = np.concatenate([tree.depth() for tree in trees])
    visits = np.bincount(depths, np.concatenate([tree.visits for tree in trees]))
    value = np.bincount(depths, np.concatenate([tree.value for tree in trees]))
    lines = [
        f"{len(trees)} problems, {len(depths)} distinct prefixes, {sizes.mean():.1f} a problem",
        f"{np.mean(sizes >= 8):.0%} of the trees have 8 prefixes or more, "
        f"{np.mean(is_chain):.0%} are chains, without a branch",
        f"{np.sum(sizes == 1)} trees have no prefix but the question",
        "depth  prefixes  success"]
    for depth, count in enumerate(np.bincount(depths)):
        lines.append(f"{depth:5d}  {count:8d}  {value[depth] / max(visits[depth], 1):7.1%}")
    return "\n".join(lines)

def main():
    parser = arguments("Build prefix trees from searches and traces, and show them.")
    parser.add_argument("files", nargs="*", default=["data/arithmetic/trees.jsonl"],
                        help="JSONL of searches, traces or trees")
    parser.add_argument("--from_completions", action="store_true",
                        help='the files are a sampler\'s {"question", "answer", "completions"}')
    parser.add_argument("--out", help="write the merged trees to this JSONL file")
    parser.add_argument("--show", action="store_true", help="draw a tree in the terminal")
    parser.add_argument("--id", help="the problem to draw; without it, the first")
    args = parser.parse_args()
    if args.from_completions:
        trees = build(chain.from_iterable(map(from_completions, args.files)))
    else:
        trees = read_trees(args.files)
    if args.out and os.path.exists(args.out) and os.path.getsize(args.out) > 0:
        if any(os.path.samefile(args.out, path) for path in args.files):
            raise InputError(f"--out {args.out} is read as well; expected another file")
        _, nodes = next(read_jsonl(args.out, parse_row))
        if "depth" not in nodes[0]:
            raise InputError(f"--out {args.out} holds no trees; expected a new file")
    if args.out:
        write_trees(args.out, trees)
    if args.show or args.id:
        chosen = [tree for tree in trees if args.id in (None, tree.problem["id"])]
        if not chosen:
            raise InputError(f"no problem has the id {shorten(args.id)}; expected another")
        width = shutil.get_terminal_size().columns
        print(show(chosen[0], sys.stdout.isatty(), width), end="\n\n")
    print(summary(trees))

if __name__ == "__main__":
    run_command(main)
