#!/usr/bin/env bash
# Every test of base, data, model and train on emulated processors: an old one, one with AVX2, and AMD's before AVX-512; scripts/test.sh has those of
# operations but for the slowest. Needs qemu-user, and what scripts/setup.sh --tests builds. Some hours for each processor.
#
#   scripts/checks/qemu_all.sh [PROCESSOR...]     e.g. Haswell
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ $# -eq 0 ]; then set -- Nehalem Haswell EPYC-Milan; fi
command -v qemu-x86_64 > /dev/null || { echo "qemu_all: there is no qemu-x86_64: sudo apt-get install qemu-user" >&2; exit 1; }
exec python3 tests/integration/processors.py build/caldera --all --only "$@"
