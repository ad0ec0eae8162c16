// Before the first paint: the colours that the person chose. A classic script, because modules run after the paint.

try {
  document.documentElement.dataset.theme = JSON.parse(localStorage.getItem("gemma-edge.theme")) ?? "system";
} catch {
  // No storage: as the system.
}
