#!/usr/bin/env bash
# Every .cpp file compiles by itself, with the headers that it names, though builds join several of a folder (CALDERA_UNITY). Nothing is
# written but CMake's configuration in build-plain/. On two cores some fifteen minutes.
#
#   scripts/check_plain.sh              all files
#   scripts/check_plain.sh TEXT...      those whose path holds one of these, e.g. model/ops/
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build-plain
cmake -S . -B build-plain -G Ninja -DCMAKE_BUILD_TYPE=Release -DCALDERA_UNITY=OFF -DCALDERA_CUDA=OFF \
  ${LIBTORCH:+-DLIBTORCH="$LIBTORCH"} > build-plain/setup.log 2>&1 || { tail -n 40 build-plain/setup.log >&2; exit 1; }
exec python3 - "$@" << 'PYTHON'
import concurrent.futures, json, os, pathlib, shlex, subprocess, sys

root = pathlib.Path.cwd()
entries = {}
for entry in json.load(open("build-plain/compile_commands.json")):
    name = os.path.relpath(entry["file"], root)
    if name.endswith(".cpp") and (len(sys.argv) == 1 or any(text in name for text in sys.argv[1:])):
        entries[name] = entry
if not entries:
    sys.exit("check_plain: no such files")


def compile(name):
    words = shlex.split(entries[name]["command"])
    output = words.index("-o")
    del words[output:output + 2]
    return name, subprocess.run([*words, "-fsyntax-only"], cwd=entries[name]["directory"], capture_output=True, text=True)


if len(sys.argv) == 1:
    files = subprocess.run(["git", "ls-files", "*.cpp"], capture_output=True, text=True).stdout.split()
    for name in sorted(set(files) - entries.keys()):
        print(f"check_plain: not part of a build without CUDA, so not looked at: {name}")
failed = []
with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for count, (name, process) in enumerate(pool.map(compile, sorted(entries)), 1):
        if process.returncode != 0:
            failed.append(name)
            print(f"{name}: does not compile by itself\n{process.stderr[:3000]}", flush=True)
        if count % 20 == 0:
            print(f"check_plain: {count} of {len(entries)} files", flush=True)
print(f"check_plain: {len(entries)} files, {len(failed)} do not compile by themselves{''.join(f'{chr(10)}  {name}' for name in failed)}")
sys.exit(1 if failed else 0)
PYTHON
