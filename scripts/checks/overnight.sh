#!/usr/bin/env bash
# One long run on two machines (network namespaces) of two ranks each, with a failure every few minutes, drawn at random; launchers that end are started again with
# the same command. Its final weights must be those of a run that nothing disturbed. Needs build/caldera, root and iproute2. Two hours, and some for the other run.
#
#   scripts/checks/overnight.sh [--minutes M] [--seed S]
set -euo pipefail
cd "$(dirname "$0")/../.."
exec python3 tests/integration/nodes.py build/caldera --overnight 120 "$@"
