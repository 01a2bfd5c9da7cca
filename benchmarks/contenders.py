"""Variants of the published step in which fused functions of PyTorch or of other packages compute the heaviest parts;
bank.py compares the bank with them. The functions of other packages are Triton kernels for GPUs and run only if their
packages are installed; nobody has run them for this comparison yet.

They compute the bank's loss and gradients or, if a function cannot, something of the same cost; their docstrings say
which.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch.nn import functional as F

from benchmarks.published import TAU, Published

CHUNKS = (None, "auto", 128, 512)  # how many queries linear_cross_entropy handles at a time


class LinearCrossEntropy(Published):
    """The step with torch.nn.functional.linear_cross_entropy.

    The rows follow the gradient of the loss. For positive rows this is not CaCo's gradient, which needs the probability
    of each query; the function, when it works in chunks, returns only the mean of the losses.
    """

    chunk: int | str | None = None

    def loss(self, q_ND: torch.Tensor, k_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        norm_K1 = self.w_KD.norm(dim=1, keepdim=True)
        m_KD = (self.w_KD / norm_K1).requires_grad_()
        with torch.no_grad():
            label_N = (k_ND @ m_KD.T).argmax(1)
        loss = self.fused(q_ND / TAU, m_KD, label_N)
        loss.backward()
        gradient_KD, m_KD = m_KD.grad, m_KD.detach()
        along_K1 = torch.linalg.vecdot(gradient_KD, m_KD)[:, None]
        return loss, gradient_KD.sub_(along_K1 * m_KD).div_(norm_K1)

    def fused(self, scaled_ND: torch.Tensor, m_KD: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
        return F.linear_cross_entropy(scaled_ND, m_KD, label_N, options=self.options())

    def options(self) -> "torch.nn.LinearCrossEntropyOptions | None":
        if self.chunk is None:
            return None
        return torch.nn.LinearCrossEntropyOptions(batch_chunk_size=None if self.chunk == "auto" else int(self.chunk))

    def step(self, q_ND: torch.Tensor, k_ND: torch.Tensor) -> None:
        self.update(self.loss(q_ND, k_ND)[1])

    def choose(self, seconds: Callable[[Callable], float], q_ND: torch.Tensor, k_ND: torch.Tensor) -> None:
        """Set `chunk` to the one of CHUNKS with which a step takes the least time."""
        taken = {}
        for self.chunk in CHUNKS:
            taken[self.chunk] = seconds(lambda: self.step(q_ND, k_ND))
        self.chunk = min(taken, key=lambda chunk: taken[chunk])


class Liger(LinearCrossEntropy):
    """The step with LigerFusedLinearCrossEntropyLoss of liger-kernel, which computes the logits of a part of the
    queries at a time.
    """

    def fused(self, scaled_ND: torch.Tensor, m_KD: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss()(m_KD, scaled_ND, label_N)

    def choose(self, seconds: Callable[[Callable], float], q_ND: torch.Tensor, k_ND: torch.Tensor) -> None:
        """Does nothing: the function chooses the size of its parts itself."""


class CutCrossEntropy(Liger):
    """The step with linear_cross_entropy of cut-cross-entropy, in bfloat16.

    The function leaves out gradients that are too small for bfloat16.
    """

    def fused(self, scaled_ND: torch.Tensor, m_KD: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(scaled_ND.bfloat16(), m_KD.bfloat16(), label_N)


class Attention(Published):
    """The step with the flash attention that torch.nn.functional.scaled_dot_product_attention calls on a CPU.

    The queries attend to the rows, which serve as keys and values. The output gives the main part of the gradient of
    the queries, the log-sum-exp gives the loss, and the gradient of the values gives that of the rows. The result is
    the bank's step.
    """

    def step(self, q_ND: torch.Tensor, k_ND: torch.Tensor) -> None:
        N, parts = len(q_ND), torch.get_num_threads()  # as many heads as threads: the backward pass runs heads parallel
        parts = parts if N % parts == 0 else 1
        with torch.no_grad():
            norm_K1 = self.w_KD.norm(dim=1, keepdim=True)
            m_KD = self.w_KD / norm_K1
            label_N = (k_ND @ m_KD.T).argmax(1)
            q = q_ND.view(1, parts, N // parts, -1)
            m = m_KD.expand(1, parts, -1, -1)
            attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            out, log_sum = attend(q, m, m, scale=1 / TAU)
            own_N = torch.linalg.vecdot(q_ND, m_KD[label_N]) / TAU
            loss_N = log_sum.flatten() - own_N
            q_ND.grad = (out.view(N, -1) - m_KD[label_N]) / (N * TAU)
            toward_KD = attend_backward(q / N, q, m, m, out, log_sum, 0.0, False, scale=1 / TAU)[2].sum((0, 1))
            toward_KD.index_add_(0, label_N, (1 - 2 * (-loss_N).exp())[:, None] * q_ND / N)
            along_K1 = torch.linalg.vecdot(toward_KD, m_KD)[:, None]
            self.update(-(toward_KD - along_K1 * m_KD) / (norm_K1 * TAU))


attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class AttentionOnGPU(Published):
    """The same step on a GPU, with the function that takes float32 there (memory-efficient attention)."""

    def step(self, q_ND: torch.Tensor, k_ND: torch.Tensor) -> None:
        N = len(q_ND)
        with torch.no_grad():
            norm_K1 = self.w_KD.norm(dim=1, keepdim=True)
            m_KD = self.w_KD / norm_K1
            label_N = (k_ND @ m_KD.T).argmax(1)
            q, m = q_ND[None, None], m_KD[None, None]
            attend = torch.ops.aten._scaled_dot_product_efficient_attention
            out, log_sum, *state = attend(q, m, m, None, True, scale=1 / TAU)
            loss_N = log_sum.flatten()[:N] - torch.linalg.vecdot(q_ND, m_KD[label_N]) / TAU
            q_ND.grad = (out.view(N, -1) - m_KD[label_N]) / (N * TAU)
            back = torch.ops.aten._scaled_dot_product_efficient_attention_backward
            grads = back(q / N, q, m, m, None, out, log_sum, *state, 0.0, [True, True, True, False], scale=1 / TAU)
            toward_KD = grads[2].sum((0, 1))
            toward_KD.index_add_(0, label_N, (1 - 2 * (-loss_N).exp())[:, None] * q_ND / N)
            along_K1 = torch.linalg.vecdot(toward_KD, m_KD)[:, None]
            self.update(-(toward_KD - along_K1 * m_KD) / (norm_K1 * TAU))


PACKAGES = {"Liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}  # the name under which each is imported


def contenders(device: torch.device) -> dict[str, type[Published]]:
    """The contenders for a device of this kind."""
    if device.type == "cpu":
        return {"linear_cross_entropy": LinearCrossEntropy, "attention": Attention}
    return {
        "linear_cross_entropy": LinearCrossEntropy, "attention": AttentionOnGPU, "Liger": Liger,
        "cut-cross-entropy": CutCrossEntropy,
    }  # fmt: skip


def lacks(name: str, device: torch.device) -> str | None:
    """Why a contender cannot run on this machine, or None if it can."""
    if name == "linear_cross_entropy" and not hasattr(F, name):
        return f"PyTorch {torch.__version__} has no such function"
    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
        return f"{PACKAGES[name]} is not installed"
    if name == "memory-efficient InfoNCE from PyPI":
        if device.type != "cpu":
            return "nobody has tried how memeff is called; cut-cross-entropy and Liger are run instead"
        return (
            "memeff and cut-cross-entropy are Triton kernels, for GPUs; info-nce-pytorch and infonce store the whole"
            " matrix"
        )
    return None
