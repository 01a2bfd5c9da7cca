"""Variants of the published step in which fused functions of PyTorch compute the heaviest parts; bank.py compares the
bank with them.

They compute the bank's loss and gradients or, if a function cannot, something of the same cost; their docstrings say
which.
"""

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
        loss = F.linear_cross_entropy(q_ND / TAU, m_KD, label_N, options=self.options())
        loss.backward()
        gradient_KD, m_KD = m_KD.grad, m_KD.detach()
        along_K1 = torch.linalg.vecdot(gradient_KD, m_KD)[:, None]
        return loss, gradient_KD.sub_(along_K1 * m_KD).div_(norm_K1)

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

CONTENDERS: dict[str, type[Published]] = {"linear_cross_entropy": LinearCrossEntropy, "attention": Attention}


def lacks(name: str, device: torch.device) -> str | None:
    """Why a contender cannot run on this machine, or None if it can."""
    if device.type != "cpu":
        return "compared with the bank on CPUs only"
    if name == "linear_cross_entropy" and not hasattr(F, name):
        return f"PyTorch {torch.__version__} has no such function"
    if name == "memory-efficient InfoNCE from PyPI":
        return (
            "memeff and cut-cross-entropy are Triton kernels, for GPUs; info-nce-pytorch and infonce store the whole"
            " matrix"
        )
    return None
