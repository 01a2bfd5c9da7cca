"""What trains a method: the training loop, the optimiser, saving before a scheduler ends the process, and the assembly
of all parts from a configuration.

Not here: anything that is specific to one method, bank or evaluator (caco/methods, caco/banks, caco/evals)."""
