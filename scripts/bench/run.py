#!/usr/bin/env python3
"""Measures Caldera beside transformers and puts the tables into docs/performance.md, between its two marks, each as soon as it is there.

  scripts/bench/run.py           everything (some 20 minutes on two cores)
  scripts/bench/run.py --short   the main cases, at most ten minutes
  --threads N, --prefix "nice -n -15 taskset -c 1"   where the machine is not free
  --only TEXT                    parts whose name holds this ("llava 2 float32", "tokenize")

Needs build/caldera and .deps/venv with scripts/requirements-test.txt (scripts/test.sh sets both up)."""
import argparse, datetime, os, pathlib, platform, subprocess, sys, tempfile, time

import fixtures, others, train

BEGIN, END = "<!-- measured: scripts/bench/run.py -->\n", "<!-- end -->\n"


def cpu_name():
    info = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in open("/proc/cpuinfo") if ":" in line}
    flags = info.get("flags", "").split()
    kinds = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{info.get('model name', platform.machine())}, family {info.get('cpu family')}, {os.cpu_count()} cores ({', '.join(kinds)})"


class Page:
    """The part of a Markdown file between the marks."""

    def __init__(self, path):
        self.path, self.parts = path, []

    def add(self, text):
        print(text, flush=True)
        self.parts.append(text)
        self.write("**Cut off**: the run ended before its last table.\n")

    def write(self, warning=""):
        page = self.path.read_text()
        begin = page.index(BEGIN) + len(BEGIN)
        end = page.index(END, begin)
        self.path.write_text(page[:begin] + "\n".join([*self.parts, warning] if warning else self.parts) + page[end:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefix", default="")
    parser.add_argument("--only", default="")
    parser.add_argument("--work", type=pathlib.Path, help="keeps what the programs run on, for a next time")
    parser.add_argument("--out", type=pathlib.Path, default=fixtures.ROOT / "docs/performance.md")
    args = parser.parse_args()
    args.rounds, args.device = args.rounds or (4 if args.short else 7), "cpu"
    import torch, transformers
    version = subprocess.run(["git", "-C", fixtures.ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    page, began, failures = Page(args.out), time.time(), []
    page.add(f"{cpu_name()}; torch {torch.__version__}, transformers {transformers.__version__}; commit {version}, {datetime.date.today()}; "
             f"{args.threads} thread{'s' if args.threads > 1 else ''} each" + (f", every process under `{args.prefix}`" if args.prefix else "")
             + f"; {args.rounds} rounds.\n")
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or pathlib.Path(temporary)
        work.mkdir(exist_ok=True)
        fixtures.make_model(work)
        parts = [(train.name_of(case), lambda case=case: train.run(work, case, args, page.add)) for case in train.cases(args.short)]
        parts += [(part.__name__, lambda part=part: part(work, args, page.add)) for part in others.PARTS]
        for name, run in parts:
            if args.only not in name:
                continue
            print(f"-- {name}, {time.time() - began:.0f} s after the start", file=sys.stderr, flush=True)
            try:
                run()
            except (Exception, SystemExit) as error:  # the other tables are worth having
                failures.append(name)
                page.add(f"**{name}**: failed: {type(error).__name__}: {str(error)[:300]}\n")
    page.write()
    print(f"-- done after {time.time() - began:.0f} s", file=sys.stderr)
    if failures:
        raise SystemExit(f"failed: {', '.join(failures)}")


if __name__ == "__main__":
    main()
