"""A folder has one owner: others are told whose it is, and a dead owner's claim is taken over."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from keyreid import ownership
from keyreid.errors import KeyreidError
from keyreid.ownership import LOCK, OWNER, owned

HOLD = """
import sys, time, platform
if len(sys.argv) > 2:
    import filelock._identity, filelock._marker, filelock._soft
    for module in (filelock._identity, filelock._marker, filelock._soft):
        if hasattr(module, "host_name"):
            module.host_name = lambda: sys.argv[2]
    platform.node = lambda: sys.argv[2]
from pathlib import Path
from keyreid import ownership
ownership.LEASE_SECONDS = 3.0
with ownership.owned(Path(sys.argv[1]), "keyreid train"):
    print("mine", flush=True)
    time.sleep(600)
"""


def _holder(folder: Path, *host: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *host], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "mine\n"
    return process


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "LEASE_SECONDS", 3.0)
    monkeypatch.setattr(ownership, "PATIENCE_SECONDS", 0.5)


def test_a_second_owner_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    holder = _holder(tmp_path)
    try:
        with pytest.raises(KeyreidError, match=rf"keyreid train \(pid {holder.pid} on "), owned(tmp_path, "import"):
            pass
    finally:
        holder.kill()
        holder.wait()


def test_a_killed_owner_is_succeeded_at_once(tmp_path: Path) -> None:
    holder = _holder(tmp_path)
    holder.kill()
    holder.wait()
    with owned(tmp_path, "keyreid train"):
        assert (tmp_path / LOCK).is_file()
    assert not (tmp_path / LOCK).exists()
    assert not (tmp_path / OWNER).exists()


def test_an_owner_on_another_machine_is_believed_while_it_gives_a_sign_of_life(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = _holder(tmp_path, "elsewhere")
    try:
        with pytest.raises(KeyreidError, match="on elsewhere"), owned(tmp_path, "keyreid train"):
            pass
        assert "waiting" in capsys.readouterr().err
    finally:
        holder.kill()
        holder.wait()
    with owned(tmp_path, "keyreid train"):  # nobody here can ask for its process: the lease decides
        pass


def test_an_owner_that_lost_its_claim_is_stopped(tmp_path: Path) -> None:
    holder = _holder(tmp_path)
    (tmp_path / LOCK).unlink()
    assert holder.wait(timeout=120) == -signal.SIGTERM


def test_nothing_is_left_of_a_refused_start_in_a_new_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="refused"), owned(tmp_path / "new", "import"):
        raise RuntimeError("refused")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KeyreidError, match=r"file/run.*cannot be written"), owned(tmp_path / "file" / "run", "import"):
        pass


def test_owners_of_one_folder_take_turns(tmp_path: Path) -> None:
    program = """
import sys, time
from pathlib import Path
from keyreid import ownership
ownership.PATIENCE_SECONDS = 300.0
folder = Path(sys.argv[1])
for _ in range(5):
    with ownership.owned(folder, "count"):
        count = int((folder / "count").read_text())
        time.sleep(0.02)
        (folder / "count").write_text(str(count + 1))
"""
    (tmp_path / "count").write_text("0")
    workers = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(4)]
    assert [worker.wait() for worker in workers] == [0] * 4
    assert (tmp_path / "count").read_text() == "20"


def test_files_of_one_folder_have_owners_of_their_own(tmp_path: Path) -> None:
    with owned(tmp_path, "keyreid embed", "a.parquet"), owned(tmp_path, "keyreid embed", "b.parquet"):
        with pytest.raises(KeyreidError, match=r"a.parquet: keyreid embed \(pid"), owned(tmp_path, "x", "a.parquet"):
            pass
        assert len(list(tmp_path.iterdir())) == 4
    assert not list(tmp_path.iterdir())
