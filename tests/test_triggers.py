from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2 import functional as tv

from activemark_fast import triggers as triggers_module
from activemark_fast.key import Key
from activemark_fast.normalisation import Preprocess
from activemark_fast.photographs import shipped_photographs
from activemark_fast.synthetic import synthetic_images
from activemark_fast.triggers import (
    ImageMismatchError,
    check_digests,
    clean_images,
    photograph_crops,
    trigger_images,
)

KEY = Key.of(bytes(range(32)))
OTHER_KEY = Key.of(bytes(range(1, 33)))
PREPROCESS = Preprocess((32, 32), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))


def draw(count: int, size: tuple[int, int] = (32, 32), key: Key = KEY) -> Tensor:
    return synthetic_images(key.stream("test"), count, size)


def as_array(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).contiguous().numpy()


def write_folder(folder: Path, images: Tensor, suffix: str = ".png") -> Path:
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(as_array(image)).save(folder / f"{index:03}{suffix}")
    return folder


# --- preprocessing ---


@pytest.mark.parametrize("source", [(40, 61), (61, 40), (20, 33), (64, 64)])
def test_preprocess_is_resize_crop_normalise(source: tuple[int, int]) -> None:
    images = draw(4, source)
    resized = tv.resize(images.float(), [32], tv.InterpolationMode.BICUBIC, antialias=True).clamp(0, 255)
    expected = tv.normalize(
        tv.center_crop(resized, [32, 32]) / 255, list(PREPROCESS.mean), list(PREPROCESS.std)
    )
    actual = PREPROCESS(images)
    assert actual.dtype == torch.float32
    assert actual.shape == (4, 3, 32, 32)
    torch.testing.assert_close(actual, expected)


def test_preprocess_leaves_the_right_size_alone() -> None:
    images = draw(2)
    pixels = PREPROCESS(images) * torch.tensor(PREPROCESS.std).view(3, 1, 1)
    pixels = (pixels + torch.tensor(PREPROCESS.mean).view(3, 1, 1)) * 255
    torch.testing.assert_close(pixels, images.float(), atol=1e-3, rtol=0)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_preprocess_covers_any_size(h: int, w: int, height: int, width: int) -> None:
    white = torch.full((1, 3, h, w), 255, dtype=torch.uint8)
    pixels = Preprocess((height, width), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))(white)
    assert pixels.shape == (1, 3, height, width)
    torch.testing.assert_close(pixels, torch.ones_like(pixels))


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        (([32, 32], (0, 0, 0), (1, 1, 1)), TypeError, "size"),
        (((32.0, 32), (0, 0, 0), (1, 1, 1)), TypeError, "size"),
        (((32,), (0, 0, 0), (1, 1, 1)), ValueError, "size"),
        (((0, 32), (0, 0, 0), (1, 1, 1)), ValueError, "size"),
        (((32, 32), [0, 0, 0], (1, 1, 1)), TypeError, "mean"),
        (((32, 32), (0, 0), (1, 1, 1)), ValueError, "mean"),
        (((32, 32), (0, 0, 0), (1, 1, 0)), ValueError, "std"),
        (((32, 32), (0, 0, 0), (1, 1, float("nan"))), ValueError, "std"),
    ],
)
def test_preprocess_refuses_fields(arguments: tuple, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{name}: "):
        Preprocess(*arguments)


def test_preprocess_refuses_images() -> None:
    with pytest.raises(TypeError, match=r"uint8 tensor, got a torch\.float32 tensor"):
        PREPROCESS(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"\(B, 3, h, w\), got \(3, 32, 32\)"):
        PREPROCESS(torch.zeros(3, 32, 32, dtype=torch.uint8))


# --- synthetic images ---


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((32, 32), "796f2ce4c642027aa15f855d7728a6692487d14d9e8210dc6ca1312f33ec9fbc"),
        ((37, 53), "9ec85a53819a41d54a23aee217b74ffb63cbb3cb47d13d1110d7c72ec7a7a9e8"),
        ((130, 9), "320fd505940e78435b523aa38ff57b7e3ba305494c71512c274f5e60d0b8262b"),
    ],
)
def test_synthetic_images_known_answer(size: tuple[int, int], expected: str) -> None:
    # A change here means that owners can no longer make the images which their marks were embedded on.
    assert hashlib.sha256(draw(8, size).numpy().tobytes()).hexdigest() == expected


@given(st.integers(8, 70), st.integers(8, 70), st.binary(min_size=16, max_size=16))
@settings(max_examples=25, deadline=None)
def test_synthetic_images_have_contrast_at_any_size(h: int, w: int, material: bytes) -> None:
    images = draw(4, (h, w), Key.of(material))
    assert images.dtype == torch.uint8
    assert images.shape == (4, 3, h, w)
    assert (images.float().std(dim=(1, 2, 3)) > 10).all()


def test_every_synthetic_image_has_contrast_and_is_new() -> None:
    images = draw(256)
    assert (images.float().std(dim=(1, 2, 3)) > 15).all()
    # Clipping must not eat the images.
    assert ((images == 0) | (images == 255)).float().mean() < 0.1
    assert len({image.numpy().tobytes() for image in images}) == 256


def test_synthetic_images_of_a_smaller_count_come_first() -> None:
    images = draw(11, (37, 53))
    assert torch.equal(draw(6, (37, 53)), images[:6])


def test_synthetic_images_depend_on_the_key() -> None:
    mine, other = draw(64).float(), draw(64, key=OTHER_KEY).float()
    mine, other = (x.flatten(1) - x.flatten(1).mean(dim=1, keepdim=True) for x in (mine, other))
    similarity = torch.cosine_similarity(mine, other, dim=1)
    assert similarity.abs().max() < 0.8
    assert abs(similarity.mean()) < 0.1


def spectral_slope(images: Tensor) -> float:
    """Slope of log power against log frequency, ensemble average over lightness."""
    grey = images.double().mean(dim=1)
    _, h, w = grey.shape
    window = torch.hann_window(h, dtype=torch.float64)[:, None] * torch.hann_window(w, dtype=torch.float64)
    power = torch.fft.fft2((grey - grey.mean(dim=(1, 2), keepdim=True)) * window).abs().square().mean(dim=0)
    frequency = (torch.fft.fftfreq(h)[:, None].square() + torch.fft.fftfreq(w).square()).sqrt()
    edges = np.geomspace(2.5 / min(h, w), 0.5, 9).tolist()
    rings = [(frequency >= low) & (frequency < high) for low, high in pairwise(edges)]
    x = [frequency[ring].log().mean().item() for ring in rings]
    y = [power[ring].mean().log().item() for ring in rings]
    return float(np.polyfit(x, y, 1)[0])


@pytest.mark.parametrize("size", [(64, 64), (96, 80)])
def test_synthetic_images_have_a_natural_spectrum(size: tuple[int, int]) -> None:
    images = draw(64, size)
    assert -3.0 < spectral_slope(images) < -1.2
    for kind in (images[::4], images[2::4], images[1::2]):
        assert -3.0 < spectral_slope(kind) < -1.2


def test_spectral_slope_of_noise_is_flat() -> None:
    noise = torch.from_numpy(KEY.stream("noise").integers(0, 256, (32, 3, 64, 64)))
    assert abs(spectral_slope(noise)) < 0.2


def test_dead_leaves_have_edges_and_clouds_have_none() -> None:
    images = draw(64, (64, 64)).float().mean(dim=1)
    steps = (images[:, :, 1:] - images[:, :, :-1]).abs().flatten(1)
    # Most neighbours in a dead-leaves image are alike, few differ much: a heavy-tailed distribution.
    tail = steps.quantile(0.98, dim=1) / steps.median(dim=1).values
    assert tail[::4].median() > 2 * tail[1::2].median()


@pytest.mark.parametrize(
    ("count", "size", "error", "name"),
    [
        (0, (32, 32), ValueError, "count"),
        (1.0, (32, 32), TypeError, "count"),
        (1, (32, 7), ValueError, "size"),
        (1, 32, TypeError, "size"),
    ],
)
def test_synthetic_images_refuse(
    count: int, size: tuple[int, int], error: type[Exception], name: str
) -> None:
    with pytest.raises(error, match=f"^{name}: "):
        draw(count, size)


# --- where trigger images come from ---


def test_from_the_key() -> None:
    triggers = trigger_images(None, KEY, PREPROCESS, count=20, synthetic=True)  # as older marks take them
    expected = synthetic_images(KEY.stream("triggers/synthetic"), 20, (32, 32))
    assert triggers.source == "key"
    assert torch.equal(triggers.pixels, PREPROCESS(expected))
    check_digests(triggers, trigger_images(expected, KEY, PREPROCESS).digests)


def test_from_the_key_they_are_crops_of_photographs() -> None:
    triggers = trigger_images(None, KEY, PREPROCESS, count=40)
    assert triggers.source == "key"
    assert torch.equal(triggers.pixels, trigger_images(None, KEY, PREPROCESS, count=40).pixels)
    assert torch.equal(triggers.pixels[:5], PREPROCESS(crops(40))[:5])
    assert len({image.numpy().tobytes() for image in crops(40)}) == 40
    other = trigger_images(None, Key(b"another owner's key, 16 bytes"), PREPROCESS, count=40)
    assert not torch.equal(triggers.pixels, other.pixels)


def test_crops_are_cut_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cut: list[Tensor] = []
    resized = triggers_module.interpolate

    def noted(crop: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        cut.append(crop)
        return resized(crop, *args, **kwargs)

    monkeypatch.setattr(triggers_module, "interpolate", noted)
    triggers = trigger_images(None, KEY, PREPROCESS, count=40)
    assert not cut
    some = triggers.some([31, 2])
    assert len(cut) == 2
    assert torch.equal(some, triggers.pixels[[31, 2]])


def crops(count: int) -> torch.Tensor:
    cut = photograph_crops(KEY.stream("triggers/photographs"), count, PREPROCESS.size)
    return torch.stack([cut(index) for index in range(count)])


@pytest.mark.parametrize("size", [(32, 32), (17, 40), (224, 224)])
def test_crops_have_the_size_asked_for(size: tuple[int, int]) -> None:
    crop = photograph_crops(KEY.stream("test"), 1, size)(0)
    assert (tuple(crop.shape), crop.dtype) == ((3, *size), torch.uint8)


def test_clean_images_that_are_held_out_are_of_other_photographs() -> None:
    clean = clean_images(None, PREPROCESS, 100, 50)
    assert (len(clean.fitted), len(clean.held)) == (100, 50)
    shipped = shipped_photographs()
    apart = shipped.sources % 4 == 0
    assert torch.equal(clean.held, PREPROCESS(shipped.images[apart][:50]))
    assert not set(shipped.sources[apart].tolist()) & set(shipped.sources[~apart].tolist())


def test_own_clean_images_stand_beside_shipped_photographs() -> None:
    own, shipped = PREPROCESS(draw(40)), shipped_photographs()
    apart = shipped.sources % 4 == 0
    clean = clean_images(own, PREPROCESS, 100, 6)
    mine = torch.arange(40) % 4 == 0
    assert torch.equal(clean.fitted[:30], own[~mine])
    assert torch.equal(clean.fitted[30:], PREPROCESS(shipped.images[~apart][:70]))
    assert torch.equal(clean.held[:4], own[mine][:4])
    assert torch.equal(clean.held[4:], PREPROCESS(shipped.images[apart][:2]))
    assert clean.source == "the images given, beside the photographs that the package ships"
    many = clean_images(PREPROCESS(draw(90)), PREPROCESS, 60, 12)
    assert (len(many.fitted), len(many.held)) == (60, 12)
    assert torch.equal(many.fitted[40:], PREPROCESS(shipped.images[~apart][:20]))


def test_few_clean_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^clean: wanted at least 16 images, got 3"):
        clean_images(PREPROCESS(draw(3)), PREPROCESS, 100, 5)


def test_from_model_input() -> None:
    pixels = PREPROCESS(draw(20))
    triggers = trigger_images(pixels, KEY, PREPROCESS, count=17)
    assert triggers.source == "tensor"
    assert torch.equal(triggers.pixels, pixels[:17])
    assert len(triggers.digests) == 17


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_model_input_is_cast_to_float32_without_gradient(dtype: torch.dtype) -> None:
    pixels = PREPROCESS(draw(16)).to(dtype).requires_grad_()
    triggers = trigger_images(pixels, KEY, PREPROCESS)
    assert not triggers.pixels.requires_grad
    assert torch.equal(triggers.pixels, pixels.detach().float())


def test_one_image_has_one_digest_wherever_it_comes_from(tmp_path: Path) -> None:
    images = draw(16, (40, 50))
    folder = write_folder(tmp_path / "images", images)
    pictures = [Image.fromarray(as_array(image)) for image in images]
    expected = trigger_images(images, KEY, PREPROCESS)
    batches = DataLoader(TensorDataset(images, torch.arange(16)), batch_size=5)
    sources: dict[str, list[object]] = {
        "folder": [folder, str(folder)],
        "tensor": [images.to(memory_format=torch.channels_last)],
        "iterable": [
            list(images),
            pictures,
            [as_array(image) for image in images],
            batches,
            zip(images, range(16), strict=True),
        ],
    }
    for source, alternatives in sources.items():
        for alternative in alternatives:
            triggers = trigger_images(alternative, KEY, PREPROCESS)
            assert triggers.source == source
            assert torch.equal(triggers.pixels, expected.pixels)
            check_digests(triggers, expected.digests)


def test_images_of_unlike_sizes_and_kinds_may_be_mixed() -> None:
    mixed = [*draw(8, (40, 50)), *PREPROCESS(draw(4)), draw(4, (33, 80)), as_array(draw(1)[0])]
    assert trigger_images(mixed, KEY, PREPROCESS).pixels.shape == (17, 3, 32, 32)


def test_grey_and_transparent_pictures_become_rgb() -> None:
    grey = Image.fromarray(as_array(draw(1)[0])).convert("L")
    pixels = trigger_images([grey, grey.convert("RGBA"), grey.convert("P")] * 6, KEY, PREPROCESS).pixels
    assert torch.equal(pixels[0], pixels[1])
    assert pixels.shape == (18, 3, 32, 32)


def test_iterable_is_read_only_as_far_as_needed() -> None:
    image = draw(1)[0]

    def forever() -> Iterator[Tensor]:
        for _ in range(18):
            yield image
        raise AssertionError("read too far")

    assert len(trigger_images(forever(), KEY, PREPROCESS, count=18).digests) == 18


def test_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    images = draw(20)
    folder = write_folder(tmp_path / "images", images)
    (folder / "000.png").rename(folder / "zzz.PNG")
    (folder / "notes.txt").write_text("no image")
    (folder / "sub").mkdir()
    triggers = trigger_images(folder, KEY, PREPROCESS, count=19)
    assert torch.equal(triggers.pixels, PREPROCESS(images[1:20]))
    last = trigger_images(folder, KEY, PREPROCESS).pixels[19]
    assert torch.equal(last, PREPROCESS(images[:1])[0])


def test_jpeg_and_webp_are_decoded(tmp_path: Path) -> None:
    images = draw(16)
    for suffix in (".jpg", ".webp", ".bmp"):
        folder = write_folder(tmp_path / suffix[1:], images, suffix)
        assert trigger_images(folder, KEY, PREPROCESS).pixels.shape == (16, 3, 32, 32)


# --- what is refused ---


@pytest.mark.parametrize("damage", ["truncated", "text", "folder"])
def test_broken_file_is_named(tmp_path: Path, damage: str) -> None:
    folder = write_folder(tmp_path / "images", draw(20))
    broken = folder / "003.png"
    content = broken.read_bytes()
    broken.unlink()
    if damage == "folder":
        broken.mkdir()
    else:
        broken.write_bytes(content[:-200] if damage == "truncated" else b"not an image")
    with pytest.raises(ValueError, match=r"^images: .*003\.png.*cannot be decoded"):
        trigger_images(folder, KEY, PREPROCESS)


def with_value(value: float) -> Tensor:
    pixels = PREPROCESS(draw(16))
    pixels[7, 1, 2, 3] = value
    return pixels


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (lambda: 5, TypeError, "got int"),
        (lambda: b"bytes", TypeError, "got bytes"),
        (lambda: {"image": draw(16)}, TypeError, "item 0.*got str"),
        (lambda: [*draw(16), None], TypeError, "item 16.*got NoneType"),
        (lambda: [()], TypeError, "item 0.*got tuple"),
        (lambda: draw(16)[0], ValueError, r"got \(3, 32, 32\)"),
        (lambda: draw(16)[:, :1], ValueError, r"got \(16, 1, 32, 32\)"),
        (lambda: torch.zeros(16, 3, 0, 32), ValueError, r"got \(16, 3, 0, 32\)"),
        (lambda: draw(16).long(), TypeError, r"got a torch\.int64 tensor"),
        (lambda: draw(16).numpy(), ValueError, r"item 0.*\(h, w, 3\), got \(3, 32, 32\)"),
        (lambda: [as_array(draw(1)[0]) / 255], TypeError, "item 0.*got float64"),
        (lambda: torch.zeros(16, 3, 32, 31), ValueError, r"size \(32, 32\), got \(32, 31\) for image 0"),
        (lambda: with_value(float("nan")), ValueError, "NaN or infinity in image 7"),
        (lambda: with_value(float("-inf")), ValueError, "NaN or infinity in image 7"),
        (lambda: with_value(0.0).double() * 1e300, ValueError, "NaN or infinity in image 0"),
        (lambda: draw(15), ValueError, "at least 16, got 15"),
        (lambda: draw(16)[:0], ValueError, "at least 16, got 0"),
        (lambda: [], ValueError, "at least 16, got 0"),
    ],
)
def test_images_are_refused(images: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^images: .*{message}"):
        trigger_images(images(), KEY, PREPROCESS)


def test_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^images: .*none"):
        trigger_images(tmp_path, KEY, PREPROCESS)
    with pytest.raises(ValueError, match=r"^images: wanted a folder.*nowhere"):
        trigger_images(tmp_path / "nowhere", KEY, PREPROCESS)
    few = write_folder(tmp_path / "few", draw(15))
    with pytest.raises(ValueError, match=r"^images: .*at least 16, got 15"):
        trigger_images(few, KEY, PREPROCESS)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ((bytes(32), PREPROCESS), TypeError, "key"),
        ((KEY, (32, 32)), TypeError, "preprocess"),
        ((KEY, PREPROCESS, 15), ValueError, "count"),
        ((KEY, PREPROCESS, 16.0), TypeError, "count"),
        ((KEY, PREPROCESS, True), TypeError, "count"),
    ],
)
def test_other_arguments_are_refused(arguments: tuple, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{name}: "):
        trigger_images(None, *arguments)


# --- digests ---


def test_digest_tells_key_dtype_shape_and_content() -> None:
    zeros = torch.zeros(16, 3, 32, 32)
    variants: list[tuple[Tensor, Key]] = [
        (zeros, KEY),
        (zeros, OTHER_KEY),
        (zeros.half(), KEY),
        (zeros.byte(), KEY),
        (zeros.byte().reshape(16, 3, 16, 64), KEY),
        (zeros.byte().reshape(16, 3, 64, 16), KEY),
        (zeros + 1, KEY),
    ]
    digests = [trigger_images(images, key, PREPROCESS).digests[0] for images, key in variants]
    assert len(set(digests)) == len(variants)
    assert {len(digest) for digest in digests} == {32}


def test_digest_known_answer() -> None:
    images = torch.arange(16 * 3 * 8 * 9).reshape(16, 3, 8, 9).byte()
    expected = KEY.mac("triggers/digest", b"torch.uint8 (3, 8, 9)\n" + bytes(images[5].flatten().tolist()))
    assert trigger_images(images, KEY, PREPROCESS).digests[5] == expected


@given(st.integers(0, 15), st.integers(0, 2), st.integers(0, 31), st.integers(0, 31))
@settings(max_examples=20, deadline=None)
def test_one_changed_value_is_found(index: int, channel: int, row: int, column: int) -> None:
    images = draw(16)
    expected = trigger_images(images, KEY, PREPROCESS).digests
    images[index, channel, row, column] ^= 1
    with pytest.raises(ImageMismatchError, match=rf"^images: image {index} is not"):
        check_digests(trigger_images(images, KEY, PREPROCESS), expected)


def test_order_and_count_of_images_are_checked() -> None:
    triggers = trigger_images(crops(16), KEY, PREPROCESS)
    check_digests(triggers, list(triggers.digests))
    with pytest.raises(ImageMismatchError, match=r"wanted the 15 images .* got 16"):
        check_digests(triggers, triggers.digests[:15])
    swapped = replace(triggers, digests=(*triggers.digests[:14], triggers.digests[15], triggers.digests[14]))
    with pytest.raises(ImageMismatchError, match="image 14") as caught:
        check_digests(swapped, triggers.digests)
    assert isinstance(caught.value, ValueError)
    assert triggers.digests[14].hex() not in str(caught.value)
