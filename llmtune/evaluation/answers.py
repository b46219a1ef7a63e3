"""Reading a written answer without losing its meaning: which choice it names, which number."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

NEGATIONS = frozenset(
    re.findall(
        r"\w+",
        "not no never neither nor non without cannot nicht kein keine keinen nie pas "
        "jamais ni não nao nunca не ни geen niet inte ikke ",
    )
)
"""What negates the words behind it, as the common languages write it."""
AUXILIARIES = frozenset(
    re.findall(r"\w+", "is are was were do does did ca wo would could should has have had ")
)
"""Verbs that take n't."""

NEGATING_CHARACTERS = "不非未没無"
"""What negates the word right behind it in Chinese and Japanese."""
NEGATION_REACH = 3
"""How many words before a choice can negate it."""
CLAUSE_ENDS = re.compile(r"[.,;:!?()\n—–]|\b(?:but|rather|instead|sondern|mais|sino)\b")

AROUND_KINDS = frozenset({"Ps", "Pe", "Pi", "Pf", "Po"})
"""Unicode categories of what may be right beside a choice without changing it: brackets, quotes,
sentence marks."""
AROUND_MORE = "~`_\u2013\u2014"
NEVER_AROUND = "#%&@/\\"
"""Signs that belong to what they touch, though Unicode calls them punctuation."""
INSIDE = ".,':\u2019\u00b7"
"""What joins its two sides where both are parts of a word or number: 1.5, it's, 12:30."""
WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
"""Scripts that put no space between words."""

SPACE_GROUPS = "\u00a0\u202f\u2009"
GROUP_SIGNS = f"_'\u2019{SPACE_GROUPS}"
"""What is written between thousands besides a comma: 1_000 in code, 1'000 in Switzerland."""
_PLAIN_SPACE = r"(?<=\d)(?<!\d{4}) (?=\d{3}(?!\d))"
CHUNK = re.compile(rf"\d(?:(?:[\d.,:/{GROUP_SIGNS}–−-]|{_PLAIN_SPACE})*\d)?(?:[eE][-+]?\d+(?!\w))?")
"""A run of digits and of what may stand inside a number, a range, a date or a fraction."""
PLAIN = re.compile(r"\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
GROUPED = re.compile(
    rf"[1-9]\d{{0,2}}(?:(?:,\d{{3}})+|(?:([{GROUP_SIGNS}])\d{{3}}(?:\1\d{{3}})*))(?:\.\d+)?"
)
SPACED = re.compile(r"[1-9]\d{0,2}(?: \d{3})*(?: 0\d{2})(?: \d{3})*(?:\.\d+)?")
"""A plain space may also part two numbers, but none of those begins with a 0."""


@dataclass(frozen=True)
class _Named:
    """A choice that is in a text at characters `start` to `end`."""

    place: int
    start: int
    end: int


def find_choice(text: str, choices: Sequence[str]) -> int | None:
    """Return which choice a text names; None if it names none, or more than one.

    A text names a choice that it is, or that it holds as whole words. Signs belong to a word that
    they touch ("C++" does not name "C", "-1" does not name "1"), the longest choice counts where
    several begin at one place, and a choice that is denied ("not positive") is not named. Case
    counts only if choices differ in nothing else.
    """
    folded = [_fold(choice) for choice in choices]
    folds_case = len(set(folded)) == len(folded)
    if not folds_case:
        folded = [_tidy(choice) for choice in choices]
    answer = _fold(text) if folds_case else _tidy(text)
    for form in (answer, _strip_around(answer)):
        if form and form in folded:
            return folded.index(form)
    return _only_named(answer, folded)


def _only_named(text: str, choices: Sequence[str]) -> int | None:
    """Return the one choice that is in `text` and is not denied there."""
    found = _longest(
        [each for place, one in enumerate(choices) for each in _find(text, place, one)]
    )
    named = set()
    begin = 0
    for each in found:
        if not _is_denied(text[begin : each.start]):
            named.add(each.place)
        begin = each.end
    return named.pop() if len(named) == 1 else None


def find_last_number(text: str) -> float | None:
    """Return the last number in `text`, or None if there is none or it can be read in two ways.

    "1,234.5", "1_000" and "1 000" have thousands; "12 500" may be two numbers, "1,2" may
    be a decimal or a list, "10-20" is a range, "3/4" and dates are more than one number: none of
    these is guessed. A minus sign counts if no word or number touches it.
    """
    found = list(CHUNK.finditer(text))
    if not found:
        return None
    chunk = found[-1].group()
    before = text[: found[-1].start()]
    if GROUPED.fullmatch(chunk) or SPACED.fullmatch(chunk):
        digits = re.sub(rf"[, {GROUP_SIGNS}]", "", chunk)
    elif PLAIN.fullmatch(chunk):
        digits = chunk
    else:
        return None
    if before.endswith(".") and not re.search(r"[\w.]\.$", before):
        digits, before = f"0.{digits}", before[:-1]
    before = re.sub(r"[$€£¥]\s?$", "", before)
    is_negative = re.search(r"(?<![\w)\]])[-−]$", before) is not None
    return -float(digits) if is_negative else float(digits)


def _find(text: str, place: int, choice: str) -> Iterator[_Named]:
    """Yield where a choice is in `text` as whole words."""
    start = text.find(choice) if choice else -1
    while start >= 0:
        end = start + len(choice)
        if _is_apart(text, start, before=True) and _is_apart(text, end, before=False):
            yield _Named(place, start, end)
        start = text.find(choice, start + 1)


def _longest(found: Sequence[_Named]) -> list[_Named]:
    """Return what is inside nothing longer, in the text's order."""
    kept = [
        each
        for each in found
        if not any(
            other.start <= each.start
            and each.end <= other.end
            and other.end - other.start > each.end - each.start
            for other in found
        )
    ]
    return sorted(kept, key=lambda each: each.start)


def _is_apart(text: str, border: int, *, before: bool) -> bool:
    """Whether what is on the far side of a choice's border does not belong to the same word."""
    outside = text[border - 1 : border] if before else text[border : border + 1]
    inside = text[border : border + 1] if before else text[border - 1 : border]
    if not outside or outside.isspace():
        return True
    if is_word(outside):
        unspaced = _is_unspaced(outside) or _is_unspaced(inside)
        return unspaced or not is_word(inside)
    if not _is_around(outside):
        return False
    if outside not in INSIDE:
        return True
    beyond = text[border - 2 : border - 1] if before else text[border + 1 : border + 2]
    joins = is_word(beyond) if outside != ":" else beyond.isdigit()
    return not (joins and is_word(inside))


def _is_denied(before: str) -> bool:
    """Whether a choice is denied by what is before it in its clause."""
    if before.rstrip()[-1:] and before.rstrip()[-1] in NEGATING_CHARACTERS:
        return True
    clause = CLAUSE_ENDS.split(before)[-1]
    words = re.sub(r"['\u2019]", "", clause).replace("-", " ").split()[-NEGATION_REACH:]
    return any(
        word in NEGATIONS or (word.endswith("nt") and word[:-2] in AUXILIARIES) for word in words
    )


def is_word(character: str) -> bool:
    """Whether a character is part of a word in any script: letters, marks, digits, `_`."""
    return bool(character) and (unicodedata.category(character)[0] in "LMN" or character == "_")


def _is_unspaced(character: str) -> bool:
    return bool(character) and unicodedata.name(character, "").startswith(WITHOUT_SPACES)


def _is_around(character: str) -> bool:
    if character in NEVER_AROUND:
        return False
    return character in AROUND_MORE or unicodedata.category(character) in AROUND_KINDS


def _strip_around(text: str) -> str:
    start, end = 0, len(text)
    while start < end and (text[start].isspace() or _is_around(text[start])):
        start += 1
    while end > start and (text[end - 1].isspace() or _is_around(text[end - 1])):
        end -= 1
    return text[start:end]


def _fold(text: str) -> str:
    return _tidy(unicodedata.normalize("NFKC", text).casefold())


def _tidy(text: str) -> str:
    return " ".join(text.split())
