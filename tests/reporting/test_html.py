"""The page: self-contained, safe against hostile text, and complete."""

import math
import re
from html.parser import HTMLParser

import pytest

from llmtune.io.manifest import CheckRecord, Manifest
from llmtune.reporting.build import build_report
from llmtune.reporting.charts import draw_interval, interval_limit, thin_points
from llmtune.reporting.html import render_html
from llmtune.reporting.sections.merge import describe_check
from llmtune.reporting.sections.training import draw_loss_curve
from tests.reporting.planted import (
    PlantedSuite,
    improve,
    plant_generations,
    plant_log,
    plant_run,
    right_wrong,
)

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}"
BASE = right_wrong(120, 0.5, seed=0)
VOID = {"meta", "link", "br", "img", "line", "circle"}


class TagChecker(HTMLParser):
    """Collects every tag and checks that what is opened is closed in order."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.stack = set(), [], []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.stack.pop() == tag


@pytest.fixture
def hostile_page(tmp_path):
    """The page of a run in which every text that others write is hostile."""
    suite = PlantedSuite(
        HOSTILE.replace("/", "|"),
        "target",
        {"base": BASE, "tuned": improve(BASE, 0.3, seed=1)},
        slices=[{"who": HOSTILE if index % 2 else "other"} for index in range(120)],
    )
    parted = {"prompt": 3, "position": 1, "live_text": HOSTILE, "merged_text": f"x{HOSTILE}"}
    check = {"dtype": HOSTILE, "kl": 1e-6, "divergences": [parted]}
    merge = {HOSTILE: HOSTILE, "check": check}
    manifest = Manifest(
        config={"run_dir": HOSTILE, "evaluate": {"bootstrap_samples": 1000}},
        base={"origin": HOSTILE},
        data={HOSTILE: {"notes": [[HOSTILE, 3]], "bad_rows": [{HOSTILE: HOSTILE}]}},
        stages={"merge": {"seconds": 1.0, "result": merge}},
    )
    run = plant_run(tmp_path, [suite], manifest=manifest)
    plant_log(run, [2.0, 1.0], {2: 1.5})
    row = {"prompt": HOSTILE, "base": HOSTILE, "tuned": f"other {HOSTILE}", "reference": HOSTILE}
    plant_generations(run, [row])
    return render_html(build_report(run))


def test_hostile_text_is_shown_and_never_run(hostile_page):
    checker = TagChecker()
    checker.feed(hostile_page)
    assert not checker.tags & {"script", "img", "iframe", "object", "base", "form"}
    assert not [name for name, _ in checker.attributes if name.startswith("on")]
    assert "alert(&#39;x&#39;)" in hostile_page
    assert "{{ 7*7 }}" in hostile_page


def test_the_page_is_well_formed(hostile_page):
    checker = TagChecker()
    checker.feed(hostile_page)
    assert checker.stack == []
    ids = [value for name, value in checker.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_the_page_asks_for_nothing_from_outside(hostile_page):
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", hostile_page)
    checker = TagChecker()
    checker.feed(hostile_page)
    sources = [v for name, v in checker.attributes if name in ("src", "href", "srcset", "data")]
    assert {source for source in sources if not source.startswith("#")} == {"data:,"}


def test_light_dark_and_paper_are_styled(hostile_page):
    assert "prefers-color-scheme: dark" in hostile_page
    assert "@media print" in hostile_page
    assert 'name="viewport"' in hostile_page


def test_verdict_stands_before_every_table(hostile_page):
    assert hostile_page.index('class="word"') < hostile_page.index("<table")


def test_changed_words_are_marked_on_both_sides(tmp_path):
    run = plant_run(tmp_path)
    row = {"prompt": "p", "base": "it is very sour today", "tuned": "it is quite sweet today"}
    plant_generations(run, [row])
    page = render_html(build_report(run))
    assert "it is <del>very sour</del> today" in page
    assert "it is <ins>quite sweet</ins> today" in page


def test_interval_plot_turns_the_tone_by_what_is_clear_of_zero():
    for gain, kind in ((0.1, "better"), (-0.1, "worse"), (0.01, "unclear")):
        plot = draw_interval(gain, gain - 0.05, gain + 0.05, limit=0.2)
        assert f'class="interval {kind}"' in plot


def test_interval_plot_is_symmetric_around_its_middle():
    plot = draw_interval(0.0, -0.1, 0.1, limit=0.2)
    center = float(re.search(r'cx="([\d.]+)"', plot).group(1))
    zero = float(re.search(r'class="zero" x1="([\d.]+)"', plot).group(1))
    assert center == zero == 90.0


@pytest.mark.parametrize("largest", [1e-9, 0.013, 0.19, 7.0, 0.0])
def test_interval_axis_holds_every_end(largest):
    assert interval_limit([largest, -largest / 2]) >= largest


def test_loss_curve_stays_inside_its_frame():
    train = [(step, 5 * math.exp(-step / 30) + 0.2) for step in range(1, 1001)]
    drawn = draw_loss_curve(train, [(500, 0.3), (1000, 0.25)])
    width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', drawn).groups())
    line = max(re.findall(r' d="([^"]+)"', drawn), key=len)
    places = re.findall(r"[ML] (\S+) (\S+)", line)
    for x, y in places:
        assert 0 <= float(x) <= width and 0 <= float(y) <= height
    assert 20 < len(places) <= 300
    assert drawn.count("var(--paper)") == 2


def test_one_point_and_a_flat_curve_can_be_drawn():
    assert "var(--good)" in draw_loss_curve([], [(10, 0.5)])
    assert "var(--base)" in draw_loss_curve([(1, 0.5), (2, 0.5)], [])


def test_a_chart_takes_its_colors_from_the_page_and_has_ids_of_its_own():
    first = draw_loss_curve([(1, 0.5), (2, 0.4)], [(2, 0.3)])
    assert not re.search(r"#[0-9a-f]{6}", first)
    assert "http" not in first and "<metadata" not in first
    ids = re.findall(r' id="([^"]+)"', first)
    assert ids and all(each.startswith("loss-") for each in ids)
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', first)) <= {
        pair for each in ids for pair in ((each, ""), ("", each))
    }
    assert first == draw_loss_curve([(1, 0.5), (2, 0.4)], [(2, 0.3)])


def test_thinned_points_keep_the_mean():
    points = [(float(i), float(i % 7)) for i in range(1200)]
    thinned = thin_points(points, 300)
    assert len(thinned) == 300
    mean = sum(y for _, y in thinned) / 300
    assert mean == pytest.approx(sum(y for _, y in points) / 1200)


def test_the_merge_check_is_a_sentence_and_shows_where_answers_part():
    check: CheckRecord = {
        "dtype": "float32",
        "num_tokens": 1204,
        "kl": 2.3e-6,
        "num_labels": 20,
        "num_same_labels": 20,
        "divergences": [
            {
                "prompt": 7,
                "position": 17,
                "live_margin": 0.0031,
                "merged_margin": 0.0012,
                "live_text": "made of rust",
                "merged_text": "made of dust",
            }
        ],
    }
    shown = describe_check(check)
    assert shown.sentence.endswith("both computed in float32, gave the same 20 of 20 labels.")
    assert [fact.value for fact in shown.facts] == ["1\N{NARROW NO-BREAK SPACE}204", "2.3e-06"]
    assert "Open prompt 8" in shown.divergences[0].title
    assert "0.0031" in shown.divergences[0].title and "0.0012" in shown.divergences[0].title
    assert shown.divergences[0].merged[-1].text == "dust"
    assert describe_check(None) is None
