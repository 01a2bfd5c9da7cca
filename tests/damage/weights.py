"""Malicious and damaged weight files: no code in them is run, none takes seconds or gigabytes to read, and what does
not fit is named.
"""

import io
import pickle
import resource
import time
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from damaging import damaged

from caco.nn.backbones import small_resnet
from caco.nn.formats import FORMATS
from caco.nn.weights import load_backbone

SECONDS, MEGABYTES = 5.0, 400
CALLS = [
    ("os", "system", "touch {}"), ("posix", "system", "touch {}"), ("builtins", "eval", "open('{}', 'w')"),
    ("builtins", "exec", "open('{}', 'w')"),
    ("pathlib", "Path.touch", "{}"), ("os", "mkdir", "{}"), ("subprocess", "getoutput", "touch {}"),
    ("runpy", "run_path", "{}"),
    ("torch", "save", "{}"), ("torch.serialization", "load", "{}"), ("torch.hub", "load", "{}"),
    ("numpy", "load", "{}"), ("shutil", "rmtree", "{}"),
    ("webbrowser", "open", "file://{}"), ("importlib", "import_module", "antigravity"), ("builtins", "getattr", "{}"),
    ("os", "mkfifo", "{}"),
]  # fmt: skip


# A tuple that contains the same tuple twice, nested 50 times; as a key, in a set, and within a key. The pickles are
# written by hand, because Python would not finish building the dict.
NESTED = b"X\x01\0\0\0x" + 50 * b"q\x00h\x00\x86"
SLOW = [
    b"\x80\x02}" + NESTED + b"K\x01s.",
    b"\x80\x02cbuiltins\nset\n]" + NESTED + b"a\x85R.",
    b"\x80\x02]q\x01}(h\x01K\x00" + NESTED + b"K\x02\x86K\x01u.",
    b"\x80\x02}("
    + b"".join(pickle.dumps(number * (2**61 - 1), 2)[2:-1] + b"K\x01" for number in range(9, 60_000))
    + b"u.",  # all have the same hash
]


class Call:
    """An object whose pickle calls any function."""

    def __init__(self, module: str, name: str, argument: str):
        self.call = module, name, argument

    def pickled(self, protocol: int = 2) -> bytes:
        module, name, argument = self.call
        text = argument.encode()
        return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"X" + len(text).to_bytes(4, "little") + text + b"\x85R."


def prepare(folder: Path) -> dict:
    backbone = small_resnet(width=8)
    state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    files = {}
    torch.save(state, out := io.BytesIO())
    files["new.pth"] = out.getvalue()
    torch.save(
        {"state_dict": {f"module.encoder_q.{k}": v for k, v in state.items()}},
        out := io.BytesIO(),
        _use_new_zipfile_serialization=False,
    )
    files["old.pth"] = out.getvalue()
    files["kept.safetensors"] = safetensors.torch.save(state)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("archive/data/0", "w") as part:
            for _ in range(256):
                part.write(bytes(2**20))
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    files["bomb.pth"] = bomb.getvalue()
    return {"folder": folder, "backbone": backbone, "state": state, "files": files}


def odd(state: dict, rng: np.random.Generator) -> object:
    """Contents that torch.save can write but no network has."""
    name = str(rng.choice([name for name, tensor in state.items() if tensor.is_floating_point()]))
    nested: object = "x"
    for _ in range(50):
        nested = [nested, nested]
    choices: list[object] = [
        {**state, name: state[name].to_sparse()},
        {**state, name: state[name].to(torch.complex64)},
        {**state, name: torch.empty(state[name].shape, device="meta")},
        {**state, name: torch.zeros(1).expand(10**12)},
        {**state, name: torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8)},
        {**state, name: torch.full_like(state[name], float("nan"))},
        {**state, name: state[name].to(torch.bool)},
        {**state, name: nested},
        {**state, 5: torch.zeros(2), ("a", "b"): 1},
        {"state_dict": {f"module.encoder_q.{k}": v for k, v in state.items()}, "Memory_Bank": {"W": torch.zeros(3)}},
        {"state_dict": {f"module.encoder_q.{k}": v for k, v in state.items()} | {"queue_ptr": torch.zeros(3, 2),
        "queue": torch.zeros(2, 2, 2)}},
        {"method": {f"encoder.backbone.{k}": v for k, v in state.items()}, "backbone": nested},
        {"method": {f"encoder.backbone.{k}": v for k, v in state.items()}, "backbone": "nowhere"},
        {"a" * 100_000: torch.zeros(1)},
        {k: v[..., None] for k, v in state.items()},
        [state], torch.zeros(3), {}, {"state_dict": {}}, {"model": state, "state_dict": 3}, "text", None, 10**4000,
    ]  # fmt: skip
    return choices[int(rng.integers(0, len(choices)))]


def case(prepared: dict, rng: np.random.Generator) -> str:
    folder, files = prepared["folder"], prepared["files"]
    ran = folder / "ran"
    kind = int(rng.integers(0, 5))
    name = str(rng.choice(list(files)))
    if kind < 2:
        content = damaged(files[name], rng) if name != "bomb.pth" else files[name]
    elif kind == 2:
        number = int(rng.integers(-len(SLOW), len(CALLS)))
        module, function, argument = CALLS[max(0, number)]
        content = SLOW[number] if number < 0 else Call(module, function, argument.format(ran)).pickled()
        name = "call.pth"
        if rng.integers(0, 2):
            with (
                zipfile.ZipFile(io.BytesIO(files["new.pth"])) as archive,
                zipfile.ZipFile(out := io.BytesIO(), "w") as other,
            ):
                for part in archive.namelist():
                    other.writestr(part, content if part.endswith("data.pkl") else archive.read(part))
            content = out.getvalue()
    elif kind == 3:
        torch.save(
            odd(prepared["state"], rng), out := io.BytesIO(), _use_new_zipfile_serialization=bool(rng.integers(0, 2))
        )
        content, name = out.getvalue(), "odd.pth"
    else:
        # Sizes that the file claims but does not have.
        content = files[name].replace((8).to_bytes(1, "little"), (255).to_bytes(1, "little"), int(rng.integers(1, 20)))
        content = (
            content.replace(pickle.dumps(72, 2)[2:-1], pickle.dumps(10**9, 2)[2:-1]) if name != "bomb.pth" else content
        )
    path = folder / name
    path.write_bytes(content)
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    word = "refused"
    try:
        load_backbone(path, str(rng.choice(list(FORMATS))), prepared["backbone"])
        word = "read"
    finally:
        assert not ran.exists(), "something in the file was run"
        assert time.process_time() - begun < SECONDS, f"{time.process_time() - begun:.1f} s"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert grown < MEGABYTES, f"{grown:.0f} MB"
    return word
