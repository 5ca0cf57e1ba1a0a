#!/usr/bin/env bash
# How far the losses and weights of several ranks are from those of one after 100 steps: both stages, full and with adapters, 2 and 4 ranks under
# every strategy. Needs build/caldera. Most of an hour on two cores.
#
#   scripts/checks/curves.sh [ARGS...]     those of tests/integration/curves.py, e.g. --only "LoRA 4 ranks, zero1"
set -euo pipefail
cd "$(dirname "$0")/../.."
exec python3 tests/integration/curves.py build/caldera "$@"
