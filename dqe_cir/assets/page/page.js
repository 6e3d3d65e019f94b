// The search page in a browser. The kernel holds everything: `state` says what to show (retriever/09_page.ipynb),
// and every request goes back as one message that carries all that stands in the text field.

const SMALL = 296, LARGE = 900; // pixels of a picture in the grid and in the viewer
const PIECE = 4 * 2 ** 20; // of an upload: smaller than any server's limit on messages

function h(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child != null && child !== false));
  return node;
}

// ---- pictures: asked for when they are near the screen, and kept

function gallery(model, root) {
  const kept = new Map(), wanted = new Set();
  let soon = null;
  const near = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) if (isIntersecting) ask(target);
  }, { rootMargin: "400px" });
  function ask(image) {
    near.unobserve(image);
    if (kept.has(image.dataset.key)) image.src = kept.get(image.dataset.key);
    else {
      wanted.add(image.dataset.key);
      soon ??= setTimeout(() => { model.send({ do: "pictures", with: [[...wanted]] }); wanted.clear(); soon = null; });
    }
  }
  function came(keys, buffers) {
    keys.forEach((key, i) => kept.set(key, URL.createObjectURL(new Blob([buffers[i]]))));
    for (const image of root.querySelectorAll("img[data-key]")) {
      if (!image.src && kept.has(image.dataset.key)) image.src = kept.get(image.dataset.key);
    }
  }
  function picture(key, alt, side = SMALL, kind = "dqe-picture") {
    const image = h("img", { class: kind, alt, "data-key": `${key}@${side}`, draggable: "false" });
    if (kept.has(image.dataset.key)) image.src = kept.get(image.dataset.key);
    else near.observe(image);
    return image;
  }
  const forget = () => { near.disconnect(); kept.forEach((address) => URL.revokeObjectURL(address)); };
  return { picture, came, forget };
}

function render({ model, el }) {
  const root = h("div", { class: "dqe-page", onkeydown: (event) => event.stopPropagation() }); // JupyterLab has commands of one letter
  const { picture, came, forget } = gallery(model, root);
  const state = () => model.get("state");
  let asked = 0, written = -1, viewed = null, patience = [];

  // ---- talking with the kernel

  function send(action, values = [], buffers) {
    model.send({ do: action, with: values, text: field.value, number: ++asked }, undefined, buffers);
    root.setAttribute("aria-busy", "true");
    patience.forEach(clearTimeout);
    patience = [[1500, "waiting for the kernel: it is busy, and takes requests in their order"],
      [60_000, "no answer for a minute: is the kernel still running? Run all cells again, or open the page anew"],
    ].map(([milliseconds, words]) => setTimeout(() => { told.textContent = words; }, milliseconds));
  }
  function begun() { // the kernel is at it, and says so itself
    patience.forEach(clearTimeout);
    told.textContent = "";
  }
  async function upload(files) {
    const file = [...files].find((one) => one.type.startsWith("image/") || /\.(jpe?g|png|webp|hei[cf]|bmp|gif|tiff?|avif)$/i.test(one.name));
    if (!file) return void (told.textContent = "that is no picture");
    if (file.size > state().most_bytes) return send("too_large", [file.name, file.size]);
    const bytes = await file.arrayBuffer();
    for (let at = 0; at === 0 || at < file.size; at += PIECE) {
      send("piece", [file.name, at, file.size], [bytes.slice(at, at + PIECE)]);
    }
  }
  function download(name, kind, buffer) {
    const address = URL.createObjectURL(new Blob([buffer], { type: kind }));
    h("a", { href: address, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(address), 10_000);
  }

  // ---- parts of the page that follow the state: drawn again only when what they show has changed

  const regions = [];
  function region(node, pick, draw) {
    let before;
    regions.push(() => {
      const now = JSON.stringify(pick(state()));
      if (now === before && !state().bad) return; // what was refused is put back to what it was
      before = now;
      const focus = node.contains(document.activeElement) && document.activeElement.dataset.focus;
      node.replaceChildren(...[draw(state())].flat(3).filter((child) => child != null && child !== false));
      if (focus) node.querySelector(`[data-focus="${CSS.escape(focus)}"]`)?.focus();
    });
    return node;
  }
  function button(words, action, more = {}) {
    return h("button", { type: "button", "data-focus": more["aria-label"] ?? words, onclick: action, ...more }, words);
  }
  function choice(words, options, value, action) {
    const select = h("select", { "data-focus": words, onchange: () => action(select.value) },
      options.map(([label, name]) => h("option", { value: name, selected: String(name) === String(value) }, label)));
    return h("label", { class: "dqe-choice" }, h("span", {}, words), select);
  }
  function line_of(input, action) { // Enter in a line is the button beside it; not the Enter that ends a composed character
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.isComposing) return;
      event.preventDefault();
      action();
    });
    return input;
  }
  function slider(words, value, least, most, action, more = {}) {
    const said = h("output", {}, Number(value).toFixed(2));
    const input = h("input", { type: "range", min: least, max: most, step: "any", value, "data-focus": words,
      oninput: () => { said.textContent = Number(input.value).toFixed(2); }, onchange: () => action(Number(input.value)), ...more });
    input.addEventListener("keydown", (event) => { // a tenth of the way a key
      const way = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
      if (!way || input.disabled) return;
      event.preventDefault();
      input.value = Math.round(20 * (Number(input.value) + way * (most - least) / 20)) / 20;
      input.dispatchEvent(new Event("input"));
      input.dispatchEvent(new Event("change"));
    });
    return h("label", { class: "dqe-slider" }, h("span", { title: words }, words), input, said);
  }

  // ---- where to search, and what is going on

  const where = region(h("div", { class: "dqe-bar" }), (s) => [s.galleries, s.gallery, s.asks_folder, s.folder], (s) => {
    const open = () => send("folder", [folder.value]);
    const folder = line_of(h("input", { type: "text", value: s.folder, placeholder: "path of a folder", "aria-label": "Folder", "data-focus": "folder" }), open);
    const path = h("div", { class: "dqe-folder" }, folder, button("Open", open));
    return [choice("Gallery", s.galleries.map((name) => [name, name]), s.gallery, (name) => send("gallery", [name])),
      s.asks_folder && path,
      button("Reindex", () => send("reindex"), { title: "look again which pictures are there" })];
  });
  const status = region(h("div", { class: "dqe-status", role: "status" }), (s) => [s.status, s.bad],
    (s) => h("span", { class: s.bad ? "dqe-bad" : null }, s.status));
  const bar = region(h("div", { class: "dqe-progress" }), (s) => s.progress,
    (s) => s.progress != null && h("progress", { value: s.progress, max: 1, "aria-label": "encoding pictures" }));
  const told = h("div", { class: "dqe-told", role: "status" });

  // ---- the question

  const search = () => send("search");
  const field = line_of(h("input", { type: "text", id: `dqe-text-${Math.random().toString(36).slice(2)}`, class: "dqe-text", autocomplete: "off" }), search);
  const form = h("div", { class: "dqe-form" }, h("label", { for: field.id }, "What should change?"), field, button("Search", search, { class: "dqe-main" }));
  const note = region(h("div", { class: "dqe-note", role: "status" }), (s) => s.note, (s) => s.note && h("span", {}, s.note));
  const reference = region(h("figure", { class: "dqe-reference" }), (s) => s.reference, (s) => s.reference && [
    h("button", { type: "button", class: "dqe-look", "data-focus": "reference", "aria-label": `Look at the reference ${s.reference.name}`, onclick: () => look(s.reference) },
      picture(s.reference.key, `reference: ${s.reference.name}`)),
    h("figcaption", { class: "dqe-name", title: s.reference.name }, s.reference.name)]);
  const file = h("input", { type: "file", accept: "image/*,.heic,.heif", hidden: true, onchange: () => { upload(file.files); file.value = ""; } });
  const ways = h("div", { class: "dqe-ways" },
    button("Choose …", () => { send("browse", ["", 0]); chooser.showModal(); }, { title: "choose the reference from the pictures of the gallery" }),
    button("Another", () => send("another"), { title: "another picture of the gallery" }),
    button("Upload", () => file.click(), { title: "a picture of your own; it can be pasted or dropped here, too" }), file);
  const examples = region(h("div", {}), (s) => [s.examples, s.history, s.reference], (s) => s.examples.length > 0 && choice("Example",
    [["a query of the data set …", ""], ...s.examples.map((words, row) => [words, row])], "", (row) => send("example", [Number(row)])));
  const weights = region(h("div", { class: "dqe-weights" }), (s) => [s.balance, s.parts, s.mode, s.weights], (s) => [
    slider("Picture ↔ words", s.balance, -1, 1, (value) => send("balance", [value]), { title: "left: more of the picture; right: more of the words" }),
    s.parts.length === 0 ? h("p", {}, s.no_parts) : h("fieldset", {}, h("legend", {}, s.reads ? "Attributes" : "Gate"),
      h("div", { class: "dqe-modes" }, ["learned", "off", "by hand"].map((mode) => h("label", {},
        h("input", { type: "radio", name: `mode-${field.id}`, value: mode, checked: s.mode === mode, "data-focus": `mode ${mode}`, onchange: () => send("mode", [mode]) }), mode))),
      h("div", { class: "dqe-sliders" }, s.parts.map((part, i) => slider(part, s.weights[i], 0, s.most,
        (value) => send("weights", [s.weights.map((old, j) => (i === j ? value : old))]), { disabled: s.mode !== "by hand" }))))]);
  const avoided = region(h("div", { class: "dqe-avoided" }), (s) => s.avoided, (s) => s.avoided.length > 0 && [h("span", {}, "Not like:"),
    s.avoided.map((one) => button(`${one.name} ×`, () => send("allow", [one.key]), { title: "count it again", "aria-label": `Count ${one.name} again` }))]);

  // ---- what was found

  function card(one) {
    return h("li", { class: `dqe-card dqe-${one.mark || "plain"}` },
      h("button", { type: "button", class: "dqe-look", "data-focus": `look ${one.key}`, "aria-label": `Look at ${one.name}`, onclick: () => look(one) },
        picture(one.key, `result ${one.rank}: ${one.name}`)),
      h("div", { class: "dqe-result", title: one.name }, h("span", { class: "dqe-name" }, one.name),
        `${one.rank}. ${one.score}`, one.mark && h("strong", { class: "dqe-mark" }, ` ${one.mark}`)),
      h("div", { class: "dqe-buttons" }, doing(one)));
  }
  function doing(one) {
    const about = (words, action, title) => button(words, action, { "aria-label": `${words}: ${one.name}`, "data-focus": `${words} ${one.key}`, title });
    return [about("Use as reference", () => { viewer.close(); send("use", [one.key]); }, "ask the next question about this picture"),
      about("Why?", () => { look(one); send("why", [one.key]); }, "what this result owes its place to"),
      about("Not this", () => { viewer.close(); send("avoid", [one.key]); }, "not like this one: rank what resembles it lower")];
  }
  const results = region(h("section", { "aria-label": "Results" }), (s) => [s.results, s.more, s.subset, s.legend], (s) => s.results.length > 0 && [
    h("ol", { class: "dqe-grid" }, s.results.map(card)),
    h("div", { class: "dqe-bar" }, s.more && button("More results", () => send("more")),
      button("List (CSV)", () => send("table"), { title: "download the list" }), button("Sheet (PNG)", () => send("sheet"), { title: "download the pictures as one sheet" }),
      s.legend && h("span", { class: "dqe-legend" }, s.legend)),
    s.subset.length > 0 && h("div", { class: "dqe-subset" }, h("h3", {}, "Among the pictures of its subset"), h("ol", { class: "dqe-grid dqe-small" }, s.subset.map(card)))]);

  // ---- the past, and what went wrong

  function line(step) { return h("li", { value: step.number }, step.words); }
  const past = region(h("section", { class: "dqe-history", "aria-label": "History" }), (s) => [s.history, s.can_undo], (s) => [
    h("div", { class: "dqe-bar" }, button("Undo", () => send("undo"), { disabled: !s.can_undo }), button("Save history", () => send("save"), { disabled: !s.history.length }),
      !s.history.length && h("span", {}, "no question yet")),
    h("ol", { reversed: true }, s.history.slice(0, 6).map(line)),
    s.history.length > 6 && h("details", {}, h("summary", {}, `${s.history.length - 6} older`), h("ol", { reversed: true }, s.history.slice(6).map(line)))]);
  const log = region(h("section", { class: "dqe-log" }), (s) => s.log, (s) => s.log.length > 0 && h("details", {},
    h("summary", { "data-focus": "log" }, `What went wrong (${s.log.length})`),
    s.log.map((entry) => h("details", {}, h("summary", {}, `${entry.when} ${entry.words}`), h("pre", { tabindex: "0" }, entry.trace)))));

  // ---- two windows: one picture large, with its reasons; and all pictures, to choose the reference from

  function look(one) {
    if (viewed?.key === one.key) return;
    viewed = one;
    seen.replaceChildren(h("h3", { class: "dqe-whole" }, one.rank ? `${one.rank}. ${one.name}` : one.name), picture(one.key, one.name, LARGE, "dqe-large"),
      one.rank ? h("div", { class: "dqe-buttons" }, doing(one)) : "");
    reasons();
    if (!viewer.open) viewer.showModal();
  }
  function reasons() {
    const why = state().why;
    if (!viewed || why?.key !== viewed.key) return void because.replaceChildren();
    because.innerHTML = why.html; // made by the kernel, which escapes every name and text
    if (why.maps) because.append(picture(why.maps, "where each sub-query looked on the reference", 0, "dqe-strip"));
    because.append(h("p", {}, ""));
    because.lastChild.innerHTML = why.lesson;
    if (why.strip) because.append(picture(why.strip, "the nearest training query: reference, target, what was pushed away", 0, "dqe-strip"));
  }
  const seen = h("div", { class: "dqe-seen" }), because = h("div", { class: "dqe-why", "aria-live": "polite" });
  const closing = () => h("form", { method: "dialog", class: "dqe-close" }, h("button", { "aria-label": "Close" }, "×"));
  const viewer = h("dialog", { class: "dqe-viewer", "aria-label": "A picture and its reasons", onclose: () => { viewed = null; } }, closing(), seen, because);
  const filter = h("input", { type: "search", placeholder: "part of a name", "aria-label": "Part of a name", oninput: () => send("browse", [filter.value, 0]) });
  const shelf = region(h("div", {}), (s) => s.shelf, (s) => s.shelf && [
    h("ul", { class: "dqe-grid dqe-small" }, s.shelf.pictures.map((one) => h("li", { class: "dqe-card" },
      h("button", { type: "button", class: "dqe-look", "aria-label": `Choose ${one.name}`, onclick: () => { chooser.close(); send("choose", [one.key]); } }, picture(one.key, one.name)),
      h("span", { class: "dqe-name", title: one.name }, one.name)))),
    h("div", { class: "dqe-bar" }, button("Before", () => send("browse", [filter.value, s.shelf.page - 1]), { disabled: s.shelf.page === 0 }),
      h("span", {}, `page ${s.shelf.page + 1} of ${s.shelf.pages}`), button("Next", () => send("browse", [filter.value, s.shelf.page + 1]), { disabled: s.shelf.page + 1 >= s.shelf.pages }))]);
  const chooser = h("dialog", { class: "dqe-chooser", "aria-label": "Choose the reference" }, closing(), h("h3", {}, "Choose the reference"), filter, shelf);

  // ---- pictures that are dropped or pasted

  root.addEventListener("dragover", (event) => { event.preventDefault(); root.classList.add("dqe-over"); });
  root.addEventListener("dragleave", () => root.classList.remove("dqe-over"));
  root.addEventListener("drop", (event) => {
    event.preventDefault();
    event.stopPropagation();
    root.classList.remove("dqe-over");
    upload(event.dataTransfer.files);
  });
  root.addEventListener("paste", (event) => {
    if (!event.clipboardData.files.length) return; // words go where they always go
    event.preventDefault();
    upload(event.clipboardData.files);
  });

  // ---- following the state

  function follow() {
    const s = state();
    if (s.written !== written) { // the page has written; what a person types is never touched
      written = s.written;
      field.value = s.text;
    }
    field.placeholder = s.hint;
    regions.forEach((draw) => draw());
    if (viewer.open) reasons();
    if (s.begun >= asked) begun();
    if (s.answered >= asked) root.removeAttribute("aria-busy");
  }
  function heard(message, buffers) {
    if (message.pictures) came(message.pictures, buffers);
    if (message.download) download(message.download, message.kind, buffers[0]);
  }
  root.append(where, status, bar, told, h("section", { class: "dqe-question", "aria-label": "Question" }, reference,
    h("div", { class: "dqe-asking" }, form, note, ways, examples, weights, avoided)), results, past, log, viewer, chooser);
  el.append(root);
  model.on("change:state", follow);
  model.on("msg:custom", heard);
  asked = state().answered;
  follow();
  return () => { model.off("change:state", follow); model.off("msg:custom", heard); patience.forEach(clearTimeout); forget(); };
}

export default { render };
