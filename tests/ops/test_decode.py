from __future__ import annotations

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from activemark_fast.ops.bits import unpack_bits
from activemark_fast.ops.common import Perceptron
from activemark_fast.ops.decode import Decoded, decode_keyed, decode_learned
from tests.ops.streams import Arguments, Sizes

SIZES = Sizes(3, 7, 20, 40, 11, (1, 4, 6), 2)
SMALL = Sizes(2, 3, 4, 9, 5, (0, 2), 2)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def check(got: Decoded, logits: torch.Tensor, message: torch.Tensor, sharpness: float) -> None:
    """`logits` in float64."""
    tolerance = 1e-12 if got.logits.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(got.logits.double(), logits, rtol=tolerance, atol=tolerance)
    assert torch.equal(unpack_bits(got.words, message.shape[1]), (got.logits > 0).int())
    assert got.errors.dtype == torch.int32
    assert torch.equal(got.errors, ((got.logits > 0) != message.bool()).sum(dim=1).int())
    loss = binary_cross_entropy_with_logits(sharpness * logits, message.double(), reduction="none").mean(1)
    torch.testing.assert_close(got.loss.double(), loss, rtol=10 * tolerance, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keyed_is_what_it_says(dtype: torch.dtype) -> None:
    given = Arguments(SIZES, dtype)
    tapped = given.stream(2)
    mean = tapped[:, list(SIZES.slots)].double().mean(dim=1)
    logits = (mean[:3] - mean[3:]) @ given.directions.double().T / (2 * given.scale.double())
    codec = (given.directions, given.scale, given.slots)
    got = decode_keyed(tapped, *codec, given.words, 3.0)
    assert got.logits.dtype == (dtype if dtype == torch.float64 else torch.float32)
    check(got, logits, given.message, 3.0)


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_learned_is_the_decoder_on_the_channel(axis: str, dtype: torch.dtype) -> None:
    given = Arguments(SIZES, dtype)
    tapped, decoder = given.stream(), given.decoder(axis)
    channel = tapped.select(1 if axis == "token" else 2, 2).double()
    hidden = torch.relu(channel @ decoder.weight1.double().T + decoder.bias1.double())
    logits = hidden @ decoder.weight2.double().T + decoder.bias2.double()
    check(decode_learned(tapped, decoder, 2, axis, given.words, 2.0), logits, given.message, 2.0)


def test_a_logit_of_0_or_nan_is_an_error() -> None:
    given = Arguments(SIZES, torch.float32)
    tapped = torch.zeros(6, 7, 20)
    tapped[0, 1, 0] = torch.nan
    for words in (given.words, ~given.words):
        got = decode_keyed(tapped, given.directions, given.scale, given.slots, words)
        assert got.errors.tolist() == [40, 40, 40]


def test_a_loss_that_is_nearly_0_keeps_its_digits() -> None:
    given = Arguments(SIZES, torch.float32)
    signs = 2 * given.message.float() - 1
    decoder = Perceptron(torch.zeros(11, 20), torch.zeros(11), torch.zeros(40, 11), 16 * signs[0])
    bias = decoder.bias2.clone().requires_grad_()
    got = decode_learned(given.stream(), decoder._replace(bias2=bias), 2, "token", given.words)
    exact = torch.exp(torch.tensor(-16.0, dtype=torch.float64)).log1p()
    assert got.loss[0].item() == pytest.approx(float(exact), rel=1e-5)
    (gradient,) = torch.autograd.grad(got.loss[0], bias)
    torch.testing.assert_close(gradient, -signs[0] * float(exact) / 40, rtol=1e-5, atol=0)


def test_no_images() -> None:
    given = Arguments(Sizes(0, 7, 20, 40, 11, (1,), 2), torch.float32)
    stream = given.stream()
    for got in (
        decode_keyed(stream, given.directions, given.scale, given.slots, given.words),
        decode_learned(stream, given.decoder("token"), 2, "token", given.words),
    ):
        assert got.logits.shape == (0, 40)
        assert got.errors.shape == (0,)


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_gradients(axis: str) -> None:
    given = Arguments(SMALL, torch.float64, codec_dtype=torch.float64)
    keyed = (given.directions, given.scale, given.slots)
    tapped = given.stream(2).clone().requires_grad_()
    for outputs in (slice(None, None, 3), slice(1), slice(3, 4)):  # logits and loss, then each alone
        assert torch.autograd.gradcheck(
            lambda x, outputs=outputs: decode_keyed(x, *keyed, given.words, 2.0)[outputs], tapped
        )
    stream = given.stream().clone().requires_grad_()
    decoder = [tensor.requires_grad_() for tensor in given.decoder(axis)]
    assert torch.autograd.gradcheck(
        lambda x, *layers: decode_learned(x, Perceptron(*layers), 2, axis, given.words, 2.0)[::3],
        (stream, *decoder),
    )


@pytest.mark.parametrize("device", DEVICES)
def test_registration(device: str) -> None:
    given = Arguments(SIZES, torch.float32, device)
    stream, keyed = given.stream(2).clone().requires_grad_(), (given.directions, given.scale, given.slots)
    decoder = [tensor.requires_grad_() for tensor in given.decoder("channel")]
    decode_keyed(stream, *keyed, given.words)  # registers the operators
    operators = torch.ops.activemark_fast
    once = given.stream().clone().requires_grad_()
    grad = torch.ones(3, 40, device=device)
    for operator, arguments in (
        (operators.decode_keyed, (stream, *keyed, given.words, 2.0)),
        (operators.decode_keyed_backward, (grad, *keyed, 7, torch.bfloat16)),
        (operators.decode_learned, (once, *decoder, 2, 2, given.words, 1.0)),
        (operators.decode_learned_backward, (grad, once.detach(), *(x.detach() for x in decoder), 2, 2)),
    ):
        torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_as_one_graph(device: str) -> None:
    given = Arguments(SIZES, torch.float32, device)
    decoder, keyed = given.decoder("token"), (given.directions, given.scale, given.slots)

    def both(x: torch.Tensor) -> torch.Tensor:
        read = decode_keyed(x, *keyed, given.words)
        learned = decode_learned(x[:3], decoder, 2, "token", given.words)
        return read.loss.sum() + learned.loss.sum() + read.logits.square().sum()

    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(both, fullgraph=True, backend=backend)
    gradients = []
    stream = given.stream(2)
    for function in (both, compiled):
        tapped = stream.clone().requires_grad_()
        function(tapped).backward()
        gradients.append(tapped.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_autocast_rounds_nothing() -> None:
    given = Arguments(SIZES, torch.bfloat16)
    tapped, decoder = given.stream(2), given.decoder("token")

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        return (
            decode_keyed(tapped, given.directions, given.scale, given.slots, given.words).logits,
            decode_learned(tapped[:3], decoder, 2, "token", given.words).logits,
        )

    before = both()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(x, y) for x, y in zip(both(), before, strict=True))


def test_errors() -> None:
    given = Arguments(SIZES, torch.float32)
    keyed = (given.directions, given.scale, given.slots)
    with pytest.raises(ValueError, match="tapped: wanted each image twice, got 3 images"):
        decode_keyed(given.stream(), *keyed, given.words)
    with pytest.raises(ValueError, match=r"expected: wanted the shape \(3, 2\), got \(2, 2\)"):
        decode_keyed(given.stream(2), *keyed, given.words[:2])
    with pytest.raises(TypeError, match=r"expected: wanted torch\.int32, got torch\.uint8"):
        decode_learned(given.stream(), given.decoder("token"), 2, "token", given.message)
    with pytest.raises(ValueError, match=r"decoder\.weight1: wanted the shape \(any, 7\), got \(11, 20\)"):
        decode_learned(given.stream(), given.decoder("token"), 2, "channel", given.words)
    with pytest.raises(ValueError, match="index: wanted 0 to 6, got 7"):
        decode_learned(given.stream(), given.decoder("token"), 7, "token", given.words)
    with pytest.raises(IndexError):
        decode_keyed(given.stream(2), given.directions, given.scale, torch.tensor([7]), given.words)
