"""caco: cooperative-adversarial contrastive learning (arXiv 2203.14370)."""

from caco import instructions

instructions.apply()  # before anything imports torch
