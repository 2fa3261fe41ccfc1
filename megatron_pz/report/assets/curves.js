// Which curves there are, in which colours. A series without values is left out, a chart without series too.
const S = (name, label, color, dashed) => ({ name, label, color, dashed });
const CURVES = [
  ["The game", [
    { title: "Rewards", unit: "mean of rollouts", share: false, zero: true,
      series: [S("reward/mask/mean", "mask", "mask"), S("reward/prediction/mean", "prediction", "prediction")] },
    { title: "Fixed masks", unit: "answered right", share: true,
      series: [S("eval/fixed_masks/accuracy", "texts of the corpus", "green"), S("eval/held_out/accuracy", "held-out texts", "violet"),
        S("eval/fixed_masks/format_rate", "in a box", "green", true), S("eval/held_out/format_rate", "held out, in a box", "violet", true),
        S("eval/shuffled/accuracy", "words shuffled", "rose")] },
    { title: "Completion length", unit: "tokens",
      series: [S("tokens/completion/mask", "mask", "mask"), S("tokens/completion/prediction", "prediction", "prediction")] },
    { title: "Entropy", unit: "nats", zero: true,
      series: [S("entropy/mask", "mask", "mask"), S("entropy/prediction", "prediction", "prediction"), S("entropy", "text", "grey")] },
  ]],
  ["Masks and predictions", [
    { title: "Mask health", unit: "share of masks", share: true,
      series: [S("mask/valid_rate", "valid", "green"), S("mask/distinct_share", "distinct", "teal"),
        S("mask/whole_word_share", "whole words", "grey"), S("mask/stop_word_share", "stop words", "rose"),
        S("mask/lottery_share", "guessed by luck", "gold"), S("mask/visible_share", "still visible", "violet")] },
    { title: "Predictions", unit: "share", share: true,
      series: [S("prediction/format_rate", "in a box", "prediction"), S("prediction/near_miss_rate", "near miss", "gold"),
        S("truncated_share/prediction", "cut off", "rose"), S("truncated_share/mask", "mask cut off", "mask", true)] },
    { title: "Prediction groups", unit: "share of groups", share: true,
      series: [S("groups/all_right_share", "all right", "green"), S("groups/all_wrong_share", "all wrong", "rose"),
        S("groups/kept_share/prediction", "kept", "prediction"), S("groups/kept_share/mask", "mask groups kept", "mask"),
        S("groups/one_right_share", "one right", "gold")] },
    { title: "Repeated responses", unit: "share of a group", share: true,
      series: [S("groups/duplicate_share/mask", "mask", "mask"), S("groups/duplicate_share/prediction", "prediction", "prediction")] },
    { title: "Hidden text", unit: "mean",
      series: [S("mask/length_words", "words", "mask"), S("mask/occurrences", "occurrences", "teal")] },
    { title: "Rejected masks", unit: "rollouts, by reason", stacked: true,
      series: ["no_mask", "not_in_paragraph", "too_many_occurrences", "too_long", "truncated", "whole_paragraph", "empty",
        "forbidden_text", "partial_word", "prompt_too_long", "aborted"].map((reason, i) => S("mask/reject/" + reason, reason.replaceAll("_", " "),
        ["rose", "mask", "gold", "teal", "prediction", "violet", "green", "grey", "rose", "mask", "grey"][i])) },
    { title: "Surviving groups", unit: "groups", zero: true, series: [S("num_surviving_groups", "learnt from", "teal")] },
  ]],
  ["The update", [
    { title: "Loss", unit: "nats a token", series: [S("loss", "loss", "violet"), S("loss/mask", "mask's part", "mask"),
      S("loss/prediction", "prediction's part", "prediction")] },
    { title: "Gradient norm", unit: "before clipping", zero: true, series: [S("grad_norm", "norm", "teal")] },
    { title: "Learning rate", zero: true, series: [S("lr", "lr", "grey")] },
    { title: "Mismatch", unit: "engine to trainer, nats", log: true,
      series: [S("mismatch_kl", "KL", "rose"), S("mismatch/max_abs", "largest difference", "grey")] },
    { title: "Clipped tokens", unit: "share", share: true, series: [S("clip_fraction", "clipped", "gold")] },
    { title: "Probability ratio", unit: "mean", series: [S("ratio/mean", "ratio", "prediction")] },
    { title: "KL to the initial policy", unit: "nats", zero: true, series: [S("ref_kl", "KL", "violet")] },
    { title: "Mask generation's share", unit: "of the update", share: true,
      series: [S("token_share/mask", "tokens", "mask"), S("grad_share/mask", "gradient at the logits", "teal")] },
  ]],
  ["Time and tokens", [
    { title: "Seconds per phase", unit: "seconds a step", stacked: true,
      series: [S("time/rollout_s", "rollout", "mask"), S("time/train_s", "train", "prediction"), S("time/score_s", "score", "violet"),
        S("time/batch_s", "batch", "grey"), S("time/sync_s", "sync", "teal"), S("time/eval_s", "eval", "green"), S("time/checkpoint_s", "checkpoint", "gold")] },
    { title: "Tokens per phase", unit: "tokens a step", zero: true,
      series: [S("tokens/generated", "generated", "mask"), S("tokens/packed", "through the trainer", "prediction"), S("tokens/trained", "trained", "green")] },
    { title: "Memory", unit: "GiB", zero: true, divide: 2 ** 30, series: [S("memory/rss_bytes", "rank 0", "grey")] },
    { title: "Epoch", unit: "passes over the corpus", zero: true, series: [S("epoch", "epoch", "teal")] },
  ]],
];

class Curves {
  constructor(node, smoothing, data, openStep) {
    this.index = null;
    this.openStep = openStep;
    this.charts = [];
    for (const [heading, specs] of CURVES) {
      const charts = specs.map((spec) => this.make(spec, data)).filter(Boolean);
      if (!charts.length) continue;
      node.append(el("div", { class: "chart-group" }, el("h3", null, heading), el("div", { class: "chart-grid" }, charts.map((c) => c.node))));
      this.charts.push(...charts);
    }
    const usual = data.steps.length > 400 ? 20 : data.steps.length > 80 ? 5 : 1;
    smoothing.append(...[1, 5, 20, 100].map((n) => el("option", { value: n, selected: n === usual }, n === 1 ? "none" : `mean of ${n}`)));
    smoothing.addEventListener("change", () => this.draw());
    this.smoothing = smoothing;
    new ResizeObserver(() => this.draw()).observe(node);
  }

  make(spec, data) {
    const hasValues = (name) => (data.columns[name] || []).some((v) => v !== null && (!spec.stacked || v !== 0));
    const [paid, unpaid] = data.verdicts;  // a control pays other answers than right ones
    const named = (label) => label.replace(/^(all|one) right$/, `$1 ${paid}`).replace("all wrong", `all ${unpaid}`);
    const series = spec.series.filter(({ name }) => hasValues(name)).map((s) => ({ ...s, label: named(s.label) }));
    const columns = {};
    for (const { name } of series) columns[name] = data.columns[name].map((v) => (v === null ? null : v / (spec.divide || 1)));
    return series.length ? new Chart({ ...spec, series }, data.steps, columns, this) : null;
  }

  draw() {
    // All widths are read before anything is drawn: else each chart would make the browser lay out the page again.
    const widths = this.charts.map((chart) => Math.max(160, chart.svg.clientWidth));
    this.charts.forEach((chart, i) => chart.draw(widths[i], Number(this.smoothing.value)));
  }

  read(index) {
    if (index === this.index) return;
    this.index = index;
    for (const chart of this.charts) chart.read(index);
  }
}
