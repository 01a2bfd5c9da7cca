"""Augmented views of images: the recipes, in Python with Pillow and compiled, the same to the bit.

Not here: which image is read when (caco/data/loaders)."""
