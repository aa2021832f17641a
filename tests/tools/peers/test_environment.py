import subprocess

import pytest
from peers.environment import INSTALLED, PeerError, ensure_environment, run

NOTHING = "--no-index\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    requirements = folder / "nothing.txt"
    requirements.write_text(NOTHING, encoding="utf-8")
    return ensure_environment(folder / "environment", requirements), folder / "environment", requirements


def test_python_is_that_of_the_environment(made):
    python, folder, _ = made
    found = subprocess.run([python, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(folder)


def test_the_environment_is_made_once(made):
    python, folder, requirements = made
    (folder / "kept").touch()
    assert ensure_environment(folder, requirements) == python
    assert (folder / "kept").exists()


def test_an_environment_of_other_pins_is_made_anew(made, tmp_path):
    _, folder, _ = made
    (folder / "old").touch()
    other = tmp_path / "other.txt"
    other.write_text(NOTHING + "# other\n", encoding="utf-8")
    ensure_environment(folder, other)
    assert not (folder / "old").exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_environment_is_left_alone(made, tmp_path, kind):
    requirements = made[2]
    precious = tmp_path / "taken" if kind == "file" else tmp_path / "taken/precious"
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("mine", encoding="utf-8")
    with pytest.raises(PeerError, match="taken holds something else than a Python environment"):
        ensure_environment(tmp_path / "taken", requirements)
    assert precious.read_text(encoding="utf-8") == "mine"


def test_a_package_that_cannot_be_had_is_named_and_the_environment_not_called_whole(tmp_path):
    requirements = tmp_path / "pins.txt"
    requirements.write_text(NOTHING + "no-such-package==1.0\n", encoding="utf-8")
    with pytest.raises(PeerError, match=r"pins\.txt cannot be made; it takes a package index.*no-such-package"):
        ensure_environment(tmp_path / "environment", requirements)
    assert not (tmp_path / "environment" / INSTALLED).exists()


def test_a_failed_command_tells_what_it_printed_last():
    with pytest.raises(PeerError, match=r"^it failed: line 8 \| .* \| line 12$"):
        run(["sh", "-c", "for i in $(seq 12); do echo line $i; echo; done; exit 3"], "it failed")


def test_a_command_that_fails_in_silence_tells_its_status():
    with pytest.raises(PeerError, match=r"^it failed: exit status 3$"):
        run(["sh", "-c", "exit 3"], "it failed")
