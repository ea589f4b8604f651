"""Who can connect: what runs on one machine listens on its loopback interface alone; docs/security.md has the table."""

import contextlib
import ipaddress
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from test_training_launch import LAUNCH
from training_runs import toy_config, toy_shards

from keyreid.config import save_config
from keyreid.distributed.launch import free_port

REPOSITORY = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
SECONDS = 600


def doors(process: subprocess.Popen) -> dict[tuple[str, int], str]:
    """Addresses and ports at which a process and all that it started listen, and who does."""
    found = {}
    try:
        family = [(top := psutil.Process(process.pid)), *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return found
    for each in family:
        try:
            listening = [c for c in each.net_connections("inet") if c.status == psutil.CONN_LISTEN]
            who = f"{each.name()}: {shlex.join(each.cmdline())}"[:200]
            found |= {(c.laddr.ip, c.laddr.port): who for c in listening}
        except psutil.Error:  # it ended
            continue
    return found


def open_to_others(found: dict[tuple[str, int], str]) -> dict[tuple[str, int], str]:
    """Those that other machines reach."""
    addresses = {place: ipaddress.ip_address(place[0].removeprefix("::ffff:")) for place in found}
    return {place: found[place] for place, address in addresses.items() if not address.is_loopback}


def watch(command, folder: Path, ends=lambda _: False, seconds: float = SECONDS) -> dict[tuple[str, int], str]:
    """All doors of a command from its start to its end, or until `ends(doors)`; then it is ended."""
    found: dict[tuple[str, int], str] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    environment |= {"PYTHONPATH": str(REPOSITORY)}
    output = folder / "printed.txt"
    with output.open("w") as file:
        process = subprocess.Popen(
            [str(word) for word in command], cwd=folder, env=environment, stdout=file, stderr=file
        )
    deadline = time.monotonic() + seconds
    try:
        while process.poll() is None and not ends(found):
            assert time.monotonic() < deadline, output.read_text()
            found |= doors(process)
            time.sleep(0.05)
    finally:
        left = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for each in [*left, process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        status = process.wait()
    assert ends(found) or status == 0, output.read_text()
    return found


def test_ranks_of_one_machine_meet_on_loopback_alone_and_unpickle_nothing(tmp_path):
    (tmp_path / "rank.py").write_text(
        """
import os, pickle, time
from pathlib import Path
import torch.distributed as dist
from keyreid.distributed.ranks import join, leave
from keyreid.errors import CheckpointError

ranks = join()
# On a machine whose name is an address of its network, gloo and NCCL would listen there.
assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")
def refuse(*_):
    raise AssertionError("unpickled")
dist.distributed_c10d._unpickler = pickle.loads = pickle.Unpickler = refuse
value = {"a": [1, 2.5, None], "\\u00fc": "x" * 100_000}
assert ranks.from_first(value if ranks.first else None) == value
assert ranks.from_first(Path("/a/\\udcff") if ranks.first else None) == Path("/a/\\udcff")
assert ranks.from_all([ranks.rank, "k"]) == [[0, "k"], [1, "k"]]
for said, kind, text in (
    (CheckpointError("torn"), "CheckpointError", "torn"),
    (OSError("full"), *(("OSError", "full") if ranks.first else ("KeyreidError", "OSError: full"))),
):
    error = ranks.from_first(said if ranks.first else None)
    assert (type(error).__name__, str(error)) == (kind, text)
Path(f"met-{ranks.rank}").touch()
while not Path("seen").exists():
    time.sleep(0.05)
leave()
"""
    )
    met = [tmp_path / "met-0", tmp_path / "met-1"]

    def ends(found):
        if all(path.exists() for path in met) and len(found) >= 3:
            (tmp_path / "seen").touch()
        return False

    command = [sys.executable, "-c", LAUNCH, tmp_path / "rank.py", tmp_path]
    found = watch(command, tmp_path, ends)
    assert len(found) >= 3  # the store, and gloo on each rank
    assert not open_to_others(found)


def test_ranks_meet_at_one_address_of_one_interface(tmp_path):
    addresses = [a.address for each in psutil.net_if_addrs().values() for a in each if a.family == 2]
    own = [address for address in addresses if not address.startswith("127.")]
    if not own:
        pytest.skip("this machine has no network")
    code = "from keyreid.distributed.ranks import _listener; import socket\n"
    code += f"print(socket.socket(fileno=_listener({own[0]!r}, 0)).getsockname()[0])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == own[0]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("data"))


@pytest.mark.slow
@pytest.mark.parametrize("how", [["--ranks", "2"], ["--ray", "local", "--ranks", "2"]], ids=["ranks", "ray"])
def test_a_training_listens_on_loopback_alone(how, shards, tmp_path):
    config = toy_config(shards, tmp_path / "runs", schedule={"epochs": 1, "steps_per_epoch": 5, "warmup_epochs": 0})
    save_config(config, tmp_path / "toy.yaml")
    found = watch([BIN / "keyreid", "train", tmp_path / "toy.yaml", *how], tmp_path)
    assert (config.run_dir / "completed").is_file()
    assert len(found) >= 3
    assert not open_to_others(found)


@pytest.mark.slow
def test_a_search_listens_on_loopback_alone_and_refuses_who_has_no_token(shards, tmp_path):
    pytest.importorskip("ray.tune")
    schedule = {"epochs": 1, "steps_per_epoch": 5, "warmup_epochs": 0}
    config = toy_config(shards, tmp_path / "runs", schedule=schedule, data={"identities": 2})
    save_config(config, tmp_path / "toy.yaml")
    search = {
        "name": "search",
        "base": "toy.yaml",
        "space": {"loss.alpha": {"uniform": [0.3, 0.9]}},
        "trials": 2,
        "budget": {"epochs": 1},
        "holdout": 0.5,
        "resources": {"ranks": 2, "cpus": 1},
        "concurrency": 1,
    }
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(search))
    strangers = {}

    def ends(found):
        gcs = [place for place, who in found.items() if who.startswith("gcs_server:")]
        if gcs and not strangers:  # on this machine, who have found the port
            join = f"import ray; ray.init('127.0.0.1:{gcs[0][1]}', logging_level='CRITICAL'); print(ray.nodes())"
            plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
            plain["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # or they would ask at the address of the network
            servers = psutil.Process().children(recursive=True)
            known = next(each.environ() for each in servers if each.name() == "gcs_server")["RAY_AUTH_TOKEN"]
            for who, token in {"without": None, "wrong": "0" * 64, "known": known}.items():
                own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}
                with (tmp_path / who).open("w") as file:
                    process = subprocess.Popen([sys.executable, "-c", join], env=plain | own, stdout=file, stderr=file)
                strangers[who] = process
        return False

    found = watch([BIN / "keyreid", "tune", tmp_path / "search.yaml"], tmp_path, ends)
    assert (tmp_path / "runs" / "search" / "best.yaml").is_file()
    assert any(who.startswith("raylet:") for who in found.values()) and len(found) >= 6
    assert not open_to_others(found)
    assert strangers
    joined = {who: process.wait(SECONDS) == 0 for who, process in strangers.items()}
    assert joined == {"without": False, "wrong": False, "known": True}
    assert "NodeManagerAddress" in (tmp_path / "known").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/security.md", "launch/quickstart"])
def test_mlflow_as_our_pages_start_it_listens_on_loopback_alone(page, tmp_path):
    lines = (REPOSITORY / page).read_text().splitlines()
    line = next(line for line in lines if re.search(r"\bmlflow (ui|server)\b.*--backend", line))
    words = shlex.split(line[line.index("mlflow ") :])
    words[words.index("--backend-store-uri") + 1] = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow = [BIN / words[0], *words[1:], "--port", free_port()]
    found = watch(mlflow, tmp_path, ends=lambda found: found)
    assert not open_to_others(found)
