"""Words of the stamps data: kinds as they are spoken of, articles, captions, and the stamps' own text files."""
import pathlib
import re

# Kind -> how a sentence names one of it.
KINDS = {
    "animal": "an animal",
    "bird": "a bird",
    "body part": "a body part",
    "bug": "a bug",
    "building": "a building",
    "clothing": "clothing",
    "drink": "a drink",
    "electronic device": "an electronic device",
    "flag": "a flag",
    "food": "food",
    "fruit or vegetable": "a fruit or vegetable",
    "holiday thing": "a holiday thing",
    "household or office thing": "a household or office thing",
    "musical instrument": "a musical instrument",
    "person": "a person",
    "plant": "a plant",
    "road sign": "a road sign",
    "sea animal": "a sea animal",
    "tool or weapon": "a tool or weapon",
    "toy or sports gear": "a toy or sports gear",
    "vehicle": "a vehicle",
    "weather or space": "weather or space",
}
# Left and right mean something in these.
UNMIRRORED = {"flag", "road sign"}
# A colour word in front of these says something odd.
UNCOLOURED = {"body part", "flag", "person", "weather or space"}

# Plurals and stuff: "some scissors", "some bread".
SOME = set(
    (
        "adhesive tape, apple juice, bacon, bamboo, beer, binoculars, blueberries, bread, broccoli, building "
        "blocks, butter, candy, cheese, cherry blossom, clover, coffee, confetti, corn, docks, dumplings, "
        "fireworks, flip-flops, french fries, garlic, ginger, glasses, grapes, hair, hash browns, hedge shears, "
        "holly, ice cream, jeans, juice, lasagna, lavender, lemonade, lettuce, lightning, loppers, maracas, milk, "
        "onion rings, orange juice, pants, paper, pliers, potato chips, pruning shears, rain, scissors, shorts, "
        "soda, soup, spaghetti, stones, sunglasses, tea, thyme, water, wine"
    ).split(", ")
)
NAMES = {
    "jupiter": "Jupiter", "mars": "Mars", "mercury": "Mercury", "neptune": "Neptune", "pluto": "Pluto",
    "saturn": "Saturn", "uranus": "Uranus", "venus": "Venus", "santa claus": "Santa Claus", "earth": "the Earth",
    "sun": "the sun", "moon": "the moon", "eiffel tower": "the Eiffel Tower",
}


def noun_phrase(name: str, adjective: str = "") -> str:
    """"tiger", "red" -> "a red tiger"; plurals and stuff take "some", names stand alone."""
    if name in NAMES:
        return NAMES[name]
    if name.startswith("flag of "):
        country = " ".join(w if w in ("of", "and") else w.capitalize() for w in name[8:].split())
        return f"the flag of {country}"
    words = f"{adjective} {name}".strip()
    if name in SOME:
        return f"some {words}"
    return ("an " if words[0] in "aeiou" and not words.startswith(("uni", "one", "eu")) else "a ") + words


def caption(name: str, kind: str, colour: str | None) -> str:
    """"An animal: a brown tiger.": the kind first, so that a picture of something never seen still says how it begins."""
    if colour is None or kind in UNCOLOURED or colour in name.split() or name in NAMES:
        phrase = noun_phrase(name)
    elif colour == "black and white":
        phrase = f"a black and white picture of {noun_phrase(name)}"
    else:
        phrase = noun_phrase(name, colour)
    first = KINDS[kind]
    return f"{first[0].upper()}{first[1:]}: {phrase}."


LANGUAGES = {"fr": "French", "de": "German", "es": "Spanish"}


def translations(text_file: pathlib.Path) -> dict[str, str]:
    """Language -> the stamp's caption in it, for stamps whose caption is no more than a thing with its article
    ("Une grenouille."). Those that were left in English are left out."""
    if not text_file.exists():
        return {}
    lines = text_file.read_text(encoding="utf8").splitlines()
    english = lines[0].strip().rstrip(".")
    if not re.fullmatch(r"(An?|Some) \w+( \w+)?", english):
        return {}
    found = {}
    for line in lines[1:]:
        code, _, value = line.partition(".utf8=")
        value = value.strip().rstrip(".").strip()
        if code in LANGUAGES and value != english and re.fullmatch(r"[^\W\d_]+( [^\W\d_]+){1,2}", value):
            found[LANGUAGES[code]] = value[0].lower() + value[1:]
    return found
