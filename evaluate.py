"""
A policy: load it, write its prompts, sample its completions, and score it on a data set.

What differs from `model.generate`:
1. Prompts of one tree share most of their tokens: each shared token is prefilled once.
2. Each completion has random numbers of its own: it depends on its seed, not on its neighbours.
3. Completions are lists of the ids that were sampled, end token kept: they are trained on as they
   are. All sampling knobs are set; of the model's own generation_config only the end ids are read.

    python evaluate.py --model Qwen/Qwen2.5-1.5B-Instruct --adapter out/gsm8k \
        --data data/gsm8k/test.jsonl --samples 8
    torchrun --nproc_per_node 8 evaluate.py ...                    # each rank scores its share
    python evaluate.py --compare out/before.jsonl out/after.jsonl  # the same problems, paired
"""
import json
import math
import os
import re
import signal
import sys
import warnings
from collections import deque
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache, partial
from itertools import chain, islice
from typing import NamedTuple
from weakref import WeakKeyDictionary
from zlib import crc32

PARENT = os.getppid()  # before torch is imported, which takes seconds; see `distributed`

import numpy as np
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from scipy.stats import binomtest
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm
from transformers import (AttentionInterface, AttentionMaskInterface, AutoConfig,
                          AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer,
                          DynamicCache)
from transformers.cache_utils import Cache, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from data.grade import equal, extract_answer, is_correct, is_solved
from tree import (BLANK_LINE, JOIN, InputError, append_jsonl, arguments, at_least, continue_jsonl,
                  get_field, lock, pack, printable, read_jsonl, read_problems, rng, run_command,
                  shorten)

logging.set_verbosity_error()
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch")

INSTRUCTION = ("Solve the problem step by step. Separate the steps by blank lines. "
               "End with \"The answer is \\boxed{...}.\"")
FIXED_DATE = "{% macro strftime_now(format) %}01 Jan 2025{% endmacro %}{{ '' }}"
ROOM = 16  # spare columns of a cache that may grow
EIGHTH = 8  # completions begin, and empty rows go, once they are an eighth of the rows
COMPILE = None  # True: --compile. False: --no_compile. None: a graph on CUDA, plain on a CPU
COMPILER = dict(backend="inductor")  # of torch.compile


# ---- Ranks ---------------------------------------------------------------------------------------
def distributed():
    """(rank, world size, device) of this process, which joins the others of its torchrun."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        import ctypes  # a rank must not train on when torchrun itself is killed
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != PARENT:
            sys.exit("torchrun has ended while its ranks were starting")
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=7))  # a slow rank is waited for
    return rank, world, device


def say(sentence):
    """Print a sentence once, however many ranks there are."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(sentence, flush=True)


def gather(item):
    """The list of every rank's item, on every rank."""
    if not dist.is_initialized():
        return [item]
    items = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(items, item)
    except RuntimeError as error:  # such as a closed connection
        raise InputError("another rank has ended, whose error is the one to look at; here: "
                         f"{shorten(str(error), 200)}") from None
    return items


# ---- Loading -------------------------------------------------------------------------------------
def add_device_flags(add):
    """The flags that say how a model is computed. `add` is a parser's add_argument."""
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of the weights; auto: bfloat16 for 20 million weights or more, where it is fast")
    add("--compile", action="store_true", default=None, help="compile decoding with torch.compile; "
        "by default its kernels are recorded as a graph on CUDA")
    add("--no_compile", dest="compile", action="store_false", default=None,
        help="decode step by step: no graph, no torch.compile")


def is_small(model):
    """Fewer than 20 million weights: neither bf16 nor a second thread gains anything."""
    return model.num_parameters() < 2e7


def choose_dtype(auto_class, path, device):
    """bf16 where the device is faster with it, unless the model is small, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # with AVX512-BF16 alone products take twice as long as in float32
        fast = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    if not fast:
        return torch.float32
    with torch.device("meta"):
        model = auto_class.from_config(AutoConfig.from_pretrained(path))
    return torch.float32 if is_small(model) else torch.bfloat16


def load(model, adapter=None, device="cpu", dtype="auto", trainable=False):
    """A causal language model and its tokenizer, with a PEFT adapter on it if one is named.

    model      a folder that save_pretrained wrote, or a name on the hub; safetensors alone are read
    dtype      "auto" (see choose_dtype), "float32" or "bfloat16"; an adapter is float32
    trainable  whether the adapter is to be trained further
    Raises InputError where there is no such model, or one whose attention cannot be packed.
    """
    device = torch.device(device)
    policy = load_weights(AutoModelForCausalLM, model, dtype, device)
    tokenizer = load_tokenizer(model, adapter)
    if len(tokenizer) > policy.get_input_embeddings().num_embeddings:
        raise InputError(f"{model} embeds fewer tokens than the {len(tokenizer)} of its tokenizer")
    if device.type == "cpu" and is_small(policy) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a second thread gains nothing on so small a model
    policy.to(device).eval()
    check_tree_masks(policy, model)
    if adapter:
        policy = load_adapter(policy, model, adapter, trainable).to(device).eval()
        multiply_in_bf16(policy)
    if not all(weight.isfinite().all() for weight in policy.parameters()):
        raise InputError(f"{adapter or model} has weights that are not finite numbers; expected a "
                         "model that has not diverged")
    return policy, tokenizer


def load_weights(auto_class, path, dtype, device, new_weights=(), **how):
    """`auto_class.from_pretrained(path)`; InputError unless every weight comes from its files, but
    for `new_weights`, such as a fresh value head's. The dtype is chosen for `device`; the model is
    still on the CPU."""
    is_folder = path.startswith((".", "/")) or path.count("/") > 1  # a hub name has one
    if is_folder and not os.path.isdir(path):
        raise InputError(f"there is no folder {path}; expected one of a model, or a hub name")
    try:
        dtype = choose_dtype(auto_class, path, device) if dtype == "auto" else getattr(torch, dtype)
        read = partial(auto_class.from_pretrained, path, dtype=dtype, use_safetensors=True,
                       output_loading_info=True, ignore_mismatched_sizes=True, **how)
        try:
            model, report = read(attn_implementation="sdpa")
            model.set_attn_implementation("grouped")
        except ValueError:  # some families have no such attention
            model, report = read(attn_implementation="eager")
        missing = {str(key) for key in [*report["missing_keys"], *report["mismatched_keys"]]}
        if missing - set(new_weights):
            raise ValueError(f"the weights {sorted(missing)[:3]} are missing or of another shape")
    except Exception as error:  # damaged files raise whatever their readers happen to
        raise unusable(f"the model {path}", error, "a folder with config.json and "
                       "model.safetensors, or a hub name and a network") from None
    return model


def unusable(what, error, expected):
    """An InputError that says in one sentence why a library could not read something."""
    reason = " ".join(str(error).split())[:300]
    kind = type(error).__name__
    return InputError(f"{what} cannot be used ({kind}): {reason}; expected {expected}")


def load_tokenizer(model, adapter=None):
    """The tokenizer of the adapter's folder if it brings one, else the model's. InputError."""
    own = adapter and os.path.exists(os.path.join(adapter, "tokenizer_config.json"))
    path = adapter if own else model
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        if tokenizer.eos_token_id is None:
            raise ValueError("it has no end-of-sequence token (eos_token), so nothing ever ends")
        prompt, *steps = encode(tokenizer, "1 + 1", ["12 + 7 = 19", "The answer is 19."])
        text = tokenizer.decode(steps[0] + steps[1])
        known = tokenizer.unk_token_id not in steps[0] + steps[1]
        if known and text != "12 + 7 = 19\n\nThe answer is 19.\n\n":
            raise ValueError(f"it turns the steps of a prefix into {shorten(text)}")
    except Exception as error:  # also a chat template that fails
        raise unusable(f"the tokenizer of {path}", error, "one that gives text back") from None
    return tokenizer


def load_adapter(policy, model, adapter, trainable):
    """The policy with a PEFT adapter on it. InputError where they do not fit."""
    try:
        in_file = set(load_peft_weights(adapter, device="cpu"))
        with warnings.catch_warnings():  # peft only warns of weights without a place in the model
            warnings.simplefilter("ignore")
            policy = PeftModel.from_pretrained(policy, adapter, is_trainable=trainable)
        if policy.peft_config["default"].is_prompt_learning:
            raise ValueError("it adds to the prompt instead of changing weights.")
        in_model = set(get_peft_model_state_dict(policy, save_embedding_layers=False))
        strays = in_model - in_file
        strays |= {name for name in in_file - in_model if ".lora_" in name}
        if strays:
            raise ValueError(f"the weights {sorted(strays)[:3]} are in one of the two alone.")
    except Exception as error:
        raise unusable(f"the adapter {adapter} on {model}", error, "a folder that is there, such "
                       "as train.py writes, or a hub name, and its own base model") from None
    return policy


def multiply_in_bf16(policy):
    """On a bf16 base, multiply LoRA's float32 weights in bf16, too: autocast."""
    if policy.dtype != torch.bfloat16:
        return
    for module in policy.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False
    # every call of the policy goes through this from here on
    policy.forward = torch.autocast(policy.device.type, torch.bfloat16)(policy.forward)


@torch.no_grad()
def checksum(model):
    """crc32 of all weights of a model, as text."""
    total = 0
    for name, weight in sorted(model.state_dict().items()):
        total = crc32(name.encode(), total)
        total = crc32(weight.contiguous().flatten().view(torch.uint8).cpu().numpy(), total)
    return f"{total:08x}"


def load_critic(path, device):
    """A decoder with a fresh value head, one number a token (App. B), in float32, to be trained."""
    critic = load_weights(AutoModelForTokenClassification, path, "float32", device,
                          new_weights=("score.weight", "score.bias"), num_labels=1)
    if not all(weight.isfinite().all() for weight in critic.parameters()):
        raise InputError(f"{path} has weights that are not finite numbers; expected a critic that "
                         "has not diverged")
    critic.requires_grad_(True).to(device).eval()  # eval: no dropout before the head
    check_tree_masks(critic.base_model, path)
    return critic


def check_vocabulary(other, student):
    """InputError where two models read other tokens: their log-probs could not be compared."""
    if load_tokenizer(other).get_vocab() != load_tokenizer(student).get_vocab():
        raise InputError(f"{other} has another vocabulary than {student}; expected a teacher or "
                         "critic with the student's tokenizer")


# ---- Prompts -------------------------------------------------------------------------------------
def add_prompt_flags(add):
    """The flags that say how a question becomes a prompt. `add` is a parser's add_argument."""
    add("--instruction", metavar="TEXT", help="stands behind each question, in scoring as in "
        "training; by default a built-in sentence with a chat template, nothing without")
    add("--chat_template_kwargs", type=json_object, default={}, metavar="JSON",
        help="for the chat template, such as '{\"enable_thinking\": false}'")


def json_object(text):
    """A type for argparse."""
    return dict(json.loads(text))


def encoder(tokenizer, args):
    """encode(question, steps) with the prompt flags of a command line."""
    return partial(encode, tokenizer, instruction=args.instruction,
                   template_kwargs=args.chat_template_kwargs)


def encode(tokenizer, question, steps=(), instruction=None, template_kwargs=None):
    """[ids of the prompt, ids of each step]: joined, a prefix that opens the assistant's turn.

    To try another prompt format, change this function, with a chat template and without. The prompt
    must end where a step can begin; `turn_end` says what closes a whole solution.
    """
    if instruction is None and tokenizer.chat_template:
        instruction = INSTRUCTION
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:  # "<|im_end|>" in a question is text, not the end of a turn
            spaced = token.content[:1] + " " + token.content[1:]
            question = question.replace(token.content, spaced)
    if instruction:
        question = question + JOIN + instruction
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": question}]
        text = render(tokenizer, turns, add_generation_prompt=True, **(template_kwargs or {}))
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template places BOS
    else:
        prompt = tokenizer(question + JOIN)["input_ids"]
        while prompt and prompt[-1] == tokenizer.eos_token_id:  # some close every text
            prompt.pop()
    return [prompt, *encode_steps(tokenizer, steps)]


def render(tokenizer, turns, **how):
    """The chat template's text. Some templates print today's date: here it is always the same."""
    template = FIXED_DATE + tokenizer.get_chat_template()
    return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, **how)


def encode_steps(tokenizer, steps, closing=JOIN):
    """The ids of each step with its closing blank line.

    Each step is tokenised alone, so that prefixes which share steps share their ids. It is done
    behind a blank line, whose ids are cut off again, since SentencePiece puts a mark of its own
    before whatever opens a text.
    """
    if not steps:
        return []
    tokenize = partial(tokenizer, add_special_tokens=False)
    before = tokenize(JOIN)["input_ids"]
    encoded = tokenize([JOIN + step + closing for step in steps])["input_ids"]
    for k, step in enumerate(steps):
        if encoded[k][:len(before)] == before:
            encoded[k] = encoded[k][len(before):]
        else:  # this tokenizer merges the blank line with the text; it puts no mark
            encoded[k] = tokenize(step + closing)["input_ids"]
    return encoded


def encode_solution(tokenizer, question, steps, encode_prefix=None):
    """(prompt ids, completion ids) of a whole solution, which ends the turn after its last step."""
    encode_prefix = encode_prefix or partial(encode, tokenizer)
    prompt, *encoded = encode_prefix(question, steps[:-1])
    encoded += encode_steps(tokenizer, steps[-1:], closing="")
    return prompt, [*chain(*encoded), turn_end(tokenizer)]


def turn_end(tokenizer):
    """The special token that the chat template puts behind an assistant's content, else EOS."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "It is 2"}]
        behind = render(tokenizer, turns).rpartition("It is 2")[2]
        added = tokenizer.added_tokens_decoder  # all_special_ids lacks those without a role
        for token in tokenizer(behind, add_special_tokens=False)["input_ids"]:
            if token in added and added[token].special:
                return token
    return tokenizer.eos_token_id


def eos_ids(model, tokenizer):
    """Every id that ends a completion: chat models have several."""
    configured = model.generation_config.eos_token_id
    if not isinstance(configured, list):
        configured = [configured]
    return sorted({tokenizer.eos_token_id, turn_end(tokenizer), *configured} - {None})


def decode(tokenizer, ids):
    """The text of a completion, without the end-of-sequence token."""
    return tokenizer.decode(ids, skip_special_tokens=True)


def check_prompts(model, tokenizer, prompts, max_new_tokens):
    """InputError where a prompt is empty or does not fit the model's positions. Learned positions
    end, so there the completion must fit as well; rotary ones go on beyond, if badly. Says so where
    prompts hold words that the tokenizer lacks."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    learned = not getattr(config, "rope_parameters", None)
    room = positions - max_new_tokens if learned else positions
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) == 0 or max(lengths) > room:
        raise InputError(f"the prompts have {min(lengths)} to {max(lengths)} tokens, completions "
                         f"up to {max_new_tokens}; expected them to fit the {positions} positions "
                         "of the model")
    unknown = tokenizer.unk_token_id
    if unknown not in (None, tokenizer.bos_token_id, tokenizer.eos_token_id):
        count = sum(unknown in prompt for prompt in prompts)
        if count:
            say(f"note: {count} of {len(prompts)} prompts hold words that the tokenizer lacks")


# ---- Attention -----------------------------------------------------------------------------------
def grouped_attention(module, query, key, value, attention_mask, scaling=None, **how):
    """transformers' sdpa attention. But where each row has one token, the query heads that share a
    key become queries of one head, so that no key is copied.

    query (B, heads, Q, head_dim), key and value (B, groups, K, head_dim), mask (B, 1, Q, K)
    """
    rows, heads, length, size = query.shape
    if length > 1 or heads == key.shape[1]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling,
                                      **how)
    query = query.reshape(rows, key.shape[1], -1, size)
    output = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask,
                                          scale=scaling)
    return output.reshape(rows, 1, heads, -1), None


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", sdpa_mask)


# ---- Log-probs of packed rows --------------------------------------------------------------------
def attention_masks(model, visible, query_position, key_position):
    """The attention masks that this model takes for `visible`, (B, 1, Q, K) bool: one tensor, or a
    dictionary by kind of layer where it has several kinds.

    query_position (B, Q), key_position (B, K)   places of the tokens in their own sequences
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        kinds = ["sliding_attention" if window else "full_attention"]
    masks = {}
    for kind in set(kinds):
        mask = visible
        if kind == "sliding_attention":
            distance = query_position[:, None, :, None] - key_position[:, None, None, :]
            mask = visible & (distance < window)
        if config._attn_implementation == "eager":  # adds its mask to the scores
            lowest = torch.finfo(model.dtype).min
            zeros = torch.zeros_like(mask, dtype=model.dtype)
            mask = zeros.masked_fill(~mask, lowest)
        masks[kind] = mask
    return masks if len(masks) > 1 else mask


def pad_rows(rows, model):
    """tree.Rows as one batch on the model's device: ids (B, L), position (B, L) and mask."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    position = torch.zeros(len(rows), longest, dtype=torch.long)
    visible = torch.eye(longest, dtype=torch.bool).repeat(len(rows), 1, 1, 1)  # padding sees itself
    for k, row in enumerate(rows):
        length = len(row.ids)
        ids[k, :length] = torch.from_numpy(row.ids)
        position[k, :length] = torch.from_numpy(row.position)
        visible[k, 0, :length, :length] = torch.from_numpy(row.mask)
    position = position.to(model.device)
    mask = attention_masks(model, visible.to(model.device), position, position)
    return ids.to(model.device), position, mask


@torch.no_grad()
def check_tree_masks(model, path):
    """InputError where a packed row does not give this model the log-probs of plain sequences."""
    config = model.config.get_text_config()
    served = {"full_attention", "sliding_attention"}
    stateful = set(getattr(config, "layer_types", None) or []) - served
    sequences = np.random.default_rng(0).integers(0, config.vocab_size, (3, 8))
    sequences[:, :5] = sequences[0, :5]
    row = pack(sequences.tolist())
    try:
        if stateful:
            raise ValueError(f"it has layers of {', '.join(sorted(stateful))}")
        ids, position, mask = pad_rows([row], model)
        alone = model(torch.from_numpy(sequences).to(model.device))[0]  # (3, 8, V) or hidden states
        packed = model(ids, attention_mask=mask, position_ids=position)[0][0, np.stack(row.paths)]
        difference = torch.log_softmax(alone.float(), -1) - torch.log_softmax(packed.float(), -1)
        gap = difference.abs().mean().item()
        if gap > (0.01 if model.dtype == torch.float32 else 0.2):
            raise ValueError(f"in a row with others, log-probs differ by {gap:.2g} nat")
    except Exception as error:  # such as that of a model that knows neither masks nor positions
        raise unusable(f"the model {path}", error, "attention that takes a mask and positions, in "
                       "all layers, for sequences to share their prefixes") from None


def row_tokens(model):
    """How long a packed row may be: at this length attention takes half as much as the products
    with the weights. Those take 2 FLOP a weight for each token, attention to L others 4 L
    hidden_size for each layer."""
    config = model.config.get_text_config()
    weights = sum(p.numel() for p in model.parameters())
    return weights // (4 * config.hidden_size * config.num_hidden_layers)


class Predictions(NamedTuple):
    """What predicted each of the n completion tokens of several samples."""
    logits: torch.Tensor   # (n, V) float32, over the temperature
    target: torch.Tensor   # (n,) the token's id
    sample: torch.Tensor   # (n,) which sample it belongs to


def predict(model, batch, temperature=1.0):
    """Predictions of the completions' tokens of a tree.MicroBatch.

    The one place where logits meet ids: the id at place t of a sequence is predicted at t - 1.
    """
    tokens = []  # of each completion token: row, place of the one before it, id, sample
    for k, (sample, (r, path)) in enumerate(zip(batch.samples, paths_of(batch.rows))):
        before = path[-len(sample.completion_ids) - 1:-1].tolist()
        for place, token in zip(before, sample.completion_ids):
            tokens.append((r, place, token, k))
    row_of, place, target, sample_of = torch.tensor(tokens, device=model.device).T.contiguous()
    ids, position, mask = pad_rows(batch.rows, model)
    kept, column = place.unique(return_inverse=True)  # no other place has its logits computed
    logits = model(ids, attention_mask=mask, position_ids=position, use_cache=False,
                   logits_to_keep=kept).logits  # (B, kept, V)
    logits = logits[row_of, column].float() / temperature
    return Predictions(logits, target, sample_of)


def paths_of(rows):
    """(number of the row, places in it) of each sequence, in the order of the samples."""
    paths = []
    for r, row in enumerate(rows):
        paths += [(r, path) for path in row.paths]
    return paths


def log_probs(predictions):
    """log softmax(logits)[target], (n,)."""
    return -torch.nn.functional.cross_entropy(predictions.logits, predictions.target,
                                              reduction="none")


def divergence(logits, other, direction):
    """KL between next-token distributions over the full vocabulary, (n,).

    logits      (n, V) the student's, with its gradient
    direction   "student_teacher" is KL(student || other), the field's reverse KL;
                "teacher_student" is KL(other || student), which App. B prints
    """
    shared = min(logits.shape[1], other.shape[1])  # vocabularies may be padded differently
    p = torch.log_softmax(logits[:, :shared], dim=-1)
    q = torch.log_softmax(other[:, :shared], dim=-1)
    if direction == "teacher_student":
        p, q = q, p
    return (p.exp() * (p - q)).sum(-1)


def step_starts(tokenizer, ids):
    """Where the reasoning steps of a completion begin: 0, and where text follows a blank line."""
    starts = [0]
    for t in range(1, len(ids)):
        step = tokenizer.decode(ids[starts[-1]:t])
        has_text = decode(tokenizer, ids[t:t + 1]).strip()
        if BLANK_LINE.search(step.lstrip()) and has_text:
            starts.append(t)
    return starts


def step_values(critic, batch):
    """V of the state before each reasoning step (sample.steps) of a MicroBatch's samples, (m,)."""
    row_of = []
    place = []
    for sample, (r, path) in zip(batch.samples, paths_of(batch.rows)):
        row_of += [r] * len(sample.steps)
        place += [path[len(sample.prefix_ids) + start - 1] for start in sample.steps]
    ids, position, mask = pad_rows(batch.rows, critic)
    values = critic(ids, attention_mask=mask, position_ids=position, use_cache=False).logits
    return values[row_of, place, 0].float()


# ---- Sampling ------------------------------------------------------------------------------------
def with_less_memory(work, size):
    """work(size); where memory runs out, work(size // 2), and so on. Returns (result, size).

    `work` is run again from its start: it must not change what it was given.
    """
    while True:
        try:
            return work(size), size
        except RuntimeError as error:
            if not is_out_of_memory(error) or size == 1:
                raise
        size = size // 2  # after `except`, in which the traceback keeps the tensors alive
        forget_steps()
        print(f"out of memory; going on with {size} at a time, the same results", flush=True)


def is_out_of_memory(error):
    """Whether this error is that of CUDA's allocator or of the CPU's."""
    said = ("t allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return any(text in str(error) for text in said)


def peak_memory():
    """MiB at most in use so far: by CUDA's allocator, else resident in the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2 ** 20
    if sys.platform == "linux":  # getrusage begins with the peak of the process that started it
        with open("/proc/self/status", encoding="utf-8") as status:
            kibibytes = re.search(r"VmHWM:\s+(\d+)", status.read()).group(1)
        return int(kibibytes) / 2 ** 10
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20  # bytes on macOS


def generate(model, tokenizer, prompts, max_new_tokens, temperature=1.0, seeds=None,
             stop_at_blank=False, batch_size=256, return_logps=False):
    """Complete prompts: lists of ids in, lists of ids out, as sampled, end token kept.

    temperature     0 is greedy. No top-k, no top-p, no penalty.
    seeds           one a prompt, each the arguments of tree.rng; default the prompt's place
    stop_at_blank   True, or one flag a prompt: end with the first blank line after some text
    batch_size      how many completions are decoded side by side
    return_logps    return (completions, logps), the log-prob of each id at this temperature
    Raises InputError where log-probs are not finite: the model has diverged.
    """
    seeds = seeds or [(0, k) for k in range(len(prompts))]
    stops = np.broadcast_to(stop_at_blank, len(prompts))
    was_training = model.training
    decoder = Decoder(model, tokenizer, max(1, min(batch_size, len(prompts))))
    for k in chain(*shared_rows(prompts)):
        decoder.add(Completion(k, prompts[k], max_new_tokens, temperature, seeds[k], stops[k]))
    done = sorted(decoder.run(), key=lambda completion: completion.key)
    model.train(was_training)
    ids = [completion.ids for completion in done]
    if return_logps:
        return ids, [completion.logps for completion in done]
    return ids


def shared_rows(prompts):
    """Which prompts to pack into one row: lists of their numbers. A prompt joins the one before it,
    in sorted order, where they share half of its tokens or more; else the longer row would cost
    more than is saved. The longest come first, so that they begin together."""
    rows = []
    for k in sorted(range(len(prompts)), key=lambda k: prompts[k]):
        if rows:
            neighbour = prompts[rows[-1][-1]]
            common = len(os.path.commonprefix([neighbour, prompts[k]]))
            if 2 * common >= len(prompts[k]):
                rows[-1].append(k)
                continue
        rows.append([k])
    return sorted(rows, key=lambda row: -max(len(prompts[k]) for k in row))


def prefill(model, prompts):
    """Compute each distinct token of N prompts once, then give each prompt its own copy.

    The last token of each is left for the first step of decoding. Returns the (keys, values) of
    each layer, both (N, heads, T, head_dim), padded on the left.
    """
    longest = max(len(prompt) for prompt in prompts) - 1
    rows = shared_rows(prompts)
    packed = []
    for row in rows:
        # a prompt of one token has no past: its token is computed, and nothing is made of it
        pasts = [prompts[k][:-1] or prompts[k] for k in row]
        packed.append(pack(pasts))
    ids, position, mask = pad_rows(packed, model)
    cache = DynamicCache()  # a plain one: with the model's config, sliding layers drop old tokens
    nowhere = torch.zeros(0, dtype=torch.long, device=model.device)  # no logits are wanted
    model(ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True,
          logits_to_keep=nowhere)
    row_of = torch.zeros(len(prompts), 1, dtype=torch.long)
    place = torch.zeros(len(prompts), longest, dtype=torch.long)  # in the packed row
    for k, (r, path) in zip(chain(*rows), paths_of(packed)):
        length = len(prompts[k]) - 1
        row_of[k] = r
        place[k, longest - length:] = torch.from_numpy(path[:length])
    row_of = row_of.to(model.device)
    place = place.to(model.device)
    layers = []
    for layer in cache.layers:
        keys = layer.keys[row_of, :, place].transpose(1, 2)
        values = layer.values[row_of, :, place].transpose(1, 2)
        layers.append((keys, values))
    return layers


def sample_token(logits, temperature, uniform):
    """Next tokens (N,) and their log-probs under softmax(logits / temperature); argmax at 0.

    logits (N, V), temperature (N,), uniform (N,) in [0, 1), or None where all are greedy. The
    cumulative distribution is inverted at the row's own random number: a completion depends on its
    seed alone, not on who else is in the batch.
    """
    greedy = temperature == 0
    divisor = temperature.masked_fill(greedy, 1.0)[:, None]
    logps = torch.log_softmax(logits.float() / divisor, dim=-1)
    token = logps.argmax(-1)
    if uniform is not None:
        cumulative = logps.exp().cumsum(-1, dtype=torch.float64)
        threshold = uniform * cumulative[:, -1]
        drawn = torch.searchsorted(cumulative, threshold[:, None], right=True)[:, 0]
        token = token.where(greedy, drawn.clamp(max=logits.shape[1] - 1))
    return token, logps.gather(1, token[:, None])[:, 0]


def next_logits(model, cache, last, position):
    """What predicts the next token of N sequences, (N, V). Its work is on tensors alone, whose
    shapes stay the same, so that it can be compiled.

    cache          of StaticLayers; all sequences end in the same column, where their last ids go
    last, position (N,) the last id of each, and its place in its sequence
    """
    layer = cache.layers[0]
    # (C,) how far each column is from the one that is written now: -1 holds the token before. Where
    # column 5 is written with the token at place 3, columns 2 to 5 hold the places 0 to 3
    offset = torch.arange(layer.max_cache_len, device=last.device) - layer.cumulative_length
    place = offset + position[:, None]  # of what each column holds, in its sequence (N, C)
    visible = (place >= 0) & (offset <= 0)
    mask = attention_masks(model, visible[:, None, None], position[:, None], place)
    return model(last[:, None], attention_mask=mask, position_ids=position[:, None],
                 past_key_values=cache, use_cache=True).logits[:, -1]


@cache
def has_newline(tokenizer, token):
    """A blank line can only be complete where such a token was sampled."""
    return "\n" in tokenizer.decode([token])


@dataclass
class Completion:
    """A prompt, and what has been sampled behind it so far."""
    key: object                # the caller's name for it
    prompt: list
    max_new_tokens: int
    temperature: float         # 0 is greedy
    seed: tuple                # of its random numbers: the arguments of tree.rng
    stop_at_blank: bool        # end with the first blank line after some text
    ids: list = field(default_factory=list)     # end token included
    logps: list = field(default_factory=list)   # of each id, at this temperature
    uniform: np.ndarray = None                  # a random number for each token


@cache
def compiled_logits():
    """`next_logits`, compiled anew for each model, number of rows and number of columns."""
    torch._dynamo.config.cache_size_limit = 64  # combinations of them
    return torch.compile(next_logits, fullgraph=True, dynamic=False, **COMPILER)


class Step:
    """A static cache of keys and values, and one step of decoding on it.

    recorded   whether its kernels are recorded as a CUDA graph at the first call, and replayed. A
               graph reads the weights where they were: it sees what the optimiser has changed in
               place, but no other adapter and no hook. KEPT.clear() makes it forget.
    compiled   whether torch.compile fuses the kernels first
    """

    def __init__(self, rows, columns, recorded=False, compiled=False):
        self.rows = rows
        self.columns = columns
        self.recorded = recorded
        self.next_logits = compiled_logits() if compiled else next_logits
        self.layers = []
        self.graph = None

    def fill(self, layer_index, rows, keys, values, used):
        """Put keys and values (n, heads, T, head_dim) into these rows of a layer, so that the last
        stands in the column before `used`, where the next token goes."""
        if layer_index == len(self.layers):
            layer = StaticLayer(self.columns)
            layer.lazy_initialization(keys[:1].expand(self.rows, -1, -1, -1),
                                      values[:1].expand(self.rows, -1, -1, -1))
            self.layers.append(layer)
        layer = self.layers[layer_index]
        begin = used - keys.shape[2]
        layer.keys[rows, :, begin:used] = keys
        layer.values[rows, :, begin:used] = values
        layer.cumulative_length.fill_(used)

    def run(self, model, last, position, temperature, uniform):
        """The next tokens and their log-probs, both (N,)."""
        logits = self.next_logits(model, Cache(self.layers), last, position)
        return sample_token(logits, temperature, uniform)

    def __call__(self, model, used, inputs):
        """run(model, *inputs), whose keys and values go into the column `used`."""
        if not self.recorded:
            return self.run(model, *inputs)
        if self.graph is None:
            self.record(model, used, inputs)
        for place, value in zip(self.inputs, inputs):
            place.copy_(value)
        self.graph.replay()
        return self.outputs

    def record(self, model, used, inputs):
        """Record the kernels of one step as a CUDA graph, after the warm-up that this requires."""
        self.inputs = [value.clone() for value in inputs]
        keeper, stream = recorder()
        main = torch.cuda.current_stream()
        stream.wait_stream(main)
        try:
            with torch.cuda.stream(stream):  # whatever fails within, the current stream comes back
                for _ in range(2):
                    self.run(model, *self.inputs)
                    for layer in self.layers:
                        layer.cumulative_length.fill_(used)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=keeper.pool(), stream=stream,
                                      capture_error_mode="thread_local"):
                    self.outputs = self.run(model, *self.inputs)
        finally:
            main.wait_stream(stream)
        self.graph = graph


@cache
def recorder():
    """What all graphs share: an empty graph that owns their memory, and the stream on which they
    are recorded. To share memory is safe: `Decoder.sample` copies what one has found before another
    is replayed."""
    stream = torch.cuda.Stream()
    keeper = torch.cuda.CUDAGraph()
    with torch.cuda.graph(keeper, stream=stream, capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")
    return keeper, stream


KEPT = WeakKeyDictionary()  # model -> its static Steps, for the next Decoder


def forget_steps():
    """Give back the memory of what decoding keeps for later."""
    KEPT.clear()
    recorder.cache_clear()


class Decoder:
    """Completes prompts side by side in `slots` rows, each filled again when its completion ends.

    Keys and values stand in transformers' StaticLayers. The sequences of all rows end in the same
    column, so that one index says where the next token goes. When rows end or begin, or the columns
    are full, `arrange` lays them out anew.

    On CUDA a step is recorded as a graph. With --compile it is compiled by torch.compile, on a CPU
    as well, which takes minutes for a shape: small models gain after several hundred updates,
    SmolLM2-135M in bf16 gains nothing. Both want `static` shapes: the number of rows shrinks by
    factors of four, that of columns is a power of two and has room for the longest completion from
    the start, and the Steps are kept for the next Decoder. That takes memory for a few whole
    caches.
    """

    def __init__(self, model, tokenizer, slots):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.slots = slots
        self.static = model.device.type == "cuda" if COMPILE is None else COMPILE
        self.ends = set(eos_ids(model, tokenizer))
        self.waiting = deque()
        self.closed = False  # whether no completion will be added
        self.rows = []       # a Completion, or None where one has ended
        self.now = None      # the Step for these rows
        self.used = 0        # columns of its cache that are filled
        self.kept = {}       # (rows, columns) -> Step, where they are static
        if self.static:
            self.kept = KEPT.pop(model, {})
        self.work = 0        # completions at work, summed over all steps
        self.room = 0        # slots, summed over all steps
        self.busy = 1.0      # work / room, up to the tail: when the last completion began

    def add(self, completion):
        """Complete this when a slot is free."""
        if not completion.prompt:
            raise ValueError("a prompt without tokens cannot be completed; expected an id or more")
        self.waiting.append(completion)

    def run(self):
        """Yield each completion as it ends, until none is left. None may be added meanwhile."""
        self.closed = True
        while self.waiting or any(self.rows):
            yield from self.step()
        if self.static:
            KEPT[self.model] = self.kept

    def step(self):
        """Sample one token in every row. Returns the completions that ended with it.

        Where memory runs out all that was under way is begun anew in half as many slots. Where a
        step cannot be compiled it is recorded, and where that fails it is plain. The completions
        are the same: each depends on its seed alone.
        """
        global COMPILE
        if not (self.waiting or any(self.rows)):
            return []
        # inference_mode is less work, but compiled code may not write to its tensors
        no_gradient = torch.no_grad if self.static else torch.inference_mode
        try:
            with no_gradient():
                return self.advance()
        except Exception as error:
            if is_out_of_memory(error) and self.slots > 1:
                self.slots //= 2
                print(f"out of memory; going on with {self.slots} at a time, the same results",
                      flush=True)
            elif self.static and not isinstance(error, InputError):
                print(f"decoding is not {'compiled' if COMPILE else 'recorded'}: "
                      f"{type(error).__name__}, {shorten(str(error))}", flush=True)
                COMPILE = None if COMPILE and self.model.device.type == "cuda" else False
                self.static = COMPILE is None
            else:
                raise
        self.begin_anew()  # after `except`, in which the traceback keeps the tensors alive
        return []

    def begin_anew(self):
        """Forget what has been sampled, and all keys and values."""
        for row in filter(None, self.rows[::-1]):
            self.waiting.appendleft(replace(row, ids=[], logps=[]))
        self.rows = []
        self.now = None
        self.kept = {}
        forget_steps()

    def advance(self):
        """`step`, as long as nothing goes wrong."""
        live = [k for k, row in enumerate(self.rows) if row]
        count = min(len(self.waiting), self.slots - len(live))
        all_others = self.closed and count == len(self.waiting)
        if EIGHTH * count < len(live) and not all_others:
            count = 0  # wait for more: to begin one takes as long as to begin many
        new = list(islice(self.waiting, count))
        rows = self.row_count(len(live) + len(new))
        longest = max((len(row.prompt) for row in new), default=0)
        full = self.now and self.used == self.now.columns
        too_small = full or longest > self.used + 1 or rows > len(self.rows)
        too_large = EIGHTH * (len(self.rows) - rows) >= len(self.rows)
        if too_small or too_large:
            self.arrange(live, new, rows)
        elif new:
            self.begin(new)
        if new and self.room:
            self.busy = self.work / self.room
        self.work += len(live) + len(new)
        self.room += self.slots
        tokens, logps = self.sample()
        self.used += 1
        ended = []
        for k, row in enumerate(self.rows):
            if row:
                row.ids.append(tokens[k])
                row.logps.append(logps[k])
                if self.has_ended(row):
                    ended.append(row)
                    self.rows[k] = None
        return ended

    def row_count(self, completions):
        """How many rows to decode so many completions in. Few numbers where each is recorded."""
        if not self.static:
            return completions
        rows = 1 << (self.slots - 1).bit_length()
        while rows >= 4 * completions:
            rows //= 4
        return rows

    def arrange(self, live, new, rows):
        """Lay out the cache anew in so many rows: those that are at work, then new completions.

        live   the numbers of the rows at work
        """
        work = [self.rows[k] for k in live]
        lengths = [len(row.prompt) + len(row.ids) - 1 for row in work]  # tokens in the cache
        width = max(lengths + [len(row.prompt) - 1 for row in new])
        to_come = max(row.max_new_tokens - len(row.ids) for row in work + new)
        if self.static:
            columns = 1 << (width + to_come - 1).bit_length()
        else:  # attention computes empty columns, too
            columns = width + min(to_come, ROOM)
        recorded = self.static and self.model.device.type == "cuda"
        step = self.kept.get((rows, columns)) or Step(rows, columns, recorded, bool(COMPILE))
        index = torch.tensor(live, dtype=torch.long, device=self.model.device)
        filled = slice(self.used - max(lengths, default=0), self.used)
        for k, layer in enumerate(self.now.layers if live else []):
            keys = layer.keys[:, :, filled].index_select(0, index)
            values = layer.values[:, :, filled].index_select(0, index)
            if not self.static:
                self.now.layers[k] = None  # two whole caches would take twice the memory
            step.fill(k, slice(len(live)), keys, values, width)
        if self.static:
            self.kept[rows, columns] = step
        self.now = step
        self.used = width
        self.rows = work + [None] * (rows - len(work))
        if new:
            self.begin(new)

    def begin(self, new):
        """Let new completions, the first of those that wait, begin in free rows."""
        free = [k for k, row in enumerate(self.rows) if row is None][:len(new)]
        index = torch.tensor(free, device=self.model.device)
        for k, layer in enumerate(prefill(self.model, [row.prompt for row in new])):
            self.now.fill(k, index, *layer, self.used)
        for k, row in zip(free, new):
            row.uniform = rng(*row.seed).random(row.max_new_tokens)
            self.rows[k] = row
            self.waiting.popleft()  # only now: memory may have run out before

    def sample(self):
        """The next id of each row, and its log-prob: two lists."""
        inputs = []
        for row in self.rows:
            if row:
                last = row.ids[-1] if row.ids else row.prompt[-1]
                position = len(row.prompt) + len(row.ids) - 1
                inputs.append((last, position, row.temperature, row.uniform[len(row.ids)]))
            else:
                inputs.append((0, 0, 0, 0))  # an empty row, whose token is ignored
        inputs = torch.tensor(inputs, dtype=torch.float64, device=self.model.device)
        last, position, temperature, uniform = inputs.unbind(1)
        if not (self.static or temperature.any()):
            uniform = None  # all are greedy
        tokens, logps = self.now(self.model, self.used, [
            last.long(), position.long(), temperature.float(), uniform])
        return tokens.tolist(), logps.tolist()

    def has_ended(self, row):
        """Whether this completion is done. InputError where its log-probs are not finite."""
        if not math.isfinite(row.logps[-1]):
            raise InputError("the log-probs of a completion are not finite numbers. Expected a "
                             "model that has not diverged; a lower learning rate may help.")
        if row.stop_at_blank and has_newline(self.tokenizer, row.ids[-1]):
            text = self.tokenizer.decode(row.ids)
            if BLANK_LINE.search(text.lstrip()):
                return True
        return row.ids[-1] in self.ends or len(row.ids) == row.max_new_tokens


# ---- Scoring -------------------------------------------------------------------------------------
def score(model, tokenizer, problems, max_new_tokens=512, samples=0, temperature=1.0, seed=0,
          encode_prefix=None, decoder=None):
    """Complete every problem greedily and `samples` times at `temperature`. Yields one row a
    problem, in their order.

    A row has the problem's fields, then one entry a completion, the greedy one first: completions
    (text), extracted (the answer found), correct (marked, as in training), flexible (also the last
    number, where no answer is marked), truncated (at max_new_tokens: never correct), tokens.
    """
    encode_prefix = encode_prefix or partial(encode, tokenizer)
    decoder = decoder or Decoder(model, tokenizer, 256)
    for k, problem in enumerate(problems):
        prompt = encode_prefix(problem["question"])[0]
        name = problem["id"]
        decoder.add(Completion((k, 0), prompt, max_new_tokens, 0.0, (seed, name), False))
        for j in range(samples):
            decoder.add(Completion((k, j + 1), prompt, max_new_tokens, temperature,
                                   (seed, name, j), False))
    completions = [[None] * (samples + 1) for _ in problems]
    judged = 0
    for completion in decoder.run():
        k, j = completion.key
        completions[k][j] = completion.ids
        while judged < len(problems) and all(completions[judged]):
            yield judge(problems[judged], completions[judged], tokenizer, decoder.ends)
            judged += 1


def judge(problem, completions, tokenizer, ends):
    """The row of one problem; completions are lists of ids."""
    texts = [decode(tokenizer, ids) for ids in completions]
    truncated = [ids[-1] not in ends for ids in completions]
    correct = [is_solved(text, problem) for text in texts]
    flexible = [is_correct(text, problem["answer"]) for text in texts]
    return dict(
        problem, completions=texts, truncated=truncated,
        extracted=[extract_answer(text) for text in texts],
        correct=[good and not cut for good, cut in zip(correct, truncated)],
        flexible=[good and not cut for good, cut in zip(flexible, truncated)],
        tokens=[len(ids) for ids in completions])


def mean_interval(values, clusters):
    """Mean and 95 % interval of one figure for each problem, from 0 to 1: (mean, low, high).

    clusters   of each problem: instances of one template are not independent. Where each is alone
               in its cluster, a share has Wilson's interval (1927), which is not empty at 0 or 1.
    """
    values = np.array(values, float)
    if len(set(clusters)) == len(values) and set(values) <= {0.0, 1.0}:
        interval = binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
        return values.mean(), max(interval.low, 0.0), interval.high
    mean, low, high = normal_interval(values, clusters)
    low, high = np.clip([low, high], 0.0, 1.0)
    return mean, low, high


def normal_interval(values, clusters):
    """The same for any figure, such as a difference: from the variance between clusters. A single
    cluster has no interval."""
    mean = np.mean(values)
    names, cluster = np.unique(clusters, return_inverse=True)
    count = len(names)
    if count == 1:
        return mean, math.nan, math.nan
    deviation = np.bincount(cluster, values - mean)  # summed in each cluster
    variance = np.sum(deviation ** 2) * count / (count - 1)
    half = 1.96 * np.sqrt(variance) / len(values)
    return mean, mean - half, mean + half


def majority(row):
    """Whether the most frequent answer of the samples is right; equal answers vote together, and
    those of truncated samples do not vote."""
    answers = []
    marks = []  # whether each is right
    samples = zip(row["completions"][1:], row["truncated"][1:], row["correct"][1:])
    for text, is_cut, is_right in samples:
        answer = extract_answer(text, strict=True)
        if answer is not None and not is_cut:
            answers.append(answer)
            marks.append(is_right)
    votes = []
    for answer in answers:
        votes.append(sum(equal(answer, other) for other in answers))
    return bool(votes) and marks[int(np.argmax(votes))]


def summarise(rows):
    """The figures of a scored data set: name -> (share, low, high), the 95 % interval."""
    samples = len(rows[0]["correct"]) - 1
    figures = {}
    figures["greedy"] = [row["correct"][0] for row in rows]
    figures["flexible"] = [row["flexible"][0] for row in rows]
    if samples:
        sampled = [row["correct"][1:] for row in rows]
        figures[f"mean@{samples}"] = [np.mean(marks) for marks in sampled]
        figures[f"maj@{samples}"] = [majority(row) for row in rows]
        figures[f"pass@{samples}"] = [any(marks) for marks in sampled]
    figures["truncated"] = [np.mean(row["truncated"]) for row in rows]
    clusters = clusters_of(rows)
    return {name: mean_interval(values, clusters) for name, values in figures.items()}


def clusters_of(rows):
    """What the intervals take as independent: GSM-Symbolic's templates, else the problems."""
    return [str(row.get("template", row["id"])) for row in rows]


def percent(share, low, high):
    """A share and its 95 % interval as text."""
    return f"{100 * share:.1f} %, 95 % [{100 * low:.1f}, {100 * high:.1f}]"


def table(rows):
    """summarise(rows) as text, then greedy accuracy by steps, level or subject where there are."""
    tokens = list(chain(*[row["tokens"] for row in rows]))
    lines = [f"{len(rows)} problems, {np.mean(tokens):.0f} tokens a completion"]
    for name, figure in summarise(rows).items():
        lines.append(f"{name:>10}  {percent(*figure)}")
    for key in ("steps", "level", "subject"):
        parts = sorted({str(row[key]) for row in rows if key in row})
        for part in parts:
            correct = [row["correct"][0] for row in rows if str(row.get(key)) == part]
            percentage = 100 * np.mean(correct)
            lines.append(f"{key:>10} {printable(part)}: {percentage:5.1f} % of {len(correct)}")
    return "\n".join(lines)


def compare(first, second):
    """Two scorings of the same problems, paired, as text: the difference, its 95 % interval and an
    exact sign test. InputError where no problem, or not the same problem, stands in both."""
    others = {row["id"]: row for row in second}
    first = [row for row in first if row["id"] in others]
    second = [others[row["id"]] for row in first]
    if not first or [content(row) for row in first] != [content(row) for row in second]:
        raise InputError("the two have no problem in common, or other problems under the same id; "
                         "expected two scorings of one data set")
    lines = [f"{len(first)} problems in both"]
    kinds = {"greedy": slice(0, 1), "mean@k": slice(1, None)}
    fewest = min(len(first[0]["correct"]), len(second[0]["correct"]))
    if fewest == 1:
        del kinds["mean@k"]
    for name, kept in kinds.items():
        a = np.array([np.mean(row["correct"][kept]) for row in first])
        b = np.array([np.mean(row["correct"][kept]) for row in second])
        difference, low, high = normal_interval(b - a, clusters_of(first))
        wins = int((b > a).sum())
        losses = int((b < a).sum())
        p = binomtest(wins, max(wins + losses, 1)).pvalue
        lines.append(
            f"{name:>8}  {100 * a.mean():.1f} % -> {100 * b.mean():.1f} %, difference "
            f"{100 * difference:+.1f} points, 95 % [{100 * low:+.1f}, {100 * high:+.1f}]; "
            f"{wins} better, {losses} worse, exact sign test p = {p:.2g}")
    return "\n".join(lines)


def content(row):
    """What makes a problem the same, whatever its id."""
    return row["question"], row["answer"]


def parse_score(row, number):
    """A row of a file of scores, checked: read_jsonl's `parse`."""
    for name in ("id", "question", "answer"):
        get_field(row, name, str, "text, as evaluate.py writes it")
    for name in ("completions", "correct", "flexible", "truncated", "tokens"):
        if len(get_field(row, name, list, "one entry a completion")) != len(row["completions"]):
            raise InputError(f"field \"{name}\" has not one entry a completion")
    return row


def read_scores(path):
    """The rows of a file of scores."""
    return list(read_jsonl(path, parse_score))


def work_settings(model, encode_prefix, args, names):
    """What the rows of an output file depend on: these flags, the weights, and how prompts read. A
    file that is continued must have the same."""
    settings = {name: getattr(args, name) for name in names}
    settings["weights"] = checksum(model)
    settings["prompt"] = prompt_checksum(encode_prefix)
    return settings


def prompt_checksum(encode_prefix):
    """crc32 of how a question and a step are encoded: another format is another policy."""
    example = encode_prefix("1 + 1", ["1 + 1 = 2"])
    return f"{crc32(json.dumps(example).encode()):08x}"


def unfinished(path, parse, settings, problems, rank, world):
    """This rank's share of the problems that an output file does not hold yet.

    Rank 0 reads the file before anybody appends to it, and says what is taken from it. InputError,
    and an untouched file, where it is of other settings or has another problem under an id.
    """
    asked = {problem["id"]: problem for problem in problems}

    def check(row, number):
        row = parse(row, number)
        saved = row.get("settings") or {}
        for name, value in settings.items():
            if saved.get(name) != value:
                raise InputError(f"its {name} is {shorten(saved.get(name))} and not "
                                 f"{shorten(value)}; expected the same, or another --out")
        if content(asked.get(row["id"], row)) != content(row):
            raise InputError(f"the id {shorten(row['id'])} is of another problem; expected the "
                             "same data, or another --out")
        return row["id"]

    done = gather(set(continue_jsonl(path, check)) if rank == 0 else None)[0]
    todo = [problem for problem in problems if problem["id"] not in done]
    if rank == 0 and len(todo) < len(problems):
        print(f"{len(problems) - len(todo)} of {len(problems)} problems are taken from {path}")
    return todo[rank::world]


def main():
    global COMPILE
    parser = arguments("Score a policy on a data set, or compare two scorings.")
    add = parser.add_argument
    add("--model", default="data/arithmetic/student", help="a folder or a hub name")
    add("--adapter", help="a PEFT adapter, such as a run folder of train.py")
    add("--data", default="data/arithmetic/test.jsonl", help="problems, JSONL")
    add("--out", help="every completion, JSONL, continued if it is there; "
        "default out/eval-POLICY-DATA.jsonl")
    add("--samples", type=at_least(0), default=0, help="sampled completions a problem, beside the "
        "greedy one, for mean@k, maj@k and pass@k")
    add("--temperature", type=at_least(0, float), default=1.0, help="of those samples")
    add("--max_new_tokens", type=at_least(1), default=512, help="MATH wants 2048")
    add("--batch_size", type=at_least(1), default=128, help="completions decoded side by side")
    add("--limit", type=at_least(0), default=0, help="score the first so many problems, 0 is all")
    add("--seed", type=at_least(0), default=0, help="of the samples")
    add_prompt_flags(add)
    add_device_flags(add)
    add("--compare", nargs=2, metavar=("A", "B"), help="compare two files of scores, nothing else")
    args = parser.parse_args()
    COMPILE = args.compile
    if args.compare:
        print(compare(*map(read_scores, args.compare)))
        return
    rank, world, device = distributed()
    policy = os.path.basename(os.path.abspath(args.adapter or args.model))
    data = os.path.splitext(os.path.basename(args.data))[0]
    path = args.out or f"out/eval-{policy}-{data}.jsonl"
    problems = read_problems(args.data, args.limit)
    held = lock(path) if rank == 0 else None  # until the end of the process
    model, tokenizer = load(args.model, args.adapter, device, args.dtype)
    encode_prefix = encoder(tokenizer, args)
    prompts = [encode_prefix(problem["question"])[0] for problem in problems]
    check_prompts(model, tokenizer, prompts, args.max_new_tokens)
    settings = work_settings(model, encode_prefix, args, (
        "samples", "temperature", "max_new_tokens", "seed"))
    todo = unfinished(path, parse_score, settings, problems, rank, world)
    decoder = Decoder(model, tokenizer, args.batch_size)
    rows = score(model, tokenizer, todo, args.max_new_tokens, args.samples, args.temperature,
                 args.seed, encode_prefix, decoder)
    for row in tqdm(rows, total=len(todo), unit="problem", disable=rank > 0, dynamic_ncols=True):
        append_jsonl(path, dict(row, settings=settings))
    busy = np.mean(gather(decoder.busy))
    if rank == 0:
        asked = {problem["id"] for problem in problems}
        print(table([row for row in read_scores(path) if row["id"] in asked]))
        print(f"every completion is in {path}; slots busy until the tail: {busy:.0%}")
    if world > 1:
        dist.destroy_process_group()
    return held


if __name__ == "__main__":
    run_command(main)
