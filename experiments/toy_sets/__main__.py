"""`python -m experiments.toy_sets FOLDER`: toy sets in the layouts of VOC, COCO and PACS, to try on them what reads
these.
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
        help="a new folder; then eval.segment.root=FOLDER, and so for detect, detect_coco, domain, ...",
    )
    with errors.shown():
        folder = parser.parse_args().folder
        if folder.exists():
            raise UserError(f"{folder}: expected a folder that is not there yet, as nothing is overwritten")
        draw(folder)
        print(f"VOCdevkit/, coco/ and pacs/ are in {folder}")


if __name__ == "__main__":
    main()
