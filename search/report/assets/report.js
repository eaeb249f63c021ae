"use strict";
/* The page: fills each section from the data in it. */
(() => {
  const PS = PruneSearch;
  const { html, empty } = PS;
  const run = PS.reader(JSON.parse(document.getElementById("report-data").textContent));
  const { data, trials } = run;
  const at = (id) => document.getElementById(id);
  const PAGE = 50;
  let chosen = data.chosen;
  let axes = [...data.axes];
  const hidden = new Set(PS.front.LAYERS.filter((layer) => layer.hidden).map((layer) => layer.name));
  const tables = [];

  // --- the head ----------------------------------------------------------------------------

  function facts() {
    const dense = (name) => {
      const column = run.columns.get(name);
      return column && data.dense[name] !== undefined ? PS.figure(column, data.dense[name]) : PS.NONE;
    };
    const rows = [["Trials ended", `${PS.decimal(data.state.finished, 0)} of ${PS.decimal(data.state.trials, 0)}`]];
    for (const [status, count] of Object.entries(data.state.by_status)) {
      if (status !== "completed") rows.push([PS.words(status), PS.decimal(count, 0)]);
    }
    rows.push(["Front members", PS.decimal(data.front.length, 0)]);
    if (data.hypervolume) rows.push(["Hypervolume", data.hypervolume.value.at(-1).toPrecision(4)]);
    for (const name of data.axes) rows.push([`Dense ${PS.inText(run.columns.get(name))}`, dense(name)]);
    for (const [term, text] of rows) at("facts").append(html("div", {}, html("dt", {}, term), html("dd", {}, text)));
  }

  function theme() {
    const root = document.documentElement;
    const apply = (value) => (value === "auto" ? delete root.dataset.theme : (root.dataset.theme = value));
    const stored = remembered();
    for (const input of document.querySelectorAll("input[name=theme]")) {
      if (input.value === stored) input.checked = true;
      input.addEventListener("change", () => {
        apply(input.value);
        try { localStorage.setItem("prune-search-theme", input.value); } catch { /* a file may have none */ }
      });
    }
    apply(stored);
  }

  function remembered() {
    try {
      const value = localStorage.getItem("prune-search-theme");
      return ["light", "dark"].includes(value) ? value : "auto";
    } catch {
      return "auto";
    }
  }

  // --- the front ---------------------------------------------------------------------------

  const chart = PS.front.chart(at("front-chart"), run);

  function front() {
    const controls = at("front-controls");
    if (!trials.count && !Object.keys(data.dense).length) {
      at("front-frame").hidden = true;
      return empty(at("front"), "Nothing has been measured yet.");
    }
    controls.append(
      axisSelect("Horizontal", "axis-x", 0), axisSelect("Vertical", "axis-y", 1),
      html("button", { type: "button", onclick: chart.unzoom }, "Whole range"),
      html("span", { class: "hint" }, "Drag to zoom. With the chart in focus, ← and → walk along the front."),
    );
    const host = at("front-chart");
    host.setAttribute("tabindex", "0");
    host.setAttribute("role", "group");
    host.setAttribute("aria-roledescription", "chart");
    host.addEventListener("keydown", walk);
    drawFront();
    legend();
    PS.onResize(host, chart.redraw);
  }

  function axisSelect(label, id, place) {
    const select = html("select", { id, onchange: () => { axes[place] = select.value; drawFront(); } });
    for (const column of data.columns) {
      const text = column.objective ? `${PS.heading(column)}, objective` : PS.heading(column);
      select.append(html("option", { value: column.name, selected: column.name === axes[place] }, text));
    }
    return html("label", { for: id }, `${label} `, select);
  }

  function drawFront() {
    const [x, y] = axes;
    chart.draw({ x, y, hidden, chosen, onHover: card, onChoose: choose });
    const names = [y, x].map((name) => PS.inText(run.columns.get(name)));
    const members = chart.members();
    const ends = members.length ? [members[0], members.at(-1)].map((i) => `${trials.id[i]} (${sentence(i)})`) : [];
    const range = ends.length ? ` It reaches from ${ends[0]} to ${ends[1]}.` : "";
    const text = `${PS.plural(members.length, "trial")} that no other beats in ${names.join(" and ")}.${range}`;
    at("front-chart").setAttribute("aria-label", `The front: ${text}`);
    const own = Object.keys(data.objectives).every((name) => axes.includes(name));
    at("front-caption").textContent = own ? text :
      `${text} These are not the axes that the search optimised: its own front has ${PS.plural(data.front.length, "member")}.`;
  }

  function sentence(index) {
    return [...axes].reverse().map((name) => PS.figure(run.columns.get(name), run.value(index, name))).join(" at ");
  }

  function legend() {
    const counts = chart.counts();
    const list = at("front-legend");
    for (const layer of PS.front.LAYERS) {
      const count = trials.text.status.codes.length ? counts.get(layer.name) : 0;
      if (!count) continue;
      const box = html("input", { type: "checkbox", checked: !hidden.has(layer.name), onchange: () => {
        if (box.checked) hidden.delete(layer.name);
        else hidden.add(layer.name);
        drawFront();
      } });
      list.append(html("li", {}, html("label", {}, box, PS.front.mark(layer), `${layer.label} (${PS.decimal(count, 0)})`)));
    }
    for (const layer of [PS.front.FRONT, PS.front.DENSE, PS.front.CHOSEN]) {
      list.append(html("li", {}, PS.front.mark(layer), layer.label));
    }
  }

  /** The whole candidate beside the pointer. */
  function card(index, event) {
    const box = at("front-card");
    box.hidden = index === null;
    if (index === null) return;
    const figures = index < 0 ? denseRows() : PS.figureRows(run, index, figureNames());
    const title = index < 0 ? "Dense model" : trials.id[index];
    box.replaceChildren(html("p", { class: "card-title" }, title), PS.definitions(figures, "figures"));
    if (index >= 0) box.append(PS.definitions(PS.candidateRows(run, index, 12)));
    const frame = at("front-frame").getBoundingClientRect();
    const [x, y] = event ? [event.clientX - frame.left, event.clientY - frame.top] : [frame.width, 0];
    const left = x > frame.width / 2 ? x - box.offsetWidth - 16 : x + 16;
    box.style.left = `${Math.max(0, Math.min(left, frame.width - box.offsetWidth))}px`;
    box.style.top = `${Math.max(0, Math.min(y - 40, frame.height - box.offsetHeight))}px`;
  }

  function denseRows() {
    return data.columns.filter((column) => data.dense[column.name] !== undefined)
      .map((column) => [column.label, PS.figure(column, data.dense[column.name])]);
  }

  function walk(event) {
    const members = chart.members();
    const here = members.indexOf(chosen);
    const steps = {
      ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: members.length - 1,
    };
    if (event.key === "Escape") return card(null);
    if (!(event.key in steps) || !members.length) return undefined;
    event.preventDefault();
    const to = here < 0 ? 0 : Math.max(0, Math.min(members.length - 1, steps[event.key]));
    choose(members[to]);
    return undefined;
  }

  // --- one member --------------------------------------------------------------------------

  function choose(index) {
    chosen = index;
    drawFront();
    member();
    parallel();
    tables.forEach((table) => table.refresh());
    at("announcer").textContent = `${PS.network.summary(run, index)} ${sentence(index)}.`;
  }

  function memberControls() {
    if (!trials.count) return;
    const select = html("select", { id: "member-select", onchange: () => choose(Number(select.value)) });
    at("member-controls").append(html("label", { for: "member-select" }, "Trial ", select),
      html("span", { class: "hint" }, "Any trial can be chosen in the tables, too."));
  }

  function member() {
    const host = at("member-body");
    host.replaceChildren();
    if (chosen === null) return empty(host, "No trial has been completed yet.");
    fillSelect();
    const widths = trials.widths[chosen];
    const dropped = new Set(run.dropped(chosen));
    const text = PS.network.summary(run, chosen);
    const size = html("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "The pruned network" });
    host.append(html("div", { class: "member-grid" },
      html("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "Figures" }, comparison()), PS.definitions(PS.candidateRows(run, chosen))));
    if (!data.network.layers.length) return empty(host, "The layers are not known yet.");
    host.append(html("figure", {}, size,
      html("ul", { class: "legend" }, ...networkLegend()),
      html("figcaption", {}, `${text} The height of an outline goes with the square root of the dense channels; the fill is the fraction that is kept.`)));
    size.append(PS.network.draw(data.network, widths, dropped, size.clientWidth || 900, text));
    host.append(html("details", {}, html("summary", {}, "The same as a table"),
      html("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "Layers" }, PS.network.table(data.network, widths, dropped, text))));
    return undefined;
  }

  function networkLegend() {
    const box = (name) => PS.svg("svg", { class: "mark network", width: 16, height: 16, viewBox: "0 0 16 16", "aria-hidden": "true" },
      PS.svg("rect", { x: 2, y: 2, width: 12, height: 12, rx: 2, class: name }));
    const arc = PS.svg("svg", { class: "mark network", width: 20, height: 16, viewBox: "0 0 20 16", "aria-hidden": "true" },
      PS.svg("path", { d: "M2 14C2 2 18 2 18 14", class: "shortcut" }));
    const stripes = PS.svg("svg", { class: "mark network gone", width: 16, height: 16, viewBox: "0 0 16 16", "aria-hidden": "true" },
      PS.svg("path", { d: "M2 8L8 2M2 14L14 2M8 14L14 8", class: "stripes" }), PS.svg("rect", { x: 2, y: 2, width: 12, height: 12, rx: 2, class: "outline gone" }));
    return [["dense width", box("outline")], ["kept", box("kept")], ["removed block", stripes], ["shortcut around a removable block", arc]]
      .map(([label, mark]) => html("li", {}, mark, label));
  }

  /** The member's figures beside the dense model's. */
  function comparison() {
    const cell = (text) => html("td", { class: "number" }, text);
    const body = html("tbody");
    for (const column of data.columns) {
      const value = run.value(chosen, column.name);
      const dense = data.dense[column.name];
      if (value === null) continue;
      const ratio = dense && !["accuracy_drop", "speedup"].includes(column.name) ? `${PS.decimal((100 * value) / dense, 1)}\u202f%` : "";
      body.append(html("tr", {}, html("th", { scope: "row" }, column.label), cell(PS.figure(column, value)),
        cell(dense === undefined ? PS.NONE : PS.figure(column, dense)), cell(ratio)));
    }
    const heads = ["Figure", trials.id[chosen], "Dense", "Of dense"].map((text, place) => html("th", { scope: "col", class: place ? "number" : null }, text));
    return html("table", { class: "plain" }, html("caption", { class: "visually-hidden" }, `${trials.id[chosen]} beside the dense model`),
      html("thead", {}, html("tr", {}, ...heads)), body);
  }

  function fillSelect() {
    const select = at("member-select");
    const rest = run.onFront.has(chosen) ? [] : [chosen];
    const option = (index, text) => html("option", { value: index, selected: index === chosen }, text);
    select.replaceChildren(
      ...rest.map((index) => option(index, `${trials.id[index]}, not on the front`)),
      ...data.front.map((index) => option(index, `${trials.id[index]}: ${sentenceOfObjectives(index)}`)),
    );
  }

  function sentenceOfObjectives(index) {
    return Object.keys(data.objectives).map((name) => PS.figure(run.columns.get(name), run.value(index, name))).join(", ");
  }

  // --- tables ------------------------------------------------------------------------------

  function figureColumns(names) {
    return names.map((name) => run.columns.get(name)).filter(Boolean).map((column) => ({
      name: column.name, label: PS.heading(column), numeric: true,
      value: (i) => run.value(i, column.name), text: (i) => PS.figure(column, run.value(i, column.name), false),
    }));
  }

  const nameColumn = {
    label: "Trial", value: (i) => trials.id[i], text: (i) => trials.id[i],
    node: (i) => html("button", { type: "button", class: "link", onclick: () => { choose(i); at("member-title").scrollIntoView(); } }, trials.id[i]),
  };

  function textColumn(label, text) {
    return { label, value: (i) => text(i), text };
  }

  const choices = [
    textColumn("Criterion", (i) => run.text(i, "criterion") || "none"),
    textColumn("Rule", (i) => run.text(i, "select") || "none"),
    { ...textColumn("Blocks dropped", (i) => run.dropped(i).join(", ") || "none"), look: "blocks" },
    { label: "Channels left (%)", numeric: true, value: run.keptShare, text: (i) => {
      const share = run.keptShare(i);
      return share === null ? PS.NONE : PS.decimal(100 * share, 1);
    } },
  ];

  const MAIN = ["accuracy", "accuracy_drop", "latency_ms", "speedup", "macs", "num_params", "peak_memory_mib"];

  function figureNames() {
    const probes = data.columns.map((column) => column.name).filter((name) => name.includes("@"));
    return [...new Set([...Object.keys(data.objectives), ...MAIN, ...probes])].filter((name) => run.columns.has(name));
  }

  function members() {
    const host = at("members-body");
    if (!data.front.length) return empty(host, "The front is empty: no trial was completed with all objectives measured.");
    const figures = figureColumns(figureNames());
    const first = ["dense", ...figures.map((column) => {
      const dense = data.dense[column.name];
      return dense === undefined ? PS.NONE : PS.figure(run.columns.get(column.name), dense, false);
    }), "", "", "", "100.0"];
    tables.push(PS.tables.table(host, {
      caption: "Members of the front, the dense model first", columns: [nameColumn, ...figures, ...choices],
      rows: [...data.front], first, marked: (i) => i === chosen,
    }));
    return undefined;
  }

  function allTrials() {
    const host = at("trials-body");
    if (!trials.count) return empty(host, "No trial has ended yet.");
    const status = html("select", { id: "status-filter" }, html("option", { value: "" }, "all"),
      ...trials.text.status.values.map((name) => html("option", { value: name }, PS.words(name))));
    const search = html("input", { id: "text-filter", type: "search", autocomplete: "off" });
    const place = html("div");
    host.append(html("div", { class: "controls row" },
      html("label", { for: "status-filter" }, "Status ", status),
      html("label", { for: "text-filter" }, "Text in it ", search)), place,
    html("p", { class: "print-only" }, `The table of all ${PS.plural(trials.count, "trial")} is not printed: it is in the run folder's trials/*.parquet.`));
    const table = PS.tables.table(place, {
      caption: "All trials", page: PAGE, rows: run.all, marked: (i) => i === chosen,
      columns: [nameColumn, textColumn("Status", (i) => PS.words(run.text(i, "status"))),
        textColumn("Proposed by", (i) => run.text(i, "origin") || ""),
        ...figureColumns([...new Set([...Object.keys(data.objectives), ...MAIN.slice(0, 5), "trial_s"])]), ...choices.slice(0, 3),
        textColumn("Message", (i) => run.text(i, "message") || "")],
    });
    tables.push(table);
    const texts = run.all.map((i) => [trials.id[i], run.text(i, "origin"), run.text(i, "criterion"), run.text(i, "message"), ...run.dropped(i)].join(" ").toLowerCase());
    const filter = PS.later(() => {
      const wanted = search.value.trim().toLowerCase();
      table.show(run.all.filter((i) => (!status.value || run.text(i, "status") === status.value) && texts[i].includes(wanted)));
    });
    status.addEventListener("change", filter);
    search.addEventListener("input", filter);
    return undefined;
  }

  // --- parallel coordinates -------------------------------------------------------------------

  let onlyFront = false;
  const lines = html("div");
  const linesCaption = html("figcaption");

  function parallelSection() {
    const host = at("parallel-body");
    if (!run.all.some((i) => run.text(i, "status") === "completed")) return empty(host, "No trial has been completed yet.");
    const box = html("input", { type: "checkbox", onchange: () => { onlyFront = box.checked; parallel(); } });
    host.append(html("div", { class: "controls row" }, html("label", {}, box, " Only the front")), html("figure", {}, lines, linesCaption));
    parallel();
    PS.onResize(host, parallel);
    return undefined;
  }

  function parallel() {
    if (!lines.isConnected) return;
    const { drawn, of } = PS.charts.parallel(lines, run, onlyFront, chosen);
    const quality = run.columns.get(data.axes[1]);
    const sample = drawn < of && !onlyFront ? ` ${PS.decimal(drawn, 0)} of the ${PS.decimal(of, 0)} others are drawn, evenly.` : "";
    linesCaption.textContent = `Each line is a completed trial, the stronger the better its ${PS.inText(quality)}; the front's are blue and wider, the member above is dashed.${sample}`;
  }

  // --- all of it ---------------------------------------------------------------------------

  function printing() {
    const opened = [];
    addEventListener("beforeprint", () => {
      for (const one of document.querySelectorAll("details.printed:not([open])")) {
        one.open = true;
        opened.push(one);
      }
    });
    addEventListener("afterprint", () => {
      while (opened.length) opened.pop().open = false;
    });
  }

  async function fill() {
    theme();
    facts();
    memberControls();
    const section = (name) => () => PS.sections[name](at(`${name}-body`), run);
    const parts = [
      front, member, members, section("progress"), section("importance"), parallelSection, section("time"),
      section("failures"), section("rungs"), allTrials, section("environment"),
    ];
    for (const part of parts) {
      part();
      await new Promise((resolve) => { setTimeout(resolve); }); // the page answers in between
    }
    printing();
    performance.mark("report-ready");
    document.documentElement.dataset.ready = "true";
  }

  fill();
})();
