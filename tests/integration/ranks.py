"""Runs of the scenes recipe on a few pictures, by one process or several ranks, and how two of them compare.

Needs nothing but Python. All runs lie in one temporary folder; data and outputs are named relative to it."""
import argparse, filecmp, json, os, pathlib, shutil, signal, socket, struct, subprocess, tempfile, threading, time

ROOT = pathlib.Path(__file__).resolve().parents[2]
STAGES = ("pretrain", "finetune")
# What a rank is told by launchers must not leak into the runs that are started here.
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("CALDERA_", "OMPI_", "PMI", "SLURM_")) and k not in (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")} | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
BY_THE_CLOCK = {"tokens_per_second", "step_ms", "data_wait_ms", "peak_memory_bytes"}
LORA = ["stages.finetune.lora.lora_r=4", "stages.finetune.gradient_checkpointing=true"]


class Runs:
    def __init__(self, caldera, num_train=40):
        self.caldera = os.path.abspath(caldera)
        self.work = pathlib.Path(tempfile.mkdtemp(prefix="caldera_ranks_"))
        subprocess.run([self.caldera, "data", "make-scenes", "--out", self.work / "data", "--num-train", str(num_train), "--num-test", "4",
                        "--seed", "3"], check=True, cwd=ROOT, stderr=subprocess.DEVNULL, env=CLEAN)

    def remove(self):
        self.kill_all()
        shutil.rmtree(self.work, ignore_errors=True)

    def processes(self):
        """Of all runs into this folder, launchers and ranks."""
        return [int(pid) for pid in filter(str.isdigit, os.listdir("/proc")) if str(self.work) in command_of(pid) and not is_over(pid)]

    def kill_all(self):
        for pid in self.processes():
            send(signal.SIGKILL, pid)
        wait_until(lambda: not self.processes(), "killed processes to end")

    def train(self, output, strategy="ddp", *more, timeout_s=60, **stage):
        """The words after `caldera` for a run to the folder `output`; `stage` are settings of both stages (None: the recipe's own)."""
        settings = dict(dtype="float32", global_batch_size=6, max_steps=6, save_steps=2, save_total_limit=2, max_tokens_per_micro_batch=300) | stage
        strategy, _, within = strategy.partition(" within ")
        if strategy == "zero3":
            settings["gradient_checkpointing"] = "true"
        overrides = [f"output={self.work / output}", f"distributed.strategy={strategy}", f"distributed.timeout_s={timeout_s}"]
        if within:
            overrides.append(f"distributed.shard_within={within}")
        for name in STAGES:
            overrides += [f"stages.{name}.data.data_path={self.work}/data/{name}.json", f"stages.{name}.data.image_folder={self.work}/data/images",
                          f"stages.{name}.data.dataloader_num_workers=1"]
            overrides += [f"stages.{name}.{key}={value}" for key, value in settings.items() if value is not None]
        overrides += [f"stages.pretrain.data.eval_data_path={self.work}/data/captions_test.json",
                      f"evaluation.data_path={self.work}/data/test.json", f"evaluation.captions_path={self.work}/data/captions_test.json",
                      f"evaluation.image_folder={self.work}/data/images", "evaluation.max_questions=1"]
        return ["train", "configs/scenes/scenes.yaml", *overrides, *more]

    def start(self, n, *more):
        """The words before `train` for n ranks."""
        return [self.caldera, "launch", "-n", str(n), *more, "--"] if n > 1 or more else [self.caldera]

    def run(self, command, expect=0, fault="", limit=120):
        """Runs to its end within `limit` seconds; returns what it wrote."""
        began = time.monotonic()
        process = subprocess.run(command, cwd=ROOT, env=environment(fault), timeout=limit, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                 text=True, errors="replace")
        assert process.returncode == expect, f"exit code {process.returncode}, expected {expect}:\n{process.stdout[-4000:]}"
        self.seconds = time.monotonic() - began
        return process.stdout

    def run_on_two_machines(self, n, command, expect=0, fault="", limit=120):
        """The same on two machines with n ranks each, both of them this one; returns what the first wrote."""
        port = free_port()
        machines = [subprocess.Popen([self.caldera, "launch", "-n", str(n), "--nodes", "2", "--node-rank", str(k), "--rendezvous", f"127.0.0.1:{port}",
                                      "--", *command], cwd=ROOT, env=environment(fault) | {"GLOO_SOCKET_IFNAME": "lo"}, stdout=subprocess.PIPE,
                                     stderr=subprocess.STDOUT, text=True, errors="replace") for k in (0, 1)]
        try:
            texts = [machine.communicate(timeout=limit)[0] for machine in machines]
        finally:
            for machine in machines:
                machine.kill()
        codes = [machine.returncode for machine in machines]
        assert codes == [expect] * 2, f"exit codes {codes}, expected {expect}:\n{texts[0][-3000:]}\n{texts[1][-3000:]}"
        return texts[0]

    def metrics(self, output, stage):
        """The lines of metrics.jsonl without what depends on the clock or on the process."""
        return [{k: v for k, v in json.loads(line).items() if k not in BY_THE_CLOCK} for line in open(self.work / output / stage / "metrics.jsonl")]

    def steps(self, output, stage="pretrain"):
        """How many steps a run has done so far."""
        path = self.work / output / stage / "metrics.jsonl"
        return path.read_text().count('"loss"') if path.exists() else 0

    def seconds_since_step(self, output):
        """Since the last line of metrics, whichever stage's: about as long ago a fault in the next step happened."""
        return time.time() - max(path.stat().st_mtime for path in (self.work / output).glob("*/metrics.jsonl"))

    def losses(self, output, stage):
        return [line["loss"] for line in self.metrics(output, stage) if "loss" in line]

    def weights(self, output, stage):
        """name -> list of float32 of the final model."""
        data = (self.work / output / stage / "final/model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        result = {}
        for name, entry in json.loads(data[8:8 + length]).items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            raw = data[8 + length + begin:8 + length + end]
            result[name] = struct.unpack(f"<{len(raw) // 4}f", raw)
        return result

    def differences(self, one, two, stage):
        """The worst relative difference of a loss, and of a tensor of the final weights (by its norm), of two float32 runs."""
        a, b = self.losses(one, stage), self.losses(two, stage)
        assert len(a) == len(b), (len(a), len(b))
        samples = [[(m["num_tokens"], m["num_supervised"], m["epoch"]) for m in self.metrics(o, stage) if "loss" in m] for o in (one, two)]
        assert samples[0] == samples[1], f"{stage}: other samples"
        worst_loss = max(abs(x - y) / abs(x) for x, y in zip(a, b))
        a, b = self.weights(one, stage), self.weights(two, stage)
        assert a.keys() == b.keys()
        worst_weights = 0
        for name in a:
            difference = sum((x - y) ** 2 for x, y in zip(a[name], b[name])) ** 0.5
            worst_weights = max(worst_weights, difference / max(sum(x * x for x in a[name]) ** 0.5, 1e-3))
        return worst_loss, worst_weights

    def same_curve(self, one, two, stages=STAGES):
        for stage in stages:
            loss, weights = self.differences(one, two, stage)
            assert loss <= 1e-5 and weights <= 1e-4, f"{stage}: losses differ by {loss}, weights by {weights}"

    def same_bits(self, one, two, stages=STAGES, is_same_saves=True):
        """Final weights, every checkpoint's tensors, which checkpoints are left, and metrics. A run that a signal stopped has
        saved at another step too: then only the checkpoints that both have."""
        for stage in stages:
            a, b = self.work / one / stage, self.work / two / stage
            files = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*.safetensors") if ".old-" not in str(path.relative_to(folder)))
                     for folder in (a, b)]
            if is_same_saves:
                assert files[0] == files[1], f"{stage}: {files}"
                assert any("optimizer" in name for name in files[0]), files[0]
                names = files[0] + [name for name in ("latest", "best") if (a / name).exists()]
            else:
                names = sorted(set(files[0]) & set(files[1]))
            assert "final/model.safetensors" in names, files
            for name in names:
                assert filecmp.cmp(a / name, b / name, shallow=False), f"{stage}: {name} differs"
            assert self.metrics(one, stage) == self.metrics(two, stage), f"{stage}: metrics differ"


class Process:
    """A command that runs while the test looks on. Commands that start ranks are launchers."""
    def __init__(self, command, fault="", **variables):
        self.text, self.began = "", time.monotonic()
        self.process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment(fault) | variables, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        self.pid = self.process.pid
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.text += line

    def code(self):
        """As a shell says it, 128 + N after signal N; None while it runs."""
        code = self.process.poll()
        return 128 - code if code is not None and code < 0 else code

    def ranks(self):
        """rank -> process id of those that have been started and not reaped."""
        found = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            if state_of(pid)[1] != self.pid:
                continue
            variables = environment_of(pid)
            if "RANK" in variables:
                found[int(variables["RANK"])] = int(pid)
        return dict(sorted(found.items()))

    def wait_for(self, words, limit=60):
        wait_until(lambda: words in self.text or self.code() is not None, f'"{words}"', limit)
        self.process.poll() is None or self.reader.join(5)
        assert words in self.text, f'ended with {self.code()} without "{words}":\n{self.text[-4000:]}'

    def wait_until(self, condition, what, limit=60):
        """As wait_until, but not beyond this process's end."""
        wait_until(lambda: condition() or self.code() is not None, what, limit)
        assert self.code() is None, f"ended with {self.code()} before {what}:\n{self.text[-4000:]}"

    def end(self, expect=0, limit=120):
        """Waits for its end, with one of these codes; returns what it wrote."""
        try:
            self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"has not ended within {limit:.0f} s:\n{self.text[-4000:]}") from None
        self.reader.join(5)
        expect = expect if isinstance(expect, tuple) else (expect,)
        assert self.code() in expect, f"exit code {self.code()}, expected {expect}:\n{self.text[-4000:]}"
        return self.text

    def kill(self):
        """With all of its ranks, which could not tell anybody."""
        send(signal.SIGKILL, self.pid, *self.ranks().values())
        self.process.wait()


def state_of(pid):
    """State letter and parent of a process; ("X", 0) where there is none."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return "X", 0
    return fields[0], int(fields[1])


def send(number, *pids):
    """A signal; processes that have ended already are passed over."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def command_of(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def is_over(pid):
    return state_of(pid)[0] in "XZ"


def environment_of(pid):
    try:
        pairs = pathlib.Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def wait_until(condition, what, limit=60):
    """Seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit, f"waited {limit:.0f} s for {what}"
        time.sleep(0.01)
    return time.monotonic() - began


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Table:
    """Rows of a table in Markdown: what failed, and how many seconds later everything had ended or gone on."""
    def __init__(self):
        self.rows = []

    def add(self, what, how, seconds):
        self.rows.append(f"| {what} | `{how}` | {seconds:.1f} |")
        print(f"  {what}: {seconds:.1f} s", flush=True)

    def show(self):
        if self.rows:
            print("\n| failure | by | seconds |\n| --- | --- | --- |\n" + "\n".join(self.rows), flush=True)


def environment(fault=""):
    return CLEAN | ({"CALDERA_FAULT": fault} if fault else {})


def arguments():
    """Of the programs that run_tests() is for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("caldera")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", default="", help="tests whose name contains this")
    return parser


def run_tests(tests, options):
    """Those whose name contains options.only; those with _full in their name with --full alone."""
    for name, test in tests.items():
        if not name.startswith("test_") or options.only not in name or (name.endswith("_full") and not options.full):
            continue
        began = time.monotonic()
        print(name, flush=True)
        test()
        print(f"  passed in {time.monotonic() - began:.1f} s", flush=True)
