"use strict";
/* The front in any two columns. Needs common.js and Plotly; works under a strict content security
   policy when the page's own style element or sheet has the id `plotly.js-style-global` and the
   class `no-inline-styles`, and holds the rules of report.css for `.js-plotly-plot`. */
PruneSearch.front = (() => {
  const PS = PruneSearch;
  const CELL = 3; // pixels: of the marks that lie on one such spot one is drawn
  const HEIGHT = 520;

  /* Okabe and Ito's hues at a lightness that stands out on white and on black. Marks differ in
     shape, too. `name` is the class of the mark in the legend. */
  const LAYERS = [
    { name: "stopped", label: "stopped early, at its rung", symbol: "x-thin", size: 6, color: "#8a8f96", hidden: true },
    { name: "infeasible", label: "violates a constraint", symbol: "circle-open", size: 6, color: "#8a8f96" },
    { name: "trial", label: "trial", symbol: "circle", size: 6, color: "#8a8f96" },
    { name: "random", label: "control: random channels", symbol: "triangle-up", size: 9, color: "#c0780e" },
    { name: "uniform", label: "control: uniform pruning", symbol: "square", size: 7, color: "#1d8f68" },
  ];
  const FRONT = { name: "member", label: "front in these two axes", symbol: "circle", color: "#2b7cc0" };
  const DENSE = { name: "dense", label: "dense model", symbol: "star", color: "#d1531c" };
  const CHOSEN = { name: "chosen", label: "the member below", symbol: "circle-open", color: "#9a5fc4" };

  function layerOf(run, index) {
    const status = run.text(index, "status");
    if (status === "early_stopped") return "stopped";
    if (status === "infeasible") return "infeasible";
    if (status !== "completed") return null;
    const kind = run.text(index, "kind");
    return kind === "search" ? "trial" : kind;
  }

  /** Whether more of a column is to the better; as the run says, else by the column. */
  function upward(run, name) {
    return run.columns.get(name).better === "higher";
  }

  /** Indices of the completed trials that no other beats in both columns, along the front. */
  function pareto(run, x, y) {
    const signX = upward(run, x) ? -1 : 1;
    const signY = upward(run, y) ? -1 : 1;
    const points = run.all
      .filter((i) => run.text(i, "status") === "completed")
      .filter((i) => run.value(i, x) !== null && run.value(i, y) !== null)
      .map((i) => [signX * run.value(i, x), signY * run.value(i, y), i])
      .sort((a, b) => a[0] - b[0] || a[1] - b[1] || a[2] - b[2]);
    const found = [];
    let best = Infinity;
    for (const [, cost, index] of points) {
      if (cost < best) {
        best = cost;
        found.push(index);
      }
    }
    return found;
  }

  /** Of indices whose marks fall on one spot the first. */
  function thinned(indices, xs, ys, ranges, width, height) {
    const taken = new Set();
    const [[x0, x1], [y0, y1]] = ranges;
    const across = Math.ceil(width / CELL) + 1;
    return indices.filter((index) => {
      const column = Math.floor((((xs[index] - x0) / (x1 - x0)) * width) / CELL);
      const row = Math.floor((((ys[index] - y0) / (y1 - y0)) * height) / CELL);
      if (!(column >= 0 && row >= 0 && column <= across && row * CELL <= height)) return false;
      const spot = row * across + column;
      if (taken.has(spot)) return false;
      taken.add(spot);
      return true;
    });
  }

  function padded(values) {
    const [low, high] = PS.extent(values) || [0, 1];
    const room = (high - low || Math.abs(high) || 1) * 0.05;
    return [low - room, high + room];
  }

  function axis(run, name, range) {
    const column = run.columns.get(name);
    const better = column.better ? `, ${column.better} is better` : "";
    return {
      title: { text: escaped(PS.heading(column) + better), standoff: 12 },
      range, zeroline: false, ticks: "", automargin: true, fixedrange: false,
    };
  }

  /** Plotly reads a little HTML in texts. */
  function escaped(text) {
    return text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  }

  function scaled(run, name) {
    const { scale } = run.columns.get(name);
    return run.trials.number[name].map((value) => (value === null ? null : value * scale));
  }

  function markers(layer, indices, xs, ys) {
    const open = layer.symbol.endsWith("-open") || layer.symbol.endsWith("-thin");
    return {
      type: "scatter", mode: "markers", name: layer.label, hoverinfo: "none", showlegend: false,
      x: indices.map((i) => xs[i]), y: indices.map((i) => ys[i]), customdata: indices,
      marker: {
        symbol: layer.symbol, size: layer.size, color: layer.color,
        opacity: layer.name === "trial" ? 0.75 : 1,
        line: { color: layer.color, width: open ? 1.2 : 0 },
      },
    };
  }

  function staircase(run, members, xs, ys, x) {
    return {
      type: "scatter", mode: "lines", hoverinfo: "skip", showlegend: false,
      x: members.map((i) => xs[i]), y: members.map((i) => ys[i]),
      line: { shape: "hv", width: 1.8, color: FRONT.color }, // y holds until the next is attained
    };
  }

  /**
   * A chart of the front in `host`, to be drawn again with other options.
   *
   * options: x, y (columns), hidden (a set of layers' names), chosen (an index or null), onHover
   * (index or null, event), onChoose (index).
   */
  function chart(host, run) {
    let options = null;
    let zoomed = null;
    let wired = false;

    function layers() {
      const found = new Map(LAYERS.map((layer) => [layer.name, []]));
      for (const index of run.all) {
        const shown = run.value(index, options.x) !== null && run.value(index, options.y) !== null;
        const layer = shown ? layerOf(run, index) : null;
        if (layer) found.get(layer).push(index);
      }
      return found;
    }

    function draw() {
      const { x, y, hidden, chosen } = options;
      const xs = scaled(run, x);
      const ys = scaled(run, y);
      const found = layers();
      const visible = LAYERS.filter((layer) => !hidden.has(layer.name));
      const dense = [x, y].map((name) => {
        const value = run.data.dense[name];
        return value === undefined ? null : value * run.columns.get(name).scale;
      });
      const indices = visible.flatMap((layer) => found.get(layer.name));
      const whole = [
        padded([...indices.map((i) => xs[i]), dense[0]]),
        padded([...indices.map((i) => ys[i]), dense[1]]),
      ];
      const ranges = zoomed || whole;
      const width = host.clientWidth || 900;
      const members = pareto(run, x, y);
      const traces = visible.map((layer) => {
        const seen = thinned(found.get(layer.name), xs, ys, ranges, width, HEIGHT);
        return markers(layer, seen, xs, ys);
      });
      traces.push(staircase(run, members, xs, ys, x));
      traces.push(markers({ ...FRONT, size: 9 }, members, xs, ys));
      if (chosen !== null && xs[chosen] !== null && ys[chosen] !== null) {
        const ring = markers({ ...CHOSEN, size: 17 }, [chosen], xs, ys);
        ring.marker.line.width = 2.5;
        traces.push(ring);
      }
      if (dense[0] !== null && dense[1] !== null) {
        traces.push({
          type: "scatter", mode: "markers", x: [dense[0]], y: [dense[1]], hoverinfo: "none",
          customdata: [-1], showlegend: false,
          marker: { symbol: DENSE.symbol, size: 16, color: DENSE.color },
        });
      }
      const layout = {
        width, height: HEIGHT, margin: { l: 56, r: 16, t: 12, b: 52 },
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
        hoverdistance: 12, dragmode: "zoom", font: { family: "inherit", size: 13 },
        xaxis: axis(run, x, ranges[0]), yaxis: axis(run, y, ranges[1]),
      };
      const made = Plotly.react(host, traces, layout, { displayModeBar: false, doubleClick: false });
      if (!wired) wire();
      return made;
    }

    function wire() {
      wired = true;
      host.on("plotly_hover", (event) => {
        options.onHover(event.points[0].customdata, event.event);
      });
      host.on("plotly_unhover", () => options.onHover(null, null));
      host.on("plotly_click", (event) => {
        const index = event.points[0].customdata;
        if (index >= 0) options.onChoose(index);
      });
      host.on("plotly_relayout", (change) => {
        if (change["xaxis.range[0]"] === undefined && change["yaxis.range[0]"] === undefined) return;
        const { xaxis, yaxis } = host.layout;
        zoomed = [[...xaxis.range], [...yaxis.range]];
        draw();
      });
      host.on("plotly_doubleclick", unzoom);
      host.on("plotly_afterplot", () => scalable(host));
    }

    function unzoom() {
      zoomed = null;
      draw();
    }

    return {
      draw(changed) {
        const axes = options && (changed.x !== options.x || changed.y !== options.y);
        if (axes) zoomed = null;
        options = changed;
        return draw();
      },
      redraw: () => options && draw(),
      unzoom,
      members: () => pareto(run, options.x, options.y),
      counts() {
        const found = layers();
        return new Map([...found].map(([name, indices]) => [name, indices.length]));
      },
    };
  }

  /** Lets the style sheet scale a chart: for print, whose width nobody knows before. */
  function scalable(host) {
    for (const part of host.querySelectorAll(".main-svg")) {
      part.setAttribute("viewBox", `0 0 ${part.getAttribute("width")} ${part.getAttribute("height")}`);
    }
  }

  /** The mark of a layer, for a legend. */
  function mark(layer) {
    const shapes = {
      circle: () => PS.svg("circle", { cx: 8, cy: 8, r: layer.name === "member" ? 5 : 4 }),
      "circle-open": () => PS.svg("circle", { cx: 8, cy: 8, r: layer.name === "chosen" ? 6 : 4, class: "open" }),
      "x-thin": () => PS.svg("path", { d: "M4 4L12 12M12 4L4 12", class: "open" }),
      "triangle-up": () => PS.svg("path", { d: "M8 2L14 13H2Z" }),
      square: () => PS.svg("rect", { x: 3, y: 3, width: 10, height: 10 }),
      star: () => PS.svg("path", { d: "M8 0L10 5.6L16 5.8L11.3 9.4L13 15.2L8 11.8L3 15.2L4.7 9.4L0 5.8L6 5.6Z" }),
    };
    const attributes = { class: "mark", width: 16, height: 16, viewBox: "0 0 16 16", "aria-hidden": "true" };
    const drawn = shapes[layer.symbol]();
    drawn.setAttribute(drawn.getAttribute("class") ? "stroke" : "fill", layer.color);
    return PS.svg("svg", attributes, drawn);
  }

  return { chart, pareto, mark, scalable, LAYERS, FRONT, DENSE, CHOSEN, HEIGHT };
})();
