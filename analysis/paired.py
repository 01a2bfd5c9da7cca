"""`python -m analysis.paired RUNS --than RUNS`: how far one setting is ahead of another, with an interval.

    python -m analysis.paired runs/digits/*-caco-* --than runs/digits/*-none-*     finished runs, paired by their seeds
    python -m analysis.paired runs/digits/*-caco-* --than runs/digits/*-none-* --to FILE.json
    python -m analysis.paired FILE.json                                            the same, from that file

The k-NN evaluator of each run is repeated with its newest checkpoint, to learn which test images it gets right. The
interval is a bootstrap over seeds and test images together: both are drawn again with replacement, and each image
counts for both settings. FILE keeps one bit for each run and test image, so that the interval can be computed again
without the runs.
"""

import argparse
import base64
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from caco import errors, metrics
from caco.config import folders
from caco.errors import UserError
from caco.runs.files import read_json, write_json
from caco.runs.paths import expanded

DRAWS = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.paired", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=expanded, help="directories of finished runs, or a file from --to")
    parser.add_argument("--than", nargs="+", type=expanded, default=[], metavar="RUN", help="the runs to compare with")
    parser.add_argument("--data-root", metavar="PATH", help="where the runs' images are now")
    parser.add_argument("--to", type=expanded, metavar="FILE", help="keep which images each run gets right")
    with errors.shown():
        arguments = parser.parse_args(folders.take(sys.argv[1:]))
        if arguments.than:
            made = compared(arguments.runs, arguments.than, arguments.data_root)
        else:
            made = kept(arguments.runs)
        if arguments.to is not None:
            write_json(arguments.to, made)
        print("\n".join(told(made)))


def kept(files: Sequence[Path]) -> dict[str, Any]:
    """What `--to` has written to a file.

    Raises:
        UserError: there is no such file, or there are several.
    """
    found = read_json(files[0]) if len(files) == 1 and not files[0].is_dir() else {}
    if "first" not in found:
        raise UserError("expected RUNS --than RUNS, or one file that --to has written")
    return found


def compared(runs: Sequence[Path], than: Sequence[Path], data_root: str | None = None) -> dict[str, Any]:
    """Which test images each run gets right, as plain values for JSON; `right` is base64 of one bit for each image.

    Raises:
        UserError: the seeds of the two settings differ, or the runs are not evaluated by one k-NN on the same images.
    """
    first, second = ([_right(run, data_root) for run in group] for group in (runs, than))
    seeds = [sorted(run["seed"] for run in group) for group in (first, second)]
    if seeds[0] != seeds[1] or len(set(seeds[0])) < len(seeds[0]):
        raise UserError(f"expected each seed once on both sides, got seeds {seeds[0]} and, for --than, {seeds[1]}")
    shared = {}
    for key in ("metric", "test_images", "test_digest"):
        values = {run.pop(key) for run in first + second}
        if len(values) > 1:
            raise UserError(f"expected runs with the same {key}, got {', '.join(sorted(map(str, values)))}")
        (shared[key],) = values
    return {**shared, "first": first, "second": second}


def _right(run_dir: Path, data_root: str | None) -> dict[str, Any]:
    from analysis import model  # not at the top: what a file holds is told without torch
    from caco.config.composition import instantiate
    from caco.data.sets.sources import labels_of
    from caco.evals.evaluation import Evaluation

    trained = model.load(run_dir, data_root)
    cfg = trained.cfg
    named = {name: metric for name, node in cfg.eval.items() if (metric := metrics.knn_metric({name: node}))}
    if len(named) != 1 or not (run_dir / "summary.json").is_file():
        raise UserError(f"{run_dir}: expected a finished run that one k-NN evaluates, as with eval=[knn_all]")
    ((name, metric),) = named.items()
    knn = instantiate(cfg.eval[name])
    Evaluation(
        {name: knn}, trained.splits, trained.views, batch=cfg.batch, device="cpu", precision=cfg.precision,
        seed=cfg.seed,
    )  # fmt: skip
    _, test = trained.splits.labelled("k-NN")
    right_T = knn.predicted(trained.method.backbone).numpy() == labels_of(test)
    return {
        "name": run_dir.name,
        "seed": cfg.seed,
        "metric": metric,
        "test_images": len(test),
        "test_digest": test.digest(),
        "right": base64.b64encode(np.packbits(right_T).tobytes()).decode(),
    }


def difference(first_ST: np.ndarray, second_ST: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """The mean difference of two accuracies in percentage points, and the ends of its interval of 95 %.

    Args:
        first_ST, second_ST: bool, whether the run with seed S gets test image T right.
        seed: seed of the bootstrap.
    """
    ahead_ST = first_ST.astype(np.float64) - second_ST
    seeds, images = ahead_ST.shape
    generator = np.random.default_rng(seed)
    drawn = np.empty(DRAWS)
    for draw in range(DRAWS):
        weight_S = np.bincount(generator.integers(seeds, size=seeds), minlength=seeds) / seeds
        weight_T = np.bincount(generator.integers(images, size=images), minlength=images) / images
        drawn[draw] = weight_S @ ahead_ST @ weight_T
    low, high = np.percentile(drawn, [2.5, 97.5])
    return 100 * ahead_ST.mean(), 100 * low, 100 * high


def told(made: dict[str, Any]) -> list[str]:
    """The accuracy of each pair of runs, and their difference with its interval."""
    sides = []
    for side in ("first", "second"):
        bits = [np.frombuffer(base64.b64decode(run["right"]), np.uint8) for run in _by_seed(made[side])]
        sides.append(np.array([np.unpackbits(one, count=made["test_images"]) for one in bits], dtype=bool))
    lines = [f"{metrics.title(made['metric'])} on {made['test_images']:,} images"]
    for first, second, one_T, other_T in zip(*map(_by_seed, (made["first"], made["second"])), *sides, strict=True):
        lines.append(
            f"seed {first['seed']}: {100 * one_T.mean():.2f} {first['name']}, {100 * other_T.mean():.2f}"
            f" {second['name']}"
        )
    mean, low, high = difference(*sides)
    lines.append(
        f"mean difference {mean:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f} (bootstrap over"
        f" {len(sides[0])} seeds and {made['test_images']:,} images together, {DRAWS:,} draws)"
    )
    return lines


def _by_seed(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(runs, key=lambda run: run["seed"])


if __name__ == "__main__":
    main()
