"""Whether an answer is right: find it in a completion, compare it with the gold as mathematics."""
import cmath, json, math, operator, re
from fractions import Fraction
from itertools import islice
from zlib import crc32
# Whether they are right
#
# `extract_answer` finds the answer, `is_correct` compares it with the gold: as text in one spelling, then as mathematics. For that, both are read into
# a small tree of lists, tuples, intervals and equations whose leaves are numbers, computed by a parser of our own: model text is data, never code.
# Any string is graded, without an exception and in milliseconds: every loop is linear in the text, and what is longer than LONG characters, deeper
# than DEEP levels or larger than BITS bits is not computed with.
#
# What counts as equal. Rational numbers agree exactly: 0.5 is 1/2, 0.33 is not 1/3. Roots, pi and functions agree to nine digits; formulas agree in
# value at three points with positive coordinates. Tuples and intervals keep order and brackets; sets, comma lists, unions and the two values of \pm
# come in any order. Optional: units (but two that are named begin alike), money signs, degrees, the base of a number, the letter of a choice, the
# "x =" of "x = 5", and the percent sign: 25% is 25 and is 0.25.

LONG, DEEP, BITS = 400, 40, 8192

# ---- finding the answer

MARKER = re.compile(r"\\(?:boxed|fbox)\s{0,9}|#{4,}(?:[\s*]{0,9}(?:final )?answer\b[\s:*]{0,9})?|"  # the braces of {0,9} keep it linear
                    r"answers?[\s*_]{0,9}(?:(?:is|are)\b(?!\s+(?:in)?correct)|[:=])[\s:*_]{0,9}", re.IGNORECASE)
NUMBER = re.compile(r"\\[dtc]?frac\{-?[0-9]+\}\{[0-9]+\}|(?:(?<![\w)}])[-−])?\\?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?\\?%?")
MATH = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|\$(?=\S)((?:[^$\\]|\\.)+)(?<!\s)\$(?!\d)", re.DOTALL)  # "$5 or $6" is money
WORD = r"(?:(?:a )?(?!(?:and|or|pi|sqrt|sin|cos|tan|log|ln)\b)[A-Za-z]{2,})"
PROSE = re.compile(rf"\\[a-zA-Z]+ ?\{{[^{{}}]*\}}|((?:[ (]{WORD})+\b(?! ?[-+*/=]| {WORD}))")  # words outside \text{}, with no "=" or "+" to follow
VARIABLE = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])")


def extract_answer(text, strict=False):
    """The answer behind the last marker: a box, "#### 72" or "The answer is 72.". Passed over are markers with nothing behind them and boxes that
    never close (a truncated completion). Without a marker: None if strict, as in training, else the last number of the text."""
    end = len(text)
    for marker in reversed(list(MARKER.finditer(text))[-30:]):  # thirty empty markers, and there is no answer
        answer = in_box(text, marker.end(), end) if marker[0][0] == "\\" else in_sentence(text[marker.end():end])
        if answer:
            return answer
        end = marker.start()  # a box that reaches an unclosed one is unclosed itself, so no character is read twice
    last = -1 if strict else max(map(text.rfind, "0123456789"))
    return tidy(NUMBER.findall(text[max(0, last - LONG):last + 9])[-1]) if last >= 0 else None


def in_box(text, start, end):
    """What stands between the brace at `start` and its partner, "" without one; of \\boxed 5 the 5."""
    if text[start:start + 1] != "{":
        return tidy(re.compile(r"[^\s{}$]*").match(text, start, end)[0])
    depth = 0
    for brace in islice(re.compile(r"\\[\\{}]|[{}]").finditer(text, start, end), 1000):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)  # \{ and \} do not nest
        if depth == 0:
            return tidy(text[start + 1:brace.start()])
    return ""


def in_sentence(text):
    """The answer with which a text begins: "36 + 36 = $72 dollars, because ..." -> 72."""
    first = (text.split(maxsplit=1) or [""])[0]
    if len(first) > LONG:
        return first
    text = MATH.sub(lambda m: " ".join(m[m.lastindex].split()), text.lstrip()[:LONG].replace("**", ""))
    line = " ".join(re.split(r"\n|(?<!\\)[.!?](?:\s|$)", text)[0].split())
    line = re.sub(r"\b(?:negative|minus) (?=[\d\\$])", "-", line)
    line = re.sub(r"(?<=\d) ?[xX] ?(?=[$\d])", " * ", line)
    line = re.sub(r"^(?:(?:[a-z]{2,}|a) )+(?=[-(\\$]*\d|\\|\([A-Z]\))", "", line)  # "equal to 5"
    if re.match(r"[A-Za-z]{2,}(?: [^=]*)?$", line):  # "Janet makes $18 a day", or words alone: "east, since ..."
        numbers = NUMBER.findall(line) if re.search(r"\b[a-z]{2}", line) else []
        return tidy(numbers[-1] if numbers else re.split(r"[,;] | (?:because|since|as) ", line)[0])
    prose = next((m for m in PROSE.finditer(line) if m[1]), None)
    line = line[:prose.start()] if prose else line
    left, _, right = line.rpartition("=")
    is_value = not VARIABLE.search(right) and (len(left.strip()) == 1 or not VARIABLE.search(left))  # else the equation is the answer
    return tidy(right if is_value else line)


def tidy(answer):
    """Without what surrounds it; a plain number also without its money sign and thousands separators."""
    answer = answer.strip().rstrip(" .,;:\\")
    if len(answer) > LONG:
        return answer
    while answer.endswith("}") and answer.count("{") < answer.count("}"):  # \boxed{The answer is 5}
        answer = answer[:-1].rstrip(" .,;:\\")
    plain = re.sub(r"\\?\$|(?<=\d),(?=\d{3}(?!\d))", "", answer).replace("−", "-")
    return plain if re.fullmatch(r"-?\d*\.?\d+", plain) else answer


# ---- comparing two answers

def is_correct(completion, answer, strict=False):
    """Does the completion end in the gold `answer`? The gold may be a bare answer or a whole solution that ends in one."""
    found, gold = extract_answer(completion, strict), str(answer)
    return found is not None and equal(extract_answer(gold, strict=True) or gold, found)


def equal(gold, answer):
    """Are two answers the same, as text or as mathematics?"""
    gold, answer = normalise(gold), normalise(answer)
    if not gold or gold == answer or max(len(gold), len(answer)) > LONG:
        return gold == answer != ""
    words, others = (re.sub(r"[\s().']", "", text).casefold() for text in (gold, answer))
    if words.isalpha() and words == others:
        return True
    choice = CHOICE.fullmatch(answer)
    if choice and not CHOICE.fullmatch(gold):  # "(C) 12" for the gold C, or for the gold 12
        answer = choice[1] if re.fullmatch(r"\(?[A-H]\)?", gold) else choice[2]
    units = [UNIT.search(gold), UNIT.search(answer)]
    if all(units) and units[0][1] != units[1][1]:
        return False
    gold, answer = UNIT.sub("", gold), UNIT.sub("", answer)
    if bool(BASE.search(gold)) != bool(BASE.search(answer)):
        gold, answer = BASE.sub("", gold), BASE.sub("", answer)
    percents = ("", "/100") if ("%" in gold) != ("%" in answer) else ("",)
    try:
        return any(same(read(tokenise(gold.replace("%", p))), read(tokenise(answer.replace("%", p)))) for p in percents)
    except OverflowError:  # an exact number too large to compare with a float
        return False


FUNCTIONS = {"sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "cot": lambda z: 1 / cmath.tan(z), "sec": lambda z: 1 / cmath.cos(z),
             "csc": lambda z: 1 / cmath.sin(z), "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan, "exp": cmath.exp,
             "ln": cmath.log, "log": cmath.log10}
CONSTANTS = {"pi": cmath.pi, "e": cmath.e, "i": 1j}
NAMES = "|".join(FUNCTIONS) + "|sqrt|pi"
SYNONYMS = {old: new for new, olds in {
    "": r"$ \$ £ € ¢ \( \) \[ \] \displaystyle", "-": "− – — ‐ ‑", "*": r"\cdot \times \ast × · ⋅", "/": r"\div ÷ \over", ":": r"\colon",
    "=": r"\approx ≈", "|": r"\vert \lvert \rvert", "(": r"\langle", ")": r"\rangle", r"\{": r"\lbrace", r"\}": r"\rbrace", "<": r"\lt", ">": r"\gt",
    "<=": r"\le \leq \leqslant ≤", ">=": r"\ge \geq \geqslant ≥", r"\pm": "±", r"\cup": "∪", r"\frac": r"\dfrac \tfrac \cfrac", r"\pi": "π pi",
    r"\sqrt": "√ sqrt", r"\infty": "∞ infinity Infinity", r"\neq": r"\ne ≠", r"\emptyset": r"\varnothing ∅", r"\theta": "θ",
}.items() for old in olds.split()}
RULES = [(re.compile(pattern), replacement) for pattern, replacement in (
    # a matrix becomes a tuple of rows in brackets; a row of one entry is that entry, so a column is a plain tuple
    (r"\\begin\{(?:[bpB]?matrix|array)\}(?:\{[lcr|]*\})?", "(["), (r"(?:\\\\\s*)?\\end\{(?:[bpB]?matrix|array)\}", "])"),
    (r"\\\\", "],["), ("&", ","),
    (r"\\!\s*|\{(?=,\})|(?<=\{,)\}|(?<=\d)\\,(?=\d{3})", ""),  # 10,\!080 10{,}080 10\,080
    (r"\\[,;: ]|~|\\q?quad(?![a-z])", " "),
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])", ""),
    *2 * ((r"\\(?:text\w*|math[a-z]+|[mh]box|operatorname|boxed)\s*\{([^{}]*)\}", r" \1 "),),  # twice, for they nest
    (r"\\(?:text\w*|math[a-z]+|boldsymbol|boxed)(?=\s*\{)", ""),
    (r"\^?\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z])|\\degree|°)", " "),
    (r"(?<=[\d)}])\s*(?:\\approx|≈).*", ""),  # 1/3 \approx 0.33
    (r"\\\{\s*\\\}", r"\\emptyset "), (r"²", "^2"), (r"³", "^3"), (r"\*\*", "^"), (r"\\%|\bpercent\b", "%"),
    (r"\b([ap])\.m\b\.?", r"\1m"), (r"(?<=\d)(?=[A-Za-z]{4,}|[ckm]m\b)", " "),  # 10 a.m. 12inches
    (r",?\s+(?:and|or)\s+", ", "), (r"^\s*[a-zA-Z]\s*(?:\\in(?![a-z])|∈)", ""),  # x \in [0, 1]
    (r"\s*_\s*\{\s*\(?(\w+)\)?\s*\}", r"_\1"), (r"^\s*\((\w+)\)(?=_)", r"\1"),  # (52)_{8}
    (r"\\[dtc]?frac\s*(\d)", r"\\frac{\1}"), (r"(\\[dtc]?frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),  # \frac43
    (r"(?<![\w.^])(\d+)\s*\\[dtc]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(?<![\w.])(\d+)\s+(\d+)\s*/\s*(\d+)",
     r"(\1\4+\2\5/\3\6)"),  # 1\frac{3}{4} and 1 3/4
    (r"(\d)[eE]([-+]?\d)", r"\1*10^\2"),
    (r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}", lambda m: "((%s%s%s-0%s%s)/%s%s)" % (*m.groups(), m[1], m[2], "9" * len(m[3]), "0" * len(m[2]))),
)]
UNIT = re.compile(rf"(?<=[\d)}}\]i]) (?:(?:square|sq|cubic)\.? )*(?!(?:{NAMES})\b)"  # after a number: " cm^2", " square inches", " miles per hour"
                  r"(?=[A-Za-z]{3}|(?:[cmk]?m|[km]?g|in|ft|lb|oz|mi|yd|hr|[ap]m|[shLCF])\b)([A-Za-z])(?:[A-Za-z ./]|\^\{?[23]\}?)*(?=$|[,)\]\\])")
CHOICE = re.compile(r"\(([A-H])\) (.+)")  # (C) 12
BASE = re.compile(r"(?<=\w)_\d+$")  # 4210_5
TOKEN = re.compile(rf"\d+(?:\.\d*)?|\.\d+|\\[a-zA-Z]+|\\.|<=|>=|\b[A-Za-z]{{4,}}|{NAMES}|[A-Z]{{2,}}|[A-Za-z]_\w|\S")  # AB is one name, xy is x times y


def normalise(answer):
    """One spelling for the many of LaTeX and plain text."""
    if len(answer) <= LONG:
        for pattern, replacement in RULES:
            answer = pattern.sub(replacement, answer)
        if not re.search(r"[(\[]|\\\{", answer):  # 1,250 is a number, (1,250) a pair
            answer = re.sub(r"(?<=\d)[, ](?=\d{3}(?!\d))", "", answer)
    return " ".join(answer.split()).rstrip(" .,;:")


def tokenise(answer):
    return [token for token in (SYNONYMS.get(token, token) for token in TOKEN.findall(answer)) if token]


# ---- reading: tokens -> tree

OPEN, CLOSE = ("(", "[", "{", r"\{"), (")", "]", "}", r"\}")


def split(tokens, separators):
    """The parts between separators outside all brackets, those separators, and whether one pair of brackets holds everything."""
    parts, found, depth, closed = [[]], [], 0, 0
    for token in tokens:
        depth += (token in OPEN) - (token in CLOSE)
        closed += depth == 0 and token in CLOSE
        if depth == 0 and token in separators:
            found.append(token)
            parts.append([])
        else:
            parts[-1].append(token)
    return parts, found, closed == 1 and tokens[0] in OPEN and tokens[-1] in CLOSE


def read(tokens, depth=0):
    """An answer as a tree: ("any", trees) in any order, ("(]", trees) in this one, ("value", numbers), ("text", string), or see relation."""
    if depth > DEEP:
        return "text", "".join(tokens)
    parts, commas, bracketed = split(tokens, (",", r"\cup"))
    if not commas and (r"\pm" in tokens or r"\mp" in tokens) and tokens[0] != r"\{":
        parts = [[{r"\pm": plus, r"\mp": minus}.get(token, token) for token in tokens] for plus, minus in ("+-", "-+")]
    if len(parts) > 1:
        trees = [read(part, depth + 1) for part in parts if part]
        return "any", [leaf for tree in trees for leaf in (tree[1] if tree[0] == "any" else [tree])]
    sides, signs, _ = split(tokens, ("=", "<", ">", "<=", ">="))
    if signs:
        return relation(sides, signs, depth + 1)
    if bracketed:
        items, commas, _ = split(tokens[1:-1], (",",))
        is_ordered = commas and tokens[0] in "(["
        return (tokens[0] + tokens[-1], [read(item, depth + 1) for item in items]) if is_ordered else read(tokens[1:-1], depth + 1)
    return leaf(tokens)


def leaf(tokens):
    try:
        return "value", [compute(tokens, point) for point in range(3)]
    except (ValueError, ArithmeticError):
        return "text", "".join(token for token in tokens if token not in "{}").casefold()


def is_name(tokens):
    """x, x_1, f(x), Area"""
    return re.fullmatch(r"\\?[A-Za-z]+(_\w)?(\([a-z]\))?", "".join(tokens)) is not None


def relation(sides, signs, depth):
    """An equation as ("=", left - right up to a factor, right, is left a mere name). An inequality in a mere name as the interval it is."""
    named = [is_name(side) for side in sides]
    if set(signs) == {"="}:
        left, right = (-1, 0) if named[-1] and not named[0] else (0, -1)  # 5 = x
        kind, difference = leaf([*sides[left], "-", "(", *sides[right], ")"])
        if kind == "value" and difference[0]:
            difference = [number / difference[0] for number in difference]
        return "=", (kind, difference), read(sides[right], depth), named[left]
    if set(signs) <= {">", ">="}:
        return relation(sides[::-1], [sign.replace(">", "<") for sign in signs[::-1]], depth)
    if len(sides) == 2 and any(named):  # x < 3 is -oo < x < 3
        sides, signs = ([["-", r"\infty"], *sides], ["<", *signs]) if named[0] else ([*sides, [r"\infty"]], [*signs, "<"])
    trees = [read(side, depth) for side in sides]
    if len(sides) == 3 and is_name(sides[1]):
        return {"<": "("}.get(signs[0], "[") + {"<": ")"}.get(signs[1], "]"), [trees[0], trees[2]]
    return " ".join(signs), trees


def same(gold, answer):
    """Are two trees equal? An equation is also its right side, but a gold equation only where its left side is a name, as in x = 5."""
    if "any" in (gold[0], answer[0]):
        a, b = (tree[1] if tree[0] == "any" else [tree] for tree in (gold, answer))
        return all(any(same(x, y) for y in b) for x in a) and all(any(same(x, y) for x in a) for y in b)
    if gold[0] == "=" != answer[0]:
        return gold[3] and same(gold[2], answer)
    if answer[0] == "=" != gold[0]:
        return same(gold, answer[2])
    kind, a, b = gold[0], gold[1], answer[1]
    if kind != answer[0] or kind == "text":
        return kind == answer[0] and a == b
    if kind == "=":
        return same(a, b)
    if kind == "value":
        return all(x == y if type(x) is type(y) is Fraction else cmath.isclose(x, y, rel_tol=1e-9, abs_tol=1e-12) for x, y in zip(a, b))
    return len(a) == len(b) and all(map(same, a, b))


# ---- computing: tokens -> number

def power(base, exponent):
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length()) <= BITS:
            return base ** int(exponent)
    return complex(base) ** complex(exponent)


# how tightly an operator binds what stands to its left and to its right; 3 is multiplication without a sign, 4 a leading minus, 9 a single operand
OPERATORS = {"+": (1, 1, operator.add), "-": (1, 1, operator.sub), "*": (2, 3, operator.mul), "/": (2, 3, operator.truediv), "^": (6, 5, power)}


def compute(tokens, point):
    """The value of an expression at one of three points: a Fraction while exact, else a complex float. ValueError or ArithmeticError where there is
    none. `operand(level)` reads on while operators bind tighter than its level, so that sin 2x is sin(2x), yet 1/2x is (1/2)x."""
    rest = ["", *reversed(tokens)]

    def skip(token):
        return rest[-1] == token and bool(rest.pop())

    def group(close, depth):
        value = operand(0, depth)
        if rest.pop() != close:
            raise ValueError("unbalanced, or no expression")
        return value

    def operand(level, depth):
        if depth > DEEP:
            raise ValueError("too deep")
        token, depth = rest.pop(), depth + 1
        name = token.lstrip("\\")
        if token in ("+", "-"):
            value = operand(4, depth) * (-1 if token == "-" else 1)
        elif token[:1].isdigit() or token[:1] == ".":
            value = Fraction(token)
        elif token in OPEN:
            value = group(CLOSE[OPEN.index(token)], depth)
        elif token == "|":
            value = abs(group("|", depth))
        elif token == r"\frac":
            value = operand(9, depth) / operand(9, depth)
        elif token == r"\sqrt":
            degree = group("]", depth) if skip("[") else 2
            value = power(operand(9, depth), Fraction(1) / degree)
        elif name in FUNCTIONS:
            base = operand(9, depth) if skip("_") else 10
            exponent = operand(9, depth) if skip("^") else Fraction(1)
            value = FUNCTIONS[name](complex(operand(9 if rest[-1] in OPEN else 2, depth))) / cmath.log10(complex(base))
            value = power(value, exponent)
        elif name in CONSTANTS:
            value = CONSTANTS[name]
        elif name[:1].isalpha():
            value = Fraction(crc32(f"{name} {point}".encode()) % 1999 + 1, 64)
        else:
            raise ValueError("no expression")
        while True:
            if not isinstance(value, Fraction) and not cmath.isfinite(value):
                raise ValueError("too large")
            if isinstance(value, Fraction) and max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS:
                value = complex(value)
            sign, name = rest[-1], rest[-1].lstrip("\\")
            unsigned = (2 if name in FUNCTIONS else 3, 3, operator.mul) if sign in OPEN or name[:1].isalpha() else (0, 0, None)
            left, right, function = OPERATORS.get(sign, unsigned)
            if skip("!"):
                if value not in range(171):
                    raise ValueError("no factorial, or too large")
                value = Fraction(math.factorial(int(value)))
            elif left <= level:
                return value
            else:
                sign in OPERATORS and rest.pop()
                value = function(value, operand(right, depth))

    return group("", 0)


# ---------------------------------------------------------------------------------------------------
# Its score
