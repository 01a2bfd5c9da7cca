#!/usr/bin/env bash
# Sets up .venv with every pinned dependency; installs Debian's packages that are missing, if it may. Called by make setup.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

say() { printf 'setup: %s\n' "$*" >&2; }

# Asks for abilities, not packages: another Python or distribution that has them needs none of Debian's.
missing_packages() {
  if ! command -v "$python" >/dev/null; then
    echo python3 python3-venv python3-dev
  else
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    "$python" -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null ||
      echo python3-dev
  fi
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
missing_test_packages() {
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
  "${root[@]}" apt-get update &&
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$@"
}

missing=$(missing_packages | xargs)
wanted=$(echo "$missing" "$(missing_test_packages)" | xargs)
if [ -n "$wanted" ]; then
  say "missing system packages: $wanted"
  # shellcheck disable=SC2086  # one word a package
  install_packages $wanted || say "they could not be installed from here (needs root or sudo, and apt-get)"
  missing=$(missing_packages | xargs)
fi

extras=all,test
if [ -n "$missing" ]; then
  case " $missing " in
    *" python3 "* | *" python3-venv "*)
      say "error: no virtual environment without them; as root: apt-get install $missing"
      exit 1
      ;;
  esac
  extras=mlflow,slurm,analysis,test
fi

"$python" -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v < (3, 14) and
    f"setup: error: expected Python 3.11 to 3.13, got {sys.version.split()[0]}; choose one with make setup PYTHON=...")'
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv

# Sources (ffcv among them) build against a known setuptools; in .venv itself torch decides which one it wants.
echo 'setuptools==84.2.1' >.venv/build-constraints.txt
.venv/bin/python -m pip install --quiet --upgrade -c constraints.txt pip
.venv/bin/python -m pip install -c constraints.txt --build-constraint .venv/build-constraints.txt -e ".[$extras]"

if [ "$extras" != all,test ]; then
  say "*** INCOMPLETE: no ffcv, for want of system packages. All else works. To complete it, as root:"
  say "***   apt-get install $missing"
  say "*** and then: make -B setup"
fi

missing=$(missing_test_packages | xargs)
if [ -n "$missing" ]; then
  say "*** make test will skip the tests on a real SLURM. To have them, as root:"
  say "***   apt-get install $missing"
fi
