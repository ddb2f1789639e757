"""The two parts of `fetch` that must be right to the byte: the journal after any cut, and the zip's directory."""

import io
import itertools
import struct
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset.acquire import journal as journal_module
from pipeline.dataset.acquire.access.remote import LocalFile
from pipeline.dataset.acquire.journal import DONE, HEADER, RECORD, Journal
from pipeline.dataset.acquire.transfer import MemberDamagedError, Reader, plan_requests, unpack
from pipeline.dataset.acquire.zip_directory import check_safe, read_directory
from pipeline.errors import TransientError, UserError


def noted(path, fingerprint=7) -> list[int]:
    journal = Journal(path, fingerprint)
    journal.close()
    return journal.trusted.tolist()


def write(path, numbers, fingerprint=7, barrier_after=()) -> None:
    journal = Journal(path, fingerprint)
    for number in numbers:
        journal.add(number)
        if number in barrier_after:
            journal.barrier()
    journal.close()


def test_a_cut_at_any_byte_loses_no_whole_record(tmp_path):
    path = tmp_path / "journal"
    write(path, range(10, 15))
    data = path.read_bytes()
    first = HEADER.size + RECORD.itemsize  # the header, and the boot's record
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        whole = max(0, length - first) // RECORD.itemsize
        assert noted(path) == list(range(10, 10 + whole))
        write(path, [99])
        assert noted(path) == [*range(10, 10 + whole), 99]


def test_garbage_ends_the_journal_and_another_archive_starts_it_anew(tmp_path):
    path = tmp_path / "journal"
    write(path, range(5))
    with path.open("ab") as file:
        file.write(struct.pack("<3L", DONE, 4242, 0) + b"garbage, and more of it than a record has bytes")
    assert noted(path) == [0, 1, 2, 3, 4]
    assert noted(path, fingerprint=8) == []
    assert noted(path) == []


def test_after_a_boot_only_what_was_flushed_is_believed(tmp_path, monkeypatch):
    path = tmp_path / "journal"
    write(path, range(6), barrier_after={3})
    assert noted(path) == [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr(journal_module, "boot_number", lambda: 12345)
    assert noted(path) == [0, 1, 2, 3]
    write(path, [9])
    assert noted(path) == [0, 1, 2, 3, 9], "what was forgotten stays so in the new boot"


@given(
    st.lists(st.tuples(st.binary(max_size=300), st.booleans(), st.booleans()), min_size=1, max_size=12),
    st.binary(max_size=40),
    st.sampled_from([1 << 31, 50]),
)
def test_directory_agrees_with_zipfile(tmp_path_factory, members, comment, limit):
    """Names, sizes, CRCs and bytes, with and without zip64, for members of all kinds."""
    path = tmp_path_factory.mktemp("zip") / "archive.zip"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile, "ZIP64_LIMIT", limit)
        with zipfile.ZipFile(path, "w") as archive:
            for i, (data, deflated, streamed) in enumerate(members):
                info = zipfile.ZipInfo(f"folder é/{i}")
                info.compress_type = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
                if streamed:
                    info.flag_bits |= 8
                archive.writestr(info, data * 5)
            archive.comment = comment
    directory = read_directory(LocalFile(path))
    check_safe(directory)
    assert len(directory) == len(members)
    reader = Reader(io.BytesIO(path.read_bytes()), 0)
    for i, (data, _, _) in enumerate(members):
        assert directory.name(i) == f"folder é/{i}"
        assert int(directory.entries["crc"][i]) == zlib.crc32(data * 5)
        assert b"".join(unpack(reader, directory, i)) == data * 5


def test_no_flipped_byte_gives_a_wrong_member(tmp_path):
    """Whatever byte of an archive is wrong: all members come out right, or an error says so."""
    rng = np.random.default_rng(0)
    contents = {f"{i}": rng.bytes(50) + b"text " * 20 for i in range(4)}
    path, refused = tmp_path / "archive.zip", 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    good = path.read_bytes()
    for place, flip in itertools.product(range(len(good)), (1, 0x40, 0xFF)):
        data = bytearray(good)
        data[place] ^= flip
        path.write_bytes(data)
        try:
            directory = read_directory(LocalFile(path))
            check_safe(directory)
            found = {}
            for i in range(len(directory)):
                start = int(directory.entries["start"][i])
                found[directory.name(i)] = b"".join(unpack(Reader(io.BytesIO(data[start:]), start), directory, i))
            assert found == contents, f"byte {place} ^ {flip}"
        except (UserError, TransientError, MemberDamagedError):
            refused += 1
    assert refused > 2 * len(good)


def test_requests_join_neighbours_and_leave_out_what_is_whole(tmp_path):
    path = tmp_path / "archive.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(40):
            archive.writestr(f"{i}", bytes(1000))
    directory, everything = read_directory(LocalFile(path)), np.arange(40)
    assert [list(r) for r in plan_requests(directory, everything, everything[:0], 1 << 20)] == [list(range(40))]
    assert [len(r) for r in plan_requests(directory, everything, everything[:0], 10_500)] == [10, 10, 10, 10]
    missing = np.array([0, 1, 2, 4, 5])
    apart = plan_requests(directory, missing, np.setdiff1d(everything, missing), 1 << 20)
    assert [list(r) for r in apart] == [[0, 1, 2], [4, 5]]
    assert [list(r) for r in plan_requests(directory, np.array([0, 5, 39]), everything[:0], 1 << 20)] == [[0, 5], [39]]
