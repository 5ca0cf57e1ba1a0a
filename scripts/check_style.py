#!/usr/bin/env python3
"""Checks what clang-format does not: #pragma once, file length, unfinished business, stray characters. Prints FILE:LINE for
each fault; exit code 1 then. Where clang-format is installed it also says, without failing, which files it would change."""
import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ["base", "model", "data", "train", "eval", "serve", "cli", "scripts", "tests", "checkpoints", "cmake", ".ci"]
CPP = {".h", ".cpp", ".cu", ".cuh"}
CODE = CPP | {".py", ".sh", ".cmake"}
MAX_LINES = 500
# Files that may be longer, and why.
LONG_FILES = {}
UNFINISHED = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b")


def faults_of(path, data):
    """Yields (line number, what is wrong) for one file, its path relative to the root."""
    text = data.decode("utf-8", errors="replace")
    lines = text.splitlines()
    if path.suffix in {".h", ".cuh"} and "#pragma once" not in lines:
        yield 1, "a header needs #pragma once"
    if len(lines) > MAX_LINES and str(path) not in LONG_FILES:
        yield MAX_LINES, f"{len(lines)} lines, {MAX_LINES} at most; split it, or give the reason in {pathlib.Path(__file__).name}"
    if text and not text.endswith("\n"):
        yield len(lines), "the last line does not end"
    for number, line in enumerate(lines, 1):
        if UNFINISHED.search(line):
            yield number, "unfinished: do it, or leave it out"
        if line != line.rstrip():
            yield number, "white space at the end of the line"
        if "\t" in line:
            yield number, "a tab"
        if "\ufffd" in line and path.suffix in CPP:
            yield number, "not UTF-8"


def clang_format_notes(files):
    if not shutil.which("clang-format") or not (ROOT / ".clang-format").exists():
        return
    result = subprocess.run(["clang-format", "--dry-run", *map(str, files)], capture_output=True, text=True, cwd=ROOT)
    changed = sorted({line.split(":")[0] for line in result.stderr.splitlines() if "-Wclang-format-violations" in line})
    if changed:
        print(f"note: clang-format would change {len(changed)} files, as {', '.join(changed[:5])}")


def main():
    files = []
    for folder in FOLDERS:
        for directory, _, names in os.walk(ROOT / folder):
            files += [pathlib.Path(directory, name).relative_to(ROOT) for name in names]
    files = sorted(p for p in files if p.suffix in CODE)
    count = 0
    for path in files:
        for number, what in faults_of(path, (ROOT / path).read_bytes()):
            print(f"{path}:{number}: {what}")
            count += 1
    clang_format_notes([p for p in files if p.suffix in CPP])
    print(f"{len(files)} files, {count} faults")
    return 1 if count or not files else 0


if __name__ == "__main__":
    sys.exit(main())
