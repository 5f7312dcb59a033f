"""The needle task's words: what is hidden, what is asked, and which cities and numbers only an evaluation may use.

Training data and evaluation must agree on these to the letter and must not share a city or a number, so they stand
here once. The texts are LWM's (arXiv 2402.08268, section 5.2 and its evaluation code).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lwm_core.errors import DataError, ShapeError
from lwm_core.prompts import PROMPT_START as PROMPT_START

Split = Literal["train", "held-out"]

DIGITS = 7
"""Digits of a magic number; the first is not 0."""

HELD_OUT_DIVISOR = 7

PROMPT_END = (
    " Don't give information outside the document or repeat your findings. "
    "Keep your response short and direct. ASSISTANT:"
)

CITIES: tuple[str, ...] = (
    "Aachen", "Abidjan", "Accra", "Adelaide", "Agra", "Aleppo", "Algiers", "Almaty", "Amman", "Amsterdam", "Ankara",
    "Antwerp", "Asmara", "Astana", "Asuncion", "Athens", "Atlanta", "Auckland", "Austin", "Baghdad", "Baku", "Bamako",
    "Bandung", "Bangkok", "Bangui", "Barcelona", "Bari", "Basel", "Basra", "Beijing", "Beirut", "Belfast", "Belgrade",
    "Bergen", "Berlin", "Bern", "Bilbao", "Bishkek", "Bogota", "Bologna", "Bonn", "Bordeaux", "Boston", "Brasilia",
    "Bremen", "Brighton", "Brisbane", "Bristol", "Brno", "Brussels", "Bucharest", "Budapest", "Bursa", "Busan", "Cairo",
    "Calgary", "Cali", "Canberra", "Caracas", "Cardiff", "Casablanca", "Chengdu", "Chennai", "Chicago", "Cologne",
    "Colombo", "Conakry", "Copenhagen", "Cordoba", "Cork", "Curitiba", "Dakar", "Dallas", "Damascus", "Darwin", "Davao",
    "Delhi", "Denver", "Detroit", "Dhaka", "Djibouti", "Dodoma", "Doha", "Donetsk", "Dortmund", "Dresden", "Dublin",
    "Dubai", "Dundee", "Durban", "Dushanbe", "Edinburgh", "Essen", "Fez", "Florence", "Frankfurt", "Freetown",
    "Fukuoka", "Gaborone", "Galway", "Gdansk", "Geneva", "Genoa", "Ghent", "Giza", "Glasgow", "Goa", "Graz", "Grenoble",
    "Guayaquil", "Hamburg", "Hanoi", "Hanover", "Harare", "Havana", "Helsinki", "Hiroshima", "Hobart", "Houston",
    "Hyderabad", "Ibadan", "Incheon", "Islamabad", "Istanbul", "Izmir", "Jaipur", "Jakarta", "Jeddah", "Johannesburg",
    "Kabul", "Kampala", "Kano", "Karachi", "Kathmandu", "Kazan", "Khartoum", "Kiev", "Kigali", "Kingston", "Kinshasa",
    "Kobe", "Kolkata", "Krakow", "Kumasi", "Kyoto", "Lagos", "Lahore", "Leeds", "Leipzig", "Libreville", "Lille",
    "Lima", "Lisbon", "Liverpool", "Ljubljana", "Lodz", "London", "Luanda", "Lusaka", "Luxembourg", "Lviv", "Lyon",
    "Macau", "Madrid", "Malaga", "Malmo", "Managua", "Manaus", "Manchester", "Manila", "Maputo", "Marrakesh",
    "Marseille", "Medellin", "Melbourne", "Memphis", "Miami", "Milan", "Minsk", "Mombasa", "Monaco", "Montevideo",
    "Montreal", "Moscow", "Mosul", "Mumbai", "Munich", "Muscat", "Nagoya", "Nairobi", "Nanjing", "Nantes", "Naples",
    "Nashville", "Nassau", "Niamey", "Nice", "Nicosia", "Nottingham", "Nuremberg", "Odessa", "Osaka", "Oslo", "Ottawa",
    "Oxford", "Palermo", "Paris", "Patna", "Perth", "Philadelphia", "Phoenix", "Pisa", "Porto", "Portland", "Poznan",
    "Prague", "Pretoria", "Pune", "Quebec", "Quito", "Rabat", "Recife", "Reykjavik", "Riga", "Riyadh", "Rome",
    "Rosario", "Rotterdam", "Salvador", "Salzburg", "Santiago", "Santos", "Sapporo", "Sarajevo", "Seattle", "Seoul",
    "Seville", "Shanghai", "Sheffield", "Singapore", "Skopje", "Sofia", "Stockholm", "Strasbourg", "Stuttgart",
    "Surabaya", "Surat", "Sydney", "Taipei", "Tallinn", "Tampa", "Tampere", "Tashkent", "Tbilisi", "Tehran", "Tirana",
    "Tokyo", "Toronto", "Toulouse", "Tripoli", "Tunis", "Turin", "Utrecht", "Valencia", "Valparaiso", "Vancouver",
    "Venice", "Vienna", "Vientiane", "Vilnius", "Warsaw", "Wellington", "Windhoek", "Winnipeg", "Wuhan", "Yaounde",
    "Yerevan", "Yokohama", "Zagreb", "Zanzibar", "Zaragoza", "Zurich",
)  # fmt: skip


def cities(split: Split) -> tuple[str, ...]:
    """The cities of a split: every fourth name is held out."""
    return tuple(city for i, city in enumerate(CITIES) if (i % 4 == 3) == (split == "held-out"))


def is_held_out(number: int) -> bool:
    """Whether only an evaluation may use ``number``: every seventh, which no single digit gives away."""
    return number % HELD_OUT_DIVISOR == 0


def draw_number(random: np.random.Generator, split: Split) -> str:
    """A number of the split as text."""
    number = int(random.integers(10 ** (DIGITS - 1), 10**DIGITS))
    while is_held_out(number) != (split == "held-out"):
        number = int(random.integers(10 ** (DIGITS - 1), 10**DIGITS))
    return str(number)


@dataclass(frozen=True)
class Needle:
    """One hidden fact."""

    city: str
    number: str

    @property
    def text(self) -> str:
        """The line that is planted."""
        return f"\nThe special magic {self.city} number is: {self.number}\n"


def draw_needles(random: np.random.Generator, count: int, split: Split) -> list[Needle]:
    """``count`` needles with different cities and different numbers.

    Raises:
        DataError: the split has fewer cities than that.
    """
    names = cities(split)
    if count > len(names):
        raise DataError(f"needle: {count} needles are asked for, but the {split} split has {len(names)} cities")
    chosen = random.choice(len(names), size=count, replace=False)
    numbers: list[str] = []
    while len(numbers) < count:
        number = draw_number(random, split)
        if number not in numbers:
            numbers.append(number)
    return [Needle(names[int(i)], number) for i, number in zip(chosen, numbers, strict=True)]


def question(needles: Sequence[Needle]) -> str:
    """What is asked about one needle, or about several at once."""
    if len(needles) == 1:
        return f" What is the special magic {needles[0].city} number?"
    names = [needle.city for needle in needles]
    listed = ", ".join(names[:-1]) + f" and {names[-1]}"
    return f" What are the special magic numbers for {listed}?"


def answer(needles: Sequence[Needle]) -> str:
    """What a model is trained to say, a space first: the number, or each city with its number."""
    if len(needles) == 1:
        return f" {needles[0].number}"
    return " " + ", ".join(f"{needle.city}: {needle.number}" for needle in needles)


def plant(haystack: Sequence[int], needles: Sequence[tuple[float, Sequence[int]]], ends: frozenset[int]) -> list[int]:
    """Insert each needle's ids into ``haystack`` at its depth, moved back to just after a sentence end.

    Args:
        haystack: ids of the text, already cut to leave room for the needles.
        needles: (depth in [0, 1], ids) of each; depth 0 is before the first token.
        ends: ids that end a sentence or a line; where none lies before, the depth is taken as it is.
    """
    spots = []
    for depth, ids in needles:
        spot = round(depth * len(haystack))
        spots.append((next((i for i in range(spot, 0, -1) if haystack[i - 1] in ends), spot), ids))
    result: list[int] = []
    last = 0
    for spot, ids in sorted(spots, key=lambda item: item[0]):
        result.extend(haystack[last:spot])
        result.extend(ids)
        last = spot
    result.extend(haystack[last:])
    return result


Encode = Callable[[str], Sequence[int]]
"""Text to ids without special ids: a tokenizer's ``encode``."""


def sentence_ends(decode: Callable[[Sequence[int]], str], size: int) -> frozenset[int]:
    """Ids in ``[0, size)`` whose own text ends a sentence or a line: what :func:`plant` moves a needle back to."""
    return frozenset(i for i in range(size) if decode([i]).rstrip(" ").endswith((".", "!", "?", "\n")))


def build_prompt(
    haystack: Sequence[int],
    needles: Sequence[tuple[float, Needle]],
    asked: Sequence[Needle],
    encode: Encode,
    ends: frozenset[int],
    bos: int | None = None,
) -> list[int]:
    """Ids of a whole prompt: ``[bos] PROMPT_START haystack-with-needles question PROMPT_END``.

    Training data and evaluation both build their prompts here. Every piece is encoded by itself and the ids are laid
    end to end, so that the length is known before the text is chosen (:func:`fit_haystack`) and a needle's ids do not
    depend on its neighbours.

    Args:
        haystack: ids of the real text, :func:`fit_haystack` of them.
        needles: (depth in [0, 1], needle) of each needle that is planted.
        asked: the needles that the question is about, in the order in which the answer names them.
        encode: the tokenizer's ``encode``.
        ends: see :func:`plant`; :func:`sentence_ends` gives them.
        bos: id that starts a document, where the tokenizer has one (``special_ids.get("bos")``).
    """
    planted = plant(haystack, [(depth, encode(needle.text)) for depth, needle in needles], ends)
    start = [] if bos is None else [bos]
    return [*start, *encode(PROMPT_START), *planted, *encode(question(asked)), *encode(PROMPT_END)]


def answer_ids(asked: Sequence[Needle], encode: Encode, eos: int | None = None) -> list[int]:
    """Ids that follow the prompt: the answer, then ``eos`` where the tokenizer has one."""
    return [*encode(answer(asked)), *([] if eos is None else [eos])]


def fit_haystack(
    length: int, needles: Sequence[Needle], asked: Sequence[Needle], encode: Encode, bos: int | None = None
) -> int:
    """How many haystack ids make :func:`build_prompt` exactly ``length`` ids long.

    Raises:
        ShapeError: the needles and the question alone are longer than that; the message says how many ids they need.
    """
    fixed = len(build_prompt([], [(0.0, needle) for needle in needles], asked, encode, frozenset(), bos))
    if fixed > length:
        raise ShapeError(
            f"needle: a prompt of {length} tokens was asked for, but {len(needles)} needle(s) and the question "
            f"about {len(asked)} alone need {fixed}; use a longer length or fewer needles"
        )
    return length - fixed
