"""
A policy, its completions, whether they are right, and its score on a data set.

What differs from model.generate and from the usual graders:
1. Tokens that prompts share are prefilled once, and each sample has its own random numbers: a completion depends on its
   seed alone, whatever stands beside it in the batch. All sampling knobs are set, the model's own defaults ignored.
2. Completions are lists of the ids that were sampled, EOS kept: they are trained on as they are.
3. The grader reads answers as mathematics with a parser of its own. It is two fifths of this file, and long on purpose: the
   reward is all that the student ever learns from, and a wrong one teaches silently.

    python evaluate.py --model Qwen/Qwen2.5-1.5B-Instruct --adapter out/gsm8k --data data/gsm8k/test.jsonl --samples 8
    python evaluate.py --compare out/before.jsonl out/after.jsonl       # two scorings of the same problems, paired
"""
import cmath
import ctypes
import json
import math
import operator
import os
import re
import resource
import signal
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from zlib import crc32

from tree import (BLANK_LINE, JOIN, InputError, arguments, at_least, drop_torn_line, leave_on_signals, pack, printable, read_jsonl,
                  read_problems, run_command, shorten, take)

if __name__ == "__main__":
    leave_on_signals()  # torch takes seconds to import

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")  # their affairs, not the user's

# ---------------------------------------------------------------------------------------------------
# The policy

INSTRUCTION = ("Solve the problem step by step. Separate the steps by blank lines. "
               "End with \"The answer is \\boxed{...}.\"")


def distributed():
    """(rank, world size, device) of this process; joins the others where torchrun started several."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":  # else a torchrun that is killed leaves its ranks at work, beside those of the next
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if world > 1 and not torch.distributed.is_initialized():
        # a rank that has finished waits as long as the others need; torchrun ends all where one dies
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
    return rank, world, device


def gather(item):
    """The list of every rank's item, on every rank."""
    if not torch.distributed.is_initialized():
        return [item]
    items = [None] * torch.distributed.get_world_size()
    try:
        torch.distributed.all_gather_object(items, item)
    except RuntimeError as error:  # its connection is closed
        raise InputError(f"rank {torch.distributed.get_rank()} ends, for another rank has ended, whose error is the one to look at "
                         f"({shorten(str(error), 120)}).") from None
    return items


def load(model, adapter=None, device="cpu", dtype=None, trainable=False, trust_remote_code=False):
    """A causal language model and its tokenizer, from a folder or the hub, with a PEFT adapter on it if one is named.

    dtype   default bf16 on CUDA, float32 elsewhere.  Weights are read from safetensors alone.
    Raises InputError where the folder or the hub has no such model, the tokenizer has no end-of-sequence token, or
    the adapter belongs to another model.
    """
    device = torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if not os.path.isdir(model) and (os.path.isabs(model) or model.startswith(".") or model.count("/") > 1):
        raise InputError(f"there is no folder {model}, and it is no hub name either. Expected a folder that "
                         "save_pretrained wrote, or a name such as Qwen/Qwen2.5-1.5B-Instruct.")
    try:  # damaged files raise whatever their readers happen to
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        policy, report = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, output_loading_info=True,
                                                              ignore_mismatched_sizes=True, trust_remote_code=trust_remote_code)
        wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        if wrong:
            raise ValueError(f"its weights are not those of its config.json, {wrong[0]} and {len(wrong) - 1} others are missing or of another shape.")
        encode(tokenizer, "1 + 1")  # a chat template that fails would do so at the first question
        tokenizer.eos_token_id is None or eos_ids(policy, tokenizer)
    except Exception as error:
        raise InputError(f"the model {model} cannot be loaded ({type(error).__name__}): {' '.join(str(error).split())[:300]} Expected a folder with "
                         "config.json, model.safetensors and the tokenizer's files, or a hub name and a network.") from None
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {model} has no end-of-sequence token, so no completion could ever end. "
                         "Set eos_token in its tokenizer_config.json.")
    if len(tokenizer) > policy.get_input_embeddings().num_embeddings:
        raise InputError(f"the tokenizer of {model} has {len(tokenizer)} tokens, its model embeds only "
                         f"{policy.get_input_embeddings().num_embeddings}. Expected a matching pair.")
    if device.type == "cpu" and policy.num_parameters() < 2e7 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a second thread gains nothing on so small a model, and waits forever where the cores are shared
    policy.to(device).eval()
    check_tree_masks(policy)
    if adapter:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            if not os.path.isfile(os.path.join(adapter, file)):
                raise InputError(f"there is no {file} in {adapter}. Expected a folder that train.py wrote.")
        try:
            with warnings.catch_warnings():  # peft only warns of weights that have no place in the model; here they are compared
                warnings.simplefilter("ignore")
                policy = PeftModel.from_pretrained(policy, adapter, is_trainable=trainable)
            with safe_open(os.path.join(adapter, "adapter_model.safetensors"), "pt") as weights:
                saved, own = set(weights.keys()), set(get_peft_model_state_dict(policy, save_embedding_layers=False))
            wrong = sorted(own - saved | {name for name in saved - own if ".lora_" in name})
            if wrong:
                raise ValueError(f"the weights {wrong[0]} and {len(wrong) - 1} others stand in one of the two alone.")
            name = lambda path: os.path.basename(os.path.abspath(path))
            base = policy.peft_config["default"].base_model_name_or_path
            if base and name(base) != name(model):
                raise ValueError(f"it was trained on {base}, by its adapter_config.json.")
        except Exception as error:
            raise InputError(f"the adapter {adapter} does not fit the model {model} ({type(error).__name__}): {' '.join(str(error).split())[:200]} "
                             "Expected the adapter's own base model.") from None
    if not all(weight.isfinite().all() for weight in policy.parameters()):
        raise InputError(f"the model {model} or its adapter has weights that are no finite numbers. Expected others.")
    return policy.to(device).eval(), tokenizer


def encode(tokenizer, question, steps=()):
    """[ids of the prompt, ids of each step]: the concatenation is a prefix, which opens the assistant's turn.

    A step is encoded once, on its own, with its closing blank line, so that "is a prefix of" holds for ids as for text.
    """
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": f"{question}\n\n{INSTRUCTION}"}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has placed BOS already
    else:
        prompt = tokenizer(question + JOIN)["input_ids"]
    return [prompt] + (tokenizer([step + JOIN for step in steps], add_special_tokens=False)["input_ids"] if steps else [])


def encode_solution(tokenizer, question, steps):
    """(ids of the prompt, ids of the whole completion), which ends the turn after its last step."""
    prompt, *ids = encode(tokenizer, question, steps[:-1])
    last = tokenizer(steps[-1], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return prompt, [token for step in [*ids, last] for token in step]


def fitting(model, tokenizer, problems, skip_bad=False):
    """The problems whose prompt the model can take: one token or more, and no more than its context. InputError, or `skip_bad`, for the others."""
    longest, bad = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf, []
    for problem in problems:
        length = len(encode(tokenizer, problem["question"])[0])
        if not 0 < length <= longest:
            bad.append(problem["id"])
            said = f"the question of {shorten(problem['id'])} has {length} tokens; expected 1 to {longest}, as this model takes them."
            if not skip_bad:
                raise InputError(said + " Shorten it, or pass it over with --skip_bad.")
            print("skipped:", said, file=sys.stderr)
    if len(bad) == len(problems):
        raise InputError(f"none of the {len(problems)} questions has 1 to {longest} tokens, as this model takes them.")
    return [problem for problem in problems if problem["id"] not in set(bad)]


def decode(tokenizer, completion):
    """The text of a completion, without the end-of-sequence token."""
    return tokenizer.decode(completion, skip_special_tokens=True)


# ---------------------------------------------------------------------------------------------------
# Its completions

@lru_cache(maxsize=4)
def token_kinds(tokenizer, size):
    """(size, 4) bool: per token, whether its text holds a blank line, opens with a line's end, closes with one, is space."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    kinds = np.zeros((size, 4), bool)
    for token, text in enumerate(texts):
        bare = text.strip(" \t")
        kinds[token] = bool(BLANK_LINE.search(text)), bare.startswith("\n"), bare.endswith("\n"), not text.strip()
    return torch.from_numpy(kinds)


def eos_ids(model, tokenizer):
    """Every id that ends a completion: chat models name several."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({tokenizer.eos_token_id, *(token for token in configured if token is not None)})


def takes_tree_masks(model):
    """Whether a packed row gives this model the log-probs of its plain sequences, as `check_tree_masks` found when it was loaded."""
    return getattr(model, "tree_masks", True)


@torch.no_grad()
def check_tree_masks(model):
    """Compare one small packed group with its sequences alone. Sliding-window layers, and attention that ignores a mask given
    to it, cannot be packed: then one line says so, and every sequence gets its own padded row, in sampling and in training."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention"} or ({"sliding_attention"} if getattr(config, "sliding_window", None) else set())
    sequences = np.random.default_rng(0).integers(0, config.vocab_size, (3, 8))
    sequences[:, :5] = sequences[0, :5]
    packed = pack(sequences.tolist())
    ids, position, mask = pad_rows([packed], model)
    alone = model(torch.from_numpy(sequences).to(model.device))[0]  # (3, 8, V) logits, or hidden states of a decoder without a head
    together = model(ids, attention_mask=mask, position_ids=position)[0][0, np.stack(packed[3])]
    gap = (torch.log_softmax(alone.float(), -1) - torch.log_softmax(together.float(), -1)).abs().mean().item()
    model.tree_masks = not kinds and gap < (0.01 if model.dtype == torch.float32 else 0.2)
    if not model.tree_masks:
        print(f"this model takes no tree masks ({', '.join(kinds) or f'log-probs differ by {gap:.2g}'}): prefixes are not shared, rows are padded")


def row_tokens(model):
    """How long a packed row may be: where attention, quadratic in the row, costs half of the products with the weights,
    4 L d a layer against 2 a weight. 0 where the model takes no tree masks, and rows are not shared at all."""
    config = model.config.get_text_config()
    weights = sum(p.numel() for p in model.parameters())
    return weights // (4 * config.hidden_size * config.num_hidden_layers) if takes_tree_masks(model) else 0


def shared_rows(prompts, share=True):
    """Put prompts that share at least half of their tokens into one row: lists of indices, the longest prompts first."""
    rows = []
    for k in sorted(range(len(prompts)), key=prompts.__getitem__):
        if rows:
            before = prompts[rows[-1][-1]]
            common = next((t for t, (a, b) in enumerate(zip(before, prompts[k])) if a != b), min(len(before), len(prompts[k])))
        if rows and share and 2 * common >= len(prompts[k]):
            rows[-1].append(k)
        else:
            rows.append([k])
    return sorted(rows, key=lambda row: -max(len(prompts[k]) for k in row))


def pad_rows(packed, model):
    """Packed rows as one batch on the model's device: ids (B, L), position (B, L), mask (B, 1, L, L).

    For a model that takes no tree masks the rows are plain sequences, and the mask (B, L) tells them from padding.
    """
    length = max(len(ids) for ids, _, _, _ in packed)
    ids, position = np.zeros((2, len(packed), length), int)
    mask = np.zeros((len(packed), 1, length, length), bool)
    mask[..., range(length), range(length)] = True  # padding sees itself: a row of softmax without any key would be nan
    for row, (row_ids, row_position, row_mask, _) in enumerate(packed):
        ids[row, :len(row_ids)], position[row, :len(row_ids)] = row_ids, row_position
        mask[row, 0, :len(row_ids), :len(row_ids)] = row_mask
    if not takes_tree_masks(model):
        mask = np.arange(length) < np.array([[len(row_ids)] for row_ids, _, _, _ in packed])
    return tuple(torch.from_numpy(array).to(model.device) for array in (ids, position, mask))


class RoomyLayer(DynamicLayer):
    """Keys and values with room for what is to come: transformers' own layer copies all of them for every new token."""

    def update(self, key_states, value_states, *args, **kwargs):
        old = self.get_seq_length()
        new = old + key_states.shape[2]
        if old == 0 or new > self.room[0].shape[2]:
            grown = [states.new_empty(*states.shape[:2], new + 64, states.shape[3]) for states in (key_states, value_states)]
            for larger, kept in zip(grown, (self.keys, self.values) if old else ()):
                larger[:, :, :old] = kept
            self.room, self.is_initialized = grown, True
        self.room[0][:, :, old:new], self.room[1][:, :, old:new] = key_states, value_states
        return self.show(new)

    def show(self, length):
        self.keys, self.values = (states[:, :, :length] for states in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        length, self.room = self.get_seq_length(), [states[indices] for states in self.room]
        self.show(length)


def empty_cache(model):
    cache = DynamicCache()
    cache.layers = [RoomyLayer() for _ in range(model.config.get_text_config().num_hidden_layers)]
    return cache


def prefill(model, prompts, rows):
    """Compute each distinct token of the prompts once, and hand every prompt its own copy of the keys and values.

    rows    lists of indices into prompts, N in all, that share a packed row
    Returns the cache (N, heads, T, head_dim a layer), padded on the left, and its mask (N, T).
    """
    packed = [pack([prompts[k] for k in row]) for row in rows]
    ids, position, mask = pad_rows(packed, model)
    shared = DynamicCache()  # a plain one: those that a model makes for its windows forget
    model(ids, attention_mask=mask, position_ids=position, past_key_values=shared, use_cache=True, logits_to_keep=1)
    paths = [path for _, _, _, row_paths in packed for path in row_paths]
    place = np.zeros((len(paths), max(map(len, paths))), int)  # (N, T) where each token of each prompt stands in its row
    real = np.zeros(place.shape, bool)
    for k, path in enumerate(paths):
        place[k, place.shape[1] - len(path):], real[k, place.shape[1] - len(path):] = path, True
    place, real = torch.from_numpy(place).to(model.device), torch.from_numpy(real).to(model.device)
    row = torch.tensor([r for r, members in enumerate(rows) for _ in members], device=model.device)[:, None]
    cache = empty_cache(model)
    for own, layer in zip(cache.layers, shared.layers):
        own.update(layer.keys[row, :, place].transpose(1, 2), layer.values[row, :, place].transpose(1, 2))
    return cache, real


def completion_logits(model, members, rows, temperature=1.0):
    """What predicted each completion token: logits (n, V) float32 over the temperature, the ids (n,), the sample of each (n,).

    members, rows    samples with prefix_ids and completion_ids, and their packed rows, as tree.micro_batches gives them
    The one place where logits meet ids: the id at place t of a sequence is predicted at place t - 1. No other place has logits computed.
    """
    ids, position, mask = pad_rows(rows, model)  # (B, L), (B, L), (B, 1, L, L)
    row, place, target, sample = [], [], [], []
    for k, (member, (r, path)) in enumerate(zip(members, ((r, path) for r, packed in enumerate(rows) for path in packed[3]))):
        first = len(member.prefix_ids)
        row += [r] * (len(path) - first)
        place += path[first - 1:-1].tolist()
        target += member.completion_ids
        sample += [k] * (len(path) - first)
    row, place, target, sample = (torch.tensor(x, device=model.device) for x in (row, place, target, sample))
    keep, column = place.unique(return_inverse=True)
    logits = model(ids, attention_mask=mask, position_ids=position, use_cache=False, logits_to_keep=keep).logits  # (B, kept, V)
    return logits[row, column].float() / temperature, target, sample


def log_probs(logits, target):
    """log softmax(logits)[target]: (n, V), (n,) -> (n,)."""
    return -torch.nn.functional.cross_entropy(logits, target, reduction="none")


def divergence(logits, other, direction):
    """KL between next-token distributions over the full vocabulary, (n,). logits (n, V) are the student's and have the gradient.

    direction   "student_teacher" is KL(student || other), the field's reverse KL; "teacher_student" is KL(other || student), which App. B prints.
    """
    width = min(logits.shape[1], other.shape[1])  # models of one tokenizer may pad their vocabularies differently
    p, q = (torch.log_softmax(x[:, :width], dim=-1) for x in (logits, other))
    if direction == "teacher_student":
        p, q = q, p
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)  # torch takes the second distribution first


def step_starts(model, tokenizer, ids):
    """Where the reasoning steps of a completion begin: 0, and after each blank line that is not its end."""
    blank, opens, closes, _ = token_kinds(tokenizer, model.config.vocab_size)[ids].numpy().T
    blank[1:] |= closes[:-1] & opens[1:]  # a blank line may also be split over two tokens
    return [0, *(np.flatnonzero(blank[:-1]) + 1).tolist()]


def check_vocabulary(other, student, trust_remote_code=False):
    """InputError where the two do not read the same tokens: their next-token distributions could not be compared. Reads tokenizers alone."""
    try:
        ours, theirs = (AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code).get_vocab() for model in (student, other))
    except Exception as error:  # damaged files raise whatever their readers happen to
        raise InputError(f"the tokenizer of {student} or of {other} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    if ours != theirs:
        token = next(token for token in (*ours, *theirs) if ours.get(token) != theirs.get(token))
        raise InputError(f"the model {other} has another vocabulary than the student {student}: {len(theirs)} tokens and {len(ours)}; {shorten(token)} is "
                         f"{shorten(theirs.get(token))} there and {shorten(ours.get(token))} here. Expected a teacher or critic with the student's tokenizer.")


def out_of_memory(error):
    """Whether an exception says that CUDA or the CPU's allocator has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error) or "not enough memory" in str(error)


def peak_memory():
    """MiB at most in use so far: by CUDA's allocator, else by the process (of which getrusage would tell its parent's, too)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2 ** 20
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20  # bytes on macOS


def load_critic(path, device, trust_remote_code=False):
    """A decoder with a value head, one number a token (App. B's critic): the model at `path` with a fresh head, every weight float32 and
    trainable. Raises InputError where there is no such model."""
    try:
        critic = AutoModelForTokenClassification.from_pretrained(path, num_labels=1, dtype=torch.float32, attn_implementation="sdpa",
                                                                 use_safetensors=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the critic {path} cannot be loaded: {' '.join(str(error).split())[:300]} Expected a decoder's folder or hub name.") from None
    critic.requires_grad_(True).to(device).eval()  # eval: no dropout before the head
    check_tree_masks(critic.base_model)
    critic.tree_masks = critic.base_model.tree_masks
    return critic


def step_values(critic, members, rows):
    """V of the state before each reasoning step of the samples, all in a row (m,): read off at the last token before it (member.steps)."""
    ids, position, mask = pad_rows(rows, critic)
    paths = [(r, path) for r, packed in enumerate(rows) for path in packed[3]]
    at = [(r, path[len(member.prefix_ids) - 1 + start]) for member, (r, path) in zip(members, paths) for start in member.steps]
    row, place = torch.tensor(np.array(at), device=critic.device).T
    return critic(ids, attention_mask=mask, position_ids=position, use_cache=False).logits[row, place, 0].float()


def pick(logits, temperature, uniform):
    """Next tokens and their log-probabilities under softmax(logits / temperature); the argmax at temperature 0.

    logits (N, V), uniform (N,) in [0, 1). Drawn by inverting the cumulative distribution at the row's own random number:
    a completion depends on its seed alone, not on who else is in the batch, on which GPU, or in which order.
    """
    logps = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token = logps.argmax(-1)
    else:
        cumulative = logps.exp().cumsum(-1, dtype=torch.float64)
        token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
        token = token.clamp(max=logits.shape[1] - 1)
    return token, logps.gather(1, token[:, None])[:, 0]


@contextmanager
def merged(model):
    """The plain model with the adapter folded into its weights and PEFT's layers out of the way, to decode with: a third faster
    than with the adapter beside them. Afterwards layers and weights are back, bit for bit.
    In bf16 folding would round, and the sampler would be another policy than the trainer: there the model is left as it is."""
    if not isinstance(model, PeftModel) or model.dtype != torch.float32:
        yield model
        return
    layers = [(parent, name, layer) for parent in model.modules() for name, layer in parent.named_children() if isinstance(layer, BaseTunerLayer)]
    kept = [layer.get_base_layer().weight.detach().clone() for _, _, layer in layers]
    model.merge_adapter()
    try:
        for parent, name, layer in layers:
            setattr(parent, name, layer.get_base_layer())
        yield model.get_base_model()
    finally:
        for parent, name, layer in layers:
            setattr(parent, name, layer)
        model.unmerge_adapter()
        for (_, _, layer), weight in zip(layers, kept):
            layer.get_base_layer().weight.data.copy_(weight)


@torch.inference_mode()
def generate(model, tokenizer, prompts, max_new_tokens, temperature=1.0, seeds=None, stop_at_blank=False,
             batch_size=256, return_logps=False):
    """Complete prompts. Lists of ids in, lists of ids out, exactly as sampled, EOS kept where it was reached.

    temperature     0 is greedy. No top-k, no top-p, no penalty, whatever the model's own generation_config says.
    seeds           one per prompt, ints or tuples of ints; default the prompt's place
    stop_at_blank   True, or one flag a prompt: end with the first blank line after some text, which is a step
    batch_size      how many completions are decoded side by side
    return_logps    return (completions, logps): the log-probability of each sampled id, at this temperature
    """
    if not all(prompts):
        raise ValueError("a prompt without tokens cannot be completed; expected at least one id")
    seeds = range(len(prompts)) if seeds is None else seeds
    stop = np.broadcast_to(stop_at_blank, len(prompts))
    completions, logps = [None] * len(prompts), [None] * len(prompts)
    training = model.training
    model.eval()
    batch, batches = [], []
    for row in shared_rows(prompts, takes_tree_masks(model)):
        for piece in (row[start:start + batch_size] for start in range(0, len(row), batch_size)):
            if sum(map(len, batch)) + len(piece) > batch_size:
                batches.append(batch)
                batch = []
            batch.append(piece)
    with merged(model) as plain:
        waiting = batches + [batch] * bool(batch)
        while waiting:
            rows = waiting.pop(0)
            members = [k for row in rows for k in row]
            uniform = np.stack([np.random.default_rng(seeds[k]).random(max_new_tokens) for k in members])
            try:
                decoded = decode_batch(plain, tokenizer, prompts, rows, uniform, stop[members], temperature)
            except RuntimeError as error:
                if not out_of_memory(error) or len(members) == 1:
                    raise
                print(f"out of memory with {len(members)} completions side by side; going on with half as many", flush=True)
                rows = rows if len(rows) > 1 else [[k] for k in members]  # a single row is cut up
                waiting[:0] = [rows[:len(rows) // 2], rows[len(rows) // 2:]]
                continue
            for k, ids, values in zip(members, *decoded):
                completions[k], logps[k] = ids, values
    model.train(training)
    return (completions, logps) if return_logps else completions


def decode_batch(model, tokenizer, prompts, rows, uniform, stop, temperature):
    """Complete the N prompts of `rows` side by side; rows that end leave the batch. uniform (N, max_new_tokens)."""
    device, (count, steps) = model.device, uniform.shape
    members = [k for row in rows for k in row]
    last = torch.tensor([prompts[k][-1] for k in members], device=device)
    position = torch.tensor([len(prompts[k]) - 1 for k in members], device=device)
    if position.max() > 0:
        cache, real = prefill(model, [prompt[:-1] for prompt in prompts], rows)
    else:
        cache, real = empty_cache(model), torch.ones(count, 0, dtype=torch.bool, device=device)
    mask = torch.cat([real, real.new_ones(count, steps)], dim=1)  # (N, T + steps)
    mask = mask[:, None, None] if takes_tree_masks(model) else mask
    uniform, stop = torch.from_numpy(uniform).to(device), torch.tensor(stop, device=device)
    is_eos = torch.isin(torch.arange(model.config.vocab_size, device=device), torch.tensor(eos_ids(model, tokenizer), device=device))
    blank, opens, closes, space = token_kinds(tokenizer, model.config.vocab_size).to(device).T if stop.any() else (None,) * 4
    ids, logps = torch.zeros(count, steps, dtype=torch.long, device=device), torch.zeros(count, steps, device=device)
    lengths = torch.full((count,), steps, device=device)
    live = torch.arange(count, device=device)
    written, over = torch.zeros(2, count, dtype=torch.bool, device=device)
    for t in range(steps):
        logits = model(last[:, None], attention_mask=mask[..., :real.shape[1] + t + 1], position_ids=position[:, None],
                       past_key_values=cache, use_cache=True).logits[:, -1]
        token, logp = pick(logits, temperature, uniform[live, t])
        ids[live, t], logps[live, t] = token, logp
        done = is_eos[token]
        if blank is not None:  # a blank line may also be split over two tokens
            written = written | ~space[token]
            done = done | stop[live] & written & (blank[token] | closes[last] & opens[token])
        lengths[live[done & ~over]] = t + 1
        last, position, over = token, position + 1, over | done
        if over.sum() * 8 >= len(live):  # an eighth of the rows are over: worth copying the others
            keep = (~over).nonzero()[:, 0]
            if not len(keep):
                break
            cache.batch_select_indices(keep)
            live, last, position, mask, written, over = (x[keep] for x in (live, last, position, mask, written, over))
    ids, logps = ids.tolist(), logps.tolist()
    return [row[:n] for row, n in zip(ids, lengths.tolist())], [row[:n] for row, n in zip(logps, lengths.tolist())]


# ---------------------------------------------------------------------------------------------------
# Whether they are right
#
# `extract_answer` finds the answer, `is_correct` compares it with the gold: as text in one spelling, then as mathematics. For that, both are read into
# a small tree of lists, tuples, intervals and equations whose leaves are numbers, computed by a parser of our own: model text is data, never code.
# Any string is graded, without an exception and in milliseconds: every loop is linear in the text, and what is longer than LONG characters, deeper
# than DEEP levels or larger than BITS bits is not computed with.
#
# What counts as equal. Rational numbers agree exactly: 0.5 is 1/2, 0.33 is not 1/3. Roots, pi and functions agree to nine digits; formulas agree in
# value at three points with positive coordinates. Tuples and intervals keep order and brackets; sets, comma lists, unions and the two values of \pm
# come in any order. Optional: units (but two that are named begin alike), money signs, degrees, the base of a number, the letter of a choice, the
# "x =" of "x = 5", and the percent sign: 25% is 25 and is 0.25.

LONG, DEEP, BITS = 400, 40, 8192

# ---- finding the answer

MARKER = re.compile(r"\\(?:boxed|fbox)\s{0,9}|#{4,}(?:[\s*]{0,9}(?:final )?answer\b[\s:*]{0,9})?|"  # the braces of {0,9} keep it linear
                    r"answers?[\s*_]{0,9}(?:(?:is|are)\b(?!\s+(?:in)?correct)|[:=])[\s:*_]{0,9}", re.IGNORECASE)
NUMBER = re.compile(r"\\[dtc]?frac\{-?[0-9]+\}\{[0-9]+\}|(?:(?<![\w)}])[-−])?\\?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?\\?%?")
MATH = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|\$(?=\S)((?:[^$\\]|\\.)+)(?<!\s)\$(?!\d)", re.DOTALL)  # "$5 or $6" is money
WORD = r"(?:(?:a )?(?!(?:and|or|pi|sqrt|sin|cos|tan|log|ln)\b)[A-Za-z]{2,})"
PROSE = re.compile(rf"\\[a-zA-Z]+ ?\{{[^{{}}]*\}}|((?:[ (]{WORD})+\b(?! ?[-+*/=]| {WORD}))")  # words outside \text{}, with no "=" or "+" to follow
VARIABLE = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])")


def extract_answer(text, strict=False):
    """The answer behind the last marker: a box, "#### 72" or "The answer is 72.". Passed over are markers with nothing behind them and boxes that
    never close (a truncated completion). Without a marker: None if strict, as in training, else the last number of the text."""
    end = len(text)
    for marker in reversed(list(MARKER.finditer(text))[-30:]):  # thirty empty markers, and there is no answer
        answer = in_box(text, marker.end(), end) if marker[0][0] == "\\" else in_sentence(text[marker.end():end])
        if answer:
            return answer
        end = marker.start()  # a box that reaches an unclosed one is unclosed itself, so no character is read twice
    last = -1 if strict else max(map(text.rfind, "0123456789"))
    return tidy(NUMBER.findall(text[max(0, last - LONG):last + 9])[-1]) if last >= 0 else None


def in_box(text, start, end):
    """What stands between the brace at `start` and its partner, "" without one; of \\boxed 5 the 5."""
    if text[start:start + 1] != "{":
        return tidy(re.compile(r"[^\s{}$]*").match(text, start, end)[0])
    depth = 0
    for brace in islice(re.compile(r"\\[\\{}]|[{}]").finditer(text, start, end), 1000):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)  # \{ and \} do not nest
        if depth == 0:
            return tidy(text[start + 1:brace.start()])
    return ""


def in_sentence(text):
    """The answer with which a text begins: "36 + 36 = $72 dollars, because ..." -> 72."""
    first = (text.split(maxsplit=1) or [""])[0]
    if len(first) > LONG:
        return first
    text = MATH.sub(lambda m: " ".join(m[m.lastindex].split()), text.lstrip()[:LONG].replace("**", ""))
    line = " ".join(re.split(r"\n|(?<!\\)[.!?](?:\s|$)", text)[0].split())
    line = re.sub(r"\b(?:negative|minus) (?=[\d\\$])", "-", line)
    line = re.sub(r"(?<=\d) ?[xX] ?(?=[$\d])", " * ", line)
    line = re.sub(r"^(?:(?:[a-z]{2,}|a) )+(?=[-(\\$]*\d|\\|\([A-Z]\))", "", line)  # "equal to 5"
    if re.match(r"[A-Za-z]{2,}(?: [^=]*)?$", line):  # "Janet makes $18 a day", or words alone: "east, since ..."
        numbers = NUMBER.findall(line) if re.search(r"\b[a-z]{2}", line) else []
        return tidy(numbers[-1] if numbers else re.split(r"[,;] | (?:because|since|as) ", line)[0])
    prose = next((m for m in PROSE.finditer(line) if m[1]), None)
    line = line[:prose.start()] if prose else line
    left, _, right = line.rpartition("=")
    is_value = not VARIABLE.search(right) and (len(left.strip()) == 1 or not VARIABLE.search(left))  # else the equation is the answer
    return tidy(right if is_value else line)


def tidy(answer):
    """Without what surrounds it; a plain number also without its money sign and thousands separators."""
    answer = answer.strip().rstrip(" .,;:\\")
    if len(answer) > LONG:
        return answer
    while answer.endswith("}") and answer.count("{") < answer.count("}"):  # \boxed{The answer is 5}
        answer = answer[:-1].rstrip(" .,;:\\")
    plain = re.sub(r"\\?\$|(?<=\d),(?=\d{3}(?!\d))", "", answer).replace("−", "-")
    return plain if re.fullmatch(r"-?\d*\.?\d+", plain) else answer


# ---- comparing two answers

def is_correct(completion, answer, strict=False):
    """Does the completion end in the gold `answer`? The gold may be a bare answer or a whole solution that ends in one."""
    found, gold = extract_answer(completion, strict), str(answer)
    return found is not None and equal(extract_answer(gold, strict=True) or gold, found)


def equal(gold, answer):
    """Are two answers the same, as text or as mathematics?"""
    gold, answer = normalise(gold), normalise(answer)
    if not gold or gold == answer or max(len(gold), len(answer)) > LONG:
        return gold == answer != ""
    words, others = (re.sub(r"[\s().']", "", text).casefold() for text in (gold, answer))
    if words.isalpha() and words == others:
        return True
    choice = CHOICE.fullmatch(answer)
    if choice and not CHOICE.fullmatch(gold):  # "(C) 12" for the gold C, or for the gold 12
        answer = choice[1] if re.fullmatch(r"\(?[A-H]\)?", gold) else choice[2]
    units = [UNIT.search(gold), UNIT.search(answer)]
    if all(units) and units[0][1] != units[1][1]:
        return False
    gold, answer = UNIT.sub("", gold), UNIT.sub("", answer)
    if bool(BASE.search(gold)) != bool(BASE.search(answer)):
        gold, answer = BASE.sub("", gold), BASE.sub("", answer)
    percents = ("", "/100") if ("%" in gold) != ("%" in answer) else ("",)
    try:
        return any(same(read(tokenise(gold.replace("%", p))), read(tokenise(answer.replace("%", p)))) for p in percents)
    except OverflowError:  # an exact number too large to compare with a float
        return False


FUNCTIONS = {"sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "cot": lambda z: 1 / cmath.tan(z), "sec": lambda z: 1 / cmath.cos(z),
             "csc": lambda z: 1 / cmath.sin(z), "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan, "exp": cmath.exp,
             "ln": cmath.log, "log": cmath.log10}
CONSTANTS = {"pi": cmath.pi, "e": cmath.e, "i": 1j}
NAMES = "|".join(FUNCTIONS) + "|sqrt|pi"
SYNONYMS = {old: new for new, olds in {
    "": r"$ \$ £ € ¢ \( \) \[ \] \displaystyle", "-": "− – — ‐ ‑", "*": r"\cdot \times \ast × · ⋅", "/": r"\div ÷ \over", ":": r"\colon",
    "=": r"\approx ≈", "|": r"\vert \lvert \rvert", "(": r"\langle", ")": r"\rangle", r"\{": r"\lbrace", r"\}": r"\rbrace", "<": r"\lt", ">": r"\gt",
    "<=": r"\le \leq \leqslant ≤", ">=": r"\ge \geq \geqslant ≥", r"\pm": "±", r"\cup": "∪", r"\frac": r"\dfrac \tfrac \cfrac", r"\pi": "π pi",
    r"\sqrt": "√ sqrt", r"\infty": "∞ infinity Infinity", r"\neq": r"\ne ≠", r"\emptyset": r"\varnothing ∅", r"\theta": "θ",
}.items() for old in olds.split()}
RULES = [(re.compile(pattern), replacement) for pattern, replacement in (
    # a matrix becomes a tuple of rows in brackets; a row of one entry is that entry, so a column is a plain tuple
    (r"\\begin\{(?:[bpB]?matrix|array)\}(?:\{[lcr|]*\})?", "(["), (r"(?:\\\\\s*)?\\end\{(?:[bpB]?matrix|array)\}", "])"),
    (r"\\\\", "],["), ("&", ","),
    (r"\\!\s*|\{(?=,\})|(?<=\{,)\}|(?<=\d)\\,(?=\d{3})", ""),  # 10,\!080 10{,}080 10\,080
    (r"\\[,;: ]|~|\\q?quad(?![a-z])", " "),
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])", ""),
    *2 * ((r"\\(?:text\w*|math[a-z]+|[mh]box|operatorname|boxed)\s*\{([^{}]*)\}", r" \1 "),),  # twice, for they nest
    (r"\\(?:text\w*|math[a-z]+|boldsymbol|boxed)(?=\s*\{)", ""),
    (r"\^?\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z])|\\degree|°)", " "),
    (r"(?<=[\d)}])\s*(?:\\approx|≈).*", ""),  # 1/3 \approx 0.33
    (r"\\\{\s*\\\}", r"\\emptyset "), (r"²", "^2"), (r"³", "^3"), (r"\*\*", "^"), (r"\\%|\bpercent\b", "%"),
    (r"\b([ap])\.m\b\.?", r"\1m"), (r"(?<=\d)(?=[A-Za-z]{4,}|[ckm]m\b)", " "),  # 10 a.m. 12inches
    (r",?\s+(?:and|or)\s+", ", "), (r"^\s*[a-zA-Z]\s*(?:\\in(?![a-z])|∈)", ""),  # x \in [0, 1]
    (r"\s*_\s*\{\s*\(?(\w+)\)?\s*\}", r"_\1"), (r"^\s*\((\w+)\)(?=_)", r"\1"),  # (52)_{8}
    (r"\\[dtc]?frac\s*(\d)", r"\\frac{\1}"), (r"(\\[dtc]?frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),  # \frac43
    (r"(?<![\w.^])(\d+)\s*\\[dtc]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(?<![\w.])(\d+)\s+(\d+)\s*/\s*(\d+)",
     r"(\1\4+\2\5/\3\6)"),  # 1\frac{3}{4} and 1 3/4
    (r"(\d)[eE]([-+]?\d)", r"\1*10^\2"),
    (r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}", lambda m: "((%s%s%s-0%s%s)/%s%s)" % (*m.groups(), m[1], m[2], "9" * len(m[3]), "0" * len(m[2]))),
)]
UNIT = re.compile(rf"(?<=[\d)}}\]i]) (?:(?:square|sq|cubic)\.? )*(?!(?:{NAMES})\b)"  # after a number: " cm^2", " square inches", " miles per hour"
                  r"(?=[A-Za-z]{3}|(?:[cmk]?m|[km]?g|in|ft|lb|oz|mi|yd|hr|[ap]m|[shLCF])\b)([A-Za-z])(?:[A-Za-z ./]|\^\{?[23]\}?)*(?=$|[,)\]\\])")
CHOICE = re.compile(r"\(([A-H])\) (.+)")  # (C) 12
BASE = re.compile(r"(?<=\w)_\d+$")  # 4210_5
TOKEN = re.compile(rf"\d+(?:\.\d*)?|\.\d+|\\[a-zA-Z]+|\\.|<=|>=|\b[A-Za-z]{{4,}}|{NAMES}|[A-Z]{{2,}}|[A-Za-z]_\w|\S")  # AB is one name, xy is x times y


def normalise(answer):
    """One spelling for the many of LaTeX and plain text."""
    if len(answer) <= LONG:
        for pattern, replacement in RULES:
            answer = pattern.sub(replacement, answer)
        if not re.search(r"[(\[]|\\\{", answer):  # 1,250 is a number, (1,250) a pair
            answer = re.sub(r"(?<=\d)[, ](?=\d{3}(?!\d))", "", answer)
    return " ".join(answer.split()).rstrip(" .,;:")


def tokenise(answer):
    return [token for token in (SYNONYMS.get(token, token) for token in TOKEN.findall(answer)) if token]


# ---- reading: tokens -> tree

OPEN, CLOSE = ("(", "[", "{", r"\{"), (")", "]", "}", r"\}")


def split(tokens, separators):
    """The parts between separators outside all brackets, those separators, and whether one pair of brackets holds everything."""
    parts, found, depth, closed = [[]], [], 0, 0
    for token in tokens:
        depth += (token in OPEN) - (token in CLOSE)
        closed += depth == 0 and token in CLOSE
        if depth == 0 and token in separators:
            found.append(token)
            parts.append([])
        else:
            parts[-1].append(token)
    return parts, found, closed == 1 and tokens[0] in OPEN and tokens[-1] in CLOSE


def read(tokens, depth=0):
    """An answer as a tree: ("any", trees) in any order, ("(]", trees) in this one, ("value", numbers), ("text", string), or see relation."""
    if depth > DEEP:
        return "text", "".join(tokens)
    parts, commas, bracketed = split(tokens, (",", r"\cup"))
    if not commas and (r"\pm" in tokens or r"\mp" in tokens) and tokens[0] != r"\{":
        parts = [[{r"\pm": plus, r"\mp": minus}.get(token, token) for token in tokens] for plus, minus in ("+-", "-+")]
    if len(parts) > 1:
        trees = [read(part, depth + 1) for part in parts if part]
        return "any", [leaf for tree in trees for leaf in (tree[1] if tree[0] == "any" else [tree])]
    sides, signs, _ = split(tokens, ("=", "<", ">", "<=", ">="))
    if signs:
        return relation(sides, signs, depth + 1)
    if bracketed:
        items, commas, _ = split(tokens[1:-1], (",",))
        is_ordered = commas and tokens[0] in "(["
        return (tokens[0] + tokens[-1], [read(item, depth + 1) for item in items]) if is_ordered else read(tokens[1:-1], depth + 1)
    return leaf(tokens)


def leaf(tokens):
    try:
        return "value", [compute(tokens, point) for point in range(3)]
    except (ValueError, ArithmeticError):
        return "text", "".join(token for token in tokens if token not in "{}").casefold()


def is_name(tokens):
    """x, x_1, f(x), Area"""
    return re.fullmatch(r"\\?[A-Za-z]+(_\w)?(\([a-z]\))?", "".join(tokens)) is not None


def relation(sides, signs, depth):
    """An equation as ("=", left - right up to a factor, right, is left a mere name). An inequality in a mere name as the interval it is."""
    named = [is_name(side) for side in sides]
    if set(signs) == {"="}:
        left, right = (-1, 0) if named[-1] and not named[0] else (0, -1)  # 5 = x
        kind, difference = leaf([*sides[left], "-", "(", *sides[right], ")"])
        if kind == "value" and difference[0]:
            difference = [number / difference[0] for number in difference]
        return "=", (kind, difference), read(sides[right], depth), named[left]
    if set(signs) <= {">", ">="}:
        return relation(sides[::-1], [sign.replace(">", "<") for sign in signs[::-1]], depth)
    if len(sides) == 2 and any(named):  # x < 3 is -oo < x < 3
        sides, signs = ([["-", r"\infty"], *sides], ["<", *signs]) if named[0] else ([*sides, [r"\infty"]], [*signs, "<"])
    trees = [read(side, depth) for side in sides]
    if len(sides) == 3 and is_name(sides[1]):
        return {"<": "("}.get(signs[0], "[") + {"<": ")"}.get(signs[1], "]"), [trees[0], trees[2]]
    return " ".join(signs), trees


def same(gold, answer):
    """Are two trees equal? An equation is also its right side, but a gold equation only where its left side is a name, as in x = 5."""
    if "any" in (gold[0], answer[0]):
        a, b = (tree[1] if tree[0] == "any" else [tree] for tree in (gold, answer))
        return all(any(same(x, y) for y in b) for x in a) and all(any(same(x, y) for x in a) for y in b)
    if gold[0] == "=" != answer[0]:
        return gold[3] and same(gold[2], answer)
    if answer[0] == "=" != gold[0]:
        return same(gold, answer[2])
    kind, a, b = gold[0], gold[1], answer[1]
    if kind != answer[0] or kind == "text":
        return kind == answer[0] and a == b
    if kind == "=":
        return same(a, b)
    if kind == "value":
        return all(x == y if type(x) is type(y) is Fraction else cmath.isclose(x, y, rel_tol=1e-9, abs_tol=1e-12) for x, y in zip(a, b))
    return len(a) == len(b) and all(map(same, a, b))


# ---- computing: tokens -> number

def power(base, exponent):
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length()) <= BITS:
            return base ** int(exponent)
    return complex(base) ** complex(exponent)


# how tightly an operator binds what stands to its left and to its right; 3 is multiplication without a sign, 4 a leading minus, 9 a single operand
OPERATORS = {"+": (1, 1, operator.add), "-": (1, 1, operator.sub), "*": (2, 3, operator.mul), "/": (2, 3, operator.truediv), "^": (6, 5, power)}


def compute(tokens, point):
    """The value of an expression at one of three points: a Fraction while exact, else a complex float. ValueError or ArithmeticError where there is
    none. `operand(level)` reads on while operators bind tighter than its level, so that sin 2x is sin(2x), yet 1/2x is (1/2)x."""
    rest = ["", *reversed(tokens)]

    def skip(token):
        return rest[-1] == token and bool(rest.pop())

    def group(close, depth):
        value = operand(0, depth)
        if rest.pop() != close:
            raise ValueError("unbalanced, or no expression")
        return value

    def operand(level, depth):
        if depth > DEEP:
            raise ValueError("too deep")
        token, depth = rest.pop(), depth + 1
        name = token.lstrip("\\")
        if token in ("+", "-"):
            value = operand(4, depth) * (-1 if token == "-" else 1)
        elif token[:1].isdigit() or token[:1] == ".":
            value = Fraction(token)
        elif token in OPEN:
            value = group(CLOSE[OPEN.index(token)], depth)
        elif token == "|":
            value = abs(group("|", depth))
        elif token == r"\frac":
            value = operand(9, depth) / operand(9, depth)
        elif token == r"\sqrt":
            degree = group("]", depth) if skip("[") else 2
            value = power(operand(9, depth), Fraction(1) / degree)
        elif name in FUNCTIONS:
            base = operand(9, depth) if skip("_") else 10
            exponent = operand(9, depth) if skip("^") else Fraction(1)
            value = FUNCTIONS[name](complex(operand(9 if rest[-1] in OPEN else 2, depth))) / cmath.log10(complex(base))
            value = power(value, exponent)
        elif name in CONSTANTS:
            value = CONSTANTS[name]
        elif name[:1].isalpha():
            value = Fraction(crc32(f"{name} {point}".encode()) % 1999 + 1, 64)
        else:
            raise ValueError("no expression")
        while True:
            if not isinstance(value, Fraction) and not cmath.isfinite(value):
                raise ValueError("too large")
            if isinstance(value, Fraction) and max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS:
                value = complex(value)
            sign, name = rest[-1], rest[-1].lstrip("\\")
            unsigned = (2 if name in FUNCTIONS else 3, 3, operator.mul) if sign in OPEN or name[:1].isalpha() else (0, 0, None)
            left, right, function = OPERATORS.get(sign, unsigned)
            if skip("!"):
                if value not in range(171):
                    raise ValueError("no factorial, or too large")
                value = Fraction(math.factorial(int(value)))
            elif left <= level:
                return value
            else:
                sign in OPERATORS and rest.pop()
                value = function(value, operand(right, depth))

    return group("", 0)


# ---------------------------------------------------------------------------------------------------
# Its score

def score(model, tokenizer, problems, max_new_tokens=512, samples=0, temperature=1.0, seed=0, batch_size=256):
    """Complete every problem greedily and `samples` times at `temperature`; one row a problem, in order.

    A row has the problem's fields, then one entry a completion, the greedy one first: completions (text), extracted,
    correct (strict, as training grades), flexible (the last number where no answer is marked), truncated, tokens.
    """
    eos = eos_ids(model, tokenizer)
    prompts = [encode(tokenizer, problem["question"])[0] for problem in problems]
    greedy = generate(model, tokenizer, prompts, max_new_tokens, 0, batch_size=batch_size)
    seeds = [(seed, crc32(problem["id"].encode()), j) for problem in problems for j in range(samples)]
    sampled = generate(model, tokenizer, [prompt for prompt in prompts for _ in range(samples)], max_new_tokens,
                       temperature, seeds, batch_size=batch_size)
    rows = []
    for k, problem in enumerate(problems):
        completions = [greedy[k], *sampled[k * samples:(k + 1) * samples]]
        texts = [decode(tokenizer, completion) for completion in completions]
        rows.append({**problem, "completions": texts, "extracted": [extract_answer(text) for text in texts],
                     "correct": [is_correct(text, problem["answer"], strict=True) for text in texts],
                     "flexible": [is_correct(text, problem["answer"]) for text in texts],
                     "truncated": [completion[-1] not in eos for completion in completions],
                     "tokens": [len(completion) for completion in completions]})
    return rows


def wilson(successes, n):
    """95 % interval of a share (Wilson 1927): honest at 0, at n and for few problems."""
    z, p = 1.96, successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def normal(values):
    """Mean and 95 % interval of one figure a problem, the problems being the sample."""
    half = 1.96 * np.std(values, ddof=len(values) > 1) / math.sqrt(len(values))
    return np.mean(values), (np.mean(values) - half, np.mean(values) + half)


def summarise(rows):
    """The figures of a scored data set, as shares: name -> (value, 95 % interval or None)."""
    n, k = len(rows), len(rows[0]["correct"]) - 1
    greedy, flexible = (sum(row[name][0] for row in rows) for name in ("correct", "flexible"))
    figures = {"greedy": (greedy / n, wilson(greedy, n)), "flexible": (flexible / n, wilson(flexible, n))}
    if k:
        figures[f"mean@{k}"] = normal([np.mean(row["correct"][1:]) for row in rows])
        majority, best = 0, 0
        for row in rows:
            votes = Counter(answer for answer in row["extracted"][1:] if answer is not None).most_common(1)
            majority += bool(votes) and row["correct"][1:][row["extracted"][1:].index(votes[0][0])]
            best += any(row["correct"][1:])
        figures |= {f"maj@{k}": (majority / n, wilson(majority, n)), f"pass@{k}": (best / n, wilson(best, n))}
    figures["truncated"] = np.mean([any(row["truncated"]) for row in rows]), None
    return figures


def table(rows):
    """summarise(rows) as text, then greedy accuracy by the number of steps or the level where the data has it."""
    lines = [f"{len(rows)} problems, {np.mean([t for row in rows for t in row['tokens']]):.0f} tokens a completion"]
    for name, (value, interval) in summarise(rows).items():
        lines.append(f"{name:>10}  {100 * value:5.1f} %" + (f"   95 % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""))
    for key in ("steps", "level", "subject"):
        parts = {}
        for row in rows:
            if key in row:
                parts.setdefault(row[key], []).append(row["correct"][0])
        for part in sorted(parts, key=str):
            lines.append(f"{key:>10} {printable(str(part))}: {100 * np.mean(parts[part]):5.1f} % of {len(parts[part])}")
    return "\n".join(lines)


def compare(first, second):
    """Two runs on the same problems, paired: text with the difference, its 95 % interval and McNemar's exact test."""
    second = {row["id"]: row for row in second}
    pairs = [(row["correct"], second[row["id"]]["correct"]) for row in first if row["id"] in second]
    if not pairs:
        raise InputError("the two files have no problem in common. Expected two scorings of one data set.")
    lines = [f"{len(pairs)} problems in both"]
    for name, figure in (("greedy", lambda correct: correct[0]), ("mean@k", lambda correct: np.mean(correct[1:]) if correct[1:] else np.nan)):
        a, b = (np.array([figure(pair[side]) for pair in pairs], float) for side in (0, 1))
        if np.isnan(a - b).any():
            continue
        difference, (low, high) = normal(b - a)
        wins, losses = int((b > a).sum()), int((b < a).sum())
        tail = sum(math.comb(wins + losses, j) for j in range(min(wins, losses) + 1))
        p = min(1.0, 2 * tail / 2 ** (wins + losses))
        lines.append(f"{name:>8}  {100 * a.mean():.1f} % -> {100 * b.mean():.1f} %, difference {100 * difference:+.1f} points, 95 % "
                     f"[{100 * low:+.1f}, {100 * high:+.1f}]; {wins} better, {losses} worse, exact sign test p = {p:.2g}")
    return "\n".join(lines)


def read_scores(path):
    """The rows of a file of scores, by id."""
    def parse(row, number):
        take(row, "id", str, "the problem's id")
        for name, kind in (("correct", bool), ("flexible", bool), ("truncated", bool), ("tokens", int), ("extracted", (str, type(None)))):
            column = take(row, name, list, "a list, one entry a completion")
            if not len(column) == len(row["correct"]) > 0 or not all(isinstance(entry, kind) for entry in column):
                raise InputError(f"field \"{name}\" is {shorten(column)}; expected one entry a completion, as evaluate.py writes them.")
        return row
    return {row["id"]: row for row in read_jsonl(path, parse)}


def main():
    parser = arguments("Score a policy on a data set, or compare two scorings.")
    parser.add_argument("--model", default="data/arithmetic/student", help="a folder or a hub name")
    parser.add_argument("--adapter", help="a PEFT adapter, such as a run folder of train.py")
    parser.add_argument("--data", default="data/arithmetic/test.jsonl", help="problems, JSONL")
    parser.add_argument("--out", help="JSONL of every completion; default out/eval-POLICY-DATA.jsonl; one that is there is continued")
    parser.add_argument("--samples", type=at_least(0), default=0, help="completions a problem beside the greedy one, for mean@k, maj@k and pass@k")
    parser.add_argument("--temperature", type=at_least(0, float), default=1.0, help="of those samples")
    parser.add_argument("--max_new_tokens", type=at_least(1), default=512, help="limit of a completion; MATH wants 2048")
    parser.add_argument("--batch_size", type=at_least(1), default=128, help="completions decoded side by side")
    parser.add_argument("--limit", type=at_least(0), default=0, help="score the first so many problems, 0 is all")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the samples")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="test two JSONL files of scores on the same problems, and do nothing else")
    parser.add_argument("--skip_bad", action="store_true", help="name and skip bad lines of --data instead of stopping")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the model's own code from the hub")
    args = parser.parse_args()
    if args.compare:
        return print(compare(*(list(read_scores(path).values()) for path in args.compare)))
    if int(os.environ.get("RANK", 0)):
        return  # with torchrun the first process scores, alone
    problems = read_problems(args.data, args.limit, args.skip_bad)
    stem = os.path.splitext(os.path.basename(args.data))[0]
    path = args.out or f"out/eval-{os.path.basename((args.adapter or args.model).rstrip('/'))}-{stem}.jsonl"
    policy = f"{args.model} {args.adapter} T={args.temperature} k={args.samples} max={args.max_new_tokens} seed={args.seed}"
    drop_torn_line(path)
    done = read_scores(path) if os.path.getsize(path) else {}
    if any(row.get("policy") != policy for row in done.values()):
        raise InputError(f"{path} holds scores of another policy or other settings, {shorten(next(iter(done.values())).get('policy'))}, "
                         f"not of {shorten(policy)}. Choose another --out or remove the file.")
    for problem in problems:
        if problem["id"] in done and any(done[problem["id"]].get(key) != problem[key] for key in ("question", "answer")):
            raise InputError(f"{path} holds the score of another problem with the id {shorten(problem['id'])}. Choose another --out or remove the file.")
    _, _, device = distributed()
    model, tokenizer = load(args.model, args.adapter, device, trust_remote_code=args.trust_remote_code)
    problems = fitting(model, tokenizer, problems, args.skip_bad)
    todo = [problem for problem in problems if problem["id"] not in done]
    with open(path, "a", encoding="utf-8") as out, tqdm(total=len(problems), initial=len(problems) - len(todo), unit="problem") as bar:
        for start in range(0, len(todo), args.batch_size):
            rows = score(model, tokenizer, todo[start:start + args.batch_size], args.max_new_tokens, args.samples, args.temperature,
                         args.seed, args.batch_size)
            out.writelines(json.dumps({**row, "policy": policy}, ensure_ascii=False) + "\n" for row in rows)
            out.flush()
            done |= {row["id"]: row for row in rows}
            bar.update(len(rows))
            bar.set_postfix(greedy=f"{100 * np.mean([row['correct'][0] for row in done.values()]):.1f} %")
    print(table([done[problem["id"]] for problem in problems]) + f"\nevery completion is in {path}")


if __name__ == "__main__":
    run_command(main)
