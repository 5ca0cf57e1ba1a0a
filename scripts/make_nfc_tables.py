"""Writes data/tokenizers/nfc_tables.inc: Unicode's canonical decompositions and combining classes, from Python's own
tables (Unicode 14, as PCRE2's). Hangul syllables are left out: they follow a formula."""
import sys
import unicodedata
from pathlib import Path


def main() -> None:
    decompositions, classes = [], []
    for code in range(sys.maxunicode + 1):
        if 0xD800 <= code <= 0xDFFF:
            continue
        character = chr(code)
        ccc = unicodedata.combining(character)
        if ccc:
            if classes and classes[-1][1] == code - 1 and classes[-1][2] == ccc:
                classes[-1][1] = code
            else:
                classes.append([code, code, ccc])
        parts = unicodedata.decomposition(character)
        if not parts or parts.startswith("<"):
            continue
        first, second = (parts.split() + ["0"])[:2]
        composes = int(second != "0" and unicodedata.normalize("NFC", character) == character)
        decompositions.append(f"{{0x{code:X},0x{first.lstrip('0')},0x{second.lstrip('0') or '0'},{composes}}}")

    def rows(items):
        line = ""
        for item in items:
            if len(line) + len(item) > 108:
                yield line
                line = ""
            line += item + ","
        yield line

    out = [f"// Made by scripts/make_nfc_tables.py from Unicode {unicodedata.unidata_version}; not written by hand.",
           "// {character, first part, second part or 0, whether the parts compose to it again}", "constexpr Decomposition kDecompositions[] = {"]
    out += rows(decompositions)
    out += ["};", "// {first, last, canonical combining class}", "constexpr CombiningRange kCombiningRanges[] = {"]
    out += rows(f"{{0x{a:X},0x{b:X},{c}}}" for a, b, c in classes)
    out += ["};", ""]
    path = Path(__file__).parent.parent / "data/tokenizers/nfc_tables.inc"
    path.write_text("\n".join(out))
    print(f"{path}: {len(decompositions)} decompositions, {len(classes)} ranges")


if __name__ == "__main__":
    main()
