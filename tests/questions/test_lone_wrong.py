"""The published code's number of options: two stay two, and a lone wrong candidate becomes four."""

import pytest

from tasks.questions.settings import BuildMCQSettings
from tasks.runtime.errors import StageError
from tests.conftest import settings_of
from tests.questions.test_options import OF, PAIRS, build, options

PUBLISHED = {"num_options": 5, "min_options": 2, "lone_wrong_options": 4, "top_up": "random"}


@pytest.mark.parametrize("options_from", ["policy", "random"])
def test_two_options_stay_two_and_a_lone_wrong_candidate_becomes_four(tmp_path, options_from):
    _, questions, stats = build(PAIRS, OF, tmp_path, **PUBLISHED, options_from=options_from)
    numbers = {row["image_id"]: len(row["options"]) for shard in questions for row in shard}
    # a is the truth and one wrong class; b has two wrong ones, d the truth and one (a loon is no class).
    assert numbers == {"a": 2, "b": 3, "c": 4, "d": 2, "f": 4, "g": 4}
    assert stats["outcomes"] == {"kept": 6, "truth_only": 1}
    if options_from == "policy":
        sources = sorted(options(questions, "c").values())
        assert sources == ["policy", "top_up", "top_up", "truth"]


def test_without_the_setting_a_lone_wrong_candidate_is_like_any_other(tmp_path):
    _, questions, _ = build(PAIRS, OF, tmp_path, **{**PUBLISHED, "lone_wrong_options": 0})
    assert {len(row["options"]) for shard in questions for row in shard} == {2, 3}


def test_what_cannot_be_is_refused():
    with pytest.raises(StageError, match="lone_wrong_options must be at most num_options; got 6"):
        settings_of(BuildMCQSettings, lone_wrong_options=6)
    with pytest.raises(StageError, match="lone_wrong_options needs wrong classes to add"):
        settings_of(BuildMCQSettings, lone_wrong_options=4, top_up="none")
