#!/usr/bin/env bash
# Everything compiles for 64-bit ARM, and the tests of base, data and model run there, emulated.
#
#   scripts/checks/aarch64.sh              all of it
#   scripts/checks/aarch64.sh sysroot      the downloads alone
#   scripts/checks/aarch64.sh configure    these and CMake's configuration
#
# Needs Debian with g++-aarch64-linux-gnu and qemu-user, beside what scripts/setup.sh installs; 500 MB to download, 5 GB on disk. Debian's
# arm64 packages are unpacked below build-aarch64/, and this machine's own packages stay as they are. On two cores all of it takes
# some twenty minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/versions.env
what=${1:-all}
case "$what" in
  all | sysroot | configure) ;;
  *) sed -n '2,10p' "$0" >&2; exit 2 ;;
esac
build=$PWD/build-aarch64
sysroot=$build/sysroot
mkdir -p "$build"
log=$build/setup.log
: > "$log"
. scripts/progress.sh
packages=(libc6-dev libstdc++-12-dev libopencv-dev libjpeg-dev libpng-dev libyaml-cpp-dev libsentencepiece-dev nlohmann-json3-dev libsimdjson-dev
  libcli11-dev libfmt-dev libpcre2-dev libxxhash-dev libgloo-dev libgtest-dev libgmock-dev)

for program in aarch64-linux-gnu-g++ qemu-aarch64; do
  command -v "$program" > /dev/null || fail "$program is missing: sudo apt-get install g++-aarch64-linux-gnu qemu-user"
done

# --- Debian's packages: an apt of its own, to which nothing is installed, brings them with all that they need.
if [ ! -e "$sysroot/.complete" ]; then
  apt=$build/apt
  rm -rf "$sysroot" "$apt"
  mkdir -p "$sysroot" "$apt"/{state/lists/partial,cache/archives/partial,sources.d}
  : > "$apt/status"
  : > "$apt/sources.list"
  for sources in /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources; do
    if [ -s "$sources" ]; then cp "$sources" "$apt/sources.d/"; fi
  done
  cat > "$apt/apt.conf" << CONF
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Dir::State "$apt/state";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "$apt/sources.d";
Acquire::Languages "none";
CONF
  quietly "the lists of Debian's arm64 packages" env APT_CONFIG="$apt/apt.conf" apt-get update
  watched=$apt/cache quietly "downloading arm64 packages" env APT_CONFIG="$apt/apt.conf" apt-get install -y --download-only "${packages[@]}"
  # /lib is a link to /usr/lib, as where Debian is installed.
  mkdir -p "$sysroot"/usr/{bin,sbin,lib}
  for folder in bin sbin lib; do ln -s "usr/$folder" "$sysroot/$folder"; done
  unpack() {
    local package
    for package in "$apt"/cache/archives/*.deb; do dpkg-deb --fsys-tarfile "$package" | tar -x -C "$sysroot" --keep-directory-symlink; done
  }
  watched=$sysroot quietly "unpacking them" unpack
  # What the maintainers' scripts would have chosen.
  libraries=$sysroot/usr/lib/aarch64-linux-gnu
  for name in blas lapack; do
    if [ ! -e "$libraries/lib$name.so.3" ]; then ln -s "$name/lib$name.so.3" "$libraries/lib$name.so.3"; fi
  done
  touch "$sysroot/.complete"
fi

# --- LibTorch
if [ ! -e "$build/torch/.complete" ]; then
  [ -x .deps/venv/bin/python ] || python3 -m venv .deps/venv
  watched=$build/torch quietly "LibTorch $TORCH_VERSION for arm64 (420 MB)" .deps/venv/bin/python -m pip install --disable-pip-version-check \
    --no-input --progress-bar off --no-deps --only-binary=:all: --platform manylinux_2_28_aarch64 --platform manylinux_2_25_aarch64 \
    --platform manylinux2014_aarch64 --target "$build/torch" --upgrade \
    "torch==$TORCH_VERSION" "nvidia-cuda-cupti==$CUDA_RUNTIME_VERSION" "nvidia-cuda-runtime==$CUDA_RUNTIME_VERSION"
  touch "$build/torch/.complete"
fi
if [ "$what" = sysroot ]; then exit; fi

# --- Build and tests
quietly "configuring" cmake -S . -B "$build/cmake" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_TOOLCHAIN_FILE="$PWD/cmake/aarch64.cmake" \
  -DCALDERA_CUDA=OFF -DCALDERA_MOLD=OFF -DLIBTORCH="$build/torch/torch"
if [ "$what" = configure ]; then exit; fi
echo "aarch64: building"
cmake --build "$build/cmake" -j "$(nproc)"

# Each test program by itself: ctest would stop those that take more than ten minutes where emulated.
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 build sysroot
# (A limit on addresses would hold the emulator, not the program.)
but=CpuAllocator.DoesWithoutAnArenaWhereAddressesAreLimited
export but
emulated() {
  local began=$SECONDS name log
  name=$(basename "$1") log=$build/$(basename "$1").log
  if qemu-aarch64 -L "$sysroot" "$@" > "$log" 2>&1; then
    echo "aarch64: $name passed in $((SECONDS - began)) s"
  else
    echo "aarch64: $name FAILED after $((SECONDS - began)) s, see $log:" >&2
    grep -v '^\[       OK\|^\[ RUN' "$log" | tail -n 30 >&2
    return 1
  fi
}
export -f emulated
emulated "$build/cmake/caldera" --version
cat "$build/caldera.log"
ls "$build"/cmake/{base,data,model}_tests | xargs -P "$(nproc)" -I PROGRAM bash -c 'emulated PROGRAM --gtest_filter=-$but' ||
  fail "some tests failed, see above"
echo "aarch64: all passed"
