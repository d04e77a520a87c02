import gzip
import hashlib
import io
import multiprocessing
import os
import re
import signal
import stat
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest

from calib_lightning.data import archives, web_files
from calib_lightning.data.archives import extract
from calib_lightning.data.array_files import load_npy, load_npz
from calib_lightning.data.web_files import Archive, fetch, locked, md5_of

CONTENT = np.random.default_rng(0).bytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
HALF = len(CONTENT) // 2
PAGE = b"\n<!DOCTYPE HTML><html><body>Sign in to use this network</body></html>"


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        plan = self.server.plan
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        plan.ranges.append(start and int(start[1]))
        plan.agents.append(self.headers["User-Agent"])
        time.sleep(plan.delay)
        status, body = plan.status, plan.body
        if plan.statuses:
            status = plan.statuses.pop(0)
        elif start and plan.resumes:
            status = 206
            if int(start[1]) >= len(body):
                status, body = 416, b""
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {int(start[1]) + plan.shift}-{len(body) - 1}/{len(body)}")
            body = body[int(start[1]) + plan.shift :]
        self.send_header("Content-Type", plan.type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: plan.cuts.pop(0)] if plan.cuts else body)


@pytest.fixture
def server(monkeypatch):
    """A server on this machine; the attributes say what it answers and what it was asked."""
    monkeypatch.setattr(web_files, "_PAUSES", (0, 0, 0))
    plan = SimpleNamespace(body=CONTENT, type="application/gzip", status=200, resumes=True, shift=0, delay=0)
    plan.cuts, plan.statuses, plan.ranges, plan.agents = [], [], [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as http:
        http.plan, http.daemon_threads = plan, True
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        plan.url = f"http://127.0.0.1:{http.server_port}/a.bin"
        yield plan
        http.shutdown()


def _left(folder):
    """What lies in a folder, but for locks."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") if folder.exists() else []


@pytest.mark.parametrize("known", [{}, {"md5": MD5.upper()}, {"size": len(CONTENT)}])
def test_a_file_is_downloaded_once(server, tmp_path, known):
    for _ in range(2):
        path = fetch(Archive(server.url, "a.bin", **known), tmp_path / "new" / "root")
        assert path == tmp_path / "new" / "root" / "a.bin"
        assert path.read_bytes() == CONTENT
    assert server.ranges == [None]
    assert "calib_lightning" in server.agents[0]
    assert _left(path.parent) == ["a.bin"]
    assert md5_of(path) == MD5


def test_a_whole_file_needs_no_server(tmp_path):
    (tmp_path / "a.bin").write_bytes(CONTENT)
    assert fetch(Archive("http://127.0.0.1:9/a.bin", "a.bin", MD5, len(CONTENT)), tmp_path).read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [tmp_path / "a.bin"]


def test_file_urls_are_copied_and_other_schemes_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(CONTENT)
    copy = fetch(Archive((tmp_path / "a.bin").as_uri(), "b.bin", MD5), tmp_path / "root")
    assert copy.read_bytes() == CONTENT
    with pytest.raises(ValueError, match="url is 'ftp://host/a'; it must start with http://"):
        fetch(Archive("ftp://host/a", "a"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_broken_connection_is_continued_in_the_same_call(server, tmp_path):
    server.cuts = [HALF, 1000]
    assert fetch(Archive(server.url, "a.bin"), tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, HALF, HALF + 1000]


def test_the_next_call_continues_where_the_last_one_was_interrupted(server, tmp_path, monkeypatch):
    monkeypatch.setattr(web_files, "_PAUSES", ())
    server.cuts = [HALF]
    archive = Archive(server.url, "a.bin", MD5)
    with pytest.raises(
        OSError, match=rf"truncated, {HALF} of {len(CONTENT)} bytes.*{re.escape(str(tmp_path))}/a.bin man"
    ):
        fetch(archive, tmp_path)
    assert _left(tmp_path) == [".a.bin.part"]
    assert fetch(archive, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, HALF]
    assert _left(tmp_path) == ["a.bin"]


def test_a_part_is_not_continued_if_nothing_can_tell_that_the_file_has_changed(server, tmp_path):
    (tmp_path / ".a.bin.part").write_bytes(b"of an older file")
    assert fetch(Archive(server.url, "a.bin"), tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None]


def test_a_part_that_is_complete_is_only_renamed(server, tmp_path):
    (tmp_path / ".a.bin.part").write_bytes(CONTENT)
    assert fetch(Archive(server.url, "a.bin", MD5, len(CONTENT)), tmp_path).read_bytes() == CONTENT
    assert server.ranges == []


@pytest.mark.parametrize("case", ["200", "416", "other range"])
def test_a_server_that_does_not_continue_starts_again(server, tmp_path, case):
    part = CONTENT + b"too much" if case == "416" else CONTENT[:HALF]
    server.resumes, server.shift = case != "200", 7 if case == "other range" else 0
    (tmp_path / ".a.bin.part").write_bytes(part)
    assert fetch(Archive(server.url, "a.bin", MD5), tmp_path).read_bytes() == CONTENT
    assert server.ranges == ([len(part)] if case == "200" else [len(part), None])


def test_errors_of_the_server_are_retried_and_those_of_the_request_are_not(server, tmp_path):
    server.statuses = [503, 500]
    assert fetch(Archive(server.url, "a.bin"), tmp_path).read_bytes() == CONTENT
    assert len(server.ranges) == 3
    server.status = 404
    with pytest.raises(OSError, match=r"a\.bin could not be downloaded: HTTP Error 404: Not Found\. Try again"):
        fetch(Archive(server.url, "b.bin"), tmp_path)
    assert len(server.ranges) == 4
    assert _left(tmp_path) == ["a.bin"]


def test_a_connection_that_always_breaks_ends_with_an_error(server, tmp_path):
    server.resumes, server.cuts = False, [HALF] * 9
    with pytest.raises(OSError, match="truncated"):
        fetch(Archive(server.url, "a.bin", MD5), tmp_path)
    assert len(server.ranges) == 4
    assert not (tmp_path / "a.bin").exists()


@pytest.mark.parametrize("kind", ["text/html", "application/gzip"])
def test_a_web_page_is_not_the_file(server, tmp_path, kind):
    server.body, server.type = PAGE, kind
    with pytest.raises(ValueError, match="the server sent a web page, not the file") as error:
        fetch(Archive(server.url, "a.bin"), tmp_path)
    assert server.url in str(error.value)
    assert "manually" in str(error.value)
    assert _left(tmp_path) == []


def test_a_sign_in_page_does_not_cost_what_was_downloaded(server, tmp_path):
    (tmp_path / ".a.bin.part").write_bytes(CONTENT[:HALF])
    server.resumes, server.type = False, "text/html"
    with pytest.raises(ValueError, match="web page"):
        fetch(Archive(server.url, "a.bin", MD5), tmp_path)
    server.resumes, server.type = True, "application/gzip"
    assert fetch(Archive(server.url, "a.bin", MD5), tmp_path).read_bytes() == CONTENT
    assert server.ranges == [HALF, HALF]


@pytest.mark.parametrize(
    ("known", "found"),
    [({"md5": "0" * 32}, f"md5 {MD5}, expected {'0' * 32}"), ({"size": 5}, f"{len(CONTENT)} bytes long, expected 5")],
)
def test_another_file_than_expected_is_refused(server, tmp_path, known, found):
    archive = Archive(server.url, "a.bin", **known)
    with pytest.raises(ValueError, match=found) as error:
        fetch(archive, tmp_path)
    assert server.url in str(error.value)
    assert f"{tmp_path / 'a.bin'} manually" in str(error.value)
    assert _left(tmp_path) == []
    (tmp_path / "a.bin").write_bytes(CONTENT)
    with pytest.raises(ValueError, match=rf"a\.bin is damaged: .*{found}\. Delete it to download it again from http"):
        fetch(archive, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_an_empty_answer_is_refused(server, tmp_path):
    server.body = b""
    with pytest.raises(ValueError, match="0 bytes long"):
        fetch(Archive(server.url, "a.bin"), tmp_path)
    assert _left(tmp_path) == []


def _fetch_in_process(url, folder, results):
    results.put(fetch(Archive(url, "a.bin", MD5), folder).read_bytes() == CONTENT)


def test_two_processes_download_once(server, tmp_path):
    server.delay = 0.3
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_fetch_in_process, args=(server.url, tmp_path, results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=20) for _ in processes] == [True, True]
    for process in processes:
        process.join()
    assert server.ranges == [None]


def test_a_lock_makes_its_folder_and_is_held_by_one(tmp_path):
    entered, path = [], tmp_path / "new" / "a"

    def enter():
        with locked(path):
            entered.append("second")

    with locked(path):
        assert (tmp_path / "new" / ".a.lock").exists()
        other = threading.Thread(target=enter)
        other.start()
        time.sleep(0.2)
        assert entered == []
    other.join(timeout=10)
    assert entered == ["second"]


def _archive(path, *members):
    """Write an archive of (name, content or kind of tar member) pairs."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in members:
                file.writestr(name, content)
        return path
    with tarfile.open(path, "w:gz" if path.suffix in {".gz", ".tgz"} else "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            elif isinstance(content, str):
                info.size = len(content)
            else:
                info.type, info.linkname = content, "good"
            info.mode = 0o6777
            file.addfile(info, io.BytesIO(content.encode()) if isinstance(content, str) else None)
    return path


@pytest.fixture
def goal(tmp_path):
    """A folder that an archive goes to, with a file that must survive."""
    folder = tmp_path / "goal"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    return folder


def _refused(archive, folder, error, match):
    with pytest.raises(error, match=match) as caught:
        extract(archive, folder)
    assert str(archive) in str(caught.value)
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*")] == ["mine"]
    assert (folder / "mine").read_text() == "mine"
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted([archive.name, folder.name])
    with pytest.raises(error):
        extract(archive, folder.parent / "new" / "goal")
    assert not (folder.parent / "new" / "goal").exists()


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz"])
def test_an_archive_is_unpacked_beside_what_is_there(tmp_path, goal, name):
    archive = _archive(tmp_path / name, ("./top", "top"), ("folder/", ""), ("folder/deep/x", "x" * 9), ("empty/", ""))
    extract(archive, goal)
    assert {p.relative_to(goal).as_posix(): p.is_file() and p.read_text() for p in goal.rglob("*")} == {
        "mine": "mine",
        "top": "top",
        "folder": False,
        "folder/deep": False,
        "folder/deep/x": "x" * 9,
        "empty": False,
    }
    assert stat.S_IMODE((goal / "top").stat().st_mode) & 0o7111 == 0
    extract(archive, tmp_path / "new" / "goal")
    assert (tmp_path / "new" / "goal" / "folder" / "deep" / "x").read_text() == "x" * 9


def test_what_a_killed_process_was_unpacking_is_removed(tmp_path, goal):
    killed = multiprocessing.get_context("fork").Process(target=_die_unpacking, args=(tmp_path, goal))
    killed.start()
    killed.join()
    assert len(list(goal.glob(".unpacking*"))) == 1
    extract(_archive(tmp_path / "a.zip", ("top", "new")), goal)
    assert sorted(path.name for path in goal.iterdir()) == ["mine", "top"]


def _die_unpacking(folder, goal):
    archives.shutil.copyfileobj = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    extract(_archive(folder / "b.zip", ("first", "x")), goal)


def test_an_entry_that_exists_is_not_replaced(tmp_path, goal):
    archive = _archive(tmp_path / "a.zip", ("first", "new"), ("mine", "new"))
    with pytest.raises(FileExistsError, match=r"goal/mine already exists\. Remove it to unpack .*a\.zip again"):
        extract(archive, goal)
    assert _left(goal) == ["mine"]
    assert (goal / "mine").read_text() == "mine"


@pytest.mark.parametrize("suffix", ["zip", "tar"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../evil", r"path has '\.\.'"),
        ("good/../../evil", r"path has '\.\.'"),
        ("/evil", "path is absolute"),
        ("C:/evil", "backslash or a drive letter"),
        ("good\\..\\evil", "backslash or a drive letter"),
    ],
)
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, goal, suffix, name, reason):
    archive = _archive(tmp_path / f"a.{suffix}", ("good", "good"), (name, "evil"))
    _refused(archive, goal, ValueError, re.escape(repr(name)) + ".*" + reason)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused_in_a_tar(tmp_path, goal, kind):
    _refused(_archive(tmp_path / "a.tar", ("good", "good"), ("bad", kind)), goal, ValueError, "'bad', .*link or device")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_are_refused_in_a_zip(tmp_path, goal, kind):
    link = zipfile.ZipInfo("bad")
    link.external_attr = (kind | 0o777) << 16
    _refused(
        _archive(tmp_path / "a.zip", ("good", "good"), (link, "good")), goal, ValueError, "'bad', .*link or device"
    )


def test_an_encrypted_zip_is_refused(tmp_path, goal):
    archive = _archive(tmp_path / "a.zip", ("good", "good"))
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1  # zipfile cannot write encrypted files
    archive.write_bytes(content)
    _refused(archive, goal, ValueError, "'good', which is encrypted")


@pytest.mark.parametrize("suffix", ["zip", "tgz"])
def test_a_bomb_is_refused_and_a_small_one_is_not(tmp_path, goal, suffix):
    archive = _archive(tmp_path / f"a.{suffix}", ("bomb", "0" * (11 << 20)))
    _refused(archive, goal, ValueError, "would exceed 10485760 bytes when unpacked, from the member 'bomb' on")
    small = _archive(tmp_path / f"b.{suffix}", ("zeros", "0" * (9 << 20)))
    assert small.stat().st_size < 90_000
    extract(small, goal)
    assert (goal / "zeros").stat().st_size == 9 << 20


@pytest.mark.parametrize("keep", [0, 0.3, 0.9])
@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_a_truncated_archive_is_refused(tmp_path, goal, name, keep):
    archive = _archive(tmp_path / name, ("a", CONTENT[:9000].hex()), ("b", CONTENT[9000:90000].hex()))
    content = archive.read_bytes()
    archive.write_bytes(content[: int(len(content) * keep)])
    _refused(archive, goal, ValueError, "damaged, truncated or in another format")


@pytest.mark.parametrize("fault", ["between members", "checksum", "no checksum", "header"])
def test_damage_that_tarfile_does_not_see_is_refused(tmp_path, goal, fault):
    archive = _archive(tmp_path / "a.tar.gz", ("a", "a" * 512), ("b", "b" * 512))
    packed = archive.read_bytes()
    plain = gzip.decompress(packed)
    content = {
        "between members": gzip.compress(plain[:1024]),
        "checksum": packed[:-8] + bytes(4) + packed[-4:],
        "no checksum": packed[:-8],
        "header": gzip.compress(plain[:1024] + b"c" + plain[1025:]),
    }
    archive.write_bytes(content[fault])
    with tarfile.open(archive) as file:
        assert file.getnames() in (["a"], ["a", "b"])
    _refused(archive, goal, ValueError, "damaged, truncated or in another format")


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tgz"])
def test_what_is_no_archive_is_refused(tmp_path, goal, name):
    (tmp_path / name).write_bytes(CONTENT)
    _refused(tmp_path / name, goal, ValueError, "damaged, truncated or in another format")
    (tmp_path / name).write_bytes(PAGE)
    _refused(tmp_path / name, goal, ValueError, r"is a web page, not the file\. Download it or save it again")
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        extract(tmp_path / name, goal)


def test_a_wrong_checksum_in_a_zip_is_damage(tmp_path, goal):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("first", "first")
        file.writestr("second", "the second")
    archive.write_bytes(archive.read_bytes().replace(b"the second", b"THE second"))
    _refused(archive, goal, ValueError, "damaged.*CRC")


def test_a_full_disk_leaves_nothing(tmp_path, goal, monkeypatch):
    archive = _archive(tmp_path / "a.zip", ("a", "a"), ("b", "b"))
    rename = type(tmp_path).rename

    def fail(self, target):
        if self.name == "b":
            raise OSError(28, f"No space left on device: {archive}")
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", fail)
    _refused(archive, goal, OSError, "No space left")


def test_arrays_are_read(tmp_path):
    arrays = {"image": np.arange(24.0).reshape(2, 3, 4), "label": np.array([0, 1]), "none": np.zeros((0, 3))}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    found = load_npz(tmp_path / "a.npz")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        np.save(tmp_path / "a.npy", array)
        for mmap in (False, True):
            read = load_npy(tmp_path / "a.npy", mmap=mmap)
            np.testing.assert_array_equal(read, array)
            assert read.dtype == array.dtype
            assert isinstance(read, np.memmap) == mmap
    assert list(load_npz(tmp_path / "a.npz", ["label"])) == ["label"]
    with pytest.raises(ValueError, match=r"a\.npz has no array 'test'; it has image, label, none\. Name one"):
        load_npz(tmp_path / "a.npz", ["label", "test"])


LOADERS = {"a.npz": load_npz, "a.npy": load_npy, "b.npy": lambda path: load_npy(path, mmap=True)}


@pytest.mark.parametrize("name", LOADERS)
def test_python_objects_are_not_loaded(tmp_path, name):
    (np.savez if name == "a.npz" else np.save)(tmp_path / name, np.array([{}, None]))
    with pytest.raises(ValueError, match=rf"{name} holds Python objects, which are never loaded\. Save numbers"):
        LOADERS[name](tmp_path / name)


@pytest.mark.parametrize("name", LOADERS)
def test_what_holds_no_arrays_is_named(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        LOADERS[name](path)
    (np.savez if name == "a.npz" else np.save)(path, np.arange(1000))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:20], b"", CONTENT):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is damaged, truncated .*Download it or save it again"):
            LOADERS[name](path)
    path.write_bytes(PAGE)
    with pytest.raises(ValueError, match=rf"{name} is a web page, not the file\. Download it"):
        LOADERS[name](path)


def test_a_wrong_checksum_in_an_npz_is_damage(tmp_path):
    np.savez(tmp_path / "a.npz", np.arange(1000))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[4000] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz is damaged.*CRC"):
        load_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("terminal", [True, False])
def test_unpacking_shows_how_far_it_is(terminal, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as pack:
        pack.writestr("folder/one.bin", CONTENT)
        pack.writestr("folder/two.bin", CONTENT[:HALF])
    shown = io.StringIO()
    shown.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", shown)
    extract(tmp_path / "a.zip", tmp_path / "root")
    last = shown.getvalue().split("\r")[-1]
    assert ("Unpacking a.zip: 100%" in last and "450k/450k" in last) if terminal else not shown.getvalue()
