"""The script for a GPU, with a tiny model on a CPU: no part may end the others."""
import json
import os
import sys
from unittest.mock import patch

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import gpu  # noqa: E402


def bench_rows(tmp_path, *more):
    """What the command writes where train.py ends badly."""
    with patch.object(sys, "argv", ["gpu.py", "--tiny", "--out", f"{tmp_path}/rows", *more]), \
            patch.object(gpu.subprocess, "run", side_effect=OSError("no room")), \
            patch.multiple(gpu.evaluate, COMPILE=None, COMPILER=gpu.evaluate.COMPILER):
        gpu.main()  # which sets both
    gpu.evaluate.forget_steps()
    return [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]


def test_every_part_has_its_rows_and_a_failure_is_one(tmp_path, capsys):
    """The default's process cannot be started: one row says so, and all others are measured."""
    rows = bench_rows(tmp_path)
    failed = [row for row in rows if "error" in row]
    assert {row["part"] for row in failed} == {"default"}
    assert "OSError: no room" in failed[0]["error"]
    parts = [row["part"] for row in rows]
    assert parts.count("decode") == 6 and parts.count("step") == 2
    for row in rows:
        assert row.get("as_asked", True)
        assert row.get("gap", 0) < 1e-2
    table = capsys.readouterr().out
    assert all(f"| {row['part']} | {row['name']} |" in table for row in rows)


def test_without_time_every_part_says_so(tmp_path):
    """None is left out in silence."""
    rows = bench_rows(tmp_path, "--minutes", "0")
    assert len(rows) > 12 and all("no time was left" in row["error"] for row in rows)


@pytest.mark.parametrize("name", gpu.SIZES)
def test_the_prefixes_of_a_group_are_of_one_tree(name):
    """Else packing would save nothing, and its speed would be another's."""
    size = gpu.SIZES[name]
    knobs = gpu.train.parse_args(["--preset", "paper"])
    samples = gpu.make_batch(size, knobs)
    assert len(samples) == 32
    lengths = [len(s.prefix_ids) for s in samples]
    assert max(lengths) == size["question"] + 4 * size["step"] <= 512
    assert samples[1].prefix_ids[:lengths[0]] == samples[0].prefix_ids
