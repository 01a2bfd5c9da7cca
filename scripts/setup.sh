#!/usr/bin/env bash
# Sets up .venv with pinned dependencies, as much of it as the part named needs. Called by make, once a part.
#   scripts/setup.sh demo        PyTorch, caco, matplotlib: what trains, evaluates and draws
#   scripts/setup.sh dashboard   besides: MLflow
#   scripts/setup.sh all         besides: FFCV, submitit, and what the tests need; Debian's packages that are missing, if it may
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
part=${1:?demo, dashboard or all}

say() { printf 'setup: %s\n' "$*" >&2; }

# Asks for abilities, not packages: another Python or distribution that has them needs none of Debian's.
missing_for_python() {
  if ! command -v "$python" >/dev/null; then
    echo python3 python3-venv
  else
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
  fi
}

missing_for_ffcv() {
  "$python" -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null ||
    echo python3-dev
  { command -v g++ && command -v make; } >/dev/null || echo build-essential
  command -v git >/dev/null || echo git
  if ! command -v pkg-config >/dev/null; then
    echo pkg-config libopencv-dev libturbojpeg0-dev
  else
    pkg-config --exists opencv4 || echo libopencv-dev
    pkg-config --exists libturbojpeg || echo libturbojpeg0-dev
  fi
}

# Only for tests: a SLURM that they start on this machine. Found where root's PATH looks, too.
missing_for_tests() {
  local PATH=$PATH:/usr/sbin:/usr/local/sbin
  command -v munged >/dev/null || echo munge
  command -v slurmctld >/dev/null || echo slurmctld
  command -v slurmd >/dev/null || echo slurmd
  { command -v sbatch && command -v srun; } >/dev/null || echo slurm-client
}

install_packages() { # returns non-zero where it may not or cannot
  command -v apt-get >/dev/null || return 1
  local root=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || return 1
    sudo -n true 2>/dev/null || [ -t 0 ] || return 1 # without a terminal nobody can type a password
    root=(sudo)
  fi
  "${root[@]}" apt-get update -qq &&
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends "$@" >/dev/null
}

want() { # the packages that a part misses; installs them if it may
  [ $# -eq 0 ] && return
  say "missing system packages: $*"
  install_packages "$@" || say "they could not be installed from here (needs root or sudo, and apt-get)"
}

# What pip fetches, a line each, in place of its own pages; its warnings and errors go to stderr as they are.
pip_install() {
  .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt \
    --build-constraint .venv/build-constraints.txt "$@" |
    sed -unE 's#^ *Downloading ([^ /]*/)*([^ ]+)( \(.*\))?.*#setup:     \2\3#p; s#^ *Processing (/.*/)([^ ]+\.whl).*#setup:     \2#p' >&2
}

environment() {
  # shellcheck disable=SC2046  # one word a package
  want $(missing_for_python)
  local missing
  missing=$(missing_for_python | xargs)
  if [ -n "$missing" ]; then
    say "error: no virtual environment without them; as root: apt-get install $missing"
    exit 1
  fi
  "$python" -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v < (3, 14) and
    f"setup: error: expected Python 3.11 to 3.13, got {sys.version.split()[0]}; choose one with make setup PYTHON=...")'
  .venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv
  # Sources (ffcv among them) build against a known setuptools; in .venv itself torch decides which one it wants.
  echo 'setuptools==84.2.1' >.venv/build-constraints.txt
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -c constraints.txt pip
}

compiler() {
  command -v g++ >/dev/null ||
    say "no C++ compiler (g++): caco's compiled parts are left out, and training is slower. To have them: apt-get install g++; make -B setup"
}

case $part in
demo)
  say "step 1 of 3: an environment for Python in .venv"
  environment
  compiler
  say "step 2 of 3: PyTorch with its CUDA libraries (some 3 GB of wheels, the longest step)"
  pip_install 'torch>=2.11' 'torchvision>=0.26'
  say "step 3 of 3: caco, compiled here, and the packages that it needs (some 150 MB of wheels, a minute of compiling)"
  pip_install -e '.[analysis]'
  ;;
dashboard)
  say "step 1 of 1: MLflow (some 150 MB of wheels)"
  pip_install 'caco-ssl[mlflow]'
  ;;
all)
  say "step 1 of 2: system packages for FFCV and for the tests on SLURM"
  # shellcheck disable=SC2046
  want $(missing_for_ffcv) $(missing_for_tests)
  missing=$(missing_for_ffcv | xargs)
  extras=all,test
  [ -z "$missing" ] || extras=mlflow,slurm,analysis,test
  say "step 2 of 2: MLflow, submitit, FFCV and what the tests need (some 400 MB of wheels, a minute of compiling)"
  pip_install "caco-ssl[$extras]"
  if [ -n "$missing" ]; then
    say "*** INCOMPLETE: no ffcv, for want of system packages. All else works. To complete it, as root:"
    say "***   apt-get install $missing"
    say "*** and then: make -B setup"
  fi
  missing=$(missing_for_tests | xargs)
  if [ -n "$missing" ]; then
    say "*** make test will skip the tests on a real SLURM. To have them, as root:"
    say "***   apt-get install $missing"
  fi
  ;;
*)
  say "error: expected demo, dashboard or all, got $part"
  exit 2
  ;;
esac
say "done"
