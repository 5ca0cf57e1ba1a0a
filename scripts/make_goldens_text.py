"""Makes the golden files of tokenizers, templates and labels below tests/golden/ (text_*).

    python scripts/make_goldens_text.py           the goldens, from the tokenizers that are there
    python scripts/make_goldens_text.py --train   trains the small tokenizers anew first (all goldens change)

The tokenizers are small ones of the kinds that matter, trained on sentences made here. What they must give is computed by
others' code: the sentencepiece and tokenizers packages. On top of them stand, written from their rules: HF's slow LlamaTokenizer
(legacy and not) and LLaVA's preprocessing (preprocess_v1, preprocess_llama_2, preprocess_plain, v0's preprocess, tokenizer_image_token).
"""
import argparse
import io
import json
import random
import re
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

GOLDEN = Path(__file__).parent.parent / "tests/golden"
IGNORE, IMAGE = -100, -200

# ---------------------------------------------------------------------------------------------------------------- text

ADJECTIVES = ("small large red green blue yellow bright dark round square shiny wooden metallic old young happy sleepy busy quiet "
              "crowded narrow wide tall short striped spotted transparent colourful distant nearby curious gentle").split()
NOUNS = ("cat dog horse bird elephant boat car bicycle train station street building window door table chair bottle cup plate "
         "kitchen garden mountain river lake forest beach umbrella backpack person woman man child group player ball racket "
         "skateboard snowboard kite clock sign bench sandwich pizza banana apple orange carrot laptop keyboard book vase "
         "triangle circle picture photograph painting shadow background foreground corner surface").split()
VERBS = ("is standing|is sitting|is walking|is lying|appears|can be seen|is placed|is parked|is flying|is resting|looks|"
         "is riding|is holding something|waits|plays|runs").split("|")
PLACES = ("on the left|on the right|in the middle of the scene|behind the fence|next to the wall|under the tree|near the water|"
          "in front of the house|at the edge of the road|above the other one|in the background|close to the camera").split("|")
PHRASES = ["What is in the image?", "Describe the image in detail.", "What color is the {n}?", "How many {n}s are there?",
           "Is there a {a} {n} in the picture?", "The image shows a {a} {n} which {v} {p}.", "There are {d} {n}s, and one {v} {p}.",
           "The {a} {n} {v} {p}, while a {a2} {n2} {v2} {p2}.", "Yes, the {n} is {a} and {a2}.", "No, it isn't; the {n} is {a}.",
           "Answer the question using a single word or phrase.", "It's {d} o'clock, so we're late and they've left: I'll wait.",
           "A chat between a curious user and an artificial intelligence assistant.",
           "The assistant gives helpful, detailed, and polite answers to the user's questions.",
           "You are a helpful language and vision assistant, able to understand the visual content that the user provides.",
           "USER: hello ASSISTANT: hi", "[INST] <<SYS>> [/INST]", "### Human: question", "### Assistant: answer",
           "user\nassistant\n", "The US economy grew by {d}.{d} percent; THE HEADLINE SAYS SO. US AND THEM.",
           "1. {A}: the {n} {v}.\n2. {A2}: the {n2} {v2}.\n", "def f(x):\n    return x * {d}\n\n\tif x == {d}: print('{n}')\n",
           "¿Dónde está el {n}? El niño está aquí.", "Où est la {n}, s'il vous plaît? Ça va être là.", "Die Straße ist schön, über {d} Häuser."]


def sentence(rng: random.Random) -> str:
    number = str(rng.randrange(10 ** rng.randrange(1, 5)))
    return rng.choice(PHRASES).format(a=rng.choice(ADJECTIVES), a2=rng.choice(ADJECTIVES), A=rng.choice(ADJECTIVES).title(),
                                      A2=rng.choice(ADJECTIVES).title(), n=rng.choice(NOUNS), n2=rng.choice(NOUNS),
                                      v=rng.choice(VERBS), v2=rng.choice(VERBS), p=rng.choice(PLACES), p2=rng.choice(PLACES),
                                      d=number)


ODD = ["\n", "\n\n", "  ", "   ", "\t", " \n ", "café", "naïve", "日本語のテキスト", "🦄", "👩‍👩‍👧", "Ωμέγα", "Привет", "한국어", "עברית", "العربية",
       "3.14159", "2024-01-31", "1,000,000", "ⅷ²½", "x²", "@#$%^&*()", "___", "--", "…", "“quoted”", "it's", "DON'T", "we'LL", "ſ's",
       "https://example.org/a?b=c&d=e", "C:\\path\\file", "<b>bold</b>", "e\u0301", "A\u030a", "\u1112\u1161\u11ab", "\u212b", "\u00a0",
       "\u3000", "\u2028", "\u200b", "\ufeff", "\u180e", "▁", "▁▁x", "ﬁne", "ÅÄÖ", "q\u0323\u0307", "\U0001d15e", "   end   "]
LOOKALIKES = ["<s>", "</s>", "<unk>", "<|im_end|>", "<|im_start|>user", "<|endoftext|>", "<0x0A>", "<|im_end", "[PAD]", "###", "<pad>"]


def odd_text(rng: random.Random, extra=()) -> str:
    parts = [sentence(rng) if rng.random() < 0.5 else rng.choice(ODD + list(extra)) for _ in range(rng.randrange(1, 5))]
    return "".join(part + rng.choice(["", " ", " ", "\n", "  "]) for part in parts)


# ------------------------------------------------------------------------------------------------------ small tokenizers

def train_sentencepiece(path: Path, lines: list[str]) -> None:
    """LLaMA's flags; and LLaMA's habit that "USER" is one piece within a text and two at its start, and "###" the other way round,
    on which LLaVA's arithmetic rests."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in lines for line in text.split("\n") if line), model_writer=out, vocab_size=2000,
        model_type="bpe", byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True, add_dummy_prefix=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.9999, num_threads=1,
        minloglevel=2)
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(out.getvalue())
    wanted = ["▁▁", "▁▁▁▁", "▁#", "▁##", "▁###", "##", "ER", "US", "▁US", "USER"]
    banned = {"▁USER", "▁USE", "USE", "SER", "▁U", "###", "####"}
    pieces = [p for p in model.pieces if p.piece not in banned and p.piece not in wanted]
    first = next(i for i, p in enumerate(pieces) if p.type == p.NORMAL)
    for i, text in enumerate(reversed(wanted)):
        pieces.insert(first, sentencepiece_model_pb2.ModelProto.SentencePiece(piece=text, score=1 + i))
    kept = [p.SerializeToString() for p in pieces]
    del model.pieces[:]
    for p in kept:
        model.pieces.add().ParseFromString(p)
    model.trainer_spec.ClearField("input")
    model.trainer_spec.ClearField("model_prefix")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())


QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def train_bpe(path: Path, lines: list[str], kind: str, vocab_size: int = 1200) -> None:
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    split = {"smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
             "qwen2": [pre_tokenizers.Split(Regex(QWEN2), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
             "llama3": [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
             }[kind]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    special = {"smollm": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "qwen2": [], "llama3": []}[kind]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if kind == "smollm":
        config |= {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    elif kind == "qwen2":  # added behind the vocabulary, as Qwen2 does
        tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        config |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    else:
        tokenizer.add_special_tokens(["<s>", "</s>"])
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
        config |= {"eos_token": "</s>"}
    document = json.loads(tokenizer.to_str())
    if kind == "llama3":  # the older form of merges
        document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False, separators=(",", ":")))
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


# ------------------------------------------------------------------------------- HF's slow LlamaTokenizer, from its rules

class SlowLlama:
    """legacy: each stretch between control tokens is encoded with the model's dummy prefix. Otherwise the model has none, a "▁" is put
    before the whole text, and a stretch that begins with a space is encoded behind "<unk>", whose pieces are dropped."""

    def __init__(self, path: Path, legacy: bool):
        model = sentencepiece_model_pb2.ModelProto()
        model.ParseFromString(path.read_bytes())
        if not legacy:
            model.normalizer_spec.add_dummy_prefix = False
        self.legacy = legacy
        self.model = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        self.num_unk = len(self.model.encode("<unk>"))
        self.special = {"<unk>": 0, "<s>": 1, "</s>": 2}

    def stretch(self, text: str) -> list[int]:
        if self.legacy or not text.startswith(("▁", " ")):
            return self.model.encode(text)
        return self.model.encode("<unk>" + text)[self.num_unk:]

    def __call__(self, text: str, control: bool = True) -> list[int]:
        """The ids, BOS first. Without `control`, "</s>" and the like are characters."""
        if not self.legacy and text:
            text = "▁" + text.replace("▁", " ")
        parts = [p for p in (re.split("(<unk>|<s>|</s>)", text) if control else [text]) if p]
        if not self.legacy and len(parts) > 1 and parts[0] == "▁" and parts[1] in self.special:
            parts = parts[1:]
        ids = [1]
        for part in parts:
            ids += [self.special[part]] if control and part in self.special else self.stretch(part)
        return ids


# -------------------------------------------------------------------------------------- LLaVA's preprocessing, from its rules

V1_SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
             "The assistant gives helpful, detailed, and polite answers to the user's questions.")
V0_SYSTEM = V1_SYSTEM.replace("user", "human")
LLAMA2_SYSTEM = ("You are a helpful language and vision assistant. You are able to understand the visual content that the user "
                 "provides, and assist the user with a variety of tasks using natural language.")


# LLaMA 2's own.
META_SYSTEM = ("You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  Your answers "
               "should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure that your "
               "responses are socially unbiased and positive in nature.\n\nIf a question does not make any sense, or is not factually "
               "coherent, explain why instead of answering something not correct. If you don't know the answer to a question, please don't "
               "share false information.")


def tokenizer_image_token(prompt, tokenizer):
    chunks = [tokenizer(chunk) for chunk in prompt.split("<image>")]
    ids = list(chunks[0])
    for chunk in chunks[1:]:
        ids += [IMAGE] + chunk[1:]
    return ids


def preprocess_multimodal(values):
    out = []
    for value in values:
        if "<image>" in value:
            value = ("<image>\n" + value.replace("<image>", "").strip()).strip()
        out.append(value)
    return out


def render_v1(values, system=V1_SYSTEM):
    text = system + " "
    for i, value in enumerate(values):
        text += ("USER: ", "ASSISTANT: ")[i % 2] + value + (" ", "</s>")[i % 2]
    return text


def render_llama_2(values, system=LLAMA2_SYSTEM):
    text = ""
    for i, value in enumerate(values):
        if i == 0:
            value = f"<<SYS>>\n{system}\n<</SYS>>\n\n" + value
        text += f"<s>[INST] {value} [/INST]" if i % 2 == 0 else f" {value} </s>"
    return text.lstrip("<s>")


def label_rounds(text, separator, tokenizer, corrected):
    """Labels by counting tokens round by round; None where the counts do not add up (LLaVA then learns nothing of the sample)."""
    ids = tokenizer_image_token(text, tokenizer)
    labels = [IGNORE] + ids[1:]
    current = 1
    for i, part in enumerate(text.split("</s>")):
        if part == "":
            break
        halves = part.split(separator)
        if len(halves) != 2:
            break
        round_length = len(tokenizer_image_token(part, tokenizer))
        instruction = len(tokenizer_image_token(halves[0] + separator, tokenizer)) - 2
        if corrected and i > 0 and not tokenizer.legacy:
            round_length -= 1
            instruction -= 1
        labels[current:current + instruction] = [IGNORE] * instruction
        current += round_length
    labels[current:] = [IGNORE] * len(labels[current:])
    return (ids, labels) if current == len(ids) else None


def preprocess(template, values, tokenizer):
    if template in ("v1", "vicuna_v1", "llava_v1"):
        return label_rounds(render_v1(values, V0_SYSTEM if template == "llava_v1" else V1_SYSTEM), " ASSISTANT: ", tokenizer, True)
    if template in ("llama_2", "llava_llama_2"):
        return label_rounds(render_llama_2(values, META_SYSTEM if template == "llama_2" else LLAMA2_SYSTEM), "[/INST] ", tokenizer, False)
    if template == "plain":
        ids = tokenizer_image_token("<image>" + values[1] + "\n", tokenizer)
        return ids, [IGNORE] * 2 + ids[2:]
    assert template in ("v0", "llava_v0")
    header = V0_SYSTEM + "\n\n"
    turns = ["### " + ("Human", "Assistant")[i % 2] + ": " + value + "\n" for i, value in enumerate(values)]
    ids = tokenizer_image_token(header + "".join(turns) + "### ", tokenizer)
    labels = list(ids)
    current = len(tokenizer_image_token(header, tokenizer))
    labels[:current] = [IGNORE] * current
    for i, turn in enumerate(turns):
        length = len(tokenizer_image_token(turn, tokenizer))
        if i % 2 == 0:
            labels[current + 2:current + length] = [IGNORE] * (length - 2)
        current += length
    return ids, labels


def learned_spans(labels):
    spans = []
    for i, label in enumerate(labels):
        if label == IGNORE:
            continue
        if spans and spans[-1][1] == i:
            spans[-1][1] = i + 1
        else:
            spans.append([i, i + 1])
    return spans


def conversation(rng, template):
    rounds = 1 if template == "plain" else rng.choice([1, 1, 2, 3])
    values = [odd_text(rng) for _ in range(2 * rounds)]
    has_image = template == "plain" or rng.random() < 0.7
    if has_image:
        values[0] = rng.choice(["<image>\n" + values[0], values[0] + "\n<image>", "<image>" + values[0], "<image>"])
    return values, has_image


def make_labels(model: Path) -> None:
    for legacy in (True, False):
        rng, tokenizer, samples, skipped = random.Random(int(legacy)), SlowLlama(model, legacy), [], 0
        for template, count in (("v1", 100), ("llava_llama_2", 45), ("plain", 50), ("v0", 30)):
            made = 0
            while made < count:
                values, has_image = conversation(rng, template)
                result = preprocess(template, preprocess_multimodal(values) if has_image else values, tokenizer)
                if result is None:  # LLaVA masks all of it
                    skipped += 1
                    continue
                ids, labels = result
                samples.append({"template": template, "image": has_image, "values": values, "ids": ids, "learned": learned_spans(labels)})
                made += 1
        rng = random.Random(2)
        texts = [odd_text(rng, LOOKALIKES) for _ in range(150)]
        lines = [{"text": t, "ids": tokenizer(t, control=False)[1:]} for t in texts]
        path = GOLDEN / f"text_labels_{'legacy' if legacy else 'new'}.json"
        write(path, {"samples": samples, "lines": lines})
        print(f"{path.name}: {len(samples)} samples ({skipped} masked whole by the reference left out)")


def preprocess_chatml(values, tokenizer):
    ids, labels = [], []
    for i, value in enumerate(values):
        start = "<|im_start|>" + ("user\n", "assistant\n")[i % 2]
        parts = [tokenizer.encode(t).ids for t in (start + value + "<|im_end|>\n").split("<image>")]
        turn = parts[0] + [token for part in parts[1:] for token in [IMAGE] + part]
        begin = len(tokenizer.encode(start).ids)
        ids += turn
        labels += [IGNORE] * begin + turn[begin:-1] + [IGNORE] if i % 2 else [IGNORE] * len(turn)
    return ids, labels


def make_bpe(folder: Path) -> None:
    rng = random.Random(3)
    texts = [odd_text(rng, LOOKALIKES) for _ in range(250)] + ["", " ", "\n", "     x", "aaaa" * 20, "12345678 1 22 333", "\u0301x"]
    out = {"lines": texts}
    for kind in ("smollm", "qwen2", "llama3"):
        tokenizer = Tokenizer.from_file(str(folder / f"text_bpe_{kind}/tokenizer.json"))
        tokenizer.encode_special_tokens = True
        out[kind] = [tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
    # ChatML on SmolLM2's kind of tokenizer: labels by the lengths of prefixes.
    tokenizer = Tokenizer.from_file(str(folder / "text_bpe_smollm/tokenizer.json"))
    out["chatml"] = []
    for _ in range(40):
        values, has_image = conversation(rng, "chatml")
        ids, labels = preprocess_chatml(preprocess_multimodal(values) if has_image else values, tokenizer)
        out["chatml"].append({"template": "chatml", "image": has_image, "values": values, "ids": ids, "learned": learned_spans(labels)})
    write(folder / "text_bpe.json", out)


def write(path: Path, document) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true")
    arguments = parser.parse_args()
    model = GOLDEN / "text_sentencepiece/tokenizer.model"
    if arguments.train:
        rng = random.Random(0)
        lines = [sentence(rng) for _ in range(12000)] + [odd for odd in ODD for _ in range(3)]
        train_sentencepiece(model, lines)
        for kind in ("smollm", "qwen2", "llama3"):
            train_bpe(GOLDEN / f"text_bpe_{kind}", lines, kind)
    make_labels(model)
    make_bpe(GOLDEN)


if __name__ == "__main__":
    main()
