// The network as a row of columns, for every interactive figure; a figure's own script follows in the same module.

const MIB = 2 ** 20;

// A number of bytes in words.
function bytes(count) {
  if (count >= MIB) return `${(count / MIB).toFixed(1)} MiB`;
  return count >= 1024 ? `${(count / 1024).toFixed(1)} KiB` : `${count} bytes`;
}

// An element of HTML, or of SVG inside an <svg>, with attributes and children.
function make(parent, name, attributes = {}, text = "") {
  const svg = name === "svg" || parent.namespaceURI === "http://www.w3.org/2000/svg";
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text) element.textContent = text;
  return parent.appendChild(element);
}

// A part of the network in words.
function words(part) {
  const number = part.match(/\d+/g);
  const adapter = part[0] === "a" && number;
  if (part[0] === "s" && number)
    return `stage ${number[0]}, block ${number[1]}, ${number[2] === "1" ? "attention half" : "MLP half"}`;
  if (adapter) return `stage ${number[0]}, block ${number[1]}, adapter ${number[2]}`;
  if (part[0] === "r") return `reduction before stage ${number[0]}`;
  if (part.match(/^n\d/)) return `norm behind stage ${number[0]}`;
  return { embed: "patch embedding", image: "the images", optimizer: "the optimiser" }[part] ?? part;
}

// Where the parts stand: columns from left to right, the halves of each block with their adapters behind them.
function columns(blocks, norms, ends) {
  const found = [];
  let x = 4;
  const stages = [];
  const column = (part, width, label) => {
    found.push({ part, x, width, label });
    x += width + 1;
  };
  column("embed", 42, "embed");
  blocks.forEach((count, index) => {
    const stage = index + 1;
    if (stage > 1) column(`r${stage}`, 16, "R");
    const start = x;
    for (let block = 1; block <= count; block++) {
      x += 3;
      for (const half of [1, 2]) {
        column(`s${stage}b${block}.${half}`, 21, half === 1 ? "A" : "M");
        column(`a${stage}b${block}.${half}`, 12, "a");
      }
    }
    stages.push({ stage, x: (start + x) / 2 });
    x += 3;
    if (norms.includes(stage)) column(`n${stage}`, 16, "N");
  });
  x += 6;
  for (const part of ends) column(part, 36, part);
  return { parts: found, stages, width: x + 3 };
}

// Draws the network of a method into an SVG element, and returns its boxes by part, and the height of its base line.
//   layout  "plain", "inside" (adapters within the stream) or "highway" (adapters on a way of their own above it)
// A line has in data-from and data-to the parts that it joins. The sum behind the adapter or half p is the part "+p".
function network(svg, place, layout, trained = []) {
  const high = layout === "highway";
  const road = 44, trunk = high ? 86 : 44, row = trunk + 9, base = row + 26;
  const boxes = new Map();
  const lines = make(svg, "g");
  const box = (column, top, height) => {
    const group = make(svg, "g", { class: "box", "data-part": column.part });
    group.classList.toggle("trained", trained.includes(column.part));
    make(group, "rect", { x: column.x, y: top, width: column.width, height, rx: 2 });
    make(group, "text", { x: column.x + column.width / 2, y: top + height / 2 + 3.5 }, column.label);
    boxes.set(column.part, { group, ...column });
  };
  const line = (from, to, ...points) =>
    make(lines, "path", { class: "line", d: `M${points.map((point) => point.join(" ")).join("L")}`, "data-from": from, "data-to": to });
  const sum = (part, x, y) => make(svg, "circle", { class: "sum", cx: x, cy: y, r: 2.5, "data-part": `+${part}` });

  // Where stream and highway have come to: the last part on it, and its place.
  let stream = null, way = null, bus = null;
  place.parts.forEach((column, index) => {
    const { part, x, width } = column, middle = x + width / 2;
    if (part === "embed") {
      box(column, trunk - 9, 18);
      stream = { part, x: x + width };
      way = { part, x: middle, y: trunk - 9 };
    } else if (part[0] === "r") {
      box(column, trunk - 8, 16);
      line(stream.part, high ? `l${part}` : part, [stream.x, trunk], [x, trunk]);
      stream = { part: high ? `l${part}` : part, x: x + width };
      if (high) {
        boxes.get(part).group.dataset.part = `l${part}`;
        boxes.set(`l${part}`, boxes.get(part));
        box(column, road - 8, 16);
        line(way.part, part, [way.x, road], [x, road]);
        way = { part, x: x + width, y: road };
      }
    } else if (part[0] === "s") {
      const adapter = place.parts[index + 1], join = layout === "inside" ? adapter.x + 6 : x + width + 3;
      box(column, row, 18);
      line(stream.part, part, [stream.x, trunk], [x + 4, trunk], [x + 4, row]);
      if (layout === "inside") {
        box(adapter, row, 18);
        line(part, adapter.part, [x + width, row + 9], [adapter.x, row + 9]);
        line(adapter.part, `+${part}`, [join, row], [join, trunk]);
      } else {
        line(part, `+${part}`, [x + width - 4, row], [x + width - 4, trunk]);
      }
      line(stream.part, `+${part}`, [stream.x, trunk], [join, trunk]);
      sum(part, layout === "inside" ? join : x + width - 4, trunk);
      stream = { part: `+${part}`, x: layout === "inside" ? join : x + width - 4 };
      if (high) {
        const up = adapter.x + 6;
        box(adapter, 55, 18);
        line(part, adapter.part, [x + width, row + 9], [up, row + 9], [up, 73]);
        line(adapter.part, `+${adapter.part}`, [up, 55], [up, road]);
        line(way.part, `+${adapter.part}`, ...(way.y === road ? [] : [[way.x, way.y]]), [way.x, road], [up, road]);
        sum(adapter.part, up, road);
        way = { part: `+${adapter.part}`, x: up, y: road };
      }
    } else if (part[0] === "n" && part !== "neck") {
      const from = high ? way : stream;
      box(column, 20, 14);
      line(from.part, part, [from.x, road], [middle, road], [middle, 34]);
      line(part, "bus", [middle, 20], [middle, 12], [middle + 12, 12]);
      bus ??= middle;
    } else if (part[0] !== "a") {
      box(column, 3, 18);
    }
  });
  for (const { stage, x } of place.stages) make(svg, "text", { class: "note", x, y: 32, "text-anchor": "middle" }, `stage ${stage}`);
  const ends = place.parts.filter((column) => !/\d|embed/.test(column.part));
  line("bus", ends[0].part, [bus, 12], [ends[0].x, 12]);
  ends.slice(1).forEach((column, index) => line(ends[index].part, column.part, [column.x - 1, 12], [column.x, 12]));
  return { boxes, base };
}
