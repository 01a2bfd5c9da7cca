"""Evaluation's costs as ratios, both sides timed in turn in one process.

    python benchmarks/evals.py --json evals.json

1. Logistic regression along 45 strengths (caco/evals/logistic.py) against scikit-learn's LogisticRegression, solver lbfgs,
   warm-started along the same path; the same float64 features, penalty and tolerance of the mean loss's gradient. Shown
   with it: the largest gradient entry that each leaves, and on how many test images they differ.
2. k-NN of all test features (caco/evals/knn.py) against the whole similarity matrix at once, and against float64.
3. A second evaluator's features: from the file on disk against computing them again.

Features: of scikit-learn's digits at 16 px by the untrained small ResNet (seed 0), so that nothing need be downloaded; for
1, as many of noise around class means, correlated, as --images says.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

from caco import instructions  # before torch: CACO_INSTRUCTIONS holds for it too

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from caco.config import build, compose
from caco.evals.features import FeatureStore
from caco.evals.knn import knn_predict, knn_votes
from caco.evals.logistic import Axes, fit_on_axes, largest, objective, strengths
from caco.tracking.environment import environment

TOLERANCE, MAX_ITERATIONS = 1e-5, 1000


def seconds(function):
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def features(images: int, width: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positive and correlated, as those behind a ReLU: float32 [images, width], labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, images)
    hidden = rng.normal(size=(images, width // 4)) + rng.normal(size=(classes, width // 4))[labels]
    x = hidden @ rng.normal(size=(width // 4, width)) / (width // 4) ** 0.5 + 0.3 * rng.normal(size=(images, width)) + 0.2
    return torch.from_numpy(np.maximum(x, 0)).float(), torch.from_numpy(labels)


def our_path(x, y, num_classes):
    axes, weight, ends = Axes.of(x), None, []
    z = axes.turn(x)
    for strength in strengths():
        weight = fit_on_axes(
            axes, z, y, num_classes=num_classes, strength=strength, start=weight, tolerance=TOLERANCE, max_iterations=MAX_ITERATIONS
        )
        ends.append(axes.back(*weight))
    return ends


def scikit_learns_path(x, y):
    fitted = LogisticRegression(warm_start=True, tol=TOLERANCE, max_iter=MAX_ITERATIONS)
    ends = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of iterations that did not suffice: the gradient tells
        for strength in strengths():
            fitted.set_params(C=1 / strength).fit(x, y)
            ends.append((torch.from_numpy(fitted.coef_.T.copy()), torch.from_numpy(fitted.intercept_.copy())))
    return ends


def regression(images: int, width: int, classes: int, runs: int) -> dict:
    x, y = features(images + images // 4, width, classes)
    x, y, x_test = x[:images], y[:images], x[images:].double()
    x64, y64 = x.double().numpy(), y.numpy()
    pairs = []
    for _ in range(runs):
        ours, our_ends = seconds(lambda: our_path(x, y, classes))
        theirs, their_ends = seconds(lambda: scikit_learns_path(x64, y64))
        pairs.append((ours, theirs))

    def gradients(ends):
        return [largest(*objective(*end, x.double(), y, l2=s / images)[1:]) for end, s in zip(ends, strengths(), strict=True)]

    def predicted(ends):
        return torch.stack([(x_test @ weight + bias).argmax(1) for weight, bias in ends])

    differ = (predicted(our_ends) != predicted(their_ends)).sum(dim=1)
    ratios = [theirs / ours for ours, theirs in pairs]
    return {
        "images": images, "width": width, "classes": classes, "runs": runs,
        "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
        "seconds": statistics.median(ours for ours, _ in pairs), "scikit_learn_seconds": statistics.median(t for _, t in pairs),
        "largest_gradient": max(gradients(our_ends)), "scikit_learn_largest_gradient": max(gradients(their_ends)),
        "test_images": len(x_test), "most_predictions_that_differ": int(differ.max()),
    }  # fmt: skip


def neighbours(images: int, width: int, runs: int) -> dict:
    bank, labels = features(images, width, 10)
    query = features(images + 2000, width, 10)[0][images:]
    settings = {"k": 20, "temperature": 0.2, "num_classes": 10}

    def dense(dtype):
        sims = F.normalize(query.to(dtype), dim=1) @ F.normalize(bank.to(dtype), dim=1).T
        sim, index = sims.topk(20, dim=1)
        return knn_votes(sim, labels[index], temperature=0.2, num_classes=10).argmax(1)

    pairs = [
        (seconds(lambda: knn_predict(query, bank, labels, **settings)), seconds(lambda: dense(torch.float32))) for _ in range(runs)
    ]
    ratios = [dense_s / ours for (ours, _), (dense_s, _) in pairs]
    return {
        "bank": images, "queries": len(query), "width": width, "runs": runs,
        "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
        "predictions_that_differ_from_float64": int((pairs[-1][0][1] != dense(torch.float64)).sum()),
    }  # fmt: skip


def cached(runs: int) -> dict:
    cfg = compose(["preset=demo"])
    splits, views = build(cfg.data), build(cfg.augmentation)
    torch.manual_seed(0)
    backbone = build(cfg.backbone).eval()
    ratios = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            store = FeatureStore(splits, views, batch=512, device="cpu", precision="fp32", folder=Path(folder))
            first, _ = seconds(lambda: store.features(backbone, "train").sum())
            store.forget()
            again, _ = seconds(lambda: store.features(backbone, "train").sum())
            ratios.append(first / again)
    return {"images": len(splits.train), "runs": runs, "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000, help="of the regression")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    print(instructions.told(), flush=True)
    figures = {
        "regression": regression(arguments.images, arguments.width, arguments.classes, arguments.runs),
        "neighbours": neighbours(50_000, 256, arguments.runs),
        "cached_features": cached(arguments.runs),
        "threads": torch.get_num_threads(),
        "environment": environment(),
    }
    for name in ("regression", "neighbours", "cached_features"):
        print(name, json.dumps(figures[name]))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
