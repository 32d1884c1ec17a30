"""Tests of evaluate.py: the sampler against transformers, loading, and the scores' arithmetic."""
import itertools
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,
                        pre_tokenizers, processors)
from transformers import (AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel,
                          LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM,
                          PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM)

import evaluate
import tree
from evaluate import is_correct
from tree import InputError

torch.set_num_threads(1)
QUESTIONS = ["Ann has 1 pen .", "Ann has 2 pens .", "Ben has 3 pens . How many ?", "Ann finds 4 .",
             "Ben has 5 pens ."]


def tiny_tokenizer():
    """Words with their leading space, single digits, a blank line, and one token that merges a
    full stop with it."""
    words = ["Ann", "Ben", " has", " finds", " pen", " pens", " .", ".", " How", " many", " ?",
             "The", " answer", " is", " +", " *", " =", "\n", "\n\n", ".\n\n"]
    words += list("0123456789")
    words += [" " + digit for digit in "0123456789"]
    words = ["<unk>", "<pad>", "<bos>", "<eos>", *words]
    vocabulary = {word: k for k, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\.?\n\n|\n| ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>",
                                   pad_token="<pad>", eos_token="<eos>")


def tiny(family="llama", seed=0, **more):
    """A random model of a few thousand weights and its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    kinds = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config),
             "mistral": (MistralForCausalLM, MistralConfig)}
    model, config = kinds[family]
    model = model(config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.3, bos_token_id=2, eos_token_id=3, pad_token_id=1, **more))
    return model.eval(), tokenizer


def tiny_folder(path):
    """Save `tiny()` as a folder that evaluate.load reads."""
    model, tokenizer = tiny()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def prompts_of(tokenizer):
    """Prompts of mixed lengths, several of which share a question and steps, one twice."""
    def ids(k, *steps):
        return sum(evaluate.encode(tokenizer, QUESTIONS[k], steps), [])
    return [ids(0), ids(1), ids(1, "1 + 2 = 3"), ids(1, "1 + 2 = 3", "3 * 2 = 6"),
            ids(1, "1 + 2 = 3"), ids(2, "2 + 2 = 4"), ids(3), [7], [7, 8]]


def greedy_alone(model, prompt, max_new_tokens):
    """What transformers' own generate gives one prompt."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                         max_new_tokens=max_new_tokens)
    return out[0, len(prompt):].tolist()


# ---- The sampler ---------------------------------------------------------------------------------
@pytest.mark.parametrize("family, more", [("llama", {}), ("qwen2", {}),
                                          ("mistral", {"sliding_window": 6})])
def test_greedy_is_that_of_transformers(family, more):
    """Shared prefill, left padding, rows that leave the batch and sequences longer than a sliding
    window change nothing: each prompt gets what transformers gives it alone."""
    model, tokenizer = tiny(family, **more)
    evaluate.check_tree_masks(model, family)
    prompts = prompts_of(tokenizer)
    expected = [greedy_alone(model, prompt, 15) for prompt in prompts]
    for size in (1, 3, 100):
        assert evaluate.generate(model, tokenizer, prompts, 15, 0, batch_size=size) == expected


WINDOWS = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"])
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
FAMILIES = {  # gemma2 and gpt_oss have eager attention alone
    "gemma2": WINDOWS, "gemma3_text": WINDOWS, "gpt_oss": WINDOWS | EXPERTS, "qwen3_moe": EXPERTS,
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=256)}


def family_folder(path, family, **more):
    """Save a tiny random model of a family, and the tiny tokenizer."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, head_dim=8,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
        max_position_embeddings=256, bos_token_id=2, eos_token_id=3, pad_token_id=1, **more)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_sample_as_transformers_and_train_as_they_sample(tmp_path, family):
    """A model without sdpa was loaded with another attention than its own; one with experts ended
    in an AttributeError on a CPU. The prompts are longer than the windows of layers."""
    family_folder(tmp_path, family, **FAMILIES[family])
    model, tokenizer = evaluate.load(str(tmp_path))
    prompts = prompts_of(tokenizer)[2:6]
    expected = [greedy_alone(model, prompt, 8) for prompt in prompts]
    assert evaluate.generate(model, tokenizer, prompts, 8, 0) == expected
    assert sampler_and_trainer_differ_by(model, tokenizer, prompts) < 1e-4


def sampler_and_trainer_differ_by(model, tokenizer, prompts, statistic=np.max):
    """The largest difference of a log-prob, in nat, where all share one packed row."""
    out, logps = evaluate.generate(model, tokenizer, prompts, 8, return_logps=True)
    samples = []
    for prompt, ids in zip(prompts, out):
        samples.append(SimpleNamespace(group=0, prefix_ids=prompt, completion_ids=ids))
    [batch] = tree.micro_batches(samples, 9999, 9999)
    trained = evaluate.log_probs(evaluate.predict(model, batch)).detach()
    return statistic(np.abs(trained.numpy() - list(itertools.chain(*logps))))


NOT_SERVED = {
    "lfm2": (dict(layer_types=["conv", "full_attention"]), "it has layers of conv"),
    "qwen3_next": (EXPERTS | dict(layer_types=["linear_attention", "full_attention"]),
                   "it has layers of linear_attention"),
    "bloom": (dict(n_layer=2, n_head=4), "cannot be used")}


@pytest.mark.parametrize("family", NOT_SERVED)
def test_other_kinds_of_layers_are_refused_in_one_sentence(tmp_path, family):
    """A state instead of keys and values ended in an IndexError, ALiBi in a ValueError."""
    more, says = NOT_SERVED[family]
    family_folder(tmp_path, family, **more)
    with pytest.raises(InputError, match=f"^the model {tmp_path} .*{says}.*; expected [^\n]*$"):
        evaluate.load(str(tmp_path))


def test_a_completion_depends_on_its_seed_alone():
    """Not on its neighbours, the batch size or the order: searches and ranks are reproducible."""
    model, tokenizer = tiny()
    prompts = prompts_of(tokenizer)
    seeds = [(7, k) for k in range(9)]
    together = evaluate.generate(model, tokenizer, prompts, 15, 0.8, seeds)
    others = [(8, k) for k in range(9)]
    assert together != evaluate.generate(model, tokenizer, prompts, 15, 0.8, others)
    for k in range(9):
        alone = evaluate.generate(model, tokenizer, [prompts[k]], 15, 0.8, [seeds[k]])
        assert alone == [together[k]]
    backwards = evaluate.generate(model, tokenizer, prompts[::-1], 15, 0.8, seeds[::-1],
                                  batch_size=2)
    assert backwards[::-1] == together


def test_slots_are_refilled(monkeypatch):
    """All waited for the longest completion of a batch. Nine of ten slots are at work until the
    last completion begins, and each is given back when it ends, the same as alone."""
    model, tokenizer = tiny()
    prompts = prompts_of(tokenizer) * 20
    alone = evaluate.generate(model, tokenizer, prompts, 30, batch_size=1)
    decoder = evaluate.Decoder(model, tokenizer, 16)
    for k, prompt in enumerate(prompts):
        decoder.add(evaluate.Completion(k, prompt, 30, 1.0, (0, k), False))
    steps = 0
    begun = []
    while len(begun) < len(prompts):
        steps += 1
        for completion in decoder.step():
            assert completion.ids == alone[completion.key]
            begun.append(steps - len(completion.ids))
    assert decoder.busy > 0.9
    assert len(set(begun)) > 10
    assert steps < 1.3 * sum(map(len, alone)) / 16


def test_the_last_completions_begin_where_a_slot_is_free():
    """The only one that waited had to wait until half of the others had ended."""
    model, tokenizer = tiny()
    decoder = evaluate.Decoder(model, tokenizer, 16)
    decoder.ends = set()  # all come to their limits
    for k in range(17):
        limit = 2 if k == 0 else 30
        decoder.add(evaluate.Completion(k, [5, 6], limit, 1.0, (0, k), False))
    assert len(list(decoder.run())) == 17
    assert decoder.room == 16 * (2 + 30)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_models_distribution(temperature):
    """Also where the model's own generation_config asks for top-k, top-p and a penalty: such knobs
    must not leak in."""
    model, tokenizer = tiny()
    model.generation_config.update(top_k=2, top_p=0.5, repetition_penalty=3.0, temperature=9.0)
    prompt = prompts_of(tokenizer)[2]
    logits = model(torch.tensor([prompt])).logits[0, -1].detach()
    expected = 4000 * torch.softmax(logits / temperature, -1).numpy()
    out = evaluate.generate(model, tokenizer, [prompt] * 4000, 1, temperature, batch_size=500)
    counts = np.bincount([ids[0] for ids in out], minlength=len(expected))
    rare = expected < 5  # the chi-squared test wants them in one class
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    chi_squared = ((observed - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum()
    assert chi_squared < 2.2 * len(wanted)  # its mean is len - 1


def test_log_probs_are_those_of_the_model():
    """The log-probs that generate returns are those of the whole sequence, at the temperature."""
    model, tokenizer = tiny()
    prompts = prompts_of(tokenizer)
    out, logps = evaluate.generate(model, tokenizer, prompts, 9, 0.7, return_logps=True)
    for prompt, ids, values in zip(prompts, out, logps):
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1]
        expected = torch.log_softmax(logits / 0.7, -1)[range(len(ids)), ids]
        assert values == pytest.approx(expected.tolist(), abs=1e-4)


def test_every_distinct_prompt_token_is_computed_once():
    """Five children of a node share one prefill. Counts the tokens that pass the embedding."""
    model, tokenizer = tiny()
    prompt = prompts_of(tokenizer)[3]
    seen = []

    def count(module, inputs, output):
        seen.append(inputs[0].numel())
    handle = model.get_input_embeddings().register_forward_hook(count)
    evaluate.generate(model, tokenizer, [prompt] * 5, 3)
    handle.remove()
    assert seen[0] == len(prompt) - 1
    assert max(seen[1:]) <= 5


def test_prefill_computes_no_logits():
    """With logits_to_keep=1, PyTorch copied a bf16 output layer for each row: gigabytes."""
    model, _ = tiny()
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        evaluate.prefill(model, [[5, 6, 7], [8, 9]])
    assert [output.numel() for output in seen] == [0]


@pytest.fixture
def compiled(monkeypatch):
    """Steps are compiled, as on CUDA, but without inductor. Yields what PyTorch counted."""
    monkeypatch.setattr(evaluate, "COMPILE", True)
    monkeypatch.setattr(evaluate, "COMPILER", dict(backend="eager"))
    torch._dynamo.reset()
    evaluate.compiled_logits.cache_clear()
    counters = torch._dynamo.utils.counters
    counters.clear()
    yield counters
    evaluate.compiled_logits.cache_clear()


def with_lora(model):
    """The model with a random adapter in all its matrices."""
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False)).eval()


WINDOW = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"],
              use_sliding_window=True)


@pytest.mark.parametrize("family, attention, dtype, more", [
    ("qwen2", "grouped", torch.float32, WINDOW), ("qwen2", "grouped", torch.bfloat16, WINDOW),
    ("llama", "eager", torch.float32, {})])
def test_a_compiled_step_samples_the_same(compiled, family, attention, dtype, more):
    """To the bit, in one graph, compiled anew for no token; and what the optimiser does to LoRA is
    seen by what was compiled before."""
    model, tokenizer = tiny(family, **more)
    model.set_attn_implementation(attention)
    model = with_lora(model.to(dtype))
    evaluate.multiply_in_bf16(model)
    prompts = prompts_of(tokenizer) * 3
    sample = partial(evaluate.generate, model, tokenizer, prompts, 15, 0.8, batch_size=16,
                     return_logps=True)
    first = sample()
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.1
    second = sample()
    assert second[0] != first[0]
    assert 0 < compiled["stats"]["unique_graphs"] == len(evaluate.KEPT[model]) < 6
    assert not compiled["graph_break"]
    evaluate.KEPT.clear()
    with patch.object(evaluate, "compiled_logits", lambda: evaluate.next_logits):
        assert sample() == second
    if dtype == torch.float32:  # in bf16, rows that are not there round a draw or two otherwise
        with patch.object(evaluate, "COMPILE", False):
            assert sample()[0] == second[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_cuda_a_recorded_step_samples_the_same():
    """And what the optimiser does to LoRA is seen by what was recorded before."""
    model, tokenizer = evaluate.load("data/arithmetic/student", device="cuda")
    model = with_lora(model)
    problems = tree.read_problems("data/arithmetic/test.jsonl", 64)
    prompts = [evaluate.encode(tokenizer, problem["question"])[0] for problem in problems]
    sample = partial(evaluate.generate, model, tokenizer, prompts, 128, batch_size=32)
    for _ in range(3):
        recorded = sample()
        assert any(step.graph for step in evaluate.KEPT[model].values())
        with patch.object(evaluate, "COMPILE", False):
            assert sample() == recorded
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data += 0.01


def test_where_nothing_can_be_compiled_the_plain_step_goes_on(compiled, monkeypatch, capsys):
    """It is said once."""
    def fail(graph, example_inputs):
        raise ValueError("no compiler here")
    model, tokenizer = tiny()
    prompts = prompts_of(tokenizer)
    with patch.object(evaluate, "COMPILE", False):
        expected = evaluate.generate(model, tokenizer, prompts, 15)
    monkeypatch.setattr(evaluate, "COMPILER", dict(backend=fail))
    for _ in range(2):
        assert evaluate.generate(model, tokenizer, prompts, 15) == expected
    said = capsys.readouterr().out
    assert said.count("decoding is not compiled: ") == 1 and "no compiler here" in said


def test_the_peak_of_memory_is_the_process_s_own():
    """A process that a large one has started had the large one's peak, and every part of the
    benchmark the same."""
    large = np.ones(2 ** 27)  # 1 GiB
    assert evaluate.peak_memory() > 2 ** 10
    code = "import evaluate; print(evaluate.peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50 < float(done.stdout) < 2 ** 10
    del large


def test_what_decoding_keeps_goes_where_memory_runs_out():
    """And the batch is halved: what fits beside no kept Steps would fail again after a rollout."""
    model, _ = tiny()
    evaluate.KEPT[model] = {}
    sizes = []

    def work(size):
        sizes.append(size)
        if len(sizes) < 3:
            raise RuntimeError("CUDA error: out of memory")
        return "done"
    assert evaluate.with_less_memory(work, 8) == ("done", 2)
    assert sizes == [8, 4, 2] and not evaluate.KEPT


@pytest.mark.parametrize("failing", range(2, 33, 3))
def test_a_step_that_was_torn_is_begun_anew(monkeypatch, failing):
    """Memory runs out in the middle of a new layout, and is there again without another model's
    Steps: as many side by side, the same completions."""
    model, tokenizer = tiny()
    prompts = prompts_of(tokenizer) * 2
    sample = partial(evaluate.generate, model, tokenizer, prompts, 25, batch_size=6)
    whole = sample()
    fill = evaluate.Step.fill
    calls = []

    def torn(step, *given):
        calls.append(step)
        if len(calls) == failing:
            raise RuntimeError("CUDA error: out of memory")
        fill(step, *given)
    monkeypatch.setattr(evaluate.Step, "fill", torn)
    other, _ = tiny()
    evaluate.KEPT[other] = {}
    assert sample() == whole
    assert len(calls) > failing and not evaluate.KEPT


@pytest.mark.parametrize("room", [1, 2, 5])
def test_out_of_memory_halves_the_batch(monkeypatch, capsys, room):
    """Half as many side by side give the same completions; one that does not fit is an error."""
    model, tokenizer = tiny()
    prompts = prompts_of(tokenizer)
    whole = evaluate.generate(model, tokenizer, prompts, 9)
    call = evaluate.Step.__call__
    calls = []

    def small(step, *given):
        calls.append(step.rows)
        if step.rows > room and len(calls) > 2:  # some tokens have been sampled already
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(step, *given)
    monkeypatch.setattr(evaluate.Step, "__call__", small)
    prefill = evaluate.prefill

    def small_prefill(model, prompts):
        if room < len(prompts) < 5:  # after the first time
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prefill(model, prompts)
    monkeypatch.setattr(evaluate, "prefill", small_prefill)
    assert evaluate.generate(model, tokenizer, prompts, 9) == whole
    assert "out of memory; going on with" in capsys.readouterr().out
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        evaluate.generate(model, tokenizer, prompts, 9)


def test_attention_that_ignores_the_mask_is_refused():
    model, _ = tiny()
    evaluate.check_tree_masks(model, "tiny")
    forward = model.forward
    model.forward = lambda *args, attention_mask=None, **how: forward(*args, **how)
    with pytest.raises(InputError, match="log-probs differ by .* share their prefixes"):
        evaluate.check_tree_masks(model, "tiny")


def test_eos_is_kept_and_nothing_follows_it():
    model, tokenizer = tiny()
    eos = tokenizer.eos_token_id
    out = evaluate.generate(model, tokenizer, prompts_of(tokenizer) * 20, 30)
    ended = [ids for ids in out if eos in ids]
    assert ended
    assert all(ids.index(eos) == len(ids) - 1 for ids in ended)
    assert all(len(ids) == 30 for ids in out if eos not in ids)


def test_a_chat_model_has_several_end_tokens():
    model, tokenizer = tiny()
    pen = tokenizer.convert_tokens_to_ids(" pen")
    model.generation_config.eos_token_id = [3, pen]
    assert evaluate.eos_ids(model, tokenizer) == [3, pen]
    out = evaluate.generate(model, tokenizer, prompts_of(tokenizer) * 20, 30)
    assert any(ids[-1] == pen for ids in out)
    assert not any(pen in ids[:-1] for ids in out)


def cut_at_blank(tokenizer, ids):
    """The ids up to the first blank line behind some text."""
    for n in range(1, len(ids) + 1):
        if "\n\n" in tokenizer.decode(ids[:n], skip_special_tokens=True).lstrip():
            return ids[:n]
    return ids


def test_stop_at_blank_ends_with_the_first_blank_line():
    """Also where the blank line is merged into ".\\n\\n" or split over two tokens; and only for
    the prompts that ask."""
    model, tokenizer = tiny()
    prompts = prompts_of(tokenizer) * 20
    stop = [k % 2 == 0 for k in range(len(prompts))]
    plain = evaluate.generate(model, tokenizer, prompts, 25)
    stopped = evaluate.generate(model, tokenizer, prompts, 25, stop_at_blank=stop)
    for ids, whole, stops in zip(stopped, plain, stop):
        assert ids == (cut_at_blank(tokenizer, whole) if stops else whole)
    stopped = evaluate.generate(model, tokenizer, prompts, 25, stop_at_blank=True)
    assert stopped == [cut_at_blank(tokenizer, whole) for whole in plain]
    assert len({ids[-1] for ids in stopped}) > 2


# ---- Prompts -------------------------------------------------------------------------------------
def test_prefixes_of_text_are_prefixes_of_ids():
    _, tokenizer = tiny()
    steps = ["1 + 2 = 3", "The answer is 3."]
    prompt, first, second = evaluate.encode(tokenizer, QUESTIONS[0], steps)
    text = QUESTIONS[0] + "\n\n1 + 2 = 3\n\nThe answer is 3.\n\n"
    assert tokenizer.decode(prompt + first + second) == text
    assert evaluate.encode(tokenizer, QUESTIONS[0], steps[:1]) == [prompt, first]


def test_a_prefix_opens_the_assistants_turn():
    """With a chat template the question stands in the user's turn, and BOS is not doubled."""
    _, tokenizer = tiny()
    tokenizer.chat_template = ("<bos>{% for m in messages %}{{ m['content'] }}{% endfor %}"
                               "{% if add_generation_prompt %}The{% endif %}")
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    prompt, step = evaluate.encode(tokenizer, QUESTIONS[0], ["1 + 2 = 3"])
    assert prompt.count(tokenizer.bos_token_id) == 1
    assert prompt[-1] == tokenizer.convert_tokens_to_ids("The")
    assert tokenizer.decode(step) == "1 + 2 = 3\n\n"


def real_tokenizer(kind):
    """One that spells spaces and newlines as these families do, a blank line in several ways."""
    if kind in ("gpt2", "qwen"):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        merges = [("Ċ", "Ċ"), (".", "ĊĊ"), ("Ġ", "Ċ"), ("č", "Ċ"), ("čĊ", "čĊ"), ("1", "2")]
    else:  # SentencePiece has bytes for what it has no piece for
        alphabet = [f"<0x{k:02X}>" for k in range(256)] + list("▁0123456789+=.Soxi")
        merges = [("▁", "+"), ("▁", "▁"), ("1", "2")]
    words = ["</s>", "<unk>", *alphabet, *map("".join, merges)]
    vocabulary = {word: k for k, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    if kind == "llama2":  # a mark before every text
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                                     tokenizer.normalizer])
        pieces.append(decoders.Strip(" ", 1, 0))
    elif kind == "gemma":
        tokenizer.add_tokens(["\n\n", "\n\n\n", "\t"])
    else:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=kind == "gpt2")
        pieces = [decoders.ByteLevel()]
    tokenizer.decoder = decoders.Sequence(pieces)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


KINDS = ("llama2", "gemma", "gpt2", "qwen")
GAPS = sorted(set(map("".join, itertools.product(["", *" \t\r\n"], repeat=3))))


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_of_steps_join_to_their_text(kind):
    """Llama 2 puts a mark before every text: each step but the first began with a stray space."""
    tokenizer = real_tokenizer(kind)
    first, second = evaluate.encode_steps(tokenizer, ["12 + 7 = 19.", "So 1"])
    assert tokenizer.decode(first + second) == "12 + 7 = 19.\n\nSo 1\n\n"
    assert evaluate.encode_steps(tokenizer, ["12 + 7 = 19."]) == [first]


@pytest.mark.parametrize("kind", KINDS)
def test_every_spelling_of_a_blank_line_ends_a_step(kind):
    """Spread over three tokens, or with spaces, tabs and carriage returns between the newlines, it
    was missed: the search's step had no end, and the whole text was credited to its first step."""
    model, _ = tiny()
    model.resize_token_embeddings(300)
    tokenizer = real_tokenizer(kind)
    texts = [f"\n\n1 + 2 = 3.\n{gap}\nSo 12\n{gap}\nSo 3" for gap in GAPS]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    scripts = np.zeros((len(ids), max(map(len, ids))))
    for k, row in enumerate(ids):
        scripts[k, :len(row)] = row
        starts = evaluate.step_starts(tokenizer, row)
        steps = [tokenizer.decode(row[a:b]).strip() for a, b in zip(starts, [*starts[1:], None])]
        assert steps == ["1 + 2 = 3.", "So 12", "So 3"]

    def draw(seed, k):  # the model says what the script says
        return SimpleNamespace(random=lambda length: scripts[k])

    def follow(logits, temperature, uniform):
        return uniform.long(), uniform.float()
    with patch.object(evaluate, "rng", draw), patch.object(evaluate, "sample_token", follow):
        out = evaluate.generate(model, tokenizer, [[5, 6]] * len(ids), scripts.shape[1],
                                stop_at_blank=True)
    assert {tokenizer.decode(row).strip() for row in out} == {"1 + 2 = 3."}


def test_the_end_token_is_no_step_of_its_own():
    """Behind a blank line it was one, and had the reward instead of the step before."""
    _, tokenizer = tiny()
    [step] = evaluate.encode_steps(tokenizer, ["1 + 2 = 3"])
    assert evaluate.step_starts(tokenizer, [*step, tokenizer.eos_token_id]) == [0]
    assert evaluate.step_starts(tokenizer, [*step, *step, tokenizer.eos_token_id]) == [0, len(step)]


def test_a_special_token_in_a_question_is_text():
    _, tokenizer = tiny()
    prompt = evaluate.encode(tokenizer, "Ann has <eos> 1 pen .")[0]
    assert tokenizer.eos_token_id not in prompt


def test_a_prompt_never_ends_in_the_end_token():
    """Some tokenizers close every text with it: the model had to go on behind the end."""
    _, tokenizer = tiny()
    expected = evaluate.encode(tokenizer, QUESTIONS[0])[0]
    closing = tokenizer.backend_tokenizer
    closing.post_processor = processors.TemplateProcessing(
        "$A <eos>", special_tokens=[("<eos>", 3)])
    assert tokenizer(QUESTIONS[0])["input_ids"][-1] == 3
    assert evaluate.encode(tokenizer, QUESTIONS[0])[0] == expected


def test_a_turn_ends_as_the_chat_template_ends_it():
    """With a token that is neither tokenizer.eos_token nor in generation_config, and has no name
    among the tokenizer's: the text behind the turn was graded, and sft closed with another."""
    model, tokenizer = tiny()
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    model.resize_token_embeddings(len(tokenizer))
    tokenizer.chat_template = ("{% for m in messages %}{{ m['content'] }}<|end|>\n{% endfor %}"
                               "{% if add_generation_prompt %}The{% endif %}")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    _, solution = evaluate.encode_solution(tokenizer, "1 + 1", ["1 + 1 = 2", "The answer is 2."])
    assert solution[-1] == end and 3 not in solution
    assert evaluate.eos_ids(model, tokenizer) == [3, end]
    out = evaluate.generate(model, tokenizer, prompts_of(tokenizer) * 20, 20)
    ended = [ids for ids in out if end in ids]
    assert ended and all(ids.index(end) == len(ids) - 1 for ids in ended)
    assert not any("end" in evaluate.decode(tokenizer, ids) for ids in ended)


def test_prompts_do_not_depend_on_the_clock():
    """Templates print today's date: the trainer's prompts were others than the search's."""
    _, tokenizer = tiny()
    tokenizer.chat_template = "{{ strftime_now('%d %m %Y') }} {{ messages[0]['content'] }}"
    text = evaluate.render(tokenizer, [{"role": "user", "content": "Ann has 1 pen ."}])
    assert text == "01 Jan 2025 Ann has 1 pen ."


def test_prompts_that_do_not_fit_are_refused(capsys):
    model, tokenizer = tiny()
    evaluate.check_prompts(model, tokenizer, [[7] * 256], 10)
    with pytest.raises(InputError, match="257 tokens.*256 positions"):
        evaluate.check_prompts(model, tokenizer, [[7] * 257], 10)
    with pytest.raises(InputError, match="0 to 1 tokens"):
        evaluate.check_prompts(model, tokenizer, [[7], []], 10)
    learned = GPT2LMHeadModel(GPT2Config(n_positions=96, n_embd=32, n_layer=1, n_head=2))
    evaluate.check_prompts(learned, tokenizer, [[7] * 86], 10)  # completions have to fit, too
    with pytest.raises(InputError, match="87 tokens, completions up to 10.*96 positions"):
        evaluate.check_prompts(learned, tokenizer, [[7] * 87], 10)
    assert "lacks" not in capsys.readouterr().out
    evaluate.check_prompts(model, tokenizer, [tokenizer("Q: Ann")["input_ids"], [7]], 10)
    assert "1 of 2 prompts hold words that the tokenizer lacks" in capsys.readouterr().out


# ---- Scores --------------------------------------------------------------------------------------
def rows_of(correct, answers=None):
    """Rows of scores whose completions give these answers (1 is right), one list a problem."""
    rows = []
    for k, flags in enumerate(correct):
        given = answers[k] if answers else [str(int(flag)) for flag in flags]
        texts = [f"The answer is {answer}." if answer else "I do not know." for answer in given]
        rows.append(dict(id=str(k), question=f"q{k}", answer="1", completions=texts, correct=flags,
                         flexible=flags, truncated=[False] * len(flags), tokens=[1] * len(flags),
                         steps=2 + k % 2))
    return rows


def test_figures_of_a_scoring():
    """Greedy, mean@k, maj@k (a vote, not an average) and pass@k on a worked example. Completions
    without an answer have no vote."""
    rows = rows_of([[True, False, False, True, False], [False, True, True, False, False]],
                   [["1", "6", "6", "1", "7"], ["0", "1", "1.0", None, None]])
    figures = {name: share for name, (share, *_) in evaluate.summarise(rows).items()}
    assert figures["greedy"] == 0.5
    assert figures["mean@4"] == 0.375
    assert figures["maj@4"] == 0.5
    assert figures["pass@4"] == 1.0
    assert "steps 2: 100.0 % of 1" in evaluate.table(rows)


def test_the_vote():
    """1.0 and 2/2 are one answer, and what was truncated has no vote: three of the samples had come
    to 3, and none of them was right. What is right is what the grader said."""
    [row] = rows_of([[False] * 5 + [True] * 2], [["0", "3", "3", "3", "7", "1.0", "2/2"]])
    assert not evaluate.majority(row)
    row["truncated"] = [False, True, True, True, False, False, False]
    assert evaluate.majority(row)
    row["correct"] = [False] * 7
    assert not evaluate.majority(row)
    row["truncated"] = [False] + [True] * 6
    assert not evaluate.majority(row)


def test_instances_of_one_template_are_one_cluster():
    """GSM-Symbolic's 50 instances of a template entered the interval as if independent."""
    rows = rows_of([[k < 50] for k in range(100)])
    _, low, high = evaluate.summarise(rows)["greedy"]
    assert high - low < 0.2
    for k, row in enumerate(rows):
        row["template"] = f"t{k // 25}"
    share, low, high = evaluate.summarise(rows)["greedy"]
    assert (share, low, high) == (0.5, 0, 1)
    assert "+0.0 points, 95 % [+0.0, +0.0]" in evaluate.compare(rows, rows)


def test_intervals():
    """Wilson's interval has the textbook's value; clusters of equal problems widen the interval
    as if each were one problem."""
    share, low, high = evaluate.mean_interval([0.0] * 50, range(50))
    assert (share, low) == (0, 0)
    assert high == pytest.approx(0.0713, abs=1e-3)
    values = np.array([0.2, 0.5, 0.9, 0.4])
    once = evaluate.mean_interval(values, range(4))
    thrice = evaluate.mean_interval(np.repeat(values, 3), np.repeat(range(4), 3))
    assert thrice == pytest.approx(once)
    assert np.isnan(evaluate.mean_interval(values, [0] * 4)[1:]).all()  # nothing to tell it from
    error = values.std(ddof=1) / 2
    assert once == pytest.approx((0.5, 0.5 - 1.96 * error, 0.5 + 1.96 * error))
    assert evaluate.mean_interval([0.25] + [0.0] * 99, range(100))[1] == 0  # no share is below
    halves = np.arange(100) // 50
    assert evaluate.mean_interval([1.0] * 98 + [0.0] * 2, halves)[2] == 1  # nor above


def test_compare_is_paired():
    """8 better and 1 worse of 100: p = 2 (1 + 9) / 2^9 by the exact test, whatever the other 91
    problems are."""
    first = rows_of([[False]] * 8 + [[True]] * 92)
    second = rows_of([[True]] * 8 + [[False]] + [[True]] * 91)
    text = evaluate.compare(first, second[::-1])
    assert "8 better, 1 worse" in text
    assert "p = 0.039" in text
    assert "+7.0 points" in text
    better = evaluate.compare(first, rows_of([[True]] * 100))  # of none that are worse
    half = 196 * np.sqrt(0.08 * 0.92 / 99)  # it is no share, whose interval would be Wilson's
    assert f"+8.0 points, 95 % [{8 - half:+.1f}, {8 + half:+.1f}]" in better
    with pytest.raises(InputError, match="no problem in common"):
        evaluate.compare(first, [dict(row, id="other" + row["id"]) for row in second])
    with pytest.raises(InputError, match="other problems under the same id"):
        evaluate.compare(first, [dict(row, question="another") for row in second])


def test_a_truncated_completion_is_never_correct():
    """Whatever its text says; the problem's own fields stay in the row."""
    model, tokenizer = tiny()
    problems = [dict(id=str(k), question=q, answer="1", own=k) for k, q in enumerate(QUESTIONS)]
    with patch.object(evaluate, "is_correct", return_value=True), \
            patch.object(evaluate, "is_solved", return_value=True):
        rows = list(evaluate.score(model, tokenizer, problems, 12, samples=8))
    assert [row["own"] for row in rows] == list(range(5))
    cut = []
    for row in rows:
        cut += row["truncated"]
        assert row["correct"] == row["flexible"] == [not flag for flag in row["truncated"]]
        assert len(row["completions"]) == 9
    assert 0 < sum(cut) < len(cut)


def score_here(folder, *more, answer="1"):
    """The command in this process, on QUESTIONS."""
    problems = [dict(id=str(k), question=q, answer=answer) for k, q in enumerate(QUESTIONS)]
    if "WORLD_SIZE" not in os.environ:  # else the ranks would write it at the same time
        tree.write_jsonl(f"{folder}/data.jsonl", problems)
    flags = (f"--model {folder}/model --data {folder}/data.jsonl --out {folder}/scores.jsonl "
             "--max_new_tokens 12 --samples 2 --batch_size 2")
    with patch.object(sys, "argv", ["evaluate.py", *flags.split(), *more]):
        evaluate.main()


def test_scoring_as_a_command(tmp_path, capsys):
    """Half done, torn, and continued: each problem once, in the same words. A file of other
    settings or of another problem is refused."""
    tiny_folder(tmp_path / "model")
    scores = tmp_path / "scores.jsonl"
    score_here(tmp_path)
    said = capsys.readouterr().out
    assert "greedy" in said and "mean@2" in said and "truncated" in said
    whole = scores.read_text()
    scores.write_text(whole[:len(whole) // 2])
    score_here(tmp_path)
    assert "problems are taken from" in capsys.readouterr().out
    assert scores.read_text() == whole
    with pytest.raises(InputError, match="its seed is 0 and not 1"):
        score_here(tmp_path, "--seed", "1")
    with pytest.raises(InputError, match="is of another problem"):
        score_here(tmp_path, answer="7")
    assert scores.read_text() == whole
    score_here(tmp_path, "--compare", str(scores), str(scores))
    assert "5 problems in both" in capsys.readouterr().out


def test_a_model_that_was_trained_further_is_another(tmp_path, capsys):
    """Scores were known by the adapter's folder: after training again into it, those of the old one
    were reported. What is taken from a file is said."""
    tiny_folder(tmp_path / "model")
    model, _ = evaluate.load(str(tmp_path / "model"))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "run")
    adapter = ["--adapter", str(tmp_path / "run")]
    score_here(tmp_path, "--limit", "3", *adapter)
    score_here(tmp_path, *adapter)
    assert "3 of 5 problems are taken from" in capsys.readouterr().out
    before = (tmp_path / "scores.jsonl").read_text()
    weights(lambda w: {n: x + 0.1 for n, x in w.items()})(
        tmp_path / "run" / "adapter_model.safetensors")
    with pytest.raises(InputError, match="its weights is .* expected the same, or another --out"):
        score_here(tmp_path, *adapter)
    assert (tmp_path / "scores.jsonl").read_text() == before


def rank(number, world, port, folder):
    """One of the processes of a torchrun, forked: it need not import torch again."""
    os.environ.update(RANK=str(number), WORLD_SIZE=str(world), LOCAL_RANK=str(number),
                      MASTER_ADDR="localhost", MASTER_PORT=str(port))
    sys.stdout = open(f"{folder}/said-{number}", "w")
    score_here(folder)
    sys.stdout.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded")
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_problems(tmp_path, world):
    """They hung for ever: all but one returned, and that one waited for them. Begun by one rank, it
    is continued by more, with the same completions."""
    tiny_folder(tmp_path / "model")
    score_here(tmp_path)
    whole = (tmp_path / "scores.jsonl").read_text().splitlines()
    (tmp_path / "scores.jsonl").write_text(whole[2] + "\n" + whole[3][:20])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=rank, args=(k, world, port, tmp_path)) for k in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    assert sorted((tmp_path / "scores.jsonl").read_text().splitlines()) == sorted(whole)
    assert "1 of 5 problems are taken from" in (tmp_path / "said-0").read_text()
    assert "5 problems, " in (tmp_path / "said-0").read_text()
    assert (tmp_path / "said-1").read_text() == ""


BAD_FLAGS = [
    "--limit -1", "--seed -1", "--samples -1", "--temperature nan", "--temperature -1",
    "--temperature inf", "--batch_size 0", "--max_new_tokens 0", "--lim 3", "--data FOLDER",
    "--data FOLDER/none", "--data FOLDER/empty", "--data FOLDER/torn", "--out FOLDER/torn/below",
    "--compare FOLDER/torn FOLDER/other", "--compare FOLDER/half FOLDER/half",
    "--model FOLDER/none"]


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_and_files_are_one_line_before_any_model_is_loaded(tmp_path, capsys, flags):
    row = rows_of([[True]])[0]
    files = {"empty": "", "torn": '{"id": "p', "other": json.dumps(row) + "\n",
             "data": '{"id": "0", "question": "q", "answer": "1"}\n',
             "half": json.dumps(dict(row, tokens=[])) + "\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    flags = flags.replace("FOLDER", str(tmp_path)).split()
    argv = ["evaluate.py", "--data", f"{tmp_path}/data", "--out", f"{tmp_path}/out", *flags]
    loading = patch.object(evaluate.AutoModelForCausalLM, "from_pretrained",
                           side_effect=AssertionError("a model was loaded"))
    with patch.object(sys, "argv", argv), patch.object(sys, "stdout"), loading:
        with pytest.raises(SystemExit) as end:
            tree.run_command(evaluate.main)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert re.fullmatch(r"evaluate\.py: [^\n]+\n", said)
    assert "a model was loaded" not in said


# ---- Loading -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, says", [("nobody/nothing", "cannot be used"),
                                        ("./nowhere", "no folder"),
                                        ("/nowhere/at/all", "no folder")])
def test_a_model_that_cannot_be_had_is_one_sentence(name, says, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=says):
        evaluate.load(name)


def test_tokenizers_that_do_not_fit_are_refused(tmp_path):
    """One without EOS, and one larger than the model. A pad token is needed by nobody."""
    folder = str(tmp_path)
    tiny_folder(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra{k}>" for k in range(50)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="embeds fewer tokens"):
        evaluate.load(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="no end-of-sequence token"):
        evaluate.load(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert evaluate.load(folder)[1].pad_token is None


def test_teachers_with_another_vocabulary_are_refused(tmp_path):
    tiny_folder(tmp_path / "student")
    tiny_folder(tmp_path / "teacher")
    evaluate.check_vocabulary(str(tmp_path / "teacher"), str(tmp_path / "student"))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(tmp_path / "teacher")
    with pytest.raises(InputError, match="another vocabulary"):
        evaluate.check_vocabulary(str(tmp_path / "teacher"), str(tmp_path / "student"))


def write_text(text):
    return lambda path: path.write_text(text)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-50])


def fields(**new):
    """Change fields of a JSON file."""
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | new))


def weights(change):
    """Change the dictionary of weights in a safetensors file."""
    def spoil(path):
        changed = change(load_file(path))
        contiguous = {name: weight.contiguous() for name, weight in changed.items()}
        save_file(contiguous, path, {"format": "pt"})
    return spoil


def only_pickle(path):
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()


def add_layer(tensors):
    more = {name.replace("layers.1", "layers.7"): w.clone() for name, w in tensors.items()}
    return tensors | more


WEIGHTS = "model/model.safetensors"
CONFIG = "model/config.json"
ADAPTER = "adapter/adapter_model.safetensors"
ADAPTER_CONFIG = "adapter/adapter_config.json"
DAMAGE = {  # the file, what is done to it, what is said then
    "truncated": (WEIGHTS, cut_off, "SafetensorError"),
    "empty": (WEIGHTS, write_text(""), "SafetensorError"),
    "pickled": (WEIGHTS, only_pickle, "no file named model.safetensors"),
    "a weight missing": (WEIGHTS, weights(lambda w: dict(list(w.items())[1:])), "are missing"),
    "other shapes": (CONFIG, fields(hidden_size=64), "of another shape"),
    "more layers": (CONFIG, fields(num_hidden_layers=5), "are missing"),
    "torn config": (CONFIG, write_text("{"), "valid JSON"),
    "a list": (CONFIG, write_text("[]"), "TypeError|Unrecognized model"),
    "torn tokenizer": ("model/tokenizer.json", write_text('{"a":'), "the tokenizer of"),
    "template": ("model/tokenizer_config.json",
                 fields(chat_template="{{ raise_exception('no') }}"), "TemplateError"),
    "adapter truncated": (ADAPTER, cut_off, "SafetensorError"),
    "adapter of other layers": (ADAPTER, weights(add_layer), "alone"),
    "adapter of other modules": (ADAPTER_CONFIG, fields(target_modules=["up_proj"]), "alone"),
    "adapter of other shapes": (
        ADAPTER, weights(lambda w: {n: x[:, :9] for n, x in w.items()}), "size mismatch"),
    "diverged adapter": (
        ADAPTER, weights(lambda w: {n: x * np.nan for n, x in w.items()}), "not finite numbers"),
    "adapter config": (ADAPTER_CONFIG, write_text("{}"), "KeyError")}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with a model and an adapter on it that can be loaded."""
    folder = tmp_path_factory.mktemp("sound")
    tiny_folder(folder / "model")
    model, _ = evaluate.load(str(folder / "model"))
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    evaluate.load(str(folder / "model"), str(folder / "adapter"))
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_models_are_one_sentence(sound, tmp_path, damage):
    """Weights that are missing would be made up, and an adapter's that have no place left out."""
    file, spoil, says = DAMAGE[damage]
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path / file)
    with pytest.raises(InputError, match=says) as caught:
        evaluate.load(str(tmp_path / "model"), str(tmp_path / "adapter"))
    assert "xpected" in str(caught.value)
    assert "\n" not in str(caught.value)


ADAPTERS = {
    "a tied embedding": dict(target_modules=["q_proj", "embed_tokens"]),
    "a tied head": dict(target_modules=["q_proj", "lm_head"]),
    "both": dict(target_modules=["embed_tokens", "lm_head"]),
    "biases": dict(target_modules=["q_proj"], lora_bias=True),
    "DoRA": dict(target_modules=["q_proj"], use_dora=True),
    "some tokens": dict(target_modules=["q_proj"], trainable_token_indices=[4, 5]),
    "whole modules": dict(target_modules=["q_proj"], modules_to_save=["lm_head"])}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [*ADAPTERS, "IA3"])
def test_adapters_that_could_not_be_folded_into_the_weights_work(tmp_path, name):
    """LoRA on one of two tied matrices was folded into both: 9 nat between sampler and trainer, and
    lora_bias was a traceback."""
    model, tokenizer = tiny(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    if name == "IA3":
        config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    else:
        config = LoraConfig(r=4, **ADAPTERS[name])
    tuned = get_peft_model(model, config)
    for weight in tuned.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    loaded, _ = evaluate.load(str(tmp_path / "model"), str(tmp_path / "adapter"))
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(loaded(ids).logits, tuned.eval()(ids).logits)
    assert sampler_and_trainer_differ_by(loaded, tokenizer, prompts_of(tokenizer)[2:6]) < 1e-4


def test_an_adapter_is_looked_for_on_the_hub_too(sound, monkeypatch):
    """A name was taken for a folder. The weights are asked for as the hub has them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="adapter nobody/nothing .*LocalEntryNotFoundError"):
        evaluate.load(f"{sound}/model", "nobody/nothing")


def test_an_adapter_that_adds_to_the_prompt_is_refused(sound, tmp_path):
    model, _ = evaluate.load(f"{sound}/model")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="adds to the prompt"):
        evaluate.load(f"{sound}/model", str(tmp_path))


def test_an_adapters_base_is_known_by_its_weights_and_its_tokenizer_counts(sound, tmp_path):
    """The right base in another folder was refused, a wrong one of the same name accepted (see
    DAMAGE). The adapter's own chat template was ignored."""
    shutil.copytree(sound / "model", tmp_path / "renamed")
    shutil.copytree(sound / "adapter", tmp_path / "adapter")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }} How"
    tokenizer.save_pretrained(tmp_path / "adapter")
    _, tokenizer = evaluate.load(f"{tmp_path}/renamed", f"{tmp_path}/adapter")
    assert tokenizer.decode(evaluate.encode(tokenizer, "Ann has")[0]).endswith(" How")
    assert evaluate.load(f"{tmp_path}/renamed")[1].chat_template is None


def test_a_diverged_model_is_refused(tmp_path):
    tiny_folder(tmp_path)
    weights(lambda w: {n: x * np.nan for n, x in w.items()})(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="not finite"):
        evaluate.load(str(tmp_path))


@pytest.mark.parametrize("amx, small, expected", [
    (True, False, torch.bfloat16), (True, True, torch.float32), (False, False, torch.float32)])
def test_the_dtype_is_what_the_device_is_fast_at(sound, amx, small, expected, monkeypatch):
    """A CPU with AMX has six times its float32 rate in bf16, one with AVX512-BF16 alone half of it.
    A small model gains nothing."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(evaluate, "is_small", lambda model: small)
    model, _ = evaluate.load(f"{sound}/model", f"{sound}/adapter")
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    lora = {dtype for name, dtype in dtypes.items() if "lora_" in name}
    base = {dtype for name, dtype in dtypes.items() if "lora_" not in name}
    assert (base, lora) == ({expected}, {torch.float32})
    model, _ = evaluate.load(f"{sound}/model", dtype="float32")
    assert model.dtype == torch.float32


def test_in_bf16_the_sampler_is_the_trainer_too():
    """Below 0.01 nat a token, on the embedded student with LoRA."""
    model, tokenizer = evaluate.load("data/arithmetic/student", dtype="bfloat16")
    problems = tree.read_problems("data/arithmetic/test.jsonl", 16)
    prompts = [evaluate.encode(tokenizer, problem["question"])[0] for problem in problems]
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).eval()
    evaluate.multiply_in_bf16(model)
    assert sampler_and_trainer_differ_by(model, tokenizer, prompts, np.mean) < 0.01


def test_on_a_bf16_base_lora_s_products_are_bf16():
    """That costs logits and gradients no more accuracy than the bf16 base has cost already. The
    gradients stay float32, as the weights do. A float32 model is left as it was."""
    model, _ = tiny()
    model = with_lora(model)
    ids = torch.randint(model.config.vocab_size, (4, 12),
                        generator=torch.Generator().manual_seed(0))
    products = []
    for name, module in model.named_modules():
        if "lora_A" in name:
            module.register_forward_hook(lambda module, given, out: products.append(out.dtype))

    def logits_and_gradient():
        products.clear()
        logits = model(ids).logits.float()
        logits.log_softmax(-1)[..., 7].sum().backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert {g.dtype for g in gradients} == {torch.float32}
        model.zero_grad()
        return logits, torch.cat([g.flatten() for g in gradients])

    def largest_error():
        pairs = zip(logits_and_gradient(), exact)
        return max(((found - true).norm() / true.norm()).item() for found, true in pairs)
    forward = model.forward
    evaluate.multiply_in_bf16(model)
    assert model.forward == forward
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            weight.data = weight.data.to(torch.bfloat16).float()
    exact = logits_and_gradient()
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            weight.data = weight.data.to(torch.bfloat16)
    float32_products = largest_error()
    assert set(products) == {torch.float32}
    evaluate.multiply_in_bf16(model)
    bf16_products = largest_error()
    assert set(products) == {torch.bfloat16}
    assert 0 < float32_products < 0.05 and bf16_products < 1.5 * float32_products


# ---- Judging -------------------------------------------------------------------------------------
GRADED = [  # the gold answer, a completion, whether it is right where answers must be marked
    ("5", r"First \boxed{3}, no: \boxed{5}.", True),
    ("5", r"\boxed{3}. Wait, the answer is 5.", True),
    ("72", "#### 72", True),
    ("72", "The answer is 36 + 36 = 72", True),
    ("72", "so it is 72", False),
    ("72", "The answer is", False),
    ("as", r"\boxed as you wished", False),
    ("72", "The answer is 7.", False),
    ("72", r"\boxed{-72}", False),
    ("72", r"\boxed{72, 73}", False),
    ("1,234", "The answer is $1,234.00.", True),
    ("5,000", r"\boxed{5}", False),
    ("1/2", r"\boxed{\frac12}", True),
    ("1/2", r"\boxed{0.5}", True),
    ("1/3", r"\boxed{0.33}", False),
    (r"1 \frac{3}{4}", r"\boxed{\frac{7}{4}}", True),
    (r"25\%", r"\boxed{\frac{1}{4}}", True),
    ("25", r"\boxed{0.25}", False),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", True),
    (r"\pi", r"\boxed{3.14}", False),
    (r"90^\circ", r"\boxed{90}", True),
    ("x^2+2x+1", r"\boxed{x^2+1}", False),
    ("p - q", r"\boxed{-q+p}", True),
    ("x=5", r"\boxed{5}", True),
    ("3, 5, 7", r"\boxed{7, 5, 3}", True),
    ("(3,4)", r"\boxed{(4,3)}", False),
    ("(3,4]", r"\boxed{[3,4)}", False),
    (r"x \in [-2,7]", r"\boxed{[-2,7]}", True),
    (r"\text{Evelyn}", "The answer is Evelyn.", True),
    (r"\text{(C)}", r"\boxed{C}", True),
    (r"\text{(C)}", r"\boxed{D}", False)]


@pytest.mark.parametrize("gold, completion, right", GRADED)
def test_completions_are_judged(gold, completion, right):
    assert evaluate.is_solved(completion, {"answer": gold}) == right


def test_a_number_without_a_marker_is_right_only_for_the_flexible_score():
    assert is_correct("so 5 + 3 = 8", "8")
    assert not evaluate.is_solved("so 5 + 3 = 8", {"answer": "8"})
