"""Sets of images: what a set is, and the sets that caco reads from disk, downloads or brings along.

Not here: what becomes of an image (caco/data/views), and in what order (caco/data/loaders)."""
