// See check_page.sh. With SHOTS=FOLDER, a picture of each page is written there.
const fs = require('fs');
const path = require('path');
const puppeteer = require('puppeteer-core');

const axe = fs.readFileSync(require.resolve('axe-core/axe.min.js'), 'utf8');
const SERIOUS = ['serious', 'critical'];
const LEAST_TEXT = 8;

async function check(browser, file, width, scheme) {
  const page = await browser.newPage();
  await page.setViewport({ width, height: 900 });
  await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: scheme }]);
  await page.goto(`file://${path.resolve(file)}`);
  await page.evaluate(axe);
  const found = await page.evaluate(() => window.axe.run(document, { resultTypes: ['violations'] }));
  const faults = found.violations
    .filter((violation) => SERIOUS.includes(violation.impact))
    .map((violation) => `${violation.impact} ${violation.id}: ${violation.nodes[0].html.slice(0, 200)}`);
  const [wide, text] = await page.evaluate(() => {
    const drawn = [...document.querySelectorAll('svg text')].filter((element) => element.getClientRects().length);
    const scale = (element) => Math.hypot(element.getCTM().a, element.getCTM().b) * parseFloat(getComputedStyle(element).fontSize);
    return [document.documentElement.scrollWidth, Math.min(...drawn.map(scale))];
  });
  if (wide > width) faults.push(`the page is ${wide} pixels wide`);
  if (!(text >= LEAST_TEXT)) faults.push(`text in a figure is ${text.toFixed(1)} pixels high`);
  if (process.env.SHOTS) {
    const name = `${path.basename(file, '.html')}-${width}-${scheme}.png`;
    await page.screenshot({ path: path.join(process.env.SHOTS, name), fullPage: true });
  }
  await page.close();
  console.log(`${path.basename(file)}, ${width} pixels, ${scheme}: ${faults.join('; ') || `ok, text from ${text.toFixed(1)} pixels`}`);
  return faults.length;
}

(async () => {
  const browser = await puppeteer.launch({ executablePath: process.env.CHROMIUM, args: ['--no-sandbox'] });
  let faults = 0;
  for (const file of process.argv.slice(2))
    for (const width of [390, 1280])
      for (const scheme of ['light', 'dark']) faults += await check(browser, file, width, scheme);
  await browser.close();
  process.exit(faults ? 1 : 0);
})();
