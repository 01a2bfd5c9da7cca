"""Images as they are stored that are larger than anything that is meant: refused before they are read or unpacked."""

import numpy as np
import pytest

from caco.data.sets.reading import UnreadableImage
from caco.data.sets.stored import read_stored, stored


def test_what_would_unpack_to_more_than_is_meant_is_refused_before_it_is(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    file = tmp_path / "bands.tif"
    tifffile.imwrite(file, np.zeros((4, 4, 3), np.uint8), photometric="rgb")
    content = bytearray(file.read_bytes())
    with pytest.raises(UnreadableImage, match="one of 3 channels where data.channels=2"):
        stored(bytes(content), "here", 2)
    with tifffile.TiffFile(file) as opened:
        sides = [opened.pages[0].tags[name].valueoffset for name in ("ImageWidth", "ImageLength")]
    for at in sides:
        content[at : at + 2] = (13_000).to_bytes(2, "little")
    with pytest.raises(UnreadableImage, match="got (one of|an array of shape .* bytes|.*Error)"):
        stored(bytes(content), "here", 3)
    as_npy = b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (9000, 9000, 9), }"
    with pytest.raises(UnreadableImage, match=r"an array of shape \[9000, 9000, 9\] and type float64, 5,832,000,000"):
        stored(as_npy.ljust(128) + b"\n", "here", 9)
    with open(tmp_path / "large.npy", "wb") as large:
        large.truncate(2**33)  # without taking room
    with pytest.raises(UnreadableImage, match="large.npy: .* a file of 8,589,934,592 bytes, where at most"):
        read_stored(tmp_path / "large.npy", 1)
