"""A model of a few thousand weights, made of configurations alone, and samples for it, in one folder. Needs nothing but Python."""
import json, random, shutil, struct, pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_inputs(work, num_samples):
    """vision/, language/, images/ and data.json, whose samples are of mixed lengths."""
    write_json(work / "vision/config.json", {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64,
                                             "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 16})
    write_json(work / "language/config.json", {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                                               "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4000,
                                               "max_position_embeddings": 1024})
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(ROOT / "checkpoints/scenes/language_model" / name, work / "language")
    rng = random.Random(0)
    words = "red green blue circle square top left and the is there two".split()
    (work / "images").mkdir()
    for i in range(8):  # BMP of 40 x 40 pixels, three bytes each
        header = struct.pack("<2sIII", b"BM", 54 + 4800, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 40, 40, 1, 24, 0, 4800, 0, 0, 0, 0)
        (work / f"images/{i}.bmp").write_bytes(header + rng.randbytes(4800))
    records = [{"id": str(i), "image": f"{i % 8}.bmp", "conversations": [
        {"from": "human", "value": "<image>\n" + " ".join(rng.choices(words, k=rng.randint(1, 60)))},
        {"from": "gpt", "value": " ".join(rng.choices(words, k=rng.randint(1, 120)))}]} for i in range(num_samples)]
    write_json(work / "data.json", records)


def write_recipe(work, output, stages):
    """work/recipe.yaml. `stages`: name -> settings beside its data and the defaults of here."""
    common = {"global_batch_size": 4, "save_steps": 0, "data": {"data_path": str(work / "data.json"), "image_folder": str(work / "images"),
                                                                "conversation_template": "v1"}}
    write_json(work / "recipe.yaml", {"model": {"vision_tower": str(work / "vision"), "language_model": str(work / "language"),
                                                "random_parts": ["vision_tower", "language_model"]},
                                      "stages": [{"name": name} | common | settings for name, settings in stages.items()],
                                      "output": str(output), "device": "cpu"})
    return work / "recipe.yaml"
