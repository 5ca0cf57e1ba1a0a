#!/usr/bin/env python3
"""Makes tests/golden/safetensors_cases.json: 34 files, whole and malformed, and what the Python package safetensors says of each.

    pip install safetensors
    scripts/make_goldens_safetensors.py

A file is a list of [bytes in hexadecimal, how many times]. "accepted": by the package; "ours": whether Caldera accepts it too.
"""
import json
import pathlib

import safetensors

PATH = pathlib.Path(__file__).resolve().parent.parent / "tests/golden/safetensors_cases.json"


def with_length(length, *parts):
    pieces = [[length.to_bytes(8, "little").hex(), 1]]
    for part in parts:
        data, count = part if isinstance(part, tuple) else (part, 1)
        pieces.append([(data.encode() if isinstance(data, str) else data).hex(), count])
    return pieces


def file(header, body=0):
    header = header.encode() if isinstance(header, str) else header
    return with_length(len(header), header, (b"\0", body))


def tensor(name="a", dtype="F32", shape="[2]", offsets="[0,8]", more=""):
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}{more}}}'


VALID = "{" + tensor() + "}"


def two(first, second):
    return "{" + tensor("a", "U8", "[4]", first) + "," + tensor("b", "U8", "[4]", second) + "}"


def one(**fields):
    return "{" + tensor(**fields) + "}"


DEEP = 100_000
CASES = {
    "empty file": [],
    "7 bytes": [["00", 7]],
    "header longer than the file": with_length(1000, VALID),
    "header of 2^63 bytes": with_length(1 << 63, VALID),
    "header of more than 100 MB": with_length(100_000_001, VALID),
    "header that is not UTF-8": file(b'{"\xff\xfe":1}'),
    "header that is not JSON": file("{a:1}"),
    "garbage behind the header's JSON": file(VALID + "x", 8),
    "an array at the top": file("[]"),
    "100,000 levels": with_length(2 * DEEP + 6, '{"a":', ("[", DEEP), ("]", DEEP), "}"),
    "body too short": file(VALID, 7),
    "body too long": file(VALID, 9),
    "gap": file(two("[0,4]", "[5,9]"), 9),
    "overlap": file(two("[0,4]", "[3,7]"), 7),
    "reversed offsets": file(one(dtype="U8", shape="[4]", offsets="[4,0]"), 4),
    "negative offset": file(one(dtype="U8", shape="[4]", offsets="[-4,0]"), 4),
    "size that differs from its shape's": file(one(shape="[3]"), 8),
    "product that overflows": file(one(dtype="U8", shape="[4294967296,4294967296]", offsets="[0,0]")),
    "shape of floats": file(one(shape="[2.0]"), 8),
    "unknown dtype": file(one(dtype="F33"), 8),
    "missing key": file('{"a":{"dtype":"F32","shape":[2]}}', 8),
    "metadata of a number": file('{"__metadata__":{"k":1}}'),
    "nested metadata": file('{"__metadata__":{"k":{"l":"m"}}}'),
    "valid": file(VALID, 8),
    "padded header": file(VALID + " " * 6, 8),
    "empty tensor": file(one(shape="[0,3]", offsets="[0,0]")),
    "scalar": file(one(dtype="F64", shape="[]"), 8),
    "BOOL": file(one(dtype="BOOL", shape="[3]", offsets="[0,3]"), 3),
    "F8_E4M3": file(one(dtype="F8_E4M3", shape="[2]", offsets="[0,2]"), 2),
    "a field more": file(one(dtype="U8", shape="[1]", offsets="[0,1]", more=',"more":[{"x":1}]'), 1),
    "a name that looks like a path": file(one(name="../a", dtype="U8", shape="[1]", offsets="[0,1]"), 1),
    "leading spaces": file("  " + VALID, 8),
    "a name twice": file("{" + tensor() + "," + tensor() + "}", 8),
    "NUL in a name": file(one(name="a\\u0000b"), 8),
}
# Against the format's own specification, or a trap for programs in C.
STRICTER = {"leading spaces", "a name twice", "NUL in a name"}


def accepted(pieces) -> bool:
    try:
        safetensors.deserialize(b"".join(bytes.fromhex(data) * count for data, count in pieces))
        return True
    except safetensors.SafetensorError:
        return False


def main() -> None:
    rows = [{"name": name, "pieces": pieces, "accepted": accepted(pieces), "ours": accepted(pieces) and name not in STRICTER}
            for name, pieces in CASES.items()]
    PATH.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(f"{PATH.name}: {len(rows)} cases, {sum(row['accepted'] for row in rows)} accepted by safetensors {safetensors.__version__}, "
          f"{sum(row['ours'] for row in rows)} by Caldera")


if __name__ == "__main__":
    main()
