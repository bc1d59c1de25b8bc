"""Questions of the mini ScienceQA: fixed tables of facts, and templates for the sentences around them.

A `Skill` pairs what is asked about (x) with its answer (y). x appears in the question or in the hint, or, where the
skill has a `draw`, only in the image: question and hint are then chosen independently of x, so that the answer can be
found only from the image.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from tools import mini_pictures as pictures

NAMES = ("Ana", "Ben", "Cora", "Dan", "Emma", "Finn", "Gina", "Hugo", "Ines", "Jack", "Kate", "Leo", "Mia", "Noah",
         "Olga", "Paul")
NATURAL, SOCIAL, LANGUAGE = "natural science", "social science", "language science"


@dataclass(frozen=True)
class Skill:
    """What the problems of one skill have in common.

    facts: pairs (x, y). questions, hints, solution, caption: templates with {x}, {y}, {name} (a child) and, in
    captions, the scene's names. n_choices: maximum number of choices of a problem. draw(canvas, **scene) draws the
    scene that scene(rng, x) returns.
    """

    subject: str
    topic: str
    category: str
    name: str
    grades: tuple[int, int]
    facts: tuple[tuple[str, str], ...]
    questions: tuple[str, ...]
    solution: str
    lecture: str
    n_choices: int
    hints: tuple[str, ...] = ("",)
    task: str = "closed choice"
    draw: Callable | None = None
    scene: Callable[[Random, str], dict] | None = None
    caption: str = ""

    def __post_init__(self):
        if self.draw and any("{x}" in text or "{y}" in text for text in (*self.questions, *self.hints)):
            raise ValueError(f"{self.name}: the text tells what the picture shows")

    def choices(self, y: str) -> list[str]:
        """The group of answers that contains y, in the table's order. Each y has one fixed group."""
        answers = list(dict.fromkeys(answer for _, answer in self.facts))
        n_groups = -(-len(answers) // self.n_choices)
        bounds = [len(answers) * i // n_groups for i in range(n_groups + 1)]
        return next(answers[i:j] for i, j in zip(bounds, bounds[1:], strict=False) if y in answers[i:j])


@dataclass(frozen=True)
class Problem:
    """One problem of a skill, before it has an id, a split and pixels."""

    skill: Skill
    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str
    lecture: str
    solution: str
    grade: str
    caption: str = ""
    scene: dict = field(default_factory=dict)

    @property
    def key(self) -> tuple:
        """Equal for duplicates: problems that differ only in lecture, solution, grade or the image's variations."""
        return self.question, self.choices, self.hint, self.caption


def make_problem(skill: Skill, fact: tuple[str, str], rng: Random) -> Problem:
    """A problem about `fact`. Some lectures and solutions are empty, as in the real data set."""
    x, y = fact
    words = {"x": x, "y": y, "name": rng.choice(NAMES)}
    choices = skill.choices(y)
    scene = skill.scene(rng, x) if skill.scene else {}
    return Problem(
        skill, ask(rng, skill).format(**words), tuple(choices), choices.index(y),
        rng.choice(skill.hints).format(**words), skill.lecture if rng.random() < 0.9 else "",
        skill.solution.format(**words) if rng.random() < 0.9 else "", f"grade{rng.randint(*skill.grades)}",
        skill.caption.format(**words, **scene), scene)


def ask(rng: Random, skill: Skill) -> str:
    """A question of the skill; one that names no child may be introduced by `{name} asks: `."""
    question = rng.choice(skill.questions)
    if "{name}" in question:
        return question
    return rng.choice(("{name} asks: ", "{name} wants to know: ", "")) + question


def same(words: str) -> tuple[tuple[str, str], ...]:
    """Facts with y equal to x."""
    return tuple((word, word) for word in words.split(", "))


def table(**answers: str) -> tuple[tuple[str, str], ...]:
    """answer="x1, x2" -> ((x1, answer), (x2, answer)); an underscore in an answer is a space."""
    return tuple((x, y.replace("_", " ")) for y, xs in answers.items() for x in xs.split(", "))


def pairs(text: str) -> tuple[tuple[str, str], ...]:
    """"x1: y1, x2: y2" -> ((x1, y1), (x2, y2))."""
    return tuple((x, y) for x, y in (pair.split(": ") for pair in text.split(", ")))


def in_turn(**words: str) -> tuple[tuple[str, str], ...]:
    """kind="y1, y2" -> ((kind, y1), (other kind, z1), ..., (kind, y2), ...)."""
    return tuple(fact for turn in zip(*(every(kind, ys) for kind, ys in words.items()), strict=True) for fact in turn)


def both_ways(text: str) -> tuple[tuple[str, str], ...]:
    """All facts, then all of them reversed, so that the two words of a pair are never among the same choices."""
    forward = pairs(text)
    return forward + tuple((y, x) for x, y in forward)


def every(xs: str, ys: str) -> tuple[tuple[str, str], ...]:
    return tuple((x, y) for x in xs.split(", ") for y in ys.split(", "))


def shown_as(name: str) -> Callable[[Random, str], dict]:
    """The scene is x itself, as the argument `name` of the drawing function."""
    return lambda rng, x: {name: x}


def layers_with(place: str) -> Callable[[Random, str], dict]:
    """Three rock layers, x at `place`."""
    def scene(rng, x):
        others = rng.sample([rock for rock in pictures.ROCKS if rock != x], 2)
        return {name: x if name == place else others.pop() for name in ("top", "middle", "bottom")}
    return scene


CAPITALS = pairs("Western Australia: Perth, Northern Territory: Darwin, South Australia: Adelaide, "
                 "Queensland: Brisbane, New South Wales: Sydney, Victoria: Melbourne, Tasmania: Hobart")
MAGNETS = (("like", "repel"), ("unlike", "attract"))

PICTURE_SKILLS = (
    Skill(SOCIAL, "geography", "Geography", "Identify Australian states on a map", (2, 5),
          same(", ".join(pictures.AUSTRALIA)),
          ("Which part of Australia is colored on the map?", "{name} colored one part of Australia. Which one?"),
          "The colored part of the map is {y}.", "A map shows where places are.", 4,
          ("", "The map shows Australia."),
          draw=pictures.australia, scene=shown_as("state"), caption="A map of Australia with {state} in color."),
    Skill(SOCIAL, "geography", "State capitals", "Identify Australian capitals on a map", (4, 8), CAPITALS,
          ("What is the capital of the colored part of Australia?",
           "{name} wants to visit the capital of the colored state. Which city is it?"),
          "The colored part is {x}. Its capital is {y}.", "The capital is the city where the government meets.", 4,
          draw=pictures.australia, scene=shown_as("state"), caption="A map of Australia with {state} in color."),
    Skill(SOCIAL, "geography", "Geography", "Identify continents", (1, 4), same(", ".join(pictures.CONTINENTS)),
          ("Which continent is colored on the map?", "{name} colored one continent. Which one?"),
          "The colored continent is {y}.", "A continent is a very large area of land.", 5,
          ("", "The map shows the world."),
          draw=pictures.continents, scene=shown_as("continent"),
          caption="A map of the world with {continent} in color."),
    Skill(SOCIAL, "geography", "Geography", "Identify oceans", (1, 4), same(", ".join(pictures.OCEANS)),
          ("Which ocean does the star mark?", "{name} put a star on the map. Which ocean is it in?"),
          "The star is in the {y}.", "Oceans are huge bodies of salt water.", 5, ("", "The map shows the world."),
          draw=pictures.oceans, scene=shown_as("ocean"), caption="A map of the world with a star in the {ocean}."),
    Skill(SOCIAL, "geography", "Geography", "Read a map: cardinal directions", (2, 3), same("north, south, east, west"),
          ("In which direction does {name} walk from the house to the flag?",
           "{name} is at the house. Which way is the flag?"),
          "The flag is {y} of the house.", "Most maps have north at the top.", 4,
          ("", "The arrow on the map points north."),
          draw=pictures.island, scene=shown_as("direction"), caption="An island with a flag {direction} of a house."),
    Skill(SOCIAL, "economics", "Economics", "Read bar charts", (3, 6), same(", ".join(pictures.FRUITS)),
          ("Which fruit did {name} sell the most of?", "What did most people buy from {name}?"),
          "The tallest bar is for {y}.", "In a bar chart, the tallest bar stands for the largest number.", 4,
          ("", "{name} sells fruit at the market."),
          draw=pictures.bar_chart, scene=shown_as("tallest"), caption="A bar chart. The tallest bar is for {tallest}."),
    Skill(NATURAL, "physics", "Magnets", "Identify magnets that attract or repel", (3, 8), MAGNETS,
          ("What will these magnets do to each other?", "{name} holds two magnets. What will they do?"),
          "These are {x} poles, so the magnets {y}.", "Like poles repel. Unlike poles attract.", 2,
          ("", "{name} puts two magnets on a table.", "Red is north and blue is south."),
          draw=pictures.magnets, scene=shown_as("poles"), caption="Two magnets with {poles} poles facing each other."),
    Skill(NATURAL, "units-and-measurement", "Units and measurement", "Read a thermometer", (2, 4),
          tuple((degrees, f"{degrees} degrees") for degrees in ("0", "10", "20", "30", "40")),
          ("What does the thermometer show?", "How warm is it where {name} lives?"),
          "The red column ends at {y}.", "Read a thermometer at the top of its column.", 4,
          ("", "The scale is in Celsius."),
          draw=pictures.thermometer, scene=shown_as("degrees"), caption="A thermometer at {degrees} degrees."),
    Skill(NATURAL, "chemistry", "States of matter", "Identify states of matter from particles", (5, 8),
          same("solid, liquid, gas"),
          ("Which state of matter is in the jar?", "{name} drew particles in a jar. Which state is it?"),
          "The particles move like those of a {y}.",
          "Particles stay in place in a solid, slide in a liquid and fly apart in a gas.", 3,
          ("", "The circles are particles."),
          draw=pictures.particles, scene=shown_as("state"), caption="A jar with the particles of a {state}."),
    Skill(NATURAL, "physics", "Electricity", "Predict whether a bulb lights", (4, 8),
          (("closed", "yes"), ("open", "no")),
          ("Does a current flow in the circuit of {name}?", "Is there a current in this circuit?",
           "{name} built this circuit. Does a current flow?"),
          "The circuit is {x}, so the answer is {y}.", "A current flows only in a closed circuit.", 2,
          ("", "The battery is full.", "{name} has a battery and a bulb."), task="yes or no",
          draw=pictures.circuit, scene=shown_as("state"), caption="A circuit with a bulb and an {state} switch."),
    Skill(NATURAL, "physics", "Force and motion", "Compare forces", (3, 8),
          (("left", "left"), ("right", "right"), ("balanced", "nowhere")),
          ("Where will the box move?", "Two teams of {name} pull a box. Where does it go?"),
          "The forces on the box move it {y}.", "An object moves in the direction of the greater force.", 3,
          ("", "Longer arrows are stronger pulls."),
          draw=pictures.forces, scene=shown_as("result"), caption="Two forces pull a box: {result}."),
    Skill(NATURAL, "earth-science", "Rocks and minerals", "Find the oldest rock layer", (4, 8),
          same(", ".join(pictures.ROCKS)),
          ("What color is the oldest layer of rock?", "{name} looks for the oldest rock. What color is it?"),
          "The oldest layer is the bottom one, which is {y}.", "New layers of rock form on top of older ones.", 4,
          ("", "The layers have not been disturbed."), draw=pictures.rock_layers, scene=layers_with("bottom"),
          caption="Rock layers: {top} on top, {middle} in the middle, {bottom} at the bottom."),
    Skill(NATURAL, "earth-science", "Weather and climate", "Describe the weather", (1, 3),
          same("sunny, cloudy, rainy, snowy, stormy"),
          ("What is the weather like?", "{name} looks out of the window. What is the weather like?"),
          "The picture shows a {y} day.", "Weather is what the air is like at a certain place and time.", 5,
          ("", "{name} wants to go out."),
          draw=pictures.weather, scene=shown_as("kind"), caption="A landscape on a {kind} day."),
    Skill(NATURAL, "earth-science", "Astronomy", "Identify phases of the moon", (1, 5),
          same("new moon, crescent moon, half moon, full moon"),
          ("Which phase of the moon is this?", "{name} looks at the sky. Which phase does the moon have?"),
          "The picture shows a {y}.", "The moon seems to change its shape as it moves around Earth.", 4,
          ("", "The sky is clear tonight."),
          draw=pictures.moon, scene=shown_as("phase"), caption="The night sky with a {phase}."),
    Skill(NATURAL, "biology", "Ecosystems", "Interpret food chains: plant eaters", (3, 8),
          same(", ".join(pictures.PLANT_EATERS)),
          ("Which animal eats the leaf?", "{name} drew a food chain. Which animal eats plants?"),
          "The arrow from the leaf points to the {y}.", "Arrows in a food chain point to the eater.", 4,
          ("", "The picture shows a food chain."), draw=pictures.food_chain,
          scene=lambda rng, x: {"prey": x, "hunter": rng.choice(list(pictures.HUNTERS))},
          caption="A food chain: a leaf, then a {prey}, then a {hunter}."),
    Skill(NATURAL, "biology", "Ecosystems", "Interpret food chains: predators", (3, 8),
          same(", ".join(pictures.HUNTERS)),
          ("Which animal is the last in the food chain?", "{name} drew a food chain. Which animal eats animals?"),
          "The last arrow points to the {y}.", "Arrows in a food chain point to the eater.", 4,
          ("", "The picture shows a food chain."), draw=pictures.food_chain,
          scene=lambda rng, x: {"prey": rng.choice(list(pictures.PLANT_EATERS)), "hunter": x},
          caption="A food chain: a leaf, then a {prey}, then a {hunter}."),
    Skill(NATURAL, "biology", "Genes to traits", "Use Punnett squares", (6, 12), same("none, one, two, four"),
          ("How many of the four plants have white flowers?", "{name} crosses two plants. How many cells are white?"),
          "In this Punnett square, the number of aa cells is {y}.", "Only plants with the genes aa have white flowers.",
          4, ("", "Purple cells stand for purple flowers."),
          draw=pictures.punnett, scene=shown_as("white"), caption="A Punnett square with {white} of four cells white."),
    Skill(NATURAL, "biology", "Plants", "Identify parts of a plant", (1, 5), same("flower, leaf, stem, root"),
          ("Which part of the plant does the arrow point to?", "{name} points at a plant. Which part is it?"),
          "The arrow points to the {y}.", "Plants have roots, a stem, leaves and flowers.", 4,
          ("", "{name} grew this plant."),
          draw=pictures.plant, scene=shown_as("part"), caption="A plant with an arrow at the {part}."),
)

TEXT_SKILLS = (
    Skill(NATURAL, "chemistry", "States of matter", "Identify solids, liquids and gases", (2, 5),
          table(solid="ice, wood, steel, sand, paper, glass", liquid="milk, water, juice, oil, honey, blood",
                gas="steam, air, oxygen, helium, nitrogen, hydrogen"),
          ("Which state of matter is {x}?", "Is {x} a solid, a liquid or a gas?"),
          "At the state we know it in, {x} is a {y}.", "A solid keeps its shape, a liquid flows and a gas fills space.",
          3),
    Skill(NATURAL, "biology", "Classification", "Identify animal groups", (2, 6),
          table(mammal="bat, whale, dog, horse", bird="eagle, penguin, duck, robin", fish="shark, trout, salmon, tuna",
                reptile="lizard, turtle, cobra, crocodile", insect="ant, bee, moth, fly"),
          ("To which group does the {x} belong?", "What kind of animal is the {x}?"), "The {x} is a {y}.",
          "Scientists sort animals into groups by their bodies.", 5),
    Skill(NATURAL, "chemistry", "Physical and chemical change", "Compare physical and chemical changes", (5, 9),
          table(physical="ice melting, water boiling, cutting paper, folding cloth, breaking glass, mixing sand",
                chemical="wood burning, iron rusting, milk turning sour, baking bread, an apple rotting, "
                         "a match burning"),
          ("Which kind of change is {x}?", "{name} saw {x}. Which kind of change is it?"),
          "We call {x} a {y} change.", "A chemical change makes a new substance. A physical change does not.", 2),
    Skill(NATURAL, "biology", "Body systems", "Identify organs", (4, 9),
          pairs("pumps blood: heart, takes in air: lungs, digests food: stomach, cleans blood: kidney, thinks: brain, "
                "covers the body: skin, tastes food: tongue, hears sounds: ear"),
          ("Which organ {x}?", "{name} asks which organ {x}."), "The organ that {x} is called {y}.",
          "Each organ of the body has its own work.", 5),
    Skill(NATURAL, "physics", "Force and motion", "Identify pushes and pulls", (1, 4),
          table(push="kicking a ball, closing a drawer, pressing a key, throwing a stone, hitting a nail",
                pull="opening a drawer, dragging a sled, picking an apple, lifting a bag, drawing a curtain"),
          ("Is {x} a push or a pull?", "{name} is {x}. Which force is it?"), "The force of {x} is a {y}.",
          "A push moves things away. A pull brings them closer.", 2),
    Skill(NATURAL, "biology", "Traits", "Identify inherited and acquired traits", (4, 9),
          table(inherited="eye color, blood type, dimples, curly hair, ear shape, nose shape",
                acquired="a scar, speaking French, riding a bike, playing chess, a tattoo, cooking rice"),
          ("{name} has this trait: {x}. Which kind is it?", "Which kind of trait is {x}?"),
          "The trait, {x}, is {y}.", "Inherited traits come from parents. Acquired traits do not.", 2),
    Skill(NATURAL, "biology", "Living things", "Tell living from nonliving things", (1, 3),
          table(true="fern, oak, worm, mushroom, spider, rose, whale",
                false="rock, cloud, river, chair, bottle, robot, coin"),
          ("True or false? A {x} is a living thing.", "{name} says that a {x} is alive. True or false?"),
          "For the {x}, this is {y}.", "Living things grow and need food.", 2, task="true-or false"),
    Skill(NATURAL, "physics", "Materials", "Identify materials from a text", (2, 5),
          every("cup, spoon, table, box, ring", "wood, glass, steel, clay, silver, plastic"),
          ("What is the {x} made of?", "Which material did {name} see?"), "The text says that the {x} is made of {y}.",
          "Objects can be made of many materials.", 4, ("{name} has a {x}. It is made of {y}.",
                                                            "The {x} of {name} is made of {y}.")),
    Skill(NATURAL, "science-and-engineering-practices", "Designing experiments", "Identify what was measured", (5, 12),
          every("beans, corn, wheat, roses, ferns", "height, mass, color, age, smell"),
          ("What did {name} measure?", "What was measured?"), "The text says that {name} measured the {y}.",
          "In an experiment, we measure what may change.", 4,
          ("{name} grew {x} in sand and measured the {y}.", "{name} gave {x} more light and measured the {y}."),),
    Skill(SOCIAL, "geography", "State capitals", "Identify state capitals of the United States", (3, 6),
          pairs("Texas: Austin, Ohio: Columbus, Utah: Salt Lake City, Georgia: Atlanta, Colorado: Denver, "
                "Hawaii: Honolulu, Arizona: Phoenix, Maine: Augusta, Oregon: Salem, Idaho: Boise, Kansas: Topeka, "
                "Nevada: Carson City, Alaska: Juneau, Iowa: Des Moines"),
          ("What is the capital of {x}?", "{name} lives in the capital of {x}. Which city is it?"),
          "The capital of {x} is {y}.", "The capital is the city where the government meets.", 5),
    Skill(SOCIAL, "geography", "Geography", "Identify the continent of a country", (3, 7),
          table(Africa="Kenya, Egypt, Ghana, Mali", Asia="Japan, India, China, Nepal",
                Europe="France, Italy, Spain, Poland", South_America="Peru, Chile, Brazil, Bolivia",
                North_America="Canada, Mexico, Cuba, Panama"),
          ("On which continent is {x}?", "{name} flies to {x}. Which continent is it on?"),
          "The country {x} is in {y}.", "A continent is a very large area of land.", 5),
    Skill(SOCIAL, "economics", "Economics", "Identify goods and services", (2, 5),
          table(good="a shirt, a bicycle, a sandwich, a lamp, a pencil, a sofa",
                service="a haircut, a bus ride, a piano lesson, a car wash, a massage, a dental exam"),
          ("{name} pays for {x}. Is it a good or a service?", "Is {x} a good or a service?"),
          "What is paid for, {x}, is a {y}.", "Goods can be touched. Services are work done for others.", 2),
    Skill(SOCIAL, "geography", "Agriculture", "Find a crop in a text", (2, 6),
          every("the valley, the north, the island, the hills, the delta",
                "rice, wheat, cotton, tea, coffee, potatoes"),
          ("What do farmers in {x} grow?", "Which crop grows in {x}?"), "The text says that {x} has farms with {y}.",
          "Crops are plants that people grow.", 5,
          ("Farmers in {x} grow {y}.", "{name} lives in {x}, where {y} grows well.")),
    Skill(LANGUAGE, "grammar", "Parts of speech", "Identify nouns, verbs and adjectives", (2, 6),
          in_turn(noun="kitchen, teacher, garden, village, window, doctor",
                                         verb="bring, choose, forget, listen, borrow, carry",
                                         adjective="brave, lazy, honest, tiny, gentle, noisy"),
          ("Which word is a {x}?", "{name} looks for a {x}. Which word is it?"), "The word {y} is used as a {x}.",
          "Nouns name things, verbs name actions and adjectives describe.", 3),
    Skill(LANGUAGE, "verbs", "Verb tense", "Identify the tense of a sentence", (2, 6),
          table(past="We walked home., They played chess., You cleaned the room., The dog barked.",
                present="We walk home., They play chess., You clean the room., The dog barks.",
                future="We will walk home., They will play chess., You will clean the room., The dog will bark."),
          ("Which tense does the sentence use?", "{name} wrote a sentence. Which tense is it in?"),
          "The sentence is in the {y} tense.", "The tense of a verb tells when something happens.", 3, ("{x}",)),
    Skill(LANGUAGE, "grammar", "Sentences", "Identify the four kinds of sentences", (2, 6),
          table(question="Where is the cat?, Who ate the cake?, When do we go?, Can you swim?",
                command="Close the door., Wash your hands., Bring me the book., Sit down.",
                exclamation="What a big cake!, How tall you are!, What a day!, How nice!",
                statement="The cat is here., I ate the cake., We go at noon., You can swim."),
          ("What kind of sentence is this?", "{name} read a sentence. What kind is it?"),
          "The sentence is a {y}.", "A sentence can tell, ask, order or exclaim.", 4, ("{x}",)),
    Skill(LANGUAGE, "vocabulary", "Antonyms", "Choose the antonym", (1, 5),
          both_ways("hot: cold, big: small, fast: slow, happy: sad, wet: dry, loud: quiet, hard: soft, early: late, "
                    "full: empty, strong: weak, rich: poor, clean: dirty"),
          ("Which word means the opposite of {x}?", "{name} needs the antonym of {x}. Which is it?"),
          "The opposite of {x} is {y}.", "Antonyms are words with opposite meanings.", 5),
    Skill(LANGUAGE, "phonological-awareness", "Rhyming", "Choose the rhyming word", (1, 2),
          both_ways("cake: lake, cat: hat, moon: spoon, star: car, bee: tree, king: ring, goat: boat, bell: shell, "
                    "rain: train, sock: clock, nose: rose, fish: dish"),
          ("Which word rhymes with {x}?", "{name} needs a rhyme for {x}. Which word is it?"),
          "The words {x} and {y} rhyme.", "Words that rhyme end with the same sound.", 4),
    Skill(LANGUAGE, "figurative-language", "Literary devices", "Classify the figure of speech", (6, 12),
          table(simile="Her eyes are like stars., He is as brave as a lion., It is as cold as ice., "
                       "She swims like a fish.",
                metaphor="Her eyes are stars., Time is money., The world is a stage., My room is a zoo.",
                hyperbole="I told you a million times., My bag weighs a ton., I could eat a horse., I waited forever."),
          ("Which figure of speech is used?", "{name} read this text. Which figure of speech is it?"),
          "The text uses {y}.", "A simile compares with like or as, a metaphor without. Hyperbole exaggerates.", 3,
          ("{x}",)),
    Skill(LANGUAGE, "grammar", "Nouns", "Form the plural", (1, 4),
          pairs("child: children, mouse: mice, foot: feet, tooth: teeth, man: men, leaf: leaves, "
                "wolf: wolves, baby: babies, city: cities, goose: geese, knife: knives, person: people"),
          ("What is the plural of {x}?", "{name} writes about more than one {x}. Which word is right?"),
          "The plural of {x} is {y}.", "Plural nouns name more than one.", 5),
)
