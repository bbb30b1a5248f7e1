"""Reads the answer in a completion, for rewards and evaluation alike.

`parse` finds the answer block; `choose` reads it as an answer to a multiple-choice question. Both
take any string, never raise, and need time linear in its length. `answer_column.read_answers` is the
fast path of `parse` for a whole column; a property test holds the two together.

`choose` reads an answer as a sequence of claims: letters and option texts, with only filler ("the
answer is") and punctuation between them. All claims must mean the same option. So "B.", "(b)",
"Option B", "Laysan Albatross" and "B. Laysan Albatross" are answers. "A or B", "B, maybe A", a
letter beside another option's text, and a letter inside prose are not: a hedged answer earns nothing.
A lead-in ("species name:") and a remark on sex or age ("(female or juvenile)") change no answer.
Only A to Z are letters. An option text of one sign, such as "7" or "狗", is a text like any other.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from tasks.language import remarks, words
from tasks.language.prompts import LETTERS

_TAG = re.compile(r"</?(?:think|answer)>")
_WELL_FORMED = ["<think>", "</think>", "<answer>", "</answer>"]
# Words that do not change a claim beside them; \boxed{B} is how models answer in mathematics.
_FILLERS = frozenset(
    """the an answer answers is it its this that my final correct right best option choice letter
    species i say think believe choose pick select would be boxed text textbf mathbf
    """.split()  # noqa: SIM905 - as a list it would take a screen
)
_LETTER_FOLLOWS = ("option", "choice", "letter")
_SAYING = ("would", "say", "think", "believe", "choose", "pick", "select")
_LABEL_ENDS = re.compile(r"[\s*_\])]*[.):\]][\s*_\[(]*")


@dataclass(frozen=True)
class Parsed:
    """The parts of a completion, stripped of white space.

    `answer` is None unless there is exactly one non-empty answer block. `problem` is then the
    reason: no_answer, unclosed_answer, several_answers, nested_answer or empty_answer; else it is
    "". `well_formed` is what the format reward pays for: one think block, then one non-empty answer
    block, and only white space around them.
    """

    thought: str | None
    answer: str | None
    well_formed: bool
    problem: str


@dataclass(frozen=True)
class Choice:
    """The index of the option that an answer names, or None.

    `status` is how the answer was read (letter, text, letter_and_text), or why it was not: a
    `problem` of `Parsed`, hedge, disagree (a letter beside words that are not its option's),
    out_of_range, ambiguous (a text that fits two options), too_long, or unknown.
    """

    index: int | None
    status: str


@dataclass(frozen=True)
class _Options:
    """The options of a question, indexed for look-up.

    `spellings` maps an option's words, joined by spaces, to (the texts between them, option index).
    `bags` does so for sorted words, where one of them is a model year. `longest` counts words.
    `remarks` says whether an option has a remark in parentheses.
    """

    count: int
    spellings: dict[str, list[tuple[tuple[str, ...], int]]]
    bags: dict[tuple[str, ...], set[int]]
    longest: int
    vocabulary: frozenset[str]
    remarks: bool


def parse(completion: str) -> Parsed:
    """Split a completion at its <think> and <answer> tags, which must be spelled exactly so.

    Where a chat template ends the prompt in <think>, the completion lacks that tag. Its answer is
    read all the same; for `thought` and `well_formed` put the tag back: `parse("<think>" + text)`.
    """
    tags = list(_TAG.finditer(completion))
    names = [tag.group() for tag in tags]
    answer, problem = _answer(completion, tags, names)
    thought = None
    if [name for name in names if "think" in name] == _WELL_FORMED[:2]:
        start, end = names.index("<think>"), names.index("</think>")
        thought = completion[tags[start].end() : tags[end].start()].strip()
    well_formed = (
        answer is not None
        and names == _WELL_FORMED
        and not completion[: tags[0].start()].strip()
        and not completion[tags[1].end() : tags[2].start()].strip()
        and not completion[tags[3].end() :].strip()
    )
    return Parsed(thought, answer, well_formed, problem)


def in_form(completion: str, style: str) -> bool:
    """Whether a completion has the form that a prompt style asks for, white space around its blocks aside.

    One non-empty answer block alone (`direct`); a non-empty caption block, then what `well_formed`
    accepts (`caption`); with any other style what `well_formed` accepts.
    """
    if style == "direct":
        text = completion.strip()
        alone = text.startswith("<answer>") and text.endswith("</answer>")
        return alone and parse(text).answer is not None
    if style == "caption":
        opened, _, rest = completion.partition("<caption>")
        caption, closed, rest = rest.partition("</caption>")
        clean = not opened.strip() and closed and caption.strip() and "caption>" not in rest
        return bool(clean) and parse(rest).well_formed
    return parse(completion).well_formed


def reasoning(completion: str) -> str:
    """The reasoning in a completion: its think block, or else the text before the answer."""
    text = parse(completion).thought
    if text is None:
        text = completion.partition("<answer>")[0].replace("<think>", "").replace("</think>", "")
    return text.strip()


def choose(completion: str, options: Sequence[str]) -> Choice:
    """Which of `options`, lettered from A, the completion's answer names. The module text has the rules."""
    parsed = parse(completion)
    if parsed.answer is None:
        return Choice(None, parsed.problem)
    if len(parsed.answer) > words.MAX_LENGTH:
        return Choice(None, "too_long")
    prepared = _prepare(tuple(options))
    answer = parsed.answer
    if not prepared.remarks:
        answer = remarks.without_stages(answer, prepared.vocabulary)
    tokens = remarks.after_lead_in(words.words(answer), remarks.LEAD_IN - prepared.vocabulary)
    return _Reading(tokens, prepared).choice()


def _answer(completion: str, tags: list[re.Match[str]], names: list[str]) -> tuple[str | None, str]:
    """(content of the one answer block, ""), or (None, problem)."""
    opened, closed = names.count("<answer>"), names.count("</answer>")
    if opened == 0:
        return None, "no_answer"
    if opened > 1 or closed > 1:
        return None, "several_answers"
    start = names.index("<answer>")
    if closed == 0 or names.index("</answer>") < start:
        return None, "unclosed_answer"
    # The answer lies inside a thought if the tag before it is no </think> and the next one is.
    within = names[:start][-1:] != ["</think>"] and names[start + 2 :][:1] == ["</think>"]
    if names[start + 1] != "</answer>" or within:
        return None, "nested_answer"
    answer = completion[tags[start].end() : tags[start + 1].start()].strip()
    return (answer, "") if answer else (None, "empty_answer")


@lru_cache(maxsize=4096)
def _prepare(options: tuple[str, ...]) -> _Options:
    """Index the options: each with and without its remarks and its article."""
    spellings: dict[str, list[tuple[tuple[str, ...], int]]] = {}
    bags: dict[tuple[str, ...], set[int]] = {}
    for index, option in enumerate(options):
        full = words.words(option)
        bare = words.words(words.without_remarks(option))
        for spelling in (full, words.without_article(full), bare, words.without_article(bare)):
            key = " ".join(word.key for word in spelling)
            gaps = tuple(word.after.strip() for word in spelling[:-1])
            spellings.setdefault(key, []).append((gaps, index))
            if bag := words.year_bag(key.split()):
                bags.setdefault(bag, set()).add(index)
    spellings.pop("", None)
    longest = max((key.count(" ") + 1 for key in spellings), default=0)
    vocabulary = frozenset(word for key in spellings for word in key.split())
    remarks = any(words.without_remarks(option) != option for option in options)
    return _Options(len(options), spellings, bags, longest, vocabulary, remarks)


def _depths(tokens: list[words.Word]) -> list[int]:
    """How many parentheses are open at each word."""
    depths, depth = [], 0
    for word in tokens:
        depth = max(0, depth + word.before.count("(") - word.before.count(")"))
        depths.append(depth)
    return depths


def _is_letter(word: words.Word) -> bool:
    """Whether the word is one of A to Z. A single digit or sign of another script is a text."""
    return len(word.key) == 1 and word.key.isascii() and word.key.isalpha()


class _Reading:
    """Reads an answer's words from left to right as claims about the options.

    Each entry of `letters` and `texts` is one claim: the indices of the options that it may mean.
    """

    def __init__(self, tokens: list[words.Word], options: _Options):
        self.words = tokens
        self.options = options
        self.letters: list[set[int]] = []
        self.texts: list[set[int]] = []
        self.hedged = False
        self.unknown = False

    def choice(self) -> Choice:
        """The option that all claims agree on, or why there is none."""
        self._read()
        claims = self.letters + self.texts
        if self.hedged:
            return Choice(None, "hedge")
        if not claims:
            return Choice(None, "unknown")
        agreed = set.intersection(*claims)
        if not agreed:
            return Choice(None, self._conflict())
        if self.unknown:
            return Choice(None, "disagree" if self.letters else "unknown")
        if len(agreed) > 1:
            return Choice(None, "ambiguous")
        index = agreed.pop()
        if index >= self.options.count:
            return Choice(None, "out_of_range")
        if self.letters and self.texts:
            return Choice(index, "letter_and_text")
        return Choice(index, "letter" if self.letters else "text")

    def _conflict(self) -> str:
        """The status of claims that mean no option in common."""
        one_letter = bool(self.letters) and bool(set.intersection(*self.letters))
        one_text = bool(self.texts) and bool(set.intersection(*self.texts))
        return "disagree" if one_letter and one_text else "hedge"

    def _read(self) -> None:
        index, depths = 0, _depths(self.words)
        while index < len(self.words):
            word = self.words[index]
            length, named = self._option_at(index)
            if named:
                self.texts.append(named)
                index += length
                continue
            if word.key in words.HEDGES:
                self.hedged = True
            elif _is_letter(word):
                self._read_letter(index)
            elif word.key not in _FILLERS:
                # Words in parentheses are ignored, unless they may refer to the options.
                refers = self.options.remarks or word.key in self.options.vocabulary
                self.unknown |= depths[index] == 0 or refers
            index += 1

    def _read_letter(self, at: int) -> None:
        """Claim the letter that is word `at`, unless it is an article or the pronoun I."""
        word = self.words[at]
        before = self.words[at - 1].key if at else ""
        following = self.words[at + 1].key if at + 1 < len(self.words) else ""
        article = word.raw == "a" and word.after == " " and before not in _LETTER_FOLLOWS
        if article and len(following) > 1 and self._option_at(at + 1)[1]:
            return  # the article of "a Laysan Albatross"; a capital A would be the letter
        if word.key == "i" and following in _SAYING:
            return
        claim = {LETTERS.index(word.key.upper())}
        # An option may itself be a letter: "B. A" is letter B with its text, "B, A" is a hedge.
        if self.letters and _LABEL_ENDS.fullmatch(word.before):
            claim |= {index for _, index in self.options.spellings.get(word.key, [])}
        self.letters.append(claim)

    def _option_at(self, start: int) -> tuple[int, set[int]]:
        """The longest option text that starts at word `start`: (its word count, option indices)."""
        keys = [word.key for word in self.words[start : start + self.options.longest]]
        for length in range(len(keys), 0, -1):
            if length == 1 and self._labels_an_option(self.words[start]):
                break  # an option's letter is always read as the letter
            fits = self.options.spellings.get(" ".join(keys[:length]), [])
            named = {index for gaps, index in fits if self._joined(start, gaps)}
            if named:
                return length, named
        rest = [word.key for word in self.words[start:]] if self.options.bags else []
        if len(rest) <= self.options.longest:
            return len(rest), self.options.bags.get(words.year_bag(rest), set())
        return 0, set()

    def _labels_an_option(self, word: words.Word) -> bool:
        """Whether the word is the letter of an option. An X among three options is none."""
        return _is_letter(word) and LETTERS.index(word.key.upper()) < self.options.count

    def _joined(self, start: int, gaps: tuple[str, ...]) -> bool:
        """Whether the words from `start` are joined as in the option, and not as in a list."""
        return all(
            words.hangs_on(word) or (gap != "" and word.after.strip() == gap)
            for word, gap in zip(self.words[start:], gaps, strict=False)
        )
