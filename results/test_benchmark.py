"""The benchmark's other side does its work on whatever weights ours does."""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import benchmark  # noqa: E402


def test_generate_of_bf16_weights(monkeypatch):
    """transformers' generate goes past our autocast: float32 LoRA on a bf16 base needs its own."""
    monkeypatch.chdir(os.path.dirname(HERE))
    flags = "--dtype bfloat16 --batch_size 8 --new_tokens 2 --threads 1"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags.split()])
    args = benchmark.parse_args()
    knobs, run, trees = benchmark.build(args)
    prompts = [sample.prefix_ids for sample in benchmark.make_batch(run, trees, knobs)]
    tokens = []
    real = run.models.student.generate
    monkeypatch.setattr(run.models.student, "generate",
                        lambda **how: tokens.append(real(**how)))
    benchmark.their_generate(run, prompts, args)
    assert tokens[0].shape == (8, max(map(len, prompts)) + 2)
