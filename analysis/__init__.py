"""Make tables, figures and HTML pages from records or an MLflow store. Only figures that need a trained model import
torch.
"""

import caco  # noqa: F401 - first: it says in a sentence if the packages that every command needs are missing
