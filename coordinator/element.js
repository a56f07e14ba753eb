// How this page makes nodes and words. Text from the network enters the document as text nodes only: nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

/** A node with attributes; children are nodes or plain text. `null` attributes and children are left out. */
export function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

export function shape(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(key, String(value));
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Peer ids are 52 characters of base32; eight tell the members of one swarm apart for a person. */
export const shortId = (peerId) => peerId.slice(0, 8);

export const whole = (value) => Math.round(value).toLocaleString("en-US");

/** Three significant digits, `12.3k` from ten thousand on. */
export function compact(value) {
  if (value >= 1e6) return `${(value / 1e6).toPrecision(3)}M`;
  if (value >= 1e4) return `${(value / 1e3).toPrecision(3)}k`;
  return whole(value);
}

/** Three significant digits and a prefix, `2.87 Gbit/s`; `–` for what was not measured. */
export function withUnit(value, unit) {
  if (value === null) return "–";
  const prefixes = ["", "k", "M", "G", "T", "P"];
  const thousands = Math.max(0, Math.min(prefixes.length - 1, Math.floor(Math.log10(value * 1.0005) / 3)));
  const scaled = value / 1000 ** thousands;
  return `${scaled >= 100 ? Math.round(scaled) : Number(scaled.toPrecision(3))} ${prefixes[thousands]}${unit}`;
}

/** Two digits where there are few: `0.37 %`, `42 %`. */
export const percent = (share) => (share >= 0.995 ? "100 %" : `${Number((100 * share).toPrecision(2))} %`);

export const clock = (unixS) =>
  new Date(unixS * 1000).toLocaleTimeString(undefined, { hour12: false, hour: "2-digit", minute: "2-digit", second: "2-digit" });
