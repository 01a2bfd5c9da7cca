"""What a run logs: the ledger, which is always written, and the trackers that are fed from it, such as MLflow.

Not here: comparing runs for a paper (analysis), and what a run saves in order to go on (caco/runs)."""
