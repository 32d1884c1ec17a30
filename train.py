"""
Tree-OPO: GRPO-like training of a small language model on prefixes from a teacher's search trees.

What differs from textbook GRPO:
1. Prompts are prefixes: 8 partial solutions of one problem's tree form a group (Sec. 3.1), not one question 8 times.
2. Advantages know the tree: r - alpha V(prefix), mean-centred, or a quadratic program (Sec. 3.2, 3.3; advantage.py).
3. No division by the standard deviation (App. A.8), no ratio, no clip, no reference model: one update a batch, so the
   loss is the plain policy gradient of Sec. 3.4, a sum over completion tokens and a mean over samples.
4. A group is one packed row: what its samples share is computed once (tree.pack).

The methods that the paper compares with (Tables 1 and 2) differ in three places: what a completion (`compare`) or each of its steps
(`credit_steps`) is credited with, how log-probs are weighted (`surrogate`), and a KL term (`evaluate.divergence`). See README.

    torchrun train.py --baseline expectation                          # the embedded default, on a laptop
    torchrun --nproc_per_node 8 train.py --preset paper --trees out/gsm8k_trees.jsonl --baseline expectation
    python train.py --resume                                          # go on where the default run was stopped
"""
import fcntl
import json
import math
import os
import re
import signal
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from tree import (InputError, arguments, at_least, continue_jsonl, leave_on_signals, micro_batches, read_problems, read_solutions,
                  read_trees, run_command, sample_group, shuffled, stop_on_signals, tokenize, write_jsonl)

if __name__ == "__main__":
    leave_on_signals()  # torch takes seconds to import; in the loop stop_on_signals replaces it

import numpy as np
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import get_cosine_schedule_with_warmup

import advantage
import evaluate
from evaluate import gather

# ---- Knobs. Any flag overrides its preset. -------------------------------------------------------
PRESETS = {
    "arithmetic": dict(  # the embedded default
        model="data/arithmetic/student", trees="data/arithmetic/trees.jsonl", eval_data="data/arithmetic/test.jsonl",
        alpha=0.5, group_size=8, batch_size=32, temperature=1.0, max_prompt=256, max_new_tokens=96, eval_new_tokens=96,
        lora_rank=16, lora_alpha=64, lora_dropout=0.0, critic_warmup=5, lr=3e-4, steps=120, eval_every=40, save_every=20),
    "paper": dict(  # Table 3; steps: two passes over GSM8K's 7,473 training problems, four a batch
        model="Qwen/Qwen2.5-1.5B-Instruct", trees="out/gsm8k_trees.jsonl", eval_data="data/gsm8k/test.jsonl",
        alpha=0.5, group_size=8, batch_size=32, temperature=1.0, max_prompt=512, max_new_tokens=256, eval_new_tokens=512,
        lora_rank=16, lora_alpha=64, lora_dropout=0.1, critic_warmup=20, lr=3e-5, steps=3736, eval_every=500, save_every=100),
}

# what a resumed run may change without being another run
MAY_DIFFER = "out resume force skip_bad eval_data eval_limit eval_every eval_new_tokens save_every rollouts_every micro_tokens no_pack".split()


def add_flags(parser):
    """Every knob, in groups. Defaults that differ between presets are in PRESETS."""
    count, whole, share, positive, number = at_least(1), at_least(0), at_least(0, float, high=1), at_least(1e-12, float), at_least(0, float)
    add = parser.add_argument_group("model").add_argument
    add("--model", help="the student: a folder or a hub name")
    add("--adapter", help="start from this PEFT adapter instead of a fresh one")
    add("--lora_rank", type=whole, help="0 trains every weight instead of an adapter")
    add("--lora_alpha", type=positive, help="LoRA's scale is alpha / rank")
    add("--lora_dropout", type=at_least(0, float, high=0.99), help="dropout in LoRA layers, in the update alone")
    add("--trust_remote_code", action="store_true", help="run the model's own code from the hub")
    add = parser.add_argument_group("data").add_argument
    add("--trees", help="prefix trees, JSONL; traces or searches where the objective is sft")
    add("--eval_data", help="held-out problems, JSONL")
    add("--eval_limit", type=whole, default=0, help="evaluate on the first so many, 0 is all")
    add("--skip_bad", action="store_true", help="name and skip bad lines instead of stopping")
    add("--out", help="run folder; default out/PRESET-GROUP-METHOD-SEED")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--force", action="store_true", help="resume although other flags differ from the checkpoint's")
    add = parser.add_argument_group("method (Table 1)").add_argument
    add("--objective", choices=("tree_opo", "sft"), default="tree_opo", help="sft: cross entropy on the steps of traces")
    add("--group", choices=("question", "trace", "tree"), default="tree", help="how a group's prefixes are drawn")
    add("--baseline", choices=sorted(advantage.ESTIMATORS), help="how its advantages are computed; default expectation")
    add("--alpha", type=share, help="weight of V(prefix) in the advantage")
    add("--mc_rollouts", type=count, default=4, help="fresh completions a prefix for --baseline mc (App. A.9)")
    add("--ema", type=share, default=0.5, help="weight of a new reward in a prefix's history, for --baseline ema")
    add("--no_root", action="store_true", help="leave the bare question out of the prefixes")
    add("--group_size", type=count, help="samples that are compared with each other")
    add("--batch_size", type=count, help="samples a step over all ranks")
    add("--temperature", type=at_least(0.01, float), help="of the student's rollouts, and of the loss")
    add("--max_prompt", type=count, help="longer prefixes are dropped, tokens")
    add("--max_new_tokens", type=count, help="a completion that needs more has reward 0")
    add("--epochs", type=count, default=1, help="updates a batch; with more than one the probability ratio is clipped, as in PPO and GRPO")
    add("--clip", type=positive, default=0.2, help="how far the ratio may leave 1")
    add("--kl_coef", type=number, default=0.0, help="weight of KL(student || student without its adapter)")
    add = parser.add_argument_group("teacher and critic (Table 2, App. B, Sec. 3.1)").add_argument
    add("--teacher", help="a model with the student's vocabulary: a folder or a hub name")
    add("--teacher_adapter", help="a PEFT adapter on it")
    add("--distill_coef", type=number, default=0.0, help="weight of the divergence to the teacher, a mean over completion tokens")
    add("--kl", choices=("student_teacher", "teacher_student"), default="student_teacher", help="its direction: KL(first || second)")
    add("--reward", choices=("task", "teacher", "none"), default="task",
        help="task: 1 for the right answer; teacher: log p(teacher) - log p(student) of every step; none: the divergence alone")
    add("--behaviour", choices=("student", "teacher"), default="student", help="who writes the completions; the teacher's are weighted (Sec. 3.1)")
    add("--weight_clip", type=positive, default=10.0, help="largest importance weight of a teacher's completion")
    add("--critic", help="a decoder's folder or hub name; with a value head it replaces --baseline by GAE over reasoning steps")
    add("--critic_lr", type=positive, default=1e-3, help="of all its weights")
    add("--critic_warmup", type=whole, help="steps in which the critic learns and the student does not")
    add("--gamma", type=share, default=0.95, help="discount a reasoning step, of step rewards and in GAE")
    add("--gae_lambda", type=share, default=0.95, help="1 is REINFORCE with the critic as its baseline, 0 is TD(0)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=count, help="updates")
    add("--max_tokens", type=whole, default=0, help="end, and end the schedule, after so many generated tokens instead; 0: after --steps")
    add("--lr", type=positive, help="peak learning rate; cosine to 0 after 3 %% of warm-up")
    add("--seed", type=whole, default=0, help="of groups, completions and initial adapter")
    add("--micro_tokens", type=count, default=8192 if torch.cuda.is_available() else 1024,
        help="tokens a forward pass, padding included; does not change the objective (a CPU likes what fits its cache)")
    add("--no_pack", action="store_true", help="pad every sample to its own row instead of sharing prefixes")
    add("--nonfinite", choices=("skip", "abort"), default="skip", help="what to do with a step whose loss or gradient is not finite")
    add("--eval_every", type=whole, help="steps between evaluations, 0 is never, not even before and after")
    add("--eval_new_tokens", type=count, help="limit of an evaluated completion")
    add("--save_every", type=whole, help="steps between checkpoints, 0 is never, but for the last")
    add("--rollouts_every", type=whole, default=10, help="steps between samples written to rollouts.jsonl, 0 is never")


def parse_args(argv=None):
    """The knobs: a preset, and the flags that override it. Raises InputError where they make no sense together."""
    parser = arguments(__doc__.strip().split("\n\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="arithmetic", help="defaults of the flags below; paper is its Table 3")
    add_flags(parser)
    parser.set_defaults(**PRESETS[parser.parse_args(argv).preset])
    args = parser.parse_args(argv)
    rl, compared = args.objective == "tree_opo", args.reward == "task" and not args.critic  # else steps are credited, one by one
    asked = args.distill_coef or "teacher" in (args.reward, args.behaviour)  # for a teacher
    for wrong, sentence in (
            (args.batch_size % args.group_size,
             f"--batch_size {args.batch_size} is no multiple of --group_size {args.group_size}; expected whole groups."),
            (rl and compared and args.group_size == 1,
             "--group_size is 1: a sample alone is compared with nothing, its advantage always 0. Expected 2 or more."),
            (args.baseline and not compared,
             f"--baseline {args.baseline} compares task rewards in a group; --critic and --reward {args.reward} do not. Leave one out."),
            (args.critic and not (rl and args.reward != "none"),
             "--critic without rewards has nothing to predict; expected --reward task or teacher."),
            (not rl and (args.teacher or args.kl_coef or args.epochs > 1),
             "--objective sft learns traces alone; --teacher, --kl_coef and --epochs are not for it."),
            ((asked or args.teacher_adapter) and not args.teacher,
             "--distill_coef, --reward teacher, --behaviour teacher and --teacher_adapter need --teacher PATH."),
            (args.teacher and not asked,
             "--teacher is given, but nothing asks for it; expected --distill_coef, --reward teacher or --behaviour teacher."),
            (args.reward == "none" and not args.distill_coef, "--reward none leaves nothing to learn from; expected a --distill_coef above 0."),
            (args.behaviour == "teacher" and (not compared or args.epochs > 1 or args.baseline in ("ema", "mc")),
             "--behaviour teacher weighs its completions by task rewards; --critic, other --reward, --epochs, ema and mc need the student's."),
            (args.adapter and not args.lora_rank, "--adapter is trained as it is; --lora_rank 0, which trains every weight, is not for it."),
            (args.kl_coef and not args.lora_rank, "--kl_coef compares with the student without its adapter, and --lora_rank 0 leaves none.")):
        if wrong:
            raise InputError(sentence)
    args.baseline = args.baseline or "expectation"
    method = args.objective if not rl else args.baseline if compared else args.reward + "-critic" * bool(args.critic)
    args.out = args.out or f"out/{args.preset}-{args.group}-{method}-{args.seed}"
    return args


# ---- Records -------------------------------------------------------------------------------------
@dataclass
class Sample:
    """One completion, from prefix to advantage. Ids are kept as sampled and padded at the last moment."""
    group: int
    node: int
    prefix_ids: list
    completion_ids: list = None
    sampler_logps: list = None
    tree: int = 0              # its place among the trees
    seed: tuple = ()           # of its random numbers
    reward: float = 0.0
    truncated: bool = False
    value: float = 0.0
    advantage: object = 1.0    # one number, or one a token
    steps: list = None         # where the completion's reasoning steps begin, if they are credited one by one
    targets: list = None       # what the critic should have said before each


class Models(NamedTuple):
    """Who takes part. Only the student, and the critic where there is one, learn."""
    student: object
    teacher: object = None
    critic: object = None


class Scale(NamedTuple):
    """1 / (samples, completion tokens, reasoning steps) of the whole step over all ranks: micro-batches and ranks never change the objective."""
    sample: float
    token: float = 0.0
    state: float = 0.0


@dataclass
class Run:
    """Who learns, where the run stands, and which of its ranks this is."""
    models: Models
    tokenizer: object
    optimizer: object
    names: dict      # name -> weight that learns: the student's, then the critic's
    history: list    # per tree (P,): a running mean of the student's rewards at each prefix, nan where it has not been
    rank: int = 0
    world: int = 1
    step: int = 0    # steps done
    tokens: int = 0  # generated so far

    def share(self, args):
        """How much of the run is done, from 0 to 1 and, with --max_tokens, a little over."""
        return self.tokens / args.max_tokens if args.max_tokens else self.step / args.steps

    def lr_share(self, args):
        """The learning rate of the step to come, as a share of its peak: up for 3 % of the run, then down a cosine to 0."""
        schedule = get_cosine_schedule_with_warmup(self.optimizer, max(1, round(0.03 * args.steps)), args.steps + 1)
        return schedule.lr_lambdas[0](self.share(args) * args.steps + 1)  # its own count of steps would not do with --max_tokens


# ---- Roll out: groups of prefixes, completions, rewards, advantages ------------------------------
def rollout(run, trees, args):
    """This rank's groups of one step, completed, graded, and compared.

    Everything drawn derives from (seed, step, group), never from the rank or an earlier step: any number of ranks
    samples the same batch, and a resumed run replays nothing.
    Returns samples (list of Sample), one dict of figures a group, and the number of generated tokens.
    """
    groups, count, size = [], args.batch_size // args.group_size, args.group_size
    for g in range(run.rank, count, run.world):
        place, rng = int(shuffled(run.step * count + g, len(trees), args.seed)), np.random.default_rng((args.seed, run.step, g))
        nodes = sample_group(trees[place], size, args.group, rng, root=not args.no_root)
        fresh = np.repeat(np.unique(nodes), args.mc_rollouts) if args.baseline == "mc" else nodes[:0]  # App. A.9
        # the seed's last number from 1 on: numpy takes (seed, step, group, 0) for (seed, step, group), which drew the prefixes
        groups.append([Sample(g, node, trees[place].prefix_ids(node), tree=place, seed=(args.seed, run.step, g, k))
                       for k, node in enumerate([*nodes.tolist(), *fresh.tolist()], 1)])
    drawn = [s for group in groups for s in group]
    policy = run.models.teacher if args.behaviour == "teacher" else run.models.student
    completions, logps = evaluate.generate(policy, run.tokenizer, [s.prefix_ids for s in drawn], args.max_new_tokens, args.temperature,
                                           [s.seed for s in drawn], return_logps=True)
    eos = evaluate.eos_ids(policy, run.tokenizer)
    for s, ids, values in zip(drawn, completions, logps):
        s.completion_ids, s.sampler_logps, s.truncated = ids, values, ids[-1] not in eos
        s.reward = float(not s.truncated and evaluate.is_correct(evaluate.decode(run.tokenizer, ids), trees[s.tree].answer, strict=True))
    figures = [compare(group[:size], group[size:], trees[group[0].tree], run.history[group[0].tree], args) for group in groups]
    return [s for group in groups for s in group[:size]], figures, sum(map(len, completions))


def compare(members, fresh, tree, history, args):
    """Set the advantages of one group (Sec. 3.2, 3.3) and return the figures that Figure 4 plots.

    fresh     what else was drawn at its prefixes, for --baseline mc
    history   (P,) the student's mean reward at each prefix so far, nan where it has not been
    """
    nodes, rewards, info = np.array([s.node for s in members]), np.array([s.reward for s in members]), {}
    mc = np.full(len(tree.parent), np.nan)
    for node in {s.node for s in fresh}:
        mc[node] = np.mean([s.reward for s in fresh if s.node == node])
    teacher = np.array(tree.value) / np.maximum(tree.visits, 1)
    a = advantage.advantages(args.baseline, nodes, tree.parent, rewards, alpha=args.alpha, teacher=teacher, mc=mc, history=history, info=info)
    values = advantage.value("expectation", nodes, tree.parent, rewards)
    for k, sample in enumerate(members):
        sample.advantage, sample.value = float(a[k]), float(values[k])
    return advantage.figures(a, nodes, tree.parent, rewards) | dict(fallback=float(info["fallback"] != "none"))


@torch.no_grad()
def credit_steps(samples, models, tokenizer, args):
    """Credit reasoning steps instead of whole completions, rows (a) to (c) of Table 2: GAE's advantages, and targets for the critic.

    A step's reward is log p(teacher) - log p(student) of its tokens, whose expected sum is -KL(student || teacher); or the task's, at the
    last step. Without a critic V is 0 and lambda 1: then the advantage is the discounted return, and the loss is REINFORCE.
    """
    student, teacher, critic = models
    for members, rows in cut(samples, models, args):
        for s in members:
            s.steps = evaluate.step_starts(student, tokenizer, s.completion_ids)
        if critic:
            values = evaluate.step_values(critic, members, rows).cpu().split([len(s.steps) for s in members])
        if args.reward == "teacher":
            logits, target, _ = evaluate.completion_logits(teacher, members, rows, args.temperature)
            theirs = evaluate.log_probs(logits, target).cpu().split([len(s.completion_ids) for s in members])
        for k, s in enumerate(members):
            task = np.r_[np.zeros(len(s.steps) - 1), s.reward]
            rewards = np.add.reduceat(theirs[k].numpy() - s.sampler_logps, s.steps) if args.reward == "teacher" else task
            v = values[k].numpy() if critic else np.zeros(len(s.steps))
            a, s.targets = advantage.gae(rewards, v, args.gamma, args.gae_lambda if critic else 1.0)
            s.advantage = np.repeat(a, np.diff([*s.steps, len(s.completion_ids)]))


def remember(samples, history, args):
    """Move each prefix's running mean towards the rewards that the student has just earned there; for --baseline ema."""
    for s in samples if history else ():
        before = history[s.tree][s.node]
        history[s.tree][s.node] = s.reward if np.isnan(before) else before + args.ema * (s.reward - before)


def make_batch(run, data, args):
    """This rank's samples of one step, credited: (samples, figures of groups, generated tokens, Scale)."""
    if args.objective == "sft":  # solutions with advantage 1: the policy gradient is then that of cross entropy
        samples = [Sample(k, 0, *data[shuffled(run.step * args.batch_size + k, len(data), args.seed)])
                   for k in range(run.rank, args.batch_size, run.world)]
        figures, generated = [], sum(len(s.completion_ids) for s in samples)
    else:
        samples, figures, generated = rollout(run, data, args)
        if args.critic or args.reward == "teacher":
            with_less_memory(lambda: credit_steps(samples, run.models, run.tokenizer, args), samples, args, run.rank)
        elif args.reward == "none":
            for s in samples:
                s.advantage = 0.0
        if args.critic or args.reward != "task":  # what Figure 4 plots is of advantages that were not used
            figures = [{key: f[key] for key in ("reward", "dead")} for f in figures]
    counts = gather((sum(len(s.completion_ids) for s in samples), sum(len(s.steps or ()) for s in samples)))
    tokens, states = map(sum, zip(*counts))
    # policy gradient: sum over tokens, mean over samples; cross entropy: mean over tokens
    return samples, figures, generated, Scale(1 / (tokens if args.objective == "sft" else args.batch_size), 1 / tokens, 1 / max(states, 1))


# ---- Update: the loss, its gradient over micro-batches and ranks ---------------------------------
def cut(samples, models, args):
    """The samples in micro-batches of packed rows; of padded ones where one of the models takes no tree masks."""
    return micro_batches(samples, args.micro_tokens, 0 if args.no_pack else min(evaluate.row_tokens(model) for model in models if model))


def surrogate(logps, old, advantages, sample, args):
    """What to maximise, a number a token. At ratio 1 each variant has the gradient of A log pi, the policy gradient of Sec. 3.4.
    All are (n,): `old` are the log-probs under the policy that sampled, `sample` says which sample a token belongs to."""
    if args.behaviour == "teacher":  # Sec. 3.1: w = pi(c | p) / pi_T(c | p) of a whole completion. As dw = w d log pi, w is a constant here
        weight = log_weights(logps, old, sample).clamp(max=math.log(args.weight_clip)).exp()
        return weight[sample] * advantages * logps
    if args.epochs > 1:  # PPO's clipped ratio, a token at a time, as GRPO has it
        ratio = (logps - old).exp()
        return torch.minimum(ratio * advantages, ratio.clamp(1 - args.clip, 1 + args.clip) * advantages)
    return advantages * logps


def log_weights(logps, old, sample):
    """log pi(c | p) - log pi_behaviour(c | p) of every sample (N,), without gradient."""
    return torch.zeros(int(sample.max()) + 1, device=logps.device).index_add(0, sample, logps.detach() - old)


def accumulate(models, samples, scale, args, warm_up=False):
    """Add the gradient of this rank's share of the loss:

        - sum_k A_k sum_t log pi(c_kt | p_k, c_k<t) scale.sample                              (Sec. 3.4)
        + (distill_coef KL(student, teacher) + kl_coef KL(student || no adapter)) scale.token  (App. B), a mean over completion tokens
        + (V_phi(s) - target)^2 scale.state                                                   (App. B), a mean over reasoning steps

    warm_up   train the critic alone
    Returns lists of figures: a loss a micro-batch; gap |log pi(sampler) - log pi(trainer)| and kl a token; log_weight a sample; the
    members of micro-batches whose loss is not finite. Where only advantages count, a sample of advantage 0 adds nothing: no pass is spent on it.
    """
    student, teacher, critic = models
    stats = dict(loss=[], gap=[], kl=[], log_weight=[], critic_loss=[], bad=[])
    if not (args.distill_coef or args.kl_coef or critic):
        samples = [s for s in samples if np.any(s.advantage)]
    for members, rows in cut(samples, models, args):
        loss = torch.zeros((), device=student.device)
        if not warm_up:
            logits, target, sample = evaluate.completion_logits(student, members, rows, args.temperature)
            logps = evaluate.log_probs(logits, target)
            old = torch.tensor([x for s in members for x in s.sampler_logps or [0.0] * len(s.completion_ids)], device=logps.device)
            advantages = np.concatenate([np.broadcast_to(s.advantage, len(s.completion_ids)) for s in members])
            advantages = torch.tensor(advantages, dtype=torch.float32, device=logps.device)
            loss = loss - scale.sample * surrogate(logps, old, advantages, sample, args).sum()
            if args.behaviour == "teacher":
                stats["log_weight"] += log_weights(logps, old, sample).tolist()
            elif members[0].sampler_logps:
                stats["gap"] += (logps.detach() - old).abs().tolist()
            for coef, other, direction in ((args.distill_coef, teacher, args.kl), (args.kl_coef, student, "student_teacher")):
                if coef:
                    with torch.no_grad(), student.disable_adapter() if other is student else nullcontext():
                        theirs, _, _ = evaluate.completion_logits(other, members, rows, args.temperature)
                    kl = evaluate.divergence(logits, theirs, direction)
                    loss = loss + coef * scale.token * kl.sum()
                    stats["kl"] += kl.tolist()
        if critic:
            targets = torch.tensor(np.concatenate([s.targets for s in members]), dtype=torch.float32, device=student.device)
            critic_loss = scale.state * (evaluate.step_values(critic, members, rows) - targets).square().sum()
            stats["critic_loss"].append(critic_loss.item())
            loss = loss + critic_loss
        loss.backward()
        stats["loss"].append(loss.item())
        if not math.isfinite(stats["loss"][-1]):
            stats["bad"] += members
    return stats


def update(models, optimizer, samples, scale, lr_share, args, rank=0, warm_up=False):
    """`--epochs` steps of AdamW, at `lr_share` of the peak rates, on the loss of the whole batch. Returns this rank's figures of the first,
    and the gradient's norm."""
    def gradient():
        optimizer.zero_grad()
        return accumulate(models, samples, scale, args, warm_up)
    figures = []
    for _ in range(args.epochs):
        models.student.train()
        stats = with_less_memory(gradient, samples, args, rank)
        models.student.eval()
        groups = [group["params"] for group in optimizer.param_groups]
        all_reduce_gradients([p for params in groups for p in params], poison=bool(stats["bad"]))
        norms = [torch.nn.utils.clip_grad_norm_(params, 1.0).item() for params in groups]  # the student's, the critic's
        if all(map(math.isfinite, norms)):
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_share
            for p in groups[0] if warm_up else ():  # the student waits, and so do its moments
                p.grad = None
            optimizer.step()
        else:  # the same on every rank
            concerned = stats["bad"] if any(gather(bool(stats["bad"]))) else samples  # of the latter each loss is finite, some gradient not
            with open(os.path.join(args.out, f"nonfinite-{rank}.jsonl"), "a", encoding="utf-8") as out:
                out.writelines(json.dumps(vars(s), default=lambda x: x.tolist()) + "\n" for s in concerned)
            sentence = f"the loss or the gradient is not finite; the samples concerned are in {args.out}/nonfinite-RANK.jsonl."
            if args.nonfinite == "abort":
                raise InputError(f"{sentence} Expected finite numbers: lower --lr, or look at the samples. --nonfinite skip would go on.")
            print(f"rank {rank}: {sentence} This update is skipped", flush=True)
        optimizer.zero_grad()
        figures.append((stats, norms[0]))
    return figures[0]


def with_less_memory(work, samples, args, rank):
    """work(); where memory runs out, work() again with half as many tokens a forward pass. The objective does not know."""
    while True:
        try:
            return work()
        except RuntimeError as error:
            if not evaluate.out_of_memory(error) or args.micro_tokens == 1:
                raise
        args.micro_tokens = max(1, min(args.micro_tokens, sum(len(s.prefix_ids) + len(s.completion_ids) for s in samples)) // 2)
        print(f"rank {rank}: out of memory; going on with --micro_tokens {args.micro_tokens}, the same objective", flush=True)


def all_reduce_gradients(params, poison=False):
    """Sum the gradients over ranks with one flat all_reduce; a rank without work contributes zeros, one whose loss was not finite nan."""
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if poison:
        params[0].grad.fill_(math.nan)
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
    if rank == 0:
        check_folder(args)
    run, data, problems = set_up(args, rank, world, device)
    logs = open_run(args, run.step) if rank == 0 else []
    if rank == 0:
        trainable = sum(p.numel() for p in run.models.student.parameters() if p.requires_grad)
        print(f"{trainable:,} trainable of {sum(p.numel() for p in run.models.student.parameters()):,} weights on {world} x {device.type}, "
              f"{len(data)} problems, {args.group} groups -> {args.out}")
    signals, seen, begun, first = stop_on_signals(), False, time.time(), run.share(args)
    while True:
        # 2. evaluate: before, after, and now and then; no more once told to stop, which may happen in the middle of it
        stop, done = any(gather(bool(signals))), run.share(args) >= 1
        if problems and not stop and (done or run.step % args.eval_every == 0):
            score(run, problems, args)
            stop = any(gather(bool(signals)))
        if stop or done:
            break
        # 3. roll out
        clock = [time.time()]
        samples, figures, generated, scale = make_batch(run, data, args)
        clock.append(time.time())
        # 4. update; the first one must show in a completion that is drawn again
        watched = samples[0] if samples and figures and not seen and args.behaviour == "student" else None
        before = watched and draw_again(run, watched, args)
        torch.manual_seed(int(np.random.default_rng((args.seed, run.step, rank, 0, 2)).integers(2 ** 63)))  # of dropout
        warm_up, lr_share = args.critic and run.step < args.critic_warmup, run.lr_share(args)
        stats, grad_norm = update(run.models, run.optimizer, samples, scale, lr_share, args, rank, warm_up)
        if watched and 0 < grad_norm < math.inf:
            seen = True
            if before == draw_again(run, watched, args):
                print(f"step {run.step + 1} changed no log-prob of a completion drawn again: the update does not reach the sampler, "
                      f"or --lr {args.lr} is too small")
        clock.append(time.time())
        # 5. report
        parts = gather((samples, figures, generated, stats))
        row = report(run, parts, clock, args) | dict(lr=args.lr * lr_share, grad_norm=grad_norm)
        samples = sorted((s for part in parts for s in part[0]), key=lambda s: s.group)  # of all ranks
        remember(samples, run.history, args)
        run.step, run.tokens = run.step + 1, row["tokens"]
        if rank == 0:
            left = (time.time() - begun) * max(0, 1 - run.share(args)) / (run.share(args) - first)
            print(progress_line(row, run.share(args), left, args), flush=True)
            write_logs(logs, row, samples, run.tokenizer, args)
            warn(row, samples, data, run.tokenizer, args)
            # 6. save
            if run.share(args) >= 1 or args.save_every and run.step % args.save_every == 0:
                save(run, args)
    for log in logs:
        log.close()
    if rank == 0 and stop:
        save(run, args)
        print(f"stopped after step {run.step}, which is saved; the same command with --resume goes on", flush=True)
    elif rank == 0:
        finish(args, run.step, (time.time() - begun) / 60)
    if world > 1:
        dist.destroy_process_group()
    if stop:
        sys.exit(128 + (signals or [signal.SIGTERM])[0])


# ---- Set up. From here on it is housekeeping: data, models, checkpoints, logs. -------------------
def load_models(args, device):
    """(Models, the student's tokenizer). The student is what learns: an adapter on it, or with --lora_rank 0 all of its weights."""
    for other in filter(None, (args.teacher, args.critic)):
        evaluate.check_vocabulary(other, args.model, args.trust_remote_code)
    torch.manual_seed(args.seed)  # the fresh adapter's A, the critic's head
    load = partial(evaluate.load, device=device, trust_remote_code=args.trust_remote_code)
    student, tokenizer = load(args.model, args.adapter, trainable=True)
    if args.lora_rank == 0:
        student = student.float().requires_grad_(True)
    elif not args.adapter:
        student = get_peft_model(student, LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
                                                     target_modules="all-linear", task_type="CAUSAL_LM"))
    teacher = load(args.teacher, args.teacher_adapter)[0].requires_grad_(False) if args.teacher else None
    return Models(student, teacher, evaluate.load_critic(args.critic, device, args.trust_remote_code) if args.critic else None), tokenizer


def set_up(args, rank, world, device):
    """(Run, training data, held-out problems), from scratch or where the checkpoint stands. Files before models: their errors are cheap."""
    checkpoint = find_checkpoint(args) if args.resume else None
    problems = read_problems(args.eval_data, args.eval_limit, args.skip_bad) if args.eval_every else []
    data = (read_solutions if args.objective == "sft" else read_trees)(args.trees, args.skip_bad)
    models, tokenizer = load_models(args, device)
    if args.objective == "sft":
        data, history = [evaluate.encode_solution(tokenizer, *solution) for solution in data], []
    else:
        data, dropped = tokenize(data, partial(evaluate.encode, tokenizer), args.max_prompt)
        if not data:
            raise InputError(f"no prefix of {args.trees} has at most {args.max_prompt} tokens; raise --max_prompt.")
        if dropped:
            print(f"dropped {dropped} prefixes of more than {args.max_prompt} tokens; {sum(len(tree.steps) for tree in data)} are left")
        history = [np.full(len(tree.parent), np.nan) for tree in data]
    problems = problems and evaluate.fitting(models.student, tokenizer, problems, args.skip_bad)
    names = {name: p for name, p in models.student.named_parameters() if p.requires_grad}
    groups = [dict(params=list(names.values()), peak_lr=args.lr)]
    if models.critic:
        groups.append(dict(params=list(models.critic.parameters()), peak_lr=args.critic_lr))
        names |= {f"critic.{name}": p for name, p in models.critic.named_parameters()}
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95 if args.objective == "sft" else 0.999), weight_decay=0.0)
    run = Run(models, tokenizer, optimizer, names, history, rank, world)
    if checkpoint:
        restore(run, checkpoint, args)
    return run, data, problems


def score(run, problems, args):
    """Greedy completions of the held-out problems, shared among the ranks, into eval-STEP.jsonl; prints the accuracy.
    Once a step, however often the run is resumed there."""
    path = os.path.join(args.out, f"eval-{run.step}.jsonl")
    if gather(os.path.exists(path))[0]:
        return
    parts = gather(evaluate.score(run.models.student, run.tokenizer, problems[run.rank::run.world], args.eval_new_tokens))
    if run.rank == 0:
        rows = [row for part in parts for row in part]
        write_jsonl(rows, path)
        accuracy, (low, high) = evaluate.summarise(rows)["greedy"]
        print(f"step {run.step}: greedy accuracy {100 * accuracy:.1f} % on {len(rows)} held-out problems, 95 % [{100 * low:.1f}, {100 * high:.1f}]",
              flush=True)


def finish(args, step, minutes):
    """Say what came out: before against after on the same problems."""
    print(f"{step} steps done, {minutes:.1f} minutes since the start or the resume; the model is in {args.out}")
    paths = [os.path.join(args.out, f"eval-{k}.jsonl") for k in (0, step)]
    if all(map(os.path.exists, paths)):  # a resumed run may have been told to evaluate only then, or on other problems
        before, after = map(evaluate.read_scores, paths)
        if before.keys() & after.keys():
            print(f"greedy accuracy before and after: {evaluate.compare(list(before.values()), list(after.values()))}")


def draw_again(run, sample, args):
    """A completion sampled once more, alone. One that an update leaves as it was, to the last bit, comes from a sampler that has not seen it.
    (Beside others in a batch, as it was drawn first, the last bits are others anyway.)"""
    return evaluate.generate(run.models.student, run.tokenizer, [sample.prefix_ids], args.max_new_tokens, args.temperature, [sample.seed],
                             return_logps=True)


# ---- Checkpoints: one safetensors file of weights, Adam's moments and the step, written aside and renamed ----
def save(run, args):
    """Write the model (or its PEFT adapter) at the top of the run folder, and the checkpoint, keeping the previous one. The checkpoint comes
    last: a run killed in between does the step again, and writes both."""
    state = {"history": torch.from_numpy(np.concatenate([*run.history, [0.0]]))}
    for name, p in run.names.items():
        state |= {f"{key}/{name}": value for key, value in [("weight", p.detach()), *run.optimizer.state.get(p, {}).items()]}
    path, aside = (os.path.join(args.out, name) for name in ("checkpoint.safetensors", "model.tmp"))
    metadata = {"step": str(run.step), "tokens": str(run.tokens), "args": json.dumps(vars(args))}
    try:
        save_file({key: value.contiguous().cpu() for key, value in state.items()}, path + ".tmp", metadata)
        run.models.student.save_pretrained(aside)
        run.tokenizer.save_pretrained(aside)
    except (SafetensorError, OSError) as error:
        raise InputError(f"the checkpoint of step {run.step} cannot be written to {args.out}: {error}. What was saved before is intact; "
                         "make room and --resume.") from None
    for name in os.listdir(aside):
        os.replace(os.path.join(aside, name), os.path.join(args.out, name))
    os.rmdir(aside)
    if os.path.exists(path):
        os.replace(path, os.path.join(args.out, "checkpoint.previous.safetensors"))
    os.replace(path + ".tmp", path)


def find_checkpoint(args):
    """The run folder's last whole checkpoint, opened. Raises InputError where there is none, or one of other settings."""
    names = "checkpoint.safetensors", "checkpoint.previous.safetensors"  # a kill between two renames leaves the latter alone
    paths = [path for path in (os.path.join(args.out, name) for name in names) if os.path.exists(path)]
    for path in paths:
        try:
            state = safe_open(path, "pt")
            saved = json.loads(state.metadata()["args"])
            break
        except (SafetensorError, OSError, TypeError, KeyError) as error:
            print(f"{path} is torn, or no checkpoint of train.py ({error}): it is passed over", flush=True)
    else:
        raise InputError(f"no checkpoint in {args.out} can be read. Without --resume a run starts anew." if paths else
                         f"there is no checkpoint in {args.out}. Expected one that --save_every wrote; without --resume a run starts anew.")
    if path != paths[0]:  # lest the next save keeps the torn one as the previous one
        with suppress(FileNotFoundError):  # another rank has done it
            os.replace(paths[0], paths[0] + ".torn")
    differ = [f"--{key} was {saved.get(key)} and is {value}" for key, value in vars(args).items()
              if key not in MAY_DIFFER and saved.get(key) != value]
    if differ and not args.force:
        raise InputError(f"the checkpoint in {args.out} is of other settings: {', '.join(differ)}. Expected the same; --force goes on all the same.")
    return state


def restore(run, state, args):
    """Set a run to where a checkpoint stands."""
    shapes = {key[7:]: state.get_slice(key).get_shape() for key in state.keys() if key.startswith("weight/")}
    if shapes != {name: list(p.shape) for name, p in run.names.items()}:
        raise InputError(f"the checkpoint in {args.out} has other weights than this student, or this critic, trains. "
                         "Expected the same model, --lora_rank and --critic.")
    for name, p in run.names.items():
        with torch.no_grad():
            p.copy_(state.get_tensor(f"weight/{name}"))
        if f"step/{name}" in state.keys():  # else no update has been done yet
            moments = {key: state.get_tensor(f"{key}/{name}") for key in ("exp_avg", "exp_avg_sq", "step")}
            run.optimizer.state[p] = {key: value.to("cpu" if key == "step" else p.device) for key, value in moments.items()}
    kept = state.get_tensor("history").numpy()
    if len(kept) == sum(map(len, run.history)) + 1:  # else --force goes on with other trees
        run.history = np.split(kept[:-1], np.cumsum([len(h) for h in run.history])[:-1]) if run.history else []
    run.step, run.tokens = int(state.metadata()["step"]), int(state.metadata()["tokens"])


def check_folder(args):
    """InputError where the run folder cannot be made or written, or holds what is no run: that would be moved aside."""
    if os.path.lexists(args.out) and not os.path.isdir(args.out):
        raise InputError(f"--out {args.out} is no folder. Expected the name of one to make.")
    if not os.path.exists(args.out):
        os.makedirs(args.out)
        os.rmdir(args.out)  # made for good when the models are there
    elif not os.access(args.out, os.W_OK | os.X_OK):
        raise InputError(f"the folder --out {args.out} cannot be written to. Expected another.")
    elif not args.resume and os.listdir(args.out) and not os.path.exists(os.path.join(args.out, "log.jsonl")):
        raise InputError(f"the folder --out {args.out} holds something else than a run. "
                         "Expected an earlier run, which is moved aside, an empty folder, or none.")
    log = os.path.join(args.out, "log.jsonl")
    if os.path.exists(log):
        with open(log, "a", encoding="utf-8") as file:
            claim(file, args)


def claim(log, args):
    """Lock a run's log for as long as it is open. InputError where another run holds it: two in one folder would spoil each other's work."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another run is at work in {args.out}. Wait for its end, stop it, or choose another --out.") from None
    except OSError:
        pass  # a file system without locks


def open_run(args, start):
    """Make the run folder and open log.jsonl and rollouts.jsonl to append. An earlier run of the name is moved aside,
    never overwritten; a resumed one loses the lines and the evaluations of the steps that it does again."""
    if not args.resume and os.path.exists(args.out) and os.listdir(args.out):
        aside = next(f"{args.out}.{k}" for k in range(1, 10 ** 6) if not os.path.exists(f"{args.out}.{k}"))
        os.rename(args.out, aside)
        print(f"moved the earlier run of this name to {aside}")
    os.makedirs(args.out, exist_ok=True)
    for name in os.listdir(args.out):
        if (scored := re.fullmatch(r"eval-(\d+)\.jsonl", name)) and int(scored[1]) > start:
            os.remove(os.path.join(args.out, name))
    logs = [continue_jsonl(os.path.join(args.out, name), lambda row: row["step"] < start) for name in ("log.jsonl", "rollouts.jsonl")]
    claim(logs[0], args)
    return logs


# ---- What a step has to say ----------------------------------------------------------------------
def mean(values, of=np.mean):
    """Mean, or another figure, of what is a number; nan where nothing is."""
    values = [v for v in values if v is not None and v == v]
    return float(of(values)) if values else math.nan


def report(run, parts, clock, args):
    """The figures of one step over all ranks, as README defines them: one object of log.jsonl. `parts` are every rank's (samples,
    figures of groups, generated tokens, stats of the update)."""
    samples, figures = ([x for part in parts for x in part[k]] for k in (0, 1))
    generated = sum(part[2] for part in parts)
    stats = {name: [x for part in parts for x in part[3][name]] for name in parts[0][3]}
    row = dict(step=run.step, loss=sum(stats["loss"]), length=mean([len(s.completion_ids) for s in samples]), tokens=run.tokens + generated)
    if figures:
        row |= {name: mean([f.get(name) for f in figures]) for name in
                ("reward", "dead", "sat", "sat_pair", "sat_triplet", "sat_all", "dropped", "adv_var", "adv_var_scaled", "fallback")}
        row |= dict(sat_sd=mean([f.get("sat") for f in figures], np.std), truncated=mean([s.truncated for s in samples]),
                    entropy=-mean([x for s in samples for x in s.sampler_logps]), gap=mean(stats["gap"]), gap_max=mean(stats["gap"], max))
    row |= {name: of(stats[name]) for name, of in (("kl", mean), ("critic_loss", sum)) if stats[name]}
    if stats["log_weight"]:
        weights = np.exp(np.minimum(stats["log_weight"], math.log(args.weight_clip)))
        row |= dict(ess=weights.sum() ** 2 / (weights ** 2).sum() / len(weights), clipped=float(np.mean(weights >= args.weight_clip * 0.999)))
    return row | dict(tokens_per_s=generated / (clock[2] - clock[0]), seconds_rollout=clock[1] - clock[0],
                      seconds_update=clock[2] - clock[1], peak_memory_mb=evaluate.peak_memory())


def write_logs(logs, row, samples, tokenizer, args):
    """One line of log.jsonl, and every so many steps the samples to rollouts.jsonl."""
    log, rollouts = logs
    log.write(json.dumps({key: value if math.isfinite(value) else None for key, value in row.items()}) + "\n")
    if args.rollouts_every and row["step"] % args.rollouts_every == 0:
        for s in samples:
            texts = dict(prefix=tokenizer.decode(s.prefix_ids), completion=tokenizer.decode(s.completion_ids))
            figures = dict(reward=s.reward, value=s.value, advantage=float(np.mean(s.advantage)), truncated=s.truncated)
            rollouts.write(json.dumps(dict(step=row["step"], group=s.group, node=s.node, **texts, **figures), ensure_ascii=False) + "\n")


def progress_line(row, done, seconds, args):
    """One step as one line: what a person watches. `done` is the run's share, `seconds` what is left of it."""
    of = "" if args.max_tokens else f"/{args.steps}"
    formats = dict(reward=".2f", dead=".2f", entropy=".2f", truncated=".2f", gap=".2g", kl=".2g", critic_loss=".2g", ess=".2g")
    parts = [f"step {row['step'] + 1}{of} {int(100 * min(done, 1)):3d} %", f"loss {row['loss']:+.3f}"]
    parts += [f"{name} {row[name]:{form}}" for name, form in formats.items() if not math.isnan(row.get(name, math.nan))]
    parts += [f"length {row['length']:.0f}", f"grad {row['grad_norm']:.2f}", f"{row['tokens_per_s']:.0f} tok/s",
              f"ETA {int(seconds) // 60}:{int(seconds) % 60:02d}"]
    dead = row.get("dead") == 1 and not row["grad_norm"]
    return " | ".join(parts) + "  every group is dead: equal rewards, nothing to learn from" * dead


def warn(row, samples, trees, tokenizer, args):
    """Say what is probably wrong with a run: a sampler that is not the trainer, or rewards that never come."""
    if row.get("gap", 0) > 1e-2:
        print(f"sampler and trainer differ by {row['gap']:.2g} nat a token: the update is of another policy than the one that sampled. "
              "Likely causes: --lora_dropout, bf16 weights, or a model whose attention depends on how rows are batched (try --no_pack).")
    if row["step"] == 49 and "reward" in row:
        with open(os.path.join(args.out, "log.jsonl"), encoding="utf-8") as lines:
            if any(json.loads(line)["reward"] for line in lines):
                return
        print("no reward in the first 50 steps, which is nearly always the prompt or the grader. Three completions:")
        for s in samples[:3]:
            text = evaluate.decode(tokenizer, s.completion_ids)
            found, expected = json.dumps(evaluate.extract_answer(text, strict=True)), json.dumps(trees[s.tree].answer)
            print(f"  {json.dumps(text[-300:])}\n  extracted {found}, expected {expected}")


if __name__ == "__main__":
    run_command(lambda: train(parse_args()))
