"""caco: cooperative-adversarial contrastive learning (arXiv 2203.14370)."""
