"""Toy data sets in the published file layouts of VOC, COCO and PACS, drawn instead of downloaded:
`python -m experiments.toy_sets FOLDER`.

With them, the code that reads and evaluates these sets can be run from end to end on any machine; scale=smoke and the
tests do so. Accuracies on toy sets say nothing about a method. There is one module per kind of set. The same version of
Pillow draws the same images on every machine.
"""
