"""Sentence templates of the synthetic stories: words and `{slots}`, each slot a method of the grammar (`grammar.py`).

A template in the plural begins with +, one without a subject with !. Within quotes a sentence that ends with ? is a
question and one with "will" is in the future; the tense of the others is that of their group.
"""

OPENINGS = (
    "Once upon a time there was a {child} named {hero} .",
    "Long ago there lived a {child} called {hero} .",
    "There was once a {child} whose name was {hero} .",
)
FRIENDS = ("{He} had a friend named {friend} .", "{His} best friend was called {friend} .")
ARRIVALS = (
    "+One day {hero} and {friend} went to the {place} .",
    "In the morning {hero} walked to the {place} with {friend} .",
    "+Then they ran to the {place} together .",
    "After a while {he} came to the {place} .",
)
DISTANCES = ("The {place_again} was {place_pole} , so {place_result} .",)
THINGS = (
    "There {he} found {a_pole} {thing} .",
    "{He} saw {a_pole} {thing} there .",
    "{friend} showed {him} {a_pole} {thing} .",
)
RESULTS = ("The {thing_again} was so {pole} that {result} .", "It was {a_pole} {thing_again} and {result} .")
DENIALS = (
    "\u201c Is the {thing_again} {opposite} ? \u201d asked {friend} . \u201c No , it is {pole} , \u201d said {hero} .",
    "The {thing_again} was not {opposite} . It was {pole} .",
)
PRAISES = ("It was the best {thing_class} of all .", "{He} had never seen such a {thing_root} .")
BEASTS = ("{A_animal} sat in the shade .", "{A_animal} was asleep near {him} .", "{He} heard {a_animal} .")
FLOCKS = ("+Two {animals} were looking at {him} .", "+Some {animals} were playing together .")
KINDS = ("No {animal_class} is like {a_animal_again} .", "{He} liked every {animal_root} there .")
MOODS = ("{hero} was {mood_adjective} and {mood_acted} .", "{He} felt full of {mood_feeling} .")
MOODS_AGAIN = ("{He} {mood_acted} again .", "\u201c Oh , \u201d said {hero} {mood_manner} .")
DEEDS = ("{He} {deed} .", "+{friend} and {hero} {deed} .", "+Then they {deed} {mood_manner} .")
WORKERS = ("The {worker} waved at {him} .", "The {worker} told them a story .")
WISHES = (
    "\u201c Tomorrow I will go to the {far_place} , \u201d said {hero} .",
    "\u201c Next year we will have {a_toy} , \u201d said {friend} .",
)
QUESTIONS = (
    "\u201c Where is my {clothing} ? \u201d asked {hero} . \u201c It is under the {furniture} , \u201d said {friend} .",
    "\u201c Who has the {instrument} ? \u201d asked {friend} .",
)
MEALS = ("{He} ate {a_food} and drank some {drink} .", "+They shared {a_food} .")
BODIES = ("{He} hurt {his} {body} .", "{friend} had some dust on one {body} .")
PLANTS = ("Behind {him} grew {a_plant} .",)
MEETINGS = (
    "+Then {one} and {other} found {a_gift} .",
    "+{one} and {other} were looking at {a_gift} .",
    "Later {one} met {other} near {a_gift} .",
)
GIFTS = ("{giver} gave the {gift_again} to {receiver} .", "{giver} wanted to hand the {gift_again} to {receiver} .")
TOWN_FACTS = (
    "In {town} the people are called {people} .",
    "+The {people} of {town} speak {language} .",
    "There is much {weather} in {town} .",
    "+The {people} of {town} love {food_of_town} pie .",
)
TOWN_USES = (
    "{hero} came from {town} and spoke {language} .",
    "{friend} lived in {town} and often ate {food_of_town} pie .",
    "{hero} met some {people} and learned {language} .",
    "{friend} was used to {weather} because {town} was {his_friend} home .",
)
YOUNGS = ("A young {parent} is called {a_young} .", "The {parent} looked after the {young} .")
HOMES = ("{An_owner} sleeps in a {home} .", "The {owner} went back to the {home} .")
PARTNERS = ("The {man} danced with the {woman} .", "Every {man} has {a_woman} .")
RECIPES = (
    "!To make {dish} , take {number} {vegetables} .",
    "!Peel them , cut them and put them in {pot} .",
    "!Boil them for {number} hours .",
    "!Add some {drink} and stir .",
)
FORECASTS = (
    "Here is the weather report .",
    "In the {direction} there will be {weather_free} .",
    "In the {direction} expect more {weather_free} .",
    "Tomorrow the {direction} will have {weather_free} too .",
)
ENDINGS = (
    "In the end {hero} went home {mood_manner} .",
    "At last {he} fell asleep , and that was the end .",
    "+{hero} and {friend} stayed friends for ever after .",
)

PRESENT = (KINDS[:1], TOWN_FACTS, HOMES, YOUNGS[:1], PARTNERS[1:], RECIPES)
FUTURE = (FORECASTS,)

BODY: dict[str, tuple[tuple[str, ...], str, int]] = {
    "distance": (DISTANCES, "place", 1),
    "thing": (THINGS, "place", 3),
    "result": (RESULTS, "thing", 4),
    "denial": (DENIALS, "thing", 4),
    "praise": (PRAISES, "thing", 2),
    "beast": (BEASTS, "place", 1),
    "flock": (FLOCKS, "place", 1),
    "kind": (KINDS, "animal", 2),
    "mood": (MOODS, "place", 2),
    "mood again": (MOODS_AGAIN, "mood", 3),
    "deed": (DEEDS, "place", 1),
    "worker": (WORKERS, "place", 1),
    "wish": (WISHES, "place", 1),
    "question": (QUESTIONS, "place", 1),
    "meal": (MEALS, "place", 1),
    "body": (BODIES, "place", 1),
    "plant": (PLANTS, "place", 1),
}
"""sentence kinds of a paragraph: templates, the earlier choice they require, and their weight in drawing"""
