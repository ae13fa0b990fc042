from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from activemark_fast.ops.bits import pack_bits, unpack_bits
from activemark_fast.ops.common import Perceptron
from activemark_fast.ops.inject import inject_keyed, inject_keyed_, inject_learned, inject_learned_
from tests.ops.streams import Arguments, Sizes

SIZES = Sizes(3, 7, 20, 9, 11, (1, 4, 6), 2)
SMALL = Sizes(2, 3, 4, 9, 5, (0, 2), 2)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@given(st.integers(0, 3), st.integers(1, 100), st.integers(0, 2**16))
def test_bits_packed_and_unpacked(images: int, bits: int, seed: int) -> None:
    message = torch.randint(0, 2, (images, bits), generator=torch.Generator().manual_seed(seed))
    words = pack_bits(message)
    assert words.shape == (images, -(-bits // 32))
    assert words.dtype == torch.int32
    assert torch.equal(unpack_bits(words, bits), message.int())
    for i in range(images):
        packed = sum((int(word) % 2**32) << (32 * place) for place, word in enumerate(words[i]))
        assert packed == sum(int(bit) << place for place, bit in enumerate(message[i]))
    for dtype in (torch.bool, torch.uint8, torch.float32):
        assert torch.equal(pack_bits(message.to(dtype)), words)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keyed_is_what_it_says(dtype: torch.dtype) -> None:
    given = Arguments(SIZES, dtype)
    stream = given.stream()
    before = stream.clone()
    added = torch.zeros(3, 7, 20, dtype=torch.float64)
    signs = 2 * given.message.double() - 1
    added[:, list(SIZES.slots)] = (0.7 * (signs @ given.directions.double()))[:, None]
    got = inject_keyed(stream, given.directions, given.scale, given.words, given.slots)
    want = torch.cat([before.double() + added, before.double() - added])
    assert torch.equal(stream, before)
    assert got.is_contiguous()
    torch.testing.assert_close(got, want.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert inject_keyed_(stream, given.directions, given.scale, given.words, given.slots) is stream
    assert torch.equal(stream, got[:3])


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_learned_is_the_encoder_on_the_channel(axis: str, dtype: torch.dtype) -> None:
    given = Arguments(SIZES, dtype)
    output, source, encoder = given.stream(), given.stream(), given.encoder(axis)
    before, dim = output.clone(), 1 if axis == "token" else 2
    inputs = torch.cat([source.select(dim, 2).double(), given.message.double()], dim=1)
    hidden = torch.relu(inputs @ encoder.weight1.double().T + encoder.bias1.double())
    want = torch.sigmoid(hidden @ encoder.weight2.double().T + encoder.bias2.double())
    got = inject_learned(output, source, given.words, encoder, 2, axis)
    torch.testing.assert_close(got.select(dim, 2), want.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(output, before)
    restored = got.clone()
    restored.select(dim, 2).copy_(before.select(dim, 2))
    assert torch.equal(restored, before)
    assert inject_learned_(output, source, given.words, encoder, 2, axis) is output
    assert torch.equal(output, got)
    of_itself = inject_learned(source, source, given.words, encoder, 2, axis)
    assert torch.equal(inject_learned_(source, source, given.words, encoder, 2, axis), of_itself)


def test_no_images() -> None:
    given = Arguments(Sizes(0, 7, 20, 9, 11, (1,), 2), torch.float32)
    stream = given.stream()
    assert inject_keyed(stream, given.directions, given.scale, given.words, given.slots).shape == (0, 7, 20)
    encoder = given.encoder("token")
    assert inject_learned(stream, stream, given.words, encoder, 2, "token").shape == (0, 7, 20)


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_gradients(axis: str) -> None:
    given = Arguments(SMALL, torch.float64, codec_dtype=torch.float64)
    stream = given.stream().clone().requires_grad_()
    keyed = (given.directions, given.scale, given.words, given.slots)
    assert torch.autograd.gradcheck(lambda x: inject_keyed(x, *keyed), stream)
    source = given.stream().clone().requires_grad_()
    encoder = [tensor.requires_grad_() for tensor in given.encoder(axis)]
    assert torch.autograd.gradcheck(
        lambda x, y, *layers: inject_learned(x, y, given.words, Perceptron(*layers), 2, axis),
        (stream, source, *encoder),
    )


@pytest.mark.parametrize("device", DEVICES)
def test_registration(device: str) -> None:
    given = Arguments(SIZES, torch.float32, device)
    stream, encoder = given.stream(), given.encoder("channel")
    inject_keyed(stream, given.directions, given.scale, given.words, given.slots)  # registers the operators
    operators = torch.ops.activemark_fast
    keyed = (given.directions, given.scale, given.words, given.slots)
    trained = [tensor.clone().requires_grad_() for tensor in (stream, *encoder)]
    for operator, arguments in (
        (operators.inject_keyed, (trained[0], *keyed)),
        (operators.inject_keyed_, (stream, *keyed)),
        (operators.inject_learned, (trained[0], stream, given.words, *trained[1:], 2, 2)),
        (operators.inject_learned_, (stream, stream.clone(), given.words, *encoder, 2, 2)),
        (operators.inject_learned_backward, (stream, stream, given.words, *encoder, 2, 2)),
    ):
        torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_as_one_graph(device: str) -> None:
    given = Arguments(SIZES, torch.float32, device)
    stream, encoder = given.stream(), given.encoder("token")

    def both(x: torch.Tensor) -> torch.Tensor:
        injected = inject_keyed(x, given.directions, given.scale, given.words, given.slots)
        return inject_learned(injected[:3], x, given.words, encoder, 2, "token") * 2

    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(both, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(stream), both(stream))


def test_autocast_rounds_nothing() -> None:
    given = Arguments(SIZES, torch.float32)
    stream, encoder = given.stream(), given.encoder("token")

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        return (
            inject_keyed(stream, given.directions, given.scale, given.words, given.slots),
            inject_learned(stream, stream, given.words, encoder, 2, "token"),
        )

    before = both()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(x, y) for x, y in zip(both(), before, strict=True))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("stream", [1.0], r"stream: wanted a torch\.Tensor, got list"),
        ("stream", torch.zeros(3, 7, 20, dtype=torch.int32), r"stream: wanted a real .*, got torch\.int32"),
        ("stream", torch.zeros(3, 20), r"stream: wanted the shape \(images, tokens, width\), got \(3, 20\)"),
        ("directions", torch.zeros(9, 19), r"directions: wanted the shape \(any, 20\), got \(9, 19\)"),
        ("directions", torch.zeros(9, 20, requires_grad=True), "directions: wanted .* no gradient"),
        ("scale", torch.zeros(1), r"scale: wanted the shape \(\), got \(1,\)"),
        ("words", torch.zeros(3, 1, dtype=torch.int64), r"words: wanted torch\.int32, got torch\.int64"),
        ("words", torch.zeros(3, 9, dtype=torch.int32), r"words: wanted the shape \(3, 1\), got \(3, 9\)"),
        ("slots", torch.zeros(2), r"slots: wanted torch\.int64, got torch\.float32"),
        ("slots", torch.zeros(0, dtype=torch.int64), r"slots: wanted the shape \(any\), got \(0,\)"),
        (
            "slots",
            torch.zeros(2, dtype=torch.int64, device="meta"),
            "slots: wanted a tensor on cpu, got .*meta",
        ),
    ],
)
def test_errors_of_the_keyed(name: str, value: object, error: str) -> None:
    given = Arguments(SIZES, torch.float32)
    arguments = {
        "stream": given.stream(),
        "directions": given.directions,
        "scale": given.scale,
        "words": given.words,
        "slots": given.slots,
    }
    for function in (inject_keyed, inject_keyed_):
        with pytest.raises((TypeError, ValueError), match=error):
            function(**arguments | {name: value})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("source", torch.zeros(3, 7, 21), r"source: wanted the shape \(3, 7, 20\), got \(3, 7, 21\)"),
        ("axis", "image", "axis: wanted 'token' or 'channel', got 'image'"),
        ("index", 7, "index: wanted 0 to 6, got 7"),
        ("index", -1, "index: wanted 0 to 6, got -1"),
        ("index", 1.0, "index: wanted int, got float"),
    ],
)
def test_errors_of_the_learned(name: str, value: object, error: str) -> None:
    given = Arguments(SIZES, torch.float32)
    arguments = {
        "output": given.stream(),
        "source": given.stream(),
        "words": given.words,
        "encoder": given.encoder("token"),
        "index": 2,
        "axis": "token",
    }
    for function in (inject_learned, inject_learned_):
        with pytest.raises((TypeError, ValueError), match=error):
            function(**arguments | {name: value})
    narrow = given.encoder("token")._replace(weight1=torch.zeros(11, 20))
    with pytest.raises(ValueError, match=r"encoder\.weight1: wanted more than 20 columns, .*, got 20"):
        inject_learned(**arguments | {"encoder": narrow})
    wide = given.encoder("token")._replace(bias2=torch.zeros(3))
    with pytest.raises(ValueError, match=r"encoder\.bias2: wanted the shape \(20\), got \(3,\)"):
        inject_learned(**arguments | {"encoder": wide})


def test_what_cannot_be_done_in_place() -> None:
    given = Arguments(SIZES, torch.float32)
    keyed = (given.directions, given.scale, given.words, given.slots)
    with pytest.raises(ValueError, match="stream: wanted a tensor that needs no gradient"):
        inject_keyed_(given.stream().requires_grad_(), *keyed)
    with pytest.raises(ValueError, match=r"stream: wanted a place in memory for every value, .* expanded"):
        inject_keyed_(torch.zeros(1, 7, 20).expand(3, -1, -1), *keyed)
    encoder = given.encoder("token")
    encoder.bias2.requires_grad_()
    with pytest.raises(ValueError, match="bias2: wanted a tensor that needs no gradient"):
        inject_learned_(given.stream(), given.stream(), given.words, encoder, 2, "token")
    with torch.no_grad():
        inject_learned_(given.stream(), given.stream(), given.words, encoder, 2, "token")


def test_tensors_have_no_negative_strides() -> None:
    # PyTorch refuses them where they would enter, so no kernel can meet one.
    with pytest.raises(ValueError, match="negative"):
        torch.from_numpy(torch.zeros(3, 7, 20).numpy()[::-1])
