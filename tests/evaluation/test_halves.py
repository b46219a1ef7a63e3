"""Items are divided by their ids alone, in two independent ways."""

from llmtune.evaluation.halves import in_half_size, in_selection_half

IDS = [f"item-{number}" for number in range(1000)]


def test_the_halves_are_halves_and_do_not_depend_on_each_other():
    chosen = {name for name in IDS if in_selection_half(name)}
    small = {name for name in IDS if in_half_size(name)}
    assert 450 < len(chosen) < 550 and 450 < len(small) < 550
    assert 200 < len(chosen & small) < 300


def test_an_item_is_in_the_same_half_on_every_machine():
    assert [name for name in "1234ab" if in_selection_half(name)] == ["3", "4"]
    assert [name for name in "1234ab" if in_half_size(name)] == ["2", "b"]
