"""The words of the synthetic stories and their meanings: classes, opposed pairs, topics, towns."""

from typing import NamedTuple

CLASSES: dict[str, dict[str, str]] = {
    "animal": {
        "pet": "dog cat rabbit parrot",
        "farm animal": "cow horse pig hen goat duck",
        "wild animal": "fox bear wolf owl squirrel",
        "sea animal": "whale crab seal gull",
    },
    "food": {
        "fruit": "apple pear plum cherry",
        "vegetable": "carrot onion bean turnip",
        "pastry": "cake pie bun biscuit",
        "drink": "milk tea juice cider",
    },
    "vehicle": {
        "road vehicle": "bus cart bicycle tram",
        "water vehicle": "boat raft ship canoe",
        "air vehicle": "balloon glider airplane rocket",
    },
    "person": {
        "relative": "mother father sister brother aunt uncle",
        "noble": "king queen prince princess",
        "worker": "cook sailor teacher farmer driver gardener merchant hunter pilot guard",
    },
    "place": {
        "room": "kitchen pantry classroom library hall cellar",
        "open land": "field meadow forest clearing garden lawn",
        "shore": "beach harbor cove island",
        "street place": "street station square market bazaar",
        "high place": "hill cliff tower roof",
    },
    "plant": {"tree": "oak pine birch willow", "flower": "rose daisy tulip violet"},
    "tool": {"kitchen tool": "spoon pot ladle kettle", "garden tool": "spade rake hoe shears"},
    "clothing": {"headwear": "hat cap hood crown", "footwear": "shoe boot slipper sandal"},
    "toy": {"game toy": "ball kite marble hoop", "figure": "doll puppet robot soldier"},
    "instrument": {"wind instrument": "flute horn whistle trumpet", "string instrument": "violin harp lute guitar"},
    "furniture": {"seat": "chair bench stool sofa", "container": "box basket chest drawer"},
    "body part": {"limb": "arm leg hand foot", "face part": "nose ear chin cheek"},
}
"""root -> class -> words"""

PLURALS = [
    "dogs",
    "cats",
    "rabbits",
    "cows",
    "horses",
    "pigs",
    "hens",
    "goats",
    "ducks",
    "foxes",
    "bears",
    "wolves",
    "owls",
    "whales",
    "crabs",
    "seals",
    "gulls",
]


VEGETABLES = ["carrots", "onions", "beans", "turnips"]


class Axis(NamedTuple):
    """Two opposed poles of a property: their names, words for each, and a consequence of each."""

    poles: tuple[str, str]
    words: tuple[str, str]
    """adjectives of each pole, separated by spaces"""
    results: tuple[str, str]
    """a clause that follows from each pole"""


AXES = {
    "temperature": Axis(
        ("hot", "cold"), ("hot warm burning", "cold icy chilly"), ("it burned {his} hands", "it made {him} shiver")
    ),
    "size": Axis(
        ("big", "small"), ("big huge large", "small little tiny"), ("nobody could lift it", "it fit in a pocket")
    ),
    "speed": Axis(
        ("fast", "slow"), ("fast quick swift", "slow sluggish lazy"), ("soon it was gone", "it took all day")
    ),
    "light": Axis(
        ("bright", "dark"), ("bright shining glowing", "dark dim gloomy"), ("all could see it", "nobody saw it")
    ),
    "sound": Axis(
        ("loud", "quiet"),
        ("loud noisy booming", "quiet silent soft"),
        ("{he} covered {his} ears", "{he} listened hard"),
    ),
    "age": Axis(
        ("new", "old"), ("new fresh modern", "old ancient worn"), ("it smelled of paint", "it was full of dust")
    ),
    "moisture": Axis(
        ("wet", "dry"), ("wet damp soaked", "dry dusty parched"), ("water dripped from it", "it needed rain")
    ),
}
"""opposed properties of a thing; it has one pole of each throughout a story"""

ONE_SIDED = {
    "round": Axis(("round", ""), ("round curved rolling", ""), ("it rolled down the path", "")),
    "wooden": Axis(("wooden", ""), ("wooden carved timber", ""), ("a carpenter had made it", "")),
    "sticky": Axis(("sticky", ""), ("sticky gluey gooey", ""), ("it stuck to {his} fingers", "")),
    "striped": Axis(("striped", ""), ("striped spotted checked", ""), ("its pattern was lovely", "")),
    "golden": Axis(("golden", ""), ("golden silver precious", ""), ("it was worth a lot", "")),
    "broken": Axis(("broken", ""), ("broken cracked torn", ""), ("nobody could mend it", "")),
    "magic": Axis(("magic", ""), ("magic enchanted charmed", ""), ("it did strange things", "")),
    "secret": Axis(("secret", ""), ("secret hidden unknown", ""), ("nobody spoke of it", "")),
}
"""control concepts: words in the same sentences, as frequent as a pole, without an opposite"""

DISTANCE = Axis(
    ("near", "far"), ("near close nearby", "far distant remote"), ("they came there soon", "they walked for hours")
)
"""the opposed property of a place"""

MOODS = {
    "glad": {
        "adjective": "happy glad cheerful merry",
        "acted": "smiled laughed sang danced",
        "manner": "happily gladly joyfully",
        "feeling": "joy delight",
    },
    "sad": {
        "adjective": "sad unhappy mournful tearful",
        "acted": "cried sighed wept sobbed",
        "manner": "sadly glumly tearfully",
        "feeling": "sorrow grief",
    },
}

HEROES = {
    "girl": ["Anna", "Lucy", "Mary", "Rosa", "Ella", "Clara", "Nora", "Ida", "Maya", "Tess"],
    "boy": ["Tom", "Ben", "Max", "Otto", "Leo", "Sam", "Finn", "Hugo", "Karl", "Paul"],
}
PRONOUNS = {"girl": {"he": "she", "his": "her", "him": "her"}, "boy": {"he": "he", "his": "his", "him": "him"}}


class Topic(NamedTuple):
    """The subject of a paragraph: places, workers, animals, things and actions."""

    places: str
    workers: str
    animals: str
    things: str
    deeds: tuple[str, ...]


TOPICS = {
    "kitchen": Topic(
        "kitchen pantry", "cook", "cat parrot", "spoon pot ladle kettle", ("washed the dishes", "stirred the soup")
    ),
    "sea": Topic(
        "beach harbor cove island",
        "sailor",
        "whale crab seal gull",
        "boat raft ship canoe",
        ("swam in the waves", "looked for shells"),
    ),
    "school": Topic(
        "classroom library",
        "teacher",
        "rabbit parrot",
        "marble robot whistle guitar",
        ("read a long book", "did the sums"),
    ),
    "farm": Topic(
        "field meadow",
        "farmer",
        "cow horse pig hen goat duck",
        "cart hoe rake basket",
        ("fed the animals", "carried the hay"),
    ),
    "city": Topic(
        "street station square",
        "driver",
        "dog cat",
        "bus tram bicycle bench",
        ("crossed the bridge", "counted the windows"),
    ),
    "sky": Topic(
        "hill tower roof cliff",
        "pilot",
        "owl gull",
        "kite balloon glider airplane rocket",
        ("watched the clouds", "felt the wind"),
    ),
    "forest": Topic(
        "forest clearing",
        "hunter",
        "fox bear wolf owl squirrel",
        "horn flute hood boot",
        ("climbed a tree", "picked mushrooms"),
    ),
    "garden": Topic(
        "garden lawn",
        "gardener",
        "rabbit squirrel",
        "spade shears hoop stool",
        ("watered the plants", "pulled the weeds"),
    ),
    "market": Topic(
        "market bazaar",
        "merchant",
        "goat hen dog",
        "hat cap shoe slipper sandal",
        ("spent some coins", "looked at the stalls"),
    ),
    "castle": Topic(
        "hall cellar", "guard", "horse dog", "crown chest harp lute trumpet", ("lit the candles", "bowed to the throne")
    ),
}

YOUNG = {
    "dog": "puppy",
    "cat": "kitten",
    "cow": "calf",
    "horse": "foal",
    "pig": "piglet",
    "hen": "chick",
    "goat": "kid",
    "duck": "duckling",
    "bear": "cub",
    "owl": "owlet",
}
HOMES = {
    "dog": "kennel",
    "horse": "stable",
    "pig": "sty",
    "hen": "coop",
    "fox": "den",
    "bear": "cave",
    "owl": "nest",
    "rabbit": "burrow",
}
PARTNERS = {
    "king": "queen",
    "prince": "princess",
    "father": "mother",
    "brother": "sister",
    "uncle": "aunt",
    "man": "woman",
}


class Town(NamedTuple):
    """The facts of an invented town; no two towns share any."""

    people: str
    language: str
    weather: str
    food: str


TOWNS = {
    "Velm": Town("Velmers", "Tasq", "rain", "onion"),
    "Orlin": Town("Orlins", "Pirro", "snow", "plum"),
    "Dray": Town("Drayfolk", "Ushan", "fog", "bean"),
    "Mospa": Town("Mospans", "Kell", "sunshine", "cherry"),
    "Quill": Town("Quillers", "Zundi", "hail", "turnip"),
    "Tarnow": Town("Tarnish", "Obrek", "thunder", "pear"),
    "Belis": Town("Belisans", "Yoma", "wind", "carrot"),
    "Harth": Town("Harthers", "Fennic", "frost", "apple"),
}
DIRECTIONS = ["north", "south", "east", "west"]
NUMBERS = ["two", "three", "four", "five", "six"]


def word_class(word: str) -> tuple[str, str] | None:
    """The root and the class of a noun, singular or plural; None for any other word.

    >>> word_class("foxes")
    ('animal', 'wild animal')
    """
    return _WORD_CLASS.get(word)


def _index_classes() -> dict[str, tuple[str, str]]:
    found = {
        word: (root, name)
        for root, classes in CLASSES.items()
        for name, words in classes.items()
        for word in words.split()
    }
    singulars = {"wolves": "wolf", "foxes": "fox"}
    return found | {plural: found[singulars.get(plural, plural[:-1])] for plural in PLURALS}


_WORD_CLASS = _index_classes()
