"""Memory with a descriptor, and what stands for it where a sandbox denies it."""

from __future__ import annotations

import errno
import os

import pytest

from ecdysis_async._system.shared_memory import LastWord, make_memory


def use(descriptor: int) -> bytes:
    try:
        assert not os.get_inheritable(descriptor)
        os.pwrite(descriptor, b"here", 4096)
        return os.pread(descriptor, 4, 4096)
    finally:
        os.close(descriptor)


def test_it_can_be_written_and_read() -> None:
    assert use(make_memory("ecdysis-test")) == b"here"


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS])
def test_a_file_without_a_name_stands_for_it(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def deny(*arguments: object) -> int:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "memfd_create", deny)
    assert use(make_memory("ecdysis-test")) == b"here"


def test_a_lack_of_descriptors_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*arguments: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "memfd_create", deny)
    with pytest.raises(OSError, match="Too many open files"):
        make_memory("ecdysis-test")


def test_the_last_word_is_the_last_complete_one() -> None:
    word = LastWord.make()
    try:
        assert word.read() == b""
        for record in (b"one", b"two, which is longer", b"3"):
            word.write(record)
            assert word.read() == record
        with pytest.raises(OSError, match="Bad file descriptor"):
            LastWord(-1).write(b"four")
        assert LastWord(word.descriptor).read() == b"3"
    finally:
        word.close()
        word.close()
