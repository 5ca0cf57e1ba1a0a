#!/usr/bin/env python3
"""Kills a two-stage run with SIGKILL at random moments and lets it go on; its final weights must be bit-equal to those of a
run that nobody disturbed. Usage: kill_resume.py CALDERA [--kills N] [--seed S]"""
import argparse, filecmp, json, os, pathlib, random, shutil, signal, subprocess, sys, tempfile, time

parser = argparse.ArgumentParser()
parser.add_argument("caldera")
parser.add_argument("--kills", type=int, default=5)
parser.add_argument("--seed", type=int, default=int(time.time()))
options = parser.parse_args()
root = pathlib.Path(__file__).resolve().parents[2]
work = pathlib.Path(tempfile.mkdtemp(prefix="caldera_kill_"))
caldera = os.path.abspath(options.caldera)
STEPS = 24  # a stage


def command(output):
    overrides = [f"output={output}"]
    for stage, data in (("pretrain", "pretrain"), ("finetune", "finetune")):
        overrides += [f"stages.{stage}.data.data_path={work}/data/{data}.json", f"stages.{stage}.data.image_folder={work}/data/images",
                      f"stages.{stage}.global_batch_size=8", f"stages.{stage}.max_steps={STEPS}", f"stages.{stage}.save_steps=3",
                      f"stages.{stage}.save_total_limit=2"]
    overrides += [f"stages.pretrain.data.eval_data_path={work}/data/captions_test.json",
                  f"evaluation.data_path={work}/data/test.json", f"evaluation.captions_path={work}/data/captions_test.json",
                  f"evaluation.image_folder={work}/data/images", "evaluation.max_questions=5"]
    return [caldera, "train", "configs/scenes/scenes.yaml", *overrides]


def lines_of(output):
    return sum(len(p.read_text().splitlines()) for p in pathlib.Path(output).glob("*/metrics.jsonl"))


def stable(path):
    """metrics.jsonl without what depends on the clock or on the process."""
    drop = {"tokens_per_second", "step_ms", "data_wait_ms", "peak_memory_bytes"}
    return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in open(path)]


try:
    subprocess.run([caldera, "data", "make-scenes", "--out", work / "data", "--num-train", "200", "--num-test", "8", "--seed", "3"],
                   check=True, cwd=root, stderr=subprocess.DEVNULL)
    subprocess.run(command(work / "straight"), check=True, cwd=root, stderr=subprocess.DEVNULL)

    print(f"seed {options.seed}")
    rng = random.Random(options.seed)
    moments = sorted(rng.uniform(0.02, 0.98) * 2 * STEPS for _ in range(options.kills))
    for moment in moments:
        process = subprocess.Popen(command(work / "killed"), cwd=root, stderr=subprocess.DEVNULL)
        while process.poll() is None and lines_of(work / "killed") < moment:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))  # somewhere within the step, a save among them
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"killed after {lines_of(work / 'killed')} lines of metrics")
    subprocess.run(command(work / "killed"), check=True, cwd=root, stderr=subprocess.DEVNULL)

    for stage in ("pretrain", "finetune"):
        one, two = work / "straight" / stage, work / "killed" / stage
        assert filecmp.cmp(one / "final/model.safetensors", two / "final/model.safetensors", shallow=False), f"{stage}: weights differ"
        assert stable(one / "metrics.jsonl") == stable(two / "metrics.jsonl"), f"{stage}: metrics differ"
        leftovers = list(two.glob("**/*.tmp-*"))
        assert not leftovers, leftovers
    print("final weights of both stages are bit-equal")
finally:
    shutil.rmtree(work, ignore_errors=True)
