"""The paper's tables as experiments: what is run, how, and the records of what came out."""
