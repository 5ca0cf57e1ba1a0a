#!/usr/bin/env python3
"""Both stages, and the second one with LoRA, against transformers and PEFT, number by number: from one and the same start, 20 AdamW
steps must give the losses that LlavaForConditionalGeneration gives on the same samples (within 1e-4 relative), `caldera score` must
give its per-sample losses (1e-4), and final/ must load with no missing or unexpected keys and give its logits' losses (1e-4).
PEFT loads the adapter that Caldera wrote, and Caldera the one that PEFT saved. Usage: trajectory.py CALDERA"""
import json, pathlib, random, subprocess, sys, tempfile

import numpy, torch
from peft import PeftModel
from PIL import Image
from transformers import (CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM,
                          LlavaForConditionalGeneration, get_scheduler)

torch.set_num_threads(1)
caldera = str(pathlib.Path(sys.argv[1]).resolve())
root = pathlib.Path(__file__).resolve().parents[2]
tokenizer = root / "checkpoints/scenes/language_model"
STEPS = 20


def make_parts(work):
    """A tower and a decoder of odd sizes with random weights, as HF folders."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=48, intermediate_size=112, num_hidden_layers=3, num_attention_heads=3, image_size=56,
                              patch_size=14, projection_dim=48)
    CLIPVisionModel(vision).save_pretrained(work / "tower")
    text = LlamaConfig(hidden_size=96, intermediate_size=176, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
                       vocab_size=640, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=False)
    LlamaForCausalLM(text).save_pretrained(work / "decoder")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (work / "decoder" / name).write_bytes((tokenizer / name).read_bytes())


def make_data(work):
    rng = random.Random(0)
    words = "red green blue circle square star top left bottom right and a the is there yes no two three".split()
    (work / "images").mkdir()
    captions, dialogues = [], []
    for i in range(8):
        size = (rng.randint(40, 90), rng.randint(40, 90))
        pixels = numpy.random.default_rng(i).integers(0, 255, (size[1], size[0], 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(work / "images" / f"{i}.png")
        text = lambda n: " ".join(rng.choice(words) for _ in range(n))
        captions.append({"id": f"c{i}", "image": f"{i}.png", "conversations": [
            {"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": text(rng.randint(4, 14)) + "."}]})
        turns = []
        for turn in range(rng.randint(1, 3)):
            turns += [{"from": "human", "value": ("<image>\n" if turn == 0 and i != 5 else "") + text(5) + "?"},
                      {"from": "gpt", "value": text(rng.randint(1, 6))}]
        dialogues.append({"id": f"d{i}", **({"image": f"{i}.png"} if i != 5 else {}), "conversations": turns})
    json.dump(captions, open(work / "captions.json", "w"))
    json.dump(dialogues, open(work / "dialogues.json", "w"))


def stage(work, name, data, template, trainable, lr):
    return {"name": name, "trainable": trainable, "global_batch_size": 8, "max_tokens_per_micro_batch": 150, "max_steps": STEPS,
            "data": {"data_path": f"{work}/{data}.json", "image_folder": f"{work}/images", "conversation_template": template,
                     "image_aspect_ratio": "pad", "model_max_length": 512},
            "optimizer": {"learning_rate": lr, "warmup_ratio": 0.1, "weight_decay": 0.05, "max_grad_norm": 1.0}}


def train(work, output, stages):
    recipe = {"model": {"vision_tower": f"{work}/tower", "language_model": f"{work}/decoder"}, "stages": stages, "output": str(output),
              "seed": 3, "device": "cpu"}
    path = work / (output.name + ".yaml")
    json.dump(recipe, open(path, "w"))  # JSON is YAML
    subprocess.run([caldera, "train", path], check=True, stderr=subprocess.DEVNULL)


def losses(folder):
    return [row["loss"] for row in map(json.loads, open(folder / "metrics.jsonl")) if "loss" in row]


def load(folder):
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.eval()


def batches(work, model_folder, data, template):
    """The samples as Caldera tokenises them, expanded, with pixels from CLIPImageProcessor on PIL."""
    out = work / "preview.jsonl"
    subprocess.run([caldera, "data", "preview", "--data", work / f"{data}.json", "--images", work / "images", "--model", model_folder,
                    "--template", template, "--out", out], check=True, stderr=subprocess.DEVNULL)
    processor = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    fill = tuple(int(mean * 255) for mean in processor.image_mean)
    rows = []
    for record, row in zip(json.load(open(work / f"{data}.json")), map(json.loads, open(out))):
        ids, labels = [], []
        for token, label in zip(row["input_ids"], row["labels"]):
            repeat = row["num_image_tokens"] if token == -200 else 1
            ids += [token] * repeat
            labels += [label] * repeat
        pixels = None
        if "image" in record:
            image = Image.open(work / "images" / record["image"]).convert("RGB")
            square = Image.new("RGB", (max(image.size),) * 2, fill)
            square.paste(image, ((max(image.size) - image.width) // 2, (max(image.size) - image.height) // 2))
            pixels = processor(square, return_tensors="pt")["pixel_values"]
        rows.append((torch.tensor([ids]), torch.tensor([labels]), pixels))
    return rows


def loss_sums(model, rows, vocab):
    """Per sample: sum of the negative log likelihood, and the number of supervised tokens. Rows of the vocabulary beyond `vocab`
    only pad the file (room for the placeholder's id)."""
    out = []
    for ids, labels, pixels in rows:
        ids = torch.where(ids == -200, model.config.image_token_id, ids)
        logits = model(input_ids=ids, pixel_values=pixels).logits[0, :-1, :vocab]
        target = labels[0, 1:]
        out.append((torch.nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum"), int((target != -100).sum())))
    return out


def reference(model, rows, trainable, lr, vocab):
    """Trains the parts named, or what already trains where none is (an adapter's model). `lr` may be a pair: the projector's second."""
    if trainable:
        for name, parameter in model.named_parameters():
            part = "projector" if "projector" in name else "vision_tower" if "vision_tower" in name else "language_model"
            parameter.requires_grad_(part in trainable)
    lr, projector_lr = lr if isinstance(lr, tuple) else (lr, lr)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([
        {"params": [p for n, p in model.named_parameters() if p.requires_grad and ("projector" in n) == is_projector and
                    (p.dim() >= 2) == decays], "weight_decay": 0.05 if decays else 0.0, "lr": projector_lr if is_projector else lr}
        for is_projector in (True, False) for decays in (True, False)])
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=STEPS)
    out = []
    for _ in range(STEPS):
        sums = loss_sums(model, rows, vocab)
        loss = sum(s for s, _ in sums) / sum(n for _, n in sums)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        out.append(loss.item())
    return out


def worst(what, ours, theirs, bound):
    error = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    print(f"{what}: worst relative difference {error:.1e} (bound {bound:.0e}); last {ours[-1]:.6f} against {theirs[-1]:.6f}")
    assert error <= bound, what


with tempfile.TemporaryDirectory(prefix="caldera_parity_") as name:
    work = pathlib.Path(name)
    make_parts(work)
    make_data(work)
    pretrain = lambda lr: stage(work, "pretrain", "captions", "plain", ["projector"], lr)
    finetune = lambda lr: stage(work, "finetune", "dialogues", "v1", ["projector", "language_model"], lr)
    train(work, work / "start", [dict(pretrain(1e-12), max_steps=1)])  # its first step has learning rate 0
    train(work, work / "run", [pretrain(5e-3), finetune(2e-3)])
    vocab = 640

    start = load(work / "start/pretrain/final")
    rows = batches(work, work / "start", "captions", "plain")
    worst("stage 1, 20 steps", losses(work / "run/pretrain"), reference(start, rows, ["projector"], 5e-3, vocab), 1e-4)

    middle = load(work / "run/pretrain/final")
    rows = batches(work, work / "run", "dialogues", "v1")
    worst("stage 2, 20 steps", losses(work / "run/finetune"), reference(middle, rows, ["projector", "language_model"], 2e-3, vocab), 1e-4)

    def export(model, form, out, *more):
        subprocess.run([caldera, "export", "--model", model, "--format", form, "--out", out, *more], check=True, stderr=subprocess.DEVNULL)

    def score(model, *more):
        subprocess.run([caldera, "score", "--model", model, "--data", work / "dialogues.json", "--images", work / "images", "--template",
                        "v1", "--dtype", "float32", "--out", work / "score.jsonl", *more], check=True, stderr=subprocess.DEVNULL)
        return [json.loads(line)["nll_sum"] for line in open(work / "score.jsonl")]

    @torch.no_grad()
    def sums(model):
        return [s.item() for s, _ in loss_sums(model.eval(), rows, vocab)]

    worst("score of final/", score(work / "run"), sums(load(work / "run/finetune/final")), 1e-4)

    # LoRA: the first step's learning rate is 0, so a run of one step gives the adapter that a run of twenty begins with.
    for rslora, targets in ((False, []), (True, ["q_proj", "v_proj", "down_proj"])):
        lora = {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0, "use_rslora": rslora, "target_modules": targets}
        adapt = dict(finetune(4e-3), lora=lora)
        adapt["optimizer"] = dict(adapt["optimizer"], mm_projector_lr=1e-3)
        name = f"lora_{int(rslora)}"
        train(work, work / f"{name}_start", [pretrain(5e-3), dict(adapt, max_steps=1)])
        train(work, work / name, [pretrain(5e-3), adapt])
        model = PeftModel.from_pretrained(load(work / "run/pretrain/final"), work / f"{name}_start/finetune/final/adapter",
                                          is_trainable=True)
        trains = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trains and all("lora_" in n or "multi_modal_projector" in n for n in trains), trains
        assert not any("lora_" in n and "vision_tower" in n for n, _ in model.named_parameters())
        final = work / name / "finetune/final"
        assert len(trains) == 4 + 2 * 3 * (len(targets) or 7), trains
        worst(f"LoRA{' (rslora, three modules)' if rslora else ''}, 20 steps", losses(work / name / "finetune"),
              reference(model, rows, None, (4e-3, 1e-3), vocab), 1e-4)

        trained = PeftModel.from_pretrained(load(work / "run/pretrain/final"), final / "adapter")
        expected = sums(trained)
        worst("final/ merged, against PEFT on final/adapter", score(final), expected, 1e-4)
        worst("final/adapter, its base found", score(final / "adapter"), expected, 1e-4)
        trained.save_pretrained(work / name / "saved")
        worst("what PEFT saved, read by Caldera", score(work / name / "saved", "--model-base", work / "run/pretrain"), expected, 1e-4)

        export(work / name, "peft", work / name / "peft")
        config = json.load(open(work / name / "peft/adapter_config.json"))
        again = PeftModel.from_pretrained(load(config["base_model_name_or_path"]), work / name / "peft")
        worst("export --format peft, loaded by PEFT", sums(again), expected, 1e-4)
        worst("export --format peft, loaded by Caldera", score(work / name / "peft"), expected, 1e-4)
        export(work / name / "peft", "peft", work / name / "merged", "--merge")
        worst("export --format peft --merge", sums(load(work / name / "merged")), expected, 1e-4)
        export(work / name, "peft", work / name / "decoder", "--part", "language_model")
        config = json.load(open(work / name / "decoder/adapter_config.json"))
        alone = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(config["base_model_name_or_path"]), work / name / "decoder")
        ids = rows[0][0].clamp_min(0)
        with torch.no_grad():
            whole = trained.base_model.model.model.language_model(inputs_embeds=alone.get_input_embeddings()(ids)).last_hidden_state
            ours = alone.base_model.model.model(input_ids=ids).last_hidden_state
        assert torch.equal(whole, ours)
print("equal to transformers and PEFT")
