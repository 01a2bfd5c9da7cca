"""What trains a method: the training loop, the optimiser, saving before a scheduler ends the process, and the assembly
of all parts from a configuration.

Nothing here is specific to one method, bank or evaluator; those are in caco/methods, caco/banks and caco/evals."""
