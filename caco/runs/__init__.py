"""A run on disk: its identity, directory, checkpoints, small files that survive a kill, the machine and code it ran on,
and the names under which earlier versions wrote it.

Not here: logging while a run trains (caco/tracking), and anything that knows a method or a component."""
