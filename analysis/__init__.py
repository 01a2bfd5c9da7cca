"""From records and MLflow stores to tables, figures and a page of both. Imports torch only where a figure needs a
model.
"""
