(function main() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const asked = location.hash;
  let browser = null;
  if (data.rounds.length) {
    browser = new Browser(byId("browser"), data.rounds);
    const fromAddress = () => {
      const place = new URLSearchParams(location.hash.slice(1));
      if (!place.has("step")) return;
      const more = {};
      for (const name of ["paragraph", "mask"]) if (place.has(name)) more[name] = Number(place.get(name)) || 0;
      browser.goToStep(Number(place.get("step")) || 0, more);
    };
    browser.go({}, true);
    fromAddress();
    addEventListener("hashchange", fromAddress);
  }
  if (data.steps.length) {
    byId("curves").hidden = false;
    new Curves(byId("charts"), byId("smoothing"), data, (step) => {
      if (!browser) return;
      browser.goToStep(step);
      byId("rollouts").scrollIntoView();
    });
  }
  if (data.questions.length) {
    byId("questions").hidden = false;
    const sets = [...new Set(data.questions.map((q) => q.set))];
    for (const set of sets) {
      const own = data.questions.filter((q) => q.set === set);
      byId("question-list").append(el("details", { open: own === data.questions && own.length < 9 },
        el("summary", null, `${words(set)}: ${own.length} questions`), own.map(question)));
    }
  }
  // Only now has the page its full height.
  if (asked.startsWith("#step=")) byId("rollouts").scrollIntoView({ behavior: "instant" });
  document.body.dataset.ready = "yes";

  function question(q) {
    const pieces = q.text.split("[mask]");
    const text = el("p", null, pieces.flatMap((piece, i) => (i ? [el("mark", null, q.target || "?"), piece] : [piece])));
    const chips = q.answers.map((a) => el("span", { class: "chip " + (a.right ? "good" : ""), title: a.answer },
      `${a.step}: ${typeof a.answer === "string" ? a.answer : "no answer"}`));
    return el("div", { class: "question" }, text, el("div", { class: "answers" }, chips));
  }
})();
