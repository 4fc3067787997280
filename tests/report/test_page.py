"""The page and the figures of `plop report`."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from plop_ext.cli.main import main
from plop_ext.errors import InputError
from plop_ext.report import tables
from plop_ext.report.against import compare_scores
from plop_ext.report.figures import drawings, style
from plop_ext.scores import Scores
from tests.support.gain_tables import scores, table

LEVELS = [0.6, 0.8, 0.81, 1.4, 2.0]
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects text, tags and attributes, and checks that tags close in order."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(params=[4, 80], ids=["4 layers", "80 layers"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    # Two types so near that their order depends on the samples: the figure of stability has something to show.
    found = table([0.6, 0.8, 0.801, 1.4, 2.0], layers=request.param, own_layer_sd=0.03)
    scores(found).save(tmp_path / "s.json")
    return tmp_path / "s.json"


def test_page_is_whole_and_fetches_nothing(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    scores(table([0.6, 0.9, 0.8, 1.4, 2.0], seed=1), data="code").save(other)
    output = tmp_path / "r.html"
    assert main(["report", str(saved), "-o", str(output), "--against", str(other)]) == 0
    content = output.read_text(encoding="utf-8")
    page = Page(content)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    fetched = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "data")]
    assert all(value and value.startswith(("#", "data:")) for value in fetched)
    assert "@import" not in content and not re.search(r"url\((?!#)", content)
    assert page.tags.count("svg") == 2 * 5
    for wanted in ("Toy", "toy", "among the 3 lowest", "lowest-3", "all-linear", "activations, MiB", "against code"):
        assert wanted in page.text
    for item in Scores.load(saved).statistics().types:
        assert item.type in page.text and f"{item.nfn:.3f}" in page.text
        assert item.over_layers and f"{item.over_layers[0]:.3f} to {item.over_layers[1]:.3f}" in page.text


def test_page_follows_the_colour_scheme(saved: Path, tmp_path: Path) -> None:
    output = tmp_path / "r.html"
    assert main(["report", str(saved), "-o", str(output)]) == 0
    content = output.read_text()
    assert "prefers-color-scheme: dark" in content and '<meta name="color-scheme" content="light dark">' in content
    found = re.findall(r"<svg.*?</svg>", content, flags=re.DOTALL)
    assert len(found) == 2 * 4
    for drawing in found:
        assert style.INK not in drawing and style.CHOSEN not in drawing
        assert "currentColor" in drawing
        # No page-sized background of its own.
        assert 'id="patch_1"' not in drawing or "fill: #ffffff" not in drawing.split('id="patch_2"')[0]
        ElementTree.fromstring(drawing)


def test_the_recommendation_comes_first(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(saved), "-o", str(tmp_path / "r.html")]) == 0
    content = (tmp_path / "r.html").read_text()
    headline = "Put LoRA on a, b and c: 3 of 5 module types"
    assert capsys.readouterr().out.startswith(headline)
    assert content.index(headline) < content.index("<figure") < content.index("<table")
    assert f"<code>plop place {saved} -o placement.json</code>" in content


def test_every_id_is_given_once_and_every_reference_has_one(saved: Path, tmp_path: Path) -> None:
    assert main(["report", str(saved), "-o", str(tmp_path / "r.html"), "--against", str(saved)]) == 0
    content = (tmp_path / "r.html").read_text()
    ids = re.findall(r'\bid="([^"]*)"', content)
    assert len(ids) == len(set(ids)) > 100
    references = re.findall(r'(?:href="#|url\(#|labelledby="|describedby=")([^")]*)', content)
    assert references and set(references) <= set(ids)


def test_every_figure_has_a_role_a_title_and_a_description(saved: Path, tmp_path: Path) -> None:
    assert main(["report", str(saved), "-o", str(tmp_path / "r.html"), "--against", str(saved)]) == 0
    content = (tmp_path / "r.html").read_text()
    openings = re.findall(r"<svg[^>]*><title[^>]*>([^<]+)</title><desc[^>]*>([^<]+)</desc>", content)
    assert len(openings) == content.count("<svg") == content.count('role="img" aria-labelledby=')
    assert ("NFN by type and layer" in dict(openings)) and all(len(words) > 20 for _, words in openings)


def test_a_telephone_shows_figures_that_can_be_read(saved: Path, tmp_path: Path) -> None:
    """A narrow figure is scaled to the 358 pixels that a screen of 390 leaves, and its text with it."""
    assert main(["report", str(saved), "-o", str(tmp_path / "r.html")]) == 0
    content = (tmp_path / "r.html").read_text()
    narrow = re.findall(r'<svg[^>]*class="narrow".*?</svg>', content, flags=re.DOTALL)
    assert len(narrow) == content.count('class="wide"') == 4
    for drawing in narrow:
        [width] = re.findall(r'viewBox="0 0 ([\d.]+) ', drawing.partition(">")[0])
        sizes = [float(size) for size in re.findall(r"font(?:-size)?: (?:bold |700 )?([\d.]+)px", drawing)]
        assert "DejaVu" not in drawing and drawing.count("var(--sans)") == drawing.count("<text")
        assert sizes and min(sizes) * 358 / float(width) >= 9


def test_a_figure_that_would_be_flat_is_left_out() -> None:
    certain = scores(table([0.6, 0.8, 1.0, 1.4, 2.0], own_layer_sd=0.0, sample_sd=0.001))
    assert [item.name for item in drawings(certain, ("a",), certain.statistics())] == [
        "heatmap",
        "intervals",
        "layers",
    ]
    shallow = scores(table([0.6, 0.8], layers=1, sample_sd=0.001))
    assert [item.name for item in drawings(shallow, ("a",), shallow.statistics())] == ["heatmap", "intervals"]


def test_names_are_escaped(tmp_path: Path) -> None:
    found = scores(table(LEVELS), data="<script>alert(1)</script>", name="a&b<c>")
    found.save(tmp_path / "s.json")
    assert main(["report", str(tmp_path / "s.json"), "-o", str(tmp_path / "r.html")]) == 0
    content = (tmp_path / "r.html").read_text()
    assert "<script" not in content and "a&amp;b&lt;c&gt;" in content


def test_figures_are_png_and_svg(saved: Path, tmp_path: Path) -> None:
    assert main(["report", str(saved), "--figures", str(tmp_path / "f" / "g")]) == 0
    names = {path.name for path in (tmp_path / "f" / "g").iterdir()}
    expected = ("heatmap", "intervals", "layers", "stability")
    assert names == {f"{name}.{suffix}" for name in expected for suffix in ("png", "svg")}
    for name in expected:
        assert (tmp_path / "f" / "g" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        drawing = (tmp_path / "f" / "g" / f"{name}.svg").read_text()
        assert style.INK in drawing
        if name in ("heatmap", "intervals", "layers"):
            assert all(f">{label}<" in drawing for label in "abcde")


def test_terminal_says_it_all_without_files(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(saved)]) == 0
    printed = capsys.readouterr().out
    for wanted in ("over data", "over layers", "P layers", "automatic k is", "Memory that training adds", "lowest-3"):
        assert wanted in printed
    assert sorted(path.name for path in saved.parent.iterdir()) == ["s.json"]


def test_kendalls_tau_is_in_the_terminal_and_on_the_page(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(saved), "-o", str(tmp_path / "r.html")]) == 0
    found = Scores.load(saved).statistics()
    assert found.tau_samples is not None
    line = f"two resamples: {found.tau_samples:.2f} over samples, {found.tau_layers:.2f} over layers"
    assert line in " ".join(capsys.readouterr().out.split())
    assert line in (tmp_path / "r.html").read_text()
    one = scores(table(LEVELS, samples=1))
    assert f"two resamples: {one.statistics().tau_layers:.2f} over layers" in "\n".join(tables.confidence_lines(one))


def test_placements_are_shown_where_their_cost_is_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first weight of a model in 8 bits says nothing of the width of its activations."""
    scores(table(LEVELS, own_layer_sd=0.03), dtype="float8_e4m3fn").save(tmp_path / "s.json")
    assert main(["report", str(tmp_path / "s.json"), "-o", str(tmp_path / "r.html")]) == 0
    printed = capsys.readouterr().out
    [row] = [line for line in printed.splitlines() if "lowest-3" in line and "unknown" in line]
    placement = Scores.load(tmp_path / "s.json").place()
    assert f"{placement.num_parameters():,}" in row and row.count("unknown") == 5
    page = Page((tmp_path / "r.html").read_text()).text
    assert "Placements and their cost" in page and page.count("unknown") % 4 == 0 and "unknown" in page
    assert "Green: chosen for LoRA." in page


def test_no_signal_is_reported_and_nothing_is_placed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores(table([1.0, 1.0, 1.0])).save(tmp_path / "s.json")
    assert main(["report", str(tmp_path / "s.json"), "-o", str(tmp_path / "r.html")]) == 0
    assert "no signal" in capsys.readouterr().out
    content = (tmp_path / "r.html").read_text()
    assert 'class="card warn"' in content and "No signal: every type" in content
    assert "Placements and their cost" not in content


def test_one_sample_and_layers_without_a_number(tmp_path: Path) -> None:
    source = table(LEVELS, layers=3, samples=1)
    source.layer[:] = -1
    scores(source).save(tmp_path / "s.json")
    assert main(["report", str(tmp_path / "s.json"), "-o", str(tmp_path / "r.html")]) == 0
    Page((tmp_path / "r.html").read_text())


def test_comparison_of_two_files() -> None:
    first = scores(table([0.6, 0.8, 1.0, 1.4], sample_sd=0.01), data="code")
    second = scores(table([0.6, 0.8, 1.5, 1.4], sample_sd=0.01, seed=1), data="maths")
    found = compare_scores(first, second)
    assert (found.first_name, found.second_name) == ("code", "maths")
    assert [row.type for row in found.rows] == ["a", "b", "c", "d"]
    assert found.rows[2].ratio == pytest.approx(1.5, rel=0.02) and found.rows[2].differs and not found.rows[0].differs
    assert found.tau == pytest.approx(4 / 6)
    assert found.shared == ("a", "b") and found.swapped == ("c", "d")
    alike = compare_scores(first, first)
    assert (alike.first_name, alike.second_name) == ("code (1)", "code (2)") and alike.tau == 1.0
    named = compare_scores(first, scores(table([0.6, 0.8]), data="code", name="other"))
    assert named.second_name == "other on code" and named.only_first == ("c", "d")
    strange = table([1.5])
    with pytest.raises(InputError, match="no module type in common"):
        compare_scores(first, scores(type(strange)(**{**vars(strange), "types": ("z",)})))


def test_paper_script_scores_have_a_page_without_statistics(tmp_path: Path) -> None:
    plain = scores(table(LEVELS))
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj")
    modules = tuple(
        type(module)(**{**vars(module), "name": module.name.replace(f".{old}", f".{new}"), "type": new})
        for module in plain.modules
        for old, new in zip("abcde", names, strict=True)
        if module.type == old
    )
    settings = {**plain.provenance["settings"], "compat": "paper-script"}
    found = Scores(
        modules,
        plain.totals,
        np.array(plain.sample_ids),
        np.array(plain.sample_batches),
        (),
        {**plain.provenance, "settings": settings},
    )
    found.save(tmp_path / "s.json")
    assert main(["report", str(tmp_path / "s.json"), "-o", str(tmp_path / "r.html")]) == 0
    page = Page((tmp_path / "r.html").read_text())
    assert page.tags.count("svg") == 2 * 2 and "over samples" not in page.text and "lowest" in page.text
    assert [item.name for item in drawings(found, (), None)] == ["heatmap", "layers"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "no/such/r.html"], "name a writable folder that exists"),
        (["--rank", "0"], "`--rank` must be at least 1"),
        (["--types", "many"], "`--types` must be a number or auto"),
        (["--against", "missing.json"], "cannot read"),
        (["--figures", "{file}"], "is a file; name a folder"),
    ],
)
def test_mistakes(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores(table(LEVELS)).save(tmp_path / "s.json")
    assert main(["report", *[a.format(file=tmp_path / "s.json") for a in [str(tmp_path / "s.json"), *arguments]]]) == 2
    assert message in capsys.readouterr().err


def test_types_that_are_no_place_for_lora_are_shown_with_the_reason(tmp_path: Path) -> None:
    found = scores(table(LEVELS, layers=4))
    reason = "it is a gate"
    modules = tuple(replace(module, no_place=reason * (module.type == "a")) for module in found.modules)
    replace(found, modules=modules).save(tmp_path / "s.json")
    assert main(["report", str(tmp_path / "s.json"), "-o", str(tmp_path / "r.html"), "--types", "2"]) == 0
    page = Page((tmp_path / "r.html").read_text())
    assert (
        f"no place for LoRA: {reason}" in page.text
        and f"Scored, no place for LoRA: a (4 modules): {reason}." in page.text
    )
    # The lowest type is passed over: the two next are chosen.
    assert "Put LoRA on b and c: 2 of 4 module types" in page.text
