// A small line chart of the last minutes.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 300, HEIGHT = 100;
const N_COLOURS = 4, N_DASHES = 4;

// Neighbours differ in colour and in dashes; sixteen lines differ in one of them at least.
const style = (i) => `colour-${i % N_COLOURS} dash-${(i + Math.floor(i / N_COLOURS)) % N_DASHES}`;

/** Lines by name, each of points (seconds before now, value), over a time of so many seconds. */
export function chart(seconds, lines) {
  const most = Math.max(1e-9, ...Object.values(lines).flat().map(([, value]) => value));
  const drawing = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img",
    "aria-label": `${Object.keys(lines).join(", ")}: up to ${most.toPrecision(3)}` });
  drawing.append(shape("line", { class: "frame", x1: 0, y1: HEIGHT, x2: WIDTH, y2: HEIGHT }));
  Object.values(lines).forEach((points, i) => {
    const path = points.map(([at, value]) => `${(1 + at / seconds) * WIDTH},${HEIGHT - (value / most) * (HEIGHT - 2)}`);
    drawing.append(shape("polyline", { class: style(i), points: path.join(" ") }));
  });
  const box = document.createElement("div");
  box.className = "chart";
  box.append(row("scale", [`up to ${most < 0.001 ? 0 : most.toPrecision(3)}`]), drawing,
    row("scale", [`${seconds < 120 ? `${seconds} s` : `${Math.round(seconds / 60)} minutes`} ago`, "now"]));
  const names = Object.keys(lines);
  if (names.length > 1) box.append(row("legend", names, sample));
  return box;
}

function row(name, texts, before = () => "") {
  const made = document.createElement("div");
  made.className = name;
  texts.forEach((text, i) => {
    const each = document.createElement("span");
    each.append(before(i), text);
    made.append(each);
  });
  return made;
}

/** A piece of a line, for the legend. */
function sample(i) {
  const made = shape("svg", { viewBox: "0 0 28 8", class: "sample", "aria-hidden": "true" });
  made.append(shape("polyline", { class: style(i), points: "0,4 28,4" }));
  return made;
}

function shape(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
