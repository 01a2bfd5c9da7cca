"""Raw pixels as features: a baseline that any encoder should beat."""

from torch import Tensor, nn
from torch.nn import functional as F


class RawPixels(nn.Module):
    """Turns images [B, C, H, W] into their pixels [B, C s s]; larger images are averaged down to s = 32."""

    def __init__(self, size: int, *, channels: int = 3, largest: int = 32) -> None:
        super().__init__()
        self.side = min(size, largest)
        self.num_features = channels * self.side**2

    def extra_repr(self) -> str:
        return f"side={self.side}"

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, self.side).flatten(1)
