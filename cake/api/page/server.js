// Requests to the server that this page came from, with the key where it asks for one.

const KEY = "cake.key";

/** Fetch `path`; where the server asks for a key, ask the person. Throws an Error that says what was wrong. */
export async function fetched(path, options = {}) {
  for (;;) {
    const key = localStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    const response = await fetch(path, { ...options, headers });
    if (response.ok) return response;
    if (response.status !== 401) throw new Error(await reason(response));
    await askForKey(key);
  }
}

/** The objects of a stream of server-sent events, until `[DONE]` or its end. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

let asking = null; // one dialog for all who wait for the key

function askForKey(refused) {
  if (localStorage.getItem(KEY) !== refused) return Promise.resolve(); // another has asked meanwhile
  asking ??= new Promise((resolve) => {
    const dialog = document.querySelector("#key-dialog");
    dialog.addEventListener("close", () => {
      localStorage.setItem(KEY, dialog.querySelector("input").value);
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}
