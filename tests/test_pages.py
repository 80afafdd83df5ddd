"""Tables between marks: what stands there is replaced, and nothing else."""

import pytest

from nucseg.tables.pages import fill, rewrite

MAKERS = {"one": lambda: "| 1 |", "two": lambda: "| 2 |"}
PAGE = "# Title\n<!-- one -->\nold\n<!-- end of one -->\nrest\n"
NEW = PAGE.replace("old", "| 1 |")


def test_what_stands_between_the_marks_is_made_anew(tmp_path):
    assert fill(PAGE, MAKERS) == fill(NEW, MAKERS) == NEW
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    rewrite([path], MAKERS)
    assert path.read_text() == NEW


@pytest.mark.parametrize("text", ["# nucseg", "<!-- one -->", "<!-- end of two -->\n<!-- two"])
def test_a_page_without_the_marks_is_an_error(text):
    with pytest.raises(ValueError, match=r"<!-- (one|two) -->"):
        fill(text, MAKERS)


def test_a_page_may_have_to_have_every_mark():
    with pytest.raises(ValueError, match="lacks the line '<!-- two -->'"):
        fill(PAGE, MAKERS, every=True)
