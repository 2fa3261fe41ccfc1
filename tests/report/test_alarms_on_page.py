"""The table of alarms, in a real browser."""

import pytest
from report.chromium import texts

from megatron_pz.report.alarms import ALARMS
from megatron_pz.report.jsonl import to_line
from megatron_pz.report.page import write_page


def test_every_alarm_stands_on_the_page_with_state_meaning_and_what_to_do(browser, tmp_path):
    rows = [
        {"step": s, "truncated_share/mask": 0.5, "mask/valid_rate": 0.9, "num_surviving_groups": 9.0}
        for s in range(1, 8)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(map(to_line, rows)))
    browser.open(write_page(tmp_path))
    assert browser.complaints() == []
    shown = browser.js(
        "[...document.querySelectorAll('.alarms tbody tr')].map((r) => [...r.children].map((c) => c.textContent))"
    )
    states = {name.replace(" ", "_"): state for name, state, *_ in shown}
    assert set(states) == {alarm.name for alarm in ALARMS} and shown[0][0] == "truncation"
    assert states["truncation"] == "sounds first at step 3"
    assert (states["invalid_masks"], states["near_misses"]) == ("silent ", "not measured ")
    assert {(row[3], row[4]) for row in shown} == {(alarm.meaning, alarm.action) for alarm in ALARMS}
    assert texts(browser, ".alarms .sign.past") == ["truncated_share/mask over 0.1: 0.5"]
    assert texts(browser, "#alarms .note")[0].startswith(f"1 of {len(ALARMS)} sound")


@pytest.mark.parametrize("width", [1280, 800, 400])
def test_names_of_metrics_in_the_alarms_stand_in_one_piece(browser, page, width):
    browser.open(page, width=width)
    # A piece of text that is broken over lines has a box a line.
    broken = """[...document.querySelectorAll('.alarms .sign')].flatMap((sign) => {
      const pieces = document.createTreeWalker(sign, NodeFilter.SHOW_TEXT), found = [];
      while (pieces.nextNode()) for (const match of pieces.currentNode.data.matchAll(/\\S+/g)) {
        const range = document.createRange();
        range.setStart(pieces.currentNode, match.index);
        range.setEnd(pieces.currentNode, match.index + match[0].length);
        if (range.getClientRects().length > 1) found.push(match[0]);
      }
      return found; })"""
    assert browser.js(broken) == []
    assert browser.js("document.documentElement.scrollWidth") == width
