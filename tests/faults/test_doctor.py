"""What `dmc-hub doctor` finds in an installation and in the folder of a run."""

from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dmc_hub import checkpoint, doctor
from dmc_hub.cli import main
from dmc_hub.output_folder import alone_in


def findings(folder: Path | None = None) -> dict[str, tuple[str, str]]:
    return {finding.subject: (finding.state, finding.detail) for finding in doctor.diagnose(folder)}


def make_run(folder: Path) -> Path:
    for name in ("pipeline", "unfinished/critic/checkpoint-10"):
        with checkpoint.write_folder_atomically(folder / name) as stage:
            (stage / "weights").write_text("all of them")
    return folder


def test_a_sound_run_has_no_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["doctor", "--output-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok       pipeline ") and "1 files, all as they were written" in line for line in lines)
    assert sorted(tmp_path.rglob("*")) == before


def test_damage_locks_and_leftovers_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path)
    (tmp_path / "pipeline" / "weights").write_text("all of then")
    (tmp_path / "checkpoint-7").mkdir()
    checkpoint.open_stage(tmp_path / "adapter")
    with alone_in(tmp_path):
        found = findings(tmp_path)
        assert main(["doctor", "--output-dir", str(tmp_path)]) == 1
    assert "2 problems: pipeline, checkpoint-7." in capsys.readouterr().err
    assert found["pipeline"][0] == "problem"
    assert "was changed" in found["pipeline"][1]
    assert found["lock"][0] == "note"
    assert "is in use by" in found["lock"][1]
    assert found["stages"] == ("note", "1 of interrupted saves; the next run removes them")


def test_wrong_and_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._state_of(Requirement("numpy>=1")) == ("ok", metadata.version("numpy"))
    assert doctor._state_of(Requirement("numpy>=99"))[1].endswith("is installed, >=99 is needed")
    assert doctor._state_of(Requirement("no-such-library")) == ("missing", "is missing")
    needs = ["numpy>=99", "torch", 'no-such-library; extra == "demo"', 'pytest; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda name: needs)
    monkeypatch.setattr(metadata, "metadata", lambda name: Extras())
    found = {finding.subject: finding for finding in doctor._dependencies()}
    assert found["numpy"].state == "problem"
    assert found["torch"].state == "ok"
    assert found["extra demo"].detail == 'no-such-library is missing: pip install "dmc_hub[demo]"'
    assert "extra dev" not in found


class Extras:
    def get_all(self, name: str) -> list[str]:
        return ["demo", "dev"]


def test_a_full_disk_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "free_bytes", lambda folder: 5)
    assert findings(tmp_path)["output folder"] == ("problem", f"`{tmp_path}` has only 5 bytes free")
