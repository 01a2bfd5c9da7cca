"""Print, as JSON, which instruction set each part of this process uses, found from what it computes; before it come the
lines that oneDNN and MKL print about themselves.
"""

import hashlib
import json
import sys
from unittest.mock import patch

import numpy as np

from caco import instructions  # isort: skip  # before torch
import torch

from caco.banks.kernels import fused
from caco.data.views import native
from caco.data.views.augmentation import View, Views
from caco.runs.environment import environment


def bank_bits() -> str:
    """The bits of sums over a bank; each instruction set of the kernel adds in a different order, so they differ."""
    draw = np.random.default_rng(0)
    q, w = (torch.from_numpy(draw.standard_normal((rows, 50), np.float32)) for rows in (40, 700))
    z, peak, sums = fused.forward(q / 7, w, [0.1], [0.0], with_sums=True, bf16=False)
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in (*z, peak, sums))).hexdigest()


def views_level() -> str:
    """The instruction set that views.cpp reports after a call."""
    library, served = native.library(), []

    class Listening:
        @staticmethod
        def caco_make_views(job):
            library.caco_make_views(job)
            served.append(instructions.LEVELS[job._obj.set])

    views = Views(size=4, views={"one": View()}, mean=[0.5] * 3, std=[0.5] * 3)
    with patch.object(native, "library", lambda: Listening):
        views.batch_pixels([np.zeros((8, 8, 3), np.uint8)], np.zeros(1), 0)
    return served[0]


def main() -> None:
    torch.nn.functional.conv2d(torch.ones(8, 16, 24, 24), torch.ones(16, 16, 3, 3))
    torch.ones(64, 64).mm(torch.ones(64, 64))
    compiled = instructions.compiled(instructions.BANK) and {"bank_bits": bank_bits(), "views_level": views_level()}
    record = {key: value for key, value in environment().items() if key.startswith("instructions")}
    sys.stdout.flush()
    print(
        "\n"
        + json.dumps({"record": record, "compiled": compiled, "capability": torch.backends.cpu.get_cpu_capability()})
    )


if __name__ == "__main__":
    main()
