"""Official archives: fetched over a connection that fails in every way, unpacked without harm."""

import contextlib
import hashlib
import io
import re
import tarfile
import threading
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest

import data_cards
from tasks.ingest import archives
from tasks.ingest.archives import fetch, unpack, unpacked
from tasks.runtime.errors import StageError
from tests.stub_server import Handler, serving

PAYLOAD = bytes(range(256)) * 4000  # a megabyte


@pytest.fixture
def server(monkeypatch):
    """A local server that answers each request with the next of `behaviours`, then properly."""
    monkeypatch.setattr(archives, "PATIENCE", 0.0)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    state = SimpleNamespace(behaviours=[], ranges=[], url="", released=threading.Event())

    class Archive(Handler):
        def do_GET(self):
            asked = self.headers.get("Range")
            state.ranges.append(asked)
            behaviour = state.behaviours.pop(0) if state.behaviours else "whole"
            if behaviour in (404, 500, 503):
                self.send_error(behaviour)
                return
            if behaviour == "elsewhere":
                self.send_response(302)
                self.send_header("Location", "/moved/birds.tgz")
                self.end_headers()
                return
            if behaviour == "endless":
                self.send_response(200)
                self.end_headers()  # and no length
                with contextlib.suppress(OSError):
                    while True:
                        self.wfile.write(PAYLOAD)
                return
            body = PAYLOAD if behaviour != "wrong" else PAYLOAD[:-1] + b"x"
            start = int(asked[6:-1]) if asked and behaviour != "no ranges" else 0
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            end = start + 300_000 if behaviour in ("cut", "stall") else len(body)
            self.wfile.write(body[start:end])
            if behaviour == "stall":
                self.wfile.flush()
                state.released.wait(30)
            if behaviour == "cut":
                self.wfile.flush()
                self.connection.close()

    with serving(Archive) as url:
        state.url = f"{url}/birds.tgz"
        yield state
        state.released.set()


def entry(server, name: str = "birds.tgz") -> dict[str, str]:
    return {"name": name, "url": server.url, "md5": hashlib.md5(PAYLOAD).hexdigest()}


@pytest.mark.parametrize(
    "behaviours",
    [
        [],
        ["cut"],
        ["cut", "cut", 503],
        [500, 500],
        ["wrong"],
        ["cut", "no ranges"],
        ["stall"],
        ["elsewhere"],
        ["elsewhere", "cut", "elsewhere"],
    ],
    ids=str,
)
def test_a_file_arrives_whole_over_a_failing_connection(server, tmp_path, behaviours):
    server.behaviours = list(behaviours)
    (path,) = fetch([entry(server)], tmp_path, "birds")
    assert path.read_bytes() == PAYLOAD
    assert [p.name for p in tmp_path.iterdir()] == ["birds.tgz"]


def test_a_cut_download_goes_on_in_the_next_run(server, tmp_path):
    (tmp_path / "birds.tgz.part").write_bytes(PAYLOAD[:500_000])
    (path,) = fetch([entry(server)], tmp_path, "birds")
    assert path.read_bytes() == PAYLOAD
    assert server.ranges == ["bytes=500000-"]


def test_a_part_that_is_already_whole_is_taken(server, tmp_path):
    (tmp_path / "birds.tgz.part").write_bytes(PAYLOAD)
    (path,) = fetch([entry(server)], tmp_path, "birds")
    assert path.read_bytes() == PAYLOAD


def test_what_is_there_is_not_downloaded_again(server, tmp_path):
    (tmp_path / "birds.tgz").write_bytes(PAYLOAD)
    fetch([entry(server)], tmp_path, "birds")
    assert server.ranges == []


@pytest.mark.parametrize(
    ("behaviour", "told"),
    [(404, "the server answered 404"), (500, "answered 500"), ("wrong", "what came has md5")],
)
def test_a_download_that_cannot_succeed_says_why_and_what_to_do(server, tmp_path, behaviour, told):
    server.behaviours = [behaviour] * archives.ATTEMPTS * 10
    with pytest.raises(StageError, match=rf"birds\.tgz.*{told}.*\[Download\] archives"):
        fetch([entry(server)], tmp_path, "birds")
    assert not (tmp_path / "birds.tgz").exists()


def test_an_endless_download_is_ended(server, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_DOWNLOAD", 3 * len(PAYLOAD))
    server.behaviours = ["endless"] * archives.ATTEMPTS * 10
    with pytest.raises(StageError, match=r"the server sends more than 3,072,000 bytes"):
        fetch([entry(server)], tmp_path, "birds")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3 * len(PAYLOAD)


def test_several_files_come_at_once_and_each_is_checked(server, tmp_path):
    names = ["a.tgz", "b.tgz", "c.tgz"]
    paths = fetch([entry(server, name) for name in names], tmp_path, "birds")
    assert [path.name for path in paths] == names
    assert all(path.read_bytes() == PAYLOAD for path in paths)


def test_a_damaged_file_of_the_user_is_named_and_kept(server, tmp_path):
    (tmp_path / "birds.tgz").write_bytes(b"half")
    with pytest.raises(StageError, match=r"birds\.tgz has md5 .*damaged or another version"):
        fetch([entry(server)], tmp_path, "birds")
    assert (tmp_path / "birds.tgz").read_bytes() == b"half"


def test_a_wrong_checksum_says_how_a_card_of_ones_own_can_carry_another(
    server, tmp_path, monkeypatch
):
    """And such a card, a copy of ours with that md5, is read in place of ours."""
    told = r"md5 (\w+), not .*write its md5 into a card of your own, cards/flowers\.md"
    (tmp_path / "birds.tgz").write_bytes(b"another version")
    with pytest.raises(StageError, match=told) as there:
        fetch([entry(server)], tmp_path, "flowers")
    server.behaviours = ["wrong"] * archives.ATTEMPTS
    with pytest.raises(StageError, match=told):
        fetch([entry(server, "new.tgz")], tmp_path, "flowers")
    md5 = re.search(told, str(there.value)).group(1)
    text = (data_cards.FOLDER / "flowers.md").read_text()
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "flowers.md").write_text(
        text.replace(data_cards.load("flowers").source["files"][0]["md5"], md5)
    )
    monkeypatch.chdir(tmp_path)
    files = [{**data_cards.load("flowers").source["files"][0], "name": "birds.tgz"}]
    assert fetch(files, tmp_path, "flowers") == [tmp_path / "birds.tgz"]


def test_a_file_without_a_home_says_where_to_put_it(tmp_path):
    files = [{"name": "cars_train.tgz", "md5": "0"}, {"name": "cars_test.tgz", "md5": "0"}]
    with pytest.raises(StageError, match=r"cars_train\.tgz, cars_test\.tgz can no longer be down"):
        fetch(files, tmp_path, "cars")


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 4, link: str = "") -> tuple:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size if kind == tarfile.REGTYPE else 0, link
    return info, io.BytesIO(b"\0" * info.size)


def tar(path: Path, *members: tuple, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for info, data in members:
            archive.addfile(info, data)
    return path


HOSTILE = {
    "parent": [member("../out.jpg")],
    "deep parent": [member("a/b/../../../out.jpg")],
    "absolute": [member("/tmp/dive-k-out.jpg")],
    "symlink": [member("a", tarfile.SYMTYPE, link="/etc/passwd")],
    "relative symlink": [member("a", tarfile.SYMTYPE, link="../..")],
    "write through a symlink": [member("a", tarfile.SYMTYPE, link="../.."), member("a/out.jpg")],
    "hard link": [member("a", tarfile.LNKTYPE, link="/etc/passwd")],
    "relative hard link": [member("a.jpg"), member("b", tarfile.LNKTYPE, link="../x")],
    "character device": [member("a", tarfile.CHRTYPE)],
    "block device": [member("a", tarfile.BLKTYPE)],
    "fifo": [member("a", tarfile.FIFOTYPE)],
    "duplicate": [member("a.jpg"), member("a.jpg")],
    "file over folder": [member("a/b.jpg"), member("a")],
}


@pytest.mark.parametrize("members", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_archive_is_refused_and_writes_nothing_outside(tmp_path, members):
    path = tar(tmp_path / "bad.tgz", *members)
    root = tmp_path / "in" / "root"
    with pytest.raises(StageError, match=r"bad\.tgz"):
        unpack(path, root)
    outside = [p for p in tmp_path.rglob("*") if root not in p.parents]
    assert sorted(outside) == sorted([path, root.parent, root])
    assert not Path("/tmp/dive-k-out.jpg").exists()


@pytest.mark.process
def test_an_archive_of_a_hundred_thousand_entries_is_refused(tmp_path):
    path = tmp_path / "many.tar"
    names = (tarfile.TarInfo(f"{number}.jpg") for number in range(100_000))
    path.write_bytes(b"".join(info.tobuf(tarfile.USTAR_FORMAT) for info in names) + b"\0" * 1024)
    with pytest.raises(StageError, match=r"many\.tar holds more than 50,000 files; refused"):
        unpack(path, tmp_path / "root")


def test_an_archive_of_more_entries_than_any_official_one_is_unpacked(tmp_path):
    path = tmp_path / "pets.tar"
    entry = tarfile.TarInfo("annotations")  # a folder, which may come again
    entry.type = tarfile.DIRTYPE
    path.write_bytes(entry.tobuf(tarfile.USTAR_FORMAT) * 25_000 + b"\0" * 1024)
    unpack(path, tmp_path / "root")
    assert (tmp_path / "root" / "annotations").is_dir()


def test_a_bomb_is_refused_before_it_fills_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_SMALL", 1 << 20)
    path = tar(tmp_path / "bomb.tgz", *(member(f"{i}.jpg", size=300_000) for i in range(20)))
    with pytest.raises(StageError, match=r"bomb\.tgz unpacks to more than"):
        unpack(path, tmp_path / "root")
    assert sum(p.stat().st_size for p in (tmp_path / "root").rglob("*")) <= 1 << 20


@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_a_damaged_archive_is_named(tmp_path, damage):
    path = tar(tmp_path / "x.tgz", *(member(f"{i}.jpg", size=9000) for i in range(50)))
    data = path.read_bytes()
    path.write_bytes(
        {"cut": data[: len(data) // 2], "noise": b"\x1f\x8b" + b"no" * 99}.get(damage, b"")
    )
    with pytest.raises(StageError, match=r"x\.tgz cannot be unpacked"):
        unpack(path, tmp_path / "root")


def test_an_interrupted_unpacking_is_done_anew(tmp_path):
    path = tar(tmp_path / "x.tgz", member("a.jpg"))
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "half.jpg").write_bytes(b"")
    (tmp_path / "list.mat").write_bytes(b"plain")
    root = unpacked([path, tmp_path / "list.mat"], tmp_path / "root")
    assert sorted(p.name for p in root.iterdir()) == [".unpacked", "a.jpg", "list.mat"]
    stamp = (root / "a.jpg").stat().st_mtime_ns
    assert unpacked([path], root) == root
    assert (root / "a.jpg").stat().st_mtime_ns == stamp
