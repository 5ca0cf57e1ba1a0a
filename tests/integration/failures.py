#!/usr/bin/env python3
"""What stops, hangs or is told to end on one machine, with real processes. Usage: failures.py CALDERA [--full] [--only NAME]

Whatever happens, nothing waits longer than three times distributed.timeout_s, a message says why, and the same command goes on with
the same bits. Ends with a table of what happened and how long it took to be over. Some three minutes."""
import os, pathlib, re, shutil, signal, socket, subprocess, threading, time

from ranks import ROOT, Process, Runs, Table, arguments, environment_of, free_port, is_over, run_tests, send, wait_until

options = arguments().parse_args()
runs = Runs(options.caldera)
table = Table()
TIMEOUT_S = 6
LIMIT_S = 3 * TIMEOUT_S + 12  # what starts and ends of processes may take on a busy machine; the tables print what it took
STRAIGHT = {1: "ddp", 2: "zero2"}


def words(name, n, *more, **settings):
    return runs.start(n) + runs.train(name, STRAIGHT[n], *more, timeout_s=TIMEOUT_S, **settings)


def straight(n):
    """A run that nothing disturbs, made once."""
    name = f"straight_{n}"
    if not (runs.work / name).exists():
        runs.run(words(name, n))
    return name


def start_until(step, command, name, fault, stage="pretrain"):
    """A run that has done so many steps of the stage."""
    process = Process(command, fault)
    process.wait_until(lambda: runs.steps(name, stage) >= step, f"step {step} of {stage}")
    return process


# --- Signals

def test_a_signal_to_every_process_again_and_again():
    """As schedulers do it; the launcher passes its own on besides."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        name = f"all_{number.name}"
        process = start_until(2, words(name, 2), name, "slow@step:2")
        ranks = process.ranks()
        began = time.monotonic()
        for _ in range(3):
            send(number, process.pid, *ranks.values())
            time.sleep(0.2)  # apart, so that they are not merged into one
        text = process.end(128 + number, 30)
        table.add("the launcher and all ranks are told to end, three times: all have saved and ended", f"{number.name}", time.monotonic() - began)
        assert f"stopped by signal {int(number)} after saving" in text, text[-2000:]
        for rank in ranks:
            assert f"stopped by signal {int(number)} after saving" in (runs.work / name / f"logs/rank-{rank}.log").read_text(), f"rank {rank}"
        assert 2 <= runs.steps(name) < 6
        runs.run(words(name, 2))
        runs.same_bits(straight(2), name, is_same_saves=False)


def test_only_a_later_ctrl_c_ends_at_once():
    for number, code, steps in ((signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 1)):
        # The second step takes six seconds, and both signals come within it.
        name = f"later_{number.name}"
        process = Process(words(name, 2, max_tokens_per_micro_batch=1, global_batch_size=24), "slow@micro_batch:13")
        process.wait_for("pretrain step 1/6")
        send(number, process.pid)
        time.sleep(3.3)
        send(number, process.pid)
        began = time.monotonic()
        text = process.end(code, 30)
        assert runs.steps(name) == steps, (number, runs.steps(name), text[-2000:])
        if number == signal.SIGINT:
            table.add("Ctrl-C again, more than 3 s later", "SIGINT", time.monotonic() - began)
            assert time.monotonic() - began < 10


def test_a_signal_at_the_start_is_no_failure():
    for number, times in ((signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 1)):
        # As soon as a rank is there, its handlers are not; and before any is.
        for wait in (True, False):
            process = Process([*runs.start(2, "--max-restarts", "3"), *runs.train("early", "zero2", timeout_s=TIMEOUT_S)])
            if wait:
                process.wait_until(process.ranks, "a rank")
            began = time.monotonic()
            for _ in range(times):
                send(number, process.pid)
            text = process.end(128 + number, 30)
            assert "starting again" not in text, text[-2000:]
    table.add("told to end before the first step, with --max-restarts 3: no restart", "SIGINT, SIGTERM", time.monotonic() - began)
    shutil.rmtree(runs.work / "early", ignore_errors=True)


def test_a_signal_in_the_last_step_of_a_stage():
    for n in (1, 2):
        name = f"last_{n}"
        process = start_until(5, words(name, n), name, "slow@step:6")
        send(signal.SIGTERM, process.pid)
        process.end(143, 30)
        assert (runs.work / name / "pretrain/final").exists() and runs.steps(name, "finetune") == 0
        # And in the last of the run, where this attempt counts anew.
        process = start_until(5, words(name, n), name, "slow@step:6", "finetune")
        send(signal.SIGINT, process.pid)
        process.end(130, 30)
        assert (runs.work / name / "finetune/final").exists() and not (runs.work / name / "results.json").exists()
        runs.run(words(name, n))
        assert (runs.work / name / "results.json").exists()
        runs.same_bits(straight(n), name)


# --- Restarts

def prepare_resume(name):
    """A run cut in step 6, with checkpoints after steps 2 and 4; the option that goes back to the first."""
    runs.run(words(name, 2), 5, "sigkill@step:6,rank=1")
    return ["--resume", str(runs.work / name / "pretrain/checkpoints/step-00000002")]


def check_restarts(start, kind):
    """--resume is obeyed once: what is started again goes on from the newest checkpoint."""
    for resume in ("never", "DIR"):
        name = f"{kind}_{resume}"
        if resume == "never":
            shutil.copytree(runs.work / straight(2), runs.work / name)
            option, fault = ["--resume", "never"], "sigkill@step:5,rank=1;sigkill@step:2,rank=0,attempt=1"
        else:
            option, fault = prepare_resume(name), "sigkill@step:4,rank=1"
        text = runs.run([*start, *runs.train(name, "zero2", *option, timeout_s=TIMEOUT_S)], fault=fault)
        assert text.count("resumed after step 2\n") == (resume == "DIR") and "resumed after step 4\n" in text, text[-4000:]
        old = sorted(str(path.relative_to(runs.work / name)) for path in (runs.work / name).glob("**/*.old-*"))
        assert old == (["finetune.old-1", "pretrain.old-1"] if resume == "never" else ["pretrain/checkpoints.old-1"]), old
        if resume == "DIR":
            assert [path.name for path in (runs.work / name / old[0]).iterdir()] == ["step-00000004"]
        runs.same_bits(straight(2), name)


def test_restarts_obey_resume_once():
    check_restarts(runs.start(2, "--max-restarts", "3"), "again")


def test_restarts_by_torchrun_too():
    torchrun = ROOT / ".deps/venv/bin/torchrun"
    if not torchrun.exists() or subprocess.run([torchrun, "--help"], capture_output=True).returncode != 0:
        return print("  skipped: no torchrun in .deps/venv")
    check_restarts([torchrun, "--nproc-per-node=2", "--max-restarts=3", "--no-python", f"--master-port={free_port()}", runs.caldera], "torchrun")


# --- Ranks and launchers that no longer move

def test_a_rank_that_hangs_while_saving():
    for rank, is_async in ((1, False), (1, True), (0, False), (0, True)):
        name = f"hang_{rank}_{is_async}"
        process = start_until(2, words(name, 2, async_save=str(is_async).lower()), name, f"hang@save:1,rank={rank}")
        text = process.end(5, 60)
        seconds = runs.seconds_since_step(name)
        error = text[text.rindex("error: "):]
        assert f"rank {rank}" in error and "saving" in error, text[-3000:]
        table.add(f"rank {rank} hangs while it saves{', async_save' if is_async else ''}", "hang@save:1", seconds)
        assert seconds < LIMIT_S, seconds


def test_all_ranks_stopped():
    process = start_until(2, words("stopped", 2), "stopped", "slow@step:2")
    send(signal.SIGSTOP, *process.ranks().values())
    began = time.monotonic()
    text = process.end(5, 60)
    table.add("all ranks of the machine are stopped", "SIGSTOP", time.monotonic() - began)
    assert re.search(r"sign of life", text[text.rindex("error: "):]), text[-3000:]
    assert time.monotonic() - began < LIMIT_S


def test_the_launcher_stopped():
    """It hosts the store. (Ctrl-Z.)"""
    process = start_until(2, words("launcher", 2), "launcher", "slow@step:2")
    ranks = process.ranks().values()
    send(signal.SIGSTOP, process.pid)
    seconds = wait_until(lambda: all(map(is_over, ranks)), "the ranks to end", LIMIT_S)
    table.add("the launcher is stopped", "SIGSTOP", seconds)
    send(signal.SIGCONT, process.pid)
    text = process.end(5, 30)
    assert "the run's store at" in text and "has not answered for" in text, text[-3000:]
    runs.run(words("launcher", 2))
    runs.same_bits(straight(2), "launcher")


# --- Ports, and who listens there

class Silent:
    """A program that accepts connections and says nothing."""
    def __enter__(self):
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port, self.taken = self.server.getsockname()[1], []
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def _accept(self):
        try:
            while True:
                self.taken.append(self.server.accept()[0])
        except OSError:
            pass

    def __exit__(self, *_):
        self.server.close()


def test_a_run_of_one():
    """One rank under a launcher, which has no heartbeat, for longer than any time-out; and one machine by a name that leads elsewhere."""
    command = [*runs.start(1, "--max-restarts", "0"), *runs.train("single", timeout_s=1, max_tokens_per_micro_batch=1, max_steps=2)]
    runs.run(command, fault="slow@micro_batch:1")
    assert runs.seconds > 9, runs.seconds
    runs.run([*runs.start(2, "--nodes", "1", "--node-rank", "0", "--rendezvous", f"name.invalid:{free_port()}"), *runs.train("by_name", "zero2")])


def test_a_port_of_another_program():
    with Silent() as other:
        for node, what, message in ((0, "is taken", f"cannot listen on port {other.port}"), (1, "belongs to another program", "accepts connections but")):
            command = [*runs.start(2, "--nodes", "2", "--node-rank", str(node), "--rendezvous", f"127.0.0.1:{other.port}", "--node-timeout",
                                   str(TIMEOUT_S)), *runs.train("port", timeout_s=TIMEOUT_S)]
            text = runs.run(command, 5, limit=60)
            table.add(f"the rendezvous port {what}", f"--node-rank {node}", runs.seconds)
            assert message in text and str(other.port) in text, text[-2000:]
            assert runs.seconds < LIMIT_S, runs.seconds


def listening_addresses(port):
    """Of this machine's TCP sockets that listen on the port, in the kernel's hexadecimal."""
    found = set()
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in pathlib.Path(path).read_text().splitlines()[1:]:
            _, local, _, state = line.split()[:4]
            address, number = local.split(":")
            if state == "0A" and int(number, 16) == port:
                found.add(address)
    return found


STRANGER = """
import sys, datetime, torch.distributed
print("ready", flush=True)
store = torch.distributed.TCPStore("127.0.0.1", int(sys.stdin.readline()), is_master=False, timeout=datetime.timedelta(seconds=10))
for key in ("failure", "verdict", "launch/end", "launch/attempt"):
    for prefix in ("caldera/0/", "caldera/"):
        store.set(prefix + key, '{"code": 1, "message": "a stranger says so"}')
print("written", flush=True)
"""


def test_strangers_do_not_end_a_run():
    python = ROOT / ".deps/venv/bin/python"
    stranger = subprocess.Popen([python, "-c", STRANGER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                text=True) if python.exists() else None
    has_stranger = stranger is not None and stranger.stdout.readline() == "ready\n"
    process = start_until(2, words("stranger", 2), "stranger", "slow@step:2")
    port = int(environment_of(process.ranks()[0])["MASTER_PORT"])
    assert listening_addresses(port) == {"0100007F"}, f"port {port}: {listening_addresses(port)}"
    if has_stranger:
        text, _ = stranger.communicate(f"{port}\n", timeout=30)
        assert text == "written\n" and process.code() is None, (text, process.text[-2000:])
    else:
        print("  no stranger: no PyTorch in .deps/venv")
    text = process.end(0)
    assert "stranger says so" not in text, text[-2000:]
    runs.same_bits(straight(2), "stranger")


# --- Two runs into one folder

def on_another_host(command):
    return ["unshare", "--uts", "sh", "-c", 'hostname elsewhere && exec "$@"', "sh", *command]


def check_refused(command, first, host, fault="", message="has been working in this folder"):
    text = runs.run(command, 2, fault, limit=30)
    assert f"process {first.pid}" in text and host in text and message in text, text[-2000:]
    assert runs.seconds < 20, runs.seconds


def test_a_second_run_into_the_same_folder():
    host = socket.gethostname()
    for fault in ("", "enolck@lock:1"):  # with flock(), and on a file system without
        name = f"locked_{fault[:6]}"
        first = start_until(1, words(name, 1), name, ";".join(filter(None, (fault, "slow@step:1"))))
        send(signal.SIGSTOP, first.pid)  # it must not be over before the others have tried
        check_refused(words(name, 1), first, host, fault)
        if not fault:
            table.add("a second run into the same folder: exit code 2", "caldera train", runs.seconds)
        if os.getuid() == 0:
            check_refused(on_another_host(words(name, 1)), first, host, fault, str(runs.work / name / ".lock") if fault else "working in this folder")
        send(signal.SIGCONT, first.pid)
        first.end(0)
        runs.same_bits(straight(1), name)
    # Ranks too, of which one holds the folder.
    first = start_until(1, words("locked_ranks", 2), "locked_ranks", "slow@step:1")
    text = runs.run([*runs.start(2, "--max-restarts", "2"), *runs.train("locked_ranks", "zero2", timeout_s=TIMEOUT_S)], 2, limit=30)
    assert f"process {first.ranks()[0]}" in text and "starting again" not in text, text[-2000:]
    first.end(0)
    runs.same_bits(straight(2), "locked_ranks")


def test_a_lock_of_a_killed_run_is_no_obstacle():
    for fault in ("", "enolck@lock:1"):
        name = f"stale_{fault[:6]}"
        first = start_until(3, words(name, 1), name, ";".join(filter(None, (fault, "slow@step:1"))))
        first.kill()
        assert (runs.work / name / ".lock").read_text()
        runs.run(words(name, 1), 0, fault)
        runs.same_bits(straight(1), name)


try:
    run_tests(dict(globals()), options)
    table.show()
finally:
    runs.remove()
