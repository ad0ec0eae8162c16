// Colours for code: comments, strings, numbers and keywords. Coarse on purpose: the same few rules for every language.

import { el } from "./dom.js";

const MOST_CHARACTERS = 20_000; // longer code stays plain: it is rendered again with every token
const KEYWORDS = new Set(`abstract and as assert async await bool break case catch char class const continue def default
  del do double elif else enum except export extends extern false False final finally float fn for from func function
  global go if impl implements import in inline int interface is lambda let long loop match mod mut new nil None not
  null or override package pass private protected pub public raise return self short signed sizeof static struct super
  switch template this throw trait true True try type typedef typeof undefined union unsafe unsigned use using var
  virtual void where while with yield select insert update delete create table join on group order by limit SELECT FROM
  WHERE INSERT UPDATE DELETE CREATE TABLE JOIN ON GROUP ORDER BY LIMIT AND OR NOT NULL AS INTO VALUES echo then fi done
  esac local`.split(/\s+/));
const HASHES = /^(?:py|python|sh|bash|shell|zsh|console|yaml|yml|toml|ini|ruby|rb|r|perl|make|makefile|dockerfile|conf)$/i;
const DASHES = /^(?:sql|lua|haskell|hs)$/i;
const PLAIN = /^(?:text|txt|plain|plaintext|output|log|md|markdown|diff)$/i;
const STRINGS = String.raw`"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'`;
const REST = String.raw`\b(?:0[xX][\da-fA-F]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\b|[A-Za-z_$][\w$]*`;

function commentsOf(language) {
  if (HASHES.test(language)) return "#[^\\n]*";
  if (DASHES.test(language)) return "--[^\\n]*";
  if (/^(?:html|xml|svg|json|css)$/i.test(language)) return String.raw`<!--[\s\S]*?(?:-->|$)|/\*[\s\S]*?(?:\*/|$)`;
  return String.raw`//[^\n]*|/\*[\s\S]*?(?:\*/|$)`;
}

// A fragment of the code's nodes; its text is the code.
export function highlighted(code, language) {
  const fragment = document.createDocumentFragment();
  if (!language || PLAIN.test(language) || code.length > MOST_CHARACTERS) {
    fragment.append(code);
    return fragment;
  }
  const tokens = new RegExp(`(${commentsOf(language)})|(${STRINGS}|\`(?:\\\\.|[^\`\\\\])*\`)|(${REST})`, "g");
  let from = 0;
  for (const { 0: text, 1: comment, 2: string, 3: word, index } of code.matchAll(tokens)) {
    const kind = comment ? "comment" : string ? "string" : /^\d/.test(word) ? "number" : KEYWORDS.has(word) && "keyword";
    if (!kind) continue;
    fragment.append(code.slice(from, index), el("span", { class: `code-${kind}` }, text));
    from = index + text.length;
  }
  fragment.append(code.slice(from));
  return fragment;
}
