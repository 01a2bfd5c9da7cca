"""A run on disk: its identity, directory, checkpoints, small files that survive a kill, the machine and code it ran on,
and the names under which earlier versions wrote it.

Logging while a run trains is in caco/tracking. Nothing here knows a method or a component."""
