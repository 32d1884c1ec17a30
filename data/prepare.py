"""
Make or fetch a data set as JSONL problems, {"id", "question", "answer", ...}, into data/NAME/.

    python data/prepare.py gsm8k                     # train.jsonl, test.jsonl and *_traces.jsonl
    python data/prepare.py math                      # likewise gsm_symbolic, which is a test alone
    python data/prepare.py gsm8k --source my/gsm8k   # from a local copy, a folder or one file
    python data/prepare.py arithmetic                # remakes the embedded world

The embedded world has word problems and all that the pipeline needs. Its teacher is pre-trained on
clean solutions. Its student goes on from there, on solutions by people who misread ("halves them"
as minus two) and slip, as a base model is trained on noisy text: it can do the sums and often does
the wrong one. The teacher's searches become the prefix trees. All of it derives from one seed.
"""
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from typing import NamedTuple, Sequence

from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

import tree  # noqa: E402
from tree import InputError  # noqa: E402


# ---- Published data sets -------------------------------------------------------------------------
class Published(NamedTuple):
    address: str
    problems: int   # so many, or the download is not whole


GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
SYMBOLIC = "https://raw.githubusercontent.com/apple/ml-gsm-symbolic/main/generated_data"
PRM800K = "https://media.githubusercontent.com/media/openai/prm800k/main/prm800k/math_splits"
PUBLISHED = {
    "gsm8k": {"train": Published(f"{GSM8K}/train.jsonl", 7473),
              "test": Published(f"{GSM8K}/test.jsonl", 1319)},
    "gsm_symbolic": {"test": Published(f"{SYMBOLIC}/GSM_symbolic.jsonl", 5000)},
    # the split of Lightman et al. 2023: MATH-500 is the test, all the others are to train on
    "math": {"train": Published(f"{PRM800K}/train.jsonl", 12000),
             "test": Published(f"{PRM800K}/test.jsonl", 500)},
}


def prepare(name, source, out):
    """Write each split of a published data set to OUT/SPLIT.jsonl, normalised and checked.

    source   None to download, else a folder with files named as the published ones, or one file
    Raises InputError where a file cannot be had, has a bad line, or is not whole.
    """
    splits = PUBLISHED[name]
    if source and os.path.isfile(source):  # one file: the split that its name tells
        split = "train" if "train" in os.path.basename(source) else "test"
        splits = {split: splits.get(split)}
    with tempfile.TemporaryDirectory() as folder:
        for split, published in splits.items():
            path = os.path.join(out, f"{split}.jsonl")
            raw = os.path.join(folder, f"{split}.jsonl")  # problems without id get one by this name
            if source:
                copy_file(source, published, raw)
            else:
                download(published.address, raw)
            try:
                problems = tree.read_problems(raw)
            except InputError as error:
                raise InputError(str(error).replace(raw, source or published.address)) from None
            if not source and len(problems) != published.problems:
                raise InputError(f"{published.address} gave {len(problems)} problems, expected "
                                 f"{published.problems}: the download is not whole, or another.")
            for problem in problems:
                if "solution" in problem and name != "math":  # whose solutions are no list of steps
                    problem["steps"] = len(worked_steps(problem))
            tree.write_jsonl(path, problems)
            print(f"{path}: {len(problems)} problems")
            solved = list(traces(problems)) if name == "gsm8k" else []
            if solved:
                tree.write_jsonl(os.path.join(out, f"{split}_traces.jsonl"), solved)


def copy_file(source, published, path):
    """Copy a source file to `path`, or the file of a source folder that is named as published."""
    if os.path.isdir(source):
        source = os.path.join(source, os.path.basename(published.address))
    if not os.path.isfile(source):
        raise InputError(f"there is no file {source}. Expected one as published, for example at "
                         f"{published.address}.")
    shutil.copyfile(source, path)


def download(address, path):
    """Fetch a file, with a progress bar."""
    name = os.path.basename(address)
    try:
        with urllib.request.urlopen(address, timeout=60) as response, open(path, "wb") as file:
            size = int(response.headers.get("Content-Length", 0)) or None
            with tqdm.wrapattr(file, "write", total=size, desc=name, dynamic_ncols=True) as out:
                shutil.copyfileobj(response, out)
    except (OSError, HTTPException) as error:
        raise InputError(f"{address} cannot be fetched ({error}). Fetch it elsewhere and give the "
                         "file or its folder with --source.") from None


def worked_steps(problem):
    """The lines of a worked solution of GSM8K, without its calculator's notes <<3+4=7>>."""
    lines = problem.get("solution", "").split("\n")
    steps = [re.sub("<<.*?>>", "", line).strip() for line in lines]
    return [step for step in steps if step]


def traces(problems):
    """The solutions that come with GSM8K as traces: prefixes by people, for want of a search."""
    for problem in problems:
        steps = worked_steps(problem)
        if steps:
            answer = f"The answer is \\boxed{{{problem['answer']}}}."
            yield {"id": problem["id"], "question": problem["question"],
                   "answer": problem["answer"], "steps": [*steps, answer], "reward": 1}


# ---- The embedded world: problems ----------------------------------------------------------------
class Phrase(NamedTuple):
    text: str            # "finds {}", with its operand in place of {}
    operation: str       # one of + - * /
    operands: Sequence
    weight: int          # how often it is drawn
    misread: float = 0   # how often a person with misconceptions takes * for + or / for -


NAMES = "Ava Mia Zoe Eve Ben Max Sam Tom".split()
THINGS = "pens coins books shells cards stones apples stamps".split()
PHRASES = [
    Phrase("finds {}", "+", range(2, 13), 2),
    Phrase("buys {}", "+", range(2, 13), 2),
    Phrase("gets {}", "+", range(2, 13), 2),
    Phrase("loses {}", "-", range(2, 13), 2),
    Phrase("eats {}", "-", range(2, 13), 2),
    Phrase("gives away {}", "-", range(2, 13), 2),
    Phrase("doubles them", "*", [2], 9, 0.6),
    Phrase("triples them", "*", [3], 6, 0.3),
    Phrase("halves them", "/", [2], 12, 0.6),
    Phrase("keeps one in {}", "/", range(3, 6), 6, 0.3),
]
WEIGHTS = [phrase.weight for phrase in PHRASES]
SLIP = 0.05              # how often such a person's result is wrong by 1 or 10
MISTAKEN_FOR = {"*": "+", "/": "-"}


class Action(NamedTuple):
    operation: str
    operand: int
    misread: float


class Chain(NamedTuple):
    """What one person has, and what happens to it."""
    start: int
    actions: list
    end: int


class Story(NamedTuple):
    question: str
    chains: list         # of two or three persons, whose things are then put together
    answer: int


def apply(operation, number, operand):
    """The result of an operation; misread ones stay between 0 and 999."""
    if operation == "+":
        return number + operand
    if operation == "-":
        return max(number - operand, 0)
    if operation == "*":
        return min(number * operand, 999)
    return number // operand


def make_chain(rng, length):
    """(Chain, its text) of `length` actions whose numbers stay whole, between 4 and 60."""
    start = rng.randint(4, 30)
    number = start
    actions = []
    text = ""
    while len(actions) < length:
        phrase = rng.choices(PHRASES, WEIGHTS)[0]
        operand = rng.choice(phrase.operands)
        result = apply(phrase.operation, number, operand)
        if actions and {phrase.operation, actions[-1].operation} == {"*", "/"}:
            continue     # "doubles them, halves them" teaches nothing
        if phrase.operation == "/" and number % operand:
            continue
        if not 4 <= result <= 60:
            continue
        actions.append(Action(phrase.operation, operand, phrase.misread))
        text += ", " + phrase.text.format(operand)
        number = result
    return Chain(start, actions, number), text


def make_story(rng, steps):
    """A problem of so many steps: the actions of two or three persons, and one sum less than that.

    "Ava has 12 pens, doubles them. Ben has 9, loses 2. How many pens do they have together?"
    """
    persons = 2
    if steps >= 5:
        persons = rng.choice([2, 3])
    lengths = [1] * persons
    for _ in range(steps - (persons - 1) - persons):
        lengths[rng.randrange(persons)] += 1
    thing = rng.choice(THINGS)
    noun = f" {thing}"   # the first person has pens, the others have so many of them
    chains = []
    text = ""
    for name, length in zip(rng.sample(NAMES, persons), lengths):
        chain, happens = make_chain(rng, length)
        chains.append(chain)
        text += f"{name} has {chain.start}{noun}{happens}. "
        noun = ""
    question = f"{text}How many {thing} do they have together?"
    return Story(question, chains, sum(chain.end for chain in chains))


@dataclass(eq=False)     # two persons with equal amounts are two
class Amount:
    """What a solution knows of one person, or of several whose things were put together."""
    number: int
    actions: list        # that are still to happen


def solve(chains, rng, misconceptions=False):
    """The steps of a solution in some order. The next step is an action of one of the persons who
    have any left, or the sum of two who have none.

        12 * 2 = 24        9 - 2 = 7        7 + 24 = 31        The answer is 31.

    misconceptions   those of a person who misreads and slips, and goes on consistently
    """
    amounts = [Amount(chain.start, list(chain.actions)) for chain in chains]
    steps = []
    while len(amounts) > 1 or amounts[0].actions:
        choices = [amount for amount in amounts if amount.actions]
        ended = [amount for amount in amounts if not amount.actions]
        amount = None
        if choices and len(ended) > 1:
            choices.append(None)
        if choices:
            amount = rng.choice(choices)
        if amount is None:
            amount, other = rng.sample(ended, 2)
            amounts.remove(other)
            action = Action("+", other.number, misread=0)
        else:
            action = amount.actions.pop(0)
        steps.append(take_step(amount, action, rng, misconceptions))
    return [*steps, f"The answer is {amounts[0].number}."]


def take_step(amount, action, rng, misconceptions):
    """Apply an action to an amount, and write that down."""
    first = amount.number
    operation = action.operation
    second = action.operand
    if misconceptions and rng.random() < action.misread:
        operation = MISTAKEN_FOR[operation]
    amount.number = apply(operation, first, second)
    if misconceptions and rng.random() < SLIP:
        amount.number = max(0, amount.number + rng.choice([-10, -1, 1, 10]))
    return f"{first} {operation} {second} = {amount.number}"


def make_problems(name, count, low, high, traps, seed, seen):
    """`count` problems of `low` to `high` steps, `traps` or more of which are mostly misread.

    seen   all questions so far: none is made twice, in no set
    """
    rng = random.Random(f"{name} {seed}")
    rows = []
    while len(rows) < count:
        length = rng.randint(low, high)
        story = make_story(rng, length)
        actions = []
        for chain in story.chains:
            actions += chain.actions
        mostly_misread = [action for action in actions if action.misread > 0.5]
        if story.question not in seen and len(mostly_misread) >= traps:
            seen.add(story.question)
            rows.append({"id": f"{name}-{len(rows)}", "question": story.question,
                         "answer": str(story.answer), "steps": length})
    return rows


def make_traces(name, count, misconceptions, seed, seen):
    """`count` solutions to pre-train on, half of them of 6 to 8 steps."""
    rng = random.Random(f"{name} {seed}")
    rows = []
    while len(rows) < count:
        is_long = rng.random() < 1 / 2
        length = rng.randint(6, 8) if is_long else rng.randint(3, 5)
        story = make_story(rng, length)
        if story.question not in seen:
            steps = solve(story.chains, rng, misconceptions)
            is_right = steps[-1] == f"The answer is {story.answer}."
            rows.append({"id": f"{name}-{len(rows)}", "question": story.question,
                         "answer": str(story.answer), "steps": steps, "reward": int(is_right)})
    return rows


# ---- The embedded world: models and trees --------------------------------------------------------
def vocabulary():
    """The tokens of the embedded world: words and signs with their leading space, single digits."""
    words = {"has", "How", "many", "do", "they", "have", "together", "answer", "is", *THINGS}
    for phrase in PHRASES:
        words.update(phrase.text.replace("{}", "").split())
    tokens = ["<pad>", "<eos>", "<unk>", "\n\n", "The", ".", ",", "?"]
    tokens += [f" {sign}" for sign in "+-*/="]
    tokens += [*NAMES, *(f" {name}" for name in NAMES), "How"]
    tokens += [f" {word}" for word in sorted(words)]
    tokens += list("0123456789")
    tokens += [f" {digit}" for digit in "0123456789"]
    return tokens


def make_model(path, seed):
    """A random Llama of 0.8 M parameters, and a word-level tokenizer that decodes what it encodes.
    """
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging
    logging.disable_progress_bar()
    tokens = vocabulary()
    numbered = {token: k for k, token in enumerate(tokens)}
    core = Tokenizer(models.WordLevel(numbered, unk_token="<unk>"))
    word_or_sign = Regex(r"\n\n| ?[A-Za-z]+| ?[^A-Za-z]")  # a word keeps its leading space
    core.pre_tokenizer = pre_tokenizers.Split(word_or_sign, behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        clean_up_tokenization_spaces=False, model_max_length=512)
    torch.manual_seed(seed)
    # A wide initialisation and fast rotations learn arithmetic several times sooner than the usual
    # 0.02 and 10,000.
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=128, intermediate_size=344, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        max_position_embeddings=512, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


EASY = (3, 5, 0)  # fewest and most steps, and how many of them at least are mostly misread
HARD = (6, 8, 3)
PROBLEMS = ["train.jsonl", "val.jsonl", "test.jsonl", "hard_train.jsonl", "hard_val.jsonl",
            "hard_test.jsonl"]
TREES = ["trees.jsonl", "hard_trees.jsonl"]
MODELS = ["teacher", "student"]
MODEL_FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
               "tokenizer_config.json"]


def make_arithmetic(out, seed):
    """The embedded world: problems, then models and trees by this repository's own scripts.

    InputError where the folder has other things in it than a world made before.
    """
    found = set(os.listdir(out)) if os.path.isdir(out) else set()
    if found and found != {*PROBLEMS, *TREES, *MODELS}:
        names = ", ".join(sorted(found)[:5])
        raise InputError(f"{out} holds {names}. Expected none, an empty one, or what this command "
                         "made there before, which it replaces.")
    with tempfile.TemporaryDirectory() as folder:
        make_world(folder, seed)
        for name in PROBLEMS + TREES:
            os.makedirs(out, exist_ok=True)
            shutil.copyfile(os.path.join(folder, name), os.path.join(out, name))
        for name in MODELS:  # without the run's checkpoints and logs
            os.makedirs(os.path.join(out, name), exist_ok=True)
            for file in MODEL_FILES:
                path = os.path.join(name, file)
                shutil.copyfile(os.path.join(folder, path), os.path.join(out, path))


def make_world(folder, seed):
    """All files of the embedded world, and those that they are made of, in a folder."""
    seen = set()
    problem_sets = {
        "test": make_problems("test", 400, *EASY, seed, seen),
        "val": make_problems("val", 200, *EASY, seed, seen),
        "train": make_problems("train", 800, *EASY, seed, seen),
        "hard_test": make_problems("hard_test", 400, *HARD, seed, seen),
        "hard_val": make_problems("hard_val", 200, *HARD, seed, seen),
        "hard_train": make_problems("hard_train", 250, *HARD, seed, seen),
        "clean": make_traces("clean", 150_000, False, seed, seen),
        "noisy": make_traces("noisy", 20_000, True, seed, seen),
    }
    for name, rows in problem_sets.items():
        tree.write_jsonl(f"{folder}/{name}.jsonl", rows)
    make_model(f"{folder}/init", seed)
    folder = shlex.quote(folder)
    sft = (f"train.py --objective sft --lora_rank 0 --eval_every 0 --save_every 0 "
           f"--seed {seed}")
    search = f"mcts.py --model {folder}/teacher --max_new_tokens 128 --seed {seed}"
    commands = [
        f"{sft} --model {folder}/init --trees {folder}/clean.jsonl --batch_size 32 --steps 4500 "
        f"--lr 0.003 --out {folder}/teacher",
        f"{sft} --model {folder}/teacher --trees {folder}/noisy.jsonl --batch_size 16 --steps 600 "
        f"--lr 0.001 --out {folder}/student",
        f"{search} --data {folder}/train.jsonl --out {folder}/search.jsonl",
        f"{search} --data {folder}/hard_train.jsonl --max_depth 8 --out {folder}/hard_search.jsonl",
        f"tree.py {folder}/search.jsonl --out {folder}/trees.jsonl",
        f"tree.py {folder}/hard_search.jsonl --out {folder}/hard_trees.jsonl",
    ]
    for command in commands:
        print("python", command, flush=True)
        # One thread: with more, sums are rounded in another order, and the model is another.
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, env=one_thread)
        if done.returncode != 0:
            raise InputError("the command above has failed, and said why.")


def main():
    parser = tree.arguments("Make or fetch a data set as JSONL problems.")
    parser.add_argument("name", choices=("arithmetic", *PUBLISHED))
    parser.add_argument("--source", help="a local copy instead of the published address: a folder "
                        "with files named as the published ones, or one file")
    parser.add_argument("--out", help="folder to write to; default data/NAME")
    parser.add_argument("--seed", type=tree.at_least(0), default=0, help="of the embedded world")
    args = parser.parse_args()
    out = os.path.abspath(args.out or os.path.join(HERE, args.name))
    if args.name == "arithmetic":
        if args.source:
            raise tree.InputError("arithmetic is made from --seed; --source does nothing. Expected "
                                  "it with a published set alone.")
        make_arithmetic(out, args.seed)
    else:
        prepare(args.name, args.source, out)


if __name__ == "__main__":
    tree.run_command(main)
