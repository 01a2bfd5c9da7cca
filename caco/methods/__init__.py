"""Contrastive objectives as positives x negatives x bank."""
