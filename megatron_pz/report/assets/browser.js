// The browser of rollouts: step, paragraph, mask, prediction. What is chosen stands in the address, so it can be linked to.
class Browser {
  constructor(node, rounds) {
    this.rounds = rounds;
    this.at = { round: rounds.length - 1, paragraph: 0, mask: null };
    this.slider = el("input", { type: "range", min: 0, max: rounds.length - 1, "aria-label": "Step",
      oninput: () => this.go({ round: Number(this.slider.value) }) });
    this.output = el("output", { id: "step-shown" });
    this.back = el("button", { type: "button", "aria-label": "Step before", onclick: () => this.go({ round: this.at.round - 1 }) }, "‹");
    this.next = el("button", { type: "button", "aria-label": "Next step", onclick: () => this.go({ round: this.at.round + 1 }) }, "›");
    this.list = el("nav", { class: "paragraph-list", "aria-label": "Paragraphs" });
    this.game = el("article", { class: "game" });
    moveByArrows(this.list);
    node.append(el("div", { class: "stepper" }, this.back, this.output, this.next, this.slider),
      el("div", { class: "browse" }, this.list, this.game),
      el("p", { class: "keys" }, el("kbd", null, "Tab"), " moves between the lists, ", el("kbd", null, "↑"), " ", el("kbd", null, "↓"),
        " along them, ", el("kbd", null, "←"), " ", el("kbd", null, "→"), " on the slider change the step."));
  }

  // `change` says what is chosen anew; what hangs below it starts at its own beginning.
  go(change, isFirst) {
    const round = Math.max(0, Math.min(this.rounds.length - 1, change.round === undefined ? this.at.round : change.round));
    const paragraphs = this.rounds[round].paragraphs;
    const wanted = change.paragraph === undefined ? this.at.paragraph : change.paragraph;
    const paragraph = Math.max(0, Math.min(paragraphs.length - 1, wanted));
    const isSame = round === this.at.round && paragraph === this.at.paragraph && this.at.mask !== null;
    let mask = change.mask !== undefined ? change.mask : isSame ? this.at.mask : best(paragraphs[paragraph].masks);
    mask = Math.max(0, Math.min(paragraphs[paragraph].masks.length - 1, mask));
    const keepsList = round === this.at.round && this.list.childElementCount > 0;
    this.at = { round, paragraph, mask };
    this.draw(keepsList);
    if (!isFirst) history.replaceState(null, "", `#step=${this.rounds[round].step}&paragraph=${paragraph}&mask=${mask}`);
  }

  goToStep(step, more) {
    let nearest = 0;
    this.rounds.forEach((r, i) => { if (Math.abs(r.step - step) < Math.abs(this.rounds[nearest].step - step)) nearest = i; });
    this.go({ round: nearest, ...more });
  }

  draw(keepsList) {
    const { round, paragraph } = this.at, { step, paragraphs, verdicts } = this.rounds[round];
    this.slider.value = round;
    this.slider.setAttribute("aria-valuetext", `step ${step}`);
    this.output.textContent = `Step ${step}`;
    this.back.disabled = round === 0;
    this.next.disabled = round === this.rounds.length - 1;
    if (!keepsList) this.list.replaceChildren(...paragraphs.map((p, i) => this.item(p, i, verdicts)));
    [...this.list.children].forEach((item, i) => item.setAttribute("aria-current", String(i === paragraph)));
    const shown = this.list.children[paragraph];  // scrollIntoView would move the page too
    this.list.scrollTop = Math.max(shown.offsetTop + shown.offsetHeight - this.list.clientHeight, Math.min(this.list.scrollTop, shown.offsetTop));
    this.drawGame(paragraphs[paragraph], verdicts);
  }

  item(paragraph, index, verdicts) {
    const predictions = paragraph.masks.flatMap((mask) => mask.predictions);
    const paid = predictions.filter((p) => p.reward > 0).length, valid = paragraph.masks.filter((mask) => mask.valid).length;
    return el("button", { type: "button", onclick: () => this.go({ paragraph: index, mask: best(paragraph.masks) }) },
      el("span", { class: "snippet" }, Array.from(paragraph.text).slice(0, 60).join("")),
      el("span", { class: "sub" }, `${valid} of ${paragraph.masks.length} masks valid, ${paid} of ${predictions.length} ${verdicts[0]}`));
  }

  drawGame(paragraph, verdicts) {
    const { mask: chosen } = this.at, mask = paragraph.masks[chosen];
    const hadFocus = this.game.contains(document.activeElement);
    const rows = el("div", { class: "mask-list", role: "group", "aria-label": "Masks" },
      paragraph.masks.map((m, i) => maskRow(m, i === chosen, verdicts, () => this.go({ mask: i }))));
    moveByArrows(rows);
    this.game.replaceChildren(passage(paragraph, chosen),
      el("p", { class: "source" }, String(paragraph.id), mask.version === null || mask.version === undefined ? "" : ` · policy version ${mask.version}`),
      el("h3", null, paragraph.masks.some((m) => m.response !== undefined) ? "Masks" : "Masks, chosen by chance"), rows,
      ...responseBlock(mask, "mask"), ...predictionList(mask, verdicts));
    if (hadFocus) rows.children[chosen].focus();
  }
}

function best(masks) {
  let at = 0;
  masks.forEach((mask, i) => { if (mask.predictions.length && (mask.reward || 0) > (masks[at].reward || 0)) at = i; });
  return at;
}

// The paragraph with the chosen mask marked and the places of the others underlined. Spans count code points.
function passage(paragraph, chosen) {
  const characters = Array.from(paragraph.text), kinds = new Uint8Array(characters.length);
  paragraph.masks.forEach((mask, i) => mask.spans.forEach(([start, end]) => {
    for (let k = start; k < end; k++) kinds[k] = i === chosen ? 2 : Math.max(kinds[k], 1);
  }));
  const node = el("p", { class: "passage" });
  for (let start = 0; start < characters.length;) {
    let end = start;
    while (end < characters.length && kinds[end] === kinds[start]) end++;
    const text = characters.slice(start, end).join("");
    node.append(kinds[start] === 2 ? el("mark", null, text) : kinds[start] === 1 ? el("span", { class: "other" }, text) : text);
    start = end;
  }
  return node;
}

function maskRow(mask, isChosen, verdicts, onclick) {
  const paid = mask.predictions.filter((p) => p.reward > 0).length;
  return el("button", { type: "button", class: "mask-row", "aria-current": String(isChosen), onclick },
    el("span", null, answerText(mask.answer), " ", mask.reject_reason && el("span", { class: "chip bad" }, words(mask.reject_reason))),
    el("span", { class: "pips", role: "img", "aria-label": `${paid} of ${mask.predictions.length} ${verdicts[0]}` },
      [...mask.predictions].sort((a, b) => b.reward - a.reward).map((p) => el("i", { class: "pip" + (p.reward > 0 ? " right" : "") }))),
    el("span", { class: "figure" }, ...figures(mask, 3)),
    el("span", null, mask.trained === undefined ? null : trainedChip(mask)));
}

function predictionList(mask, verdicts) {
  if (!mask.predictions.length) return [el("p", { class: "note" }, "Nobody was asked for this mask.")];
  const head = el("h3", null, "Predictions of ", el("span", { class: "quoted" }, `“${mask.answer}”`));
  return [head, el("div", null, mask.predictions.map((p) => el("div", { class: "prediction" },
    el("div", { class: "prediction-head" },
      el("span", { class: "chip " + (p.reward > 0 ? "good" : "bad") }, verdicts[p.reward > 0 ? 0 : 1]),
      answerText(p.answer),
      p.reject_reason && el("span", { class: "chip bad" }, words(p.reject_reason)),
      el("span", { class: "figure" }, ...figures(p, 0)),
      trainedChip(p)),
    ...responseBlock(p, "prediction"))))];
}

function figures(rollout, digits) {
  if (typeof rollout.reward !== "number") return [];
  const advantage = typeof rollout.advantage === "number" ? [" ", el("small", null, `adv. ${signed(rollout.advantage)}`)] : [];
  return [el("small", null, "reward "), rollout.reward.toFixed(digits), ...advantage];
}

function trainedChip(rollout) {
  return el("span", { class: "chip" }, rollout.trained ? "trained" : "dropped");
}

function answerText(answer) {
  return typeof answer === "string" ? el("span", { class: "quoted" }, answer) : el("span", { class: "quoted nothing" }, "no answer");
}

// A short response stands open; a long one (with thinking) is folded.
function responseBlock(rollout, name) {
  if (typeof rollout.response !== "string") return [];
  const text = el("pre", { class: "response" }, rollout.response);
  const length = typeof rollout.num_tokens === "number" ? `${rollout.num_tokens} tokens` : "";
  if (rollout.response.length <= 120) {
    return [el("p", { class: "response" }, rollout.response, el("span", { class: "sub" }, `   ${name}, ${length}`))];
  }
  return [el("details", null, el("summary", null, `${name}, ${length}`), text)];
}

function words(reason) {
  return reason.replaceAll("_", " ");
}
