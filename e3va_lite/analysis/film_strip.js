const BAR = 18; // the height of a bar
const DEEPEST = 150; // below a network

function render({ model, el }) {
  const data = model.get("data");
  const root = el.attachShadow({ mode: "open" });
  make(root, "style").textContent = model.get("style");
  const figure = make(root, "div", { class: "figure" });
  const frames = data.sections.reduce((sum, section) => sum + section.frames, 0);
  const place = columns(data.blocks, data.norms, ["neck", "head", "loss"]);
  const categories = data.categories.map((category) => category.name);
  const peak = Math.max(...data.methods.map((method) => method.peak));
  const area = (BAR * (place.width - 8)) / peak; // of a byte, in the bars and in the blocks below the networks alike
  const hanging = ["activations", "gradients", "temporaries"].map((name) => categories.indexOf(name));
  const totals = data.methods.map((method) => {
    const total = new Float64Array(frames);
    for (const [size, , , , first, last] of method.tensors) for (let f = first; f <= last; f++) total[f] += size;
    return total;
  });

  make(figure, "h3", {}, "One training step: what is in memory, and where it was made");
  make(figure, "p", { class: "note" }, data.setting);
  const controls = make(figure, "div", { class: "controls" });
  const play = make(controls, "button", { type: "button", "aria-label": "Play or pause" }, "▶ Play");
  const slider = make(controls, "input", { type: "range", min: 0, max: frames - 1, step: 1, value: 0, "aria-label": "Moment of the training step" });
  const timeline = drawTimeline(figure, data, totals, frames, place.width);
  const section = make(figure, "p", { class: "section", "aria-live": "polite" });
  const caption = make(figure, "p", { class: "caption note" });
  const strips = data.methods.map((method) => drawStrip(figure, method, place));
  drawLegend(figure, data, area);

  function show(frame) {
    let start = 0, number = 0;
    while (frame >= start + data.sections[number].frames) start += data.sections[number++].frames;
    const { name, caption: words } = data.sections[number];
    slider.value = frame;
    slider.setAttribute("aria-valuetext", `${name}, moment ${frame + 1} of ${frames}`);
    section.textContent = name;
    caption.textContent = words;
    timeline(frame);
    strips.forEach((strip, index) => strip(frame, name.startsWith("Backward"), totals[index][frame]));
  }

  // Every block that is alive in this frame: below the part that made it, and all of them in the bar.
  function drawStrip(parent, method, place) {
    const line = make(parent, "div", { class: "now" });
    const what = make(line, "span"), value = make(line, "span", { class: "value" });
    const svg = make(parent, "svg", { role: "img" });
    const { boxes, base } = network(svg, place, method.layout, method.trained);
    const deep = Math.min(deepest(method, boxes), DEEPEST) + 6;
    svg.setAttribute("viewBox", `0 0 ${place.width} ${base + deep + BAR + 2}`);
    const blocks = make(svg, "g");
    const kind = { plain: "no adapters", inside: "adapters inside the backbone", highway: "adapters on a highway beside the backbone" };
    return (frame, backward, total) => {
      const part = data.parts[method.running[frame]];
      svg.classList.toggle("backward", backward);
      for (const { group } of boxes.values()) group.classList.remove("runs");
      boxes.get(part)?.group.classList.add("runs");
      if (!backward) boxes.get(`l${part}`)?.group.classList.add("runs");
      what.innerHTML = "";
      make(what, "strong", { style: `border-left: 10px solid ${method.colour}; padding-left: 6px` }, method.name);
      make(what, "span", {}, ` (${kind[method.layout]}), ${backward ? "the gradient is at" : "running"}: ${words(part)}`);
      value.textContent = `${bytes(total)} now; peak ${bytes(method.peak)}`;
      svg.setAttribute("aria-label", `${method.name}: ${words(part)}; ${value.textContent}`);

      blocks.replaceChildren();
      const alive = method.tensors.filter(([, , , , first, last]) => first <= frame && frame <= last);
      const depth = new Map();
      const block = ([size, count, category, made], x, y, width, height) => {
        const thin = width < 3 || height < 3; // no room for an outline
        const rect = make(blocks, "rect", { class: thin ? "" : "block", x, y, width, height, fill: data.categories[category].colour });
        const where = data.parts[made] ? `, made by ${words(data.parts[made])}` : "";
        make(rect, "title", {}, `${categories[category]}: ${bytes(size)}${count > 1 ? ` in ${count} tensors` : ""}${where}`);
      };
      for (const category of hanging)
        for (const row of alive.filter((row) => row[2] === category)) {
          const at = boxes.get(data.parts[row[3]]);
          if (!at) continue;
          const y = depth.get(at.part) ?? base, tall = (area * row[0]) / at.width;
          block(row, at.x, y, at.width, Math.min(tall, base + DEEPEST - y));
          depth.set(at.part, Math.min(y + tall, base + DEEPEST));
        }
      let x = 4;
      data.categories.forEach((category, index) => {
        const start = x, rows = alive.filter((row) => row[2] === index);
        for (const row of rows) {
          const wide = (area * row[0]) / BAR;
          block(row, x, base + deep, wide, BAR);
          x += wide;
        }
        const label = `${category.name} ${bytes(rows.reduce((sum, row) => sum + row[0], 0))}`;
        if (x - start > 5.6 * label.length)
          make(blocks, "text", { x: (start + x) / 2, y: base + deep + 12.5, "text-anchor": "middle", style: index < 3 ? "fill: #fff" : "" }, label);
      });
    };
  }

  // The greatest height of the blocks below any part, at any time.
  function deepest(method, boxes) {
    const heights = new Map();
    for (const [size, , category, made, first, last] of method.tensors) {
      const at = boxes.get(data.parts[made]);
      if (!at || !hanging.includes(category)) continue;
      const height = heights.get(at.part) ?? heights.set(at.part, new Float64Array(frames)).get(at.part);
      for (let frame = first; frame <= last; frame++) height[frame] += (area * size) / at.width;
    }
    return Math.max(0, ...Array.from(heights.values(), (height) => Math.max(...height)));
  }

  let timer = null;
  function toggle(on) {
    clearInterval(timer);
    timer = null;
    play.textContent = on ? "❚❚ Pause" : "▶ Play";
    if (!on) return;
    if (+slider.value === frames - 1) show(0);
    timer = setInterval(() => {
      if (!el.isConnected || +slider.value >= frames - 1) toggle(false);
      else show(+slider.value + 1);
    }, 160);
  }
  play.addEventListener("click", () => toggle(timer === null));
  slider.addEventListener("input", () => {
    toggle(false);
    show(+slider.value);
  });
  figure.addEventListener("pick", (event) => {
    toggle(false);
    show(event.detail);
  });
  // Notebooks have keys of their own.
  figure.addEventListener("keydown", (event) => event.stopPropagation());
  show(0);
  return () => toggle(false);
}

// The live bytes over the step, a line per method; returns what moves the mark of the present moment.
function drawTimeline(parent, data, totals, frames, width) {
  const svg = make(parent, "svg", { class: "timeline", viewBox: `0 0 ${width} 104`, role: "img", "aria-label": "Live bytes over the step, a line per method" });
  const left = 92, right = width - 8, low = 92, most = Math.max(...totals.map((total) => Math.max(...total)));
  const x = (frame) => left + ((right - left) * frame) / (frames - 1), y = (size) => low - (74 * size) / most;
  let start = 0;
  data.sections.forEach((section, index) => {
    const end = start + section.frames;
    if (index % 2 === 0) make(svg, "rect", { x: x(start), y: 14, width: x(end) - x(start), height: low - 14, fill: "#f4f6fa" });
    start = end;
  });
  [["forward", 0, 2], ["loss", 2, 3], ["backward", 3, 5], ["optimiser", 5, 6]].forEach(([name, from, to]) => {
    const ends = [from, to].map((count) => data.sections.slice(0, count).reduce((sum, section) => sum + section.frames, 0));
    make(svg, "text", { x: x((ends[0] + ends[1] - 1) / 2), y: 10, "text-anchor": "middle" }, name);
  });
  make(svg, "text", { class: "note", x: left - 6, y: y(most) + 4, "text-anchor": "end" }, bytes(most));
  make(svg, "text", { class: "note", x: left - 6, y: low, "text-anchor": "end" }, "0");
  make(svg, "path", { class: "line", d: `M${left} ${low}H${right}` });
  data.methods.forEach((method, index) => {
    const points = Array.from(totals[index], (size, frame) => `${x(frame).toFixed(1)} ${y(size).toFixed(1)}`);
    make(svg, "path", { d: `M${points.join("L")}`, fill: "none", stroke: method.colour, "stroke-width": 2, "stroke-dasharray": ["", "6 2", "2 2"][index % 3] });
    make(svg, "text", { x: 4, y: 34 + 16 * index, style: `fill: ${method.colour}; font-weight: 700` }, method.name);
  });
  const mark = make(svg, "path", { stroke: "#22303c", "stroke-width": 1.5 });
  const dots = data.methods.map((method) => make(svg, "circle", { r: 3.5, fill: method.colour, stroke: "#fff" }));
  svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect();
    const at = (((event.clientX - box.left) * width) / box.width - left) / (right - left);
    const frame = Math.round(Math.min(Math.max(at, 0), 1) * (frames - 1));
    parent.dispatchEvent(new CustomEvent("pick", { detail: frame }));
  });
  return (frame) => {
    mark.setAttribute("d", `M${x(frame)} 14V${low}`);
    dots.forEach((dot, index) => {
      dot.setAttribute("cx", x(frame));
      dot.setAttribute("cy", y(totals[index][frame]));
    });
  };
}

function drawLegend(parent, data, area) {
  const legend = make(parent, "div", { class: "legend", style: "margin-top: 6px" });
  const meaning = {
    parameters: "parameters",
    gradients: "gradients of parameters",
    optimizer: "the optimiser's state",
    activations: "activations, kept for the backward pass",
    temporaries: "temporaries",
  };
  for (const { name, colour } of data.categories) {
    const item = make(legend, "span");
    make(item, "span", { class: "swatch", style: `background: ${colour}` });
    make(item, "span", {}, meaning[name]);
  }
  const item = make(legend, "span");
  const unit = 2 ** Math.ceil(Math.log2(64 / area)); // bytes of a square that can be seen
  const side = (unit * area) ** 0.5;
  make(item, "span", { style: `width: ${side}px; height: ${side}px; border: 1px solid #22303c` });
  make(item, "span", {}, `this area: ${bytes(unit)}`);
  make(
    parent, "p", { class: "note" },
    "A: attention half of a block, M: its MLP half, a: adapter, R: reduction, N: norm. A dark outline: trained. " +
      "Filled dark: running; filled green: the gradient has come here. Below a part hangs what it made; the bar has all.",
  );
}

const figure = { render };
export default figure;
