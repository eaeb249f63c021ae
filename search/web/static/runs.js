// All runs of the results folder.

import { ask } from "/static/api.js";
import { announce, complaint, h, put, scrolling } from "/static/dom.js";
import { moment, plural, seconds, volume, words } from "/static/format.js";

const EVERY_MS = 3000;

export async function showRuns(main) {
  document.title = "Runs · prune-search";
  const list = h("div", {}, h("p", { class: "small" }, "Reading the runs …"));
  put(main,
    h("div", { class: "row" }, h("h1", {}, "Runs"),
      h("a", { class: "button main end", href: "/new" }, "New search")),
    h("section", { class: "card", "aria-label": "Runs" }, list));
  let before = "";
  const look = async () => {
    const found = await ask("/runs");
    const text = JSON.stringify(found);
    if (text === before) return;
    before = text;
    put(list, found.runs.length ? scrolling("Runs", table(found)) : empty(found.folder));
    const running = found.runs.filter((run) => run.state === "running").length;
    announce(`${plural(found.runs.length, "run")}, ${running} running`);
  };
  await look();
  setInterval(() => document.hidden || look().catch((error) => put(list, complaint(error))), EVERY_MS);
}

function table(found) {
  const heads = ["run", "state", "model on data", "trials", "front", "hypervolume", "last trial", "time left"];
  const numbers = ["front", "hypervolume"];
  return h("table", {},
    h("caption", {}, `${plural(found.runs.length, "run")} in ${found.folder}`),
    h("thead", {}, h("tr", {}, heads.map((head) =>
      h("th", { scope: "col", class: numbers.includes(head) && "number" }, head)))),
    h("tbody", {}, found.runs.map(line)));
}

function line(run) {
  const path = `/runs/${encodeURIComponent(run.name)}`;
  const done = h("td", {}, `${run.finished} of ${run.trials} `);
  if (run.trials) {
    done.append(h("progress", { max: run.trials, value: run.finished, "aria-label": `${run.name}: trials` }));
  }
  const name = run.trials ? h("a", { href: path }, run.name) : run.name;
  return h("tr", {},
    h("th", { scope: "row" }, name),
    h("td", {}, h("span", { class: `badge ${run.state}` }, words(run.state)),
      run.message && h("div", { class: "small" }, run.message)),
    h("td", {}, run.model && `${run.model} on ${run.data}`),
    done,
    h("td", { class: "number" }, run.trials ? String(run.front.length) : ""),
    h("td", { class: "number" }, run.trials ? volume(run.hypervolume) : ""),
    h("td", {}, moment(run.updated_at)),
    h("td", {}, run.seconds_left === null ? "" : `about ${seconds(run.seconds_left)}`));
}

function empty(folder) {
  return h("p", {}, `There is no run in ${folder} yet. `,
    h("a", { href: "/new" }, "Start a search"), " here, or with prune-search run.");
}
