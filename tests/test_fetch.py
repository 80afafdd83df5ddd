"""Fetching: from a server on this machine, so that cut connections and wrong files can be made to happen."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from nucseg.data import MissingData, load_dataset
from nucseg.data.fetch import TNBC_ARCHIVE, Archive, FetchError, extract, fetch_dataset
from nucseg.data.layouts import rows


def _png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tnbc_zip() -> bytes:
    """An archive in the layout of the official release: 50 small images, two nuclei in each mask."""
    rng = np.random.default_rng(0)
    image = _png(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
    mask = np.zeros((24, 24), np.uint8)
    mask[2:8, 2:8] = mask[12:20, 12:20] = 255
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for row in rows("tnbc"):
            zipped.writestr(f"TNBC_NucleiSegmentation/Slide_{row.patient}/{row.id}.png", image)
            zipped.writestr(f"TNBC_NucleiSegmentation/GT_{row.patient}/{row.id}.png", _png(mask))
        zipped.writestr("__MACOSX/TNBC_NucleiSegmentation/Slide_01/._01_1.png", b"no image")
    return buffer.getvalue()


@pytest.fixture
def server():
    """A server of one file on 127.0.0.1; `cut` ends the next answers after that many bytes, `seen` lists the ranges."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            start = 0
            if "Range" in self.headers and self.server.ranges:
                start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            self.server.seen.append(self.headers.get("Range"))
            body = self.server.content[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            cut = self.server.cut.pop(0) if self.server.cut else None
            self.wfile.write(body[:cut])

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.content, running.cut, running.seen, running.ranges = b"", [], [], True
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def _archive(server, content: bytes, **changed) -> Archive:
    server.content = content
    about = {
        "url": f"http://127.0.0.1:{server.server_address[1]}/TNBC_NucleiSegmentation.zip",
        "name": "TNBC_NucleiSegmentation.zip",
        "hash": f"sha256:{hashlib.sha256(content).hexdigest()}",
        "size": len(content),
    }
    return Archive(**{**about, **changed})


def test_a_fetched_archive_is_unpacked_and_opens_as_a_dataset(server, tnbc_zip, tmp_path):
    text = fetch_dataset("tnbc", tmp_path, accept_licence=True, progress=False, archive=_archive(server, tnbc_zip))
    assert "100 nuclei in 50 images" in text
    assert "CC BY 4.0" in text
    dataset = load_dataset("tnbc", tmp_path)
    assert [len(dataset.train), len(dataset.val), len(dataset.test)] == [30, 7, 13]
    assert dataset.train[0].labels.max() == 2


def test_a_finished_download_is_not_fetched_again(server, tnbc_zip, tmp_path):
    archive = _archive(server, tnbc_zip)
    first = fetch_dataset("tnbc", tmp_path, accept_licence=True, progress=False, archive=archive)
    second = fetch_dataset("tnbc", tmp_path, accept_licence=True, progress=False, archive=archive)
    assert first == second
    assert len(server.seen) == 1


def test_a_cut_download_goes_on_where_it_stopped(server, tnbc_zip, tmp_path):
    archive = _archive(server, tnbc_zip)
    server.cut = [60_000]
    with pytest.raises(FetchError, match="run the same command again"):
        fetch_dataset("tnbc", tmp_path, accept_licence=True, progress=False, archive=archive)
    kept = (tmp_path / "tnbc" / "TNBC_NucleiSegmentation.zip.part").stat().st_size
    assert 40_000 < kept <= 60_000
    fetch_dataset("tnbc", tmp_path, accept_licence=True, progress=False, archive=archive)
    assert server.seen == [None, f"bytes={kept}-"]


def test_a_server_that_cannot_resume_sends_the_file_anew(server, tnbc_zip, tmp_path):
    archive = _archive(server, tnbc_zip)
    server.ranges = False
    part = tmp_path / "tnbc" / "TNBC_NucleiSegmentation.zip.part"
    part.parent.mkdir()
    part.write_bytes(b"half")
    fetch_dataset("tnbc", tmp_path, accept_licence=True, progress=False, archive=archive)
    assert len(load_dataset("tnbc", tmp_path).samples) == 50


def test_a_file_with_another_checksum_is_refused_and_not_kept(server, tnbc_zip, tmp_path):
    archive = _archive(server, tnbc_zip, hash=f"sha256:{'0' * 64}")
    with pytest.raises(FetchError, match="not the published file"):
        fetch_dataset("tnbc", tmp_path, accept_licence=True, progress=False, archive=archive)
    assert list((tmp_path / "tnbc").iterdir()) == []


def test_an_archive_without_all_images_says_which_are_missing(server, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        zipped.writestr("Slide_01/01_1.png", b"x")
    with pytest.raises(MissingData, match=r"found 0 of 50 .* missing: 01_1, 01_2"):
        fetch_dataset("tnbc", tmp_path, True, progress=False, archive=_archive(server, buffer.getvalue()))


def test_the_licence_is_shown_first_and_nothing_is_fetched_without_it(server, tnbc_zip, tmp_path):
    shown = []
    archive = _archive(server, tnbc_zip)
    with pytest.raises(FetchError, match="licence was not accepted"):
        fetch_dataset("tnbc", tmp_path, accept_licence=lambda text: shown.append(text), archive=archive)
    assert "CC BY 4.0" in shown[0]
    assert server.seen == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["kumar", "monuseg"])
def test_sets_behind_a_form_give_steps_with_licence_and_folder(name, tmp_path):
    text = fetch_dataset(name, tmp_path)
    assert "CC BY-NC-SA 4.0" in text
    assert "1. Open https://" in text
    assert str(tmp_path / name) in text


def test_an_unknown_name_gets_the_nearest_one(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'kumar'"):
        fetch_dataset("kumarr", tmp_path)


@pytest.mark.parametrize("member", ["../evil.txt", "/tmp/evil.txt", "a/../../evil.txt", "C:\\evil.txt", "..\\evil.txt"])
def test_no_path_of_an_archive_leaves_the_folder(member, tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("good.txt", "good")
        zipped.writestr(member, "evil")
    with pytest.raises(FetchError, match="outside the folder"):
        extract(archive, tmp_path / "out" / "here")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.zip"]


def test_links_in_an_archive_are_refused(tmp_path):
    archive = tmp_path / "a.zip"
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr(link, "/etc/passwd")
    with pytest.raises(FetchError, match="is a link"):
        extract(archive, tmp_path / "out")


def test_a_damaged_archive_says_so_and_leaves_nothing(tmp_path):
    archive = tmp_path / "a.zip"
    archive.write_bytes(b"PK\x03\x04 no more")
    with pytest.raises(FetchError, match="damaged or no zip file"):
        extract(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("nucseg.data.fetch.LARGEST", 1000)
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("zeros", bytes(2000))
    with pytest.raises(FetchError, match="unpacks to more than"):
        extract(archive, tmp_path / "out")


def test_the_published_checksum_is_a_whole_one():
    algorithm, digest = TNBC_ARCHIVE.hash.split(":")
    assert len(bytes.fromhex(digest)) == hashlib.new(algorithm).digest_size
