"""Runs on several machines, each a network namespace with a host name of its own (see machines, beside this file)."""
import os, re, shutil, subprocess, time

from ranks import ROOT, Process, wait_until

MACHINES = ROOT / "tests/integration/machines"
TAG = f"c{os.getpid()}"
RENDEZVOUS = "10.77.0.10:29500"
TIMEOUT_S = 6
LIMIT_S = 3 * TIMEOUT_S + 12  # what starts and ends of processes may take on a busy machine; the tables print what it took


def machines(*words):
    subprocess.run(machine_words(*words), check=True, capture_output=True, text=True)


def machine_words(*words):
    return [str(MACHINES), TAG, *map(str, words)]


class Job:
    """One run: a launcher on each machine, of two ranks each. `runs` is set by the program."""
    runs = None

    def __init__(self, name, *more, count=2, begin=True, strategy="zero2", options=(), rendezvous=RENDEZVOUS, fault="", only={}, variables={},
                 programs={}, timeout_s=TIMEOUT_S, **settings):
        """`only`: by machine, settings of its recipe alone; `variables`: of its environment; `programs`: words that start the program there."""
        self.name, self.count, self.options, self.rendezvous, self.fault = name, count, options, rendezvous, fault
        self.only, self.variables, self.programs = only, variables, programs
        self.train = Job.runs.train(name, strategy, *more, timeout_s=timeout_s, **settings)
        self.launchers, self.all = {}, []  # by machine, those of now; and all that ever were
        if begin:
            for k in range(count):
                self.start(k)

    def start(self, k, node_rank=None):
        command = machine_words("on", k, *self.programs.get(k, (Job.runs.caldera,)), "launch", "-n", 2, "--nodes", self.count, "--node-rank", k if node_rank is None else node_rank,
                                "--rendezvous", self.rendezvous, *self.options, "--", *self.train, *self.only.get(k, ()))
        self.launchers[k] = Process(command, self.fault, **{"CALDERA_RUN_SECRET": "of the tests"} | self.variables.get(k, {}))
        self.all.append(self.launchers[k])
        return self.launchers[k]

    def ranks(self):
        return {rank: pid for launcher in self.launchers.values() for rank, pid in launcher.ranks().items()}

    def text(self):
        return "\n".join(launcher.text for launcher in self.all)

    def codes(self):
        return {k: launcher.code() for k, launcher in self.launchers.items()}

    def wait_until(self, condition, what, limit=60):
        wait_until(lambda: condition() or any(code is not None for code in self.codes().values()), what, limit)
        assert condition(), f"codes {self.codes()} before {what}:\n{self.text()[-4000:]}"

    def wait_steps(self, steps, stage="pretrain", limit=60):
        self.wait_until(lambda: Job.runs.steps(self.name, stage) >= steps, f"step {steps} of {stage}", limit)

    def end(self, expect=0, limit=120):
        """Until all have ended, each with one of these codes; what each machine's launcher wrote."""
        until = time.monotonic() + limit
        texts = {k: launcher.end(expect, max(0, until - time.monotonic())) for k, launcher in self.launchers.items()}
        left = [pid for launcher in self.all for pid in launcher.ranks().values()]
        assert not left, f"ranks {left} are left"
        return texts


def straight(count=2):
    """A run that nothing disturbs, made once."""
    name = f"straight_{count}"
    if not (Job.runs.work / name).exists():
        Job(name, count=count).end()
    return name


def finish(name, count=2):
    """The same command again, with nothing in its way; the bits of a run that was never disturbed."""
    Job(name, count=count).end()
    Job.runs.same_bits(straight(count), name, is_same_saves=False)


def last_error(text):
    assert "error: " in text, text[-3000:]
    return text[text.rindex("error: "):]


def runs_since(job):
    """Seconds since the last launcher of the job was started."""
    return time.monotonic() - job.all[-1].began


def can_make_machines():
    """Makes three, where that can be done; those of a test that was killed are taken away first."""
    if os.getuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    try:
        for name in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.splitlines():
            left = re.match(r"c(\d+)-switch", name)
            if left and not os.path.exists(f"/proc/{left[1]}"):
                subprocess.run([MACHINES, f"c{left[1]}", "down"], check=True)
        machines("up", "3")
        return True
    except subprocess.CalledProcessError as error:
        print(error.stderr)
        return False
