#!/usr/bin/env python3
"""Several ranks, real processes on one machine. Usage: distributed.py CALDERA [--full]

The same curve and weights from any number of ranks under any strategy; resuming, also on another number of ranks; ranks that die, throw,
stop or leave bring the others down with their name; a signal saves on all ranks; torchrun and mpirun start the same binary unchanged.
Faults come at counted points (CALDERA_FAULT), never by the clock. --full: all combinations, some minutes."""
import argparse, filecmp, json, os, pathlib, shutil, signal, struct, subprocess, sys, tempfile, time

parser = argparse.ArgumentParser()
parser.add_argument("caldera")
parser.add_argument("--full", action="store_true")
parser.add_argument("--only", default="", help="tests whose name contains this")
options = parser.parse_args()
root = pathlib.Path(__file__).resolve().parents[2]
work = pathlib.Path(tempfile.mkdtemp(prefix="caldera_ranks_"))
caldera = os.path.abspath(options.caldera)
STEPS = 6  # a stage
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("CALDERA_", "OMPI_", "PMI", "SLURM_")) and k not in (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")} | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def train(output, strategy="ddp", *more, timeout_s=60, **stage):
    settings = dict(dtype="float32", global_batch_size=6, max_steps=STEPS, save_steps=2, save_total_limit=2, max_tokens_per_micro_batch=300) | stage
    if strategy == "zero3":
        settings["gradient_checkpointing"] = "true"
    overrides = [f"output={work / output}", f"distributed.strategy={strategy}", f"distributed.timeout_s={timeout_s}"]
    for name in ("pretrain", "finetune"):
        overrides += [f"stages.{name}.data.data_path={work}/data/{name}.json", f"stages.{name}.data.image_folder={work}/data/images",
                      f"stages.{name}.data.dataloader_num_workers=1"]
        overrides += [f"stages.{name}.{key}={value}" for key, value in settings.items()]
    overrides += [f"stages.pretrain.data.eval_data_path={work}/data/captions_test.json",
                  f"evaluation.data_path={work}/data/test.json", f"evaluation.captions_path={work}/data/captions_test.json",
                  f"evaluation.image_folder={work}/data/images", "evaluation.max_questions=1"]
    return ["train", "configs/scenes/scenes.yaml", *overrides, *more]


def launch(n, *more):
    return [caldera, "launch", "-n", str(n), *more, "--"]


def run(command, expect=0, fault="", limit=120):
    """Runs to its end within `limit` seconds; returns what it wrote."""
    began = time.monotonic()
    process = subprocess.run(command, cwd=root, env=CLEAN | ({"CALDERA_FAULT": fault} if fault else {}), timeout=limit,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    text = process.stdout
    assert process.returncode == expect, f"exit code {process.returncode}, expected {expect}:\n{text[-4000:]}"
    run.seconds = time.monotonic() - began
    return text


def stable(output, stage):
    drop = {"tokens_per_second", "step_ms", "data_wait_ms", "peak_memory_bytes"}
    return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in open(work / output / stage / "metrics.jsonl")]


def losses(output, stage):
    return [line["loss"] for line in stable(output, stage) if "loss" in line]


def weights(output, stage):
    """name -> list of float32, read by hand: the test needs nothing but Python."""
    data = (work / output / stage / "final/model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + length])
    result = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        raw = data[8 + length + begin:8 + length + end]
        result[name] = struct.unpack(f"<{len(raw) // 4}f", raw) if entry["dtype"] == "F32" else raw
    return result


def same_weights(one, two, stage, relative=1e-4):
    a, b = weights(one, stage), weights(two, stage)
    assert a.keys() == b.keys()
    for name in a:
        difference = sum((x - y) ** 2 for x, y in zip(a[name], b[name])) ** 0.5
        norm = sum(x * x for x in a[name]) ** 0.5
        assert difference <= relative * max(norm, 1e-3), f"{name}: {difference} of {norm}"


def same_bits(one, two):
    for stage in ("pretrain", "finetune"):
        assert filecmp.cmp(work / one / stage / "final/model.safetensors", work / two / stage / "final/model.safetensors",
                           shallow=False), f"{stage}: weights differ"
        assert stable(one, stage) == stable(two, stage), f"{stage}: metrics differ"


def same_curve(one, two, relative=1e-5):
    for stage in ("pretrain", "finetune"):
        a, b = losses(one, stage), losses(two, stage)
        assert len(a) == len(b) == STEPS, (len(a), len(b))
        for step, (x, y) in enumerate(zip(a, b), 1):
            assert abs(x - y) <= relative * abs(x), f"{stage} step {step}: {x} against {y}"
        counts = [[(line.get("num_tokens"), line.get("num_supervised"), line.get("epoch")) for line in stable(o, stage)] for o in (one, two)]
        assert counts[0] == counts[1], f"{stage}: other samples"
        same_weights(one, two, stage)


# --- The tests. Each is a function test_*; those with _full in their name run with --full alone.
def test_any_number_of_ranks_gives_the_same_curve():
    run([caldera, *train("one")])
    cases = [(2, "ddp"), (2, "zero1"), (2, "zero2"), (4, "zero3")]
    if options.full:
        cases += [(4, "ddp"), (4, "zero1"), (3, "zero2"), (4, "zero2"), (2, "zero3"), (3, "zero3")]
    for n, strategy in cases:
        text = run(launch(n) + train(f"{strategy}_{n}", strategy))
        assert f"{n} ranks on 1 machine, gloo, started by caldera launch; {strategy}" in text, text[:2000]
        same_curve("one", f"{strategy}_{n}")
        for rank in range(n):
            assert (work / f"{strategy}_{n}/logs/rank-{rank}.log").exists()


def test_adapters_too():
    lora = ["stages.finetune.lora.lora_r=4", "stages.finetune.lora.lora_dropout=0", "stages.finetune.gradient_checkpointing=true"]
    run([caldera, *train("lora_one", "ddp", *lora)])
    run(launch(2) + train("lora_two", "zero3", *lora))
    same_curve("lora_one", "lora_two")


def test_a_killed_rank_and_restart_change_no_bit():
    # Killed within a micro-batch of rank 1; the launcher starts again from the last checkpoint. Written in the background.
    text = run(launch(2, "--max-restarts", "2") + train("killed", "zero2", async_save="true"), fault="sigkill@micro_batch:9,rank=1")
    assert "rank 1 was killed by signal 9" in text and "starting again from the last checkpoint (1 of 2)" in text, text[-3000:]
    if not (work / "zero2_2").exists():
        run(launch(2) + train("zero2_2", "zero2"))
    same_bits("zero2_2", "killed")


def test_a_signal_saves_and_another_number_of_ranks_goes_on():
    if not (work / "one").exists():
        run([caldera, *train("one")])
    moves = [((2, "zero3"), (1, "ddp"))]
    if options.full:
        moves += [((1, "ddp"), (2, "zero2")), ((4, "zero2"), (2, "ddp")), ((2, "ddp"), (4, "zero3")), ((4, "zero1"), (1, "ddp"))]
    for (n, strategy), (m, other) in moves:
        name = f"moved_{n}_{m}_{strategy}"
        process = subprocess.Popen(launch(n) + train(name, strategy), cwd=root, env=CLEAN | {"CALDERA_FAULT": "slow@step:2"},
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        metrics = work / name / "pretrain/metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)
        text, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGUSR1, (process.returncode, text[-3000:])
        assert f"stopped by signal {int(signal.SIGUSR1)} after saving" in text, text[-2000:]
        done = len(losses(name, "pretrain"))
        assert 2 <= done < STEPS, done
        text = run((launch(m) if m > 1 else [caldera]) + train(name, other))
        assert f"resumed after step {done}" in text, text[-3000:]
        same_curve("one", name)


def test_a_failing_rank_brings_all_down_with_its_name():
    cases = [("sigkill", 1, 2, 5, "rank 1 was killed by signal 9"), ("throw", 1, 2, 1, "thrown at step 3"),
             ("exit0", 0, 2, 5, "rank 0 left before the others"), ("sigstop", 1, 2, 5, "rank 1 has given no sign of life")]
    if options.full:
        cases += [("abort", 2, 3, 5, "rank 2 was killed by signal 6"), ("hang", 1, 3, 5, "rank 1 is stuck"),
                  ("sigstop", 0, 2, 5, "rank 0 has given no sign of life"), ("sigkill", 0, 4, 5, "rank 0 was killed by signal 9"),
                  ("throw", 0, 4, 1, "thrown at step 3")]
    for kind, rank, n, code, words in cases:
        text = run(launch(n) + train(f"down_{kind}_{rank}", "zero1", timeout_s=4), expect=code, fault=f"{kind}@step:3,rank={rank}", limit=60)
        last = text.strip().splitlines()[-1]
        error = text[text.rindex("error: "):]
        assert words in error, f"{kind} of rank {rank}: {text[-3000:]}"
        assert "at step" in error, error
        print(f"  {kind} of rank {rank} of {n}: {run.seconds:.1f} s: {last[:150]}")


def test_a_loss_that_is_not_finite_stops_all_ranks_at_the_same_step():
    text = run(launch(2) + train("nan"), expect=1, fault="nan@micro_batch:5,rank=1")
    assert "loss nan" in text and "not finite on rank 1" in text and "its samples:" in text, text[-2000:]
    steps = {line.split("error: ")[1].split(":")[0] for rank in (0, 1)
             for line in open(work / f"nan/logs/rank-{rank}.log") if line.startswith("error: step")}
    assert len(steps) == 1, steps


def test_a_slow_rank_is_reported():
    text = run(launch(2) + train("slow", "ddp", "--stage", "pretrain"), fault="slow@micro_batch:1,rank=1")
    assert "rank 1 is a straggler" in text, text[-3000:]


def test_a_full_disk_on_one_rank_is_said_and_the_old_checkpoint_stays():
    text = run(launch(2) + train("disk", "zero1"), expect=1, fault="enospc@save:3,rank=1")
    assert "No space left on device" in text and "rank 1" in text, text[-3000:]
    assert not (work / "disk/pretrain/latest").exists()
    run(launch(2) + train("disk", "zero1"))


def test_torchrun_and_mpirun_start_it_unchanged():
    torchrun = root / ".deps/venv/bin/torchrun"
    if torchrun.exists() and subprocess.run([torchrun, "--help"], capture_output=True).returncode == 0:
        text = run([torchrun, "--nproc-per-node=2", "--no-python", "--master-port=29611", caldera, *train("torchrun", "zero1", "--stage", "pretrain")])
        assert "2 ranks on 1 machine, gloo, started by torchrun" in text, text[-3000:]
    else:
        print("  skipped: no torchrun in .deps/venv")
    mpirun = shutil.which("mpirun")
    if mpirun:
        root_options = ["--allow-run-as-root"] if os.getuid() == 0 else []
        text = run([mpirun, *root_options, "--oversubscribe", "-np", "2", caldera, *train("mpirun", "zero1", "--stage", "pretrain")])
        assert "2 ranks on 1 machine, gloo, started by mpirun" in text, text[-3000:]
    else:
        print("  skipped: no mpirun on this machine (Debian: openmpi-bin)")


try:
    subprocess.run([caldera, "data", "make-scenes", "--out", work / "data", "--num-train", "40", "--num-test", "4", "--seed", "3"],
                   check=True, cwd=root, stderr=subprocess.DEVNULL, env=CLEAN)
    for name, test in list(globals().items()):
        if not name.startswith("test_") or options.only not in name:
            continue
        began = time.monotonic()
        print(name, flush=True)
        test()
        print(f"  passed in {time.monotonic() - began:.1f} s", flush=True)
finally:
    shutil.rmtree(work, ignore_errors=True)
