from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from activemark_fast.codec import CODECS, LearnedCodec
from activemark_fast.key import Key
from activemark_fast.site import Site

KEY, OTHER = Key(b"k" * 32), Key(b"o" * 32)
SITE = Site(1, (2, 4), 17, 1, 48, (0, 5), (3, 40))
BITS = 12


def stream(batch: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(batch, SITE.num_tokens, SITE.width, generator=torch.Generator().manual_seed(seed))


def messages(batch: int) -> Tensor:
    drawn = torch.randint(0, 2, (batch, BITS), generator=torch.Generator().manual_seed(0))
    return drawn.to(torch.uint8)


def codec(axis: str, key: Key = KEY) -> LearnedCodec:
    return LearnedCodec.create(key, SITE, BITS, stream(), axis)


def channel_of(streams: Tensor, mark: LearnedCodec) -> Tensor:
    return streams.select(1 if mark.axis == "token" else 2, mark.index)


AXES = pytest.mark.parametrize("axis", ["token", "channel"])


@AXES
def test_everything_follows_from_the_key(axis: str) -> None:
    torch.manual_seed(1)
    ours = codec(axis)
    torch.manual_seed(2)
    again, theirs = codec(axis), codec(axis, OTHER)
    assert ours.index == again.index
    for name, tensor in ours.state().items():
        assert torch.equal(tensor, again.state()[name])
        if name == "original_rate":
            continue
        assert not torch.equal(tensor, theirs.state()[name])
    first = ours.encoder[0]
    assert isinstance(first, torch.nn.Linear)
    bound = first.in_features**-0.5
    assert 0.9 * bound < first.weight.abs().max() <= bound


def test_index_avoids_massive_activations() -> None:
    few = replace(SITE, massive_tokens=tuple(range(1, 16)), massive_channels=tuple(range(47)))
    for byte in range(10):
        key = Key(bytes([byte]) * 16)
        assert LearnedCodec.create(key, few, BITS, stream(), "token").index == 16
        assert LearnedCodec.create(key, few, BITS, stream(), "channel").index == 47
    found = {
        LearnedCodec.create(Key(bytes([b]) * 16), SITE, BITS, stream(), "token").index for b in range(40)
    }
    assert len(found) > 5
    assert found <= set(SITE.patch_tokens)


@AXES
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inject_overwrites_one_channel_with_a_sigmoid(axis: str, batch: int, dtype: torch.dtype) -> None:
    mark, output, source = codec(axis), stream(batch).to(dtype), stream(batch, seed=1).to(dtype)
    before = output.clone()
    injected = mark.inject(output, source, messages(batch))
    assert injected.shape == output.shape
    assert injected.dtype == dtype
    assert torch.equal(output, before)
    written = channel_of(injected, mark)
    assert torch.all((written > 0) & (written < 1))
    restored = injected.detach().clone()
    channel_of(restored, mark).copy_(channel_of(output, mark))
    assert torch.equal(restored, output)


@AXES
def test_what_is_written_depends_on_source_and_message_only(axis: str) -> None:
    mark, source = codec(axis), stream(4, seed=1)
    written = channel_of(mark.inject(stream(4), source, messages(4)), mark)
    assert torch.equal(channel_of(mark.inject(stream(4, seed=2), source, messages(4)), mark), written)
    assert not torch.equal(channel_of(mark.inject(stream(4), source, 1 - messages(4)), mark), written)
    assert not torch.equal(channel_of(mark.inject(stream(4), source + 1, messages(4)), mark), written)


@AXES
def test_gradient_reaches_encoder_decoder_and_source(axis: str) -> None:
    mark, output, source = codec(axis), stream(3), stream(3, seed=1).requires_grad_()
    message = messages(3)
    read = mark.decode(mark.inject(output, source, message), SITE.taps[-1], message)
    logits = read.logits
    assert logits.shape == (3, BITS)
    assert logits.dtype == torch.float32
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, message.float(), reduction="none")
    torch.testing.assert_close(read.loss, loss.mean(dim=1))
    assert torch.equal(read.errors, ((logits > 0) != message.bool()).sum(dim=1, dtype=torch.int32))
    logits.square().sum().backward()
    for name, parameter in mark.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert source.grad is not None
    assert channel_of(source.grad, mark).abs().sum() > 0
    rest = source.grad.clone()
    channel_of(rest, mark).zero_()
    assert rest.abs().sum() == 0


@AXES
def test_state_round_trip(axis: str) -> None:
    mark = codec(axis)
    with torch.no_grad():
        for parameter in mark.parameters():
            parameter.add_(0.01)
    restored = CODECS["learned"].restore(KEY, SITE, BITS, mark.state(), axis)
    injected = mark.inject(stream(), stream(seed=1), messages(5))
    assert torch.equal(restored.inject(stream(), stream(seed=1), messages(5)), injected)
    read, again = (codec.decode(injected, 4, messages(5)) for codec in (mark, restored))
    assert torch.equal(read.logits, again.logits)
    assert isinstance(restored, LearnedCodec)
    assert not any(p.requires_grad for p in restored.parameters())
    assert all(not t.requires_grad and t.is_contiguous() for t in mark.state().values())
    assert (mark.name, mark.exact, mark.taps, mark.bits) == ("learned", False, (4,), BITS)


def test_sizes_are_the_papers() -> None:
    shapes = {name: tuple(t.shape) for name, t in codec("token").state().items() if name.endswith("weight")}
    assert shapes == {
        "encoder.0.weight": (1024, 48 + BITS),
        "encoder.2.weight": (48, 1024),
        "decoder.0.weight": (512, 48),
        "decoder.2.weight": (BITS, 512),
    }
    assert codec("channel").state()["encoder.0.weight"].shape == (1024, 17 + BITS)


def test_a_model_without_a_token_to_write_to() -> None:
    with pytest.raises(ValueError, match="model: wanted patch tokens"):
        LearnedCodec.create(KEY, replace(SITE, massive_tokens=tuple(range(17))), BITS, stream(), "token")
