"""
Tree-OPO: GRPO-like training of a small language model on prefixes from a teacher's search trees.

What differs from textbook GRPO:
1. Prompts are prefixes: 8 partial solutions of one problem's tree form a group (Sec. 3.1), instead
   of one question 8 times.
2. Advantages know the tree: r - alpha V(prefix), mean-centred, or a quadratic program (Sec. 3.2,
   3.3; advantage.py).
3. No division by the standard deviation (App. A.8), no ratio, no clip, no reference model: one
   update a batch, so the loss is the plain policy gradient of Sec. 3.4, a sum over completion
   tokens and a mean over samples.
4. A group is one packed row: what its samples share is computed once (tree.pack).

The other methods of Tables 1 and 2 change the advantage of a completion (`compare_groups`) or of
its steps (`credit_steps`), weigh log-probs (`surrogate`), or add a KL term (`evaluate.divergence`).
"""
import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple
from zlib import crc32

import evaluate  # before torch: it notes which torchrun has started this process
import numpy as np
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import advantage
from evaluate import gather, say
from tree import (InputError, arguments, at_least, lock, micro_batches, read_problems,
                  read_solutions, read_trees, rng, run_command, sample_group, shuffled, tokenize,
                  write_jsonl)

EXAMPLES = """examples:
  torchrun train.py --baseline expectation                    the embedded default, on a laptop
  python train.py --resume                                    go on where that run was stopped
  python train.py --group question --baseline grpo            GRPO, for comparison
  python train.py --objective sft --trees traces.jsonl        learn worked solutions by heart
  python train.py --teacher data/arithmetic/teacher --distill_coef 0.1 --out out/kl
                                                              Tree-OPO + KL
  python train.py --group question --reward teacher --teacher data/arithmetic/teacher
                                                              REINFORCE with the teacher's reward
  torchrun --nproc_per_node 8 train.py --preset paper --trees out/gsm8k_trees.jsonl
"""

# ---- Knobs. Any flag overrides its preset. -------------------------------------------------------
PRESETS = {
    "arithmetic": dict(  # the embedded default
        model="data/arithmetic/student", trees="data/arithmetic/trees.jsonl",
        eval_data="data/arithmetic/val.jsonl", alpha=0.5, group_size=8, batch_size=32,
        temperature=1.0, max_prompt=256, max_new_tokens=96, lora_rank=16, lora_alpha=64.0,
        lora_dropout=0.0, critic_warmup=20, lr=5e-4, steps=120, eval_every=40, save_every=20),
    "paper": dict(  # Table 3; steps: two passes over GSM8K's 7,473 training problems, four a batch
        model="Qwen/Qwen2.5-1.5B-Instruct", trees="out/gsm8k_trees.jsonl",
        eval_data="data/gsm8k/test.jsonl", alpha=0.5, group_size=8, batch_size=32,
        temperature=1.0, max_prompt=512, max_new_tokens=256, lora_rank=16, lora_alpha=64.0,
        lora_dropout=0.1, critic_warmup=20, lr=3e-5, steps=3736, eval_every=500, save_every=100),
}
CLIP = 0.2             # how far the probability ratio may leave 1 where there are several epochs
MAX_WEIGHT = 10.0      # largest importance weight of a teacher's completion (Sec. 3.1)
DISTILL_LR = 5e-4      # the default of --lr where the reward is not the task's (Table 3)
CRITIC_LR = 1e-3       # of all the critic's weights
GAMMA = 0.95           # discount a reasoning step, of step rewards and in GAE (Table 3)
WARMUP = 0.03          # share of the run in which the learning rate rises
ROLLOUTS_EVERY = 10    # steps between samples written to rollouts.jsonl
MAX_GRAD_NORM = 1.0    # longer gradients are clipped
MAY_DIFFER = (            # flags that --resume may change; of files the contents are compared
    "out", "resume", "preset", "eval_every", "save_every", "micro_tokens", "no_pack", "compile",
    "model", "adapter", "trees", "eval_data")


count = at_least(1)  # types of flags
whole = at_least(0)
fraction = at_least(0, float, high=1)
positive = at_least(1e-12, float)


def add_flags(parser):
    """Every knob, in groups. Those with a default in each preset are added by `preset`."""
    def group(title, sentence):
        return parser.add_argument_group(title, sentence).add_argument

    def preset(name, kind, text):
        values = " | ".join(str(defaults[name]) for defaults in PRESETS.values())
        add(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"{text} ({values})")

    add = group("model", "What learns: LoRA on a causal language model.")
    preset("model", str, "the student: a folder or a hub name")
    add("--adapter", help="start from this PEFT adapter instead of a fresh one")
    preset("lora_rank", whole, "0 trains every weight instead of an adapter")
    preset("lora_alpha", positive, "LoRA's scale is alpha / rank")
    preset("lora_dropout", at_least(0, float, high=0.99), "in LoRA layers, in the update alone")
    add = group("data", "What it learns from, and where the run is kept.")
    preset("trees", str, "prefix trees, or traces and searches for sft; JSONL")
    preset("eval_data", str, "held-out problems, JSONL")
    evaluate.add_prompt_flags(add)
    add("--out", help="run folder (out/PRESET-GROUP-METHOD-SEED)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    add = group("method", "The rows of Table 1, and what a batch is.")
    add("--objective", choices=("tree_opo", "sft"), default="tree_opo", help="sft: cross entropy")
    add("--group", choices=("question", "trace", "tree"), default="tree", help="of prefixes")
    add("--baseline", choices=advantage.ESTIMATORS, default=argparse.SUPPRESS, metavar="NAME",
        help=f"expectation, or one of {', '.join(advantage.ESTIMATORS)}")
    preset("alpha", fraction, "weight of V(prefix) in the advantage")
    add("--mc_rollouts", type=count, default=4, help="completions a prefix for --baseline mc")
    add("--no_root", action="store_true", help="leave the bare question out of the prefixes")
    preset("group_size", count, "samples that are compared with each other")
    preset("batch_size", count, "samples a step over all ranks")
    preset("temperature", at_least(0.01, float), "of the student's rollouts, and of the loss")
    preset("max_prompt", count, "longer prefixes are dropped; tokens")
    preset("max_new_tokens", count, "longer completions earn 0; twice as many in evaluations")
    add("--epochs", type=count, default=1, help="updates a batch; with several PPO's clipped ratio")
    add("--kl_coef", type=at_least(0, float), default=0.0, help="of KL(student || no adapter)")
    add = group("teacher and critic", "The rows of Table 2; App. B, Sec. 3.1.")
    add("--teacher", help="a model with the student's vocabulary: a folder or a hub name")
    add("--teacher_adapter", help="a PEFT adapter on it")
    add("--distill_coef", type=at_least(0, float), default=0.0, help="of the KL with the teacher")
    add("--kl", choices=("student_teacher", "teacher_student"), default="student_teacher",
        help="its direction: KL(first || second)")
    add("--reward", choices=("task", "teacher", "none"), default="task",
        help="teacher: log p(teacher) - log p(student) of every step; none: the KL alone")
    add("--behaviour", choices=("student", "teacher"), default="student",
        help="who writes the completions; the teacher's are weighted")
    add("--critic", help="a decoder; with a value head it replaces --baseline by GAE over steps")
    preset("critic_warmup", whole, "passes over the first batch in which only the critic learns")
    add("--gae_lambda", type=fraction, default=0.95, help="1: REINFORCE with a baseline; 0: TD(0)")
    add = group("optimisation", "How long, how fast, and how often it reports.")
    preset("steps", count, "updates")
    add("--max_tokens", type=whole, default=0, help="end after so many generated tokens, not steps")
    preset("lr", positive, f"its peak, before a cosine to 0; {DISTILL_LR} with another --reward")
    add("--seed", type=whole, default=0, help="of groups, completions and the fresh adapter")
    add("--micro_tokens", type=count, default=8192 if torch.cuda.is_available() else 1024,
        help="tokens a forward pass, padding included; does not change the objective")
    evaluate.add_device_flags(add)
    add("--no_pack", action="store_true", help="a row for every sample, instead of one for a group")
    preset("eval_every", whole, "steps between evaluations, 0 is never, not even at the ends")
    preset("save_every", whole, "steps between checkpoints, 0 is only the last")


def parse_args(argv=None):
    """The knobs: a preset, and the flags that override it. InputError where they make no sense."""
    parser = arguments(__doc__.strip().split("\n\n")[0], epilog=EXAMPLES)
    parser.add_argument("--preset", choices=PRESETS, default="arithmetic",
                        help="defaults: (arithmetic | paper), the latter from the paper's Table 3")
    add_flags(parser)
    given = vars(parser.parse_args(argv))
    defaults = dict(PRESETS[given["preset"]], baseline="expectation")
    if given["reward"] != "task":
        defaults["lr"] = DISTILL_LR
    args = argparse.Namespace(**{**defaults, **given})
    argv = sys.argv[1:] if argv is None else argv
    words = {word.split("=")[0] for word in argv}
    check_flags(args, [name for name in given if f"--{name}" in words])
    method = args.baseline if args.reward == "task" else args.reward
    if args.critic:
        method = f"{args.reward}-critic"
    if args.objective == "sft":
        method = "sft"
    name = f"{args.preset}-{args.group}-{method}-{args.seed}"
    args.out = os.path.normpath(args.out or f"out/{name}")
    return args


def check_flags(args, named):
    """InputError where flags contradict each other, do nothing, or leave nothing to learn from.

    named   the flags on the command line
    """
    def refuse(wrong, sentence):
        if wrong:
            raise InputError(sentence)

    sft = args.objective == "sft"
    compares = args.reward == "task" and not args.critic  # completions of a group with each other
    wants_teacher = args.distill_coef or "teacher" in (args.reward, args.behaviour)
    refuse(not sft and args.batch_size % args.group_size,
           f"--batch_size {args.batch_size} is no multiple of --group_size {args.group_size}.")
    refuse(not sft and compares and args.group_size == 1,
           "--group_size 1 compares a sample with nothing; expected 2 or more.")
    refuse("baseline" in named and not compares,
           "--baseline compares task rewards; --critic and other --reward do not. Leave one out.")
    refuse(args.critic and (sft or args.reward == "none"),
           "--critic has nothing to predict; expected --reward task or teacher.")
    refuse(sft and (args.teacher or args.kl_coef or args.epochs > 1 or "baseline" in named),
           "--objective sft takes no --teacher, --kl_coef, --epochs or --baseline.")
    refuse((wants_teacher or args.teacher_adapter) and not args.teacher,
           "--distill_coef, --teacher_adapter and --reward or --behaviour teacher need --teacher.")
    refuse(args.teacher and not wants_teacher,
           "--teacher needs --distill_coef, or --reward or --behaviour teacher, to do something.")
    refuse(args.reward == "none" and not args.distill_coef,
           "--reward none leaves nothing to learn from; expected a --distill_coef above 0.")
    refuse(args.behaviour == "teacher"
           and (not compares or args.epochs > 1 or args.baseline == "mc"),
           "--behaviour teacher takes no --critic, --epochs, --baseline mc or other --reward.")
    refuse(args.adapter and {"lora_rank", "lora_alpha", "lora_dropout"} & set(named),
           "--adapter is trained as it is; --lora_rank, --lora_alpha, --lora_dropout do nothing.")
    refuse(args.kl_coef and not args.lora_rank,
           "--kl_coef compares with the student without its adapter; --lora_rank 0 has none.")
    refuse(not args.lora_rank and {"lora_alpha", "lora_dropout", "dtype"} & set(named),
           "--lora_rank 0 trains all weights in float32; --lora_alpha, --lora_dropout and --dtype "
           "do nothing.")
    has_v = compares and args.baseline not in advantage.WITHOUT_V
    used = dict(group=True, temperature=True, alpha=has_v, mc_rollouts=args.baseline == "mc",
                no_root=args.group != "question", kl=args.distill_coef,
                critic_warmup=args.critic, gae_lambda=args.critic)  # and none of them by sft
    for name, is_used in used.items():
        refuse(name in named and (sft or not is_used), f"--{name} does nothing here; leave it out.")


# ---- Records -------------------------------------------------------------------------------------
@dataclass
class Sample:
    """One completion, from prefix to advantages. Ids are kept as sampled."""
    group: int
    node: int
    prefix_ids: list
    completion_ids: list = None
    sampler_logps: list = None       # (n,) of the completion's tokens
    tree: int = 0                    # number of its tree
    depth: int = 0                   # steps in its prefix
    fresh: bool = False              # a further one for the baseline `mc`, not trained on
    seed: tuple = ()                 # of its random numbers
    truncated: bool = False
    solved: bool = False             # the answer is right
    reward: float = 0.0              # what the student is to earn more of
    advantages: np.ndarray = None    # (n,) one a completion token
    steps: list = None               # where its reasoning steps begin, if they are credited
    targets: np.ndarray = None       # what the critic should have said before each step


class Models(NamedTuple):
    """Who takes part. Only the student, and the critic where there is one, learn."""
    student: object
    teacher: object = None
    critic: object = None


class Scale(NamedTuple):
    """What sums over samples, completion tokens and reasoning steps are multiplied by: 1 / their
    number in the whole batch, so that neither micro-batches nor ranks change the objective."""
    sample: float
    token: float = 0.0
    step: float = 0.0


@dataclass
class Run:
    """Who learns, where the run stands, and which of its ranks this is."""
    models: Models
    tokenizer: object
    optimizer: object
    trainable: dict     # name -> weight that learns: the student's, then the critic's
    contents: dict      # checksums of what was read, which a resume compares
    micro_tokens: int   # tokens in a forward pass; halved where memory has run out
    rank: int = 0
    world: int = 1
    step: int = 0       # steps done
    tokens: int = 0     # generated so far

    def done(self, args):
        """How much of the run is done, from 0 to 1 and, with --max_tokens, a little over."""
        return self.tokens / args.max_tokens if args.max_tokens else self.step / args.steps

    def lr_factor(self, args):
        """The next step's learning rate over its peak: a linear warm-up, then a cosine to 0. With
        --max_tokens, --steps is no more than the unit of the warm-up."""
        step = self.done(args) * args.steps + 1
        warmup = max(1, round(WARMUP * args.steps))
        if step < warmup:
            return step / warmup
        progress = (step - warmup) / max(1, args.steps + 1 - warmup)
        return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))

    def share(self, items):
        """This rank's part of a list that all ranks have: neighbours, which share prefixes."""
        start = len(items) * self.rank // self.world
        return items[start:len(items) * (self.rank + 1) // self.world]


def is_evaluated(run, args):
    """Whether the student is scored where the run stands: now and then, and at both ends."""
    if not args.eval_every:
        return False
    return run.done(args) >= 1 or run.step % args.eval_every == 0


# ---- Roll out: prefixes, completions, rewards ----------------------------------------------------
def draw(run, trees, args):
    """The samples of this step, still without completions, the same on every rank.

    Everything random derives from (seed, step, group), never from the rank or an earlier step: any
    number of ranks samples the same batch, and a resumed run replays nothing.
    """
    samples = []
    groups = args.batch_size // args.group_size
    for g in range(groups):
        number = int(shuffled(run.step * groups + g, len(trees), args.seed))
        tree = trees[number]
        draws = rng(args.seed, "group", run.step, g)
        nodes = sample_group(tree, args.group_size, args.group, draws, not args.no_root).tolist()
        depth = tree.depth().tolist()
        fresh = []
        if args.baseline == "mc":  # App. A.9
            fresh = np.repeat(np.unique(nodes), args.mc_rollouts).tolist()
        for k, node in enumerate(nodes + fresh):
            samples.append(Sample(g, node, tree.prefix_ids(node), tree=number,
                                  depth=depth[node], fresh=k >= args.group_size,
                                  seed=(args.seed, "completion", run.step, g, k)))
    return samples


def rollout(run, trees, args):
    """Draw a batch, complete it, and grade it. Returns all samples, on every rank."""
    mine = run.share(draw(run, trees, args))
    policy = run.models.teacher if args.behaviour == "teacher" else run.models.student
    completions, logps = evaluate.generate(
        policy, run.tokenizer, [s.prefix_ids for s in mine], args.max_new_tokens, args.temperature,
        [s.seed for s in mine], return_logps=True)
    ends = evaluate.eos_ids(policy, run.tokenizer)
    for sample, ids, values in zip(mine, completions, logps):
        problem = trees[sample.tree].problem
        text = evaluate.decode(run.tokenizer, ids)
        sample.completion_ids = ids
        sample.sampler_logps = values
        sample.truncated = ids[-1] not in ends
        sample.solved = not sample.truncated and evaluate.is_solved(text, problem)
        sample.reward = reward(sample, text, problem)
    return list(chain(*gather(mine)))


def reward(sample, text, problem):
    """What a completion earns: any number, here 1 for a right answer. Shape rewards here.

    sample    has completion_ids, sampler_logps, truncated and solved
    text      of the completion
    problem   every field of its data file
    """
    return float(sample.solved)


# ---- Credit: advantages --------------------------------------------------------------------------
def compare_groups(samples, trees, args):
    """Set the advantages of each group (Sec. 3.2, 3.3); returns the samples to learn from, and the
    metrics of each group, which Figure 4 plots."""
    groups = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    metrics = []
    for members in groups.values():
        fresh = [s for s in members if s.fresh]
        members = [s for s in members if not s.fresh]
        tree = trees[members[0].tree]
        mc = np.full(len(tree.parent), np.nan)
        for node in {s.node for s in fresh}:
            mc[node] = np.mean([s.reward for s in fresh if s.node == node])
        group = advantage.Group(
            node=[s.node for s in members], parent=tree.parent,
            rewards=[s.reward for s in members], solved=[s.solved for s in members],
            logps=[sum(s.sampler_logps) for s in members],
            lengths=[len(s.completion_ids) for s in members], alpha=args.alpha, mc=mc,
            teacher=np.array(tree.value) / np.maximum(tree.visits, 1))
        a, used = advantage.advantages(args.baseline, **vars(group))
        for sample, value in zip(members, a):
            sample.advantages = np.full(len(sample.completion_ids), value)
        row = advantage.metrics(a, group)
        row["fallback"] = float(used != args.baseline)
        metrics.append(row)
    return [s for s in samples if not s.fresh], metrics


@torch.no_grad()
def token_logps(model, samples, run, args, micro_tokens):
    """The log-probs of each sample's completion tokens under a model: a list of (n,) arrays."""
    logps = {}
    for batch in batches(samples, run.models, args, micro_tokens):
        lengths = [len(s.completion_ids) for s in batch.samples]
        values = evaluate.log_probs(evaluate.predict(model, batch, args.temperature))
        for sample, part in zip(batch.samples, values.cpu().split(lengths)):
            logps[id(sample)] = part.numpy()
    return [logps[id(sample)] for sample in samples]


@torch.no_grad()
def credit_steps(samples, run, args, micro_tokens):
    """Credit reasoning steps instead of whole completions, rows (a) to (c) of Table 2: GAE's
    advantages, and targets for the critic. It overwrites and adds up nothing: it may be run again.

    A step's reward is log p(teacher) - log p(student) of its tokens, whose expected sum is
    -KL(student || teacher); or the task's, at the last step. Without a critic V is 0 and lambda 1:
    then the advantage is the discounted return, and the loss is REINFORCE.
    """
    rewards = []
    for sample in samples:
        sample.steps = evaluate.step_starts(run.tokenizer, sample.completion_ids)
        rewards.append(np.zeros(len(sample.steps)))
        rewards[-1][-1] = sample.reward
    if args.reward == "teacher":
        teacher_logps = token_logps(run.models.teacher, samples, run, args, micro_tokens)
        for k, sample in enumerate(samples):
            gains = teacher_logps[k] - sample.sampler_logps
            rewards[k] = np.add.reduceat(gains, sample.steps)  # a sum a step
    values = {id(sample): np.zeros(len(sample.steps)) for sample in samples}
    lam = 1.0
    if run.models.critic:
        lam = args.gae_lambda
        for batch in batches(samples, run.models, args, micro_tokens):
            counts = [len(s.steps) for s in batch.samples]
            parts = evaluate.step_values(run.models.critic, batch).cpu().split(counts)
            values |= {id(s): part.numpy() for s, part in zip(batch.samples, parts)}
    for sample, step_rewards in zip(samples, rewards):
        a, sample.targets = advantage.gae(step_rewards, values[id(sample)], GAMMA, lam)
        if not np.isfinite(a).all():
            raise InputError("the critic's values or the teacher's rewards are not finite numbers; "
                             "expected models that have not diverged")
        lengths = np.diff([*sample.steps, len(sample.completion_ids)])
        sample.advantages = np.repeat(a, lengths)


def share_credit(samples, run, args):
    """`credit_steps` of all samples, each rank doing its part."""
    mine = run.share(samples)
    _, run.micro_tokens = evaluate.with_less_memory(
        lambda micro_tokens: credit_steps(mine, run, args, micro_tokens), run.micro_tokens)
    return list(chain(*gather(mine)))


def make_batch(run, data, args):
    """All samples of one step, credited; the metrics of their groups; the tokens generated."""
    if args.objective == "sft":  # with advantage 1 the policy gradient is that of cross entropy
        first = run.step * args.batch_size
        samples = []
        for k in range(args.batch_size):
            prompt_ids, completion_ids = data[shuffled(first + k, len(data), args.seed)]
            ones = np.ones(len(completion_ids))
            samples.append(Sample(k, 0, prompt_ids, completion_ids, advantages=ones))
        return samples, [], sum(len(s.completion_ids) for s in samples)
    samples = rollout(run, data, args)
    generated = sum(len(s.completion_ids) for s in samples)
    if args.critic or args.reward == "teacher":
        return share_credit(samples, run, args), [], generated
    if args.reward == "none":
        for sample in samples:
            sample.advantages = np.zeros(len(sample.completion_ids))
        return samples, [], generated
    samples, metrics = compare_groups(samples, data, args)
    return samples, metrics, generated


# ---- Update: the loss, its gradient over micro-batches and ranks ---------------------------------
def batches(samples, models, args, micro_tokens):
    """The samples in micro-batches of packed rows, or of a row a sample with --no_pack."""
    longest = min(evaluate.row_tokens(model) for model in models if model)
    return micro_batches(samples, micro_tokens, 0 if args.no_pack else longest)


def surrogate(logps, old_logps, advantages, sample, args):
    """What to maximise, a number a token (n,). At ratio 1 each variant has the gradient of
    A log pi, the policy gradient of Sec. 3.4.

    old_logps   (n,) under the policy that sampled, as the sampler computed them: with bf16 weights
                they differ by 0.02 a token from `logps` before any update
    sample      (n,) which sample a token belongs to
    """
    if args.behaviour == "teacher":  # Sec. 3.1; w has no gradient: this is an advantage of w A
        weight = log_weights(logps, old_logps, sample).clamp(max=math.log(MAX_WEIGHT)).exp()
        return weight[sample] * advantages * logps
    if args.epochs > 1:  # PPO's clipped ratio, a token at a time, as GRPO has it
        ratio = (logps - old_logps).exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        return torch.minimum(ratio * advantages, clipped * advantages)
    return advantages * logps


def log_weights(logps, old_logps, sample):
    """log pi(c | p) - log pi_behaviour(c | p) of every sample (N,), without gradient."""
    zeros = torch.zeros(int(sample.max()) + 1, device=logps.device)
    return zeros.index_add(0, sample, logps.detach() - old_logps)


def policy_loss(models, batch, scale, args, stats):
    """The student's part of the loss of a micro-batch; what it finds is added to `stats`."""
    student = models.student
    predictions = evaluate.predict(student, batch, args.temperature)
    logps = evaluate.log_probs(predictions)
    advantages = np.concatenate([s.advantages for s in batch.samples])
    advantages = torch.tensor(advantages, dtype=torch.float32, device=logps.device)
    old_logps = logps.detach()
    if batch.samples[0].sampler_logps:  # worked solutions were not sampled
        sampled = np.concatenate([s.sampler_logps for s in batch.samples])
        old_logps = torch.tensor(sampled, dtype=torch.float32, device=logps.device)
        if args.behaviour == "teacher":
            stats["log_weight"] += log_weights(logps, old_logps, predictions.sample).tolist()
        else:
            stats["gap"] += (logps.detach() - old_logps).abs().tolist()
    gain = surrogate(logps, old_logps, advantages, predictions.sample, args)
    loss = -scale.sample * gain.sum()
    references = [("kl", args.distill_coef, models.teacher, args.kl),
                  ("kl_base", args.kl_coef, student, "student_teacher")]
    for name, coef, reference, direction in references:
        if coef:
            plain = student.disable_adapter() if reference is student else nullcontext()
            with torch.no_grad(), plain:
                other = evaluate.predict(reference, batch, args.temperature).logits
            kl = evaluate.divergence(predictions.logits, other, direction)
            loss = loss + coef * scale.token * kl.sum()
            stats[name] += kl.tolist()
    return loss


def accumulate(models, samples, scale, args, micro_tokens, warm_up=False):
    """Add the gradient of the samples' part of the loss:

        - sum_k sum_t A_kt log pi(c_kt | p_k, c_k<t) scale.sample                    (Sec. 3.4)
        + distill_coef KL(student, teacher) scale.token                              (App. B)
        + kl_coef KL(student || student without its adapter) scale.token
        + (V_phi(s) - target)^2 scale.step                                           (App. B)

    warm_up   train the critic alone
    Returns lists of numbers: loss and critic_loss of each micro-batch; kl, kl_base, and the gap
    |log pi(sampler) - log pi(trainer)|, of each token; log_weight of each sample. Samples whose
    advantages are all 0 are left out where nothing else is learnt from them.
    """
    stats = dict(loss=[], gap=[], kl=[], kl_base=[], log_weight=[], critic_loss=[])
    if not (args.distill_coef or args.kl_coef or models.critic or args.behaviour == "teacher"):
        samples = [s for s in samples if s.advantages.any()]
    for batch in batches(samples, models, args, micro_tokens):
        loss = torch.zeros((), device=models.student.device)
        if not warm_up:
            loss = loss + policy_loss(models, batch, scale, args, stats)
        if models.critic:
            targets = np.concatenate([s.targets for s in batch.samples])
            targets = torch.tensor(targets, dtype=torch.float32, device=loss.device)
            error = evaluate.step_values(models.critic, batch) - targets
            critic_loss = scale.step * error.square().sum()
            stats["critic_loss"].append(critic_loss.item())
            loss = loss + critic_loss
        loss.backward()
        stats["loss"].append(loss.item())
    return stats


def optimiser_step(run, samples, args, warm_up=False):
    """One step of AdamW on the whole batch, of whose gradient each rank computes its share; with
    warm_up, of the critic alone. Where the gradient is not finite, on whichever rank, all skip it.

    Returns accumulate's numbers, the gradient's norm, and whether the step was taken.
    """
    tokens = sum(len(s.completion_ids) for s in samples)
    steps = sum(len(s.steps or ()) for s in samples)
    scale = Scale(1 / args.batch_size, 1 / tokens, 1 / max(steps, 1))
    if args.objective == "sft":
        scale = Scale(sample=1 / tokens)  # cross entropy is a mean over tokens
    mine = run.share(samples)

    def gradient(micro_tokens):
        draws = rng(args.seed, "dropout", run.step, run.rank)
        torch.manual_seed(int(draws.integers(2 ** 63)))
        run.optimizer.zero_grad()
        return accumulate(run.models, mine, scale, args, micro_tokens, warm_up)

    lora_dropout(run.models.student, True)
    stats, run.micro_tokens = evaluate.with_less_memory(gradient, run.micro_tokens)
    lora_dropout(run.models.student, False)
    groups = run.optimizer.param_groups  # the student's, the critic's
    all_reduce_gradients(list(chain(*[group["params"] for group in groups])))
    norms = [torch.nn.utils.clip_grad_norm_(g["params"], MAX_GRAD_NORM).item() for g in groups]
    is_finite = all(map(math.isfinite, norms))
    if is_finite:
        for group in groups:
            group["lr"] = group["peak_lr"] * (1 if warm_up else run.lr_factor(args))
        if warm_up:  # without a gradient AdamW leaves the student and its moments alone
            for p in groups[0]["params"]:
                p.grad = None
        run.optimizer.step()
    run.optimizer.zero_grad()
    return stats, norms[0], is_finite


def warm_up_critic(run, samples, args):
    """Before the first update the critic alone learns the first batch, `--critic_warmup` times over
    (Table 3: 20 epochs). Targets and advantages are computed anew after each pass. Returns the
    samples."""
    for _ in range(args.critic_warmup):
        _, _, is_finite = optimiser_step(run, samples, args, warm_up=True)
        if not is_finite:
            raise InputError("the critic's gradient is not finite before the first update. "
                             "Expected a --critic that has not diverged.")
        samples = share_credit(samples, run, args)
    return samples


def update(run, samples, args):
    """`--epochs` steps on the same batch. Returns accumulate's numbers of the first, and what is to
    be logged of them all."""
    steps = [optimiser_step(run, samples, args) for _ in range(args.epochs)]
    stats, norm, _ = steps[0]
    skipped = sum(not is_finite for _, _, is_finite in steps)
    return stats, dict(lr=args.lr * run.lr_factor(args), grad_norm=norm, skipped=skipped)


def lora_dropout(model, active):
    """Dropout acts in LoRA's layers alone: the base's own would make it another policy."""
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            module.train(active)


def all_reduce_gradients(params):
    """Sum the gradients over ranks with one flat all_reduce; a rank without work adds zeros."""
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if dist.is_initialized():
        flat = torch.cat([p.grad.flatten() for p in params])
        dist.all_reduce(flat)
        for p, grad in zip(params, flat.split([p.numel() for p in params])):
            p.grad.copy_(grad.view_as(p))


# ---- The loop ------------------------------------------------------------------------------------
def train(args):
    """The run: set up, then evaluate now and then, roll out, update, report, save."""
    # 1. set up
    rank, world, device = evaluate.distributed()
    evaluate.COMPILE = args.compile
    held = open_folder(args) if rank == 0 else None  # the folder's lock
    run, data, problems = set_up(args, rank, world, device)
    log = Log(run, data, args)
    signals = stop_on_signals(rank)
    while True:
        # 2. evaluate, but no more once told to stop
        stop = any(gather(bool(signals)))
        last = run.done(args) >= 1
        if not stop and is_evaluated(run, args):
            log.evaluation(problems)
            stop = not last and any(gather(bool(signals)))
        if stop or last:
            break
        # 3. roll out, and credit what was sampled
        begun = time.monotonic()
        samples, metrics, generated = make_batch(run, data, args)
        sampled = time.monotonic()
        # 4. update
        if args.critic and run.step == 0:
            samples = warm_up_critic(run, samples, args)
        stats, row = update(run, samples, args)
        # 5. report
        row |= dict(seconds_rollout=sampled - begun, seconds_update=time.monotonic() - sampled)
        run.step += 1
        run.tokens += generated
        row |= report(run, samples, metrics, gather(stats), args)
        log.step(row, samples, generated)
        # 6. save, at the end before the last evaluation: whatever happens in it, nothing is lost
        due = args.save_every and run.step % args.save_every == 0
        if rank == 0 and (due or run.done(args) >= 1):
            save(run, args)
    if rank == 0:
        if not last:
            save(run, args)
        log.end(stop)
    if world > 1:
        dist.destroy_process_group()
    if stop:  # told so itself, or another rank was
        sys.exit(128 + (signals[0] if signals else signal.SIGTERM))
    return held


# ---- Set up. From here on it is housekeeping: data, models, checkpoints, logs. -------------------
def set_up(args, rank, world, device):
    """(Run, training data, held-out problems), from scratch or where the checkpoint stands. Files
    are read before models are loaded, so that mistakes show at once."""
    checkpoint = find_checkpoint(args) if args.resume else None
    problems = read_problems(args.eval_data) if args.eval_every else []
    read = read_solutions if args.objective == "sft" else read_trees
    data = read(args.trees)
    for other in filter(None, (args.teacher, args.critic)):
        evaluate.check_vocabulary(other, args.model)
    models, tokenizer, weights = load_models(args, device)
    encode = evaluate.encoder(tokenizer, args)
    if problems:
        prompts = [encode(problem["question"])[0] for problem in problems]
        evaluate.check_prompts(models.student, tokenizer, prompts, 2 * args.max_new_tokens)
    data = encode_data(data, encode, tokenizer, models.student, args)
    trainable = {name: p for name, p in models.student.named_parameters() if p.requires_grad}
    groups = [dict(params=list(trainable.values()), peak_lr=args.lr)]
    if models.critic:
        groups.append(dict(params=list(models.critic.parameters()), peak_lr=CRITIC_LR))
        trainable |= {f"critic.{name}": p for name, p in models.critic.named_parameters()}
    betas = (0.9, 0.95 if args.objective == "sft" else 0.999)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=betas, weight_decay=0.0)
    contents = dict(weights=weights, trees=file_checksum(args.trees),
                    prompts=evaluate.prompt_checksum(encode))
    if problems:
        contents["held-out problems"] = f"{crc32(json.dumps(problems).encode()):08x}"
    run = Run(models, tokenizer, optimizer, trainable, contents, args.micro_tokens, rank, world)
    if checkpoint:
        restore(run, checkpoint, args)
    return run, data, problems


def file_checksum(path):
    """crc32 of a file, as text."""
    with open(path, "rb") as file:
        return f"{crc32(file.read()):08x}"


def load_models(args, device):
    """(Models, the student's tokenizer, the checksum of the weights it starts from). The student is
    what learns: an adapter on it, or with --lora_rank 0 all of its weights."""
    torch.manual_seed(args.seed)  # the fresh adapter's A, the critic's head
    dtype = args.dtype if args.lora_rank else "float32"
    student, tokenizer = evaluate.load(args.model, args.adapter, device, dtype, trainable=True)
    weights = evaluate.checksum(student)
    if args.lora_rank == 0:
        student.requires_grad_(True)
    elif not args.adapter:
        student = get_peft_model(student, LoraConfig(
            r=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
            target_modules="all-linear", task_type="CAUSAL_LM"))
        evaluate.multiply_in_bf16(student)
    student.eval()  # PEFT wraps it in training mode, in which a base's own dropout acts
    teacher = None
    if args.teacher:
        teacher, _ = evaluate.load(args.teacher, args.teacher_adapter, device, args.dtype)
        teacher.requires_grad_(False)
    critic = evaluate.load_critic(args.critic, device) if args.critic else None
    return Models(student, teacher, critic), tokenizer, weights


def encode_data(data, encode, tokenizer, student, args):
    """Trees or solutions with their ids; what is longer than --max_prompt is dropped, and said."""
    if args.objective == "sft":
        encoded = [evaluate.encode_solution(tokenizer, *solution, encode) for solution in data]
        kept = [(prompt, ids) for prompt, ids in encoded if len(prompt) <= args.max_prompt]
        dropped = len(encoded) - len(kept)
        sequences = [prompt + ids for prompt, ids in kept]
        new_tokens = 0
    else:
        kept, dropped = tokenize(data, encode, args.max_prompt)
        sequences = []
        for tree in kept:
            prefixes = map(tree.prefix_ids, range(len(tree.parent)))
            sequences += [tree.ids[0], max(prefixes, key=len)]
        new_tokens = args.max_new_tokens
    if dropped:
        say(f"dropped {dropped} prompts of more than {args.max_prompt} tokens")
    if not kept:
        raise InputError(f"{args.trees} has no prompt of at most {args.max_prompt} tokens; "
                         "expected shorter ones, or a larger --max_prompt")
    evaluate.check_prompts(student, tokenizer, sequences, new_tokens)
    return kept


def open_folder(args):
    """Make the run folder and lock it. InputError where another run is at work in it, or where it
    holds something and --resume is not given: nothing is ever overwritten."""
    if os.path.lexists(args.out) and not os.path.isdir(args.out):
        raise InputError(f"--out {args.out} is no folder. Expected the name of one to make.")
    os.makedirs(args.out, exist_ok=True)
    held = lock(os.path.join(args.out, "log.jsonl"))
    others = {name for name in os.listdir(args.out) if not name.endswith(".lock")}
    if others and not (args.resume and {"log.jsonl", "checkpoint"} & others):
        raise InputError(f"the folder {args.out} is not empty. Expected --resume to go on with a "
                         "run in it, another --out, or an empty folder.")
    return held


def stop_on_signals(rank):
    """A list that SIGTERM and Ctrl-C write to, for a loop that finishes its step before it ends. A
    second one ends it at once."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        if rank == 0:  # print would fail if it was what the signal broke into
            os.write(2, b"told to stop: once this step is done and saved; again: at once\n")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return received


# ---- Checkpoints: one safetensors file of weights, Adam's moments and the step -------------------
def checkpoint_path(args):
    """In a folder of its own, where no loader takes its tensors for the model's."""
    return os.path.join(args.out, "checkpoint", "checkpoint.safetensors")


def save(run, args):
    """Write the model (or its PEFT adapter) at the top of the run folder, then the checkpoint. Both
    are written aside and renamed. InputError, and nothing lost, where weights are not finite."""
    state = {}
    for name, p in run.trainable.items():
        if not p.isfinite().all():
            raise InputError(f"the weights have diverged at step {run.step} ({name}); expected "
                             "finite numbers: lower --lr. What was saved before is intact")
        state[f"weight/{name}"] = p.detach()
        for key, value in run.optimizer.state.get(p, {}).items():
            state[f"{key}/{name}"] = value
    state = {key: value.contiguous().cpu() for key, value in state.items()}
    metadata = dict(
        step=str(run.step),
        tokens=str(run.tokens),
        args=json.dumps(vars(args)),
        contents=json.dumps(run.contents))
    path = checkpoint_path(args)
    aside = os.path.join(args.out, "checkpoint", "aside")
    try:
        shutil.rmtree(aside, ignore_errors=True)  # what a kill has left there
        os.makedirs(aside)
        run.models.student.save_pretrained(aside)
        run.tokenizer.save_pretrained(aside)
        for name in os.listdir(aside):
            target = os.path.join(args.out, name)
            if os.path.isdir(target):  # such as additional chat templates
                shutil.rmtree(target)
            os.replace(os.path.join(aside, name), target)
        save_file(state, os.path.join(aside, "checkpoint"), metadata)
        with open(os.path.join(aside, "checkpoint"), "rb") as file:
            os.fsync(file.fileno())
        os.replace(os.path.join(aside, "checkpoint"), path)
        os.rmdir(aside)
    except (SafetensorError, OSError) as error:
        raise InputError(f"step {run.step} cannot be saved in {args.out}: {error}; expected room. "
                         "Make some and --resume: the checkpoint before is intact") from None


def find_checkpoint(args):
    """The run folder's checkpoint, opened, or None where there is none yet. InputError where it is
    damaged or of other settings."""
    path = checkpoint_path(args)
    if not os.path.exists(path):
        say(f"there is no checkpoint in {args.out}: the run starts anew")
        return None
    try:
        checkpoint = safe_open(path, "pt")
        saved = json.loads(checkpoint.metadata()["args"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); expected a checkpoint, or another --out "
                         "to start anew") from None
    defaults = vars(parse_args(["--preset", args.preset]))
    for key, value in vars(args).items():
        before = saved.get(key, defaults[key])  # a fork may have a flag that is new
        if key not in MAY_DIFFER and before != value:
            raise InputError(f"the checkpoint in {args.out} is of --{key} {before}, not "
                             f"{value}; expected the same settings, or another --out")
    return checkpoint


def restore(run, checkpoint, args):
    """Set a run to where a checkpoint stands. InputError where it was made with other contents."""
    metadata = checkpoint.metadata()
    for what, value in json.loads(metadata["contents"]).items():
        if run.contents.get(what, value) != value:
            raise InputError(f"the {what} are not those of the checkpoint in {args.out}; expected "
                             "the same contents, or another --out")
    for name, p in run.trainable.items():
        with torch.no_grad():
            p.copy_(checkpoint.get_tensor(f"weight/{name}"))
        if f"step/{name}" in checkpoint.keys():  # else no update has been done yet
            run.optimizer.state[p] = dict(
                step=checkpoint.get_tensor(f"step/{name}"),
                exp_avg=checkpoint.get_tensor(f"exp_avg/{name}").to(p.device),
                exp_avg_sq=checkpoint.get_tensor(f"exp_avg_sq/{name}").to(p.device))
    run.step = int(metadata["step"])
    run.tokens = int(metadata["tokens"])


# ---- Logs: what a step has to say ----------------------------------------------------------------
def mean(values, statistic=np.mean):
    """The mean, or another statistic, without None and nan; nan where nothing is left."""
    values = [value for value in values if value is not None and not math.isnan(value)]
    return float(statistic(values)) if values else math.nan


def report(run, samples, metrics, parts, args):
    """The figures of one step over all ranks, as results/README.md defines them.

    samples, metrics   of the whole batch
    parts              every rank's numbers from `accumulate`
    """
    stats = {}
    for name in parts[0]:
        stats[name] = list(chain(*[part[name] for part in parts]))
    row = dict(step=run.step, tokens=run.tokens, loss=sum(stats["loss"]),
               length=mean([len(s.completion_ids) for s in samples]),
               peak_memory_mb=evaluate.peak_memory())
    for name in sorted(set().union(*metrics)):
        row[name] = mean([group.get(name) for group in metrics])
    if metrics:
        row["sat_sd"] = mean([group["sat"] for group in metrics], np.std)
    if args.objective == "tree_opo":
        row["reward"] = mean([s.reward for s in samples])
        row["solved"] = mean([s.solved for s in samples])
        row["truncated"] = mean([s.truncated for s in samples])
        for depth in sorted({s.depth for s in samples}):
            solved = [s.solved for s in samples if s.depth == depth]
            row[f"solved_at_{depth}"] = mean(solved)
        row["gap"] = mean(stats["gap"])
        row["gap_max"] = max(stats["gap"], default=math.nan)
        if args.behaviour == "student":
            row["entropy"] = -mean(chain(*[s.sampler_logps for s in samples]))
    for name in ("kl", "kl_base"):
        if stats[name]:
            row[name] = mean(stats[name])
    if stats["critic_loss"]:
        row["critic_loss"] = sum(stats["critic_loss"])
    if stats["log_weight"]:
        weights = np.exp(np.minimum(stats["log_weight"], math.log(MAX_WEIGHT)))
        effective = weights.sum() ** 2 / (weights ** 2).sum()
        row["ess"] = effective / len(weights)
        row["clipped"] = float(np.mean(weights >= 0.999 * MAX_WEIGHT))
    return row


COLUMNS = dict(loss="+.3f", reward=".2f", dead=".2f", entropy=".2f", truncated=".2f", gap=".0e",
               kl=".2g", kl_base=".2g", critic_loss=".2g", ess=".2f", length=".0f", grad_norm=".2f")


class Log:
    """log.jsonl and rollouts.jsonl of a run, and what it prints. Rank 0 alone writes."""

    def __init__(self, run, data, args):
        self.run = run
        self.args = args
        self.begun = time.monotonic()
        self.done_before = run.done(args)
        self.header_due = True
        self.any_solved = run.step > 0  # or not known
        self.gap_said = False
        self.problems = []
        if args.objective != "sft":
            self.problems = [tree.problem for tree in data]
        if run.rank > 0:
            return
        again = is_evaluated(run, args)
        self.log = continue_log(args, "log.jsonl", run.step, again)
        self.rollouts = continue_log(args, "rollouts.jsonl", run.step)
        weights = list(run.models.student.parameters())
        learning = sum(p.numel() for p in weights if p.requires_grad)
        total = sum(p.numel() for p in weights)
        device = weights[0].device.type
        print(f"{learning:,} trainable of {total:,} weights on {run.world} x {device}, "
              f"{len(data)} problems of {args.trees} -> {args.out}")
        preset = PRESETS[args.preset]
        if args.eval_every:
            print(f"evaluated on {args.eval_data}")
            if args.trees != preset["trees"] and args.eval_data == preset["eval_data"]:
                print("note: the trees are others than the preset's, "
                      "the evaluation's problems are not")

    def write(self, row):
        """Append a line to log.jsonl; a figure that is not finite is null."""
        finite = {}
        for name, value in row.items():
            finite[name] = value if math.isfinite(value) else None
        self.log.write(json.dumps(finite) + "\n")

    def evaluation(self, problems):
        """Score the student greedily on the held-out problems, shared among the ranks."""
        run = self.run
        mine = run.share(problems)
        rows = evaluate.score(run.models.student, run.tokenizer, mine,
                              2 * self.args.max_new_tokens,
                              encode_prefix=evaluate.encoder(run.tokenizer, self.args))
        rows = tqdm(rows, total=len(mine), leave=False, disable=run.rank > 0, dynamic_ncols=True)
        rows = list(chain(*gather(list(rows))))
        if run.rank == 0:
            write_jsonl(f"{self.args.out}/eval-{run.step}.jsonl", rows)
            accuracy, low, high = evaluate.summarise(rows)["greedy"]
            self.write(dict(step=run.step, eval_accuracy=accuracy, eval_low=low, eval_high=high))
            print(f"step {run.step}: greedy accuracy on {len(problems)} held-out problems "
                  f"{evaluate.percent(accuracy, low, high)}", flush=True)
        if run.done(self.args) == self.done_before:
            self.begun = time.monotonic()  # the ETA leaves out the first evaluation

    def step(self, row, samples, generated):
        """Log one step, print its line, and say what is probably wrong with the run."""
        run = self.run
        if run.rank > 0:
            return
        row["tokens_per_s"] = generated / (row["seconds_rollout"] + row["seconds_update"])
        self.write(row)
        self.print_progress(row)
        self.any_solved = self.any_solved or row.get("solved") != 0
        if row["skipped"]:
            print("the gradient is not finite: this update is skipped")
        if row.get("dead") == 1 and row["grad_norm"] == 0:
            print("every group is dead: equal rewards, nothing to learn from; what still moves the "
                  "weights is Adam's momentum")
        if row.get("gap", 0.0) > 1e-2 and not self.gap_said:
            self.gap_said = True
            print(f"sampler and trainer differ by {row['gap']:.2g} nat a token: the update is of "
                  "another policy than the one that sampled (--lora_dropout, or bf16 weights, "
                  "which come to 0.02); this is said once, the log has every step's gap")
        if run.step == 50 and not self.any_solved:
            print("nothing solved in 50 steps, which is nearly always the prompt or the grader: "
                  f"see {self.args.out}/rollouts.jsonl")
        if (run.step - 1) % ROLLOUTS_EVERY == 0:
            for s in samples:
                problem = self.problems[s.tree] if self.problems else {}
                line = dict(step=run.step, group=s.group, id=problem.get("id"), node=s.node,
                            depth=s.depth, answer=problem.get("answer"), solved=s.solved,
                            reward=s.reward, advantage=float(np.mean(s.advantages)),
                            truncated=s.truncated,
                            prefix=run.tokenizer.decode(s.prefix_ids),
                            completion=run.tokenizer.decode(s.completion_ids))
                self.rollouts.write(json.dumps(line, ensure_ascii=False) + "\n")

    def print_progress(self, row):
        """A step as a line of at most 120 columns, cut to the terminal, below a header."""
        done = self.run.done(self.args)
        elapsed = time.monotonic() - self.begun
        left = int(elapsed * max(0, 1 - done) / (done - self.done_before))
        percent = 100 * min(done, 1)
        cells = {"step": str(row["step"]), "done": f"{percent:.0f}%"}
        for name, form in COLUMNS.items():
            if name in row:
                cells[name] = "-" if math.isnan(row[name]) else format(row[name], form)
        cells["tok/s"] = f"{row['tokens_per_s']:.0f}"
        cells["ETA"] = f"{left // 60}:{left % 60:02d}"
        lines = [cells.values()]
        if self.header_due:
            lines = [cells.keys(), cells.values()]
            self.header_due = False
        columns = min(120, shutil.get_terminal_size((120, 24)).columns)
        for line in lines:
            padded = []
            for name, cell in zip(cells, line):
                width = max(6, len(name))
                padded.append(f"{cell:>{width}}")
            print(" ".join(padded)[:columns], flush=True)

    def end(self, stopped):
        """Say what came out: the accuracy before against after, on the same problems."""
        self.log.close()
        self.rollouts.close()
        step = self.run.step
        if stopped:
            print(f"stopped after step {step}, which is saved; --resume goes on")
            return
        minutes = (time.monotonic() - self.begun) / 60
        print(f"{step} steps done, {minutes:.1f} minutes; the model is in {self.args.out}")
        paths = [f"{self.args.out}/eval-{k}.jsonl" for k in (0, step)]
        if all(map(os.path.exists, paths)):
            print("accuracy before and after:", evaluate.compare(*map(evaluate.read_scores, paths)))


def continue_log(args, name, step, evaluated_again=False):
    """A log opened to append. The lines of steps after the checkpoint are dropped, for those steps
    are done again, and so may the evaluation at the checkpoint be. So is what cannot be read, such
    as a line that a power cut tore."""
    path = os.path.join(args.out, name)
    kept = []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                    again = evaluated_again and "eval_accuracy" in row and row["step"] == step
                    if row["step"] <= step and not again:
                        kept.append(row)
                except (ValueError, KeyError, TypeError):
                    print(f"{path}, line {number} cannot be read and is dropped")
    write_jsonl(path, kept)
    return open(path, "a", encoding="utf-8", buffering=1)


if __name__ == "__main__":
    run_command(lambda: train(parse_args()))
