"""What a run says of itself: the ledger, always written, and MLflow, which is fed from it.

Not here: who reads several runs (analysis), and what is saved to go on from (caco/runs)."""
