"""The package in which Hydra looks for launchers; it accepts none from another place."""

from caco.launch.sweep import SubmititLauncher

__all__ = ["SubmititLauncher"]
