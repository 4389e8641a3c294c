"""Names, words and sentences made up from a seed: no text of anybody is needed, and as many as a length wants."""
from __future__ import annotations

import random
import re

ONSETS = "b br c ch cl d dr f fl g gr h j k l m n p pl pr qu r s sh sl st t th tr v w".split()
VOWELS = "a e i o u ai ea ee ia io oa ou".split()
CODAS = ["", "", "l", "m", "n", "nd", "r", "rn", "s", "st", "t", "x"]

ADJECTIVES = """
amber ancient angular autumn bashful beryl bitter blunt brave brisk bronze careful cheerful chilly clever
coarse copper crimson curious dapper distant dusty eager early earnest elder emerald fabled faint fearless fertile
foggy formal frosty gentle gilded glad glossy golden grateful hidden hollow humble icy idle indigo ivory jolly keen
kindly lively lonely loyal lucid lunar mellow merry mighty misty modest narrow nimble noble northern oblique olive
patient pearly plain polished prudent quaint quiet radiant rapid rugged rustic sandy scarlet serene shady silent
silver sincere slender smooth snowy solemn sparse spirited steady stormy sturdy subtle sunny tender thorny timid
tranquil twilight upright velvet vivid wandering warm weary western wild windy wistful woolen young zealous""".split()

NOUNS = """acorn anchor anvil apron arrow badger balcony barley barrel basket beacon beaver bellows bench birch bishop
blanket bonnet bridge bucket button cabin candle canyon carpet castle cedar cellar chimney cider cinder clover cobbler
comet compass copper cottage cradle cricket curtain dagger dairy donkey dragon drummer eagle ember falcon feather
fiddle flagon forest fountain galley garden gazelle glacier goblet granite hammer hamlet harbor harness hatchet heron
hillside honey island jackal jasper kettle kitten ladder lantern lichen linen lobster locket lumber magnet mallet
maple market meadow mirror mitten monsoon mortar nectar needle orchard otter oyster paddle parlor parsley pebble
pepper pigeon pillow pilgrim plaster pocket pony quarry quill rabbit ribbon river saddle sailor salmon sandal satchel
shadow shovel sparrow spindle stable steeple summit tailor tavern thicket thimble thunder timber tinder trumpet tunnel
turnip valley violin wagon walnut weaver whistle willow window wizard yarrow zephyr""".split()

PLACES = "the harbour,the old mill,the market,the north gate,the library,the station,the orchard,the river".split(",")
VERBS = "watched,repaired,painted,sold,carried,praised,measured,forgot,described,mended,followed,hid".split(",")
WEATHER = "It rained all morning.,The wind turned before noon.,Nobody hurried.,The lamps were lit early.".split(",")

SENTENCE_END = re.compile("(?:(?<=[.!?])|(?<=[.!?][\"\u201d\u2019])) (?=[\"\u201c\u2018(A-Z])")


def syllables(rng: random.Random, count: int) -> str:
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + (rng.choice(CODAS) if i == count - 1 else "")
                   for i in range(count))


def distinct(rng: random.Random, count: int, size: int = 3, taken: set[str] | None = None) -> list[str]:
    """Words that look like words, each once; they get longer when short ones run out."""
    seen = set() if taken is None else taken
    words: list[str] = []
    misses = 0
    while len(words) < count:
        word = syllables(rng, size + misses // 1000)
        if word in seen:
            misses += 1
            continue
        seen.add(word)
        words.append(word)
    return words


def names(rng: random.Random, count: int) -> list[str]:
    return [name.capitalize() for name in distinct(rng, count, 2)]


def pairs(rng: random.Random, count: int) -> list[str]:
    """"gentle-otter", each once; with a number when all are used up."""
    all_pairs = len(ADJECTIVES) * len(NOUNS)
    chosen = rng.sample(range(all_pairs), min(count, all_pairs))
    words = [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in chosen]
    return words + [f"{words[i % all_pairs]}-{i // all_pairs + 1}" for i in range(all_pairs, count)]


def sentence(rng: random.Random) -> str:
    """About nothing that a task asks for."""
    if rng.random() < 0.2:
        return rng.choice(WEATHER)
    who = f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    what = f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    place = rng.choice(PLACES)
    forms = (f"{who.capitalize()} stood near {place}.", f"Somebody {rng.choice(VERBS)} {what} at {place}.",
             f"At {place}, {who} was older than {what}.", f"They {rng.choice(VERBS)} {who} and {what}.")
    return rng.choice(forms)


def sentences(text: str) -> list[str]:
    """Of running text: cut behind a full stop, question or exclamation mark, with its closing quote."""
    flat = re.sub(r"\s+", " ", text).strip()
    return [part for part in SENTENCE_END.split(flat) if part]
