"""A bank in a training loop outside caco: its loss and the motion of its rows agree with the equations and with caco's
methods, on any number of ranks.
"""

import copy

import pytest
import torch
from processes import ranks
from tiny import now
from torch import nn
from torch.nn import functional as F

from caco import distributed
from caco.banks.fifo import FifoBank
from caco.banks.learnable import LearnableBank
from caco.banks.own_loop import leave_to_ranks
from caco.data.loaders.batches import Batch
from caco.errors import UserError
from caco.methods.contrastive import Contrastive
from caco.methods.sources import BankRow, BankRows, OtherView
from caco.nn.heads import Encoder, Projector
from caco.nn.twin import MomentumTwin

B, D, K, E = 8, 6, 13, 3


def embeddings(step, number=B, dtype=torch.float64):
    """Embeddings that are not normalised, as a projector gives them."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(2, number, D, generator=generator, dtype=torch.float64).mul_(3).to(dtype).unbind()


def dense(q, k, w, positive, tau, extra=None):
    """The loss of each query as documented for `loss`, computed with plain PyTorch, and the column of its positive."""
    q, k, m = (F.normalize(x, dim=1) for x in (q, k, w))
    columns = (
        [q @ m.T] + ([(q * k).sum(1, keepdim=True)] if positive == "key" else []) + ([] if extra is None else [extra])
    )
    at = (k @ m.T).argmax(1) if positive == "row" else torch.full((len(q),), len(w))
    return F.cross_entropy(torch.cat(columns, 1) / tau, at, reduction="none"), at


@pytest.mark.parametrize("kind", [LearnableBank, FifoBank])
@pytest.mark.parametrize("positive", ["row", "key"])
@pytest.mark.parametrize("columns", [0, E])
def test_the_loss_and_the_gradients_of_queries_keys_and_extra_columns_are_those_of_autograd(kind, positive, columns):
    (q, k), bank = embeddings(0), kind(size=K, dim=D).double()
    extra = (
        torch.rand(B, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(9)) * 2 - 1
        if columns
        else None
    )
    results = []
    for of in (lambda *a: bank.loss(a[0], a[1], temperature=0.1, positive=positive, extra_BE=a[2]),
               lambda *a: dense(a[0], a[1], bank.rows.weight.detach(), positive, 0.1, a[2])[0].mean()):  # fmt: skip
        leaves = [None if x is None else x.clone().requires_grad_() for x in (q, k, extra)]
        value = of(*leaves)
        value.backward()
        results.append([value.detach(), *(x.grad for x in leaves if x is not None and x.grad is not None)])
    assert len(results[0]) == len(results[1]) == 2 + (positive == "key") + bool(columns)
    for ours, autograds in zip(*results, strict=True):
        assert torch.allclose(ours, autograds, atol=1e-12)


@pytest.mark.parametrize("positive", ["row", "key"])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_rows_descend_the_loss_as_positives_and_climb_it_as_negatives(positive, parts):
    """The motion of the rows (Eqs. 6 to 10) follows from the gradient of each query's loss with respect to the rows."""
    (q, k), bank = embeddings(1), LearnableBank(size=K, dim=D, lr=0.5, momentum=0.0).double()
    before = bank.rows.weight.detach().clone()
    for qs, ks in zip(q.chunk(parts), k.chunk(parts), strict=True):
        (bank.loss(qs.requires_grad_(), ks, temperature=0.1, positive=positive) / parts).backward()
    assert torch.equal(bank.rows.weight, before)  # rows do not move before the update
    bank.update()
    w = before.clone().requires_grad_()
    loss_B, at_B = dense(q.detach(), k, w, positive, 0.1)
    expected = torch.zeros_like(before)
    for loss, at in zip(loss_B / B, at_B.tolist(), strict=True):
        gradient = torch.autograd.grad(loss, w, retain_graph=True)[0]
        sign = -torch.ones(K, 1, dtype=torch.float64)
        if at < K:
            sign[at] = 1
        expected += sign * gradient
    assert torch.allclose(bank.rows.weight, before - 0.5 * expected, atol=1e-12)


def test_a_warm_start_moves_no_row_and_its_keys_fill_the_bank():
    bank = LearnableBank(size=2 * B, dim=D)
    for step in range(2):
        q, k = embeddings(step, dtype=torch.float32)
        before = bank.rows.weight.detach().clone()
        bank.loss(q.requires_grad_(), k, positive="key", learn=False).backward()
        bank.update()
        assert torch.equal(bank.rows.weight, before)
        bank.fill(F.normalize(k, dim=1), step)
        assert torch.equal(bank.rows.weight[step * B : (step + 1) * B], F.normalize(k, dim=1))


def test_a_queue_takes_the_steps_keys_of_all_calls_once_and_none_in_eval_mode():
    bank = FifoBank(size=20, dim=D).double()
    (q1, k1), (q2, k2) = embeddings(2), embeddings(3)
    (bank.loss(q1, k1) + bank.loss(q2, k2)).item()
    bank.eval()
    bank.loss(q1, k1)
    bank.update()
    assert torch.allclose(bank.rows.weight[: 2 * B], F.normalize(torch.cat([k1, k2]), dim=1))
    after = bank.rows.weight.clone()
    bank.update()  # without a loss before it
    assert torch.equal(bank.rows.weight, after) and int(bank.next_row) == 2 * B


def encoder():
    torch.manual_seed(4)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 16), nn.ReLU())
    return Encoder(
        backbone=backbone, projector=Projector(in_dim=16, hidden_dim=16, dim=D, layers=2, batch_norm=True, bias=False)
    )


@pytest.mark.parametrize("kind", ["caco", "moco"])
def test_a_loop_of_ones_own_makes_the_methods_steps(kind):
    """After five steps, rows and weights are equal to the bit. Each direction is computed for the whole batch, as in
    the published loops.
    """
    bank = LearnableBank(size=K, dim=D, lr=0.5) if kind == "caco" else FifoBank(size=4 * B, dim=D)
    method = Contrastive(
        encoder=encoder(), bank=copy.deepcopy(bank), positives=BankRow() if kind == "caco" else OtherView(),
        negatives=BankRows(),
        temperature=0.1, symmetric=False,
    )  # fmt: skip
    theirs = torch.optim.SGD(method.encoder.parameters(), lr=0.1, momentum=0.9)
    own = encoder()
    twin, ours = MomentumTwin(own), torch.optim.SGD(own.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(5)
    for step in range(5):
        views = list(torch.randn(2, B, 3, 4, 4, generator=generator))
        moment = now(step=step, twin_momentum=0.99, bank_lr=0.5)
        method.before_step(moment, None)
        theirs.zero_grad()
        expected = method.forward(Batch(views, torch.arange(B), torch.zeros(B)), moment).loss
        expected.backward()
        theirs.step()
        method.after_step(moment)

        twin.update(own, 0.99)
        ours.zero_grad()
        loss = bank.loss(own(views[0], unit=False), twin(views[1], unit=False), temperature=0.1)
        loss.backward()
        ours.step()
        bank.update()
        assert torch.equal(loss, expected)
    assert torch.equal(bank.rows.weight, method.bank.rows.weight)
    for mine, published in zip(own.parameters(), method.encoder.parameters(), strict=True):
        assert torch.equal(mine, published)


@pytest.mark.parametrize("bank", [LearnableBank(size=4096, dim=64), FifoBank(size=4096, dim=64)])
def test_bf16_embeddings_are_scored_in_float32_and_autocast_stays_within_its_rounding(bank):
    generator = torch.Generator().manual_seed(6)
    q, k = torch.randn(2, 32, 64, generator=generator)
    q = (q + k).bfloat16()
    exact = copy.deepcopy(bank).double()
    expected = exact.loss(q.double(), k.double(), positive="key", temperature=0.1)
    low = q.clone().requires_grad_()
    loss = bank.loss(low, k.bfloat16().float(), positive="key", temperature=0.1)
    loss.backward()
    assert loss.dtype == torch.float32 and low.grad.dtype == torch.bfloat16 and low.grad.abs().sum() > 0
    assert abs(loss.item() - expected.item()) < 0.02
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(bank.loss(q, k, positive="key", temperature=0.1).item() - expected.item()) < 0.05


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA")
@pytest.mark.parametrize("kind", [LearnableBank, FifoBank])
def test_on_cuda_as_on_a_cpu(kind):
    banks = [kind(size=300, dim=D).to(device) for device in ("cpu", "cuda")]
    for step in range(3):
        values = []
        for bank in banks:
            q, k = (x.float().to(bank.rows.weight.device) for x in embeddings(step))
            values.append(bank.loss(q.requires_grad_(), k))
            values[-1].backward()
            bank.update()
        assert abs(values[0].item() - values[1].item()) < 1e-4
    assert torch.allclose(banks[0].rows.weight, banks[1].rows.weight.cpu(), atol=1e-4)


def test_the_optimiser_may_be_given_all_parameters_and_a_checkpoint_holds_the_bank():
    module = nn.ModuleDict({"encoder": nn.Linear(D, D), "bank": LearnableBank(size=K, dim=D)})
    optimizer = torch.optim.AdamW(module.parameters(), lr=1.0, weight_decay=1.0)
    before = module["bank"].rows.weight.detach().clone()
    q, k = embeddings(7, dtype=torch.float32)
    module["bank"].loss(module["encoder"](q), k).backward()
    optimizer.step()
    assert torch.equal(module["bank"].rows.weight, before)
    module["bank"].update()
    other = LearnableBank(size=K, dim=D, seed=1)
    other.load_state_dict(module["bank"].state_dict())
    assert torch.equal(other.rows.weight, module["bank"].rows.weight) and torch.equal(
        other.rows.velocity, module["bank"].rows.velocity
    )


def test_what_does_not_fit_is_refused_and_all_of_it_at_once(monkeypatch):
    bank, (q, k) = LearnableBank(size=K, dim=D), embeddings(8, dtype=torch.float32)
    with pytest.raises(UserError) as refusal:
        bank.loss(q[:, :4], k, temperature=0.0, positive="view")
    expected = [f"expected shape [B, {D}] for both, as wide as the bank's rows; got [8, 4] and [8, 6]",
    "temperature: expected a number above 0; got 0.0",
                "positive: expected row or key; got 'view'"]  # fmt: skip
    assert [wanted in line for wanted, line in zip(expected, str(refusal.value).splitlines(), strict=True)] == [
        True
    ] * 3
    with pytest.raises(UserError, match=r"extra: expected cosines \[8, E\]; got \[7, 2\]"):
        bank.loss(q, k, extra_BE=torch.zeros(7, 2))
    with pytest.raises(UserError, match="expected float32, got bfloat16"):
        copy.deepcopy(bank).bfloat16().loss(q, k)
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(UserError, match="loss scaling would scale the motion of the rows"),
    ):
        bank.loss(q, k)
    with pytest.raises(UserError, match="queries are not finite unit vectors"):
        bank.loss(q * torch.nan, k)
    monkeypatch.setattr(distributed, "world", lambda: 2)
    with pytest.raises(UserError, match="made before the process group of 2 ranks"):
        bank.loss(q, k)


def a_loop(kind, file):
    """Train some steps on this rank's part of each batch, with DistributedDataParallel if there are several ranks; rank
    0 writes the result.
    """
    distributed.start(torch.device("cpu"), timeout_s=120)
    torch.manual_seed(1)
    bank = (LearnableBank(size=K, dim=D, lr=0.5) if kind == "caco" else FifoBank(size=4 * B, dim=D)).double()
    module = nn.ModuleDict({"encoder": nn.Linear(D, D).double(), "bank": bank})
    module.forward = lambda q, k: bank.loss(module["encoder"](q), k, temperature=0.1)
    wrapped = module
    if distributed.world() > 1:
        wrapped = nn.parallel.DistributedDataParallel(leave_to_ranks(module))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(4):
        q, k = (distributed.own(x, B // distributed.world()) for x in embeddings(step))
        optimizer.zero_grad()
        wrapped(q, k).backward()
        optimizer.step()
        bank.update()
    state = module.state_dict()  # every rank must call this, because it is a collective
    if distributed.is_main():
        torch.save(state, file)
    distributed.stop()


@pytest.mark.parametrize("kind", ["caco", "moco"])
def test_two_ranks_share_the_rows_and_end_as_one_does(tmp_path, kind):
    codes, told = ranks(2, a_loop, kind, tmp_path / "two.pt")
    assert codes == [0, 0], told
    a_loop(kind, tmp_path / "one.pt")
    one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.allclose(value.double(), two[name].double(), atol=1e-12), name


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # warnings of Lightning itself
def test_in_a_lightning_module(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Cooperative(lightning.LightningModule):
        def configure_model(self):
            if not hasattr(self, "bank"):
                self.encoder = nn.Linear(D, D)
                self.twin = MomentumTwin(self.encoder)
                self.bank = LearnableBank(size=K, dim=D, lr=0.5)
                leave_to_ranks(self)

        def training_step(self, batch, _):
            q, k = batch
            self.twin.update(self.encoder, 0.99)
            return self.bank.loss(self.encoder(q), self.twin(k))

        def on_train_batch_end(self, *_):
            self.bank.update()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    batches = [embeddings(step, dtype=torch.float32) for step in range(4)]
    module = Cooperative()
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", precision="bf16-mixed", default_root_dir=tmp_path, **quiet
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    started = LearnableBank(size=K, dim=D, lr=0.5).rows.weight
    assert (module.bank.rows.weight - started).abs().sum() > 0.1 and not module.bank.anchors
    trainer.save_checkpoint(tmp_path / "module.ckpt")
    kept = torch.load(tmp_path / "module.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(kept["bank.rows.weight"], module.bank.rows.weight)
