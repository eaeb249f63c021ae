"use strict";
/* The sections that follow from the data alone: each fills a host. Needs the other files but
   report.js; a page that shows a run live uses them, too. */
PruneSearch.sections = (() => {
  const PS = PruneSearch;
  const { html, empty } = PS;

  function progress(host, run) {
    const found = run.data.hypervolume;
    let by = "trials";
    if (!found) return empty(host, "Not known yet: it needs the dense model's figures and a trial that has ended.");
    const place = html("div", { class: "chart", role: "img" });
    const corner = Object.entries(found.reference).map(([name, value]) => {
      const column = run.columns.get(name);
      return `${PS.inText(column)} ${PS.figure(column, value)}`;
    });
    const draw = () => {
      PS.charts.hypervolume(place, found, by);
      place.setAttribute("aria-label", `Hypervolume over ${by}: it grew ${PS.plural(found.value.length, "time")} and ended at ${found.value.at(-1).toPrecision(4)}.`);
    };
    host.append(PS.radios("Over", "hypervolume-by", [["trials", "trials"], ["seconds", "seconds"]], by, (value) => { by = value; draw(); }),
      html("figure", {}, place, html("figcaption", {},
        `The volume that the front dominates, measured from a corner a little worse than the dense model: ${corner.join(", ")}. More is better.`)),
      html("details", {}, html("summary", {}, "The same as a table"), html("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "Hypervolume" }, growth(found))));
    draw();
    PS.onResize(place, draw);
    return undefined;
  }

  function growth(found) {
    const body = html("tbody");
    found.trials.forEach((count, place) => {
      body.append(html("tr", {}, html("td", { class: "number" }, PS.decimal(count, 0)),
        html("td", { class: "number" }, PS.decimal(found.seconds[place], 1)), html("td", { class: "number" }, found.value[place].toPrecision(5))));
    });
    const heads = ["Trials", "Seconds", "Hypervolume"].map((text) => html("th", { scope: "col", class: "number" }, text));
    return html("table", { class: "plain" }, html("caption", { class: "visually-hidden" }, "Hypervolume each time that it grew"),
      html("thead", {}, html("tr", {}, ...heads)), body);
  }

  function importance(host, run) {
    const { data } = run;
    if (!data.importance) return empty(host, "Not asked for.");
    const panels = html("div", { class: "panels wide" });
    for (const one of data.importance.metrics) {
      const column = run.columns.get(one.metric);
      const part = html("div", { class: "panel" }, html("h3", {}, column.label));
      if (one.doubt) part.append(html("p", { class: "warning" }, one.doubt));
      if (one.parameters.length) {
        const rows = one.parameters.slice(0, 12).map((found) => ({
          label: found.name, value: found.mean, low: found.low, high: found.high,
          texts: [PS.decimal(found.mean, 3), `${PS.decimal(found.low, 3)} to ${PS.decimal(found.high, 3)}`],
        }));
        const drawn = one.num_used < one.num_trials ? `${PS.decimal(one.num_used, 0)} of ${PS.decimal(one.num_trials, 0)}` : PS.decimal(one.num_trials, 0);
        PS.tables.bars(part, `From ${drawn} trials; R² = ${PS.decimal(one.r2, 2)} on unseen ones.`, ["Parameter", "Fall of R²", "Range"], rows);
        if (one.parameters.length > 12) part.append(html("p", { class: "hint" }, `${one.parameters.length - 12} further parameters matter less.`));
      }
      panels.append(part);
    }
    host.append(panels, html("p", { class: "prose small" }, data.importance.method));
    return undefined;
  }

  function time(host, run) {
    const { data, trials } = run;
    const { parts, trial_parts: inside, by_status: ends } = data.times;
    host.classList.add("panels");
    const panel = (title, caption, heads, rows) => {
      const part = html("div", { class: "panel" }, html("h3", {}, title));
      PS.tables.bars(part, caption, heads, rows);
      host.append(part);
    };
    const share = (seconds, total) => (total ? `${PS.decimal((100 * seconds) / total, 0)}\u202f%` : PS.NONE);
    const rows = (list) => {
      const total = list.reduce((sum, one) => sum + one.seconds, 0);
      return list.map((one) => ({ label: one.label, value: one.seconds, texts: [PS.duration(one.seconds), share(one.seconds, total)] }));
    };
    if (parts.length) panel("The run", "Wall clock, over all sessions of the run.", ["Part", "Time", "Share"], rows(parts));
    else host.append(html("p", { class: "empty" }, "The times of the run's parts are written when a session ends."));
    if (!trials.count) return;
    panel("Inside trials", "Added up over all workers.", ["Part", "Time", "Share"], rows(inside));
    panel("By how they ended", "Time inside trials.", ["Status", "Trials", "Time"], ends.map((one) => ({
      label: PS.words(one.status), value: one.seconds, texts: [PS.decimal(one.trials, 0), PS.duration(one.seconds)],
    })));
  }

  function failures(host, run) {
    const { data, trials } = run;
    if (!data.failures.length) return empty(host, trials.count ? "No trial failed or violated a constraint." : "No trial has ended yet.");
    const body = html("tbody");
    for (const one of data.failures) {
      const more = one.count > one.trials.length ? ", …" : "";
      body.append(html("tr", {}, html("td", { class: "number" }, PS.decimal(one.count, 0)), html("td", {}, PS.words(one.status)),
        html("td", { class: "cause" }, one.cause), html("td", {}, one.trials.join(", ") + more)));
    }
    const heads = ["Trials", "Status", "Cause", "Which"].map((text, place) => html("th", { scope: "col", class: place ? null : "number" }, text));
    host.append(html("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "Failures by cause" }, html("table", { class: "plain" },
      html("caption", { class: "visually-hidden" }, "Failed and infeasible trials by cause"), html("thead", {}, html("tr", {}, ...heads)), body)));
    host.append(html("p", { class: "hint" }, "Messages that differ in their numbers alone are one cause."));
    return undefined;
  }

  function rungs(host, run) {
    const { data } = run;
    if (!data.rungs.length) return empty(host, "No two trials have reached two fidelities: nothing is to be compared.");
    const pair = html("div", { class: "panels" });
    for (const one of data.rungs) {
      const value = one.spearman === null ? "undefined" : PS.decimal(one.spearman, 2);
      pair.append(html("figure", { class: "panel" }, PS.charts.rung(run, one.low, one.high),
        html("figcaption", {}, html("strong", {}, `${value} `), `between fidelity ${one.low} and ${one.high}, over ${PS.plural(one.num_trials, "trial")}`,
          one.warning ? html("span", { class: "warning block" }, one.warning) : null)));
    }
    host.append(pair, html("p", { class: "prose small" },
      "Spearman’s rank correlation of validation accuracy over the trials that reached both fidelities. Fidelity 0 is pruned and recalibrated, 1 a share of the fine-tuning, 2 all of it. " +
      "Where trials were stopped early those are the promoted ones, among which the order is harder to foretell: the figure errs on the low side."));
    return undefined;
  }

  function environment(host, run) {
    const { driver, probes, hosts } = run.data.environment;
    host.classList.add("panels");
    const flat = (found) => Object.entries(found).filter(([, value]) => value !== null)
      .flatMap(([name, value]) => (typeof value === "object" ? Object.entries(value).filter((one) => one[1] !== null).map(([n, v]) => [n, String(v)]) : [[name.replace(/_/g, " "), String(value)]]));
    const panel = (title, rows) => host.append(html("div", { class: "panel" }, html("h3", {}, title), PS.definitions(rows)));
    if (Object.keys(driver).length) panel("Driver", flat(driver));
    for (const [name, found] of Object.entries(probes)) panel(name ? `Probe ${name}` : "Latency probe", flat(found));
    if (hosts.length) panel("Trials ran on", hosts.map((one) => [`${one.host}, ${one.device}`, PS.plural(one.trials, "trial")]));
    if (!host.childElementCount) empty(host, "Not stored yet.");
  }

  return { progress, importance, time, failures, rungs, environment };
})();
