"""A run as it lies on disk: its identity, directory, checkpoints, small files that survive a kill, and what it ran on.

Not here: what is logged while it runs (caco/tracking), and anything that knows a method or a component."""
