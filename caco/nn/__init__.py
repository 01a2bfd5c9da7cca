"""Networks: backbones, heads, norms, the momentum twin, and weights from other formats.

Not here: a loss, or when a twin moves (caco/methods)."""
