"""
What sharing prefixes saves. Each line compares two ways of doing the same work, in turn, in one
run: the ratio of their seconds pair by pair, as median [min, max]. Completions have one length, so
that both sides do equal work, unless --natural lets them end where the model ends them.

    python results/benchmark.py                                           # the embedded model
    python results/benchmark.py --model SmolLM2-135M-Instruct --trees trees.jsonl --batch_size 16
    pip install trl && python results/benchmark.py --trl                  # a whole step against TRL

1. update     one update of a batch, every sample padded to its own row, against packed groups
2. generate   transformers' generate, against ours, on the same prompts
3. slots      eight batches of prompts one after the other, against as many slots that are filled
              again as completions end; with --natural, for otherwise all end together
4. group size the update at 4 to 64 samples of one tree: its cost follows the distinct tokens
5. memory     peak of the process for one update and for generation alone, each in a process of
              its own
6. step       TRL's GRPOTrainer, against ours: rollout, reward, advantages, update; same prompts,
              batch, lengths, LoRA. TRL's dtype is the one it is shipped with, or --trl_dtype
"""
import argparse
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
from tree import (append_jsonl, arguments, at_least, micro_batches, pack, rng,  # noqa: E402
                  run_command, sample_group)

LR = 1e-6  # of the updates that are timed
FORWARDED = ("model", "trees", "batch_size", "group_size", "new_tokens", "max_prompt",
             "micro_tokens", "threads", "dtype", "trl_dtype")  # also those of part 5's processes


# ---- Timing --------------------------------------------------------------------------------------
def clock(work):
    """Seconds of one call."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def synchronize():
    """Wait for what CUDA still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(name, before, after, pairs):
    """Time two callables in turn, after a warm-up of each. Prints and returns what `show` does."""
    before()
    after()
    times = []
    for _ in range(pairs):
        seconds = clock(before)
        times.append((seconds, clock(after)))
    return show(name, np.array(times))


def show(name, times):
    """Print seconds and their ratio, before / after; times (pairs, 2) in seconds."""
    before, after = np.median(times, axis=0)
    ratios = times[:, 0] / times[:, 1]
    ratio = float(np.median(ratios))
    low = float(ratios.min())
    high = float(ratios.max())
    print(f"{name:<42} {before:7.3f} -> {after:7.3f} s   ratio {ratio:5.2f} "
          f"[{low:.2f}, {high:.2f}] of {len(times)} pairs", flush=True)
    return dict(name=name, seconds=[float(before), float(after)], ratio=ratio, low=low, high=high)


def show_floor(what, floor, row):
    """Print the least time that the hardware allows for what `row` measured of ours."""
    print(f"{'':<42} floor of {what}: {floor:.3f} s, {floor / row['seconds'][1]:.0%} of the time")


def ceilings(device, dtype):
    """What this machine does at best: FLOP/s of a matrix product, bytes/s of a copy, which counts
    what is read and what is written. The best of many, for others may use the machine."""
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    b = torch.randn(2048, 2048, device=device, dtype=dtype)
    source = torch.empty(2 ** 26, device=device)
    target = torch.empty_like(source)
    product = min(clock(lambda: a @ b) for _ in range(40))
    copy = min(clock(lambda: target.copy_(source)) for _ in range(40))
    return 2 * 2048 ** 3 / product, 2 * source.nbytes / copy


# ---- The work that is timed ----------------------------------------------------------------------
def build(args):
    """train.py's knobs, its Run with a fresh LoRA adapter, and the tokenized trees."""
    flags = {"model": args.model, "trees": args.trees, "batch_size": args.batch_size,
             "group_size": args.group_size, "max_new_tokens": args.new_tokens,
             "max_prompt": args.max_prompt, "micro_tokens": args.micro_tokens,
             "dtype": args.dtype, "lora_rank": 16, "lr": LR, "eval_every": 0}
    words = []
    for name, value in flags.items():
        words += [f"--{name}", str(value)]
    knobs = train.parse_args(words)
    run, trees, _ = train.set_up(knobs, *evaluate.distributed())
    torch.set_num_threads(args.threads)  # loading a small model may have set it to one
    return knobs, run, trees


def make_batch(run, trees, knobs, seed=0):
    """Samples on prefixes of random trees, in groups, as one step of training has them."""
    draws = rng(seed)
    samples = []
    for g in range(knobs.batch_size // knobs.group_size):
        tree = trees[draws.integers(len(trees))]
        samples += make_group(run, tree, knobs.group_size, knobs, draws, g)
    return samples


def make_group(run, tree, size, knobs, draws, number=0):
    """`size` samples of a tree, with random completions of --new_tokens and random advantages."""
    samples = []
    for node in sample_group(tree, size, "tree", draws):
        ids = draws.integers(0, len(run.tokenizer), knobs.max_new_tokens).tolist()
        sample = train.Sample(number, int(node), tree.prefix_ids(node), ids)
        sample.advantages = np.full(len(ids), draws.normal())
        samples.append(sample)
    return samples


def updater(run, samples, knobs, no_pack):
    """A callable: forward and backward of a batch, padded or packed."""
    knobs = argparse.Namespace(**{**vars(knobs), "no_pack": no_pack})
    scale = train.Scale(1 / len(samples))

    def update():
        train.accumulate(run.models, samples, scale, knobs, knobs.micro_tokens)
        run.optimizer.zero_grad()

    return update


def their_generate(run, prompts, args):
    """transformers' generate on left-padded prompts; without --natural none ends early."""
    model = run.models.student
    pad = run.tokenizer.pad_token_id or 0
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for k, prompt in enumerate(prompts):
        ids[k, longest - len(prompt):] = torch.tensor(prompt)
        mask[k, longest - len(prompt):] = 1
    shortest = 0 if args.natural else args.new_tokens
    bf16 = model.dtype == torch.bfloat16  # generate goes past our own autocast, see evaluate.py
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), do_sample=True,
            temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, pad_token_id=pad,
            max_new_tokens=args.new_tokens, min_new_tokens=shortest)


def our_generate(run, prompts, args):
    """Our sampler on the same prompts."""
    evaluate.generate(run.models.student, run.tokenizer, prompts, args.new_tokens)


def in_batches(run, prompts, args):
    """Our sampler on many prompts, a batch of them after the other."""
    for begin in range(0, len(prompts), args.batch_size):
        our_generate(run, prompts[begin:begin + args.batch_size], args)


def in_slots(run, prompts, args):
    """The same in as many slots, each filled again when its completion ends. Returns the share of
    slots that were busy until the last completion began."""
    decoder = evaluate.Decoder(run.models.student, run.tokenizer, args.batch_size)
    for k, prompt in enumerate(prompts):
        decoder.add(evaluate.Completion(k, prompt, args.new_tokens, 1.0, (0, k), False))
    for _ in decoder.run():
        pass
    return decoder.busy


def roll_out(run, samples, knobs, draws):
    """Complete samples anew. Advantages are random, so that no group is dead."""
    prompts = [s.prefix_ids for s in samples]
    completions, logps = evaluate.generate(
        run.models.student, run.tokenizer, prompts, knobs.max_new_tokens, return_logps=True)
    for sample, ids, values in zip(samples, completions, logps):
        sample.completion_ids = ids
        sample.sampler_logps = values
        sample.advantages = np.full(len(ids), draws.normal())


def our_step(run, trees, knobs, step):
    """One step of ours: (seconds of rollout and grading, seconds of the update)."""
    samples = make_batch(run, trees, knobs, step)

    def rollout():
        roll_out(run, samples, knobs, rng(step))
        for sample in samples:
            text = evaluate.decode(run.tokenizer, sample.completion_ids)
            evaluate.is_solved(text, {"answer": "1"})

    seconds = clock(rollout)
    return seconds, clock(lambda: train.update(run, samples, knobs))


def trl_steps(args, tokenizer, prompts, steps=1, after_step=lambda step: None):
    """`steps` steps of TRL's GRPOTrainer on `prompts`: for each its (seconds of rollout and
    rewards, of the update), and what after_step(step) returned. Needs trl."""
    import datasets
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOTrainer
    times = []
    now = {}  # of the step at work: when it began, seconds of its rollout

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            now["begin"] = time.perf_counter()

        def on_step_end(self, *_, **__):
            synchronize()
            seconds = time.perf_counter() - now["begin"]
            theirs = (now["rollout"], seconds - now["rollout"])
            times.append((theirs, after_step(len(times))))

    class InOrder(GRPOTrainer):
        """Our groups are distinct prefixes of a tree: TRL gets them in order, without repeats."""
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(dataset or self.train_dataset)

        def _generate_and_score_completions(self, inputs):
            start = time.perf_counter()
            outputs = super()._generate_and_score_completions(inputs)
            synchronize()
            now["rollout"] = time.perf_counter() - start
            return outputs

    draws = rng(0)
    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(
            args.model, dtype=getattr(torch, args.trl_dtype), attn_implementation="sdpa"),
        reward_funcs=lambda completions, **_: draws.normal(size=len(completions)).tolist(),
        args=trl_config(args, steps), processing_class=tokenizer, callbacks=[Clock()],
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": tokenizer.decode(prompt)} for prompt in prompts]),
        peft_config=LoraConfig(
            r=16, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer.train()
    return times


def trl_config(args, steps):
    """TRL's settings that do the work of ours."""
    from trl import GRPOConfig
    on_gpu = torch.cuda.is_available()
    limits = {} if args.natural else {"min_new_tokens": args.new_tokens}
    return GRPOConfig(
        output_dir=os.path.join(args.tmp, "trl"), per_device_train_batch_size=args.batch_size,
        num_generations=args.group_size, max_completion_length=args.new_tokens,
        generation_kwargs=limits, max_steps=steps, beta=0.0, temperature=1.0, learning_rate=LR,
        bf16=args.trl_dtype == "bfloat16", use_cpu=not on_gpu, gradient_checkpointing=False,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True)


# ---- Memory --------------------------------------------------------------------------------------
def peak(kind, args):
    """Peak memory of a process of its own that does one kind of work, MiB."""
    command = [sys.executable, os.path.abspath(__file__), "--only", kind]
    for name in FORWARDED:
        command += [f"--{name}", str(getattr(args, name))]
    if args.natural:
        command.append("--natural")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def do_only(args):
    """Do one kind of work three times, and print this process's peak memory."""
    knobs, run, trees = build(args)
    samples = make_batch(run, trees, knobs)
    prompts = [s.prefix_ids for s in samples]
    if args.only == "trl_step":
        tokenizer = run.tokenizer
        del run  # TRL loads a model of its own
        trl_steps(args, tokenizer, prompts)
    else:
        work = {"nothing": lambda: None,
                "padded": updater(run, samples, knobs, True),
                "packed": updater(run, samples, knobs, False),
                "generate": lambda: their_generate(run, prompts, args),
                "ours": lambda: our_generate(run, prompts, args),
                "our_step": lambda: our_step(run, trees, knobs, 0)}
        for _ in range(3):
            work[args.only]()
    print(evaluate.peak_memory())


# ---- The command ---------------------------------------------------------------------------------
def parse_args():
    """The flags."""
    parser = arguments("What sharing prefixes saves.")
    add = parser.add_argument
    count = at_least(1)
    add("--model", default="data/arithmetic/student", help="a folder or a hub name")
    add("--trees", default="data/arithmetic/trees.jsonl", help="prefix trees, JSONL")
    add("--batch_size", type=count, default=32, help="samples a step")
    add("--group_size", type=count, default=8, help="samples of one tree")
    add("--new_tokens", type=count, default=72, help="length of every completion")
    add("--max_prompt", type=count, default=512, help="longer prefixes are dropped; tokens")
    add("--micro_tokens", type=count, default=8192 if torch.cuda.is_available() else 1024,
        help="tokens a forward pass, padding included")
    add("--natural", action="store_true",
        help="let completions end where the model ends them, instead of all at --new_tokens")
    add("--pairs", type=count, default=7, help="how often each comparison is timed")
    add("--sizes", type=count, nargs="*", default=[4, 8, 16, 32, 64],
        help="group sizes of part 4")
    add("--threads", type=count, default=os.cpu_count(), help="of PyTorch on the CPU")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="as train.py's")
    add("--trl", action="store_true", help="compare whole steps with TRL, which must be installed")
    add("--trl_dtype", choices=("float32", "bfloat16"), help="the default is TRL's: bfloat16 on a "
        "GPU, float32 on a CPU", default="bfloat16" if torch.cuda.is_available() else "float32")
    add("--tmp", default="out", help="where TRL may write")
    add("--out", help="append the figures to this JSONL file")
    add("--only", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare_slots(args, knobs, run, trees):
    """Part 3: batches one after the other, and slots that are filled again."""
    prompts = []
    for step in range(8):
        prompts += [s.prefix_ids for s in make_batch(run, trees, knobs, step)]
    row = compare("generate 8 batches: one by one -> slots", lambda: in_batches(run, prompts, args),
                  lambda: in_slots(run, prompts, args), args.pairs)
    row["busy"] = in_slots(run, prompts, args)
    print(f"slots busy until the last completion began: {row['busy']:.0%}")
    return row


def compare_sizes(args, knobs, run, trees):
    """Part 4: the update of one group, larger and larger, of the tree with the most prefixes."""
    tree = max(trees[:200], key=lambda tree: len(tree.steps))
    rows = []
    for size in args.sizes:
        draws = rng(0)
        group = make_group(run, tree, size, knobs, draws)
        prefixes = [s.prefix_ids for s in group]
        new = size * args.new_tokens
        padded = sum(map(len, prefixes)) + new
        packed = len(pack(prefixes).ids) + new
        rows.append(compare(
            f"update, group of {size} ({padded} -> {packed} tokens)",
            updater(run, group, knobs, True), updater(run, group, knobs, False), args.pairs))
    return rows


def compare_steps(args, knobs, run, trees, floor):
    """Part 6: TRL's steps and ours in turn, the first of each being the warm-up."""
    prompts = []
    for step in range(args.pairs + 1):
        prompts += [s.prefix_ids for s in make_batch(run, trees, knobs, step)]
    times = trl_steps(args, run.tokenizer, prompts, args.pairs + 1,
                      lambda step: our_step(run, trees, knobs, step))
    times = np.array(times[1:])  # (pairs, theirs and ours, rollout and update)
    rows = [show("step: TRL -> ours", times.sum(2)),
            show("its rollout and rewards: TRL -> ours", times[..., 0]),
            show("its update: TRL -> ours", times[..., 1])]
    if not args.natural:  # else nobody knows beforehand how many tokens there are
        show_floor("a step, both together", floor, rows[0])
    return rows


def measure(args):
    """All parts. Returns the figures: sizes in tokens, ceilings, a row a comparison, memory."""
    knobs, run, trees = build(args)
    model = run.models.student
    weights = sum(p.numel() for p in model.parameters())
    weight_bytes = sum(p.nbytes for p in model.parameters())
    flops, bandwidth = ceilings(model.device, model.dtype)
    samples = make_batch(run, trees, knobs)
    prompts = [s.prefix_ids for s in samples]
    lengths = [len(prompt) for prompt in prompts]
    padded = len(samples) * (max(lengths) + args.new_tokens)
    batch = next(micro_batches(samples, 10 ** 9, evaluate.row_tokens(model)))  # all in one
    packed = sum(len(row.ids) for row in batch.rows)
    print(f"{os.path.basename(os.path.abspath(args.model))}: {weights:,} weights, {model.dtype}, "
          f"{model.device}, {args.threads} threads; batch {args.batch_size}, groups of "
          f"{args.group_size}, prompts of {min(lengths)} to {max(lengths)} tokens, "
          f"{args.new_tokens} new tokens")
    print(f"measured ceilings: {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s; "
          f"the batch is {padded} padded tokens, {packed} packed ones")
    update = compare(
        "update: padded -> packed", updater(run, samples, knobs, True),
        updater(run, samples, knobs, False), args.pairs)
    update_floor = 4 * weights * packed / flops  # 2 forward, 2 backward; the base needs no gradient
    show_floor("the packed update, 4 x weights x distinct tokens / peak", update_floor, update)
    generate = compare(
        "generate: transformers -> ours", lambda: their_generate(run, prompts, args),
        lambda: our_generate(run, prompts, args), args.pairs)
    generate_floor = weight_bytes * args.new_tokens / bandwidth
    if not args.natural:
        show_floor("decoding, bytes of weights x steps / bandwidth of a copy, read and written",
                   generate_floor, generate)
    rows = [update, generate]
    if args.natural:
        rows.append(compare_slots(args, knobs, run, trees))
    rows += compare_sizes(args, knobs, run, trees)
    kinds = ["nothing", "padded", "packed", "generate", "ours"]
    if args.trl:
        kinds += ["trl_step", "our_step"]
    memory = {kind: peak(kind, args) for kind in kinds}
    print("peak memory, MiB: " + ", ".join(f"{kind} {memory[kind]:.0f}" for kind in kinds))
    if args.trl:  # last, for this process keeps TRL's gigabytes
        rows += compare_steps(args, knobs, run, trees, update_floor + generate_floor)
    return dict(device=str(model.device), padded=padded, packed=packed, gflops=flops / 1e9,
                gbytes=bandwidth / 1e9, rows=rows, memory=memory)


def main():
    args = parse_args()
    if not args.natural:
        evaluate.eos_ids = lambda model, tokenizer: []  # nothing ends a completion early
    if args.only:
        do_only(args)
        return
    figures = measure(args)
    if args.out:
        settings = vars(args).copy()
        for name in ("out", "only", "tmp"):
            del settings[name]
        settings["model"] = os.path.basename(os.path.abspath(args.model))
        settings["trees"] = os.path.basename(args.trees)
        append_jsonl(args.out, {**settings, **figures})


if __name__ == "__main__":
    run_command(main)
