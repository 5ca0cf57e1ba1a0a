"""Failures drawn at random, of runs on several machines: many short runs with one each, or a long run with many. See nodes.py."""
import random, re, shutil, signal, subprocess, time

from job import LIMIT_S, TIMEOUT_S, Job, finish, machines, straight
from ranks import send

KINDS = ("cut", "short cut", "kill rank", "stop rank", "stop machine", "kill launcher", "stop launcher", "slow", "disk")
MOMENTS = ("joining", "step", "save", "restart")
NODE_TIMEOUT_S = 15  # less than LIMIT_S: nothing is waited for longer


class Failure:
    """One of them, on a machine or one of its two ranks."""
    def __init__(self, rng, count, moments=MOMENTS, kinds=KINDS):
        self.kind, self.moment, self.rank, self.step = rng.choice(kinds), rng.choice(moments), rng.randrange(2 * count), rng.randint(1, 9)
        self.machine = self.rank // 2
        # What a process does to itself is put at a counted point; all else is done to it when the moment comes.
        kind = {"kill rank": "sigkill", "stop rank": "sigstop", "slow": "slow", "disk": "enospc"}.get(self.kind)
        self.is_counted = self.kind in ("slow", "disk") or kind is not None and self.moment in ("step", "save")
        point = "save" if self.kind == "disk" or self.moment == "save" else "step"
        faults = [f"{kind}@{point}:{self.step},rank={self.rank}"] if self.is_counted else []
        if self.moment == "restart":  # which comes from another rank's death
            faults = ["sigkill@step:3,rank=1"] + [fault + ",attempt=1" for fault in faults]
        # Half a second a step, so that no moment passes unseen.
        self.faults = ";".join(faults + [f"slow@step:1,rank=0,attempt={attempt}" for attempt in (0, 1)])

    def __str__(self):
        whom = f"of rank {self.rank}" if self.kind in ("kill rank", "stop rank", "slow", "disk") else f"of machine {self.machine}"
        return f"{self.kind} {whom}, {self.moment}{f' {self.step}' if self.moment == 'step' else ''}"

    def has_come(self, job):
        """Whether its moment has."""
        launcher = job.launchers[self.machine]
        if self.moment == "joining":
            return len(launcher.ranks()) == 2
        if self.moment == "restart":
            return "starting again" in launcher.text and len(launcher.ranks()) == 2
        if self.moment == "save":
            return any((Job.runs.work / job.name).glob("*/latest"))
        return sum(Job.runs.steps(job.name, stage) for stage in ("pretrain", "finetune")) >= self.step

    def strike(self, job):
        launcher = job.launchers[self.machine]
        ranks = launcher.ranks()
        hit = [ranks[self.rank]] if self.rank in ranks else []
        if self.kind.endswith("cut"):
            machines("cut", self.machine)
        elif self.kind == "kill launcher":
            launcher.kill()
            job.start(self.machine)
        elif not self.is_counted:
            number = signal.SIGKILL if self.kind == "kill rank" else signal.SIGSTOP
            send(number, *{"stop machine": list(ranks.values()), "stop launcher": [launcher.pid]}.get(self.kind, hit))

    def is_short(self, job, seconds):
        """Whether it is over by now, although the run is not: two seconds of a short cut, a launcher stopped until its ranks have ended."""
        if self.kind == "stop launcher":
            return not job.launchers[self.machine].ranks()
        return self.kind == "short cut" and seconds > 2

    def heal(self, job):
        """What a person would do once all is quiet."""
        if self.kind.endswith("cut"):
            machines("heal", self.machine)
        if self.kind == "stop launcher":
            send(signal.SIGCONT, *[launcher.pid for launcher in job.all if launcher.code() is None])

    def names_culprit(self, text):
        def named(*ranks):  # "rank 3", "ranks 1, 3"
            return rf"ranks? ([0-9]+, )*({'|'.join(map(str, ranks))})\b"
        return re.search({"kill rank": named(self.rank), "stop rank": named(self.rank), "disk": "No space left on device"}.get(
            self.kind, rf"node{self.machine}|machine {self.machine}|run's store|{named(2 * self.machine, 2 * self.machine + 1)}"), text)


def last_change(folder):
    """When anything below it was last written: a slow save goes on although no step does."""
    times = []
    for path in folder.rglob("*"):
        try:
            times.append(path.stat().st_mtime_ns)
        except FileNotFoundError:
            pass
    return max(times, default=0)


def state_of_job(job):
    steps = [Job.runs.steps(job.name, stage) for stage in ("pretrain", "finetune")]
    return steps, job.ranks(), [len(launcher.text) for launcher in job.all], job.codes(), last_change(Job.runs.work / job.name)


def watch(job, failure):
    """Until all launchers have ended; no longer than LIMIT_S without any sign of life from any of them. The longest such time, seconds."""
    seen, since, longest, struck_at = None, time.monotonic(), 0, None
    while any(code is None for code in job.codes().values()):
        if struck_at is None and failure.has_come(job):
            failure.strike(job)
            struck_at = time.monotonic()
        if struck_at and failure.is_short(job, time.monotonic() - struck_at):
            failure.heal(job)
        now = state_of_job(job)
        if now != seen:
            seen, since = now, time.monotonic()
        longest = max(longest, time.monotonic() - since)
        assert time.monotonic() - since < LIMIT_S, f"nothing has happened for {LIMIT_S} s: {now}"
        time.sleep(0.1)
    failure.heal(job)
    return longest


def random_failures(num_runs, seed):
    """Whether all went well."""
    count, wrong, by_themselves, longest = 3, [], 0, 0
    straight(count)
    for i in range(num_runs):
        rng = random.Random(f"{seed} {i}")
        failure = Failure(rng, count)
        name, began = f"failure_{i}", time.monotonic()
        job = Job(name, count=count, options=("--max-restarts", "3", "--node-timeout", str(NODE_TIMEOUT_S)), fault=failure.faults)
        try:
            longest = max(longest, watch(job, failure))
            job.end(tuple(range(256)), 5)
            is_done = set(job.codes().values()) == {0}
            num_restarts = max(launcher.text.count("starting again") for launcher in job.all)
            if not is_done or num_restarts > (failure.moment == "restart"):
                assert failure.names_culprit(job.text()), "the culprit is not named"
            finish(name, count)
            by_themselves += is_done
            print(f"  {i}: {failure}: {'went on by itself' if is_done else f'ended with {sorted(job.codes().values())}, went on by the same command'}, "
                  f"{num_restarts} restarts, {time.monotonic() - began:.0f} s", flush=True)
        except (AssertionError, subprocess.CalledProcessError) as error:
            wrong.append(i)
            print(f"  {i}: {failure}: WRONG: {error}\n{job.text()[-6000:]}", flush=True)
            failure.heal(job)
        Job.runs.kill_all()
        shutil.rmtree(Job.runs.work / name, ignore_errors=True)
    print(f"{num_runs} failures, seed {seed}: {by_themselves} went on by themselves, {num_runs - by_themselves - len(wrong)} by the same "
          f"command, {len(wrong)} wrong {wrong}; nothing happened for {longest:.1f} s at most")
    return not wrong


def long_run(minutes, seed):
    """Launchers that end are started again, as a scheduler does."""
    rng = random.Random(seed)
    steps = max(6, int(minutes * 60 / 2 / 0.6))  # a stage; disturbed, a step takes half a second more
    settings = dict(max_steps=steps, save_steps=20)
    Job("plain", **settings).end(limit=3600 + steps)
    slow = ";".join(f"slow@step:1,rank=0,attempt={attempt}" for attempt in range(1000))
    job = Job("disturbed", fault=slow, options=("--max-restarts", "1000", "--node-timeout", str(NODE_TIMEOUT_S)), **settings)
    began, next_at, struck, failure, moved_at, done = time.monotonic(), time.monotonic() + 30, 0, None, time.monotonic(), -1
    while set(job.codes().values()) != {0}:
        for k, code in job.codes().items():
            if code not in (None, 0):
                job.start(k)
                if job.launchers[0].code() == 0:  # the run is done, and this launcher has not heard of it
                    job.start(0)
        now = sum(Job.runs.steps(job.name, stage) for stage in ("pretrain", "finetune"))
        if now != done:
            done, moved_at = now, time.monotonic()
        assert time.monotonic() - moved_at < 3 * (LIMIT_S + NODE_TIMEOUT_S), f"no step for {time.monotonic() - moved_at:.0f} s:\n{job.text()[-6000:]}"
        if failure and time.monotonic() > healed_at:
            failure.heal(job)
            failure = None
        if not failure and time.monotonic() > next_at and all(code is None for code in job.codes().values()):
            failure = Failure(rng, 2, moments=("joining",), kinds=[kind for kind in KINDS if kind not in ("slow", "disk")])
            print(f"  after {time.monotonic() - began:.0f} s, {done} steps: {failure.kind} of machine {failure.machine}", flush=True)
            failure.strike(job)
            struck += 1
            healed_at = time.monotonic() + (2 if failure.kind == "short cut" else rng.uniform(1, 3) * TIMEOUT_S)
            next_at = time.monotonic() + rng.uniform(0.5, 1.5) * min(240, max(60, minutes * 4))
        time.sleep(0.2)
    Job.runs.same_bits("plain", "disturbed", is_same_saves=False)
    restarts = max(launcher.text.count("starting again") for launcher in job.all)
    print(f"{struck} failures in {(time.monotonic() - began) / 60:.0f} minutes and {2 * steps} steps, seed {seed}, {restarts} restarts by launchers: "
          "the same bits as undisturbed")
