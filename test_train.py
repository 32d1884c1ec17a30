"""
Tests of train.py, in its own order: knobs, rollouts and rewards, credit, the gradient, whole runs,
checkpoints, logs, several ranks.

    pytest test_train.py                    in about a minute
    TREE_OPO_SLOW=1 pytest test_train.py    and what is slow and seldom breaks
"""
import ast
import gc
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import evaluate  # before torch: it notes which torchrun has started this process
import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributions import Categorical, kl_divergence
from transformers import (AutoTokenizer, GPT2Config, GPT2LMHeadModel,
                          LlamaForTokenClassification)

import advantage
import train
from results import sweep
from test_evaluate import FAMILIES, QUESTIONS, family_folder, tiny, tiny_folder
from tree import (InputError, Tree, arguments, lock, micro_batches, read_trees, run_command,
                  write_jsonl, write_trees)

HERE = os.path.dirname(os.path.abspath(train.__file__))
WHOLE = 10 ** 6  # micro-batch budget that holds any batch here
slow = pytest.mark.skipif(os.environ.get("TREE_OPO_SLOW") != "1", reason="TREE_OPO_SLOW is not 1")
torch.set_num_threads(1)


# ---- What the tests are made of: samples and gradients -------------------------------------------
def lora(model, dropout=0.0):
    """A LoRA policy whose B is not zero, so that the adapter matters."""
    model = get_peft_model(model, LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear",
        task_type="CAUSAL_LM")).eval()
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


def random_samples(tokenizer, groups=3, size=5, seed=0):
    """Samples as train.rollout makes them, on random trees; some prefixes come twice in a group."""
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return rng.integers(4, len(tokenizer), rng.integers(low, high)).tolist()

    samples = []
    for g in range(groups):
        prefixes = [ids(3, 9)]
        for _ in range(3):
            prefixes.append(prefixes[rng.integers(len(prefixes))] + ids(1, 5))
        for _ in range(size):
            prefix = prefixes[rng.integers(4)]
            samples.append(sample_of(prefix, ids(1, 12), rng.normal(), group=g))
    return samples


def sample_of(prefix, completion, advantage=0.0, logps=None, group=0, reward=0.0):
    """A finished sample with the same advantage at all of its tokens."""
    return train.Sample(group, 0, prefix, completion, logps, reward=reward,
                        advantages=np.full(len(completion), float(advantage)))


def without_advantage(samples):
    """The samples, of which only other terms of the loss are left."""
    for sample in samples:
        sample.advantages = np.zeros(len(sample.completion_ids))
    return samples


def settings(**knobs):
    """train.py's knobs at their defaults, but for these."""
    return SimpleNamespace(**{**vars(train.parse_args([])), **knobs})


def run_of(models, tokenizer=None, **fields):
    """A run that no checkpoint belongs to."""
    fields = {"optimizer": None, "trainable": {}, "contents": {}, "micro_tokens": WHOLE, **fields}
    return train.Run(models, tokenizer, **fields)


def count_tokens(samples):
    return sum(len(s.completion_ids) for s in samples)


def flat_gradient(model):
    """The gradient of all weights that learn, zero where there is none."""
    parts = []
    for p in model.parameters():
        if p.requires_grad:
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            parts.append(grad.flatten())
    return torch.cat(parts)


def gradient(model, samples, scale, args, micro_tokens=WHOLE, teacher=None):
    """(gradient, loss, accumulate's numbers) of one accumulated gradient."""
    model.zero_grad()
    stats = train.accumulate(train.Models(model, teacher), samples, scale, args, micro_tokens)
    return flat_gradient(model), sum(stats["loss"]), stats


def close(got, expected, share=1e-4):
    """Whether two gradients agree, to a share of the largest entry, which is not zero."""
    largest = expected.abs().max()
    return largest > 1e-4 and (got - expected).abs().max() < share * largest


def completion_distribution(model, sample, temperature=1.0):
    """What a plain causal forward says before each completion token, the slow obvious way."""
    ids = torch.tensor([sample.prefix_ids + sample.completion_ids])
    logits = model(ids).logits[0, len(sample.prefix_ids) - 1:-1]
    return Categorical(logits=logits.float() / temperature)


def next_token(model, prefix):
    return Categorical(logits=model(torch.tensor([prefix])).logits[0, -1].float())


# ---- What the tests are made of: whole runs ------------------------------------------------------
@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny policy whose guesses are sometimes right, trees, and a held-out set."""
    folder = tmp_path_factory.mktemp("world")
    tiny_folder(folder / "model")
    problems = []
    trees = []
    traces = []
    for k, question in enumerate(QUESTIONS):
        problem = dict(id=f"q{k}", question=question, answer=str(k))
        steps = ["", "1 + 2 = 3", "3 * 2 = 6", "2 + 2 = 4", "The"]
        trees.append(Tree(problem, steps, [-1, 0, 1, 0, 2], [4, 2, 1, 2, 1], [2, 1, 1, 1, 1]))
        traces.append(dict(problem, steps=["1 + 2 = 3", f"The answer is {k}."], reward=1))
        problems.append(problem)
    write_trees(str(folder / "trees.jsonl"), trees)
    write_jsonl(str(folder / "traces.jsonl"), traces)
    write_jsonl(str(folder / "test.jsonl"), problems)
    train.train(train.parse_args([
        "--model", f"{folder}/model", "--objective", "sft", "--lora_rank", "0", "--lr", "1e-2",
        "--steps", "30", "--batch_size", "8", "--trees", f"{folder}/traces.jsonl",
        "--out", f"{folder}/policy", "--eval_every", "0", "--save_every", "0"]))
    return folder


@pytest.fixture(autouse=True)
def own_signals():
    """A run takes SIGTERM and SIGINT for itself; the tests want them back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def short(world, out, *flags):
    """Flags of a run of three steps of two groups, which `flags` override; POLICY is the policy."""
    flags = [
        "--model", "POLICY", "--trees", f"{world}/trees.jsonl",
        "--eval_data", f"{world}/test.jsonl",
        "--out", f"{world}/{out}", "--max_new_tokens", 12, "--group_size", 4, "--batch_size", 8,
        "--lr", 3e-3, "--steps", 3, "--save_every", 1, "--eval_every", 3, *flags]
    return [str(flag).replace("POLICY", f"{world}/policy") for flag in flags]


def here(world, out, *flags):
    """Such a run in this process."""
    train.train(train.parse_args(short(world, out, *flags)))
    return Path(world, out)


@pytest.fixture(scope="module")
def whole(world):
    """Three steps, uninterrupted."""
    return here(world, "whole")


def start(*command):
    """A process of the project's, whose output is one pipe."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=HERE, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(process, status=0):
    """What the process said. It must end with this status; None is any."""
    output, _ = process.communicate(timeout=600)
    assert status is None or process.returncode == status, output
    return output


def wait_for_step(process, step):
    """Read what a process prints up to the line of this step."""
    for line in process.stdout:
        cell = line.split(maxsplit=1)[:1]
        if cell and cell[0].isdigit() and int(cell[0]) >= step and "%" in line:
            return


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def has_learnt(folder):
    """Whether the fresh adapter has moved: its B was zero."""
    return any(value.any() for name, value in adapter(folder).items() if "lora_B" in name)


def read(path):
    """The rows of a JSONL file. NaN and Infinity are no JSON."""
    with open(path) as lines:
        return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def log(folder, evaluations=False):
    """The steps of a run's log, or its evaluations."""
    return [row for row in read(folder / "log.jsonl") if ("eval_accuracy" in row) == evaluations]


def timeless(folder):
    """The whole log without what a clock or the machine decides."""
    other = ("seconds", "tokens_per_s", "peak")
    rows = log(folder) + log(folder, evaluations=True)
    for row in rows:
        for key in [key for key in row if key.startswith(other)]:
            del row[key]
    return rows


def kept_names(folder):
    """Its files of rollouts and scores."""
    return sorted(name for name in os.listdir(folder) if name.startswith(("rollouts", "eval")))


def same_run(a, b):
    """Equal to the bit: weights, logs but for times, rollouts and scores."""
    theirs = adapter(b)
    assert all(torch.equal(value, theirs[name]) for name, value in adapter(a).items())
    assert timeless(a) == timeless(b)
    assert kept_names(a) == kept_names(b)
    for name in kept_names(a):
        assert (a / name).read_text() == (b / name).read_text(), name


class Killed(BaseException):
    """Stands for kill -9 at one exact place: nothing catches it, only what is on disk is left."""


def killed(world, out, *flags):
    """A run in this process that must be Killed; its lock goes with it."""
    ended = False
    try:
        here(world, out, *flags)
    except Killed:
        ended = True
    gc.collect()
    assert ended
    return world / out


def killed_in_step(patch, step):
    """Killed when this step, counted from 1, is to be sampled."""
    real = train.rollout

    def fatal(run, *others):
        if run.step + 1 == step:
            raise Killed
        return real(run, *others)

    patch.setattr(train, "rollout", fatal)


def solve_every_other(patch):
    """No group is dead: every other completion counts as right."""
    numbers = itertools.count()
    patch.setattr(evaluate, "is_solved", lambda text, problem: next(numbers) % 2 == 0)


def poison_first_update(patch, group):
    """The first training pass in which this group takes part comes out as nan."""
    real = evaluate.predict
    left = 1

    def predict(model, batch, temperature=1.0):
        nonlocal left
        predictions = real(model, batch, temperature)
        if left and torch.is_grad_enabled() and any(s.group == group for s in batch.samples):
            left -= 1
            predictions = predictions._replace(logits=predictions.logits * float("nan"))
        return predictions

    patch.setattr(evaluate, "predict", predict)


# ---- Knobs ---------------------------------------------------------------------------------------
REFUSED = [
    ("--batch_size 12 --group_size 8", "no multiple"),
    ("--group_size 1", "compares a sample with nothing"),
    ("--baseline grpo --critic C", "Leave one out"),
    ("--objective sft --critic C", "nothing to predict"),
    ("--objective sft --epochs 2", "sft takes no"),
    ("--objective sft --baseline grpo", "sft takes no"),
    ("--distill_coef 0.1", "need --teacher"),
    ("--reward teacher", "need --teacher"),
    ("--teacher T", "to do something"),
    ("--reward none", "nothing to learn from"),
    ("--behaviour teacher --teacher T --epochs 2", "takes no --critic"),
    ("--behaviour teacher --teacher T --baseline mc", "takes no --critic"),
    ("--adapter A --lora_rank 4", "trained as it is"),
    ("--kl_coef 0.1 --lora_rank 0", "has none"),
    ("--steps 0", "steps"),
    ("--temperature 0", "temperature"),
    ("--baseline nonsense", "nonsense"),
    ("--step 5", "--step"),  # abbreviated
    ("--mc_rollouts 2", "does nothing"),
    ("--kl teacher_student", "does nothing"),
    ("--gae_lambda=1", "does nothing"),
    ("--critic_warmup 3", "does nothing"),
    ("--no_root --group question", "does nothing"),
    ("--no_root --objective sft", "does nothing"),
    ("--group question --objective sft", "does nothing"),
    ("--temperature 0.5 --objective sft", "does nothing"),
    ("--alpha 0.1 --critic C", "does nothing"),
    ("--alpha 0.1 --baseline optimal", "--alpha does nothing"),
    ("--lora_rank 0 --lora_alpha 8", "trains all weights"),
    ("--lora_rank 0 --dtype bfloat16", "trains all weights"),
    ("--chat_template_kwargs [1]", "invalid json_object"),
]


@pytest.mark.parametrize("flags, sentence", REFUSED)
def test_flags_that_contradict_or_do_nothing_are_refused(flags, sentence):
    with pytest.raises(InputError, match=sentence):
        train.parse_args(flags.split())


@pytest.mark.parametrize("flags, folder", [
    ("", "arithmetic-tree-expectation-0"),
    ("--baseline grpo --group question --seed 3", "arithmetic-question-grpo-3"),
    ("--preset paper --critic C", "paper-tree-task-critic-0"),
    ("--objective sft --group_size 1", "arithmetic-tree-sft-0"),
    ("--objective sft --batch_size 4", "arithmetic-tree-sft-0"),
    ("--reward teacher --teacher T", "arithmetic-tree-teacher-0"),
])
def test_the_run_folder_names_the_method(flags, folder):
    assert train.parse_args(flags.split()).out == f"out/{folder}"


def test_a_run_folder_may_be_named_with_a_slash():
    """That failed after the model had been loaded."""
    assert train.parse_args(["--out", "out/run/"]).out == "out/run"


def test_what_linux_alone_has_is_imported_where_it_is_needed():
    """`import train` ended in an ImportError on Windows. Python 3.10 reads the sources, and no
    duration is taken from a clock that may be set back."""
    for path in [*Path(HERE).glob("*.py"), *Path(HERE, "data").glob("*.py")]:
        if path.name.startswith("test_"):
            continue
        source = path.read_text()
        for statement in ast.parse(source, feature_version=(3, 10)).body:
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                names = {name.name for name in statement.names}
                assert not names & {"fcntl", "resource", "ctypes"}, path
        assert "SIGALRM" not in source and "time.time(" not in source


def test_the_knobs_fit_on_two_pages(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    told = capsys.readouterr().out
    assert len(told.splitlines()) <= 150
    assert "(default: None)" not in told
    assert "(0.0005 | 3e-05)" in " ".join(told.split())  # what each preset has
    parser = arguments("")
    train.add_flags(parser)
    assert len(parser._actions) - 1 <= 50  # the first is --help


@pytest.mark.parametrize("name, preset", train.PRESETS.items())
def test_a_preset_names_only_knobs(name, preset):
    assert preset.keys() < vars(train.parse_args(["--preset", name])).keys()
    args = train.parse_args(["--preset", name, "--lr", "0.125"])
    assert args.lr == 0.125 and args.steps == preset["steps"]
    distils = ["--preset", name, "--reward", "teacher", "--teacher", "T"]  # has a rate of its own
    assert train.parse_args(distils).lr == train.DISTILL_LR
    assert train.parse_args([*distils, "--lr", "0.125"]).lr == 0.125


# ---- Roll out: prefixes, completions, rewards ----------------------------------------------------
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 5, 8, 32])
def test_ranks_share_a_batch_without_loss_or_repeat(world, count):
    shared = []
    for rank in range(world):
        part = run_of(None, rank=rank, world=world).share(list(range(count)))
        assert count // world <= len(part) <= count // world + 1
        shared += part
    assert shared == list(range(count))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("eos_is_pad", [False, True])
def test_sampler_is_trainer(temperature, eos_is_pad):
    """Log-probs of sampled ids under generate and under the training forward agree: temperature,
    the end token, masks from lengths (not from ids != pad), positions and the adapter are alike."""
    model, tokenizer = tiny()
    if eos_is_pad:
        tokenizer.pad_token = tokenizer.eos_token
    model = lora(model)
    with torch.no_grad():  # likely enough an end that some completions end and some do not
        weight = model.get_output_embeddings().weight
        weight[tokenizer.eos_token_id] += 0.5 * weight.std()
    drawn = random_samples(tokenizer, groups=6, size=6)
    completions, logps = evaluate.generate(model, tokenizer, [s.prefix_ids for s in drawn], 12,
                                           temperature, return_logps=True)
    ended = [ids[-1] == tokenizer.eos_token_id for ids in completions]
    assert any(ended) and not all(ended)
    samples = []
    for s, ids, values in zip(drawn, completions, logps):
        samples.append(sample_of(s.prefix_ids, ids, 1.0, values, group=s.group))
    for no_pack in (False, True):
        args = settings(no_pack=no_pack, temperature=temperature)
        _, _, stats = gradient(model, samples, train.Scale(1.0), args, 300)
        assert len(stats["gap"]) == count_tokens(samples)
        assert max(stats["gap"]) < 1e-4


def test_a_reward_reads_the_problems_own_fields(world, monkeypatch):
    """Whatever the file of trees says of a problem is there where its completions are judged."""
    trees = read_trees(str(world / "trees.jsonl"))
    for k, tree in enumerate(trees):
        tree.problem["worth"] = k + 0.25
    write_trees(str(world / "worth.jsonl"), trees)
    monkeypatch.setattr(train, "reward", lambda sample, text, problem: problem["worth"])
    out = here(world, "worth", "--trees", world / "worth.jsonl", "--steps", 1, "--eval_every", 0)
    rollouts = read(out / "rollouts.jsonl")
    for line in rollouts:
        [k] = [k for k, question in enumerate(QUESTIONS) if line["prefix"].startswith(question)]
        assert line["reward"] == k + 0.25
        assert (line["id"], line["answer"]) == (f"q{k}", trees[k].problem["answer"])
    assert len({line["reward"] for line in rollouts}) == 2


def short_is_better(sample, text, problem):
    return sample.solved - 0.01 * len(sample.completion_ids)


def never_positive(sample, text, problem):
    return sample.solved - 1.0


@pytest.mark.parametrize("shaped", [short_is_better, never_positive])
@pytest.mark.parametrize("baseline", ["expectation", "optimistic", "pessimistic", "qp_hard"])
def test_a_shaped_reward_leaves_the_solved_solved(world, monkeypatch, baseline, shaped):
    """Order constraints and the optimistic and pessimistic values ask who has solved the problem.
    That is known whatever a solution earns, and a group of unequal rewards is not dead."""
    flags = ["--baseline", baseline, "--steps", 1, "--eval_every", 0]
    solve_every_other(monkeypatch)
    plain = here(world, f"{baseline}-plain-{shaped.__name__}", *flags)
    solve_every_other(monkeypatch)
    monkeypatch.setattr(train, "reward", shaped)
    out = here(world, f"{baseline}-{shaped.__name__}", *flags)
    [theirs] = log(plain)
    [row] = log(out)
    assert theirs["dead"] < 1 and has_learnt(out)
    assert row["length"] == theirs["length"]  # the same completions, since no update came before
    if shaped is never_positive:
        assert row["reward"] == pytest.approx(theirs["reward"] - 1)
        assert row["dead"] == theirs["dead"]
    else:
        assert row["reward"] == pytest.approx(theirs["reward"] - 0.01 * row["length"])
        assert row["dead"] <= theirs["dead"]
    assert theirs["sat"] is not None and row["sat"] is not None


# ---- Credit of reasoning steps -------------------------------------------------------------------
@pytest.fixture
def three_steps():
    """(models with a critic, tokenizer, a sample of three steps, one of one step)."""
    model, tokenizer = tiny()
    teacher, _ = tiny(seed=5)
    torch.manual_seed(0)
    model.config.num_labels = 1
    critic = LlamaForTokenClassification(model.config).eval()
    blank = tokenizer.convert_tokens_to_ids("\n\n")
    completion = [10, 11, blank, 12, blank, 13, 14, 3]
    old_logps = np.linspace(-2, -0.5, len(completion)).tolist()
    long = sample_of([5, 6, 7], completion, logps=old_logps, reward=1.0)
    short = sample_of([5, 6, 7], [9, 3], logps=[-1.0, -1.0])
    return train.Models(model, teacher, critic), tokenizer, long, short


@torch.no_grad()
def values_before(critic, sample, starts):
    """The critic's values from plain forward passes, one for each state."""
    values = []
    for start in starts:
        state = sample.prefix_ids + sample.completion_ids[:start]
        values.append(critic(torch.tensor([state])).logits[0, -1, 0].item())
    return values


@torch.no_grad()
def gains_of(teacher, sample):
    """log p(teacher) - log p(sampler) of each completion token."""
    theirs = completion_distribution(teacher, sample).log_prob(torch.tensor(sample.completion_ids))
    return theirs.numpy() - sample.sampler_logps


@pytest.mark.parametrize("reward", ["task", "teacher"])
def test_steps_are_credited_by_gae_and_the_critic_is_asked_before_each(three_steps, reward,
                                                                       monkeypatch):
    """Against GAE written out by hand, at discount 0.9 and lambda 0.8."""
    monkeypatch.setattr(train, "GAMMA", 0.9)
    models, tokenizer, long, short = three_steps
    args = settings(reward=reward, critic="yes", gae_lambda=0.8)
    train.credit_steps([long, short], run_of(models, tokenizer), args, WHOLE)
    assert long.steps == [0, 3, 5]
    assert short.steps == [0]
    v = values_before(models.critic, long, long.steps)
    r = [0, 0, 1]
    if reward == "teacher":
        gains = gains_of(models.teacher, long)
        r = [gains[:3].sum(), gains[3:5].sum(), gains[5:].sum()]
    delta = [r[0] + 0.9 * v[1] - v[0], r[1] + 0.9 * v[2] - v[1], r[2] - v[2]]
    last = delta[2]
    middle = delta[1] + 0.72 * last
    first = delta[0] + 0.72 * middle
    expected = [first] * 3 + [middle] * 2 + [last] * 3
    assert long.advantages == pytest.approx(expected, abs=1e-4)
    assert long.targets == pytest.approx(np.add([first, middle, last], v), abs=1e-4)


def test_the_critic_learns_its_targets_and_in_warm_up_the_student_waits(three_steps):
    models, tokenizer, long, short = three_steps
    args = settings(critic="yes")
    train.credit_steps([long, short], run_of(models, tokenizer), args, WHOLE)
    errors = []
    for s in (long, short):
        errors += list(s.targets - values_before(models.critic, s, s.steps))
    scale = train.Scale(0.5, 1 / 10, 1 / 4)
    stats = train.accumulate(models, [long, short], scale, args, WHOLE, warm_up=True)
    assert sum(stats["critic_loss"]) == pytest.approx(np.square(errors).sum() / 4, rel=1e-4)
    assert stats["critic_loss"] == stats["loss"]
    assert stats["gap"] == []
    assert models.critic.score.weight.grad.abs().max() > 0
    assert not flat_gradient(models.student).any()
    train.accumulate(models, [long, short], scale, args, WHOLE)
    assert flat_gradient(models.student).any()


def test_without_a_critic_a_steps_credit_is_its_discounted_return(three_steps):
    """Whatever --gae_lambda says: there are no values that it could mix in."""
    models, tokenizer, long, _ = three_steps
    args = settings(reward="teacher", gae_lambda=0.1)
    train.credit_steps([long], run_of(models._replace(critic=None), tokenizer), args, WHOLE)
    gains = gains_of(models.teacher, long)
    last = gains[5:].sum()
    middle = gains[3:5].sum() + train.GAMMA * last
    first = gains[:3].sum() + train.GAMMA * middle
    expected = [first] * 3 + [middle] * 2 + [last] * 3
    assert long.advantages == pytest.approx(expected, abs=1e-4)


def test_reinforce_with_the_teachers_reward_descends_the_reverse_kl():
    """Row (a) of Table 2 by enumeration: over all completions of one token, E[A grad log pi] with
    A = log p(teacher) - log p(student) is minus the gradient of KL(student || teacher)."""
    model, tokenizer = tiny()
    teacher, _ = tiny(seed=5)
    prefix = [5, 6, 7]
    args = settings(reward="teacher")
    p = next_token(model, prefix)
    q = next_token(teacher, prefix)
    model.zero_grad()
    kl_divergence(p, q).backward()
    expected = flat_gradient(model)
    samples = []
    for token, logp in enumerate(p.logits.tolist()):
        samples.append(sample_of(prefix, [token], logps=[logp]))
    train.credit_steps(samples, run_of(train.Models(model, teacher), tokenizer), args, WHOLE)
    for s in samples:
        token = s.completion_ids[0]
        assert s.advantages == pytest.approx([(q.logits - p.logits)[token].item()], abs=1e-4)
        s.advantages = s.advantages * p.probs[token].item()
    got, _, _ = gradient(model, samples, train.Scale(1.0), args)
    assert close(got, expected)


# ---- Update: the policy gradient -----------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gradient_is_the_same_however_the_batch_is_cut(family):
    """Padded or packed, in one pass or one sample at a time. Guards against a denominator taken per
    micro-batch, masks that leak, positions that count padding, and duplicates that are merged."""
    model, tokenizer = tiny(family)
    model = lora(model.double())
    samples = random_samples(tokenizer)
    model.zero_grad()
    reference = 0.0
    for s in samples:
        logps = completion_distribution(model, s, 0.7).log_prob(torch.tensor(s.completion_ids))
        loss = -s.advantages[0] * logps.sum() / len(samples)
        loss.backward()
        reference += loss.item()
    expected = flat_gradient(model)
    assert expected.abs().max() > 1e-3
    scale = train.Scale(1 / len(samples))
    for no_pack in (False, True):
        args = settings(temperature=0.7, no_pack=no_pack)
        for micro_tokens in (1, 20, 50, 120, WHOLE):
            got, loss, _ = gradient(model, samples, scale, args, micro_tokens)
            assert abs(loss - reference) < 1e-5
            assert (got - expected).abs().max() < 1e-5, (no_pack, micro_tokens)


def test_every_token_has_its_own_advantage():
    """Advantages meet the tokens they were computed for, however samples were packed."""
    model, tokenizer = tiny()
    samples = random_samples(tokenizer)
    rng = np.random.default_rng(3)
    total = 0.0
    for s in samples:
        s.advantages = rng.normal(size=len(s.completion_ids))
        logps = completion_distribution(model, s).log_prob(torch.tensor(s.completion_ids))
        total = total - (torch.tensor(s.advantages) * logps).sum()
    model.zero_grad()
    total.backward()
    expected = flat_gradient(model)
    for micro_tokens in (60, WHOLE):
        got, loss, _ = gradient(model, samples, train.Scale(1.0), settings(), micro_tokens)
        assert close(got, expected)
        assert loss == pytest.approx(total.item(), rel=1e-4, abs=1e-3)


def test_a_micro_batch_keeps_its_budget_and_packing_saves_tokens():
    _, tokenizer = tiny()
    samples = random_samples(tokenizer, groups=4, size=8)
    tokens = {}
    for row_tokens in (0, 60, WHOLE):
        for budget in (40, 100, 400, WHOLE):
            seen = []
            tokens[row_tokens] = 0
            for batch in micro_batches(samples, budget, row_tokens):
                seen += batch.samples
                lengths = [len(row.ids) for row in batch.rows]
                tokens[row_tokens] += sum(lengths)
                assert len(lengths) * max(lengths) <= budget or len(batch.samples) == 1
                for row in batch.rows:
                    assert len(row.ids) <= row_tokens or len(row.paths) == 1
            assert sorted(map(id, seen)) == sorted(map(id, samples))
    assert tokens[WHOLE] < tokens[0]


def test_samples_without_advantage_cost_no_pass():
    """A dead group has advantage zero everywhere; its gradient is nothing, whatever it costs."""
    model, tokenizer = tiny()
    samples = without_advantage(random_samples(tokenizer))
    model.forward = None  # any pass would raise
    _, loss, stats = gradient(model, samples, train.Scale(1.0), settings(), 99)
    assert loss == 0
    assert not any(stats.values())


def test_policy_gradient_of_a_two_token_world_is_exact():
    """One completion token, two prefixes: the update averaged over all outcomes, each with its
    probability and its advantage r - alpha V, is the exact gradient of the expected reward,
    whatever V is (Lemma 3.1)."""
    model, _ = tiny()
    model = model.double()
    prefixes = [[5, 6], [5, 6, 7]]
    rewarded = [8, 9]  # the token that earns 1 after each prefix
    probs = [torch.softmax(model(torch.tensor([p])).logits[0, -1], -1) for p in prefixes]
    model.zero_grad()
    ((probs[0][8] + probs[1][9]) / 2).backward()
    exact = flat_gradient(model)
    for baseline in ([0.0, 0.0], [0.9, -0.4]):
        samples = []
        for g in (0, 1):
            for token, prob in enumerate(probs[g].tolist()):
                a = float(token == rewarded[g]) - baseline[g]
                samples.append(sample_of(prefixes[g], [token], a * prob, group=g))
        got, _, _ = gradient(model, samples, train.Scale(1 / 2), settings())
        assert (-got - exact).abs().max() < 1e-6 < exact.abs().max() / 100  # logits are float32


def test_weighted_completions_of_the_teacher_give_the_students_gradient(monkeypatch):
    """Sec. 3.1 by enumeration: E under the teacher of w A grad log pi is E under the student of
    A grad log pi, where no weight is so large that it is clipped."""
    monkeypatch.setattr(train, "MAX_WEIGHT", 1e9)
    model, _ = tiny()
    teacher, _ = tiny(seed=5)
    prefix = [5, 6, 7]
    values = np.random.default_rng(0).normal(size=model.config.vocab_size)

    def mean_gradient(behaviour, args):
        samples = []
        for token, value in enumerate(values):
            a = value * behaviour.probs[token].item()
            samples.append(sample_of(prefix, [token], a, [behaviour.logits[token].item()]))
        return gradient(model, samples, train.Scale(1.0), args)[0]

    expected = mean_gradient(next_token(model, prefix), settings())
    got = mean_gradient(next_token(teacher, prefix), settings(behaviour="teacher"))
    assert close(got, expected)


def test_a_weight_is_of_the_whole_completion_clipped_and_differentiated_once():
    logps = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    old_logps = torch.tensor([-2.0, -2.0, -9.0])
    sample = torch.tensor([0, 0, 1])
    gain = train.surrogate(logps, old_logps, torch.ones(3), sample, settings(behaviour="teacher"))
    gain.sum().backward()
    assert logps.grad.tolist() == pytest.approx([np.e, np.e, train.MAX_WEIGHT], rel=1e-5)


def test_every_completion_of_the_teacher_counts_in_the_log():
    """The effective sample size was that of the samples with an advantage: .46 where it is .375."""
    model, tokenizer = tiny()
    teacher, _ = tiny(seed=5)
    samples = without_advantage(random_samples(tokenizer))
    for sample in samples:
        sample.sampler_logps = [-1.0] * len(sample.completion_ids)
    _, _, stats = gradient(model, samples, train.Scale(1.0), settings(behaviour="teacher"))
    assert len(stats["log_weight"]) == len(samples)


def test_clipped_epochs_start_from_the_plain_gradient():
    """At ratio 1 PPO's surrogate has the policy gradient. Outside the clip it has none where going
    on would help, and all where it would harm."""
    logps = torch.log(torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5])).requires_grad_()
    advantages = torch.tensor([3.0, 1.0, -1.0, 1.0, -1.0])
    sample = torch.zeros(5, dtype=torch.long)
    gain = train.surrogate(logps, torch.zeros(5), advantages, sample, settings(epochs=2))
    gain.sum().backward()
    assert logps.grad.tolist() == pytest.approx([3.0, 0.0, -1.5, 0.5, 0.0])


def test_dropout_acts_in_lora_alone():
    """GPT-2 has dropout of its own, which would make the base another policy than the sampler."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4,
                                      resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)).eval()
    _, tokenizer = tiny()
    samples = random_samples(tokenizer, groups=1)
    for s in samples:
        s.completion_ids = [token % 50 for token in s.completion_ids]
        s.prefix_ids = [token % 50 for token in s.prefix_ids]

    def losses(dropout):
        """(loss inside an update, loss of the policy that sampled)."""
        model = lora(base, dropout)
        _, plain, _ = gradient(model, samples, train.Scale(1 / len(samples)), settings())
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW([dict(params=weights, peak_lr=1e-3)])
        run = run_of(train.Models(model), tokenizer, optimizer=optimizer)
        args = settings(batch_size=len(samples))
        stats, _ = train.update(run, samples, args)
        assert not any(module.training for module in model.modules())  # switched off again
        model.unload()
        return sum(stats["loss"]), plain

    inside, outside = losses(0.0)
    assert inside == pytest.approx(outside, rel=1e-5)
    inside, outside = losses(0.5)
    assert abs(inside - outside) > 1e-3 * abs(outside)


# ---- Update: KL terms ----------------------------------------------------------------------------
def test_the_divergence_is_torchs_and_its_names_say_its_direction():
    """App. B prints KL(teacher || student) and calls it reverse. A padded vocabulary is cut."""
    torch.manual_seed(0)
    student = torch.randn(6, 9)
    teacher = torch.randn(6, 12)
    p = Categorical(logits=student)
    q = Categorical(logits=teacher[:, :9])
    reverse = evaluate.divergence(student, teacher, "student_teacher")
    forward = evaluate.divergence(student, teacher, "teacher_student")
    assert torch.allclose(reverse, kl_divergence(p, q), atol=1e-6)
    assert torch.allclose(forward, kl_divergence(q, p), atol=1e-6)


@pytest.mark.parametrize("kl", ["student_teacher", "teacher_student"])
def test_distillation_is_the_mean_kl_over_completion_tokens(kl):
    """However the batch is cut: the gradient of the token mean of torch's own KL."""
    model, tokenizer = tiny()
    teacher, _ = tiny(seed=5)
    teacher.requires_grad_(False)
    samples = without_advantage(random_samples(tokenizer))
    tokens = count_tokens(samples)
    total = 0.0
    for s in samples:
        p = completion_distribution(model, s, 0.7)
        q = completion_distribution(teacher, s, 0.7)
        if kl == "teacher_student":
            p, q = q, p
        between = kl_divergence(p, q)
        total = total + 0.3 * between.sum() / tokens
    model.zero_grad()
    total.backward()
    expected = flat_gradient(model)
    scale = train.Scale(1.0, token=1 / tokens)
    for no_pack, micro_tokens in ((True, WHOLE), (False, 60), (False, WHOLE)):
        args = settings(distill_coef=0.3, kl=kl, temperature=0.7, no_pack=no_pack)
        got, loss, stats = gradient(model, samples, scale, args, micro_tokens, teacher)
        assert loss == pytest.approx(total.item(), rel=1e-4)
        assert len(stats["kl"]) == tokens
        assert close(got, expected)


def test_kl_to_the_adapter_free_policy_has_the_gradient_of_that_kl():
    """Not k3 used as a loss, whose gradient is that of the other direction."""
    model, tokenizer = tiny()
    model = lora(model)
    samples = without_advantage(random_samples(tokenizer, groups=1))
    tokens = count_tokens(samples)
    total = 0.0
    for s in samples:
        with torch.no_grad(), model.disable_adapter():
            q = completion_distribution(model, s)
        total = total + 0.5 * kl_divergence(completion_distribution(model, s), q).sum() / tokens
    model.zero_grad()
    total.backward()
    expected = flat_gradient(model)
    scale = train.Scale(1.0, token=1 / tokens)
    got, _, _ = gradient(model, samples, scale, settings(kl_coef=0.5))
    assert close(got, expected)


# ---- Update: what goes wrong ---------------------------------------------------------------------
@pytest.mark.parametrize("flags", ["", "--critic POLICY --critic_warmup 0", "--epochs 2"])
def test_an_update_that_is_not_finite_is_skipped(world, monkeypatch, capsys, flags):
    """One nan in Adam's moments is nan in every weight for ever."""
    out = f"poisoned{len(flags)}"
    poison_first_update(monkeypatch, 1)
    here(world, out, *flags.split(), "--eval_every", 0, "--micro_tokens", 1)
    first, *others = log(world / out)
    assert first["skipped"] == 1 and first["loss"] is None and first["grad_norm"] is None
    assert "not finite" in capsys.readouterr().out
    assert all(row["skipped"] == 0 and np.isfinite(row["loss"]) for row in others)
    assert all(value.isfinite().all() for value in adapter(world / out).values())
    assert has_learnt(world / out)


def test_out_of_memory_halves_the_passes(world, monkeypatch, capsys):
    """Of the critic's pass before the update, and of the update itself."""
    real = evaluate.step_values
    sizes = []

    def small(critic, batch):
        sizes.append(len(batch.samples))
        if len(sizes) in (1, 4):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(critic, batch)

    monkeypatch.setattr(evaluate, "step_values", small)
    here(world, "narrow", "--critic", "POLICY", "--eval_every", 0, "--steps", 1,
         "--micro_tokens", 100_000)
    assert "out of memory; going on with 50000" in capsys.readouterr().out


def test_the_student_and_its_moments_wait_for_the_critic(world, monkeypatch):
    """Steps with zero gradients would age Adam's moments: the first real update would be halved.
    The critic passes over the first batch twice, and has no warm-up in any later step."""
    real = train.update
    waited = []

    def spy(run, samples, args):
        lora_B = [p for name, p in run.trainable.items() if "lora_B" in name]
        waited.append(not any(p.any() for p in lora_B))
        return real(run, samples, args)

    monkeypatch.setattr(train, "update", spy)
    out = here(world, "waits", "--critic", "POLICY", "--critic_warmup", 2, "--steps", 2,
               "--eval_every", 0)
    assert waited == [True, False]
    with safe_open(out / "checkpoint" / "checkpoint.safetensors", "pt") as state:
        for name in state.keys():
            if name.startswith("step/"):
                expected = 4 if name.startswith("step/critic.") else 2
                assert state.get_tensor(name) == expected


def test_a_critic_that_has_diverged_is_refused_in_its_warm_up(monkeypatch):
    """Before the student has learnt anything that could be lost."""
    monkeypatch.setattr(train, "optimiser_step", lambda *_, **__: ([], math.inf, False))
    with pytest.raises(InputError, match="critic's gradient is not finite"):
        train.warm_up_critic(None, [], settings(critic_warmup=1))


# ---- The loop ------------------------------------------------------------------------------------
def test_a_run_leaves_its_logs_scores_and_model(world, whole):
    """Steps count from 1; the scores before and after stand in the log and in eval-STEP.jsonl."""
    assert [row["step"] for row in log(whole)] == [1, 2, 3]
    assert [row["step"] for row in log(whole, evaluations=True)] == [0, 3]
    for row in log(whole):
        assert row["skipped"] == 0
        assert {"loss", "reward", "dead", "gap", "grad_norm", "tokens", "lr"} <= row.keys()
        assert row["gap"] < 1e-4  # the sampler is the trainer
    assert any(row["dead"] < 1 for row in log(whole)) and has_learnt(whole)
    for row in log(whole, evaluations=True):
        scores = evaluate.read_scores(whole / f"eval-{row['step']}.jsonl")
        assert [score["id"] for score in scores] == [f"q{k}" for k in range(len(QUESTIONS))]
        assert row["eval_accuracy"] == np.mean([score["correct"][0] for score in scores])
        assert row["eval_low"] <= row["eval_accuracy"] <= row["eval_high"]
    rollouts = read(whole / "rollouts.jsonl")
    assert [line["step"] for line in rollouts] == [1] * 8
    assert log(whole)[0]["reward"] == np.mean([line["reward"] for line in rollouts])
    for line in rollouts:
        assert line["prefix"].startswith(tuple(QUESTIONS))
        assert line["depth"] == line["prefix"].count("\n\n") - 1  # the first closes the question
    for depth in {line["depth"] for line in rollouts}:
        solved = [line["solved"] for line in rollouts if line["depth"] == depth]
        assert log(whole)[0][f"solved_at_{depth}"] == np.mean(solved)
    assert os.listdir(whole / "checkpoint") == ["checkpoint.safetensors"]
    assert not [name for name in os.listdir(whole) if "tmp" in name]


def test_the_run_folder_is_an_adapter(world, whole):
    """evaluate.load and peft alone read the same model from it."""
    ours, _ = evaluate.load(f"{world}/policy", str(whole))
    plain, _ = evaluate.load(f"{world}/policy")
    theirs = PeftModel.from_pretrained(plain, str(whole))
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_the_log_of_the_teachers_completions_has_no_entropy(world):
    """It was the teacher's; and the value in rollouts.jsonl was not the one that was subtracted."""
    out = here(world, "offpolicy", "--behaviour", "teacher", "--teacher", "POLICY", "--steps", 1,
               "--eval_every", 0)
    [row] = log(out)
    assert "entropy" not in row and {"ess", "clipped"} <= row.keys()
    assert all("value" not in line for line in read(out / "rollouts.jsonl"))


def test_a_runs_update_has_no_dropout_of_the_base(world, tmp_path, monkeypatch):
    """A fresh adapter is wrapped in training mode, and with it GPT-2's own dropout went on: the
    update was of another policy than the one that had sampled, by 0.07 nat a token."""
    solve_every_other(monkeypatch)
    family_folder(tmp_path / "model", "gpt2", **FAMILIES["gpt2"], resid_pdrop=0.5)
    out = here(world, "dropout", "--model", tmp_path / "model", "--eval_every", 0)
    assert all(row["gap"] < 1e-4 for row in log(out))


@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe"])
def test_other_families_are_trained(world, tmp_path, family):
    """Eager attention, and a mixture of experts on a CPU: sampler and trainer agree, LoRA moves."""
    family_folder(tmp_path / "model", family, **FAMILIES[family])
    out = here(world, f"family-{family}", "--model", tmp_path / "model", "--steps", 1,
               "--distill_coef", 1, "--teacher", "POLICY", "--eval_every", 0)
    assert log(out)[0]["gap_max"] < 1e-4 and has_learnt(out)


def test_weights_that_are_all_trained_are_not_rounded_first(world, monkeypatch):
    """Where bf16 is fast they were loaded in it, and then trained in float32."""
    args = train.parse_args(["--lora_rank", "0", "--model", f"{world}/policy"])
    monkeypatch.setattr(evaluate, "choose_dtype", lambda *_: torch.bfloat16)
    models, _, _ = train.load_models(args, torch.device("cpu"))
    expected, _ = evaluate.load(f"{world}/policy", dtype="float32")
    for weight, other in zip(models.student.parameters(), expected.parameters()):
        assert torch.equal(weight, other) and weight.requires_grad


class Clock:
    """Goes on by a second each time it is asked."""
    def __init__(self):
        self.now = 0

    def monotonic(self):
        self.now += 1
        return self.now


def test_what_is_evaluated_and_how_long_it_will_take(world, monkeypatch, capsys):
    """People trained on trees of their own and were scored on the embedded pens, unsaid. The time
    left counted the evaluation before the first step."""
    clock = Clock()
    score = evaluate.score

    def slow_score(*args, **how):
        clock.now += 1000
        return score(*args, **how)

    monkeypatch.setattr(evaluate, "score", slow_score)
    monkeypatch.setattr(train, "time", clock)
    data = str(world / "test.jsonl")
    monkeypatch.setitem(train.PRESETS["arithmetic"], "eval_data", data)
    here(world, "watched", "--steps", 2, "--eval_every", 2)
    said = capsys.readouterr().out
    assert f"evaluated on {data}\nnote: the trees are others than the preset's" in said
    [first] = [line for line in said.splitlines() if line.split()[:2] == ["1", "50%"]]
    assert first.split()[-1].startswith("0:")  # not the 1,000 seconds of the evaluation


def test_a_run_is_drawn_into_its_own_folder(world, whole, monkeypatch):
    """Also where it learns from solutions, which earn no reward. No committed picture changes."""
    pytest.importorskip("matplotlib")
    from results import plot
    pictures = {path: path.read_bytes() for path in Path(HERE, "results").glob("*.png")}
    for folders in ([world / "policy"], [whole, world / "policy"]):
        monkeypatch.setattr(sys, "argv", ["plot.py", "run", *map(str, folders)])
        plot.main()
        assert (folders[0] / "run.png").read_bytes().startswith(b"\x89PNG")
        (folders[0] / "run.png").unlink()
    assert pictures == {path: path.read_bytes() for path in Path(HERE, "results").glob("*.png")}


METHODS = {name: f"--baseline {name}" for name in advantage.ESTIMATORS} | sweep.ROWS
METHODS |= {"task_critic": f"--critic {sweep.STUDENT}", "sft": "--objective sft"}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_command(world, whole, monkeypatch, name):
    """One step: the adapter moves, and the method's own figures are in the log."""
    solve_every_other(monkeypatch)
    flags = METHODS[name].replace(sweep.STUDENT, "POLICY")
    flags = flags.replace(sweep.TEACHER, "POLICY" if "adapter" in flags else "POLICY/../model")
    flags = flags.replace("{out}/{set}-teacher", str(whole)).split()
    if name == "sft":
        flags += ["--trees", world / "traces.jsonl"]
    flags += ["--steps", 1, "--eval_every", 0]
    if "--critic" in flags:
        flags += ["--critic_warmup", 0]
    args = train.parse_args(short(world, f"method-{name}", *flags))
    out = here(world, f"method-{name}", *flags)
    [row] = log(out)
    assert has_learnt(out) and not log(out, evaluations=True)
    rollouts = read(out / "rollouts.jsonl")
    assert len(rollouts) == 8  # those that `mc` draws in addition are not learnt from
    if name != "sft":
        assert row["reward"] == np.mean([line["reward"] for line in rollouts])
    compares = args.objective == "tree_opo" and args.reward == "task" and not args.critic
    assert ("kl" in row) == bool(args.distill_coef)
    assert ("kl_base" in row) == bool(args.kl_coef)
    assert ("critic_loss" in row) == bool(args.critic)
    assert ("ess" in row) == (name == "off_policy")
    assert ("sat" in row) == compares
    if args.baseline == "mc" and compares:
        assert row["tokens"] > 8 * row["length"]


@slow
@pytest.mark.parametrize("row", sweep.ROWS)
def test_every_row_of_the_tables_runs_on_the_embedded_default(tmp_path, monkeypatch, row):
    monkeypatch.chdir(HERE)
    flags = sweep.ROWS[row].replace(" --teacher_adapter {out}/{set}-teacher", "")
    train.train(train.parse_args([
        "--eval_every", "0", "--steps", "2", "--out", f"{tmp_path}/run", *flags.split()]))
    assert has_learnt(tmp_path / "run")


def test_max_tokens_ends_a_run(world):
    out = here(world, "tokens", "--max_tokens", 150, "--steps", 100, "--eval_every", 0)
    tokens = [row["tokens"] for row in log(out)]
    assert tokens[-1] >= 150 and all(count < 150 for count in tokens[:-1])


@pytest.mark.parametrize("place, step", [("score", 0), ("rollout", 1)])
def test_told_to_stop_it_saves(world, whole, monkeypatch, capfd, place, step):
    """SIGTERM in the first evaluation, or in the first step, which is finished. It says so."""
    owner = dict(score=evaluate, rollout=train)[place]
    real = getattr(owner, place)

    def told(*args, **how):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **how)

    status = None
    with monkeypatch.context() as patch:
        patch.setattr(owner, place, told)
        try:
            here(world, f"told_{place}", "--save_every", 0)
        except SystemExit as end:
            status = end.code
    gc.collect()
    assert status == 143
    said = capfd.readouterr()
    assert f"stopped after step {step}, which is saved" in said.out
    assert said.err.count("told to stop") == 1
    here(world, f"told_{place}", "--save_every", 0, "--resume")
    same_run(whole, world / f"told_{place}")


# ---- Set up: folders and mistakes ----------------------------------------------------------------
def test_a_folder_that_is_not_empty_is_refused(world, whole):
    """Nothing is ever overwritten; an empty folder is as good as none."""
    before = {name: (whole / name).read_bytes() for name in os.listdir(whole) if "." in name}
    with pytest.raises(InputError, match="is not empty.*--resume"):
        here(world, "whole")
    assert before == {name: (whole / name).read_bytes() for name in before}
    (world / "empty").mkdir()
    (world / "empty/scores.jsonl.lock").touch()  # evaluate.py was given an adapter too early
    here(world, "empty", "--steps", 1, "--eval_every", 0)


def test_resuming_on_other_trees_is_refused(world):
    """The same name may be another file."""
    trees = world / "changing.jsonl"
    trees.write_text((world / "trees.jsonl").read_text())
    flags = ["--trees", trees, "--steps", 1, "--eval_every", 0]
    here(world, "changed", *flags)
    trees.write_text(trees.read_text().replace("2 + 2 = 4", "2 + 3 = 5"))
    with pytest.raises(InputError, match="the trees are not those"):
        here(world, "changed", *flags, "--resume")


def test_resuming_with_moved_files(world):
    """A run that was copied to another machine went on under the same paths alone."""
    flags = ["--steps", 1, "--eval_every", 0]
    first = here(world, "adapter_a", *flags)
    second = here(world, "adapter_b", *flags, "--seed", 1)
    out = here(world, "moved", *flags, "--adapter", first)
    shutil.copytree(first, world / "adapter_c")
    shutil.copy(world / "trees.jsonl", world / "moved.jsonl")
    here(world, "moved", *flags, "--adapter", world / "adapter_c", "--trees", world / "moved.jsonl",
         "--resume")
    assert [row["step"] for row in log(out)] == [1]
    for other in (["--adapter", second], []):
        with pytest.raises(InputError, match="the weights are not those"):
            here(world, "moved", *flags, *other, "--resume")
        gc.collect()


def test_resuming_with_other_held_out_problems_is_refused(world):
    """The run went to its end, and failed to compare the two accuracies. Without evaluation the
    file does not matter."""
    data = world / "held_out.jsonl"
    data.write_text((world / "test.jsonl").read_text())
    flags = ["--eval_data", data, "--steps", 1]
    here(world, "held_out", *flags, "--eval_every", 1)
    data.write_text(data.read_text().replace("Ben", "Ann"))
    with pytest.raises(InputError, match="the held-out problems are not those"):
        here(world, "held_out", *flags, "--eval_every", 1, "--resume")
    gc.collect()
    here(world, "held_out", *flags, "--eval_every", 0, "--resume")
    rows = map(json.loads, (world / "held_out/log.jsonl").read_text().splitlines())
    evaluated = [row["step"] for row in rows if "eval_accuracy" in row]
    assert evaluated == [0, 1]  # what is not measured again is not lost


def test_a_folder_of_something_else_is_left_alone(world):
    """`--out .` with --resume replaced the README.md there, and a model's tokenizer."""
    folder = world / "mine"
    folder.mkdir()
    (folder / "README.md").write_text("dear")
    with pytest.raises(InputError, match="is not empty"):
        here(world, "mine", "--resume")
    assert (folder / "README.md").read_text() == "dear"


MISTAKES = [
    ("--trees nowhere.jsonl", "nowhere.jsonl"), ("--batch_size 9", "--batch_size"),
    ("--no_such_flag", "unrecognized"), ("--baseline magic", "invalid choice"),
    ("--trees torn.jsonl", "torn.jsonl, line 6"), ("--trees test.jsonl", "test.jsonl, line 1"),
    ("--eval_every 1 --eval_data nowhere.jsonl", "nowhere.jsonl"),
    ("--out test.jsonl", "is no folder"), ("--out /dev/null", "is no folder"),
    ("--out test.jsonl/below", "test.jsonl"), ("--teacher ./nowhere --distill_coef 1", "nowhere"),
    ("--teacher stranger --distill_coef 1", "another vocabulary"),
    ("--objective sft --trees trees.jsonl", "trees.jsonl")]


LATE_MISTAKES = [  # which only the model can tell
    ("--model ./nothing", "no folder"), ("--max_prompt 1", "--max_prompt"),
    ("--adapter policy", "the adapter policy"), ("--critic ./nowhere", "nowhere"),
    ("--eval_every 1 --eval_data long.jsonl", "1001 tokens"),
    ("--objective sft --trees traces.jsonl --max_prompt 1", "--max_prompt"),
    ("--objective sft --trees long_traces.jsonl", "256 positions")]


@pytest.mark.parametrize("flags, says", MISTAKES + LATE_MISTAKES)
def test_a_mistake_is_one_sentence_and_status_2(world, tmp_path, monkeypatch, capsys, flags, says):
    """Without a traceback, and where files are enough to tell, before a model is loaded."""
    monkeypatch.chdir(world)
    torn = (world / "trees.jsonl").read_text() + '{"id": "q9", "ques'
    (world / "torn.jsonl").write_text(torn)
    write_jsonl("long.jsonl", [dict(id="long", question="Ben " * 1000, answer="1")])
    write_jsonl("long_traces.jsonl", [dict(id="long", question="Ben has 5 pens .", answer="1",
                                           steps=["1 + 2 = 3"] * 99, reward=1)])
    (world / "stranger").mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (world / "model" / name).read_text()
        (world / "stranger" / name).write_text(text.replace('"Ann"', '"Zoe"'))
    if (flags, says) in MISTAKES:
        monkeypatch.setattr(evaluate, "load", lambda *a, **how: pytest.fail("a model was loaded"))
    base = ["--model", "policy", "--trees", "trees.jsonl", "--eval_every", "0", "--steps", "1",
            "--out", f"{tmp_path}/run"]
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: train.train(train.parse_args(base + flags.split())))
    said = capsys.readouterr().err.splitlines()  # transformers shows its loading bar before
    assert stop.value.code == 2 and says in said[-1] and "Traceback" not in str(said)


def test_two_scorings_do_not_write_one_file(world, monkeypatch):
    monkeypatch.setattr(sys, "argv", [
        "evaluate.py", "--data", f"{world}/test.jsonl", "--out", f"{world}/scores.jsonl"])
    held = lock(f"{world}/scores.jsonl")
    with pytest.raises(InputError, match="another process writes .*scores.jsonl"):
        evaluate.main()
    held.close()


def test_a_rank_whose_torchrun_was_killed_while_it_imported_torch_ends(monkeypatch):
    """Importing takes seconds. A rank whose torchrun died meanwhile asked in vain to be told of
    that death, and trained on beside the next run."""
    asked = []
    system = SimpleNamespace(prctl=lambda *wish: asked.append(wish))
    monkeypatch.setattr("ctypes.CDLL", lambda name: system)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(evaluate, "PARENT", os.getppid())
    evaluate.distributed()
    assert asked == [(1, signal.SIGKILL)]
    monkeypatch.setattr(evaluate, "PARENT", -1)  # whose child is this process no more
    with pytest.raises(SystemExit, match="torchrun has ended"):
        evaluate.distributed()


def test_completions_beyond_learned_positions_are_refused(world, tmp_path):
    """GPT-2: the prompts fit its positions, and they with their completions did not: an IndexError
    after the model had begun."""
    tokenizer = AutoTokenizer.from_pretrained(f"{world}/policy")
    for positions, says in ((40, None), (28, "completions up to 12; expected them to fit the 28")):
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2,
                            n_positions=positions, bos_token_id=3, eos_token_id=3)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
        tokenizer.save_pretrained(tmp_path / "gpt2")
        flags = ["--model", tmp_path / "gpt2", "--steps", 1, "--eval_every", 0]
        if says:
            with pytest.raises(InputError, match=says):
                here(world, f"positions-{positions}", *flags)
        else:
            here(world, f"positions-{positions}", *flags)


# ---- Checkpoints ---------------------------------------------------------------------------------
def test_resume_without_a_checkpoint_starts_anew(world, whole, capsys):
    here(world, "anew", "--resume")
    assert "starts anew" in capsys.readouterr().out
    same_run(whole, world / "anew")


def test_a_finished_run_is_resumed_without_work(world, whole, monkeypatch, capsys):
    monkeypatch.setattr(train, "rollout", lambda *args: pytest.fail("a step too many"))
    names = ("log.jsonl", "rollouts.jsonl", "eval-3.jsonl", "adapter_model.safetensors")
    before = [(whole / name).read_bytes() for name in names]
    here(world, "whole", "--resume")
    assert before == [(whole / name).read_bytes() for name in names]
    assert "3 steps done" in capsys.readouterr().out


def test_a_log_that_cannot_be_read_does_not_stop_a_run(world, whole, capsys):
    """A power cut left NUL bytes at the ends of the logs: the checkpoint was whole, and every
    --resume a traceback."""
    out = world / "power_cut"
    shutil.copytree(whole, out)
    for name, damaged in (("log.jsonl", "\n\0\0\0\n[1, 2]\n"), ("rollouts.jsonl", "{}\0")):
        with open(out / name, "a") as file:
            file.write(damaged)
    here(world, "power_cut", "--resume")
    assert capsys.readouterr().out.count("cannot be read and is dropped") == 4
    same_run(whole, out)


def test_resuming_with_other_settings_names_them(world, whole):
    """Only how it is watched and cut may differ."""
    for flags, says in ((["--lr", 0.5], "--lr 0.003, not 0.5"),
                        (["--steps", 4], "--steps 3, not 4"),
                        (["--baseline", "flat"], "--baseline expectation")):
        with pytest.raises(InputError, match=says):
            here(world, "whole", "--resume", *flags)
        gc.collect()
    here(world, "whole", "--resume", "--save_every", 2, "--micro_tokens", 100, "--no_pack")


def test_resuming_with_the_new_flag_of_a_fork(world, whole, monkeypatch):
    """A run of before the flag existed goes on with its default, and with nothing else."""
    add_flags = train.add_flags

    def more_flags(parser):
        add_flags(parser)
        parser.add_argument("--flavour", default="plain", help="of a fork")
        parser.add_argument("--spice", type=int, default=train.argparse.SUPPRESS, help="likewise")
    monkeypatch.setattr(train, "add_flags", more_flags)
    for preset in train.PRESETS.values():
        monkeypatch.setitem(preset, "spice", 3)
    here(world, "whole", "--resume")
    with pytest.raises(InputError, match="--spice 3, not 4"):
        here(world, "whole", "--resume", "--spice", 4)
    with pytest.raises(InputError, match="--flavour plain, not other"):
        here(world, "whole", "--resume", "--flavour", "other")


def test_killed_between_any_two_renames(world, whole, monkeypatch):
    """Between the adapter and its checkpoint, too: the same files as uninterrupted."""
    replace = os.replace
    count = 0

    def counted(*paths):
        nonlocal count
        count += 1
        if count == fatal:
            raise Killed
        replace(*paths)

    monkeypatch.setattr(os, "replace", counted)
    fatal = 0
    here(world, "counted")
    total = count
    for fatal in (total // 2, total - 1):
        count = 0
        out = killed(world, f"rename{fatal}")
        count = -total * 2
        here(world, f"rename{fatal}", "--resume")
        same_run(whole, out)


@pytest.mark.parametrize("place", ["save_file", "save_pretrained", "score", "log"])
def test_killed_inside_what_is_slow(world, whole, monkeypatch, place):
    """In the midst of a file of weights, of a scoring, of a line of the log."""
    owner, name = dict(save_file=(train, "save_file"), score=(evaluate, "score"),
                       save_pretrained=(PeftModel, "save_pretrained"),
                       log=(train.Log, "step"))[place]
    real = getattr(owner, name)
    count = 0

    def torn(*args, **how):
        nonlocal count
        count += 1
        if count < 2:
            return real(*args, **how)
        if place == "save_file":
            with open(args[1], "wb") as file:
                file.write(b"torn")
        if place == "log":
            args[0].log.write('{"step": 2, "to')
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, torn)
        out = killed(world, f"in_{place}")
    here(world, f"in_{place}", "--resume")
    same_run(whole, out)
    assert os.listdir(out / "checkpoint") == ["checkpoint.safetensors"]


STATES = {
    "critic": "--critic POLICY --critic_warmup 1 --reward teacher --teacher POLICY/../model",
    "tokens": "--max_tokens 250 --lora_dropout 0.3",
    "epochs": "--epochs 2 --kl_coef 0.1 --baseline mc --mc_rollouts 2",
    "every_weight": "--lora_rank 0"}


@pytest.mark.parametrize("state", STATES)
def test_what_a_run_carries_from_step_to_step_is_in_its_checkpoint(world, monkeypatch, state):
    """The critic with its Adam, the schedule of --max_tokens, dropout's random numbers."""
    flags = [*STATES[state].split(), "--eval_every", 0, "--save_every", 2, "--steps", 4]
    a = here(world, f"{state}_whole", *flags)
    with monkeypatch.context() as patch:
        killed_in_step(patch, 4)
        b = killed(world, f"{state}_cut", *flags)
    here(world, f"{state}_cut", *flags, "--resume")
    if state == "every_weight":
        assert timeless(a) == timeless(b)
        assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    else:
        same_run(a, b)


def test_kill_minus_9_frees_the_folder_and_loses_nothing(world):
    """The same command in two terminals: the second is refused. Killed at a random moment, the run
    is resumed, and comes to the same to the bit."""
    flags = ["--steps", 12, "--eval_every", 6, "--save_every", 3]
    process = start("train.py", *short(world, "shared", *flags))
    try:
        wait_for_step(process, 1)
        for more in ([], ["--resume"]):
            with pytest.raises(InputError, match="another process writes .*shared/log.jsonl"):
                here(world, "shared", *flags, *more)
        time.sleep(np.random.default_rng().uniform(0, 1))
    finally:
        process.kill()
        process.communicate()
    with pytest.raises(InputError, match="is not empty"):
        here(world, "shared", *flags)
    gc.collect()
    here(world, "shared", *flags, "--resume")
    same_run(here(world, "alone", *flags), world / "shared")
    assert [row["step"] for row in log(world / "shared")] == list(range(1, 13))


@pytest.mark.parametrize("kept", [0, 100, 10_000])
def test_a_damaged_checkpoint_is_one_sentence(world, whole, kept):
    """Of which only the first bytes are there."""
    path = world / f"damaged {kept}" / "checkpoint" / "checkpoint.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes((whole / "checkpoint" / "checkpoint.safetensors").read_bytes()[:kept])
    with pytest.raises(InputError, match="is damaged"):
        here(world, f"damaged {kept}", "--resume")


@pytest.mark.parametrize("room", [100_000, 10_000])
def test_a_full_disk_is_one_sentence(world, whole, monkeypatch, room):
    """And the checkpoint before is as it was, whether the adapter fits or not."""
    out = world / f"full{room}"
    path = out / "checkpoint" / "checkpoint.safetensors"
    save = train.save

    def save_once(run, args):
        if run.step == 2:
            raise Killed
        save(run, args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "save", save_once)
        killed(world, out.name)
    before = path.read_bytes()

    def save_in_little_room(run, args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, -1))
        save(run, args)

    said = ""
    with monkeypatch.context() as patch:
        patch.setattr(train, "save", save_in_little_room)
        try:
            here(world, out.name, "--resume")
        except InputError as error:
            said = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    gc.collect()
    assert "step 2 cannot be saved" in said and path.read_bytes() == before
    here(world, out.name, "--resume")
    same_run(whole, out)


@pytest.mark.parametrize("flags", ["--critic POLICY", "--reward teacher --teacher POLICY"])
def test_a_critic_or_teacher_that_diverges_stops_the_run(world, monkeypatch, flags):
    """It ended in a traceback, or trained on without learning."""
    nan = torch.tensor(float("nan"))
    step_values = evaluate.step_values
    monkeypatch.setattr(evaluate, "step_values", lambda *args: step_values(*args) * nan)
    token_logps = train.token_logps
    monkeypatch.setattr(train, "token_logps", lambda *args: [
        values * nan.numpy() for values in token_logps(*args)])
    with pytest.raises(InputError, match="not finite numbers"):
        here(world, f"sick{len(flags)}", *flags.split(), "--eval_every", 0)


def test_diverged_weights_are_never_saved(world, monkeypatch):
    out = world / "diverged"
    here_once = train.update

    def diverging(run, *others):
        result = here_once(run, *others)
        if run.step == 1:
            next(iter(run.trainable.values())).data[0] = float("nan")
        return result

    monkeypatch.setattr(train, "update", diverging)
    with pytest.raises(InputError, match="diverged at step 2"):
        here(world, "diverged", "--eval_every", 0)
    with safe_open(out / "checkpoint" / "checkpoint.safetensors", "pt") as checkpoint:
        assert checkpoint.metadata()["step"] == "1"
    assert all(value.isfinite().all() for value in adapter(out).values())


def test_a_tokenizer_of_several_chat_templates_is_saved_again(world, tmp_path):
    """They are a folder beside the tokenizer's files: the second save failed, and every resume."""
    shutil.copytree(world / "policy", tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    tokenizer.chat_template = dict.fromkeys(["default", "tools"], "{{ messages[0]['content'] }}")
    tokenizer.save_pretrained(tmp_path / "policy")
    flags = ["--model", tmp_path / "policy", "--eval_every", 0, "--instruction", ""]
    out = here(world, "templates", *flags)
    here(world, "templates", *flags, "--resume")  # which saves again
    saved = AutoTokenizer.from_pretrained(out)
    assert saved.chat_template == tokenizer.chat_template


# ---- Logs ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [
    "", "--critic POLICY --teacher POLICY/../model --distill_coef 0.1",
    "--behaviour teacher --teacher POLICY/../model"])
def test_a_progress_line_is_whole_in_120_columns(world, monkeypatch, capsys, flags):
    """From the step to the time left, also where the terminal is wider; a narrow one cuts it."""
    for columns in (200, 50):
        monkeypatch.setenv("COLUMNS", str(columns))
        here(world, f"progress{len(flags)}-{columns}", *flags.split(), "--steps", 1,
             "--eval_every", 0)
        lines = capsys.readouterr().out.splitlines()
        [header] = [line for line in lines if line.split()[:2] == ["step", "done"]]
        [figures] = [line for line in lines if line.split()[:2] == ["1", "100%"]]
        assert len(header) == len(figures) <= min(columns, 120)
        if columns == 200:
            assert header.split()[-1] == "ETA" and ":" in figures.split()[-1]
            assert len(header.split()) == len(figures.split())


def test_warnings_of_a_sick_run(world, monkeypatch, capsys):
    """A sampler that is another policy than the trainer, and fifty steps without a reward."""
    here(world, "healthy", "--eval_every", 0)
    said = capsys.readouterr().out
    assert "differ by" not in said and "nothing solved" not in said
    with monkeypatch.context() as patch:
        real = evaluate.log_probs
        patch.setattr(evaluate, "log_probs", lambda predictions: 1.1 * real(predictions))
        here(world, "gap", "--eval_every", 0, "--steps", 2)
    assert capsys.readouterr().out.count("sampler and trainer differ by") == 1
    monkeypatch.setattr(evaluate, "is_solved", lambda text, problem: False)
    out = here(world, "unrewarded", "--eval_every", 0, "--steps", 51, "--batch_size", 4,
               "--save_every", 0, "--max_new_tokens", 4)
    said = capsys.readouterr().out
    assert said.count("nothing solved in 50 steps") == 1 and "every group is dead" in said
    assert not has_learnt(out)


# ---- Several ranks -------------------------------------------------------------------------------
BRIEF = "--steps 2 --eval_every 0"
LONG = "--steps 4 --eval_every 2 --save_every 2"
UNEVEN = {  # runs of which each rank has another share
    "three": "--batch_size 12 --steps 2 --eval_every 2",
    "dead": BRIEF,
    "spoilt": BRIEF,
    "critic": f"--batch_size 4 --critic POLICY --critic_warmup 1 {BRIEF}",
    "distilled": f"--batch_size 4 --teacher POLICY/../model --distill_coef 0.1 {BRIEF}"}
if os.environ.get("TREE_OPO_SLOW") == "1":
    UNEVEN |= {
        "one": "--batch_size 4",
        "epochs": "--batch_size 4 --epochs 2",
        "mc": "--batch_size 4 --baseline mc --mc_rollouts 2",
        "teacher": "--batch_size 4 --reward teacher --teacher POLICY/../model",
        "off_policy": "--batch_size 4 --behaviour teacher --teacher POLICY/../model"}


def several(world, *runs):
    """Runs in one process, since processes are slow to start. runs: OUT and FLAGS in turn. The
    first word of OUT says what befalls the run, unless it is resumed."""
    destroy = dist.destroy_process_group
    for out, flags in zip(runs[::2], runs[1::2]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "destroy_process_group", lambda: None)
            if "--resume" not in flags:
                befall(patch, out.rstrip("12"))
            try:
                here(world, out, *flags.split())
            except (Killed, SystemExit) as end:
                print(f"{out} has ended: {end!r}")
        gc.collect()  # a run that was killed holds its lock no more
    if dist.is_initialized():
        destroy()


def befall(patch, fate):
    """What happens to a run of this name."""
    if fate == "dead":
        leave_a_rank_without_work(patch)
    elif fate == "spoilt":
        poison_first_update(patch, 1)
    elif fate == "cut":
        killed_in_step(patch, 4)
    elif fate in ("told", "raising"):
        end_a_rank(patch, fate)


def leave_a_rank_without_work(patch):
    """Group 1, which is all that the second of two ranks has, is dead."""
    real = train.compare_groups

    def half_dead(samples, *others):
        for s in samples:
            if s.group == 1:
                s.solved = False
                s.reward = 0.0
        return real(samples, *others)

    patch.setattr(train, "compare_groups", half_dead)


def end_a_rank(patch, how):
    """In the second step the second rank is told to stop, or raises."""
    real = train.rollout

    def ending(run, *others):
        if run.step == 1 and run.rank == 1:
            if how == "raising":
                raise ValueError("a sudden end")
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run, *others)

    patch.setattr(train, "rollout", ending)


def start_ranks(world, ranks, *runs):
    """`several` runs under torchrun."""
    return start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks, __file__,
                 world, *runs)


@pytest.fixture(scope="module")
def pairs(world):
    """The uneven runs on one rank, NAME1, and on two, NAME2. On two ranks also a run that is whole,
    one that is cut and resumed, one that is told to stop, and at last one that raises. Returns what
    the two ranks said."""
    one = []
    two = []
    for name, flags in UNEVEN.items():
        one += [f"{name}1", flags]
        two += [f"{name}2", flags]
    endless = "--steps 99 --save_every 0 --eval_every 0"
    process = start_ranks(world, 2, *two, "long2", LONG, "cut2", LONG, "cut2", f"{LONG} --resume",
                          "told2", endless, "raising2", endless)
    several(world, *one)  # meanwhile
    said = finish(process, status=None)
    assert process.returncode == 1, said
    return said


@pytest.mark.parametrize("name", UNEVEN)
def test_two_ranks_do_what_one_does(world, pairs, name):
    """The batch, its rewards, the loss and the gradient, also where a rank has nothing to do."""
    one = world / f"{name}1"
    two = world / f"{name}2"
    for a, b in zip(timeless(one), timeless(two), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - ({"gap", "gap_max"} if name == "spoilt" else set()):
            same = a[key] == b[key]  # null is no number
            assert same or a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), key
    theirs = adapter(two)
    for key, value in adapter(one).items():
        assert torch.allclose(value, theirs[key], atol=1e-4), key
    for path in sorted(one.glob("eval-*.jsonl")):
        scores = [evaluate.read_scores(path), evaluate.read_scores(two / path.name)]
        assert [row["id"] for row in scores[0]] == [row["id"] for row in scores[1]]
    if name == "spoilt":
        assert log(two)[0]["skipped"] == 1
    if name == "dead":
        assert log(two)[0]["dead"] >= 0.5


def test_two_ranks_are_resumed_to_the_bit(world, pairs):
    assert "cut2 has ended: Killed()" in pairs
    same_run(world / "long2", world / "cut2")
    assert [row["step"] for row in log(world / "cut2")] == [1, 2, 3, 4]


def test_when_one_rank_is_told_to_stop_all_finish_the_step(world, pairs):
    assert "stopped after step 2, which is saved" in pairs
    assert pairs.count("told2 has ended: SystemExit(143)") == 2
    assert len(log(world / "told2")) == 2


def test_a_rank_that_raises_takes_the_others_along(world, pairs):
    """Its own error is shown, and nobody waits for it for ever."""
    assert "ValueError: a sudden end" in pairs
    assert len(log(world / "raising2")) == 1


@slow
@pytest.mark.parametrize("trial", range(3))
def test_two_ranks_survive_kill_minus_9(world, pairs, trial):
    """At a random moment, of a rank or of torchrun; then --resume: the same to the bit."""
    random = np.random.default_rng()
    out = f"shot{trial}"
    process = start_ranks(world, 2, out, LONG)
    wait_for_step(process, random.integers(1, 4))
    time.sleep(random.uniform(0, 0.1))
    ours = [process.pid]
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        ours += map(int, file.read().split())
    try:
        os.kill(ours[random.integers(len(ours))], signal.SIGKILL)
    except ProcessLookupError:
        pass  # it had already ended
    finish(process, status=None)
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in ours[1:]):  # no rank trains on
        assert time.monotonic() < deadline
        time.sleep(0.01)
    finish(start_ranks(world, 2, out, f"{LONG} --resume"))
    same_run(world / "long2", world / out)


if __name__ == "__main__":
    run_command(lambda: several(*sys.argv[1:]))
