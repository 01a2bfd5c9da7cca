"""Where Hydra looks for launchers, and takes none from elsewhere."""

from caco.launch.sweep import SubmititLauncher

__all__ = ["SubmititLauncher"]
