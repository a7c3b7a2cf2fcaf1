// The chosen theme, before anything is painted.
try {
  const theme = localStorage.getItem("klein-theme");
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
} catch {
  // a browser that keeps nothing follows the system
}
