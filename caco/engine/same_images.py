"""Records in images.json which images a run is evaluated on, and refuses to go on with others."""

import json
from typing import Any

from caco.evals.evaluation import Evaluation


def images_read(evaluation: Evaluation) -> dict[str, Any]:
    """The digests of the images that a run's evaluations read besides the images it is trained on, for images.json in
    the run's directory.

    These images and their place are no part of a run's identity, so this record keeps results of two different test
    sets out of one curve.
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
    return json.loads(json.dumps(read))  # in the form that the file gives back: lists in place of tuples


def other_images(recorded: dict[str, Any], ours: dict[str, Any], *, is_done: bool) -> str | None:
    """Why a run that was evaluated on the recorded images cannot go on with `ours`; None if it can.

    Args:
        is_done: whether the evaluation at the run's end has been made too.
    """
    parts = [*recorded.get("images", {}), *recorded.get("epoch", {}), *(recorded.get("end", {}) if is_done else {})]
    known, here = ({**of.get("images", {}), **of.get("epoch", {}), **of.get("end", {})} for of in (recorded, ours))
    # Earlier versions recorded an evaluator's sets as a list with the files' times, so a mere copy of the files looked
    # like other images. Such lists are not compared.
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
        " would mix both: point data.root, data.labelled_root or the evaluator's root at the earlier images, or"
        " choose another hydra.run.dir"
    )
