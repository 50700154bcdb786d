const DEEPEST = 56; // of the blocks of what is kept

function render({ model, el }) {
  const data = model.get("data");
  const root = el.attachShadow({ mode: "open" });
  make(root, "style").textContent = model.get("style");
  const figure = make(root, "div", { class: "figure" });
  const place = columns(data.blocks, data.norms, ["loss"]);
  const widths = Object.fromEntries(place.parts.map(({ part, width }) => [part, width]));
  const rowsOfAll = data.tables.flatMap((targets) => targets[data.parts.indexOf("")]);
  const area = DEEPEST / Math.max(...rowsOfAll.map(([part, , size]) => size / (widths[data.parts[part]] ?? Infinity))); // of a byte
  const chosen = { method: data.methods[0].name, switches: Object.keys(data.switches).map(() => false), part: "" };

  make(figure, "h3", {}, "The gradient's paths, from the loss back to what is trained");
  make(figure, "p", { class: "note" }, `${data.setting}; the norms (N) are trained in all three networks`);
  const controls = make(figure, "div", { class: "controls" });
  const methods = make(controls, "fieldset");
  make(methods, "legend", {}, "Network");
  const networks = { plain: "full (no adapters)", inside: "adapter (inside)", highway: "e3va (highway)" };
  for (const { name, layout } of data.methods) {
    const label = make(methods, "label");
    const input = make(label, "input", { type: "radio", name: "method", value: name });
    input.checked = name === chosen.method;
    input.addEventListener("change", () => show({ method: name, part: "" }));
    label.append(networks[layout]);
  }
  const switches = make(controls, "fieldset");
  make(switches, "legend", {}, "Switches");
  Object.entries(data.switches).forEach(([name, meaning], index) => {
    const label = make(switches, "label", { title: meaning });
    const input = make(label, "input", { type: "checkbox", name });
    input.addEventListener("change", () => show({ switches: chosen.switches.with(index, input.checked) }));
    label.append(name);
  });
  const picking = make(controls, "label");
  make(picking, "strong", {}, "Paths to");
  const select = make(picking, "select", { "aria-label": "Part of the network" });
  select.addEventListener("change", () => show({ part: select.value }));
  const meaning = make(figure, "p", { class: "switch note" });
  const svg = make(figure, "svg", { role: "img" });
  const verdict = make(figure, "p", { class: "verdict", "aria-live": "polite" });
  const numbers = make(figure, "p", { "aria-live": "polite" });
  const table = make(figure, "table");
  drawLegend(figure);

  function show(change) {
    Object.assign(chosen, change);
    const key = chosen.switches.map(Number).join("");
    const state = data.states[`${chosen.method}:${key}`];
    const targets = data.tables[state.table];
    const rows = (targets[data.parts.indexOf(chosen.part)] ?? []).map(([part, ...row]) => [data.parts[part], ...row]);
    const lit = new Set(rows.map(([part]) => part));
    const { layout } = data.methods.find((method) => method.name === chosen.method);

    const on = Object.entries(data.switches).filter((_, index) => chosen.switches[index]);
    meaning.textContent = on.length ? on.map(([name, words]) => `${name}: ${words}`).join("; ") : "No switch is on: nothing is frozen, and nothing is cut off.";
    svg.replaceChildren();
    const { boxes, base } = network(svg, place, layout, Object.keys(state.trained));
    drawPaths(boxes, base, rows, lit);
    fillSelect(boxes, targets, layout);
    say(state, rows, layout);
    const sums = summed(rows);
    svg.setAttribute("aria-label", `${chosen.method}: ${numbers.textContent}`);
    drawTable(sums);
  }

  // Lights up what is on the paths, and hangs below it what is kept there.
  function drawPaths(boxes, base, rows, lit) {
    if ([...lit].some((part) => /^n\d/.test(part))) lit.add("bus");
    svg.setAttribute("viewBox", `0 0 ${place.width} ${base + DEEPEST + 18}`);
    for (const line of svg.querySelectorAll(".line")) line.classList.toggle("lit", lit.has(line.dataset.from) && lit.has(line.dataset.to));
    for (const sum of svg.querySelectorAll(".sum")) sum.classList.toggle("lit", lit.has(sum.dataset.part));
    for (const { group } of boxes.values()) {
      const part = group.dataset.part;
      group.classList.toggle("lit", lit.has(part));
      group.classList.toggle("picked", part === chosen.part);
      make(group, "title", {}, words(part));
      group.addEventListener("click", () => show({ part: part === chosen.part ? "" : part }));
    }
    for (const [part, links, size] of rows) {
      const at = boxes.get(part);
      if (!at) continue;
      const height = (area * size) / at.width;
      const block = make(svg, "rect", { class: "kept", x: at.x, y: base, width: at.width, height });
      make(block, "title", {}, `${words(part)}: ${bytes(size)} kept`);
      if (links) make(svg, "text", { x: at.x + at.width / 2, y: base + height + 11, "text-anchor": "middle" }, links);
    }
  }

  function fillSelect(boxes, targets, layout) {
    select.replaceChildren();
    make(select, "option", { value: "" }, "everything that is reached");
    for (const { part } of place.parts) {
      if (part === "loss" || !boxes.has(part)) continue;
      const reached = data.parts.indexOf(part) in targets;
      make(select, "option", { value: part }, words(part) + (reached ? "" : " (not reached)"));
    }
    if (layout === "highway")
      for (const part of boxes.keys()) if (part.startsWith("lr")) make(select, "option", { value: part }, words(part));
    select.value = chosen.part;
  }

  function say(state, rows, layout) {
    const aside = layout === "highway" ? " (the highway's reductions, which it shares, not counted)" : "";
    const missing = state.unreached
      ? `${state.unreached} tensors require a gradient and get none: they would never be trained.`
      : "All that is trained gets a gradient, but not the loss's: paths have been cut off that it should have taken.";
    verdict.classList.toggle("wrong", !state.exact);
    verdict.textContent = state.exact ? "All that is trained gets its whole gradient." : missing;
    const links = rows.reduce((sum, row) => sum + row[1], 0), size = rows.reduce((sum, row) => sum + row[2], 0);
    const what = chosen.part ? `Paths to ${words(chosen.part)}` : "All paths";
    const ends = state.trained[chosen.part];
    const end = !chosen.part ? "" : ends ? ` They end in its ${ends} trained tensors.` : " Nothing in it is trained: they pass through.";
    numbers.textContent = rows.length
      ? `${what}: the longest has ${links} links, and ${bytes(size)} are kept on them.${end}` +
        ` The whole network keeps ${bytes(state.bytes)}; the gradient passes ${state.activations} outputs of pretrained modules${aside} and ends in ${state.parameters} pretrained tensors.`
      : `No gradient arrives at: ${words(chosen.part)}. The whole network keeps ${bytes(state.bytes)}.`;
  }

  // Links and bytes by stage, back from the loss.
  function summed(rows) {
    const sums = new Map();
    for (const [part, links, size] of rows) {
      const stage = part === "loss" ? "loss" : part === "embed" ? "patch embedding" : `stage ${part.match(/\d/)[0]}`;
      const [l, s] = sums.get(stage) ?? [0, 0];
      sums.set(stage, [l + links, s + size]);
    }
    const order = ["loss", ...data.blocks.map((_, index) => `stage ${data.blocks.length - index}`), "patch embedding"];
    return order.filter((name) => sums.has(name)).map((name) => [name, ...sums.get(name)]);
  }

  function drawTable(sums) {
    table.replaceChildren();
    if (!sums.length) return;
    const head = make(make(table, "thead"), "tr"), body = make(table, "tbody");
    for (const title of ["back from the loss", "links", "so far", "kept", "so far"]) make(head, "th", { scope: "col" }, title);
    let links = 0, size = 0;
    for (const [name, more, kept] of sums) {
      const row = make(body, "tr");
      for (const cell of [name, more, (links += more), bytes(kept), bytes((size += kept))]) make(row, "td", {}, String(cell));
    }
  }

  figure.addEventListener("keydown", (event) => event.stopPropagation()); // notebooks have keys of their own
  show({});
}

function drawLegend(parent) {
  const legend = make(parent, "div", { class: "legend", style: "margin-top: 8px" });
  const entries = [
    ["background: #e0a458", "trained"],
    ["background: #e4eaf4", "frozen"],
    ["border: 2.6px solid #2a7f62; height: 7px", "on the gradient's paths"],
    ["border: 2.5px dashed #22303c; height: 7px", "picked: click a box"],
    ["background: #5b6877", "kept for the backward pass; the number: links on the longest path"],
  ];
  for (const [style, text] of entries) {
    const item = make(legend, "span");
    make(item, "span", { class: "swatch", style });
    make(item, "span", {}, text);
  }
  make(
    parent, "p", { class: "note" },
    "A: attention half of a block, M: its MLP half, a: adapter, R: reduction, N: norm, ○: sum. A link is an operation that " +
      "changes the gradient. detach and no_grad cut the same paths: with no_grad the graph is never built, with detach it is built and dropped.",
  );
}

const figure = { render };
export default figure;
