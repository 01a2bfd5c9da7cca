"""A run as it lies on disk: its identity, directory, checkpoints, small files that survive a kill, what it ran on,
and by what names earlier versions wrote it.

Not here: what is logged while it runs (caco/tracking), and anything that knows a method or a component."""
