"""
Prefix trees: from searches and traces to groups of prefixes, and from a group to one packed row.

1. Build. Searches (of mcts.py) and traces (of any sampler, of people) are cut into their distinct
   staged prefixes and merged by problem: the solution ABCDE yields A, AB, ABC, ABCD (Sec. 4.1).
   Failed branches are kept; steps that bear the answer are not, for nothing is left to do there.
2. Draw. A group is some prefixes of one problem's tree (Sec. 3.1, rho_D).
3. Pack. The samples of a group share most of their tokens: `pack` lays each distinct one down once.

    python tree.py out/search.jsonl more_traces.jsonl --out out/trees.jsonl
    python tree.py out/trees.jsonl --show --id train-12       # without a file: the embedded trees
"""
import argparse
import json
import os
import re
import shutil
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np

from data.grade import extract_answer, is_gradable, states_answer

JOIN = "\n\n"  # between steps, and behind each step of a prefix
BLANK_LINE = re.compile(r"\n[ \t\r]*\n")


# ---- Trees ---------------------------------------------------------------------------------------
@dataclass
class Tree:
    """The distinct staged prefixes of one problem. Node 0 is the question; parents come first."""
    problem: dict                               # as read_problems gives it
    steps: list = field(default_factory=list)   # (P,) each node's own step, "" at the root
    parent: list = field(default_factory=list)  # (P,) -1 at the root
    visits: list = field(default_factory=list)  # (P,) rollouts of the teacher through the node
    value: list = field(default_factory=list)   # (P,) sum of their rewards
    ids: list = field(default_factory=list)     # (P,) token ids of each step, at 0 of the prompt

    def add(self, parent, step, visits=0, value=0.0):
        """Append a node. Returns its number."""
        self.parent.append(parent)
        self.steps.append(step)
        self.visits.append(visits)
        self.value.append(value)
        return len(self.steps) - 1

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


def parse_node(node, k):
    """Node k of a search or a tree, its step stripped. Raises InputError."""
    parent = get_field(node, "parent", int, f"the number of node {k}'s parent")
    step = get_field(node, "step", str, f"the text of node {k}").strip()
    visits = get_field(node, "visits", int, f"the number of rollouts through node {k}")
    value = get_field(node, "value", (int, float), f"the rewards at node {k}, summed")
    is_question = k == 0 and parent == -1 and step == ""
    is_step = 0 <= parent < k and step != "" and not BLANK_LINE.search(step)
    if not (is_question or is_step) or not 0 <= value <= visits < 2 ** 53:
        raise InputError(f"node {k} is {shorten(node, 200)}; expected the question at node 0, else "
                         "an earlier parent and one step, and 0 <= value <= visits")
    return {**node, "step": step}


def parse_row(row, number=0):
    """A search, a tree or a trace -> (problem, nodes). Raises InputError."""
    if "nodes" in row:  # asked first, for a problem may have a field "steps" of its own
        own = ("nodes", "settings")
        nodes = get_field(row, "nodes", list, "the nodes of a search or a tree")
    else:  # a trace is a search of one rollout: nodes in a chain
        own = ("steps", "reward")
        steps = get_field(row, "steps", list, 'the steps of a trace (a search or tree has "nodes")')
        reward = get_field(row, "reward", (int, float), "the reward, 0 to 1")
        nodes = [{"parent": k - 1, "step": step, "visits": 1, "value": reward}
                 for k, step in enumerate(["", *steps])]
        nodes[-1].update(terminal=True, ends_trace=True)
    if not nodes or not all(isinstance(node, dict) for node in nodes):
        raise InputError(f"the nodes are {shorten(nodes)}; expected objects, the question's first")
    problem = parse_problem({name: row[name] for name in row if name not in own})
    return problem, [parse_node(node, k) for k, node in enumerate(nodes)]


def merge(sources):
    """Pairs (problem, nodes) -> [Tree], one a problem, with the fields of its first pair. Equal
    prefixes are one node, which sums visits and value. Left out are nodes without visits, those
    that end a solution or whose step bears the answer, and all below them."""
    trees = {}   # problem id -> Tree
    places = {}  # (problem id, parent, step) -> node
    for problem, nodes in sources:
        name = problem["id"]
        tree = trees.setdefault(name, Tree(problem))
        for text in ("question", "answer"):
            if problem[text] != tree.problem[text]:
                raise InputError(f"two {text}s have the id {shorten(name)}; expected one")
        number_of = {-1: -1}  # node of the source -> node of the tree, where it is not left out
        for k, node in enumerate(nodes):
            is_over = node["visits"] == 0 or node.get("terminal")
            has_answer = states_answer(node["step"])
            if node["parent"] not in number_of or (k > 0 and (is_over or has_answer)):
                continue
            parent = number_of[node["parent"]]
            place = (name, parent, node["step"])
            if place not in places:
                places[place] = tree.add(parent, node["step"])
            number_of[k] = places[place]
            tree.visits[places[place]] += node["visits"]
            tree.value[places[place]] += node["value"]
    return list(trees.values())


def build(rows):
    """Searches, traces and trees, objects as in their files -> [Tree], one a problem."""
    return merge(map(parse_row, rows))


def read_trees(paths):
    """The same from one JSONL file or a list of them. Raises InputError."""
    paths = [paths] if isinstance(paths, str) else paths
    return merge(chain.from_iterable(read_jsonl(path, parse_row) for path in paths))


def read_solutions(path):
    """The solutions to learn from, [(question, steps)]: all traces of a file, right or wrong, and
    the rollouts of its searches that came to a right answer. InputError where there are none."""
    solutions = []
    for problem, nodes in read_jsonl(path, parse_row):
        for node in nodes[1:]:
            if node.get("reward") == 1 or node.get("ends_trace"):
                steps = [node.get("rest", "")]  # what the rollout wrote behind its last node
                while node["parent"] >= 0:
                    steps.append(node["step"])
                    node = nodes[node["parent"]]
                solutions.append((problem["question"], [step for step in steps[::-1] if step]))
    if not solutions:
        raise InputError(f"no solution in {path} came to a right answer; expected traces, or "
                         "searches in which one did (trees do not hold the ends of solutions)")
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
    """Trees with the ids of encode(question, steps) -> [ids of the prompt, ids of each step], and
    the number of prefixes dropped since they had more than `max_prompt` tokens."""
    kept = []
    dropped = 0
    for tree in trees:
        ids = encode(tree.problem["question"], tree.steps[1:])
        short = Tree(tree.problem)
        length = {-1: 0}  # node -> tokens of its prefix
        moved = {-1: -1}  # node -> its number in the short tree
        for node, parent in enumerate(tree.parent):
            length[node] = length[parent] + len(ids[node])
            if length[node] <= max_prompt:
                moved[node] = short.add(moved[parent], tree.steps[node], tree.visits[node],
                                        tree.value[node])
                short.ids.append(ids[node])
        dropped += len(tree.parent) - len(short.parent)
        if short.parent:
            kept.append(short)
    return kept, dropped


# ---- Groups --------------------------------------------------------------------------------------
def rng(seed, *key):
    """The generator of one draw: `key` says which, by words and numbers."""
    key = [crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def shuffled(place, count, seed):
    """Which of `count` items comes at `place` in endless passes, each in an order of its own."""
    epoch, place = divmod(place, count)
    return rng(seed, "pass", epoch).permutation(count)[place]


def sample_group(tree, size, group, rng, root=True):
    """Draw a group's prefixes: (size,) node numbers, distinct where there are enough.

    group   "tree": of the whole tree, uniform; "trace": of one root-to-leaf trace, whose leaf is
            uniform; "question": the bare question each time, as in GRPO
    root    whether the bare question is among the prefixes of "tree" and "trace"
    """
    if group == "question":
        return np.zeros(size, int)
    nodes = np.arange(len(tree.parent))
    if group == "trace":
        leaves = np.setdiff1d(nodes, tree.parent)
        nodes = np.array(tree.path(rng.choice(leaves)))
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
    places = {}  # (place of the token before, token) of a prefix -> place
    paths = []
    for k, prefix in enumerate(prefixes):
        completion = completions[k] if completions else []
        path = []
        before = -1
        for n, token in enumerate([*prefix, *completion]):
            key = (before, token) if n < len(prefix) else (k, n, "completion")
            if key not in places:
                places[key] = len(ids)
                ids.append(token)
                position.append(n)
                parent.append(before)
            before = places[key]
            path.append(before)
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
    """Split samples into MicroBatches of at most `micro_tokens` tokens, padding included, or of one
    sample. A group shares a row, halved until that has at most `row_tokens` tokens; with 0 each
    sample has its own."""
    limit = min(micro_tokens, row_tokens)
    groups = defaultdict(list)
    for k, sample in enumerate(samples):
        groups[sample.group if row_tokens else k].append(sample)
    waiting = list(groups.values())
    packed = []  # (samples, Row)
    while waiting:
        group = waiting.pop()
        row = pack([s.prefix_ids for s in group], [s.completion_ids for s in group])
        if len(row.ids) > limit and len(group) > 1:
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


# ---- Problems ------------------------------------------------------------------------------------
def parse_problem(row, name=None):
    """A problem as we, GSM8K, GSM-Symbolic or MATH publish it -> {"id", "question", "answer", ...}.
    `name` is the id of one without. All other fields pass through."""
    problem = {"id": row.get("unique_id", name), **row}  # the former in MATH
    if "question" not in row and "problem" in row:  # MATH
        problem["question"] = problem.pop("problem")
    if "answer" not in row and "solution" in row:  # MATH, as some publish it
        problem["answer"] = extract_answer(str(row["solution"]), strict=True)
    name = str(get_field(problem, "id", (str, int), "the problem's id"))
    question = get_field(problem, "question", str, "the text of the problem").strip()
    problem.setdefault("answer", "")  # a grader of another kind may do without
    answer = str(get_field(problem, "answer", (str, int, float), "the final answer")).strip()
    if "####" in answer:  # GSM8K: the worked solution, then #### and the answer
        solution, _, answer = answer.rpartition("####")
        answer = answer.strip()
        problem.setdefault("solution", solution.strip())
    if "instance" in row and "template" not in row:  # GSM-Symbolic: instances of a template
        problem["template"] = name
        name = f"{name}-{row['instance']}"
    problem |= {"id": name, "question": question, "answer": answer}
    if not name.strip() or not question or not is_gradable(problem):
        raise InputError(f"the answer {shorten(answer)} cannot be graded, or the question or the "
                         "id is blank; expected text, and a number, a formula or words")
    return problem


def read_problems(path, limit=0):
    """The problems of a JSONL file, or the first `limit`. InputError, also for an id met twice."""
    met = set()

    def parse(row, number):
        problem = parse_problem(row, f"{Path(path).stem}-{number}")
        if problem["id"] in met:
            raise InputError(f"the id {shorten(problem['id'])} was met before; expected it once")
        met.add(problem["id"])
        return problem
    return list(islice(read_jsonl(path, parse), limit or None))


# ---- JSONL files, one object a line --------------------------------------------------------------
def get_field(row, name, kind, expected):
    """row[name] where it is of this type, or one of a tuple of types; else InputError."""
    value = row.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f'field "{name}" is {shorten(value)}; expected {expected}')
    return value


def read_jsonl(path, parse, torn=False):
    """Yield parse(row, line_number) of every line; with `torn`, all but a last one without its end.
    InputError where there is no line, and for a line that is no object or that `parse` refuses."""
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
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: {error}") from None
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
    with open(path + ".tmp", "w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(path + ".tmp", path)


def append_jsonl(path, row):
    """Append one whole line. Several ranks may append to one file."""
    import fcntl
    with open(path, "ab") as out:
        fcntl.flock(out, fcntl.LOCK_EX)
        out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def continue_jsonl(path, parse):
    """The parsed rows of an output file that will be appended to; [] where there is none.

    `parse` tells whether the file is ours: where it refuses no whole line, a last line that a
    killed writer left without its end is cut off; else InputError, and nothing is changed.
    """
    make_folder(path)
    if not os.path.exists(path) or os.path.getsize(path) == 0:
        return []
    rows = list(read_jsonl(path, parse, torn=True))
    with open(path, "rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
    return rows


def lock(path):
    """Hold PATH.lock until this process ends; keep the returned file. InputError if it is held."""
    import fcntl
    path = os.path.realpath(path)  # one lock however the path is spelt
    make_folder(path)
    file = open(path + ".lock", "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another process writes {path}; expected it to end first") from None
    return file


# ---- Commands ------------------------------------------------------------------------------------
class InputError(ValueError):
    """A user's mistake: what was found, where, and what was expected."""


def run_command(main):
    """Run a script's `main`. A mistake of the user is one line on stderr, and status 2."""
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        main()
    except BrokenPipeError:  # python tree.py --show | head
        os._exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, OSError) as error:
        print(printable(f"{os.path.basename(sys.argv[0])}: {error}"), file=sys.stderr)
        sys.exit(2)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):  # tells every default but None
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
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"found {text}, expected {low} to {high:g}")
        return kind(text)
    return number


def printable(text):
    """Text without what a terminal would obey: escapes, bells, marks that turn its direction."""
    return "".join(c if c.isprintable() else " " for c in text)


def shorten(value, width=60):
    """A value as an error message shows it: JSON, in one line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= width else text[:width - 3] + "..."


# ---- The command ---------------------------------------------------------------------------------
def show(tree, width):
    """The tree as text, a line a node: its step, indented, its visits, the teacher's success."""
    room = max(20, width - 20)
    lines = []
    for path in sorted(map(tree.path, range(len(tree.parent)))):  # children follow their parent
        node = path[-1]
        success = tree.value[node] / max(tree.visits[node], 1)
        text = "│  " * (len(path) - 1) + printable(tree.steps[node] or tree.problem["question"])
        lines.append(f"{text:<{room}.{room}}{tree.visits[node]:7d} visits {success:5.0%}")
    return "\n".join(lines)


def can_hold_triplet(tree, group):
    """Whether some rewards would make a triplet of this group (Sec. 3.2): it has two siblings and
    a prefix below one of them."""
    group = set(group)
    siblings = Counter(tree.parent[node] for node in group)
    for node in group:
        for above in tree.path(node)[:-1]:
            if above in group and siblings[tree.parent[above]] > 1:
                return True
    return False


def summary(trees):
    """What a run on these trees has to work with, as text."""
    count = len(trees)
    draws = rng(0)
    triplets = []
    for tree in trees:
        for _ in range(max(1, 40_000 // count)):
            group = sample_group(tree, 8, "tree", draws)
            triplets.append(can_hold_triplet(tree, group.tolist()))
    sizes = np.array([len(tree.parent) for tree in trees])
    chains = [max(np.bincount(tree.parent[1:], minlength=1)) <= 1 for tree in trees]
    lines = [f"{count} problems, {sizes.sum()} distinct prefixes, {sizes.mean():.1f} a problem",
             f"{np.mean(chains):.1%} of the trees are chains, without a branch",
             f"{np.mean(sizes >= 8):.1%} have 8 prefixes or more, enough for a group of 8",
             f"{np.mean(triplets):.1%} of groups of 8 can hold a triplet, if the rewards are such",
             f"{(sizes == 1).sum()} have no prefix but the question",
             "depth   prefixes   teacher's success (of visits)"]
    depth = np.concatenate([tree.depth() for tree in trees])
    visits = np.bincount(depth, np.concatenate([tree.visits for tree in trees]))
    value = np.bincount(depth, np.concatenate([tree.value for tree in trees]))
    for d, prefixes in enumerate(np.bincount(depth)):
        lines.append(f"{d:5d} {prefixes:10d}   {value[d] / max(visits[d], 1):.1%}")
    return "\n".join(lines)


def main():
    parser = arguments("Build prefix trees from searches and traces, and show them.")
    parser.add_argument("files", nargs="*", default=["data/arithmetic/trees.jsonl"],
                        help="JSONL of searches, traces or trees")
    parser.add_argument("--out", help="write the merged trees to this JSONL file")
    parser.add_argument("--show", action="store_true", help="draw a tree in the terminal")
    parser.add_argument("--id", help="the problem to draw; without it, the first")
    args = parser.parse_args()
    trees = read_trees(args.files)
    if args.out:
        make_folder(args.out)
        if os.path.exists(args.out):  # it may be what took a search many hours
            _, nodes = next(read_jsonl(args.out, parse_row))
            is_input = any(os.path.samefile(args.out, path) for path in args.files)
            if is_input or "depth" not in nodes[0]:
                raise InputError(f"{args.out} is an input or no trees; expected another --out")
        # searches stand in the order in which they ended, which must not decide what --seed draws
        trees.sort(key=lambda tree: (len(tree.problem["id"]), tree.problem["id"]))
        write_trees(args.out, trees)
    if args.show or args.id:
        chosen = [tree for tree in trees if args.id in (None, tree.problem["id"])]
        if not chosen:
            raise InputError(f"no problem has the id {shorten(args.id)}; expected another")
        print(show(chosen[0], shutil.get_terminal_size().columns), end="\n\n")
    print(summary(trees))


if __name__ == "__main__":
    run_command(main)
