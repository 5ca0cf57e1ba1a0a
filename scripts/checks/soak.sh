#!/usr/bin/env bash
# A long run neither grows nor leaks: 10,000 steps with checkpoints and evaluations by one process, then by two ranks, whose memory and open files
# are looked at a hundred times. Needs build/caldera. Some hours on two cores.
#
#   scripts/checks/soak.sh [ARGS...]     those of tests/integration/soak.py, e.g. --steps 2000
set -euo pipefail
cd "$(dirname "$0")/../.."
for ranks in 1 2; do
  python3 tests/integration/soak.py build/caldera --ranks "$ranks" "$@"
done
