"""Published data sets as people have them, downloads that are not whole, and the embedded world."""
import json
import os
import random
import subprocess
import sys
from unittest.mock import patch

import pytest

import prepare
from prepare import Published
from tree import InputError

ROWS = ['{"question": "3 pens and 4?", "answer": "3+4=<<3+4=7>>7\\n#### 7"}',
        '{"question": "1 and 1?", "answer": "1+1=2\\n#### 2"}']


def write(path, text):
    with open(path, "wb") as file:
        file.write(text.encode())
    return str(path)


def read(path):
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_gsm8k_becomes_problems_and_traces(tmp_path):
    source = write(tmp_path / "test.jsonl", "\n".join(ROWS))
    prepare.prepare("gsm8k", source, f"{tmp_path}/out")
    problems = read(f"{tmp_path}/out/test.jsonl")
    assert problems[0] == {"id": "test-1", "question": "3 pens and 4?", "answer": "7",
                           "solution": "3+4=<<3+4=7>>7", "steps": 1}
    traces = read(f"{tmp_path}/out/test_traces.jsonl")
    assert traces[0] == {"id": "test-1", "question": "3 pens and 4?", "answer": "7", "reward": 1,
                         "steps": ["3+4=7", "The answer is \\boxed{7}."]}


@pytest.mark.parametrize("text", [
    "\ufeff" + "\r\n".join(ROWS) + "\r\n",                                 # as Windows exports it
    "\n\n" + "\n\n".join(ROWS) + "\n",                                     # blank lines
])
def test_the_same_rows_from_elsewhere(tmp_path, text):
    """A byte order mark ended in a traceback; blank lines gave solutions to other problems."""
    source = write(tmp_path / "test.jsonl", text)
    prepare.prepare("gsm8k", source, f"{tmp_path}/out")
    traces = read(f"{tmp_path}/out/test_traces.jsonl")
    assert [trace["steps"][0] for trace in traces] == ["3+4=7", "1+1=2"]


@pytest.mark.parametrize("solution, steps", [
    ("A list:\n#### step\n3+4=7", ["A list:", "#### step", "3+4=7"]),      # #### twice
    ("a\u2028b", ["a\u2028b"]),                                            # no end of a line
    ("\n3+4=7\n \n", ["3+4=7"]),
])
def test_no_step_is_lost(tmp_path, solution, steps):
    """The solution was read a second time, by other rules for lines and for ####."""
    row = {"question": "How many?", "answer": f"{solution}\n#### 7"}
    source = write(tmp_path / "test.jsonl", json.dumps(row, ensure_ascii=False))
    prepare.prepare("gsm8k", source, f"{tmp_path}/out")
    [trace] = read(f"{tmp_path}/out/test_traces.jsonl")
    assert trace["steps"][:-1] == steps


def test_answers_without_a_solution(tmp_path):
    """Answers that are numbers ended in a traceback. They make problems, but no traces."""
    source = write(tmp_path / "test.jsonl", '{"id": 0, "question": "1/2?", "answer": 0.5}\n')
    prepare.prepare("gsm8k", source, f"{tmp_path}/out")
    assert read(f"{tmp_path}/out/test.jsonl") == [{"id": "0", "question": "1/2?", "answer": "0.5"}]
    assert os.listdir(f"{tmp_path}/out") == ["test.jsonl"]


def test_a_bad_line_is_named_by_the_users_file(tmp_path):
    source = write(tmp_path / "test.jsonl", ROWS[0] + '\n{"question": "torn')
    with pytest.raises(InputError, match=f"^{source}, line 2"):
        prepare.prepare("gsm8k", source, f"{tmp_path}/out")
    with pytest.raises(InputError, match="there is no file"):
        prepare.prepare("gsm8k", f"{tmp_path}/none", f"{tmp_path}/out")
    assert not os.path.exists(f"{tmp_path}/out")


def test_a_download_that_is_cut_at_a_lines_end(tmp_path):
    """536 of 1,319 problems were taken for the whole."""
    address = "file://" + write(tmp_path / "test.jsonl", "\n".join(ROWS))
    whole = {"gsm8k": {"test": Published(address, 2)}}
    more = {"gsm8k": {"test": Published(address, 3)}}
    gone = {"gsm8k": {"test": Published(address + "x", 2)}}
    for published, said in ((more, "gave 2 problems, expected 3"), (gone, "cannot be fetched")):
        with patch.object(prepare, "PUBLISHED", published), pytest.raises(InputError, match=said):
            prepare.prepare("gsm8k", None, f"{tmp_path}/out")
        assert not os.path.exists(f"{tmp_path}/out")
    with patch.object(prepare, "PUBLISHED", whole):
        prepare.prepare("gsm8k", None, f"{tmp_path}/out")
    assert len(read(f"{tmp_path}/out/test.jsonl")) == 2


@pytest.mark.parametrize("names", [["notes.txt"], ["test.jsonl", "train.jsonl"],
                                   [*prepare.PROBLEMS, *prepare.TREES, *prepare.MODELS, "mine"]])
def test_the_embedded_world_replaces_nothing_of_others(tmp_path, names):
    """`prepare.py arithmetic --out FOLDER` deleted what was in FOLDER/teacher and FOLDER/tmp."""
    for name in names:
        write(tmp_path / name, "dear")
    with patch.object(prepare, "make_world", side_effect=AssertionError("it was made")):
        with pytest.raises(InputError, match="holds"):
            prepare.make_arithmetic(str(tmp_path), 0)
    assert all((tmp_path / name).read_text() == "dear" for name in names)


def test_the_embedded_world_replaces_its_own_files(tmp_path):
    def make_world(folder, seed):
        for name in prepare.PROBLEMS + prepare.TREES:
            write(f"{folder}/{name}", f"seed {seed}")
        for name in prepare.MODELS:
            os.makedirs(f"{folder}/{name}")
            for file in [*prepare.MODEL_FILES, "log.jsonl"]:
                write(f"{folder}/{name}/{file}", f"seed {seed}")

    with patch.object(prepare, "make_world", make_world):
        prepare.make_arithmetic(f"{tmp_path}/world", 0)
        prepare.make_arithmetic(f"{tmp_path}/world", 1)
    assert sorted(os.listdir(f"{tmp_path}/world/teacher")) == sorted(prepare.MODEL_FILES)
    assert (tmp_path / "world/student/config.json").read_text() == "seed 1"


def test_stories_are_solved_by_their_steps():
    """The committed problems are these, and the clean solution of each ends in its answer."""
    seen = set()
    committed = read(os.path.join(prepare.HERE, "arithmetic", "test.jsonl"))
    assert prepare.make_problems("test", 400, 2, 5, 0, 0, seen) == committed
    rng = random.Random(0)
    for length in range(2, 9):
        story = prepare.make_story(rng, length)
        steps = prepare.solve(story.start, story.actions)
        assert len(steps) == length + 1
        assert steps[-1] == f"The answer is {story.answer}."
    traces = prepare.make_traces("noisy", 200, True, 0, seen)
    assert 0.2 < sum(trace["reward"] for trace in traces) / len(traces) < 0.6


def test_the_command(tmp_path):
    source = write(tmp_path / "test.jsonl", "\n".join(ROWS))
    script = os.path.join(prepare.HERE, "prepare.py")
    command = [sys.executable, script, "gsm8k", "--source", source, "--out", f"{tmp_path}/out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "2 problems" in done.stdout
    done = subprocess.run([*command, "--sauce", "x"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
