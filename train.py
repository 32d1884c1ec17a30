"""
Tree-OPO: GRPO-like training of a small language model on prefixes from a teacher's search trees.

What differs from textbook GRPO:
1. Prompts are prefixes: 8 partial solutions of one problem's tree form a group (Sec. 3.1), not one question 8 times.
2. Advantages know the tree: r - alpha V(prefix), mean-centred, or a quadratic program (Sec. 3.2, 3.3; advantage.py).
3. No division by the standard deviation (App. A.8), no ratio, no clip, no reference model: one update a batch, so the
   loss is the plain policy gradient of Sec. 3.4, a sum over completion tokens and a mean over samples.
4. A group is one packed row: what its samples share is computed once (tree.pack).

    torchrun train.py --baseline expectation                          # the embedded default, on a laptop
    torchrun --nproc_per_node 8 train.py --preset paper --trees out/gsm8k_trees.jsonl --baseline expectation
    python train.py --resume                                          # go on where the default run was stopped
"""
import argparse
import json
import os
import resource
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import get_cosine_schedule_with_warmup

import advantage
import evaluate
from tree import (InputError, drop_torn_line, pack, parse_prefixes, read_jsonl, read_problems, read_trees, run_command,
                  sample_group, tokenize)

# ---------------------------------------------------------------------------------------------------
# Knobs. Any flag overrides its preset.

PRESETS = {
    "arithmetic": dict(  # the embedded default
        model="data/arithmetic/student", trees="data/arithmetic/trees.jsonl", eval_data="data/arithmetic/test.jsonl",
        alpha=0.5, group_size=8, batch_size=32, temperature=1.0, max_prompt=256, max_new_tokens=96, eval_new_tokens=96,
        lora_rank=16, lora_alpha=64, lora_dropout=0.0, lr=3e-4, steps=120, eval_every=40, save_every=20),
    "paper": dict(  # Table 3; steps: two passes over GSM8K's 7,473 training problems, four a batch
        model="Qwen/Qwen2.5-1.5B-Instruct", trees="out/gsm8k_trees.jsonl", eval_data="data/gsm8k/test.jsonl",
        alpha=0.5, group_size=8, batch_size=32, temperature=1.0, max_prompt=512, max_new_tokens=256, eval_new_tokens=512,
        lora_rank=16, lora_alpha=64, lora_dropout=0.1, lr=3e-5, steps=3736, eval_every=500, save_every=100),
}


# what a resumed run may change without being another run
MAY_DIFFER = "out resume force skip_bad eval_data eval_limit eval_every eval_new_tokens save_every rollouts_every micro_tokens no_pack".split()


def parse_args(argv=None):
    """The knobs: a preset, and the flags that override it. Raises InputError where they make no sense together."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="arithmetic", help="defaults of the flags below; paper is its Table 3")
    preset = PRESETS[first.parse_known_args(argv)[0].preset]
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0], parents=[first], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="the student: a folder or a hub name")
    model.add_argument("--adapter", help="start from this PEFT adapter instead of a fresh one")
    model.add_argument("--lora_rank", type=int, help="0 trains every weight instead of an adapter")
    model.add_argument("--lora_alpha", type=float, help="LoRA's scale is alpha / rank")
    model.add_argument("--lora_dropout", type=float, help="dropout in LoRA layers, in the update alone")
    model.add_argument("--trust_remote_code", action="store_true", help="run the model's own code from the hub")
    data = parser.add_argument_group("data")
    data.add_argument("--trees", help="prefix trees, JSONL; traces where the objective is sft")
    data.add_argument("--eval_data", help="held-out problems, JSONL")
    data.add_argument("--eval_limit", type=int, default=0, help="evaluate on the first so many, 0 is all")
    data.add_argument("--skip_bad", action="store_true", help="name and skip bad lines instead of stopping")
    data.add_argument("--out", help="run folder; default out/PRESET-GROUP-BASELINE-SEED")
    data.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    data.add_argument("--force", action="store_true", help="resume although other flags differ from the checkpoint's")
    method = parser.add_argument_group("method")
    method.add_argument("--objective", choices=("tree_opo", "sft"), default="tree_opo", help="sft: cross entropy on the steps of traces")
    method.add_argument("--group", choices=("question", "trace", "tree"), default="tree", help="how a group's prefixes are drawn")
    method.add_argument("--baseline", choices=sorted(advantage.ESTIMATORS), default="expectation", help="how its advantages are computed")
    method.add_argument("--alpha", type=float, help="weight of V(prefix) in the advantage")
    method.add_argument("--no_root", action="store_true", help="leave the bare question out of the prefixes")
    method.add_argument("--group_size", type=int, help="samples that are compared with each other")
    method.add_argument("--batch_size", type=int, help="samples a step over all ranks")
    method.add_argument("--temperature", type=float, help="of the student's rollouts, and of the loss")
    method.add_argument("--max_prompt", type=int, help="longer prefixes are dropped, tokens")
    method.add_argument("--max_new_tokens", type=int, help="a completion that needs more has reward 0")
    run = parser.add_argument_group("optimisation")
    run.add_argument("--steps", type=int, help="updates")
    run.add_argument("--lr", type=float, help="peak learning rate; cosine to 0 after 3 %% of warm-up")
    run.add_argument("--seed", type=int, default=0, help="of groups, completions and initial adapter")
    run.add_argument("--micro_tokens", type=int, default=8192 if torch.cuda.is_available() else 1024,
                     help="tokens a forward pass, padding included; does not change the objective (a CPU likes what fits its cache)")
    run.add_argument("--no_pack", action="store_true", help="pad every sample to its own row instead of sharing prefixes")
    run.add_argument("--eval_every", type=int, help="steps between evaluations, 0 is never, not even before and after")
    run.add_argument("--eval_new_tokens", type=int, help="limit of an evaluated completion")
    run.add_argument("--save_every", type=int, help="steps between checkpoints, 0 is never, but for the last")
    run.add_argument("--rollouts_every", type=int, default=10, help="steps between samples written to rollouts.jsonl")
    parser.set_defaults(**preset)
    args = parser.parse_args(argv)
    args.out = args.out or f"out/{args.preset}-{args.group}-{args.baseline}-{args.seed}"
    if args.batch_size % args.group_size or args.batch_size < 1 or args.group_size < 1:
        raise InputError(f"--batch_size {args.batch_size} is no multiple of --group_size {args.group_size}; expected whole groups.")
    if not args.lr > 0 or args.steps < 1 or not 0 <= args.alpha <= 1 or args.temperature <= 0:
        raise InputError(f"--lr {args.lr}, --steps {args.steps}, --alpha {args.alpha}, --temperature {args.temperature}: expected "
                         "lr > 0, steps >= 1, alpha in [0, 1] and temperature > 0.")
    return args


# ---------------------------------------------------------------------------------------------------
# Roll out: groups of prefixes, completions, rewards, advantages

@dataclass
class Sample:
    """One completion, from prefix to advantage. Ids are kept as sampled and padded at the last moment."""
    group: int
    node: int
    prefix_ids: list
    completion_ids: list
    sampler_logps: list = None
    reward: float = 0.0
    truncated: bool = False
    value: float = 0.0
    advantage: float = 1.0


def shuffled(place, count, seed):
    """Which of `count` items comes at `place` in endless passes over them, each pass in an order of its own."""
    epoch, place = divmod(place, count)
    # numpy takes a seed that ends in zeros for the shorter one: this one ends in 1, for it shall be nobody else's
    return np.random.default_rng((seed, epoch, 0, 0, 1)).permutation(count)[place]


def rollout(model, tokenizer, trees, step, args, rank=0, world=1):
    """This rank's groups of one step, completed, graded, and compared.

    Everything drawn derives from (seed, step, group), never from the rank or an earlier step: any number of ranks
    samples the same batch, and a resumed run replays nothing.
    Returns samples (list of Sample) and one dict of figures a group.
    """
    samples, drawn = [], []
    for g in range(rank, args.batch_size // args.group_size, world):
        tree = trees[shuffled(step * (args.batch_size // args.group_size) + g, len(trees), args.seed)]
        rng = np.random.default_rng((args.seed, step, g))
        nodes = sample_group(tree, args.group_size, args.group, rng, root=not args.no_root)
        drawn.append((g, tree, nodes))
        samples += [Sample(g, int(node), tree.prefix_ids(node), []) for node in nodes]
    # from 1 on, for the same reason: (seed, step, group, 0) is (seed, step, group), which drew the prefixes
    seeds = [(args.seed, step, sample.group, k % args.group_size + 1) for k, sample in enumerate(samples)]
    completions, logps = evaluate.generate(model, tokenizer, [s.prefix_ids for s in samples], args.max_new_tokens,
                                           args.temperature, seeds, return_logps=True)
    eos = evaluate.eos_ids(model, tokenizer)
    figures = []
    for k, (g, tree, nodes) in enumerate(drawn):
        members = samples[k * args.group_size:(k + 1) * args.group_size]
        for i, sample in enumerate(members, k * args.group_size):
            sample.completion_ids, sample.sampler_logps = completions[i], logps[i]
            sample.truncated = completions[i][-1] not in eos
            text = evaluate.decode(tokenizer, completions[i])
            sample.reward = float(not sample.truncated and evaluate.is_correct(text, tree.answer, strict=True))
        figures.append(compare(members, tree, nodes, args))
    return samples, figures


def compare(members, tree, nodes, args):
    """Set the advantages of one group (Sec. 3.2, 3.3) and return the figures that Figure 4 plots."""
    rewards, info = np.array([s.reward for s in members]), {}
    teacher = np.array(tree.value) / np.maximum(tree.visits, 1)
    a = advantage.advantages(args.baseline, nodes, tree.parent, rewards, alpha=args.alpha, teacher=teacher, info=info)
    values = advantage.value("expectation", nodes, tree.parent, rewards)
    for k, sample in enumerate(members):
        sample.advantage, sample.value = float(a[k]), float(values[k])
    constraints = advantage.order_constraints(nodes, tree.parent, rewards)
    figures = dict(reward=rewards.mean(), dead=float(rewards.min() == rewards.max()), fallback=float(info.get("fallback", "none") != "none"),
                   sat_pair=advantage.satisfaction(a, constraints.pair), sat_triplet=advantage.satisfaction(a, constraints.triplet),
                   dropped=constraints.dropped)
    if not figures["dead"]:
        figures.update(adv_var=a.var(), adv_var_scaled=a.var() / np.abs(a).mean() ** 2)
    return figures


def parse_trace(row, number):
    """A trace's question and steps, to learn by heart."""
    if "nodes" in row:
        raise InputError("this is a search or a tree, which has no one solution; --objective sft expects traces, with \"steps\".")
    _, question, _, nodes = parse_prefixes(row, number)
    return question, [step for _, step, *_ in nodes[1:]]


def sft_batch(traces, step, args, rank=0, world=1):
    """This rank's traces of one step as samples of advantage 1: the policy gradient is then that of cross entropy."""
    samples = []
    for k in range(rank, args.batch_size, world):
        prompt, completion = traces[shuffled(step * args.batch_size + k, len(traces), args.seed)]
        samples.append(Sample(k, 0, prompt, completion))
    return samples


# ---------------------------------------------------------------------------------------------------
# Update

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


def completion_logps(model, members, rows, temperature):
    """Log-probabilities of the completion ids, flat, and the sample each belongs to: (n,), (n,).

    The one place where log-probs meet ids: the id at place t of a sequence is predicted at place t - 1.
    Logits are computed at those places alone, and their log-softmax in float32.
    """
    ids, position, mask = evaluate.pad_rows(rows, model)  # (B, L), (B, L), (B, 1, L, L)
    paths = [(r, path) for r, row in enumerate(rows) for path in row[3]]
    row, place, target, sample = [], [], [], []
    for k, (member, (r, path)) in enumerate(zip(members, paths)):
        first = len(member.prefix_ids)
        row += [r] * (len(path) - first)
        place += path[first - 1:-1].tolist()
        target += member.completion_ids
        sample += [k] * (len(path) - first)
    row, place, target, sample = (torch.tensor(x, device=model.device) for x in (row, place, target, sample))
    keep, column = place.unique(return_inverse=True)
    logits = model(ids, attention_mask=mask, position_ids=position, use_cache=False, logits_to_keep=keep).logits  # (B, kept, V)
    logps = -torch.nn.functional.cross_entropy(logits[row, column].float() / temperature, target, reduction="none")
    return logps, sample


def accumulate(model, samples, scale, args):
    """Add the gradient of this rank's share of the loss, -scale sum_k A_k sum_t log pi(c_kt | p_k, c_k<t) (Sec. 3.4).

    scale     1 / (samples of the whole step, over all ranks): micro-batches and ranks never change the objective
    Returns the loss and the sampler-trainer gaps |log pi(sampler) - log pi(trainer)|, one a token.
    A sample of advantage 0 adds nothing: no pass is spent on it.
    """
    loss, gaps = 0.0, []
    samples = [s for s in samples if s.advantage != 0]
    for members, rows in micro_batches(samples, args.micro_tokens, 0 if args.no_pack else evaluate.row_tokens(model)):
        logps, sample = completion_logps(model, members, rows, args.temperature)
        advantages = torch.tensor([s.advantage for s in members], device=logps.device)[sample]
        micro_loss = -scale * (advantages * logps).sum()
        micro_loss.backward()
        loss += micro_loss.item()
        if members[0].sampler_logps:
            gaps += (logps.detach().cpu() - torch.tensor([x for s in members for x in s.sampler_logps])).abs().tolist()
    return loss, gaps


def update(model, optimizer, params, samples, scale, lr, args, world):
    """One step of AdamW on the loss of the whole batch. Returns this rank's loss and gaps, and the gradient's norm."""
    model.train()
    loss, gaps = accumulate(model, samples, scale, args)
    model.eval()
    all_reduce_gradients(params, world)
    grad_norm = torch.nn.utils.clip_grad_norm_(params, 1.0).item()
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return loss, gaps, grad_norm


def all_reduce_gradients(params, world):
    """Sum the gradients over ranks with one flat all_reduce; a rank without work contributes zeros."""
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if world > 1:
        flat = torch.cat([p.grad.flatten() for p in params])
        dist.all_reduce(flat)
        for p, grad in zip(params, flat.split([p.numel() for p in params])):
            p.grad.copy_(grad.view_as(p))


def gather(item, world):
    """The list of every rank's item, on every rank."""
    if world == 1:
        return [item]
    items = [None] * world
    dist.all_gather_object(items, item)
    return items


# ---------------------------------------------------------------------------------------------------
# Checkpoints: one safetensors file of weights, Adam's moments and the step, written aside and renamed

def save(model, tokenizer, optimizer, names, step, tokens, args):
    """Write the checkpoint, keeping the previous one, and the model (or its PEFT adapter) at the top of the run folder."""
    state = {f"weight/{name}": p.detach() for name, p in names.items()}
    for name, p in names.items():
        state |= {f"{key}/{name}": optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq", "step") if p in optimizer.state}
    path = os.path.join(args.out, "checkpoint.safetensors")
    metadata = {"step": str(step), "tokens": str(tokens), "args": json.dumps(vars(args))}
    save_file({key: value.contiguous().cpu() for key, value in state.items()}, path + ".tmp", metadata)
    if os.path.exists(path):
        os.replace(path, os.path.join(args.out, "checkpoint.previous.safetensors"))
    os.replace(path + ".tmp", path)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


def restore(model, optimizer, names, args):
    """Load the run folder's checkpoint into model and optimizer; returns (steps done, tokens generated)."""
    path = os.path.join(args.out, "checkpoint.safetensors")
    if not os.path.exists(path):
        raise InputError(f"there is no checkpoint in {args.out}. Expected one that --save_every wrote; without --resume a run starts anew.")
    with safe_open(path, "pt", device=str(model.device)) as state:
        saved = json.loads(state.metadata()["args"])
        differ = [f"--{key} was {saved.get(key)} and is {value}" for key, value in vars(args).items() if key not in MAY_DIFFER and saved.get(key) != value]
        if differ and not args.force:
            raise InputError(f"the checkpoint in {args.out} is of other settings: {', '.join(differ)}. Expected the same; --force goes on all the same.")
        for name, p in names.items():
            with torch.no_grad():
                p.copy_(state.get_tensor(f"weight/{name}"))
            optimizer.state[p] = {key: state.get_tensor(f"{key}/{name}") for key in ("exp_avg", "exp_avg_sq", "step")}
            optimizer.state[p]["step"] = optimizer.state[p]["step"].cpu()
        return int(state.metadata()["step"]), int(state.metadata()["tokens"])


def open_run(args, start):
    """Make the run folder and open log.jsonl and rollouts.jsonl to append. An earlier run of the name is moved aside,
    never overwritten; a resumed one loses the lines of the steps that it does again."""
    if not args.resume and os.path.exists(args.out):
        aside = next(f"{args.out}.{k}" for k in range(1, 10 ** 6) if not os.path.exists(f"{args.out}.{k}"))
        os.rename(args.out, aside)
        print(f"moved the earlier run of this name to {aside}")
    os.makedirs(args.out, exist_ok=True)
    logs = []
    for path in (os.path.join(args.out, name) for name in ("log.jsonl", "rollouts.jsonl")):
        if os.path.exists(path):
            drop_torn_line(path)
            with open(path, encoding="utf-8") as lines:
                kept = [line for line in lines if json.loads(line)["step"] < start]
            with open(path + ".tmp", "w", encoding="utf-8") as out:
                out.writelines(kept)
            os.replace(path + ".tmp", path)
        logs.append(open(path, "a", encoding="utf-8", buffering=1))
    return logs


# ---------------------------------------------------------------------------------------------------
# The loop

def set_up(args, device):
    """Data first, since its errors are cheap, then the student: (model, tokenizer, training data, held-out problems)."""
    problems = read_problems(args.eval_data, args.eval_limit, args.skip_bad) if args.eval_every else []
    if args.objective == "sft":
        rows = list(read_jsonl(args.trees, parse_trace, args.skip_bad))
    else:
        trees = read_trees(args.trees, args.skip_bad)
    torch.manual_seed(args.seed)  # the fresh adapter's A
    model, tokenizer = evaluate.load(args.model, args.adapter, device, trainable=True, trust_remote_code=args.trust_remote_code)
    if args.lora_rank == 0:
        model = model.float().requires_grad_(True)
    elif not args.adapter:
        model = get_peft_model(model, LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
                                                 target_modules="all-linear", task_type="CAUSAL_LM"))
    encode = lambda question, steps: evaluate.encode(tokenizer, question, steps)
    if args.objective == "sft":
        traces = []
        for question, steps in rows:
            prompt, *ids = encode(question, steps[:-1])
            last = tokenizer(steps[-1], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            traces.append((prompt, [token for step in ids + [last] for token in step]))
        return model, tokenizer, traces, problems
    trees, dropped = tokenize(trees, encode, args.max_prompt)
    if not trees:
        raise InputError(f"no prefix of {args.trees} has at most {args.max_prompt} tokens; raise --max_prompt.")
    if dropped:
        print(f"dropped {dropped} prefixes of more than {args.max_prompt} tokens; {sum(len(t.steps) for t in trees)} are left")
    return model, tokenizer, trees, problems


def score(model, tokenizer, problems, step, args, rank, world):
    """Greedy completions of the held-out problems, shared among the ranks, into eval-STEP.jsonl; prints the accuracy."""
    rows = gather(evaluate.score(model, tokenizer, problems[rank::world], args.eval_new_tokens), world)
    rows = [row for part in rows for row in part]
    if rank == 0:
        with open(os.path.join(args.out, f"eval-{step}.jsonl"), "w", encoding="utf-8") as out:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        accuracy, (low, high) = evaluate.summarise(rows)["greedy"]
        print(f"step {step}: greedy accuracy {100 * accuracy:.1f} % on {len(rows)} held-out problems, "
              f"95 % [{100 * low:.1f}, {100 * high:.1f}]", flush=True)


def mean(values):
    """Mean of what is a number; nan where nothing is."""
    values = [v for v in values if v is not None and v == v]
    return float(np.mean(values)) if values else float("nan")


def peak_memory():
    """MiB at most in use so far: by CUDA's allocator, else by the process (of which getrusage would tell its parent's, too)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2 ** 20
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20  # bytes on macOS


def report(step, parts, clock, tokens, args):
    """The figures of one step over all ranks, as README defines them: one object of log.jsonl.

    parts    every rank's (samples, figures of groups, loss, gaps)
    """
    samples, figures, gaps = ([x for part in parts for x in part[k]] for k in (0, 1, 3))
    lengths = [len(s.completion_ids) for s in samples]
    row = dict(step=step, loss=sum(part[2] for part in parts), length=mean(lengths), tokens=tokens + sum(lengths))
    if figures:
        row |= {name: mean([f.get(name) for f in figures]) for name in
                ("reward", "dead", "sat_pair", "sat_triplet", "dropped", "adv_var", "adv_var_scaled", "fallback")}
        row |= dict(truncated=mean([s.truncated for s in samples]), entropy=-mean([x for s in samples for x in s.sampler_logps]),
                    gap=mean(gaps), gap_max=max(gaps, default=float("nan")))
    return row | dict(tokens_per_s=sum(lengths) / (clock[2] - clock[0]), seconds_rollout=clock[1] - clock[0],
                      seconds_update=clock[2] - clock[1], peak_memory_mb=peak_memory())


def write_logs(logs, row, samples, tokenizer, args):
    """One line of log.jsonl, and every so many steps this rank's samples to rollouts.jsonl."""
    log, rollouts = logs
    log.write(json.dumps({key: None if value != value else value for key, value in row.items()}) + "\n")
    if args.rollouts_every and row["step"] % args.rollouts_every == 0:
        for s in samples:
            texts = dict(prefix=tokenizer.decode(s.prefix_ids), completion=tokenizer.decode(s.completion_ids))
            figures = dict(reward=s.reward, value=s.value, advantage=s.advantage, truncated=s.truncated)
            rollouts.write(json.dumps(dict(step=row["step"], group=s.group, node=s.node, **texts, **figures), ensure_ascii=False) + "\n")


def progress_line(row, seconds, args):
    """One step as one line: what a person watches. seconds a step give the ETA."""
    done, eta = row["step"] + 1, seconds * (args.steps - row["step"] - 1)
    parts = [f"step {done}/{args.steps} {100 * done // args.steps:3d} %", f"loss {row['loss']:+.3f}"]
    if "reward" in row:
        parts += [f"{name} {row[name]:.2f}" for name in ("reward", "dead", "entropy", "truncated")] + [f"gap {row['gap']:.0e}"]
    parts += [f"length {row['length']:.0f}", f"grad {row['grad_norm']:.2f}", f"{row['tokens_per_s']:.0f} tok/s", f"ETA {eta // 60:.0f}:{eta % 60:02.0f}"]
    return " | ".join(parts) + ("  every group is dead: equal rewards, nothing to learn from" if row.get("dead") == 1 else "")


def finish(args, minutes, evaluated):
    """Say what came out: before against after on the same problems."""
    print(f"{args.steps} steps done, {minutes:.1f} minutes since the start or the resume; the model is in {args.out}")
    if evaluated:
        before, after = (list(evaluate.read_scores(os.path.join(args.out, f"eval-{step}.jsonl")).values()) for step in (0, args.steps))
        print(f"greedy accuracy before and after: {evaluate.compare(before, after)}")


def train(args):
    """The run: set up, then for every step roll out, update, report, and now and then save and evaluate."""
    rank, world, device = evaluate.distributed()
    # 1. data, student, optimiser, and where an earlier run stopped
    model, tokenizer, data, problems = set_up(args, device)
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    params = list(names.values())
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.95 if args.objective == "sft" else 0.999), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, round(0.03 * args.steps)), args.steps + 1).lr_lambdas[0]
    start, tokens = restore(model, optimizer, names, args) if args.resume else (0, 0)
    if rank == 0:
        logs = open_run(args, start)
        print(f"{sum(p.numel() for p in params):,} trainable of {sum(p.numel() for p in model.parameters()):,} weights on "
              f"{world} x {device.type}, {len(data)} problems, {args.group} groups, {args.baseline} baseline -> {args.out}")
    # 2. the untrained student
    if problems and start == 0:
        score(model, tokenizer, problems, 0, args, rank, world)
    begun = time.time()
    for step in range(start, args.steps):
        # 3. roll out
        clock = [time.time()]
        if args.objective == "sft":
            samples, figures = sft_batch(data, step, args, rank, world), []
            scale = 1 / sum(gather(sum(len(s.completion_ids) for s in samples), world))  # mean over tokens
        else:
            samples, figures = rollout(model, tokenizer, data, step, args, rank, world)
            scale = 1 / args.batch_size  # sum over tokens, mean over samples
        clock.append(time.time())
        # 4. update
        lr = args.lr * schedule(step + 1)
        loss, gaps, grad_norm = update(model, optimizer, params, samples, scale, lr, args, world)
        clock.append(time.time())
        # 5. report
        row = report(step, gather((samples, figures, loss, gaps), world), clock, tokens, args) | dict(lr=lr, grad_norm=grad_norm)
        tokens, last = row["tokens"], step + 1 == args.steps
        if rank == 0:
            write_logs(logs, row, samples, tokenizer, args)
            print(progress_line(row, (time.time() - begun) / (step + 1 - start), args), flush=True)
            # 6. save
            if last or args.save_every and (step + 1) % args.save_every == 0:
                save(model, tokenizer, optimizer, names, step + 1, tokens, args)
        # 7. evaluate
        if problems and (last or (step + 1) % args.eval_every == 0):
            score(model, tokenizer, problems, step + 1, args, rank, world)
    if rank == 0:
        finish(args, (time.time() - begun) / 60, bool(problems))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(lambda: train(parse_args()))
