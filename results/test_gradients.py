"""
The instrument: what it measures against autograd, its estimates against a case where the truth is
known, and its intervals against how often they hold.
"""
import numpy as np
import pytest
import torch

import gradients
import train
from gradients import assess, interval, product_of_means, project, ratio_interval
from tree import InputError, MicroBatch, pack


# ---- One group of the embedded student -----------------------------------------------------------
@pytest.fixture(scope="module")
def world():
    """(run, trees, args): the embedded student, and its trees, with an adapter that is not 0."""
    args = train.parse_args(["--eval_every", "0", "--batch_size", "8"])
    run, trees, _ = train.set_up(args, 0, 1, "cpu")
    torch.manual_seed(0)
    for name, weight in run.trainable.items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return run, trees, args


@pytest.fixture(scope="module")
def group(world):
    """(samples, line of the file of samples) of one group in which something is to be learned."""
    run, trees, args = world
    for run.step in range(100):
        samples = train.rollout(run, trees, args)
        if 0 < sum(sample.solved for sample in samples) < 8:
            break
    tree = trees[samples[0].tree]
    return samples, gradients.measure_group(run, samples, tree, args)


def trained_gradient(world, samples, advantages):
    """What train.py would hand to the optimiser for these advantages, as one vector (D,)."""
    run, _, args = world
    for sample, value in zip(samples, advantages):
        sample.advantages = np.full(len(sample.completion_ids), value)
    run.optimizer.zero_grad()
    train.accumulate(run.models, samples, train.Scale(1 / len(samples)), args, 1024)
    return torch.cat([-weight.grad.flatten() for weight in run.trainable.values()])


@pytest.mark.parametrize("method", ["none", "flat", "expectation", "optimal_tree"])
def test_products_give_the_gradient_that_training_sees(world, group, method):
    """The products of single gradients against the packed rows of train.py."""
    samples, row = group
    probe = gradients.read_probe(row, alpha=0.5)
    a = gradients.named(method, probe)
    expected = trained_gradient(world, samples, a)
    shares = a / len(a)
    squared_norm = expected.square().sum().item()
    assert shares @ probe.gram @ shares == pytest.approx(squared_norm, rel=1e-3)
    projected = project(expected[None])[0].numpy()
    assert np.allclose(shares @ probe.projected, projected, atol=1e-3 * np.abs(projected).max())


def test_spread_is_the_squared_gradient_of_the_logits(world, group):
    """sum_t |e_y - p|^2, by autograd."""
    run, _, args = world
    samples, row = group
    for sample, spread in zip(samples, row["spread"]):
        batch = MicroBatch([sample], [pack([sample.prefix_ids], [sample.completion_ids])])
        logits = gradients.evaluate.predict(run.models.student, batch).logits.detach()
        logits.requires_grad_(True)
        logps = torch.log_softmax(logits, -1)
        target = torch.tensor(sample.completion_ids)[:, None]
        gradient, = torch.autograd.grad(logps.gather(1, target).sum(), logits)
        assert gradient.square().sum().item() == pytest.approx(spread, rel=1e-4, abs=1e-6)


def test_samples_are_continued_and_other_settings_refused(world, tmp_path):
    """More groups go on from the file; another seed wants another file."""
    run, trees, args = world
    path = str(tmp_path / "samples.jsonl")
    first = gradients.measure(run, trees, args, 2, path)
    both = gradients.measure(run, trees, args, 3, path)
    assert both[:2] == first
    assert len({row["id"] for row in both}) == 3
    with pytest.raises(InputError, match="its seed is 0 and not 1"):
        gradients.measure(run, trees, train.argparse.Namespace(**{**vars(args), "seed": 1}), 3,
                          path)


@pytest.mark.parametrize("flags", [["--resume"], ["--baseline", "flat"], ["--objective", "sft"]])
def test_flags_that_sample_otherwise_are_refused(flags):
    """--resume measured the default run's checkpoint as the untrained student."""
    with pytest.raises(InputError, match="has no place here"):
        gradients.parse_args(flags)


def test_projection_keeps_products():
    """Within three standard errors, as its docstring bounds them."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(2, 20_000)).astype(np.float32)) + 0.5
    exact = x @ x.T
    kept = project(x) @ project(x).T
    error = (exact.diagonal().prod() / gradients.PROJECTION).sqrt()
    assert ((kept - exact).abs() < 3 * 2 ** 0.5 * error).all()


# ---- Estimators ----------------------------------------------------------------------------------
def test_weighted_baselines():
    """Samples 0 and 1 at the question, 2 below it; sample 1 alone is solved."""
    row = dict(id="a", node=[0, 0, 1], parent=[-1, 0], depth=[0, 1], rewards=[0, 1, 0],
               solved=[False, True, False], logps=[-1, -2, -4], lengths=[1, 2, 4], teacher=[0, 0],
               spread=[1, 1, 1], gram=np.diag([1.0, 2.0, 4.0]), projected=np.zeros((3, 2)))
    probe = gradients.read_probe(row, alpha=0.5)

    def weighted(among, own):
        return pytest.approx(gradients.weighted("norm", among, own, probe).tolist())

    assert weighted("group", True) == [-2 / 7, 5 / 7, -2 / 7]
    assert weighted("group", False) == [-1 / 3, 1, -2 / 3]
    assert weighted("subtree", True) == [-2 / 7, 5 / 7, 0]
    assert weighted("depth", True) == [-2 / 3, 1 / 3, 0]
    assert weighted("depth", False) == [-1, 1, -2 / 3]  # the third has nobody at its depth
    length = gradients.weighted("length", "group", True, probe)
    assert length == pytest.approx(gradients.named("opo", probe))
    surprisal = gradients.weighted("surprisal", "group", True, probe)
    assert surprisal == pytest.approx(gradients.named("optimal", probe))


def test_samples_are_counted_by_the_steps_that_are_left():
    """Of the tree 0 - 1 - 2 with a branch 0 - 3, whose one step is one less than the longest."""
    row = dict(id="a", parent=[-1, 0, 1, 0], depth=[0, 1, 2, 1], node=[0, 2, 2, 3],
               rewards=[0, 1, 0, 1], solved=[False, True, False, True], logps=[-1, -2, -4, -1],
               lengths=[1, 2, 4, 1], teacher=[0] * 4, spread=[1] * 4, gram=np.eye(4).tolist(),
               projected=[[0, 0]] * 4)
    found = gradients.describe([gradients.read_probe(row, 0.5)])
    assert found["samples_left"] == [2, 1, 1]
    assert found["solved_left"] == [0.5, 1.0, 0.0]
    assert (found["solved"], found["dead"]) == (0.5, 0.0)


def test_groups_of_one_problem_are_averaged():
    probes = [gradients.Probe(name, *[None] * 6) for name in "baab"]
    values = gradients.mean_by_problem([[1, 2], [3, 4], [5, 6], [7, 8]], probes)
    assert values.tolist() == [[4, 5], [4, 5]]


# ---- Estimates and intervals, where the truth is known -------------------------------------------
MEAN = 0.15
DEVIATION = np.linspace(0.5, 1.5, 10)


def draw(rng, G, mean=MEAN):
    """(G, 10) gradients of `flat`, of a better estimator on the same samples, and of the reference.
    Their noise is large beside their mean, as it is in training. The efficiency is 1 / 0.7^2."""
    noise = rng.exponential(size=(G, 10)) - 1  # skewed, as gradients are
    flat = mean + noise * DEVIATION
    other = 0.5 * (mean + 0.7 * (0.8 * noise + 0.6 * rng.normal(size=(G, 10))) * DEVIATION)
    return flat, other, other + 0.1 * rng.normal(size=(G, 10))


def efficiency(flat, other, y):
    """Of one draw, as assess_all computes it."""
    base = assess(flat, (flat ** 2).sum(1), y)["signal"]
    return assess(other, (other ** 2).sum(1), y)["signal"] / base


def test_estimates_are_unbiased():
    """Norm and variance over many draws; the squared mean itself is far above the norm."""
    rng = np.random.default_rng(0)
    norm = []
    naive = []
    variance = []
    for _ in range(1000):
        x, _, y = draw(rng, 20)
        found = assess(x, (x ** 2).sum(1), y)
        norm.append(found["norm"][0])
        variance.append(found["variance"][0])
        naive.append((x.mean(0) ** 2).sum())
    error = np.std(norm) / 1000 ** 0.5
    assert np.mean(norm) == pytest.approx(10 * MEAN ** 2, abs=3 * error)
    assert np.mean(naive) > 3 * 10 * MEAN ** 2
    error = np.std(variance) / 1000 ** 0.5
    assert np.mean(variance) == pytest.approx((DEVIATION ** 2).sum(), abs=3 * error)


def test_left_out_groups_are_left_out():
    """The fast sums against sums over fewer groups."""
    x, y, _ = draw(np.random.default_rng(0), 6)
    products = product_of_means(x, y)
    for k in range(6):
        rest = np.delete(np.arange(6), k)
        assert products[1 + k] == pytest.approx(product_of_means(x[rest], y[rest])[0])
    table = (x @ y.T)[~np.eye(6, dtype=bool)]
    assert products[0] == pytest.approx(table.mean())


@pytest.mark.parametrize("mean, at_most", [(MEAN, 0.99), (MEAN / 4, 1.0)])
def test_intervals_hold_as_often_as_they_say(mean, at_most):
    """The jackknife's 95 % intervals of the efficiency and of the squared norm. Where there is more
    noise than signal, they hold more often; an efficiency of an unknown sign has none, which denies
    nothing."""
    rng = np.random.default_rng(1)
    held = dict(efficiency=0, norm=0)
    stated = 0
    runs = 400
    for _ in range(runs):
        flat, other, y = draw(rng, 100, mean)
        _, low, high = ratio_interval(efficiency(flat, other, y))
        held["efficiency"] += np.isnan(low) or low < 1 / 0.49 < high
        stated += not np.isnan(low)
        _, low, high = interval(product_of_means(flat, flat))
        held["norm"] += low < 10 * mean ** 2 < high
    print(held, stated)
    assert stated == runs if mean == MEAN else stated > 0.4 * runs
    assert 0.92 * runs <= held["efficiency"] <= at_most * runs
    assert 0.92 * runs <= held["norm"] <= at_most * runs


def test_a_bootstrap_would_take_a_copy_for_another_group():
    """Its replicates lie above the estimate by the variance over the number of groups."""
    rng = np.random.default_rng(2)
    flat, _, _ = draw(rng, 100)
    again = []
    for _ in range(1000):
        copies = flat[rng.integers(100, size=100)]
        again.append(product_of_means(copies, copies)[0])
    bias = np.mean(again) - product_of_means(flat, flat)[0]
    error = np.std(again) / 1000 ** 0.5
    assert bias == pytest.approx(np.var(flat, axis=0).sum() / 100, abs=4 * error)
    assert bias > 8 * error


# ---- The summary ---------------------------------------------------------------------------------
def test_table_and_picture(tmp_path):
    """A number that could not be estimated is a dash, and no reason to stop."""
    lines = []
    for name, value in (("flat", 1.0), ("optimal", None)):
        line = dict(label="easy", estimator=name, groups=10, problems=5, group="tree", solved=0.5,
                    dead=0.1, triplets=0.3, sat=0.8)
        for key in ("efficiency", "cosine", "signal"):
            line |= {key: value, f"{key}_low": value, f"{key}_high": value}
        lines.append(line)
    text = gradients.table(lines)
    assert "| flat | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] |" in text
    assert "| efficiency | expectation | optimistic | pessimistic | optimal |" in text
    assert "| easy | – | – | – | – | – | – | – |" in text
    assert "| optimal | – | – |" in text and "flat satisfies 80 % of the order" in text
    wide = [lines[0] | dict(efficiency_high=2.7e11), lines[1]]
    assert "| flat | 1.00 [1.00, 3e+11] |" in gradients.table(wide)
    assert "satisfies" not in gradients.table([line | dict(sat=None) for line in lines])
    pytest.importorskip("matplotlib")
    gradients.draw(lines, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
