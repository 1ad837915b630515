"""Files are found and opened alike on disk, in memory and on an S3 server; what can't be reached says so soon."""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.log import files
from mmoe_rec.log.files import find_files, open_file, parse_path_columns, source_includes

TABLE = pa.table({"x": [1, 2, 3]})
VISIBLE = ["a-b.parquet", "a/0.parquet", "a/b/1.parquet", "day=__HIVE_DEFAULT_PARTITION__/2.parquet", "c.parquet"]
HIDDEN = ["_metadata.parquet", ".c.parquet", "_temporary/0/3.parquet", ".log.1a2b.tmp/4.parquet", "a/readme.txt"]


def _write(uri: str, table: pa.Table = TABLE) -> None:
    with fsspec.open(uri, "wb", auto_mkdir=True) as handle:
        pq.write_table(table, handle)


def _names(source: str, base: str) -> list[str]:
    return [file.uri.partition(base)[2].lstrip("/") for file in find_files(source)]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Address of an S3 server."""
    from moto.server import ThreadedMotoServer

    threaded = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    threaded.start()
    host, port = threaded.get_host_and_port()
    yield f"http://{host}:{port}"
    threaded.stop()


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An AWS environment of the test's own."""
    import s3fs

    monkeypatch.setattr(files, "_READ_SECONDS", 240)  # a busy machine is no silent one
    for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_CA_BUNDLE"]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nowhere")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    s3fs.S3FileSystem.clear_instance_cache()
    yield monkeypatch
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(server: str, aws: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of an empty bucket."""
    import s3fs

    aws.setenv("AWS_ENDPOINT_URL", server)
    system = s3fs.S3FileSystem()
    system.mkdir("bucket")
    yield "s3://bucket"
    system.invalidate_cache()
    system.rm("bucket", recursive=True)


@pytest.fixture(params=["disk", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder to write to."""
    if request.param == "s3":
        yield f"{request.getfixturevalue('bucket')}/deep/log"
        return
    yield str(tmp_path / "log") if request.param == "disk" else "memory://deep/log"
    fsspec.filesystem("memory").store.clear()


def test_what_is_found_is_the_same_everywhere(place):
    for name in VISIBLE + HIDDEN:
        _write(f"{place}/{name}")
    assert _names(place, "/log") == sorted(VISIBLE)
    assert _names(f"{place}/", "/log") == sorted(VISIBLE)
    assert _names(f"{place}/**/*.parquet", "/log") == sorted(VISIBLE)
    assert _names(f"{place}/*.parquet", "/log") == ["a-b.parquet", "c.parquet"]
    assert _names(f"{place}/[ad]*", "/log") == sorted(set(VISIBLE) - {"c.parquet"})
    assert _names(f"{place}/_*.parquet", "/log") == ["_metadata.parquet"]
    assert _names(f"{place}/_metadata.parquet", "/log") == ["_metadata.parquet"]
    assert _names(f"{place}/a/b/1.parquet", "/log") == ["a/b/1.parquet"]
    for file in find_files(place):
        with open_file(file.uri) as handle:
            assert handle.size() == file.bytes
            assert pq.read_table(handle).equals(TABLE)


def test_a_file_that_is_written_again_has_another_version(place):
    _write(f"{place}/0.parquet")
    _write(f"{place}/1.parquet")
    before = find_files(place)
    assert find_files(place) == before
    _write(f"{place}/1.parquet", pa.table({"x": [1, 2, 4]}))
    after = find_files(place)
    assert after[0] == before[0]
    assert after[1].bytes == before[1].bytes
    assert after[1].version != before[1].version


def test_nothing_there(place):
    _write(f"{place}/readme.txt")
    with pytest.raises(UserError, match=r"the log '.*/log' contains no \*.parquet file. Set data.log to a folder"):
        find_files(place)
    for missing in ("other", "*.parquet", "other/*.parquet", "0.parquet"):
        with pytest.raises(UserError, match=r"the log '.*' does not exist. Set data.events.x.path to a folder"):
            find_files(f"{place}/{missing}", "data.events.x.path")


@pytest.mark.parametrize("given", ["log", "log/*.csv", "log/a 'b.csv", "log/**/*.csv"])
def test_csv_files_get_the_line_that_converts_them(tmp_path, given):
    (tmp_path / "log").mkdir()
    text = 'user,time,seen,note\n1,2024-01-31 10:00:00,,"x, 2024-01-31"\n2,2024-02-01 11:00:00,2024-02-02,y\n'
    for name in ("a 'b", "c"):
        (tmp_path / "log" / f"{name}.csv").write_text(text)
    with pytest.raises(UserError) as caught:
        find_files(f"{tmp_path}/{given}", "--input")
    message = str(caught.value)
    first = f"{tmp_path}/log/a 'b.csv"
    assert message.startswith(
        f"'{first}' is a CSV file, but --input needs Parquet. Convert it in Python with pyarrow: "
    )
    exec(message.split("`")[1], {})
    assert pq.read_table(first.replace(".csv", ".parquet"))["user"].to_pylist() == [1, 2]
    assert _names(str(tmp_path / "log"), "/log") == ["a 'b.parquet"], "CSV files beside Parquet files do no harm"


def test_file_addresses_are_local_paths(tmp_path):
    _write(str(tmp_path / "0.parquet"))
    assert find_files(f"file://{tmp_path}") == find_files(str(tmp_path))


def test_values_in_paths():
    assert parse_path_columns("s3://b/log/day=7/brand=a%2Fb%20c/x=__HIVE_DEFAULT_PARTITION__/q=1.parquet") == {
        "day": "7",
        "brand": "a/b c",
        "x": None,
    }
    assert parse_path_columns("log/a=b=c/d=/0.parquet") == {"a": "b=c", "d": ""}


# What can't be reached


@pytest.mark.parametrize("uri", ["s3://nowhere-at-all", "s3://nowhere-at-all/log", "s3://nowhere-at-all/log/*"])
def test_a_missing_bucket(bucket, uri):
    with pytest.raises(UserError) as caught:
        find_files(uri)
    assert str(caught.value).startswith(f"the log '{uri}' does not exist. Set data.log")


def test_an_unreachable_bucket_is_reported_as_such(aws):
    aws.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    message = "'s3://bucket/log' can't be reached .*127.0.0.1:1.*. Check the URI, the cred"
    with pytest.raises(UserError, match=message):
        find_files("s3://bucket/log")


def test_a_bucket_that_never_answers(aws):
    aws.setattr(files, "_READ_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        aws.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(UserError, match=r"'s3://bucket/log' can't be reached .*. Check the URI"):
            find_files("s3://bucket/log")


def test_the_users_settings_of_retries_stay(monkeypatch):
    from fsspec.config import conf

    assert files._s3_defaults()["config_kwargs"]["retries"]["total_max_attempts"] == 3
    with monkeypatch.context() as patch:
        patch.setenv("AWS_MAX_ATTEMPTS", "9")
        assert files._s3_defaults() == {}
    monkeypatch.setitem(conf, "s3", {"config_kwargs": {"signature_version": "x"}})
    assert files._s3_defaults() == {}


def test_no_credentials(server, aws):
    aws.setenv("AWS_ENDPOINT_URL", server)
    aws.delenv("AWS_ACCESS_KEY_ID")
    aws.delenv("AWS_SECRET_ACCESS_KEY")
    message = r"'s3://bucket/log' can't be reached \(NoCredentialsError: .*. Check the URI, the credentials"
    with pytest.raises(UserError, match=message):
        find_files("s3://bucket/log")


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package(monkeypatch, protocol, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    with pytest.raises(
        UserError, match=rf"'{protocol}://bucket/log' needs a Python package that is not installed: .*{package}"
    ):
        find_files(f"{protocol}://bucket/log")


def test_a_file_that_is_gone_and_a_server_that_is_gone_differ(bucket, aws):
    _write(f"{bucket}/0.parquet")
    with pytest.raises(FileNotFoundError), open_file(f"{bucket}/1.parquet"):
        pass
    with aws.context() as elsewhere:
        elsewhere.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        with pytest.raises(UserError, match=r"'s3://bucket/0.parquet' can't be reached"):
            open_file(f"{bucket}/0.parquet").__enter__()


def _found(source: str | Path) -> list[str]:
    return [file.uri for file in find_files(str(source))]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log with a folder of its own, one that is a link, and a link to a file."""
    log, away = tmp_path / "log", tmp_path / "away"
    for file in (log / "a/0.parquet", away / "deep/1.parquet", away / "2.parquet", tmp_path / "other/3.parquet"):
        _write(str(file))
    (log / "b").symlink_to("../away")
    (log / "a/3.parquet").symlink_to(tmp_path / "other/3.parquet")
    return log


def test_links_are_followed(log):
    everything = [str(log / name) for name in ("a/0.parquet", "a/3.parquet", "b/2.parquet", "b/deep/1.parquet")]
    assert _found(log) == everything
    assert _found(log / "*") == everything
    assert _found(log / "**/*.parquet") == everything
    assert _found(log / "**") == everything
    assert _found(log / "b") == everything[2:]
    assert _found(log / "*/*.parquet") == everything[:3]
    assert _found(log / "[b]/d*/*") == everything[3:]


@pytest.mark.parametrize("pattern", ["", "**/*.parquet", "**"])
@pytest.mark.parametrize("target", ["..", "../..", "."])
def test_a_circle_of_links_is_reported(log, pattern, target):
    (log / "a/again").symlink_to(target)
    with pytest.raises(UserError, match=r"a/again.*' is a link to a folder that contains it. Remove the"):
        find_files(str(log / pattern))


def test_a_folder_that_is_there_twice_is_reported(log):
    (log / "latest").symlink_to("a")
    with pytest.raises(UserError, match=r"'.*/log/a/0.parquet' and '.*/latest/0.parquet' are links to the same file"):
        find_files(str(log))
    assert len(_found(log / "[ab]")) == 4


@pytest.fixture
def forbid(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a folder one that may not be read, also for root."""
    scandir = os.scandir

    def forbid(folder: Path) -> None:
        def refuse(path: str | Path) -> Any:
            if Path(path) == folder:
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)

    return forbid


@pytest.mark.parametrize("pattern", ["", "*", "*/*.parquet", "**/*.parquet", "**"])
def test_a_folder_that_may_not_be_read_is_reported(log, forbid, pattern):
    forbid(log / "b")
    with pytest.raises(UserError, match=r"'.*/log/b' can't be read \(Permission denied\) and may contain files of"):
        find_files(str(log / pattern))
    assert len(_found(log / "a")) == 2
    (log / "b").rename(log / ".b")
    forbid(log / ".b")  # hidden: nothing of it is wanted
    assert len(_found(log)) == 2


_INSIDE = [
    ("log", "log/work"),
    ("log", "log/deep/work"),
    ("log", "log"),
    ("log", "log/../log/work"),
    ("log/../log/", "log/work"),
    ("log", "log/linked/work"),
    ("log/**/*.parquet", "log/work"),
    ("log/*", "log/work"),
    ("*", "work"),
    ("work/*/*/*/*.parquet", "work"),
    ("work/features", "work"),
    ("work/features/encoded/train", "work"),
]
_SEPARATE = [
    ("log", "work"),
    ("log", "log-work"),
    ("log", "log/.work"),  # hidden
    ("log/*.parquet", "log/work"),
    ("log/day=*/*.parquet", "log/work"),
    ("work/log", "work"),
    ("*/log/*.parquet", "work"),
    ("log/0.parquet", "log"),
]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(("source", "work", "inside"), [(*e, True) for e in _INSIDE] + [(*e, False) for e in _SEPARATE])
def test_whether_a_log_takes_in_what_is_not_there_yet(tmp_path, monkeypatch, source, work, inside, there):
    for name in ("log/0", "log/day=1/1", "elsewhere/2"):
        _write(f"{tmp_path}/{name}.parquet")
    (tmp_path / "log/linked").symlink_to("../elsewhere")
    monkeypatch.chdir(tmp_path)
    written = Path(work) / "features/encoded/train/part-00000.parquet"
    if there:
        _write(str(written))
    for item in (source, str(tmp_path / source)):
        assert source_includes(item, [written]) == source_includes(item, [tmp_path / written]) == inside
