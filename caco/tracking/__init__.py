"""What a run logs: the ledger, which is always written, and the trackers that are fed from it, such as MLflow.

Comparing runs for a paper is in analysis; what a run saves in order to go on is in caco/runs."""
