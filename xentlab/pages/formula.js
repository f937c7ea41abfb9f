// A formula of p: parsed into a tree, evaluated with its derivative, written as Python. Nothing is run as code.
"use strict";
const FUNCTIONS = {
  // name: [number of arguments, value, derivatives, Python]
  log: [1, Math.log, a => [1 / a], "jnp.log"],
  ln: [1, Math.log, a => [1 / a], "jnp.log"],
  log2: [1, Math.log2, a => [1 / (a * Math.LN2)], "jnp.log2"],
  exp: [1, Math.exp, a => [Math.exp(a)], "jnp.exp"],
  sqrt: [1, Math.sqrt, a => [0.5 / Math.sqrt(a)], "jnp.sqrt"],
  abs: [1, Math.abs, a => [Math.sign(a)], "jnp.abs"],
  tanh: [1, Math.tanh, a => [1 - Math.tanh(a) ** 2], "jnp.tanh"],
  min: [2, Math.min, (a, b) => a === b ? [.5, .5] : a < b ? [1, 0] : [0, 1], "jnp.minimum"],
  max: [2, Math.max, (a, b) => a === b ? [.5, .5] : a > b ? [1, 0] : [0, 1], "jnp.maximum"],
};
const CONSTANTS = {e: [Math.E, "jnp.e"], pi: [Math.PI, "jnp.pi"]};

class FormulaError extends Error {}

function tokenize(text) {
  const pattern = /\s*(?:(\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?)|([A-Za-z_][A-Za-z_0-9]*)|(\*\*|[-+*\/^(),−·]))/y;
  const tokens = [];
  let place = 0;
  while (text.slice(place).trim()) {
    pattern.lastIndex = place;
    const found = pattern.exec(text);
    if (!found) throw new FormulaError(`“${text.slice(place).trim()[0]}” at character ${place + text.slice(place).search(/\S/) + 1} has no meaning here.`);
    const [, number, name, sign] = found;
    const at = pattern.lastIndex - (number ?? name ?? sign).length + 1;
    tokens.push(number !== undefined ? {kind: "number", text: number, at} : name !== undefined ? {kind: "name", text: name, at}
      : {kind: "sign", text: {"**": "^", "−": "-", "·": "*"}[sign] ?? sign, at});
    place = pattern.lastIndex;
  }
  return tokens;
}

// sum: product (+|- product)*; product: unary (*|/ unary)*; unary: - unary | power; power: atom (^ unary)?
function parse(text) {
  const tokens = tokenize(text);
  let place = 0, depth = 0;
  const ahead = sign => tokens[place]?.kind === "sign" && tokens[place].text === sign;
  const take = sign => ahead(sign) && ++place;
  const here = () => tokens[place] ? `“${tokens[place].text}” at character ${tokens[place].at}` : "the end";
  function need(sign, why) { if (!take(sign)) throw new FormulaError(`“${sign}” ${why} is missing before ${here()}.`); }
  function chain(next, signs) {
    let left = next();
    for (let sign; (sign = signs.find(ahead)) !== undefined;) { place++; left = {sign, parts: [left, next()]}; }
    return left;
  }
  const sum = () => chain(product, ["+", "-"]);
  const product = () => chain(unary, ["*", "/"]);
  function unary() {
    if (++depth > 60) throw new FormulaError("This is nested too deep.");
    const found = take("-") ? {sign: "neg", parts: [unary()]} : take("+") ? unary() : power();
    depth--;
    return found;
  }
  function power() {
    const base = atom();
    return take("^") ? {sign: "^", parts: [base, unary()]} : base;
  }
  function atom() {
    const token = tokens[place];
    if (take("(")) { const inner = sum(); need(")", "for an open bracket"); return inner; }
    if (!token || token.kind === "sign") throw new FormulaError(`A number, p or a bracket is missing before ${here()}.`);
    place++;
    if (token.kind === "number") return {number: Number(token.text), text: token.text};
    if (token.text === "p") return {variable: true};
    if (Object.hasOwn(CONSTANTS, token.text)) return {constant: token.text};
    if (!Object.hasOwn(FUNCTIONS, token.text)) {
      throw new FormulaError(`“${token.text}” at character ${token.at} is not known. There are p, e, pi and ${Object.keys(FUNCTIONS).join(", ")}.`);
    }
    need("(", `after ${token.text}`);
    const parts = [sum()];
    while (take(",")) parts.push(sum());
    need(")", `to close ${token.text}`);
    const count = FUNCTIONS[token.text][0];
    if (parts.length !== count) throw new FormulaError(`${token.text} takes ${count} number${count > 1 ? "s" : ""}; got ${parts.length}.`);
    return {call: token.text, parts};
  }
  if (!tokens.length) throw new FormulaError("Write a loss of p, such as -log(p).");
  const tree = sum();
  if (place < tokens.length) throw new FormulaError(`An operator is missing before ${here()}.`);
  return tree;
}

// Value and derivative by p, together (forward mode).
function evaluate(tree, p) {
  if (tree.variable) return [p, 1];
  if ("number" in tree) return [tree.number, 0];
  if (tree.constant) return [CONSTANTS[tree.constant][0], 0];
  const parts = tree.parts.map(part => evaluate(part, p));
  const [[a, da], [b, db] = []] = parts;
  if (tree.call) {
    const [, value, slopes] = FUNCTIONS[tree.call], numbers = parts.map(part => part[0]);
    const each = slopes(...numbers);
    return [value(...numbers), parts.reduce((sum, part, i) => sum + (part[1] === 0 ? 0 : each[i] * part[1]), 0)];
  }
  switch (tree.sign) {
    case "neg": return [-a, -da];
    case "+": return [a + b, da + db];
    case "-": return [a - b, da - db];
    case "*": return [a * b, da * b + a * db];
    case "/": return [a / b, (da === 0 ? 0 : da / b) - (db === 0 ? 0 : a / b * (db / b))];  // b * b may be below the least float
    case "^": return [a ** b, (da === 0 ? 0 : b * a ** (b - 1) * da) + (db === 0 ? 0 : a ** b * Math.log(a) * db)];
  }
}

function python(tree) {
  if (tree.variable) return "p";
  if ("number" in tree) return Number.isFinite(tree.number) ? String(tree.number) : "jnp.inf";
  if (tree.constant) return CONSTANTS[tree.constant][1];
  if (["log", "ln"].includes(tree.call) && tree.parts[0].variable) return "log_p";
  const parts = tree.parts.map(python);
  if (tree.call) return `${FUNCTIONS[tree.call][3]}(${parts.join(", ")})`;
  return tree.sign === "neg" ? `(-${parts[0]})` : `(${parts[0]} ${tree.sign === "^" ? "**" : tree.sign} ${parts[1]})`;
}
