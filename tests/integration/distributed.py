#!/usr/bin/env python3
"""Several ranks, real processes on one machine. Usage: distributed.py CALDERA [--full] [--only NAME]

The same curve and weights from any number of ranks under any strategy; resuming, also on another number of ranks; ranks that die, throw,
stop or leave bring the others down with their name; a signal saves on all ranks; torchrun and mpirun start the same binary unchanged.
Faults come at counted points (CALDERA_FAULT), never by the clock. --full: all combinations, a quarter of an hour."""
import itertools, json, os, random, re, shutil, signal, subprocess, time

from ranks import CLEAN, LORA, ROOT, Runs, Table, arguments, run_tests

options = arguments().parse_args()
runs = Runs(options.caldera)
table = Table()
STEPS = 6  # a stage
NODE = "zero3 within node"


def straight(name, n, *arguments, **settings):
    """A run that several tests compare with, made once."""
    if not (runs.work / name).exists():
        runs.run(runs.start(n) + runs.train(name, *arguments, **settings))
    return name


def test_any_number_of_ranks_gives_the_same_curve():
    straight("one", 1)
    assert all("comm_bytes" not in line for line in runs.metrics("one", "pretrain"))
    cases = [(2, "ddp"), (2, "zero1"), (2, "zero2"), (4, "zero3")]
    if options.full:
        cases += [(4, "ddp"), (4, "zero1"), (3, "zero2"), (4, "zero2"), (2, "zero3"), (3, "zero3")]
    for n, strategy in cases:
        text = runs.run(runs.start(n) + runs.train(f"{strategy}_{n}", strategy))
        assert f"{n} ranks on 1 machine, gloo, started by caldera launch; {strategy}" in text, text[:2000]
        runs.same_curve("one", f"{strategy}_{n}")
        # The projector's gradient, the step's report; where parts are shared the new weights; of zero3 more.
        steps = [line for line in runs.metrics(f"{strategy}_{n}", "pretrain") if "loss" in line]
        counts = {line["comm_collectives"] for line in steps}
        assert counts == {"ddp": {2}, "zero1": {3}}.get(strategy, counts), counts
        assert min(line["comm_bytes"] for line in steps) > 4 * 1000
        for rank in range(n):
            assert (runs.work / f"{strategy}_{n}/logs/rank-{rank}.log").exists()


def test_a_single_rank_in_a_group():
    """CALDERA_GROUP_OF_ONE: what a machine with one GPU can try of NCCL."""
    straight("one", 1)
    for strategy in ("ddp", "zero2", "zero3"):
        name = f"{strategy}_1"
        text = runs.run(["env", "CALDERA_GROUP_OF_ONE=1", *runs.start(1, "--max-restarts", "0"), *runs.train(name, strategy)])
        assert f"1 rank on 1 machine, gloo, started by caldera launch; {strategy}" in text, text[:2000]
        runs.same_curve("one", name)
        assert all(line["comm_collectives"] > 0 for line in runs.metrics(name, "pretrain") if "loss" in line)


def test_plans_tell_what_ranks_send():
    """`caldera plan --nodes`: collectives and bytes of a step, equal to what the first of the real ranks counts."""
    for nodes, n, strategy in [(1, 2, "ddp"), (1, 3, "zero1"), (1, 2, "zero2"), (1, 4, "zero3"), (2, 2, NODE)]:
        name = f"sent_{nodes}_{n}_{strategy.split()[0]}"
        arguments = runs.train(name, strategy, max_tokens_per_micro_batch=10000, max_steps=2)
        if nodes == 1:
            runs.run(runs.start(n) + arguments)
        else:
            runs.run_on_two_machines(n, arguments)
        planned = runs.run([runs.caldera, "plan", *arguments[1:], "--json", "--nodes", str(nodes), "--gpus-per-node", str(n)])
        for row in map(json.loads, planned.splitlines()):
            sent = {(line["comm_collectives"], line["comm_bytes"]) for line in runs.metrics(name, row["stage"]) if "loss" in line}
            assert sent == {(row["num_collectives"], row["num_bytes"])}, (name, row, sent)


def test_adapters_too():
    """Also on weights in 4 bits, which lie whole on every rank."""
    for name, more in (("lora", []), ("qlora", ["stages.finetune.lora.load_in_4bit=true"])):
        arguments = LORA + more
        straight(f"{name}_one", 1, "ddp", *arguments)
        runs.run(runs.start(2) + runs.train(f"{name}_two", "zero3", *arguments))
        runs.same_curve(f"{name}_one", f"{name}_two")


def test_parts_within_a_machine():
    straight("one", 1)
    for strategy in ("zero1", "zero2", "zero3") if options.full else ("zero3",):
        name = f"nodes_{strategy}"
        text = runs.run_on_two_machines(2, runs.train(name, f"{strategy} within node"))
        assert f"4 ranks on 2 machines, gloo, started by caldera launch; {strategy} within each machine" in text, text[:2000]
        runs.same_curve("one", name)
        parts = sorted(path.name for path in (runs.work / name / "finetune/checkpoints/step-00000004").glob("optimizer*"))
        assert parts == ["optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"], parts


def test_parts_within_a_machine_go_on_full():
    """Cut: the same bits on as many machines, the same curve on one rank, on four of one machine, and back."""
    straight("one", 1)
    runs.run_on_two_machines(2, runs.train("nodes_straight", NODE))
    for name, m, other in (("same", 4, NODE), ("to_one", 1, "ddp"), ("to_four", 4, "zero2")):
        runs.run_on_two_machines(2, runs.train(f"nodes_{name}", NODE), expect=5, fault="sigkill@step:4,rank=3")
        if other == NODE:
            runs.run_on_two_machines(2, runs.train(f"nodes_{name}", NODE))
            runs.same_bits("nodes_straight", f"nodes_{name}")
        else:
            runs.run(runs.start(m) + runs.train(f"nodes_{name}", other))
            runs.same_curve("one", f"nodes_{name}")
    runs.run(runs.start(1) + runs.train("to_nodes"), expect=-signal.SIGKILL, fault="sigkill@step:10")
    runs.run_on_two_machines(2, runs.train("to_nodes", NODE))
    runs.same_curve("one", "to_nodes")


def test_a_killed_rank_and_restart_change_no_bit():
    # Killed within a micro-batch of rank 1; the launcher starts again from the last checkpoint. Written in the background.
    text = runs.run(runs.start(2, "--max-restarts", "2") + runs.train("killed", "zero2", async_save="true"), fault="sigkill@micro_batch:9,rank=1")
    assert "rank 1 was killed by signal 9" in text and "starting again from the last checkpoint (1 of 2)" in text, text[-3000:]
    straight("zero2_2", 2, "zero2")
    runs.same_bits("zero2_2", "killed")


# --- Where a run is cut, in a stage of 8 steps: 40 samples, 14 a step, so an epoch ends after steps 3 and 6; each sample is a micro-batch.
CUTS = {"after step 1": "step:2", "between micro-batches": "micro_batch:33", "at an epoch's end": "step:4", "a step after it": "step:5",
        "before the last step": "step:8"}
RESUME = dict(global_batch_size=14, max_steps=8, save_steps=1, max_tokens_per_micro_batch=1)


def resume_run(output, stage, is_lora, n, **more):
    """One stage; the strategies and dtypes are spread over what else differs."""
    strategy = {(False, "pretrain"): "zero1", (False, "finetune"): "zero2", (True, "pretrain"): "ddp", (True, "finetune"): "zero3"}[is_lora, stage]
    words = ["--stage", stage]
    if stage == "pretrain":
        words += ["stages.pretrain.eval_steps=1", "stages.pretrain.save_best=true"]
    if is_lora:  # in the first stage too
        words += LORA + [word.replace("finetune", "pretrain") for word in LORA] + ["stages.pretrain.trainable=[projector,language_model]"]
    dtype = "bfloat16" if is_lora == (n == 2) else "float32"
    return runs.start(n) + runs.train(output, strategy, *words, **RESUME, dtype=dtype, **more)


def check_resumed(stage, is_lora, n, cut, async_save):
    uncut = f"uncut_{'lora' if is_lora else 'full'}_{n}"
    for earlier in ("pretrain", "finetune")[:1 + (stage == "finetune")]:
        if not (runs.work / uncut / earlier / "final").exists():
            runs.run(resume_run(uncut, earlier, is_lora, n))
    name = f"cut_{stage}_{uncut}_{list(CUTS).index(cut)}"
    if stage == "finetune":
        (runs.work / name).mkdir()
        (runs.work / name / "pretrain").symlink_to(runs.work / uncut / "pretrain")
    point = CUTS[cut] if n == 1 else CUTS[cut].replace("micro_batch:33", "micro_batch:18")
    command = resume_run(name, stage, is_lora, n, async_save=str(async_save).lower())
    runs.run(command, expect=5 if n > 1 else -signal.SIGKILL, fault=f"sigkill@{point},rank={n - 1}")
    cut_after = len(runs.losses(name, stage))
    text = runs.run(command)
    assert async_save or "resumed after step" in text, text[-3000:]
    runs.same_bits(uncut, name, [stage])
    shutil.rmtree(runs.work / name)
    print(f"  {stage}, {'LoRA' if is_lora else 'full'}, {n} rank{'s' if n > 1 else ''}, cut {cut} (after step {cut_after}), "
          f"{'async' if async_save else 'sync'} save: the same bits", flush=True)


def test_a_cut_run_goes_on_with_the_same_bits():
    cases = list(itertools.product(("pretrain", "finetune"), (False, True), (1, 2), CUTS))
    if not options.full:
        cases = [("pretrain", False, 1, "a step after it"), ("finetune", True, 2, "between micro-batches")]
    for i, (stage, is_lora, n, cut) in enumerate(cases):
        check_resumed(stage, is_lora, n, cut, async_save=(i + i // 5) % 2 == 1)
    print(f"  {len(cases)} combinations")


def test_a_signal_saves_and_another_number_of_ranks_goes_on():
    straight("one", 1)
    moves = [((2, "zero3"), (1, "ddp"))]
    if options.full:
        moves += [((1, "ddp"), (2, "zero2")), ((4, "zero2"), (2, "ddp")), ((2, "ddp"), (4, "zero3")), ((4, "zero1"), (1, "ddp")),
                  ((2, "zero3"), (2, "ddp")), ((2, "zero1"), (4, "zero1"))]
    for (n, strategy), (m, other) in moves:
        name = f"moved_{n}_{m}_{strategy}_{other}"
        process = subprocess.Popen(runs.start(n) + runs.train(name, strategy), cwd=ROOT, env=CLEAN | {"CALDERA_FAULT": "slow@step:2"},
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        metrics = runs.work / name / "pretrain/metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)
        text, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGUSR1, (process.returncode, text[-3000:])
        assert f"stopped by signal {int(signal.SIGUSR1)} after saving" in text, text[-2000:]
        done = len(runs.losses(name, "pretrain"))
        assert 2 <= done < STEPS, done
        text = runs.run(runs.start(m) + runs.train(name, other))
        assert f"resumed after step {done}" in text, text[-3000:]
        runs.same_curve("one", name)


# --- Ranks that fail: the launcher's exit code, and what its last error says.
FAILURES = {"sigkill": (5, "rank {} was killed by signal 9"), "abort": (5, "rank {} was killed by signal 6"), "throw": (1, "thrown at"),
            "exit0": (5, "rank {} left before the others"), "sigstop": (5, "rank {} has given no sign of life"), "hang": (5, "rank {} is stuck")}


def check_failure(kind, rank, n, point="step:3", strategy="zero1", **settings):
    code, words = FAILURES[kind]
    name = f"down_{kind}_{rank}_{n}"
    text = runs.run(runs.start(n) + runs.train(name, strategy, timeout_s=6, **settings), expect=code, fault=f"{kind}@{point},rank={rank}", limit=60)
    error = text[text.rindex("error: "):]
    what = f"{kind} of rank {rank} of {n} at {point} under {strategy}"
    assert words.format(rank) in error and f"rank {rank}" in error, f"{what}: {text[-3000:]}"
    table.add(what, f"{kind}@{point}", runs.seconds)
    print(f"    {text.strip().splitlines()[-1][:110]}", flush=True)
    shutil.rmtree(runs.work / name)


def test_a_failing_rank_brings_all_down_with_its_name():
    for kind, rank, n in [("sigkill", 1, 2), ("throw", 1, 2), ("exit0", 0, 2), ("sigstop", 1, 2)] + options.full * [("hang", 1, 3), ("sigstop", 0, 2)]:
        check_failure(kind, rank, n)


def test_a_hundred_failures_full():
    rng = random.Random(1)
    wrong = []
    for i in range(20):
        for kind in ("sigkill", "sigstop", "throw", "exit0", "abort"):
            n = rng.choice((2, 3, 4))
            rank, strategy = rng.randrange(n), rng.choice(("ddp", "zero1", "zero2", "zero3"))
            point = rng.choice((f"step:{rng.randint(1, 9)}", f"micro_batch:{rng.randint(1, 12)}", f"save:{rng.randint(1, 8)}"))
            if point.startswith("save") and strategy == "ddp":
                rank = 0  # the others save nothing there
            settings = dict(global_batch_size=8, save_steps=1, async_save=rng.choice(("true", "false")))
            try:
                check_failure(kind, rank, n, point, strategy, **settings)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                wrong.append(f"{kind} of rank {rank} of {n} at {point} under {strategy}, {settings}: {error}")
                print(f"  WRONG: {wrong[-1]}", flush=True)
                shutil.rmtree(runs.work / f"down_{kind}_{rank}_{n}", ignore_errors=True)
    assert not wrong, f"{len(wrong)} of 100"


def test_a_loss_that_is_not_finite_stops_all_ranks_at_the_same_step():
    text = runs.run(runs.start(2) + runs.train("nan"), expect=1, fault="nan@micro_batch:5,rank=1")
    assert "loss nan" in text and "not finite on rank 1" in text and "its samples:" in text, text[-2000:]
    steps = {line.split("error: ")[1].split(":")[0] for rank in (0, 1)
             for line in open(runs.work / f"nan/logs/rank-{rank}.log") if line.startswith("error: step")}
    assert len(steps) == 1, steps


def test_a_slow_rank_is_reported_and_not_ended():
    # Half a second more a micro-batch: far more than ten times as long.
    text = runs.run(runs.start(2) + runs.train("slow", "ddp", "--stage", "pretrain"), fault="slow@micro_batch:1,rank=1")
    found = re.search(r"rank 1 is a straggler: (\d+) ms a step, the others (\d+) ms; it costs (\d+) ms a step", text)
    assert found, text[-3000:]
    own, others, cost = map(int, found.groups())
    assert own > 500 and abs(cost - (own - others)) <= 1, found.group()
    print(f"  {found.group()}")
    assert len(runs.losses("slow", "pretrain")) == STEPS


def test_a_full_disk_on_one_rank_is_said_and_the_old_checkpoint_stays():
    text = runs.run(runs.start(2) + runs.train("disk", "zero1"), expect=1, fault="enospc@save:3,rank=1")
    assert "No space left on device" in text and "rank 1" in text, text[-3000:]
    assert not (runs.work / "disk/pretrain/latest").exists()
    runs.run(runs.start(2) + runs.train("disk", "zero1"))


def test_torchrun_starts_it_unchanged():
    torchrun = ROOT / ".deps/venv/bin/torchrun"
    if not torchrun.exists() or subprocess.run([torchrun, "--help"], capture_output=True).returncode != 0:
        return print("  skipped: no torchrun in .deps/venv")
    text = runs.run([torchrun, "--nproc-per-node=2", "--no-python", "--master-port=29611", runs.caldera,
                     *runs.train("torchrun", "zero1", "--stage", "pretrain")])
    assert "2 ranks on 1 machine, gloo, started by torchrun" in text, text[-3000:]


def test_mpirun_starts_it_unchanged():
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        return print("  skipped: no mpirun on this machine (Debian: openmpi-bin)")
    as_root = ["--allow-run-as-root"] if os.getuid() == 0 else []
    start = [mpirun, *as_root, "--oversubscribe", "-np", "2", runs.caldera]
    text = runs.run(start + runs.train("mpirun", "zero1", "--stage", "pretrain"))
    assert "2 ranks on 1 machine, gloo, started by mpirun" in text, text[-3000:]
    straight("one", 1)
    runs.same_curve("one", "mpirun", ["pretrain"])


try:
    run_tests(dict(globals()), options)
    table.show()
finally:
    runs.remove()
