"""Row generators: all at once is the same as one by one."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.tables import seeding


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.integers(0, 2**32 - 1) | st.just(2**40),
    st.lists(st.text(max_size=9), min_size=1, max_size=5),
)
def test_generators_made_at_once_draw_as_those_made_alone(seed, keys):
    for key, generator in zip(keys, seeding.row_generators(seed, keys), strict=True):
        alone = seeding.row_generator(seed, key)
        assert generator.permutation(7).tolist() == alone.permutation(7).tolist()
        assert generator.integers(2**60) == alone.integers(2**60)


def test_a_key_whose_number_is_small_draws_alike_too(monkeypatch):
    monkeypatch.setattr(seeding, "_number", len)
    (generator,) = seeding.row_generators(3, ["abc"])
    assert generator.random() == seeding.row_generator(3, "abc").random()
