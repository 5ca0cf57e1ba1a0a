"""What the benchmarks run on: a small LLaVA with random weights (as transformers saves it), pictures, and conversations of given lengths."""
import json, pathlib, random, re, shutil, subprocess, typing

ROOT = pathlib.Path(__file__).resolve().parents[2]
CALDERA = pathlib.Path(__import__("os").environ.get("CALDERA", ROOT / "build/caldera"))
VOCAB, IMAGE_TOKEN = 32000, 31999
LORA = {"lora_r": 128, "lora_alpha": 256, "lora_dropout": 0}  # LLaVA's but for its dropout of 0.05, whose masks no two programs share



class Shape(typing.NamedTuple):
    """A model's sizes, and the mixes of samples that are a step for it: tokens of each, image tokens included, and the share of each text that
    is supervised."""
    image_px: int
    vision: dict
    text: dict
    dtype: str  # of its files
    mixes: dict
    max_tokens: int  # of a micro-batch: a step is one


SMALL = Shape(
    112, dict(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=1024, projection_dim=256),
    dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8, intermediate_size=1376), "float32",
    {
        "llava": ([256, 216, 192, 168, 144, 120, 104, 85], 0.6),  # a random batch of short instructions: 62.7 % of the padded batch is real
        "captions": ([100, 96, 92, 90, 88, 84, 82, 80, 98, 94, 91, 89, 87, 85, 83, 81], 0.9),  # stage 1's: picture and a line
        "long": ([1024, 620, 410, 320], 0.5),  # conversations of many turns
        "uniform": ([256] * 8, 0.6),  # no padding at all
    }, 4096)
# LLaVA-1.5-7B's: a picture is 576 tokens.
LARGE = Shape(
    336, dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, projection_dim=768),
    dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, intermediate_size=11008), "bfloat16",
    {
        "llava": ([1360, 1100, 940, 820, 740, 690, 640, 610], 0.6),
        "captions": ([626, 622, 618, 616, 614, 610, 608, 606, 624, 620, 617, 615, 613, 611, 609, 607], 0.9),
    }, 12288)


def shape_of(name, num_layers=None):
    """small or 7b, the latter with so many of its decoder's blocks."""
    shape = {"small": SMALL, "7b": LARGE}[name]
    return shape._replace(text={**shape.text, "num_hidden_layers": num_layers}) if num_layers else shape


def configs(shape=SMALL):
    from transformers import CLIPVisionConfig, LlamaConfig
    vision = CLIPVisionConfig(image_size=shape.image_px, patch_size=14, **shape.vision)
    text = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0,
                       tie_word_embeddings=False, **shape.text)
    return vision, text


def make_model(work, shape=SMALL, device="cpu"):
    """LlavaForConditionalGeneration with random weights as an HF folder (the small one: 63.4 M parameters), and its parts."""
    import gc, torch
    from transformers import CLIPImageProcessor, CLIPVisionModel, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration
    if (work / "model/config.json").exists():
        made = json.loads((work / "model/config.json").read_text())["text_config"]
        if any(made[key] != value for key, value in shape.text.items()):
            raise SystemExit(f"{work} holds a model of another shape: name another folder")
        return
    torch.manual_seed(0)
    vision, text = configs(shape)
    torch.set_default_dtype(getattr(torch, shape.dtype))
    with torch.device(device):
        model = LlavaForConditionalGeneration(LlavaConfig(
            vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, image_seq_length=(shape.image_px // 14)**2,
            projector_hidden_act="gelu", vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=False))
        language, tower = LlamaForCausalLM(text), CLIPVisionModel(vision)
    torch.set_default_dtype(torch.float32)
    tokenizer = ROOT / "checkpoints/scenes/language_model"
    processor = CLIPImageProcessor(size={"shortest_edge": shape.image_px}, crop_size={"height": shape.image_px, "width": shape.image_px})
    for folder in ("model", "decoder", "tower"):
        (work / folder).mkdir(parents=True, exist_ok=True)
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(tokenizer / name, work / folder)
        processor.save_pretrained(work / folder)
    language.model.load_state_dict(model.model.language_model.state_dict())
    language.lm_head.load_state_dict(model.lm_head.state_dict())
    language.save_pretrained(work / "decoder")
    weights = {name.removeprefix("model.vision_tower."): value for name, value in model.state_dict().items() if "vision_tower" in name}
    tower.load_state_dict(weights, strict=False)
    tower.save_pretrained(work / "tower")
    model.save_pretrained(work / "model")
    if device == "cuda":  # whose memory the contenders want
        del model, language, tower, weights
        gc.collect()
        torch.cuda.empty_cache()


def english():
    """Sentences of Python's own documentation: text that every machine with Python has."""
    import pydoc_data.topics
    text = " ".join(" ".join(pydoc_data.topics.topics.values()).split())
    return [sentence for sentence in re.split(r"(?<=[.:]) ", text) if 20 < len(sentence) < 300]


def make_text_tokenizer(work):
    """A SentencePiece model of LLaMA's kind (BPE, byte fallback, identity normaliser), of 8000 pieces, which the sentences' words fill."""
    import sentencepiece
    folder = work / "tokenizer"
    if not folder.exists():
        folder.mkdir()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(english()), model_prefix=str(folder / "tokenizer"), vocab_size=8000, model_type="bpe", byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True,
            character_coverage=0.9999, hard_vocab_limit=False, minloglevel=2)
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True, **special}))
    return folder


def make_conversations(work, count):
    """Conversations of one to six rounds in those sentences, one after another: 200 of them say nothing twice."""
    rng, sentences, at = random.Random(0), english(), 0

    def take(number):
        nonlocal at
        at += number
        return " ".join(sentences[(at + i) % len(sentences)] for i in range(number))

    records = []
    for i in range(count):
        turns = []
        for _ in range(rng.randint(1, 6)):
            turns += [{"from": "human", "value": take(1)}, {"from": "gpt", "value": take(rng.randint(1, 4))}]
        records.append({"id": str(i), "conversations": turns})
    (work / "texts.json").write_text(json.dumps(records))
    return work / "texts.json"


def preview(work, records, template):
    """input_ids and labels of the records as Caldera makes them, images expanded."""
    (work / "preview_in.json").write_text(json.dumps(records))
    subprocess.run([CALDERA, "data", "preview", "--data", work / "preview_in.json", "--model", work / "model", "--template", template,
                    "--out", work / "preview_out.jsonl"], check=True, capture_output=True)
    rows = []
    for row in map(json.loads, open(work / "preview_out.jsonl")):
        ids, labels = [], []
        for token, label in zip(row["input_ids"], row["labels"]):
            repeat = row["num_image_tokens"] if token == -200 else 1
            ids += [token] * repeat
            labels += [label] * repeat
        rows.append({"ids": ids, "labels": labels})
    return rows


def make_batch(work, mix, template, shape=SMALL):
    """The samples of one step: a data file, pictures, and the same samples as token ids. Lengths are met to within two tokens."""
    import numpy
    from PIL import Image
    file = work / f"{mix}_{template}.json"
    lengths, share = shape.mixes[mix]
    rng = random.Random(1)
    words = "red green blue circle square star top left bottom right and a the is there yes no two three".split()
    (work / "images").mkdir(exist_ok=True)
    candidates = []
    for i, length in enumerate(lengths):
        image = f"{mix}{i}.png"
        pixels = numpy.random.default_rng(i).integers(0, 255, (shape.image_px, shape.image_px, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(work / "images" / image)
        text = [rng.choice(words) for _ in range(2000)]
        for size in range(1, min(2 * (length - (shape.image_px // 14)**2), 1000)):
            asked = max(1, round(size * (1 - share)))
            candidates.append((i, {"id": f"{i}", "image": image, "conversations": [
                {"from": "human", "value": "<image>\n" + " ".join(text[:asked])},
                {"from": "gpt", "value": " ".join(text[asked:asked + max(1, size - asked)])}]}))
    rows = preview(work, [record for _, record in candidates], template)
    best = {}
    for (i, record), row in zip(candidates, rows):
        distance = abs(len(row["ids"]) - lengths[i])
        if i not in best or distance < best[i][0]:
            best[i] = (distance, record, row)
    records = [best[i][1] for i in range(len(lengths))]
    file.write_text(json.dumps(records))
    return {"records": records, "rows": [best[i][2] for i in range(len(lengths))], "file": file}


def recipe(work, mix, template, stage, dtype, output, device="cpu", shape=SMALL, **changes):
    """A recipe whose every step is the same batch: one stage, its learning rate constant."""
    trainable = ["projector"] if stage == 1 else ["projector", "language_model"]
    data = {"data_path": str(work / f"{mix}_{template}.json"), "image_folder": str(work / "images"), "conversation_template": template,
            "dataloader_num_workers": 1}
    optimizer = {"learning_rate": 2e-5, "max_grad_norm": 1.0, "lr_scheduler_type": "constant", "warmup_ratio": 0}
    content = {"model": {"vision_tower": str(work / "tower"), "language_model": str(work / "decoder"),
                         "pretrain_mm_mlp_adapter": str(work / "model")},
               "stages": [{"name": f"stage{stage}", "trainable": trainable, "data": data, "optimizer": optimizer,
                           "global_batch_size": len(shape.mixes[mix][0]), "max_tokens_per_micro_batch": shape.max_tokens, "max_steps": 100000, "dtype": dtype,
                           "save_steps": 0, **changes}],
               "output": str(output), "device": device, "seed": 0}
    path = work / f"recipe_{mix}_{template}_{stage}_{dtype}{'_lora' if 'lora' in changes else ''}.yaml"
    path.write_text(json.dumps(content))  # JSON is YAML
    return path
