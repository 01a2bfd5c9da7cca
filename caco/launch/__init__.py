"""Starts runs in other processes, also several at once: sweeps on this machine or in SLURM's queue, and the copy of the
code that their jobs run.

Not here: what a run does once it has started (caco/train.py)."""
