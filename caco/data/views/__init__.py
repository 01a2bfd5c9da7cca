"""Augmented views of images: the published recipes in Python with Pillow, and compiled code that gives the same bits.

Not here: which image is read when (caco/data/loaders)."""
