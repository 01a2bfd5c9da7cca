"""Where Hydra looks for launchers, and takes none from elsewhere."""

from caco.sweep import SubmititLauncher

__all__ = ["SubmititLauncher"]
