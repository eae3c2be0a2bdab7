"""The page that `replay.write_html` fills in: its looks and its script. It loads nothing, and its policy forbids it to.

`/*SHADES*/` becomes the CSS of the colours, `DATA` the JSON: units of [text, token ids, steps], each a token or the
byte tokens of one character. The script puts all of it into the page as text, never as markup.
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>From masks to words</title>
<style>
:root { --page: #f4f2ed; --card: #fdfcfa; --ink: #2a2926; --soft: #64615a; --line: #dedad1; --mask: #e6e2d9 }
@media (prefers-color-scheme: dark) {
  :root { --page: #111316; --card: #191c20; --ink: #dddad3; --soft: #a09d96; --line: #33373d; --mask: #2d3239 }
}
/*SHADES*/
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
main { max-width: 50rem; margin: 0 auto; padding: clamp(1rem, 5vw, 3.5rem) clamp(.9rem, 4vw, 2rem) }
h1 { margin: 0; font-size: 1.5rem; font-weight: 600; letter-spacing: -.01em }
p { margin: .3rem 0 1.4rem; color: var(--soft); max-width: 40rem }
#text {
  padding: clamp(1rem, 4vw, 1.8rem); background: var(--card); border: 1px solid var(--line); border-radius: 14px;
  font: 1rem/1.85 ui-monospace, "SF Mono", "Cascadia Code", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
}
#text span { padding: .12em 0; border-radius: .35em; transition: color .4s, background-color .4s }
#text .mask { color: transparent; user-select: none }
#text .mask, .chip { background: var(--mask); box-shadow: inset 0 0 0 1.5px var(--card) }
#text .given, .given { color: var(--soft) }
#text .new { background: var(--mask); background: color-mix(in srgb, currentColor 20%, transparent) }
/* A line break has no width: without a sign, nobody would see it masked or filled. */
[data-break]:not(.given)::before { content: "\\21b5"; opacity: .4 }
#panel { position: sticky; bottom: 0; margin-top: 1rem; padding: .7rem 0 .8rem; background: var(--page) }
.row { display: flex; flex-wrap: wrap; align-items: center; gap: .6rem 1rem }
button, select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line) }
button, select { border-radius: 9px; min-height: 2.6rem; padding: 0 .8rem; cursor: pointer }
button { display: flex; align-items: center; gap: .5rem; min-width: 6.4rem; font-weight: 600 }
svg { width: 1em; height: 1em; fill: currentColor }
:focus-visible { outline: 2px solid #3b82c4; outline-offset: 2px }
#track { flex: 1 1 14rem; min-width: 0 }
@media (max-width: 34rem) { #track { flex-basis: 100%; order: -1 } }
#slider { display: block; width: 100%; height: 1.6rem; margin: 0; accent-color: var(--soft); cursor: pointer }
#ramp { height: 5px; margin: 0 8px; border-radius: 3px; background: var(--ramp) }
.ends { display: flex; justify-content: space-between; margin: .1rem 8px 0 }
.ends, .legend, #status { color: var(--soft); font-size: .85rem; font-variant-numeric: tabular-nums }
.legend { gap: .3rem 1.4rem; margin-top: .2rem }
.chip { display: inline-block; width: 2.2em; height: 1em; border-radius: .35em; vertical-align: -.1em }
#status { margin-left: auto }
table { margin-top: 1.6rem; border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem 2rem .35rem 0; text-align: left; overflow-wrap: anywhere }
th, td { border-bottom: 1px solid var(--line) }
th { font-weight: 400; color: var(--soft); vertical-align: top }
#tip { position: fixed; z-index: 1; padding: .15rem .6rem; border-radius: 7px; background: var(--ink) }
#tip { color: var(--card); font-size: .85rem; pointer-events: none }
@media (prefers-reduced-motion: reduce) { #text span { transition: none } }
@media print { #panel .row:first-child, #tip { display: none } }
</style>
</head>
<body>
<main>
<h1>From masks to words</h1>
<p>Each block is a masked token. Every step of the reverse process fills some of them in, anywhere in the text; the
colour tells when.</p>
<div id="text" role="region" aria-label="Text being filled in" dir="auto"></div>
<div id="panel">
  <div class="row">
    <button id="play" type="button"><svg viewBox="0 0 16 16" aria-hidden="true"><path id="icon"/></svg><span
     id="label">Play</span></button>
    <div id="track">
      <input id="slider" type="range" min="0" step="1" aria-label="Step">
      <div id="ramp" role="img" aria-label="Colour legend, from filled early to filled late"></div>
      <div class="ends" aria-hidden="true"><span>filled early</span><span>late</span></div>
    </div>
    <select id="speed" aria-label="Speed">
      <option value="0.25">¼ ×</option><option value="0.5">½ ×</option><option value="1" selected>1 ×</option>
      <option value="2">2 ×</option><option value="4">4 ×</option>
    </select>
  </div>
  <div class="row legend">
    <span><i class="chip"></i> masked</span><span class="given">grey: given</span><span id="status"></span>
  </div>
</div>
<table aria-label="Facts about this sample"><tbody id="facts"></tbody></table>
<div id="tip" role="tooltip" hidden></div>
<noscript>The replay needs JavaScript.</noscript>
</main>
<script id="data" type="application/json">DATA</script>
<script>
'use strict'
const $ = id => document.getElementById(id)
const data = JSON.parse($('data').textContent), total = data.steps
const calm = matchMedia('(prefers-reduced-motion: reduce)').matches
const duration = Math.min(6000, Math.max(2000, 180 * total))  // milliseconds at speed 1, however many the steps

// `from` is the slider's place from which a unit is seen: 0 if given, s + 1 if its last token came at step s.
// Masked units already take the room of their text, so that nothing moves when it comes.
const units = data.units.map(([text, ids, steps]) => {
  const span = document.createElement('span'), open = ids.includes(data.mask)
  span.textContent = open ? '\\u00a0\\u00a0\\u00a0' : text
  if (text.includes('\\n')) span.dataset.break = ''
  $('text').append(span)
  return { span, ids, steps, from: open ? Infinity : Math.max(...steps) + 1, look: '' }
})
const unitOf = new Map(units.map(unit => [unit.span, unit]))
const filled = data.units.flatMap(([, , steps]) => steps.filter(s => s >= 0))
const wanted = filled.length + data.units.filter(([, ids]) => ids.includes(data.mask)).length

let at = 0, place = 0, playing = false, before = 0, hovered = null

function show(step) {
  at = Math.min(total, Math.max(0, step))
  for (const unit of units) {
    const shade = Math.round(31 * (unit.from - 1) / Math.max(1, total - 1))
    const seen = unit.from === 0 ? 'given' : `s${shade}${unit.from === at ? ' new' : ''}`
    const look = unit.from > at ? 'mask' : seen
    if (look !== unit.look) unit.span.className = unit.look = look
  }
  $('slider').value = at
  $('slider').setAttribute('aria-valuetext', `step ${at} of ${total}`)
  $('status').textContent = `step ${at} of ${total} · ${filled.filter(s => s < at).length} of ${wanted} tokens`
  if (hovered) tell(hovered)
}

function setPlaying(on) {
  playing = on
  $('label').textContent = on ? 'Pause' : 'Play'
  $('icon').setAttribute('d', on ? 'M3 2h4v12H3zM9 2h4v12H9z' : 'M3 1l11 7-11 7z')
}

function play() {
  if (at >= total) show(0)
  place = at
  before = performance.now()
  setPlaying(true)
  requestAnimationFrame(tick)
}

function tick(now) {
  if (!playing) return
  // A page that was hidden goes on where it was.
  place += Math.min(100, Math.max(0, now - before)) / duration * total * $('speed').value
  before = now
  if (Math.floor(place) !== at) show(Math.floor(place))
  if (at >= total) setPlaying(false)
  else requestAnimationFrame(tick)
}

function toggle() {
  clearTimeout(opening)
  if (playing) setPlaying(false)
  else play()
}

function go(step) {
  clearTimeout(opening)
  setPlaying(false)
  show(step)
}

function tell(unit) {
  const many = unit.ids.length > 1 ? 's' : '', last = unit.from - 1
  const when = last < 0 ? 'given' : `step${many} ${unit.steps.map(s => s < 0 ? 'given' : s + 1).join(', ')}`
  $('tip').textContent = unit.from > at ? 'masked' : `${when}, token id${many} ${unit.ids.join(', ')}`
  $('tip').hidden = false
  const box = unit.span.getClientRects()[0] || unit.span.getBoundingClientRect(), tip = $('tip').getBoundingClientRect()
  $('tip').style.left = Math.max(4, Math.min(box.left, innerWidth - tip.width - 4)) + 'px'
  $('tip').style.top = (box.top > tip.height + 8 ? box.top - tip.height - 4 : box.bottom + 4) + 'px'
}

function hover(unit) {
  hovered = unit || null
  if (hovered) tell(hovered)
  else $('tip').hidden = true
}

$('text').addEventListener('pointerover', event => hover(unitOf.get(event.target)))
$('text').addEventListener('pointerleave', () => hover(null))
addEventListener('scroll', () => hover(null), { passive: true })
$('play').addEventListener('click', toggle)
$('slider').addEventListener('input', () => go(Number($('slider').value)))
addEventListener('keydown', event => {
  const within = event.target.tagName
  if (event.ctrlKey || event.metaKey || event.altKey || within === 'SELECT') return
  if (event.key === ' ' && within !== 'BUTTON') toggle()
  else if (event.key === 'ArrowLeft' && within !== 'INPUT') go(at - 1)
  else if (event.key === 'ArrowRight' && within !== 'INPUT') go(at + 1)
  else return
  event.preventDefault()
})

for (const [name, value] of data.facts) {
  const row = $('facts').insertRow(), head = document.createElement('th')
  head.scope = 'row'
  head.textContent = name
  row.append(head)
  row.insertCell().textContent = value
}

$('slider').max = total
setPlaying(false)
show(calm ? total : 0)
const opening = calm ? 0 : setTimeout(play, 900)
</script>
</body>
</html>
"""
