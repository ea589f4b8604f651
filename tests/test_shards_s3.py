"""Shards in object storage, from a real server of S3's protocol: whole, by ranges, as streams, and with wrong keys."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from packed import make_config, make_dataset, pack_dataset

from keyreid.errors import DataError
from keyreid.shards import open_reader
from keyreid.shards.plan import evaluation_clips
from keyreid.shards.shard_set import ShardSet

pytest.importorskip("s3fs", reason="keyreid[remote] is not installed")
BUCKET = "s3://people/sets/toy"
# A process of its own: its client and ours must not meet in one.
SERVER = """
import os, sys
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("s3")
    pack_dataset(make_dataset(root / "source", identities=4), root / "source", root / "shards", 60_000)
    return root / "shards"


@pytest.fixture(scope="module")
def endpoint(folder):
    """A server that holds the set, and knows one user, whose keys it returns with its URL."""
    import boto3

    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    url = f"http://127.0.0.1:{int(server.stdout.readline())}"
    place = {"endpoint_url": url, "region_name": "us-east-1"}
    root = {"aws_access_key_id": "root", "aws_secret_access_key": "root"}
    client = boto3.client("s3", **place, **root)
    client.create_bucket(Bucket="people")
    for path in folder.iterdir():
        client.upload_file(str(path), "people", f"sets/toy/{path.name}")
    iam = boto3.client("iam", **place, **root)
    iam.create_user(UserName="reader")
    policy = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:Get*", "Resource": "*"}]}'
    iam.put_user_policy(UserName="reader", PolicyName="reads", PolicyDocument=policy)
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    reset = urllib.request.Request(f"{url}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
    urllib.request.urlopen(reset).close()  # from here on, keys and rights are checked
    yield url, key["AccessKeyId"], key["SecretAccessKey"]
    server.kill()
    server.wait()


@pytest.fixture
def keys(endpoint, monkeypatch):
    """Sets the environment as a user would; the user's own keys and files play no part."""
    from s3fs import S3FileSystem

    def change(access: str, secret: str) -> None:
        S3FileSystem.clear_instance_cache()
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", access)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint[0])
    change(*endpoint[1:])
    yield change
    S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(("remote", "reader"), [("shards", "plain"), ("ranges", "plain"), ("auto", "stream")])
def test_a_set_in_a_bucket_is_read(folder, keys, tmp_path, remote, reader):
    local, shards = ShardSet.open(folder), ShardSet.open(BUCKET, tmp_path, None, remote)
    clips = evaluation_clips(local, range(len(local)), 4)
    batches = [clips[start : start + 8] for start in range(0, len(clips), 8)]
    opened = open_reader(shards, iter(batches), make_config(BUCKET, data__reader=reader), workers=0)
    expected = open_reader(local, iter(batches), make_config(folder), workers=0)
    for one, other in zip(opened, expected, strict=True):
        assert one.keys == other.keys
        assert (one.images == other.images).all()
        assert (one.guidance == other.guidance).all()
    assert len(list(tmp_path.glob("*/*.tar"))) == (len(local.card["shards"]) if remote == "shards" else 0)


@pytest.mark.parametrize("access", ["AKIANOBODY", "the reader's"])
def test_wrong_keys_are_named_at_once(endpoint, keys, tmp_path, access):
    keys(endpoint[1] if access == "the reader's" else access, "wrong")
    with pytest.raises(DataError, match=f"{BUCKET}/dataset.json: PermissionError") as caught:
        ShardSet.open(BUCKET, tmp_path)
    assert "given up" not in str(caught.value)  # it was asked once


def test_a_shard_that_is_not_there_is_named(folder, keys, tmp_path):
    with pytest.raises(DataError, match=f"{BUCKET}/none/dataset.json: FileNotFoundError"):
        ShardSet.open(f"{BUCKET}/none", tmp_path)
    files = ShardSet.open(BUCKET, tmp_path, remote="ranges").files
    files._shards[0]["file"] = "lost.tar"
    with pytest.raises(DataError, match=r"lost\.tar: FileNotFoundError"):
        files.read(0, 10, 0)
