"""The grammar of the synthetic stories: the plan of a story, and a method for each slot of the sentence templates."""

from collections.abc import Iterator

from saelab.synthetic import lexicon as lex, templates as lines
from saelab.synthetic.vocabulary import T, Teller

WORDS = {name: [w for words in classes.values() for w in words.split()] for name, classes in lex.CLASSES.items()}
SOLID_FOODS = [w for name, words in lex.CLASSES["food"].items() if name != "drink" for w in words.split()]
GIFTS = WORDS["toy"] + WORDS["instrument"] + WORDS["clothing"]
TRAITS = {**lex.AXES, **lex.ONE_SIDED}
POLES = [(name, i) for name, axis in TRAITS.items() for i, pole in enumerate(axis.poles) if pole]
"""each pole of an axis, and each one-sided trait, equally likely"""
NAMES = {name: gender for gender, names in lex.HEROES.items() for name in names}
PLURALS = {{"wolves": "wolf", "foxes": "fox"}.get(word, word[:-1]): word for word in lex.PLURALS}
SPECIALS = ("gift", "gift", "gift", "town", "town", "lore", "recipe", "forecast")


class Tale(Teller):
    """One synthetic story: an opening, two paragraphs of one topic each, a special passage after each, an ending."""

    def generate(self) -> "Tale":
        """Generate the whole story and return it."""
        with self.during("opening"):
            self.say(self.pick(lines.OPENINGS))
            self.say(self.pick(lines.FRIENDS))
        for _ in range(2):
            self.forget("topic", "place", "thing", "trait", "animal", "mood", "distance")
            self._lasting -= {s for s in self._lasting if not s.startswith("story of")}
            self.paragraph()
            self._lasting -= {s for s in self._lasting if s.startswith("topic ")}  # what is special has no topic
            getattr(self, "special_" + self.pick(SPECIALS, "special"))()
            self.marks.append(("special end", len(self.words)))
        with self.during("ending"):
            self.say(self.pick(lines.ENDINGS))
        return self

    def paragraph(self) -> None:
        """Write an arrival at a place, then three to five sentences of different kinds."""
        self.say(self.pick(lines.ARRIVALS))
        left = dict(lines.BODY)
        for i in range(5):
            kinds = [kind for kind, (_, needs, times) in left.items() if needs in self.known for _ in range(times)]
            kind = self.pick(kinds + ["stop"] * (3 if i > 2 else 0))
            if kind == "stop":
                return
            self.say(self.pick(left.pop(kind)[0]))

    def special_gift(self) -> None:
        """Write a passage in which one person gives the other something."""
        self.forget("one", "gift", "giver")
        self.say(self.pick(lines.MEETINGS))
        self.say(self.pick(lines.GIFTS))

    def special_town(self) -> None:
        """Write two facts about an invented town."""
        self.forget("town")
        for line in self._two_of(lines.TOWN_FACTS + lines.TOWN_USES):
            self.say(line)
        self._lasting -= {s for s in self._lasting if s.startswith("about ")}

    def special_lore(self) -> None:
        """Write two sentences of different relations: young animals, animal homes, partners."""
        kinds = {"young-of": lines.YOUNGS, "home-of": lines.HOMES, "partner-of": lines.PARTNERS}
        for relation in self._two_of(tuple(kinds)):
            self.forget("parent", "owner", "man")
            with self.during(relation):
                self.say(self.pick(kinds[relation]))

    def special_recipe(self) -> None:
        """Write a recipe."""
        with self.during("recipe"):
            for line in lines.RECIPES:
                self.say(line)

    def special_forecast(self) -> None:
        """Write a weather report."""
        with self.during("weather-report"):
            self.say(lines.FORECASTS[0])
            for line in self._two_of(lines.FORECASTS[1:]):
                self.say(line)

    def _two_of(self, options: tuple[T, ...]) -> Iterator[T]:
        first = self.pick(options)
        yield first
        yield self.pick([option for option in options if option != first])

    # people

    def _gender(self) -> str:
        return self.recall("gender", ("girl", "boy"))

    def slot_child(self) -> None:
        gender = self._gender()
        self.last(f"story of a {gender}")
        self.write(gender)

    def _name(self, name: str, *roles: str) -> None:
        first = name not in self.words
        self.write(name, *roles, *(["first-mention"] if first else []))

    def slot_hero(self) -> None:
        self._name(self.recall("hero", lex.HEROES[self._gender()]))

    def slot_friend(self) -> None:
        self._name(self.recall("friend", [name for name in NAMES if name != self.known["hero"]]))

    def slot_he(self) -> None:
        self.write(lex.PRONOUNS[self._gender()]["he"])

    def slot_his(self) -> None:
        self.write(lex.PRONOUNS[self._gender()]["his"])

    def slot_him(self) -> None:
        self.write(lex.PRONOUNS[self._gender()]["him"])

    def slot_his_friend(self) -> None:
        self.write(lex.PRONOUNS[NAMES[str(self.known["friend"])]]["his"])

    def _pair(self) -> tuple[str, str]:
        return str(self.known["hero"]), str(self.known["friend"])

    def slot_one(self) -> None:
        self._name(self.recall("one", self._pair()))

    def slot_other(self) -> None:
        self._name(next(name for name in self._pair() if name != self.known["one"]))

    def slot_giver(self) -> None:
        place = self.recall("giver", (0, 1))
        self.marks.append(("giver", len(self.words)))
        self._name(self._pair()[place], "giver")

    def slot_receiver(self) -> None:
        self.marks.append(("receiver", len(self.words)))
        self._name(self._pair()[1 - self.recall("giver", (0, 1))], "receiver")

    def slot_a_gift(self) -> None:
        self._article(self.recall("gift", GIFTS))

    def slot_gift_again(self) -> None:
        self.write(str(self.known["gift"]))

    def slot_worker(self) -> None:
        self.write(self._topic().workers)

    # where

    def _topic(self) -> lex.Topic:
        return lex.TOPICS[self.recall("topic", list(lex.TOPICS))]

    def slot_place(self) -> None:
        place = self.recall("place", self._topic().places.split())
        self.last(f"topic {self.known['topic']}")
        self.write(place)

    def slot_place_again(self) -> None:
        self.write(str(self.known["place"]))

    def slot_place_pole(self) -> None:
        pole = self.recall("distance", (0, 1))
        self.write(self.pick(lex.DISTANCE.words[pole].split()))

    def slot_place_result(self) -> None:
        pole = self.recall("distance", (0, 1))
        self.write(lex.DISTANCE.results[pole], lex.DISTANCE.poles[pole])

    def slot_far_place(self) -> None:
        self.write(self.pick([w for w in WORDS["place"] if w != self.known["place"]]))

    # things

    def _article(self, words: str, *concepts: str) -> None:
        self.write("an" if words[0] in "aeiou" else "a")
        self.write(words, *concepts)

    def _trait(self) -> tuple[lex.Axis, int]:
        name, pole = self.recall("trait", POLES)
        return TRAITS[name], pole

    def slot_a_pole(self) -> None:
        axis, pole = self._trait()
        self._article(self.pick(axis.words[pole].split()))

    def slot_pole(self) -> None:
        axis, pole = self._trait()
        self.write(self.pick(axis.words[pole].split()))

    def slot_result(self) -> None:
        axis, pole = self._trait()
        with self.during(axis.poles[pole]):
            for word in axis.results[pole].split():
                if word[0] == "{":
                    getattr(self, "slot_" + word[1:-1])()
                else:
                    self.write(word)

    def slot_opposite(self) -> None:
        """Write the opposite pole; a one-sided trait has none, so any other one-sided trait."""
        axis, pole = self._trait()
        others = axis.words[1 - pole] or " ".join(other.words[0] for other in lex.ONE_SIDED.values() if other != axis)
        self.write(self.pick(others.split()))

    def slot_thing(self) -> None:
        self.write(self.recall("thing", self._topic().things.split()))

    def slot_thing_again(self) -> None:
        self.write(str(self.known["thing"]))

    def slot_thing_class(self) -> None:
        root, name = lex.word_class(str(self.known["thing"])) or ("", "")
        self.write(name, name, root)

    def slot_thing_root(self) -> None:
        self.write((lex.word_class(str(self.known["thing"])) or ("",))[0])

    # animals, food and the rest

    def slot_animal(self) -> None:
        self.write(self.recall("animal", self._topic().animals.split()))

    def slot_a_animal(self) -> None:
        self._article(self.recall("animal", self._topic().animals.split()))

    def slot_a_animal_again(self) -> None:
        self._article(str(self.known["animal"]))

    def slot_animals(self) -> None:
        self.write(self.pick([PLURALS[w] for w in self._topic().animals.split() if w in PLURALS]))

    def slot_animal_class(self) -> None:
        name = (lex.word_class(str(self.known["animal"])) or ("", ""))[1]
        self.write(name, name, "animal")

    def slot_animal_root(self) -> None:
        self.write("animal")

    def _mood(self) -> dict[str, str]:
        mood = self.recall("mood", list(lex.MOODS))
        self.last(mood)
        return lex.MOODS[mood]

    def slot_mood_adjective(self) -> None:
        self.write(self.pick(self._mood()["adjective"].split()))

    def slot_mood_acted(self) -> None:
        self.write(self.pick(self._mood()["acted"].split()))

    def slot_mood_manner(self) -> None:
        self.write(self.pick(self._mood()["manner"].split()))

    def slot_mood_feeling(self) -> None:
        self.write(self.pick(self._mood()["feeling"].split()))

    def slot_deed(self) -> None:
        self.write(self.pick(self._topic().deeds))

    def slot_a_toy(self) -> None:
        self._article(self.pick(WORDS["toy"]))

    def slot_a_food(self) -> None:
        self._article(self.pick(SOLID_FOODS))

    def slot_a_plant(self) -> None:
        self._article(self.pick(WORDS["plant"]))

    def slot_drink(self) -> None:
        self.write(self.pick(lex.CLASSES["food"]["drink"].split()))

    def slot_clothing(self) -> None:
        self.write(self.pick(WORDS["clothing"]))

    def slot_furniture(self) -> None:
        self.write(self.pick(WORDS["furniture"]))

    def slot_instrument(self) -> None:
        self.write(self.pick(WORDS["instrument"]))

    def slot_body(self) -> None:
        self.write(self.pick(WORDS["body part"]))

    # towns, lore and registers

    def _town(self) -> str:
        if "town" in self.known:
            self.marks.append(("fact", len(self.words)))  # from here on every word of the town is forced
        town = self.recall("town", list(lex.TOWNS))
        self.last(f"about {town}")
        return town

    def slot_town(self) -> None:
        self.write(self._town())

    def slot_people(self) -> None:
        self.write(lex.TOWNS[self._town()].people)

    def slot_language(self) -> None:
        self.write(lex.TOWNS[self._town()].language)

    def slot_weather(self) -> None:
        self.write(lex.TOWNS[self._town()].weather)

    def slot_food_of_town(self) -> None:
        self.write(lex.TOWNS[self._town()].food)

    def slot_parent(self) -> None:
        self.write(self.recall("parent", list(lex.YOUNG)))

    def slot_young(self) -> None:
        self.write(lex.YOUNG[str(self.known["parent"])])

    def slot_a_young(self) -> None:
        self._article(lex.YOUNG[str(self.known["parent"])])

    def slot_owner(self) -> None:
        self.write(self.recall("owner", list(lex.HOMES)))

    def slot_an_owner(self) -> None:
        self._article(self.recall("owner", list(lex.HOMES)))

    def slot_home(self) -> None:
        self.write(lex.HOMES[str(self.known["owner"])])

    def slot_man(self) -> None:
        self.write(self.recall("man", list(lex.PARTNERS)))

    def slot_woman(self) -> None:
        self.write(lex.PARTNERS[str(self.known["man"])])

    def slot_a_woman(self) -> None:
        self._article(lex.PARTNERS[str(self.known["man"])])

    def slot_dish(self) -> None:
        self.write(self.pick(("soup", "stew")))

    def slot_number(self) -> None:
        self.write(self.pick(lex.NUMBERS))

    def slot_vegetables(self) -> None:
        self.write(self.pick(lex.VEGETABLES))

    def slot_pot(self) -> None:
        self._article(self.pick(("pot", "kettle")))

    def slot_direction(self) -> None:
        self.write(self.pick(lex.DIRECTIONS))

    def slot_weather_free(self) -> None:
        self.write(self.pick([town.weather for town in lex.TOWNS.values()]))
