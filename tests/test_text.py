import pytest

from padst_compiler.text import suggest, table


def test_names_stand_left_and_numbers_right() -> None:
    lines = table(["site", "tokens", "why"], [["1", "1,024", "a\nb"], ["22", "3", ""]]).split("\n")
    assert lines == [
        "site | tokens | why",
        "-----+--------+----",
        "1    |  1,024 | a b",
        "22   |      3 |",
    ]


def test_a_table_without_rows_is_its_headers() -> None:
    assert table(["a", "bc"], []) == "a | bc\n--+---"


def test_empty_cells_do_not_make_a_column_text() -> None:
    assert table(["n", "x"], [["a", ""], ["b", "12"]]).splitlines()[3] == "b | 12"


def test_a_row_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected 2 cells"):
        table(["a", "b"], [["only"]])


@pytest.mark.parametrize(
    ("given", "known", "said"),
    [
        ("learnt", ["none", "learned"], "Did you mean 'learned'?"),
        ("x", ["a"], "Use 'a'."),
        ("x", ["a", "b", "c"], "Use 'a', 'b' or 'c'."),
        ("x", [], "There is none to choose."),
        ("x", [f"layer{n}" for n in range(20)], "or one of 12 more."),
    ],
)
def test_suggestions_name_close_or_all_names(given: str, known: list[str], said: str) -> None:
    assert suggest(given, known).endswith(said)
