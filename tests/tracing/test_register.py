from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from activemark_fast import Key
from activemark_fast.codec.codebooks import SiteMeasure
from activemark_fast.tracing import Change, Register, RegisterError, check_names, draw_biases
from activemark_fast.tracing.codewords import draw_codewords
from activemark_fast.watermark import fingerprint

KEY = Key(b"tests of the register of copies")
NAMES = ["Ada", "bob@example.org", "Müller + Söhne"]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 5))


def register(names: list[str] | None = None) -> Register:
    generator = torch.Generator().manual_seed(1)

    def rows(width: int) -> torch.Tensor:
        return torch.randn(6, width, generator=generator)

    changes = {"0.weight": Change(0, rows(4), rows(5)), "1.weight": Change(6, rows(5), rows(4))}
    measured = SiteMeasure(torch.eye(4, dtype=torch.float64), 1.5)
    reference = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64)
    return Register.make(KEY, NAMES if names is None else names, model(), changes, measured, reference)


def same(a: Register, b: Register) -> bool:
    return (
        (a.names, a.fingerprint, a.tag, a.measured.spread)
        == (b.names, b.fingerprint, b.tag, b.measured.spread)
        and a.changes.keys() == b.changes.keys()
        and all(
            a.changes[n].start == b.changes[n].start
            and torch.equal(a.changes[n].left, b.changes[n].left)
            and torch.equal(a.changes[n].right, b.changes[n].right)
            for n in a.changes
        )
        and torch.equal(a.measured.covariance, b.measured.covariance)
        and torch.equal(a.reference, b.reference)
    )


def test_a_copy_differs_by_the_codeword_and_in_nothing_else() -> None:
    made, original = register(), model()
    marked = copy.deepcopy(original)
    copied = made.copy(KEY, original, "Ada")
    word = draw_codewords(KEY, ["Ada"], draw_biases(KEY, 12))[0]
    for name, parameter in copied.named_parameters():
        expected = marked.get_parameter(name)
        if name in made.changes:
            change = made.changes[name]
            for k in range(6):
                sign = 1 if word[change.start + k] else -1
                expected = expected + sign * torch.outer(change.left[k], change.right[k])
        torch.testing.assert_close(parameter, expected)
    assert fingerprint(original) == fingerprint(marked)  # left as it was
    assert fingerprint(copied) == fingerprint(made.copy(KEY, original, "Ada"))
    assert fingerprint(copied) != fingerprint(made.copy(KEY, original, "bob@example.org"))


def test_later_recipients_leave_earlier_copies_what_they_are() -> None:
    first, original = register(), model()
    later = first.added(["Grace"])
    assert later.names == (*NAMES, "Grace")
    assert first.names == tuple(NAMES)
    assert fingerprint(first.copy(KEY, original, "Ada")) == fingerprint(later.copy(KEY, original, "Ada"))
    assert later.added(["Grace", "Ada"]).names == later.names
    with pytest.raises(ValueError, match="recipients: wanted each name once, got name 4 as number 1"):
        first.added(["ADA"])


def test_copies_need_the_marked_model_its_key_and_a_recipient() -> None:
    made = register()
    with pytest.raises(ValueError, match="model: wanted the marked model"):
        made.copy(KEY, nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 5)), "Ada")
    with pytest.raises(RegisterError, match="key: wanted the key this register was made with"):
        made.copy(Key(b"somebody else's key"), model(), "Ada")
    with pytest.raises(ValueError, match="name: wanted a recipient") as raised:
        made.copy(KEY, model(), "Eve")
    assert "Eve" not in str(raised.value)


def test_the_file_gives_the_register_back(tmp_path: Path) -> None:
    made = register()
    made.save(tmp_path / "register", KEY)
    assert same(Register.load(tmp_path / "register", KEY), made)
    assert (tmp_path / "register").stat().st_mode & 0o777 == 0o600
    made.save(tmp_path / "again", KEY)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "register").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "register"]


def test_the_file_shows_no_name(tmp_path: Path) -> None:
    register().save(tmp_path / "register", KEY)
    content = (tmp_path / "register").read_bytes()
    for text in (*NAMES, "0.weight", register().fingerprint):
        assert text.encode() not in content


def test_another_key_neither_reads_nor_writes(tmp_path: Path) -> None:
    register().save(tmp_path / "register", KEY)
    with pytest.raises(RegisterError, match="the key it was made with"):
        Register.load(tmp_path / "register", Key(b"somebody else's key"))
    with pytest.raises(RegisterError, match="key"):
        register().save(tmp_path / "other", Key(b"somebody else's key"))
    assert not (tmp_path / "other").exists()


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("register") / "register"
    register().save(path, KEY)
    return path.read_bytes()


@settings(max_examples=50)
@given(st.data())
def test_every_changed_byte_is_found_out(
    content: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[index] ^= data.draw(st.integers(1, 255))
    cut = bytes(changed)[: data.draw(st.sampled_from([len(content), index]))]
    path = tmp_path_factory.getbasetemp() / "changed"
    path.write_bytes(cut)
    with pytest.raises(RegisterError):
        Register.load(path, KEY)


def test_a_newer_format_says_so(tmp_path: Path) -> None:
    (tmp_path / "register").write_bytes(b"activemark register 9\nwhatever")
    with pytest.raises(RegisterError, match="register of format 9, this release reads format 1"):
        Register.load(tmp_path / "register", KEY)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("Ada", TypeError, "wanted a sequence of names, got str"),
        (None, TypeError, "wanted a sequence of names, got NoneType"),
        ([7], TypeError, "wanted strings, got int as name 1"),
        ([], ValueError, "wanted at least one name"),
        ([""], ValueError, "1 to 60 characters, got 0 in name 1"),
        (["a" * 61], ValueError, "1 to 60 characters, got 61"),
        (["a/b"], ValueError, "got another character in name 1"),
        (["a\n"], ValueError, "got another character"),
        (["Ada", ".hidden"], ValueError, "got another character in name 2"),
        (["Ada", "ada"], ValueError, "wanted each name once, got name 2 as number 1"),
        (["\ud800"], ValueError, "got another character"),
    ],
)
def test_names_that_are_none(names: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"recipients: .*{message}"):
        check_names(names)  # type: ignore[arg-type]


def test_names_are_composed() -> None:
    assert check_names(["Mu\u0308ller"]) == ("Müller",)


def test_the_repr_shows_no_direction() -> None:
    assert "tensor" not in repr(register())
