#!/usr/bin/env bash
# Sets up .venv with what one purpose needs: setup.sh demo | dashboard | docs | all. Called by make.
# A step that was done is repeated only if one of its input files has changed, or if AGAIN is set (make -B).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
log=build/setup.log

say() { printf 'setup: %s\n' "$*" >&2; }

# These functions print the Debian packages that are missing. They test for the tools themselves and not for packages,
# because another Python or distribution may have the tools without Debian's packages.
missing_python() {
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

# The tests start a SLURM of their own on this machine. Its programs may be in folders that only root's PATH has.
missing_for_tests() {
  local PATH=$PATH:/usr/sbin:/usr/local/sbin
  command -v munged >/dev/null || echo munge
  command -v slurmctld >/dev/null || echo slurmctld
  command -v slurmd >/dev/null || echo slurmd
  { command -v sbatch && command -v srun; } >/dev/null || echo slurm-client
}

install_packages() { # returns non-zero if apt-get or root rights are missing, or if apt-get fails
  command -v apt-get >/dev/null || return 1
  local root=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || return 1
    sudo -n true 2>/dev/null || [ -t 0 ] || return 1 # without a terminal nobody can type a password
    root=(sudo)
  fi
  {
    "${root[@]}" apt-get update &&
      "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$@"
  } >>"$log" 2>&1
}

pip_install() { .venv/bin/python scripts/pip_install.py "$log" "$@"; }

# Each step has two functions: about_STEP prints what the step installs and how large it is, do_STEP does it.

about_system() { echo "Debian packages for FFCV and for the tests on SLURM (up to 155 MB, 690 MB on the disk; as root or with sudo)"; }
do_system() {
  local wanted
  wanted=$(echo "$(missing_for_ffcv)" "$(missing_for_tests)" | xargs)
  [ -n "$wanted" ] || return 0
  say "installing $wanted"
  # shellcheck disable=SC2086  # one word a package
  install_packages $wanted || say "they could not be installed from here (needs root or sudo, and apt-get); see $log"
}

about_python() { echo "a virtual environment, .venv"; }
do_python() {
  local wanted
  wanted=$(missing_python | xargs)
  # shellcheck disable=SC2086
  if [ -n "$wanted" ] && ! install_packages $wanted; then
    say "error: no virtual environment without them; as root: apt-get install $wanted"
    exit 1
  fi
  "$python" -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v < (3, 14) and
    f"setup: error: expected Python 3.11 to 3.13, got {sys.version.split()[0]}; choose one with make setup PYTHON=...")'
  .venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv
}

about_torch() { echo "PyTorch (3.0 GB of wheels, most of them for GPUs; the longest step)"; }
do_torch() { pip_install 3000 torch torchvision; }

about_needs() { echo "timm, Hydra, scikit-learn, matplotlib and what they need (110 MB)"; }
do_needs() { pip_install 110 @ @analysis; }

about_caco() { echo "caco itself, from this folder, with its native parts"; }
do_caco() {
  pip_install 2 --no-deps -e .
  if ! command -v g++ >/dev/null; then
    say "there is no C++ compiler, so the native parts are left out. Results are the same to rounding;"
    say "the demo takes some 10 to 25 % longer, a large bank and image files several times as long."
    say "To have them: apt-get install g++, as root, and the same command again."
  fi
}

about_mlflow() { echo "MLflow, which shows runs in a browser (100 MB; 180 MB without the other steps)"; }
do_mlflow() { pip_install 100 @mlflow hydra-core omegaconf; }

about_docs() { echo "mkdocs-material and mkdocstrings, which make the documentation site (30 MB; 95 MB without the other steps)"; }
do_docs() { pip_install 30 @docs hydra-core omegaconf numpy pillow scipy; }

about_rest() { echo "FFCV, submitit, pycocotools and what the tests and make lint need (210 MB)"; }
do_rest() {
  local missing
  missing=$(echo "$(missing_python)" "$(missing_for_ffcv)" | xargs)
  pip_install 2 --upgrade pip # an older one knows no constraints on what a source is built with
  # FFCV builds from source, against a known setuptools; in .venv itself torch decides which one it wants.
  echo 'setuptools==84.2.1' >.venv/build-constraints.txt
  if [ -z "$missing" ]; then
    pip_install 200 --build-constraint .venv/build-constraints.txt @ffcv @slurm @dense @test
  else
    pip_install 80 @slurm @dense @test
    say "*** INCOMPLETE: no ffcv, for want of system packages. All else works. To complete it, as root:"
    say "***   apt-get install $missing"
    say "*** and then: make -B setup"
  fi
  missing=$(missing_for_tests | xargs)
  if [ -n "$missing" ]; then
    say "*** make test will skip the tests on a real SLURM. To have them, as root:"
    say "***   apt-get install $missing"
  fi
}

# The file that marks a step as done. caco without its native parts has its own mark, so that they are built as soon as
# there is a compiler.
stamp() {
  if [ "$1" = caco ] && ! command -v g++ >/dev/null; then
    echo .venv/.caco-without-native-parts
  else
    echo ".venv/.$1"
  fi
}

is_done() {
  local inputs=(pyproject.toml setup.py constraints.txt scripts caco/*/*/*.cpp caco/*/*/*.h)
  [ -z "${AGAIN:-}" ] && [ -e "$(stamp "$1")" ] && [ -z "$(find "${inputs[@]}" -newer "$(stamp "$1")")" ]
}

case "${1:-}" in
  demo) steps=(python torch needs caco) ;;
  dashboard) steps=(python mlflow) ;; # runs of another machine can be looked at without PyTorch
  docs) steps=(python docs) ;; # pages are made from files and records, without PyTorch
  all) steps=(python system torch needs caco mlflow docs rest) ;;
  *)
    say "error: expected demo, dashboard, docs or all, got '${1:-}'"
    exit 2
    ;;
esac

[ -x .venv/bin/python ] || rm -rf .venv # its Python was removed, so every step must be repeated
left=()
for step in "${steps[@]}"; do
  is_done "$step" || left+=("$step")
done
[ ${#left[@]} -gt 0 ] || exit 0
mkdir -p build
: >"$log"
for number in "${!left[@]}"; do
  step=${left[number]}
  begun=$SECONDS
  printf 'setup %d of %d: %s\n' $((number + 1)) ${#left[@]} "$("about_$step")" >&2
  "do_$step"
  touch "$(stamp "$step")"
  printf '    done in %d:%02d\n' $(((SECONDS - begun) / 60)) $(((SECONDS - begun) % 60)) >&2
done
[ "$1" != all ] || touch .venv/.done
