"""SimCLR, NNCLR and MoCo v2 give the same losses as lightly, an independent library."""

import pytest
import torch
from test_contrastive import TAU, B, D, K, build
from tiny import now
from torch import nn
from torch.nn import functional as F

from caco.banks.fifo import FifoBank
from caco.methods import sources
from caco.methods.nnclr import NNCLR
from caco.nn.heads import Encoder, Projector

ntxent = pytest.importorskip("lightly.loss").NTXentLoss


def test_simclr():
    method, views = build(sources.OtherView(), sources.BatchBothViews(), None, momentum=None, reduction="mean")
    z0, z1 = method.encoder(views[0]), method.encoder(views[1])
    assert torch.allclose(method.loss(views).loss, ntxent(temperature=TAU)(z0, z1), atol=1e-6)


def test_mocov2():
    method, views = build(sources.OtherView(), sources.BankRows(), FifoBank(size=K, dim=D, seed=0), symmetric=False)
    method, views = method.float(), [view.float() for view in views]
    theirs = ntxent(temperature=TAU, memory_bank_size=(K, D))
    theirs.memory_bank.bank.copy_(method.bank.rows.weight)
    q, k = method.encoder(views[0]), method.twin(views[1])
    assert torch.allclose(method.loss(views).loss, theirs(q, k), atol=1e-6)


def test_nnclr_is_the_paper_s_pseudocode():
    torch.manual_seed(0)
    encoder = Encoder(backbone=nn.Flatten(), projector=Projector(in_dim=12, dim=D, layers=1)).double()
    method = NNCLR(
        encoder=encoder, bank=FifoBank(size=K, dim=D, seed=0), predictor_hidden_dim=7, temperature=TAU
    ).double()
    views = [torch.randn(B, 3, 2, 2, dtype=torch.float64) for _ in range(2)]
    ours = method.loss(views).loss
    ours.backward()
    gradient = encoder.projector[0].weight.grad.clone()
    method.zero_grad()

    queue = F.normalize(method.bank.rows.weight.detach(), dim=1)
    projected = [view.flatten(1) @ encoder.projector[0].weight.T for view in views]
    z = [F.normalize(x, dim=1) for x in projected]
    # the predictor takes the projector's output before it is normalised to z
    p = [F.normalize(method.predictor(x), dim=1) for x in projected]

    def direction(a, b):
        neighbour = queue[(z[a].detach() @ queue.T).argmax(1)]
        return F.cross_entropy(neighbour @ p[b].T / TAU, torch.arange(B))

    expected = direction(0, 1) / 2 + direction(1, 0) / 2
    expected.backward()
    assert torch.allclose(ours, expected, atol=1e-12)
    assert torch.allclose(gradient, encoder.projector[0].weight.grad, atol=1e-12)
    method.after_step(now(bank_lr=0.0))
    assert torch.allclose(method.bank.rows.weight[:B], z[0].detach()), "the queue takes the first view's embeddings"
