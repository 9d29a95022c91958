"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const read = (id) => JSON.parse($(id).textContent);
  const table = read("table-data"), pictures = read("picture-data");
  const figures = [...document.querySelectorAll('script[id^="figure-"]')].map((block) => block.textContent);

  // Numbers. Infinities are text in JSON; NaN is null.
  const special = { inf: Infinity, "-inf": -Infinity };
  const revive = (numbers) => numbers && numbers.map((n) => (n === null ? NaN : (special[n] ?? n)));
  const columns = table.columns.map((c) => ({ ...c, value: revive(c.value), mcse: revive(c.mcse) }));
  for (const column of columns) {
    const size = Math.max(...[0], ...column.value.slice(0, 1000).filter(Number.isFinite).map(Math.abs));
    column.decimals = size < 100 ? 3 : 2;
  }
  const count = table.datapoints.length;
  const serious = table.flags.reduce((bits, flag, place) => (flag.serious ? bits | (1 << place) : bits), 0);
  const minus = (text) => text.replace("-", "\u2212");
  const format = (n, decimals) =>
    Number.isNaN(n) ? "\u2013" : Number.isFinite(n) ? minus(n.toFixed(decimals)) : n > 0 ? "\u221e" : "\u2212\u221e";
  const error = (n, decimals) =>
    !Number.isFinite(n) ? "" : n > 0 && n < 0.5 * 10 ** -decimals ? `\u00b1 <${(10 ** -decimals).toFixed(decimals)}` : `\u00b1 ${n.toFixed(decimals)}`;
  const counted = (n) => n.toLocaleString("en");
  const flagsOf = (row) => table.flags.filter((_, place) => table.bits[row] & (1 << place));

  // Elements; text is always set as text.
  const element = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };
  const escape = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

  // Pictures, as HTML made of numbers and addresses of blobs alone.
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const sheets = new Map();
  const sheet = (place) => {
    if (!sheets.has(place))
      sheets.set(place, URL.createObjectURL(new Blob([bytes(pictures.sheets[place])], { type: "image/png" })));
    return sheets.get(place);
  };
  const levels = pictures?.kind === "sequence" ? bytes(pictures.values) : null;
  const strokes = ["#2f5d8c", "#c8641e", "#4b7a2b"];
  const image = (row, wanted) => {
    const at = pictures.place[row];
    if (at < 0) return "";
    const { width, height, columns: across, per_sheet: most } = pictures;
    const scale = Math.max(1, Math.round(wanted / Math.max(width, height)));
    const [x, y] = [(at % most) % across, Math.floor((at % most) / across)];
    return `<span class="picture" role="img" aria-label="image of datapoint ${table.datapoints[row]}" style="display:inline-block;image-rendering:pixelated;width:${width * scale}px;height:${height * scale}px;background:url(${sheet(Math.floor(at / most))}) -${x * width * scale}px -${y * height * scale}px / ${across * width * scale}px auto"></span>`;
  };
  const sequence = (row, wanted) => {
    const { points, channels, missing } = pictures;
    const [width, height] = [3 * wanted, wanted];
    let lines = "";
    for (let channel = 0; channel < channels; channel++) {
      let path = "", pen = "M";
      for (let point = 0; point < points; point++) {
        const level = levels[(row * channels + channel) * points + point];
        if (level === missing) { pen = "M"; continue; }
        path += `${pen}${((point / Math.max(points - 1, 1)) * (width - 4) + 2).toFixed(1)} ${(height - 2 - (level / 254) * (height - 4)).toFixed(1)}`;
        pen = "L";
      }
      lines += `<path d="${path}" fill="none" stroke="${strokes[channel]}" stroke-width="1.5" stroke-linecap="round"/>`;
    }
    return `<svg class="picture" role="img" aria-label="sequence of datapoint ${table.datapoints[row]}" width="${width}" height="${height}" style="background:#fff">${lines}</svg>`;
  };
  const numbers = (row) => {
    const rest = pictures.total - pictures.values[row].length;
    const shown = revive(pictures.values[row]).map((n) => (Number.isFinite(n) ? minus(String(n)) : format(n, 0)));
    return `<span class="numbers">${shown.join(", ")}${rest > 0 ? `, \u2026 (${pictures.total} numbers)` : ""}</span>`;
  };
  const picture = (row, wanted) =>
    pictures === null ? "" : { image, sequence, row: numbers }[pictures.kind](row, wanted);

  // What is shown of one datapoint when it is pointed at or chosen.
  const lines = (row) => columns.map((c) => [c.label, `${format(c.value[row], c.decimals)} ${c.mcse ? error(c.mcse[row], c.decimals) : ""}`]);
  const MOST = 7;
  const tip = (row) => {
    const flags = flagsOf(row).map((flag) => (flag.serious ? `<span style="color:#a04a0c">${escape(flag.label)}</span>` : escape(flag.label))).join(", ");
    const rows = lines(row).slice(0, MOST).map(([label, text]) => `<tr><td style="padding-right:1em">${escape(label)}</td><td style="text-align:right;white-space:nowrap">${text}</td></tr>`);
    return `<div data-tip="${table.datapoints[row]}" style="font:12px/1.35 sans-serif;color:#1f2328;max-width:300px">${picture(row, pictures?.kind === "sequence" ? 48 : 84)}<div><b>datapoint ${table.datapoints[row]}</b></div><table style="border-spacing:0">${rows.join("")}</table><div>${flags}</div></div>`;
  };
  const choose = (row) => {
    const box = $("chosen");
    box.replaceChildren();
    const left = element("div");
    left.innerHTML = picture(row, 112);
    const list = element("dl");
    for (const [label, text] of lines(row)) list.append(element("dt", {}, label), element("dd", {}, text));
    const flags = flagCell(row, "div");
    box.append(left, element("div", {}, element("strong", {}, `Datapoint ${table.datapoints[row]}`), list, flags));
    state.chosen = row;
    plotted();
    drawn();
  };

  // The table: filtered, sorted, a page of it drawn.
  const first = columns.findIndex((c) => c.id === "inference_gap");
  const state = { by: first < 0 ? 0 : first, down: true, page: 0, rows: [], chosen: null };
  const comparison = /^(.*?)\s*(<=|>=|<|>)\s*([-\u2212]?\d*\.?\d+(?:e[-+]?\d+)?)$/i;
  const compare = { "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b };
  const condition = (text) => {
    const wanted = text.trim().toLowerCase();
    if (!wanted) return () => true;
    const range = /^(\d+)(?:\s*[-\u2013]\s*(\d+))?$/.exec(wanted);
    if (range) {
      const [low, high] = [Number(range[1]), Number(range[2] ?? range[1])];
      return (row) => table.datapoints[row] >= low && table.datapoints[row] <= high;
    }
    const parts = comparison.exec(wanted);
    if (parts) {
      const named = (c) => c.label.toLowerCase();
      const column = columns.find((c) => named(c) === parts[1]) ?? columns.find((c) => parts[1] && named(c).includes(parts[1]));
      if (!column) return null;
      const bound = Number(parts[3].replace("\u2212", "-"));
      return (row) => compare[parts[2]](column.value[row], bound);
    }
    return (row) => flagsOf(row).some((flag) => flag.label.toLowerCase().includes(wanted));
  };
  const flagged = (choice) =>
    choice === "all" ? () => true
      : choice === "trusted" ? (row) => !(table.bits[row] & serious)
      : choice === "serious" ? (row) => Boolean(table.bits[row] & serious)
      : (row) => Boolean(table.bits[row] & (1 << Number(choice)));
  const select = () => {
    const holds = condition($("filter").value), has = flagged($("flags").value);
    $("filter").setAttribute("aria-invalid", String(holds === null));
    state.unknown = holds === null;
    state.rows = holds === null ? [] : Array.from({ length: count }, (_, row) => row).filter((row) => holds(row) && has(row));
    sort();
    state.page = 0;
  };
  const sort = () => {
    const value = state.by < 0 ? table.datapoints : columns[state.by].value, sign = state.down ? -1 : 1;
    state.rows.sort((a, b) => {
      const [x, y] = [value[a], value[b]];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y) || a - b;
      return x === y ? a - b : sign * (x < y ? -1 : 1);
    });
  };
  const cells = (row) => {
    const shown = element("button", { type: "button", "aria-label": `Show datapoint ${table.datapoints[row]}` }, String(table.datapoints[row]));
    shown.addEventListener("click", () => choose(row));
    const heading = element("th", { scope: "row" }, shown);
    if (table.bits[row] & serious)
      heading.append(element("span", { class: "serious", role: "img", "aria-label": "not to be trusted", title: "not to be trusted: see its flags" }, "\u26a0"));
    const made = [heading];
    if (pictures !== null) {
      const cell = element("td");
      cell.innerHTML = picture(row, pictures.kind === "sequence" ? 28 : 36);
      made.push(cell);
    }
    columns.forEach((c, at) => {
      if (at === table.gaps) made.push(flagCell(row));
      const cell = element("td", {}, format(c.value[row], c.decimals));
      const doubtful = c.mcse ? error(c.mcse[row], c.decimals) : "";
      if (doubtful) cell.append(" ", element("span", { class: "mcse" }, doubtful));
      made.push(cell);
    });
    return element("tr", state.chosen === row ? { "data-chosen": "" } : {}, ...made);
  };
  const flagCell = (row, tag = "td") => {
    const cell = element(tag, { class: "words" });
    flagsOf(row).forEach((flag, place) => cell.append(place ? ", " : "", element("span", flag.serious ? { class: "serious" } : {}, flag.label)));
    return cell;
  };
  const drawn = () => {
    const size = Number($("size").value), pages = Math.max(1, Math.ceil(state.rows.length / size));
    state.page = Math.min(Math.max(state.page, 0), pages - 1);
    const start = state.page * size, rows = state.rows.slice(start, start + size);
    $("rows").tBodies[0].replaceChildren(...rows.map(cells));
    document.querySelectorAll("#rows thead th[data-by]").forEach((th) =>
      th.setAttribute("aria-sort", Number(th.dataset.by) !== state.by ? "none" : state.down ? "descending" : "ascending"));
    $("status").textContent = state.unknown
      ? "No column has this name. Write part of a column's heading, then < or >, then a number."
      : rows.length ? `Rows ${counted(start + 1)} to ${counted(start + rows.length)} of ${counted(state.rows.length)}${state.rows.length < count ? `, filtered from ${counted(count)}` : ""}` : "No datapoint fits the filter";
    for (const [id, stop] of [["first", state.page === 0], ["previous", state.page === 0], ["next", state.page === pages - 1], ["last", state.page === pages - 1]])
      $(id).disabled = stop;
    $("pages").hidden = count <= 25;
  };
  const refresh = () => { select(); drawn(); plotted(); };
  const head = () => {
    const line = element("tr");
    const sortable = (by, label, description) => {
      const button = element("button", { type: "button", title: description }, label);
      button.addEventListener("click", () => {
        state.down = state.by === by ? !state.down : by >= 0;
        state.by = by;
        state.page = 0;
        sort();
        drawn();
      });
      line.append(element("th", { scope: "col", "data-by": by, "data-label": label, "aria-sort": "none" }, button));
    };
    const fixed = (label, kind) => line.append(element("th", { scope: "col", class: kind, "data-label": label }, element("span", {}, label)));
    sortable(-1, "datapoint", "the index of the datapoint");
    if (pictures !== null) fixed({ image: "image", sequence: "sequence", row: "data" }[pictures.kind], "shown");
    columns.forEach((c, by) => {
      if (by === table.gaps) fixed("flags", "words");
      sortable(by, c.label, c.description);
    });
    $("rows").tHead.replaceChildren(line);
  };

  // Figures, in the colours of the scheme. They are drawn again when it changes.
  const dark = matchMedia("(prefers-color-scheme: dark)"), coarse = matchMedia("(pointer: coarse)");
  const schemes = {
    false: ["#1f2328", "#7d858e", "#dfe3e7", "#ffffff", "#2f5d8c", "#c8641e"],
    true: ["#e6e8eb", "#8d959e", "#343a42", "#15181c", "#7db3ea", "#f0a050"],
  };
  let scatter = null, views = [];
  const draw = async () => {
    const colours = schemes[dark.matches];
    scatter = null;
    for (const view of views.splice(0)) view.clear?.();
    for (const text of figures) {
      const item = JSON.parse(text.replace(/#0102(0[0-5])/g, (_, place) => colours[Number(place)]));
      $(item.target_id).replaceChildren();
      views.push(await Bokeh.embed.embed_item(item));
    }
    document.querySelectorAll(".plot").forEach((plot) => { plot.dataset.scheme = dark.matches ? "dark" : "light"; });
    scatter = Bokeh.documents.findLast((doc) => doc.get_model_by_name("trusted") !== null);
    if (coarse.matches) scatter.get_model_by_name("scatter").toolbar.active_drag = null; // a finger scrolls the page
    plotted();
    document.body.dataset.drawn = String(Number(document.body.dataset.drawn ?? 0) + 1);
  };
  const bounds = (values) => {
    let [low, high] = [Infinity, -Infinity];
    for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
    if (low > high) return [0, 1];
    const room = 0.05 * (high - low) || 0.5;
    return [low - room, high + room];
  };
  const BARS = 1000;
  const plotted = () => {
    if (scatter === null) return;
    const [x, y] = ["across", "up"].map((id) => columns[Number($(id).value)]);
    const rows = state.rows.filter((row) => Number.isFinite(x.value[row]) && Number.isFinite(y.value[row]));
    const model = (name) => scatter.get_model_by_name(name);
    const part = (some) => ({ x: some.map((row) => x.value[row]), y: some.map((row) => y.value[row]), tip: some.map(tip) });
    model("trusted").data = part(rows.filter((row) => !(table.bits[row] & serious)));
    model("flagged").data = part(rows.filter((row) => table.bits[row] & serious));
    const bars = { x0: [], x1: [], y0: [], y1: [] };
    if (rows.length <= BARS)
      for (const row of rows) {
        const [a, b] = [x.value[row], y.value[row]];
        const [across, up] = [x, y].map((c) => (c.mcse && Number.isFinite(c.mcse[row]) ? c.mcse[row] : 0));
        bars.x0.push(a - across, a); bars.x1.push(a + across, a);
        bars.y0.push(b, b - up); bars.y1.push(b, b + up);
      }
    model("errors").data = bars;
    const chosen = rows.includes(state.chosen) ? [state.chosen] : [];
    model("chosen").data = { x: chosen.map((row) => x.value[row]), y: chosen.map((row) => y.value[row]) };
    for (const [name, column, axis] of [["x", x, "x-axis"], ["y", y, "y-axis"]]) {
      const [start, end] = bounds(rows.map((row) => column.value[row]));
      model(name).setv({ start, end, reset_start: start, reset_end: end });
      model(axis).axis_label = plainLabel(`${column.label}${column.id === "khat" ? "" : " (nats)"}`);
    }
    const left = state.rows.length - rows.length;
    $("undrawn").textContent = left ? `${counted(left)} without finite values ${left === 1 ? "is" : "are"} not drawn.` : "";
  };
  const plainLabel = (text) => text.replace(/\$\$|\\\(|\\\[/g, (m) => `${m[0]}\u2060${m[1]}`); // no TeX

  // Controls.
  const options = (id, entries, chosen) =>
    $(id).replaceChildren(...entries.map(([value, label]) => {
      const option = element("option", { value }, label);
      option.selected = value === chosen;
      return option;
    }));
  const named = columns.map((c, place) => [String(place), c.label]);
  const place = (id) => String(Math.max(0, columns.findIndex((c) => c.id === id)));
  options("across", named, place(table.axes[0]));
  options("up", named, place(table.axes[1]));
  const number = (holds) => counted(table.bits.filter(holds).length);
  const kinds = [["all", `any or none (${counted(count)})`]];
  if (serious) kinds.push(["serious", `not to be trusted (${number((b) => b & serious)})`], ["trusted", `no such flag (${number((b) => !(b & serious))})`]);
  table.flags.forEach((flag, at) => kinds.push([String(at), `${flag.label} (${number((b) => b & (1 << at))})`]));
  options("flags", kinds, "all");
  for (const id of ["across", "up"]) $(id).addEventListener("change", plotted);
  $("filter").addEventListener("input", refresh);
  $("flags").addEventListener("change", refresh);
  $("size").addEventListener("change", drawn);
  $("example").addEventListener("click", () => { $("filter").value = $("example").textContent; refresh(); $("filter").focus(); });
  const turns = { first: () => 0, previous: () => state.page - 1, next: () => state.page + 1, last: () => Infinity };
  for (const [id, page] of Object.entries(turns)) $(id).addEventListener("click", () => { state.page = page(); drawn(); });

  // An example of a comparison that fits these numbers, and figures as wide as paper.
  const example = columns[Math.max(first, 0)], finite = example.value.filter(Number.isFinite).sort((a, b) => a - b);
  if (finite.length) $("example").textContent = `${example.label} > ${Number(finite[Math.floor(0.9 * finite.length)].toPrecision(2))}`;
  const PAPER = 680; // pixels between the margins of A4
  addEventListener("beforeprint", () => document.querySelectorAll(".plot").forEach((plot) =>
    plot.style.setProperty("--shrunk", String(Math.min(1, PAPER / plot.clientWidth)))));

  head();
  select();
  if (state.rows.length) choose(state.rows[0]); else drawn();
  dark.addEventListener("change", draw);
  draw();
})();
