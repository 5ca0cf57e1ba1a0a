#!/usr/bin/env python3
"""Makes LLaVA's JSON from the pictures of two Debian packages. See docs/stamps.md.

    make_data.py --tuxpaint /usr/share/tuxpaint/stamps --openclipart /usr/share/openclipart/png --out data-cache/stamps/data

Writes OUT/images/*.jpg, pretrain.json, finetune.json, test.json, captions_test.json and statistics.json. The same packages
give the same files.
"""
import argparse
import collections
import dataclasses
import hashlib
import json
import pathlib
import random

import numpy as np
from PIL import Image

import pictures
import words

SEED = 0
TRAIN_CAP, TEST_CAP = 20, 6  # pictures of one subject, so that ice cream does not outweigh the rest
TEST_YES_NO_PER_KIND = 4  # questions answered yes, and as many answered no
TEST_COLOUR, TEST_WHAT, TEST_PER_LANGUAGE = 60, 40, 8
BRIEF = "Describe the picture briefly."
WHAT = "What is this?"
WHICH_KIND = "Which kind of thing is in the picture?"
WHICH_COLOUR = "What is the main colour of the picture?"


@dataclasses.dataclass
class Picture:
    id: str
    stem: pathlib.Path
    kind: str
    subject: str
    name: str
    content: Image.Image | None = None  # RGBA, cut out
    square: Image.Image | None = None  # as it is, RGB
    print: np.ndarray | None = None
    colour: str | None = None
    names_abroad: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def held_out(self) -> bool:
        return int(hashlib.sha256(self.subject.encode()).hexdigest(), 16) % 10 == 0

    @property
    def answer_to_what(self) -> str:
        return "flag" if self.kind == "flag" else self.name  # whose it is cannot be seen of a flag not met before

    @property
    def caption(self) -> str:
        return words.caption(self.name, self.kind, self.colour)


def stable(text: str) -> str:
    """Sorts by this: an order that looks drawn and depends on nothing but the text."""
    return hashlib.sha256(f"{SEED}:{text}".encode()).hexdigest()


def read_labels(labels: pathlib.Path, roots: dict[str, pathlib.Path]) -> list[Picture]:
    found = []
    for line in labels.read_text(encoding="utf8").splitlines():
        if line.startswith("#"):
            continue
        path, kind, subject, name = line.split("\t")
        package, _, inside = path.partition("/")
        slug = "".join(c if c.isalnum() else "-" for c in path.lower()).strip("-")
        found.append(Picture(slug, roots[package] / inside, kind, subject, name))
    return found


def load(all_pictures: list[Picture]) -> list[Picture]:
    """Those that can be read, at most a cap of each subject."""
    of_subject, kept = collections.Counter(), []
    for picture in sorted(all_pictures, key=lambda p: stable(p.id)):
        if of_subject[picture.subject] >= (TEST_CAP if picture.held_out else TRAIN_CAP):
            continue
        picture.content = pictures.load_content(picture.stem, picture.kind == "flag")
        if picture.content is None:
            print(f"left out, nothing to see: {picture.stem}")
            continue
        of_subject[picture.subject] += 1
        picture.square = pictures.on_square(picture.content)
        picture.print = pictures.fingerprint(picture.square)
        picture.colour = pictures.colour_of(picture.square)
        picture.names_abroad = words.translations(picture.stem.with_name(picture.stem.name + ".txt"))
        kept.append(picture)
    return kept


def without_twins(kept: list[Picture]) -> list[Picture]:
    """One of each set of the same picture; held-out ones come first, so that no twin of theirs is trained on."""
    unique: list[Picture] = []
    prints = np.empty((len(kept), 432), dtype=np.float32)
    for picture in sorted(kept, key=lambda p: (not p.held_out, stable(p.id))):
        if not pictures.is_twin(picture.print, prints[: len(unique)]):
            prints[len(unique)] = picture.print[0]
            unique.append(picture)
    return sorted(unique, key=lambda p: stable(p.id))


def record(id: str, image: str, turns: list[tuple[str, str]], **extra) -> dict:
    conversations = []
    for i, (question, answer) in enumerate(turns):
        conversations.append({"from": "human", "value": ("<image>\n" if i == 0 else "") + question})
        conversations.append({"from": "gpt", "value": answer})
    return {"id": id, "image": image, **extra, "conversations": conversations}


def is_kind(kind: str) -> str:
    return f"Is this {words.KINDS[kind]}?"


def yes_no(picture: Picture, want_yes: bool, rng: random.Random) -> tuple[str, str]:
    if want_yes:
        return is_kind(picture.kind), "yes"
    return is_kind(rng.choice([k for k in words.KINDS if k != picture.kind])), "no"


def training_records(train: list[Picture], out: pathlib.Path) -> tuple[list[dict], list[dict]]:
    """Each picture as it is and in one varied view; a caption and a conversation on each."""
    pretrain, finetune = [], []
    for index, picture in enumerate(train):
        rng = random.Random(stable(picture.id))
        first, second = f"{picture.id}.jpg", f"{picture.id}-b.jpg"
        save(picture.square, out / first)
        save(pictures.variant(picture.content, picture.kind not in words.UNMIRRORED, rng), out / second)
        for image in (first, second):
            pretrain.append(record(pathlib.Path(image).stem, image, [(BRIEF, picture.caption)]))

        kind, what = (WHICH_KIND, picture.kind), (WHAT, picture.answer_to_what)
        colour = [(WHICH_COLOUR, picture.colour)] if picture.colour else []
        abroad = [(f"Name it in {language}.", name) for language, name in sorted(picture.names_abroad.items())]
        # What is asked first is answered from the picture alone; what follows may lean on the answers before. So the caption
        # comes first on one half of the pictures, the kind on the other.
        opening = [kind, *colour, what] if index % 4 < 2 else [(BRIEF, picture.caption), *colour]
        finetune.append(record(f"{picture.id}", first, [*opening, *abroad[:1]]))
        # Yes as often as no: after a no, a second question, yes every other time.
        asked = [yes_no(picture, index % 2 == 0, rng)]
        if index % 2 == 1:
            asked.append(yes_no(picture, index % 4 == 1, rng))
        finetune.append(record(f"{picture.id}-b", second, [*asked, kind, (BRIEF, picture.caption), *abroad[1:2]]))
    random.Random(SEED).shuffle(pretrain)
    random.Random(SEED + 1).shuffle(finetune)
    return pretrain, finetune


def test_records(test: list[Picture], out: pathlib.Path) -> tuple[list[dict], list[dict]]:
    rng = random.Random(SEED)
    for picture in test:
        save(picture.square, out / f"{picture.id}.jpg")
    questions: list[dict] = []

    def ask(type: str, picture: Picture, question: str, answer: str) -> None:
        id = f"{type}-{len(questions):04d}"
        questions.append(record(id, f"{picture.id}.jpg", [(question, answer)], type=type, held_out=True))

    for picture in test:
        ask("kind", picture, WHICH_KIND, picture.kind)
    # As many yes as no to each question, so that not looking gives one half.
    for kind in words.KINDS:
        same, other = [p for p in test if p.kind == kind], [p for p in test if p.kind != kind]
        num = min(TEST_YES_NO_PER_KIND, len(same))
        for picture in rng.sample(same, num):
            ask("yes_no", picture, is_kind(kind), "yes")
        for picture in rng.sample(other, num):
            ask("yes_no", picture, is_kind(kind), "no")
    coloured = [p for p in test if p.colour]
    for picture in rng.sample(coloured, min(TEST_COLOUR, len(coloured))):
        ask("colour", picture, WHICH_COLOUR, picture.colour)
    named = [p for p in test if p.kind != "flag"]
    for picture in rng.sample(named, min(TEST_WHAT, len(named))):
        ask("what", picture, WHAT, picture.name)
    for language in sorted(words.LANGUAGES.values()):
        named = [p for p in test if language in p.names_abroad]
        for picture in rng.sample(named, min(TEST_PER_LANGUAGE, len(named))):
            ask(language.lower(), picture, f"Name it in {language}.", picture.names_abroad[language])

    captions = [record(p.id, f"{p.id}.jpg", [(BRIEF, p.caption)]) for p in apart(test)]
    return questions, captions


def apart(test: list[Picture]) -> list[Picture]:
    """An order in which neighbours differ in kind as far as it goes: the loss with a shuffled picture takes the next one's."""
    left, order = list(test), []
    while left:
        most = collections.Counter(p.kind for p in left)
        last = order[-1].kind if order else None
        order.append(max((p for p in left), key=lambda p: (p.kind != last, most[p.kind])))
        left.remove(order[-1])
    return order


def save(square, file: pathlib.Path) -> None:
    square.save(file, quality=92, subsampling=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuxpaint", type=pathlib.Path, default="/usr/share/tuxpaint/stamps")
    parser.add_argument("--openclipart", type=pathlib.Path, default="/usr/share/openclipart/png")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    images = args.out / "images"
    images.mkdir(parents=True, exist_ok=True)

    labels = pathlib.Path(__file__).with_name("labels.tsv")
    labelled = read_labels(labels, {"tuxpaint": args.tuxpaint, "openclipart": args.openclipart})
    unique = without_twins(load(labelled))
    train, test = [p for p in unique if not p.held_out], [p for p in unique if p.held_out]
    pretrain, finetune = training_records(train, images)
    questions, captions = test_records(test, images)
    heard = {turn["value"] for r in pretrain + finetune for turn in r["conversations"] if turn["from"] == "gpt"}
    told = {r["conversations"][1]["value"] for r in captions} & heard
    assert not told, f"captions of held-out subjects in training: {sorted(told)}"

    for name, records in (("pretrain", pretrain), ("finetune", finetune), ("captions_test", captions), ("test", questions)):
        lines = ",\n".join(json.dumps(r, ensure_ascii=False) for r in records)
        (args.out / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf8")

    kinds = {k: [sum(p.kind == k for p in side) for side in (train, test)] for k in words.KINDS}
    statistics = {
        "num_pictures": len(unique),
        "num_subjects": len({p.subject for p in unique}),
        "num_heldout_pictures": len(test),
        "num_heldout_subjects": len({p.subject for p in test}),
        "num_pretrain_samples": len(pretrain),
        "num_finetune_samples": len(finetune),
        "num_finetune_turns": sum(len(r["conversations"]) // 2 for r in finetune),
        "num_questions": dict(collections.Counter(r["type"] for r in questions)),
        "majority_kind": max(kinds, key=lambda k: kinds[k][1]),
        "majority_kind_share": round(max(n for _, n in kinds.values()) / len(test), 3),
        "kinds_train_test": kinds,
        "heldout_subjects": sorted({p.subject for p in test}),
        "colours": dict(collections.Counter(str(p.colour) for p in unique).most_common()),
    }
    (args.out / "statistics.json").write_text(json.dumps(statistics, indent=1) + "\n")
    shown = {k: v for k, v in statistics.items() if k.startswith(("num_", "majority"))}
    print(f"{len(labelled)} pictures labelled; {len(unique)} used: without twins, and no more than the cap of a subject")
    for kind, (num_train, num_test) in kinds.items():
        print(f"  {kind:20s} {num_train:5d} train {num_test:4d} held out")
    print("stamps:", json.dumps(shown))


if __name__ == "__main__":
    main()
