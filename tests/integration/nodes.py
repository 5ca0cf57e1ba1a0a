#!/usr/bin/env python3
"""Runs on several machines, each a network namespace with a host name of its own. Usage: nodes.py CALDERA [--full] [--only NAME]

Cables are pulled, launchers and ranks killed and stopped, machines told different things: everything ends within three times
distributed.timeout_s with a line that says why, or goes on, with the same bits in the end. Needs root, iproute2 and network namespaces;
without them it ends with code 77. Ends with a table of what happened and how long it took. Some four minutes.

  nodes.py CALDERA --faults N [--seed S]            N runs on three machines, each with a failure drawn at random
  nodes.py CALDERA --overnight MINUTES [--seed S]   one long run on two machines, a failure every few minutes"""
import json, pathlib, re, shutil, signal, subprocess, sys, time

import random_failures
from job import LIMIT_S, TIMEOUT_S, Job, can_make_machines, finish, last_error, machines, runs_since, straight
from ranks import ROOT, Runs, Table, arguments, run_tests, send

parser = arguments()
parser.add_argument("--faults", "--runs", type=int)
parser.add_argument("--overnight", "--minutes", type=float)
parser.add_argument("--seed", type=int, default=int(time.time()))
options = parser.parse_args()
RESTARTS = ("--max-restarts", "3", "--node-timeout", "60")
table = Table()


# --- Cables

def test_a_pulled_cable():
    for k in (1, 0):
        job = Job(f"cut_{k}", fault="slow@step:2")
        job.wait_steps(2)
        machines("cut", k)
        began = time.monotonic()
        texts = job.end(5, LIMIT_S)
        table.add(f"the cable of machine {k} is pulled: all of both machines have ended", "ip link set down", time.monotonic() - began)
        for machine, text in texts.items():
            assert re.search(r"no sign of life|has not answered for|lost|cannot reach|node[01]", last_error(text)), f"machine {machine}: {text[-3000:]}"
        assert "node1" in last_error(texts[0]) or "rank" in last_error(texts[0]), texts[0][-3000:]
        machines("heal", k)
        finish(job.name)


def test_a_short_cut_heals():
    job = Job("short", fault="slow@step:2", timeout_s=10)
    job.wait_steps(2)
    machines("cut", 1)
    time.sleep(2)  # TCP tries again after 0.2, 0.6, 1.4 and 3 s
    machines("heal", 1)
    job.end()
    assert "starting again" not in job.text(), job.text()[-3000:]
    runs.same_bits(straight(), "short")


# --- Restarts

def test_a_killed_rank_restarts_all_machines():
    job = Job("restart_rank", options=RESTARTS, fault="sigkill@step:3,rank=3")
    texts = job.end()
    table.add("a rank of machine 1 is killed, --max-restarts 3: the run is done", "sigkill@step:3", runs_since(job))
    for text in texts.values():
        assert text.count("starting again") == 1, text[-3000:]
    assert "rank 3" in texts[0] and "node1" in texts[0], texts[0][-3000:]
    runs.same_bits(straight(), job.name)


def test_a_killed_launcher_comes_back():
    for k in (1, 0):
        # What is asked for once is not done again: the run goes on, although machine 0's new launcher begins with nothing.
        job = Job(f"restart_{k}", "--resume", "never", options=RESTARTS, fault="slow@step:2")
        job.wait_steps(3)
        job.launchers[k].kill()
        if k == 1:
            job.launchers[0].wait_for("waiting for machine 1", LIMIT_S)
        job.fault = ""
        job.start(k)
        job.end()
        table.add(f"launcher and ranks of machine {k} are killed, the command given again: the run is done", "SIGKILL", runs_since(job))
        runs.same_bits(straight(), job.name, is_same_saves=False)
        assert not list((runs.work / job.name).glob("*.old-*")), sorted((runs.work / job.name).iterdir())


def test_a_long_cut_heals_by_restart():
    job = Job("restart_cut", options=RESTARTS, fault="slow@step:2")
    job.wait_steps(2)
    machines("cut", 1)
    began = time.monotonic()
    job.launchers[0].wait_for("waiting for machine 1", LIMIT_S)
    time.sleep(max(0, 2 * TIMEOUT_S - (time.monotonic() - began)))
    machines("heal", 1)
    healed = time.monotonic()
    if job.launchers[1].code() is not None:
        job.start(1)
    job.end()
    table.add("a cut of twice timeout_s, --max-restarts 3: from its end until the run is done", "ip link set down, up", time.monotonic() - healed)
    runs.same_bits(straight(), job.name, is_same_saves=False)


def test_a_stopped_machine():
    """All of its ranks; its launcher learns of it from the others."""
    job = Job("stopped", fault="slow@step:2")
    job.wait_steps(2)
    send(signal.SIGSTOP, *job.launchers[1].ranks().values())
    began = time.monotonic()
    texts = job.end(5, LIMIT_S + 6)
    table.add("all ranks of machine 1 are stopped: all of both machines have ended", "SIGSTOP", time.monotonic() - began)
    for text in texts.values():
        assert re.search(r"rank [23]|node1|machine 1", last_error(text)) and "sign of life" in last_error(text), text[-3000:]
    assert time.monotonic() - began < LIMIT_S


# --- What the machines are told

def spoiled_model():
    """The language model with one bit of its weights turned."""
    copy = runs.work / "other_model"
    if not copy.exists():
        shutil.copytree(ROOT / "checkpoints/scenes/language_model", copy)
        weights = sorted(copy.glob("*.safetensors"))[0]
        data = bytearray(weights.read_bytes())
        data[-2] ^= 1
        weights.chmod(0o644)
        weights.write_bytes(data)
    return copy


def fewer_records():
    path = runs.work / "data/one_fewer.json"
    path.write_text(json.dumps(json.loads((runs.work / "data/finetune.json").read_text())[:-1]))
    return path


def test_machines_that_do_not_agree():
    for what, other, code, words in [
            ("seed", "seed=7", 2, "seed"),
            ("learning rate", "stages.finetune.optimizer.learning_rate=0.25", 2, "stages.finetune.optimizer.learning_rate"),
            ("number of records", f"stages.finetune.data.data_path={fewer_records()}", 3, "stages.finetune.data.data_path"),
            ("weights", f"model.language_model={spoiled_model()}", 4, "language_model")]:
        job = Job("differ", only={1: [other]}, options=RESTARTS)
        texts = job.end(code, 30)
        table.add(f"machine 1 has another {what}: exit code {code}", other.split("=")[0], runs_since(job))
        for text in texts.values():
            assert words in last_error(text) and "node1" in last_error(text) and "starting again" not in text, text[-3000:]
        assert runs.steps("differ") == 0
        shutil.rmtree(runs.work / "differ")


def test_another_version_of_the_program():
    other = runs.work / "caldera"
    program, version = pathlib.Path(runs.caldera).read_bytes(), re.compile(rb"caldera [0-9]+\.[0-9]+\.[0-9]+\0")
    assert len(version.findall(program)) == 1
    other.write_bytes(version.sub(lambda found: found[0][:-2] + b"9\0", program))
    other.chmod(0o755)
    job = Job("version", programs={1: (other,)}, options=RESTARTS)
    for text in job.end(2, 30).values():
        assert "version" in last_error(text) and "node1" in last_error(text) and "starting again" not in text, text[-3000:]


def test_clocks_that_differ():
    """By a day, and more: no time of one machine means anything on another."""
    if subprocess.run(["unshare", "--time", "true"], stderr=subprocess.DEVNULL).returncode:
        return print("  left out: this kernel has no time namespaces")
    job = Job("clocks", programs={1: ("unshare", "--time", "--monotonic", "100000", "--boottime", "100000", runs.caldera)})
    job.end()
    runs.same_bits(straight(), "clocks")


def test_secrets():
    job = Job("secret_none", "--stage", "pretrain", variables={k: {"CALDERA_RUN_SECRET": ""} for k in (0, 1)})
    assert "CALDERA_RUN_SECRET" in job.end()[0]
    job = Job("secret_two", variables={1: {"CALDERA_RUN_SECRET": "another"}}, options=("--node-timeout", "6"))
    texts = job.end((2, 5), LIMIT_S)
    table.add("two machines with different secrets", "CALDERA_RUN_SECRET", runs_since(job))
    for text in texts.values():
        assert "CALDERA_RUN_SECRET" in last_error(text), text[-3000:]


# --- Coming together

def test_a_rank_that_fails_while_joining():
    job = Job("joining", variables={1: {"GLOO_SOCKET_IFNAME": "nosuch"}})
    texts = job.end((1, 5), LIMIT_S)
    table.add("a rank of machine 1 fails while joining", "GLOO_SOCKET_IFNAME=nosuch", runs_since(job))
    for text in texts.values():
        assert "node1" in last_error(text) or "rank" in last_error(text), text[-3000:]
    assert "node1" in texts[0] and "GLOO_SOCKET_IFNAME" in texts[1], texts[0][-3000:] + texts[1][-3000:]


def test_names_and_addresses():
    """A host name that is 127.0.1.1 at home, and IPv6. (All other runs: IPv4.)"""
    for i, rendezvous in enumerate(("node0:29500", "[fd77::10]:29500")):
        Job(f"address_{i}", rendezvous=rendezvous).end()
        runs.same_bits(straight(), f"address_{i}")


def test_a_machine_that_comes_twice():
    job = Job("twice", fault="slow@step:2")
    job.wait_steps(1)
    first = job.launchers[1]
    text = job.start(2, node_rank=1).end((2, 5), LIMIT_S)
    table.add("the same --node-rank on two machines: the second is refused", "--node-rank 1", runs_since(job))
    assert "node1" in last_error(text) and str(first.pid) in last_error(text), text[-3000:]
    del job.launchers[2]
    job.end()
    runs.same_bits(straight(), job.name)


def test_a_machine_that_does_not_come():
    job = Job("alone", begin=False, options=("--node-timeout", "5"))
    text = job.start(0).end(5, LIMIT_S)
    table.add("machine 1 is not started, --node-timeout 5", "exit code 5", runs_since(job))
    assert "for machine 1" in last_error(text) and 5 <= runs_since(job) < LIMIT_S, text[-3000:]


# --- The rest

def test_a_straggler_has_a_machine():
    job = Job("straggler", "--stage", "pretrain", fault="slow@micro_batch:1,rank=3", max_tokens_per_micro_batch=1, global_batch_size=12,
              max_steps=8)
    job.end()
    assert "rank 3 (node1) is a straggler" in job.text(), job.text()[-3000:]


def test_parts_within_a_machine():
    runs.run(runs.start(1) + runs.train("one"))
    for strategy in ("zero2 within node", "zero3 within node"):
        name = strategy.replace(" ", "_")
        Job(name, strategy=strategy).end()
        runs.same_curve("one", name)


def test_a_full_disk():
    disk = runs.work / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "caldera", disk], check=True)
    try:
        job = Job("disk")
        texts = job.end((1, 5), 60)
        table.add("the output's disk is full", "tmpfs of 24 MB", runs.seconds_since_step("disk"))
        assert "No space left on device" in last_error(texts[0]) and "rank" in last_error(texts[0]), texts[0][-3000:]
        assert (disk / "pretrain/final").exists()
        subprocess.run(["mount", "-o", "remount,size=900m", disk], check=True)
        finish("disk")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_file_system_that_turns_read_only():
    """As one does by itself after an error of its disk; under the checkpoints, for files that are open would keep it from that."""
    folder = runs.work / "read_only/pretrain/checkpoints"
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "caldera", folder], check=True)
    try:
        job = Job("read_only", fault="slow@step:3")
        job.launchers[0].wait_for("step-00000002", 60)
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        texts = job.end((1, 5), 60)
        assert "Read-only file system" in last_error(texts[0]) and "rank" in last_error(texts[0]), texts[0][-3000:]
        subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
        finish("read_only")
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


if not can_make_machines():
    print("skipped: machines need root, iproute2 and network namespaces")
    machines("down") if shutil.which("ip") else None
    sys.exit(77)
runs = Job.runs = Runs(options.caldera)
try:
    if options.faults:
        sys.exit(0 if random_failures.random_failures(options.faults, options.seed) else 1)
    elif options.overnight:
        random_failures.long_run(options.overnight, options.seed)
    else:
        run_tests(dict(globals()), options)
        table.show()
finally:
    runs.remove()
    machines("down")
