// What charts ask for while they are drawn. Served from here, for a chart's options carry no code of their own.
(() => {
  const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
  const exact = new Intl.NumberFormat("en", { maximumSignificantDigits: 5 });
  window.ratchetNumber = (value) => (Math.abs(value) >= 10000 ? compact.format(value) : exact.format(value));
  window.ratchetShare = (value) => `${exact.format(100 * value)} %`;
  window.ratchetTooltip = (axis, points) => {
    const box = document.createElement("div");
    const shown = points.filter((point) => !/ (low|high)$/.test(point.seriesName) && valueOf(point) != null);
    const head = document.createElement("div");
    head.className = "tip-head";
    const decision = shown.map((point) => point.data?.decision).find(Boolean);
    head.textContent = `${axis} ${points[0]?.axisValue ?? ""}${decision ? ` · ${decision}` : ""}`;
    box.append(head);
    for (const point of shown) {
      const row = document.createElement("div");
      row.className = "tip-row";
      const dot = document.createElement("span");
      dot.className = "swatch";
      dot.style.setProperty("--swatch", point.color);
      const name = document.createElement("span");
      name.textContent = point.seriesName;
      const value = document.createElement("b");
      value.textContent = exact.format(valueOf(point));
      row.append(dot, name, value);
      box.append(row);
    }
    return box;
  };
  const valueOf = (point) => (point.data !== null && typeof point.data === "object" ? point.data.value : point.data);

  window.ratchetTheme = (theme) => {
    document.cookie = `ratchet_theme=${theme}; path=/ui; max-age=31536000; SameSite=Lax`;
    document.documentElement.dataset.theme = theme;
  };
  window.ratchetScrollTo = (selector) => document.querySelector(selector)?.scrollIntoView({ block: "nearest" });
})();
