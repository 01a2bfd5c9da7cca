"""`python -m caco.embed` and `caco-embed`: compute the features of a folder of images and write them into one file."""

import shutil

from omegaconf import DictConfig

from caco.config import pretrained
from caco.errors import UserError
from caco.evaluate import run_command
from caco.runs import directory
from caco.runs.paths import expanded, make_folder, require_writable
from caco.saying import doing

HELP = """\
caco: write the features of a folder of images into one file.

  python -m caco.embed run=RUN data.root=FOLDER to=FILE.npz      RUN: its directory, a checkpoint or an MLflow run id
  python -m caco.embed run=RUN data.root=FOLDER to=FILE.parquet
  python -m caco.embed weights=FILE backbone=resnet50 data.root=FOLDER to=FILE.npz

  .npz       numpy.load(FILE): features [N, D] float32, files [N] (below data.root); if data= has labels, also
             label [N] and classes
  .parquet   one row for each image: file, features and, if data= has labels, label

Features are those of the backbone on the plain view, which evaluations use too. They are computed batch by batch in
bounded memory; the same command again goes on where it stopped and gives the same bytes. Every image below data.root is
read, in the order of the names; with another `data=`, first the training images, then the test images.
docs/library.md does the same in Python; docs/weights.md says what weights= can read.

Groups, chosen by group=option:

{groups}
"""


def main() -> None:
    """The console script."""
    run_command("embed", HELP, ("backbone", "augmentation", "data", "loader"), _embed)


def _embed(cfg: DictConfig) -> None:
    location = None if cfg.run is None else pretrained.locate(cfg.run)
    to = expanded(cfg.to)
    if to.is_dir():
        raise UserError(f"to: expected a file, got {to}, which is a folder")
    require_writable(to.parent, "to")
    aside = to.with_name(f".{to.name}.unfinished")
    if directory.is_first_rank():
        make_folder(aside, "to")
        directory.hold(aside)
    with doing("loading PyTorch"):
        from caco.engine.embedding import run_embedding  # not at the top of the file, because it imports torch

    try:
        run_embedding(cfg, location, to, aside)
    except UserError:
        if directory.is_first_rank() and not [path for path in aside.iterdir() if path.name != ".lock"]:
            shutil.rmtree(aside)
        raise


if __name__ == "__main__":
    main()
