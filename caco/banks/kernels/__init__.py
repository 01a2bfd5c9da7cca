"""The bank's passes over its rows, fused: C++ for each instruction set of a processor, Triton for GPUs.

Not here: when they are called (caco/banks/scoring.py), which also does without them."""
