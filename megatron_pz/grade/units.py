"""Words that say what an answer counts, and numbers written as words."""

from __future__ import annotations

import re

_LENGTH = "mm cm dm m km inch inches ft foot feet yd yard yards mile miles meter meters metre metres mtr"
_AREA = "acre acres hectare hectares square squared sq cubic cube cu cc"
_MASS = "g gm gram grams kg kilogram kilograms mg lb lbs pound pounds ton tons tonne tonnes oz ounce ounces"
_VOLUME = "l lt liter liters litre litres ml gal gallon gallons cup cups"
_TIME = (
    "s sec secs second seconds min mins minute minutes h hr hrs hour hours day days week weeks month months yr yrs year "
    "years am pm noon"
)
_SPEED = "mph kmh kmph rpm"
_PHYSICS = "ohm ohms volt volts watt watts joule joules newton newtons hertz pascal kelvin celsius fahrenheit mol moles"
_MONEY = "dollar dollars cent cents rupee rupees rs euro euros percent"
_THINGS = (
    "unit units degree degrees deg radian radians man men woman women people person persons student students child "
    "children apple apples coin coins tile tiles toy toys soldier soldiers monkey monkeys pie pies round rounds mark marks "
    "number numbers way ways time times book books ticket tickets"
)
_SENSES = "increase decrease profit loss gain more less excess east west north south"

UNITS = frozenset(" ".join((_LENGTH, _AREA, _MASS, _VOLUME, _TIME, _SPEED, _PHYSICS, _MONEY, _THINGS, _SENSES)).split())
"""Left out of an answer where they stand as words of their own; those of one letter only behind a number, since
elsewhere a letter is a variable."""

_ONES = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
        "eighteen nineteen".split()
    )
}
_TENS = {
    word: 10 * value for value, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)
}
_POWERS = {"thousand": 10**3, "million": 10**6, "billion": 10**9}

_LONG = re.compile(
    r"(?<![\w\\])(?:" + "|".join(sorted((u for u in UNITS if len(u) > 1), key=len, reverse=True)) + r")(?![\w])"
)
_SHORT = re.compile(r"(?<=\d)\s+(?:" + "|".join(sorted(u for u in UNITS if len(u) == 1)) + r")(?:\^?\{?[23]\}?)?$")
_SPEEDS = re.compile(
    r"(?<=\d)\s*(?:mm|cm|m|km|mi|miles?|ft|feet|meters?|g|kg)\s*(?:/|per)\s*(?:s|sec|second|h|hr|hour|min|minute|day|m|cm)(?:\^?\{?[23]\}?)?$"
)
_GLUED = re.compile(r"(?<=\d)\s*(?:mm|cm|dm|km|kg|ml|mph|kmh)(?:\^?\{?[23]\}?)?$")


def without_units(text: str) -> str:
    """`text` without unit words, unless nothing else is in it.

    >>> without_units("12 square feet"), without_units("5 m/s"), without_units("m + 2"), without_units("miles")
    ('12', '5', 'm + 2', 'miles')
    """
    found = text
    for pattern in (_SPEEDS, _GLUED, _SHORT, _LONG):
        shorter = pattern.sub("", found).strip()
        found = shorter or found
    return found


def number_of_words(text: str) -> int | None:
    """The whole number that `text` spells in English; None where it holds any other word.

    >>> number_of_words("two hundred and forty-one"), number_of_words("twelve"), number_of_words("two cats")
    (241, 12, None)
    """
    words = [word for word in re.split(r"[\s-]+", text.lower().strip()) if word and word != "and"]
    if not words:
        return None
    total, part = 0, 0
    for word in words:
        if word in _ONES or word in _TENS:
            part += _ONES.get(word, _TENS.get(word, 0))
        elif word == "hundred":
            part = max(part, 1) * 100
        elif word in _POWERS:
            total, part = total + max(part, 1) * _POWERS[word], 0
        else:
            return None
    return total + part
