"""Tests of train.py: the sampler is the trainer, batches are cut in any way, runs are killed and resumed."""
import json
import os
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model

import evaluate
import train
from test_evaluate import QUESTIONS, tiny, tiny_folder
from tree import InputError, Tree, micro_batches, parse_traces, run_command, write_trees

torch.set_num_threads(1)
HERE = os.path.dirname(os.path.abspath(train.__file__))


def lora(model):
    """A LoRA policy whose B is not zero, so that the adapter matters."""
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


def random_samples(tokenizer, groups=3, size=5, seed=0):
    """Samples as train.rollout makes them, on random prefix trees, some prefixes twice in a group."""
    rng = np.random.default_rng(seed)
    ids = lambda low, high: rng.integers(4, len(tokenizer), rng.integers(low, high)).tolist()
    samples = []
    for g in range(groups):
        prefixes = [ids(3, 9)]
        for _ in range(3):
            prefixes.append(prefixes[rng.integers(len(prefixes))] + ids(1, 5))
        for _ in range(size):
            samples.append(train.Sample(g, 0, prefixes[rng.integers(4)], ids(1, 12), advantage=float(rng.normal())))
    return samples


def settings(**knobs):
    """train.py's knobs at their defaults, but for these."""
    return SimpleNamespace(**{**vars(train.parse_args([])), "micro_tokens": 10 ** 6, **knobs})


def accumulate(model, samples, scale, args, **others):
    """(loss, gaps) of one accumulated gradient."""
    stats = train.accumulate(train.Models(model, **others), samples, train.Scale(scale), args)
    return sum(stats["loss"]), stats["gap"]


def gradient(model, samples, **knobs):
    model.zero_grad()
    loss, _ = accumulate(model, samples, 1 / len(samples), settings(temperature=0.7, **knobs))
    return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gradient_is_the_same_however_the_batch_is_cut(family):
    """Padded or packed, in one pass or one sample at a time: the objective does not know. Guards against a denominator
    taken per micro-batch, masks that leak, position ids that count padding, and duplicates that are merged."""
    model, tokenizer = tiny(family)
    model = lora(model.double())
    samples = random_samples(tokenizer)
    # the slow obvious version: each sample alone, its log-probs read off a plain causal forward
    model.zero_grad()
    reference = 0.0
    for s in samples:
        ids = torch.tensor([s.prefix_ids + s.completion_ids])
        logps = torch.log_softmax(model(ids).logits[0] / 0.7, -1)[len(s.prefix_ids) - 1:-1]
        loss = -s.advantage * logps.gather(1, torch.tensor(s.completion_ids)[:, None]).sum() / len(samples)
        loss.backward()
        reference += loss.item()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert expected.abs().max() > 1e-3
    for no_pack in (False, True):
        for micro_tokens in (1, 20, 50, 120, 10 ** 6):
            loss, got = gradient(model, samples, no_pack=no_pack, micro_tokens=micro_tokens)
            assert abs(loss - reference) < 1e-5
            assert (got - expected).abs().max() < 1e-5, (no_pack, micro_tokens)


def test_a_micro_batch_keeps_its_budget_and_packing_saves_tokens():
    _, tokenizer = tiny()
    samples = random_samples(tokenizer, groups=4, size=8)
    for row_tokens in (0, 60, 10 ** 6):
        for budget in (40, 100, 400):
            batches = list(micro_batches(samples, budget, row_tokens))
            assert sorted(id(s) for members, _ in batches for s in members) == sorted(map(id, samples))
            for members, rows in batches:
                area = len(rows) * max(len(row[0]) for row in rows)
                assert area <= budget or len(members) == 1
                assert len(members) == len(rows) or all(len(row[0]) <= row_tokens or len(row[3]) == 1 for row in rows)
    tokens = [sum(len(row[0]) for _, rows in micro_batches(samples, 10 ** 6, packed) for row in rows) for packed in (10 ** 6, 0)]
    assert tokens[0] < tokens[1]


def test_samples_without_advantage_cost_no_pass():
    """A dead group has advantage zero everywhere; a forward over it would be work for a gradient of nothing."""
    model, tokenizer = tiny()
    samples = random_samples(tokenizer)
    for s in samples:
        s.advantage = 0.0
    model.forward = None  # any pass would raise
    assert accumulate(model, samples, 1.0, settings(micro_tokens=99)) == (0.0, [])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("eos_is_pad", [False, True])
def test_sampler_is_trainer(temperature, eos_is_pad):
    """Log-probs of sampled ids under generate and under the training forward agree: temperature, EOS in the loss, masks from
    lengths (not from ids != pad), positions, and the adapter are the same on both sides."""
    model, tokenizer = tiny()
    if eos_is_pad:
        tokenizer.pad_token = tokenizer.eos_token
    model = lora(model)
    with torch.no_grad():  # EOS likely enough that some completions end and some do not
        model.get_output_embeddings().weight[tokenizer.eos_token_id] += 0.5 * model.get_output_embeddings().weight.std()
    prefixes = [s.prefix_ids for s in random_samples(tokenizer, groups=6, size=6)]
    completions, logps = evaluate.generate(model, tokenizer, prefixes, 12, temperature, return_logps=True)
    ended = [ids[-1] == tokenizer.eos_token_id for ids in completions]
    assert any(ended) and not all(ended)
    samples = [train.Sample(k // 6, 0, prefix, ids, values, advantage=1.0) for k, (prefix, ids, values) in enumerate(zip(prefixes, completions, logps))]
    for no_pack in (False, True):
        _, gaps = accumulate(model, samples, 1.0, settings(micro_tokens=300, no_pack=no_pack, temperature=temperature))
        assert len(gaps) == sum(map(len, completions)) and max(gaps) < 1e-4


def test_policy_gradient_of_a_two_token_world_is_exact():
    """One completion token, two prefixes: averaging the update over all outcomes, each with its probability and its
    advantage r - alpha V, gives the exact gradient of the expected reward, whatever V is (Lemma 3.1)."""
    model, tokenizer = tiny()
    model = model.double()
    prefixes, rewarded = [[5, 6], [5, 6, 7]], [8, 9]  # the token that earns 1 after each prefix
    args = settings()
    probs = [torch.softmax(model(torch.tensor([p])).logits[0, -1], -1) for p in prefixes]
    model.zero_grad()
    (sum(p[r] for p, r in zip(probs, rewarded)) / 2).backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters()])
    for baseline in ([0.0, 0.0], [0.9, -0.4]):
        model.zero_grad()
        samples = [train.Sample(g, 0, prefixes[g], [token], advantage=(float(token == rewarded[g]) - baseline[g]) * probs[g][token].item())
                   for g in (0, 1) for token in range(len(probs[g]))]
        accumulate(model, samples, 1 / 2, args)
        estimate = -torch.cat([p.grad.flatten() for p in model.parameters()])
        assert (estimate - exact).abs().max() < 1e-6 < exact.abs().max() / 100  # log-softmax is float32


# ---------------------------------------------------------------------------------------------------
# The other rows of the paper's tables

def flat_gradient(model):
    return torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in model.parameters()])


def next_logits(model, prefix):
    return model(torch.tensor([prefix])).logits[0, -1].float()


def test_the_divergence_is_torchs_and_its_names_say_its_direction():
    """App. B prints KL(teacher || student) and calls it reverse. The arguments are named; a padded vocabulary is cut to the common part."""
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 9), torch.randn(6, 12)
    p, q = (torch.distributions.Categorical(logits=x[:, :9]) for x in (student, teacher))
    assert torch.allclose(evaluate.divergence(student, teacher, "student_teacher"), torch.distributions.kl_divergence(p, q), atol=1e-6)
    assert torch.allclose(evaluate.divergence(student, teacher, "teacher_student"), torch.distributions.kl_divergence(q, p), atol=1e-6)


@pytest.mark.parametrize("kl", ["student_teacher", "teacher_student"])
def test_distillation_is_the_mean_kl_over_completion_tokens(kl):
    """However the batch is cut: the gradient of the token mean of torch's own KL, each sample alone. The teacher gets no gradient."""
    (model, tokenizer), (teacher, _) = tiny(), tiny(seed=5)
    samples = random_samples(tokenizer)
    tokens = sum(len(s.completion_ids) for s in samples)
    total = 0.0
    for s in samples:
        s.advantage = 0.0
        ids = torch.tensor([s.prefix_ids + s.completion_ids])
        p, q = (torch.distributions.Categorical(logits=m(ids).logits[0, len(s.prefix_ids) - 1:-1] / 0.7) for m in (model, teacher))
        total = total + torch.distributions.kl_divergence(*((p, q) if kl == "student_teacher" else (q, p))).sum() / tokens
    model.zero_grad()
    (0.3 * total).backward()
    expected = flat_gradient(model)
    teacher.requires_grad_(False)
    for knobs in (dict(no_pack=True), dict(micro_tokens=60), dict()):
        model.zero_grad()
        args = settings(distill_coef=0.3, kl=kl, temperature=0.7, **knobs)
        stats = train.accumulate(train.Models(model, teacher), samples, train.Scale(1.0, token=1 / tokens), args)
        assert sum(stats["loss"]) == pytest.approx(0.3 * total.item(), rel=1e-4) and len(stats["kl"]) == tokens
        assert (flat_gradient(model) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_kl_to_the_adapter_free_policy_has_the_gradient_of_that_kl():
    """Not k3 used as a loss, whose gradient is that of the other direction. Without the adapter there is nothing to differ from."""
    model, tokenizer = tiny()
    model = lora(model)
    samples = random_samples(tokenizer, groups=1)
    tokens, args = sum(len(s.completion_ids) for s in samples), settings(kl_coef=0.5)
    total = 0.0
    for s in samples:
        s.advantage = 0.0
        ids, first = torch.tensor([s.prefix_ids + s.completion_ids]), len(s.prefix_ids) - 1
        with torch.no_grad(), model.disable_adapter():
            q = torch.distributions.Categorical(logits=model(ids).logits[0, first:-1])
        p = torch.distributions.Categorical(logits=model(ids).logits[0, first:-1])
        total = total + 0.5 * torch.distributions.kl_divergence(p, q).sum() / tokens
    model.zero_grad()
    total.backward()
    expected = flat_gradient(model)
    model.zero_grad()
    train.accumulate(train.Models(model), samples, train.Scale(1.0, token=1 / tokens), args)
    assert expected.abs().max() > 1e-4 and (flat_gradient(model) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_reinforce_with_the_teachers_reward_descends_the_reverse_kl():
    """Row (a) of Table 2 by enumeration: over all completions of one token, E[A grad log pi] with A = log p(teacher) - log p(student) is
    minus the gradient of KL(student || teacher)."""
    (model, tokenizer), (teacher, _) = tiny(), tiny(seed=5)
    prefix, args = [5, 6, 7], settings(reward="teacher", critic=None)
    p, q = (torch.distributions.Categorical(logits=next_logits(m, prefix)) for m in (model, teacher))
    model.zero_grad()
    torch.distributions.kl_divergence(p, q).backward()
    expected = flat_gradient(model)
    samples = [train.Sample(0, 0, prefix, [token], [p.logits[token].item()]) for token in range(model.config.vocab_size)]
    train.credit_steps(samples, train.Models(model, teacher), tokenizer, args)
    for s in samples:
        assert s.advantage == pytest.approx([(q.logits - p.logits)[s.completion_ids[0]].item()], abs=1e-4)
        s.advantage = s.advantage * p.probs[s.completion_ids[0]].item()
    model.zero_grad()
    accumulate(model, samples, 1.0, args)
    assert (flat_gradient(model) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_weighted_completions_of_the_teacher_give_the_students_gradient():
    """Sec. 3.1 by enumeration: E under the teacher of w A grad log pi is E under the student of A grad log pi. A weight is clipped at
    --weight_clip, and differentiated once."""
    (model, _), (teacher, _) = tiny(), tiny(seed=5)
    prefix, rng = [5, 6, 7], np.random.default_rng(0)
    p, q = (torch.distributions.Categorical(logits=next_logits(m, prefix)) for m in (model, teacher))
    tokens = range(model.config.vocab_size)
    a = rng.normal(size=len(tokens))
    estimates = []
    for args, behaviour in ((settings(), p), (settings(behaviour="teacher", weight_clip=1e9), q)):
        model.zero_grad()
        samples = [train.Sample(0, 0, prefix, [t], [behaviour.logits[t].item()], advantage=a[t] * behaviour.probs[t].item()) for t in tokens]
        accumulate(model, samples, 1.0, args)
        estimates.append(flat_gradient(model))
    assert (estimates[0] - estimates[1]).abs().max() < 1e-4 * estimates[0].abs().max()
    logps, old = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True), torch.tensor([-2.0, -2.0, -9.0])
    weighted = train.surrogate(logps, old, torch.ones(3), torch.tensor([0, 0, 1]), settings(behaviour="teacher", weight_clip=10.0))
    weighted.sum().backward()
    assert logps.grad.tolist() == pytest.approx([np.e, np.e, 10.0], rel=1e-5)


def test_clipped_epochs_start_from_the_plain_gradient():
    """At ratio 1 PPO's surrogate has the policy gradient; outside the clip it has none where going on would help, and all where it would harm."""
    logps, args = torch.log(torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5])), settings(epochs=2, clip=0.2)
    advantages = torch.tensor([3.0, 1.0, -1.0, 1.0, -1.0])
    x = logps.clone().requires_grad_(True)
    train.surrogate(x, torch.zeros(5), advantages, torch.zeros(5, dtype=torch.long), args).sum().backward()
    assert x.grad.tolist() == pytest.approx([3.0, 0.0, -1.5, 0.5, 0.0])


def test_steps_are_credited_by_gae_and_the_critic_is_asked_before_each():
    """The critic's targets against a hand computation: three steps, values from plain forward passes of the critic over each state."""
    (model, tokenizer), (teacher, _) = tiny(), tiny(seed=5)
    torch.manual_seed(0)
    from transformers import LlamaForTokenClassification
    model.config.num_labels = 1
    critic = LlamaForTokenClassification(model.config).eval()
    critic.tree_masks = True
    blank = tokenizer.convert_tokens_to_ids("\n\n")
    prefix, steps = [5, 6, 7], [[10, 11, blank], [12, blank], [13, 14, 3]]
    completion = sum(steps, [])
    old = np.linspace(-2, -0.5, len(completion)).tolist()
    sample = train.Sample(0, 0, prefix, completion, old, reward=1.0)
    other = train.Sample(0, 0, prefix, [9, 3], [-1.0, -1.0], reward=0.0)
    with torch.no_grad():
        v = [critic(torch.tensor([prefix + sum(steps[:k], [])])).logits[0, -1, 0].item() for k in range(3)]
        logits = teacher(torch.tensor([prefix + completion])).logits[0, 2:-1]
        theirs = torch.log_softmax(logits, -1).gather(1, torch.tensor(completion)[:, None])[:, 0].numpy()
    for reward in ("task", "teacher"):
        train.credit_steps([sample, other], train.Models(model, teacher, critic), tokenizer, settings(reward=reward, critic="yes", gamma=0.9, gae_lambda=0.8))
        assert sample.steps == [0, 3, 5] and other.steps == [0]
        gain = theirs - old
        r = [0, 0, 1] if reward == "task" else [gain[:3].sum(), gain[3:5].sum(), gain[5:].sum()]
        delta = [r[0] + 0.9 * v[1] - v[0], r[1] + 0.9 * v[2] - v[1], r[2] - v[2]]
        a = [delta[0] + 0.72 * delta[1] + 0.72 ** 2 * delta[2], delta[1] + 0.72 * delta[2], delta[2]]
        assert sample.advantage == pytest.approx([a[0]] * 3 + [a[1]] * 2 + [a[2]] * 3, abs=1e-4)
        assert sample.targets == pytest.approx([a[k] + v[k] for k in range(3)], abs=1e-4)
    critic.zero_grad()
    args = settings(critic="yes")
    stats = train.accumulate(train.Models(model, None, critic), [sample, other], train.Scale(0.5, 1 / 10, 1 / 4), args, warm_up=True)
    assert stats["critic_loss"] == stats["loss"] and stats["gap"] == []  # the student waits
    with torch.no_grad():
        errors = [(v[k] - sample.targets[k]) ** 2 for k in range(3)] + [(critic(torch.tensor([prefix])).logits[0, -1, 0].item() - other.targets[0]) ** 2]
    assert sum(stats["critic_loss"]) == pytest.approx(sum(errors) / 4, rel=1e-4)
    assert critic.score.weight.grad.abs().max() > 0


def test_without_a_critic_a_steps_credit_is_its_return():
    (model, tokenizer), (teacher, _) = tiny(), tiny(seed=5)
    blank = tokenizer.convert_tokens_to_ids("\n\n")
    sample = train.Sample(0, 0, [5, 6], [7, blank, 8, 3], [-1.0] * 4, reward=1.0)
    train.credit_steps([sample], train.Models(model, teacher), tokenizer, settings(reward="teacher", critic=None, gamma=0.5, gae_lambda=0.1))
    with torch.no_grad():
        gain = torch.log_softmax(teacher(torch.tensor([[5, 6, 7, blank, 8, 3]])).logits[0, 1:-1], -1).gather(1, torch.tensor([[7], [blank], [8], [3]]))[:, 0] + 1
    late = (gain[2] + gain[3]).item()
    assert sample.advantage == pytest.approx([(gain[0] + gain[1]).item() + 0.5 * late] * 2 + [late] * 2, abs=1e-4)


# ---------------------------------------------------------------------------------------------------
# Whole runs, as processes

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model whose random guesses are sometimes right, trees of a few questions, and a held-out set."""
    folder = tmp_path_factory.mktemp("world")
    tiny_folder(folder / "model")
    trees = []
    for k, question in enumerate(QUESTIONS):
        steps, parent = ["", "1 + 2 = 3", "3 * 2 = 6", "2 + 2 = 4", "The"], [-1, 0, 1, 0, 2]
        trees.append(Tree(f"q{k}", question, str(k), steps, parent, [4, 2, 1, 2, 1], [2.0, 1.0, 1.0, 1.0, 1.0]))
    write_trees(trees, str(folder / "trees.jsonl"))
    with open(folder / "test.jsonl", "w") as out:
        out.writelines(json.dumps({"id": f"t{k}", "question": q, "answer": str(k)}) + "\n" for k, q in enumerate(QUESTIONS))
    traces = [{"id": f"q{k}", "question": q, "answer": str(k), "steps": ["1 + 2 = 3", f"The answer is {k}."], "reward": 1} for k, q in enumerate(QUESTIONS)]
    with open(folder / "traces.jsonl", "w") as out:
        out.writelines(json.dumps(row) + "\n" for row in traces)
    # a policy that has learnt to answer with some digit, so that rewards are mixed
    command(folder, "--model", folder / "model", "--objective", "sft", "--lora_rank", "0", "--lr", "1e-2", "--steps", "30", "--batch_size", "8", "--group_size", "1",
            "--trees", folder / "traces.jsonl", "--out", folder / "policy", "--eval_every", "0", "--save_every", "0")
    return folder


def command(folder, *flags, ranks=1, check=True, background=False):
    """python train.py FLAGS, or torchrun of `several` runs on more ranks."""
    launch = ["train.py"] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), __file__, str(folder)]
    process = subprocess.Popen([sys.executable, *launch, *map(str, flags)], cwd=HERE, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    if background:
        return process
    output, _ = process.communicate(timeout=170)
    assert not check or process.returncode == 0, output
    return output


def short(world, out, *flags):
    """Flags of a run of three steps of two groups, which `flags` override."""
    at = lambda name: os.path.join(world, name)
    return [str(flag) for flag in (
        "--model", at("policy"), "--trees", at("trees.jsonl"), "--eval_data", at("test.jsonl"), "--out", at(out), "--max_new_tokens", 12, "--eval_new_tokens", 12,
        "--group_size", 4, "--batch_size", 8, "--lr", 3e-3, "--steps", 3, "--save_every", 1, "--eval_every", 3, "--rollouts_every", 1, *flags)]


def here(world, out, *flags):
    """Such a run in this process."""
    train.train(train.parse_args(short(world, out, *flags)))


def adapter(folder):
    from safetensors.torch import load_file
    return load_file(folder / "adapter_model.safetensors")


def log(folder):
    with open(folder / "log.jsonl") as lines:
        return [json.loads(line) for line in lines]


class Killed(BaseException):
    """Stands for kill -9 where a test wants it at one exact place: nothing catches it, and what is on disk is all that is left."""


def timeless(folder):
    return [{key: value for key, value in row.items() if not key.startswith(("seconds", "tokens_per", "peak"))} for row in log(folder)]


def same_run(a, b):
    """Equal adapters, logs but for times, rollouts, scores; and nothing left aside."""
    assert all(torch.equal(value, adapter(b)[name]) for name, value in adapter(a).items())
    assert timeless(a) == timeless(b) and not [name for name in os.listdir(b) if "tmp" in name]
    for name in [name for name in os.listdir(a) if name.startswith(("rollouts", "eval"))]:
        assert (a / name).read_text() == (b / name).read_text(), name


SLOW = bool(os.environ.get("TREE_OPO_SLOW"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_is_uninterrupted(world, pairs, ranks):
    """kill -9 at random moments, of either rank and of torchrun too, then --resume: the weights bit for bit, each step once in the log with the
    figures of the uninterrupted run. A resume that repeats or skips a batch, or loses Adam's moments; ranks that trained on without their torchrun.
    20 moments with TREE_OPO_SLOW=1."""
    rng, flags = np.random.default_rng(), UNEVEN["whole"]
    run = lambda out, resume, **how: command(world, *(short(world, out, *flags.split(), *resume.split()) if ranks == 1 else (out, flags + resume)), ranks=ranks, **how)
    for k in range(5 if SLOW else 1):
        out, resume = world / f"cut{ranks}-{k}", ""
        for moment in range(4 if SLOW else 1):
            process = run(out, resume, background=True)
            if rng.random() < 0.25 and SLOW:
                time.sleep(rng.uniform(0.2, 6))  # while it starts
            else:
                step = 1 if rng.random() < 0.2 else 20 if rng.random() < 0.2 else rng.integers(1, 21)  # the first and the last more often
                next((line for line in process.stdout if line.startswith("step ") and "/" in line and int(line[5:line.index("/")]) >= step), None)
                time.sleep(rng.uniform(0, 0.2))
            ours = [process.pid]
            if ranks > 1 and process.poll() is None:
                ours += map(int, open(f"/proc/{process.pid}/task/{process.pid}/children").read().split())
            victim = ours[rng.integers(len(ours))]
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.communicate(timeout=60)
            while any(os.path.exists(f"/proc/{pid}") for pid in ours[1:]):  # in no time, or the test hangs
                time.sleep(0.01)
            resume = " --resume" if (out / "checkpoint.safetensors").exists() or (out / "checkpoint.previous.safetensors").exists() else ""
        run(out, resume)
        same_run(world / f"whole{ranks}", out)
        assert [row["step"] for row in log(out)] == list(range(20))
    assert any(row["dead"] < 1 for row in log(out)) and max(value.abs().max() for name, value in adapter(out).items() if "lora_B" in name) > 0


def several(world, *runs):
    """Several runs in one process, or in one torchrun of this file, since processes are slow to start. runs: OUT and FLAGS in turn; the name of
    OUT says what befalls the run."""
    real = train.rollout, train.compare, evaluate.completion_logits, dist.destroy_process_group
    dist.destroy_process_group = lambda: None

    def half_dead(members, *others):  # all that rank 1 draws
        for s in members:
            s.reward *= 1 - members[0].group % 2
        return real[1](members, *others)

    for out, flags in zip(runs[::2], runs[1::2]):
        how, _, who = out.rpartition("_")

        def ending(*args, **others):
            if args[0].step == 1 and os.environ.get("RANK") == who:
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "sentence":
                    raise InputError("a sentence of one rank")
                if how == "raise":
                    raise ValueError("a sudden end")
                os.kill(os.getppid() if how == "torchrun" else os.getpid(), signal.SIGTERM)
                time.sleep(0.5)
            return real[0](*args, **others)
        train.rollout = ending if who.isdigit() else real[0]
        train.compare = half_dead if "dead" in out else real[1]
        evaluate.completion_logits = poisoned(1, lambda s: s.group == 1) if "spoilt" in out else real[2]
        here(world, out, *flags.replace("MODEL", os.path.join(world, "policy")).split())
    train.rollout, train.compare, evaluate.completion_logits, dist.destroy_process_group = real
    if dist.is_initialized():
        dist.destroy_process_group()


UNEVEN = {"three": "--batch_size 12", "one": "--batch_size 4", "one_critic": "--batch_size 4 --critic MODEL --critic_warmup 1", "one_ema": "--batch_size 4 --baseline ema --epochs 2",
          "one_teacher": "--batch_size 4 --reward teacher --teacher MODEL", "one_distilled": "--batch_size 4 --teacher MODEL --distill_coef 0.1",
          "one_off_policy": "--batch_size 4 --behaviour teacher --teacher MODEL", "dead": "", "spoilt": "", "one_problem": "--eval_limit 1", "whole": "--steps 20 --eval_every 10 --save_every 3"}


@pytest.fixture(scope="module")
def pairs(world):
    """These runs on one rank, NAME1, and on two, NAME2."""
    runs = lambda ranks: [x for name, flags in UNEVEN.items() for x in (name + ranks, flags)]
    several(str(world), *runs("1"))
    command(world, *runs("2"), ranks=2)


def test_two_ranks_do_what_one_does(world, pairs):
    """The batch, its rewards, the loss and the gradient of two gloo ranks are those of one process. Three groups on two ranks, one group (the other
    rank has nothing at all), all groups of one rank dead, or its loss not finite: nobody waits for ever, and nothing is another objective."""
    for name in UNEVEN.keys() - {"whole"}:  # whose 20 steps drift apart in the last bits
        one, two = world / (name + "1"), world / (name + "2")
        for a, b in zip(timeless(one), timeless(two), strict=True):
            assert a.keys() == b.keys() and (a["reward"], a["dead"], a["tokens"]) == (b["reward"], b["dead"], b["tokens"])
            assert all(a[key] == b[key] or name == "spoilt" and "gap" in key or a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5) for key in a), (name, a, b)
        assert all(torch.allclose(value, adapter(two)[key], atol=1e-4) and value.isfinite().all() for key, value in adapter(one).items()), name
        assert (one / "eval-3.jsonl").read_text().count("\n") == (two / "eval-3.jsonl").read_text().count("\n")
    assert log(world / "spoilt2")[0]["loss"] is None and log(world / "dead2")[0]["dead"] >= 0.5
    assert not (world / "spoilt2" / "nonfinite-0.jsonl").read_text() and {json.loads(line)["group"] for line in open(world / "spoilt2" / "nonfinite-1.jsonl")} == {1}


@pytest.mark.parametrize("how", ["raise_1"] + ["raise_0", "kill_0", "kill_1", "sentence_0", "sentence_1", "term_0", "term_1", "torchrun_0"] * SLOW)
def test_a_rank_that_ends_takes_the_others_along(world, how):
    """Within a minute, with its own error shown, not a time-out's. A SIGTERM of one rank, or of torchrun, is a step finished and saved by all."""
    begun = time.time()
    said = command(world, how, "--steps 9 --save_every 0 --eval_every 0", ranks=2, check=False)
    assert time.time() - begun < 60 and {"raise": "ValueError: a sudden end", "kill": "Signal 9 (SIGKILL)", "sentence": "a sentence of one rank"}.get(how[:-2], "saved") in said
    assert "Traceback" not in said.replace("Traceback (most recent call last):\n  File \"<frozen runpy>", "") or how[:-2] == "raise"
    if how[:-2] in ("term", "torchrun"):
        assert len(log(world / how)) == 2 and (world / how / "checkpoint.safetensors").exists()


def test_adapter_loads_both_ways_and_every_baseline_runs(world):
    """The run folder is a PEFT adapter for evaluate.load and for PeftModel alike, with equal logits; and each --baseline and
    --group goes through the loop."""
    import advantage
    for k, baseline in enumerate(sorted(advantage.ESTIMATORS)):
        args = train.parse_args(["--model", str(world / "policy"), "--trees", str(world / "trees.jsonl"), "--eval_every", "0", "--steps", "1",
                                 "--group_size", "4", "--batch_size", "8", "--max_new_tokens", "12", "--baseline", baseline,
                                 "--group", ("tree", "trace", "question")[k % 3], "--out", str(world / baseline), "--rollouts_every", "1"])
        train.train(args)
        [row] = log(world / baseline)
        rollouts = [json.loads(line) for line in open(world / baseline / "rollouts.jsonl")]
        assert len(rollouts) == 8 and row["reward"] == np.mean([r["reward"] for r in rollouts])
    ours, _ = evaluate.load(str(world / "policy"), str(world / baseline))
    plain, _ = evaluate.load(str(world / "policy"))
    theirs = PeftModel.from_pretrained(plain, str(world / baseline))
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_a_second_run_moves_the_first_aside(world, capsys):
    """Nothing is lost: the same command twice leaves two run folders."""
    for _ in range(2):
        train.train(train.parse_args(["--model", str(world / "policy"), "--trees", str(world / "trees.jsonl"), "--eval_every", "0",
                                      "--steps", "1", "--out", str(world / "again")]))
    assert "moved the earlier run" in capsys.readouterr().out and (world / "again.1" / "adapter_model.safetensors").exists()


def test_resuming_with_other_settings_names_them(world):
    """A run folder that two configurations share, and resume from each other."""
    flags = ["--model", str(world / "policy"), "--trees", str(world / "trees.jsonl"), "--eval_every", "0", "--out", str(world / "settings"), "--steps"]
    train.train(train.parse_args([*flags, "1"]))
    with pytest.raises(InputError, match="--steps was 1 and is 2, --lr was 0.0003 and is 0.5"):
        train.train(train.parse_args([*flags, "2", "--resume", "--lr", "0.5"]))
    train.train(train.parse_args([*flags, "2", "--resume", "--lr", "0.5", "--force"]))
    assert [row["step"] for row in log(world / "settings")] == [0, 1]


ROWS = {  # the rows of Tables 1 and 2, and what else train.py offers, as commands; T stands for the teacher
    "grpo": "--group question --baseline grpo", "trace": "--group trace --baseline expectation", "mc": "--baseline mc --mc_rollouts 2", "ema": "--baseline ema",
    "reinforce_kl": "--group question --reward teacher --teacher T", "reinforce_kl_baseline": "--group question --reward teacher --teacher T --critic T --critic_warmup 1 --gae_lambda 1",
    "actor_critic": "--group question --reward teacher --teacher T --critic T --critic_warmup 1", "task_critic": "--critic T --critic_warmup 1",
    "gkd": "--group question --reward none --distill_coef 1 --teacher T", "tree_opo_kl": "--teacher T --distill_coef 0.1 --kl student_teacher",
    "off_policy": "--behaviour teacher --teacher T", "grpo_clipped": "--group question --baseline grpo --epochs 2 --kl_coef 0.04"}


@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_a_command(tmp_path, row):
    """Three steps of each on the embedded default: the adapter moves, and the log has the row's own figures."""
    flags = [os.path.join(HERE, "data/arithmetic/teacher") if flag == "T" else flag for flag in ROWS[row].split()]
    embedded = {name: os.path.join(HERE, path) for name, path in train.PRESETS["arithmetic"].items() if name in ("model", "trees")}
    args = train.parse_args([x for name, path in embedded.items() for x in (f"--{name}", path)] + ["--eval_every", "0", "--steps", "3", "--out", str(tmp_path / row), *flags])
    train.train(args)
    rows = log(tmp_path / row)
    assert max(value.abs().max() for name, value in adapter(tmp_path / row).items() if "lora_B" in name) > 0
    assert all(("kl" in r) == bool(args.distill_coef or args.kl_coef) and ("critic_loss" in r) == bool(args.critic) for r in rows)
    assert any("ess" in r for r in rows) == (row == "off_policy")
    assert any(r["sat"] is not None for r in rows) == (args.reward == "task" and not args.critic and args.group != "question")
    if row == "mc":
        assert rows[0]["tokens"] > 2 * 32 * rows[0]["length"]


def test_a_held_out_question_beyond_the_context(world, capsys):
    """It was evaluated all the same, in garbage, or ended the run after hours: now one sentence before the first step, or a line with --skip_bad."""
    (world / "long.jsonl").write_text((world / "test.jsonl").read_text() + json.dumps({"id": "long", "question": "Ben " * 10_000, "answer": "1"}) + "\n")
    with pytest.raises(InputError, match="the question of \"long\" has"):
        here(world, "long", "--eval_data", world / "long.jsonl")
    here(world, "long", "--eval_data", world / "long.jsonl", "--skip_bad", "--steps", 1)
    assert len((world / "long" / "eval-1.jsonl").read_text().splitlines()) == len(QUESTIONS) and "skipped" in capsys.readouterr().err


def test_a_teacher_of_another_vocabulary_is_refused_before_any_work(world, capsys):
    tokenizer_file = json.loads((world / "model" / "tokenizer.json").read_text())
    (world / "stranger").mkdir()
    tokenizer_file["model"]["vocab"] = {{"Ann": "Zoe"}.get(word, word): k for word, k in tokenizer_file["model"]["vocab"].items()}
    (world / "stranger" / "tokenizer.json").write_text(json.dumps(tokenizer_file))
    (world / "stranger" / "tokenizer_config.json").write_text((world / "model" / "tokenizer_config.json").read_text())  # and no weights at all
    with pytest.raises(InputError, match="another vocabulary"):
        train.train(train.parse_args(["--model", str(world / "policy"), "--trees", str(world / "trees.jsonl"), "--eval_every", "0", "--out", str(world / "never"),
                                      "--teacher", str(world / "stranger"), "--distill_coef", "0.1"]))
    assert not (world / "never").exists()


def test_sft_learns_the_searches_right_solutions(world):
    """MCTS-driven REINFORCE fine-tunes the teacher on its search's traces: what ended in a right answer, from the question down."""
    nodes = [dict(parent=-1, step="", visits=3, value=2.0, terminal=False, reward=None), dict(parent=0, step="1 + 2 = 3", visits=2, value=1.0, terminal=False, reward=None),
             dict(parent=1, step="The answer is 3.", visits=1, value=1.0, terminal=True, reward=1.0), dict(parent=1, step="The answer is 4.", visits=1, value=0.0, terminal=True, reward=0.0),
             dict(parent=0, step="2 + 1 = 3", visits=1, value=1.0, terminal=False, reward=1.0, rest="So.\n\nThe answer is 3.")]
    row = dict(id="q", question="Ben has 3 pens .", answer="3", nodes=nodes)
    assert parse_traces(row, 1) == [("Ben has 3 pens .", ["1 + 2 = 3", "The answer is 3."]), ("Ben has 3 pens .", ["2 + 1 = 3", "So.\n\nThe answer is 3."])]
    with pytest.raises(InputError, match="this is a tree"):
        parse_traces({**row, "nodes": [dict(parent=-1, step="", visits=3, value=2.0)]}, 1)


# ---------------------------------------------------------------------------------------------------
# Killed, stopped, out of space, out of numbers, out of memory

@pytest.fixture(scope="module")
def whole3(world):
    """Three steps, uninterrupted."""
    here(world, "whole3")


def test_killed_between_any_two_renames(world, whole3, monkeypatch, capsys):
    """A kill between the checkpoint's two renames, or between the checkpoint and the adapter (of the last step, so that the resumed run
    thought that it had finished and left an old adapter), or before the last scores: the same files as uninterrupted. All places with TREE_OPO_SLOW=1."""
    replace, count = os.replace, 0

    def counted(*paths):
        nonlocal count
        count += 1
        if count == fatal:
            raise Killed
        replace(*paths)
    monkeypatch.setattr(os, "replace", counted)
    fatal = 0
    here(world, "counted")
    places = range(1, count + 1) if SLOW else [3, count - 7, count - 4, count - 2, count - 1, count]
    for place in places:
        count, fatal = 0, place
        with pytest.raises(Killed):
            here(world, f"rename{place}")
        fatal = 0
        try:
            here(world, f"rename{place}", "--resume")
        except InputError as error:  # nothing had been saved
            assert "there is no checkpoint" in str(error) and not (world / f"rename{place}" / "checkpoint.safetensors").exists()
            continue
        same_run(world / "whole3", world / f"rename{place}")


@pytest.mark.parametrize("place", ["save_file", "save_pretrained", "score", "write_logs"])
def test_killed_inside_what_is_slow(world, whole3, monkeypatch, place):
    """A kill in the middle of a file of weights, of save_pretrained, of an evaluation, or between log and checkpoint: torn files are never read."""
    owner = {"save_pretrained": PeftModel, "score": evaluate}.get(place, train)
    real, count = getattr(owner, place), 0

    def torn(*args, **how):
        nonlocal count
        count += 1
        if count < {"score": 2}.get(place, 3):
            return real(*args, **how)
        if place == "save_file":
            open(args[1], "wb").write(b"torn")
        if place == "write_logs":
            real(*args, **how)
            args[0][0].write('{"step": 99, "to')
        if place == "save_pretrained":
            os.makedirs(args[1], exist_ok=True)
            open(os.path.join(args[1], "adapter_model.safetensors"), "wb").write(b"torn")
        raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(owner, place, torn)
        with pytest.raises(Killed):
            here(world, "in_" + place)
    here(world, "in_" + place, "--resume")
    same_run(world / "whole3", world / ("in_" + place))


def test_a_torn_checkpoint_gives_way_to_the_one_before(world, whole3, capsys):
    """Cut short by a disk that lost its last pages: a traceback of safetensors. Now one line and the previous one; with both torn, one sentence."""
    here(world, "torn")
    path = world / "torn" / "checkpoint.safetensors"
    for size in (1000, 100, 0):
        path.write_bytes(path.read_bytes()[:size])
        here(world, "torn", "--resume")
        assert "checkpoint.safetensors is torn" in capsys.readouterr().out
        same_run(world / "whole3", world / "torn")
    for name in ("checkpoint.safetensors", "checkpoint.previous.safetensors"):
        (world / "torn" / name).write_bytes(b"torn")
    with pytest.raises(InputError, match="no checkpoint in .* can be read"):
        here(world, "torn", "--resume")


@pytest.mark.parametrize("place", ["evaluation before", "first step", "evaluation", "last evaluation"])
def test_stopped_anywhere_it_saves(world, whole3, monkeypatch, capsys, place):
    """SIGTERM during an evaluation ended the run with "step 2 is saved" when it was not; before the first step, with a checkpoint that could not be read."""
    name, count = ("rollout" if place == "first step" else "score"), 0
    owner = train if name == "rollout" else evaluate
    real = getattr(owner, name)

    def told(*args, **how):
        nonlocal count
        count += 1
        if count == {"evaluation before": 1, "first step": 1, "evaluation": 2, "last evaluation": 3}[place]:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **how)
    out = "told_" + place.replace(" ", "_")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(owner, name, told)
        here(world, out, "--save_every", "0", "--eval_every", "2")
    step = {"evaluation before": 0, "first step": 1, "evaluation": 2, "last evaluation": 3}[place]
    assert end.value.code == 143 and f"stopped after step {step}, which is saved" in capsys.readouterr().out
    here(world, out, "--resume", "--save_every", "0", "--eval_every", "3")
    for extra in ("eval-2.jsonl", "eval-3.jsonl"):
        assert extra != "eval-3.jsonl" or (world / out / extra).exists()
    same_run(world / "whole3", world / out)


def test_interrupted_while_torch_is_imported(world):
    """Ctrl-C in the first seconds was a traceback out of some library."""
    process = command(world, *short(world, "early"), background=True)
    deadline = time.time() + 30
    while "libtorch" not in open(f"/proc/{process.pid}/maps").read() and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and said == "\ntrain.py: stopped by SIGINT; what was finished is kept.\n" and not (world / "early").exists()


def test_told_to_stop_it_evaluates_no_more(world, monkeypatch):
    """SIGTERM in a step before an evaluation: the evaluation was done all the same, minutes in which torchrun loses patience after 30 s."""
    real = train.rollout

    def told(*args, **how):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **how)
    monkeypatch.setattr(train, "rollout", told)
    with pytest.raises(SystemExit):
        here(world, "impatient", "--eval_every", "1")
    assert sorted(name for name in os.listdir(world / "impatient") if name.startswith("eval")) == ["eval-0.jsonl"]


def test_a_finished_run_is_resumed_without_work(world, whole3, capsys):
    """Status 0 and the same files, to the byte: a finished run in a script that resumes whatever is there."""
    before = {name: (world / "whole3" / name).read_bytes() for name in os.listdir(world / "whole3")}
    here(world, "whole3", "--resume")
    assert before == {name: (world / "whole3" / name).read_bytes() for name in os.listdir(world / "whole3")}
    assert "3 steps done" in capsys.readouterr().out


def test_a_full_disk_is_one_sentence(world, whole3, monkeypatch):
    """And the checkpoint before is as it was: whether the weights, the adapter or the log is what does not fit."""
    for room in (100_000, 10_000, 500):
        out = f"full{room}"
        with monkeypatch.context() as patch:
            patch.setattr(train, "save", lambda *args, real=train.save: real(*args) if args[0].step == 1 else exec("raise Killed"))
            with pytest.raises(Killed):
                here(world, out)
        before = (world / out / "checkpoint.safetensors").read_bytes()
        try:
            patch = monkeypatch.context()
            with patch as limited, pytest.raises((InputError, OSError)) as error:
                real = train.rollout  # a disk that fills up while it runs
                limited.setattr(train, "rollout", lambda *args, **how: resource.setrlimit(resource.RLIMIT_FSIZE, (room, -1)) or real(*args, **how))
                here(world, out, "--resume")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        assert room == 500 or "What was saved before is intact" in str(error.value)
        assert (world / out / "checkpoint.safetensors").read_bytes() == before
        del error
        here(world, out, "--resume")
        same_run(world / "whole3", world / out)


STATES = {"ema": "--baseline ema", "mc": "--baseline mc --mc_rollouts 2", "critic": "--critic MODEL --critic_warmup 1", "teacher": "--reward teacher --teacher MODEL",
          "dropout": "--lora_dropout 0.3", "epochs": "--epochs 2 --kl_coef 0.1", "every_weight": "--lora_rank 0", "tokens": "--max_tokens 400"}


@pytest.mark.parametrize("state", STATES)
def test_twice_the_same_and_resumed_the_same(world, state, monkeypatch):
    """What a run carries from step to step is in its checkpoint: the history of ema, the critic with its Adam, the schedule of --max_tokens, and
    dropout's random numbers, which were drawn on and on from the seed, so that a resumed run had others."""
    flags = STATES[state].replace("MODEL", str(world / "policy")).split() + ["--eval_every", "0", "--save_every", "2", "--steps", "4"]
    here(world, state + "_whole", *flags)
    real = train.rollout

    def fatal(*args, **how):
        if args[0].step == 3:
            raise Killed
        return real(*args, **how)
    with monkeypatch.context() as patch:
        patch.setattr(train, "rollout", fatal)
        try:
            here(world, state + "_cut", *flags)
        except Killed:
            pass
    here(world, state + "_cut", *flags, "--resume")
    here(world, state + "_again", *flags)
    a, b, c = (world / (state + end) for end in ("_whole", "_cut", "_again"))
    assert timeless(a) == timeless(b) == timeless(c)
    if state == "every_weight":
        assert len({(x / "model.safetensors").read_bytes() for x in (a, b, c)}) == 1
    else:
        same_run(a, b)
        same_run(a, c)


def poisoned(count, of=lambda s: True, value=float("nan")):
    """evaluate.completion_logits, which spoils the first `count` training passes in which such a sample takes part."""
    real, left = evaluate.completion_logits, [count]

    def spoil(model, members, *others):
        logits, *rest = real(model, members, *others)
        if model.training and left[0] and any(map(of, members)):
            left[0] -= 1
            logits = logits * value
        return logits, *rest
    return spoil


@pytest.mark.parametrize("state", ["", "--critic MODEL --critic_warmup 0", "--epochs 2"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_its_samples_kept(world, monkeypatch, capsys, what, state):
    """One nan in Adam's moments is nan in every weight for ever. The step's samples are dumped, the others go on, finite; the log stays JSON
    (an infinite gradient was written as Infinity); and what such a first step leaves, weights without Adam's moments, can be resumed."""
    flags, out = state.replace("MODEL", str(world / "policy")).split(), f"spoilt_{what}{len(state)}"
    if what == "loss":
        monkeypatch.setattr(evaluate, "completion_logits", poisoned(1, lambda s: s.group == 1))
    else:
        real, left = train.accumulate, [2 if "epochs" in state else 1]

        def accumulate(models, *others, **how):
            stats = real(models, *others, **how)
            if left[0]:
                left[0] -= 1
                next(p for p in models.student.parameters() if p.requires_grad).grad[0] = np.inf
            return stats
        monkeypatch.setattr(train, "accumulate", accumulate)
    here(world, out, *flags, "--steps", 1, "--eval_every", 0)
    [first] = [json.loads(line, parse_constant=pytest.fail) for line in open(world / out / "log.jsonl")]
    spoilt = [json.loads(line) for line in open(world / out / "nonfinite-0.jsonl")]
    assert first["loss" if what == "loss" else "grad_norm"] is None and "This update is skipped" in capsys.readouterr().out
    assert spoilt and all(s["completion_ids"] and "advantage" in s for s in spoilt)
    if "epochs" not in state:
        assert not any(value.any() for name, value in adapter(world / out).items() if "lora_B" in name)
    here(world, out, *flags, "--steps", 3, "--eval_every", 0, "--resume", "--force")
    assert all(np.isfinite(row["loss"]) for row in log(world / out)[1:]) and all(value.isfinite().all() for value in adapter(world / out).values())
    assert any(value.any() for name, value in adapter(world / out).items() if "lora_B" in name)


def test_nonfinite_abort_is_one_sentence(world, monkeypatch):
    """And the checkpoint before is good: the run goes on from there."""
    monkeypatch.setattr(evaluate, "completion_logits", poisoned(9, lambda s: s.seed[1] == 1))
    with pytest.raises(InputError, match="not finite; the samples concerned are in .*nonfinite-RANK.jsonl.*--nonfinite skip"):
        here(world, "abort", "--nonfinite", "abort")
    monkeypatch.undo()
    here(world, "abort", "--nonfinite", "abort", "--resume")
    here(world, "abort_whole", "--nonfinite", "abort")
    same_run(world / "abort_whole", world / "abort")


def test_out_of_memory_in_the_update_is_one_line(world, monkeypatch, capsys):
    """The objective is the same in micro-batches of half the size, which are half of the batch and not of a budget far above it."""
    model, tokenizer = tiny()
    samples, real, parts = random_samples(tokenizer), evaluate.completion_logits, []
    size = sum(len(s.prefix_ids) + len(s.completion_ids) for s in samples)
    for room in (10 ** 9, size // 2, size // 5, 1):
        policy = lora(tiny()[0])
        optimizer = torch.optim.AdamW([dict(params=[p for p in policy.parameters() if p.requires_grad], peak_lr=0.01)], weight_decay=0.0)

        def small(model, members, rows, *others):
            if len(rows) * max(len(row[0]) for row in rows) > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(model, members, rows, *others)
        monkeypatch.setattr(evaluate, "completion_logits", small)
        args, scale = settings(no_pack=True), train.Scale(1 / len(samples))
        if room == 1:
            with pytest.raises(torch.OutOfMemoryError):
                train.update(train.Models(policy), optimizer, samples, scale, 1.0, args)
            continue
        stats, norm = train.update(train.Models(policy), optimizer, samples, scale, 1.0, args)
        said = capsys.readouterr().out.count("out of memory")
        assert said == {10 ** 9: 0, size // 2: 1}.get(room, said) and (room > size or args.micro_tokens <= size // 2)
        parts.append((sum(stats["loss"]), norm))
    assert said > 1 and np.allclose(parts, parts[0], rtol=1e-4)


def test_warnings_of_a_sick_run(world, monkeypatch, capsys):
    """A sampler that is another policy than the trainer (here: of another temperature), an update that does not reach the sampler, and fifty
    steps without a reward are said, once each; a healthy run says none of it."""
    here(world, "healthy", "--eval_every", 0)
    said = capsys.readouterr().out
    assert not any(words in said for words in ("sampler and trainer differ", "does not reach the sampler", "no reward in the first"))
    real = evaluate.log_probs
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "log_probs", lambda logits, target: real(logits / 1.5, target))
        here(world, "gap", "--eval_every", 0, "--steps", 1)
    assert "sampler and trainer differ by" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self: None)
        here(world, "stuck", "--eval_every", 0, "--steps", 3)
    assert capsys.readouterr().out.count("does not reach the sampler") == 1
    monkeypatch.setattr(evaluate, "is_correct", lambda *args, **how: False)
    here(world, "unrewarded", "--eval_every", 0, "--steps", 51, "--batch_size", 4, "--save_every", 0, "--max_new_tokens", 4)
    said = capsys.readouterr().out
    assert said.count("no reward in the first 50 steps") == 1 and said.count("  extracted ") == 3 and "expected \"" in said
    assert "every group is dead" in said and not any(value.any() for name, value in adapter(world / "unrewarded").items() if "lora_B" in name)


def test_where_a_run_cannot_be_put(world, monkeypatch):
    """A file of the name of --out was moved aside as if it were a run, a folder of other things too, and a place that cannot be written was found
    after the model was loaded."""
    (world / "file").write_text("mine")
    (world / "things").mkdir(exist_ok=True)
    (world / "things" / "mine.txt").write_text("mine")
    (world / "dangling").symlink_to("nowhere")
    monkeypatch.setattr(evaluate, "load", lambda *args, **how: pytest.fail("a model was loaded"))
    for out, says in (("file", "is no folder"), ("file/below", "Not a directory"), ("things", "something else than a run"), ("dangling", "is no folder"),
                      ("/proc/nowhere", "/proc/nowhere"), ("/dev/null", "is no folder"), ("x" * 300, "File name too long")):
        with pytest.raises((InputError, OSError), match=says):
            here(world, out)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (world / "void").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        here(world, "void")
    monkeypatch.undo()
    here(world, "void", "--steps", 1, "--eval_every", 0)
    assert (world / "file").read_text() == (world / "things" / "mine.txt").read_text() == "mine" and (world / "void" / "log.jsonl").exists()


def test_the_student_and_its_moments_wait_for_the_critic(world):
    """Steps with zero gradients would age Adam's moments: the student's first real update would come out at half its size."""
    from safetensors import safe_open
    train.train(train.parse_args(["--model", str(world / "policy"), "--trees", str(world / "trees.jsonl"), "--eval_every", "0", "--steps", "2", "--group_size", "4",
                                  "--batch_size", "8", "--max_new_tokens", "12", "--critic", str(world / "model"), "--critic_warmup", "2", "--out", str(world / "waits")]))
    with safe_open(str(world / "waits" / "checkpoint.safetensors"), "pt") as state:
        moved = {name for name in state.keys() if name.startswith("exp_avg/")}
    assert moved and all(name.startswith("exp_avg/critic.") for name in moved)
    assert max(value.abs().max() for name, value in adapter(world / "waits").items() if "lora_B" in name) == 0


def test_out_of_memory_while_steps_are_credited_halves_the_passes(world, monkeypatch, capsys):
    """The critic's and the teacher's passes before the update are as large as those in it."""
    values, sizes = evaluate.step_values, []

    def short(critic, members, rows):
        sizes.append(sum(len(row[0]) for row in rows))
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return values(critic, members, rows)
    monkeypatch.setattr(evaluate, "step_values", short)
    train.train(train.parse_args(["--model", str(world / "policy"), "--trees", str(world / "trees.jsonl"), "--eval_every", "0", "--steps", "1", "--group_size", "4",
                                  "--batch_size", "8", "--max_new_tokens", "12", "--critic", str(world / "model"), "--out", str(world / "narrow")]))
    assert capsys.readouterr().out.count("out of memory") == 1 and max(sizes[1:]) < sizes[0]


def test_evaluations_that_a_resume_makes_old_are_made_anew(world):
    """eval-K beyond the checkpoint may be another policy's; and before and after on different problems are not compared."""
    flags = ["--model", str(world / "policy"), "--trees", str(world / "trees.jsonl"), "--eval_new_tokens", "12", "--max_new_tokens", "12", "--group_size", "4",
             "--batch_size", "8", "--eval_every", "1", "--save_every", "1", "--out", str(world / "stale")]
    (world / "stale").mkdir()  # an empty folder is no earlier run
    train.train(train.parse_args([*flags, "--steps", "1", "--eval_data", str(world / "test.jsonl")]))
    assert not (world / "stale.1").exists()
    (world / "stale" / "eval-2.jsonl").write_text("stale")
    other = world / "other.jsonl"
    other.write_text((world / "test.jsonl").read_text().replace('"t', '"u'))
    train.train(train.parse_args([*flags, "--steps", "2", "--resume", "--force", "--eval_data", str(other)]))
    assert evaluate.read_scores(str(world / "stale" / "eval-2.jsonl")).keys() == {f"u{k}" for k in range(len(QUESTIONS))}


def test_two_runs_in_one_folder_are_kept_apart(world):
    """The same command in two terminals: the second one moved the first one's folder aside while it wrote there."""
    process = command(world, *short(world, "shared", "--steps", "500"), background=True)
    try:
        next(line for line in process.stdout if line.startswith("step 2/"))
        for flags in ([], ["--resume"]):
            assert "another run is at work" in command(world, *short(world, "shared", "--steps", "500", *flags), check=False)
    finally:
        process.kill()
        process.communicate()
    assert not (world / "shared.1").exists()
    command(world, *short(world, "shared", "--steps", "2"))  # a killed run holds nothing


MISTAKES = [
    (["--trees", "nowhere.jsonl"], "there is no file nowhere.jsonl"), (["--lr", "-1"], "--lr"), (["--batch_size", "9"], "--batch_size"),
    (["--alpha", "2"], "--alpha"), (["--alpha", "-0.1"], "--alpha"), (["--resume", "--out", "unheard_of"], "no checkpoint"), (["--batch_size", "0"], "--batch_size"),
    (["--no_such_flag"], "unrecognized"), (["--baseline", "magic"], "invalid choice"), (["--group_size", "0"], "--group_size"),
    (["--mc_rollouts", "0"], "--mc_rollouts"), (["--distill_coef", "0.1"], "need --teacher"), (["--reward", "teacher"], "need --teacher"),
    (["--teacher", "policy"], "nothing asks for it"), (["--critic", "policy", "--reward", "none", "--teacher", "policy", "--distill_coef", "1"], "without rewards"),
    (["--critic", "policy", "--objective", "sft"], "without rewards"), (["--critic", "policy", "--baseline", "flat"], "Leave one out"),
    (["--group_size", "1"], "--group_size"), (["--kl_coef", "1", "--lora_rank", "0"], "--kl_coef"), (["--lr", "nan"], "--lr"), (["--lr", "0"], "--lr"),
    (["--epochs", "2", "--behaviour", "teacher", "--teacher", "policy"], "--behaviour"), (["--temperature", "inf"], "--temperature"),
    (["--adapter", "policy", "--lora_rank", "0"], "--lora_rank 0"), (["--trees", "torn.jsonl"], "torn.jsonl, line 6: the line is no JSON"),
    (["--trees", "test.jsonl"], "test.jsonl, line 1"), (["--eval_every", "1", "--eval_data", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
    (["--eval_every", "1", "--eval_data", "policy/config.json", "--skip_bad"], "holds no usable line"), (["--out", "test.jsonl"], "is no folder"),
    (["--teacher", "nowhere/at/all", "--distill_coef", "1"], "nowhere/at/all"), (["--objective", "sft", "--trees", "trees.jsonl"], "trees.jsonl, line 1")]
LATE_MISTAKES = [  # which only the model can tell
    (["--model", "./nothing"], "no folder"), (["--max_prompt", "1"], "--max_prompt"), (["--adapter", "stranger_adapter"], "does not fit the model"),
    (["--adapter", "policy"], "there is no adapter_config.json"), (["--critic", "nowhere/at/all"], "nowhere/at/all")]


@pytest.mark.parametrize("flags, says", MISTAKES + LATE_MISTAKES)
def test_a_mistake_is_one_sentence_and_status_2(world, flags, says, monkeypatch, capsys):
    """A traceback, or one after minutes in which a model was loaded; and no run folder is left that holds nothing."""
    monkeypatch.chdir(world)
    (world / "torn.jsonl").write_text((world / "trees.jsonl").read_text() + '{"id": "q9", "ques')
    if "stranger_adapter" in flags:
        lora(tiny()[0]).save_pretrained("stranger_adapter")
        config = json.loads((world / "stranger_adapter" / "adapter_config.json").read_text())
        (world / "stranger_adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "some/stranger"}))
    if (flags, says) in MISTAKES:
        monkeypatch.setattr(evaluate.AutoModelForCausalLM, "from_pretrained", lambda *args, **how: pytest.fail("a model was loaded"))
    base = ["--model", "policy", "--trees", "trees.jsonl", "--eval_every", "0", "--steps", "1", "--out", "wrong"]
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: train.train(train.parse_args(base + flags)))
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if not line.startswith("skipped")]
    assert stop.value.code == 2 and says in said and len(lines) == 1 and "Traceback" not in said and not os.path.exists("wrong")


def test_bad_lines_are_skipped_on_demand(world, capsys):
    """Each named on stderr, and the others are trained on."""
    (world / "torn.jsonl").write_text((world / "trees.jsonl").read_text() + '{"id": "q9", "ques\n{"id": "q8"}\n')
    here(world, "skipping", "--trees", world / "torn.jsonl", "--skip_bad", "--steps", 1)
    said = capsys.readouterr()
    assert "skipped 2 bad lines" in said.err and "line 6" in said.err and f"{len(QUESTIONS)} problems" in said.out


def test_a_resumed_run_may_be_told_to_evaluate(world, capsys):
    """It ended with status 2 for want of the scores before, after all the work was done."""
    here(world, "later", "--steps", 1, "--eval_every", 0)
    here(world, "later", "--steps", 1, "--resume", "--eval_every", 1)
    assert (world / "later" / "eval-1.jsonl").exists() and "before and after" not in capsys.readouterr().out


if __name__ == "__main__":
    run_command(lambda: several(*sys.argv[1:]))
