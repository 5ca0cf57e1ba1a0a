#!/usr/bin/env bash
# A hundred runs on three machines (network namespaces) of two ranks each, with a failure drawn at random: cables pulled, ranks and launchers killed or stopped,
# slow ranks, full disks; while joining, in a step, in a save, in a restart. Nothing may hang for longer than three times timeout_s, the message must name the
# culprit, and in the end the bits are those of a run that nothing disturbed. Needs build/caldera, root and iproute2. An hour and a half on two cores.
#
#   scripts/checks/faults.sh [--runs N] [--seed S]     the same seed draws the same failures
set -euo pipefail
cd "$(dirname "$0")/../.."
exec python3 tests/integration/nodes.py build/caldera --faults 100 "$@"
