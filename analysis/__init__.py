"""Make tables, figures and HTML pages from records or an MLflow store. Only figures that need a trained model import
torch.
"""
