"""The images that a run is trained and evaluated on, with their views and the loader that reads them."""

from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig

from caco import distributed
from caco.config.composition import instantiate
from caco.data.loaders.bound import BoundLoader, Loader
from caco.data.loaders.images import Images
from caco.data.sets.sources import Splits
from caco.data.views.augmentation import Views
from caco.engine.assembly import build_splits
from caco.engine.channels import views_of
from caco.engine.starting import Start
from caco.saying import Sometimes


class Data(NamedTuple):
    """The images of a run and what reads them."""

    splits: Splits
    views: Views
    digest: str  # of the images to train on
    settings: Loader
    loader: BoundLoader
    images: Images

    def close(self) -> None:
        self.loader.close()
        self.images.close()


def read(cfg: DictConfig, run_dir: Path, device: torch.device, say: Sometimes, start: Start) -> Data:
    """The images, their views and the started loader. A collective."""
    with start.part("reading the images"):
        splits = build_splits(cfg)
    with start.part("looking at the images"):
        splits.pretrain.look(say)  # on all ranks together, because the digest of a large set takes long
    with start.part("measuring the images"):
        views = views_of(cfg, splits, run_dir=run_dir, say=say)
    with start.part("the digest of the images"):
        digest = distributed.together(lambda: splits.pretrain.digest() if distributed.is_main() else "")[0]

    settings: Loader = instantiate(cfg.loader)

    def bind_loader() -> BoundLoader:
        return settings.bind(
            splits.pretrain,
            views,
            batch=cfg.batch,
            seed=cfg.seed,
            rank=distributed.rank(),
            world=distributed.world(),
            device=device,
        )

    with start.part("starting the loader"):
        loader = bind_loader()
    images = Images(
        splits.pretrain, views, bind_loader, batch=max(1, min(cfg.batch, 512)), device=device, rank=distributed.rank(),
        world=distributed.world(), num_workers=settings.num_workers, corrupt=settings.corrupt,
    )  # fmt: skip
    return Data(splits, views, digest, settings, loader, images)
