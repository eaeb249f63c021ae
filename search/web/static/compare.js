// Two runs in the same two metrics.

import { ask } from "/static/api.js";
import { Scatter } from "/static/chart.js";
import { announce, choice, complaint, h, put, scrolling } from "/static/dom.js";
import { plural, title, volume } from "/static/format.js";
import { cells, pointOf } from "/static/pareto.js";
import { nameOf } from "/static/run.js";

const LOOKS = [{ color: "front", shape: "circle" }, { color: "other", shape: "diamond" }];

export async function showCompare(main) {
  document.title = "Compare · prune-search";
  const { runs } = await ask("/runs");
  const names = runs.filter((run) => run.trials).map((run) => run.name);
  put(main, h("h1", {}, "Compare two runs"));
  if (names.length < 2) {
    main.append(h("p", {}, "There must be two runs to compare."));
    return;
  }
  const query = new URLSearchParams(location.search);
  const a = names.includes(query.get("a")) ? query.get("a") : names[0];
  const other = names.find((name) => name !== a);
  const b = names.includes(query.get("b")) && query.get("b") !== a ? query.get("b") : other;
  const asked = { a, b, x: query.get("x"), y: query.get("y") };
  const scatter = new Scatter("Two fronts; links are their members");
  const controls = h("div", { class: "row controls" });
  const table = h("div", {});
  main.append(
    h("section", { class: "card", "aria-label": "Fronts" }, controls, scatter.element),
    h("section", { class: "card", "aria-label": "Figures" }, table));

  const update = async (change = {}) => {
    Object.assign(asked, change);
    const given = Object.entries(asked).filter(([, value]) => value);
    const text = new URLSearchParams(given).toString();
    history.replaceState(null, "", `?${text}`);
    try {
      const found = await ask(`/compare?${text}`);
      draw(found, scatter, table);
      const options = found.metrics.map((m) => [m, title(m)]);
      put(controls,
        choice("run", names, asked.a, (value) => update({ a: value })),
        choice("with", names, asked.b, (value) => update({ b: value })),
        choice("across", options, found.x, (value) => update({ x: value })),
        choice("up", options, found.y, (value) => update({ y: value })));
    } catch (error) {
      put(table, complaint(error));
    }
  };
  await update();
}

function draw(found, scatter, table) {
  const { x, y, runs } = found;
  const directions = Object.fromEntries([x, y].map((m) => [m, directionOf(m)]));
  scatter.set({
    x: nameOf(x, directions), y: nameOf(y, directions), layers: [],
    fronts: runs.map((run, i) => ({
      label: run.name, ...LOOKS[i],
      points: run.members.map((t) => pointOf(run.name, t, x, y)).map((point) => ({ ...point, lines: [run.name, ...point.lines] })),
    })),
    marks: runs.filter((run) => x in run.baseline && y in run.baseline).map((run) => ({ x: run.baseline[x], y: run.baseline[y] })),
  });
  const [one, other] = runs;
  const rows = [
    ["trials finished", (run) => String(run.finished)],
    ["front members", (run) => String(run.members.length)],
    ["hypervolume, one reference point", (run) => volume(run.hypervolume)],
    ["share of the other front that it covers", (run) => (run.covers === null ? "" : `${(run.covers * 100).toFixed(0)} %`)],
  ];
  put(table,
    scrolling("Figures", h("table", {},
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "figure"), runs.map((run) =>
        h("th", { scope: "col", class: "number" }, h("a", { href: `/runs/${encodeURIComponent(run.name)}` }, run.name))))),
      h("tbody", {}, rows.map(([label, text]) => h("tr", {}, h("th", { scope: "row" }, label),
        runs.map((run) => h("td", { class: "number" }, text(run)))))))),
    h("details", {}, h("summary", {}, "The fronts as tables"), runs.map((run) => members(run, [y, x]))));
  announce(`${one.name}: ${plural(one.members.length, "member")}; ${other.name}: ${plural(other.members.length, "member")}`);
}

function members(run, metrics) {
  return scrolling(run.name, h("table", {},
    h("caption", {}, run.name),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "trial"),
      metrics.map((m) => h("th", { scope: "col", class: "number" }, title(m))), h("th", { scope: "col" }, "criterion"))),
    h("tbody", {}, run.members.map((t) => h("tr", {},
      h("th", { scope: "row" }, h("a", { href: `/runs/${encodeURIComponent(run.name)}/trials/${encodeURIComponent(t.trial_id)}` }, t.trial_id)),
      cells(t, metrics).map((text) => h("td", { class: "number" }, text)), h("td", {}, t.criterion ?? ""))))));
}

function directionOf(metric) {
  return ["accuracy", "speedup"].includes(metric.split("@")[0]) ? "maximize" : "minimize";
}
