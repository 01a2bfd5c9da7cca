"""Image sets, augmented views and loaders."""
