"""Processes for tests, forked from a server process that has imported everything. They start at once, while a new
interpreter takes seconds to import torch.

Only tests about what `python -m caco.train` imports, and when, start a new interpreter.
"""

import functools
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed import TCPStore

HERE = Path(__file__).parent
# All modules that a run imports; each process must import again what is missing here.
IMPORTED = [
    "pytest", "caco.train", "caco.engine.training", "caco.evaluate", "caco.engine.embedding", "caco.nn.backbones",
    "caco.methods.nnclr",
    "caco.methods.swav",
    "caco.methods.dino", "caco.methods.byol", "caco.methods.simsiam", "caco.methods.mocov3", "caco.methods.vicreg",
    "caco.methods.infomin", "caco.methods.cpcv2", "caco.banks.learnable", "caco.banks.fifo", "caco.data.sets.folders",
    "caco.data.loaders.bound", "caco.data.views.augmentation", "caco.evals.finetune", "caco.evals.knn",
    "caco.evals.linear",
    "caco.tracking.ledger", "sklearn.datasets", "timm", "torchvision",
]  # fmt: skip
# A process that hangs is killed after this time, which is long enough for a machine with ten times as much work as
# cores.
PATIENCE_S = 240


@functools.cache
def _server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent)]))
        multiprocessing.forkserver.ensure_running()
    return context


class Process:
    """A process that runs `function(*arguments)`; the function must be importable by name.

    Args:
        environment: the environment variables of the process; it inherits none from this one.
        session: whether the process leads its own process group, as a command in a shell does.
    """

    def __init__(
        self, function: Callable, *arguments, environment: dict[str, str] | None = None, session: bool = False
    ):
        self._folder = tempfile.TemporaryDirectory()
        environment = dict(os.environ) if environment is None else environment
        start = (function, arguments, environment, self._folder.name, session)
        self._process = _server().Process(target=_begin, args=start)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None, "the process was started"
        return self._process.pid

    def running(self) -> bool:
        return self._process.is_alive()

    def end(self) -> tuple[int, str, str]:
        """Wait for its end; returns its exit code (-N if signal N ended it), standard output and standard error."""
        self._process.join(PATIENCE_S)
        hangs = self._process.is_alive()
        if hangs:
            self._process.kill()
            self._process.join()
        output, errors = ((Path(self._folder.name) / name).read_text() for name in ("1", "2"))
        code = self._process.exitcode
        self._process.close()
        self._folder.cleanup()
        if hangs:
            pytest.fail(f"a process has not ended within {PATIENCE_S} s; its standard error:\n{errors}")
        assert code is not None, "the process has ended"
        return code, output, errors


def _begin(function: Callable, arguments: tuple, environment: dict[str, str], folder: str, session: bool) -> None:
    for stream in (1, 2):
        os.dup2(os.open(f"{folder}/{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if session:
        os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    function(*arguments)


def ranks(world: int, function: Callable, *arguments) -> tuple[list[int], list[tuple[str, str]]]:
    """Run `function(*arguments)` in `world` processes that form a group, as torchrun would start them.

    Returns:
        the exit codes and the outputs (standard output, standard error), in the order of the ranks.
    """
    # As in torchrun, this process holds the store, on a port that no other process can take meanwhile.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    started = [
        Process(function, *arguments, environment=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    ends = [process.end() for process in started]
    return [code for code, *_ in ends], [(out, err) for _, out, err in ends]


def caco_train(*overrides: str) -> None:
    """Do what `caco-train` does with this command line."""
    from caco.train import main

    sys.argv = ["caco-train", *overrides]
    main()


def caco_embed(*words: str) -> None:
    from caco.embed import main

    sys.argv = ["caco-embed", *words]
    main()


def caco_evaluate(*overrides: str) -> None:
    from caco.evaluate import main

    sys.argv = ["caco-evaluate", *overrides]
    main()
