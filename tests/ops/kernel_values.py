"""Values and gradients of the Triton kernels, through the ops, against PyTorch in float64.

`test_kernels.py` runs this file: in Triton's interpreter, in a process of its own, and on a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

from activemark_fast.ops.bits import unpack_bits  # noqa: E402
from activemark_fast.ops.common import KERNEL_DTYPES, Perceptron  # noqa: E402
from activemark_fast.ops.decode import Decoded, decode_keyed, decode_learned  # noqa: E402
from activemark_fast.ops.inject import (  # noqa: E402
    inject_keyed,
    inject_keyed_,
    inject_learned,
    inject_learned_,
)
from tests.ops.streams import LARGE, SIZES, Arguments, Sizes  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
KEYED = [size for size in SIZES if size.images < 64]
SPLIT = [
    Sizes(1, 66, 129, 200, 1, tuple(range(65)), 0),
    Sizes(2, 72, 1091, 32, 1, tuple(range(5, 72)), 0),
    Sizes(2, 9, 64, 600, 1, (3, 3, 8), 0),
]
"""Images of one part and of many, more slots than a block has, more bits than four warps take."""
EVERY_KEYED = pytest.mark.parametrize("sizes", KEYED, ids=lambda s: f"{s.images}x{s.width}")
EVERY_SIZE = pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"{s.images}x{s.tokens}x{s.width}")
EVERY_DTYPE = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
EVERY_AXIS = pytest.mark.parametrize("axis", ["token", "channel"])
launches: list[str] = []


@pytest.fixture(autouse=True)
def _kernels_on_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor a launcher makes starts as NaN or 2^31 - 1. In the interpreter, kernels take the CPU's."""
    import activemark_fast.ops.decode.kernel
    import activemark_fast.ops.inject.kernel
    import activemark_fast.ops.kernels
    import activemark_fast.ops.registry

    def wrap_triton(kernel):
        launches.append(kernel.fn.__name__)
        return kernel

    def runs_in_triton(stream: Tensor) -> bool:
        return stream.dtype in KERNEL_DTYPES

    ops = activemark_fast.ops
    for module in (ops.kernels, ops.inject.kernel, ops.decode.kernel):
        monkeypatch.setattr(module, "wrap_triton", wrap_triton)
    monkeypatch.setattr(ops.registry, "runs_in_triton", runs_in_triton)
    empty = torch.empty

    def poisoned(*shape, **kwargs):
        made = empty(*shape, **kwargs)
        return made.fill_(torch.nan if made.is_floating_point() else 2**31 - 1)

    monkeypatch.setattr(torch, "empty", poisoned)
    launches.clear()
    torch.manual_seed(0)


def close(got: Tensor, want: Tensor, dtype: torch.dtype, rows: bool = False) -> None:
    """`want` in float64; the largest error against the largest value, with `rows` each for itself."""
    assert got.shape == want.shape
    assert want.dtype == torch.float64
    error, size = (got.double() - want).abs(), want.abs()
    if rows:
        assert error.dim() == 1
    else:
        error, size = error.max(), size.max()
    assert bool((error <= TOLERANCE[dtype] * size).all()), (error / size).max()


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def double(tensor: Tensor) -> Tensor:
    return leaf(tensor.double())


@EVERY_KEYED
@EVERY_DTYPE
def test_inject_keyed(sizes: Sizes, dtype: torch.dtype) -> None:
    given = Arguments(sizes, dtype, DEVICE)
    stream = leaf(given.stream())
    exact = double(stream)
    codec = (given.directions, given.scale, given.words, given.slots)
    got = inject_keyed(stream, *codec)
    want = inject_keyed(exact, *codec)
    assert launches == ["inject_keyed_kernel"]
    assert got.dtype == dtype
    close(got, want, dtype)
    grad = torch.randn_like(got)
    got.backward(grad)
    want.backward(grad.double())
    assert stream.grad is not None
    assert exact.grad is not None
    close(stream.grad, exact.grad, dtype)


@pytest.mark.parametrize("sizes", SIZES[:3], ids=lambda s: f"{s.images}x{s.width}")
@EVERY_DTYPE
def test_inject_keyed_inplace(sizes: Sizes, dtype: torch.dtype) -> None:
    given = Arguments(sizes, dtype, DEVICE)
    stream = given.stream()
    want = inject_keyed_(stream.double(), given.directions, given.scale, given.words, given.slots)
    rest = torch.ones(sizes.tokens, dtype=torch.bool, device=DEVICE)
    rest[given.slots] = False
    before = stream.clone()
    got = inject_keyed_(stream, given.directions, given.scale, given.words, given.slots)
    assert launches == ["inject_keyed_inplace_kernel"]
    assert got is stream
    close(got, want, dtype)
    assert torch.equal(got[:, rest], before[:, rest])


@EVERY_SIZE
@EVERY_DTYPE
@EVERY_AXIS
def test_inject_learned(sizes: Sizes, dtype: torch.dtype, axis: str) -> None:
    given = Arguments(sizes, dtype, DEVICE)
    output, source, encoder = leaf(given.stream()), leaf(given.stream()), given.encoder(axis)
    weights = Perceptron(*map(leaf, encoder))
    exact = [double(output), double(source), *map(double, encoder)]
    got = inject_learned(output, source, given.words, weights, sizes.index, axis)
    want = inject_learned(exact[0], exact[1], given.words, Perceptron(*exact[2:]), sizes.index, axis)
    assert launches == ["first_layer_kernel", "encode_kernel"]
    assert got.dtype == dtype
    dim = 1 if axis == "token" else 2
    close(got.select(dim, sizes.index), want.select(dim, sizes.index), dtype)
    rest = [i for i in range(got.shape[dim]) if i != sizes.index]
    if rest:
        chosen = torch.tensor(rest, device=DEVICE)
        assert torch.equal(got.index_select(dim, chosen), output.index_select(dim, chosen))
    grad = torch.randn_like(got)
    got.backward(grad)
    want.backward(grad.double())
    for tensor, double_tensor in zip((output, source, *weights), exact, strict=True):
        assert tensor.grad is not None
        assert double_tensor.grad is not None
        close(tensor.grad, double_tensor.grad, dtype)


@EVERY_DTYPE
@EVERY_AXIS
def test_inject_learned_inplace(dtype: torch.dtype, axis: str) -> None:
    sizes = SIZES[1]
    given = Arguments(sizes, dtype, DEVICE)
    output, encoder = given.stream(), given.encoder(axis)
    want = inject_learned(output, output, given.words, encoder, sizes.index, axis)
    got = inject_learned_(output, output, given.words, encoder, sizes.index, axis)
    assert got is output
    assert torch.equal(got, want)


def check_decoded(
    got: Decoded, want: Decoded, message: Tensor, dtype: torch.dtype, sharpness: float
) -> Tensor:
    """The loss of which gradients are taken: logits and loss take part with random weights."""
    assert got.logits.dtype == torch.float32
    close(got.logits, want.logits, dtype)
    bits = message.shape[1]
    clear = want.logits.abs() > TOLERANCE[dtype] * want.logits.abs().max()
    read = unpack_bits(got.words, bits)
    assert torch.equal(read[clear], (want.logits > 0).int()[clear])
    assert torch.equal(read, (got.logits > 0).int())
    assert got.errors.dtype == torch.int32
    assert torch.equal(got.errors, (read != message).sum(1).int())
    y = sharpness * (2 * message.double() - 1) * got.logits.detach().double()
    close(got.loss.detach(), torch.nn.functional.softplus(-y).mean(1), torch.float32, rows=True)
    return got.loss


@EVERY_KEYED
@EVERY_DTYPE
def test_decode_keyed(sizes: Sizes, dtype: torch.dtype) -> None:
    given = Arguments(sizes, dtype, DEVICE)
    tapped = leaf(given.stream(2))
    exact = double(tapped)
    rest = (given.directions, given.scale, given.slots, given.words, 3.0)
    got, want = decode_keyed(tapped, *rest), decode_keyed(exact, *rest)
    forward = ["decode_keyed_partial_kernel", "decode_keyed_reduce_kernel"]
    assert launches == forward
    check_decoded(got, want, given.message, dtype, 3.0)
    check_gradients(got, want, [tapped], [exact], dtype)
    assert launches == forward + 2 * ["decode_keyed_backward_kernel"]


@pytest.mark.parametrize("sizes", SPLIT, ids=lambda s: f"{s.images}x{s.width}x{s.bits}x{len(s.slots)}")
@EVERY_DTYPE
def test_decode_keyed_in_parts(sizes: Sizes, dtype: torch.dtype) -> None:
    given = Arguments(sizes, dtype, DEVICE)
    plus, minus = given.stream(), given.stream()
    rest = (given.directions, given.scale, given.slots)

    def decode(first: Tensor, second: Tensor, words: Tensor = given.words) -> Decoded:
        return decode_keyed(torch.cat([first, second]), *rest, words)

    got = decode(plus, minus)
    want = decode(plus.double(), minus.double())
    check_decoded(got, want, given.message, dtype, 1.0)
    assert torch.equal(decode(minus, plus).logits, -got.logits)
    assert torch.equal(decode(plus, plus).logits, torch.zeros_like(got.logits))
    for i in range(sizes.images):
        alone = decode(plus[i : i + 1], minus[i : i + 1], given.words[i : i + 1].clone())
        assert torch.equal(alone.logits[0], got.logits[i])
    channels_apart = torch.cat([plus, minus]).transpose(1, 2).contiguous().transpose(1, 2)
    assert channels_apart.stride(2) == sizes.tokens
    close(decode_keyed(channels_apart, *rest, given.words).logits, want.logits, dtype)


@EVERY_SIZE
@EVERY_DTYPE
@EVERY_AXIS
def test_decode_learned(sizes: Sizes, dtype: torch.dtype, axis: str) -> None:
    given = Arguments(sizes, dtype, DEVICE)
    tapped, decoder = leaf(given.stream()), given.decoder(axis)
    weights = Perceptron(*map(leaf, decoder))
    exact = [double(tapped), *map(double, decoder)]
    got = decode_learned(tapped, weights, sizes.index, axis, given.words, 2.0)
    want = decode_learned(exact[0], Perceptron(*exact[1:]), sizes.index, axis, given.words, 2.0)
    assert launches == ["first_layer_kernel", "decode_learned_kernel"]
    check_decoded(got, want, given.message, dtype, 2.0)
    check_gradients(got, want, [tapped, *weights], exact, dtype)


def check_gradients(
    got: Decoded, want: Decoded, tensors: list[Tensor], exact: list[Tensor], dtype: torch.dtype
) -> None:
    for outputs in ((got.logits, want.logits), (got.loss, want.loss)):
        grad = torch.randn_like(outputs[1])
        ours = torch.autograd.grad(outputs[0], tensors, grad.float(), retain_graph=True)
        theirs = torch.autograd.grad(outputs[1], exact, grad.float().double(), retain_graph=True)
        for tensor, ours_grad, theirs_grad in zip(tensors, ours, theirs, strict=True):
            assert ours_grad.dtype == tensor.dtype
            close(ours_grad, theirs_grad, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest(dtype: torch.dtype) -> None:
    given = Arguments(LARGE, dtype, DEVICE)
    stream = given.stream()
    codec = (given.directions, given.scale)
    got = inject_keyed(stream, *codec, given.words, given.slots)
    want = inject_keyed(stream.double(), *codec, given.words, given.slots)
    close(got, want, dtype)
    decoded, exact = (decode_keyed(x, *codec, given.slots, given.words) for x in (got, got.double()))
    check_decoded(decoded, exact, given.message, dtype, 1.0)
    encoder = given.encoder("token")
    got = inject_learned(stream, stream, given.words, encoder, LARGE.index, "token")
    want = inject_learned(stream.double(), stream.double(), given.words, encoder, LARGE.index, "token")
    close(got[:, LARGE.index], want[:, LARGE.index], dtype)


def test_a_logit_of_0_or_nan_is_an_error_and_cancelling_passes_give_exactly_0() -> None:
    given = Arguments(SIZES[1], torch.float32, DEVICE)
    tapped = given.stream()
    twice = torch.cat([tapped, tapped])
    rest = (given.directions, given.scale, given.slots)
    for message in (given.words, ~given.words, torch.zeros_like(given.words)):
        decoded = decode_keyed(twice, *rest, message)
        assert torch.equal(decoded.logits, torch.zeros_like(decoded.logits))
        assert torch.equal(decoded.words, torch.zeros_like(decoded.words))
        assert decoded.errors.tolist() == [given.sizes.bits] * given.sizes.images
    other = given.stream()
    forth = decode_keyed(torch.cat([tapped, other]), *rest, given.words).logits
    assert torch.equal(decode_keyed(torch.cat([other, tapped]), *rest, given.words).logits, -forth)
    twice[0, given.slots[0], 3] = torch.nan
    decoded = decode_keyed(twice, *rest, given.words)
    assert bool(decoded.logits[0].isnan().all())
    assert not bool(decoded.logits[1:].isnan().any())
    assert int(decoded.errors[0]) == given.sizes.bits


@EVERY_DTYPE
def test_a_slot_that_is_no_token_is_seen(dtype: torch.dtype) -> None:
    given = Arguments(SIZES[1], dtype, DEVICE)
    for bad in (-1, given.sizes.tokens, 2**40):
        slots = torch.tensor([1, bad], device=DEVICE)
        decoded = decode_keyed(given.stream(2), given.directions, given.scale, slots, given.words)
        assert bool(decoded.logits.isnan().all())
        stream = given.stream()
        injected = inject_keyed(stream, given.directions, given.scale, given.words, slots)[: len(stream)]
        assert (injected != stream).any(dim=2).any(dim=0).nonzero().tolist() == [[1]]
        inject_keyed_(stream, given.directions, given.scale, given.words, slots)
        assert torch.equal(stream, injected)


@EVERY_DTYPE
def test_weights_and_directions_of_every_dtype(dtype: torch.dtype) -> None:
    sizes = SIZES[1]
    given = Arguments(sizes, torch.float32, DEVICE, codec_dtype=dtype)
    stream = given.stream()
    encoder, decoder = given.encoder("token"), given.decoder("channel")
    for got, want in [
        [
            inject_keyed(x, given.directions, given.scale, given.words, given.slots)
            for x in (stream, stream.double())
        ],
        [inject_learned(x, x, given.words, encoder, 3, "token") for x in (stream, stream.double())],
        [decode_learned(x, decoder, 3, "channel", given.words).logits for x in (stream, stream.double())],
    ]:
        close(got, want, torch.float32)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs one program after another")
@EVERY_DTYPE
def test_repeated_runs_are_equal(dtype: torch.dtype) -> None:
    sizes = Sizes(200, 257, 1024, 32, 1024, tuple(range(1, 257, 4)), 77)
    given = Arguments(sizes, dtype, DEVICE)
    stream, encoder, decoder = given.stream(), given.encoder("token"), given.decoder("token")
    keyed = (given.directions, given.scale)

    def run() -> list[Tensor]:
        injected = inject_keyed(stream, *keyed, given.words, given.slots)
        learned = inject_learned(stream, stream, given.words, encoder, sizes.index, "token")
        return [
            injected,
            learned,
            *decode_keyed(injected, *keyed, given.slots, given.words),
            *decode_learned(learned, decoder, sizes.index, "token", given.words),
        ]

    first = run()
    for _ in range(20):
        for again, once in zip(run(), first, strict=True):
            assert torch.equal(again, once)
