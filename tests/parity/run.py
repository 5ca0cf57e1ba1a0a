#!/usr/bin/env python3
"""Runs every live parity check (they need transformers and the built binary). Usage: run.py CALDERA"""
import pathlib, subprocess, sys, time

folder = pathlib.Path(__file__).resolve().parent
failed = []
scripts = sorted(path for path in folder.glob("*.py") if path.name != "run.py")
for script in scripts:
    print(f"-- {script.name}", flush=True)
    start = time.time()
    if subprocess.run([sys.executable, script, *sys.argv[1:]]).returncode != 0:
        failed.append(script.name)
    print(f"   {time.time() - start:.0f} s", flush=True)
print(f"parity: {len(scripts) - len(failed)} passed, {len(failed)} failed {' '.join(failed)}")
sys.exit(bool(failed))
