"""Which images a run is evaluated on: images.json in its directory, and the refusal of others."""

import json
from typing import Any

from caco.evals.evaluation import Evaluation


def images_read(evaluation: Evaluation) -> dict[str, Any]:
    """The images that a run's evaluations read besides those that it is trained on, by digest: what images.json in its
    directory keeps.

    They are no part of a run's identity, nor is where they lie; so this is how two test sets are kept out of one curve.
    """
    if not evaluation.evaluators:
        return {}
    splits = evaluation.store.splits
    sources = {"train": splits.train, "test": splits.test}
    inputs = {name: (one.when, one.image_sets() or one.inputs()) for name, one in evaluation.evaluators.items()}
    read = {
        "images": {split: source.digest() for split, source in sources.items() if source is not None},
        "epoch": {name: read for name, (when, read) in inputs.items() if when == "epoch" and read},
        "end": {name: read for name, (when, read) in inputs.items() if when != "epoch" and read},
    }
    return json.loads(json.dumps(read))  # as the file will say it: tuples are lists there


def other_images(recorded: dict[str, Any], ours: dict[str, Any], *, is_done: bool) -> str | None:
    """Why a run that has been evaluated on the recorded images cannot go on with these; None where it can.

    Args:
        is_done: whether what is evaluated at its end has been, too.
    """
    parts = [*recorded.get("images", {}), *recorded.get("epoch", {}), *(recorded.get("end", {}) if is_done else {})]
    known, here = ({**of.get("images", {}), **of.get("epoch", {}), **of.get("end", {})} for of in (recorded, ours))
    # What earlier versions wrote of an evaluator's sets, a list, had the times of files in it, and a copy looked like
    # other images.
    differ = [
        part for part in parts if part in here and type(here[part]) is type(known[part]) and here[part] != known[part]
    ]
    if not differ:
        return None
    where = {"train": "the labelled training images", "test": "the test images"}
    named = " and ".join(where.get(part, f"those of eval.{part}") for part in differ)
    shown = {part: (known[part], here[part]) if isinstance(known[part], str) else None for part in differ}
    digests = "; ".join(f"{part}: digest {pair[0]}, now {pair[1]}" for part, pair in shown.items() if pair)
    return (
        f"this run has been evaluated on other images so far ({named}{': ' * bool(digests)}{digests}), and its curve"
        " would be of both: point data.root, data.labelled_root or the evaluator's root at those, or choose another"
        " hydra.run.dir"
    )
