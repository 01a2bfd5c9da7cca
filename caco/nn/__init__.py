"""Backbones, heads and the momentum twin."""
