"""Images of the mini ScienceQA: one function per kind of image, drawn with Pillow, with small random variations.

Each function draws on a `Canvas` in unit coordinates (x to the right, y down). Position, size and colours vary with the
canvas's random generator. What the answer depends on is large enough to be recognised at 48 pixels. Outlines of
countries and continents are rough, made by hand from longitudes and latitudes.
"""

import math
from random import Random

from PIL import Image, ImageDraw, ImageFont

SIZE = 224  # of a finished image; drawn at twice the size, for smooth edges

INK, PAPER, WHITE = (40, 42, 54), (247, 245, 238), (255, 255, 255)
RED, BLUE, GREEN, YELLOW = (214, 52, 48), (52, 104, 196), (66, 150, 72), (242, 196, 48)
BROWN, GRAY, ORANGE, PURPLE = (134, 88, 52), (150, 152, 158), (236, 130, 40), (138, 76, 170)
SKY, SEA, LAND, NIGHT, SAND = (176, 216, 244), (196, 222, 240), (226, 222, 200), (28, 32, 66), (232, 208, 150)


class Canvas:
    """A square image and its drawing methods. rng: for the random variations, also those of the drawing functions."""

    def __init__(self, rng: Random, background=PAPER):
        self.rng = rng
        self.pixels = 2 * SIZE
        self.scale = rng.uniform(0.92, 1.0)
        self.shift = rng.uniform(0, 1 - self.scale), rng.uniform(0, 1 - self.scale)
        self.image = Image.new("RGB", (self.pixels, self.pixels))
        self.pencil = ImageDraw.Draw(self.image)
        self.background(background)

    def background(self, color):
        self.pencil.rectangle((0, 0, self.pixels, self.pixels), self.tint(color))

    def tint(self, color):
        """The colour, slightly varied."""
        return color and tuple(min(255, max(0, c + self.rng.randint(-10, 10))) for c in color)

    def at(self, x, y):
        return tuple((s + self.scale * v) * self.pixels for s, v in zip(self.shift, (x, y), strict=True))

    def length(self, x):
        return x * self.scale * self.pixels

    def polygon(self, points, fill, outline=INK, width=0.008):
        points = [self.at(*point) for point in points]
        self.pencil.polygon(points, self.tint(fill))
        if outline:
            self.pencil.line([*points, points[0]], outline, round(self.length(width)), joint="curve")

    def line(self, points, color=INK, width=0.015):
        self.pencil.line([self.at(*point) for point in points], color, round(self.length(width)), joint="curve")

    def box(self, x0, y0, x1, y1, fill, outline=INK, width=0.008):
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill, outline, width)

    def ellipse(self, x, y, rx, ry, fill, outline=INK, width=0.008):
        self.pencil.ellipse((*self.at(x - rx, y - ry), *self.at(x + rx, y + ry)), self.tint(fill), outline,
                            round(self.length(width)))

    def disc(self, x, y, r, fill, outline=INK, width=0.008):
        self.ellipse(x, y, r, r, fill, outline, width)

    def text(self, x, y, words, size, color=INK):
        """Text centred at (x, y), of height `size`."""
        self.pencil.text(self.at(x, y), words, color, ImageFont.load_default(self.length(size)), anchor="mm")

    def arrow(self, start, end, color=INK, width=0.03):
        (x0, y0), (x1, y1) = start, end
        length = math.hypot(x1 - x0, y1 - y0)
        ux, uy, head = (x1 - x0) / length, (y1 - y0) / length, 2.2 * width
        neck = x1 - ux * head * 1.2, y1 - uy * head * 1.2
        self.line([start, neck], color, width)
        self.polygon([end, (neck[0] - uy * head, neck[1] + ux * head), (neck[0] + uy * head, neck[1] - ux * head)],
                     color, None)

    def finish(self) -> Image.Image:
        """RGB [SIZE, SIZE]."""
        return self.image.reduce(2)


# ---- maps

AUSTRALIA = {
    "Western Australia": [(129, -15), (126, -14), (124, -16.5), (122.2, -18), (119, -20), (114, -22), (113.5, -26),
                          (115.5, -31), (115, -34.3), (118, -35), (121, -33.8), (124, -33), (126, -32.3), (129, -31.7)],
    "Northern Territory": [(129, -15), (130.5, -12.5), (132.5, -11.5), (136.8, -12.2), (135.8, -15), (138, -16.7),
                           (138, -26), (129, -26)],
    "South Australia": [(129, -26), (141, -26), (141, -38), (139.8, -37), (138.5, -35.5), (137.8, -33), (136, -34.8),
                        (134.2, -33), (131.2, -31.5), (129, -31.7)],
    "Queensland": [(138, -16.7), (139.5, -17.5), (141, -16), (141.6, -12.5), (142.5, -10.8), (143.6, -14),
                   (145.3, -15), (146.2, -18.8), (149, -21), (151, -24), (153.2, -26), (153.5, -28.2), (149, -29),
                   (141, -29), (141, -26), (138, -26)],
    "New South Wales": [(141, -29), (149, -29), (153.5, -28.2), (152.8, -31.5), (151.3, -33.8), (150, -37.4),
                        (148, -36.8), (146.5, -36), (144, -35.8), (141, -34)],
    "Victoria": [(141, -34), (144, -35.8), (146.5, -36), (148, -36.8), (150, -37.4), (147.5, -38), (146.3, -39),
                 (144.5, -38.2), (143.5, -38.8), (141, -38)],
    "Tasmania": [(143.6, -40.6), (148.8, -40.7), (148.6, -43.4), (146.6, -45.2), (144.4, -44)],  # slightly enlarged
}

CONTINENTS = {
    "North America": [[(-168, 66), (-156, 71), (-128, 70), (-95, 72), (-80, 74), (-62, 60), (-56, 52), (-66, 45),
                       (-75, 37), (-81, 26), (-84, 30), (-97, 27), (-97, 18), (-88, 20), (-83, 9), (-79, 8), (-86, 12),
                       (-105, 20), (-113, 29), (-123, 38), (-125, 48), (-135, 58), (-152, 60), (-165, 56)],
                      [(-70, 78), (-30, 83), (-20, 72), (-43, 60), (-53, 68)]],
    "South America": [[(-79, 8), (-72, 12), (-60, 9), (-50, 0), (-35, -6), (-39, -15), (-48, -26), (-57, -36),
                       (-65, -43), (-69, -53), (-75, -50), (-72, -30), (-71, -18), (-81, -5)]],
    "Africa": [[(-6, 35), (10, 37), (32, 31), (43, 12), (51, 11), (40, -5), (40, -16), (33, -26), (27, -34), (18, -34),
                (12, -17), (9, -1), (9, 4), (-8, 4), (-17, 14), (-17, 21)]],
    "Europe": [[(-10, 37), (-9, 43), (-1, 44), (-4, 48), (3, 51), (8, 56), (5, 60), (14, 68), (28, 71), (45, 67),
                (60, 68), (60, 52), (50, 46), (30, 45), (28, 40), (22, 37), (18, 41), (12, 45), (15, 38), (5, 43),
                (0, 39), (-5, 36)], [(-5, 50), (1, 52), (-3, 58), (-7, 56)]],
    "Asia": [[(60, 68), (75, 73), (105, 77), (140, 73), (179, 68), (178, 63), (162, 60), (156, 52), (140, 50),
              (128, 40), (121, 30), (109, 20), (106, 10), (104, 1), (100, 7), (98, 16), (91, 22), (80, 8), (73, 19),
              (67, 25), (57, 26), (58, 20), (45, 13), (36, 28), (28, 37), (40, 42), (50, 46), (60, 52)]],
    "Australia": [[(114, -22), (122, -18), (132, -11), (136, -15), (142, -11), (153, -26), (150, -37), (140, -38),
                   (131, -31), (115, -34)]],
    "Antarctica": [[(-175, -76), (-100, -73), (-60, -64), (-40, -75), (0, -69), (60, -66), (110, -66), (160, -69),
                    (175, -77), (175, -86), (-175, -86)]],
}

OCEANS = {"Pacific Ocean": (-140, 0), "Atlantic Ocean": (-38, 22), "Indian Ocean": (78, -24), "Arctic Ocean": (5, 82),
          "Southern Ocean": (20, -56)}


def australia(canvas, state):
    """The states of Australia, one of them coloured."""
    canvas.background(SEA)
    color = canvas.rng.choice((RED, ORANGE, PURPLE))
    for name, outline in AUSTRALIA.items():
        points = [((x - 112.5) / 42, 0.08 - (y + 10.5) / 42) for x, y in outline]
        canvas.polygon(points, color if name == state else LAND)


def world_map(canvas, continent=None, color=RED):
    """All continents, one of them coloured. Returns the function from longitude and latitude to coordinates."""
    def place(x, y):
        return (x + 180) / 360, 0.5 - y / 180

    canvas.background(SEA)
    for name, outlines in CONTINENTS.items():
        for outline in outlines:
            canvas.polygon([place(*point) for point in outline], color if name == continent else LAND, width=0.005)
    return place


def continents(canvas, continent):
    world_map(canvas, continent, canvas.rng.choice((RED, ORANGE, PURPLE)))


def oceans(canvas, ocean):
    """A star marks an ocean."""
    x, y = world_map(canvas)(*OCEANS[ocean])
    x, y = x + canvas.rng.uniform(-0.015, 0.015), y + canvas.rng.uniform(-0.015, 0.015)
    radii = [0.1, 0.045] * 5
    canvas.polygon([(x + r * math.sin(i * math.pi / 5), y - r * math.cos(i * math.pi / 5))
                    for i, r in enumerate(radii)], RED, INK, 0.006)


def island(canvas, direction):
    """A house in the middle of an island, a flag to one side of it, and a compass arrow."""
    canvas.background(SEA)
    canvas.ellipse(0.5, 0.52, 0.49, 0.46, SAND)
    dx, dy = {"north": (0, -1), "south": (0, 1), "east": (1, 0), "west": (-1, 0)}[direction]
    reach = canvas.rng.uniform(0.25, 0.29)
    x, y = 0.5 + reach * dx, 0.52 + reach * dy
    canvas.box(0.41, 0.48, 0.59, 0.62, WHITE)
    canvas.polygon([(0.37, 0.49), (0.5, 0.38), (0.63, 0.49)], BROWN)
    canvas.line([(x - 0.05, y + 0.11), (x - 0.05, y - 0.11)], INK, 0.02)
    canvas.polygon([(x - 0.04, y - 0.11), (x + 0.12, y - 0.04), (x - 0.04, y + 0.03)], RED)
    canvas.arrow((0.07, 0.2), (0.07, 0.09), INK, 0.015)
    canvas.text(0.07, 0.04, "N", 0.07)


# ---- physics and chemistry

def magnets(canvas, poles):
    """Two bar magnets. poles: `like` or `unlike`, the poles that face each other."""
    left = canvas.rng.choice(("NS", "SN"))
    right = left if poles == "unlike" else left[::-1]
    y = canvas.rng.uniform(0.34, 0.5)
    for x, pair in ((0.02, left), (0.58, right)):
        for i, pole in enumerate(pair):
            canvas.box(x + 0.2 * i, y, x + 0.2 * (i + 1), y + 0.2, RED if pole == "N" else BLUE)
            canvas.text(x + 0.2 * i + 0.1, y + 0.1, pole, 0.14, WHITE)


def thermometer(canvas, degrees):
    """0 to 40 degrees Celsius."""
    top, bottom, x = 0.06, 0.74, 0.5 + canvas.rng.uniform(-0.08, 0.08)
    level = bottom - (bottom - top - 0.06) * int(degrees) / 40 - 0.04
    canvas.box(x - 0.07, top, x + 0.07, 0.84, WHITE)
    canvas.disc(x, 0.86, 0.12, RED)
    canvas.box(x - 0.045, level, x + 0.045, 0.84, RED, None)
    for mark in range(0, 41, 10):
        y = bottom - (bottom - top - 0.06) * mark / 40 - 0.04
        canvas.line([(x + 0.07, y), (x + 0.13, y)], INK, 0.012)
        canvas.text(x + 0.21, y, str(mark), 0.09)


def particles(canvas, state):
    """Particles of a solid, a liquid or a gas in a jar."""
    rng, color = canvas.rng, canvas.rng.choice((BLUE, GREEN, PURPLE))
    canvas.box(0.1, 0.08, 0.9, 0.94, WHITE, INK, 0.02)
    if state == "solid":
        spots = [(0.26 + 0.12 * i, 0.87 - 0.12 * j) for i in range(5) for j in range(4)]
        wobble = 0.005
    elif state == "liquid":
        spots = [(0.18 + 0.128 * i + 0.03 * (j % 2), 0.87 - 0.13 * j) for i in range(6) for j in range(3)]
        wobble = 0.028
    else:
        spots = [(0.24 + 0.26 * i, 0.2 + 0.2 * j) for i in range(3) for j in range(4)]
        wobble = 0.06
    for x, y in spots:
        x, y = x + rng.uniform(-wobble, wobble), y + rng.uniform(-wobble, wobble)
        canvas.disc(min(0.83, x), min(0.87, y), 0.055, color)


def circuit(canvas, state):
    """Battery, switch and bulb; the bulb is lit only in a closed circuit."""
    closed = state == "closed"
    canvas.line([(0.62, 0.2), (0.88, 0.2), (0.88, 0.8), (0.12, 0.8), (0.12, 0.2), (0.36, 0.2)], INK, 0.02)
    canvas.box(0.36, 0.72, 0.64, 0.88, GREEN)
    canvas.box(0.64, 0.76, 0.68, 0.84, GRAY)
    canvas.line([(0.36, 0.2), (0.62, 0.2) if closed else (0.57, 0.02)], RED, 0.03)
    for x in (0.36, 0.62):
        canvas.disc(x, 0.2, 0.025, INK)
    if closed:
        for i in range(8):
            dx, dy = math.cos(i * math.pi / 4), math.sin(i * math.pi / 4)
            canvas.line([(0.12 + 0.16 * dx, 0.5 + 0.16 * dy), (0.12 + 0.22 * dx, 0.5 + 0.22 * dy)], ORANGE, 0.02)
    canvas.disc(0.12, 0.5, 0.11, YELLOW if closed else WHITE, INK, 0.015)


def forces(canvas, result):
    """A box pulled to both sides; the longer arrow is the stronger force."""
    weak, strong = canvas.rng.uniform(0.1, 0.13), canvas.rng.uniform(0.27, 0.3)
    left, right = {"left": (strong, weak), "right": (weak, strong), "balanced": (0.2, 0.2)}[result]
    y = canvas.rng.uniform(0.4, 0.5)
    canvas.box(0, y + 0.15, 1, y + 0.18, GRAY, None)
    canvas.box(0.36, y - 0.13, 0.64, y + 0.15, canvas.rng.choice((BROWN, SAND, GRAY)))
    canvas.arrow((0.36, y), (0.35 - left, y), RED, 0.05)
    canvas.arrow((0.64, y), (0.65 + right, y), BLUE, 0.05)


# ---- earth and sky

ROCKS = {"red": RED, "yellow": YELLOW, "gray": GRAY, "brown": BROWN, "green": GREEN}


def rock_layers(canvas, top, middle, bottom):
    """Three layers of rock under grass and sky."""
    canvas.background(SKY)
    phase, rise = canvas.rng.uniform(0, 6), canvas.rng.uniform(0.01, 0.03)

    def layer(y, fill):
        crest = [(x / 10, y + rise * math.sin(phase + 0.6 * x)) for x in range(-1, 12)]
        canvas.polygon([*crest, (1.1, 1.1), (-0.1, 1.1)], fill)

    colors = (110, 170, 90), *(ROCKS[name] for name in (top, middle, bottom))
    for y, fill in zip((0.13, 0.18, 0.46, 0.73), colors, strict=True):
        layer(y, fill)


def cloud(canvas, x, y, color):
    for dx, dy, r in ((-0.16, 0.03, 0.12), (0.16, 0.03, 0.13), (0, -0.05, 0.16), (0, 0.06, 0.12)):
        canvas.disc(x + dx, y + dy, r, color, None)


def weather(canvas, kind):
    """Sunny, cloudy, rainy, snowy, stormy."""
    rng = canvas.rng
    x, y = 0.5 + rng.uniform(-0.06, 0.06), 0.32 + rng.uniform(-0.03, 0.05)
    canvas.background(SKY if kind in ("sunny", "cloudy") else (120, 130, 150))
    if kind == "sunny":
        for i in range(12):
            dx, dy = math.cos(i * math.pi / 6), math.sin(i * math.pi / 6)
            canvas.line([(x + 0.24 * dx, y + 0.05 + 0.24 * dy), (x + 0.32 * dx, y + 0.05 + 0.32 * dy)], ORANGE, 0.03)
        canvas.disc(x, y + 0.05, 0.19, YELLOW, ORANGE, 0.015)
    else:
        cloud(canvas, x, y, (72, 74, 90) if kind == "stormy" else WHITE)
    if kind == "cloudy":
        cloud(canvas, x - 0.12, y + 0.3, WHITE)
    for i in range(4):
        fx, fy = x - 0.24 + 0.16 * i, y + 0.28 + rng.uniform(-0.02, 0.02)
        for drop in (fy, fy + 0.2):
            if kind == "rainy":
                canvas.line([(fx, drop), (fx - 0.05, drop + 0.12)], BLUE, 0.035)
            elif kind == "snowy":
                canvas.disc(fx, drop + 0.05, 0.04, WHITE, None)
    if kind == "stormy":
        canvas.polygon([(x + 0.02, y + 0.16), (x - 0.14, y + 0.42), (x - 0.02, y + 0.42), (x - 0.1, y + 0.64),
                        (x + 0.16, y + 0.34), (x + 0.04, y + 0.34), (x + 0.14, y + 0.16)], YELLOW, ORANGE)
    canvas.box(-0.1, 0.93, 1.1, 1.1, WHITE if kind == "snowy" else GREEN, None)


def moon(canvas, phase):
    """New, crescent, half and full moon in a night sky."""
    canvas.background(NIGHT)
    for _ in range(14):
        canvas.disc(canvas.rng.random(), canvas.rng.random(), 0.008, WHITE, None)
    x, y, r = 0.5, 0.5, canvas.rng.uniform(0.32, 0.37)
    bright, dark = (238, 234, 210), (58, 62, 98)
    canvas.disc(x, y, r, dark if phase == "new moon" else bright, (110, 114, 150), 0.012)
    if phase == "half moon":
        canvas.pencil.pieslice((*canvas.at(x - r, y - r), *canvas.at(x + r, y + r)), 90, 270, dark)
    elif phase == "crescent moon":
        canvas.disc(x - 0.24 * r, y, 0.76 * r, dark, None)


# ---- living things

def leaf(canvas, x, y):
    canvas.ellipse(x, y, 0.075, 0.14, GREEN)
    canvas.line([(x, y - 0.1), (x, y + 0.2)], (30, 90, 40), 0.015)


def snail(canvas, x, y):
    canvas.ellipse(x, y + 0.13, 0.16, 0.04, SAND)
    canvas.disc(x + 0.13, y + 0.06, 0.045, SAND)
    canvas.disc(x - 0.03, y, 0.12, ORANGE)
    canvas.disc(x - 0.03, y, 0.06, BROWN)


def rabbit(canvas, x, y):
    for dx in (-0.045, 0.045):
        canvas.ellipse(x + dx, y - 0.13, 0.03, 0.1, GRAY)
    canvas.ellipse(x, y + 0.1, 0.11, 0.12, GRAY)
    canvas.disc(x, y - 0.02, 0.085, GRAY)
    for dx in (-0.03, 0.03):
        canvas.disc(x + dx, y - 0.03, 0.014, INK)


def caterpillar(canvas, x, y):
    for i in range(5):
        canvas.disc(x - 0.13 + 0.065 * i, y + 0.1 - 0.06 * (i % 2), 0.055, (150, 200, 40))
    canvas.disc(x + 0.14, y + 0.02, 0.06, RED)


def beetle(canvas, x, y):
    for dy in (-0.06, 0.02, 0.1):
        canvas.line([(x - 0.15, y + dy - 0.03), (x, y + dy), (x + 0.15, y + dy - 0.03)], INK, 0.015)
    canvas.disc(x, y - 0.11, 0.05, INK)
    canvas.ellipse(x, y + 0.03, 0.1, 0.13, (60, 60, 150))
    canvas.line([(x, y - 0.08), (x, y + 0.16)], INK, 0.015)


def owl(canvas, x, y):
    canvas.ellipse(x, y + 0.02, 0.12, 0.18, BROWN)
    canvas.polygon([(x - 0.12, y - 0.2), (x - 0.03, y - 0.13), (x - 0.11, y - 0.06)], BROWN)
    canvas.polygon([(x + 0.12, y - 0.2), (x + 0.03, y - 0.13), (x + 0.11, y - 0.06)], BROWN)
    for dx in (-0.05, 0.05):
        canvas.disc(x + dx, y - 0.06, 0.05, YELLOW)
        canvas.disc(x + dx, y - 0.06, 0.02, INK)


def fox(canvas, x, y):
    canvas.polygon([(x - 0.14, y - 0.18), (x - 0.04, y - 0.1), (x + 0.04, y - 0.1), (x + 0.14, y - 0.18),
                    (x + 0.14, y + 0.02), (x, y + 0.19), (x - 0.14, y + 0.02)], ORANGE)
    canvas.polygon([(x - 0.06, y + 0.07), (x + 0.06, y + 0.07), (x, y + 0.19)], WHITE)
    for dx in (-0.06, 0.06):
        canvas.disc(x + dx, y, 0.018, INK)


def snake(canvas, x, y):
    wave = [(x - 0.14 + 0.028 * i, y + 0.09 * math.sin(i * 0.9)) for i in range(11)]
    canvas.line(wave, INK, 0.075)
    canvas.line(wave, (96, 176, 60), 0.06)
    canvas.ellipse(x + 0.14, y + 0.03, 0.06, 0.05, (96, 176, 60))


def frog(canvas, x, y):
    canvas.ellipse(x, y + 0.08, 0.16, 0.09, GREEN)
    canvas.ellipse(x, y - 0.02, 0.12, 0.09, GREEN)
    for dx in (-0.07, 0.07):
        canvas.disc(x + dx, y - 0.1, 0.04, WHITE)
        canvas.disc(x + dx, y - 0.1, 0.018, INK)


PLANT_EATERS = {"snail": snail, "rabbit": rabbit, "caterpillar": caterpillar, "beetle": beetle}
HUNTERS = {"owl": owl, "fox": fox, "snake": snake, "frog": frog}


def food_chain(canvas, prey, hunter):
    """A leaf, its eater, and the eater's predator; arrows point to the eater."""
    leaf(canvas, 0.1, 0.2)
    PLANT_EATERS[prey](canvas, 0.44, 0.46)
    HUNTERS[hunter](canvas, 0.8, 0.74)
    canvas.arrow((0.17, 0.28), (0.29, 0.38), INK, 0.02)
    canvas.arrow((0.56, 0.57), (0.67, 0.66), INK, 0.02)


def punnett(canvas, white):
    """A Punnett square whose cells are coloured as the flowers would be; `white` of the four are white."""
    rows, columns = {"none": ("AA", "Aa"), "one": ("Aa", "Aa"), "two": ("Aa", "aa"), "four": ("aa", "aa")}[white]
    if canvas.rng.random() < 0.5:
        rows, columns = columns, rows
    x0, y0, cell = 0.2, 0.2, 0.38
    for i, row in enumerate(rows):
        canvas.text(x0 - 0.1, y0 + cell * (i + 0.5), row, 0.14)
        canvas.text(x0 + cell * (i + 0.5), y0 - 0.1, columns[i], 0.14)
        for j, column in enumerate(columns):
            genes = "".join(sorted(row + column))
            canvas.box(x0 + cell * j, y0 + cell * i, x0 + cell * (j + 1), y0 + cell * (i + 1),
                       WHITE if genes == "aa" else PURPLE, INK, 0.015)
            canvas.text(x0 + cell * (j + 0.5), y0 + cell * (i + 0.5), genes, 0.16, INK if genes == "aa" else WHITE)


def plant(canvas, part):
    """A flowering plant with an arrow at one of its parts."""
    canvas.background(SKY)
    canvas.box(-0.1, 0.72, 1.1, 1.1, (196, 160, 116), None)
    x = 0.36
    for dx in (-0.14, -0.05, 0.05, 0.14):
        canvas.line([(x, 0.7), (x + dx / 2, 0.82), (x + dx, 0.95)], (240, 226, 196), 0.022)
    canvas.line([(x, 0.24), (x, 0.74)], (60, 130, 60), 0.04)
    canvas.ellipse(x - 0.15, 0.5, 0.14, 0.055, GREEN)
    canvas.ellipse(x + 0.15, 0.44, 0.14, 0.055, GREEN)
    for i in range(6):
        canvas.disc(x + 0.1 * math.cos(i * math.pi / 3), 0.17 + 0.1 * math.sin(i * math.pi / 3), 0.07, (236, 120, 170))
    canvas.disc(x, 0.17, 0.06, YELLOW)
    tips = {"flower": (x + 0.18, 0.17), "leaf": (x + 0.3, 0.44), "stem": (x + 0.03, 0.61), "root": (x + 0.14, 0.88)}
    tip = tips[part]
    canvas.arrow((0.98, tip[1]), tip, RED, 0.045)


# ---- charts

FRUITS = {"apples": RED, "lemons": YELLOW, "pears": GREEN, "plums": PURPLE}


def bar_chart(canvas, tallest):
    """Fruits sold at a market; bars in random order."""
    rng = canvas.rng
    names = rng.sample(list(FRUITS), len(FRUITS))
    canvas.line([(0.07, 0.04), (0.07, 0.86), (0.99, 0.86)], INK, 0.015)
    for i, name in enumerate(names):
        height = rng.uniform(0.68, 0.78) if name == tallest else rng.uniform(0.15, 0.45)
        x = 0.11 + 0.22 * i
        canvas.box(x, 0.86 - height, x + 0.18, 0.86, FRUITS[name])
        canvas.text(x + 0.09, 0.92, name, 0.062)
