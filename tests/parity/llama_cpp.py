#!/usr/bin/env python3
"""llama.cpp answers as Caldera does: greedy tokens of the same float16 weights, with a picture and without.

    tests/parity/llama_cpp.py CALDERA MODEL IMAGES DATA.json LLAMA_CPP_BIN [--questions N] [--captions MODEL]

MODEL is a model folder, IMAGES and DATA.json questions about pictures of the size its tower takes (so that nobody
resizes them), --captions a model that was trained on captions, whose texts are
longer. LLAMA_CPP_BIN is the folder with llama-mtmd-cli and
llama-completion; where they are absent, nothing is checked and a message says so. They are built on a CPU in a quarter of an
hour from the source distribution of llama-cpp-python (0.3.36 was used):

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B llama.cpp -DLLAMA_CURL=OFF -DBUILD_SHARED_LIBS=OFF
    cmake --build llama.cpp --target llama-mtmd-cli llama-completion

llama.cpp of May 2025 and later puts the class token behind the patches (ggml-org/llama.cpp#25814), so the features of a CLIP tower
are not what it was trained to give. Such a build agrees on questions like those of training, and on no more; with the order of the
two operands of ggml_concat in tools/mtmd/models/llava.cpp exchanged, all must be equal."""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image

import random_llava

NUM_TOKENS = 32
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
# Random models are chaotic: the first token that is not computed alike is in the text. In float32 throughout.
RANDOM = {"plain": {}, "llama3": {"rope_scaling": LLAMA3}, "yarn": {"rope_scaling": YARN},
          "yarn_magnitude": {"rope_scaling": {**YARN, "attention_factor": 1.4, "beta_fast": 20}},
          "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
          "biases_tied": {"attention_bias": True, "mlp_bias": True, "tied": True}}
FLOAT32 = ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")


def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, errors="replace",
                          stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr}"
    return done.stdout


def export(caldera, model, folder, dtype="f16"):
    """The weights that both are given, rounded once: as Caldera's folder and as llama.cpp's arguments."""
    run(caldera, "export", "--model", model, "--format", "hf", "--dtype", dtype, "--template", "v1", "--out",
        folder / "hf")
    run(caldera, "export", "--model", folder / "hf", "--format", "gguf", "--dtype", dtype, "--out", folder / "gguf")
    decoder = ["-m", folder / f"gguf/model-{dtype}.gguf", "-t", 1, "--temp", 0, "-n", NUM_TOKENS]
    return folder / "hf", decoder, ["--mmproj", folder / f"gguf/mmproj-{dtype}.gguf", "--jinja"]


def generate(caldera, model, questions, images, work):
    records = [{"id": str(i), **({"image": image} if image else {}),
                "conversations": [{"from": "human", "value": ("<image>\n" if image else "") + prompt},
                                  {"from": "gpt", "value": "x"}]} for i, (image, prompt) in enumerate(questions)]
    (work / "questions.json").write_text(json.dumps(records))
    run(caldera, "generate", "--model", model, "--data", work / "questions.json", "--images", images,
        "--max-new-tokens", NUM_TOKENS, "--out", work / "answers.jsonl")
    lines = map(json.loads, (work / "answers.jsonl").read_text().splitlines())
    return [line["text"].strip() for line in sorted(lines, key=lambda line: int(line["id"]))]


def answer(*command):
    # llama.cpp's tools write from a thread of their own, and now and then end before it has written all: the longest of three.
    return max((run(*command).replace("[end of text]", "").strip() for _ in range(3)), key=len)


def random_models(caldera, mtmd, completion, work):
    """Random decoders with every rope scaling, and a SigLIP tower before each. Left out of the comparison is what the
    two print differently: broken UTF-8, NUL, control tokens."""
    size = random_llava.TOWER["image_size"]
    pixels = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(work / "random.png")

    def readable(text):
        for odd in ("\N{REPLACEMENT CHARACTER}", "\0", "<s>", "<unk>"):
            text = text.replace(odd, "")
        return text.strip()

    results = {"random decoders": [], "random SigLIP towers": []}
    for name, text in RANDOM.items():
        random_llava.make(work / f"{name}_source", "siglip", **text)
        folder, decoder, tower = export(caldera, work / f"{name}_source", work / name, "f32")
        for question in ("What is it?", "Where is the red star"):
            for kind, image, their in (
                    ("random decoders", "", answer(completion, *decoder, *FLOAT32, "-no-cnv", "--no-display-prompt", "--simple-io",
                                                   "-p", f"{SYSTEM} USER: {question} ASSISTANT:")),
                    ("random SigLIP towers", "random.png", answer(mtmd, *decoder, *tower, *FLOAT32, "--image", work / "random.png",
                                                                  "-p", "\n" + question))):
                our, = generate(caldera, folder, [(image, question)], work, work)
                results[kind].append(((name, question), readable(our), readable(their)))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("caldera", "model", "images", "data", "llama_cpp_bin"):
        parser.add_argument(name, type=pathlib.Path)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--captions", type=pathlib.Path)
    args = parser.parse_args()
    mtmd, completion = (args.llama_cpp_bin / name for name in ("llama-mtmd-cli", "llama-completion"))
    if not (mtmd.exists() and completion.exists()):
        print(f"skipped: no llama-mtmd-cli and llama-completion in {args.llama_cpp_bin}")
        return
    work = pathlib.Path(tempfile.mkdtemp(prefix="caldera_llama_cpp_"))
    records = [r for r in json.loads(args.data.read_text()) if isinstance(r.get("image"), str)][: args.questions]
    asked = [(r["image"], r["conversations"][0]["value"].removeprefix("<image>\n")) for r in records]
    pictures = list(dict.fromkeys(image for image, _ in asked))

    folder, decoder, tower = export(args.caldera, args.model, work / "model")
    kinds = {"as in training": asked,
             "never asked in training": [(image, "Describe the picture.") for image in pictures],
             "without a picture": [("", prompt) for prompt in dict.fromkeys(prompt for _, prompt in asked)]}
    results = {}
    for kind, questions in kinds.items():
        ours = generate(args.caldera, folder, questions, args.images, work)
        theirs = [answer(mtmd, *decoder, *tower, "--image", args.images / image, "-p", "\n" + prompt) if image else
                  answer(completion, *decoder, "-no-cnv", "--no-display-prompt", "--simple-io", "-p",
                         f"{SYSTEM} USER: {prompt} ASSISTANT:")
                  for image, prompt in questions]
        results[kind] = list(zip(questions, ours, theirs))
    if args.captions:  # llama-mtmd-cli wants text after a picture, so the captions are asked for in the words of v1
        folder, decoder, tower = export(args.caldera, args.captions, work / "captions")
        questions = [(image, "Describe the picture.") for image in pictures]
        ours = generate(args.caldera, folder, questions, args.images, work)
        theirs = [answer(mtmd, *decoder, *tower, "--image", args.images / image, "-p", "\n" + prompt)
                  for image, prompt in questions]
        results["captions"] = list(zip(questions, ours, theirs))

    results |= random_models(args.caldera, mtmd, completion, work)
    for kind, rows in results.items():
        for question, our, their in rows:
            if our != their:
                print(f"{kind}: {question}: caldera {our!r}, llama.cpp {their!r}")
    for kind, rows in results.items():
        equal = sum(our == their for _, our, their in rows)
        words = sum(len(our.split()) for _, our, _ in rows)
        print(f"llama.cpp, {kind}: {equal} of {len(rows)} answers equal ({words} words)")
    sys.exit(any(our != their for rows in results.values() for _, our, their in rows))


if __name__ == "__main__":
    main()
