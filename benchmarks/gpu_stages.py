"""What the stages of the check of a GPU measure, and with which settings: whether the bank's results agree with the
equations in float64, where training steps wait for the GPU, and how well and how fast methods learn in 80 seconds.
gpu_check.py says when and for how long each stage runs. Its other stages run the benchmarks bank.py and step.py.
"""

import contextlib
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import caco  # noqa: F401  # isort: skip  # before torch, because it sets torch's instruction set
import torch
from torch.nn import functional as F

from caco import equations
from caco.banks.kernels import fused
from caco.banks.learnable import LearnableBank
from caco.config import composition
from caco.engine import trainer
from caco.engine.training import run_training
from caco.tracking.ledger import read_rows

PACKED_IMAGES = 20_000  # the number of images that gpu_check.py packs; four fifths of them are for training
LEARN_S, LEARN_LIMIT_S = 80, 117  # how long a method is trained, and the limit of its whole stage
SHAPES = [  # (queries, rows, width); no block size divides 1000 and 65,537
    (256, 4096, 128),
    (1000, 65_537, 128),
    (512, 8192, 256),
]
# Largest allowed error of the loss at temperature 0.1, and of the rows' steps relative to the largest step.
BOUND = {"fp32": 2e-4, "bf16": 3e-2}
LEARNING = {
    "caco": ["method=caco_small", "pn=both", "bank.size=1024", "warm_start.passes=32", "bank_learning.final_lr=0",
    "bank_learning.reading=paper",
             "bank_learning.push=0.25", "bank_learning.lr_reference_batch=1024"],
    "adco": ["method=adco", "method.momentum=0.99", "bank.size=1024", "bank_learning.final_lr=0",
    "bank_learning.reading=paper",
             "bank_learning.push=0.25", "bank_learning.lr_reference_batch=1024"],
    "mocov2": ["method=mocov2", "method.momentum=0.99", "method.temperature=0.1", "bank.size=4096"],
}  # fmt: skip
TRAINING = [
    "projector=small", "optimizer=sgd", "optimizer.lr=0.06", "optimizer.weight_decay=5e-4",
    "schedule.warmup_epochs=1", "schedule.final_fraction=0", "eval=[knn_all]", "tracking=ledger",
]  # fmt: skip
SMALL = ["data=digits", "augmentation=digits", "backbone=small_resnet", "backbone.width=8", "batch=64"]
WAITING = ["caco", "mocov2", "adco", "swav", "dino", "byol", "instdisc"]  # the methods that the stage `waits` runs
Write = Callable[[dict], None]  # writes the figures that are known so far to the result file


def kernels(device: torch.device, *, tiny: bool, write: Write = lambda known: None) -> dict:
    """Compare the bank's loss, update and choice of rows, in both precisions, with the equations in float64.

    The update is compared only at shapes whose gradient in float64 is not too large to compute.

    Returns:
        who made the passes ("served_by": Triton, the CPU's code, or PyTorch alone), and for each shape and precision
        the errors ("off"): of the mean loss; of the rows' steps, relative to the largest step; and the number of keys
        whose chosen row is not the nearest one in float64.
    Raises:
        AssertionError: an error is larger than its bound.
    """
    found: dict[str, dict[str, float]] = {}
    for N, K, D in [(32, 129, 16)] if tiny else SHAPES:
        for precision, bound in BOUND.items():
            generator = torch.Generator().manual_seed(0)
            q, k = (F.normalize(torch.randn(N, D, generator=generator), dim=1).to(device) for _ in range(2))
            bank = LearnableBank(size=K, dim=D, lr=3.0, seed=0).to(device)
            before = bank.rows.weight.detach().double()
            q.requires_grad_()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                row = bank.rows.most_probable(k)
                loss = bank.score(q, row, temperature=0.1).loss_B.mean()
            loss.backward()
            bank.update(lr=3.0, keys_GD=k)
            exact = equations.contrastive_loss(q.detach().double(), before, row, 0.1).mean()
            gradient = equations.bank_gradient(q.detach().double(), before, row, 0.1) if N * K * D <= 2**27 else None
            off = {"loss": abs(loss.item() - exact.item())}
            if gradient is not None:
                step = before - bank.rows.weight.detach().double()
                off["rows"] = ((step - 3.0 * gradient).abs().max() / (3.0 * gradient).abs().max()).item()
            nearest = (k.double() @ F.normalize(before, dim=1).T).argmax(1)
            off["rows chosen otherwise than in float64"] = (row != nearest).sum().item()
            found[f"N {N}, K {K}, D {D}, {precision}"] = off
            write({"off": found})
            assert max(off.values()) <= bound, (
                f"N {N}, K {K}, D {D}, {precision}: off by {off}, expected at most {bound}"
            )
    served = (
        "Triton"
        if device.type == "cuda" and fused.on_cuda(device, 128)
        else "CPU"
        if device.type == "cpu"
        else "PyTorch alone"
    )
    return {"served_by": served, "off": found}


def waits(run: Path, *, tiny: bool, write: Write) -> dict:
    """Find where training steps wait for the GPU, and how often. PyTorch reports the waits
    (`torch.cuda.set_sync_debug_mode`). For each method the steps from the 12th to the 20th are watched; none of these
    is logged, because a logged step has to wait for its loss.

    Returns:
        for each method, the places in the source code ("FILE:LINE") and how often each waited in these steps; or the
        error that kept the method from running.
    """
    found: dict[str, dict] = {}
    for name in WAITING[:1] if tiny else WAITING:
        bank = ["bank.size=512"] if name in ("caco", "mocov2", "adco") else []
        few = ["method.num_prototypes=64"] if name in ("swav", "dino") else []
        steps = ["max_steps=30", "epochs=2", "log_every_steps=1000", "schedule.warmup_epochs=0", "eval=[]"]
        own = ["optimizer=sgd", "projector=small", "tracking=ledger", *SMALL]
        try:
            with _watched() as seen:
                _train(run / name, [f"method={name}", *own, *bank, *few, *steps])
            found[name] = {"places": dict(seen)}
        except Exception as error:  # noqa: BLE001 - one method failed; the others must still run
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        write({"waits": found})
    return {"waits": found}


@contextlib.contextmanager
def _watched() -> Iterator[Counter[str]]:
    """A context that counts, by place in the source code, PyTorch's warnings that the host waits for the GPU. It counts
    from the 12th to the 20th step of a training. Without a GPU there are no such warnings.
    """
    seen: Counter[str] = Counter()
    batches, gpu = trainer.Trainer.batches, torch.cuda.is_available()

    def some(self):
        for number, given in enumerate(batches(self)):
            if gpu and number in (11, 20):  # an epoch of the digits has 21 steps
                torch.cuda.set_sync_debug_mode("warn" if number == 11 else "default")
            yield given

    def note(message, category, filename, lineno, file=None, line=None) -> None:
        if "synchroniz" in str(message):
            seen[f"{Path(filename).name}:{lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        trainer.Trainer.batches = some  # type: ignore[method-assign]
        try:
            yield seen
        finally:
            trainer.Trainer.batches = batches  # type: ignore[method-assign]
            if gpu:
                torch.cuda.set_sync_debug_mode("default")


def _train(folder: Path, overrides: list[str]) -> dict:
    composition.register()
    return run_training(composition.job_config(composition.compose(overrides)), folder)


def learn(name: str, data: Path | None, run: Path, *, tiny: bool, write: Write) -> dict:
    """Train one method for about 80 seconds and evaluate it by k-NN. A short first run measures how many epochs fit in
    the 80 seconds.

    Args:
        name: the method, a key of `LEARNING`.
        data: the folder with the unpacked images; not needed with `tiny`.
        run: a folder for the directories of the two runs.
    Returns:
        images per second, accuracy of k-NN in percent, seconds, and the summary of the run.
    """
    started = time.perf_counter()
    images = SMALL
    if not tiny:
        if data is None:
            raise SystemExit("learn: expected --data, a folder with train/ and test/, as pack takes it")
        images = ["data=cifar10_jpeg75", f"data.root={data}", "augmentation=cifar", "backbone=resnet18_cifar",
                  "batch=256", "loader.num_workers=8"]  # fmt: skip

    def train(folder: str, *overrides: str) -> dict:
        own = {key for key, _, _ in (override.partition("=") for override in overrides)}
        settings = [
            setting for setting in [*TRAINING, *LEARNING[name], *images] if setting.partition("=")[0] not in own
        ]
        return _train(run / folder, [*settings, *overrides])

    train("first", "max_steps=60", "epochs=10", "warm_start.steps=0", "warm_start.passes=null", "eval=[]")
    speed = _images_per_second(run / "first" / "ledger.jsonl", batch=64 if tiny else 256)
    # The time left before the stage's limit, less 20 s for the images, the k-NN evaluation and saving.
    seconds = 1 if tiny else min(LEARN_S, LEARN_LIMIT_S - 20 - (time.perf_counter() - started))
    epochs = max(2, int(seconds * speed / (1400 if tiny else 4 * PACKED_IMAGES // 5)))
    known = {"method": name, "images_per_second_at_first": speed, "epochs": epochs}
    write(known)
    whole = train("whole", f"epochs={epochs}")
    return known | {
        "images_per_second": whole["images_per_second"],
        "knn": whole["knn20_top1"],
        "training_s": time.perf_counter() - started,
        "summary": whole,
    }


def _images_per_second(ledger: Path, *, batch: int) -> float:
    """The speed of a short run, from its ledger. The first half of the ledger's rows is left out, because kernels are
    compiled in the first steps.
    """
    rows = [row for row in read_rows(ledger)[0] if row.get("kind") == "train"]
    early, late = rows[len(rows) // 2], rows[-1]
    return (late["step"] - early["step"]) * batch / max(late["time"] - early["time"], 1e-3)
