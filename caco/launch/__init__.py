"""Starts runs in other processes, also several at once: sweeps on this machine or in SLURM's queue, and the copy of the
code that their jobs run.

What a run does once it has started is in caco/train.py."""
