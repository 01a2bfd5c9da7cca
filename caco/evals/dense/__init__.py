"""Evaluators of what stands where in an image: detection and segmentation, and the loop in which they fine-tune a
network.

Not here: evaluators of one feature an image, which are in caco/evals itself."""
