#!/usr/bin/env bash
# Sets the project up and builds it: Debian packages, LibTorch, build/caldera. Run again, it does only what is missing.
#
#   scripts/setup.sh           builds build/caldera
#   scripts/setup.sh --tests   builds the tests too
#
#   LIBTORCH=/path/to/torch    use this LibTorch (a folder with lib/libtorch_cpu.so) instead of installing one into .deps/
#   CALDERA_CUDA=ON|OFF        with CUDA or without; by default (AUTO) with it where there is an NVIDIA GPU
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
. scripts/progress.sh

# The parts of the work are timed apart.
part_began=$SECONDS
times=()
part_is_over() { # NAME
  times+=("$1 $((SECONDS - part_began)) s")
  part_began=$SECONDS
}

# --- Debian packages
packages=(cmake ninja-build g++ pkg-config ccache mold libopencv-dev libjpeg-dev libpng-dev libyaml-cpp-dev libsentencepiece-dev nlohmann-json3-dev
  libsimdjson-dev libcli11-dev libfmt-dev libpcre2-dev libxxhash-dev libgloo-dev libgtest-dev libgmock-dev)
python3 -c 'import venv, ensurepip' 2> /dev/null || packages+=(python3 python3-venv)
# What a test does without, too, saying so.
useful=()
if [ "$target" = all ] && [ "$(uname -m)" = x86_64 ]; then useful=(qemu-user); fi
# missing_of PACKAGES...: those that are not installed.
missing_of() {
  local package
  for package in "$@"; do
    case "$(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2> /dev/null)" in
      ii*) ;;
      *) echo "$package" ;;
    esac
  done
}
if command -v dpkg-query > /dev/null; then
  mapfile -t missing < <(missing_of "${packages[@]}")
  mapfile -t missing_useful < <(missing_of "${useful[@]}")
  as_root=()
  if [ "$(id -u)" = 0 ]; then
    as_root=(env DEBIAN_FRONTEND=noninteractive)
  elif sudo -n true 2> /dev/null; then
    as_root=(sudo -n env DEBIAN_FRONTEND=noninteractive)
  fi
  install=(apt-get install -y --no-install-recommends)
  if [ ${#missing[@]} -gt 0 ]; then
    [ ${#as_root[@]} -gt 0 ] || fail "these packages are missing; install them, then run this again:
  sudo ${install[*]} ${missing[*]} ${missing_useful[*]}"
    quietly "updating the package lists" "${as_root[@]}" apt-get update
    quietly "installing ${#missing[@]} packages: ${missing[*]}" "${as_root[@]}" "${install[@]}" "${missing[@]}"
  fi
  if [ ${#missing_useful[@]} -gt 0 ]; then
    echo "setup: installing ${missing_useful[*]}"
    [ ${#as_root[@]} -gt 0 ] && "${as_root[@]}" "${install[@]}" "${missing_useful[@]}" >> "$log" 2>&1 ||
      echo "setup: that could not be installed; the tests do without"
  fi
else
  echo "setup: no dpkg here; what Debian calls these is needed: ${packages[*]}"
fi
part_is_over packages

# --- LibTorch
has_gpu() { compgen -G '/dev/nvidia[0-9]*' > /dev/null || nvidia-smi -L 2> /dev/null | grep -q '^GPU '; }
has_nvcc() { nvcc --version > /dev/null 2>&1 || "${CUDA_PATH:-/usr/local/cuda}/bin/nvcc" --version > /dev/null 2>&1; }
nvcc_advice="the CUDA toolkit ${CUDA_RUNTIME_VERSION%%.*} (nvcc in PATH or in /usr/local/cuda/bin)"
cuda=${CALDERA_CUDA:-AUTO}
case "$cuda" in
  ON) has_nvcc || fail "CALDERA_CUDA=ON needs $nvcc_advice" ;;
  OFF) ;;
  AUTO)
    cuda=OFF
    if ! has_gpu; then
      echo "setup: no NVIDIA GPU here, so for the CPU only; with CUDA all the same: CALDERA_CUDA=ON scripts/setup.sh"
    elif has_nvcc; then
      cuda=ON
    else
      echo "setup: WARNING: there is an NVIDIA GPU, which will not be used: its kernels need $nvcc_advice." >&2
      echo "setup: Install that and run this again; CALDERA_CUDA=OFF is for the CPU only, without this warning." >&2
    fi
    ;;
  *) fail "CALDERA_CUDA: expected ON, OFF or AUTO, got \"$cuda\"" ;;
esac
if [ -z "${LIBTORCH:-}" ]; then
  .deps/venv/bin/python -m pip --version > /dev/null 2>&1 || quietly "making .deps/venv" python3 -m venv .deps/venv
  if [ "$cuda" = ON ]; then
    pip_install_once "torch-$TORCH_VERSION-cuda" "installing LibTorch $TORCH_VERSION with its CUDA libraries (2.7 GB to download)" \
      "torch==$TORCH_VERSION"
  elif [ ! -e ".deps/venv/.installed-torch-$TORCH_VERSION-cuda" ]; then
    # (Python itself could not import this torch; nobody asks it to.)
    pip_install_once "torch-$TORCH_VERSION-cpu" "installing LibTorch $TORCH_VERSION (540 MB to download)" --no-deps \
      "torch==$TORCH_VERSION" "nvidia-cuda-cupti==$CUDA_RUNTIME_VERSION" "nvidia-cuda-runtime==$CUDA_RUNTIME_VERSION"
  fi
fi
part_is_over LibTorch

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
part_is_over build
echo "setup: build/caldera is ready"
printf -v all '%s, ' "${times[@]}"
echo "setup: ${all%, }"
