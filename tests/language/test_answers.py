"""The one reader of completions: what it takes for an answer, and what it must never take."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.language.answers import Choice, choose, parse
from tasks.language.prompts import LETTERS, completion

OPTIONS = (
    "2008 Acura TL Type-S",
    "Laysan Albatross",
    "Black-footed Albatross",
    "F/A-18",
    "Chuck-will's-widow",
)
# Lookalikes made to trip a reader: names inside names, names made of other names, a name in another
# order, a name with a remark.
NESTED = ("Desert", "Rose", "Desert Rose", "Rose Mallow", "Mallow (tree)")
# Texts of one sign: none of them is a letter of an option.
SIGNS = ("猫", "狗", "3", "7", "X")
# No examples are kept between runs, and the same ones are tried in each.
SETTLED = settings(deadline=None, derandomize=True, database=None)


def answered(answer: str, options: tuple[str, ...] = OPTIONS) -> Choice:
    return choose(completion("Dark wings.", answer), options)


WELL_FORMED = [
    ("<think>t</think><answer>B</answer>", "the plain form"),
    ("<think>t</think><answer>B</answer>\n", "a trailing newline"),
    (" \n<think>t</think>\n\n<answer>B</answer> \t\n", "white space around and between"),
    ("<think>a\nb</think><answer>B\n</answer>", "newlines inside"),
    ("<think></think><answer>B</answer>", "an empty thought is still a thought"),
    ("<think>1 < 2 > 0, </b></think><answer>B</answer>", "other markup is text"),
]
ILL_FORMED = [
    ("<answer>B</answer>", "B", "no thought"),
    ("<think>t<answer>B</answer>", "B", "the thought never ends"),
    ("t</think><answer>B</answer>", "B", "the opening tag stood in the prompt"),
    ("<think>t</think><answer>B</answer> So B.", "B", "words after"),
    ("Sure! <think>t</think><answer>B</answer>", "B", "words before"),
    ("<think>t</think> hence <answer>B</answer>", "B", "words between"),
    ("<answer>B</answer><think>t</think>", "B", "the wrong way round"),
    ("<think>a</think><think>b</think><answer>B</answer>", "B", "two thoughts"),
    ("<think><think>a</think></think><answer>B</answer>", "B", "a thought in a thought"),
]
UNANSWERED = [
    ("", "no_answer", "nothing at all"),
    ("B", "no_answer", "no tags"),
    ("<think>t</think> B", "no_answer", "an answer outside its tags"),
    ("<think>cut off at the token limit", "no_answer", "truncated thought"),
    ("B</answer>", "no_answer", "never opened"),
    ("<ANSWER>B</ANSWER>", "no_answer", "tags are lower-case"),
    ("<answer >B</answer >", "no_answer", "tags hold no spaces"),
    ("<think>t</think><answer>B", "unclosed_answer", "truncated answer"),
    ("</answer>B<answer>", "unclosed_answer", "closed before it opens"),
    ("<think>t</think><answer>A</answer><answer>B</answer>", "several_answers", "two blocks"),
    ("<think>t</think><answer>B</answer><answer>B</answer>", "several_answers", "even if alike"),
    ("<think><answer>A</answer></think><answer>B</answer>", "several_answers", "one in thought"),
    ("<answer>A<answer>B</answer></answer>", "several_answers", "one inside the other"),
    ("<answer>A</answer></answer>", "several_answers", "closed twice"),
    ("<think>t <answer>B</answer> t</think>", "nested_answer", "only thought, never said"),
    ("t <answer>B</answer> t</think>", "nested_answer", "the same, opened in the prompt"),
    ("<answer><think>t</think>B</answer>", "nested_answer", "a thought inside the answer"),
    ("<think>t<answer></think>B</answer>", "nested_answer", "blocks that cross"),
    ("<think>t</think><answer></answer>", "empty_answer", "empty"),
    ("<think>t</think><answer> \n\t</answer>", "empty_answer", "nothing but white space"),
]


@pytest.mark.parametrize(("text", "why"), WELL_FORMED)
def test_well_formed(text, why):
    parsed = parse(text)
    assert (parsed.well_formed, parsed.answer, parsed.problem) == (True, "B", ""), why
    assert parsed.thought is not None


@pytest.mark.parametrize(("text", "answer", "why"), ILL_FORMED)
def test_an_ill_formed_completion_can_still_answer(text, answer, why):
    parsed = parse(text)
    assert (parsed.well_formed, parsed.answer, parsed.problem) == (False, answer, ""), why


@pytest.mark.parametrize(("text", "problem", "why"), UNANSWERED)
def test_no_single_answer_block_is_no_answer(text, problem, why):
    parsed = parse(text)
    assert (parsed.well_formed, parsed.answer, parsed.problem) == (False, None, problem), why
    assert choose(text, OPTIONS) == Choice(None, problem)


def test_a_thought_opened_in_the_prompt_can_be_put_back():
    parsed = parse("<think>" + "dark wings</think><answer>B</answer>")
    assert (parsed.thought, parsed.answer, parsed.well_formed) == ("dark wings", "B", True)


def test_format_takes_a_trailing_newline_and_refuses_several_blocks():
    """Elsewhere a trailing newline cost the format reward, and several answer blocks earned it."""
    assert parse(completion("t", "B") + "\n").well_formed
    assert not parse(completion("t", "A") + "<answer>B</answer>").well_formed


@given(
    st.text(st.characters(exclude_characters="<>")), st.text(st.characters(exclude_characters="<>"))
)
@SETTLED
def test_what_prompts_builds_parse_takes_apart(thought, answer):
    parsed = parse(completion(thought, answer))
    assert (parsed.thought, parsed.answer) == (thought.strip(), answer.strip() or None)
    assert parsed.well_formed == bool(answer.strip())


READ = [
    ("B", "letter", "a letter"),
    ("b", "letter", "a small letter"),
    ("(B)", "letter", "in parentheses"),
    ("B)", "letter", "as a list item"),
    ("B.", "letter", "with a full stop"),
    ("[B]", "letter", "in brackets"),
    ("**B**", "letter", "in bold"),
    ('"B"', "letter", "in quotes"),
    ("`B`", "letter", "as code"),
    ("$\\boxed{\\text{B}}$", "letter", "boxed, as mathematics models do"),
    ("Ｂ", "letter", "full-width"),
    ("\u200bB\ufeff", "letter", "with invisible characters"),
    ("Option B", "letter", "as an option"),
    ("option (b).", "letter", "as an option, small"),
    ("The answer is B.", "letter", "in a sentence"),
    ("I think the correct answer is: **B**", "letter", "in a longer sentence"),
    ("B B", "letter", "said twice"),
    ("Laysan Albatross", "text", "the text alone"),
    ("laysan-albatross.", "text", "the text in another spelling"),
    ("a Laysan albatross", "text", "the text with an article"),
    ("The Laysan Albatross", "text", "the text with an article"),
    ("It is a Laysan Albatross.", "text", "the text in a sentence"),
    ("Laysan Albatross (Phoebastria immutabilis)", "text", "the text with a remark"),
    ("B. Laysan Albatross", "letter_and_text", "both, and they agree"),
    ("B: laysan albatross", "letter_and_text", "both, and they agree"),
    ("B Laysan Albatross", "letter_and_text", "both, and they agree"),
    ("(B)\nLaysan Albatross", "letter_and_text", "both, on two lines"),
    ("Laysan Albatross (B)", "letter_and_text", "text first"),
    ("**B**. **Laysan Albatross**", "letter_and_text", "both in bold"),
    ("The answer is B, a Laysan albatross", "letter_and_text", "the article is no second letter"),
]
REFUSED = [
    ("A or B", "hedge", "two letters"),
    ("A, B", "hedge", "two letters"),
    ("A/B", "hedge", "two letters"),
    ("A B", "hedge", "two letters"),
    ("a\nb", "hedge", "two letters"),
    ("B, not A", "hedge", "two letters, whatever is said of one"),
    ("B (or C)", "hedge", "a second letter in a remark"),
    ("B or Z", "hedge", "a second letter that is no option is still a second letter"),
    ("either", "hedge", "both and none"),
    ("either B", "hedge", "a hedging word"),
    ("maybe B", "hedge", "a hedging word"),
    ("not B", "hedge", "a denial"),
    ("none of the above", "hedge", "no option"),
    ("all of them", "hedge", "every option"),
    ("Laysan Albatross or Black-footed Albatross", "hedge", "two texts"),
    ("Laysan Albatross, F/A-18", "hedge", "two texts"),
    ("B. Laysan Albatross C. Black-footed Albatross", "hedge", "the whole list"),
    ("B. Black-footed Albatross", "disagree", "letter and text disagree"),
    ("A Laysan Albatross", "disagree", "a capital A is the letter, and A is a car"),
    ("B. Wandering Albatross", "disagree", "a text that is not on offer"),
    ("B because of its dark back", "disagree", "a letter and loose words"),
    ("B (the Black-footed one)", "disagree", "a remark about another option"),
    ("F", "out_of_range", "no such option"),
    ("(Z)", "out_of_range", "no such option"),
    ("Albatross", "unknown", "part of two texts"),
    ("Wandering Albatross", "unknown", "not on offer"),
    ("AB", "unknown", "no letter"),
    ("2", "unknown", "a number is no letter"),
    ("В", "unknown", "a Cyrillic letter"),
    ("...", "unknown", "nothing said"),
    ("the answer is", "unknown", "nothing said"),
    ("B" * 501, "too_long", "no answer is that long"),
]


@pytest.mark.parametrize(("answer", "status", "why"), READ)
def test_every_way_to_say_b_is_b(answer, status, why):
    assert answered(answer) == Choice(1, status), why


@pytest.mark.parametrize(("answer", "status", "why"), REFUSED)
def test_refused_answers(answer, status, why):
    assert answered(answer) == Choice(None, status), why


def test_letters_are_read_from_the_right_place():
    """Elsewhere "(B)" scored 0, "A. 2008 Acura TL Type-S" was read as S, and "A or B" as B."""
    assert answered("(B)").index == 1
    assert answered("A. 2008 Acura TL Type-S").index == 0
    assert answered("A or B").index is None
    assert answered("A. 2008 Acura TL Type-S", tuple(f"Car {x}" for x in LETTERS)).index is None


@pytest.mark.parametrize(
    ("answer", "index", "why"),
    [
        ("A. Acura TL Type-S 2008", 0, "the year may move"),
        ("2008 acura tl type s", 0, "a hyphen is a space"),
        ("A. 2008 Acura TL Type-S Sedan", None, "another name"),
        ("F/A-18", 3, "letters inside a name are not letters"),
        ("D. F/A-18", 3, "letters inside a name are not letters"),
        ("F A 18", 3, "separators of a name may go missing"),
        ("C-130", None, "not the letter C"),
        ("chuck wills widow", 4, "apostrophes and hyphens do not matter"),
        ("E. Chuck–will’s–widow", 4, "of whatever kind"),
    ],
)
def test_names_that_look_like_letters(answer, index, why):
    assert answered(answer).index == index, why


@pytest.mark.parametrize(
    ("answer", "index", "why"),
    [
        ("Desert Rose", 2, "the longest name wins"),
        ("Rose Mallow", 3, "the longest name wins"),
        ("Desert-Rose", 2, "a hyphen is a space"),
        ("Desert, Rose", None, "a list of two options is not the third"),
        ("Desert. Rose", None, "a list of two options is not the third"),
        ("Desert / Rose", None, "a list of two options is not the third"),
        ("Desert\nRose", None, "a list of two options is not the third"),
        ("Mallow", 4, "a remark may be left out"),
        ("Mallow (tree)", 4, "or given"),
        ("Mallow (bush)", None, "but not another one"),
    ],
)
def test_names_made_of_other_names(answer, index, why):
    assert answered(answer, NESTED).index == index, why


def test_options_that_are_letters_or_alike():
    hands = ("C", "A", "B")
    assert answered("B", hands) == Choice(1, "letter")  # the question asks for a letter
    assert answered("B. A", hands) == Choice(1, "letter")
    assert answered("A. B", ("B", "A", "C")) == Choice(0, "letter")
    assert answered("A, B", ("B", "A", "C")).index is None
    assert answered("Mallard", ("Mallard", "mallard")) == Choice(None, "ambiguous")
    assert answered("B. Mallard", ("Mallard", "mallard")) == Choice(1, "letter_and_text")
    assert answered("A", ()) == Choice(None, "out_of_range")
    assert answered("i", tuple(f"Bird {x}" for x in LETTERS)) == Choice(8, "letter")
    assert answered("I think B", tuple(f"Bird {x}" for x in LETTERS)) == Choice(1, "letter")


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("狗", Choice(1, "text")),
        ("B. 狗", Choice(1, "letter_and_text")),
        ("狗 (B)", Choice(1, "letter_and_text")),
        ("the answer is 7.", Choice(3, "text")),
        ("(d) 7", Choice(3, "letter_and_text")),
        ("3", Choice(2, "text")),
        ("３", Choice(2, "text")),  # full-width
        ("X", Choice(4, "text")),  # no option has the letter X
        ("E. x", Choice(4, "letter_and_text")),
        ("B", Choice(1, "letter")),
        ("A. 狗", Choice(None, "disagree")),
        ("B. X", Choice(None, "disagree")),
        ("a 狗", Choice(None, "disagree")),  # before one sign an "a" is no article
        ("3 or 7", Choice(None, "hedge")),
        ("猫、狗", Choice(None, "hedge")),
        ("7, X", Choice(None, "hedge")),
        ("猫狗", Choice(None, "unknown")),
        ("37", Choice(None, "unknown")),
        ("Z", Choice(None, "out_of_range")),
    ],
)
def test_a_text_of_one_sign_that_is_no_letter_is_a_text(answer, choice):
    assert answered(answer, SIGNS) == choice
