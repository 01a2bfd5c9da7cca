"""Small weight files that would take hours to read are refused at once; files that a training writes are not."""

import io
import pickle
import random
import time
import zipfile

import pytest
import torch

from caco.errors import UserError
from caco.nn.weights import read


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["key", "set", "numbers"])
def test_a_file_whose_keys_would_take_hours_to_hash_is_refused_at_once(tmp_path, kind, zipped):
    """Two such files: nested tuples that contain the same tuple twice, 60 levels deep, have 2**60 paths; and 60,000
    multiples of Python's hash modulus all have the same hash.
    """
    nested = b"X\x01\0\0\0x" + 60 * b"q\x00h\x00\x86"
    numbers = b"".join(pickle.dumps(number * (2**61 - 1), 2)[2:-1] + b"K\x01" for number in range(9, 60_000))
    made = {
        "key": b"}" + nested + b"K\x01s.",
        "set": b"cbuiltins\nset\n]" + nested + b"a\x85R.",
        "numbers": b"}(" + numbers + b"u.",
    }[kind]
    path = tmp_path / "slow.pth"
    torch.save({}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    if zipped:
        with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(path, "w") as other:
            for name in archive.namelist():
                other.writestr(name, b"\x80\x02" + made if name.endswith("data.pkl") else archive.read(name))
    else:
        path.write_bytes(content.replace(b"\x80\x02}q\x00.", b"\x80\x02" + made))
    begun = time.monotonic()
    with pytest.raises(UserError, match="its objects are nested so deeply that reading it would take hours"):
        read(path, "timm")
    assert time.monotonic() - begun < 5


def test_a_pickle_before_a_zip_file_is_not_read(tmp_path):
    torch.save({}, tmp_path / "whole.pth")
    (tmp_path / "two.pth").write_bytes(b"\x80\x02}" + (tmp_path / "whole.pth").read_bytes())
    with pytest.raises(UserError, match="does not begin like a file of torch.save"):
        read(tmp_path / "two.pth", "timm")


def test_what_is_shared_and_large_in_earnest_is_read(tmp_path):
    """10,000 references to one name, long tuples, sets, and a tensor in many places: files that a training writes stay
    far below the limit.
    """
    state = {("group", i): {"params": tuple(range(30)), "kind": "a" * 50, "seen": {1, 2, 2**70}} for i in range(2_000)}
    torch.save(
        {"state_dict": {"conv1.weight": torch.zeros(2)}, "optimizer": state, "rng": random.getstate()},
        tmp_path / "large.pth",
    )
    assert list(read(tmp_path / "large.pth", "timm"))
