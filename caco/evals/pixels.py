"""Raw pixels as features: what any encoder has to beat."""

from torch import Tensor, nn
from torch.nn import functional as F


class RawPixels(nn.Module):
    """Images [B, C, H, W] to their pixels [B, C s s], larger ones averaged down to s = 32."""

    def __init__(self, size: int, *, channels: int = 3, largest: int = 32) -> None:
        super().__init__()
        self.side = min(size, largest)
        self.num_features = channels * self.side**2

    def extra_repr(self) -> str:
        return f"side={self.side}"

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, self.side).flatten(1)
