#!/usr/bin/env python3
"""Folders that others wrote, in every layout: per-sample losses of `caldera score` are those of transformers on the same weights (within
1e-5 relative, float32). Models are of odd sizes with random weights; of the samples some have two pictures, some none.
Usage: folders.py CALDERA"""
import functools, json, os, pathlib, random, shutil, subprocess, sys, tempfile

import numpy, safetensors.torch, torch
from PIL import Image
from transformers import (CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM,
                          LlavaConfig, LlavaForConditionalGeneration, LlavaImageProcessorPil, SiglipConfig, SiglipImageProcessor,
                          SiglipModel, SiglipVisionConfig, SiglipVisionModel)

torch.set_num_threads(1)
BOUND = 1e-5
caldera = str(pathlib.Path(sys.argv[1]).resolve())
root = pathlib.Path(__file__).resolve().parents[2]
tokenizer = root / "checkpoints/scenes/language_model"
IMAGE_TOKEN = 530
CLIP = CLIPVisionConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=3, image_size=45, patch_size=11,
                        projection_dim=40)
SIGLIP = SiglipVisionConfig(hidden_size=44, intermediate_size=76, num_hidden_layers=3, num_attention_heads=2, image_size=45, patch_size=11)
TEXT = LlamaConfig(hidden_size=60, intermediate_size=88, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
                   vocab_size=700, max_position_embeddings=512, tie_word_embeddings=False)
worst = {}


def randomise(model):
    """Livelier than fresh weights, so that every tensor has a say."""
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.12)
    return model.eval()


def make_data(work):
    rng, words = random.Random(0), "red green blue circle square star top left and the is there yes no two three".split()
    text = lambda n: " ".join(rng.choice(words) for _ in range(n))
    (work / "images").mkdir()
    for i, (width, height) in enumerate([(60, 45), (45, 45), (31, 90), (100, 20), (64, 200), (3, 7)]):
        pixels = numpy.random.default_rng(i).integers(0, 255, (height, width, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(work / "images" / f"{i}.png")
    records = []
    for i, pictures in enumerate([[0], [1, 2], [], [3, 0], [4], [5, 1, 2]]):
        questions = [text(4) + "?" for _ in range(2)]
        if pictures:  # the first picture before its question, the others within and behind
            questions[0] = "<image>\n" + questions[0]
        if len(pictures) > 1:
            questions[1] = "see <image> " + questions[1] + " <image>" * (len(pictures) - 2)
        turns = [{"from": ("human", "gpt")[j % 2], "value": value} for j, value in enumerate([questions[0], text(5), questions[1], text(3)])]
        record = {"id": str(i), "conversations": turns}
        if pictures:
            record["image"] = [f"{p}.png" for p in pictures] if len(pictures) > 1 else f"{pictures[0]}.png"
        records.append(record)
    (work / "data.json").write_text(json.dumps(records))
    return records


def add_tokenizer(folder):
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    return folder


def score(work, folder, environment=None):
    out = work / "score.jsonl"
    subprocess.run([caldera, "score", "--model", folder, "--data", work / "data.json", "--images", work / "images", "--template", "v1",
                    "--dtype", "float32", "--out", out], check=True, stderr=subprocess.DEVNULL, env={**os.environ, **(environment or {})})
    return [json.loads(line)["nll_sum"] for line in open(out)]


def reference(work, records, model, folder, processor, pad=False):
    """transformers' losses on the ids that `caldera data preview` states, with pixels from PIL and its own processor."""
    out = work / "preview.jsonl"
    subprocess.run([caldera, "data", "preview", "--data", work / "data.json", "--images", work / "images", "--model", folder, "--template",
                    "v1", "--out", out], check=True, stderr=subprocess.DEVNULL)
    losses = []
    for record, row in zip(records, map(json.loads, open(out)), strict=True):
        names = record.get("image", [])
        names = [names] if isinstance(names, str) else names
        assert row["input_ids"].count(-200) == len(names)
        per_image = row["num_image_tokens"] // max(1, len(names))
        ids, labels, pixels = [], [], None
        for token, label in zip(row["input_ids"], row["labels"]):
            repeat = per_image if token == -200 else 1
            ids += [model.config.image_token_id if token == -200 else token] * repeat
            labels += [label] * repeat
        if names:
            images = [Image.open(work / "images" / name).convert("RGB") for name in names]
            if pad:
                fill = tuple(int(mean * 255) for mean in processor.image_mean)
                squares = [Image.new("RGB", (max(image.size),) * 2, fill) for image in images]
                for square, image in zip(squares, images):
                    square.paste(image, ((square.width - image.width) // 2, (square.width - image.height) // 2))
                images = squares
            pixels = processor(images, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(labels)[1:], ignore_index=-100, reduction="sum").item())
    return losses


def compare(what, ours, theirs):
    error = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    worst[what] = error
    print(f"{what}: worst relative difference {error:.1e}", flush=True)


def classic(name):
    """transformers 5's name in memory, as 4.x named it in files."""
    for new, old in (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."),
                     ("model.multi_modal_projector.", "multi_modal_projector."),
                     ("model.vision_tower.", "vision_tower.vision_model.")):
        if name.startswith(new):
            return old + name[len(new):]
    raise KeyError(name)


def original(name):
    """As the original LLaVA names it."""
    name = classic(name)
    for new, old in (("language_model.", ""), ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
                     ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
                     ("vision_tower.", "model.vision_tower.vision_tower.")):
        if name.startswith(new):
            return old + name[len(new):]
    raise KeyError(name)


def write(folder, config, tensors, kind):
    """Weights as safetensors, as pytorch_model.bin, or as two shards of the latter."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if kind == "safetensors":
        safetensors.torch.save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    elif kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        names, files = list(tensors), [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        for i, file in enumerate(files):
            torch.save({name: tensors[name] for name in names[i::2]}, folder / file)
        index = {"metadata": {}, "weight_map": {name: files[i % 2] for i, name in enumerate(names)}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return add_tokenizer(folder)


def hf_folders(work, records):
    model = randomise(LlavaForConditionalGeneration(LlavaConfig(vision_config=CLIP, text_config=TEXT, image_token_index=IMAGE_TOKEN)))
    processor = CLIPImageProcessor(size={"shortest_edge": 45}, crop_size={"height": 45, "width": 45})
    saved = work / "saved"
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    theirs = reference(work, records, model, add_tokenizer(saved), processor)
    compare("HF, as transformers 5 saves it", score(work, saved), theirs)
    model.save_pretrained(work / "shards", max_shard_size="50KB")
    assert (work / "shards/model.safetensors.index.json").exists()
    compare("HF, in shards", score(work, add_tokenizer(work / "shards")), theirs)
    config, state = json.loads((saved / "config.json").read_text()), dict(model.state_dict())
    for kind in ("safetensors", "bin", "shards"):
        compare(f"HF, classic names, {kind}", score(work, write(work / "f", config, {classic(k): v for k, v in state.items()}, kind)), theirs)
    compare("HF, names of transformers 5", score(work, write(work / "f", config, state, "safetensors")), theirs)
    return model, state, theirs


def original_folders(work, records, model, state):
    """LLaVA v1.5's folders: pictures padded, the tower named by a folder, by HF's cache, or held."""
    config = {key: value for key, value in TEXT.to_dict().items() if key != "rope_parameters"} | {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "image_aspect_ratio": "pad", "mm_hidden_size": 48,
        "mm_projector_type": "mlp2x_gelu", "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "rope_theta": 10000.0,
        "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2, "mm_vision_tower": "openai/tiny", "use_mm_proj": True,
        "tokenizer_model_max_length": 2048, "image_grid_pinpoints": None, "mm_resampler_type": None}
    processor = CLIPImageProcessor(size={"shortest_edge": 45}, crop_size={"height": 45, "width": 45})
    whole = {original(name): tensor for name, tensor in state.items()}
    parts = {name: tensor for name, tensor in whole.items() if not name.startswith("model.vision_tower.")}
    tower = CLIPVisionModel(CLIP)
    tower.load_state_dict(model.model.vision_tower.state_dict())
    cache = work / "hub/models--openai--tiny"
    tower.save_pretrained(cache / "snapshots/abc")
    processor.save_pretrained(cache / "snapshots/abc")
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("abc")
    theirs = None
    for kind in ("bin", "shards", "safetensors"):
        folder = write(work / "f", config, parts, kind)
        if theirs is None:
            shutil.copytree(cache / "snapshots/abc", folder / "openai/tiny")
            theirs = reference(work, records, model, folder, processor, pad=True)
            compare("original LLaVA, bin, tower in a folder beside", score(work, folder), theirs)
            shutil.rmtree(folder / "openai")
        compare(f"original LLaVA, {kind}, tower in HF's cache", score(work, folder, {"HF_HUB_CACHE": str(work / "hub")}), theirs)
    randomise(tower).save_pretrained(work / "other_tower")  # wrong weights, which those in the file replace
    processor.save_pretrained(work / "other_tower")
    held = write(work / "f", config | {"model_type": "llava_llama", "mm_vision_tower": str(work / "other_tower")}, whole, "bin")
    compare("original LLaVA, tower in the same file", score(work, held), theirs)


def train_start(work, name, tower, decoder, projector, aspect="square", **model):
    """A model of parts as a recipe puts it together: one step with a learning rate of 0 (the warm-up's first)."""
    recipe = {"model": {"vision_tower": str(tower), "language_model": str(decoder), "pretrain_mm_mlp_adapter": str(projector), **model},
              "output": str(work / name), "device": "cpu",
              "stages": [{"name": "s", "trainable": ["projector"], "global_batch_size": 2, "max_steps": 1,
                          "data": {"data_path": f"{work}/data.json", "image_folder": f"{work}/images", "conversation_template": "v1",
                                   "image_aspect_ratio": aspect},
                          "optimizer": {"learning_rate": 1e-12, "warmup_ratio": 0.5}}]}
    (work / "recipe.yaml").write_text(json.dumps(recipe))
    subprocess.run([caldera, "train", work / "recipe.yaml"], check=True, stderr=subprocess.DEVNULL)
    return work / name / "s/final"


def parts(work, records, model, state):
    """A CLIPModel, a decoder and stage 1's mm_projector.bin; the same at other picture sizes; parts of a whole LLaVA's folder."""
    clip = CLIPModel(CLIPConfig(vision_config=CLIP, text_config=dict(hidden_size=16, intermediate_size=20, num_hidden_layers=1,
                                                                     num_attention_heads=2, vocab_size=9)))
    clip.vision_model.load_state_dict(model.model.vision_tower.state_dict())
    clip.save_pretrained(work / "clip")
    decoder = LlamaForCausalLM(TEXT)
    decoder.load_state_dict({name.replace("model.language_model.", "model."): tensor for name, tensor in state.items()
                             if "language_model" in name or name.startswith("lm_head")})
    decoder.save_pretrained(work / "decoder")
    add_tokenizer(work / "decoder")
    torch.save({original(name): tensor for name, tensor in state.items() if "projector" in name}, work / "mm_projector.bin")
    for size in (45, 70, 24):
        processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        final = train_start(work, f"size{size}", work / "clip", work / "decoder", work / "mm_projector.bin",
                            **({} if size == 45 else {"image_size": size}))
        tower = model.model.vision_tower
        tower.forward = functools.partial(tower.forward, interpolate_pos_encoding=size != 45)  # LLaVA's own forward does not pass it on
        theirs = reference(work, records, model, final, processor)
        compare(f"CLIPModel + decoder + mm_projector.bin, pictures of {size} pixels", score(work, final), theirs)
        if size != 45:  # what was written needs no interpolation any more
            again, info = LlavaForConditionalGeneration.from_pretrained(final, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"], info
            compare(f"  written for {size} pixels, in transformers", theirs, reference(work, records, again.eval(), final, processor))
    final = train_start(work, "of_whole", work / "saved", work / "saved", work / "saved")
    processor = CLIPImageProcessor(size={"shortest_edge": 45}, crop_size={"height": 45, "width": 45})
    compare("parts of a whole LLaVA's folder", score(work, final), reference(work, records, model, final, processor))


def siglip(work, records):
    model = randomise(LlavaForConditionalGeneration(LlavaConfig(vision_config=SIGLIP, text_config=TEXT, image_token_index=IMAGE_TOKEN,
                                                                vision_feature_select_strategy="full")))
    processor = SiglipImageProcessor(size={"height": 45, "width": 45})
    model.save_pretrained(work / "siglip")
    processor.save_pretrained(work / "siglip")
    theirs = reference(work, records, model, add_tokenizer(work / "siglip"), processor)
    compare("HF with a SigLIP tower", score(work, work / "siglip"), theirs)
    vision = model.model.vision_tower
    vision.save_pretrained(work / "siglip_vision")
    both = SiglipModel(SiglipConfig(vision_config=SIGLIP, text_config=dict(hidden_size=16, intermediate_size=20, num_hidden_layers=1,
                                                                           num_attention_heads=2, vocab_size=9)))
    both.vision_model.load_state_dict(vision.state_dict())
    both.save_pretrained(work / "siglip_model")
    for name in ("siglip_vision", "siglip_model"):
        processor.save_pretrained(work / name)
        final = train_start(work, f"of_{name}", work / name, work / "siglip", work / "siglip", vision_feature_select_strategy="patch")
        compare(f"a recipe with {name}", score(work, final), theirs)
        again, info = LlavaForConditionalGeneration.from_pretrained(final, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        written = SiglipImageProcessor.from_pretrained(final)
        compare(f"  as written, in transformers", theirs, reference(work, records, again.eval(), final, written))
    final = train_start(work, "padded", work / "siglip", work / "siglip", work / "siglip", aspect="pad", vision_feature_select_strategy="patch")
    written = LlavaImageProcessorPil.from_pretrained(final)
    compare("a recipe with SigLIP that pads", score(work, final), reference(work, records, again.eval(), final, written))


with tempfile.TemporaryDirectory(prefix="caldera_folders_") as name:
    torch.manual_seed(0)
    work = pathlib.Path(name)
    records = make_data(work)
    model, state, _ = hf_folders(work, records)
    original_folders(work, records, model, state)
    parts(work, records, model, state)
    siglip(work, records)
bad = {what: error for what, error in worst.items() if not error <= BOUND}
if bad:
    sys.exit(f"FAILED (bound {BOUND:.0e}): {bad}")
print(f"{len(worst)} comparisons within {BOUND:.0e}; worst {max(worst.values()):.1e}")
