#!/usr/bin/env bash
# Several ranks as real processes in all combinations of numbers, strategies and faults; scripts/test.sh has a choice of them. Needs build/caldera;
# torchrun and mpirun are tried where they are. A quarter of an hour on two cores.
#
#   scripts/checks/distributed_full.sh [--only NAME]
set -euo pipefail
cd "$(dirname "$0")/../.."
exec python3 tests/integration/distributed.py build/caldera --full "$@"
