"""
The teacher's multi-turn Monte Carlo tree search over many problems at once (App. D, after rStar).

A node is a reasoning step. One rollout of one problem:
1. Select: from the question down, an unvisited child at random, else the child of the highest
   UCT = value / visits + c sqrt(ln visits(parent) / visits); what is terminal or exhausted is skipped.
2. Expand: sample up to `branch` next steps, each up to its blank line; equal ones are merged.
3. Simulate: from a new child to the end in one continuation; its steps, to `max_depth`, become nodes.
4. Back up: the reward, 1 for the known answer, and a visit along the path.

Each problem's search is a generator that yields the completions it wants and is sent what was sampled: it reads as
if it were alone. The driver advances hundreds side by side and pools their wishes into one `generate` call a tick.

    python mcts.py                                                    # the embedded teacher on the embedded problems
    torchrun --nproc_per_node 8 mcts.py --model Qwen/Qwen2.5-7B-Instruct --data data/gsm8k/train.jsonl --out out/gsm8k_search.jsonl
"""
import fcntl
import json
import math
import os
import time
import zlib
from dataclasses import dataclass, field

from tree import (ANSWER_MARKER, BLANK_LINE, JOIN, InputError, arguments, at_least, drop_torn_line, leave_on_signals, read_jsonl,
                  read_problems, run_command, shorten, take)

if __name__ == "__main__":
    leave_on_signals()  # torch takes seconds to import

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

import evaluate


@dataclass
class Node:
    parent: int
    step: str
    ids: list                     # the step's tokens with its closing blank line; the prompt's at the root
    depth: int
    visits: int = 0
    value: float = 0.0
    terminal: bool = False        # the solution ends here
    reward: float = None          # of the rollout that ended here
    rest: str = None              # what that rollout wrote below max_depth, where steps are no nodes any more
    expanded: bool = False
    closed: bool = False          # terminal or exhausted: nothing new below
    children: list = field(default_factory=list)


def path_to(nodes, node):
    """Node numbers from the root to `node`."""
    path = [node]
    while nodes[path[-1]].parent >= 0:
        path.append(nodes[path[-1]].parent)
    return path[::-1]


def select(nodes, c_uct, rng):
    """The node to work on next: unvisited, or visited and not expanded yet."""
    node = 0
    while nodes[node].expanded:
        children = [k for k in nodes[node].children if not nodes[k].closed]
        unvisited = [k for k in children if nodes[k].visits == 0]
        if unvisited:
            return int(rng.choice(unvisited))
        log_visits = math.log(nodes[node].visits)
        node = max(children, key=lambda k: nodes[k].value / nodes[k].visits + c_uct * math.sqrt(log_visits / nodes[k].visits))
    return node


def add_child(nodes, parent, step, terminal, encode_step):
    """The child of `parent` with this step, new or met before. What ends one solution may go on in another: two nodes."""
    for child in nodes[parent].children:
        if (nodes[child].step, nodes[child].terminal) == (step, terminal):
            return child
    nodes.append(Node(parent, step, encode_step(step), nodes[parent].depth + 1, terminal=terminal))
    nodes[parent].children.append(len(nodes) - 1)
    return len(nodes) - 1


def search(prompt_ids, encode_step, grade, rng, args):
    """One problem's search. Yields (prefix ids, whether to stop at a blank line, how many) and is sent a list of
    (text, whether it came to its end); returns the nodes.

    grade    text of a whole solution -> reward, 0 or 1
    """
    nodes = [Node(-1, "", prompt_ids, 0)]
    for _ in range(args.rollouts):
        if nodes[0].closed:
            break
        node = select(nodes, args.c_uct, rng)
        prefix = lambda: [token for k in path_to(nodes, node) for token in nodes[k].ids]
        written = lambda: JOIN.join(nodes[k].step for k in path_to(nodes, node)[1:])
        # a node met before, and the root, gets its children; the rollout goes on from one of them
        if (nodes[node].visits or node == 0) and nodes[node].depth < args.max_depth:
            for text, ended in (yield prefix(), True, args.branch):
                step = BLANK_LINE.split(text.strip(), 1)[0].strip()
                if step and (ended or BLANK_LINE.search(text.lstrip())):  # else it ran into the limit: no step
                    child = nodes[add_child(nodes, node, step, ended or bool(ANSWER_MARKER.search(step)), encode_step)]
                    if child.terminal and child.reward is None:
                        child.reward = grade(written() + JOIN + step)
            nodes[node].expanded = True
            unvisited = [k for k in nodes[node].children if nodes[k].visits == 0]
            node = int(rng.choice(unvisited)) if unvisited else node
        reward = nodes[node].reward
        if not nodes[node].terminal and (nodes[node].children or not nodes[node].expanded):
            [(text, ended)] = yield prefix(), False, 1
            reward = grade(written() + JOIN + text) if ended else 0.0
            steps = [step.strip() for step in BLANK_LINE.split(text.strip()) if step.strip()]
            whole = steps if ended else steps[:-1]  # the limit cut the last one
            for k, step in enumerate(whole):
                if nodes[node].depth == args.max_depth:
                    nodes[node].rest = JOIN.join(whole[k:])
                    break
                node = add_child(nodes, node, step, k + 1 == len(steps) or bool(ANSWER_MARKER.search(step)), encode_step)
                if nodes[node].terminal:
                    break
            nodes[node].reward = reward
        for k in reversed(path_to(nodes, node)):
            at = nodes[k]
            at.visits, at.value = at.visits + 1, at.value + (reward or 0.0)
            at.closed = at.terminal or at.depth == args.max_depth or at.expanded and all(nodes[j].closed for j in at.children)
    return nodes


def to_row(problem, nodes, settings):
    """A finished search as one object of the output file."""
    rows = [{"parent": at.parent, "step": at.step, "visits": at.visits, "value": at.value, "terminal": at.terminal, "reward": at.reward}
            | ({"rest": at.rest} if at.rest else {}) for at in nodes]
    return {"id": problem["id"], "question": problem["question"], "answer": problem["answer"], "nodes": rows, "settings": settings}


def append(path, row):
    """Append one line under a lock: ranks share the file. What a rank that was killed within its line left behind is cut off."""
    with open(path, "ab+") as out:
        fcntl.flock(out, fcntl.LOCK_EX)
        out.seek(-min(1, out.seek(0, os.SEEK_END)), os.SEEK_END)
        if out.read(1) not in (b"", b"\n"):
            drop_torn_line(path)
        out.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        out.flush()


def finished(path, settings):
    """The ids of the searches that are in the file already."""
    def parse(row, number):
        if row.get("settings") != settings:
            raise InputError(f"this search has the settings {shorten(row.get('settings'), 200)}, not {shorten(settings, 200)}. "
                             "Choose another --out or remove the file.")
        return take(row, "id", str, "the problem's id")
    return set(read_jsonl(path, parse)) if os.path.getsize(path) else set()


def run(model, tokenizer, problems, args, settings, bar):
    """Search all problems, `parallel` of them side by side, and append each one as it finishes."""
    eos = evaluate.eos_ids(model, tokenizer)
    encode_step = lambda step: evaluate.encode(tokenizer, "", [step])[1]
    waiting, active, begun, tokens, rollouts, successes = list(problems)[::-1], [], time.time(), 0, 0, 0
    while waiting or active:
        while waiting and len(active) < args.parallel:
            problem = waiting.pop()
            seed = (args.seed, zlib.crc32(problem["id"].encode()))
            grade = lambda text, answer=problem["answer"]: float(evaluate.is_correct(text, answer, strict=True))
            searching = search(evaluate.encode(tokenizer, problem["question"])[0], encode_step, grade, np.random.default_rng(seed), args)
            # the last: the number of its next completion; from 1, since numpy takes the seed (s, p, 0) for (s, p)
            active.append([problem, searching, next(searching), seed, 1])
        # one tick: every active search's wish in one call
        prompts, stops, seeds = [], [], []
        for problem, _, (prefix, stop, count), seed, had in active:
            prompts += [prefix] * count
            stops += [stop] * count
            seeds += [(*seed, had + j) for j in range(count)]
        completions = evaluate.generate(model, tokenizer, prompts, args.max_new_tokens, args.temperature, seeds, stops, args.batch_size)
        if tokens == 0 and not bar.disable:
            seconds, ticks = time.time() - begun, 2 * args.rollouts * math.ceil(len(problems) / args.parallel)
            bar.write(f"first tick: {len(prompts)} completions, {sum(map(len, completions))} tokens, {seconds:.1f} s. {len(problems)} problems "
                      f"take up to {ticks} ticks: about {seconds * ticks / 60:.0f} minutes, less where searches exhaust their trees.")
        tokens += sum(map(len, completions))
        sent, still = iter(completions), []
        for entry in active:
            problem, searching, (_, _, count), seed, had = entry
            try:
                wish = searching.send([(evaluate.decode(tokenizer, ids), ids[-1] in eos) for ids in (next(sent) for _ in range(count))])
                still.append([problem, searching, wish, seed, had + count])
            except StopIteration as end:
                append(args.out, to_row(problem, end.value, settings))
                rollouts, successes = rollouts + end.value[0].visits, successes + end.value[0].value
                bar.update(1)
        active = still
        bar.set_postfix_str(f"{tokens / (time.time() - begun):.0f} tok/s, success {100 * successes / max(rollouts, 1):.0f} %")


def main():
    parser = arguments("Search a teacher's solutions by MCTS, many problems side by side.")
    count = at_least(1)
    parser.add_argument("--model", default="data/arithmetic/teacher", help="the teacher: a folder or a hub name")
    parser.add_argument("--adapter", help="a PEFT adapter on it")
    parser.add_argument("--data", default="data/arithmetic/train.jsonl", help="problems, JSONL; the training split, never the test's")
    parser.add_argument("--out", default="out/search.jsonl", help="searches, JSONL, appended to; what is there is not searched again")
    parser.add_argument("--rollouts", type=count, default=16, help="simulations a problem")
    parser.add_argument("--max_depth", type=count, default=5, help="steps that become nodes; a rollout at the last level runs to its end")
    parser.add_argument("--branch", type=count, default=5, help="next steps sampled when a node is expanded")
    parser.add_argument("--c_uct", type=at_least(0, float), default=2.0, help="weight of exploration in UCT")
    parser.add_argument("--temperature", type=at_least(0.01, float), default=1.0, help="of the teacher's sampling")
    parser.add_argument("--max_new_tokens", type=count, default=512, help="limit of a continuation; one that needs more has reward 0")
    parser.add_argument("--parallel", type=count, default=256, help="problems searched side by side, a rank")
    parser.add_argument("--batch_size", type=count, default=256, help="completions decoded side by side")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of selection and sampling")
    parser.add_argument("--limit", type=at_least(0), default=0, help="search the first so many problems, 0 is all")
    parser.add_argument("--skip_bad", action="store_true", help="name and skip bad lines of --data instead of stopping")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the model's own code from the hub")
    args = parser.parse_args()
    problems = read_problems(args.data, args.limit, args.skip_bad)
    settings = {key: getattr(args, key) for key in ("model", "adapter", "data", "rollouts", "max_depth", "branch", "c_uct", "temperature", "max_new_tokens", "seed")}
    rank, world, device = evaluate.distributed()
    if rank == 0:
        drop_torn_line(args.out)
    if world > 1:
        dist.barrier()
    done = finished(args.out, settings)
    if world > 1:
        dist.barrier()  # nobody appends before everybody has read
    model, tokenizer = evaluate.load(args.model, args.adapter, device, trust_remote_code=args.trust_remote_code)
    problems = evaluate.fitting(model, tokenizer, problems, args.skip_bad)
    todo = [problem for problem in problems if problem["id"] not in done][rank::world]
    with tqdm(total=len(todo), unit="problem", disable=rank > 0) as bar:
        run(model, tokenizer, todo, args, settings, bar)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        print(f"{len(finished(args.out, settings))} searches in {args.out}; next: python tree.py {args.out} --out out/trees.jsonl")


if __name__ == "__main__":
    run_command(main)
