"""How users say and ask things. Each list's last entries, after `HELD_OUT`, are never said in training.

{s} is the subject as the user says it ("my sister's dog"), {S} the same at the start of a sentence, {v} the value.
"""

from collections.abc import Sequence
from dataclasses import dataclass

HELD_OUT = "--- held out ---"


def split(phrases: Sequence[str], *, held_out: bool) -> list[str]:
    """The phrases of training, or those held out from it."""
    at = phrases.index(HELD_OUT)
    return list(phrases[at + 1 :] if held_out else phrases[:at])


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fact: what it may be about, and how it is told, asked and confirmed."""

    name: str
    nouns: tuple[str, ...]
    link: str
    """Between subject and value, in the assistant's sentences."""
    tells: tuple[str, ...]
    """Statements, which `TELLING` may introduce."""
    asks: tuple[str, ...]
    """Questions as they stand."""
    clauses: tuple[str, ...]
    """What `ASKING` asks for."""
    owned: bool = True
    """Whether the subject has an owner ("my sister's dog", "Anna's dog"), or is always the user's own ("my name")."""


KINDS = (
    Kind(
        "name",
        ("dog", "cat", "horse", "parrot", "rabbit", "hamster", "goat", "boat"),
        "is called",
        (
            "{S} is called {v}.",
            "{S} is named {v}.",
            "{v} is the name of {s}.",
            "The name of {s} is {v}.",
            "{S}'s name is {v}.",
            "We call {s} {v}.",
            "I call {s} {v}.",
            "Let me tell you about {s}. The name is {v}.",
            "{S} has the name {v}.",
            "{S} answers to the name {v}.",
            "{S} got the name {v}.",
            "They named {s} {v}.",
            HELD_OUT,
            "Everyone calls {s} {v}.",
            "They gave {s} the name {v}.",
            "You may call {s} {v}.",
        ),
        (
            "What is {s} called?",
            "What's {s} called?",
            "What is the name of {s}?",
            "What's {s}'s name?",
            "How is {s} called?",
            "What do we call {s}?",
            "What was the name of {s} again?",
            "And {s}, what is the name?",
            HELD_OUT,
            "Which name does {s} have?",
            "What name did we give {s}?",
        ),
        ("the name of {s}", "what {s} is called", "{s}'s name", "how {s} is called", HELD_OUT, "which name {s} has"),
    ),
    Kind(
        "person",
        ("boss", "dentist", "teacher", "doctor", "lawyer", "landlord", "cousin", "daughter", "son", "coach"),
        "is",
        (
            "{S} is {v}.",
            "{S} is called {v}.",
            "{S} is named {v}.",
            "{v} is {s}.",
            "The name of {s} is {v}.",
            "{S}'s name is {v}.",
            "I met {s}, whose name is {v}.",
            "{S} has the name {v}.",
            "We call {s} {v}.",
            "{v} became {s}.",
            "I got to know {v}, who is {s}.",
            HELD_OUT,
            "Everyone calls {s} {v}.",
            "I spoke to {s}, that is {v}.",
        ),
        (
            "Who is {s}?",
            "Who's {s}?",
            "What is the name of {s}?",
            "What's {s}'s name?",
            "What is {s} called?",
            "Who was {s} again?",
            "And who is {s}?",
            HELD_OUT,
            "Which name does {s} have?",
            "How is {s} called?",
        ),
        ("who {s} is", "the name of {s}", "{s}'s name", "what {s} is called", HELD_OUT, "which name {s} has"),
    ),
    Kind(
        "home",
        ("aunt", "uncle", "grandmother", "nephew", "niece", "friend", "colleague", "roommate"),
        "lives in",
        (
            "{S} lives in {v}.",
            "{S} has a flat in {v}.",
            "{v} is where {s} lives.",
            "The home of {s} is in {v}.",
            "{S}'s home is in {v}.",
            "{S} moved to {v} and lives there.",
            "{S} has a house in {v}.",
            "I visited {s} at home, in {v}.",
            "{S} is living in {v}.",
            "{S} has lived in {v} for years.",
            HELD_OUT,
            "{S} makes a home in {v}.",
            "You can find {s} in {v}.",
        ),
        (
            "Where does {s} live?",
            "In which town does {s} live?",
            "Where is the home of {s}?",
            "Where is {s}'s home?",
            "Which town does {s} live in?",
            "Where did {s} live again?",
            "And where does {s} live?",
            HELD_OUT,
            "In what place does {s} live?",
            "Where can I find {s}?",
        ),
        ("where {s} lives", "in which town {s} lives", "where the home of {s} is", HELD_OUT, "which town {s} lives in"),
    ),
    Kind(
        "day",
        ("exam", "flight", "birthday", "wedding", "concert", "interview", "party", "appointment"),
        "is on",
        (
            "{S} is on {v}.",
            "{S} will be on {v}.",
            "{S} takes place on {v}.",
            "The date of {s} is {v}.",
            "On {v} there is {s}.",
            "On {v} it is {s}.",
            "Please keep {v} free for {s}.",
            "They have set {s} for {v}.",
            "{S} was moved to {v}.",
            "The day of {s} is {v}.",
            "{S} falls on {v}.",
            "I am looking forward to {s} on {v}.",
            HELD_OUT,
            "{S} happens on {v}.",
            "Mark {v} for {s}.",
        ),
        (
            "When is {s}?",
            "When's {s}?",
            "On which day is {s}?",
            "What is the date of {s}?",
            "What day is {s}?",
            "When will {s} take place?",
            "When was {s} again?",
            "And when is {s}?",
            HELD_OUT,
            "On what date is {s}?",
            "When does {s} take place?",
        ),
        ("when {s} is", "the date of {s}", "on which day {s} is", "the day of {s}", HELD_OUT, "what day {s} is"),
    ),
    Kind(
        "code",
        ("locker", "gate", "safe", "garage", "alarm", "room", "seat", "ticket", "account"),
        "has the number",
        (
            "{S} has the number {v}.",
            "The number of {s} is {v}.",
            "The code of {s} is {v}.",
            "The number for {s} is {v}.",
            "{S}'s number is {v}.",
            "{S} has number {v}.",
            "{v} is the number of {s}.",
            "{v} is the code of {s}.",
            "You need {v} for {s}.",
            "For {s} the number is {v}.",
            "For {s} you need {v}.",
            "I wrote down {v} as the number of {s}.",
            HELD_OUT,
            "Use {v} for {s}.",
            "{S} has the code {v}.",
        ),
        (
            "What is the number of {s}?",
            "What's the number of {s}?",
            "Which number does {s} have?",
            "What is the code of {s}?",
            "What number do I need for {s}?",
            "What is {s}'s number?",
            "And what was the number of {s}?",
            HELD_OUT,
            "What number has {s}?",
            "What is the number for {s}?",
        ),
        (
            "the number of {s}",
            "the code of {s}",
            "{s}'s number",
            "which number {s} has",
            HELD_OUT,
            "the number for {s}",
        ),
    ),
    Kind(
        "favourite",
        ("colour", "food", "drink", "sport", "animal", "flower", "instrument", "season"),
        "is",
        (
            "{S} is {v}.",
            "{v} is {s}.",
            "If you ask about {s}, it is {v}.",
            "As for {s}, it is {v}.",
            "{S} will always be {v}.",
            "For {s} the choice is {v}.",
            "{S} must be {v}.",
            HELD_OUT,
            "{S} has always been {v}.",
            "When it comes to {s}, it is {v}.",
        ),
        (
            "What is {s}?",
            "What's {s}?",
            "What was {s} again?",
            "Which one is {s}?",
            "And what is {s}?",
            HELD_OUT,
            "What would {s} be?",
        ),
        ("{s}", "what {s} is", "which one is {s}", HELD_OUT, "what {s} was"),
    ),
    Kind(
        "self_name",
        ("name",),
        "is",
        (
            "My name is {v}.",
            "I am {v}.",
            "I'm {v}.",
            "You can call me {v}.",
            "People call me {v}.",
            "Hello, I am {v}.",
            "Hi, my name is {v}.",
            "Hi, I'm {v}.",
            HELD_OUT,
            "This is {v} speaking.",
            "Everyone calls me {v}.",
        ),
        ("What is my name?", "What's my name?", "Who am I?", "What am I called?", HELD_OUT, "What was my name again?"),
        ("my name", "what my name is", "who I am", HELD_OUT, "what I am called"),
        owned=False,
    ),
    Kind(
        "self_home",
        ("home",),
        "is in",
        (
            "I live in {v}.",
            "My home is in {v}.",
            "I am from {v}.",
            "I'm living in {v}.",
            "I moved to {v} and live there.",
            "I have a flat in {v}.",
            HELD_OUT,
            "I have a house in {v}.",
            "I have lived in {v} for years.",
        ),
        (
            "Where do I live?",
            "Where is my home?",
            "In which town do I live?",
            "Where am I from?",
            HELD_OUT,
            "Where's my home?",
        ),
        ("where I live", "where my home is", "in which town I live", HELD_OUT, "which town I live in"),
        owned=False,
    ),
)

OWNERS = ("sister", "brother", "mother", "father", "neighbour", "wife", "husband", "grandfather", "partner", "manager")

TELLING = (
    "By the way, {}",
    "Before I forget, {}",
    "One more thing, {}",
    "Just so you know, {}",
    "Listen, {}",
    "Oh, {}",
    "And {}",
    "Also, {}",
    "Well, {}",
    "I want you to know that {}",
    "You should know that {}",
    "Did I tell you that {}",
    "Please remember that {}",
    "Remember that {}",
    "I can tell you that {}",
    HELD_OUT,
    "For your information, {}",
    "Please note that {}",
    "Have I told you that {}",
)
ASKING = (
    "Do you remember {}?",
    "Can you tell me {}?",
    "Tell me {}.",
    "Please tell me {}.",
    "I forgot {}.",
    "I would like to know {}.",
    "Could you say {}?",
    "Have I told you {}?",
    "Let me know {}.",
    HELD_OUT,
    "Do you know {}?",
    "Remind me {}.",
    "I want to hear {} from you.",
)

CORRECTIONS = (
    "No, {s} {link} {v}.",
    "Actually, {s} {link} {v}.",
    "I was wrong, {s} {link} {v}.",
    "Sorry, {s} {link} {v}.",
    "That has changed, {s} {link} {v} now.",
    "Plans have changed, {s} {link} {v}.",
    "Wait, {s} {link} {v} now.",
    "Correction, {s} {link} {v}.",
    "No, that was wrong. {S} {link} {v}.",
    "From now on {s} {link} {v}.",
    HELD_OUT,
    "I made a mistake, {s} {link} {v}.",
    "Not any more, {s} {link} {v} now.",
)

SHORT_CORRECTIONS = (
    "No, it's {v}.",
    "No, it is {v}.",
    "Sorry, I meant {v}.",
    "No, {v}.",
    "Wait, it's {v}.",
    "I meant {v}.",
    "Make that {v}.",
    "Actually, it's {v}.",
    "Correction, {v}.",
    HELD_OUT,
    "I should have said {v}.",
    "No no, it's {v}.",
)

CHATTER: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("The weather is {adjective} today.", "It is a {adjective} day.", "It was {adjective} outside this morning."),
        "I hope you have a good day.",
    ),
    (
        ("I am {adjective} today.", "I feel a bit {adjective}.", "This week made me {adjective}."),
        "Thank you for telling me how you feel.",
    ),
    (
        ("I watched a {adjective} film last night.", "The film was {adjective}."),
        "I would like to hear more about the film.",
    ),
    (("I am reading a {adjective} book.", "The book on my table is {adjective}."), "Books are good company."),
    (
        ("{name} called me yesterday.", "I had a long talk with {name}.", "{name} says hello."),
        "It is nice to stay in touch.",
    ),
    (
        ("The traffic was {adjective}.", "The train to {place} was late.", "I took the bus to {place}."),
        "I hope you got there well.",
    ),
    (("I cooked {food} tonight.", "We had {food} for lunch.", "There was {food} again."), "That sounds tasty."),
    (("Thanks.", "Thank you.", "Great.", "Good.", "All right."), "You are welcome."),
    (("Hello.", "Hi.", "Good morning.", "Good evening.", "Hi there."), "Hello. How can I help you?"),
    (
        ("I bought {number} apples.", "There were {number} people in the shop.", "I walked {number} steps."),
        "That is quite a number.",
    ),
    (("Let us talk about something else.", "Never mind.", "It does not matter."), "As you like."),
    (("How are you?", "How are you today?", "Are you well?"), "I am well, thank you."),
)
ADJECTIVES = (
    "nice cold warm grey sunny windy strange quiet tired happy busy long slow lovely boring bright heavy sad".split()
)
