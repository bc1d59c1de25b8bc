"""The questions of the mini ScienceQA: a table of kinds, and the drawings of those that need a picture."""

from collections.abc import Callable
from math import cos, pi, sin
from random import Random
from typing import NamedTuple

from PIL import Image, ImageDraw

SIZE = 224  # pixels of a picture's side
MAX_CHOICES = 5
NATURAL, SOCIAL, LANGUAGE = "natural science", "social science", "language science"
COLORS = {"red": "#d63430", "blue": "#3468c4", "green": "#429648", "yellow": "#f2c430", "purple": "#8a4caa"}
PAINTS = COLORS | {"white": "white", "black": "black", "orange": "#f08228", "brown": "#865834", "gray": "#96989e"}
CORNERS = {"triangle": 3, "square": 4, "circle": 60}
NUMBERS = ("one", "two", "three", "four", "five")


# Each drawing gets the picture's pencil, the words for what to show, and a generator for all that may vary.

def draw_shape(pencil, shown, rng):
    color, shape = shown.split()
    place = rng.randint(70, 154), rng.randint(70, 154), rng.randint(30, 60)
    pencil.regular_polygon(place, CORNERS[shape], fill=PAINTS[color], outline="black")


def draw_count(pencil, shown, rng):
    color, radius = rng.choice(list(COLORS.values())), rng.randint(20, 30)
    for cell in rng.sample(range(9), NUMBERS.index(shown) + 1):
        pencil.circle((40 + 72 * (cell % 3), 40 + 72 * (cell // 3)), radius, color, "black")


def draw_clock(pencil, shown, rng):
    x, y, angle = rng.randint(90, 134), rng.randint(90, 134), pi * int(shown) / 6
    pencil.circle((x, y), 85, None, "black", 3)
    pencil.line((x, y, x, y - 75), "black", 5)
    pencil.line((x, y, x + 50 * sin(angle), y - 50 * cos(angle)), PAINTS["red"], 12)


def draw_circuit(pencil, shown, rng):
    x, y, right, bottom = rng.randint(20, 60), rng.randint(30, 80), rng.randint(150, 200), rng.randint(140, 190)
    pencil.rectangle((x, y, right, bottom), None, "black", 6)
    pencil.circle(((x + right) / 2, bottom), 25, PAINTS["gray"], "black")
    if shown == "open":
        gap = rng.randint(x + 20, right - 50)
        pencil.rectangle((gap, y - 8, gap + 30, y + 8), "white")


def draw_map(pencil, shown, rng):
    dx, dy = {"north": (0, -1), "south": (0, 1), "east": (1, 0), "west": (-1, 0)}[shown]
    x, y, step = rng.randint(90, 134), rng.randint(90, 134), rng.randint(45, 65)
    pencil.regular_polygon((x, y, 25), 4, fill=PAINTS["brown"], outline="black")
    pencil.regular_polygon((x + step * dx, y + step * dy, 25), 3, fill=PAINTS["green"], outline="black")


def draw_bars(pencil, shown, rng):
    for i, color in enumerate(rng.sample(list(COLORS), len(COLORS))):
        height = rng.randint(165, 190) if color == shown else rng.randint(40, 145)
        pencil.rectangle((10 + 42 * i, 210 - height, 46 + 42 * i, 210), PAINTS[color], "black")


def draw_flag(pencil, shown, rng):
    left, top, width = rng.randint(5, 60), rng.randint(20, 80), rng.randint(35, 50)
    for i, color in enumerate(shown.split("-")):
        pencil.rectangle((left + width * i, top, left + width * (i + 1), top + 2 * width), PAINTS[color], "black")


class Kind(NamedTuple):
    """The texts, answers and drawing that all problems of one kind share.

    facts maps each right option {y} to what it is right for, {x}; several of them stand between commas. A question or
    hint tells {x}, but where there is a `draw`, only the picture does. caption is the picture in words. {name} is a
    child.
    """

    skill: str
    subject: str
    topic: str
    grades: tuple[int, int]
    facts: dict[str, str]
    question: str
    hints: tuple[str, ...]
    lecture: str
    solution: str
    draw: Callable[[ImageDraw.ImageDraw, str, Random], None] | None = None
    caption: str = ""
    task: str = "closed choice"

    def choices(self, y: str) -> list[str]:
        """The neighbours of y in `facts`, always in this order: reordered options are too hard for a tiny model."""
        answers = list(self.facts)
        n_groups = -(-len(answers) // MAX_CHOICES)
        bounds = [len(answers) * i // n_groups for i in range(n_groups + 1)]
        return next(answers[i:j] for i, j in zip(bounds, bounds[1:], strict=False) if y in answers[i:j])

    def picture(self, x: str, rng: Random) -> Image.Image:
        """An RGB picture [SIZE, SIZE] that shows x."""
        assert self.draw
        image = Image.new("RGB", (SIZE, SIZE), "white")
        self.draw(ImageDraw.Draw(image), x, rng)
        return image


def same(words) -> dict[str, str]:
    return {word: word for word in words}


def both_ways(pairs: dict[str, str]) -> dict[str, str]:
    """Each word of a pair is the answer to the other one. The two are far apart, and so never options together."""
    return pairs | {x: y for y, x in pairs.items()}


FLAGS = {"France": "blue-white-red", "Italy": "green-white-red", "Belgium": "black-yellow-red",
         "Peru": "red-white-red", "Nigeria": "green-white-green", "Ireland": "green-white-orange",
         "Romania": "blue-yellow-red", "Mali": "green-yellow-red", "Guinea": "red-yellow-green"}
CAPITALS = dict(zip(("Paris", "Rome", "Brussels", "Lima", "Abuja", "Dublin", "Bucharest", "Bamako", "Conakry"),
                    FLAGS.values(), strict=True))

KINDS = (
    Kind("Name colors", NATURAL, "physics", (1, 3),
         {color: ", ".join(f"{color} {shape}" for shape in CORNERS) for color in COLORS},
         "Which color does the picture show?", ("", "{name} painted it."), "We see the light that an object reflects.",
         "The picture shows the color {y}.", draw_shape, "A {x}."),
    Kind("Name shapes", NATURAL, "units-and-measurement", (1, 3),
         {shape: ", ".join(f"{color} {shape}" for color in COLORS) for shape in CORNERS},
         "Which shape is in the picture?", ("", "{name} cut it out of paper."), "Shapes differ in their corners.",
         "The shape is a {y}.", draw_shape, "A {x}."),
    Kind("Count particles", NATURAL, "chemistry", (4, 8), same(NUMBERS),
         "How many particles are there?", ("", "The circles are particles."), "Matter is made of particles.",
         "The number of particles is {y}.", draw_count, "Particles, and their number is {x}."),
    Kind("Read a clock", NATURAL, "units-and-measurement", (1, 3),
         {f"{hour} o'clock": str(hour) for hour in (12, 3, 6, 9, 1, 4, 7, 10)},
         "What time is it?", ("", "The red hand is the hour hand."), "The short hand tells the hour.",
         "The short hand points to {x}.", draw_clock, "A clock at {x}."),
    Kind("Understand circuits", NATURAL, "physics", (5, 9), {"yes": "closed", "no": "open"},
         "Does a current flow?", ("", "{name} built it.", "The lamp works."), "A current needs a closed circuit.",
         "The circuit is {x}, so the answer is {y}.", draw_circuit, "A circuit that is {x}.", "yes or no"),
    Kind("Read a map", SOCIAL, "geography", (2, 3), same(("north", "south", "east", "west")),
         "In which direction is the tree from the house?", ("", "The tree is green, and the house is brown."),
         "Most maps have north at the top.", "The tree is {y} of the house.", draw_map, "A tree {x} of a house."),
    Kind("Read bar charts", SOCIAL, "economics", (3, 6), same(COLORS),
         "Which color did people buy most?", ("", "{name} sells paint."), "The tallest bar is the largest number.",
         "The tallest bar is {y}.", draw_bars, "Bars, and the tallest is {x}."),
    Kind("Identify flags", SOCIAL, "geography", (4, 8), FLAGS,
         "Which country has this flag?", ("", "{name} saw it on a ship."), "Each country has a flag.",
         "The flag with the stripes {x} is the one of {y}.", draw_flag, "A flag of {x}."),
    Kind("Identify capitals by a flag", SOCIAL, "geography", (7, 12), CAPITALS,
         "What is the capital of the country with this flag?", ("", "{name} will go there."),
         "The government meets in the capital.", "The capital of the country with the stripes {x} is {y}.",
         draw_flag, "A flag of {x}."),
    Kind("Add lengths", NATURAL, "units-and-measurement", (2, 4),
         {f"{y} km": ", ".join(f"{x} km and then {y - x} km" for x in range(1, y)) for y in range(2, 10)},
         "How far did {name} walk?", ("{name} walked {x}.",), "Lengths can be added.", "Together, this is {y}."),
    Kind("Identify solids, liquids and gases", NATURAL, "chemistry", (2, 5),
         {"solid": "ice, wood, steel, sand, paper, glass", "liquid": "milk, water, juice, oil, honey, blood",
          "gas": "steam, air, oxygen, helium, nitrogen, hydrogen"},
         "Which state of matter is {x}?", ("",), "A solid keeps its shape, a liquid flows and a gas fills space.",
         "At the state we know it in, {x} is a {y}."),
    Kind("Identify animal groups", NATURAL, "biology", (6, 9),
         {"mammal": "bat, whale, dog, horse", "bird": "eagle, penguin, duck, robin",
          "fish": "shark, trout, salmon, tuna", "insect": "ant, bee, moth, fly"},
         "To which group does the {x} belong?", ("",), "Animals are sorted by their bodies.",
         "The {x} belongs to this group: {y}."),
    Kind("Tell living from nonliving things", NATURAL, "biology", (1, 3),
         {"true": "fern, oak, worm, mushroom, spider, rose", "false": "rock, cloud, river, chair, bottle, coin"},
         "True or false? A {x} is a living thing.", ("",), "Living things grow and need food.",
         "For the {x}, this is {y}.", task="true-or false"),
    Kind("Identify the continent of a country", SOCIAL, "geography", (3, 7),
         {"Africa": "Kenya, Egypt, Ghana, Mali", "Asia": "Japan, India, China, Nepal",
          "Europe": "France, Italy, Spain, Poland", "South America": "Peru, Chile, Brazil, Bolivia",
          "North America": "Canada, Mexico, Cuba, Panama"},
         "On which continent is {x}?", ("",), "A continent is a large area of land.", "The country {x} is in {y}."),
    Kind("Identify goods and services", SOCIAL, "economics", (2, 5),
         {"good": "shirt, bicycle, sandwich, lamp", "service": "haircut, bus ride, piano lesson, car wash"},
         "Is a {x} a good or a service?", ("",), "Goods can be touched. Services are work done for others.",
         "The {x} is a {y}."),
    Kind("Choose the antonym", LANGUAGE, "vocabulary", (1, 5),
         both_ways({"hot": "cold", "big": "small", "fast": "slow", "happy": "sad", "wet": "dry", "loud": "quiet",
                    "hard": "soft", "early": "late", "full": "empty", "rich": "poor"}),
         "Which word means the opposite of {x}?", ("",), "Antonyms are words with opposite meanings.",
         "The opposite of {x} is {y}."),
    Kind("Form the plural", LANGUAGE, "grammar", (1, 4),
         {"children": "child", "mice": "mouse", "feet": "foot", "teeth": "tooth", "men": "man", "leaves": "leaf",
          "wolves": "wolf", "babies": "baby", "cities": "city", "geese": "goose"},
         "What is the plural of {x}?", ("",), "Plural nouns name more than one.", "The plural of {x} is {y}."),
    Kind("Classify the figure of speech", LANGUAGE, "figurative-language", (7, 12),
         {"simile": "He is as brave as a lion., It is as cold as ice., She swims like a fish.",
          "metaphor": "Time is money., The world is a stage., My room is a zoo.",
          "hyperbole": "I told you a million times., My bag weighs a ton., I could eat a horse."},
         "Which figure of speech is used?", ("{x}",), "A simile compares with like or as, a metaphor without.",
         "The text uses {y}."),
)
