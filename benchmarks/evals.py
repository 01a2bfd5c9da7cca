"""How long evaluations take compared with a standard way to compute the same, both timed in turns in one process.

    python benchmarks/evals.py --json evals.json    all three measurements; takes minutes

1. Logistic regression for 45 regularisation strengths (caco/evals/logistic.py), compared with scikit-learn's
   LogisticRegression (solver lbfgs, warm-started along the same path). Both get the same float64 features, penalty and
   tolerance on the gradient of the mean loss. The table also shows the largest gradient entry that each leaves, and
   for how many test images their predictions differ.
2. k-NN of all test features (caco/evals/knn.py), compared in time with computing the whole similarity matrix at once,
   and in predictions with float64.
3. Features for a second evaluator: reading them from the file on disk, compared with computing them again.

No data is downloaded. Measurement 3 uses scikit-learn's digits at 16 pixels with the untrained small ResNet (seed 0);
1 and 2 use synthetic correlated features around class means, for 1 as many as --images says.
"""

import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

if not __package__:  # run as a file: import caco and benchmarks from this checkout, as python -m benchmarks.evals does
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import caco  # noqa: F401, I001 - before torch, because it sets torch's instruction set
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from benchmarks.common import Report, formatted, named, parser, ratios, say, spread
from caco.config.composition import compose, instantiate
from caco.evals.features import FeatureStore
from caco.evals.knn import knn_predict, knn_votes
from caco.evals.logistic import Axes, fit_on_axes, largest, objective, strengths

TOLERANCE, MAX_ITERATIONS = 1e-5, 1000


def with_seconds(function):
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def features(images: int, width: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Synthetic features, non-negative and correlated as after a ReLU, float32 [images, width], and their labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, images)
    hidden = rng.normal(size=(images, width // 4)) + rng.normal(size=(classes, width // 4))[labels]
    x = (
        hidden @ rng.normal(size=(width // 4, width)) / (width // 4) ** 0.5
        + 0.3 * rng.normal(size=(images, width))
        + 0.2
    )
    return torch.from_numpy(np.maximum(x, 0)).float(), torch.from_numpy(labels)


def our_path(x, y, num_classes):
    axes, weight, ends = Axes.of(x), None, []
    z = axes.turn(x)
    for strength in strengths():
        weight = fit_on_axes(
            axes,
            z,
            y,
            num_classes=num_classes,
            strength=strength,
            start=weight,
            tolerance=TOLERANCE,
            max_iterations=MAX_ITERATIONS,
        )
        ends.append(axes.back(*weight))
    return ends


def scikit_learns_path(x, y):
    fitted = LogisticRegression(warm_start=True, tol=TOLERANCE, max_iter=MAX_ITERATIONS)
    ends = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # too few iterations: the gradient in the table shows how far it came
        for strength in strengths():
            fitted.set_params(C=1 / strength).fit(x, y)
            ends.append((torch.from_numpy(fitted.coef_.T.copy()), torch.from_numpy(fitted.intercept_.copy())))
    return ends


def regression(images: int, width: int, classes: int, runs: int) -> dict:
    x, y = features(images + images // 4, width, classes)
    x, y, x_test = x[:images], y[:images], x[images:].double()
    x64, y64 = x.double().numpy(), y.numpy()
    times = []
    for turn in range(runs):
        ours, our_ends = with_seconds(lambda: our_path(x, y, classes))
        theirs, their_ends = with_seconds(lambda: scikit_learns_path(x64, y64))
        times.append((ours, theirs))
        say(f"    turn {turn + 1} of {runs}")
    ours, theirs = zip(*times, strict=True)

    def gradients(ends):
        return [
            largest(*objective(*end, x.double(), y, l2=s / images)[1:])
            for end, s in zip(ends, strengths(), strict=True)
        ]

    def predicted(ends):
        return torch.stack([(x_test @ weight + bias).argmax(1) for weight, bias in ends])

    differ = (predicted(our_ends) != predicted(their_ends)).sum(dim=1)
    return {
        "images": images, "width": width, "classes": classes, "runs": runs, **named(ratios(theirs, ours), "ratio"),
        "seconds": spread(ours)["median"], "scikit_learn_seconds": spread(theirs)["median"],
        "largest_gradient": max(gradients(our_ends)), "scikit_learn_largest_gradient": max(gradients(their_ends)),
        "test_images": len(x_test), "most_predictions_that_differ": int(differ.max()),
    }  # fmt: skip


def neighbours(images: int, queries: int, width: int, runs: int) -> dict:
    bank, labels = features(images, width, 10)
    query = features(images + queries, width, 10)[0][images:]

    def dense(dtype):
        sims = F.normalize(query.to(dtype), dim=1) @ F.normalize(bank.to(dtype), dim=1).T
        sim, index = sims.topk(20, dim=1)
        return knn_votes(sim, labels[index], temperature=0.2, num_classes=10).argmax(1)

    times = []
    for _ in range(runs):
        ours, predicted = with_seconds(lambda: knn_predict(query, bank, labels, k=20, temperature=0.2, num_classes=10))
        times.append((ours, with_seconds(lambda: dense(torch.float32))[0]))
    ours, theirs = zip(*times, strict=True)
    return {
        "bank": images, "queries": queries, "width": width, "runs": runs, **named(ratios(theirs, ours), "ratio"),
        "predictions_that_differ_from_float64": int((predicted != dense(torch.float64)).sum()),
    }  # fmt: skip


def cached(runs: int) -> dict:
    cfg = compose(["preset=demo"])
    splits, views = instantiate(cfg.data), instantiate(cfg.augmentation)
    torch.manual_seed(0)
    backbone = instantiate(cfg.backbone).eval()
    times = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            store = FeatureStore(splits, views, batch=512, device="cpu", precision="fp32", folder=Path(folder))
            first, _ = with_seconds(lambda: store.features(backbone, "train").sum())
            store.forget()
            again, _ = with_seconds(lambda: store.features(backbone, "train").sum())
            times.append((first, again))
    return {"images": len(splits.train), "runs": runs, **named(ratios(*zip(*times, strict=True)), "ratio")}


def main() -> None:
    options = parser(__doc__, runs="This many turns are measured. The default is 3.")
    options.add_argument(
        "--images",
        type=int,
        default=4000,
        help="The regression has this many features to learn from. The default is %(default)s.",
    )
    options.add_argument(
        "--width", type=int, default=256, help="A feature has this many numbers. The default is %(default)s."
    )
    options.add_argument(
        "--classes",
        type=int,
        default=20,
        help="The regression tells this many classes apart. The default is %(default)s.",
    )
    arguments = options.parse_args()
    images, width, classes, runs = arguments.images, arguments.width, arguments.classes, arguments.runs or 3
    if arguments.tiny:
        images, width, classes, runs = 100, 4, 3, 1
    report = Report(["what", "ratio", "details"])
    say(f"regression: {runs} turns of ours and scikit-learn's for {len(strengths())} strengths, {images} x {width}")
    fit = regression(images, width, classes, runs)
    report.row(
        "logistic regression: scikit-learn's time / ours",
        _ratio(fit),
        f"{fit['seconds']:.1f} s, scikit-learn's {fit['scikit_learn_seconds']:.1f} s; largest gradient entry"
        f" {fit['largest_gradient']:.1e} and {fit['scikit_learn_largest_gradient']:.1e}; at most"
        f" {fit['most_predictions_that_differ']} of {fit['test_images']} predictions differ",
    )
    say("k-NN: in blocks, and with the whole similarity matrix at once")
    near = neighbours(*((500, 20) if arguments.tiny else (50_000, 2000)), 256, runs)
    differ = f"{near['predictions_that_differ_from_float64']} of {near['queries']} predictions differ from float64's"
    report.row("k-NN: time with the whole matrix / ours", _ratio(near), differ)
    say("features: computed, and read from their file")
    again = cached(runs)
    report.row("features: time to compute / time to read", _ratio(again), f"{again['images']} images")
    report.figures |= {
        "regression": fit,
        "neighbours": near,
        "cached_features": again,
        "threads": torch.get_num_threads(),
    }
    report.end(arguments.json)


def _ratio(figures: dict) -> str:
    return formatted({"median": figures["ratio"], "min": figures["ratio_min"], "max": figures["ratio_max"]})


if __name__ == "__main__":
    main()
