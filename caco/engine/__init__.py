"""What trains a method: the loop, the optimiser, saving in time, and the assembly of all parts from a configuration.

Not here: a word of any one method, bank or evaluator (caco/methods, caco/banks, caco/evals)."""
