"""Writes data/tokenizers/nfc_tables.inc and unicode_classes.inc: Unicode as the `tokenizers` package knows it, which decides what a byte-level
BPE tokenizer's ids are. Its normaliser and its regular expressions are of different ages.

    pip install tokenizers
    python3.11 scripts/make_unicode_tables.py

nfc_tables.inc: canonical decompositions and combining classes from Python's own tables (Unicode 14), less those that the package's normaliser
does not know. Hangul syllables are left out: they follow a formula.
unicode_classes.inc: the letters and numbers that the package's regular expressions know and Python's tables (Unicode 14, as PCRE2 10.42's)
do not.
"""
import sys
import unicodedata
from pathlib import Path

from tokenizers import Regex, normalizers, pre_tokenizers

FOLDER = Path(__file__).parent.parent / "data/tokenizers"
CODES = [code for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]
MARKS = "\u0334\u0345\u05b0\u0323\u0301"  # combining classes 1, 240, 10, 220, 230
NFD = normalizers.NFD()


def agrees(code: int) -> bool:
    """Whether the package decomposes the character, and orders marks around it, as Python does."""
    texts = [chr(code)] + ["a" + mark + chr(code) for mark in MARKS] + ["a" + chr(code) + mark for mark in MARKS]
    return all(NFD.normalize_str(text) == unicodedata.normalize("NFD", text) for text in texts)


def rows(items):
    line = ""
    for item in items:
        if len(line) + len(item) > 108:
            yield line
            line = ""
        line += item
    yield line


def write(name: str, lines: list[str]) -> None:
    heading = f"// Made by scripts/make_unicode_tables.py from Unicode {unicodedata.unidata_version}; not written by hand."
    (FOLDER / name).write_text("\n".join([heading, *lines, ""]))


def write_nfc() -> None:
    decompositions, classes = [], []
    for code in CODES:
        character = chr(code)
        ccc, parts = unicodedata.combining(character), unicodedata.decomposition(character)
        decomposes = bool(parts) and not parts.startswith("<")
        if not (ccc or decomposes) or not agrees(code):
            continue
        if ccc:
            if classes and classes[-1][1] == code - 1 and classes[-1][2] == ccc:
                classes[-1][1] = code
            else:
                classes.append([code, code, ccc])
        if decomposes:
            first, second = (parts.split() + ["0"])[:2]
            composes = int(second != "0" and unicodedata.normalize("NFC", character) == character)
            decompositions.append(f"{{0x{code:X},0x{first.lstrip('0')},0x{second.lstrip('0') or '0'},{composes}}},")
    write("nfc_tables.inc", ["// {character, first part, second part or 0, whether the parts compose to it again}",
                             "constexpr Decomposition kDecompositions[] = {", *rows(decompositions), "};",
                             "// {first, last, canonical combining class}", "constexpr CombiningRange kCombiningRanges[] = {",
                             *rows(f"{{0x{a:X},0x{b:X},{c}}}," for a, b, c in classes), "};"])
    print(f"{len(decompositions)} decompositions, {len(classes)} ranges of combining classes")


def members(pattern: str) -> set[int]:
    split = pre_tokenizers.Split(Regex(pattern), "removed")
    found = set()
    for at in range(0, len(CODES), 4096):
        chunk = CODES[at:at + 4096]
        kept = set("".join(piece for piece, _ in split.pre_tokenize_str("".join(map(chr, chunk)))))
        found |= {code for code in chunk if chr(code) not in kept}
    return found


def write_classes() -> None:
    lines = ["// Ranges as they stand between the brackets of a regular expression."]
    for letter, name in (("L", "kNewLetters"), ("N", "kNewNumbers")):
        theirs, ours = members(rf"\p{{{letter}}}"), {code for code in CODES if unicodedata.category(chr(code))[0] == letter}
        assert ours <= theirs, [hex(code) for code in ours - theirs]
        ranges = []
        for code in sorted(theirs - ours):
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
        lines += [f"constexpr const char* {name} =",
                  *(f'    R"({row})"' for row in rows(rf"\x{{{a:X}}}-\x{{{b:X}}}" for a, b in ranges))]
        lines[-1] += ";"
        print(f"{len(ranges)} ranges of {name}")
    write("unicode_classes.inc", lines)


if __name__ == "__main__":
    write_nfc()
    write_classes()
