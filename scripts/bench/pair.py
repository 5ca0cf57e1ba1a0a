"""Several programs timed in turn, step by step, so that whatever else the machine does hits all of them alike.

A contender prints READY, then answers each line on stdin with one step of its work and a line of JSON, {"s": seconds, ...}. The first one is
the baseline; a speed-up is the median over rounds of baseline / contender, with quartiles."""
import json, os, shlex, statistics, subprocess, tempfile

# Freed memory stays with the process, as Caldera does for itself: the fair setting for the others.
TUNED_MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592:glibc.malloc.top_pad=268435456"}


def cpu_times():
    """Seconds that all cores were busy, and those of this process's children, alive or not."""
    fields = [int(x) for x in open("/proc/stat").readline().split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def process_seconds(pid):
    try:
        fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    children = open(f"/proc/{pid}/task/{pid}/children").read().split()
    return own + sum(process_seconds(int(child)) for child in children)


class Contender:
    def __init__(self, name, command, env=None, prefix=()):
        self.name, self.steps, self.errors = name, [], tempfile.TemporaryFile("w+")
        command = list(prefix) + (shlex.split(command) if isinstance(command, str) else [str(part) for part in command])
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
                                        bufsize=1, env={**os.environ, **(env or {})})
        line = self.process.stdout.readline()
        if line != "READY\n":
            raise SystemExit(f"{name} did not get ready:\n{self.complaints()}")

    def step(self):
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended:\n{self.complaints()}")
        return json.loads(line)

    def complaints(self):
        self.errors.seek(0)
        return self.errors.read()[-2000:]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def race(contenders, rounds, warm_up=2):
    """Rounds of one step each; every other round in the opposite order. Returns rows of numbers, one a contender."""
    for contender in contenders:
        contender.first = [contender.step() for _ in range(warm_up)]
    busy, own = cpu_times(), sum(process_seconds(c.process.pid) for c in contenders)
    for r in range(rounds):
        for contender in contenders if r % 2 == 0 else contenders[::-1]:
            contender.steps.append(contender.step())
    busy, own = cpu_times() - busy, sum(process_seconds(c.process.pid) for c in contenders) - own
    elapsed = sum(step["s"] for c in contenders for step in c.steps)
    rows = []
    for contender in contenders:
        seconds = [step["s"] for step in contender.steps]
        ratios = sorted(b["s"] / s for b, s in zip(contenders[0].steps, seconds))
        n = len(ratios)
        rows.append({"name": contender.name, "median_s": statistics.median(seconds), "min_s": min(seconds), "ratio": statistics.median(ratios),
                     "q1": ratios[n // 4], "q3": ratios[(3 * n) // 4], "hwm_mib": contender.steps[-1].get("hwm", 0),
                     "first": contender.first, "last": contender.steps[-1], "other_cores": max(0.0, (busy - own) / max(elapsed, 1e-9))})
    for contender in contenders:
        contender.close()
    return rows


def table(title, rows, work=None, unit=""):
    """Markdown. `work`: units of one step, for rates."""
    lines = [f"**{title}**", "", "| | median s |" + (f" {unit} |" if work else "") + " times the first, median [quartiles] | peak MiB |",
             "|---|---|" + ("---|" if work else "") + "---|---|"]
    for row in rows:
        rate = f" {work / row['median_s']:.0f} |" if work else ""
        lines.append(f"| {row['name']} | {row['median_s']:.4f} |{rate} {row['ratio']:.2f} [{row['q1']:.2f}, {row['q3']:.2f}] | {row['hwm_mib']:.0f} |")
    lines.append(f"\nCores busy with other programs meanwhile: {max(row['other_cores'] for row in rows):.2f}.\n")
    return "\n".join(lines)
