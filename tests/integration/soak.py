#!/usr/bin/env python3
"""A long run neither grows nor leaks. Usage: soak.py CALDERA [--steps 10000] [--ranks 1]

Trains a stage of so many small steps, with checkpoints in the background and evaluations; looks at the memory of each process (anonymous pages:
no libraries, which are read in bit by bit) and at its number of open files a hundred times.

With one arena of malloc: where each thread has its own, pages hold on to pieces that another thread handed over, and resident memory creeps up by tens
of bytes a step for tens of thousands of steps, though a heap profile shows that nothing is kept.

Caches fill and the heap settles for some thousand steps (c10d keeps the last 2,000 collectives, oneDNN 128 kernels), each at a moment of its own. A leak
goes on: it raises the memory in every quarter of the run. So what must be zero is the least of the slopes of the last three quarters, to 20 bytes a step. A
file that is just being written is open too, so of the open files it is the fewest in a quarter that must stay what it was."""
import argparse, os, pathlib, subprocess, time

from ranks import ROOT, Runs, environment

parser = argparse.ArgumentParser()
parser.add_argument("caldera")
parser.add_argument("--steps", type=int, default=10000)
parser.add_argument("--ranks", type=int, default=1)
options = parser.parse_args()
runs = Runs(options.caldera)


def processes_of(process):
    """name -> pid: the ranks, and the launcher if there is one."""
    if options.ranks == 1:
        return {"rank 0": process.pid}
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return {"launcher": process.pid} | {f"rank {rank}": int(pid) for rank, pid in enumerate(children)}


def look(pid):
    """Bytes of memory, open files."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024, len(os.listdir(f"/proc/{pid}/fd"))


def slope(points):
    n, mx, my = len(points), sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
    return sum((x - mx) * (y - my) for x, y in points) / sum((x - mx) ** 2 for x, _ in points)


def check(name, looks):
    quarters = [[point for point in looks if i < 4 * point[0] / options.steps <= i + 1] for i in range(4)]
    assert all(len(quarter) > 15 for quarter in quarters), [len(quarter) for quarter in quarters]
    slopes = [slope([(step, memory) for step, memory, _ in quarter]) for quarter in quarters]
    files = [min(count for *_, count in quarter) for quarter in quarters]
    print(f"{name}: {len(looks)} looks over {options.steps} steps; {' -> '.join(f'{quarter[-1][1] / 2**20:.2f}' for quarter in quarters)} MiB at the "
          f"quarters' ends; slopes {', '.join(f'{x:.1f}' for x in slopes)} bytes a step; open files {files}", flush=True)
    assert min(slopes[1:]) < 20, "memory grows in every quarter"
    assert max(files[1:]) <= files[0], "more and more files are open"


try:
    every = options.steps // 100
    command = runs.start(options.ranks) + runs.train(
        "soak", "ddp" if options.ranks == 1 else "zero2", "--stage", "pretrain", f"stages.pretrain.eval_steps={every}", global_batch_size=2,
        max_steps=options.steps, save_steps=every, save_total_limit=2, async_save="true")
    process = subprocess.Popen(command, cwd=ROOT, env=environment() | {"MALLOC_ARENA_MAX": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = runs.work / "soak/pretrain/metrics.jsonl"
    seen = {}  # process -> [(step, bytes, open files)]
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
        try:
            for name, pid in processes_of(process).items():
                seen.setdefault(name, []).append((step, *look(pid)))
        except (OSError, IndexError):
            pass  # it has just ended
    assert process.returncode == 0, process.returncode
    assert len(runs.losses("soak", "pretrain")) == options.steps
    for name, looks in seen.items():
        check(name, looks)
finally:
    runs.remove()
