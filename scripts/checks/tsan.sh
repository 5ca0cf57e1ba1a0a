#!/usr/bin/env bash
# Data loading, sharding, training and checkpoints under the thread sanitizer; tests/sanitizers/tsan.supp names what is left out, and why. Needs
# what scripts/setup.sh --tests installs; builds in build-tsan/. An hour or so on two cores.
#
#   scripts/checks/tsan.sh [ARGS...]     ctest's, instead of those tests
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_WAIT_POLICY=passive
if [ $# -eq 0 ]; then set -- -R 'data/loader|train/(sharding|trainer|checkpoint)'; fi
cmake --preset tsan
cmake --build --preset tsan
ctest --preset tsan -j "$(nproc)" --timeout 3600 "$@"
