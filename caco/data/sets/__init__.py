"""Sets of images: what a set is, and those that caco reads from disk, downloads or carries.

Not here: what becomes of an image (caco/data/views), and in what order (caco/data/loaders)."""
