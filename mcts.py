"""
The teacher's multi-turn Monte Carlo tree search over many problems at once (App. D, after rStar).

A node is a reasoning step. One rollout of one problem:
1. Select: from the question down, an unvisited child at random, else the child of the highest
   UCT = value / visits + c sqrt(ln visits(parent) / visits). The end of a solution may be selected
   again, at no cost: its reward is backed up once more.
2. Expand: sample up to `branch` next steps, each up to its blank line. Equal ones are merged.
3. Simulate: from a new child to the end in one continuation. Its steps become nodes.
4. Back up: a visit and the reward, 1 for the known answer, to every node of the path.
A search is a generator that yields Requests and is sent Replies: it reads as if it were alone.
`run` has hundreds of them side by side; each goes on as soon as what it asked for is sampled.

    python mcts.py            # the embedded teacher on the embedded problems
    torchrun --nproc_per_node 8 mcts.py --model Qwen/Qwen2.5-7B-Instruct \
        --data data/gsm8k/train.jsonl --out out/gsm8k_search.jsonl
"""
import math
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Iterator, NamedTuple

import torch.distributed as dist
from tqdm import tqdm

import evaluate
import tree
from data.grade import is_solved, states_answer
from tree import BLANK_LINE, JOIN


# ---- The search of one problem -------------------------------------------------------------------
@dataclass
class Node:
    parent: int
    step: str                # "" at the root, which is the question
    ids: list                # tokens of the prompt and of all steps down to here
    text: str                # the text of these steps
    depth: int
    visits: int = 0
    value: float = 0.0       # sum of the rewards backed up
    terminal: bool = False   # a solution ends here
    reward: float = None     # of the last rollout whose last node this was
    rest: str = ""           # what that rollout wrote behind this step
    expanded: bool = False
    children: list = field(default_factory=list)


class Request(NamedTuple):
    """What a search wants sampled. It is sent a list of `count` Replies."""
    prefix_ids: list
    stop_at_blank: bool      # one step, or on to the end of the solution
    count: int


class Reply(NamedTuple):
    text: str
    ended: bool              # the model ended its solution within the limit of tokens


def uct(child, parent, c):
    """The child's mean reward, and a bonus for few visits (Kocsis and Szepesvari 2006). Searches by
    another rule want another --out."""
    return child.value / child.visits + c * math.sqrt(math.log(parent.visits) / child.visits)


def select(nodes, c, rng):
    """The node to work on next: not visited, or not expanded, or an end without next steps."""
    node = 0
    while nodes[node].expanded and nodes[node].children:
        children = nodes[node].children
        new = [child for child in children if nodes[child].visits == 0]
        if new:
            return int(rng.choice(new))
        scores = [uct(nodes[child], nodes[node], c) for child in children]
        node = children[scores.index(max(scores))]
    return node


def add_child(nodes, parent, step, last, encode_step):
    """The child of `parent` with this step, new or met before. It is terminal where it was the last
    of a solution or states an answer. A step that is the last in some solutions is two nodes."""
    terminal = last or states_answer(step)
    above = nodes[parent]
    for child in above.children:
        if nodes[child].step == step and nodes[child].terminal == terminal:
            return child
    nodes.append(Node(parent, step, above.ids + encode_step(step), above.text + JOIN + step,
                      above.depth + 1, terminal=terminal))
    above.children.append(len(nodes) - 1)
    return len(nodes) - 1


def expand(nodes, node, grade, encode_step, branch):
    """Sample next steps. Each distinct one that came to its end becomes a child. Returns the
    children that no rollout has gone through."""
    replies = yield Request(nodes[node].ids, True, branch)
    for text, ended in replies:
        step, *more = BLANK_LINE.split(text.strip(), maxsplit=1)
        whole = ended or BLANK_LINE.search(text.lstrip())  # else the limit cut it
        is_last = ended and not more
        if step and whole:
            k = add_child(nodes, node, step.strip(), is_last, encode_step)
            if nodes[k].terminal and nodes[k].reward is None:
                nodes[k].reward = float(grade(nodes[k].text))
    nodes[node].expanded = True
    return [child for child in nodes[node].children if nodes[child].visits == 0]


def simulate(nodes, node, grade, encode_step, max_depth):
    """One continuation to the end. Its steps become nodes, to `max_depth` or to one that states an
    answer. What follows is kept as the last node's `rest`, for the reward is for all of it."""
    [(text, ended)] = yield Request(nodes[node].ids, False, 1)
    reward = 0.0
    steps = [step.strip() for step in BLANK_LINE.split(text) if step.strip()]
    if ended:
        reward = float(grade(nodes[node].text + JOIN + text))
    else:
        steps = steps[:-1]  # the limit cut the last one
    while steps and nodes[node].depth < max_depth and not nodes[node].terminal:
        step = steps.pop(0)
        node = add_child(nodes, node, step, ended and not steps, encode_step)
    nodes[node].reward = reward
    nodes[node].rest = JOIN.join(steps)
    return node


def back_up(nodes, node, reward):
    """Add the rollout to every node from this one up to the question."""
    while node >= 0:
        nodes[node].visits += 1
        nodes[node].value += reward
        node = nodes[node].parent


def search(prompt_ids, encode_step, grade, rng, args):
    """One problem's search: yields Requests, is sent lists of Replies, returns the nodes.

    encode_step(step) gives its ids with the closing blank line, grade(solution) a reward, 0 to 1.
    """
    nodes = [Node(-1, "", prompt_ids, "", 0)]
    for _ in range(args.rollouts):
        node = select(nodes, args.c_uct, rng)
        at = nodes[node]
        is_whole = at.expanded or at.terminal or at.depth == args.max_depth
        if not is_whole and (at.visits > 0 or node == 0):
            new = yield from expand(nodes, node, grade, encode_step, args.branch)
            if new:
                node = int(rng.choice(new))
        if not nodes[node].terminal:
            node = yield from simulate(nodes, node, grade, encode_step, args.max_depth)
        back_up(nodes, node, nodes[node].reward)
    return nodes


# ---- Many searches side by side ------------------------------------------------------------------
@dataclass
class Active:
    """A search under way."""
    problem: dict
    searching: Iterator
    request: Request         # what it waits for
    sampled: int = 0         # completions asked for so far, each with a seed of its own
    replies: dict = field(default_factory=dict)  # that have come, by their numbers
    rollouts: int = 0


def begin(problem, tokenizer, encode, args):
    """Start the search of a problem, up to its first request."""
    def encode_step(step):
        return evaluate.encode_steps(tokenizer, [step])[0]

    prompt_ids = encode(problem["question"])[0]
    grade = partial(is_solved, problem=problem)
    selection = tree.rng(args.seed, problem["id"], "selection")
    searching = search(prompt_ids, encode_step, grade, selection, args)
    return Active(problem, searching, next(searching))


def ask(decoder, one, args):
    """Have a search's request sampled."""
    one.replies = {}
    for k in range(one.request.count):
        seed = (args.seed, one.problem["id"], one.sampled)
        one.sampled += 1
        decoder.add(evaluate.Completion((one, k), one.request.prefix_ids, args.max_new_tokens,
                                        args.temperature, seed, one.request.stop_at_blank))


def run(model, tokenizer, problems, encode, args, settings, progress):
    """Search all problems, `parallel` of them side by side, and append each one as it finishes.
    Returns the tokens generated, and the share of the slots that were busy while there were
    problems to begin."""
    decoder = evaluate.Decoder(model, tokenizer, args.batch_size)
    waiting = deque(problems)
    active = 0
    busy = 1.0
    rates = []  # the success of each finished search
    while waiting or active:
        while waiting and active < args.parallel:
            active += 1
            ask(decoder, begin(waiting.popleft(), tokenizer, encode, args), args)
        if waiting:
            busy = decoder.busy
        for completion in decoder.step():
            one, k = completion.key
            text = evaluate.decode(tokenizer, completion.ids)
            one.replies[k] = Reply(text, completion.ids[-1] in decoder.ends)
            if len(one.replies) < one.request.count:
                continue
            if not one.request.stop_at_blank:
                one.rollouts += 1
                progress.update(1)
            replies = [one.replies[number] for number in range(one.request.count)]
            try:
                one.request = one.searching.send(replies)
            except StopIteration as end:
                nodes = end.value
                active -= 1
                tree.append_jsonl(args.out, to_row(one.problem, nodes, settings))
                rates.append(nodes[0].value / nodes[0].visits)
                progress.set_postfix_str(f"success {sum(rates) / len(rates):.0%}", refresh=False)
                progress.update(args.rollouts - one.rollouts)
            else:
                ask(decoder, one, args)
    return decoder.work, busy


def to_row(problem, nodes, settings):
    """A finished search as one object of the output file, with all fields of its problem."""
    columns = ("parent", "step", "visits", "value", "terminal", "reward")
    rows = []
    for at in nodes:
        row = {name: getattr(at, name) for name in columns}
        if at.rest:
            row["rest"] = at.rest
        rows.append(row)
    return {**problem, "nodes": rows, "settings": settings}


def parse_search(row, number):
    """A line of the output file: whose search it is, and whether it has a prefix to train on."""
    search = {name: tree.get_field(row, name, str, "text") for name in ("id", "question", "answer")}
    search["settings"] = tree.get_field(row, "settings", dict, "those of a search")
    search["has_prefix"] = len(tree.build([row])[0].steps) > 1
    return search


def main():
    parser = tree.arguments("Search a teacher's solutions by MCTS, many problems side by side.")
    add = parser.add_argument
    number = tree.at_least(1)
    add("--model", default="data/arithmetic/teacher", help="the teacher: a folder or a hub name")
    add("--adapter", help="a PEFT adapter on it")
    add("--data", default="data/arithmetic/train.jsonl", help="problems to train on, not a test's")
    add("--out", default="out/search.jsonl", help="searches, appended to; those there are kept")
    add("--rollouts", type=number, default=16, help="simulations a problem")
    add("--max_depth", type=number, default=5, help="steps that become nodes; rollouts go on below")
    add("--branch", type=number, default=5, help="next steps sampled when a node is expanded")
    add("--c_uct", type=tree.at_least(0, float), default=2.0, help="weight of exploration in UCT")
    add("--temperature", type=tree.at_least(0.01, float), default=1.0, help="of the sampling")
    add("--max_new_tokens", type=number, default=512, help="of a continuation; beyond, reward is 0")
    add("--parallel", type=number, default=256, help="problems searched side by side, a rank")
    add("--batch_size", type=number, default=256, help="completions decoded side by side")
    add("--seed", type=tree.at_least(0), default=0, help="of selection and sampling")
    add("--limit", type=tree.at_least(0), default=0, help="only the first so many; 0 is all")
    evaluate.add_prompt_flags(add)
    evaluate.add_device_flags(add)
    args = parser.parse_args()
    evaluate.COMPILE = args.compile

    problems = tree.read_problems(args.data, args.limit)
    rank, world, device = evaluate.distributed()
    if rank == 0:
        held = tree.lock(args.out)  # to the end: two runs at once would search everything twice
    model, tokenizer = evaluate.load(args.model, args.adapter, device, args.dtype)
    encode = evaluate.encoder(tokenizer, args)
    prompts = [encode(problem["question"])[0] for problem in problems]
    # In the longest prefix, each of max_depth steps took a sample of its own.
    evaluate.check_prompts(model, tokenizer, prompts, (args.max_depth + 1) * args.max_new_tokens)
    settings = evaluate.work_settings(model, encode, args, (
        "rollouts", "max_depth", "branch", "c_uct", "temperature", "max_new_tokens", "seed"))
    todo = evaluate.unfinished(args.out, parse_search, settings, problems, rank, world)
    total = len(todo) * args.rollouts
    with tqdm(total=total, unit="rollout", dynamic_ncols=True, disable=rank > 0) as progress:
        tokens, busy = run(model, tokenizer, todo, encode, args, settings, progress)
    tokens = evaluate.gather(tokens)  # every rank has written its last search
    busy = evaluate.gather(busy)
    searched = evaluate.gather(len(todo))
    if rank == 0:
        found = [search["has_prefix"] for search in tree.read_jsonl(args.out, parse_search)]
        print(f"{sum(tokens) / max(sum(searched), 1):.0f} tokens generated a problem; slots busy "
              f"while there were problems to begin: {sum(busy) / world:.0%}")
        print(f"{len(found)} searches in {args.out}, {found.count(False)} of them without any "
              f"prefix; next: python tree.py {args.out} --out out/trees.jsonl")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    tree.run_command(main)
