#!/usr/bin/env python3
"""A long run neither grows nor leaks. Usage: soak.py CALDERA [--steps 10000] [--ranks 1]

Trains a stage of so many small steps, with checkpoints in the background and evaluations; looks at each rank's resident memory and number of open
files a hundred times. Fails where the memory's slope over the last three quarters exceeds 100 bytes a step, or the files' number grows."""
import argparse, os, pathlib, subprocess, time

from ranks import ROOT, Runs, environment

parser = argparse.ArgumentParser()
parser.add_argument("caldera")
parser.add_argument("--steps", type=int, default=10000)
parser.add_argument("--ranks", type=int, default=1)
options = parser.parse_args()
runs = Runs(options.caldera)


def ranks_of(process):
    """The launcher's children, or the process itself."""
    if options.ranks == 1:
        return [process.pid]
    return [int(pid) for pid in pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def look(pid):
    resident = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return resident, len(os.listdir(f"/proc/{pid}/fd"))


def slope(points):
    n, mx, my = len(points), sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
    return sum((x - mx) * (y - my) for x, y in points) / sum((x - mx) ** 2 for x, _ in points)


try:
    every = options.steps // 100
    command = runs.start(options.ranks) + runs.train(
        "soak", "ddp" if options.ranks == 1 else "zero2", "--stage", "pretrain", f"stages.pretrain.eval_steps={every}", global_batch_size=2,
        max_steps=options.steps, save_steps=every, save_total_limit=2, async_save="true", logging_steps=every)
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = runs.work / "soak/pretrain/metrics.jsonl"
    seen = {}  # rank's pid -> [(step, resident bytes, open files)]
    next_step, step, position = every, 0, 0
    while process.poll() is None:
        time.sleep(0.05)
        if metrics.exists():
            with open(metrics) as file:
                file.seek(position)
                text = file.read()
            whole = text.rfind("\n") + 1
            position += len(text[:whole].encode())
            step += text[:whole].count('"loss"')
        if step < next_step:
            continue
        next_step = step + every
        for pid in ranks_of(process):
            try:
                seen.setdefault(pid, []).append((step, *look(pid)))
            except OSError:
                pass  # it has just ended
    assert process.returncode == 0, process.returncode
    assert step == options.steps, step
    for rank, points in enumerate(seen.values()):
        late = [point for point in points if point[0] > options.steps // 4]
        growth, files = slope([(s, memory) for s, memory, _ in late]), [count for _, _, count in late]
        print(f"rank {rank}: {len(points)} looks over {step} steps: {late[0][1] / 2**20:.1f} MiB at step {late[0][0]}, {late[-1][1] / 2**20:.1f} at "
              f"{late[-1][0]}; slope {growth:.1f} bytes a step; open files {min(files)} to {max(files)}", flush=True)
        assert len(late) > 20 and abs(growth) < 100, growth
        # A file that is just being written may be open too: the fewest in the second half must not be more than in the first.
        assert min(files[len(files) // 2:]) <= min(files[:len(files) // 2]), files
finally:
    runs.remove()
