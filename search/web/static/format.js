// Numbers and names in words.

const AXES = {
  accuracy: ["validation accuracy", "%", 100, 2],
  accuracy_drop: ["accuracy drop", "pp", 100, 2],
  loss: ["validation loss", "nats", 1, 4],
  latency_ms: ["latency", "ms", 1, 3],
  speedup: ["speedup over dense", "×", 1, 2],
  macs: ["multiply-adds", "M", 1e-6, 2],
  num_params: ["parameters", "k", 1e-3, 1],
  peak_memory_mib: ["peak memory", "MiB", 1, 2],
};

/** What a metric is called, its unit, the factor to that unit, and digits behind the point. */
export function axis(metric) {
  const [name, probe] = metric.split("@");
  const [words, unit, scale, digits] = AXES[name] ?? [name.replaceAll("_", " "), "", 1, 4];
  return { words: probe ? `${words} on ${probe}` : words, unit, scale, digits };
}

/** A metric's name with its unit. */
export function title(metric) {
  const { words, unit } = axis(metric);
  return unit ? `${words} (${unit})` : words;
}

/** A metric's value in its unit, without it. */
export function figure(metric, value) {
  if (value === null || value === undefined) return "";
  const { scale, digits } = axis(metric);
  return (value * scale).toFixed(digits);
}

/** The same with the unit. */
export function quantity(metric, value) {
  const text = figure(metric, value);
  return text && `${text} ${axis(metric).unit}`.trim();
}

/** A hypervolume: small ones with four digits behind the point, those of large units shortened. */
export function volume(value) {
  if (value === null || value === undefined) return "not yet";
  return value < 1000 ? value.toFixed(4) : short(value);
}

/** A large number in a few digits: 9.407M. */
export function short(value) {
  return new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 4 }).format(value);
}

export function seconds(value) {
  if (value === null || value === undefined) return "";
  if (value < 120) return `${value.toFixed(value < 10 ? 1 : 0)} s`;
  if (value < 7200) return `${(value / 60).toFixed(0)} min`;
  return `${(value / 3600).toFixed(1)} h`;
}

/** A time of day, and the date where it is another one. */
export function moment(stamp) {
  if (!stamp) return "";
  const then = new Date(stamp * 1000);
  const today = then.toDateString() === new Date().toDateString();
  const options = today
    ? { hour: "2-digit", minute: "2-digit", second: "2-digit" }
    : { dateStyle: "medium", timeStyle: "short" };
  return new Intl.DateTimeFormat("en-GB", options).format(then);
}

export function bytes(count) {
  return count < 2 ** 20 ? `${(count / 1024).toFixed(1)} KiB` : `${(count / 2 ** 20).toFixed(1)} MiB`;
}

export function plural(count, word) {
  return `${count} ${word}${count === 1 ? "" : "s"}`;
}

/** A status or state without underscores. */
export function words(name) {
  return name.replaceAll("_", " ");
}
