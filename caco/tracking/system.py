"""Records the load of the machine while a run trains: a row of system.jsonl every few seconds, apart from the run's
numbers.

The file is never rolled back, because it describes the machine, which does not return to a checkpoint. The file's
modification time also shows that the run is alive, to machines that cannot see its process.
"""

import logging
import threading
from typing import Any

import psutil

_log = logging.getLogger(__name__)


class Sampler(threading.Thread):
    """A thread that records `sample()` every `seconds`, from now until stop(). As a daemon it never delays an exit.

    The names are those of MLflow's own system metrics. With several nodes, only that of the first rank is recorded.

    Args:
        ledger: the Ledger to write to.
    """

    def __init__(self, ledger: Any, seconds: float) -> None:
        super().__init__(name="caco-system", daemon=True)
        self._ledger, self._seconds, self._stopping = ledger, seconds, threading.Event()
        self._network = psutil.net_io_counters()
        self._gpus = _gpus()

    def run(self) -> None:
        psutil.cpu_percent()  # the first call in a thread only sets the start of its measurement
        while not self._stopping.wait(self._seconds):
            try:
                self._ledger.append("system", len(self._ledger), self.sample())
            except Exception as error:  # noqa: BLE001 - drivers and a full disk raise anything; training goes on
                _log.warning("system metrics are no longer recorded: %s: %s", type(error).__name__, error)
                return

    def sample(self) -> dict[str, float]:
        """CPU, memory, disk, network traffic since the last call, and each GPU, in percent, 10^6 bytes or watts."""
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(self._ledger.path.parent))
        network, before = psutil.net_io_counters(), self._network
        self._network = network
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_percentage": memory.percent,
            "system_memory_usage_megabytes": memory.used / 1e6,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / 1e6,
        }
        if network and before:  # both are None on a machine without a network interface
            values["network_receive_megabytes"] = (network.bytes_recv - before.bytes_recv) / 1e6
            values["network_transmit_megabytes"] = (network.bytes_sent - before.bytes_sent) / 1e6
        for number, gpu in enumerate(self._gpus):
            values |= {f"gpu_{number}_{name}": value for name, value in _of_gpu(gpu).items()}
        return values

    def stop(self) -> None:
        self._stopping.set()
        self.join()
        self._ledger.close()


def _gpus() -> list[Any]:
    """NVML handles of the machine's GPUs; [] without GPUs or without nvidia-ml-py."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001 - the package or a driver is missing, or the driver does not answer
        return []
    return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]


def _of_gpu(handle: Any) -> dict[str, float]:
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {
        "utilization_percentage": pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "memory_usage_percentage": 100 * memory.used / memory.total,
        "memory_usage_megabytes": memory.used / 1e6,
        "power_usage_watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    }
