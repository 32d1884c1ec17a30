"""
What one GPU does: decoding, the update, a whole step, a search, and the embedded default.

    python results/gpu.py          # about eight minutes; writes results/gpu.jsonl, prints a table
    python results/gpu.py --tiny   # the same in a minute on a CPU, with a tiny model: a test

The model has Qwen2.5-1.5B's shape, random weights and LoRA of rank 16; nothing is downloaded. What
fails, or does not fit into the time that is left, is a row that says so, and the rest goes on. What
is compiled comes last, for it takes a minute a shape.

1. peak      a matrix product and a copy, the best of many
2. decode    tokens/s of 4, 32 and 256 rows: plain (--no_compile), replayed as a graph (the
             default), compiled as well (--compile). The floor is the bytes of weights and cache
             over the copy's read and write bandwidth
3. update    forward and backward at Table 3's sizes, padded and packed: tokens/s, and 4 x weights x
             tokens as a share of the matrix peak (with LoRA the weights need no gradient)
4. step      a whole step at these sizes, and the peak of its memory
5. search    256 problems side by side
6. default   train.py on the embedded model in bf16, with graphs: seconds and accuracy
"""
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from types import SimpleNamespace

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import evaluate  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import (AutoModelForCausalLM, PreTrainedTokenizerFast,  # noqa: E402
                          Qwen2Config)

import mcts  # noqa: E402
import train  # noqa: E402
from benchmark import clock, roll_out, synchronize, updater  # noqa: E402
from tree import (append_jsonl, arguments, micro_batches, read_jsonl, rng,  # noqa: E402
                  run_command, write_jsonl)

SIZES = {
    "qwen2.5-1.5b": dict(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, vocab_size=151936, question=120, step=40, new_tokens=256,
        rows=(32, 4, 256), steps=64, problems=256, search_tokens=128, product=8192),
    "tiny": dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=600, question=12, step=5, new_tokens=12,
        rows=(4, 2), steps=6, problems=6, search_tokens=12, product=128)}
LIMIT = 150  # seconds of a part
KINDS = {"plain": False, "graph": None, "compiled": True}  # evaluate.COMPILE
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "vocab_size")


# ---- A model, its tokenizer, a batch -------------------------------------------------------------
def make_tokenizer(size):
    """Every id is a word; one in `step` is a blank line, the last is the end."""
    words = []
    for k in range(size["vocab_size"]):
        words.append(f"w{k}" if k % size["step"] else f"\n\nw{k}")
    words[-1] = "</s>"
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, "w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("w", "merged_with_next")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def make_run(size, device):
    """A train.Run with a random model, and the knobs of Table 3."""
    words = (f"--preset paper --max_new_tokens {size['new_tokens']} --lr 1e-6 --eval_every 0 "
             "--lora_dropout 0")
    knobs = train.parse_args(words.split())
    config = Qwen2Config(tie_word_embeddings=True, **{name: size[name] for name in SHAPE})
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.set_attn_implementation("grouped")
    model.requires_grad_(False)
    model = get_peft_model(model, LoraConfig(
        r=16, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    evaluate.multiply_in_bf16(model)
    tokenizer = make_tokenizer(size)
    # one token in 200 ends a completion, so that their lengths differ
    model.generation_config.eos_token_id = list(range(1, size["vocab_size"], 200))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([dict(params=list(trainable.values()), peak_lr=1e-6)])
    run = train.Run(train.Models(model), tokenizer, optimizer, trainable, {}, knobs.micro_tokens)
    return run, knobs


def make_batch(size, knobs):
    """Samples in groups: prefixes of 0 to 4 steps of one tree each, and whole completions."""
    draws = rng(0)
    samples = []
    for g in range(knobs.batch_size // knobs.group_size):
        path = draws.integers(0, size["vocab_size"], size["question"] + 4 * size["step"]).tolist()
        for k in range(knobs.group_size):
            prefix = path[:size["question"] + k % 5 * size["step"]]
            ids = draws.integers(0, size["vocab_size"], size["new_tokens"]).tolist()
            sample = train.Sample(g, k, prefix, ids, seed=(0, g, k))
            sample.advantages = np.full(len(ids), draws.normal())
            samples.append(sample)
    return samples


# ---- Parts: each yields rows. Those that sample say first how: evaluate.COMPILE. -----------------
def fastest(work, calls):
    """Seconds of the fastest call."""
    return min(clock(work) for _ in range(calls))


def measure_peak(bench):
    """FLOP/s of a bf16 product, bytes/s of a copy, read and written."""
    n = bench.size["product"]
    a = torch.randn(n, n, device=bench.device, dtype=torch.bfloat16)
    source = torch.empty(2 ** 20 * n // 64, device=bench.device)
    target = torch.empty_like(source)
    bench.flops = 2 * n ** 3 / fastest(lambda: a @ a, 20)
    bench.bandwidth = 2 * source.nbytes / fastest(lambda: target.copy_(source), 20)
    yield dict(name=bench.name, tflops=bench.flops / 1e12, gbytes=bench.bandwidth / 1e9)


def measure_decoding(bench, rows, kind):
    """Tokens/s of so many rows side by side, once what is compiled is."""
    evaluate.COMPILE = KINDS[kind]
    evaluate.KEPT.clear()
    size = bench.size
    steps = size["steps"]
    columns = size["question"] + 2 * size["step"]
    decoder = evaluate.Decoder(bench.run.models.student, bench.run.tokenizer, rows)
    decoder.ends = set()  # none ends early
    for k in range(rows):
        ids = rng(1, k).integers(0, size["vocab_size"], columns).tolist()
        decoder.add(evaluate.Completion(k, ids, steps + 8, 1.0, (0, k), False))

    def decode(count):
        for _ in range(count):
            decoder.step()
    first = clock(lambda: decode(3))
    seconds = clock(lambda: decode(steps)) / steps
    floor = decoding_bytes(decoder, columns + steps // 2) / bench.bandwidth
    yield dict(
        name=f"{rows} rows, {kind}",
        tokens_per_s=rows / seconds,
        ms=1e3 * seconds,
        floor_ms=1e3 * floor,
        times_floor=seconds / floor,
        first_steps_s=first,
        as_asked=evaluate.COMPILE is KINDS[kind])


def decoding_bytes(decoder, columns):
    """What one step reads: the weights, and so many columns of keys and values."""
    layers = decoder.now.layers
    keys = layers[0].keys[:, :, 0].nbytes  # of a column
    weights = sum(p.nbytes for p in decoder.model.parameters())
    return weights + 2 * keys * columns * len(layers)


def measure_update(bench, kind):
    """Forward and backward of a batch."""
    samples = make_batch(bench.size, bench.knobs)
    work = updater(bench.run, samples, bench.knobs, no_pack=kind == "padded")
    work()
    seconds = fastest(work, 3)
    tokens = sum(len(s.prefix_ids) + len(s.completion_ids) for s in samples)
    computed = tokens
    if kind == "packed":
        longest = evaluate.row_tokens(bench.run.models.student)
        [batch] = micro_batches(samples, 10 ** 9, longest)
        computed = sum(len(row.ids) for row in batch.rows)
    flops = 4 * bench.weights * computed / seconds
    yield dict(
        name=kind,
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        tokens=computed,
        share_of_peak=flops / bench.flops)


def measure_step(bench, kind):
    """A step at Table 3's sizes: rollout, then update. The first of both is slower."""
    evaluate.COMPILE = KINDS[kind]
    run = bench.run
    samples = make_batch(bench.size, bench.knobs)
    for _ in range(2):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        rollout = clock(lambda: roll_out(run, samples, bench.knobs, rng(0)))
        start = time.perf_counter()
        stats, _ = train.update(run, samples, bench.knobs)
        synchronize()
        update = time.perf_counter() - start
    new = sum(len(s.completion_ids) for s in samples)
    yield dict(
        name=kind,
        rollout_s=rollout,
        update_s=update,
        tokens_per_s=new / rollout,
        gap=float(np.mean(stats["gap"])),
        peak_mb=evaluate.peak_memory())


def measure_search(bench, kind):
    """Problems side by side, two rollouts each."""
    evaluate.COMPILE = KINDS[kind]
    size = bench.size
    args = SimpleNamespace(
        rollouts=2, max_depth=5, branch=5, c_uct=2.0, temperature=1.0, seed=0,
        max_new_tokens=size["search_tokens"], parallel=256, batch_size=256,
        out=os.path.join(bench.folder, "search.jsonl"))
    problems = []
    for k in range(size["problems"]):
        problems.append(dict(id=str(k), question=str(k), answer="1"))

    def encode(question):
        draws = rng(2, int(question))
        return [draws.integers(0, size["vocab_size"], size["question"]).tolist()]
    start = time.perf_counter()
    with tqdm(disable=True) as bar:
        tokens, busy = mcts.run(bench.run.models.student, bench.run.tokenizer, problems, encode,
                                args, {}, bar)
    seconds = time.perf_counter() - start  # each token has come to the CPU
    yield dict(name=kind, seconds=seconds, tokens=tokens, tokens_per_s=tokens / seconds, busy=busy)


def measure_default(bench, dtype):
    """train.py on the embedded model, as a command."""
    root = os.path.dirname(HERE)
    folder = os.path.join(bench.folder, f"default-{dtype}")
    command = [sys.executable, os.path.join(root, "train.py"), "--dtype", dtype, "--out", folder]
    if bench.name == "tiny":
        command += ["--steps", "2", "--eval_every", "0"]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=root, text=True, timeout=bench.left(),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(done.stdout.strip().splitlines()[-1])
    log = list(read_jsonl(os.path.join(folder, "log.jsonl"), lambda row, number: row))
    steps = [row for row in log if "loss" in row]
    yield dict(
        name=dtype,
        seconds=seconds,
        accuracy=[row["eval_accuracy"] for row in log if "eval_accuracy" in row],
        rollout_s=sum(row["seconds_rollout"] for row in steps),
        update_s=sum(row["seconds_update"] for row in steps),
        gap=train.mean([row["gap"] for row in steps]))


# ---- The command ---------------------------------------------------------------------------------
class Late(BaseException):
    """A part has used up its time. Were it an Exception, Decoder would take it for a failed
    compilation."""


class Bench(SimpleNamespace):
    """What the parts share: size, device, run, knobs, folder, flops, bandwidth, end."""

    def left(self):
        """Seconds."""
        return max(1, int(self.end - time.monotonic()))

    def do(self, part, work, *more):
        """Do a part; write and print its rows. What fails is a row."""
        def stop(number, frame):
            raise Late("it took too long")
        start = time.monotonic()
        rows = []
        signal.signal(signal.SIGALRM, stop)
        try:
            if self.left() < 5:
                raise Late("no time was left")
            signal.alarm(min(LIMIT, self.left()))
            rows += work(self, *more)
        except (Exception, Late) as error:  # whatever it is, the other parts are worth having
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{os.path.basename(last.filename)}:{last.lineno}"
            said = f"{type(error).__name__}: {str(error)[:300]} ({where})"
            rows.append(dict(name=" ".join(map(str, more)), error=said))
        finally:
            signal.alarm(0)
        for row in rows:
            row = dict(part=part, **row, part_s=time.monotonic() - start)
            append_jsonl(self.out, row)
            print(show(row), flush=True)


def show(row):
    """A row as a line of a Markdown table."""
    cells = []
    for key, value in row.items():
        if key not in ("part", "name"):
            cells.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return f"| {row['part']} | {row.get('name', '')} | {', '.join(cells)} |"


def main():
    parser = arguments("What one GPU does.")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on any machine")
    parser.add_argument("--minutes", type=float, default=8, help="all in all")
    parser.add_argument("--out", help="written anew; default results/gpu.jsonl, with --tiny "
                        "out/gpu.jsonl")
    args = parser.parse_args()
    name = "tiny" if args.tiny else "qwen2.5-1.5b"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(name=name, size=SIZES[name], device=device,
                  flops=float("nan"), bandwidth=float("nan"),
                  out=args.out or os.path.join("out" if args.tiny else HERE, "gpu.jsonl"),
                  end=time.monotonic() + 60 * args.minutes)
    write_jsonl(bench.out, [])
    if args.tiny:
        evaluate.COMPILER = dict(backend="eager")

    def set_up(bench):
        bench.run, bench.knobs = make_run(bench.size, device)
        bench.weights = sum(p.numel() for p in bench.run.models.student.parameters())
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        yield dict(name=card, weights=bench.weights, torch=torch.__version__)
    first, *others = bench.size["rows"]  # the one with a goal, in case time runs out
    with tempfile.TemporaryDirectory() as bench.folder:
        print("| part | what | figures |\n|---|---|---|")
        bench.do("model", set_up)
        bench.do("peak", measure_peak)
        for kind in ("plain", "graph", "compiled"):
            bench.do("decode", measure_decoding, first, kind)
        for kind in ("packed", "padded"):
            bench.do("update", measure_update, kind)
        for kind in ("plain", "graph"):
            bench.do("step", measure_step, kind)
        for rows in others:
            for kind in ("plain", "graph"):
                bench.do("decode", measure_decoding, rows, kind)
        bench.do("search", measure_search, "graph")
        bench.do("default", measure_default, "bfloat16")
        for rows in others:
            bench.do("decode", measure_decoding, rows, "compiled")
        bench.do("default", measure_default, "float32")


if __name__ == "__main__":
    run_command(main)
