// A chart: lines or stacked areas over steps, with a reading line that all charts share.
const HEIGHT = 176, LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 22;

class Chart {
  // spec: {title, unit, series: [{name, label, color, dashed}], stacked, log, share, zero}; columns: {name: values}.
  constructor(spec, steps, columns, page) {
    Object.assign(this, { spec, steps, columns, page });
    this.window = 1;
    this.legend = el("div", { class: "legend" });
    this.corner = el("span", { class: "chart-unit" }, spec.unit || "");
    this.svg = svg("svg", { tabindex: 0, role: "img", "aria-label": this.describe(), height: HEIGHT });
    this.node = el("figure", { class: "chart", id: "chart-" + spec.title.toLowerCase().replace(/[^a-z0-9]+/g, "-") },
      el("figcaption", null, el("h3", null, spec.title), this.corner),
      this.legend, this.svg);
    this.svg.addEventListener("pointermove", (event) => page.read(this.indexAt(event)));
    this.svg.addEventListener("pointerleave", () => page.read(null));
    this.svg.addEventListener("click", (event) => page.openStep(this.steps[this.indexAt(event)]));
    this.svg.addEventListener("keydown", (event) => this.onKey(event));
    this.svg.addEventListener("focus", () => this.legend.setAttribute("aria-live", "polite"));
    this.svg.addEventListener("blur", () => { this.legend.removeAttribute("aria-live"); page.read(null); });
  }

  describe() {
    const ends = this.spec.series.map(({ name, label }) => {
      const known = this.columns[name].filter((value) => value !== null);
      return `${label} from ${number(known[0])} to ${number(known[known.length - 1])}`;
    });
    return `${this.spec.title}: ${ends.join("; ")}. Arrow keys read single steps, Enter opens the step's rollouts.`;
  }

  onKey(event) {
    const last = this.steps.length - 1, at = this.page.index === null ? last : this.page.index, far = event.shiftKey ? 10 : 1;
    const to = { ArrowRight: at + far, ArrowLeft: at - far, Home: 0, End: last }[event.key];
    if (to !== undefined) this.page.read(Math.max(0, Math.min(last, to)));
    else if (event.key === "Enter") this.page.openStep(this.steps[at]);
    else if (event.key === "Escape") this.page.read(null);
    else return;
    event.preventDefault();
  }

  indexAt(event) {
    const box = this.svg.getBoundingClientRect();
    const [first, last] = this.domain();
    const step = first + ((event.clientX - box.left - LEFT) / (this.width - LEFT - RIGHT)) * (last - first);
    let best = 0;
    this.steps.forEach((s, i) => { if (Math.abs(s - step) < Math.abs(this.steps[best] - step)) best = i; });
    return best;
  }

  domain() {
    const first = this.steps[0], last = this.steps[this.steps.length - 1];
    return first === last ? [first - 1, last + 1] : [first, last];
  }

  x(step) {
    const [first, last] = this.domain();
    return LEFT + ((step - first) / (last - first)) * (this.width - LEFT - RIGHT);
  }

  y(value) {
    const [low, high] = this.range, way = this.log ? Math.log10 : (v) => v;
    return HEIGHT - BOTTOM - ((way(value) - way(low)) / (way(high) - way(low))) * (HEIGHT - TOP - BOTTOM);
  }

  // Mean of the last `window` known values, at each step that has one.
  smooth(values) {
    if (this.window < 2 || values.filter((v) => v !== null).length < 2 * this.window) return values;
    const recent = [];
    return values.map((value) => {
      if (value === null) return null;
      recent.push(value);
      if (recent.length > this.window) recent.shift();
      return recent.reduce((a, b) => a + b, 0) / recent.length;
    });
  }

  draw(width, window) {
    this.width = width;
    this.window = window;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.replaceChildren();
    const raw = this.spec.series.map(({ name }) => this.columns[name]);
    this.drawn = raw.map((values) => this.smooth(values));
    this.scale(this.spec.stacked ? stack(this.drawn) : raw);
    this.axes();
    if (this.spec.stacked) this.areas();
    else this.spec.series.forEach((series, i) => this.line(series, raw[i], this.drawn[i]));
    this.reading = svg("g");
    this.svg.append(this.reading);
    this.read(this.page.index);
  }

  scale(columns) {
    const values = columns.flat().filter((value) => value !== null);
    this.log = Boolean(this.spec.log) && values.every((value) => value > 0);
    let low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    if (this.log) {
      this.range = [10 ** Math.floor(Math.log10(low)), 10 ** Math.ceil(Math.log10(high * 1.0001))];
      this.ticks = [];
      const decades = Math.log10(this.range[1] / this.range[0]), every = Math.max(1, Math.round(decades / 4));
      for (let i = 0; i <= decades + 1e-9; i += every) this.ticks.push(this.range[0] * 10 ** i);
      return;
    }
    if (this.spec.stacked || this.spec.zero || this.spec.share || (low > 0 && low < 0.4 * high)) low = Math.min(0, low);
    if (low === high) [low, high] = low === 0 ? [0, 1] : [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1];
    const gap = niceGap((high - low) / 4);
    this.gap = gap;
    this.range = [Math.floor(low / gap + 1e-9) * gap, Math.ceil(high / gap - 1e-9) * gap];
    this.ticks = [];
    for (let i = Math.round(this.range[0] / gap); i * gap <= this.range[1] + gap / 1e6; i++) this.ticks.push(i * gap);
  }

  axes() {
    for (const tick of this.ticks) {
      const y = this.y(tick);
      this.svg.append(svg("line", { class: "grid-line", x1: LEFT, x2: this.width - RIGHT, y1: y, y2: y }),
        svg("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, this.tick(tick)));
    }
    const [first, last] = this.domain(), gap = Math.max(1, niceGap((last - first) / Math.max(2, this.width / 60)));
    for (let step = Math.ceil(first / gap) * gap; step <= last; step += gap) {
      const x = this.x(step), isCutOff = x + 3.5 * number(step).length > this.width;
      this.svg.append(svg("text", { x: isCutOff ? this.width : x, y: HEIGHT - 5, "text-anchor": isCutOff ? "end" : "middle" }, number(step)));
    }
  }

  show(value) {
    if (this.spec.share) return `${Number((value * 100).toFixed(1))}%`;
    return number(value);
  }

  // As many digits as tell one tick from the next.
  tick(value) {
    if (this.log) return number(value);
    const scale = this.spec.share ? 100 : 1;
    const decimals = Math.max(0, -Math.floor(Math.log10(this.gap * scale) + 1e-9));
    if (decimals > 4 || Math.abs(value) >= 1e4) return number(Math.abs(value) < this.gap / 2 ? 0 : value);
    return (value * scale).toFixed(decimals).replace("-", "−") + (this.spec.share ? "%" : "");
  }

  line(series, raw, smooth) {
    const place = (values) => this.steps.flatMap((step, i) => (values[i] === null ? [] : [[this.x(step), this.y(values[i])]]));
    const points = place(smooth), group = svg("g", { class: "c-" + series.color, "data-series": series.name });
    if (smooth !== raw) group.append(svg("path", { class: "curve raw", d: path(place(raw)) }));
    group.append(svg("path", { class: "curve" + (series.dashed ? " dashed" : ""), d: path(points) }));
    if (points.length <= 24) group.append(...points.map(([x, y]) => svg("circle", { class: "dot", cx: x, cy: y, r: 2.6 })));
    this.svg.append(group);
  }

  areas() {
    const tops = stack(this.drawn);
    const known = this.steps.map((_, k) => k).filter((k) => this.drawn.some((values) => values[k] !== null));
    tops.forEach((top, i) => {
      const below = i ? tops[i - 1] : top.map(() => 0);
      const there = known.map((k) => [this.x(this.steps[k]), this.y(top[k])]);
      const back = known.map((k) => [this.x(this.steps[k]), this.y(below[k])]).reverse();
      const series = this.spec.series[i];
      this.svg.append(svg("g", { class: "c-" + series.color, "data-series": series.name },
        svg("path", { class: "area", d: path([...there, ...back]) + "Z" })));
    });
  }

  // Put the reading line at a step and its values into the legend; null: the last values, no line.
  read(index) {
    if (!this.reading) return;
    this.reading.replaceChildren();
    const items = this.spec.series.map((series, i) => {
      const values = this.drawn[i];
      let at = index === null ? values.length - 1 : index;
      while (at > 0 && values[at] === null) at -= 1;
      const value = values[at];
      if (index !== null && value !== null && !this.spec.stacked) {
        this.reading.append(svg("circle", { class: "dot c-" + series.color, cx: this.x(this.steps[at]), cy: this.y(value), r: 3.4 }));
      }
      return el("span", null, el("i", { class: `key c-${series.color}${series.dashed ? " dashed" : ""}` }), series.label + " ",
        el("b", null, value === null ? "–" : this.show(value)));
    });
    if (index !== null) {
      const x = this.x(this.steps[index]);
      this.reading.prepend(svg("line", { class: "hair", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }));
    }
    this.corner.textContent = index === null ? this.spec.unit || "" : `step ${this.steps[index]}`;
    this.legend.replaceChildren(...items);
  }
}

function stack(columns) {
  let below = columns[0].map(() => 0);
  return columns.map((values) => (below = values.map((value, i) => below[i] + (value === null ? 0 : value))));
}

function path(points) {
  return points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
}

function niceGap(rough) {
  if (!(rough > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((m) => m * power).find((gap) => gap >= rough * 0.999);
}
