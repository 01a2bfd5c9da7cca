"""A real SLURM with one node on this machine's loopback interface, running for the time of the tests."""

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from ports import unused_port

DAEMONS = ("munged", "slurmctld", "slurmd")
CLIENTS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
PATIENCE_S = 300
CPUS = 8  # how many processes SLURM starts at a time, independent of the machine's real number of cores

# A requeue waits for credentials to expire, by default after 120 s. Processes get more than the usual 30 s to end,
# because they need it on a busy machine; a process that ends earlier is not waited for.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={state}/munge/socket,cred_expire=5
SlurmctldPort={controller}
SlurmdPort={daemon}
StateSaveLocation={state}/controller
SlurmdSpoolDir={state}/daemon
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=120
SlurmdTimeout=20
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=short Nodes=localhost Default=YES MaxTime=60 State=UP
PartitionName=long Nodes=localhost State=UP
"""


def binary(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """The folder of a running cluster; SLURM_CONF points SLURM's commands to it."""
    absent = [name for name in (*DAEMONS, *CLIENTS) if binary(name) is None]
    if absent:
        pytest.skip(
            f"SLURM IS NOT TESTED: no {', '.join(absent)} here. Debian has them in munge, slurmctld, slurmd and "
            "slurm-client, which make -B setup installs where it may"
        )
    state = tmp_path_factory.mktemp("slurm")
    for folder in ("munge", "controller", "daemon", "log"):
        (state / folder).mkdir(mode=0o700)
    key = state / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    ports = {"controller": unused_port(), "daemon": unused_port()}
    host = socket.gethostname().partition(".")[0]
    conf = state / "slurm.conf"
    conf.write_text(CONF.format(host=host, user=getpass.getuser(), state=state, cpus=CPUS, **ports))
    munge = [
        f"--{name}={state}/munge/{name.partition('-')[0]}" for name in ("socket", "pid-file", "log-file", "seed-file")
    ]
    environment = os.environ | {"SLURM_CONF": str(conf)}
    with contextlib.ExitStack() as stack:
        # --force, because munged objects to folders that are open to this user alone.
        for name, arguments in {
            "munged": ["--foreground", "--force", f"--key-file={key}", "--num-threads=1", *munge],
            "slurmctld": ["-D", "-c"],
            "slurmd": ["-D", "-N", "localhost"],
        }.items():
            log = stack.enter_context(open(state / "log" / name, "w"))
            daemon = subprocess.Popen([binary(name), *arguments], env=environment, stdout=log, stderr=log)
            stack.callback(end, daemon)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("SLURM_CONF", str(conf))
        until(lambda: "idle" in shown("sinfo", "--noheader", "--format=%T"), lambda: logs(state))
        yield state
        shown("scancel", "--quiet", f"--user={os.getuid()}")
        until(lambda: not shown("squeue", "--noheader"), lambda: shown("squeue"))


def end(daemon: subprocess.Popen) -> None:
    daemon.terminate()
    try:
        daemon.wait(timeout=15)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def shown(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout


def until(holds, explain) -> None:
    """Wait for a condition, long enough for a busy machine; if it does not become true, fail with `explain`'s text."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {PATIENCE_S} s: {explain()}")
        time.sleep(0.1)


def logs(state: Path) -> str:
    return "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in (state / "log").iterdir())
