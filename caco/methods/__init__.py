"""The methods that the Trainer trains, one file each. All fulfil the contract in base.py.

Not here: optimisers, precision, saving and the training loop itself (caco/engine)."""
