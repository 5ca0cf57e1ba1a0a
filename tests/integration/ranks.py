"""Runs of the scenes recipe on a few pictures, by one process or several ranks, and how two of them compare.

Needs nothing but Python. All runs lie in one temporary folder; data and outputs are named relative to it."""
import filecmp, json, os, pathlib, shutil, socket, struct, subprocess, tempfile, time

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
        shutil.rmtree(self.work, ignore_errors=True)

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
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
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

    def same_bits(self, one, two, stages=STAGES):
        """Final weights, every checkpoint's tensors, which checkpoints are left, and metrics."""
        for stage in stages:
            a, b = self.work / one / stage, self.work / two / stage
            files = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")) for folder in (a, b)]
            assert files[0] == files[1], f"{stage}: {files}"
            assert "final/model.safetensors" in files[0] and any("optimizer" in name for name in files[0]), files[0]
            names = files[0] + [name for name in ("latest", "best") if (a / name).exists()]
            for name in names:
                assert filecmp.cmp(a / name, b / name, shallow=False), f"{stage}: {name} differs"
            assert self.metrics(one, stage) == self.metrics(two, stage), f"{stage}: metrics differ"


def environment(fault=""):
    return CLEAN | ({"CALDERA_FAULT": fault} if fault else {})


def run_tests(tests, options):
    """Those whose name contains options.only; those with _full in their name with --full alone."""
    for name, test in tests.items():
        if not name.startswith("test_") or options.only not in name or (name.endswith("_full") and not options.full):
            continue
        began = time.monotonic()
        print(name, flush=True)
        test()
        print(f"  passed in {time.monotonic() - began:.1f} s", flush=True)
