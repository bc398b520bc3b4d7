"""Generators of short reasoning tasks with headroom: one function per task, from a random generator to an item.

Names and words are divided between the splits, so that no name and no word of an open list is in two of them. The right
answer is drawn first, and the wrong ones come from the same prompt or the same list. Closed lists (numbers, days,
capitals, colours) are shared; there, only whole prompts differ between splits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from random import Random

from steer_engine.evaluate.items import SPLITS

Drawn = tuple[Hashable, str, list[str], str]
"""Identity, prompt, answers, right answer. Two items with the same identity count as one."""

Make = Callable[[Random, str], Drawn]
"""Makes an item from a random generator and the name of its split."""


def divided(text: str) -> dict[str, tuple[str, ...]]:
    """Split -> words. Each split takes every third word, so that all splits have similar words."""
    return {split: tuple(text.split()[start::3]) for start, split in enumerate(SPLITS)}


NAMES = divided(
    "Aaron Adam Alan Alex Alice Amy Anderson Andre Andrew Andy Anna Anthony Arthur Austin Blake Brandon Brian Carter "
    "Charles Charlie Christian Christopher Clark Cole Collins Connor Crew Crystal Daniel David Dean Edward Elizabeth "
    "Emily Eric Eva Ford Frank George Georgia Graham Grant Henry Ian Jack Jacob Jake James Jamie Jane Jason Jay "
    "Jennifer Jeremy Jessica John Jonathan Jordan Joseph Joshua Justin Kate Kelly Kevin Kyle Laura Leon Lewis Lisa "
    "Louis Luke Madison Marco Marcus Maria Mark Martin Mary Matthew Max Michael Michelle Morgan Patrick Paul Peter "
    "Prince Rachel Richard River Robert Roman Rose Ruby Russell Ryan Sarah Scott Sean Simon Stephen Steven Sullivan "
    "Taylor Thomas Tyler Victoria Warren William"
)
"""Split -> first names."""

WORDS = divided(
    "apple river stone chair window marble bottle paper candle mirror basket hammer ladder blanket pencil button "
    "ticket ribbon camera guitar piano wallet jacket helmet pillow carpet engine bridge tower castle forest island "
    "desert valley mountain ocean lake beach cloud storm flower leaf grass tree seed bread cheese butter sugar "
    "salt honey milk coffee juice water soup cake egg rice meat horse tiger rabbit monkey eagle snake spider "
    "turtle whale mouse dragon wheel rope knife spoon plate bowl glass clock watch phone radio book map coin key "
    "lamp box bag hat shoe ring"
)
"""Split -> nouns."""

PLACES = ("garden", "kitchen", "school", "office", "park", "library", "hospital", "market", "station", "church")

NUMBERS = (
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip

CYCLES = {
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "month": (
        "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
        "December",
    ),
    "number": NUMBERS,
    "letter": tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}  # fmt: skip

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "Russia": "Moscow",
    "Egypt": "Cairo", "Greece": "Athens", "Austria": "Vienna", "Ireland": "Dublin", "Portugal": "Lisbon",
    "Poland": "Warsaw", "Hungary": "Budapest", "Cuba": "Havana", "Kenya": "Nairobi", "China": "Beijing",
}  # fmt: skip

KINDS = {
    kind: divided(words)
    for kind, words in {
        "an animal": "horse dog cat tiger lion rabbit monkey cow sheep goat wolf bear pig fox elephant",
        "a fruit": "apple banana orange lemon grape peach cherry mango pear plum melon berry",
        "a colour": "red blue green yellow purple black white brown pink",
        "a tool": "hammer saw drill wrench shovel axe knife screwdriver rake",
        "a vehicle": "car truck bus train bicycle boat plane ship taxi",
        "a part of the body": "arm leg nose ear eye foot hand neck knee finger shoulder chin",
        "a piece of clothing": "shirt hat jacket dress shoe sock coat scarf glove",
        "a musical instrument": "piano guitar violin drum flute trumpet harp cello organ",
    }.items()
}
"""What a word is -> split -> words."""

CREATURES = divided(
    "wugs blips zorks daxes fleems gorps tivs plonks mibs snarps quints yorps drubs klims vorks brints chogs splafs "
    "glorps nards pilks wozzes jubs trelks frints skews bonks grelts hozzles limps"
)
"""Split -> plurals of things that do not exist."""

TRAITS = {"tall": ("taller", "shorter"), "old": ("older", "younger"), "fast": ("faster", "slower")}


def asked(context: str, question: str) -> str:
    return f"{context}\nQuestion: {question}\nAnswer:"


def listed(words: Sequence[str]) -> str:
    return f"Words: {', '.join(words)}."


def _choice(prompt: str, answers: Sequence[str], right: str) -> Drawn:
    return prompt, prompt, [f" {answer}" for answer in answers], f" {right}"


def compare(random: Random, split: str) -> Drawn:
    """Two people and one comparison. The question repeats its word, or uses the opposite one."""
    more, less = random.choice(list(TRAITS.values()))
    first, second = random.sample(NAMES[split], 2)
    said, requested = random.choice((more, less)), random.choice((more, less))
    right = first if said == requested else second
    return _choice(asked(f"{first} is {said} than {second}.", f"Who is {requested}?"), (first, second), right)


def order(random: Random, split: str) -> Drawn:
    """Three people and two comparisons in random order: who is the tallest, the shortest, or in between?"""
    people = random.sample(NAMES[split], 3)
    facts = [f"{people[0]} is taller than {people[1]}.", f"{people[1]} is taller than {people[2]}."]
    if random.random() < 0.5:
        facts = [f"{people[1]} is shorter than {people[0]}.", f"{people[2]} is shorter than {people[1]}."]
    random.shuffle(facts)
    place = random.randrange(3)
    question = f"Who is {('the tallest', 'in between', 'the shortest')[place]}?"
    return _choice(asked(" ".join(facts), question), people, people[place])


def order_yes_no(random: Random, split: str) -> Drawn:
    """The comparison of `compare`, as a question with Yes or No."""
    more, less = random.choice(list(TRAITS.values()))
    first, second = random.sample(NAMES[split], 2)
    said, requested = random.choice((more, less)), random.choice((more, less))
    one, other = random.choice(((first, second), (second, first)))
    right = "Yes" if (said == requested) == (one == first) else "No"
    prompt = asked(f"{first} is {said} than {second}.", f"Is {one} {requested} than {other}?")
    return _choice(prompt, ("Yes", "No"), right)


def lookup(random: Random, split: str) -> Drawn:
    """Three people have one thing each: what does one of them have?"""
    people, things = random.sample(NAMES[split], 3), random.sample(WORDS[split], 3)
    context = " ".join(f"{who} has the {what}." for who, what in zip(people, things, strict=True))
    place = random.randrange(3)
    return _choice(asked(context, f"What does {people[place]} have?"), things, things[place])


def owner(random: Random, split: str) -> Drawn:
    """Three people have one thing each: who has one of the things?"""
    people, things = random.sample(NAMES[split], 3), random.sample(WORDS[split], 3)
    context = " ".join(f"{who} has the {what}." for who, what in zip(people, things, strict=True))
    place = random.randrange(3)
    return _choice(asked(context, f"Who has the {things[place]}?"), people, people[place])


def key_value(random: Random, split: str) -> Drawn:
    """The value of a key in a table of four lines."""
    keys, values = random.sample(NAMES[split], 4), random.sample(WORDS[split], 4)
    table = "\n".join(f"{key}: {value}" for key, value in zip(keys, values, strict=True))
    place = random.randrange(4)
    return _choice(f"{table}\n\n{keys[place]}:", values, values[place])


def position(random: Random, split: str) -> Drawn:
    """Which of three words is first, second or third?"""
    words = random.sample(WORDS[split], 3)
    place = random.randrange(3)
    word = ("first", "second", "third")[place]
    return _choice(asked(listed(words), f"Which word is the {word} word?"), words, words[place])


def _unspoken(words: Sequence[str], right: str) -> Drawn:
    """Words without a question: the rule that picks one of them is nowhere in the prompt."""
    return _choice(f"Q: {' '.join(words)}\nA:", list(dict.fromkeys(words)), right)


def last_word(random: Random, split: str) -> Drawn:
    """Three words without a question; the rule is to name the last one."""
    words = random.sample(WORDS[split], 3)
    return _unspoken(words, words[2])


def first_word(random: Random, split: str) -> Drawn:
    """Three words without a question; the rule is to name the first one."""
    words = random.sample(WORDS[split], 3)
    return _unspoken(words, words[0])


def pick_animal(random: Random, split: str) -> Drawn:
    """Three words without a question; the rule is to name the animal."""
    return _pick("an animal", random, split)


def pick_fruit(random: Random, split: str) -> Drawn:
    """Three words without a question; the rule is to name the fruit."""
    return _pick("a fruit", random, split)


def pick_colour(random: Random, split: str) -> Drawn:
    """Three words without a question; the rule is to name the colour."""
    return _pick("a colour", random, split)


def _pick(kind: str, random: Random, split: str) -> Drawn:
    others = random.sample([each for each in KINDS if each != kind], 2)
    words = [random.choice(KINDS[each][split]) for each in (kind, *others)]
    right = words[0]
    random.shuffle(words)
    return _unspoken(words, right)


def pick_odd(random: Random, split: str) -> Drawn:
    """Three words without a question; the rule is to name the one that is of another kind than the two others."""
    kind, other = random.sample(list(KINDS), 2)
    words = [*random.sample(KINDS[kind][split], 2), random.choice(KINDS[other][split])]
    right = words[2]
    random.shuffle(words)
    return _unspoken(words, right)


def pick_repeated(random: Random, split: str) -> Drawn:
    """Four words without a question; the rule is to name the one that appears twice."""
    shown, right = _with_one_twice(random, split)
    return _unspoken(shown, right)


def pick_largest(random: Random, split: str) -> Drawn:
    """Three numbers without a question; the rule is to name the largest one."""
    del split
    places = random.sample(range(len(NUMBERS)), 3)
    return _unspoken([NUMBERS[place] for place in places], NUMBERS[max(places)])


def pick_value(random: Random, split: str) -> Drawn:
    """Three names with a word each, then one of the names; the rule is to give the word of that name."""
    keys, values = random.sample(NAMES[split], 3), random.sample(WORDS[split], 3)
    place = random.randrange(3)
    shown = ", ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
    return _choice(f"Q: {shown}; {keys[place]}\nA:", values, values[place])


def repeated(random: Random, split: str) -> Drawn:
    """Which of three words appears twice?"""
    shown, right = _with_one_twice(random, split)
    return _choice(asked(listed(shown), "Which word appears twice?"), list(dict.fromkeys(shown)), right)


def _with_one_twice(random: Random, split: str) -> tuple[list[str], str]:
    """Three words, one of them once more behind its first place, and that word."""
    words = random.sample(WORDS[split], 3)
    place = random.randrange(3)
    right = words[place]
    words.insert(random.randrange(place + 1, 4), right)
    return words, right


def extremum(random: Random, split: str) -> Drawn:
    """Which of three numbers is the largest or the smallest?"""
    del split
    places = random.sample(range(len(NUMBERS)), 3)
    word, right = random.choice((("largest", max(places)), ("smallest", min(places))))
    numbers = [NUMBERS[place] for place in places]
    prompt = asked(f"Numbers: {', '.join(numbers)}.", f"Which number is the {word}?")
    return _choice(prompt, numbers, NUMBERS[right])


def next_item(random: Random, split: str) -> Drawn:
    """What comes right after or before a day, month, number or letter? Three choices."""
    del split
    kind = random.choice(list(CYCLES))
    cycle = CYCLES[kind]
    place = random.randrange(1, len(cycle) - 1)
    word, right = random.choice((("after", cycle[place + 1]), ("before", cycle[place - 1])))
    # The item on the other side is always a choice: otherwise the question's direction would not matter.
    other = cycle[place - 1] if word == "after" else cycle[place + 1]
    rest = [each for index, each in enumerate(cycle) if abs(index - place) > 1]
    choices = [right, other, random.choice(rest)]
    random.shuffle(choices)
    prompt = asked(f"Choices: {', '.join(choices)}.", f"Which {kind} comes right {word} {cycle[place]}?")
    return _choice(prompt, choices, right)


def where_is(random: Random, split: str) -> Drawn:
    """bAbI 1: two people make three moves; where is one of them now? The right place is equally often in each move."""
    who, other = random.sample(NAMES[split], 2)
    places = random.sample(PLACES, 3)
    last = random.randrange(3)
    people = [random.choice((who, other)) for _ in range(last)] + [who] + [other] * (2 - last)
    if other not in people:
        people[0] = other
    context = " ".join(f"{person} went to the {place}." for person, place in zip(people, places, strict=True))
    return _choice(asked(context, f"Where is {who}?") + " in the", places, places[last])


def carried(random: Random, split: str) -> Drawn:
    """bAbI 2: a person takes a thing and moves on: where is the thing?"""
    subject, other = random.sample(NAMES[split], 2)
    thing = random.choice(WORDS[split])
    places = random.sample(PLACES, 3)
    facts = [
        f"{subject} went to the {places[0]}.",
        f"{subject} took the {thing}.",
        f"{subject} went to the {places[1]}.",
    ]
    if dropped := random.random() < 0.5:
        facts[2:] = [f"{subject} left the {thing} there.", f"{subject} went to the {places[1]}."]
    facts.insert(random.randrange(len(facts) + 1), f"{other} went to the {places[2]}.")
    prompt = asked(" ".join(facts), f"Where is the {thing}?") + " in the"
    return _choice(prompt, places, places[0] if dropped else places[1])


def context_or_memory(random: Random, split: str) -> Drawn:
    """A story contradicts a fact; the question is about the story or about reality."""
    country, other = random.sample(list(CAPITALS), 2)
    told, true = CAPITALS[other], CAPITALS[country]
    who = random.choice(NAMES[split])
    word, right = random.choice((("in the story", told), ("in reality", true)))
    context = f"{who} wrote a story in which the capital of {country} is {told}."
    return _choice(asked(context, f"What is the capital of {country} {word}?"), (told, true), right)


def arithmetic(random: Random, split: str) -> Drawn:
    """Sums and differences up to 9, in words. The wrong answers are near the right one."""
    first, second = random.randrange(2, 10), random.randrange(2, 10)
    plus = random.random() < 0.5
    right = first + second if plus else abs(first - second)
    start = max(0, right - random.randrange(3))
    answers = [("zero", *NUMBERS)[number] for number in range(start, start + 3)]
    first, second = (first, second) if plus else (max(first, second), min(first, second))
    who = random.choice(NAMES[split])
    verb = "gets" if plus else "loses"
    things = random.choice(("coins", "apples", "books", "stones", "cards", "shells", "stamps", "nuts"))
    numbers = ("zero", *NUMBERS)
    context = f"{who} has {numbers[first]} {things} and {verb} {numbers[second]}."
    prompt = asked(context, f"How many {things} does {who} have now?")
    return _choice(prompt, answers, numbers[right])


def category(random: Random, split: str) -> Drawn:
    """Which of three words is an animal, a fruit, ...?"""
    kinds = random.sample(list(KINDS), 3)
    words = [random.choice(KINDS[kind][split]) for kind in kinds]
    right = words[0]
    kind = kinds[0]
    random.shuffle(words)
    return _choice(asked(listed(words), f"Which word is {kind}?"), words, right)


def odd_one_out(random: Random, split: str) -> Drawn:
    """Two words are of one kind, the third is not."""
    kind, other = random.sample(list(KINDS), 2)
    pair, right = random.sample(KINDS[kind][split], 2), random.choice(KINDS[other][split])
    words = [*pair, right]
    random.shuffle(words)
    return _choice(asked(listed(words), "Which word does not belong with the others?"), words, right)


def option_letter(random: Random, split: str) -> Drawn:
    """`category` with lettered options; the answer is a letter."""
    kinds = random.sample(list(KINDS), 3)
    words = [random.choice(KINDS[kind][split]) for kind in kinds]
    place = random.randrange(3)
    options = "\n".join(f"{letter}. {word}" for letter, word in zip("ABC", words, strict=True))
    return _choice(f"Question: Which word is {kinds[place]}?\n{options}\nAnswer:", "ABC", "ABC"[place])


def ioi_three(random: Random, split: str) -> Drawn:
    """IOI with two givers: the answer is the third person."""
    people = random.sample(NAMES[split], 3)
    right = random.choice(people)
    givers = [person for person in people if person != right]
    random.shuffle(givers)
    place, thing = random.choice(PLACES), random.choice(WORDS[split])
    prompt = (
        f"Then, {people[0]}, {people[1]} and {people[2]} went to the {place}. {givers[0]} and {givers[1]} gave the "
        f"{thing} to"
    )
    return _choice(prompt, people, right)


def syllogism(random: Random, split: str) -> Drawn:
    """Two inclusions of things that do not exist: does a third follow, or only its converse?"""
    low, middle, high = random.sample(CREATURES[split], 3)
    facts = [f"All {low} are {middle}.", f"All {middle} are {high}."]
    random.shuffle(facts)
    subject, predicate, right = random.choice(((low, high, "Yes"), (high, low, "No")))
    return _choice(asked(" ".join(facts), f"Are all {subject} {predicate}?"), ("Yes", "No"), right)


MAKERS: dict[str, Make] = {
    maker.__name__.replace("_", "-"): maker
    for maker in (
        compare, order, order_yes_no, lookup, owner, key_value, position, repeated, extremum, next_item, where_is,
        carried, context_or_memory, arithmetic, category, odd_one_out, option_letter, ioi_three, syllogism, last_word,
        first_word, pick_animal, pick_fruit, pick_colour, pick_odd, pick_repeated, pick_largest, pick_value,
    )
}  # fmt: skip
"""Name of a task -> its generator."""
