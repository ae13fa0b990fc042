from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import vit
from torch import nn

from activemark_fast.checkpoints import save_model
from activemark_fast.cli import main
from activemark_fast.codec.codebooks import SiteMeasure, codebooks
from activemark_fast.forge import Attempt, Forgery, Thief, Way, forge
from activemark_fast.forge import play as play_module
from activemark_fast.forge import thief as thief_module
from activemark_fast.forge.fields import arguments, fields
from activemark_fast.forge.fitted import learned_codec, own_alignment, own_images, own_normalisation
from activemark_fast.forge.formats import massive_channels
from activemark_fast.forge.jacobian import expected_scores, lead, mean_jacobian
from activemark_fast.forge.keys import keys_guessed, keys_read, padded_keys, paid_settings
from activemark_fast.freedoms import EVIDENCE_AT
from activemark_fast.progress import Progress

Play = Callable[[Thief, float], list[Attempt]]


class Clock:
    """Goes on by a hundredth of a second at every look: how far a forger gets depends on no machine."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        self.seconds += 0.01
        return self.seconds


@pytest.fixture(scope="module", autouse=True)
def cheap() -> Any:
    """Nothing depends on the machine, and keys cost nothing to stretch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thief_module, "time", Clock())
        patch.setattr("activemark_fast.key.GRINDING_N", 2)
        yield


@pytest.fixture(scope="module")
def thief(cheap: None) -> Thief:
    bar = Progress(False)
    bar.stage("test", 0)
    return Thief.of(vit(), 0, torch.device("cpu"), "fp32", bar)


def played(way: Play, thief: Thief, looks: int) -> list[Attempt]:
    """What a way presents after so many looks at the clock."""
    return way(thief, thief.now() + looks / 100)


def test_all_ways_together_prove_nothing() -> None:
    suspect = vit(depth=4).train()
    before = {name: tensor.clone() for name, tensor in suspect.state_dict().items()}
    forgery = forge(suspect, minutes=1e-9)  # each way presents its claims nevertheless
    assert {attempt.way for attempt in forgery.attempts} == {
        "padded keys",
        "arguments",
        "fields",
        "learned codec",
        "own images",
        "images handed over",
        "claim on what comes later",
        "own normalisation",
        "own alignment",
        "format 2",
        "the same in today's format",
        "paid settings",
        "keys, read",
        "keys, guessed",
    }
    assert forgery.smallest is not None
    assert forgery.smallest > 1e-6
    assert all(attempt.tries >= 1 and attempt.seconds > 0 for attempt in forgery.attempts)
    assert str(forgery).count("\n    ") >= len(forgery.attempts)
    assert f"smallest paid p-value of {len(forgery.attempts)} claims: {forgery.smallest:.3g}, no" in str(
        forgery
    )
    assert forgery.to_dict()["smallest_paid_p_value"] == forgery.smallest
    assert suspect.training
    assert all(parameter.requires_grad for parameter in suspect.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in suspect.state_dict().items())


def test_what_a_forgery_is_worth() -> None:
    plain = Attempt("way", "tried", 3, 1.5, "match", "found", 1.0, 1e-30, 1e-20, (), "much")
    chosen = replace(plain, paid_p_value=1e-25, chosen=("the codec",), evidence="none by itself")
    refused = Attempt("way", "tried", 1, 0.1, "refused", "no")
    assert (plain.counts, chosen.counts, refused.counts) == (1e-20, None, None)
    forgery = Forgery((plain, chosen, refused))
    assert forgery.smallest == 1e-20
    assert "1e-20, EVIDENCE" in str(forgery)
    assert "1 further claims match" in str(forgery)
    assert "no claim was read" in str(Forgery((chosen, refused)))


def test_a_further_way_is_a_line_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def honest(thief: Thief, deadline: float) -> list[Attempt]:
        assert deadline > 0
        key = thief.key.subkey("further")
        return [thief.present("further", "nothing", 1, thief.now(), key, thief.seal(key))]

    monkeypatch.setattr(play_module, "WAYS", (Way(honest, 1), Way(honest, 2)))
    attempts = forge(vit(depth=3), minutes=0.1).attempts
    assert [attempt.way for attempt in attempts] == ["further"] * 2
    assert attempts[0].decision in ("no match", "inconclusive")


def test_every_field_is_refused_ignored_or_called_chosen(thief: Thief) -> None:
    plain, *attempts = played(fields, thief, 10**6)
    assert plain.decision == "no match"
    outcomes = {
        "site.prefix_tokens: some patches among them": "tokens before its patches",
        "site.num_tokens: one more": "tokens",
        "site.width: one more": "width",
        "preprocess.size: twice as large": "images of",
        "site.depth: 4096": "blocks",
    }
    ignored = {
        "preprocess.mean: in the last digits",
        "fingerprint: another",
        "architecture: any",
    }
    for attempt in attempts:
        name = attempt.tried
        if name in ignored:
            assert (attempt.p_value, attempt.chosen) == (plain.p_value, ()), name
            assert attempt.said.endswith("the honest file's")
        elif name in outcomes:
            assert attempt.decision == "inconclusive", name
            assert outcomes[name] in attempt.said
            assert attempt.p_value is None
        elif attempt.decision == "refused":
            assert attempt.said.startswith((name.partition(":")[0], "digests")), name
        else:
            assert attempt.chosen, name
            assert name.startswith("preprocess.mean: a little"), name
    assert len(attempts) == len({attempt.tried for attempt in attempts}) == 24


def test_what_verify_is_asked_changes_no_evidence(thief: Thief) -> None:
    attempts = played(arguments, thief, 10**6)
    assert len(attempts) == 4
    assert all(a.counts is not None and a.counts > 1e-6 for a in attempts)
    assert len({a.p_value for a in attempts if "precision" not in a.tried}) == 1


def test_a_trained_codec_is_chosen(thief: Thief) -> None:
    (attempt,) = played(learned_codec, thief, 40)
    assert attempt.tries > 10
    assert attempt.detection_rate is not None
    assert attempt.detection_rate > 0
    assert (attempt.p_value, attempt.chosen, attempt.counts) == (None, ("the codec",), None)


def test_optimised_images_are_chosen_and_not_taken_for_a_keys(thief: Thief) -> None:
    own, handed_over, later = played(own_images, thief, 25)
    assert own.tries == later.tries > 10
    assert own.p_value is not None
    assert own.p_value < 0.2  # no p-value holds for them
    assert own.chosen == later.chosen == ("the hold-out images",)
    assert handed_over.decision == "refused"
    assert handed_over.said.startswith("images: wanted none")


def test_an_optimised_normalisation_is_chosen(thief: Thief) -> None:
    (attempt,) = played(own_normalisation, thief, 3)
    assert attempt.chosen == ("the normalisation of images",)


def test_an_alignment_that_a_forger_turned_matches_and_is_chosen(thief: Thief) -> None:
    (attempt,) = played(own_alignment, thief, 30)
    assert attempt.decision == "match"
    assert attempt.chosen == ("activations to align with",)
    assert attempt.counts is None
    assert attempt.evidence is not None
    assert attempt.evidence.startswith("none by itself")


def test_channels_called_massive_fool_format_2_and_no_later_one(thief: Thief) -> None:
    old, new = played(massive_channels, thief, 4000)
    assert old.p_value is not None
    assert old.p_value < 1e-3  # of one key: chance has no part in it
    assert old.chosen == ("the site, channels and scale of a watermark of format 2",)
    assert old.counts is None
    assert new.decision == "refused"
    assert new.said.startswith("site.massive_channels")


@pytest.mark.parametrize("way", [keys_read, keys_guessed, paid_settings])
def test_trying_pays_for_no_more_than_the_tries(way: Play, thief: Thief) -> None:
    (attempt,) = played(way, thief, 12 if way is keys_guessed else 4)
    assert attempt.tries >= 2
    assert attempt.chosen == ()
    assert attempt.p_value is not None
    assert attempt.p_value > 1e-3 / attempt.tries
    assert attempt.counts == 1  # what is paid for is more than a few tries gain


def test_no_keys_share_a_stretched_one(thief: Thief) -> None:
    (attempt,) = played(padded_keys, thief, 0)
    assert attempt.tried.startswith("4 stretched keys")
    assert attempt.chosen == ()


def test_the_mean_jacobian_tells_what_a_key_would_read(thief: Thief) -> None:
    output = thief.at_site(thief.photographs).output
    slots = torch.tensor(thief.site.patch_tokens)
    jacobian, pairs = mean_jacobian(thief, thief.site, slots, output, thief.now() + 0.08)
    assert pairs % 128 == 0
    assert {tap: j.shape for tap, j in jacobian.items()} == {tap: (128, 128) for tap in thief.site.taps}
    guessed, read = [], []
    for number in range(3):
        stretched = thief.key.subkey(f"jacobian {number}").stretched()
        book = codebooks(stretched, thief.site, 32, SiteMeasure.of(output, 1))[0]
        for tap in thief.site.taps:
            rows = book.inject_directions.double(), book.read_directions[tap].double()
            guessed.append(expected_scores(*rows, jacobian[tap]))
        read += thief.scores(stretched, 32, thief.photographs)[0]
    both = torch.stack([torch.cat(guessed), torch.tensor(read).double()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.7


def test_expected_scores() -> None:
    rows = torch.eye(3, dtype=torch.float64)
    jacobian = torch.tensor([[1.0, 0, 0], [0, -1, 0], [1, 2, 0]], dtype=torch.float64)
    scores = expected_scores(rows, rows, jacobian)
    assert scores.tolist() == pytest.approx([math.erf(1 / math.sqrt(2)), math.erf(-0.5 / math.sqrt(2)), 0.0])
    assert float(lead(torch.ones(16))) == pytest.approx(4)
    assert float(lead(torch.zeros(16))) == 0


def test_the_evidence_threshold_is_stricter_than_a_match() -> None:
    assert EVIDENCE_AT < 1e-6


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(play_module, "WAYS", (Way(padded_keys, 1),))
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 3, "num_heads": 4, "num_classes": 3}
    path = tmp_path / "suspect.safetensors"
    save_model(vit(depth=3), path, f"timm:VisionTransformer?{json.dumps(sizes)}")
    assert main(["forge", str(path), "--minutes", "1", "--json", "--device", "cpu"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["suspect"] == str(path)
    assert said["smallest_paid_p_value"] > 1e-6
    assert [attempt["way"] for attempt in said["attempts"]] == ["padded keys"]
    assert main(["forge", str(path), "--quiet", "--device", "cpu"]) == 0
    assert "smallest paid p-value of 1 claims" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"minutes": 0}, ValueError, "minutes: wanted a finite number above 0, got 0"),
        ({"minutes": float("inf")}, ValueError, "minutes: wanted a finite number above 0, got inf"),
        ({"minutes": float("nan")}, ValueError, "minutes: wanted a finite number above 0, got nan"),
        ({"minutes": "5"}, TypeError, "minutes: wanted a number, got str"),
        ({"seed": 1.5}, TypeError, "seed: wanted int, got float"),
        ({"precision": "fp8"}, ValueError, "precision: wanted"),
    ],
)
def test_errors_name_the_argument(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        forge(vit(depth=4), **settings)


def test_no_vit() -> None:
    with pytest.raises(ValueError, match="looked for"):
        forge(nn.Linear(3, 3))


def test_no_room() -> None:
    with pytest.raises(ValueError, match="suspect: wanted room for 8 bits, got a width of 16"):
        forge(vit(embed_dim=16))
