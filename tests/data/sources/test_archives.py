import hashlib
import io
import stat
import tarfile
import tracemalloc
import zipfile
from types import SimpleNamespace

import pytest

from cbml import fetch
from cbml.data.sources import Cub200Config, archives
from cbml.errors import UserError
from cbml.stages.inputs import ensure_images
from cbml.workspace import Workspace

FILES = {
    "images/001.Albatross/a.jpg": bytes(range(256)) * 40,
    "images/002.Auklet/b.jpg": b"second",
    "images.txt": b"1 001.Albatross/a.jpg\n2 002.Auklet/b.jpg\n",
    "image_class_labels.txt": b"1 1\n2 2\n",
    "classes.txt": b"1 001.Albatross\n2 002.Auklet\n",
    "train_test_split.txt": b"1 1\n2 0\n",
}


def tar(files=FILES, *, top="CUB_200_2011/", mode="w:gz", members=()):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for member in members:
            archive.addfile(member)
        for name, content in {**files, "attributes/attributes.txt": b"not kept"}.items():
            info = tarfile.TarInfo(top + name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zipped(files=FILES, *, top="CUB_200_2011/", members=(), compression=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for member, content in [*members, *((top + name, content) for name, content in files.items())]:
            archive.writestr(member, content)
        archive.writestr(f"{top}attributes/attributes.txt", b"not kept")
        archive.writestr(f"__MACOSX/{top}images/._a.jpg", b"not kept")
    return buffer.getvalue()


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def server(server):
    server.content = tar()
    return server


def config(server=None, source=None, **changes):
    content = server.content if server else b"x"
    file = {
        "url": server.url if server else "http://localhost/CUB_200_2011.tgz",
        "size": len(content),
        "md5": hashlib.md5(content).hexdigest(),
    }
    return Cub200Config(type="cub200", mirrors=[[{**file, **changes}]], source=source)


def error_of(cub, folder):
    with pytest.raises((UserError, OSError)) as info:
        cub.download(folder)
    assert "\n" not in str(info.value)
    assert not folder.exists()
    return str(info.value)


def test_a_transfer_that_breaks_off_continues_by_range(server, tmp_path):
    server.breaks = [300, 100]
    config(server).download(tmp_path / "cub200")
    assert contents(tmp_path / "cub200") == FILES
    assert server.log == [0, 300, 400]
    assert list(tmp_path.iterdir()) == [tmp_path / "cub200"]


def test_the_next_run_continues_what_an_earlier_one_left(server, tmp_path):
    server.breaks = [300] + [0] * (fetch.RETRIES + 1)
    message = error_of(config(server), tmp_path / "cub200")
    assert f"300 of {len(server.content)} bytes arrived" in message
    assert "run again to continue" in message
    server.log.clear()
    config(server).download(tmp_path / "cub200")
    assert server.log == [300]
    assert contents(tmp_path / "cub200") == FILES


def test_a_server_without_range_starts_over(server, tmp_path):
    server.breaks, server.ranges = [300], False
    config(server).download(tmp_path / "cub200")
    assert server.log == [0, 300]
    assert contents(tmp_path / "cub200") == FILES


def test_a_complete_part_is_not_asked_for_again(server, tmp_path):
    part = tmp_path / ".cub200-download" / "CUB_200_2011.tgz.part"
    part.parent.mkdir()
    part.write_bytes(server.content)
    config(server).download(tmp_path / "cub200")
    assert server.log == []
    assert contents(tmp_path / "cub200") == FILES


@pytest.mark.parametrize("damage", [lambda content: b"garbage", lambda content: content[:-9] + b"different"])
def test_a_wrong_archive_in_the_download_folder_is_fetched_again(server, tmp_path, capsys, damage):
    archive = tmp_path / ".cub200-download" / "CUB_200_2011.tgz"
    archive.parent.mkdir()
    archive.write_bytes(damage(server.content))
    config(server).download(tmp_path / "cub200")
    assert contents(tmp_path / "cub200") == FILES
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{archive}: ") and "expected" in line and line.endswith("; fetching it again")


def test_a_right_archive_in_the_download_folder_is_not_asked_for_again(server, tmp_path):
    archive = tmp_path / ".cub200-download" / "CUB_200_2011.tgz"
    archive.parent.mkdir()
    archive.write_bytes(server.content)
    config(server).download(tmp_path / "cub200")
    assert server.log == []


@pytest.mark.parametrize("stall", ["hang", "header", "100 Continue", "drip", "chunks"])
def test_a_transfer_that_stalls_is_given_up_and_continued(server, tmp_path, monkeypatch, stall):
    monkeypatch.setattr(fetch, "STALL", 0.5)
    server.stalls = [stall]
    part = tmp_path / ".cub200-download" / "CUB_200_2011.tgz.part"
    part.parent.mkdir()
    part.write_bytes(server.content[:300])
    config(server).download(tmp_path / "cub200")
    assert contents(tmp_path / "cub200") == FILES
    first, second = server.log
    assert first == 300 and second <= 400 and (second > first) == (stall in ("drip", "chunks"))


def test_a_server_that_drips_for_ever_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "STALL", 0.3)
    server.stalls = ["drip"] * (fetch.RETRIES + 1)
    message = error_of(config(server), tmp_path / "cub200")
    assert "fewer than 100 bytes in 0.3 s" in message
    assert server.stalls == []


def test_a_server_that_never_ends_is_cut_off(server, tmp_path):
    size, server.content = len(server.content), bytes(10**7)
    assert f"size is {size // 100 * 100 + 100} bytes" in error_of(config(server, size=size), tmp_path / "cub200")


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 404},
        {"status": 503},
        {"location": "/there?signature=s3cret", "status": 503},
        {"content": b"short"},
        {"content": bytes(10**5)},
    ],
    ids=["refused", "failing", "redirected", "short", "long"],
)
def test_no_line_holds_the_secrets_of_a_url(server, tmp_path, capsys, fault):
    url = server.url.replace("://", "://someone:s3cret@") + "&token=s3cret"
    cub = config(server, url=url)
    vars(server).update(fault)
    lines = error_of(cub, tmp_path / "cub200") + capsys.readouterr().err
    assert f"{server.url.partition('?')[0]}: " in lines
    assert not any(secret in lines for secret in ("someone", "s3cret", "token"))


def test_wrong_md5_deletes_the_file(server, tmp_path):
    message = error_of(config(server, md5="0" * 32), tmp_path / "cub200")
    assert f"MD5 is {hashlib.md5(server.content).hexdigest()}, expected {'0' * 32}" in message
    assert "source=PATH" in message
    assert contents(tmp_path) == {}


def test_a_file_larger_than_expected(server, tmp_path):
    size = len(server.content)
    assert f"size is {size} bytes, expected {size - 1}" in error_of(config(server, size=size - 1), tmp_path / "cub200")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(("ranges", "message"), [(True, "file ends at or before byte"), (False, "bytes arrived")])
def test_a_file_shorter_than_expected(server, tmp_path, ranges, message):
    server.ranges = ranges
    assert message in error_of(config(server, size=len(server.content) + 1), tmp_path / "cub200")


@pytest.mark.parametrize(
    ("status", "message", "requests"),
    [
        (404, "the server answered 404", 1),
        (503, "503", fetch.RETRIES + 1),
    ],
)
def test_a_refusing_server(server, tmp_path, status, message, requests):
    server.status = status
    assert message in error_of(config(server), tmp_path / "cub200")
    assert len(server.log) == requests


def test_an_unreachable_server(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "BACKOFF", 0.0)
    message = error_of(config(url="http://127.0.0.1:9/CUB_200_2011.tgz"), tmp_path / "cub200")
    assert "ConnectionError: Connection refused" in message
    assert "source=PATH" in message
    message = error_of(config(url="http://someone:s3cret@no-such..host/CUB.tgz?token=s3cret"), tmp_path / "cub200")
    assert "http://no-such..host/CUB.tgz: " in message and "s3cret" not in message


def link(name, target, kind=tarfile.SYMTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("../evil"),
        tarfile.TarInfo("CUB_200_2011/images/../../../evil"),
        tarfile.TarInfo("/CUB_200_2011/images/evil"),
        link("CUB_200_2011/images/evil", "../../../evil"),
        link("CUB_200_2011/images/evil", "/etc/passwd"),
        link("CUB_200_2011/images/evil", "../evil", tarfile.LNKTYPE),
        link("CUB_200_2011/images/evil", "", tarfile.FIFOTYPE),
    ],
    ids=["parent", "inner parent", "absolute", "symlink", "absolute symlink", "hard link", "fifo"],
)
def test_an_unsafe_archive_leaves_nothing(server, tmp_path, member):
    server.content = tar(members=[member])
    (tmp_path / "data").mkdir()
    message = error_of(config(server), tmp_path / "data" / "cub200")
    assert f"unsafe member {member.name!r}" in message
    assert not list(tmp_path.rglob("evil"))
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".cub200-download"]


@pytest.mark.parametrize("mode", ["w:gz", "w:xz", "w:bz2", "w"])
def test_a_truncated_archive_leaves_nothing(tmp_path, mode):
    content = tar(mode=mode)
    archive = tmp_path / "mine.tar"
    archive.write_bytes(content[: len(content) // 2 if mode != "w" else 5000])
    (tmp_path / "data").mkdir()
    message = error_of(config(source=str(archive)), tmp_path / "data" / "cub200")
    assert f"{archive}: not a complete tar or zip archive" in message
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize("damage", [lambda c: c[:-8], lambda c: c[:-1], lambda c: c[:-8] + b"8 others"])
def test_the_checksum_of_gzip_is_checked(tmp_path, damage):
    archive = tmp_path / "mine.tgz"
    archive.write_bytes(damage(tar()))
    assert "not a complete tar or zip archive" in error_of(config(source=str(archive)), tmp_path / "cub200")


def sparse(name, size):
    """A member of nothing but a hole, in the format of GNU tar 1.0."""
    member = tarfile.TarInfo(name)
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name}
    member.pax_headers["GNU.sparse.realsize"] = str(size)
    return member, f"1\n{size}\n0\n".encode().ljust(512, b"\0")


def test_a_sparse_member_that_does_not_fit_on_the_disk(tmp_path, monkeypatch):
    archive, (member, data) = tmp_path / "mine.tgz", sparse("images/bomb", 10**8)
    member.size = len(data)
    with tarfile.open(archive, "w:gz") as file:
        file.addfile(member, io.BytesIO(data))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**8 + 2**30 - 1))
    message = error_of(config(source=str(archive)), tmp_path / "cub200")
    assert f"{archive}: 'images/bomb' has 100000000 bytes" in message and "free on the disk" in message
    assert list(tmp_path.iterdir()) == [archive]


def test_an_archive_has_a_bound_in_all(tmp_path, monkeypatch):
    archive = tmp_path / "mine.tgz"
    archive.write_bytes(tar())
    monkeypatch.setattr(archives, "MOST_BYTES", sum(map(len, FILES.values())), raising=False)
    config(source=str(archive)).download(tmp_path / "fits")
    monkeypatch.setattr(archives, "MOST_BYTES", archives.MOST_BYTES - 1)
    assert "at most 1" in error_of(config(source=str(archive)), tmp_path / "cub200")


def test_a_member_of_negative_size(tmp_path):
    archive, member = tmp_path / "mine.tar", tarfile.TarInfo("attributes/x")
    member.size = -512
    archive.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert "unsafe member 'attributes/x'" in error_of(config(source=str(archive)), tmp_path / "cub200")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"images": b"", "images/001.Albatross/a.jpg": b""}, "[Errno 20] Not a directory"),
        ({"images/001/a.jpg": b"", "images/001": b""}, "[Errno 21] Is a directory"),
        ({f"images/{'a' * 256}/a.jpg": b""}, "[Errno 36] File name too long"),
        ({f"images/{'a/' * 3000}a.jpg": b""}, "[Errno 36] File name too long"),
        ({"classes.txt": None, "classes.txt/a": b""}, "classes.txt not found; expected images (a folder), images.txt"),
    ],
    ids=["file for a folder", "folder for a file", "long name", "long path", "folder for a table"],
)
def test_names_in_an_archive_that_cannot_be_written(tmp_path, files, message):
    archive = tmp_path / "mine.tar"
    files = {**files, **FILES, **files}  # in this order
    archive.write_bytes(tar({name: content for name, content in files.items() if content is not None}))
    assert message in error_of(config(source=str(archive)), tmp_path / "cub200")
    assert list(tmp_path.iterdir()) == [archive]


@pytest.mark.parametrize("names", [("images", "images/a.jpg"), ("images/a.jpg", "images"), ("images/a", "images/a/b")])
def test_members_that_clash_are_said_with_the_archives_name(tmp_path, names):
    for name, make in (("mine.tar", tar), ("mine.zip", zipped)):
        archive = tmp_path / name
        archive.write_bytes(make(dict.fromkeys(names, b"")))
        message = error_of(config(source=str(archive)), tmp_path / "cub200")
        assert message.startswith(f"{archive}: '{('CUB_200_2011/' + names[1])}' is a file here and a folder there")


def test_a_member_without_a_name(tmp_path):
    archive = tmp_path / "mine.zip"
    archive.write_bytes(zipped(members=[(zipfile.ZipInfo(""), b"evil")]))
    assert f"{archive}: unsafe member ''" in error_of(config(source=str(archive)), tmp_path / "cub200")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("first", [True, False])
def test_a_header_of_many_bytes_is_not_read(tmp_path, kind, first):
    member = tarfile.TarInfo("images/x")
    member.type, member.size = kind, 2**28
    with (tmp_path / "mine.tar").open("wb") as file:
        if not first:
            file.write(tarfile.TarInfo("attributes/x").tobuf())
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2**29)  # a hole
    tracemalloc.start()
    try:
        message = error_of(config(source=str(tmp_path / "mine.tar")), tmp_path / "cub200")
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()
    assert "mine.tar: not a complete tar or zip archive (ValueError: a header of 268435456 bytes, at most" in message


def test_a_member_with_a_nul_in_its_name(tmp_path):
    archive, member = tmp_path / "mine.tar", tarfile.TarInfo()
    member.pax_headers = {"path": "images/a\0b.jpg"}
    archive.write_bytes(tar(members=[member], mode="w"))
    assert str(archive) in error_of(config(source=str(archive)), tmp_path / "cub200")


@pytest.mark.parametrize("given", [True, False], ids=["source", "url"])
def test_a_file_where_the_folder_should_be(server, tmp_path, given):
    archive = tmp_path / "mine.tar"
    archive.write_bytes(server.content)
    cub = config(server, source=str(archive) if given else None)
    assert "mine.tar" in error_of(cub, archive / "cub200")
    assert "mine.tar" in error_of(cub, archive / "data" / "cub200")


def test_a_truncated_download(server, tmp_path):
    server.content = server.content[:-200]
    assert "not a complete tar or zip archive" in error_of(config(server), tmp_path / "cub200")


@pytest.mark.parametrize(("top", "mode"), [("CUB_200_2011/", "w:gz"), ("./CUB_200_2011/", "w"), ("", "w:xz")])
def test_an_archive_that_the_user_has(tmp_path, top, mode):
    archive = tmp_path / "mine.tar"
    archive.write_bytes(tar(top=top, mode=mode))
    config(source=str(archive)).download(tmp_path / "cub200")
    assert contents(tmp_path / "cub200") == FILES
    assert archive.exists()


def place(tmp_path, source):
    """Bring the dataset of a source as a stage does; the folder of its images."""
    return ensure_images(Workspace(tmp_path, tmp_path), config(source=source))


@pytest.mark.parametrize("inside", ["", "CUB_200_2011"])
def test_a_folder_that_the_user_has_is_used_where_it_is(tmp_path, monkeypatch, inside):
    """A relative path starts at the repository, whatever the environment says."""
    for name, content in FILES.items():
        path = tmp_path / "mine" / inside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "elsewhere"))
    assert place(tmp_path, "mine") == tmp_path / "mine" / inside
    assert config(source="mine").catalogue(tmp_path / "mine" / inside).path.tolist() == [
        "images/001.Albatross/a.jpg",
        "images/002.Auklet/b.jpg",
    ]
    assert not (tmp_path / "data").exists()


def test_an_archive_is_unpacked_once_and_again_when_it_is_another_one(tmp_path):
    archive = tmp_path / "mine.zip"
    archive.write_bytes(zipped())
    folder = place(tmp_path, str(archive))
    assert contents(folder) == FILES and folder.parent == tmp_path / "data"
    (folder / "images.txt").write_text("the same folder")
    assert place(tmp_path, "mine.zip") == folder and (folder / "images.txt").read_text() == "the same folder"
    archive.write_bytes(zipped({**FILES, "images/002.Auklet/b.jpg": b"longer than before"}))
    assert contents(place(tmp_path, "mine.zip"))["images/002.Auklet/b.jpg"] == b"longer than before"


@pytest.mark.parametrize("missing", ["images.txt", "classes.txt", "images"])
def test_data_that_is_not_cub(tmp_path, missing):
    files = {name: content for name, content in FILES.items() if name != missing and not name.startswith(missing + "/")}
    archive, folder = tmp_path / "mine.tar", tmp_path / "mine"
    archive.write_bytes(tar(files))
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    expected = f" is not in the layout of CUB-200-2011: {missing} not found; expected images (a folder), "
    assert f"{archive}{expected}" in error_of(config(source=str(archive)), tmp_path / "cub200")
    with pytest.raises(UserError, match=rf"^{folder} is not in the layout") as error:
        config(source="mine").catalogue(folder)
    assert expected in str(error.value)


def test_a_source_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="no-such does not exist; expected an archive or folder of CUB-200-2011"):
        place(tmp_path, "no-such")


# Zip archives


@pytest.mark.parametrize("top", ["CUB_200_2011/", ""])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_zip_archive_is_unpacked_as_a_tar_archive_is(tmp_path, top, compression):
    archive = tmp_path / "mine.bin"
    archive.write_bytes(zipped(top=top, compression=compression))
    config(source=str(archive)).download(tmp_path / "cub200")
    assert contents(tmp_path / "cub200") == FILES


def zip_link(name):
    member = zipfile.ZipInfo(name)
    member.create_system, member.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.mark.parametrize(
    "member",
    ["../evil", "CUB_200_2011/images/../../../evil", "/evil", zip_link("CUB_200_2011/images/evil")],
    ids=["parent", "inner parent", "absolute", "symlink"],
)
def test_an_unsafe_zip_archive_leaves_nothing(tmp_path, member):
    archive = tmp_path / "mine.zip"
    archive.write_bytes(zipped(members=[(member, b"/etc/passwd")]))
    assert "unsafe member" in error_of(config(source=str(archive)), tmp_path / "data" / "cub200")
    assert not list(tmp_path.rglob("evil")) and not list((tmp_path / "data").iterdir())


def flip(content, byte):
    return content[:byte] + bytes([content[byte] ^ 1]) + content[byte + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda c: c[: len(c) // 2], lambda c: c[:-1], lambda c: flip(c, 60)],
    ids=["half", "less a byte", "another byte"],
)
def test_a_damaged_zip_archive_leaves_nothing(tmp_path, damage):
    archive = tmp_path / "mine.zip"
    archive.write_bytes(damage(zipped(top="", compression=zipfile.ZIP_STORED)))
    message = error_of(config(source=str(archive)), tmp_path / "data" / "cub200")
    assert f"{archive}: not a complete tar or zip archive (" in message
    assert not list((tmp_path / "data").iterdir())


def test_a_zip_archive_with_a_password_is_named_as_such(tmp_path):
    archive = tmp_path / "mine.zip"
    content = zipped(top="", compression=zipfile.ZIP_STORED)
    entry = content.index(b"PK\1\2")
    archive.write_bytes(content[:6] + b"\1" + content[7 : entry + 8] + b"\1" + content[entry + 9 :])
    assert "encrypted" in error_of(config(source=str(archive)), tmp_path / "cub200")


def test_a_zip_archive_has_a_bound_in_all(tmp_path, monkeypatch):
    archive = tmp_path / "mine.zip"
    archive.write_bytes(zipped())
    monkeypatch.setattr(archives, "MOST_BYTES", sum(map(len, FILES.values())) - 1)
    assert "at most" in error_of(config(source=str(archive)), tmp_path / "cub200")


# Mirrors, and files of which not everything is known


def test_the_next_mirror_is_tried_when_one_fails(server, tmp_path, capsys):
    right = {"url": server.url, "size": len(server.content), "md5": hashlib.md5(server.content).hexdigest()}
    wrong = [[right | {"url": "http://127.0.0.1:9/a.tgz"}], [right | {"size": 7}], [right | {"sha256": "0" * 64}]]
    cub = Cub200Config(type="cub200", mirrors=[*wrong, [right]])
    cub.download(tmp_path / "cub200")
    assert contents(tmp_path / "cub200") == FILES
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all(line.endswith("trying the next mirror") for line in said)
    assert "Connection refused" in said[0] and "expected 7" in said[1] and "SHA256 is " in said[2]
    assert [path.name for path in tmp_path.iterdir()] == ["cub200"]
    message = error_of(Cub200Config(type="cub200", mirrors=wrong), tmp_path / "again")
    assert all(reason in message for reason in ("Connection refused", "expected 7", "SHA256 is ", "source=PATH"))


def test_a_dataset_is_known_by_its_first_mirror(tmp_path):
    file = {"url": "http://localhost/a.tgz", "size": 7}
    more = Cub200Config(type="cub200", mirrors=[[file], [file | {"url": "http://localhost/b.tgz"}]])
    one, other = (Cub200Config(type="cub200", mirrors=[[file | {"size": size}]]) for size in (7, 8))
    folders = [each.folder(tmp_path, tmp_path) for each in (one, more, other)]
    assert folders[0] == folders[1] != folders[2]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_of_unknown_size_is_complete_when_the_server_says_so(server, tmp_path, ranges):
    server.breaks, server.ranges = [300], ranges
    config(server, size=None, md5=None).download(tmp_path / "cub200")
    assert contents(tmp_path / "cub200") == FILES
    assert server.log == [0, 300]


def test_a_complete_part_of_unknown_size_is_recognised(server, tmp_path):
    part = tmp_path / ".cub200-download" / "CUB_200_2011.tgz.part"
    part.parent.mkdir()
    part.write_bytes(server.content)
    config(server, size=None).download(tmp_path / "cub200")
    assert contents(tmp_path / "cub200") == FILES and server.log == [len(server.content)]
