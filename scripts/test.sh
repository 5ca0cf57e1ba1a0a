#!/usr/bin/env bash
# Sets up, then runs every test: ctest, and (first, for its verdict is shorter) the comparison with the Python reference.
#
#   scripts/test.sh            all
#   scripts/test.sh ARGS...    ctest with these arguments, e.g. -R train; no comparison
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/versions.env
scripts/setup.sh --tests

# Tests run beside each other: threads that wait must sleep, not spin on a core that another test needs.
export OMP_WAIT_POLICY=passive

parity=0
if [ $# -eq 0 ] && [ -e tests/parity/run.py ]; then
  [ -x .deps/venv/bin/python ] || python3 -m venv .deps/venv
  echo "test: the Python reference (scripts/requirements-test.txt)"
  .deps/venv/bin/python -m pip install --disable-pip-version-check --no-input -q "torch==$TORCH_VERSION" \
    -r scripts/requirements-test.txt
  .deps/venv/bin/python tests/parity/run.py "$PWD/build/caldera" || parity=$?
fi
ctest --test-dir build --output-on-failure -j "$(nproc)" "$@"
if [ "$parity" != 0 ]; then
  echo "test: the comparison with the Python reference failed, see above (tests/parity/run.py)" >&2
  exit "$parity"
fi
