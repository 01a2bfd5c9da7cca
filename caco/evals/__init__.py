"""Evaluators of a backbone: k-NN, quick probe."""
