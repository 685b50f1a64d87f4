import json
from pathlib import Path

import pytest

from padst_compiler import timings
from padst_compiler.contest import Measured
from padst_compiler.timings import Timings

FOUND = Measured({"a": 1e-3, "dense": 2e-3}, {"a": 1.9}, {"b": "it does not run"})


def test_what_is_stored_is_loaded_and_said_to_be_cached(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "er"
    Timings(folder).store("key", "a site", FOUND)
    found = Timings(folder).load("key")
    assert found == Measured(FOUND.seconds, FOUND.low, FOUND.dropped, cached=True)
    assert [path.name for path in folder.iterdir()] == ["key.json"]  # nothing half written
    assert json.loads((folder / "key.json").read_text())["site"] == "a site"


def test_the_last_one_stored_counts(tmp_path: Path) -> None:
    for seconds in (1.0, 2.0):
        Timings(tmp_path).store("key", "a site", Measured({"dense": seconds}, {}))
    found = Timings(tmp_path).load("key")
    assert found is not None and found.seconds == {"dense": 2.0}


def test_what_was_never_stored_is_not_found(tmp_path: Path) -> None:
    assert Timings(tmp_path).load("key") is None
    assert Timings(tmp_path / "none").load("key") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"seconds": {}}',
        '{"seconds": {"a": "fast"}, "low": {}, "dropped": {}}',
        '{"seconds": {"a": 0.0}, "low": {}, "dropped": {}}',
        '{"seconds": {"a": NaN}, "low": {}, "dropped": {}}',
        '{"seconds": {"a": 1.0}, "low": [1.0], "dropped": {}}',
        '{"seconds": {"a": 1.0}, "low": {}, "dropped": null}',
    ],
)
def test_a_damaged_file_is_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "key.json").write_text(text)
    assert Timings(tmp_path).load("key") is None


def test_bytes_that_are_no_text_are_as_none(tmp_path: Path) -> None:
    (tmp_path / "key.json").write_bytes(b"\xff\xfe\x00")
    assert Timings(tmp_path).load("key") is None


def test_a_folder_that_cannot_be_made_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "below", None):
        Timings(folder).store("key", "a site", FOUND)
        assert Timings(folder).load("key") is None


def test_they_lie_beside_inductors_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert Timings.beside_inductor().folder == tmp_path / "padst" / "timings"

    def refused() -> Path:
        raise PermissionError

    monkeypatch.setattr(timings, "inductor_cache", refused)
    assert Timings.beside_inductor().folder is None
