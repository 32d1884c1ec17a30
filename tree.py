"""
Prefix trees: from searches and traces to groups of prefixes, and from a group to one packed row.

1. Build. A search (mcts.py) or a list of traces (any sampler, any human) is cut into its distinct staged
   prefixes, merged by problem: ABCDE yields A, AB, ABC, ABCD (Sec. 4.1). Terminal nodes and prefixes that
   already bear the answer are left out, failed branches are kept, with their visits and value.
2. Draw. A group is `size` prefixes of one problem's tree (Sec. 3.1, rho_D): across the tree, along one
   root-to-leaf trace, or the bare question `size` times.
3. Pack. The samples of a group share most of their tokens; `pack` lays each distinct one down once.

    python tree.py out/search.jsonl more_traces.jsonl --out out/trees.jsonl
    python tree.py --show                                   # the embedded trees, one drawn in the terminal
    python tree.py --show out/trees.jsonl --id train-12
"""
import argparse
import atexit
import json
import os
import re
import signal
import sys
from dataclasses import dataclass, field

import numpy as np

# What announces a final answer; a prefix that has it leaves nothing to reason about.
ANSWER_MARKER = re.compile(r"\\(?:boxed|fbox)|####|answers?[\s*_]{0,9}(?:(?:is|are)\b|[:=])", re.IGNORECASE)
CONTENT = re.compile(r"[^\W_]|[^\x00-\x7f\s]|[(\[]")  # an answer has some of it, or no completion is ever right
BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
JOIN = "\n\n"  # between steps, and after each step of a prefix


# --- Files. A user's mistake ends in one sentence and exit status 2, not in a traceback.
class InputError(ValueError):
    """What was found, where, and what was expected: shown to the user as it is."""


def leave_on_signals():
    """From here on Ctrl-C and SIGTERM end the script cleanly: files are closed, then one sentence, and exit status 130 or 143."""
    def leave(number, _):
        def end(*_):
            os.write(2, f"\n{os.path.basename(sys.argv[0])}: stopped by {signal.Signals(number).name}; what was finished is kept.\n".encode())
            os._exit(128 + number)
        atexit.register(end)
        sys.unraisablehook = lambda _: None  # the exit may fall into a destructor, which would show it as a traceback
        signal.signal(signal.SIGALRM, end)
        signal.alarm(3)  # libraries swallow an exit here and there
        sys.exit(128 + number)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)


def stop_on_signals():
    """A list that SIGTERM and Ctrl-C write to, for a loop that ends by itself when it has finished what it does. A second one ends it at once."""
    stopped = []

    def note(number, _):
        stopped.append(number)
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return stopped


def run_command(main):
    """Run a script's `main`; an InputError, or a file that cannot be read or written, becomes one line on stderr and exit status 2."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    leave_on_signals()
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # a terminal without our box characters; whole lines before a signal
    try:
        main()
        sys.stdout.flush()  # a closed pipe shows here, not when the interpreter ends
    except BrokenPipeError:  # `python tree.py --show | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError, MemoryError) as error:
        kept = ". What was written before is intact" if isinstance(error, OSError) and not error.filename else ""  # a full disk
        print(printable(f"{os.path.basename(sys.argv[0])}: {error}{kept}"), file=sys.stderr)
        sys.exit(2)
    finally:  # a script has done all it does, and a signal would only be a traceback while the interpreter ends; a caller gets its handlers back
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if main.__module__ == "__main__" else handler)


def arguments(description):
    """An argparse parser as every script has it: defaults in the help, whole names only, and a mistake is an InputError."""
    def error(message):
        raise InputError(f"{message}; see --help.")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.error = error
    return parser


def at_least(low, kind=int, high=float("inf")):
    """A type of argparse's: a finite number of this kind, from `low` to `high`."""
    def parse(text):
        try:
            if low <= kind(text) <= high and kind(text) < float("inf"):
                return kind(text)
        except ValueError:
            pass
        limits = f"of at least {low}" if high == float("inf") else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"found {shorten(text)}, expected {'a whole number' if kind is int else 'a number'} {limits}")
    return parse


def read_jsonl(path, parse, skip_bad=False):
    """Yield `parse(row, line_number)` for every line of a JSONL file.

    Raises InputError with file, line, what was found and what was expected: for a missing or empty file,
    bytes that are no UTF-8, a torn line, a line that is no object, and whatever `parse` refuses.
    With `skip_bad` a bad line is named on stderr and passed over.
    """
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}. Expected a JSONL file, one object a line.")
    good = bad = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                try:
                    row = json.loads(line.decode("utf-8-sig"), parse_constant=int)  # int("NaN") and int("Infinity") raise
                    json.dumps(row, ensure_ascii=False, allow_nan=False).encode()  # half a surrogate pair, or 1e999, could never be written again
                except (ValueError, RecursionError) as error:
                    raise InputError(f"the line is no JSON ({error}); it may be torn. Expected one object a line.")
                if not isinstance(row, dict):
                    raise InputError(f"found {shorten(row)}, expected an object in braces.")
                parsed = parse(row, number)
            except (InputError, RecursionError) as error:  # the latter: nested just so deep that it can be read but not shown
                if not skip_bad:
                    raise InputError(f"{path}, line {number}: {error}") from None
                bad += 1
                print(printable(f"skipped {path}, line {number}: {error}"), file=sys.stderr)
                continue
            good += 1
            yield parsed
    if bad:
        print(printable(f"skipped {bad} bad lines of {path}"), file=sys.stderr)
    if not good:
        raise InputError(f"{path} holds no usable line. Expected JSONL, one object a line.")


def make_folder(path):
    """Make the folder of an output file. InputError where its name is that of a folder, a device or a pipe."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path} is no file; expected the name of one to write.")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)


def drop_torn_line(path):
    """Make an output file that can be appended to: create it where it is missing, and cut off a last line that a killed writer
    left without its end. What opens no object is no such line and stays."""
    make_folder(path)
    with open(path, "ab+") as file:
        file.seek(0)
        whole = (text := file.read()).rfind(b"\n") + 1
        if text[whole:whole + 1] == b"{":
            file.truncate(whole)


def write_jsonl(rows, path):
    """Write rows as JSONL, aside first and then renamed: a killed run leaves no half-written file."""
    make_folder(path)
    with open(path + ".tmp", "w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(path + ".tmp", path)


def continue_jsonl(path, keep):
    """A JSONL file opened to append whole lines, without a torn last one and without the rows that `keep` refuses."""
    if os.path.exists(path):
        drop_torn_line(path)
        with open(path, encoding="utf-8") as lines:
            write_jsonl([row for row in map(json.loads, lines) if keep(row)], path)
    return open(path, "a", encoding="utf-8", buffering=1)


def printable(text):
    """Text without what a terminal would obey: escapes, bells, and marks that turn the writing direction."""
    return "".join(c if c.isprintable() else " " for c in text)


def shorten(value, width=60):
    """A value as an error message shows it: one line, printable, not longer than `width`."""
    text = json.dumps(value, default=str)
    return text if len(text) <= width else text[:width - 3] + "..."


def take(row, name, kind, expected):
    """row[name], or an InputError that says what stands there instead of `expected`."""
    if not isinstance(row.get(name), kind) or isinstance(row[name], bool) and kind is not bool:
        raise InputError(f"field \"{name}\" is {shorten(row[name]) if name in row else 'missing'}; expected {expected}.")
    return row[name]


def parse_problem(row, number, stem="problem"):
    """One problem, in our form or as GSM8K, GSM-Symbolic and MATH publish it, as {"id", "question", "answer", ...}.

    `steps` (GSM8K: the lines of the solution) and `level` and `subject` (MATH) are kept for the evaluation.
    """
    question = take(row, "question" if "question" in row or "problem" not in row else "problem", str, "the text of the problem")
    answer = str(take(row, "answer", (str, int, float), "the final answer as text"))
    problem = {key: row[key] for key in ("steps", "level", "subject") if isinstance(row.get(key), (str, int))}
    if "####" in answer:  # GSM8K: the worked solution, then #### and the answer
        solution, _, answer = answer.rpartition("####")
        problem.setdefault("steps", sum(bool(line.strip()) for line in solution.splitlines()))
    if not question.strip():
        raise InputError(f"the question is {shorten(question)}; expected some text.")
    answer = answer.strip()
    bare = re.sub(r"\\(text\w*|[{}])", lambda m: "" if m[1][0] == "t" else "(", ANSWER_MARKER.sub("", answer))
    if not CONTENT.search(bare) or bare.count("{") != bare.count("}") or answer.endswith("\\"):
        raise InputError(f"no grader can read the answer {shorten(answer)} of {shorten(row['answer'])}; expected a number, a formula or words, braces in pairs.")
    name = take({"id": row.get("unique_id", f"{stem}-{number}"), **row}, "id", (str, int), "the problem's id")
    if "instance" in row:  # GSM-Symbolic: one template, many instances
        name = f"{name}-{row['instance']}"
    if not str(name).strip():
        raise InputError(f"field \"id\" is {shorten(name)}; expected the problem's id.")
    return {"id": str(name), "question": question.strip(), "answer": answer, **problem}


def read_problems(path, limit=None, skip_bad=False):
    """The problems of a JSONL file, as parse_problem gives them. Raises InputError, also for an id met twice."""
    stem = os.path.splitext(os.path.basename(path))[0]
    problems = {}

    def parse(row, number):
        problem = parse_problem(row, number, stem)
        if problem["id"] in problems:
            raise InputError(f"the id {shorten(problem['id'])} was met before; expected each id once.")
        problems[problem["id"]] = problem

    for _ in read_jsonl(path, parse, skip_bad):
        if limit and len(problems) >= limit:
            break
    return list(problems.values())


# --- Trees
@dataclass
class Tree:
    """The distinct staged prefixes of one problem. Node 0 is the question; a parent stands before its children."""
    id: str
    question: str
    answer: str
    steps: list = field(default_factory=lambda: [""])     # (P,) each node's own step, "" at the root
    parent: list = field(default_factory=lambda: [-1])    # (P,)
    visits: list = field(default_factory=lambda: [0])     # (P,) rollouts of the teacher through the node
    value: list = field(default_factory=lambda: [0.0])    # (P,) sum of their rewards
    ids: list = None                                      # (P,) token ids of each node's own step, by `tokenize`

    def path(self, node):
        """Nodes from the root to `node`, both included."""
        path = [node]
        while self.parent[path[-1]] >= 0:
            path.append(self.parent[path[-1]])
        return path[::-1]

    def depth(self):
        """(P,) number of steps in each prefix."""
        depth = np.zeros(len(self.parent), int)
        for node in range(1, len(depth)):
            depth[node] = depth[self.parent[node]] + 1
        return depth

    def prefix_ids(self, node):
        """The prompt's ids and those of the steps down to `node`: never decoded, never encoded again."""
        return [token for step in self.path(node) for token in self.ids[step]]


def parse_prefixes(row, number):
    """A search, a trace or a tree as (id, question, answer, nodes), each node (parent, step, visits, value, left out):
    what no rollout went through, and what ends a solution, is no prefix of a staged trace."""
    take(row, "id", (str, int), "the problem's id, by which trees are merged")
    problem, parsed = parse_problem(row, number), []
    if "nodes" in row:
        nodes = take(row, "nodes", list, "a list of nodes, the question's first")
    else:  # a trace is a search of one rollout: a chain, its last step terminal
        steps = take(row, "steps", list, "the list of steps of a trace (or \"nodes\", for a search or a tree)")
        reward = take(row, "reward", (int, float), "the trace's reward, 0 to 1")
        nodes = steps and [{"parent": k - 1, "step": step, "visits": 1, "value": reward, "terminal": k == len(steps)}
                           for k, step in enumerate(["", *steps])]
    if not nodes:
        raise InputError("the list of nodes or steps is empty; expected one or more.")
    for k, node in enumerate(nodes):
        try:
            if not isinstance(node, dict):
                raise InputError(f"found {shorten(node)}, expected an object.")
            parent, step = take(node, "parent", int, "a node's number"), take(node, "step", str, "a step's text").strip()
            visits, value = take(node, "visits", int, "a number of rollouts"), take(node, "value", (int, float), "the sum of their rewards")
            terminal = "terminal" in node and take(node, "terminal", bool, "true or false")
            if not (0 <= parent < k or k == 0 and parent == -1):
                raise InputError(f"its parent is {shorten(parent)}; expected " + (f"an earlier node, 0 to {k - 1}." if k else "-1, at node 0."))
            if bool(step) != bool(k) or BLANK_LINE.search(step):
                raise InputError(f"its step is {shorten(node['step'])}; expected " + ("one step, without a blank line." if k else "\"\" at node 0."))
            if not 0 <= value <= visits < 2 ** 53:
                raise InputError(f"it has visits {shorten(visits)} and value {shorten(value)}; expected 0 <= value <= visits.")
        except InputError as error:
            raise InputError(f"node {k}: {error}") from None
        parsed.append((parent, step, visits, float(value), terminal or visits == 0))
    return problem["id"], problem["question"], problem["answer"], parsed


def parse_traces(row, number):
    """The solutions to learn by heart, a list of (question, steps): a trace's own, and of a search each one that came to a right answer."""
    _, question, _, nodes = parse_prefixes(row, number)
    if "steps" in row:
        return [(question, [step for _, step, *_ in nodes[1:]])]
    if not any("reward" in node for node in row["nodes"]):
        raise InputError("this is a tree, which has no whole solution; expected a trace, with \"steps\", or a search, whose nodes have a \"reward\".")
    traces = []
    for node, source in zip(nodes, row["nodes"]):
        if source.get("reward") == 1 and node[1]:
            steps, parent = [node[1], *filter(None, [source.get("rest")])], node[0]
            while parent > 0:
                parent, steps = nodes[parent][0], [nodes[parent][1], *steps]
            traces.append((question, steps))
    return traces


def build(rows):
    """Searches, traces and trees, objects as in their files -> prefix trees, one a problem. Raises InputError."""
    trees, index = {}, {}
    for number, row in enumerate(rows, 1):
        merge(trees, index, *parse_prefixes(row, number))
    return list(trees.values())


def merge(trees, index, name, question, answer, nodes):
    """Merge one search, trace or tree (as parse_prefixes gives it) into `trees`, a dict by problem.

    Equal prefixes become one node, found in `index` by (problem, parent node, step), that sums visits and value. Terminal nodes,
    answer-bearing prefixes and what stands below them are left out. InputError, and no change, where the id stands for another problem.
    """
    tree = trees.setdefault(name, Tree(name, question, answer))
    if (tree.question, tree.answer) != (question, answer):
        raise InputError(f"the id {shorten(name)} stands for two problems: {shorten(tree.question)} -> {shorten(tree.answer)} "
                         f"and {shorten(question)} -> {shorten(answer)}. Expected one; rename one of them.")
    place = []  # where each node of the row went; None where it is left out
    for k, (parent, step, visits, value, left_out) in enumerate(nodes):
        above = place[parent] if k else None
        if k and (above is None or left_out or ANSWER_MARKER.search(step)):
            place.append(None)
            continue
        node = index.setdefault((name, above, step), len(tree.steps)) if k else 0
        if node == len(tree.steps):
            for column, first in ((tree.steps, step), (tree.parent, above), (tree.visits, 0), (tree.value, 0.0)):
                column.append(first)
        tree.visits[node] += visits
        tree.value[node] += value
        place.append(node)


def read_trees(paths, skip_bad=False):
    """The prefix trees of one JSONL file or several; searches, traces and trees may be mixed. Raises InputError."""
    trees, index = {}, {}
    for path in [paths] if isinstance(paths, str) else paths:
        list(read_jsonl(path, lambda row, number: merge(trees, index, *parse_prefixes(row, number)), skip_bad))
    return list(trees.values())


def read_solutions(path, skip_bad=False):
    """The solutions to learn by heart, (question, steps) each, of a JSONL file of traces and searches. InputError where there are none."""
    solutions = [solution for solutions in read_jsonl(path, parse_traces, skip_bad) for solution in solutions]
    if not solutions:
        raise InputError(f"no solution in {path} came to a right answer; there is nothing to learn by heart.")
    return solutions


def write_trees(trees, path):
    columns = lambda tree: zip(tree.parent, tree.steps, tree.depth().tolist(), tree.visits, tree.value)
    write_jsonl(({"id": tree.id, "question": tree.question, "answer": tree.answer, "nodes": [
        dict(zip(("parent", "step", "depth", "visits", "value"), node)) for node in columns(tree)]} for tree in trees), path)


def tokenize(trees, encode, max_prompt):
    """Fill each tree's `ids` by encode(question, steps) -> [ids of the prompt, ids of each step], and drop prefixes of more than
    `max_prompt` tokens (never cut). Returns the trees that still have their question, and the number of prefixes dropped."""
    kept, dropped = [], 0
    for tree in trees:
        ids = encode(tree.question, tree.steps[1:])
        length, place = {-1: 0}, {-1: -1}  # place: where a node that is short enough goes
        for node, parent in enumerate(tree.parent):
            length[node] = length[parent] + len(ids[node])
            if length[node] <= max_prompt:  # and so is its parent
                place[node] = len(place) - 1
        nodes = list(place)[1:]
        dropped += len(ids) - len(nodes)
        if nodes:
            steps, visits, value, ids = ([column[node] for node in nodes] for column in (tree.steps, tree.visits, tree.value, ids))
            kept.append(Tree(tree.id, tree.question, tree.answer, steps, [place[tree.parent[node]] for node in nodes], visits, value, ids))
    return kept, dropped


# --- Groups
def shuffled(place, count, seed):
    """Which of `count` items comes at `place` in endless passes over them, each pass in an order of its own."""
    epoch, place = divmod(place, count)
    # numpy takes a seed that ends in zeros for the shorter one: this one ends in 1, for it shall be nobody else's
    return np.random.default_rng((seed, epoch, 0, 0, 1)).permutation(count)[place]


def sample_group(tree, size, group, rng, root=True):
    """Draw the prefixes of one group from one problem's tree.

    group   "tree": `size` distinct prefixes, uniform; "trace": prefixes of one root-to-leaf trace, the leaf
            uniform; "question": the bare question, `size` times, as in GRPO.
    rng     a numpy Generator
    root    whether the bare question is among the prefixes of "tree" and "trace"
    Returns (size,) node numbers. Repeats appear only where there are fewer prefixes than `size`.
    """
    if group not in ("question", "trace", "tree"):
        raise ValueError(f"group is {group!r}; expected question, trace or tree")
    if group == "question":
        return np.zeros(size, int)
    nodes = np.arange(len(tree.parent))
    if group == "trace":
        nodes = np.array(tree.path(rng.choice(np.setdiff1d(nodes, tree.parent))))  # down to a leaf
    if not root and len(nodes) > 1:
        nodes = nodes[1:]
    return rng.choice(nodes, size, replace=len(nodes) < size)


# --- Packing
def pack(prefixes, completions=None):
    """Lay N sequences that share prefixes into one row in which each distinct prefix token stands once.

    prefixes, completions   N lists of token ids; completions are never shared, each has its own loss
    Returns
      ids       (L,) the row
      position  (L,) each token's place in its own sequence, the position id of a rotary embedding
      mask      (L, L) bool: token i may attend to token j, that is, j is i or stands before i in i's sequence
      paths     N arrays: the places in the row of each sequence's tokens, prefix and completion

    >>> ids, position, mask, paths = pack([[5, 6], [5, 6, 7]], [[8], [9]])
    >>> ids.tolist(), position.tolist()
    ([5, 6, 8, 7, 9], [0, 1, 2, 2, 3])
    >>> [path.tolist() for path in paths]
    [[0, 1, 2], [0, 1, 3, 4]]
    >>> mask.astype(int).tolist()
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
    """
    ids, parent, position, node, paths = [], [], [], {}, []
    for k, prefix in enumerate(prefixes):
        path, at = [], -1
        for place, token in enumerate([*prefix, *(completions[k] if completions else [])]):
            key = (at, token) if place < len(prefix) else (k, place, token)  # nobody else's
            before, at = at, node.setdefault(key, len(ids))
            if at == len(ids):
                ids.append(token)
                parent.append(before)
                position.append(place)
            path.append(at)
        paths.append(np.array(path, int))
    mask = np.eye(len(ids), dtype=bool)
    for token, before in enumerate(parent):
        if before >= 0:
            mask[token] |= mask[before]
    return np.array(ids, int), np.array(position, int), mask, paths


def micro_batches(samples, micro_tokens, row_tokens=0):
    """Split samples into forward passes of at most `micro_tokens` tokens, padding included, where one sample allows it.

    row_tokens    a group shares one packed row, halved until it has no more tokens than this; 0: every sample has its own row
    Yields (members, rows): the samples in the order of the rows' paths, and the packed rows themselves.
    """
    groups = {}
    for k, sample in enumerate(samples):
        groups.setdefault(sample.group if row_tokens else k, []).append(sample)
    queue, rows = list(groups.values()), []
    while queue:
        members = queue.pop()
        row = pack([s.prefix_ids for s in members], [s.completion_ids for s in members])
        if len(row[0]) > min(micro_tokens, row_tokens) and len(members) > 1:
            queue += [members[len(members) // 2:], members[:len(members) // 2]]
        else:
            rows.append((members, row))
    rows.sort(key=lambda row: -len(row[1][0]))
    while rows:
        fit = max(1, micro_tokens // len(rows[0][1][0]))
        yield [s for members, _ in rows[:fit] for s in members], [row for _, row in rows[:fit]]
        rows = rows[fit:]


# --- Showing
YELLOW_TO_GREEN = (226, 190, 154, 118, 82, 46, 40, 34, 28, 22)  # of the terminal's 256 colours, as in Fig. 1


def show(tree, colour):
    """The tree as text: a line a node, indented, with visits and the teacher's success rate."""
    children, depth = {}, tree.depth()
    for node, parent in enumerate(tree.parent):
        children.setdefault(parent, []).append(node)
    lines, stack = [], [(0, "", "")]
    while stack:
        node, indent, branch = stack.pop()
        text = printable(tree.question if node == 0 else tree.steps[node])
        rate = f"{100 * tree.value[node] / tree.visits[node]:3.0f} %" if tree.visits[node] else "  - %"
        width = max(20, 96 - len(indent + branch))
        text = text if len(text) <= width else text[:width - 3] + "..."
        line = f"{text:<{width}}  {tree.visits[node]:4d} visits  {rate}"
        if colour:
            line = f"\033[38;5;{YELLOW_TO_GREEN[min(depth[node], len(YELLOW_TO_GREEN) - 1)]}m{line}\033[0m"
        lines.append(indent + branch + line)
        below = children.get(node, [])
        indent = (indent + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch])[-60:]  # a trace of 100,000 steps would need gigabytes of it
        stack += [(child, indent, "└─ " if child == below[-1] else "├─ ") for child in reversed(below)]
    return "\n".join(lines + [f"answer: {printable(tree.answer)}   id: {printable(tree.id)}"])


def summary(trees):
    """Problems, prefixes, and per depth: how many prefixes, and the teacher's success rate there."""
    depths, visits, value = (np.concatenate(columns) for columns in zip(*((tree.depth(), tree.visits, tree.value) for tree in trees)))
    count, visits, value = np.bincount(depths), np.bincount(depths, visits), np.bincount(depths, value)
    lines = [f"{len(trees)} problems, {len(depths)} distinct prefixes, {len(depths) / len(trees):.1f} a problem",
             "depth  prefixes  success"]
    for depth in range(len(count)):
        rate = f"{100 * value[depth] / visits[depth]:5.1f} %" if visits[depth] else "    - %"
        lines.append(f"{depth:5d}  {count[depth]:8d}  {rate}  " + "█" * round(40 * count[depth] / max(count)))
    return "\n".join(lines)


def main():
    parser = arguments("Build prefix trees from searches and traces, and show them.")
    parser.add_argument("files", nargs="*", default=["data/arithmetic/trees.jsonl"], help="searches, traces or trees, JSONL")
    parser.add_argument("--out", help="write the merged trees to this JSONL file")
    parser.add_argument("--show", action="store_true", help="draw a tree in the terminal")
    parser.add_argument("--id", help="the problem to draw; default the first")
    parser.add_argument("--skip_bad", action="store_true", help="name and skip bad lines instead of stopping")
    args = parser.parse_args()
    trees = read_trees(args.files, args.skip_bad)
    if args.out:
        write_trees(trees, args.out)
    if args.show or args.id:
        chosen = [tree for tree in trees if args.id in (None, tree.id)]
        if not chosen:
            raise InputError(f"no problem has the id {shorten(args.id)}; there are {len(trees)}, the first is {shorten(trees[0].id)}.")
        print(show(chosen[0], colour=sys.stdout.isatty()), end="\n\n")
    print(summary(trees))


if __name__ == "__main__":
    run_command(main)
