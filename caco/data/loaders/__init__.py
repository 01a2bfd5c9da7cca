"""Batches of views: the order of images, random numbers, threads, worker processes, FFCV; and passes over a whole set.

Not here: what an image set or a view is (caco/data/sets, caco/data/views)."""
