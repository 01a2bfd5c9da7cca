"""The paper's tables as experiments: which runs a table needs, how each run is trained, and the records of results."""
