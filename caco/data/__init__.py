"""Images: sets of them, their augmented views, and the loaders that make batches.

Not here: what is done with a batch (caco/methods, caco/evals)."""
