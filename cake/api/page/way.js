// The way of a token, drawn: from the master through the stages and back to it.

import { element } from "./elements.js";

const MOST_IN_ROW = 14; // blocks

/** The stops of a token, with arrows between them. What a node is stands at the first of its stops alone. */
export function wayOf({ nodes, pipeline, rates }) {
  const [master] = nodes, stops = stopsOf(nodes, pipeline);
  const awaited = rates.requests ? stops.map(({ node }) => node).filter((node) => node.state === "lost") : [];
  const runs = !awaited.length && pipeline.some((stage) => stage.active);
  const seen = new Set();
  return stops.flatMap(({ node, parts }, i) => {
    const stages = stagesIn(parts), lit = runs && (!stages.length || stages.some((stage) => stage.active));
    const box = nodeElement(node, parts, lit, !seen.has(node));
    seen.add(node);
    if (!i) return [box];
    if (awaited.includes(node)) return [arrow("awaited", [`waits for ${node.name}`]), box];
    if (awaited.length) return [arrow("", ["waits"]), box];
    return [arrow(lit ? "active" : "", node === master ? ["back to the master"] : told(stages[0])), box];
  });
}

/** A node that no token passes now, with all that it holds. */
export const apart = (node) => nodeElement(node, [...node.holds, ...node.spans.map((span) => ({ span }))], false, true);

/** Who does what in which order, the master first and last; what a node does in a row is one stop. */
function stopsOf(nodes, pipeline) {
  const [master] = nodes, [embedding, head] = master.holds;
  const stages = pipeline.map((stage) => [nodes.find((node) => node.name === stage.node), stage]);
  const stops = [];
  for (const [node, part] of [[master, embedding], ...stages, [master, head]]) {
    if (stops.at(-1)?.node === node) stops.at(-1).parts.push(part);
    else stops.push({ node, parts: [part] });
  }
  return stops;
}

/** Of what a node does, that which has blocks. */
const stagesIn = (parts) => parts.filter((part) => part.span && part.span[1] > part.span[0]);

function nodeElement(node, parts, lit, first) {
  const stages = stagesIn(parts), worked = stages.map((stage) => stage.compute_ms).filter(Number.isFinite);
  const work = worked.length ? ` · ${worked.reduce((sum, ms) => sum + ms).toFixed(2)} ms` : "";
  const blocks = stages.map(({ span: [begin, end] }) => `${begin}–${end - 1}`).join(", ");
  const memory = node.memory_total === null ? "memory unknown" : `memory ${bytes(node.memory_used)} of ${bytes(node.memory_total)}`;
  const lines = (...texts) => texts.map((text) => element("p", {}, text));
  const about = lines([node.device, node.dtype].filter(Boolean).join(" · ") || "unknown device", node.address ?? "this server");
  return element("li", { className: `node ${node.state}${lit ? " active" : ""}${first ? "" : " again"}` },
    element("h3", {}, node.name, element("span", { className: "mark" }, node.state)),
    ...(first ? about : []),
    ...parts.map((part) => (part.span ? cells(part.span) : element("b", {}, part))),
    ...(blocks ? lines(`blocks ${blocks}${work}`) : []),
    ...(first ? lines(memory) : []));
}

/** A square for each block, in rows of about the same length. */
function cells([begin, end]) {
  const n = end - begin, made = element("div", { className: "cells" });
  made.style.gridTemplateColumns = `repeat(${Math.ceil(n / Math.ceil(n / MOST_IN_ROW))}, 11px)`;
  for (let block = begin; block < end; block += 1) made.append(element("i", { title: `block ${block}` }));
  return made;
}

function arrow(kind, texts) {
  return element("li", { className: `arrow ${kind}` }, ...texts.map((text) => element("div", {}, text)));
}

/** What the way to a stage was like in the last second. */
function told(stage) {
  if (stage.network_ms === null) return ["idle"];
  return [`${stage.network_ms.toFixed(2)} ms way`, `${(stage.bytes_per_s / 1e6).toFixed(2)} MB/s`];
}

const bytes = (value) => (value >= 1e9 ? `${(value / 1e9).toFixed(1)} GB` : `${Math.round(value / 1e6)} MB`);
