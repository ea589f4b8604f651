"""The doctor tries things, reports what is not well with its remedy, and its exit status can be relied on."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from keyreid import doctor
from keyreid.cli import app
from keyreid.doctor import Check, examine, failures


def test_this_machine_is_examined_without_an_exception():
    checks = {check.name: check for check in examine(["python", "packages", "mlflow", "disk", "video", "gpu"])}
    assert checks["python"].state == checks["packages"].state == checks["mlflow"].state == "ok"
    assert checks["video"].state == "ok" and "FFMPEG" in checks["video"].found
    assert checks["disk"].state in ("ok", "note") and "GB" in checks["disk"].found
    assert checks["gpu"].state in ("ok", "note")


def test_a_check_that_fails_is_a_finding(monkeypatch):
    def broken():
        raise ImportError("libcuda.so.1: cannot open shared object file\nlong trace")

    monkeypatch.setitem(doctor.CHECKS, "dali", broken)
    (check,) = examine(["dali"])
    assert check.state == "broken" and check.found == "ImportError: libcuda.so.1: cannot open shared object file"
    assert "data.reader=plain" in check.remedy
    assert failures([check], []) == [] and failures([check], ["dali"]) == [check]


def test_versions_are_compared_with_the_pins(monkeypatch):
    pins = ["numpy==1.0.0", "nowhere-to-be-found==2", 'ray==9; extra == "tune"', "torch"]
    monkeypatch.setattr(doctor, "requires", lambda _: pins)
    packages, tune, absent = examine(["packages"])[0], examine(["tune"])[0], examine(["search"])[0]
    assert packages.state == "missing" and packages.found.startswith("nowhere-to-be-found; numpy 2.")
    assert failures([packages], []) == [packages]
    assert tune.state in ("note", "missing") and "ray" in tune.found
    assert absent.state == "missing" and ".[search]" in absent.remedy and "in the clone" in absent.remedy


def test_slurm_absent_silent_and_present(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert examine(["slurm"])[0].state == "missing"
    monkeypatch.undo()
    answers = {"sinfo": "echo 'gpu 4 gpu:8'", "scontrol": "echo 'Slurmctld is DOWN'; exit 1"}
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name, script in answers.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (check,) = examine(["slurm"])
    assert check.state == "broken" and "Slurmctld is DOWN" in check.found
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 'Slurmctld is UP'\n")
    (check,) = examine(["slurm"])
    assert check.state == "ok" and "gpu 4 gpu:8" in check.found


@pytest.mark.parametrize("words", [["--only", "python"], ["--only", "python", "--json"]])
def test_status_and_form(words, monkeypatch):
    result = CliRunner().invoke(app, ["doctor", *words])
    assert result.exit_code == 0 and "python" in result.output
    if "--json" in words:
        assert json.loads(result.output)[0]["state"] == "ok"
    sick = Check("broken", "[too] old", "use a newer one", "python")
    monkeypatch.setitem(doctor.CHECKS, "python", lambda: sick)
    result = CliRunner().invoke(app, ["doctor", *words])
    assert result.exit_code == 1 and "[too] old" in result.output
