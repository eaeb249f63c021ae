"use strict";
/* What all parts share: elements, numbers with units, access to the trials' columns.
   Texts are written as text nodes only, styles by class names only. */
window.PruneSearch = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const NONE = "–";

  /** An HTML element: attributes by name, children as nodes or texts. */
  function html(tag, attributes = {}, ...children) {
    return filled(document.createElement(tag), attributes, children);
  }

  /** The same of SVG. */
  function svg(tag, attributes = {}, ...children) {
    return filled(document.createElementNS(SVG, tag), attributes, children);
  }

  function filled(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  const grouped = new Map();

  /** A number with so many decimals, thin spaces between thousands, a real minus. */
  function decimal(value, digits) {
    if (!grouped.has(digits)) {
      const options = { minimumFractionDigits: digits, maximumFractionDigits: digits };
      grouped.set(digits, new Intl.NumberFormat("en-GB", options));
    }
    return grouped.get(digits).format(value || 0).replace(/,/g, "\u202f").replace("-", "\u2212");
  }

  /** A figure of a column as text, without or with its unit. */
  function figure(column, value, withUnit = true) {
    if (value === null || value === undefined) return NONE;
    const text = decimal(value * column.scale, column.digits);
    return withUnit && column.unit ? `${text}\u202f${column.unit}` : text;
  }

  /** Label and unit of a column, as an axis or a head of a table names it. */
  function heading(column) {
    return column.unit ? `${column.label} (${column.unit})` : column.label;
  }

  /** A column's label in the middle of a sentence; `mAP` stays. */
  function inText(column) {
    return column.label.charAt(0).toLowerCase() + column.label.slice(1);
  }

  /** Seconds as people say them. */
  function duration(seconds) {
    if (seconds === null || seconds === undefined) return NONE;
    if (seconds < 100) return `${decimal(seconds, seconds < 10 ? 2 : 1)}\u202fs`;
    const minutes = Math.round(seconds / 60);
    if (minutes < 10) return `${decimal(seconds / 60, 1)}\u202fmin`;
    if (minutes < 120) return `${minutes}\u202fmin`;
    return `${Math.floor(minutes / 60)}\u202fh ${minutes % 60}\u202fmin`;
  }

  function plural(count, noun, many = `${noun}s`) {
    return `${decimal(count, 0)} ${count === 1 ? noun : many}`;
  }

  /** The run's data with ways to read it. */
  function reader(data) {
    const { trials } = data;
    const columns = new Map(data.columns.map((column) => [column.name, column]));
    const text = (index, name) => {
      const { values, codes } = trials.text[name];
      return codes[index] < 0 ? null : values[codes[index]];
    };
    const value = (index, name) => trials.number[name][index];
    const all = Array.from({ length: trials.count }, (_, index) => index);
    const onFront = new Set(data.front);
    const dropped = (index) => trials.dropped[index].map((place) => data.network.blocks[place]);

    /** Share of the dense model's channels that are left, over all layers. */
    function keptShare(index) {
      const widths = trials.widths[index];
      if (!widths) return null;
      let kept = 0;
      let dense = 0;
      data.network.layers.forEach((layer, place) => {
        kept += widths[place] || 0;
        dense += layer.dense || 0;
      });
      return dense ? kept / dense : null;
    }

    return { data, trials, columns, text, value, all, onFront, dropped, keptShare };
  }

  /** Name and text of everything that is known of a candidate, for a list. */
  function candidateRows(run, index, mostGroups = Infinity) {
    const { trials } = run;
    const rows = [];
    const add = (name, found) => {
      if (found !== null && found !== undefined && found !== "") rows.push([name, String(found)]);
    };
    add("Status", words(run.text(index, "status")));
    add("Proposed by", run.text(index, "origin"));
    add("Criterion", run.text(index, "criterion") || "none: no channel removed");
    add("Rule", run.text(index, "select"));
    add("k", run.value(index, "k"));
    add("λ of sparse training", run.value(index, "dsd_lambda"));
    add("Q of sparse training", run.value(index, "dsd_q"));
    add("Epochs of sparse training", run.value(index, "dsd_epochs"));
    add("Blocks dropped", run.dropped(index).join(", ") || "none");
    const keep = trials.keep[index];
    if (keep) add("Fraction kept", keepText(trials.groups, keep, mostGroups));
    const share = run.keptShare(index);
    if (share !== null) add("Channels left", `${decimal(100 * share, 1)}\u202f%`);
    add("Fidelity reached", trials.fidelity[index]);
    add("Message", run.text(index, "message"));
    return rows;
  }

  function keepText(groups, keep, most) {
    const set = groups.map((group, place) => [group, keep[place]]).filter((one) => one[1] !== null);
    const shown = set.slice(0, most).map(([group, kept]) => `${group}: ${kept}`);
    const more = set.length - shown.length;
    return shown.join(", ") + (more > 0 ? `, and ${more} more` : "");
  }

  /** Name and text of a trial's figures that were measured. */
  function figureRows(run, index, names = [...run.columns.keys()]) {
    return names
      .filter((name) => run.value(index, name) !== null)
      .map((name) => {
        const column = run.columns.get(name);
        return [column.label, figure(column, run.value(index, name))];
      });
  }

  /** A list of names and texts. */
  function definitions(rows, name = "definitions") {
    const list = html("dl", { class: name });
    for (const [term, text] of rows) {
      list.append(html("div", {}, html("dt", {}, term), html("dd", {}, text)));
    }
    return list;
  }

  /** `early_stopped` as `early stopped`. */
  function words(name) {
    return name === null ? "" : name.replace(/_/g, " ");
  }

  /** Round numbers that divide a range into about so many parts. */
  function ticks(low, high, count) {
    if (!(high > low)) return [low];
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough * 0.999);
    const found = [];
    for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n += 1) {
      found.push(n * step);
    }
    return found;
  }

  /** Smallest and largest number, or null where there is none. */
  function extent(values) {
    let low = Infinity;
    let high = -Infinity;
    for (const value of values) {
      if (value === null) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
    return low <= high ? [low, high] : null;
  }

  function empty(host, text) {
    host.append(html("p", { class: "empty" }, text));
  }

  function radios(legendText, name, options, current, onchange) {
    return html("fieldset", { class: "controls choice" }, html("legend", {}, legendText),
      ...options.map(([value, label]) => html("label", {},
        html("input", { type: "radio", name, value, checked: value === current, onchange: () => onchange(value) }), ` ${label}`)));
  }

  /** Calls `work` once when calls have ceased for a moment. */
  function later(work) {
    let waiting = 0;
    return () => {
      clearTimeout(waiting);
      waiting = setTimeout(work, 80);
    };
  }

  /** Calls `work` when the width of `host` has changed, but not for print: the style sheet scales. */
  function onResize(host, work) {
    let width = host.clientWidth;
    const changed = later(() => {
      if (matchMedia("print").matches || host.clientWidth === width) return;
      width = host.clientWidth;
      work();
    });
    new ResizeObserver(changed).observe(host);
  }

  return {
    empty, radios, later, onResize, html, svg, decimal, figure, heading, inText, duration, plural, reader, candidateRows, figureRows,
    definitions, words, ticks, extent, NONE,
  };
})();
