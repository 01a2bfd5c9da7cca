"""Fused kernels for the passes over a bank's rows: C++ for each instruction set of a processor, Triton for GPUs.

Not here: the code that calls them (caco/banks: scoring.py, nearest.py, motion.py), which also works without them."""
