#!/usr/bin/env python3
"""Checks that data flows down the house: a folder includes only from itself and from the folders listed for it here, and
every include of the project's own is root-relative. Prints FILE:LINE for each that does not; exit code 1 then."""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
# What each folder may include from, besides itself. model/ and data/ do not see each other.
MAY_INCLUDE = {
    "base": [],
    "model": ["base"],
    "data": ["base"],
    "train": ["base", "model", "data"],
    "eval": ["base", "model", "data", "train"],
    "serve": ["base", "model", "data", "train", "eval"],
    "cli": ["base", "model", "data", "train", "eval", "serve"],
}
# Headers that cost half a minute in every file that includes them; ATen's own serve.
BANNED = {"torch/torch.h", "torch/extension.h", "torch/script.h"}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
SOURCES = {".h", ".cpp", ".cu", ".cuh"}


def faults_of(path, text):
    """Yields (line number, what is wrong) for one file, its path relative to the root."""
    folder = path.parts[0]
    for number, line in enumerate(text.splitlines(), 1):
        match = INCLUDE.match(line)
        if not match:
            continue
        bracket, name = match.groups()
        if name in BANNED:
            yield number, f"{name} takes too long to compile; include what is used of ATen and torch/csrc"
        if bracket == "<":
            if name.split("/")[0] in MAY_INCLUDE and (ROOT / name).exists():
                yield number, f'the project\'s own headers are included as "{name}"'
            continue
        if not (ROOT / name).is_file():
            yield number, f'"{name}" is no file under the root; includes are root-relative'
        elif folder in MAY_INCLUDE and (target := name.split("/")[0]) != folder and target not in MAY_INCLUDE[folder]:
            allowed = ", ".join([folder, *MAY_INCLUDE[folder]])
            yield number, f'{folder}/ may not include "{name}" (it may from {allowed})'


def main():
    files = [p for folder in [*MAY_INCLUDE, "tests"] for p in sorted((ROOT / folder).rglob("*")) if p.suffix in SOURCES]
    count = 0
    for file in files:
        path = file.relative_to(ROOT)
        for number, what in faults_of(path, file.read_text(encoding="utf-8")):
            print(f"{path}:{number}: {what}")
            count += 1
    print(f"{len(files)} files, {count} faults")
    return 1 if count or not files else 0


if __name__ == "__main__":
    sys.exit(main())
