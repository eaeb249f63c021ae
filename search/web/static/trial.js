// One trial: what was tried, what came of it, and taking it away.

import { ask } from "/static/api.js";
import { announce, choice, h, put, scrolling } from "/static/dom.js";
import { bytes, figure, moment, seconds, title, words } from "/static/format.js";

const TIMES = {
  score_s: "score channels", prune_s: "prune", finetune_s: "recover and evaluate",
  measure_s: "measure", wait_s: "wait for the probe",
};
const NOT_CHOICES = ["params", "sampler_attrs", "keep", "dropped_blocks"];

export async function showTrial(main, name, id) {
  document.title = `${id} · ${name} · prune-search`;
  const path = `/runs/${encodeURIComponent(name)}`;
  const [trial, run] = await Promise.all([ask(`${path}/trials/${encodeURIComponent(id)}`), ask(path)]);
  const part = (label, ...children) =>
    h("section", { class: "card", "aria-label": label }, h("h2", {}, label), ...children);
  put(main,
    h("div", { class: "row" },
      h("h1", {}, id, " of ", h("a", { href: path }, name)),
      h("span", { class: `badge ${trial.status}` }, words(trial.status)),
      run.front.includes(id) && h("span", { class: "badge completed" }, "on the front"),
      trial.control && h("span", { class: "badge" }, `control: ${trial.control}`)),
    trial.message && h("p", { class: trial.status === "failed" ? "note bad" : "note" }, trial.message),
    h("div", { class: "two" },
      part("What was measured", measured(trial, run)),
      part("What was tried", tried(trial))),
    trial.exportable && part("Take it away", taking(name, id)),
    part("Widths", widths(trial)),
    part("Where the time went", times(trial)));
}

function measured(trial, run) {
  const further = Object.keys(trial.metrics).filter((m) => !run.metrics.includes(m)); // of the task
  const known = run.metrics.filter((m) => m in trial.metrics || m in run.baseline).concat(further);
  const relative = (m) => {
    const [mine, dense] = [trial.metrics[m], run.baseline[m]];
    return mine === undefined || !dense || m === "speedup" ? "" : `${((mine / dense) * 100).toFixed(1)} %`;
  };
  const rungs = trial.accuracy_by_fidelity.map((a, i) => a !== null && `fidelity ${i}: ${figure("accuracy", a)} %`);
  return [
    scrolling("What was measured", h("table", {},
      h("thead", {}, h("tr", {}, ["metric", "this trial", "dense", "of dense"].map((head, i) =>
        h("th", { scope: "col", class: i > 0 && "number" }, head)))),
      h("tbody", {}, known.map((m) => h("tr", {},
        h("th", { scope: "row" }, title(m)),
        [figure(m, trial.metrics[m]), figure(m, run.baseline[m]), relative(m)].map((text) =>
          h("td", { class: "number" }, text))))))),
    rungs.some(Boolean) && h("p", { class: "muted small" }, `Accuracy at ${rungs.filter(Boolean).join(", ")}`),
  ].filter(Boolean);
}

function tried(trial) {
  const { candidate } = trial;
  const rows = Object.entries(candidate).filter(([key, value]) => !NOT_CHOICES.includes(key) && value !== null);
  const keep = Object.entries(candidate.keep ?? {});
  return [
    scrolling("What was tried", h("table", {}, h("tbody", {},
      rows.map(([key, value]) => h("tr", {}, h("th", { scope: "row" }, words(key)),
        h("td", {}, typeof value === "object" ? JSON.stringify(value) : String(value)))),
      h("tr", {}, h("th", { scope: "row" }, "blocks dropped"),
        h("td", {}, trial.dropped_blocks.join(", ") || "none"))))),
    keep.length > 0 && h("details", {}, h("summary", {}, "Fraction kept, by group"),
      scrolling("Fraction kept", h("table", {}, h("tbody", {}, keep.map(([group, share]) => h("tr", {},
        h("th", { scope: "row" }, group), h("td", { class: "number" }, share.toFixed(3)))))))),
    h("details", {}, h("summary", {}, "The whole candidate"),
      h("pre", { tabindex: 0, "aria-label": "The whole candidate" }, JSON.stringify(candidate, null, 2))),
  ].filter(Boolean);
}

function widths(trial) {
  const layers = Object.entries(trial.dense_widths);
  if (!layers.length) return h("p", { class: "muted" }, "Not known: the trial ended before.");
  return scrolling("Widths", h("table", {},
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "layer"),
      h("th", { scope: "col", class: "number" }, "channels kept"),
      h("th", { scope: "col", class: "number" }, "of"), h("th", { scope: "col" }, "share"))),
    h("tbody", {}, layers.map(([layer, most]) => {
      const kept = trial.widths[layer];
      return h("tr", {}, h("th", { scope: "row" }, layer),
        h("td", { class: "number" }, kept === undefined ? "dropped" : String(kept)),
        h("td", { class: "number" }, String(most)), h("td", {}, bar((kept ?? 0) / most)));
    }))));
}

function times(trial) {
  const spent = Object.entries(TIMES).map(([key, label]) => [label, trial.columns[key]]);
  const all = spent.reduce((sum, [, value]) => sum + value, 0) || 1;
  const { host, device, started_at: from, finished_at: to } = trial.columns;
  return [
    scrolling("Where the time went", h("table", {}, h("tbody", {}, spent.map(([label, value]) => h("tr", {},
      h("th", { scope: "row" }, label), h("td", { class: "number" }, seconds(value)),
      h("td", {}, bar(value / all))))))),
    h("p", { class: "muted small" },
      [host && `on ${host} (${device})`, from && `from ${moment(from)}`, to && `to ${moment(to)}`].filter(Boolean).join(", ")),
  ];
}

function bar(share) {
  const element = h("span", { class: "share", "aria-hidden": "true" });
  element.style.setProperty("--share", String(share));
  return element;
}

function taking(name, id) {
  let format = "safetensors";
  const result = h("div", {});
  const button = h("button", { type: "button", class: "main", on: { click: async () => {
    button.disabled = true;
    put(result, h("p", { class: "note" }, "Exporting: the model is written, reloaded, compared and tested once…"));
    announce("Exporting");
    try {
      const path = `/runs/${encodeURIComponent(name)}/trials/${encodeURIComponent(id)}/export`;
      const made = await ask(path, "POST", { format });
      put(result, exported(made));
      announce("Exported. The archive can be downloaded.");
      result.querySelector("a").focus();
    } catch (error) {
      put(result, h("p", { class: "note bad", role: "alert" }, error.message));
    }
    button.disabled = false;
  } } }, "Export");
  const formats = [["safetensors", "safetensors and recipe"], ["pt2", "torch.export (.pt2)"], ["onnx", "ONNX"]];
  return [
    h("div", { class: "row controls" }, choice("format", formats, format, (value) => (format = value)), button),
    result,
  ];
}

function exported(made) {
  const size = Object.values(made.files).reduce((sum, count) => sum + count, 0);
  const facts = Object.entries(made.summary).filter(([, value]) => typeof value !== "object");
  return h("div", { class: "chart" },
    scrolling("What was exported", h("table", {}, h("tbody", {}, facts.map(([key, value]) => h("tr", {},
      h("th", { scope: "row" }, words(key)), h("td", {}, String(value))))))),
    h("p", {}, h("a", { class: "button main", href: made.url, download: "" }, `Download (${bytes(size)})`)));
}
