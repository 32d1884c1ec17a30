"""
What sharing prefixes saves. Each line compares two ways of doing the same work, in turn, in one run: the ratio of their
seconds pair by pair, as median [min, max]. Completions have one length, so that both sides do equal work, unless --natural lets
them end where the model ends them, as they do in a run.

    python results/benchmark.py                                           # the embedded model
    python results/benchmark.py --model SmolLM2-135M-Instruct --trees trees.jsonl --batch_size 16 --new_tokens 64
    pip install trl && python results/benchmark.py --trl                  # a whole step against TRL's GRPOTrainer

1. update     one update of a batch, every sample padded to its own row, against packed groups
2. generate   transformers' generate, against ours, on the same prompts
3. step       TRL's GRPOTrainer, against ours: rollout, reward, advantages, update; same prompts, batch, lengths, LoRA, dtype
4. group size the update at 4 to 64 samples of one tree: its cost follows the distinct tokens
5. memory     peak of the process for one update and for generation alone, each in a process of its own
"""
import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import evaluate  # noqa: E402
import train  # noqa: E402
from tree import micro_batches, pack, run_command, sample_group  # noqa: E402


def clock(work):
    """Seconds of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(name, theirs, ours, pairs, tokens):
    """Time two callables in turn after a warm-up; print and return tokens a second and the ratio theirs / ours."""
    theirs(), ours()
    times = np.array([(clock(theirs), clock(ours)) for _ in range(pairs)])  # (pairs, 2)
    return show(name, times, tokens)


def show(name, times, tokens):
    ratio, (a, b) = times[:, 0] / times[:, 1], np.median(times, axis=0)
    print(f"{name:<42} {tokens / a:8.0f} -> {tokens / b:8.0f} tok/s   {a:7.3f} -> {b:7.3f} s   ratio {np.median(ratio):5.2f} "
          f"[{ratio.min():.2f}, {ratio.max():.2f}] of {len(times)} pairs", flush=True)
    return dict(name=name, seconds=np.median(times, axis=0).tolist(), ratio=float(np.median(ratio)), low=float(ratio.min()), high=float(ratio.max()))


def floors(device, dtype):
    """This machine's measured ceilings: FLOP/s of a matrix product, bytes/s of a copy (read and written)."""
    a, b = (torch.randn(2048, 2048, device=device, dtype=dtype) for _ in range(2))
    big = torch.empty(2 ** 26, device=device)
    target = torch.empty_like(big)
    flops = 2 * 2048 ** 3 / min(clock(lambda: a @ b) for _ in range(40))  # many: others may use the machine
    return flops, 2 * big.nbytes / min(clock(lambda: target.copy_(big)) for _ in range(40))


def build(args, rank=16):
    """The policy with a LoRA adapter, as train.py makes it, and its tokenized trees."""
    flags = ["--model", args.model, "--trees", args.trees, "--eval_every", "0", "--batch_size", str(args.batch_size), "--group_size", str(args.group_size),
             "--max_new_tokens", str(args.new_tokens), "--max_prompt", str(args.max_prompt), "--micro_tokens", str(args.micro_tokens), "--lora_rank", str(rank)]
    knobs = train.parse_args(flags)
    run, trees, _ = train.set_up(knobs, *evaluate.distributed())
    torch.set_num_threads(args.threads)  # loading a small model set it to one
    return knobs, run.models.student, run.tokenizer, trees


def batch_of(trees, knobs, tokenizer, group_size=None, seed=0):
    """Samples on prefixes of the trees, with random completions of --max_new_tokens and random advantages."""
    rng, samples, size = np.random.default_rng(seed), [], group_size or knobs.group_size
    for g in range(1 if group_size else knobs.batch_size // knobs.group_size):
        tree = trees[rng.integers(len(trees))] if not group_size else max(trees[:200], key=lambda tree: len(tree.steps))
        for node in sample_group(tree, size, "tree", rng):
            completion = rng.integers(0, len(tokenizer), knobs.max_new_tokens).tolist()
            samples.append(train.Sample(g, int(node), tree.prefix_ids(node), completion, None, advantage=float(rng.normal())))
    return samples


def updater(model, samples, knobs, no_pack):
    """A callable: forward and backward of a batch, padded or packed."""
    knobs = argparse.Namespace(**{**vars(knobs), "no_pack": no_pack})

    def update():
        model.train()
        train.accumulate(train.Models(model), samples, train.Scale(1 / len(samples)), knobs)
        model.zero_grad()
    return update


def theirs_generate(model, tokenizer, prompts, new_tokens, natural=False):
    """transformers' generate on left-padded prompts, no end before new_tokens unless `natural`."""
    longest, pad = max(map(len, prompts)), tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    model.eval()
    with torch.no_grad():
        model.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
                       max_new_tokens=new_tokens, min_new_tokens=0 if natural else new_tokens, pad_token_id=pad)


def our_step(model, tokenizer, optimizer, trees, knobs, step):
    """One step of ours: (seconds of rollout and grading, seconds of the update). Random advantages: no group is dead."""
    rng = np.random.default_rng(step)
    samples = batch_of(trees, knobs, tokenizer, seed=step)

    def rollout():
        completions, logps = evaluate.generate(model, tokenizer, [s.prefix_ids for s in samples], knobs.max_new_tokens, return_logps=True)
        for sample, ids, values in zip(samples, completions, logps):
            sample.completion_ids, sample.sampler_logps, sample.advantage = ids, values, float(rng.normal())
            evaluate.is_correct(evaluate.decode(tokenizer, ids), "1", strict=True)
    return clock(rollout), clock(lambda: train.update(train.Models(model), optimizer, samples, train.Scale(1 / len(samples)), 1.0, knobs))


def trl_steps(args, knobs, tokenizer, trees, after_step=lambda step: None, steps=1):
    """Steps of TRL's GRPOTrainer on the prompts of our batches: (seconds of rollout and rewards, of the update), what after_step returns. Needs trl."""
    import datasets
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    prompts = [s.prefix_ids for step in range(steps) for s in batch_of(trees, knobs, tokenizer, seed=step)]
    times, now, rng = [], {}, np.random.default_rng(0)

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            now["begin"] = time.perf_counter()

        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            step = time.perf_counter() - now["begin"]
            times.append(((now["rollout"], step - now["rollout"]), after_step(len(times))))

    class InOrder(GRPOTrainer):
        """Our groups are distinct prefixes of one tree: TRL gets the same prompts in the same order instead of repeats."""
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(dataset or self.train_dataset)

        def _generate_and_score_completions(self, inputs):
            outputs = []
            now["rollout"] = clock(lambda: outputs.append(super(InOrder, self)._generate_and_score_completions(inputs)))
            return outputs[0]

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    config = GRPOConfig(output_dir=os.path.join(args.tmp, "trl"), per_device_train_batch_size=args.batch_size, num_generations=args.group_size,
                        max_completion_length=args.new_tokens, max_steps=steps, beta=0.0, temperature=1.0, learning_rate=1e-6,
                        generation_kwargs={} if args.natural else {"min_new_tokens": args.new_tokens}, report_to=[], save_strategy="no", logging_strategy="no",
                        bf16=dtype == torch.bfloat16, use_cpu=not torch.cuda.is_available(), disable_tqdm=True, gradient_checkpointing=False)
    theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa")
    InOrder(model=theirs, reward_funcs=lambda completions, **_: rng.normal(size=len(completions)).tolist(), args=config, processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list([{"prompt": tokenizer.decode(p)} for p in prompts]), callbacks=[Clock()],
            peft_config=LoraConfig(r=16, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    return times


def peak(kind, args):
    """Peak memory of a process of its own that does one kind of work, MiB."""
    command = [sys.executable, os.path.abspath(__file__), "--only", kind] + [x for name in ("model", "trees", "batch_size", "group_size", "new_tokens", "max_prompt",
                                                                                            "micro_tokens", "threads") for x in (f"--{name}", str(getattr(args, name)))] + ["--natural"] * args.natural
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def only(args):
    """One kind of work three times, then this process's peak memory."""
    knobs, model, tokenizer, trees = build(args)
    samples, optimizer = batch_of(trees, knobs, tokenizer), torch.optim.AdamW([dict(params=[p for p in model.parameters() if p.requires_grad], peak_lr=1e-6)])
    prompts = [s.prefix_ids for s in samples]
    work = {"nothing": lambda: None, "padded": updater(model, samples, knobs, True), "packed": updater(model, samples, knobs, False),
            "generate": lambda: theirs_generate(model, tokenizer, prompts, args.new_tokens, args.natural),
            "ours": lambda: evaluate.generate(model, tokenizer, prompts, args.new_tokens),
            "trl_step": lambda: trl_steps(args, knobs, tokenizer, trees),
            "our_step": lambda: our_step(model, tokenizer, optimizer, trees, knobs, 0)}[args.only]
    if args.only == "trl_step":
        model = optimizer = None  # it loads its own
    for _ in range(1 if args.only == "trl_step" else 3):
        work()
    print(evaluate.peak_memory())


def main():
    parser = argparse.ArgumentParser(description="What sharing prefixes saves.", formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", default="data/arithmetic/student", help="a folder or a hub name")
    parser.add_argument("--trees", default="data/arithmetic/trees.jsonl", help="prefix trees, JSONL")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=72, help="length of every completion")
    parser.add_argument("--max_prompt", type=int, default=512)
    parser.add_argument("--micro_tokens", type=int, default=8192 if torch.cuda.is_available() else 1024)
    parser.add_argument("--natural", action="store_true", help="let completions end where the model ends them, instead of all at --new_tokens")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="*", default=[4, 8, 16, 32, 64], help="group sizes of part 4")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch on the CPU")
    parser.add_argument("--trl", action="store_true", help="compare whole steps with TRL, which must be installed")
    parser.add_argument("--tmp", default="out", help="where TRL may write")
    parser.add_argument("--out", help="append the figures to this JSONL file")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.natural:
        evaluate.eos_ids = lambda model, tokenizer: []  # nothing ends a completion early
    if args.only:
        return only(args)
    knobs, model, tokenizer, trees = build(args)
    weights = sum(p.numel() for p in model.parameters())
    flops, bandwidth = floors(model.device, model.dtype)
    samples = batch_of(trees, knobs, tokenizer)
    prompts = [s.prefix_ids for s in samples]
    packed = sum(len(row[0]) for _, rows in micro_batches(samples, 10 ** 9, evaluate.row_tokens(model)) for row in rows)
    padded = len(samples) * max(len(s.prefix_ids) + len(s.completion_ids) for s in samples)
    print(f"{os.path.basename(os.path.abspath(args.model))}: {weights:,} weights, {model.dtype}, {model.device}, {args.threads} threads; batch {args.batch_size}, groups of "
          f"{args.group_size}, prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, {args.new_tokens} new tokens\n"
          f"measured ceilings: {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s; the batch is {padded} padded tokens, {packed} packed ones")
    rows = [compare("update: padded -> packed", updater(model, samples, knobs, True), updater(model, samples, knobs, False), args.pairs, padded)]
    floors_of = [6 * weights * packed / flops]
    print(f"{'':<42} floor of the packed update, 6 x weights x distinct tokens / peak: {floors_of[0]:.3f} s, {floors_of[0] / rows[-1]['seconds'][1]:.0%} of the time")
    rows.append(compare("generate: transformers -> ours", lambda: theirs_generate(model, tokenizer, prompts, args.new_tokens, args.natural),
                        lambda: evaluate.generate(model, tokenizer, prompts, args.new_tokens), args.pairs, len(prompts) * args.new_tokens))
    floors_of.append(sum(p.nbytes for p in model.parameters()) * args.new_tokens / (bandwidth / 2))
    print(f"{'':<42} floor of decoding, bytes of weights x steps / copy's read bandwidth: {floors_of[1]:.3f} s, {floors_of[1] / rows[-1]['seconds'][1]:.0%} of the time")
    if args.trl:
        optimizer = torch.optim.AdamW([dict(params=[p for p in model.parameters() if p.requires_grad], peak_lr=1e-6)])
        ours = lambda step: our_step(model, tokenizer, optimizer, trees, knobs, step)
        times = np.array(trl_steps(args, knobs, tokenizer, trees, ours, args.pairs + 1))[1:]  # (pairs, theirs and ours, rollout and update)
        for name, seconds in (("step", times.sum(2)), ("its rollout and rewards", times[..., 0]), ("its update", times[..., 1])):
            rows.append(show(f"{name}: TRL -> ours", seconds, len(prompts) * args.new_tokens))
        floor = sum(floors_of)
        args.natural or print(f"{'':<42} floor of a step, both together: {floor:.3f} s, {floor / rows[-3]['seconds'][1]:.0%} of the time")
    for size in args.sizes:
        group = batch_of(trees, knobs, tokenizer, size)
        distinct = len(pack([s.prefix_ids for s in group])[0])
        tokens = sum(len(s.prefix_ids) + args.new_tokens for s in group)
        rows.append(compare(f"update, group of {size} ({tokens} -> {distinct + size * args.new_tokens} tokens)", updater(model, group, knobs, True),
                            updater(model, group, knobs, False), args.pairs, tokens))
    memory = {kind: peak(kind, args) for kind in ("nothing", "padded", "packed", "generate", "ours", *("trl_step", "our_step") * args.trl)}
    print("peak memory, MiB: " + ", ".join(f"{kind} {value:.0f}" for kind, value in memory.items()))
    if args.out:
        with open(args.out, "a", encoding="utf-8") as out:
            settings = {key: value for key, value in vars(args).items() if key not in ("out", "only", "tmp")}
            settings |= dict(model=os.path.basename(os.path.abspath(args.model)), trees=os.path.basename(args.trees))
            out.write(json.dumps(dict(settings, device=str(model.device), padded=padded, packed=packed, gflops=flops / 1e9, gbytes=bandwidth / 1e9, rows=rows, memory=memory)) + "\n")


if __name__ == "__main__":
    run_command(main)
