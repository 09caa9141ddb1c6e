// Light, dark, or as the system: the choice is kept in this browser.

const STORED = "llava-sessions-theme";
const NEXT = { system: "light", light: "dark", dark: "system" };
const NAMES = { system: "System", light: "Light", dark: "Dark" };

/** Apply the stored theme and change it when the button is pressed. */
export function followTheme(button) {
  let theme = read();
  const apply = () => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.querySelector("#theme-text").textContent = NAMES[theme];
    button.title = "Change between light, dark and the theme of the system";
  };
  button.addEventListener("click", () => {
    theme = NEXT[theme];
    try {
      localStorage.setItem(STORED, theme);
    } catch {
      // The choice lasts until the page is closed.
    }
    apply();
  });
  apply();
}

function read() {
  try {
    const stored = localStorage.getItem(STORED);
    return stored in NEXT ? stored : "system";
  } catch {
    return "system";
  }
}
