import pytest

from nucseg.files import whole, write_bytes, write_text


def test_a_file_is_moved_to_its_place_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "a.csv"
    with whole(path) as part:
        part.write_text("half")
        assert not path.exists()
    assert path.read_text() == "half"
    assert list(path.parent.iterdir()) == [path]


def test_after_an_error_the_older_file_is_there_and_nothing_else(tmp_path):
    path = tmp_path / "a.csv"
    write_text(path, "old")

    def write():
        with whole(path) as part:
            part.write_text("ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_leaves_is_found_under_the_name_of_its_file(tmp_path):
    for name in ("results.csv", ".key.state"):  # the store looks for what begins with a dot and its key
        with whole(tmp_path / name) as part:
            assert part.name.startswith(f".{name.lstrip('.')}.")
            assert part.suffix == ".part"
            part.touch()


def test_text_and_bytes(tmp_path):
    write_text(tmp_path / "a", "Kärnkörperchen")
    assert (tmp_path / "a").read_bytes() == "Kärnkörperchen".encode()
    write_bytes(tmp_path / "a", b"\0")
    assert (tmp_path / "a").read_bytes() == b"\0"
