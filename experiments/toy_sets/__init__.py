"""Toy sets in the published layouts of VOC, COCO and PACS, drawn and not downloaded: `python -m experiments.toy_sets
FOLDER`.

What reads these sets can be tried on them from end to end, on any machine: scale=smoke does, and so do the tests. No
number on them says anything about a method. A file for each kind of set; what is drawn is the same on every machine
with one version of Pillow.
"""
