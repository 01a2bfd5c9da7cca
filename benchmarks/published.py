"""A fair rewrite of the published bank, the baseline of bank.py and step.py.

As in the published code, rows are stored unnormalised, normalised at every use, and updated by a hand-written step. It
is float32 PyTorch code that makes an N x K matrix at each stage, works in place where that is natural, and leaves out
the published code's top-5 monitoring.
"""

import torch
from torch.nn import functional as F

TAU, LR, MOMENTUM = 0.08, 0.01, 0.9


class Published:
    def __init__(self, w_KD: torch.Tensor):
        self.w_KD, self.velocity_KD = w_KD.clone(), torch.zeros_like(w_KD)

    def loss(self, q_ND: torch.Tensor, k_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of one direction, and the gradient of the rows, [K, D]."""
        norm_K1 = self.w_KD.norm(dim=1, keepdim=True)
        m_KD = self.w_KD / norm_K1
        cosine_NK = q_ND @ m_KD.T
        with torch.no_grad():
            label_N = (k_ND @ m_KD.T).argmax(1)
        loss = F.cross_entropy(cosine_NK / TAU, label_N)
        with torch.no_grad():
            weight_NK = torch.softmax(cosine_NK / TAU, 1)
            own_N1 = weight_NK.gather(1, label_N[:, None])
            weight_NK.scatter_(1, label_N[:, None], 1 - own_N1)
            toward_KD = weight_NK.T @ q_ND / len(q_ND)
            along_K1 = (weight_NK * cosine_NK).mean(0)[:, None]
            gradient_KD = -(toward_KD - along_K1 * m_KD) / (norm_K1 * TAU)
        return loss, gradient_KD

    @torch.no_grad()
    def update(self, gradient_KD: torch.Tensor) -> None:
        self.velocity_KD.mul_(MOMENTUM).add_(gradient_KD)
        self.w_KD.sub_(self.velocity_KD, alpha=LR)

    def step(self, q_ND: torch.Tensor, k_ND: torch.Tensor) -> None:
        device = q_ND.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss, gradient_KD = self.loss(q_ND, k_ND)
        loss.backward()
        self.update(gradient_KD)
