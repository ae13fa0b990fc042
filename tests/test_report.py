from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import vit

from activemark_fast.attacks import noise
from activemark_fast.attacks.suite import suite
from activemark_fast.bulk import read_journal
from activemark_fast.checkpoints import save_model
from activemark_fast.cli import main
from activemark_fast.commitment import Opening
from activemark_fast.descent import Descent, compare
from activemark_fast.embedding import embed
from activemark_fast.evaluation import Evaluation
from activemark_fast.key import Key
from activemark_fast.profiling import profile
from activemark_fast.report import Evidence, evidence_page
from activemark_fast.site import Site
from activemark_fast.verdict import Decision, Verdict

SITE = Site(2, (3, 4), 17, 1, 128, (), ())
HOSTILE = '<script>console.error("x")</script> & "quoted" \u202e.safetensors'
OPENING = Opening(True, "2026-01-02T03:04:05+00:00", None, "cd" * 32)
ARCHITECTURE = "timm:VisionTransformer?" + json.dumps(
    {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 5, "num_heads": 4, "num_classes": 3}
)


def verdict(
    decision: Decision, p_value: float | None = 5.42e-20, wrong: float = 0.03, **more: Any
) -> Verdict:
    errors = np.random.default_rng(0).binomial(32, wrong, 256)
    rate = float((errors <= 5).mean())
    made = Verdict(decision, "because", errors, 32, 5, rate, p_value, 1e-6, "keyed")
    return replace(made, **more)


def evaluation() -> Evaluation:
    """Made-up rows of the full suite; one of them is not as expected."""
    draws = np.random.default_rng(1)
    rows = []
    for attack in suite("full", 12):
        for subject, key in (("marked", "owner"), ("marked", "another"), ("original", "owner")):
            found = (subject, key) == ("marked", "owner") and attack.name != "80% of weights"
            errors = draws.binomial(32, 0.03 if found else 0.5, 64)
            expected = "match" if (subject, key) == ("marked", "owner") else "no match"
            decision = "match" if found else "no match"
            rows.append(
                {
                    "attack": attack.name,
                    "family": attack.family,
                    "task": attack.task,
                    "subject": subject,
                    "key": key,
                    "expected": expected,
                    "decision": decision,
                    "as_expected": decision == expected,
                    "detection_rate": float((errors <= 5).mean()),
                    "p_value": 5.4e-20 if found else 0.375,
                    "histogram": np.bincount(errors, minlength=33).tolist(),
                    "cosine": 0.9871,
                    "probe_accuracy": 0.5812 if subject == "marked" else 0.5833,
                    "task_score": None,
                }
            )
    header = {"data": "images & masks", "suite": "full", "seed": 3, "left_out": {"one": "no images for it"}}
    return Evaluation(header, rows)


@cache
def descent() -> Descent:
    return compare(vit(), noise(vit(), None, 0, 0.3))


def evidence(**changed: Any) -> Evidence:
    fields: dict[str, Any] = {
        "suspect": "suspect.safetensors",
        "verdict": verdict("match", opening=OPENING),
        "site": SITE,
        "profile": profile(vit()),
        "evaluation": evaluation(),
        "command": "activemark verify suspect.safetensors --watermark w.safetensors --key owner.key",
        "facts": {"SHA-256 of suspect.safetensors": "ab" * 32},
        "date": "2026-02-03 04:05 UTC",
        "descent": descent(),
    }
    return Evidence(**(fields | changed))


def text_of(page: str) -> str:
    """What a reader sees: no tags, no style, one space between words."""
    body = re.sub(r"<(style|head)\b.*?</\1>", "", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_the_verdict_comes_first_in_plain_words() -> None:
    text = text_of(evidence_page(evidence()))
    order = [
        "Match: this model carries the owner's mark",
        "descends from the owner's marked model",
        "at most once in 1.8·10¹⁹ cases",
        "If the owner is not to be trusted: an owner who lies would have to try about 1.8·10¹⁹ keys",
        "p = 5.4·10⁻²⁰",
        "R = 1.000",
        "What was read, and where",
        "Descent, by the weights alone",
        "Descent : 6 of 6 pairs of blocks share their units or heads",
        "can renumber an innocent model",
        "What the mark costs, and what it survives",
        "0.9871 mean cosine",
        "58.1 % accuracy of a linear probe on the marked model; on the original 58.3 %",
        "How to check this",
        "activemark verify suspect.safetensors --watermark w.safetensors --key owner.key",
        "ab" * 32,
        "cd" * 32,
        "by the owner's own word on 2026-01-02T03:04:05+00:00",
    ]
    places = [text.find(part) for part in order]
    assert -1 not in places, order[places.index(-1)]
    assert places == sorted(places)


def test_every_attack_is_in_the_table_with_its_numbers() -> None:
    page = evidence_page(evidence())
    text = text_of(page)
    for attack in suite("full", 12):
        assert attack.name in text
    summary = evaluation().summary()
    assert f"{summary['found']} of {summary['positives']} readings" in text
    assert "80% of weights 0.000 0.375 ✗ no match" in text
    assert page.count('class="found wrong"') == 1
    assert "one (no images for it)" in text
    assert "images & masks" in text


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"verdict": verdict("no match", 0.4, 0.5)}, "No match: no sign of the owner's mark"),
        ({"verdict": verdict("no match", 0.4, 0.5)}, "p = 0.4"),
        ({"verdict": verdict("inconclusive", 2e-5, 0.4)}, "Nothing can be concluded from this reading"),
        ({"verdict": verdict("match", 3e-7)}, "at most once in 3.3·10⁶ cases"),
        ({"verdict": verdict("match", None, codec="learned")}, "by itself this is no proof"),
        ({"verdict": verdict("match", identical=True)}, "bit for bit, those that the watermark file names"),
        ({"descent": compare(vit(), vit(1))}, "No descent found : "),
        ({"evaluation": None}, "Not measured for this page"),
        ({"evaluation": None}, "fair coins"),
        ({"verdict": verdict("match", opening=replace(OPENING, committed=False))}, "not committed"),
        ({"verdict": verdict("match", aligned="rotation")}, "A rotation of its activations"),
        ({"verdict": verdict("match", chosen=("the hold-out images",))}, "may have fitted them"),
        ({}, "by the owner's own word on"),
        ({"profile": None, "verdict": verdict("inconclusive", None, bit_errors=np.zeros(0, dtype=np.int64))},
         "The suspect could not be read"),
    ],
)  # fmt: skip
def test_what_other_verdicts_say(changed: dict[str, Any], told: str) -> None:
    page = evidence_page(evidence(**changed))
    assert told in text_of(page)
    opening = changed.get("verdict", evidence().verdict).opening
    assert ("The commitment" in page) == (opening is not None)


def test_nothing_from_outside_is_read_as_html_or_fetched() -> None:
    page = evidence_page(evidence(suspect=HOSTILE, command=f"activemark verify '{HOSTILE}'"))
    assert "<script" not in page
    assert not re.search(r"https?://|url\(|@import", page)
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) == {"data:,"}
    assert "default-src 'none'" in page


# ---- in a browser

CHROMIUM = shutil.which("chromium")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
MEASURE = """<script>
addEventListener("load", () => setTimeout(() => {
  const out = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, root = page.documentElement;
    const box = (e) => e.getBoundingClientRect();
    const wide = [...page.querySelectorAll("body *")].filter((e) =>
      !e.closest("thead, title") && box(e).width > 0 && box(e).right > root.clientWidth + 1);
    const texts = [...page.querySelectorAll("svg text")].map(box);
    const meet = (a, b) =>
      a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2;
    const range = page.createRange();
    range.selectNodeContents(page.querySelector("main"));
    const selection = page.getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    out[frame.id] = {
      width: root.clientWidth, scroll: root.scrollWidth, wide: wide.map((e) => e.outerHTML.slice(0, 90)),
      overlapping: texts.filter((a, i) => texts.some((b, j) => i < j && meet(a, b))).length,
      smallest: Math.min(...texts.map((b) => b.height)), charts: page.querySelectorAll("svg").length,
      fetched: frame.contentWindow.performance.getEntriesByType("resource").map((e) => e.name),
      selected: selection.toString(),
    };
  }
  document.body.innerHTML = "<pre id=found></pre>";
  document.getElementById("found").textContent = JSON.stringify(out);
}, 300));
</script>"""


def browse(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=5000",
    ]  # fmt: skip
    return subprocess.run(
        [str(CHROMIUM), *flags, *more], capture_output=True, text=True, timeout=120, check=True
    )


@in_a_browser
def test_layout_on_screen_phone_and_without_network(tmp_path: Path) -> None:
    page = evidence_page(evidence(suspect=HOSTILE))
    frames = "".join(
        f'<iframe id="{name}" style="width:{width}px;height:3000px" srcdoc="{html.escape(page)}"></iframe>'
        for name, width in (("desktop", 1100), ("phone", 364))
    )
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"<!doctype html><meta charset=utf-8><body>{frames}{MEASURE}", encoding="utf-8")
    done = browse(tmp_path, "--window-size=1600,3000", "--dump-dom", wrapper.as_uri())
    assert "CONSOLE" not in done.stderr, done.stderr
    written = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert written is not None, done.stdout[-2000:]
    found = json.loads(html.unescape(written[1]))
    assert set(found) == {"desktop", "phone"}
    for name, seen in found.items():
        assert seen["scroll"] <= seen["width"], f"{name} scrolls sideways"
        assert seen["wide"] == [], f"{name}: beyond the right edge"
        assert seen["charts"] == 2
        assert seen["overlapping"] == 0, f"{name}: texts of a chart overlap"
        assert seen["smallest"] >= 9, f"{name}: a text of a chart is too small"
        assert [url for url in seen["fetched"] if not url.startswith("data:")] == []
        for number in ("5.4·10⁻²⁰", "1.000", "0.9871", "detected: at most 5 wrong", "ab" * 32):
            assert number in seen["selected"], f"{name}: {number} cannot be selected"


@in_a_browser
def test_it_prints(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(evidence_page(evidence()), encoding="utf-8")
    done = browse(tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", page.as_uri())
    assert "CONSOLE" not in done.stderr, done.stderr
    pdf = (tmp_path / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 8


# ---- the command


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    original = vit(embed_dim=64, depth=5)
    key = Key(bytes(range(32)))
    key.write("owner.key")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # whether the targets are reached, the key decides
        embedding = embed(original, key, bits=24, fidelity=0.95, architecture=ARCHITECTURE)
    save_model(embedding.model, "marked.safetensors", ARCHITECTURE)
    torch.save(original.state_dict(), "original.pt")
    save_model(original, "original.safetensors", ARCHITECTURE)
    embedding.watermark.save("wm.safetensors")

    def run(suspect: str, *more: str) -> tuple[int, str, str]:
        arguments = ["report", suspect, "--watermark", "wm.safetensors", "--key", "owner.key", *more]
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    code, out, _ = run("marked.safetensors", "--out", "page.html", "--json")
    assert code == 0
    assert json.loads(out)["page"] == "page.html"
    page = Path("page.html").read_text(encoding="utf-8")
    assert "Match: this model carries" in page
    assert Path("owner.key").read_text().strip() not in page
    again = "activemark verify marked.safetensors --watermark wm.safetensors --key owner.key --exhaustive"
    assert again in page
    assert "Descent, by the weights alone" not in page

    code, out, _ = run(
        "marked.safetensors", "--original", "original.safetensors", "--out", "both.html", "--json"
    )
    assert code == 0
    assert json.loads(out)["descent"]["decision"] == "descent"
    page = Path("both.html").read_text(encoding="utf-8")
    assert "Descent, by the weights alone" in page
    assert "activemark compare original.safetensors marked.safetensors" in page

    assert run("original.pt", "--out", "other.html")[0] == 1
    assert "No match" in Path("other.html").read_text(encoding="utf-8")

    fixed = ["--watermark", "wm.safetensors", "--key", "owner.key", "--out", "swept.jsonl"]
    Path("empty.pt").touch()
    assert main(["verify-many", "marked.safetensors", "original.pt", "empty.pt", *fixed]) == 2
    capsys.readouterr()
    from_journal = ["--watermark", "wm.safetensors", "--journal", "swept.jsonl", "--out", "swept.html"]
    assert main(["report", "marked.safetensors", *from_journal, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    line = next(line for line in read_journal("swept.jsonl") if "marked" in line["suspect"])
    assert record.items() >= line["verdict"].items()
    page = Path("swept.html").read_text(encoding="utf-8")
    assert "Match: this model carries" in page
    assert "swept.jsonl, which verify-many wrote; not read again" in page
    assert main(["report", "original.pt", *from_journal]) == 1
    for suspect, message in (
        ("empty.pt", "is an empty file"),
        ("original.safetensors", "has no result on"),
    ):
        assert main(["report", suspect, *from_journal]) == 2
        assert message in capsys.readouterr().err
    Path("swept.jsonl").write_text(Path("swept.jsonl").read_text().replace('"images": ', '"images": 9'))
    assert main(["report", "marked.safetensors", *from_journal]) == 2
    assert "holds no verdict: its parts do not agree" in capsys.readouterr().err
    Path("swept.jsonl").unlink()
    assert main(["verify-many", "marked.safetensors", *fixed]) == 0
    save_model(original, "marked.safetensors", ARCHITECTURE)
    assert main(["report", "marked.safetensors", *from_journal]) == 2
    assert "was changed after the journal was written" in capsys.readouterr().err
    save_model(embedding.model, "marked.safetensors", ARCHITECTURE)

    for more, message in (
        (["--out", "page.txt"], "--out: wanted a file name that ends in .html, got page.txt"),
        (["--out", "none/page.html"], "--out: there is no folder none"),
        (["--out", "new.html", "--evaluation", "none"], "wanted a folder with the results.json"),
        (["--out", "new.html", "--commitment", "wm.safetensors"], "wm.safetensors"),
    ):
        code, _, err = run("marked.safetensors", *more)
        assert code == 2
        assert message in err
    Path("results").mkdir()
    header = {"format": 1, "watermark": "00"}
    Path("results/results.json").write_text(json.dumps({"header": header, "rows": []}))
    code, _, err = run("marked.safetensors", "--out", "new.html", "--evaluation", "results")
    assert code == 2
    assert "results is about another watermark than wm.safetensors" in err
    assert not Path("new.html").exists()
