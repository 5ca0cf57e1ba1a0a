#!/usr/bin/env bash
# Every test under the address and undefined-behaviour sanitizers. Needs what scripts/setup.sh --tests installs, and 3 GB of memory for each
# core; builds in build-asan/. Two hours or so on two cores.
#
#   scripts/checks/asan_ubsan.sh [ARGS...]     ctest's, e.g. -R model
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_WAIT_POLICY=passive
cmake --preset asan-ubsan
cmake --build --preset asan-ubsan
ctest --preset asan-ubsan -j "$(nproc)" --timeout 3600 "$@"
