// Elements of the page. Text is always text here: nothing is ever read as HTML.

/** A new element with properties, and with elements or texts in it. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** A button that does something. */
export function button(label, action, properties = {}) {
  return element("button", { type: "button", textContent: label, onclick: action, ...properties });
}

/** What a model wrote, as nodes: text, and blocks of code between fences with a button to copy them. */
export function written(text) {
  const parts = text.split(/^```/m);
  return parts.flatMap((part, i) => {
    if (i % 2) return [codeBlock(part)];
    const above = i ? part.replace(/^\n+/, "") : part; // a block has room around it
    return emphasized(i < parts.length - 1 ? above.replace(/\n+$/, "") : above);
  });
}

/** Text as it is, but for `code` and **what is important**. */
function emphasized(text) {
  return text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/).map((part, i) => {
    if (i % 2 === 0) return part;
    return part.startsWith("`") ? element("code", {}, part.slice(1, -1)) : element("strong", {}, part.slice(2, -2));
  });
}

function codeBlock(part) {
  const [language, ...lines] = part.split("\n");
  const code = lines.join("\n").replace(/\n$/, "");
  const shown = element("code", {}, code);
  const copy = button("Copy", async () => {
    if (!navigator.clipboard) { // a browser has it for loopback and HTTPS only
      getSelection().selectAllChildren(shown);
      copy.textContent = "Press Ctrl+C";
      return;
    }
    await navigator.clipboard.writeText(code);
    copy.textContent = "Copied";
  });
  return element("div", { className: "code" },
    element("div", {}, language.trim() || "code", copy), element("pre", {}, shown));
}
