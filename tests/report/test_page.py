"""The page in a real browser: what it shows, that it runs nothing and asks for nothing, and that keys work."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from report.chromium import Chromium, texts
from report.recorded_run import TEXTS, record

from megatron_pz.errors import DiskError, ReportError
from megatron_pz.report.jsonl import read_rows, to_line
from megatron_pz.report.page import build_page, write_page

ROOT = Path(__file__).parents[2]
HOSTILE = (
    "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'> {{data}} <!-- & \u2028",
    "Plain text <b>not bold</b>, <a href=\"javascript:window.pwned=3\">here</a> and ${window.pwned = 4} `too`.",
)  # fmt: skip


def test_the_page_shows_curves_and_rollouts_and_asks_for_nothing_else(browser, page):
    browser.open(page)
    assert browser.complaints() == []
    assert browser.requests() == [page.resolve().as_uri()]
    titles = texts(browser, ".chart h3")
    wanted = "Rewards|Fixed masks|Completion length|Entropy|Mask health|Seconds per phase|Tokens per phase|Mismatch"
    assert set(wanted.split("|")) | {"Gradient norm", "Learning rate"} <= set(titles)
    assert texts(browser, "h1") == ["recorded"]
    num_rollouts = len((page.parent / "rollouts.jsonl").read_bytes().splitlines())
    assert num_rollouts > 2000
    assert texts(browser, "#rollouts-note") == [f"All {num_rollouts:,} rollouts of 20 steps."]
    # Each line has as many points as there are records with a value: 20 steps of play.
    assert browser.js("document.querySelector('#chart-rewards .curve').getAttribute('d').split('L').length") == 20
    assert browser.js("document.querySelectorAll('#chart-fixed-masks circle').length") == 3 * 4  # steps 0, 10, 20
    assert browser.js(
        "[...document.querySelectorAll('.curve')].every((p) => !/NaN|Infinity/.test(p.getAttribute('d')))"
    )


def test_settings_facts_and_attribution_are_on_the_page(browser, page):
    browser.open(page)
    facts = dict(zip(texts(browser, "dt"), texts(browser, "dd"), strict=True))
    assert facts["Model"] == "examples/demo_policy"
    assert facts["Commit"] == "0123abc"
    assert facts["Layout"] == "TP 1 · PP 1 · EP 1 · CP 1 · 1 rank"
    assert facts["Round"] == "4 paragraphs × 6 masks × 6 predictions"
    assert facts["Attribution"] == "Notes <made up> for a test & by nobody"
    assert 'hf_model = "examples/demo_policy"' in texts(browser, "#settings pre")[0]


def test_the_mask_is_highlighted_in_its_paragraph_with_its_predictions(browser, page):
    browser.open(page, fragment="#step=12&paragraph=1")
    assert texts(browser, ".stepper output") == ["Step 12"]
    passage = texts(browser, ".passage")[0]
    assert passage in TEXTS
    marked = texts(browser, ".passage mark")
    chosen = texts(browser, ".mask-row[aria-current=true] .quoted")
    assert marked and set(marked) == set(chosen)
    assert len(texts(browser, ".mask-row")) == 6
    assert len(texts(browser, ".prediction")) == 6
    right = texts(browser, ".prediction .chip.good")
    assert len(right) == browser.js("document.querySelectorAll('.mask-row[aria-current=true] .pip.right').length") > 0
    rewards = [re.search(r"reward (\d)", text)[1] for text in texts(browser, ".prediction .figure")]
    assert rewards.count("1") == len(right)
    assert all(re.search(r"adv\. [+−±]\d\.\d\d", text) for text in texts(browser, ".prediction .figure"))
    assert set(texts(browser, ".prediction .prediction-head > .chip:last-child")) <= {"trained", "dropped"}


def test_invalid_masks_say_why(browser, page):
    browser.open(page)
    rows = list(read_rows(page.parent / "rollouts.jsonl"))
    everything = set()
    for step in range(1, 8):
        browser.js(f"location.hash = '#step={step}&paragraph=0'")
        browser.wait(f"document.querySelector('.stepper output').textContent === 'Step {step}'")
        wanted = [row["reject_reason"] for row in rows if row["group_id"] == f"{step}.0" and not row["valid"]]
        shown = texts(browser, ".mask-row .chip.bad")
        assert shown == [reason.replace("_", " ") for reason in wanted]
        everything |= set(shown)
    assert len(everything) >= 3


def test_characters_outside_of_the_basic_plane_are_highlighted_in_place(browser, tmp_path):
    row = {"step": 1, "paragraph_id": "p", "valid": True, "reward": 1.0, "advantage": 0.0, "trained": True}
    mask = row | {
        "role": "mask",
        "group_id": "1.0",
        "mask_id": "1.0.0",
        "prompt": "🗾🗾 über 東京 Tokyo",
        "response": "r",
    }
    (tmp_path / "rollouts.jsonl").write_text(to_line(mask | {"answer": "東京"}), encoding="utf-8")
    browser.open(write_page(tmp_path))
    assert texts(browser, ".passage") == ["🗾🗾 über 東京 Tokyo"]
    assert texts(browser, ".passage mark") == ["東京"]


def test_hovering_reads_all_charts_at_one_step(browser, page):
    browser.open(page, height=1400)
    place = "(() => { const r = document.querySelector('#chart-rewards svg').getBoundingClientRect();"
    browser.hover(*browser.js(place + " return [r.left + r.width / 2, r.top + 50]; })()"))
    assert set(texts(browser, ".chart-unit")) == {texts(browser, ".chart-unit")[0]}
    step = int(texts(browser, ".chart-unit")[0].removeprefix("step "))
    assert step in (9, 10, 11)
    shown = texts(browser, "#chart-rewards .legend b")
    assert all(re.fullmatch(r"0\.\d+", value) for value in shown) and len(shown) == 2
    browser.hover(2, 2)
    assert texts(browser, ".chart-unit")[0] == "mean of rollouts"


def test_the_page_can_be_used_with_keys_alone(browser, page):
    browser.open(page)
    browser.js("document.querySelector('#chart-rewards svg').focus()")
    browser.press("End")
    browser.press("ArrowLeft")
    assert texts(browser, "#chart-rewards .chart-unit") == ["step 19"]
    browser.press("ArrowLeft", shift=True)
    assert texts(browser, "#chart-entropy .chart-unit") == ["step 9"]
    browser.press("Enter")
    assert texts(browser, ".stepper output") == ["Step 9"]
    browser.js("document.querySelector('.stepper input').focus()")
    browser.press("ArrowRight")
    assert texts(browser, ".stepper output") == ["Step 10"]
    browser.press("Tab")
    browser.press("ArrowDown")
    browser.press("ArrowDown")
    assert browser.js("[...document.querySelectorAll('.paragraph-list button')].map((b) => b.ariaCurrent)") == [
        "false", "false", "true", "false",
    ]  # fmt: skip
    browser.js("document.querySelector('.mask-row').focus()")
    browser.press("End")
    assert browser.js("document.activeElement === document.querySelector('.mask-row:last-child')")
    assert browser.js("document.activeElement.ariaCurrent") == "true"
    assert browser.js("location.hash") == "#step=10&paragraph=2&mask=5"


@pytest.mark.parametrize("width", [1000, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_its_window_and_follows_the_colour_scheme(browser, page, tmp_path, width, dark):
    browser.open(page, width=width, dark=dark)
    assert browser.js("document.documentElement.scrollWidth") == width
    right_ends = "[...document.querySelectorAll('main *')].map((node) => node.getBoundingClientRect().right)"
    assert browser.js(f"Math.max(...{right_ends})") <= width
    shot = Image.open(browser.screenshot(tmp_path / "shot.png", whole=True)).convert("L")
    assert shot.size[0] == width and shot.size[1] > 2000
    background = shot.getpixel((1, 1))
    assert background < 40 if dark else background > 230
    # Something is drawn: a fair share of the page is neither background nor card.
    other = sum(count for level, count in enumerate(shot.histogram()) if abs(level - background) > 60)
    assert other > 0.01 * shot.size[0] * shot.size[1]


def test_text_is_told_from_its_background_in_both_schemes(browser, page):
    # Contrast of the small text by the WCAG formula; 4.5 is its bound for body text.
    for dark in (False, True):
        browser.open(page, dark=dark)
        for selector, least in (
            (".note", 4.5),
            (".legend", 4.5),
            ("#rollouts .sub", 3.0),
            (".chip.bad", 4.5),
            ("mark", 4.5),
        ):
            assert browser.js(CONTRAST.replace("SELECTOR", selector)) >= least, (selector, dark)


CONTRAST = """(() => {
  const light = (rgb) => { const [r, g, b] = rgb.match(/[\\d.]+/g).slice(0, 3).map((v) => {
    v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  let node = document.querySelector("SELECTOR");
  const ink = light(getComputedStyle(node).color);
  while (getComputedStyle(node).backgroundColor === "rgba(0, 0, 0, 0)") node = node.parentElement;
  const paper = light(getComputedStyle(node).backgroundColor);
  return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
})()"""


def test_text_with_markup_is_inert(browser, tmp_path):
    run = record(tmp_path / "<b>run", 6, texts=HOSTILE * 4)
    (run / "config.toml").write_text(f"# {HOSTILE[0]}\n[model]\nhf_model = '''{HOSTILE[1]}'''\n", encoding="utf-8")
    (run / "run.json").write_text(to_line({"attribution": HOSTILE[0], "commit": HOSTILE[1]}), encoding="utf-8")
    browser.open(write_page(run))
    assert browser.complaints() == []
    assert browser.js("window.pwned") is None
    assert browser.js("document.scripts.length") == 2
    assert browser.js("document.querySelectorAll('main img, main b b, main a, h1 b').length") == 0
    assert texts(browser, ".passage")[0] in HOSTILE
    assert texts(browser, "h1") == ["<b>run"]
    assert HOSTILE[0] in texts(browser, "dd")


def test_a_script_that_got_in_would_not_run(browser, page, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text(encoding="utf-8").replace("</body>", "<script>window.pwned = 1</script></body>"))
    browser.open(broken)
    assert browser.js("window.pwned") is None
    assert any("Content Security Policy" in said for said in browser.complaints())


def test_an_empty_run_says_so(browser, tmp_path):
    browser.open(write_page(tmp_path))
    assert browser.complaints() == []
    assert "Nothing has been recorded" in texts(browser, ".lead")[0]
    assert texts(browser, "#rollouts-note") == ["No rollout has been recorded yet."]
    assert browser.js("document.getElementById('curves').hidden")


def test_a_killed_run_is_shown_up_to_its_last_whole_line(browser, tmp_path):
    run = record(tmp_path / "run", 5)
    for name in ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl", "config.toml", "run.json"):
        data = (run / name).read_bytes()
        (run / name).write_bytes(data[: len(data) - 40])
    browser.open(write_page(run))
    assert browser.complaints() == []
    assert texts(browser, ".lead") == ["step 4"]  # the settings are cut off too
    assert "1 line could not be read" in texts(browser, "#rollouts-note")[0]
    assert "1 line of metrics.jsonl could not be read." in texts(browser, "#curves .note")


def test_one_record_alone_is_drawn(browser, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/fixed_masks/accuracy": 0.25}\n')
    browser.open(write_page(tmp_path))
    assert browser.complaints() == []
    assert texts(browser, ".chart h3") == ["Fixed masks"]
    assert texts(browser, "#chart-fixed-masks .legend b") == ["25%"]


def test_supervised_and_random_span_runs_are_shown(browser, tmp_path):
    random_span = record(tmp_path / "random", 3, task="random_span")
    browser.open(write_page(random_span))
    assert browser.complaints() == []
    assert "Masks, chosen by chance" in texts(browser, ".game h3")
    assert texts(browser, ".passage")[0] in TEXTS and texts(browser, ".passage mark")
    (tmp_path / "metrics.jsonl").write_text(
        "".join(to_line({"step": s, "loss": 3 - s / 10, "entropy": 2.0}) for s in (1, 2))
    )
    (tmp_path / "config.toml").write_text('[task]\ntask = "continue_pt"\n')
    browser.open(write_page(tmp_path))
    assert texts(browser, "#rollouts-note") == ["The task continue_pt learns from text and generates nothing."]
    assert texts(browser, ".chart h3") == ["Entropy", "Loss"]


def test_where_format_is_paid_answers_are_readable_not_right(browser, tmp_path):
    run = record(tmp_path / "control", 3, task="format_only")
    config = (run / "config.toml").read_text()
    for warm_up, chips, told in (
        ("", {"readable", "unreadable"}, "readable"),
        ('warm_up_task = "random_span"\nwarm_up_task_steps = 2\n', {"right", "wrong"}, "right"),
    ):
        (run / "config.toml").write_text(config.replace("[task]\n", f"[task]\n{warm_up}"))
        browser.open(write_page(run), fragment="#step=2&paragraph=0")
        assert browser.complaints() == []
        shown = set()
        for row in range(len(texts(browser, ".mask-row"))):
            browser.js(f"document.querySelectorAll('.mask-row')[{row}].click()")
            shown |= set(texts(browser, ".prediction-head > .chip:first-child"))
        assert shown == chips
        assert re.fullmatch(rf"\d+ of \d+ masks valid, \d+ of \d+ {told}", texts(browser, ".paragraph-list .sub")[0])
        assert browser.js("document.querySelector('.pips').ariaLabel").endswith(f" {told}")
    assert texts(browser, "#chart-prediction-groups .legend span")[0].startswith("all readable")


def test_a_long_run_stays_a_small_page(browser, tmp_path):
    run = record(tmp_path / "run", 12)
    metrics, rollouts = (run / "metrics.jsonl").read_text(encoding="utf-8"), (run / "rollouts.jsonl").read_bytes()
    last = metrics.splitlines()[-1]
    (run / "metrics.jsonl").write_text(
        "".join(last.replace('"step": 12', f'"step": {s}') + "\n" for s in range(1, 5001))
    )
    size = len(rollouts)
    path = write_page(run, max_rollout_bytes=size // 4)
    assert path.stat().st_size < 3_000_000
    browser.open(path)
    note = texts(browser, "#rollouts-note")[0]
    assert re.match(
        r"[\d,]+ of [\d,]+ rollouts: 12 of 12 steps, evenly chosen, without \d+ paragraphs of these steps", note
    )
    assert texts(browser, "#curves .note")[0] == "Each point is the mean of 4 records."


def test_the_command_writes_the_page_and_tells_where(tmp_path):
    run = record(tmp_path / "run", 2)
    (run / "report.html").write_text("old")
    command = [sys.executable, "-m", "megatron_pz.report", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{run}/report.html: 0.")
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not list(run.glob("*.part"))
    other = subprocess.run([*command, "--out", str(tmp_path / "x.html")], cwd=ROOT, capture_output=True, timeout=60)
    assert other.returncode == 0 and (tmp_path / "x.html").is_file()


def test_what_cannot_be_shown_or_written_is_told(tmp_path):
    with pytest.raises(ReportError, match="is not a folder; wanted a run directory"):
        build_page(tmp_path / "none")
    with pytest.raises(DiskError, match="cannot be written: .* Try --out."):
        write_page(tmp_path, tmp_path / "no" / "such" / "page.html")
    command = [sys.executable, "-m", "megatron_pz.report", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "is not a folder" in done.stderr and "Traceback" not in done.stderr


def test_without_a_browser_the_way_to_get_one_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(pytest.skip.Exception, match="apt-get install -y --no-install-recommends chromium"):
        Chromium(tmp_path)
