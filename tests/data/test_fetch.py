"""Downloads against a real server on this machine: whole, broken, corrupted, resumed, refused."""

import functools
import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from atomas.data import fetch as fetch_module
from atomas.data.fetch import DATASETS, Dataset, RemoteFile, fetch, git_blob_sha1
from atomas.errors import AtomasError

BODY = b"CID\tSMILES\tdescription\n" + b"".join(b"%d\tC\tmethane number %d\n" % (i, i) for i in range(5000))
SHA1 = hashlib.sha1(b"blob %d\0" % len(BODY) + BODY).hexdigest()
FILE = RemoteFile(name="train.txt", rows=5000, git_blob_sha1=SHA1)
WITHOUT_SHA1 = RemoteFile(name="train.txt", rows=5000, git_blob_sha1=None)

Behaviour = Callable[["Handler", int], None]


class Handler(BaseHTTPRequestHandler):
    """Serves BODY; `behaviour(handler, request number)` decides how. Notes every Range header."""

    behaviour: Behaviour
    ranges: list[str | None]

    def do_GET(self) -> None:
        self.ranges.append(self.headers.get("Range"))
        type(self).behaviour(self, len(self.ranges))

    def send_body(self, body: bytes = BODY, *, sent: int | None = None, with_ranges: bool = True) -> None:
        """Answer with `body` from the byte asked for on; break off after `sent` bytes."""
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and with_ranges else 0
        if start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:] if sent is None else body[start : start + sent])
        self.wfile.flush()
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Behaviour], tuple[str, list[str | None]]]]:
    monkeypatch.setattr(fetch_module, "BACKOFF_S", 0.01)
    servers = []

    def start(behaviour: Behaviour) -> tuple[str, list[str | None]]:
        ranges: list[str | None] = []
        handler = type("OneHandler", (Handler,), {"behaviour": staticmethod(behaviour), "ranges": ranges})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=functools.partial(server.serve_forever, 0.02), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/data/", ranges

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


Serve = Callable[[Behaviour], tuple[str, list[str | None]]]


def load(url: str, out: Path, file: RemoteFile = FILE) -> Path:
    fetch(Dataset(title="test set", base_url=url, files=(file,)), out)
    return out / file.name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_whole_download(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url, ranges = serve(lambda handler, number: handler.send_body())
    assert load(url, tmp_path / "out").read_bytes() == BODY
    assert names(tmp_path / "out") == ["train.txt"]
    assert ranges == [None]
    printed = capsys.readouterr().out
    assert f"git blob {SHA1} verified" in printed
    assert "atomas data build --split train=" in printed
    load(url, tmp_path / "out")
    assert ranges == [None]
    assert "already there" in capsys.readouterr().out


def test_truncated_body_is_continued_where_it_broke(serve: Serve, tmp_path: Path) -> None:
    url, ranges = serve(lambda handler, number: handler.send_body(sent=60_000 if number < 3 else None))
    assert load(url, tmp_path).read_bytes() == BODY
    assert ranges[0] is None
    starts = [int(str(asked)[6:-1]) for asked in ranges[1:]]
    assert len(starts) == 2
    assert 0 < starts[0] < starts[1] < len(BODY)


def test_endless_breaks_give_up_and_keep_what_came(serve: Serve, tmp_path: Path) -> None:
    url, ranges = serve(lambda handler, number: handler.send_body(sent=70_000 if number == 1 else 0))
    with pytest.raises(AtomasError, match=r"connection broke 4 times in a row .*run the command again"):
        load(url, tmp_path)
    assert names(tmp_path) == [".train.txt.partial"]
    assert BODY.startswith((tmp_path / ".train.txt.partial").read_bytes())
    assert len(ranges) == 4


def test_second_call_resumes_the_first(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / ".train.txt.partial").write_bytes(BODY[:100_000])
    url, ranges = serve(lambda handler, number: handler.send_body())
    assert load(url, tmp_path).read_bytes() == BODY
    assert ranges == ["bytes=100000-"]


def test_server_without_ranges_starts_over(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / ".train.txt.partial").write_bytes(BODY[:100_000])
    url, _ = serve(lambda handler, number: handler.send_body(with_ranges=False))
    assert load(url, tmp_path).read_bytes() == BODY


def test_finished_but_unnamed_download_is_taken(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / ".train.txt.partial").write_bytes(BODY)
    url, ranges = serve(lambda handler, number: handler.send_body())
    assert load(url, tmp_path).read_bytes() == BODY
    assert len(ranges) == 1


def test_corrupted_body_is_refused_and_removed(serve: Serve, tmp_path: Path) -> None:
    corrupted = BODY.replace(b"methane number 77\n", b"methane number 78\n")
    url, _ = serve(lambda handler, number: handler.send_body(corrupted))
    with pytest.raises(AtomasError, match=rf"not the expected file \(git blob \w+, not {SHA1}\)"):
        load(url, tmp_path)
    assert names(tmp_path) == []


def test_corrupted_half_is_loaded_again_from_the_start(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / ".train.txt.partial").write_bytes(b"x" + BODY[1:100_000])
    url, ranges = serve(lambda handler, number: handler.send_body())
    assert load(url, tmp_path).read_bytes() == BODY
    assert ranges == ["bytes=100000-", None]


def test_wrong_file_under_the_name_is_replaced(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes(b"something else")
    url, _ = serve(lambda handler, number: handler.send_body())
    assert load(url, tmp_path).read_bytes() == BODY


def test_server_error_that_recovers(serve: Serve, tmp_path: Path) -> None:
    url, ranges = serve(
        lambda handler, number: (
            handler.send_body() if number > 2 else handler.send_error(500 + 3 * (number - 1))
        )
    )
    assert load(url, tmp_path).read_bytes() == BODY
    assert len(ranges) == 3


@pytest.mark.parametrize("status", [404, 403, 500])
def test_lasting_refusal_is_one_line(serve: Serve, tmp_path: Path, status: int) -> None:
    url, _ = serve(lambda handler, number: handler.send_error(status))
    with pytest.raises(
        AtomasError, match=rf"{url}train.txt: the server answers {status} .*--base-url"
    ) as caught:
        load(url, tmp_path)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_no_server_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "BACKOFF_S", 0.01)
    with pytest.raises(AtomasError, match=r"connection broke 4 times"):
        load("http://127.0.0.1:9/", tmp_path)


def test_without_a_checksum_rows_are_counted(serve: Serve, tmp_path: Path) -> None:
    bodies = {"short": BODY[: BODY.index(b"3000\t")], "cut": BODY[:-3], "whole": BODY}
    for name, body in bodies.items():
        url, _ = serve(lambda handler, number, body=body: handler.send_body(body))  # type: ignore[misc]
        if name == "whole":
            assert load(url, tmp_path / name, WITHOUT_SHA1).read_bytes() == BODY
        else:
            with pytest.raises(AtomasError, match=r"3,000 rows, not 5,000|last line is not complete"):
                load(url, tmp_path / name, WITHOUT_SHA1)


def test_unwritable_folder_is_one_line(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    url, _ = serve(lambda handler, number: handler.send_body())
    with pytest.raises(AtomasError, match="cannot write"):
        load(url, tmp_path / "file")


def test_known_blob_is_that_of_the_real_validation_split(shared_data: Path) -> None:
    expected = {file.name: file.git_blob_sha1 for file in DATASETS["chebi-20"].files}
    assert git_blob_sha1(shared_data / "chebi20/validation.txt") == expected["validation.txt"]
