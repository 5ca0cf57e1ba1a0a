#!/usr/bin/env python3
"""Runs every live parity check (they need transformers, the built binary and the built tests). Usage: run.py CALDERA

gguf_nll.py needs a real model's GGUF file; it runs where CALDERA_GGUF names one."""
import os, pathlib, subprocess, sys, tempfile, time

folder = pathlib.Path(__file__).resolve().parent
caldera = pathlib.Path(sys.argv[1]).resolve()
build = caldera.parent
work = pathlib.Path(tempfile.mkdtemp(prefix="caldera_parity_"))


def python(script, *arguments):
    return [sys.executable, folder / script, *arguments]


# Name, extra environment, the commands in order.
checks = [
    ("tokens", {}, [python("tokens.py", "--build", build)]),
    ("pixels", {}, [python("pixels.py", build)]),
    ("folders", {}, [python("folders.py", caldera)]),
    ("trajectory", {}, [python("trajectory.py", caldera)]),
    ("decoders", {"CALDERA_DECODERS": str(work / "decoders")},
     [python("decoders.py", work / "decoders"), [build / "model_tests", "--gtest_filter=DecoderLive.*"]]),
    ("llavas", {"CALDERA_LLAVAS": str(work / "llavas")},
     [python("llavas.py", work / "llavas"), [build / "model_tests", "--gtest_filter=LlavaLive.*"]]),
    ("gguf_files", {}, [python("gguf_files.py", caldera)]),
    ("exports", {}, [python("exports.py", caldera)]),
    ("taps", {}, [python("taps.py", caldera)]),
    ("hf_folder", {"CALDERA_PARITY_DIR": str(work)},
     [[build / "model_tests", "--gtest_filter=ExportTest.*"], python("hf_folder.py", work, "--batch", work / "batch.safetensors")]),
]
if "CALDERA_GGUF" in os.environ:
    expected = work / "nll.safetensors"
    checks.append(("gguf_nll", {"CALDERA_GGUF_EXPECTED": str(expected)},
                   [python("gguf_nll.py", os.environ["CALDERA_GGUF"], expected),
                    [build / "model_tests", "--gtest_filter=*RealModel"]]))

failed = []
for name, environment, commands in checks:
    print(f"-- {name}", flush=True)
    start = time.time()
    if any(subprocess.run(command, env={**os.environ, **environment}).returncode != 0 for command in commands):
        failed.append(name)
    print(f"   {time.time() - start:.0f} s", flush=True)
print(f"parity: {len(checks) - len(failed)} passed, {len(failed)} failed {' '.join(failed)}".rstrip())
sys.exit(bool(failed))
