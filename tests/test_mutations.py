"""The mutations can still be made: each text stands where it is said to stand, and each test is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations import MUTATIONS, PROJECT, Mutation, MutationError

pytestmark = pytest.mark.main_python_only


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[each.what for each in MUTATIONS])
def test_each_mutation_applies_and_names_a_test(mutation: Mutation, tmp_path: Path) -> None:
    copy = tmp_path / "ecdysis_async" / mutation.path
    copy.parent.mkdir(parents=True)
    copy.write_text((PROJECT / "ecdysis_async" / mutation.path).read_text())
    mutation.apply(tmp_path)
    compile(copy.read_text(), str(copy), "exec")
    path, _, name = mutation.test.partition("::")
    assert f"def {name}(" in (PROJECT / path).read_text()
    with pytest.raises(MutationError, match="0 times, and not once"):
        mutation.apply(tmp_path)


def test_a_text_that_stands_there_twice_is_no_place(tmp_path: Path) -> None:
    (tmp_path / "ecdysis_async").mkdir()
    (tmp_path / "ecdysis_async" / "x.py").write_text("a\na\n")
    with pytest.raises(MutationError, match="2 times, and not once"):
        Mutation("x", "x.py", "a", "b", "tests/test_x.py::test").apply(tmp_path)
