// Scatter plots and steps: canvas for many points, SVG for axes and for what can be focused.

import { h, put, s } from "/static/dom.js";
import { short, volume } from "/static/format.js";

const MARGIN = { left: 62, right: 18, top: 14, bottom: 46 };
const REACH = 14; // pixels around the pointer in which a point is meant

/**
 * A scatter plot that stays quick with ten thousand points.
 *
 * `set` takes `layers` (drawn in order: label, color, shape, size, points of {x, y, href, lines}),
 * `fronts` (label, color, shape, points along the front, each a link) and `marks` (dense models).
 * `x` and `y` have `name`, `scale` and `better`.
 */
export class Scatter {
  constructor(label) {
    this.canvas = h("canvas", { "aria-hidden": "true" });
    this.svg = s("svg", { role: "group", "aria-label": label });
    this.tip = h("div", { class: "tip", role: "tooltip", hidden: true });
    this.legend = h("ul", { class: "legend" });
    this.plot = h("div", { class: "plot" }, this.canvas, this.svg, this.tip);
    this.element = h("figure", { class: "chart" }, this.plot, this.legend);
    this.data = null;
    this.cells = new Map();
    this.plot.addEventListener("pointermove", (event) => this.#point(event));
    this.plot.addEventListener("pointerleave", () => (this.tip.hidden = true));
    this.plot.addEventListener("click", (event) => this.#open(event));
    new ResizeObserver(() => this.#soon()).observe(this.plot);
    for (const query of ["(prefers-color-scheme: dark)", "print"]) {
      matchMedia(query).addEventListener("change", () => this.#draw());
    }
  }

  set(data) {
    this.data = data;
    this.#soon();
  }

  #soon() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.#draw();
    });
  }

  #draw() {
    const { width, height } = this.plot.getBoundingClientRect();
    if (!this.data || width < 50) return;
    const { x, y, layers, fronts, marks } = this.data;
    const all = [...layers, ...fronts].flatMap((one) => one.points).concat(marks);
    const box = {
      left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: height - MARGIN.bottom,
    };
    const across = scaleOf(all.map((p) => p.x * x.scale), box.left, box.right, width / 110);
    const up = scaleOf(all.map((p) => p.y * y.scale), box.bottom, box.top, height / 60);
    const place = (p) => [across.at(p.x * x.scale), up.at(p.y * y.scale)];
    const style = getComputedStyle(this.plot);
    const color = (name) => style.getPropertyValue(`--mark-${name}`).trim();
    this.#drawPoints(width, height, layers, place, color);
    const focused = this.svg.contains(document.activeElement)
      ? document.activeElement.getAttribute("href")
      : null;
    put(this.svg, axes(across, up, box, x, y), fronts.map((one) => this.#front(one, place, color)),
      marks.map((mark) => star(...place(mark), color("dense"))));
    if (focused) this.svg.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
    this.#drawLegend(layers, fronts, marks, color);
  }

  #drawPoints(width, height, layers, place, color) {
    const ratio = devicePixelRatio || 1;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const context = this.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.cells = new Map();
    for (const layer of layers) {
      context.fillStyle = context.strokeStyle = color(layer.color);
      context.lineWidth = 1.2;
      context.beginPath();
      for (const point of layer.points) {
        const [px, py] = place(point);
        trace(context, layer.shape, px, py, layer.size);
        this.#index(px, py, point);
      }
      layer.shape === "ring" ? context.stroke() : context.fill();
    }
  }

  #front(front, place, color) {
    const points = front.points.map(place);
    const path = points.map(([px, py], i) => (i ? `H${px}V${py}` : `M${px},${py}`)).join("");
    const dots = front.points.map((point, i) => {
      const [px, py] = points[i];
      this.#index(px, py, point);
      const dot = s("path", { class: "dot", d: outline(front.shape, px, py, 6), fill: color(front.color) });
      const link = s("a", { href: point.href, "aria-label": point.lines.join(", ") }, dot);
      link.addEventListener("focus", () => this.#show(px, py, point));
      link.addEventListener("blur", () => (this.tip.hidden = true));
      return link;
    });
    return s("g", {}, s("path", { class: "front", d: path, stroke: color(front.color) }), ...dots);
  }

  #index(px, py, point) {
    const key = `${Math.floor(px / REACH)},${Math.floor(py / REACH)}`;
    if (!this.cells.has(key)) this.cells.set(key, []);
    this.cells.get(key).push([px, py, point]);
  }

  #nearest(event) {
    const { left, top } = this.plot.getBoundingClientRect();
    const [px, py] = [event.clientX - left, event.clientY - top];
    let best = null;
    let least = REACH ** 2;
    for (let i = -1; i <= 1; i += 1) {
      for (let j = -1; j <= 1; j += 1) {
        const cell = `${Math.floor(px / REACH) + i},${Math.floor(py / REACH) + j}`;
        for (const found of this.cells.get(cell) ?? []) {
          const distance = (found[0] - px) ** 2 + (found[1] - py) ** 2;
          if (distance <= least) [best, least] = [found, distance]; // the later is on top
        }
      }
    }
    return best;
  }

  #point(event) {
    const found = this.#nearest(event);
    this.plot.style.cursor = found ? "pointer" : "default";
    if (found) this.#show(...found);
    else this.tip.hidden = true;
  }

  #open(event) {
    const found = this.#nearest(event);
    if (!found || event.target.closest("a")) return;
    if (event.ctrlKey || event.metaKey) window.open(found[2].href, "_blank", "noopener");
    else location.assign(found[2].href);
  }

  #show(px, py, point) {
    const [first, ...rest] = point.lines;
    put(this.tip, h("strong", {}, first), ...rest.map((line) => h("div", {}, line)));
    this.tip.hidden = false;
    const { width } = this.plot.getBoundingClientRect();
    const size = this.tip.getBoundingClientRect();
    const left = px + 14 + size.width > width ? px - 14 - size.width : px + 14;
    this.tip.style.left = `${Math.max(0, left)}px`;
    this.tip.style.top = `${Math.max(0, py - size.height / 2)}px`;
  }

  #drawLegend(layers, fronts, marks, color) {
    const entry = (label, shape, name) =>
      h("li", {}, s("svg", { viewBox: "-7 -7 14 14", "aria-hidden": "true" }, swatch(shape, color(name))), label);
    const shown = [...fronts.filter((one) => one.points.length), ...layers.filter((one) => one.points.length)];
    put(this.legend, shown.map((one) => entry(one.label, one.shape, one.color)),
      marks.length > 0 && entry("dense model", "star", "dense"));
  }
}

/** A curve that keeps its value until the next step: [[x, y], ...]. */
export class Steps {
  constructor(label) {
    this.svg = s("svg", { role: "img", "aria-label": label });
    this.plot = h("div", { class: "plot low" }, this.svg);
    this.element = h("figure", { class: "chart" }, this.plot);
    this.data = null;
    new ResizeObserver(() => this.#draw()).observe(this.plot);
  }

  set(points, xName, yName) {
    this.data = [points, xName, yName];
    const last = points.at(-1);
    if (last) this.svg.setAttribute("aria-label", `${yName}: ${volume(last[1])} at ${last[0]} ${xName}`);
    this.#draw();
  }

  #draw() {
    const { width, height } = this.plot.getBoundingClientRect();
    if (!this.data || width < 50) return;
    const [points, xName, yName] = this.data;
    const box = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: height - MARGIN.bottom };
    const across = scaleOf([0, ...points.map((p) => p[0])], box.left, box.right, width / 110);
    const up = scaleOf([0, ...points.map((p) => p[1])], box.bottom, box.top, height / 55);
    const path = points
      .map(([px, py], i) => (i ? `H${across.at(px)}V${up.at(py)}` : `M${across.at(px)},${up.at(py)}`))
      .join("");
    const stroke = getComputedStyle(this.plot).getPropertyValue("--mark-front").trim();
    put(this.svg, axes(across, up, box, { name: xName }, { name: yName }),
      s("path", { class: "front", d: path, stroke }));
  }
}

/** A linear scale with round ticks over the values. */
function scaleOf(values, from, to, most) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low > high) [low, high] = [0, 1];
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  const edge = (high - low) * 0.05;
  const [first, last] = [low >= 0 && low - edge < 0 ? 0 : low - edge, high + edge];
  const rough = (last - first) / Math.max(2, most);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const ticks = [];
  for (let n = Math.ceil(first / step - 1e-9); n * step <= last; n += 1) {
    ticks.push([n * step, step < 1e4 ? (n * step).toFixed(digits) : short(n * step)]);
  }
  return { ticks, at: (value) => from + ((value - first) / (last - first)) * (to - from) };
}

function axes(across, up, box, x, y) {
  const lines = up.ticks.map(([value, text]) => {
    const py = up.at(value);
    return s("g", {},
      s("line", { class: "grid", x1: box.left, x2: box.right, y1: py, y2: py }),
      s("text", { x: box.left - 8, y: py + 4, "text-anchor": "end" }, text));
  });
  const columns = across.ticks.map(([value, text]) => {
    const px = across.at(value);
    return s("g", {},
      s("line", { class: "grid", x1: px, x2: px, y1: box.top, y2: box.bottom }),
      s("text", { x: px, y: box.bottom + 18, "text-anchor": "middle" }, text));
  });
  const middle = (box.top + box.bottom) / 2;
  return s("g", { "aria-hidden": "true" }, ...lines, ...columns,
    s("text", { class: "name", x: (box.left + box.right) / 2, y: box.bottom + 39, "text-anchor": "middle" },
      box.right - box.left < 300 ? (x.short ?? x.name) : x.name),
    s("text", { class: "name", x: 14, y: middle, "text-anchor": "middle", transform: `rotate(-90 14 ${middle})` },
      box.bottom - box.top < 300 ? (y.short ?? y.name) : y.name));
}

function trace(context, shape, x, y, r) {
  if (shape === "triangle") {
    context.moveTo(x, y - r * 1.2);
    context.lineTo(x + r * 1.1, y + r * 0.8);
    context.lineTo(x - r * 1.1, y + r * 0.8);
    context.closePath();
  } else if (shape === "square") {
    context.rect(x - r * 0.85, y - r * 0.85, r * 1.7, r * 1.7);
  } else {
    context.moveTo(x + r, y);
    context.arc(x, y, r, 0, 2 * Math.PI);
  }
}

function outline(shape, x, y, r) {
  if (shape === "diamond") return `M${x},${y - r * 1.25}l${r * 1.25},${r * 1.25}l${-r * 1.25},${r * 1.25}l${-r * 1.25},${-r * 1.25}z`;
  if (shape === "triangle") return `M${x},${y - r * 1.2}l${r * 1.1},${r * 2}h${-r * 2.2}z`;
  if (shape === "square") return `M${x - r * 0.85},${y - r * 0.85}h${r * 1.7}v${r * 1.7}h${-r * 1.7}z`;
  return `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0z`;
}

function swatch(shape, color) {
  if (shape === "star") return star(0, 0, color, 0.75);
  const ring = shape === "ring";
  return s("path", { d: outline(shape, 0, 0, 4.5), fill: ring ? "none" : color, stroke: ring ? color : "none", "stroke-width": 1.5 });
}

function star(x, y, color, size = 1) {
  const corners = Array.from({ length: 10 }, (_, i) => {
    const r = (i % 2 ? 4.2 : 10) * size;
    const angle = (i * Math.PI) / 5 - Math.PI / 2;
    return `${x + r * Math.cos(angle)},${y + r * Math.sin(angle)}`;
  });
  return s("polygon", { points: corners.join(" "), fill: color, "pointer-events": "none" });
}
