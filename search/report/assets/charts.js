"use strict";
/* Hypervolume, parallel coordinates and rungs. Needs common.js, front.js and Plotly. */
PruneSearch.charts = (() => {
  const PS = PruneSearch;
  const MOST_LINES = 1500; // parallel lines beyond it would only be a surface
  const CLASSES = 5; // of the colour of a line

  /** Hypervolume as a staircase, over trials or seconds. */
  function hypervolume(host, found, by) {
    const over = { trials: "Trials that ended", seconds: "Seconds since the first trial began" };
    const x = found[by];
    const steps = {
      type: "scatter", mode: x.length < 60 ? "lines+markers" : "lines", x, y: found.value,
      line: { shape: "hv", width: 2, color: PS.front.FRONT.color }, marker: { size: 5 },
      hovertemplate: `%{x:,.0f} ${by}<br>hypervolume %{y:.4f}<extra></extra>`,
    };
    const layout = {
      width: host.clientWidth || 900, height: 300, margin: { l: 56, r: 16, t: 8, b: 48 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: "inherit", size: 13 },
      xaxis: { title: { text: over[by], standoff: 10 }, zeroline: false, automargin: true, rangemode: "tozero" },
      yaxis: { title: { text: "Hypervolume", standoff: 10 }, zeroline: false, automargin: true, rangemode: "tozero" },
    };
    Plotly.react(host, [steps], layout, { displayModeBar: false });
    PS.front.scalable(host);
  }

  /** The axes of the parallel coordinates: what was chosen, then what came of it. */
  function dimensions(run) {
    const { data, trials } = run;
    const share = run.all.map((i) => run.keptShare(i));
    const named = (label, name) => ({ label, kinds: trials.text[name].values, values: trials.text[name].codes.map((code) => (code < 0 ? null : code)) });
    const metric = (name) => {
      const column = run.columns.get(name);
      return {
        label: column.label, unit: column.unit, digits: column.digits,
        values: trials.number[name].map((value) => (value === null ? null : value * column.scale)),
      };
    };
    const found = [
      named("Criterion", "criterion"),
      named("Rule", "select"),
      { label: "Blocks dropped", digits: 0, values: trials.dropped.map((list) => list.length) },
      { label: "Channels left", unit: "%", digits: 0, values: share.map((value) => (value === null ? null : 100 * value)) },
      { label: "k", digits: 2, values: trials.number.k },
      { label: "λ (log10)", digits: 1, values: trials.number.dsd_lambda.map((value) => (value ? Math.log10(value) : null)) },
      ...Object.keys(data.objectives).map(metric),
    ];
    return found.filter((one) => {
      const range = PS.extent(one.values);
      return range !== null && (one.kinds ? one.kinds.length > 0 : range[1] > range[0] || one.unit);
    });
  }

  /** Trials as lines over all dimensions; the better the quality, the stronger the line. */
  function parallel(host, run, onlyFront, chosen) {
    const dims = dimensions(run);
    const quality = run.data.axes[1];
    const completed = run.all.filter((i) => run.text(i, "status") === "completed" && run.value(i, quality) !== null);
    const step = Math.max(1, completed.length / MOST_LINES);
    const even = Array.from({ length: Math.floor(completed.length / step) }, (_, n) => completed[Math.floor(n * step)]);
    const others = onlyFront ? [] : even.filter((i) => !run.onFront.has(i));
    const width = Math.max(640, host.clientWidth || 900);
    const [top, bottom, side] = [44, 300, 56];
    const gap = (width - 2 * side) / Math.max(1, dims.length - 1);
    const xs = dims.map((_, place) => side + place * gap);
    const scales = dims.map((one) => scaleOf(one, completed, top, bottom));
    const line = (i) => dims.map((one, place) => `${place ? "L" : "M"}${xs[place].toFixed(1)} ${scales[place](one.values[i]).toFixed(1)}`).join("");
    const drawing = PS.svg("svg", {
      class: "parallel", width, height: bottom + 56, viewBox: `0 0 ${width} ${bottom + 56}`, role: "img",
      "aria-label": `Parallel coordinates of ${PS.plural(others.length, "trial")} and ${PS.plural(run.data.front.length, "front member")} over ${dims.map((one) => one.label).join(", ")}. The table of all trials holds the same figures.`,
    });
    const order = [...others].sort((a, b) => run.value(a, quality) - run.value(b, quality));
    if (!(run.columns.get(quality).better === "higher")) order.reverse();
    for (let part = 0; part < CLASSES; part += 1) {
      const members = order.slice(Math.floor((part * order.length) / CLASSES), Math.floor(((part + 1) * order.length) / CLASSES));
      drawing.append(PS.svg("path", { d: members.map(line).join(""), class: `line quality-${part}` }));
    }
    drawing.append(PS.svg("path", { d: run.data.front.map(line).join(""), class: "line line-front" }));
    if (chosen !== null) drawing.append(PS.svg("path", { d: line(chosen), class: "line line-chosen" }));
    dims.forEach((one, place) => drawing.append(axisOf(one, xs[place], scales[place], top, bottom)));
    host.replaceChildren(PS.html("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "Parallel coordinates" }, drawing));
    return { drawn: others.length, of: completed.length - run.data.front.length };
  }

  /** From a value to a height; what is not set lies below the axis. */
  function scaleOf(one, indices, top, bottom) {
    const values = indices.map((i) => one.values[i]);
    const missing = values.some((value) => value === null);
    const floor = missing ? bottom - 26 : bottom;
    const [low, high] = one.kinds ? [0, Math.max(1, one.kinds.length - 1)] : PS.extent(values) || [0, 1];
    const scale = (value) => (value === null ? bottom : floor - ((value - low) / (high - low || 1)) * (floor - top));
    return Object.assign(scale, { low, high, floor, missing });
  }

  function axisOf(one, x, scale, top, bottom) {
    const parts = PS.svg("g", { class: "parallel-axis" }, PS.svg("path", { d: `M${x} ${top}V${scale.floor}` }));
    const put = (y, text, name) => parts.append(PS.svg("text", { x: x + 5, y, dy: "0.35em", class: name }, text));
    if (one.kinds) one.kinds.forEach((kind, code) => put(scale(code), PS.words(kind), "tick"));
    else for (const tick of PS.ticks(scale.low, scale.high, 4)) if (one.digits || Number.isInteger(tick)) put(scale(tick), PS.decimal(tick, tickDigits(scale)), "tick");
    if (scale.missing) put(bottom, "not set", "tick unset");
    const title = one.unit ? `${one.label} (${one.unit})` : one.label;
    title.split(/ (?=\S+$)/).forEach((text, row) => {
      parts.append(PS.svg("text", { x, y: top - 28 + 14 * row, class: "axis-title" }, text));
    });
    return parts;
  }

  function tickDigits(scale) {
    const [first, second] = PS.ticks(scale.low, scale.high, 4);
    return second === undefined ? 2 : Math.max(0, -Math.floor(Math.log10(second - first) + 1e-9));
  }

  /** Accuracy at two rungs, one dot a trial that reached both. */
  function rung(run, low, high) {
    const points = run.all
      .filter((i) => run.text(i, "status") !== "duplicate")
      .map((i) => run.trials.by_fidelity[i])
      .filter((reached) => reached.length > high && reached[low] !== null && reached[high] !== null)
      .map((reached) => [100 * reached[low], 100 * reached[high]]);
    const [xs, ys] = [0, 1].map((place) => PS.extent(points.map((point) => point[place])));
    const [left, right, top, bottom] = [48, 268, 14, 214];
    const at = (value, [from, to], a, b) => a + ((value - from) / (to - from || 1)) * (b - a);
    const dots = points.map(([x, y]) => `M${at(x, xs, left, right).toFixed(1)} ${at(y, ys, bottom, top).toFixed(1)}h0`).join("");
    const drawing = PS.svg("svg", {
      class: "rung", viewBox: "0 0 280 256", role: "img",
      "aria-label": `Accuracy of ${PS.plural(points.length, "trial")} at fidelity ${high} against fidelity ${low}, in per cent.`,
    });
    for (const tick of PS.ticks(...xs, 4)) {
      const x = at(tick, xs, left, right);
      drawing.append(PS.svg("path", { d: `M${x} ${top}V${bottom}`, class: "grid" }), PS.svg("text", { x, y: bottom + 16, class: "tick middle" }, PS.decimal(tick, 0)));
    }
    for (const tick of PS.ticks(...ys, 4)) {
      const y = at(tick, ys, bottom, top);
      drawing.append(PS.svg("path", { d: `M${left} ${y}H${right}`, class: "grid" }), PS.svg("text", { x: left - 6, y, dy: "0.35em", class: "tick end" }, PS.decimal(tick, 0)));
    }
    drawing.append(PS.svg("path", { d: dots, class: "dots" }));
    drawing.append(PS.svg("text", { x: (left + right) / 2, y: 250, class: "axis-title" }, `accuracy at fidelity ${low} (%)`));
    drawing.append(PS.svg("text", { x: 12, y: 114, class: "axis-title", transform: "rotate(-90 12 114)" }, `at fidelity ${high} (%)`));
    return drawing;
  }

  return { hypervolume, parallel, rung };
})();
