"""`atomas import-checkpoint`: what is wrong is said of the right thing."""

from pathlib import Path

import pytest

from atomas.cli import main


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["import-checkpoint", str(tmp_path / "absent.pt"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "absent.pt does not exist" in capsys.readouterr().err
