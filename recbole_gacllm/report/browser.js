"use strict";
// The page's theme, the description browser and the map. No library; data of the page is only
// ever set as text, never as markup.

const root = document.documentElement;
const dark = window.matchMedia("(prefers-color-scheme: dark)");
let chosen = null;
const showTheme = () => { root.dataset.theme = chosen || (dark.matches ? "dark" : "light"); };
dark.addEventListener("change", showTheme);
document.getElementById("theme").addEventListener("click", () => {
  chosen = root.dataset.theme === "dark" ? "light" : "dark";
  showTheme();
});
showTheme();

function element(tag, content, attributes) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  for (const part of [].concat(content === undefined ? [] : content)) made.append(part);
  return made;
}

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

// Words of b with those that are not in a marked: a longest common subsequence.
function difference(a, b) {
  const plain = (word) => word.toLowerCase().replace(/[^\p{L}\p{N}]/gu, "") || word;
  const left = a.split(/\s+/).filter(Boolean), right = b.split(/\s+/).filter(Boolean);
  const p = left.map(plain), q = right.map(plain), width = q.length + 1;
  const longest = new Uint16Array((p.length + 1) * width);
  for (let i = p.length - 1; i >= 0; i--)
    for (let j = q.length - 1; j >= 0; j--)
      longest[i * width + j] = p[i] === q[j]
        ? longest[(i + 1) * width + j + 1] + 1
        : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
  const runs = [];
  const add = (kind, word) => {
    const last = runs[runs.length - 1];
    if (last && last.kind === kind) last.words.push(word); else runs.push({ kind, words: [word] });
  };
  let i = 0, j = 0;
  while (i < p.length || j < q.length) {
    if (i < p.length && j < q.length && p[i] === q[j]) { add("", right[j]); i++; j++; }
    else if (i < p.length && (j >= q.length || longest[(i + 1) * width + j] >= longest[i * width + j + 1])) add("del", left[i++]);
    else add("ins", right[j++]);
  }
  return runs;
}

function startBrowser(data) {
  const query = document.getElementById("query"), list = document.getElementById("hits");
  const page = document.getElementById("node");
  const view = { layer: "all", removed: false };
  const label = (side, at) => (side === "user" ? `User ${data.user.t[at]}` : data.item.c[at]);
  const nodes = [];
  for (const side of ["user", "item"])
    data[side].t.forEach((token, at) => nodes.push({
      side, at, token: token.toLowerCase(),
      words: (side === "user" ? `user ${token}` : data.item.c[at]).toLowerCase(),
    }));
  // An address holds no half of a surrogate pair.
  const wellFormed = (token) => token.replace(/\p{Surrogate}/gu, "\ufffd");
  const numbers = { user: new Map(), item: new Map() };
  for (const side of ["user", "item"]) data[side].t.forEach((token, at) => numbers[side].set(wellFormed(token), at));
  const recommendedTo = data.item.t.map(() => []);
  (data.user.r || []).forEach((items, user) => items.forEach((item) => {
    if (typeof item === "number") recommendedTo[item].push(user);
  }));

  function rank(node, wanted) {
    if (node.token === wanted || node.words === wanted) return 0;
    if (node.words.startsWith(wanted)) return 1;
    if (node.token.startsWith(wanted)) return 2;
    if (node.words.includes(` ${wanted}`)) return 3;
    return node.words.includes(wanted) ? 4 : -1;
  }

  let hits = [], active = -1;
  function search() {
    const wanted = query.value.trim().toLowerCase();
    hits = [];
    if (wanted) {
      const found = nodes.map((node) => ({ node, rank: rank(node, wanted) })).filter((hit) => hit.rank >= 0);
      const isItem = (hit) => (hit.rank === 0 && hit.node.side === "item" ? 1 : 0);
      found.sort((a, b) => a.rank - b.rank || isItem(a) - isItem(b) || data[b.node.side].d[b.node.at] - data[a.node.side].d[a.node.at]);
      hits = found.slice(0, 12).map((hit) => hit.node);
    }
    active = hits.length ? 0 : -1;
    list.replaceChildren(...hits.map((node, place) => {
      const about = node.side === "user" ? "user" : `item ${data.item.t[node.at]}`;
      const row = element("li", [element("div", label(node.side, node.at)), element("span", about)], { role: "option", id: `hit${place}` });
      row.addEventListener("pointerdown", (event) => { event.preventDefault(); choose(node); });
      return row;
    }));
    if (wanted && !hits.length) list.append(element("li", "Nothing is called so.", { class: "empty" }));
    list.hidden = !wanted;
    query.setAttribute("aria-expanded", String(!list.hidden));
    highlight();
  }
  function highlight() {
    hits.forEach((_, place) => list.children[place].setAttribute("aria-selected", String(place === active)));
    if (active >= 0) {
      query.setAttribute("aria-activedescendant", `hit${active}`);
      list.children[active].scrollIntoView({ block: "nearest" });
    } else query.removeAttribute("aria-activedescendant");
  }
  function choose(node) {
    close();
    query.value = "";
    go(node.side, node.at);
  }
  function close() {
    list.hidden = true;
    query.setAttribute("aria-expanded", "false");
  }
  query.addEventListener("input", search);
  query.addEventListener("focus", () => { if (query.value) search(); });
  query.addEventListener("blur", close);
  query.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    else if (event.key === "Enter" && active >= 0) choose(hits[active]);
    else if (hits.length && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
      event.preventDefault();
      active = (active + (event.key === "ArrowDown" ? 1 : hits.length - 1)) % hits.length;
      highlight();
    }
  });

  const address = (side, at) => `#${side}=${encodeURIComponent(wellFormed(data[side].t[at]))}`;
  function go(side, at) {
    if (location.hash === address(side, at)) return;
    history.pushState(null, "", address(side, at));
    fromAddress();
  }
  function fromAddress() {
    const match = /^#(user|item)=(.*)$/.exec(location.hash);
    if (!match) return false;
    let at;
    try { at = numbers[match[1]].get(decodeURIComponent(match[2])); } catch { return false; } // such as %zz
    if (at === undefined) return false;
    show(match[1], at);
    return true;
  }
  window.addEventListener("popstate", () => fromAddress());

  function link(side, node, under) {
    if (typeof node === "string") return element("div", [`${side} ${node}`, element("small", "not in this page's sample")]);
    const made = element("a", label(side, node), { href: address(side, node) });
    made.addEventListener("click", (event) => {
      if (event.metaKey || event.ctrlKey) return;
      event.preventDefault();
      go(side, node);
      document.getElementById("browser").scrollIntoView();
    });
    const small = under === undefined ? "" : under;
    return element("div", small ? [made, element("small", small)] : [made]);
  }
  const about = (side, node) => (typeof node === "string" ? "" : side === "item" ? (data.item.g || [])[node] || "" : data.user.x[0][node]);

  function listing(title, why, rows, isOrdered) {
    const made = element("section", [element("h4", title), element("p", why, { class: "why" })]);
    made.style.cssText = "border:0;padding:0";
    const body = element("ol");
    const add = (from, to) => rows.slice(from, to).forEach((row, place) => body.append(
      element("li", [...(isOrdered ? [element("i", String(from + place + 1))] : []), row[0], ...(row[1] ? [element("span", row[1], { class: `hit ${row[2]}` })] : [])])));
    const limit = 12;
    add(0, limit);
    made.append(body);
    if (rows.length > limit) {
      const more = element("button", `Show all ${rows.length.toLocaleString("en")}`, { type: "button", class: "more" });
      more.addEventListener("click", () => { add(limit, rows.length); more.remove(); });
      made.append(more);
    }
    return made;
  }

  function layerCards(side, at) {
    return data[side].x.map((texts, layer) => {
      if (view.layer !== "all" && view.layer !== layer) return null;
      const status = data[side].s[layer][at];
      const head = element("h4", [layer === 0 ? "Layer 0, raw" : data.names[layer]]);
      if (status) head.append(element("span", status, { class: "tag" }));
      const text = element("p");
      if (layer === 0) text.append(texts[at]);
      else difference(data[side].x[layer - 1][at], texts[at]).forEach((run) => {
        if (run.kind === "del" && !view.removed) return;
        const words = run.words.join(" ");
        text.append(run.kind ? element(run.kind, words) : words, " ");
      });
      return element("div", [head, text], { class: "layer", "data-layer": layer });
    }).filter(Boolean);
  }

  function show(side, at) {
    const other = side === "user" ? "item" : "user";
    const facts = [];
    if (side === "item") facts.push(`item ${data.item.t[at]}`);
    if (side === "item" && data.item.g && data.item.g[at]) facts.push(data.item.g[at]);
    facts.push(`${data[side].d[at].toLocaleString("en")} training interactions`);
    const head = element("div", [element("h3", label(side, at)), element("p", facts.join(" · "))], { class: "node-head" });
    const cards = element("div", layerCards(side, at), { class: "layers" });

    const bar = element("div", [], { class: "bar" });
    if (data.layers > 1) {
      const choice = element("div", [], { class: "choice", role: "group", "aria-label": "Layers shown" });
      ["all", ...Array(data.layers).keys()].forEach((layer) => {
        const button = element("button", layer === "all" ? "Side by side" : `Layer ${layer}`, { type: "button", "aria-pressed": String(view.layer === layer) });
        button.addEventListener("click", () => {
          view.layer = layer;
          for (const one of choice.children) one.setAttribute("aria-pressed", String(one === button));
          cards.replaceChildren(...layerCards(side, at));
        });
        choice.append(button);
      });
      const box = element("input", [], { type: "checkbox" });
      box.checked = view.removed;
      box.addEventListener("change", () => { view.removed = box.checked; cards.replaceChildren(...layerCards(side, at)); });
      bar.append(choice, element("label", [box, "show removed words"]), element("span", [element("ins", "marked"), " is new against the layer before"]));
    }

    const lists = [];
    if (side === "user" && data.user.r && data.user.r[at].length) {
      const held = new Set(data.user.h[at]), top = new Set(data.user.r[at]);
      lists.push(listing("Recommended", "top 10 of all items new to the user", data.user.r[at].map((item) => [link("item", item, about("item", item)), held.has(item) ? "✓ really liked" : "", "good"]), true));
      const found = data.user.h[at].filter((item) => top.has(item)).length;
      lists.push(listing("Really liked", `held-out test interactions: ${found} of ${held.size} in the top 10`, data.user.h[at].map((item) => [link("item", item, about("item", item)), top.has(item) ? "✓ in the top 10" : "", "good"])));
    }
    if (data[side].n) lists.push(listing("Neighbours", `${other}s chosen for the prompts, best first`, data[side].n[at].map((node) => [link(other, node, about(other, node))])));
    if (side === "item" && data.user.r) {
      const users = recommendedTo[at];
      const liked = (user) => data.user.h[user].includes(at);
      const rows = [...users].sort((a, b) => liked(b) - liked(a)).map((user) => [link("user", user, about("user", user)), liked(user) ? "✓ really liked" : "", "good"]);
      const n = users.filter(liked).length;
      lists.push(listing("Recommended to", users.length ? `in the top 10 of ${users.length.toLocaleString("en")} users; ${n} of them really liked it` : "in no user's top 10", rows));
    }
    page.replaceChildren(head, bar, cards, element("div", lists, { class: "lists" }));
  }
  const sampled = ["user", "item"].filter((side) => data[side].t.length < data.total[side]);
  if (sampled.length) {
    const words = sampled.map((side) => `${data[side].t.length.toLocaleString("en")} of ${data.total[side].toLocaleString("en")} ${side}s`);
    document.getElementById("search").after(element("p", `A random sample: ${words.join(", ")}.`, { class: "note" }));
  }
  if (!fromAddress()) show("user", data.start);
  return (token) => {
    const at = numbers.item.get(token);
    if (at !== undefined) { go("item", at); document.getElementById("browser").scrollIntoView(); }
  };
}

function startMap(map, titles, open) {
  const panels = [...document.querySelectorAll("#map svg.map")];
  const name = document.querySelector(".found-name");
  const rings = panels.map((panel) => panel.querySelector(".found"));
  let nearest = -1;
  panels.forEach((panel, layer) => {
    const points = map.layers[layer];
    const find = (event) => {
      const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(panel.getScreenCTM().inverse());
      let best = 1600;
      nearest = -1;
      points.forEach(([x, y], item) => {
        const distance = (x - place.x) ** 2 + (y - place.y) ** 2;
        if (distance < best) { best = distance; nearest = item; }
      });
      rings.forEach((ring, at) => {
        ring.toggleAttribute("hidden", nearest < 0);
        if (nearest < 0) return;
        ring.setAttribute("cx", map.layers[at][nearest][0]);
        ring.setAttribute("cy", map.layers[at][nearest][1]);
      });
      name.textContent = nearest < 0 ? "" : titles.get(map.items[nearest]) || map.items[nearest];
    };
    panel.addEventListener("pointermove", find);
    panel.addEventListener("pointerdown", find);
    panel.addEventListener("pointerleave", () => {
      rings.forEach((ring) => ring.setAttribute("hidden", ""));
      name.textContent = "";
    });
    panel.addEventListener("click", () => { if (nearest >= 0) open(map.items[nearest]); });
  });
}

const packed = document.getElementById("data").textContent.trim();
if (packed) unpack(packed).then((data) => {
  const open = startBrowser(data.browser);
  if (data.map) {
    const titles = new Map(data.browser.item.t.map((token, at) => [token, data.browser.item.c[at]]));
    startMap(data.map, titles, open);
  }
  root.dataset.ready = "yes";
});
else root.dataset.ready = "yes";
