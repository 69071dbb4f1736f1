// Search of rows by word stems as the label book has it (saelab/labels/text_search.py): a row matches if it has every word of
// the query, exactly, longer or in another form; if none does, substrings are searched. No query is an error.
import { stemmer } from "./vendor/stemmer.js";

const WORDS = /[\p{L}\p{N}\p{Co}]+/gu;
const LONGEST = 64;  // letters of a word that is stemmed, as in SQLite

const stems = new Map();

function stemOf(word) {
  if (!stems.has(word)) stems.set(word, word.length <= LONGEST ? stemmer(word) : word);
  return stems.get(word);
}

// Lower case and without accents, as SQLite's unicode61 takes words.
function wordsOf(text) {
  return text.normalize("NFD").replace(/\p{Mn}/gu, "").toLowerCase().match(WORDS) ?? [];
}

// `fieldsOf(row)` are the texts of a row; those that match in an earlier field come first.
export class WordSearch {
  constructor(rows, fieldsOf) {
    this.texts = rows.map(row => fieldsOf(row).join("\n").toLowerCase());
    this.fields = [];  // of each field the rows by stem
    rows.forEach((row, i) => fieldsOf(row).forEach((text, f) => {
      const found = this.fields[f] ??= new Map();
      for (const word of new Set(wordsOf(text))) {
        const stem = stemOf(word), places = found.get(stem) ?? [];
        if (places.at(-1) !== i) places.push(i);
        found.set(stem, places);
      }
    }));
    this.sorted = this.fields.map(found => [...found.keys()].sort());
  }

  // Places of the rows that match, each with its rank: the number of words that its first field has, its second, ...
  search(query) {
    const words = wordsOf(query);
    const hits = words.map(word => this.fields.map((found, f) => this.startingWith(f, stemOf(word))));
    const every = hits.map(fields => new Set(fields.flatMap(set => [...set])));
    const places = every.length ? [...every[0]].filter(i => every.every(set => set.has(i))) : [];
    const rankOf = i => this.fields.map((_, f) => hits.filter(fields => fields[f].has(i)).length);
    return new Map(places.length ? places.map(i => [i, rankOf(i)]) : this.containing(query).map(i => [i, []]));
  }

  startingWith(f, stem) {
    const sorted = this.sorted[f], found = new Set();
    let low = 0, high = sorted.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] < stem) low = middle + 1; else high = middle;
    }
    for (; low < sorted.length && sorted[low].startsWith(stem); low++) for (const i of this.fields[f].get(sorted[low])) found.add(i);
    return found;
  }

  containing(query) {
    const parts = (query.match(/[\p{L}\p{N}_]+/gu) ?? query.split(/\s+/).filter(Boolean)).map(part => part.toLowerCase());
    return parts.length ? [...this.texts.keys()].filter(i => parts.every(part => this.texts[i].includes(part))) : [];
  }
}
