"""Compares the speed of whole trainings by caco, lightly and stable-pretraining, in images per second. The three use
the same method, model, views and batch.

    python benchmarks/peers.py --make-environments       run this once, first: minutes; it needs a network
    python benchmarks/peers.py --json peers.json         MoCo v2 and SimCLR, with a small ResNet and ResNet-18: minutes
    python benchmarks/peers.py --full --images PHOTOS    all images of PHOTOS/train, and k-NN on PHOTOS/test: hours

Each library has a process of its own, which runs during the whole benchmark, and the libraries take turns. A turn is a
new training of two epochs (or of --epochs). The first epoch warms up; the speed is measured over the others. Importing
the library, reading the images and building the model are not measured, because they come before. The three training
loops are in benchmarks/peer_loops.py, which also says what they have in common. What cannot be the same is printed
under the table.

--make-environments makes two virtual environments, build/peers/lightly and build/peers/stable-pretraining. It installs
the version of the library that PEERS names and what that version needs, in the versions of constraints.txt where that
file names them. A .pth file in each environment adds the packages of the environment in which this program runs; the
environment's own packages take precedence. So these packages, PyTorch among them, are not installed again, and all
three libraries compute with the same PyTorch. After that, nothing is fetched from a network.

Without --images, the images are tiles of 32 x 32 pixels, cut from JPEGs of noise with the texture of photographs.
--images names a folder whose folder train/ has one folder of images for each class (unpacked CIFAR-10, for example);
k-NN needs a folder test/ too. All three libraries read the same files. After each turn, the same function evaluates the
trained backbone by k-NN. Every turn has a seed of its own.
"""

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

# If this is run as a file, import caco and benchmarks from this checkout, as python -m benchmarks.peers does.
if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import caco  # noqa: F401, I001 - before torch, because it sets torch's instruction set
import torch
from PIL import Image

from benchmarks.common import Report, formatted, make_photos, parser, ratios, say, spread, turns
from benchmarks.peer_loops import NOT_THE_SAME, Training, option
from caco import library
from caco.config.composition import instantiate
from caco.data.sets.folders import folder
from caco.data.sets.sources import Source
from caco.errors import UserError
from caco.evals.knn import KNN
from caco.saying import per_second

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / "build" / "peers"
PEERS = {"lightly": "1.6.0", "stable-pretraining": "0.1.8"}  # the libraries that caco is compared with -> version
MAKE = "python benchmarks/peers.py --make-environments"
METHODS = {"mocov2": "MoCo v2", "simclr": "SimCLR"}


class Network(NamedTuple):
    """A network that is trained, and how many images it is trained on."""

    title: str  # its name in the table of results
    backbone: str  # an option of conf/backbone
    settings: dict[str, int]  # arguments of the backbone that replace those of conf/backbone
    hidden_dim: int  # of the projector
    batch: int  # images of a batch without --full
    images: int  # images of an epoch without --full


NETWORKS = {
    "small": Network("the small ResNet", "small_resnet", {}, 256, 256, 2000),
    "resnet18": Network("ResNet-18", "resnet18_cifar", {}, 512, 64, 192),
}
TINY = {"small": Network("a tiny ResNet", "small_resnet", {"width": 8}, 16, 8, 16)}
FULL_BATCH, QUEUE, TINY_QUEUE, TILE = 256, 4096, 32, 32


# Environments


def python_of(peer: str) -> Path:
    return ENVIRONMENTS / peer / "bin" / "python"


def lacks(peer: str) -> str | None:
    """Why caco cannot be compared with this library here; None if it can."""
    python = python_of(peer)
    if not python.exists():
        return f"it has no environment yet: {MAKE}"
    code = f"import importlib.metadata as all; print(all.version({peer!r}))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False).stdout.strip()
    return None if found == PEERS[peer] else f"{python} has {found or 'none of it'}, expected {PEERS[peer]}: {MAKE}"


def make_environments() -> None:
    shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    for peer, version in PEERS.items():
        say(f"{peer} {version}: an environment in {ENVIRONMENTS / peer}")
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENTS / peer], check=True)
        (own,) = (ENVIRONMENTS / peer / "lib").glob("python*/site-packages")
        (own / "shared.pth").write_text("\n".join(shared) + "\n")
        install = [*"-m pip install --quiet --disable-pip-version-check -c".split(), str(ROOT / "constraints.txt")]
        subprocess.run([python_of(peer), *install, f"{peer}=={version}"], check=True)
        if why := lacks(peer):
            raise SystemExit(f"{peer}: {why}")
    say("made")


class Contender:
    """A process of one library, which runs benchmarks/peer_loops.py and trains whenever `train` is called.

    Args:
        name: the library.
        python: the interpreter of the library's environment.
        top: a temporary folder. The process gets a folder in it as home and working directory, with its log.
    """

    def __init__(self, name: str, python: Path | str, top: Path):
        self.name, self.home = name, top / name
        self.home.mkdir()
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        offline = {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        fonts = {} if name == "caco" else {"MPLCONFIGDIR": str(ENVIRONMENTS / "fonts")}  # a search for fonts is slow
        environment = {**os.environ, **offline, **fonts, "HOME": str(self.home), "PYTHONPATH": os.pathsep.join(paths)}
        self.log = self.home / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, "-m", "benchmarks.peer_loops", name], cwd=self.home, env=environment, text=True, stderr=log,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip

    def answer(self) -> str:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return line
        said = "\n".join(self.log.read_text().splitlines()[-30:])
        raise RuntimeError(f"{self.name} ended with exit code {self.process.wait()}; its last lines:\n{said}")

    def train(self, training: Training) -> float:
        assert self.process.stdin is not None
        print(json.dumps(dataclasses.asdict(training)), file=self.process.stdin, flush=True)
        return float(self.answer())

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


# Images


def make_tiles(out: Path, photos: Path, count: int) -> None:
    """Write `count` PNGs of one class into the folder `out`, cut from images that `common.make_photos` makes in the
    folder `photos`.
    """
    out.mkdir(parents=True)
    down, across = 375 // TILE, 500 // TILE
    make_photos(photos, -(-count // (down * across)), 500)
    made = 0
    for file in sorted(photos.iterdir()):
        photo = np.asarray(Image.open(file))
        for place in range(min(down * across, count - made)):
            y, x = TILE * (place // across), TILE * (place % across)
            Image.fromarray(photo[y : y + TILE, x : x + TILE]).save(out / f"{made:05}.png")
            made += 1


def copied(source: Source, count: int | None, to: Path) -> None:
    """Copy images into class folders below `to`, so that all three libraries find the same images.

    Args:
        count: how many images to draw, with a fixed seed; None: all.
    """
    labels = np.zeros(len(source), dtype=int) if source.labels is None else source.labels
    chosen = np.arange(len(source))
    if count is not None and count < len(source):
        chosen = np.sort(np.random.default_rng(0).permutation(len(source))[:count])
    for index in chosen:
        path = source.path(int(index))
        assert path is not None, "of a folder of files"
        into = to / f"class{labels[index]:04}"
        into.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, into / f"{index:06}{path.suffix}")


def images_in(given: Path | None, top: Path, count: int | None) -> Path:
    """The folder of the images that all libraries read. It has train/, and it has test/ if the given images have a
    labelled test split.

    Args:
        given: the folder of --images; None to make images.
        top: a temporary folder, in which the folder is made.
        count: the number of images; of given ones at most so many in each split, None: all.
    """
    images = top / f"images-{count}"
    if given is None:
        say(f"no --images: making {count} tiles of noise with the texture of photographs")
        make_tiles(images / "train" / "tiles", top / f"photos-{count}", count or 0)
        return images
    splits = folder(root=str(given), in_memory_mb=0)
    copied(splits.pretrain, count, images / "train")
    if splits.test is not None and splits.test.labels is not None:
        copied(splits.test, count, images / "test")
    return images


def knn(training: Training) -> list[float]:
    """The accuracy of k-NN with 20 neighbours on the trained backbone's features, in percent of the test images, as a
    list of one number; an empty list if there are no test images.
    """
    splits = folder(root=training.images)
    if splits.train is None or splits.test is None:
        return []
    backbone = training.new_backbone()
    backbone.load_state_dict(torch.load(training.to, weights_only=True))
    nearest = {"knn": KNN(k=min(20, len(splits.pretrain)))}
    views = instantiate(option("augmentation", "cifar"))
    found = library.evaluate(backbone, nearest, train=splits.train, test=splits.test, views=views, device="cpu")
    return list(found.values())


# The comparison


def compare(
    report: Report, contenders: dict[str, Contender], method: str, network: Network, *, images: Path, batch: int,
    runs: int, epochs: int, workers: int, queue: int,
) -> None:  # fmt: skip
    """Compare the libraries with one method and one network. Adds to the report a row for each peer, or one row for
    caco alone if there is no peer.

    Args:
        contenders: the libraries' processes, by name; "caco" is one of them.
        images: the folder that `images_in` returned.
        runs: number of turns.
        workers: processes or threads that make views.
        queue: keys that MoCo v2 keeps.
    Raises:
        UserError: there are fewer images than a batch has.
    """
    trainings = {
        name: Training(
            method, network.backbone, network.settings, network.hidden_dim, queue, str(images), batch, epochs, workers,
            seed=0, to=str(contender.home / "trained.pt"),
        )
        for name, contender in contenders.items()
    }  # fmt: skip
    if trainings["caco"].steps == 0:
        raise UserError(f"--images: expected at least the {batch} images of a batch below {images / 'train'}")
    title = f"{METHODS[method]}, {network.title}, batch {batch}"
    say(f"{title}: {', '.join(contenders)}")
    accuracies: dict[str, list[float]] = {name: [] for name in contenders}

    def work(name: str) -> Callable[[], float]:
        seeds = itertools.count()

        def once() -> float:
            # Without this, caco would resume the run of the last turn.
            shutil.rmtree(contenders[name].home / "trained.run", ignore_errors=True)
            training = dataclasses.replace(trainings[name], seed=next(seeds))
            rate = contenders[name].train(training)
            accuracies[name] += knn(training)
            return rate

        return once

    rates = turns({name: work(name) for name in contenders}, runs, warm=0)
    medians = {name: spread(values)["median"] for name, values in rates.items()}
    report.figures[f"{method}_{network.backbone}"] = {
        "images": trainings["caco"].steps * batch, "batch": batch, "images_per_second": rates,
        "knn_top1": accuracies, "vs": {name: ratios(rates["caco"], rates[name]) for name in rates if name != "caco"},
    }  # fmt: skip
    shown = {name: formatted(spread(found), " %", digits=1) if found else "-" for name, found in accuracies.items()}
    for name in [name for name in rates if name != "caco"]:
        beside = f"{per_second(medians['caco'])} to {per_second(medians[name])} images a second"
        nearest = f"{shown['caco']} to {shown[name]}" if accuracies[name] else "-"
        report.row(f"{title}: caco / {name}", formatted(ratios(rates["caco"], rates[name])), beside, nearest)
    if len(rates) == 1:
        report.row(f"{title}: caco alone", "-", f"{per_second(medians['caco'])} images a second", shown["caco"])


def chosen(options: argparse.ArgumentParser, flag: str, words: str, known: dict) -> list[str]:
    names = words.split(",")
    if unknown := [name for name in names if name not in known]:
        options.error(f"{flag}: expected some of {', '.join(known)}; got {', '.join(unknown)}")
    return names


def main() -> None:
    options = parser(
        __doc__,
        runs="This many turns are measured. The default is 1 turn, and 3 turns with --full.",
        full="Both networks train on all images of --images, or on 2,000 made ones, in batches of 256, for 3 turns.",
    )
    options.add_argument(
        "--make-environments",
        action="store_true",
        help="Only make the virtual environments of lightly and stable-pretraining; measure nothing.",
    )
    options.add_argument(
        "--images",
        type=Path,
        help="Read the images in this folder, in which train/, and for k-NN test/ too, has one folder for each class.",
    )
    options.add_argument(
        "--count",
        type=int,
        help="An epoch has at most this many images. At most as many test images are used for k-NN.",
    )
    options.add_argument(
        "--batch",
        type=int,
        help="A batch has this many images, for both networks. By default each network has a batch of its own.",
    )
    options.add_argument(
        "--epochs",
        type=int,
        default=2,
        help="A turn trains for this many epochs, of which the first is not measured. The default is %(default)s.",
    )
    options.add_argument(
        "--workers",
        type=int,
        default=2,
        help="This many processes or threads make the views of the images. The default is %(default)s.",
    )
    options.add_argument(
        "--methods", default=",".join(METHODS), help="These methods are measured. The default is %(default)s."
    )
    options.add_argument(
        "--networks", default=",".join(NETWORKS), help="These networks are trained. The default is %(default)s."
    )
    options.add_argument(
        "--peers", default=",".join(PEERS), help="Compare caco with these libraries. The default is %(default)s."
    )
    arguments = options.parse_args()
    if arguments.make_environments:
        make_environments()
        return
    networks = TINY if arguments.tiny else NETWORKS
    named = chosen(options, "--networks", ",".join(TINY) if arguments.tiny else arguments.networks, networks)
    methods = chosen(options, "--methods", arguments.methods, METHODS)
    peers = chosen(options, "--peers", arguments.peers, PEERS)
    given = arguments.images
    if arguments.epochs < 2:
        options.error(f"--epochs: expected at least 2, since the first is not counted; got {arguments.epochs}")
    if given is not None and not given.is_dir():
        options.error(f"--images: expected a folder, got {given}, which is not there")
    report = Report(["what", "ratio (least to most)", "beside it", "k-NN"])
    pythons = {"caco": Path(sys.executable)}
    pythons |= {peer: python_of(peer) for peer in peers if not report.leave_out(peer, lacks(peer))}
    with tempfile.TemporaryDirectory() as temporary:
        top, contenders = Path(temporary), dict[str, Contender]()
        try:
            for name, python in pythons.items():
                contenders[name] = Contender(name, python, top)
            report.figures["versions"] = {name: json.loads(one.answer()) for name, one in contenders.items()}
            say(f"started: {', '.join(contenders)}")
            folders = dict[int | None, Path]()
            for name in named:
                network = networks[name]
                count = arguments.count or ((None if given else 2000) if arguments.full else network.images)
                batch = arguments.batch or (FULL_BATCH if arguments.full else network.batch)
                if count not in folders:
                    folders[count] = images_in(given, top, count)
                for method in methods:
                    compare(
                        report, contenders, method, network, images=folders[count], batch=batch,
                        runs=arguments.runs or (3 if arguments.full else 1), epochs=arguments.epochs,
                        workers=arguments.workers, queue=TINY_QUEUE if arguments.tiny else QUEUE,
                    )  # fmt: skip
        except UserError as error:
            options.error(str(error))
        finally:
            for contender in contenders.values():
                contender.close()
    report.figures |= {"epochs": arguments.epochs, "workers": arguments.workers}
    report.figures["photos"] = "given" if given else "made"
    report.notes = [f"{name}: {why}" for name in pythons for why in NOT_THE_SAME.get(name, [])]
    report.end(arguments.json)


if __name__ == "__main__":
    main()
