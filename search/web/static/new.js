// A new search: from a form or a file, checked, looked at, started.

import { ask } from "/static/api.js";
import { announce, h, put, scrolling } from "/static/dom.js";
import { figure, plural, title } from "/static/format.js";

const COSTS = ["latency_ms", "macs", "num_params", "peak_memory_mib"];
const CRITERIA = ["magnitude_l1", "taylor", "fgp", "random"];

export function showNew(main) {
  document.title = "New search · prune-search";
  const page = new NewPage(main);
  ask("/options").then((options) => page.suggest(options)).catch(() => {}); // names can be typed
}

class NewPage {
  constructor(main) {
    this.fields = {};
    this.text = h("textarea", { id: "config", spellcheck: "false", autocomplete: "off", "aria-describedby": "config-help" });
    this.file = h("input", { type: "file", id: "file", accept: ".yaml,.yml,application/yaml", on: { change: () => this.#upload() } });
    this.result = h("div", { class: "chart" });
    this.criteria = h("div", { class: "row" });
    this.button = h("button", { type: "button", class: "main", on: { click: () => this.#check() } }, "Check");
    put(main,
      h("h1", {}, "New search"),
      h("div", { class: "two" },
        h("section", { class: "card", "aria-labelledby": "form-title" }, h("h2", { id: "form-title" }, "From a form"), this.#form()),
        h("section", { class: "card", "aria-labelledby": "yaml-title" }, h("h2", { id: "yaml-title" }, "Config"),
          h("p", { class: "muted small", id: "config-help" }, "Written by the form, or your own. Nothing starts before it was checked."),
          h("label", { class: "field", for: "file" }, h("span", {}, "Upload a YAML file"), this.file),
          h("label", { class: "field", for: "config" }, h("span", {}, "YAML"), this.text),
          h("div", { class: "row" }, this.button))),
      h("section", { class: "card", "aria-label": "Check", hidden: true }, this.result));
    this.card = this.result.parentElement;
    this.text.addEventListener("input", () => this.#stale());
    this.#write();
  }

  /** Fills in the names that a config may use. */
  suggest(options) {
    const models = { ...options.zoo };
    this.#list("model", Object.keys(models));
    this.#list("data", Object.keys(options["data set"] ?? {}));
    this.#criteria(options.criterion ?? {});
  }

  #form() {
    const field = (key, label, attributes) => {
      this.fields[key] = h("input", { id: `f-${key}`, ...attributes, on: { input: () => this.#write() } });
      return h("label", { class: "field", for: `f-${key}` }, h("span", {}, label), this.fields[key]);
    };
    const number = (key, label, value, attributes = {}) => field(key, label, { type: "number", min: 0, step: "any", value, ...attributes });
    this.fields.cost = h("select", { id: "f-cost", on: { change: () => this.#write() } },
      COSTS.map((cost) => h("option", { value: cost }, title(cost))));
    this.#criteria(Object.fromEntries(CRITERIA.map((name) => [name, ""])));
    return h("form", { class: "chart", on: { submit: (event) => { event.preventDefault(); this.#check(); } } },
      h("div", { class: "fields" },
        field("name", "name of the run", { value: "digits-resnet20", maxlength: 100 }),
        field("model", "model", { value: "resnet20", list: "model-names" }),
        field("data", "data set", { value: "digits", list: "data-names" }),
        number("image_size", "pixels a side (empty: its own)", 16, { min: 8, step: 1 }),
        number("baseline", "epochs of the dense model", 30, { step: 1 }),
        h("label", { class: "field", for: "f-cost" }, h("span", {}, "to be reduced"), this.fields.cost),
        number("trials", "trials", 40, { min: 1, step: 1 }),
        number("epochs", "epochs of fine-tuning a trial", 1),
        number("drop", "largest accuracy drop (empty: any)", "", { max: 1 })),
      h("fieldset", {}, h("legend", {}, "criteria that score channels"), this.criteria),
      h("datalist", { id: "model-names" }), h("datalist", { id: "data-names" }),
      h("p", { class: "muted small" }, "Changing the form writes the config anew."));
  }

  #criteria(known) {
    const chosen = new Set([...this.criteria.querySelectorAll("input:checked")].map((box) => box.value));
    if (!chosen.size) CRITERIA.forEach((name) => chosen.add(name));
    put(this.criteria, Object.entries(known).map(([name, line]) =>
      h("label", { class: "check", title: line || null },
        h("input", { type: "checkbox", value: name, checked: chosen.has(name), on: { change: () => this.#write() } }), name)));
  }

  #list(key, names) {
    put(document.getElementById(`${key}-names`), names.map((name) => h("option", { value: name })));
  }

  #write() {
    const value = (key) => this.fields[key].value.trim();
    const chosen = [...this.criteria.querySelectorAll("input:checked")].map((box) => box.value);
    const size = value("image_size") ? `, image_size: ${value("image_size")}` : "";
    const lines = [
      `name: ${scalar(value("name"))}`,
      `model: {name: ${scalar(value("model"))}}`,
      `data: {name: ${scalar(value("data"))}${size}}`,
      `baseline: {epochs: ${value("baseline") || 0}}`,
      "space:",
      `  criteria: [${chosen.map(scalar).join(", ")}]`,
      `recover: {epochs: ${value("epochs") || 0}}`,
      `objectives: {accuracy: maximize, ${value("cost")}: minimize}`,
      ...(value("drop") ? [`constraints: ["accuracy_drop <= ${value("drop")}"]`] : []),
      `search: {trials: ${value("trials") || 1}}`,
    ];
    this.text.value = `${lines.join("\n")}\n`;
    this.#stale();
  }

  async #upload() {
    const [file] = this.file.files;
    if (!file) return;
    this.text.value = await file.text();
    this.#stale();
    announce(`${file.name} is loaded`);
  }

  #stale() {
    this.card.hidden = true;
  }

  async #check() {
    this.button.disabled = true;
    this.card.hidden = false;
    put(this.result, h("p", { class: "note" }, "Checking: data and model are loaded…"));
    announce("Checking");
    try {
      const text = this.text.value;
      const checked = await ask("/checks", "POST", { config: text });
      if (text !== this.text.value) throw new Error("The config was changed meanwhile. Check it again.");
      put(this.result, this.#report(checked));
      announce("The config is fine.");
      this.result.querySelector("button").focus();
    } catch (error) {
      put(this.result, h("p", { class: "note bad", role: "alert" }, error.message));
    }
    this.button.disabled = false;
  }

  #report({ check_id: id, name, trials, report, config }) {
    const start = h("button", { type: "button", class: "main", on: { click: () => this.#start(start, id) } }, `Start ${plural(trials, "trial")}`);
    const fact = (label, value) => h("div", {}, h("dt", {}, label), h("dd", {}, value));
    const [low, high] = report.macs_range ?? [];
    return [
      h("h2", {}, `${name} can be started`),
      h("dl", { class: "figures" },
        fact("model", report.model), fact("data", `${report.data}, ${report.image}`),
        fact("images to train on", String(report.split?.train ?? "")),
        fact("parameters", `${figure("num_params", report.num_params)} k`),
        fact("multiply-adds", `${figure("macs", low)} to ${figure("macs", high)} M`)),
      h("p", {}, report.space),
      ...(report.warnings ?? []).map((line) => h("p", { class: "note" }, line)),
      h("div", { class: "row" }, start),
      h("details", {}, h("summary", {}, "What can be removed, and what cannot"), removable(report)),
      h("details", {}, h("summary", {}, "The whole config, defaults included"),
        h("pre", { tabindex: 0, "aria-label": "The whole config" }, config)),
    ];
  }

  async #start(button, id) {
    button.disabled = true;
    try {
      const { name } = await ask("/runs", "POST", { check_id: id });
      announce(`${name} is started`);
      await waitFor(name);
      location.assign(`/runs/${encodeURIComponent(name)}`);
    } catch (error) {
      this.result.prepend(h("p", { class: "note bad", role: "alert" }, error.message));
      button.disabled = false;
    }
  }
}

/** Returns when the run has a page; a search writes its folder after it has loaded its data. */
async function waitFor(name) {
  for (;;) {
    const run = (await ask("/runs")).runs.find((one) => one.name === name);
    if (run?.trials) return;
    if (run?.state === "failed") throw new Error(`${name} could not be started: ${run.message}`);
    await new Promise((done) => setTimeout(done, 700));
  }
}

function removable(report) {
  const blocks = report.blocks ?? [];
  const groups = report.groups ?? [];
  const levels = Object.keys(groups[0]?.widths ?? {});
  return h("div", { class: "chart" },
    scrolling("Blocks", h("table", {}, h("caption", {}, "Blocks"),
      h("thead", {}, h("tr", {}, ["block", "stage", "parameters", "removable"].map((head) => h("th", { scope: "col" }, head)))),
      h("tbody", {}, blocks.map((one) => h("tr", {}, h("th", { scope: "row" }, one.name), h("td", {}, one.stage),
        h("td", {}, String(one.num_params)), h("td", {}, one.removable ? "yes" : `no: ${one.reason}`)))))),
    scrolling("Channel groups", h("table", {}, h("caption", {}, "Channel groups: the width at each fraction kept"),
      h("thead", {}, h("tr", {}, ["group", "channels", ...levels].map((head) => h("th", { scope: "col" }, head)))),
      h("tbody", {}, groups.map((one) => h("tr", {}, h("th", { scope: "row" }, one.name),
        h("td", {}, String(one.channels)), levels.map((level) => h("td", {}, String(one.widths[level])))))))));
}

/** A text as YAML; plain where that is safe. */
function scalar(text) {
  return /^[A-Za-z][A-Za-z0-9_.-]*$/.test(text) ? text : JSON.stringify(text);
}
