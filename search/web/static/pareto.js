// Points of trials, and the front in any two metrics.

import { figure, quantity, title, words } from "/static/format.js";

/** What a trial is drawn as: its kind of mark. */
export function kindOf(trial) {
  if (trial.status === "infeasible") return "infeasible";
  if (trial.status !== "completed") return null;
  return trial.control ?? "trial";
}

/** The non-dominated completed trials, the best in `x` first; of equal ones the first by name. */
export function frontOf(trials, x, y, directions) {
  const sign = (metric) => (directions[metric] === "maximize" ? -1 : 1);
  const [sx, sy] = [sign(x), sign(y)];
  const known = trials.filter(
    (t) => t.status === "completed" && isNumber(t.metrics[x]) && isNumber(t.metrics[y]),
  );
  known.sort(
    (a, b) =>
      sx * (a.metrics[x] - b.metrics[x]) ||
      sy * (a.metrics[y] - b.metrics[y]) ||
      (a.trial_id < b.trial_id ? -1 : 1),
  );
  let best = Infinity;
  return known.filter((t) => {
    const better = sy * t.metrics[y] < best;
    if (better) best = sy * t.metrics[y];
    return better;
  });
}

/** A trial as a point of a chart; null where it lacks one of the metrics. */
export function pointOf(run, trial, x, y) {
  const { metrics } = trial;
  if (!isNumber(metrics[x]) || !isNumber(metrics[y])) return null;
  const what = [trial.criterion ?? "no channels removed", blocks(trial.blocks_dropped)];
  return {
    x: metrics[x],
    y: metrics[y],
    href: `/runs/${encodeURIComponent(run)}/trials/${encodeURIComponent(trial.trial_id)}`,
    lines: [
      trial.control ? `${trial.trial_id}, control: ${trial.control}` : trial.trial_id,
      ...[y, x].map((metric) => `${title(metric).replace(/ \(.*/, "")} ${quantity(metric, metrics[metric])}`),
      what.join(", "),
      ...(trial.status === "completed" ? [] : [words(trial.status)]),
    ],
  };
}

/** A front member as cells of a table: texts by metric. */
export function cells(trial, metrics) {
  return metrics.map((metric) => figure(metric, trial.metrics[metric]));
}

export function blocks(count) {
  return count === 1 ? "1 block dropped" : `${count} blocks dropped`;
}

function isNumber(value) {
  return typeof value === "number";
}
