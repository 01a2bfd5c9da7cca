"""Evaluators of dense tasks, detection and segmentation, and the training loop with which they fine-tune a network.

Not here: evaluators of one feature an image, which are in caco/evals itself."""
