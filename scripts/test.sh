#!/usr/bin/env bash
# Sets up, then runs every test: ctest, and (first, for its verdict is shorter) the comparison with the Python reference.
#
#   scripts/test.sh            all
#   scripts/test.sh ARGS...    ctest with these arguments, e.g. -R train; no comparison
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/versions.env
scripts/setup.sh --tests
log=build/test.log
: > "$log"
. scripts/progress.sh

# Tests run beside each other: threads that wait must sleep, not spin on a core that another test needs.
export OMP_WAIT_POLICY=passive

parity=0
if [ $# -eq 0 ] && [ -e tests/parity/run.py ]; then
  [ -x .deps/venv/bin/python ] || python3 -m venv .deps/venv
  # PyTorch's Python part is linked to its CUDA libraries, and those to cuBLAS, cuDNN and so on: without a GPU, too, it is
  # imported with all of them or not at all.
  pip_install_once "reference-$(cat scripts/versions.env scripts/requirements-test.txt | cksum | cut -d ' ' -f 1)" \
    "installing the Python reference (scripts/requirements-test.txt, and PyTorch, which Python imports only with its CUDA libraries: \
2.3 GB to download where they are not there yet; \"scripts/test.sh -R .\" does without)" \
    "torch==$TORCH_VERSION" -r scripts/requirements-test.txt
  .deps/venv/bin/python tests/parity/run.py "$PWD/build/caldera" || parity=$?
fi
ctest --test-dir build --output-on-failure -j "$(nproc)" "$@"
if [ "$parity" != 0 ]; then
  echo "test: the comparison with the Python reference failed, see above (tests/parity/run.py)" >&2
  exit "$parity"
fi
