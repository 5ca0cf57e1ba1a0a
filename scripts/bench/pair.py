"""Several programs timed in turn, step by step, so that whatever else the machine does hits all of them alike.

A contender prints READY, then answers each line on stdin with one step of its work and a line of JSON, {"s": seconds, ...}. A speed-up is
the median over rounds of (other / contender), with quartiles."""
import json, os, select, shlex, statistics, subprocess, tempfile

# Freed memory stays with the process, as Caldera does for itself: the fair setting for the others.
TUNED_MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592:glibc.malloc.top_pad=268435456"}
# How OpenMP's threads wait: its own default, said aloud, for contenders have the cores to themselves in their turn.
WAITING = {} if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ) else {"GOMP_SPINCOUNT": "300000"}
PATIENCE_S = 420  # for one line of a contender: torch.compile takes minutes


class Failed(Exception):
    pass


def cpu_times():
    """Seconds that all cores were busy."""
    fields = [int(x) for x in open("/proc/stat").readline().split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def process_seconds(pid):
    """Seconds of a process and of its children, alive or not."""
    try:
        fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
        children = open(f"/proc/{pid}/task/{pid}/children").read().split()
    except OSError:
        return 0.0
    own = sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")
    return own + sum(process_seconds(int(child)) for child in children)


class Contender:
    """A program of its own. `failure` says why it is out of the race."""

    def __init__(self, name, command, env=None, prefix=()):
        self.name, self.steps, self.first, self.failure = name, [], [], ""
        self.errors = tempfile.TemporaryFile("w+")
        command = [*prefix, *(str(part) for part in command)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
                                        bufsize=1, env={**os.environ, **WAITING, **(env or {})})

    def line(self):
        if not select.select([self.process.stdout], [], [], PATIENCE_S)[0]:
            raise Failed(f"no answer within {PATIENCE_S} s")
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            complaints = self.errors.read().strip().splitlines()
            raise Failed(complaints[-1][:300] if complaints else f"ended with exit code {self.process.wait()}")
        return line

    def get_ready(self):
        if (line := self.line()) != "READY\n":
            raise Failed(f"said {line!r} for READY")

    def step(self):
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return json.loads(self.line())

    def close(self):
        if self.failure:
            self.process.kill()
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        self.process.wait()


def race(contenders, rounds, warm_up=2):
    """Rounds of one step each; every other round in the opposite order. Returns rows of numbers, one a contender. Another's program that
    fails is out of the race, and its row says why; Caldera's may not."""
    def attempt(contender, work):
        if contender.failure:
            return None
        try:
            return work()
        except (Failed, BrokenPipeError) as error:
            contender.failure = str(error) or "ended"
            if contender.name.startswith("Caldera"):
                raise SystemExit(f"{contender.name}: {contender.failure}")

    try:
        for contender in contenders:
            attempt(contender, contender.get_ready)
            contender.first = [attempt(contender, contender.step) for _ in range(warm_up)]
        busy, own = cpu_times(), sum(process_seconds(c.process.pid) for c in contenders)
        for r in range(rounds):
            for contender in contenders if r % 2 == 0 else contenders[::-1]:
                contender.steps.append(attempt(contender, contender.step))
        busy, own = cpu_times() - busy, sum(process_seconds(c.process.pid) for c in contenders) - own
    finally:
        for contender in contenders:
            contender.close()
    elapsed = sum(step["s"] for c in contenders for step in c.steps if step)
    return [row_of(contender, max(0.0, (busy - own) / max(elapsed, 1e-9))) for contender in contenders]


def row_of(contender, other_cores):
    row = {"name": contender.name, "failure": contender.failure, "other_cores": other_cores}
    if not contender.failure:
        seconds = [step["s"] for step in contender.steps]
        row |= {"seconds": seconds, "median_s": statistics.median(seconds), "hwm_mib": contender.steps[-1].get("hwm", 0),
                "first": contender.first, "last": contender.steps[-1]}
    return row


def speedup(base, row):
    ratios = sorted(b / s for b, s in zip(base["seconds"], row["seconds"]))
    n = len(ratios)
    return f"{statistics.median(ratios):.2f} [{ratios[n // 4]:.2f}, {ratios[(3 * n) // 4]:.2f}]"


def table(title, rows, work=None, unit=""):
    """Markdown. `work`: units of one step, for rates. Speed-ups against each of the other programs."""
    others = [row for row in rows if not row["name"].startswith("Caldera") and not row["failure"]]
    short = [row["name"].removeprefix("transformers ") for row in others]
    columns = ["", "median s"] + ([unit] if work else []) + [f"times {name}" for name in short] + ["peak MiB"]
    lines = [f"**{title}**", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        if row["failure"]:
            lines.append(f"| {row['name']} | not measured: {row['failure'].replace('|', '/')} |" + " |" * (len(columns) - 2))
            continue
        cells = [row["name"], f"{row['median_s']:.4f}"] + ([f"{work / row['median_s']:.0f}"] if work else [])
        cells += [speedup(other, row) if other is not row else "1" for other in others] + [f"{row['hwm_mib']:.0f}" if row["hwm_mib"] else ""]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append(f"\nCores busy with other programs meanwhile: {rows[0]['other_cores']:.2f}.  ")
    return "\n".join(lines)
