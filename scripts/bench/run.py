#!/usr/bin/env python3
"""Measures Caldera beside transformers and puts the tables into docs/performance.md, between its two marks.

  scripts/bench/run.py           everything (some 25 minutes on two cores)
  scripts/bench/run.py --short   the main cases, at most ten minutes
  --threads N, --prefix "nice -n -15 taskset -c 1"   where the machine is not free

Needs build/caldera and .deps/venv with scripts/requirements-test.txt (scripts/test.sh sets both up)."""
import argparse, datetime, os, pathlib, platform, subprocess, sys, tempfile, time

import fixtures

HERE = pathlib.Path(__file__).parent
BEGIN, END = "<!-- measured: scripts/bench/run.py -->\n", "<!-- end -->\n"


def cpu_name():
    info = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in open("/proc/cpuinfo") if ":" in line}
    flags = info.get("flags", "").split()
    kinds = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{info.get('model name', platform.machine())}, family {info.get('cpu family')}, {os.cpu_count()} cores ({', '.join(kinds)})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefix", default="")
    parser.add_argument("--out", type=pathlib.Path, default=fixtures.ROOT / "docs/performance.md")
    args = parser.parse_args()
    rounds = args.rounds or (4 if args.short else 9)
    import torch, transformers
    version = subprocess.run(["git", "-C", fixtures.ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    text = [f"{cpu_name()}; torch {torch.__version__}, transformers {transformers.__version__}; commit {version}, "
            f"{datetime.date.today()}; {args.threads} thread{'s' if args.threads > 1 else ''} each"
            + (f", every process under `{args.prefix}`" if args.prefix else "") + f"; {rounds} rounds.\n"]
    with tempfile.TemporaryDirectory() as work:
        for script in ("train.py", "others.py"):
            command = [sys.executable, HERE / script, "--work", work, "--rounds", str(rounds), "--threads", str(args.threads), "--prefix", args.prefix]
            start = time.time()
            process = subprocess.Popen([str(part) for part in command] + (["--short"] if args.short else []), stdout=subprocess.PIPE, text=True)
            for line in process.stdout:
                print(line, end="", flush=True)
                text.append(line)
            if process.wait() != 0:
                raise SystemExit(f"{script} failed")
            print(f"({script}: {time.time() - start:.0f} s)", file=sys.stderr)
    page = args.out.read_text()
    begin, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    args.out.write_text(page[:begin] + "".join(text) + page[end:])


if __name__ == "__main__":
    main()
