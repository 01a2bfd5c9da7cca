"""`python -m experiments.toy_sets FOLDER`: draw toy sets in the layouts of VOC, COCO and PACS, to try the evaluators
that read these sets.
"""

import argparse

from caco import errors
from caco.errors import UserError
from caco.runs.paths import expanded
from experiments.toy_sets.whole import draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder",
        type=expanded,
        help="a new folder; evaluate on it with eval.segment.root=FOLDER, and likewise for detect, domain, ...",
    )
    with errors.shown():
        folder = parser.parse_args().folder
        if folder.exists():
            raise UserError(
                f"{folder}: expected a folder that does not exist yet, because nothing is overwritten; choose another"
            )
        draw(folder)
        print(f"VOCdevkit/, coco/ and pacs/ are in {folder}")


if __name__ == "__main__":
    main()
