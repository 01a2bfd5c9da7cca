"""A training step gives a GPU its work and never waits for it. These tests need no GPU: they run steps on PyTorch's
device "meta", which computes shapes but no values (tests/waits.py).

docs/machines.md lists what still waits, and why.
"""

import pytest
import torch
from cases import CASES, LONG, has_bank
from tiny import compose
from waits import META, Over, WaitedError, Watch, on_meta, trainer_of

from caco.banks import scoring
from caco.banks.kernels import fused
from caco.engine import losses, trainer
from caco.methods.base import Outputs

OFTEN = {"method=caco", "method=mocov2", "method=byol", "method=swav with a queue", "pn=both negatives=hard",
         "method=instdisc", "rows renewed and in balance"}  # fmt: skip
SOME = [
    pytest.param(case, marks=() if case in OFTEN else pytest.mark.long)
    for case in CASES
    if "multi-crop" not in case and (case in OFTEN or case not in LONG or "negatives" not in case or "=both " in case)
]


@pytest.fixture(autouse=True)
def meta(monkeypatch):
    on_meta(monkeypatch)


@pytest.mark.parametrize("start", ["at the beginning", "in the training"])
@pytest.mark.parametrize("case", SOME)
def test_no_step_waits_for_the_device(case, start):
    """Checks three steps: the first ones of the run, which are the warm start's if there is one, or the training's."""
    cfg = compose(*CASES[case], bank=has_bank(CASES[case]))
    made = trainer_of(cfg, steps=3, in_training=start == "in the training")
    with pytest.raises(Over), Watch():
        made.fit()
    assert made.step >= 3


def test_the_watch_sees_what_a_gpu_would_wait_for():
    x, number = torch.empty(4, device=META), torch.empty((), device=META)
    with Watch():
        x * 2, x + torch.tensor(1.0), x.masked_fill(x > 0, 0.0), x.to(torch.float64)  # none of these waits
        for waits in (
            lambda: x[x > 0], lambda: torch.tensor(1.0, device=META),
            lambda: x[torch.tensor([0, 1])], lambda: torch.bincount(x.long()), lambda: x.nonzero(),
            lambda: torch.ones(3).to(META), number.item, lambda: bool(number),
        ):  # fmt: skip
            with pytest.raises(WaitedError):
                waits()
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # by PyTorch itself
            x.cpu()


def test_a_step_that_looks_at_its_loss_is_found(monkeypatch):
    original = trainer.Trainer._forward_and_backward

    def looks(self, batch, now) -> Outputs:
        outputs = original(self, batch, now)
        outputs.loss.item()
        return outputs

    monkeypatch.setattr(trainer.Trainer, "_forward_and_backward", looks)
    made = trainer_of(compose(*CASES["method=simsiam"], bank=False), steps=1, in_training=True)
    with pytest.raises(WaitedError, match="_local_scalar_dense"), Watch():
        made.fit()


class Behind(losses.Sent):
    """Numbers on a CPU that stand for a GPU's, which are read one step later. It counts how many were sent and read."""

    sent = read_so_far = 0

    def __init__(self, numbers_N):
        super().__init__(numbers_N)
        Behind.sent += 1

    def read(self):
        Behind.read_so_far += 1
        return super().read()


@pytest.fixture
def ahead(monkeypatch):
    """Make the Trainer treat the CPU like a GPU, whose losses are checked one step later."""
    monkeypatch.undo()
    monkeypatch.setattr(losses, "Sent", Behind)
    monkeypatch.setattr(losses.devices, "runs_ahead", lambda device: True)
    monkeypatch.setattr(fused, "nearest_row", lambda k, w: None)
    Behind.sent = Behind.read_so_far = 0


def test_losses_are_looked_at_a_step_later_and_all_of_them_before_anything_is_kept(ahead):
    seen = losses.Losses(torch.device("cpu"))
    for step in range(3):
        seen.add(["loss", "stop"], torch.tensor([float(step), 0.0]), f"step {step}", [])
        assert Behind.sent - Behind.read_so_far == 1
    assert seen.numbers == {"loss": 1.0} and not seen.stop
    seen.add(["loss", "stop"], torch.tensor([3.0, 0.5]), "step 3", [])
    assert not seen.stop
    seen.settle()
    assert seen.numbers == {"loss": 3.0} and seen.stop and Behind.sent == Behind.read_so_far
    seen.add(["loss", "stop"], torch.tensor([float("inf"), 0.0]), "step 4", [])
    with pytest.raises(losses.NonFiniteLossError, match="the loss is inf at step 4; nothing of it was saved"):
        seen.add(["loss", "stop"], torch.tensor([1.0, 0.0]), "step 5", [])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda q, w: q[3].copy_(5 * w[0]), "1 of 6 queries are not finite unit vectors; the first is query 3, whose"),
        (lambda q, w: q[4].fill_(torch.nan), "1 of 6 queries are not finite unit vectors; the first is query 4"),
        (lambda q, w: w[2].mul_(0), "rows of the bank have no direction"),
    ],
)
def test_what_a_bank_cannot_score_is_refused_with_its_loss(ahead, spoil, message):
    generator = torch.Generator().manual_seed(0)
    q, w = (torch.nn.functional.normalize(torch.randn(n, 4, generator=generator), dim=1) for n in (6, 9))
    spoil(q, w)
    seen = losses.Losses(torch.device("cpu"))
    with seen.watching() as held:
        loss = scoring.score(q, w, torch.zeros(6, dtype=torch.int64), first_row=0, size=9, tau=0.1).loss_B.mean()
    assert loss.isnan()
    seen.add(["loss", "stop"], torch.stack([loss, torch.zeros(())]), "step 7", held)
    with pytest.raises(losses.NonFiniteLossError, match=f"{message}.*; at step 7; the last checkpoint is good"):
        seen.settle()
