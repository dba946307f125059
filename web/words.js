/** The panels' texts in the user's language: English is in the code, locales/<language>/main.json has the rest. */

let words = {};

/** Learn the language that is chosen in the host's settings; what is not translated stays English. */
export async function loadWords(app, api) {
  const language = app.extensionManager.setting.get("Comfy.Locale");
  const response = await api.fetchApi("/i18n");
  if (response.ok) words = (await response.json())[language]?.svdquant ?? {};
}

/** A text, its {names} replaced by values. */
export function say(text, values = {}) {
  return (words[text] ?? text).replace(/\{(\w+)\}/g, (_, name) => values[name]);
}
