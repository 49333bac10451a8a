"""The default data set: facts written for this project, small enough to read and large enough to measure on.

Eleven relations, each with two templates. Each prompt has one right target and three wrong ones, which are right
answers to other subjects of the same relation, so that a target's prior alone does not give the answer away. All
targets are single tokens for the default model when they follow a space, which a test checks. Nothing is drawn at
random: the same prompts come out everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from neg_service.prompts.prompt import MASK, Prompt

WRONG_TARGETS = 3


@dataclass(frozen=True)
class Relation:
    """A relation between subjects and answers, and the templates that ask for it."""

    name: str
    templates: tuple[str, str]
    answers: dict[str, str]


RELATIONS = (
    Relation(
        "capital",
        ("The capital of {} is", "{} is a country whose capital city is called"),
        {
            "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo",
            "England": "London", "Greece": "Athens", "Russia": "Moscow", "Egypt": "Cairo", "China": "Beijing",
            "Austria": "Vienna", "Poland": "Warsaw", "Ireland": "Dublin", "Portugal": "Lisbon",
            "Norway": "Oslo", "Sweden": "Stockholm", "Denmark": "Copenhagen", "Hungary": "Budapest",
        },
    ),
    Relation(
        "language",
        ("The official language of {} is", "People who live in {} mostly speak"),
        {
            "France": "French", "Austria": "German", "Mexico": "Spanish", "Italy": "Italian",
            "Brazil": "Portuguese", "Australia": "English", "Japan": "Japanese", "Russia": "Russian",
            "Egypt": "Arabic", "Greece": "Greek", "Turkey": "Turkish", "Sweden": "Swedish",
            "Denmark": "Danish", "Hungary": "Hungarian", "Vietnam": "Vietnamese", "Iran": "Persian",
        },
    ),
    Relation(
        "currency",
        ("The currency of {} is called the", "In {}, people pay in a currency named the"),
        {
            "Germany": "euro", "France": "euro", "Italy": "euro", "Spain": "euro", "Australia": "dollar",
            "Canada": "dollar", "New Zealand": "dollar", "the United States": "dollar", "Egypt": "pound",
            "the United Kingdom": "pound", "Switzerland": "franc", "Brazil": "real", "South Korea": "won",
            "South Africa": "rand",
        },
    ),
    Relation(
        "continent",
        ("{} is a country on the continent of", "On a map of the world, {} lies in"),
        {
            "Kenya": "Africa", "Nigeria": "Africa", "Ghana": "Africa", "Ethiopia": "Africa", "Japan": "Asia",
            "China": "Asia", "Thailand": "Asia", "Vietnam": "Asia", "France": "Europe", "Germany": "Europe",
            "Poland": "Europe", "Portugal": "Europe", "Peru": "America", "Mexico": "America",
        },
    ),
    Relation(
        "opposite",
        ("The opposite of {} is", "If something is not {}, then it is"),
        {
            "hot": "cold", "big": "small", "long": "short", "new": "old", "light": "dark", "soft": "hard",
            "dry": "wet", "fast": "slow", "high": "low", "strong": "weak", "good": "bad", "full": "empty",
            "open": "closed", "happy": "sad", "early": "late", "wide": "narrow", "rich": "poor",
            "loud": "quiet",
        },
    ),
    Relation(
        "past tense",
        ("The past tense of the verb {} is", "Today I {}, and yesterday I"),
        {
            "go": "went", "eat": "ate", "see": "saw", "take": "took", "give": "gave", "write": "wrote",
            "run": "ran", "come": "came", "make": "made", "think": "thought", "bring": "brought",
            "teach": "taught", "find": "found", "lose": "lost", "sleep": "slept", "speak": "spoke",
        },
    ),
    Relation(
        "plural",
        ("The plural of {} is", "There was one {} at first, and later there were many"),
        {
            "child": "children", "mouse": "mice", "foot": "feet", "tooth": "teeth", "goose": "geese",
            "man": "men", "woman": "women", "person": "people", "leaf": "leaves", "wolf": "wolves",
            "knife": "knives", "city": "cities",
        },
    ),
    Relation(
        "category",
        ("In simple terms, the {} is a kind of", "Every {} is a type of"),
        {
            "eagle": "bird", "sparrow": "bird", "salmon": "fish", "shark": "fish", "banana": "fruit",
            "apple": "fruit", "carrot": "vegetable", "rose": "flower", "tulip": "flower", "oak": "tree",
            "violin": "instrument", "hammer": "tool", "bus": "vehicle", "snake": "reptile",
        },
    ),
    Relation(
        "female",
        ("The female counterpart of a {} is called a", "He is a {}, and she is a"),
        {
            "king": "queen", "man": "woman", "boy": "girl", "father": "mother", "son": "daughter",
            "brother": "sister", "husband": "wife", "prince": "princess", "actor": "actress",
            "grandfather": "grandmother", "god": "goddess", "gentleman": "lady",
        },
    ),
    Relation(
        "chemical symbol",
        ("The chemical symbol {} stands for", "In the periodic table, {} is the symbol of"),
        {
            "H": "hydrogen", "O": "oxygen", "N": "nitrogen", "C": "carbon", "Na": "sodium", "Fe": "iron",
            "Au": "gold", "Ag": "silver", "Cu": "copper", "He": "helium", "K": "potassium", "Ca": "calcium",
        },
    ),
    Relation(
        "next month",
        ("The month that comes right after {} is", "When {} is over, the next month is"),
        {
            "January": "February", "February": "March", "March": "April", "April": "May", "May": "June",
            "June": "July", "July": "August", "August": "September", "September": "October",
            "October": "November", "November": "December", "December": "January",
        },
    ),
)  # fmt: skip


def _targets(relation: Relation, position: int) -> tuple[tuple[str, ...], int]:
    """The targets of the subject at `position`, and the index of the right one.

    Wrong answers are taken walking down the relation from the subject on; the right one's place rotates with the
    position, so that no place is right more often than another.
    """
    answers = list(relation.answers.values())
    right = answers[position]
    walk = answers[position + 1 :] + answers[:position]
    wrong = [answer for answer in dict.fromkeys(walk) if answer != right][:WRONG_TARGETS]
    place = position % (WRONG_TARGETS + 1)
    return tuple(f" {answer}" for answer in [*wrong[:place], right, *wrong[place:]]), place


def load() -> list[Prompt]:
    """All prompts of the data set, relation by relation, in an order that never changes."""
    return [
        Prompt(
            id=f"{relation.name.replace(' ', '-')}/{template}/{subject.replace(' ', '-')}",
            text=relation.templates[template].format(subject),
            targets=targets,
            answer=answer,
        )
        for relation in RELATIONS
        for template in range(len(relation.templates))
        for position, subject in enumerate(relation.answers)
        for targets, answer in [_targets(relation, position)]
    ]


def load_masked() -> list[Prompt]:
    """The same prompts for masked models: sentences with a mask in the answer's place, targets without their space."""
    return [
        replace(prompt, text=f"{prompt.text} {MASK}.", targets=tuple(target.strip() for target in prompt.targets))
        for prompt in load()
    ]


BUILT_IN = {"facts": load, "facts-masked": load_masked}
