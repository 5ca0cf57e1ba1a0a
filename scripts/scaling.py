#!/usr/bin/env python3
"""Renews the tables of docs/scaling.md and docs/images/scaling.svg: `caldera plan --nodes` on LLaVA-1.5 7B and 13B, from their shapes
alone (no weights, no pictures), with made-up conversations as long as LLaVA's. Needs nothing but Python and build/caldera."""
import json, math, os, pathlib, random, shutil, subprocess, tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
CALDERA = os.environ.get("CALDERA", ROOT / "build/caldera")
NODES = [1, 2, 4, 8, 16, 32, 64, 128]
SHAPES = {"7B": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
          "13B": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)}
TOWER = dict(model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
             image_size=336, patch_size=14)
SAMPLES = 16384


def make_inputs(work):
    for name, shape in SHAPES.items():
        folder = work / name
        folder.mkdir()
        config = dict(model_type="llama", num_key_value_heads=shape["num_attention_heads"], vocab_size=32000, max_position_embeddings=4096,
                      rms_norm_eps=1e-5) | shape
        (folder / "config.json").write_text(json.dumps(config))
        for file in ("tokenizer.model", "tokenizer_config.json"):  # any will do: a word below is one token of it
            shutil.copy(ROOT / "checkpoints/scenes/language_model" / file, folder)
    (work / "tower").mkdir()
    (work / "tower/config.json").write_text(json.dumps(TOWER))
    # Nine in ten with a picture of 576 tokens; text log-normal, some 270 tokens in the mean: about 850 a sample.
    generator = random.Random(0)
    records = []
    for i in range(SAMPLES):
        tokens = min(1400, int(generator.lognormvariate(math.log(180), 0.8)))
        answer = " ".join(["red"] * max(1, tokens // 2))
        record = {"id": str(i), "conversations": [{"from": "human", "value": "red " * max(1, tokens // 2)}, {"from": "gpt", "value": answer}]}
        if generator.random() < 0.9:
            record["image"] = "x.jpg"
            record["conversations"][0]["value"] = "<image>\n" + record["conversations"][0]["value"]
        records.append(record)
    (work / "data.json").write_text(json.dumps(records))


def plan(work, size, strategy, batch, nodes):
    recipe = ROOT / f"configs/llava-v1.5/{size.lower()}.yaml"
    data = [f"stages.{stage}.data.data_path={work}/data.json" for stage in ("pretrain", "finetune")]
    text = subprocess.run([CALDERA, "plan", recipe, "--json", "--nodes", ",".join(map(str, nodes)), "--gpu", "h100", "--stage", "finetune",
                           *data, f"model.language_model={work / size}", f"model.vision_tower={work}/tower",
                           f"distributed.strategy={strategy.split()[0]}",
                           f"distributed.shard_within={'node' if 'within' in strategy else 'world'}", f"stages.finetune.global_batch_size={batch}"],
                          check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def markdown(rows):
    lines = ["| GPUs | samples a GPU | imbalance | compute ms | update ms | exposed ms | tokens/s | efficiency | GB sent | GB held |", "|" + " ---: |" * 10]
    for r in rows:
        lines.append(f"| {r['num_ranks']} | {r['samples_per_rank']:.1f} | {r['imbalance']:.2f} | {1e3 * r['compute_s']:.0f} | {1e3 * r['update_s']:.0f} "
                     f"| {1e3 * r['exposed_s']:.0f} | {r['tokens_per_second']:,.0f} | {100 * r['efficiency']:.0f} % | {r['sent_bytes'] / 1e9:.1f} "
                     f"| {r['memory_bytes'] / 1e9:.0f} |")
    return "\n".join(lines)


def plot(curves, path):
    """GPUs (log) against efficiency, one line a curve."""
    width, height, left, bottom = 720, 380, 60, 330
    x = lambda gpus: left + (math.log2(gpus) - 3) / 7 * (width - left - 170)
    y = lambda percent: bottom - percent / 100 * (bottom - 30)
    colours = ["#1b6ca8", "#d1495b", "#e8a33d", "#2e933c", "#8f5aa8"]
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
             f'<rect width="{width}" height="{height}" fill="white"/>']
    for percent in range(0, 101, 20):
        parts.append(f'<path d="M{left} {y(percent):.0f}H{x(1024):.0f}" stroke="#ddd"/>'
                     f'<text x="{left - 8}" y="{y(percent) + 4:.0f}" text-anchor="end">{percent} %</text>')
    for gpus in (8 * n for n in NODES):
        parts.append(f'<text x="{x(gpus):.0f}" y="{bottom + 20}" text-anchor="middle">{gpus}</text>')
    parts.append(f'<text x="{x(96):.0f}" y="{bottom + 40}" text-anchor="middle">GPUs, 8 a machine</text>')
    for i, (name, rows) in enumerate(curves.items()):
        points = [(x(row["num_ranks"]), y(100 * row["efficiency"])) for row in rows]
        line = "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
        parts.append(f'<path d="M{line}" fill="none" stroke="{colours[i]}" stroke-width="2"/>')
        parts.append(f'<text x="{width - 160}" y="{60 + 20 * i}" fill="{colours[i]}">{name}</text>')
    path.write_text("\n".join(parts + ["</svg>", ""]))


def main():
    text, curves = [], {}
    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        make_inputs(work)
        for size in SHAPES:
            rows = plan(work, size, "zero2", 128, NODES[:5])
            text += [f"**{size}, stage 2 as published: 128 samples a step, `zero2`**", markdown(rows)]
            for strategy in ("zero2", "zero3", "zero3 within node")[:3 if size == "7B" else 2]:
                rows = [plan(work, size, strategy, 16 * 8 * n, [n])[0] for n in NODES]
                curves[f"{size} {strategy}"] = rows
                text += [f"**{size}, stage 2, 16 samples a GPU, `{strategy}`**", markdown(rows)]
    doc = ROOT / "docs/scaling.md"
    before, _, rest = doc.read_text().partition("<!-- planned -->\n")
    after = rest.partition("<!-- end -->")[2]
    doc.write_text(before + "<!-- planned -->\n" + "\n\n".join(text) + "\n<!-- end -->" + after)
    plot(curves, ROOT / "docs/images/scaling.svg")


if __name__ == "__main__":
    main()
