// One run, live.

import { ask, follow } from "/static/api.js";
import { Scatter, Steps } from "/static/chart.js";
import { announce, choice, complaint, h, put, scrolling } from "/static/dom.js";
import { axis, moment, plural, seconds, title, volume, words } from "/static/format.js";
import { cells, frontOf, kindOf, pointOf } from "/static/pareto.js";
import { TrialTable } from "/static/table.js";

const LAYERS = [
  { kind: "infeasible", label: "infeasible trial", color: "infeasible", shape: "ring", size: 3 },
  { kind: "trial", label: "trial", color: "trial", shape: "circle", size: 3 },
  { kind: "random", label: "control: random channels", color: "random", shape: "triangle", size: 4.5 },
  { kind: "uniform", label: "control: uniform pruning", color: "uniform", shape: "square", size: 4.5 },
];
const REDRAW_MS = 250;
const AGAIN_MS = 1000;
const PARTS = {
  load_s: "load libraries, data and model", dense_s: "dense model", blocks_s: "block ranking",
  sensitivity_s: "single edits", ray_start_s: "start Ray", reference_s: "dense latency",
  trials_s: "trials (wall clock)",
};

export async function showRun(main, name) {
  const page = new RunPage(main, name, await ask(`/runs/${encodeURIComponent(name)}`));
  page.follow();
}

class RunPage {
  constructor(main, name, run) {
    document.title = `${name} · prune-search`;
    this.name = name;
    this.run = run;
    this.trials = new Map();
    this.columns = [];
    this.scatter = new Scatter(`Trials of ${name}; links are members of the front`);
    this.steps = new Steps("Hypervolume");
    this.table = new TrialTable(name, run.metrics);
    this.against = "trials";
    const [y, x] = axesOf(run);
    this.x = x;
    this.y = y;
    this.#build(main);
    this.#progress();
  }

  follow() {
    follow(this.name, {
      start: ({ columns }) => {
        this.columns = columns;
        this.trials.clear();
        this.#detail();
      },
      trials: (rows) => {
        for (const row of rows) this.#take(row);
        this.#soon();
      },
      progress: ({ summary, volumes, failures }) => {
        const ended = this.run.state === "running" && summary.state !== "running";
        const launched = this.run.state === "failed" && summary.state === "interrupted";
        Object.assign(this.run, summary, launched && { state: "failed", message: this.run.message });
        this.run.volumes = volumes.map(([trials, secs, hypervolume]) => ({ trials, seconds: secs, hypervolume }));
        this.run.failures = failures;
        this.#progress();
        this.#soon();
        if (ended) this.#detail();
      },
      gone: ({ detail }) => this.#say(new Error(detail)),
      lost: (isLost) => {
        this.connection.textContent = isLost ? "Connection lost; trying again" : "";
        if (isLost) announce("Connection lost; trying again");
      },
    });
  }

  #take(row) {
    const trial = { metrics: {} };
    this.columns.forEach((column, i) => {
      (this.run.metrics.includes(column) ? trial.metrics : trial)[column] = row[i];
    });
    this.trials.set(trial.trial_id, trial);
  }

  /** What events do not tell: times, environment, config. */
  async #detail() {
    try {
      Object.assign(this.run, await ask(`/runs/${encodeURIComponent(this.name)}`));
      this.#progress();
      this.#about();
      this.#soon();
      if (this.run.state === "starting") setTimeout(() => this.#detail(), AGAIN_MS); // no event tells its end
    } catch (error) {
      this.#say(error);
    }
  }

  #build(main) {
    const part = (id, heading, ...children) =>
      h("section", { class: "card", id, "aria-labelledby": `${id}-title` },
        h("h2", { id: `${id}-title` }, heading), ...children);
    this.state = h("span", { class: "badge" });
    this.connection = h("span", { class: "muted small" });
    this.actions = h("div", { class: "row end controls" });
    this.said = h("p", { class: "note", hidden: true });
    this.bar = h("progress", { "aria-label": "Trials finished" });
    this.barText = h("p", { class: "muted" });
    this.figures = h("dl", { class: "figures" });
    this.members = h("div", {});
    this.failures = h("div", {});
    this.about = h("div", {});
    this.frontChoice = h("div", { class: "row controls" });
    put(main,
      h("div", { class: "row" }, h("h1", {}, this.name), this.state, this.connection, this.actions),
      h("section", { class: "card", "aria-label": "Progress" },
        h("p", { class: "muted" }, `${this.run.model} on ${this.run.data}`),
        this.said, this.bar, this.barText, this.figures),
      part("front", "Front", this.frontChoice, this.scatter.element,
        h("details", {}, h("summary", {}, "The front as a table"), this.members)),
      part("volume", "Hypervolume",
        h("div", { class: "row controls" },
          choice("against", [["trials", "trials that ended"], ["seconds", "seconds"]], "trials", (value) => {
            this.against = value;
            this.#draw();
          })),
        this.steps.element),
      part("trials", "Trials", this.table.element),
      part("failures", "Failures", this.failures),
      part("about", "About this run", this.about));
    this.#choices();
    this.#about();
  }

  #choices() {
    const options = this.run.metrics.map((metric) => [metric, title(metric)]);
    put(this.frontChoice,
      choice("across", options, this.x, (value) => { this.x = value; this.#draw(); }),
      choice("up", options, this.y, (value) => { this.y = value; this.#draw(); }));
  }

  #progress() {
    const { run } = this;
    put(this.state, words(run.state));
    this.state.className = `badge ${run.state}`;
    this.bar.max = run.trials || 1;
    this.bar.value = run.finished;
    const left = run.seconds_left ? `, about ${seconds(run.seconds_left)} left` : "";
    const counts = Object.entries(run.by_status).map(([status, count]) => `${count} ${words(status)}`);
    const text = `${run.finished} of ${plural(run.trials, "trial")}${left}`;
    this.barText.textContent = counts.length ? `${text}: ${counts.join(", ")}` : text;
    const fact = (label, value) => h("div", {}, h("dt", {}, label), h("dd", {}, value));
    put(this.figures,
      fact("front", plural(run.front.length, "member")),
      fact("hypervolume", volume(run.hypervolume)),
      fact("dense accuracy", run.baseline.accuracy === undefined ? "not yet" : `${(run.baseline.accuracy * 100).toFixed(2)} %`),
      fact("fastest within 1 %", this.#near()),
      fact("last trial", moment(run.updated_at) || "none yet"));
    if (run.message) {
      this.said.hidden = false;
      this.said.className = "note bad";
      this.said.textContent = run.message;
    }
    announce(`${words(run.state)}, ${text}, ${plural(run.front.length, "front member")}`);
    const state = `${run.state} ${run.finished < run.trials}`;
    if (state !== this.offered) this.#offer();
    this.offered = state;
  }

  #near() {
    const near = [...this.trials.values()].filter(
      (t) => t.status === "completed" && t.metrics.accuracy_drop <= 0.01 && t.metrics.speedup,
    );
    const best = Math.max(...near.map((t) => t.metrics.speedup));
    return near.length ? `${best.toFixed(2)} ×` : "none yet";
  }

  #offer() {
    const { state } = this.run;
    const act = (label, path, body, look) =>
      h("button", { type: "button", class: look, on: { click: (event) => this.#act(event.target, path, body()) } }, label);
    const more = h("input", { type: "number", min: 1, max: 100000, value: 20, "aria-label": "Trials to add" });
    more.style.width = "6rem";
    const isLive = state === "running" || state === "starting";
    put(this.actions,
      isLive && act("Stop", "stop", () => ({}), ""),
      (state === "interrupted" || state === "failed") && act("Resume", "resume", () => ({}), "main"),
      !isLive && more,
      !isLive && act("Extend", "extend", () => ({ trials: Number(more.value) }), ""),
      h("a", { class: "button", href: `/compare?a=${encodeURIComponent(this.name)}` }, "Compare"),
      h("a", { class: "button", href: `/api/v1/runs/${encodeURIComponent(this.name)}/report`, download: "" }, "Report"));
  }

  async #act(button, path, body) {
    button.disabled = true;
    try {
      const { detail } = await ask(`/runs/${encodeURIComponent(this.name)}/${path}`, "POST", body);
      this.#tell(detail);
      if (path !== "stop") await this.#started();
    } catch (error) {
      this.#say(error);
    }
    button.disabled = false;
  }

  /** Returns when the search runs; one that could not be started says why. */
  async #started() {
    for (let tries = 0; tries < 60; tries += 1) {
      await new Promise((done) => setTimeout(done, 1000));
      if (this.run.state === "running") return;
      const { state, message } = await ask(`/runs/${encodeURIComponent(this.name)}`);
      if (state === "failed") throw new Error(message);
    }
  }

  #tell(text) {
    this.said.className = "note good";
    this.said.textContent = text;
    this.said.hidden = false;
    announce(text);
  }

  #say(error) {
    this.said.className = "note bad";
    this.said.textContent = error.message;
    this.said.hidden = false;
    announce(error.message);
  }

  /** Many events may come at once: the page is drawn after them. */
  #soon() {
    this.timer ??= setTimeout(() => {
      this.timer = null;
      this.#draw();
    }, REDRAW_MS);
  }

  #draw() {
    const { run, x, y } = this;
    const all = [...this.trials.values()];
    const front = frontOf(all, x, y, run.directions);
    const onFront = new Set(front);
    const points = (trials) => trials.map((t) => pointOf(this.name, t, x, y)).filter(Boolean);
    const layers = LAYERS.map((layer) => ({
      ...layer,
      points: points(all.filter((t) => kindOf(t) === layer.kind && !onFront.has(t))),
    }));
    const dense = run.baseline;
    const marks = x in dense && y in dense ? [{ x: dense[x], y: dense[y] }] : [];
    this.scatter.set({
      x: nameOf(x, run.directions), y: nameOf(y, run.directions), layers, marks,
      fronts: [{ label: "Pareto front", color: "front", shape: "circle", points: points(front) }],
    });
    this.#drawMembers(front);
    const { against } = this;
    this.steps.set(run.volumes.map((v) => [v[against], v.hypervolume]),
      against === "trials" ? "trials that ended" : "seconds", "hypervolume");
    this.table.set(all);
    this.#drawFailures();
    put(this.figures.children[3].lastChild, this.#near());
  }

  #drawMembers(front) {
    const metrics = this.run.metrics.filter((m) => front.some((t) => t.metrics[m] !== null));
    const dense = { metrics: this.run.baseline };
    put(this.members, scrolling("Front", h("table", {},
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "trial"),
        metrics.map((m) => h("th", { scope: "col", class: "number" }, title(m))),
        h("th", { scope: "col" }, "criterion"), h("th", { scope: "col", class: "number" }, "blocks dropped"))),
      h("tbody", {},
        h("tr", { class: "dense" }, h("th", { scope: "row" }, "dense"),
          cells(dense, metrics).map((text) => h("td", { class: "number" }, text)), h("td", {}), h("td", {})),
        front.map((t) => h("tr", {},
          h("th", { scope: "row" }, h("a", { href: `/runs/${encodeURIComponent(this.name)}/trials/${encodeURIComponent(t.trial_id)}` }, t.trial_id)),
          cells(t, metrics).map((text) => h("td", { class: "number" }, text)),
          h("td", {}, t.criterion ?? ""), h("td", { class: "number" }, String(t.blocks_dropped))))))));
  }

  #drawFailures() {
    const { failures } = this.run;
    if (!failures.length) {
      put(this.failures, h("p", { class: "muted" }, "No trial has failed."));
      return;
    }
    put(this.failures, scrolling("Failures", h("table", {},
      h("thead", {}, h("tr", {}, ["times", "message", "for example"].map((head) => h("th", { scope: "col" }, head)))),
      h("tbody", {}, failures.map((one) => h("tr", {},
        h("td", {}, String(one.count)), h("td", { class: "message mono" }, one.message),
        h("td", {}, h("a", { href: `/runs/${encodeURIComponent(this.name)}/trials/${encodeURIComponent(one.trial_id)}` }, one.trial_id))))))));
  }

  #about() {
    const { run } = this;
    const spent = Object.entries(PARTS).filter(([part]) => part in run.times);
    const log = h("pre", { tabindex: 0, "aria-label": "Log" }, "");
    const details = h("details", {}, h("summary", {}, "What the search said"), log);
    details.addEventListener("toggle", async () => {
      if (!details.open) return;
      try {
        log.textContent = (await ask(`/runs/${encodeURIComponent(this.name)}/log`)).text;
      } catch (error) {
        put(log, complaint(error));
      }
    });
    put(this.about,
      spent.length > 0 && h("dl", { class: "figures" },
        spent.map(([part, label]) => h("div", {}, h("dt", {}, label), h("dd", {}, seconds(run.times[part]))))),
      h("details", {}, h("summary", {}, "Config"), h("pre", { tabindex: 0, "aria-label": "Config" }, run.config)),
      h("details", {}, h("summary", {}, "Machine and versions"),
        h("pre", { tabindex: 0, "aria-label": "Machine and versions" }, JSON.stringify(run.environment, null, 2))),
      details);
  }
}

/** The objective that is quality, and the one that is cost. */
function axesOf(run) {
  const names = Object.keys(run.objectives);
  const y = names.find((name) => run.objectives[name] === "maximize") ?? names[0] ?? "accuracy";
  return [y, names.find((name) => name !== y) ?? "macs"];
}

/** An axis: its text, with the better direction, and the factor to its unit. */
export function nameOf(metric, directions) {
  const better = directions[metric] === "maximize" ? "higher" : "lower";
  const short = title(metric);
  return { name: `${short}, ${better} is better`, short, scale: axis(metric).scale };
}
