"""Methods, one file each: what the Trainer trains, behind the contract of base.py.

Not here: optimisers, precision, saving and the loop itself (caco/engine)."""
