"""Evaluators that fine-tune a network on tasks of places in an image: detection and segmentation.

Not here: evaluators of one feature an image, which are in caco/evals itself."""
