"""Corpora on other machines: real servers on loopback that stall, cut, lie and recover; one cache for all."""

import base64
import multiprocessing
import os
import pickle
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atomas.addresses import check_address
from atomas.config import Config, DataConfig, RunConfig, StorageConfig
from atomas.config_file import load_config
from atomas.data import remote
from atomas.data.corpora import Corpora
from atomas.data.order import GlobalOrder
from atomas.data.shard_index import write_index
from atomas.data.shard_writer import ShardWriter
from atomas.data.shards import Corpus, ShardedSplit
from atomas.data.storage import LocalFolder, open_storage
from atomas.data.stream import PairStream, build_loader
from atomas.data.tokenizer import AtomasTokenizer
from atomas.errors import AtomasError
from tests.data.bad_http import BadServer

NUM_RECORDS, NUM_SHARDS = 400, 4


def write_corpus(directory: Path) -> Corpus:
    with ShardWriter(directory, "train", block_size=20, shard_bytes=38_000) as writer:
        for number in range(NUM_RECORDS):
            writer.write({"id": str(number), "text": f"compound {number} " * 30})
    write_index(directory, {"train": writer.index()}, counts={}, hazards={}, sources=[], options={})
    corpus = Corpus.open(directory)
    assert len(corpus.split("train").shards) == NUM_SHARDS
    return corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("served"))


@pytest.fixture
def server(corpus: Corpus) -> Iterator[BadServer]:
    with BadServer(corpus.directory) as running:
        yield running


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_LONGEST_PAUSE_S", 0.2)


@pytest.fixture
def config(tmp_path: Path) -> StorageConfig:
    return StorageConfig(cache_dir=str(tmp_path / "cache"), timeout_seconds=2.0, attempts=4)


def ids(split: ShardedSplit) -> list[str]:
    return [record["id"] for record in split]


EXPECTED = [str(number) for number in range(NUM_RECORDS)]


def cache_in(folder: Path | str) -> Path:
    """Where this user's shards are kept in `storage.cache_dir`."""
    return Path(folder) / f"atomas-shards-{os.getuid()}"


def cached(config: StorageConfig) -> list[str]:
    return sorted(path.name for path in cache_in(config.cache_dir).iterdir() if path.name != "locks")


def test_a_corpus_over_http_is_fetched_once_and_then_read_from_disk(
    corpus: Corpus, server: BadServer, config: StorageConfig
) -> None:
    opened = Corpus.open(server.url, config)
    assert opened.fingerprint == corpus.fingerprint
    assert server.requests == [], "opening asks for the index alone"
    assert ids(opened.split("train")) == EXPECTED
    assert len(server.requests) == NUM_SHARDS
    assert cached(config) == sorted(shard.sha256 for shard in corpus.split("train").shards)
    assert ids(Corpus.open(server.url, config).split("train")) == EXPECTED
    assert len(server.requests) == NUM_SHARDS


def test_local_addresses_are_folders(corpus: Corpus, tmp_path: Path) -> None:
    assert Corpus.open(f"file://{corpus.directory}").fingerprint == corpus.fingerprint
    assert isinstance(open_storage("file:/a%20b"), LocalFolder)
    assert str(open_storage("file:/a%20b")) == "/a b"
    assert str(open_storage("./some/folder")) == "some/folder"


@pytest.mark.parametrize("fault", [500, 503, 429, "cut", "stall", "short", "long", "whole", "flip"])
def test_a_fault_of_the_server_is_survived(
    corpus: Corpus,
    server: BadServer,
    config: StorageConfig,
    fault: str | int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "PIECE_BYTES", 16 * 1024)
    server.faults.extend(["", fault, fault])  # in the middle of the first shard
    split = Corpus.open(server.url, config).split("train")
    if (
        fault == "flip"
    ):  # nothing tells which piece was wrong, so one wrong shard is an error, and a next try starts anew
        with pytest.raises(AtomasError, match=r"shard-000000\.tar: what came has the checksum"):
            split.read_block(0)
        assert cached(config) == []
    assert ids(split) == EXPECTED
    assert cached(config) == sorted(shard.sha256 for shard in split.shards)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (500, r"the server answers 500"),
        (403, r"the server answers 403"),
        (404, r"the server has no such file"),
        ("stall", r"(?i)timeout"),
        ("cut", r"ClientPayloadError"),
        ("short", r"the server sent [\d,]+ bytes where [\d,]+ were asked for"),
        ("flip", r"what came has the checksum"),
    ],
)
def test_a_server_that_never_recovers_ends_in_one_line(
    server: BadServer, config: StorageConfig, fault: str | int, message: str
) -> None:
    server.always = fault
    split = Corpus.open(
        server.url, StorageConfig(cache_dir=config.cache_dir, timeout_seconds=0.3, attempts=3)
    ).split("train")
    with pytest.raises(AtomasError, match=message) as caught:
        split.read_block(0)
    text = str(caught.value)
    assert text.startswith(f"cannot read block 000000.jsonl of shard {server.url}/train/shard-000000.tar: ")
    assert "\n" not in text
    assert not [name for name in cached(config) if "." not in name], "nothing counts as a whole shard"
    assert len(server.requests) == {403: 1, 404: 1, "flip": 1}.get(fault, 3), (
        "what will not change is asked once"
    )
    server.always = ""
    assert ids(split) == EXPECTED, "and nothing of it is left in the way"


def test_a_broken_download_goes_on_where_it_stopped(
    corpus: Corpus, server: BadServer, config: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PIECE_BYTES", 8 * 1024)
    server.faults.extend(["", "", 403])
    with pytest.raises(AtomasError, match="403"):
        Corpus.open(server.url, config).split("train").read_block(0)
    (partial,) = cached(config)
    assert partial.endswith(".partial")
    assert (cache_in(config.cache_dir) / partial).stat().st_size == 16 * 1024
    split = Corpus.open(server.url, config).split("train")
    split.read_block(0)
    assert server.sent["shard-000000.tar"] == split.shards[0].bytes, "no byte was sent twice"
    assert server.requests[3].endswith(f"bytes={16 * 1024}-{24 * 1024 - 1}")


def test_a_partial_of_other_bytes_is_not_trusted(server: BadServer, config: StorageConfig) -> None:
    split = Corpus.open(server.url, config).split("train")
    shard = split.shards[0]
    folder = cache_in(config.cache_dir)
    folder.mkdir(parents=True)
    (folder / f"{shard.sha256}.{shard.bytes}.partial").write_bytes(b"x" * 5000)
    assert len(split.read_block(0)) == 20
    assert cached(config) == [shard.sha256]


def test_a_cached_shard_that_the_disk_damaged_is_fetched_again(
    server: BadServer, config: StorageConfig
) -> None:
    split = Corpus.open(server.url, config).split("train")
    expected = split.read_block(1)
    path = cache_in(config.cache_dir) / split.shards[0].sha256
    data = bytearray(path.read_bytes())
    data[split.blocks[1].offset + 7] ^= 4
    path.write_bytes(data)
    assert split.read_block(1) == expected
    path.write_bytes(data[:3000])
    assert split.read_block(1) == expected
    assert len(server.requests) == 3


def test_the_cache_keeps_to_its_limit_and_drops_the_longest_unused(
    corpus: Corpus, server: BadServer, config: StorageConfig
) -> None:
    shards = corpus.split("train").shards
    limit = sum(shard.bytes for shard in shards[:2]) + 100
    small = StorageConfig(cache_dir=config.cache_dir, cache_gib=limit / 2**30)
    (cache_in(small.cache_dir) / "somebody's").mkdir(parents=True)
    (cache_in(small.cache_dir) / "thesis.tar").touch()
    split = Corpus.open(server.url, small).split("train")
    first_block = [0, *corpus.split("train")._block_ends.tolist()]

    def use(shard: int) -> None:
        split.read_block(first_block[shard])
        time.sleep(0.02)  # so that times of use differ
        assert (
            sum(path.stat().st_size for path in cache_in(small.cache_dir).iterdir() if path.is_file())
            <= limit
        )

    for shard in (0, 1, 0, 2):
        use(shard)
    kept = ["somebody's", "thesis.tar"]
    assert cached(small) == sorted([shards[0].sha256, shards[2].sha256, *kept])
    assert ids(split) == EXPECTED
    assert set(cached(small)) > set(kept)


def test_a_shard_larger_than_the_cache_says_what_to_set(server: BadServer, config: StorageConfig) -> None:
    split = Corpus.open(server.url, StorageConfig(cache_dir=config.cache_dir, cache_gib=1e-6)).split("train")
    with pytest.raises(
        AtomasError, match=r"more than the whole cache may have: raise storage\.cache_gib above"
    ):
        split.read_block(0)


def read_everything(url: str, config: StorageConfig, start: Any, results: Any) -> None:
    start.wait()
    results.put(ids(Corpus.open(url, config).split("train")))


@pytest.mark.parametrize("room", [10.0, 2.2])
def test_processes_that_fill_one_cache_fetch_each_shard_once(
    corpus: Corpus, server: BadServer, config: StorageConfig, room: float
) -> None:
    """With room for two shards they evict each other's, and still read everything."""
    largest = max(shard.bytes for shard in corpus.split("train").shards)
    limited = StorageConfig(cache_dir=config.cache_dir, cache_gib=room * largest / 2**30)
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    processes = [
        context.Process(target=read_everything, args=(server.url, limited, start, results)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    start.set()
    assert [results.get(timeout=60) for _ in processes] == [EXPECTED] * 3
    for process in processes:
        process.join(timeout=60)
    if room == 10.0:
        assert len(server.requests) == NUM_SHARDS
        assert cached(config) == sorted(shard.sha256 for shard in corpus.split("train").shards)


def test_a_process_killed_while_it_fetches_leaves_no_lock_and_no_shard(
    server: BadServer, config: StorageConfig
) -> None:
    server.faults.append("stall")
    slow = StorageConfig(cache_dir=config.cache_dir, timeout_seconds=60)
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    start.set()
    process = context.Process(target=read_everything, args=(server.url, slow, start, results))
    process.start()
    deadline = time.monotonic() + 30
    while not server.sent and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert all(name.endswith(".partial") for name in cached(config))
    assert ids(Corpus.open(server.url, config).split("train")) == EXPECTED


def test_a_split_is_used_after_a_fork_and_a_pickle(server: BadServer, config: StorageConfig) -> None:
    split = Corpus.open(server.url, config).split("train")
    split.read_block(0)  # connections of this process are open
    copy = pickle.loads(pickle.dumps(split))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=lambda: results.put(ids(copy)))
    process.start()
    assert results.get(timeout=60) == EXPECTED
    process.join(timeout=60)


@pytest.fixture
def small_disk(corpus: Corpus, tmp_path: Path) -> Iterator[Path]:
    """A file system with room for two shards and a half."""
    folder = tmp_path / "small"
    folder.mkdir()
    size = sum(shard.bytes for shard in corpus.split("train").shards[:2]) + 24_000
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_makes_the_cache_smaller(server: BadServer, small_disk: Path) -> None:
    """storage.cache_gib promised more than there is: older shards go, and everything is read."""
    split = Corpus.open(server.url, StorageConfig(cache_dir=str(small_disk / "cache"))).split("train")
    assert ids(split) == EXPECTED
    assert 1 <= len(list(cache_in(small_disk / "cache").glob("?" * 64))) <= 2


def test_a_disk_full_of_other_things_is_named(server: BadServer, small_disk: Path) -> None:
    free = os.statvfs(small_disk)
    (small_disk / "other").write_bytes(bytes(free.f_bavail * free.f_frsize - 30_000))
    split = Corpus.open(server.url, StorageConfig(cache_dir=str(small_disk / "cache"))).split("train")
    with pytest.raises(
        AtomasError, match=r"no room for .*/train/shard-000000\.tar in .*No space left.*storage\.cache_dir"
    ):
        split.read_block(0)
    (small_disk / "other").unlink()
    assert len(split.read_block(0)) == 20, "what had come is continued"


def test_an_address_that_cannot_be_used_says_why(server: BadServer, config: StorageConfig) -> None:
    with pytest.raises(AtomasError, match=r"gopher:// is not known"):
        Corpus.open("gopher://host/corpus")
    with pytest.raises(AtomasError, match=r"/nothing is not a built corpus \(it has no index\.json\)"):
        Corpus.open(f"{server.url}/nothing", config)
    closed = StorageConfig(cache_dir=config.cache_dir, attempts=2)
    with pytest.raises(
        AtomasError, match=r"cannot read http://127\.0\.0\.1:1/index\.json: ClientConnectorError"
    ):
        Corpus.open("http://127.0.0.1:1", closed)


def test_a_password_in_an_address_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AtomasError) as told:
        Corpus.open("s3://key:secret@bucket/corpus")
    assert str(told.value).startswith("s3://bucket/corpus has a user or password in it")
    assert "AWS_SECRET_ACCESS_KEY" in str(told.value)
    for address in ("http://somebody:secret@host/a", "https://token-secret@host/a", "ftp://me:secret@host/a"):
        with pytest.raises(AtomasError) as told:
            Corpus.open(address)
        assert "secret" not in str(told.value).replace("password SECRET", "")
        assert ("netrc" in str(told.value)) == address.startswith("http")
    check_address("abfs://container@account.dfs.core.windows.net/a")
    check_address("http://host/a@b:c")
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  corpus: [here, 's3://key:secret@bucket/corpus']\n")
    with pytest.raises(
        AtomasError, match=r"run\.yaml:2.*: data\.corpus = s3://bucket/corpus has a user"
    ) as told:
        load_config(path)
    assert "secret@" not in str(told.value)


def test_a_password_is_read_from_netrc(
    server: BadServer, config: StorageConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server.wanted = "Basic " + base64.b64encode(b"somebody:secret").decode()
    assert ids(Corpus.open(server.url, config).split("train")) == EXPECTED
    monkeypatch.delenv("NETRC")
    with pytest.raises(AtomasError, match="the server answers 401"):
        Corpus.open(server.url, config)


def test_a_cache_of_somebody_else_is_not_read(
    server: BadServer, config: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = Corpus.open(server.url, config).split("train")
    assert ids(split) == EXPECTED
    me = os.getuid()
    cache_in(config.cache_dir).rename(Path(config.cache_dir) / f"atomas-shards-{me + 1}")
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(
        AtomasError, match=rf"atomas-shards-{me + 1} belongs to another user: .*storage\.cache_dir"
    ):
        ids(Corpus.open(server.url, config).split("train"))


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_cache_that_may_not_be_written_says_so(server: BadServer, tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    split = Corpus.open(server.url, StorageConfig(cache_dir=str(folder / "cache"))).split("train")
    with pytest.raises(AtomasError, match=r"cannot write .*: Permission denied; set storage\.cache_dir"):
        split.read_block(0)


def test_a_cache_folder_that_is_a_file_says_so(server: BadServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    split = Corpus.open(server.url, StorageConfig(cache_dir=str(tmp_path / "file"))).split("train")
    with pytest.raises(AtomasError, match=r"cannot write .*; set storage\.cache_dir"):
        split.read_block(0)


def test_a_damaged_index_cannot_name_files_outside_the_cache(config: StorageConfig, tmp_path: Path) -> None:
    directory = tmp_path / "evil"
    write_corpus(directory)
    text = (directory / "index.json").read_text()
    sha = Corpus.open(directory).split("train").shards[0].sha256
    (directory / "index.json").write_text(text.replace(sha, "../" * 20 + "etc/x"))
    with BadServer(directory) as server, pytest.raises(AtomasError, match=r"changed by hand|no SHA-256"):
        Corpus.open(server.url, config).split("train").read_block(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_streams_from_a_server_that_fails_now_and_then(
    server: BadServer, config: StorageConfig, tmp_path: Path, workers: int
) -> None:
    """As training does: opened here, read in forked loader processes, beside a corpus in a folder."""
    with ShardWriter(tmp_path / "local", "train", block_size=20) as writer:
        for number in range(80):
            writer.write(
                {"smiles": "C" * (number % 9 + 1), "text": f"alkane {number}", "inchikey": str(number)}
            )
    write_index(tmp_path / "local", {"train": writer.index()}, counts={}, hazards={}, sources=[], options={})
    run = Config(
        run=RunConfig(output_dir=str(tmp_path)),
        data=DataConfig(
            corpus=(str(tmp_path / "local"), f"{server.url}/pairs"),
            batch_size=20,
            window_blocks=4,
            group_shards=2,
        ),
        storage=config,
    )
    with ShardWriter(server.folder / "pairs", "train", block_size=20, shard_bytes=4000) as writer:
        for number in range(200):
            writer.write(
                {"smiles": "O" + "C" * (number % 7), "text": f"alcohol {number}", "inchikey": f"x{number}"}
            )
    write_index(
        server.folder / "pairs", {"train": writer.index()}, counts={}, hazards={}, sources=[], options={}
    )
    server.faults.extend([500, "", "cut", "", 503, "short"])
    corpora = Corpora.open(run)
    tokenizer = AtomasTokenizer.train(["alkane alcohol CCO 0123456789"], 400)
    stream = PairStream.open(run, corpora, tokenizer)
    batches = list(build_loader(stream, range(28), num_workers=workers))
    seen = [sample for batch in batches for sample in batch.sample_id.tolist()]
    assert sorted(seen[:280]) == sorted(seen[280:]) == list(range(280))
    assert not any(batch.skipped for batch in batches)


@pytest.mark.parametrize("room", [4.2, 3.5])
def test_the_shards_of_the_next_group_come_meanwhile(
    corpus: Corpus, server: BadServer, config: StorageConfig, room: float
) -> None:
    largest = max(shard.bytes for shard in corpus.split("train").shards)
    limited = StorageConfig(cache_dir=config.cache_dir, cache_gib=room * largest / 2**30)
    split = Corpus.open(server.url, limited).split("train")
    order = GlobalOrder(
        split.blocks.num_records,
        seed=0,
        window_blocks=1,
        shard_sizes=[len(shard.blocks) for shard in split.shards],
        group_shards=2,
    )
    (upcoming,) = order.upcoming(0)
    assert sorted(upcoming.shards) == [0, 1, 2, 3]
    assert set(upcoming.shards[:2]) == set((order.indices(0, 200) // 100).tolist())
    (later,) = order.upcoming(250)
    assert (later.group, set(later.shards[:2])) == (upcoming.group + 1, set(upcoming.shards[2:]))
    split.storage.fetch_ahead([split.shards[shard] for shard in upcoming.shards])
    deadline = time.monotonic() + (20 if room > 4 else 1)
    while len(server.requests) < NUM_SHARDS and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(server.requests) == (NUM_SHARDS if room > 4 else 0), (
        "nothing where it would push out what is in use"
    )
    assert ids(split) == EXPECTED
    assert len(server.requests) == NUM_SHARDS or room < 4


@pytest.fixture(scope="module")
def s3(corpus: Corpus) -> Iterator[str]:
    """The corpus in a bucket of a real S3 server on loopback."""
    pytest.importorskip("s3fs", reason="needs the extra `s3`")
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for path in corpus.directory.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), "bucket", f"a/corpus/{path.relative_to(corpus.directory)}")
        yield "s3://bucket/a/corpus"
    server.stop()


def test_a_corpus_in_a_bucket(
    corpus: Corpus, s3: str, config: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PIECE_BYTES", 10_000)
    opened = Corpus.open(s3, config)
    assert ids(opened.split("train")) == EXPECTED
    assert cached(config) == sorted(shard.sha256 for shard in corpus.split("train").shards)


def test_what_is_not_in_the_bucket_is_named(s3: str, config: StorageConfig) -> None:
    with pytest.raises(AtomasError, match=r"s3://bucket/other is not a built corpus"):
        Corpus.open("s3://bucket/other", config)
    with pytest.raises(AtomasError, match=r"s3://nowhere/corpus"):
        Corpus.open("s3://nowhere/corpus", config)


def test_an_object_deleted_from_the_bucket_is_one_line(s3: str, config: StorageConfig) -> None:
    import boto3

    split = Corpus.open(s3, config).split("train")
    body = (
        boto3.client("s3").get_object(Bucket="bucket", Key="a/corpus/train/shard-000000.tar")["Body"].read()
    )
    boto3.client("s3").delete_object(Bucket="bucket", Key="a/corpus/train/shard-000000.tar")
    try:
        with pytest.raises(
            AtomasError, match=r"s3://bucket/a/corpus/train/shard-000000\.tar: the server has no such file"
        ):
            split.read_block(0)
    finally:
        boto3.client("s3").put_object(Bucket="bucket", Key="a/corpus/train/shard-000000.tar", Body=body)
    assert len(split.read_block(0)) == 20
