#!/usr/bin/env bash
# Sets the project up and builds it: Debian packages, LibTorch, build/caldera. Run again, it does only what is missing.
#
#   scripts/setup.sh           builds build/caldera
#   scripts/setup.sh --tests   builds the tests too
#
#   LIBTORCH=/path/to/torch    use this LibTorch (a folder with lib/libtorch_cpu.so) instead of installing one into .deps/
#   CALDERA_CUDA=ON|OFF        with CUDA or without; by default with it where a CUDA toolkit (nvcc) is found
#   CALDERA_WERROR=ON          warnings are errors
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/versions.env
target=caldera
case "${1:-}" in
  "") ;;
  --tests) target=all ;;
  *) sed -n '2,9p' "$0" >&2; exit 2 ;;
esac
mkdir -p build
log=build/setup.log
: > "$log"

fail() {
  echo "setup: $*" >&2
  exit 1
}

# quietly TITLE COMMAND...: its output goes to the log, whose end is shown if it fails.
quietly() {
  echo "setup: $1"
  shift
  echo "+ $*" >> "$log"
  "$@" >> "$log" 2>&1 || { tail -n 40 "$log" >&2; fail "failed; all of it is in $log"; }
}

# --- Debian packages
packages=(cmake ninja-build g++ pkg-config ccache mold libopencv-dev libjpeg-dev libyaml-cpp-dev libsentencepiece-dev nlohmann-json3-dev
  libsimdjson-dev libcli11-dev libfmt-dev libpcre2-dev libxxhash-dev libgloo-dev libgtest-dev libgmock-dev)
python3 -c 'import venv, ensurepip' 2> /dev/null || packages+=(python3 python3-venv)
if command -v dpkg-query > /dev/null; then
  missing=()
  for package in "${packages[@]}"; do
    case "$(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2> /dev/null)" in
      ii*) ;;
      *) missing+=("$package") ;;
    esac
  done
  if [ ${#missing[@]} -gt 0 ]; then
    install=(apt-get install -y --no-install-recommends "${missing[@]}")
    if [ "$(id -u)" = 0 ]; then
      as_root=(env DEBIAN_FRONTEND=noninteractive)
    elif sudo -n true 2> /dev/null; then
      as_root=(sudo -n env DEBIAN_FRONTEND=noninteractive)
    else
      fail "these packages are missing; install them, then run this again:
  sudo ${install[*]}"
    fi
    quietly "updating the package lists" "${as_root[@]}" apt-get update
    quietly "installing ${#missing[@]} packages: ${missing[*]}" "${as_root[@]}" "${install[@]}"
  fi
else
  echo "setup: no dpkg here; what Debian calls these is needed: ${packages[*]}"
fi

# --- LibTorch
cuda=${CALDERA_CUDA:-AUTO}
if [ "$cuda" = AUTO ]; then
  cuda=OFF
  if command -v nvcc > /dev/null || [ -x "${CUDA_PATH:-/usr/local/cuda}/bin/nvcc" ]; then cuda=ON; fi
fi
if [ -z "${LIBTORCH:-}" ]; then
  python=.deps/venv/bin/python
  "$python" -m pip --version > /dev/null 2>&1 || quietly "making .deps/venv" python3 -m venv .deps/venv
  # install_once NAME TITLE PACKAGES: a mark beside them says that all of them arrived.
  install_once() {
    local mark=.deps/venv/.installed-$1 title=$2
    shift 2
    [ -e "$mark" ] && return
    quietly "$title" "$python" -m pip install --disable-pip-version-check --no-input --progress-bar off "$@"
    touch "$mark"
  }
  if [ "$cuda" = ON ]; then
    install_once "torch-$TORCH_VERSION-cuda" "installing LibTorch $TORCH_VERSION with its CUDA libraries (some 3 GB)" \
      "torch==$TORCH_VERSION"
  elif [ ! -e ".deps/venv/.installed-torch-$TORCH_VERSION-cuda" ]; then
    # (Python itself could not import this torch; nobody asks it to.)
    install_once "torch-$TORCH_VERSION-cpu" "installing LibTorch $TORCH_VERSION (some 600 MB)" --no-deps \
      "torch==$TORCH_VERSION" "nvidia-cuda-cupti==$CUDA_RUNTIME_VERSION" "nvidia-cuda-runtime==$CUDA_RUNTIME_VERSION"
  fi
fi

# --- Build. Two gigabytes a compiler at most.
jobs=$(nproc)
memory_jobs=$(awk '/MemAvailable/ {print int($2 / 2097152)}' /proc/meminfo)
if [ "$memory_jobs" -lt "$jobs" ]; then jobs=$((memory_jobs > 0 ? memory_jobs : 1)); fi
quietly "configuring (CUDA: $cuda)" cmake --preset release -DCALDERA_CUDA="$cuda" ${LIBTORCH:+-DLIBTORCH="$LIBTORCH"} \
  ${CALDERA_WERROR:+-DCALDERA_WERROR="$CALDERA_WERROR"}
echo "setup: building $target with $jobs compilers at once"
echo "+ build $target" >> "$log"
# Of ninja's lines "[12/200] ..." one each tenth is shown.
cmake --build build --target "$target" -j "$jobs" 2>&1 | tee -a "$log" |
  awk -F'[][/]' '/^\[[0-9]+\/[0-9]+\]/ {tenth = int(10 * $2 / $3); if (tenth != last) {last = tenth; printf "setup: %3d %%\n", 10 * tenth; fflush()}}' ||
  { grep -A 25 -m 5 -E 'FAILED|error:' "$log" >&2 || tail -n 40 "$log" >&2; fail "the build failed; all of it is in $log"; }
echo "setup: done, build/caldera is ready"
