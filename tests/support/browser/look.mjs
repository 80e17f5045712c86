// What a browser makes of a page: node look.mjs PAGE FOLDER -> one JSON document; FOLDER gets a picture of the first plot.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(`${process.cwd()}/`); // the packages lie in the working folder
const load = async (name) => (await import(pathToFileURL(require.resolve(name)))).default;
const [chromium, puppeteer] = [await load("@sparticuz/chromium"), await load("puppeteer-core")];
const [page_file, folder] = process.argv.slice(2);

// runs in the page
function measure() {
  const width = document.documentElement.clientWidth;
  const scrolls = [...document.querySelectorAll(".scroll")];
  const luminance = (color) => {
    const [r, g, b] = color.match(/[\d.]+/g).slice(0, 3).map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (!color.endsWith(", 0)")) return luminance(color);
    }
    return 1;
  };
  const contrast = (element) => {
    const pair = [luminance(getComputedStyle(element).color), background(element)].sort();
    return (pair[1] + 0.05) / (pair[0] + 0.05);
  };
  const texts = [...document.querySelectorAll("h1, h2, h3, p, td, th, dt, dd, figcaption, code, strong, span")];
  return {
    page: [document.documentElement.scrollWidth, width],
    beyond: [...document.querySelectorAll("body *")].filter((e) => !e.closest(".scroll") && e.getBoundingClientRect().right > width + 1).map((e) => e.outerHTML.slice(0, 80)),
    cut: scrolls.filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent.trim().slice(0, 80)),
    stuck: scrolls.filter((e) => !["auto", "scroll"].includes(getComputedStyle(e).overflowX)).length,
    background: background(document.body),
    faint: texts.filter((e) => e.textContent.trim() && contrast(e) < 4.5).map((e) => [e.tagName, e.textContent.slice(0, 40), contrast(e)]),
  };
}

const browser = await puppeteer.launch({ args: chromium.args, executablePath: await chromium.executablePath(), headless: "shell" });
const seen = [];
for (const theme of ["light", "dark"]) {
  for (const width of [390, 1280]) {
    const page = await browser.newPage();
    const problems = [], requests = [];
    page.on("pageerror", (error) => problems.push(String(error)));
    page.on("console", (message) => problems.push(message.text()));
    page.on("request", (request) => requests.push(request.url()));
    await page.setViewport({ width, height: 900 });
    await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: theme }]);
    await page.goto(pathToFileURL(page_file).href);
    const picture = `${folder}/${theme}-${width}.png`;
    await (await page.$(".card")).screenshot({ path: picture });
    seen.push({ theme, width, problems, requests, picture, ...(await page.evaluate(measure)) });
  }
}
await browser.close();
console.log(JSON.stringify(seen));
