"""The open and closed words of the dialogues: names, places and numbers without end, days and colours from lists.

Open words are split by a checksum of their own: one in ten is held out, and no training dialogue ever says it.
"""

import zlib
from collections import defaultdict
from collections.abc import Sequence
from random import Random
from string import ascii_uppercase

_ONSETS = "b br c ch d dr f g gr h j k kl l m n p pr r s sh st t tr v w y z".split()
_NUCLEI = "a e i o u ai ea ia io ou".split()
_CODAS = ["", "", "", *"l m n r s t x nd ck rt lla nna".split()]
_MORE_NUCLEI = [*_NUCLEI, *"ee ei ie oo ue y au".split()]
_MORE_CODAS = [*_CODAS, *"ff ll ng rk sh ss st th k p".split()]
_REAL_NAMES = (
    "Adam Agnes Albert Alice Amir Ana Andrew Anna Anton Arthur Astrid Ben Bella Boris Bruno Camille Carl Carmen Cara "
    "Chen Clara Cora Daniel David Dora Edith Elena Elif Elsa Emil Emma Erik Eva Fatima Felix Fiona Frank Frida George "
    "Gloria Greta Hana Hannah Hans Hugo Ida Igor Ines Ingrid Ivan Jack Jana Jonas Julia Kai Karin Karl Katya Kenji "
    "Lara Laura Leo Lena Lily Linda Lisa Lucas Lucy Magnus Maria Marco Martin Maya Mei Milan Mina Mira Mona Nadia "
    "Nina Noah Nora Olga Oliver Omar Oscar Otto Paul Pedro Petra Priya Rania Ravi Rita Robert Rosa Ruth Sam Sara "
    "Selma Simon Sofia Stefan Sven Tara Tim Thomas Tina Tom Ursula Vera Victor Wanda Walter Yara Yuki Yusuf Zara Zoe"
).split()
_REAL_PETS = (
    "Ace Bandit Bear Biscuit Bubbles Buddy Button Charlie Coco Cookie Daisy Domino Duke Echo Flash Fluffy Ginger "
    "Hazel Honey Jasper Kiwi Lucky Luna Max Misty Mocha Muffin Nala Oreo Patch Peanut Pepper Pickle Pixie Poppy Rex "
    "Rocky Ruby Rusty Sandy Shadow Smoky Snowball Sparky Spot Storm Sunny Teddy Tiger Toffee Waffles Whiskers Ziggy"
).split()
_REAL_PLACES = (
    "Accra Amsterdam Athens Bergen Berlin Bern Bogota Bonn Boston Bristol Cairo Chicago Copenhagen Cork Dakar Delhi "
    "Denver Dublin Geneva Genoa Ghent Hamburg Hanoi Helsinki Istanbul Kyoto Lagos Leeds Lima Lisbon London Lyon "
    "Madrid Malmo Manila Milan Montreal Munich Nairobi Naples Oslo Osaka Paris Porto Prague Quito Riga Rome Seattle "
    "Seoul Seville Sofia Tallinn Tokyo Toronto Turin Tunis Vienna Vilnius Warsaw York Zagreb Zurich"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
FAVOURITES = {
    "colour": "red blue green yellow purple orange pink brown black white grey silver golden turquoise violet".split(),
    "food": "pizza soup rice pasta curry salad bread cheese sushi pancakes noodles dumplings lentils stew".split(),
    "drink": "tea coffee milk water juice cocoa lemonade cider wine beer".split(),
    "sport": "tennis football chess swimming rowing running cycling boxing skiing hockey golf climbing".split(),
    "animal": "foxes owls bears wolves otters whales rabbits deer bees seals turtles swans".split(),
    "flower": "roses tulips lilies daisies violets orchids poppies irises".split(),
    "instrument": "piano violin flute guitar drums harp cello trumpet organ".split(),
    "season": "spring summer autumn winter".split(),
}


def is_held_out(word: str) -> bool:
    """One word in ten, the same ones for ever."""
    return zlib.crc32(word.lower().encode()) % 10 == 0


class Words:
    """Draws words: those that training uses, or only those held out from it."""

    def __init__(
        self, random: Random, *, held_out: bool, plain: bool = False, wide: bool = False, pieces: Sequence[str] = ()
    ) -> None:
        """Open words are `plain`, real ones and such of syllables, or more varied; of more syllables if `wide`.

        Some of the varied ones are strung from `pieces`, if there are any, behind any capital letter.
        """
        self._random = random
        self._held_out = held_out
        self._plain = plain
        self._pieces = pieces
        self._nuclei, self._codas = (_MORE_NUCLEI, _MORE_CODAS) if wide else (_NUCLEI, _CODAS)

    def name(self) -> str:
        return self._open(_REAL_NAMES)

    def pet(self) -> str:
        return self._open(_REAL_PETS)

    def place(self) -> str:
        return self._open(_REAL_PLACES)

    def code(self) -> str:
        while True:
            digits = "".join(self._random.choices("0123456789", k=self._random.choice((2, 3, 4, 4, 5))))
            if is_held_out(digits) == self._held_out:
                return digits

    def day(self) -> str:
        """A weekday, or a date (whose number and month are not held out apart: the pair is)."""
        while True:
            date = f"{self._random.randint(1, 28)} {self._random.choice(MONTHS)}"
            if self._random.random() < 0.5:
                return self._random.choice(DAYS)
            if is_held_out(date) == self._held_out:
                return date

    def favourite(self, kind: str) -> str:
        return self._random.choice(FAVOURITES[kind])

    def odd(self) -> str:
        """A word that means nothing."""
        return self._by_syllables().lower()

    def _open(self, real: list[str]) -> str:
        while True:
            word = self._plain_word(real) if self._plain else self._varied_word(real)
            if is_held_out(word) == self._held_out:
                return word

    def _plain_word(self, real: list[str]) -> str:
        return self._random.choice(real) if self._random.random() < 0.35 else self._by_syllables()

    def _varied_word(self, real: list[str]) -> str:
        """A real word, one by letters that follow each other in real ones, one of pieces, or one of syllables."""
        match self._random.randrange(10):
            case 0 | 1 | 2:
                return self._random.choice(real)
            case 3 | 4:
                return self._by_letters()
            case 5 | 6 | 7 if self._pieces:
                return self._by_pieces()
            case _:
                return self._by_syllables()

    def _by_syllables(self) -> str:
        pick = self._random.choice
        syllables = [pick(_ONSETS) + pick(self._nuclei) for _ in range(pick((1, 2, 2, 3)))]
        return ("".join(syllables) + pick(self._codas)).capitalize()

    def _by_pieces(self) -> str:
        return self._random.choice(ascii_uppercase) + "".join(
            self._random.choices(self._pieces, k=self._random.randint(1, 4))
        )

    def _by_letters(self) -> str:
        """Each letter one that follows the two before it in some word of the lists that is not held out."""
        while True:
            word = ""
            while not word.endswith("."):
                word += self._random.choice(_FOLLOWING[("^^" + word)[-2:]])
            if 3 <= len(word) - 1 <= 10:
                return word[:-1].capitalize()


def _following() -> dict[str, list[str]]:
    """For each two letters, those that follow them; ^ is before a word and . behind it."""
    found: dict[str, list[str]] = defaultdict(list)
    for word in (*_REAL_NAMES, *_REAL_PETS, *_REAL_PLACES):
        if not is_held_out(word):
            letters = f"^^{word.lower()}."
            for at in range(2, len(letters)):
                found[letters[at - 2 : at]].append(letters[at])
    return dict(found)


_FOLLOWING = _following()
