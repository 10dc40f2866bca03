// Elements, made without HTML in strings: what a stranger wrote stays text.

// h('p', { class: 'small' }, 'text', otherElement): attributes; functions are listeners.
export function h(name, attributes = {}, ...children) {
  const element = document.createElement(name)
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === 'function') element.addEventListener(key, value)
    else if (value !== false) element.setAttribute(key, value === true ? '' : value)
  }
  element.append(...children.flat())
  return element
}

export const find = (selector, within = document) => within.querySelector(selector)

// A table of pairs: what stands there, and what it means.
export function meanings(caption, rows, heads = ['what it is', 'what it is for']) {
  const line = ([what, why]) => h('tr', {}, h('td', {}, h('code', {}, what)), h('td', {}, why))
  return h(
    'table', {},
    h('caption', {}, caption),
    h('thead', {}, h('tr', {}, heads.map((head) => h('th', { scope: 'col' }, head)))),
    h('tbody', {}, rows.map(line)),
  )
}

// Something long, letter by letter.
export const verbatim = (text) => h('pre', {}, h('code', {}, text))
