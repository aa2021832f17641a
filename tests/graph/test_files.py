import pytest

from mptqc.graph.files import write_atomically, write_together


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / "a"
    for content in (b"one", b"two"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "absent" / "a", b"")


def test_of_several_files_all_or_none(tmp_path):
    kept = tmp_path / "a"
    kept.write_bytes(b"old")
    with pytest.raises(FileNotFoundError):
        write_together({kept: b"new", tmp_path / "absent" / "b": b"new"})
    assert kept.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [kept]
