"""
Every row of the paper's Tables 1 and 2, and more, on the embedded default: seeds, two sets of problems, equal budgets of tokens.

    python results/sweep.py --jobs 2 --seeds 5 --out out/sweep      # go on where it was stopped: the same command
    python results/plot.py sweep                                    # then: pictures and a table

Seed 0 of all rows comes first, so that a sweep that was stopped is balanced. A finished run is one line of results/sweep.jsonl
and is not run again; to run all anew, name another --log and --out. What a run prints is in OUT/SET-ROW-SEED.txt.
"""
import argparse
import itertools
import json
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import train  # noqa: E402, F401: before the fork
from tree import run_command  # noqa: E402

TEACHER = "--teacher data/arithmetic/teacher"
REINFORCE_KL = f"--group question --reward teacher {TEACHER} --lr 5e-4"
ROWS = {  # the flags of train.py
    "grpo": "--group question --baseline grpo",  # Table 1
    "flat": "--baseline flat", "trace": "--group trace --baseline expectation", "expectation": "--baseline expectation",
    "optimistic": "--baseline optimistic", "pessimistic": "--baseline pessimistic", "qp_hard": "--baseline qp_hard",
    "qp_soft": "--baseline qp_soft", "mc": "--baseline mc --mc_rollouts 4",  # the paper's other estimators
    "reinforce_kl": REINFORCE_KL,  # Table 2, whose last row is "expectation"
    "reinforce_kl_baseline": f"{REINFORCE_KL} --critic data/arithmetic/student --gae_lambda 1",
    "actor_critic": f"{REINFORCE_KL} --critic data/arithmetic/student --gae_lambda 0.95",
    "mcts_reinforce": REINFORCE_KL + " --teacher_adapter {out}/{set}-teacher",
    "gkd": f"--group question --reward none --distill_coef 1 {TEACHER} --lr 5e-4",
    "tree_opo_kl": f"--baseline expectation {TEACHER} --distill_coef 0.1 --kl student_teacher",
    "off_policy": f"--baseline none --behaviour teacher {TEACHER}",  # Sec. 3.1
    "grpo_clipped": "--group question --baseline grpo --epochs 2 --kl_coef 0.04",  # as its users know it
    "tree_opo_clipped": "--baseline expectation --epochs 2 --kl_coef 0.04",
    "rloo": "--group question --baseline rloo",  # beyond the paper
} | {name: f"--baseline {name}" for name in "loo teacher treepo treerl treerpo".split()}
SETS = {"easy": ("data/arithmetic/", 30_000), "hard": ("data/arithmetic/hard_", 60_000)}  # how its files begin, generated tokens a run
OFTEN = "--eval_every 10"
CURVES = "reward sat adv_var adv_var_scaled entropy".split()  # of log.jsonl
children, preparing = set(), threading.Lock()


def script(command, out):
    """In a process of its own: run one of the scripts, what it prints into the file `out`, and end with its exit status."""
    for stream in (1, 2):
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv, status = command, 1
    try:
        runpy.run_path(command[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)  # at once: what the fork brought along has nothing to tidy up


def call(command, folder, deadline):
    """Run a command, training from the folder's checkpoint if there is one. Raises RuntimeError if it fails, TimeoutError at the deadline."""
    resume = ["--resume"] if command[0] == "train.py" and os.path.exists(f"{folder}/log.jsonl") else []
    # forked, not started anew: PyTorch takes seconds to import, a third of a run
    child = multiprocessing.get_context("fork").Process(target=script, args=([*command, *resume], f"{folder}.txt"))
    child.start()
    children.add(child)
    child.join(max(0, deadline - time.time()))
    if child.is_alive():
        child.kill()
        raise TimeoutError
    if child.exitcode:
        raise RuntimeError(f"exit status {child.exitcode}, {folder}.txt ends in\n    " + "    ".join(list(open(f"{folder}.txt", errors="replace"))[-8:]))


def prepare_teacher(name, out, deadline):
    """For mcts_reinforce: the teacher, fine-tuned on the successful traces of its own search (Sec. 4.3)."""
    searches, folder = f"{out}/{name}-search.jsonl", f"{out}/{name}-teacher"
    sft = ["--objective", "sft", "--model", "data/arithmetic/teacher", "--trees", searches, "--eval_every", "0"]
    if not os.path.exists(f"{folder}.done"):
        call(["mcts.py", "--data", f"{SETS[name][0]}train.jsonl", "--limit", "500", "--max_new_tokens", "128", "--out", searches], folder, deadline)
        call(["train.py", *sft, "--out", folder], folder, deadline)
        open(f"{folder}.done", "w").close()


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def mean(values):
    values = [value for value in values if value is not None]  # 4 digits are enough
    return float(f"{np.mean(values):.4g}") if values else None


def summarise(folder, **names):
    """A finished run as one object: accuracies, thinned curves, and which test problems the greedy answer solved."""
    log = [row for row in read(f"{folder}/log.jsonl") if "loss" in row]  # the others are evaluations
    correct = [row["correct"] for row in read(f"{folder}/final.jsonl")]
    steps = sorted(int(file[5:-6]) for file in os.listdir(folder) if file.startswith("eval-") and file.endswith(".jsonl"))
    parts = [log[part[0]:part[-1] + 1] for part in np.array_split(np.arange(len(log)), min(30, len(log)))]
    return dict(names, steps=len(log), tokens=log[-1]["tokens"], seconds=round(sum(row["seconds_rollout"] + row["seconds_update"] for row in log), 1),
                peak_memory_mb=round(max(row["peak_memory_mb"] for row in log)), greedy=mean(c[0] for c in correct), sampled=mean(x for c in correct for x in c[1:]),
                evaluations=[(log[step - 1]["tokens"] if step else 0, mean(row["correct"][0] for row in read(f"{folder}/eval-{step}.jsonl"))) for step in steps],
                means={key: mean(row.get(key) for row in log) for key in CURVES + "sat_sd sat_pair sat_triplet dead truncated kl ess".split()},
                curves={"tokens": [part[-1]["tokens"] for part in parts]} | {key: [mean(row.get(key) for row in part) for part in parts] for key in CURVES},
                correct="".join(str(int(c[0])) for c in correct))


def run(name, row, seed, flags, args, deadline):
    """One run, from wherever it stands, to its summary."""
    folder = f"{args.out}/{name}-{row}-{seed}"
    if row == "mcts_reinforce":
        with preparing:
            prepare_teacher(name, args.out, deadline)
    call(["train.py", *flags.format(out=args.out, set=name).split(), *OFTEN.split(), "--out", folder], folder, deadline)
    call(["evaluate.py", "--model", "data/arithmetic/student", "--adapter", folder, "--data", f"{SETS[name][0]}test.jsonl", "--samples", "4",
          "--max_new_tokens", "96", "--out", f"{folder}/final.jsonl"], folder, deadline)
    return summarise(folder, set=name, row=row, seed=seed, flags=flags)


def sweep(args, pool):
    """All runs, `jobs` at a time; each summary is appended to the log as it comes, a failure is shown and passed over."""
    todo, begun, counts = {}, time.time(), dict(finished=0, failed=0, stopped=0)
    for seed, row, name in itertools.product(range(args.seeds), args.rows, args.sets):
        data, tokens = SETS[name]
        flags = f"{ROWS[row]} --seed {seed} --trees {data}trees.jsonl --eval_data {data}test.jsonl --max_tokens {args.tokens or tokens}"
        todo[name, row, seed] = flags + (f" --lr {args.lr}" if args.lr and "--lr" not in flags else "")
    old = {(s["set"], s["row"], s["seed"]): s["flags"] for s in read(args.log)} if os.path.exists(args.log) else {}
    new = {key: flags for key, flags in todo.items() if old.get(key) != flags}
    print(f"{len(todo)} runs, {len(todo) - len(new)} of them finished before; {args.jobs} at a time", flush=True)
    titles = {pool.submit(run, *key, flags, args, begun + 60 * args.minutes): "{} {} seed {}".format(*key) for key, flags in new.items()}
    for future in as_completed(titles):
        try:
            s = future.result()
        except TimeoutError:
            counts["stopped"] += 1
        except Exception as error:  # whatever it is, it is shown and stops no other run
            counts["failed"] += 1
            print(f"{titles[future]} failed: {error}", flush=True)
        else:
            counts["finished"] += 1
            with open(args.log, "a", encoding="utf-8") as out:
                out.write(json.dumps(s) + "\n")
            eta = (time.time() - begun) / counts["finished"] * (len(new) - sum(counts.values()))
            print(f"{counts['finished']}/{len(new)} {titles[future]}: greedy {100 * s['greedy']:.1f} %, sampled {100 * s['sampled']:.1f} %, "
                  f"{s['seconds']:.0f} s | ETA {eta // 3600:.0f}:{eta // 60 % 60:02.0f} h", flush=True)
    print(", ".join(f"{count} {name}" for name, count in counts.items()) + f"; finished runs are in {args.log}")


def main():
    parser = argparse.ArgumentParser(description="Run every row of the paper's tables.", formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    for name, choices in (("--rows", ROWS), ("--sets", SETS)):
        parser.add_argument(name, nargs="+", choices=choices, default=list(choices), metavar="NAME", help="some of " + ", ".join(choices))
    parser.add_argument("--seeds", type=int, default=5, help="runs of a row on a set")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--tokens", type=int, help="generated tokens a run; default 30,000 on easy, 60,000 on hard")
    parser.add_argument("--lr", type=float, default=2e-4, help="learning rate of the rows that name none; at the preset's 3e-4 all of them soon meet the teacher's accuracy")
    parser.add_argument("--minutes", type=float, default=1e4, help="stop after so many")
    parser.add_argument("--out", default="out/sweep", help="folder of the run folders")
    parser.add_argument("--log", default="results/sweep.jsonl", help="one finished run a line; what is there is not run again")
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    train.torch.set_num_threads(1)
    open(args.log, "a", encoding="utf-8").close()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does, and its children with it
    pool = ThreadPoolExecutor(args.jobs)
    try:
        sweep(args, pool)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        [child.terminate() for child in list(children)]


if __name__ == "__main__":
    run_command(main)
