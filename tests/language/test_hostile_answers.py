"""The reader of completions against hedges, hostile strings and megabytes: no hedge is ever rewarded."""

import itertools
import random
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tasks.language import words
from tasks.language.answers import choose, parse
from tasks.language.prompts import LETTERS, completion
from tests.language.test_answers import NESTED, OPTIONS, SETTLED, SIGNS, answered

LETTER_FORMS = (
    "{}",
    "({})",
    "{})",
    "{}.",
    "**{}**",
    "Option {}",
    "the answer is {}",
    '"{}"',
    "[{}]",
)
TEXT_FORMS = ("{}", "the {}", "a {}", "**{}**", "{}.", "({})")
# fmt: off
JOINTS = (
    " or ", "/", ", ", " and ", "\n", " maybe ", "; ", " | ", " & ", " vs ", " vs. ", " - ", " — ",
    "? ", " (or ", ") (", " → ", "+", " + ", "，", "、", " possibly ", " but not ", " then ",
    "\r\n", ", or maybe ", " rather than ", "...", ": ", " = ", "\u2028", "**/**", "</b>", "•", "(",
)
# fmt: on


def claims(index: int, option: str) -> list[str]:
    letters = [LETTERS[index], LETTERS[index].lower()]
    forms = [form.format(letter) for form in LETTER_FORMS for letter in letters]
    forms += [form.format(text) for form in TEXT_FORMS for text in (option, option.lower())]
    return [*forms, f"{LETTERS[index]}. {option}"]


@pytest.mark.parametrize("options", [OPTIONS, NESTED, SIGNS])
def test_no_hedge_is_ever_rewarded(options):
    """Any two different options, said in any way and joined in any way, are no answer."""
    said = [claims(index, option) for index, option in enumerate(options)]
    rng = random.Random(0)
    for claimed in said:
        rng.shuffle(claimed)
    for first, second in itertools.permutations(range(len(options)), 2):
        for joint in JOINTS:
            for one, other in zip(said[first], rng.sample(said[second], 12), strict=False):
                answer = one + joint + other
                assert answered(answer, options).index is None, answer


@given(st.data())
@SETTLED
def test_no_longer_hedge_is_rewarded_either(data):
    chosen = data.draw(st.lists(st.integers(0, 4), min_size=2, max_size=5, unique=True))
    options = data.draw(st.sampled_from([OPTIONS, NESTED, SIGNS]))
    parts = [data.draw(st.sampled_from(claims(i, options[i]))) for i in chosen]
    joints = [data.draw(st.sampled_from(JOINTS)) for _ in parts]
    answer = "".join(itertools.chain.from_iterable(zip(parts, joints, strict=True)))
    assert answered(answer, options).index is None


@given(st.data())
@SETTLED
def test_one_option_said_once_or_twice_is_that_option(data):
    index = data.draw(st.integers(0, 4))
    parts = [LETTERS[index] + data.draw(st.sampled_from([". ", ") ", ": ", " - ", "\n"]))]
    parts += data.draw(st.sampled_from([[], [OPTIONS[index]], [OPTIONS[index].lower()]]))
    assert answered("".join(parts)).index == index


# fmt: off
PIECES = (
    "<think>", "</think>", "<answer>", "</answer>", "<answer", "</", "<", ">", "<!--", "<|im_end|>",
    "&lt;answer&gt;", "]]>", "\x00", "\x1b[31m", "\x7f", "\ud800", "\udfff", "\u202e", "\u2066",
    "\u200d", "e\u0301", "\u0301" * 40, "\u1ab0" * 9, "가", "ﷺ", "İ", "ß", "½", "Ⓑ", "⒝", "🅱️",
    "\u3000", "\n", "\r", "\t", " ", ".", ",", "/", "(", ")", "*", "'", "&", "+", "\\boxed{", "}",
    "or", "maybe", "the answer is ", "Option ", "A", "B", "c", "F", "S", "2008", *OPTIONS,
    "albatross", "x" * 600,
)
# fmt: on


def test_ten_thousand_hostile_strings():
    """Nothing raises, and what is answered is an option that the text does name."""
    rng = random.Random(7)
    answers = 0
    for _ in range(10_000):
        inner = "".join(rng.choices(PIECES, k=rng.randint(0, 8)))
        text = rng.choice(
            [inner, completion("t", inner), completion(inner, "B"), inner + "</answer>"]
        )
        parsed, choice = parse(text), choose(text, OPTIONS)
        assert parsed.answer is None or (parsed.answer == parsed.answer.strip() != "")
        assert (parsed.answer is None) == (parsed.problem != "")
        assert not parsed.well_formed or (parsed.answer is not None and parsed.thought is not None)
        if choice.index is not None:
            answers += 1
            said = [word.key for word in words.words(parsed.answer or "")]
            text_said = words.normalize(OPTIONS[choice.index]) in " ".join(said)
            assert LETTERS[choice.index].lower() in said or text_said, text
    assert answers > 1000


@given(
    st.text(st.characters(), max_size=60),
    st.lists(st.text(st.characters(), max_size=9), max_size=30),
)
@example("\ud800", ["\udfff", "", "\x00"])
@SETTLED
def test_nothing_raises_whatever_the_options_are(text, options):
    choice = choose(completion("t", text), options)
    assert choice.index is None or choice.index < len(options)


MILLION = 1_000_000
HUGE = {
    "one line": "x" * MILLION,
    "opening tags": "<answer>" * (MILLION // 8),
    "closing tags": "</think>" * (MILLION // 8),
    "half tags": "<answer" * (MILLION // 7),
    "angles": "<" * MILLION,
    "spaces": "<think>t</think>" + " " * MILLION + "<answer>B</answer>",
    "a huge answer": completion("t", "B " * (MILLION // 2)),
    "a huge word": completion("t", "B" * MILLION),
    "a huge thought": completion("because " * (MILLION // 8), "B"),
    "parentheses": completion("t", "(" * MILLION),
    "combining marks": completion("t", "e" + "\u0301\u0327" * (MILLION // 2)),
    "newlines": completion("\n" * MILLION, "B"),
    "ligatures": completion("t", "ﷺ" * 499),
    "marks out of order": completion("t", "B" + "\u1ab0\u05b0\u0591" * 160),
}


@pytest.mark.parametrize("kind", HUGE)
def test_a_megabyte_takes_no_time(kind):
    started = time.process_time()
    parse(HUGE[kind])
    choose(HUGE[kind], OPTIONS)
    assert time.process_time() - started < 5.0  # CPU seconds; quadratic time would take minutes
