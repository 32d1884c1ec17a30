"""
Make or fetch a data set as JSONL problems, {"id", "question", "answer", ...}, into data/NAME/.

    python data/prepare.py gsm8k                          # train.jsonl, test.jsonl, *_traces.jsonl; likewise gsm_symbolic (test), math
    python data/prepare.py gsm8k --source my/gsm8k        # from a folder with files named as the published ones, or from one file
    python data/prepare.py arithmetic                     # remakes the embedded default: problems, models, trees

The embedded default is a small world of word problems with everything that the pipeline needs. The teacher is pre-trained
on clean solutions. The student goes on from there, on solutions by people with misconceptions ("halves them" read as minus
two) and slips, as a base model is trained on noisy text: it can do the sums and often does the wrong one. The teacher's
searches of the training problems become the prefix trees. All of it derives from one seed.
"""
import json
import os
import random
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
from tree import InputError, arguments, at_least, read_problems, run_command, write_jsonl  # noqa: E402

# ---------------------------------------------------------------------------------------------------
# Published data sets: our file -> where it is published

GITHUB, GITHUB_LFS = "https://raw.githubusercontent.com", "https://media.githubusercontent.com/media"
PUBLISHED = {
    "gsm8k": {"train": f"{GITHUB}/openai/grade-school-math/master/grade_school_math/data/train.jsonl",
              "test": f"{GITHUB}/openai/grade-school-math/master/grade_school_math/data/test.jsonl"},
    "gsm_symbolic": {"test": f"{GITHUB}/apple/ml-gsm-symbolic/main/generated_data/GSM_symbolic.jsonl"},
    # the split of Lightman et al. 2023: 12,000 problems to train on, and the MATH-500 to test
    "math": {"train": f"{GITHUB_LFS}/openai/prm800k/main/prm800k/math_splits/train.jsonl",
             "test": f"{GITHUB_LFS}/openai/prm800k/main/prm800k/math_splits/test.jsonl"},
}


def fetch(name, source, out):
    """Copy each published split to out/SPLIT.jsonl, its rows normalised and checked. Raises InputError."""
    splits = PUBLISHED[name]
    if source and os.path.isfile(source):
        split = next((split for split in splits if split in os.path.basename(source)), "test")
        splits = {split: source}
    for split, address in splits.items():
        path, raw = os.path.join(out, f"{split}.jsonl"), os.path.join(out, f"{split}.tmp")
        os.makedirs(out, exist_ok=True)
        local = source if source and os.path.isfile(source) else source and os.path.join(source, os.path.basename(address))
        if local:
            if not os.path.isfile(local):
                raise InputError(f"there is no file {local}. Expected {name}'s {split} split as published at {address}.")
            shutil.copyfile(local, raw)
        else:
            try:
                with urllib.request.urlopen(address, timeout=60) as response, open(raw, "wb") as file:
                    shutil.copyfileobj(response, file)
            except (urllib.error.URLError, OSError) as error:
                raise InputError(f"{address} cannot be fetched ({error}). Fetch it elsewhere and give the file or its folder with --source.") from None
        problems = read_problems(raw)
        write_jsonl(problems, path)
        if name == "gsm8k":
            write_jsonl(worked_solutions(problems, raw), os.path.join(out, f"{split}_traces.jsonl"))
        os.remove(raw)
        print(f"{path}: {len(problems)} problems")


def worked_solutions(problems, raw):
    """GSM8K's own solutions as traces, a line a step, without its calculator's notes: prefixes from people, for want of a search."""
    with open(raw, encoding="utf-8") as lines:
        for problem, line in zip(problems, filter(str.strip, lines)):
            steps = [re.sub("<<.*?>>", "", step).strip() for step in json.loads(line)["answer"].split("####")[0].splitlines() if step.strip()]
            yield {**problem, "steps": [*steps, f"The answer is \\boxed{{{problem['answer']}}}."], "reward": 1}


# ---------------------------------------------------------------------------------------------------
# The embedded world

NAMES = "Ava Mia Zoe Eve Ben Max Sam Tom".split()
THINGS = "pens coins books shells cards stones apples stamps".split()
PHRASES = [  # text, operation, its second operand, how often, how often a person with misconceptions takes * for + or / for -
    *[(f"{verb} {{}}", "+", range(2, 13), 2, 0) for verb in ("finds", "buys", "gets", "makes")],
    *[(f"{verb} {{}}", "-", range(2, 13), 2, 0) for verb in ("loses", "eats", "sells", "gives away")],
    ("doubles them", "*", [2], 9, 0.6), ("triples them", "*", [3], 6, 0.3), ("quadruples them", "*", [4], 4, 0.3),
    ("halves them", "/", [2], 14, 0.6), ("shares them among {}", "/", range(3, 6), 8, 0.3), ("keeps one in {}", "/", range(3, 6), 8, 0.3),
]
SLIP = 0.05  # how often such a person's result is wrong by 1 or 10
APPLY = {"+": lambda a, b: a + b, "-": lambda a, b: max(a - b, 0), "*": lambda a, b: min(a * b, 999), "/": lambda a, b: a // b}


def make_problem(rng, steps):
    """(question, start, [(operation, operand, how often misread)], answer); numbers stay whole, between 5 and 99."""
    start = number = rng.randint(5, 40)
    actions, text = [], ""
    while len(actions) < steps:
        phrase, operation, operands, _, misread = rng.choices(PHRASES, [phrase[3] for phrase in PHRASES])[0]
        operand = rng.choice(operands)
        undoes = bool(actions) and {operation, actions[-1][0]} == {"*", "/"}  # "doubles them, halves them" teaches nothing
        if undoes or operation == "/" and number % operand or not 5 <= APPLY[operation](number, operand) <= 99:
            continue
        actions.append((operation, operand, misread))
        text += ", " + phrase.format(operand)
        number = APPLY[operation](number, operand)
    thing = rng.choice(THINGS)
    return f"{rng.choice(NAMES)} has {start} {thing}{text}. How many {thing}?", start, actions, number


def solve(start, actions, rng=None):
    """The steps of a solution; with rng, those of a person with misconceptions, consistent after each mistake."""
    number, steps = start, []
    for operation, operand, misread in actions:
        if rng and rng.random() < misread:
            operation = {"*": "+", "/": "-"}[operation]
        result = APPLY[operation](number, operand)
        if rng and rng.random() < SLIP:
            result = max(0, result + rng.choice([-10, -1, 1, 10]))
        steps.append(f"{number} {operation} {operand} = {result}")
        number = result
    return steps + [f"The answer is {number}."]


def make_problems(name, count, low, high, traps, seed, seen):
    """`count` problems of low to high steps, at least `traps` of which are mostly misread; no question that is in `seen`."""
    rng, rows = random.Random(f"{name} {seed}"), []
    while len(rows) < count:
        steps = rng.randint(low, high)
        question, _, actions, answer = make_problem(rng, steps)
        if question not in seen and sum(misread > 0.5 for _, _, misread in actions) >= traps:
            seen.add(question)
            rows.append({"id": f"{name}-{len(rows)}", "question": question, "answer": str(answer), "steps": steps})
    return rows


def make_traces(name, count, misconceptions, seed, seen):
    """`count` solutions to pre-train on, a quarter of them of 6 to 8 steps, to problems that no other set has."""
    rng, rows = random.Random(f"{name} {seed}"), []
    while len(rows) < count:
        question, start, actions, answer = make_problem(rng, rng.randint(6, 8) if rng.random() < 0.25 else rng.randint(2, 5))
        if question not in seen:
            steps = solve(start, actions, rng if misconceptions else None)
            rows.append({"id": f"{name}-{len(rows)}", "question": question, "answer": str(answer), "steps": steps,
                         "reward": int(steps[-1] == f"The answer is {answer}.")})
    return rows


def make_model(path, seed):
    """A random Llama of 0.6 M parameters and a word-level tokenizer with single digits that decodes what it encodes."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging
    logging.disable_progress_bar()
    words = {word for phrase in PHRASES for word in phrase[0].replace("{}", "").split()} | set("has How many answer is".split()) | set(THINGS)
    tokens = ["<pad>", "<eos>", "<unk>", "\n\n", "The", ".", ",", "?", *(f" {sign}" for sign in "+-*/="), *NAMES, *(f" {word}" for word in sorted(words))]
    tokens += [space + digit for space in ("", " ") for digit in "0123456789"]
    core = Tokenizer(models.WordLevel({token: k for k, token in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n| ?[A-Za-z]+| ?[^A-Za-z]"), behavior="isolated")  # a word keeps its leading space
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                        clean_up_tokenization_spaces=False, model_max_length=512)
    torch.manual_seed(seed)
    # a wide initialisation and fast rotations learn arithmetic several times sooner than the usual 0.02 and 10,000
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokens), hidden_size=128, intermediate_size=344, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        initializer_range=0.06, rope_parameters={"rope_type": "default", "rope_theta": 500.0}, max_position_embeddings=512,
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def make_arithmetic(out, seed):
    """Problems, then models and trees by this repository's own scripts, in the order of `commands`."""
    seen, tmp = set(), os.path.join(out, "tmp")
    for name, count, *shape in (("test", 400, 2, 5, 0), ("train", 2000, 2, 5, 0), ("hard_test", 400, 6, 8, 3), ("hard_train", 1000, 6, 8, 3)):
        write_jsonl(make_problems(name, count, *shape, seed, seen), os.path.join(out, f"{name}.jsonl"))
    write_jsonl(make_traces("clean", 24000, False, seed, seen), os.path.join(tmp, "clean.jsonl"))
    write_jsonl(make_traces("noisy", 12000, True, seed, seen), os.path.join(tmp, "noisy.jsonl"))
    make_model(os.path.join(tmp, "init"), seed)
    sft = ["train.py", "--objective", "sft", "--lora_rank", 0, "--batch_size", 16, "--group_size", 1, "--eval_every", 0, "--save_every", 0,
           "--micro_tokens", 8192, "--seed", seed]
    search = ["mcts.py", "--model", f"{tmp}/teacher", "--max_new_tokens", 128, "--seed", seed]
    commands = [
        [*sft, "--model", f"{tmp}/init", "--trees", f"{tmp}/clean.jsonl", "--steps", 1400, "--lr", 3e-3, "--out", f"{tmp}/teacher"],
        [*sft, "--model", f"{tmp}/teacher", "--trees", f"{tmp}/noisy.jsonl", "--steps", 600, "--lr", 1e-3, "--out", f"{tmp}/student"],
        [*search, "--data", f"{out}/train.jsonl", "--out", f"{tmp}/search.jsonl"],
        [*search, "--data", f"{out}/hard_train.jsonl", "--out", f"{tmp}/hard_search.jsonl"],
        ["tree.py", f"{tmp}/search.jsonl", "--out", f"{out}/trees.jsonl"],
        ["tree.py", f"{tmp}/hard_search.jsonl", "--out", f"{out}/hard_trees.jsonl"],
    ]
    for command in commands:
        print("python", *command, flush=True)
        # one thread: with more, sums are rounded in another order and the result is another model
        subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for name in ("teacher", "student"):  # the model alone, without the run's checkpoints and logs
        shutil.rmtree(os.path.join(out, name), ignore_errors=True)
        os.makedirs(os.path.join(out, name))
        for file in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(os.path.join(tmp, name, file), os.path.join(out, name, file))
    shutil.rmtree(tmp)


def main():
    parser = arguments("Make or fetch a data set as JSONL problems.")
    parser.add_argument("name", choices=("arithmetic", *PUBLISHED))
    parser.add_argument("--source", help="a local copy instead of the published address: a file, or a folder with files named as the published ones")
    parser.add_argument("--out", help="folder to write to; default data/NAME")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of everything in the embedded world")
    args = parser.parse_args()
    out = os.path.abspath(args.out or os.path.join(HERE, args.name))
    if args.name == "arithmetic":
        make_arithmetic(out, args.seed)
    else:
        fetch(args.name, args.source, out)


if __name__ == "__main__":
    run_command(main)
