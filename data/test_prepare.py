"""Published data sets as people have them, downloads that are not whole, and the embedded world."""
import json
import os
import random
import re
import subprocess
import sys
from unittest.mock import patch

import pytest

import prepare
from grade import is_correct, states_answer
from prepare import Action, Chain, Published
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
    """Two problems as published; only the worked one is a trace."""
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
    """Not by the copy that is read."""
    source = write(tmp_path / "test.jsonl", ROWS[0] + '\n{"question": "torn')
    with pytest.raises(InputError, match=f"^{source}, line 2"):
        prepare.prepare("gsm8k", source, f"{tmp_path}/out")
    with pytest.raises(InputError, match="there is no file"):
        prepare.prepare("gsm8k", f"{tmp_path}/none", f"{tmp_path}/out")
    assert not os.path.exists(f"{tmp_path}/out")


def test_a_source_that_nothing_reads_is_refused(tmp_path):
    with patch.object(sys, "argv", ["prepare.py", "arithmetic", "--source", str(tmp_path)]):
        with pytest.raises(InputError, match="--source does nothing"):
            prepare.main()


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
    """Another seed, in a folder that holds what the command made before."""
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


# ---- The embedded world: its problems ------------------------------------------------------------
VERBS = {"finds": "+", "buys": "+", "gets": "+", "loses": "-", "eats": "-", "gives": "-",
         "doubles": "*", "triples": "*", "halves": "/", "keeps": "/"}
OPERANDS = {"doubles": 2, "triples": 3, "halves": 2}


def read_story(question):
    """(steps, traps, answer) of a question, read from its words alone. All numbers are whole."""
    *persons, asked = question.split(". ")
    assert re.fullmatch("How many [a-z]+ do they have together[?]", asked)
    steps = len(persons) - 1
    traps = 0
    answer = 0
    for person in persons:
        has, *happens = person.split(", ")
        number = int(re.search("[0-9]+", has)[0])
        for what in happens:
            verb = what.split()[0]
            operand = OPERANDS.get(verb) or int(re.search("[0-9]+", what)[0])
            assert VERBS[verb] != "/" or number % operand == 0
            number = prepare.apply(VERBS[verb], number, operand)
            assert 4 <= number <= 60
        steps += len(happens)
        traps += what_is_misread(happens)
        answer += number
    return steps, traps, answer


def what_is_misread(happens):
    return happens.count("doubles them") + happens.count("halves them")


def read_step(step):
    """(first, sign, second, result) of a step."""
    first, sign, second, result = re.fullmatch(
        "([0-9]+) ([-+*/]) ([0-9]+) = ([0-9]+)", step).groups()
    return int(first), sign, int(second), int(result)


@pytest.mark.parametrize("low, high, traps", [prepare.EASY, prepare.HARD, (4, 4, 1)])
def test_problems_are_as_they_were_ordered(low, high, traps):
    """The answer is what the words say, by another reading than the one that made them."""
    seen = {prepare.make_problems("p", 1, low, high, traps, 0, set())[0]["question"]}
    rows = prepare.make_problems("p", 200, low, high, traps, 0, seen)
    questions = [row["question"] for row in rows]
    assert len(seen) == len({*questions}) + 1 == 201  # neither twice nor one that was seen
    assert [row["id"] for row in rows] == [f"p-{k}" for k in range(200)]
    for row in rows:
        steps, misread, answer = read_story(row["question"])
        assert row["steps"] == steps and row["answer"] == str(answer)
        assert misread >= traps
    assert {row["steps"] for row in rows} == {*range(low, high + 1)}
    assert {len(question.split(". ")) - 1 for question in questions} <= {2, 3}


def test_a_solution_takes_any_order():
    """Each step is right and goes on from what is known, whichever comes next. No step but the last
    bears the answer."""
    orders = set()
    story = prepare.make_story(random.Random(3), 7)
    for seed in range(300):
        steps = prepare.solve(story.chains, random.Random(seed))
        orders.add(tuple(steps))
        known = [chain.start for chain in story.chains]
        for step in steps[:-1]:
            first, sign, second, result = read_step(step)
            assert prepare.apply(sign, first, second) == result
            assert first in known or second in known
            known.append(result)
        assert len(steps) == 8 and steps[-1] == f"The answer is {story.answer}."
        assert not any(map(states_answer, steps[:-1])) and states_answer(steps[-1])
        assert is_correct("\n\n".join(steps), str(story.answer), strict=True)
    assert len(orders) == 40  # three actions among three others, and the sum either way


def test_equal_amounts_are_two():
    """Their sum is twice the one, in whatever order."""
    chains = [Chain(4, [Action("+", 2, 0)], 6), Chain(3, [Action("*", 2, 0)], 6), Chain(6, [], 6)]
    for seed in range(50):
        assert prepare.solve(chains, random.Random(seed))[-1] == "The answer is 18."


MISREAD = Chain(12, [Action("*", 2, 1.0), Action("/", 3, 1.0), Action("-", 4, 0.0)], 4)
READ = Chain(9, [Action("*", 3, 0.0)], 27)


@pytest.mark.parametrize("slip", [0, 1])
def test_who_misreads_goes_on_consistently(slip):
    """* is taken for +, and / for -, where it may be; a slip is a result wrong by 1 or 10, but not
    below 0. The answer is the last number."""
    for seed in range(50):
        with patch.object(prepare, "SLIP", slip):
            steps = prepare.solve([MISREAD, READ], random.Random(seed), misconceptions=True)
        signs = []
        for step in steps[:-1]:
            first, sign, second, result = read_step(step)
            signs.append(sign)
            right = prepare.apply(sign, first, second)
            wrong = {max(0, right + error) for error in (-10, -1, 1, 10)}
            assert result in (wrong if slip else {right})
        assert sorted(signs) == ["*", "+", "+", "-", "-"]
        assert steps[-1] == f"The answer is {result}."
        assert slip or steps[-1] == "The answer is 34."  # 12 + 2 - 3 - 4 + 27


def test_most_of_what_the_student_learns_is_wrong():
    """The share that is right, and that rewards say which."""
    traces = prepare.make_traces("noisy", 400, True, 0, set())
    assert 0.1 < sum(trace["reward"] for trace in traces) / len(traces) < 0.5
    for trace in traces:
        assert trace["reward"] == is_correct(trace["steps"][-1], trace["answer"])
    clean = prepare.make_traces("clean", 400, False, 0, set())
    assert all(trace["reward"] == 1 for trace in clean)
    for trace in clean + traces:
        steps, _, answer = read_story(trace["question"])
        assert len(trace["steps"]) == steps + 1 and trace["answer"] == str(answer)


def test_the_models_words_say_it_all(tmp_path):
    """Questions and steps, right or wrong, are written with known tokens, and decode as they were.
    """
    from transformers import AutoConfig, AutoTokenizer
    prepare.make_model(f"{tmp_path}/model", 0)
    tokenizer = AutoTokenizer.from_pretrained(f"{tmp_path}/model")
    assert AutoConfig.from_pretrained(f"{tmp_path}/model").vocab_size == len(tokenizer)
    assert os.path.getsize(f"{tmp_path}/model/model.safetensors") < 4 * 1.5e6  # bytes of float32
    for trace in prepare.make_traces("noisy", 400, True, 1, set()):
        for text in (trace["question"], "\n\n".join(trace["steps"]) + "\n\n"):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text


def test_no_embedded_problem_is_in_two_sets():
    """Nor is there one whose answer is unreadable."""
    folder = os.path.join(prepare.HERE, "arithmetic")
    questions = []
    for name in sorted(os.listdir(folder)):
        if name.endswith(".jsonl") and "trees" not in name:
            for row in read(f"{folder}/{name}"):
                assert row["id"].startswith(name.removesuffix(".jsonl") + "-")
                assert is_correct(f"\\boxed{{{row['answer']}}}", row["answer"])
                questions.append(row["question"])
    assert len({*questions}) == len(questions) > 1000


def test_the_embedded_problems_are_what_the_seed_makes(tmp_path):
    """All but models and trees, which take half an hour."""
    folder = os.path.join(prepare.HERE, "arithmetic")
    done = subprocess.CompletedProcess([], 0)
    with patch.object(prepare, "make_traces", return_value=[]), \
            patch.object(prepare, "make_model"), \
            patch.object(subprocess, "run", return_value=done):
        prepare.make_world(str(tmp_path), 0)
    for name in prepare.PROBLEMS:
        assert read(f"{folder}/{name}") == read(tmp_path / name)


# ---- The command ---------------------------------------------------------------------------------
def test_the_command(tmp_path):
    """From a local file; an unknown flag is one line and status 2."""
    source = write(tmp_path / "test.jsonl", "\n".join(ROWS))
    script = os.path.join(prepare.HERE, "prepare.py")
    command = [sys.executable, script, "gsm8k", "--source", source, "--out", f"{tmp_path}/out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "2 problems" in done.stdout
    done = subprocess.run([*command, "--sauce", "x"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
