"""One training by caco, by lightly or by stable-pretraining, for peers.py. Each library is used as its own
documentation shows. peers.py starts one process of this file for each library.

Everything that can be the same in the three trainings is the same: the backbone (a module of caco's), the views' ranges
and probabilities (augmentation=cifar), the projector's layers, the length of the queue, the temperature, SGD with a
constant learning rate, the batch, and float32 on the CPU. All three keep the decoded images in memory, as caco does
with sets this small and torchvision's CIFAR10 always does. NOT_THE_SAME lists what cannot be the same. No library
evaluates or saves a checkpoint in the time that is measured; caco writes its ledger in this time.
"""

import copy
import dataclasses
import gc
import importlib
import importlib.metadata
import json
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # if this is run as a file, import caco and benchmarks from this checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import caco  # noqa: F401, I001 - before torch, because it sets torch's instruction set
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from caco.config import composition, folders
from caco.config.composition import instantiate

MODULES = {"caco": "caco", "lightly": "lightly", "stable-pretraining": "stable_pretraining"}
DIM, LR, SGD_MOMENTUM, WEIGHT_DECAY, TWIN_MOMENTUM = 128, 0.03, 0.9, 1e-4, 0.999
NOT_NEEDED = (  # callbacks that stable-pretraining adds to every Lightning Trainer, and that are turned off here
    "progress_bar", "registry", "logging", "env_dump", "trainer_info", "sklearn_checkpoint", "wandb_checkpoint",
    "trackio_checkpoint", "swanlab_checkpoint", "module_summary", "slurm_info", "unused_params", "hf_checkpoint",
)  # fmt: skip
NOT_THE_SAME = {  # library -> how its training differs from the others'; printed under the table of results
    "stable-pretraining": [
        "its MoCo v2 makes a third forward pass in each step, of the first view by the twin, for an embedding that"
        " evaluators would read",
        "its MoCo v2's queue starts empty, where the others start with random rows, and holds the keys of the step"
        " itself, so that each positive is a negative too",
        "its twin's BatchNorm statistics are means over those of the encoder",
        "its SimCLR's last BatchNorm has no shift",
        "a thread of it reads the machine's load every ten seconds, which no setting of it turns off",
        "before the first step its methods show the backbone an image of zeros, 224 pixels wide",
    ],
}


@dataclasses.dataclass(frozen=True)
class Training:
    """The training that a library is asked for; it is the same for all three, except for `to`."""

    method: str  # "mocov2" or "simclr"
    backbone: str  # an option of conf/backbone
    settings: dict[str, Any]  # arguments of the backbone that replace those of conf/backbone
    hidden_dim: int  # of the projector
    queue: int  # how many keys MoCo v2 keeps
    images: str  # a folder whose folder train/ has one folder of images for each class
    batch: int  # images
    epochs: int  # at least 2; the first one is not measured
    workers: int  # processes or threads that make views
    seed: int
    to: str  # the file to which the trained backbone's weights are written

    @property
    def temperature(self) -> float:
        return {"mocov2": 0.2, "simclr": 0.1}[self.method]

    @property
    def steps(self) -> int:
        """Number of steps in an epoch. Images that do not fill a last batch are left out."""
        return len(list(Path(self.images, "train").glob("*/*"))) // self.batch

    def new_backbone(self) -> nn.Module:
        return instantiate(option("backbone", self.backbone), **self.settings)


def option(group: str, name: str) -> Any:
    """The settings in the file NAME.yaml of the folder GROUP in conf/."""
    return OmegaConf.load(folders.CONF / group / f"{name}.yaml")


def view() -> tuple[Any, int, dict[str, list[float]]]:
    """The views of augmentation=cifar: the settings of one view, its width in pixels, and the mean and the standard
    deviation with which colours are normalised.
    """
    recipe = option("augmentation", "cifar")
    return recipe.views.both, recipe.size, {"mean": list(recipe.mean), "std": list(recipe.std)}


class InMemory(Dataset):
    """The images of a folder of class folders as pairs (image, label). All are decoded once and kept in memory, as in
    torchvision.datasets.CIFAR10.
    """

    def __init__(self, folder: str, transform: Callable | None = None):
        from torchvision.datasets import ImageFolder

        self.items, self.transform = list(ImageFolder(folder)), transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.items[index]
        return image if self.transform is None else self.transform(image), label


def loader_of(dataset: Any, training: Training) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=training.batch,
        shuffle=True,
        drop_last=True,
        num_workers=training.workers,
        persistent_workers=training.workers > 0,
    )


def ours(training: Training) -> tuple[list[float], nn.Module]:
    """Train as caco.train does when it is given these settings on its command line.

    Returns:
        for each epoch the time at which it ended, in seconds from a common start, computed from the images per second
        in the run's ledger; and the trained backbone.
    """
    from caco.engine.training import run_training
    from caco.nn.weights import load_backbone
    from caco.tracking import recorded

    run_dir = Path(training.to).with_suffix(".run")
    words = [
        f"method={training.method}", f"method.temperature={training.temperature}", f"backbone={training.backbone}",
        *[f"backbone.{name}={value}" for name, value in training.settings.items()],
        *([f"bank.size={training.queue}"] if training.method == "mocov2" else []),
        f"projector.hidden_dim={training.hidden_dim}", f"projector.dim={DIM}", "projector.initialisation=torch",
        "augmentation=cifar", "data=folder", f"data.root='{training.images}'", f"loader.num_workers={training.workers}",
        "optimizer=sgd", f"optimizer.lr={LR}", "optimizer.reference_batch=null", f"optimizer.momentum={SGD_MOMENTUM}",
        f"optimizer.weight_decay={WEIGHT_DECAY}", "schedule.warmup_epochs=0", "schedule.final_fraction=1.0",
        f"batch={training.batch}", f"epochs={training.epochs}", f"seed={training.seed}", "precision=fp32", "device=cpu",
        "eval=[]", "tracking=ledger", f"log_every_steps={training.steps}", f"checkpoint.every_epochs={training.epochs}",
    ]  # fmt: skip
    cfg = composition.job_config(composition.compose(words))
    assert training.method != "mocov2" or cfg.method.momentum == cfg.method.final_momentum == TWIN_MOMENTUM
    run_training(cfg, run_dir)
    rows = [row for row in recorded.read(run_dir).rows if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [training.steps * (epoch + 1) for epoch in range(training.epochs)]
    backbone = training.new_backbone()
    load_backbone(next((run_dir / "checkpoints").glob("*.pt")), "caco", backbone)
    return [row["step"] * training.batch / row["images_per_second"] for row in rows], backbone


def lightly(training: Training) -> tuple[list[float], nn.Module]:
    """Train in plain PyTorch with the loop of lightly's examples, and with lightly's transforms, heads, loss with a
    memory bank, and update of the momentum twin.

    Returns:
        for each epoch the time at which it ended, in seconds; and the trained backbone.
    """
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead, SimCLRProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms import MoCoV2Transform, SimCLRTransform

    is_moco = training.method == "mocov2"
    of, pixels, colours = view()
    brightness, contrast, saturation, hue = of.jitter
    transform = (MoCoV2Transform if is_moco else SimCLRTransform)(
        input_size=pixels, min_scale=of.scale[0], cj_prob=of.jitter_p, cj_strength=1.0, cj_bright=brightness,
        cj_contrast=contrast, cj_sat=saturation, cj_hue=hue, random_gray_scale=of.gray_p, gaussian_blur=of.blur_p,
        hf_prob=of.flip_p, normalize=colours,
    )  # fmt: skip
    loader = loader_of(InMemory(training.images + "/train", transform), training)
    backbone = training.new_backbone()
    head = (MoCoProjectionHead if is_moco else SimCLRProjectionHead)(backbone.num_features, training.hidden_dim, DIM)
    twin, twin_head = copy.deepcopy(backbone), copy.deepcopy(head)
    deactivate_requires_grad(twin)
    deactivate_requires_grad(twin_head)
    criterion = NTXentLoss(training.temperature, memory_bank_size=(training.queue, DIM) if is_moco else 0)
    optimizer = torch.optim.SGD(
        [*backbone.parameters(), *head.parameters()], lr=LR, momentum=SGD_MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    ends = []
    for _ in range(training.epochs):
        total = torch.zeros(())
        for (first, second), _label in loader:
            if is_moco:
                update_momentum(backbone, twin, m=TWIN_MOMENTUM)
                update_momentum(head, twin_head, m=TWIN_MOMENTUM)
                other = twin_head(twin(second)).detach()
            else:
                other = head(backbone(second))
            loss = criterion(head(backbone(first)), other)
            total += loss.detach()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.isfinite(total)
        ends.append(time.perf_counter())
    return ends, backbone


def stable_pretraining(training: Training) -> tuple[list[float], nn.Module]:
    """Train with stable-pretraining's class of the method, its transforms and its DataModule, in Lightning's Trainer,
    in which everything that is not needed is turned off. As in stable-pretraining's benchmarks, the class is given a
    `forward` that takes the two views of a batch.

    Returns:
        for each epoch the time at which it ended, in seconds; and the trained backbone.
    """
    import lightning
    import stable_pretraining
    from stable_pretraining import data
    from stable_pretraining.callbacks import TeacherStudentCallback
    from stable_pretraining.methods.mocov2 import MoCov2
    from stable_pretraining.methods.simclr import SimCLR

    stable_pretraining.set(verbose="WARNING", progress_bar="none", default_callbacks=dict.fromkeys(NOT_NEEDED, False))
    is_moco = training.method == "mocov2"
    of, pixels, colours = view()
    brightness, contrast, saturation, hue = of.jitter
    transforms = data.transforms
    assert of.blur_p == 0

    def one_view() -> Any:
        return transforms.Compose(
            transforms.RGB(),
            transforms.RandomResizedCrop((pixels, pixels), scale=tuple(of.scale)),
            transforms.RandomHorizontalFlip(p=of.flip_p),
            transforms.ColorJitter(brightness, contrast, saturation, hue, p=of.jitter_p),
            transforms.RandomGrayscale(p=of.gray_p),
            transforms.ToImage(**colours),
        )

    transform = transforms.MultiViewTransform([one_view(), one_view()])
    dataset = data.FromTorchDataset(InMemory(training.images + "/train"), names=["image", "label"], transform=transform)
    backbone, widths = training.new_backbone(), (training.hidden_dim, DIM)
    if is_moco:
        kind: Any = MoCov2
        module = kind(
            backbone, widths, training.queue, training.temperature, ema_decay_start=TWIN_MOMENTUM,
            ema_decay_end=TWIN_MOMENTUM,
        )  # fmt: skip
    else:
        kind = SimCLR
        module = kind(backbone, widths, training.temperature)

    def forward(self: Any, batch: dict[str, Any], stage: str) -> dict[str, Tensor]:
        first, second = (one["image"] for one in batch["views"])
        return {"loss": kind.forward(self, first, second).loss}

    module.forward = types.MethodType(forward, module)
    sgd = {"type": "SGD", "lr": LR, "momentum": SGD_MOMENTUM, "weight_decay": WEIGHT_DECAY}
    module.optim = {"optimizer": sgd, "scheduler": {"type": "ConstantLR", "factor": 1.0}}
    ends: list[float] = []

    class Ends(lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            ends.append(time.perf_counter())

    trainer = lightning.Trainer(
        max_epochs=training.epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[*([TeacherStudentCallback()] if is_moco else []), Ends()], default_root_dir=Path(training.to).parent,
    )  # fmt: skip
    trainer.fit(module, datamodule=data.DataModule(train=loader_of(dataset, training)))
    return ends, module.backbone.student if is_moco else module.backbone


LOOPS: dict[str, Callable[[Training], tuple[list[float], nn.Module]]] = {
    "caco": ours, "lightly": lightly, "stable-pretraining": stable_pretraining
}  # fmt: skip


def train(name: str, training: Training) -> float:
    """Train with the library of this name, and write the backbone's weights to `training.to`.

    Returns:
        images per second in all epochs but the first, which warms up.
    """
    torch.manual_seed(training.seed)
    ends, backbone = LOOPS[name](training)
    torch.save(backbone.state_dict(), training.to)
    gc.collect()  # the workers of a loader end when the loader is deleted
    return training.steps * training.batch * (training.epochs - 1) / (ends[-1] - ends[0])


def serve(name: str) -> None:
    """Print one line of JSON with the versions of the installed libraries. Then read a `Training` as JSON from each
    line of standard input, run it, and print its images per second as one line.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so standard output has only the answers: what a library prints goes to standard error
    importlib.import_module(MODULES[name])
    versions = {package: importlib.metadata.version(package) for package in ("torch", "torchvision", "numpy")}
    if name != "caco":
        versions[name] = importlib.metadata.version(name)
    print(json.dumps(versions), file=answers, flush=True)
    for line in sys.stdin:
        print(train(name, Training(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
