"""The local ledger and MLflow."""
