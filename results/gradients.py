"""
How good is each estimator's gradient? Final accuracies of a few seeds cannot rank estimators; their
gradients at one and the same student can, for all estimators are applied to the same samples.

    python results/gradients.py --label easy-untrained               # the embedded default, frozen
    python results/gradients.py --label easy-trained --adapter out/RUN --seed 1
    python results/gradients.py --summary                            # the table and the picture

Every other flag is train.py's: --model, --adapter, --trees, --group, --seed and so on.

1. Groups are sampled as train.py does, from a student that is not updated.
2. Each sample's own gradient g_k of log pi(c_k | p_k) is taken once, with respect to what train.py
   would train. Of each group we keep the products of its gradients, exactly, and a random
   projection of each gradient, for products between groups. They are a line of the file of samples.
   A fresh LoRA adapter has B = 0, so that only B has a gradient: that is what training sees first.
3. A group's gradient is x = sum_k a_k g_k / N, where an estimator gives the advantages a. What is
   found of each estimator is a line of results/gradients.jsonl. Given a second time, the same
   command takes the samples from their file and applies the estimators anew.

What is found of an estimator, each with its 95 % interval:

    norm        |E x|^2
    variance    the trace of the covariance of x, E |x|^2 - |E x|^2
    cosine      of E x and the gradient of the objective, E y
    signal      |E x projected on E y|^2 / variance, of one group; negative where E x points the
                other way. As much noise as signal is in the mean of 1 / signal groups
    efficiency  signal over the signal of `flat`: how many times fewer groups give as accurate a
                gradient

Here y is an unbiased estimate of the gradient, REFERENCE, and a product of two means, such as
|E x|^2 = <E x, E x>, is estimated by products between groups of different problems alone. So is
<E x, E y>: what is compared with the gradient of the objective is never compared on the same
samples. Where there are more groups than problems, those of one problem are averaged first. An
estimate by products is not bounded: a square can come out below 0, a cosine above 1.
"""
import os
import sys
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
import evaluate  # noqa: E402  before torch: it notes which torchrun has started this process
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import advantage  # noqa: E402
import train  # noqa: E402
from tree import (InputError, MicroBatch, append_jsonl, arguments, at_least,  # noqa: E402
                  continue_jsonl, get_field, lock, pack, read_jsonl, rng, run_command, write_jsonl)

PROJECTION = 512                   # dimensions
IN_OVERVIEW = (  # estimators
    "expectation", "optimistic", "pessimistic", "optimal", "optimal_tree", "none", "norm")
REFERENCE = "norm, other groups"   # unbiased, and of little variance
NEEDS_ROLLOUTS = {"mc"}            # of its own: cannot be applied to these samples
SAMPLED_WITH = dict(  # flags of train.py that would sample, or reward, in another way
    objective="tree_opo", baseline="expectation", behaviour="student", reward="task", critic=None,
    resume=False)
LEGEND = """Efficiency: how many times fewer groups than with `flat` give as accurate a gradient.
Cosine: of the estimator's mean gradient and the gradient of the objective. Brackets are 95 %
intervals; an estimate by products between groups is not bounded, so a cosine can exceed 1.

The names are those of `advantage.py`, then those of variants. These are called by what weighs the
rewards in their baseline: `length`, `surprisal` (-log p), `spread` (the squared gradient with
respect to the logits) or `norm` (the exact squared gradient). "others" leaves out the own sample,
"subtree" and "depth" have a baseline for each of these, "other groups" takes it from all other
groups and is the reference. "/ sqrt(surprisal)" divides the advantages by that."""


# ---- Measure: samples and their gradients --------------------------------------------------------
@lru_cache(maxsize=1)
def random_places(size):
    """For each of `size` weights the coordinate it is added to, and with which sign: (size,) both.
    The same in every run."""
    draw = rng(PROJECTION)
    place = torch.from_numpy(draw.integers(PROJECTION, size=size))
    sign = torch.from_numpy(draw.choice(np.float32([-1, 1]), size))
    return place, sign


def project(gradients):
    """(N, D) -> (N, PROJECTION) with the same products on average (count sketch: Charikar et al.
    2002). Their standard error is at most sqrt((|x|^2 |y|^2 + <x, y>^2) / PROJECTION)."""
    place, sign = random_places(gradients.shape[1])
    projected = torch.zeros(len(gradients), PROJECTION)
    return projected.index_add(1, place, gradients * sign)


def sample_gradient(run, sample, args):
    """The gradient (D,) of log pi(c | p) of one sample, and sum_t |e_y - p|^2, the squared norm of
    its gradient with respect to the logits."""
    row = pack([sample.prefix_ids], [sample.completion_ids])
    predictions = evaluate.predict(run.models.student, MicroBatch([sample], [row]),
                                   args.temperature)
    logp = evaluate.log_probs(predictions).sum()
    gradients = torch.autograd.grad(logp, list(run.trainable.values()))
    p = torch.softmax(predictions.logits.detach(), dim=-1)  # (n, V)
    p_target = p.gather(1, predictions.target[:, None])[:, 0]
    spread = (p.square().sum(1) - 2 * p_target + 1).sum()
    return torch.cat([g.flatten() for g in gradients]).float().cpu(), spread.item()


def measure_group(run, members, tree, args):
    """All that is kept of one group: a line of the file of samples."""
    found = {}  # of each distinct sample: short completions of one prefix are often the same
    gradients = []
    spread = []
    for sample in members:
        ids = (*sample.prefix_ids, None, *sample.completion_ids)
        if ids not in found:
            found[ids] = sample_gradient(run, sample, args)
        gradient, sample_spread = found[ids]
        gradients.append(gradient)
        spread.append(sample_spread)
    gradients = torch.stack(gradients)  # (N, D)
    projected = []
    for values in project(gradients).tolist():
        projected.append([float(f"{value:.6g}") for value in values])
    teacher = np.array(tree.value) / np.maximum(tree.visits, 1)
    return dict(
        id=tree.problem["id"],
        parent=tree.parent,
        teacher=teacher.tolist(),
        depth=tree.depth().tolist(),
        node=[sample.node for sample in members],
        rewards=[sample.reward for sample in members],
        solved=[sample.solved for sample in members],
        logps=[sum(sample.sampler_logps) for sample in members],
        lengths=[len(sample.completion_ids) for sample in members],
        spread=spread,
        gram=(gradients @ gradients.T).tolist(),
        projected=projected)


def sample_settings(run, args):
    """What the samples depend on. A file that was begun with others is not continued."""
    names = ("group", "group_size", "batch_size", "no_root", "temperature", "max_prompt",
             "max_new_tokens", "seed")
    encode = evaluate.encoder(run.tokenizer, args)
    settings = evaluate.work_settings(run.models.student, encode, args, names)
    settings["trees"] = run.contents["trees"]
    return settings


def measure(run, trees, args, groups, path):
    """The first `groups` lines of the file of samples, continued from where it stands: the batches
    that train.py would draw, were the student not to change."""
    settings = sample_settings(run, args)

    def parse(row, number):
        saved = get_field(row, "settings", dict, "what the samples depend on")
        for name, value in settings.items():
            if saved.get(name) != value:
                raise InputError(f"its {name} is {saved.get(name)} and not {value}; expected the "
                                 "same, or another --label")
        return row

    rows = continue_jsonl(path, parse)
    batch_groups = args.batch_size // args.group_size
    progress = tqdm(total=groups, initial=min(len(rows), groups), dynamic_ncols=True)
    while len(rows) < groups:
        run.step, done = divmod(len(rows), batch_groups)
        samples = train.rollout(run, trees, args)
        for number in range(done, batch_groups):
            members = [sample for sample in samples if sample.group == number]
            row = measure_group(run, members, trees[members[0].tree], args)
            row["settings"] = settings
            append_jsonl(path, row)
            rows.append(row)
            progress.update()
    progress.close()
    return rows[:groups]


# ---- Estimators: advantages of every group -------------------------------------------------------
class Probe(NamedTuple):
    """One group, and what is known of its gradients."""
    problem: str           # its id
    group: advantage.Group
    depth: np.ndarray      # (N,) steps in each sample's prefix
    left: np.ndarray       # (N,) how many less than in the tree's longest prefix
    weights: dict          # name -> (N,) the weights that a baseline can have
    gram: np.ndarray       # (N, N) <g_j, g_k>
    projected: np.ndarray  # (N, PROJECTION)


def read_probe(row, alpha):
    """A line of the file of samples as a Probe."""
    names = ("node", "parent", "rewards", "solved", "logps", "lengths", "teacher")
    fields = {name: row[name] for name in names}
    group = advantage.Group(**fields, alpha=alpha)
    gram = np.array(row["gram"])
    weights = dict(
        length=group.lengths.astype(float),  # tokens
        surprisal=1e-3 - group.logps,        # -log pi(c | p), and a little, as in `optimal`
        spread=np.array(row["spread"]),      # sum_t |e_y - p|^2
        norm=np.diag(gram))                  # |g|^2
    depth = np.array(row["depth"])
    left = depth.max() - depth
    return Probe(row["id"], group, depth[group.node], left[group.node], weights, gram,
                 np.array(row["projected"]))


def named(name, probe):
    """Advantages (N,) by an estimator of advantage.py, or by its fallback."""
    a, _ = advantage.advantages(name, **vars(probe.group))
    return a


def weighted(weight, among, own, probe):
    """Advantages (N,) around weighted mean rewards, a_k = r_k - sum_j w_j r_j / sum_j w_j.

    weight  a name in Probe.weights
    among   the samples j: of the whole "group", of p_k's "subtree", or of its "depth"
    own     whether k is one of them. If it is, a_k is smaller by the factor 1 - w_k / sum_j w_j,
            which biases the gradient. If it is not and has no others, these are the group's
    """
    g = probe.group
    N = len(g.node)
    compared = np.ones((N, N), bool)
    if among == "subtree":
        compared = advantage.in_subtree(g)[g.node]
    elif among == "depth":
        compared = probe.depth[:, None] == probe.depth
    if not own:
        others = ~np.eye(N, dtype=bool)
        compared = compared & others
        alone = ~compared.any(1)
        compared[alone] = others[alone]
    w = probe.weights[weight]
    return g.rewards - compared @ (w * g.rewards) / (compared @ w)


def divided(weight, estimator, probe):
    """The same, over the root of a weight: large gradients count less, and there is a bias."""
    return estimator(probe) / np.sqrt(probe.weights[weight])


def around_other_groups(weight, probes):
    """Advantages (G, N) around the weighted mean reward of the other problems' groups. With "norm"
    that is the baseline of least variance among all constants (Greensmith et al. 2004)."""
    rewards = np.array([probe.group.rewards for probe in probes])  # (G, N)
    w = np.array([probe.weights[weight] for probe in probes])
    problem = np.array([probe.problem for probe in probes])
    other = problem[:, None] != problem  # (G, G)
    baseline = other @ (w * rewards).sum(1) / (other @ w.sum(1))  # (G,)
    return rewards - baseline[:, None]


def all_estimators():
    """name -> function(Probe) -> advantages (N,): those of advantage.py, then what a baseline could
    be if other weights were known, or if other samples were compared."""
    estimators = {}
    for name in advantage.ESTIMATORS:
        if name not in NEEDS_ROLLOUTS:
            estimators[name] = partial(named, name)
    for weight in ("spread", "norm"):  # with "length" it is opo, with "surprisal" optimal
        estimators[weight] = partial(weighted, weight, "group", True)
    for weight in ("length", "surprisal", "spread", "norm"):
        estimators[f"{weight}, others"] = partial(weighted, weight, "group", False)
    for weight in ("surprisal", "norm"):
        for among in ("subtree", "depth"):
            name = f"{weight}, {among}"
            estimators[name] = partial(weighted, weight, among, True)
            estimators[f"{name}, others"] = partial(weighted, weight, among, False)
    for name in ("flat", "optimal"):
        estimators[f"{name} / sqrt(surprisal)"] = partial(divided, "surprisal", estimators[name])
    return estimators


def all_advantages(probes):
    """name -> advantages (G, N), of every estimator on the same groups."""
    advantages = {}
    for name, estimator in all_estimators().items():
        advantages[name] = np.array([estimator(probe) for probe in probes])
    for weight in ("surprisal", "norm"):
        advantages[f"{weight}, other groups"] = around_other_groups(weight, probes)
    return advantages


# ---- What is found, with its interval ------------------------------------------------------------
# Every quantity is computed G + 1 times: of all G problems, and of all but each one. It is an array
# (G + 1,) from its beginning as a mean to its end as a ratio, and `interval` reads off the spread.
def mean_by_problem(values, probes):
    """Of each problem the mean of its groups' values, arrays of any shape."""
    values = np.array(values)
    _, problem = np.unique([probe.problem for probe in probes], return_inverse=True)
    total = np.zeros((problem.max() + 1, *values.shape[1:]))
    np.add.at(total, problem, values)
    groups = np.bincount(problem)
    return (total.T / groups).T


def mean(values):
    """The mean of (G,) numbers of problems: (G + 1,)."""
    G = len(values)
    total = values.sum()
    return np.append(total / G, (total - values) / (G - 1))


def product_of_means(x, y):
    """The unbiased estimate of <E x, E y>, the mean of <x_i, y_j> over all i != j: (G + 1,).

    x, y (G, D) are of the same G problems. The product of one with itself would add the noise
    that x and y share; over G, this is as large as the product of the means.
    """
    G = len(x)
    own = (x * y).sum(1)                               # (G,)
    total = x.sum(0) @ y.sum(0) - own.sum()            # over all i != j
    part = x @ y.sum(0) + y @ x.sum(0) - 2 * own       # (G,) over the pairs that hold i
    without = (total - part) / ((G - 1) * (G - 2))
    return np.append(total / (G * (G - 1)), without)


def interval(quantity):
    """(value, low, high), 95 %, of an array (G + 1,): the jackknife (Efron and Stein 1981).

    The bootstrap would be wrong here. Problems that are drawn again repeat, and the product of one
    with its copy is no product between problems.
    """
    value = quantity[0]
    G = len(quantity) - 1
    deviation = np.sqrt((G - 1) * np.var(quantity[1:]))
    return value, value - 1.96 * deviation, value + 1.96 * deviation


def ratio_interval(quantity):
    """The same of what is positive, taken of its logarithm; nan where it is not."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.exp(interval(np.log(quantity)))


def assess(x, squares, y):
    """Norm, variance, cosine and signal of an estimator, each (G + 1,).

    x        (G, D) the problems' gradients, projected
    squares  (G,) the mean squared norm of their groups' gradients, exactly
    y        (G, D) the reference's, projected
    """
    norm = product_of_means(x, x)
    reference = product_of_means(y, y)
    along = product_of_means(x, y)
    variance = mean(squares) - norm
    with np.errstate(invalid="ignore"):  # an estimate of a square can be negative: then it is nan
        cosine = along / np.sqrt(norm * reference)
    signal = along * np.abs(along) / reference / variance
    return dict(norm=norm, variance=variance, cosine=cosine, signal=signal)


def assess_all(probes):
    """Apply every estimator to the same groups. Returns an object for each: what is found, and the
    ends of its interval, as NAME, NAME_low and NAME_high; null where it is no number."""
    gradients = {}
    squares = {}
    for name, advantages in all_advantages(probes).items():
        x = []       # of each group its gradient
        square = []  # and the squared norm of that
        for a, probe in zip(advantages / advantages.shape[1], probes):
            x.append(a @ probe.projected)
            square.append(a @ probe.gram @ a)
        gradients[name] = mean_by_problem(x, probes)
        squares[name] = mean_by_problem(square, probes)
    y = gradients[REFERENCE]
    flat = assess(gradients["flat"], squares["flat"], y)
    lines = []
    for name, x in gradients.items():
        found = assess(x, squares[name], y)
        intervals = dict(
            norm=interval(found["norm"]),
            variance=interval(found["variance"]),
            cosine=interval(found["cosine"]),
            signal=ratio_interval(found["signal"]),
            efficiency=ratio_interval(found["signal"] / flat["signal"]))
        line = dict(estimator=name)
        for key, (value, low, high) in intervals.items():
            line[key] = rounded(value)
            line[f"{key}_low"] = rounded(low)
            line[f"{key}_high"] = rounded(high)
        lines.append(line)
    return lines


def describe(probes):
    """What the groups are like, before any estimator."""
    live = [probe.group for probe in probes if np.ptp(probe.group.rewards) > 0]
    figures = [advantage.metrics(advantage.centred(group.rewards), group) for group in live]
    order = [np.isfinite(row["sat_triplet"]) for row in figures]  # has it a triplet?
    left = np.concatenate([probe.left for probe in probes])
    solved = np.concatenate([probe.group.solved for probe in probes])
    samples_left = np.bincount(left)
    solved_left = np.bincount(left, solved) / np.maximum(samples_left, 1)
    return dict(
        groups=len(probes),
        problems=len({probe.problem for probe in probes}),
        solved=rounded(solved.mean()),
        samples_left=samples_left.tolist(),  # by Probe.left, 0 first
        solved_left=[rounded(share) for share in solved_left],
        dead=rounded(1 - len(live) / len(probes)),  # a share, as the next two
        triplets=rounded(np.mean(order)) if live else 0.0,
        sat=rounded(train.mean([row["sat"] for row in figures])))


def rounded(value):
    """To 4 digits, None where it is no number."""
    if not np.isfinite(value):
        return None
    return float(f"{value:.4g}")


# ---- Summary: a table and a picture --------------------------------------------------------------
def cell(line, key):
    """What was found, with its interval, as text."""
    numbers = [line[key], line[f"{key}_low"], line[f"{key}_high"]]
    if None in numbers:
        return "–"
    value, low, high = [f"{number:.2f}" if number < 1000 else f"{number:.0e}" for number in numbers]
    return f"{value} [{low}, {high}]"


def distinct(lines, key):
    """The values of a field, in the order in which they come."""
    return list(dict.fromkeys(line[key] for line in lines))


def overview(lines):
    """Markdown: the efficiency of the estimators of IN_OVERVIEW, with a row a label."""
    text = ["| efficiency | " + " | ".join(IN_OVERVIEW) + " |"]
    text.append("| --- |" + " --- |" * len(IN_OVERVIEW))
    for label in distinct(lines, "label"):
        cells = [label]
        for name in IN_OVERVIEW:
            found = [line for line in lines if (line["label"], line["estimator"]) == (label, name)]
            cells.append(cell(found[0], "efficiency") if found else "–")
        text.append("| " + " | ".join(cells) + " |")
    return text


def table(lines):
    """Markdown: what the columns mean, an overview, a section a label with a row an estimator."""
    text = ["# Gradients", "", LEGEND, "", *overview(lines), ""]
    for label in distinct(lines, "label"):
        of_label = [line for line in lines if line["label"] == label]
        [flat] = [line for line in of_label if line["estimator"] == "flat"]
        text += [f"## {label}", "", describe_groups(flat), ""]
        text += ["| estimator | efficiency | cosine |", "| --- | --- | --- |"]
        for line in of_label:
            text.append(f"| {line['estimator']} | {cell(line, 'efficiency')} | "
                        f"{cell(line, 'cosine')} |")
        text.append("")
    return "\n".join(text)


def describe_groups(flat):
    """A sentence on the samples that a line of `flat` is made of, and one on their noise."""
    text = (f"{flat['groups']} groups of `--group {flat['group']}`, of {flat['problems']} "
            f"problems: {100 * flat['solved']:.0f} % solved, {100 * flat['dead']:.0f} % of groups "
            f"dead, {100 * flat['triplets']:.0f} % of the others with a triplet")
    if flat["sat"] is not None:  # groups on questions have no constraints
        text += f"; flat satisfies {100 * flat['sat']:.0f} % of the order constraints"
    needed = f"{1 / flat['signal']:.0f}" if flat["signal"] else "an unknown number"
    return f"{text}. As much noise as signal is in the mean of {needed} groups of flat."


def draw(lines, path):
    """Efficiencies with their intervals: a panel a label, a line an estimator."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    labels = distinct(lines, "label")
    names = distinct(lines, "estimator")
    size = (2 + 2.6 * len(labels), 0.8 + 0.2 * len(names))
    figure, panels = plt.subplots(1, len(labels), sharey=True, squeeze=False, figsize=size)
    for label, axes in zip(labels, panels[0]):
        for line in lines:
            if line["label"] != label or line["efficiency"] is None:
                continue
            height = -names.index(line["estimator"])  # the first on top
            colour = "#888888"
            if line["estimator"] in advantage.ESTIMATORS:
                colour = "#0072B2"
            ends = [line["efficiency_low"], line["efficiency_high"]]
            axes.plot(ends, [height, height], color=colour)
            axes.plot(line["efficiency"], height, "o", color=colour, markersize=4)
        axes.axvline(1, color="0.7", linewidth=0.8, zorder=0)
        axes.set(title=label, xscale="log", xlim=(0.1, 100), xlabel="efficiency, flat is 1")
        axes.set_xticks([0.25, 1, 4, 16, 64], ["0.25", "1", "4", "16", "64"])
        axes.minorticks_off()
        axes.grid(axis="x", alpha=0.3)
    panels[0, 0].set_yticks([-k for k in range(len(names))], names, fontsize=8)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def read_lines(path):
    """The file of what was found, a line an estimator and label."""
    def parse(row, number):
        for name in ("label", "estimator"):
            get_field(row, name, str, "a name, in a line that this script wrote")
        return row
    return list(read_jsonl(path, parse))


# ---- The command ---------------------------------------------------------------------------------
def parse_args(argv=None):
    """Our own flags, and those of train.py, which checks all others."""
    parser = arguments("How good is each estimator's gradient? Other flags are train.py's.")
    add = parser.add_argument
    add("--label", default="easy-untrained", help="names this student on these trees")
    add("--groups", type=at_least(10), default=600, help="with more than problems, several of each")
    add("--samples", default=os.path.join(ROOT, "out", "gradients"),
        help="folder of the samples and their gradients, LABEL.jsonl")
    add("--out", default=os.path.join(HERE, "gradients.jsonl"),
        help="what is found; the lines of this label are replaced")
    add("--summary", action="store_true",
        help="only write the table and the picture of --out, beside it")
    own, others = parser.parse_known_args(argv)
    if own.summary and others:
        raise InputError(f"--summary only reads --out; {others[0]} does nothing. Leave it out.")
    args = train.parse_args([*others, "--eval_every", "0"])
    for name, value in SAMPLED_WITH.items():
        if getattr(args, name) != value:
            raise InputError(f"--{name} has no place here: all estimators get the same samples, of "
                             "the student as --model and --adapter have it. Leave it out.")
    return own, args


def write_summary(path):
    """The table and the picture of a file of lines, beside it. Returns the lines."""
    lines = read_lines(path)
    stem = os.path.splitext(path)[0]
    with open(f"{stem}.md", "w", encoding="utf-8") as file:
        file.write(table(lines))
    draw(lines, f"{stem}.png")
    return lines


def portable(path):
    """A path as it goes into the file: below the repository as seen from there, else its name."""
    if path is None or not os.path.exists(path):  # a name on the hub
        return path
    inside = os.path.relpath(path, ROOT)
    return os.path.basename(os.path.abspath(path)) if inside.startswith("..") else inside


def main():
    own, args = parse_args()
    if own.summary:
        print(table(write_summary(own.out)), end="")
        return
    _, _, device = evaluate.distributed()
    evaluate.COMPILE = args.compile
    run, trees, _ = train.set_up(args, 0, 1, device)
    path = os.path.join(own.samples, f"{own.label}.jsonl")
    held = lock(path)
    rows = measure(run, trees, args, own.groups, path)
    held.close()
    probes = [read_probe(row, args.alpha) for row in rows]
    about = dict(
        label=own.label,
        model=portable(args.model),
        adapter=portable(args.adapter),
        trees=portable(args.trees),
        group=args.group,
        alpha=args.alpha,
        seed=args.seed)
    about |= describe(probes)
    lines = [about | line for line in assess_all(probes)]
    others = []
    if os.path.exists(own.out):
        others = [line for line in read_lines(own.out) if line["label"] != own.label]
    write_jsonl(own.out, [*others, *lines])
    print(table(lines), end="")


if __name__ == "__main__":
    run_command(main)
