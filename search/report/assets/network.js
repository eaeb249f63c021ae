"use strict";
/* A pruned network as it flows: each layer an upright bar, dense as outline and kept as fill;
   removed blocks are hatched, and only their shortcut is left. Needs common.js. */
PruneSearch.network = (() => {
  const PS = PruneSearch;
  const TALLEST = 150; // pixels of the widest layer; heights go with the square root of channels
  const SMALLEST = 10;
  const ABOVE = 46; // room for the shortcuts
  let drawings = 0;

  /** Neighbouring layers of one block or parent, in the order of the layers. */
  function groupsOf(network) {
    const blocks = new Set(network.blocks);
    const groups = [];
    network.layers.forEach((layer, place) => {
      const last = groups[groups.length - 1];
      if (last && last.name === layer.group) last.layers.push({ ...layer, place });
      else {
        groups.push({
          name: layer.group, removable: blocks.has(layer.group), layers: [{ ...layer, place }],
        });
      }
    });
    return groups;
  }

  function height(dense, widest) {
    return Math.max(SMALLEST, TALLEST * Math.sqrt((dense || 1) / widest));
  }

  /** What is shown of a layer: dense and kept channels, and whether its block is gone. */
  function state(layer, group, widths, dropped) {
    const gone = group.removable && dropped.has(group.name);
    const kept = gone || !widths ? null : widths[layer.place];
    return { gone, kept, share: kept === null || !layer.dense ? null : kept / layer.dense };
  }

  function described(layer, found) {
    const dense = layer.dense === null ? "unknown" : layer.dense;
    if (found.gone) return `${layer.name}: removed with its block (dense ${dense})`;
    if (found.kept === null) return `${layer.name}: not known (dense ${dense})`;
    const share = found.share === null ? "" : `, ${PS.decimal(100 * found.share, 0)} %`;
    return `${layer.name}: ${found.kept} of ${dense} channels${share}`;
  }

  function bar(layer, found, left, width, middle, widest, hatch) {
    const tall = height(layer.dense, widest);
    const outline = { x: left, y: middle - tall / 2, width, height: tall, rx: 2 };
    const parts = PS.svg("g", { class: found.gone ? "layer gone" : "layer" });
    parts.append(PS.svg("title", {}, described(layer, found)));
    if (found.gone) {
      parts.append(PS.svg("rect", { ...outline, fill: `url(#${hatch})` }), PS.svg("rect", { ...outline, class: "outline" }));
      return parts;
    }
    if (found.share !== null) {
      const filled = Math.max(1.5, tall * Math.min(1, found.share));
      const y = middle - filled / 2;
      parts.append(PS.svg("rect", { ...outline, y, height: filled, class: "kept" }));
    }
    parts.append(PS.svg("rect", { ...outline, class: "outline" }));
    return parts;
  }

  function labels(layer, found, x, bottom) {
    const y = bottom + 12;
    const count = found.gone ? "×" : found.kept === null ? "?" : String(found.kept);
    const turned = (at, name, text) =>
      PS.svg("text", { x, y: at, class: name, transform: `rotate(-90 ${x} ${at})`, dy: "0.35em" }, text);
    return [turned(y, "count", count), turned(y + 34, found.gone ? "name gone" : "name", layer.name)];
  }

  function shortcut(left, right, top, gone) {
    const rise = Math.min(30, 12 + (right - left) / 6);
    const path = `M${left} ${top}C${left} ${top - rise} ${right} ${top - rise} ${right} ${top}`;
    return PS.svg("path", { d: path, class: gone ? "shortcut alone" : "shortcut" });
  }

  /**
   * The drawing, as wide as `room` pixels or wider; to be put into an element that scrolls.
   *
   * widths: channels of each layer or null; dropped: a set of block names; title: for readers.
   */
  function draw(network, widths, dropped, room, title) {
    const groups = groupsOf(network);
    const widest = Math.max(1, ...network.layers.map((layer) => layer.dense || 0));
    const gaps = 16 * (groups.length + 1);
    const fit = (room - gaps) / Math.max(1, network.layers.length) - 4;
    const width = Math.max(10, Math.min(36, fit));
    const middle = ABOVE + TALLEST / 2;
    const bottom = ABOVE + TALLEST;
    const hatch = `hatch-${(drawings += 1)}`;
    const drawing = PS.svg("g", {});
    let x = 16;
    for (const group of groups) {
      const left = x - 6;
      const gone = group.removable && dropped.has(group.name);
      const inside = PS.svg("g", {});
      for (const layer of group.layers) {
        const found = state(layer, group, widths, dropped);
        inside.append(bar(layer, found, x, width, middle, widest, hatch));
        inside.append(...labels(layer, found, x + width / 2, bottom));
        x += width + 4;
      }
      const right = x + 2;
      if (group.removable) {
        const frame = { x: left, y: ABOVE - 4, width: right - left, height: TALLEST + 8, rx: 5 };
        drawing.append(PS.svg("rect", { ...frame, class: gone ? "block gone" : "block" }));
        drawing.append(shortcut(left, right, ABOVE - 4, gone));
      }
      drawing.append(inside);
      x += 12;
    }
    const longest = Math.max(...network.layers.map((layer) => layer.name.length));
    const whole = { width: x, height: bottom + 52 + 6.2 * longest };
    const stripes = PS.svg(
      "pattern",
      { id: hatch, width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
      PS.svg("rect", { width: 2, height: 6, class: "stripe" }),
    );
    const flow = PS.svg("path", { d: `M4 ${middle}H${x - 4}`, class: "flow" });
    return PS.svg(
      "svg",
      { ...whole, viewBox: `0 0 ${whole.width} ${whole.height}`, class: "network", role: "img", "aria-label": title },
      PS.svg("defs", {}, stripes), flow, drawing,
    );
  }

  /** One sentence about what is left. */
  function summary(run, index) {
    const gone = run.dropped(index);
    const all = run.data.network.blocks.length;
    const blocks = all ? `${gone.length} of ${PS.plural(all, "removable block")} removed` : "no block is removable";
    const share = run.keptShare(index);
    const left = share === null ? "" : `, ${PS.decimal(100 * share, 0)}\u202f% of all channels left`;
    return `${run.trials.id[index]}: ${blocks}${left}.`;
  }

  /** The same as a table: layer, dense, kept, share. */
  function table(network, widths, dropped, caption) {
    const head = ["Layer", "Dense channels", "Kept", "Share"].map((text, place) =>
      PS.html("th", { scope: "col", class: place ? "number" : null }, text));
    const body = PS.html("tbody");
    for (const group of groupsOf(network)) {
      for (const layer of group.layers) {
        const found = state(layer, group, widths, dropped);
        const kept = found.gone ? "removed" : found.kept === null ? PS.NONE : String(found.kept);
        const share = found.share === null ? PS.NONE : `${PS.decimal(100 * found.share, 0)}\u202f%`;
        const cell = (text) => PS.html("td", { class: "number" }, text);
        body.append(PS.html("tr", {},
          PS.html("th", { scope: "row" }, layer.name),
          cell(layer.dense === null ? PS.NONE : String(layer.dense)), cell(kept), cell(share)));
      }
    }
    return PS.html("table", { class: "plain" },
      PS.html("caption", { class: "visually-hidden" }, caption),
      PS.html("thead", {}, PS.html("tr", {}, ...head)), body);
  }

  return { draw, summary, table };
})();
