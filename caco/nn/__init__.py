"""Networks: backbones, heads, norms, the momentum twin, and weights from other formats.

Not here: losses, and the decision when a twin moves (caco/methods)."""
