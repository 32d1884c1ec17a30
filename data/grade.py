"""
Whether an answer is right: find it in a completion, read it as mathematics, compare it with the gold.

The page goes in this order: finding the answer, one spelling, reading, computing, comparing. Model
text is data, never code. Any string is graded, without an exception and in milliseconds: every loop is
linear in the text, and an answer of more than LONG characters is compared as text alone.

What counts as equal. Rational numbers agree exactly: 0.5 is 1/2, 0.33 is not 1/3. Roots, pi and
functions agree to nine digits; formulas agree in value at four points. Tuples and intervals keep their
order and brackets; lists, sets, unions and the two values of \\pm come in any order. Optional: units
(but two that are named must agree), money signs, degrees, the base of a number, the letter of a choice,
the "x =" of "x = 5", and the percent sign: 25% is 25, and is 1/4, but 700% is not 7.

Strict is for search and training: only a marked answer counts, and it must be worked out. It has at
most one of + - * / more than the gold, or a policy earns reward by boxing the question's own formula.
Evaluation (strict=False) takes the last number where no answer is marked.
"""
import cmath
import math
import operator
import re
from collections import deque
from fractions import Fraction
from functools import partial
from itertools import islice
from typing import NamedTuple
from zlib import crc32

LONG, DEEP, BITS = 400, 40, 8192  # characters, nested brackets, bits of an exact number

# ---- Finding the answer ------------------------------------------------------------------------------

# Zero-width characters, tags such as </s>, <|eot_id|>, [END]. Private characters are used below.
INVISIBLE = re.compile(r"[\u200b-\u200f\u2060\ufeff\xad\ue000-\uf8ff]|\[[A-Z]{3,9}\]|"
                       r"<(?!answer>)[A-Za-z/|][\w|]{0,40}>")
BOX = r"\\boxed ?\{((?:[^{}]|\{[^{}]*\})*)\}"
FILL = r"(?:[\s$]|\\[()])*"
REMARK = (r"\s+(?:\w+ly |indeed )?(?:right|wrong|verified|consistent|valid|confirmed|sound|checked|"
          r"(?:in)?correct|(?:in)?accurate|(?:un)?reasonable|sensible|justified|plausible)\b")
MARKER = re.compile(  # {0,9} in place of * keeps it linear
    rf"(?P<boxes>(?:{BOX}{FILL}(?:,|and\b|or\b)+{FILL})+{BOX})|(?P<box>\\(?:boxed|fbox)\s{{0,9}})|"
    r"(?P<colon>(?:[#*]{2,6}\s{0,9}(?:final )?answer\b|(?<!/)answers?[\s*_]{0,9}[:=>])[\s:*_]{0,9}"
    r"(?:(?<=\n)[-•]\s)?)|(?P<hashes>#{4,9}(?!#|\s{0,9}\d{1,2}[.):]\s{1,9}[A-Z*]))|"  # "#### 2. Add"
    rf"(?P<words>answers?[\s*_]{{0,9}}(?:is|are)\b(?!{REMARK})[\s:*_]{{0,9}})", re.IGNORECASE)
BRACE = re.compile(r"\\[\\{}]|[{}]")
BARE = re.compile(r"[-+.\d\\][^\s$]*")  # \boxed 5, but not "\boxed as you wished"
NUMBER = re.compile(r"\\[dtc]?frac\{-?[0-9]+\}\{[0-9]+\}|(?:(?<![\w)}])[-−])?\\?\$?"
                    r"(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?\\?%?")
FORMULA = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|"  # but "$5 or $6" is money
                     r"\$(?=\S)((?:[^$\\]|\\.)+)(?<!\s)\$(?!\d)|(\\[a-zA-Z]+(?: ?\{[^{}]*\})?)", re.DOTALL)
N = r"[\d\ue000-\uf8ff]"  # a digit, or a formula that was set aside
CLAUSE_END = re.compile(rf"\n|(?<!\\)[.!?](?=\s|$)|;|(?<={N}) \((?=[\d\s+*/=$.,\ue000-\uf8ff×x-]+\))| \((?=[a-z]{{2}})|"
                        r",?\s(?:because|since|as|which|so|where|when)\b|,(?= (?!and\b|or\b)[a-z]{2})")
LEAD = re.compile(r"(?:(?:thus|therefore|hence|then|so|simply|just|only|also|now|exactly|about|is|"
                  r"approximately|given by|equal to|equals) )+", re.IGNORECASE)
NAMES = ("arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|exp|log|ln|abs|sqrt|pi|"
         "tenths|hundredths|thousandths|hundred|thousand|million|billion|trillion")
WORDS = re.compile(  # words of a sentence, those apart that belong to a formula
    rf"((?:[\s,:]*(?<![\w\\])(?!(?:{NAMES}|[A-Z]+)\b)(?:[A-Za-z]{{2,}}(?:['’-][A-Za-z]+)*|a(?= [a-z]))"
    r"(?![\w(^{_]| ?[+*/=^<>]| - ))+)")
CHANGED = re.compile(  # words that make another number of the next, and quantities of two parts
    r"\b(?:not|never|than|but|except|neither|nor|half|third|quarter|twice|double|triple|times|square|"
    r"cube|root|power|sum|product|ratio|difference|multiple|divisor|factor|reciprocal|negative|opposite|"
    r"most|least|under|below|over|above|between|up to|isn['’]t)(?: (?:of|the|an?|equal|to|exactly))* "
    rf"\$?-?{N}|\d [a-z]+,? \$?\d|{N} [a-z]+,? and \$?{N}")
NO_ANSWER = re.compile(r"(?:\S+ ){3}|(?:the|an?|in|on|at|by|to|of|as|for|from|that|this|what|how|not|we|it|"
                       r"our|your|given|found)\b", re.IGNORECASE)
VARIABLE = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])")


def extract_answer(text, strict=False):
    """The answer behind the last marker, or None: \\boxed{72}, "#### 72", "Answer: 72", "The answer is 72."

    Passed over are markers with nothing behind them and boxes that never close (a cut completion). Words
    behind "the answer is", as in "the answer is an integer", count where no other marker has an answer.
    Without a marker: None if strict, else the last number of the text."""
    text = INVISIBLE.sub("", text)
    end, words = len(text), None
    for marker in reversed(deque(MARKER.finditer(text), maxlen=30)):  # thirty empty ones: no answer
        kind = marker.lastgroup
        if kind == "boxes":
            return ", ".join(re.findall(BOX, marker[0]))
        if kind == "box":
            answer, at_once = in_box(text, marker.end(), end), True
        else:
            answer, at_once = in_sentence(text[marker.end():end])
        if answer and (at_once or kind == "colon"):
            return answer
        if kind == "words":
            words = words or answer
        end = marker.start()  # an unclosed box leaves what is before it unclosed: nothing is read twice
    if words or strict:
        return words or None
    numbers = NUMBER.findall(text[-50 * LONG:])
    return tidy(numbers[-1]) if numbers else None


def in_box(text, start, end):
    """What stands between the brace at `start` and its partner, "" without one."""
    if text[start:start + 1] != "{":
        bare = BARE.match(text, start, end)
        return tidy(bare[0]) if bare else ""
    depth = 0
    for brace in islice(BRACE.finditer(text, start, end), 1000):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)  # \{ and \} do not nest
        if depth == 0:
            return tidy(text[start + 1:brace.start()])
    return ""


def in_sentence(text):
    """The answer with which a text begins, and whether it stands there at once.

    "36 + 36 = $72 dollars, because" has 72, True. A sentence that opens with words has its last formula or
    number: "the area is $2\\pi$." has 2\\pi, False. Where words change that number, it is the whole clause:
    "less than 72". Nothing but words is an answer if they are few: "east", but not "the sum of both"."""
    formulas = []

    def set_aside(match):  # a formula becomes one character, so that what follows sees the sentence alone
        formulas.append(" ".join(match[match.lastindex].split()))
        return chr(0xE000 + len(formulas) - 1)

    def restore(part):
        return tidy(re.sub("[\ue000-\uf8ff]", lambda match: formulas[ord(match[0]) - 0xE000], part))

    text = FORMULA.sub(set_aside, re.sub(r"\*\*|__|[`\"“”]", "", text.lstrip()[:LONG]))
    clause = CLAUSE_END.split(respell(SPOKEN, text), 1)[0]
    clause = LEAD.sub("", " ".join(clause.split()), 1)
    parts = WORDS.split(clause)  # formula, words, formula, ..., words, formula
    formulas_at = [part for part in parts[::2] if re.search(rf"[A-Za-z]|{N}", part)]
    at_once = parts[0] in formulas_at
    if not formulas_at or not at_once and not re.search(r"\b[a-z]{2}", clause):  # "east, since", "June 20"
        words = re.split("[,;]", clause)[0]
        return "" if NO_ANSWER.match(words) else restore(words), False
    if CHANGED.search(clause):
        return restore(clause), False
    answer = restore(formulas_at[0 if at_once else -1])
    left, _, right = answer.rpartition("=")
    if not VARIABLE.search(right) and (len(left.strip()) == 1 or not VARIABLE.search(left)):
        answer = tidy(right)  # else the equation is the answer
    return answer, at_once


def tidy(answer):
    """Without what surrounds it; a plain number also without money sign and thousands separators."""
    answer = answer.strip().lstrip(" :*_`\"“'").rstrip(" .,;:\\*_`\"”'")
    if re.fullmatch(r"-?\d*\.\d{40,}", answer):
        answer = answer.rstrip("0")
    if len(answer) > LONG:
        return answer
    while answer.endswith("}") and answer.count("{") < answer.count("}"):  # \boxed{The answer is 5}
        answer = answer[:-1].rstrip(" .,;:\\")
    plain = re.sub(r"\\?\$|(?<=\d),(?=\d{3}(?!\d))", "", answer).replace("−", "-")
    return plain if re.fullmatch(r"-?\d*\.?\d+", plain) else answer


# ---- One spelling for the many of LaTeX and plain text -----------------------------------------------

# A unit of measure right behind a number: a word, or an abbreviation of this list. In formulas a single
# letter is a variable; \text{ W} is marked as unit_W by a rule below.
A_UNIT = (r"(?:unit_[A-Za-z.]+|(?:(?:[cmk]?m|[km]g|[kmg]?hz|[kmgt]b|[km]?wh?|in|ft|yd|mi|lb|oz|ml|pt|qt|gal|sec|min|hr|"
          r"day|wk|yr|cup|men|egg|pen)s?|[ap]m|mph|[cmk]?m/s|km/h|of|and|the|per|an?|for|at|on|by)\b|"
          rf"(?!(?:{NAMES})\b)[A-Za-z]{{4,}})")
UNIT = re.compile(rf"(?:(?<=[\d)}}\]i%!])|(?<=llion)) (?:(?:unit_)?(?:square|sq|cubic|cu)\.? )*({A_UNIT}"
                  rf"(?:[ ./]+(?:{A_UNIT}|[a-z]))*)(?: ?\^\{{?[23]\}}?)?(?=$|[,)\]\\])", re.IGNORECASE)
CHOICE = re.compile(r"\(([A-H])\) (.+)")  # (C) 12
BASE = re.compile(r"(?<=\d)_\d+$|\s*\(? ?\\?[pb]?mod ?[{( ]*\d+[})]*$")  # 4210_5, 5 \pmod{17}
SPOKEN = [  # words that compute
    (r"\b(?:negative|minus) (?=[\d\\$])", "-"), (r"\bminus\b", "-"), (r"\bplus\b", "+"),
    (r"(?<!\\)\btimes (?=[\d\\($])", "* "), (r"\bdivided by\b", "/"), (r"\bsquared\b", "^2"), (r"\bcubed\b", "^3"),
    (r"\bfactorial\b", "!"), (r"(?<=\d) and a half\b", ".5"), (rf"(?<={N}) to (?=\$?{N})", ":"),
    (rf"(?<={N}),? (?:and|or) (?=\$?-?{N})", ", ")]
UPRIGHT = r"\\(?:text\w*|math(?!bb)[a-z]+|[mh]box|operatorname|emph|underline|boxed|vec|bm|boldsymbol)"
RULES = [
    # a matrix becomes a tuple of rows in brackets; a row of one entry is that entry, a column a plain tuple
    (r"\\begin\{(?:[bpB]?(?:small)?matrix|array)\}(?:\{[lcr|]*\})?", "(["),
    (r"(?:\\\\|\\cr)?\s*\\end\{(?:[bpB]?(?:small)?matrix|array)\}", "])"),
    (r"\\\\(?:\[[\d.]+ ?[a-z]{2}\])?|\\cr(?![a-z])", "],["), ("&", ","),
    # spaces, sizes, styles, money
    (r"\{([,:])\}|(?<=\d)\\,(?=\d{3})|\\!\s*", lambda match: match[1] or ""),  # 10{,}080 10\,080 10,\!080
    (r"\\[,;: ]|~|\\q?quad(?![a-z])", " "),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|[lL]arge|bf)(?![a-zA-Z])|\\(?:text)?color(?:box)? ?\{\w*\}", ""),
    (rf"(?<=[\d)}}$])[\s$]*{UPRIGHT}\s*\{{\s*(?!(?:[ie]|and|or|{NAMES})\b)([A-Za-z][^{{}}]*)\}}", r" unit_\1 "),
    (rf"{UPRIGHT}\s*\{{([^{{}}]*)\}}", r" \1 "), (rf"{UPRIGHT}(?=\s*\{{)", ""),
    (r"\\?\$|\\[()\[\]]|[£€¢]", ""),
    # degrees count inside a function alone
    (r"\^?\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z])|\\degree)|°| (?:unit_)?degrees?\b", "°"),
    (r"(sin|cos|tan|cot|sec|csc)(\^\{?\d\}?)?\s*[({]?\s*([\d.]+)\s*°[)}]?", r"\1\2{\3\\degree}"),
    (r"°(?: *(?:unit_)?(?:[CF]|Celsius|Fahrenheit)\b)?", " "),
    (r"(sin|cos|tan)\s*\^\s*\{\s*-1\s*\}", r"arc\1 "),
    # numbers
    (r"(?<=[\d)}])\s*(?:\\approx|≈).*", ""), (r"²", "^2"), (r"³", "^3"),  # 1/3 \approx 0.33
    (r"\\%|\bpercent\b", "%"), (r"\b(unit_)?([ap])\.m\b\.?", r"\1\2m"),
    (r"(?<=\d)(?=[A-Za-z]{4,}|[ckm]m\b|[ap]m\b)", " "),  # 12inches
    (r"\\[dtc]frac", r"\\frac"), (r"\\[dt]binom", r"\\binom"), (r"\{(\w+) *\\choose *(\w+)\}", r"\\binom{\1}{\2}"),
    (r"\\frac\s*(\d)", r"\\frac{\1}"), (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),  # \frac43
    (r"(?<![\w.^])(\d+)\s*\\frac\{\s*(\d+)\s*\}\{\s*(\d+)\s*\}|(?<![\w.^])(\d+)\s+(\d+)\s*/\s*(\d+)",
     r"(\1\4+\2\5/\3\6)"),  # 1\frac{3}{4} and 1 3/4
    (r"(\d)[eE]([-+]?\d)", r"\1*10^\2"),
    (r"(\^(?:\{[^{}]*\}|\d+ ))\s*(?=\d)", r"\1*"),  # 2^3 3^4
    (r"\s*_\s*\{\s*\(?(\w+)\)?\s*\}", r"_\1"), (r"^\s*\((\w+)\)(?=_)", r"\1"),  # (52)_{8}
    # lists, sets, what does not commute
    (r",?\s+(?:and|or)\s+(?![a-z]{2})", ", "), (r"\\\{\s*\\\}", r"\\emptyset "), (r"\\[lr]?vert(?![a-z])", "|"),
    (r"^\\\{\s*[a-z]\s*(?:\\in ?\\mathbb\{?R\}? ?)?(?:\\mid|\||:)(.*)\\\}$", r"\1"),  # \{x \mid x > 4\}
    (r"\\mathbb\s*\{?R\}?|ℝ|all real numbers", r"(-\\infty,\\infty)"),
    (r"^\s*[a-zA-Z]\s*(?:\\in(?![a-z])|∈)|^\((?:\\?[a-z]+, ?)+\\?[a-z]+\) ?= ?(?=\()", ""),  # x \in [0, 1]
    (r"^([a-z]) ?= ?([^,=]+), ?(?!\1)[a-z] ?= ?([^,=]+)$", r"(\2,\3)"),  # x = 3, y = 10
    (r"^\s*[a-z] ?(?:\\neq?(?![a-z])|≠)(.+)$", r"(-\\infty,\1),(\1,\\infty)"),
    (r"^([(\[][^,]*,)([^,]*[)\]]) *\\setminus *\\\{([^,]*)\\\}$", r"\1\3),(\3,\2"),  # (0, 25) \setminus \{5\}
    (r"^-([a-z])\s*(<|>|\\[lg]eq?(?![a-z])|≤|≥)(.*)$", r"-(\3) \2 \1"),  # -x > -4
    (r"^([^|]*)\|([^|]*)$", r"\1\\mid \2"), (r"\|([^|]*)\|", r"\\abs{\1}"),
    (r"(?<![\w\\])(\{?[A-Za-z]\}?) *(?:\\times(?![a-z])|×) *(?=\{?[A-Za-z](?!\w))", r"\1\\cross "),
]
SYNONYMS = {}  # of single tokens
for row in r"""- − – — ‐ ‑;* \cdot \times \ast × · ⋅;/ \div ÷ \over;: \colon;( \langle;) \rangle;\pi π pi;
    = \approx ≈ \equiv ≡;\{ \lbrace;\} \rbrace;< \lt;> \gt;<= \le \leq \leqslant ≤;\theta θ;\pm ±;, \cup ∪;
    >= \ge \geq \geqslant ≥;\sqrt √ sqrt;\infty ∞ infinity Infinity;\emptyset \varnothing ∅""".split(";"):
    SYNONYMS.update(dict.fromkeys(row.split(), row.split()[0]))
TOKEN = re.compile(rf"\d+(?:\.\d*)?|\.\d+|\\[a-zA-Z]+|\\.|<=|>=|[A-Za-z]{{4,}}|{NAMES}|[A-Z]{{2,}}|"
                   r"[A-Za-z]_(?:\d+|[A-Za-z])|\S")  # AB is one name, xy is x times y


def respell(rules, text):
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def repeating(match):
    """0.1\\overline{3} -> \\frac{12}{90}"""
    start, nines = match[1] + match[2], "9" * len(match[3])
    return rf"\frac{{{int(start + match[3]) - int(start or 0)}}}{{{nines}{'0' * len(match[2])}}}"


def normalise(answer):
    """One spelling."""
    answer = tidy(answer)
    if len(answer) > LONG:
        return answer
    answer = respell(RULES, respell(SPOKEN, answer))
    answer = re.sub(r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}", repeating, answer)
    if not re.search(r"[(\[]|\\\{", answer):  # 1,250 is a number, (1,250) a pair
        answer = re.sub(r"(?<=\d)[, ](?=\d{3}(?!\d))", "", answer)
    answer = " ".join(answer.split()).rstrip(" .,;:")
    if re.match(r"[A-Za-z]{2,} .*\d", answer):  # \boxed{\text{There are 45 pens left}}
        answer = in_sentence(answer)[0] or answer
    return answer


# ---- Reading: tokens -> tree -------------------------------------------------------------------------

class Value(NamedTuple):
    """A number or a formula."""
    numbers: list       # at four points; exact as a Fraction, else a float or complex
    operators: int = 0  # how many of + - * / made it
    name: str = ""      # of a bare variable


class Group(NamedTuple):
    """Several trees. Its kind is "," for any order; for this order "(]" and the like, or "<"."""
    kind: str           # an answer that cannot be read has its text for a kind and no items
    items: list


class Equation(NamedTuple):
    name: str           # of its left side, if that is a bare variable
    right: NamedTuple
    difference: Value   # left - right, up to a factor


class Operator(NamedTuple):
    left: int           # how tightly it binds what stands to its left,
    right: int          # and to its right
    function: object


class Reader:
    """Reads tokens and computes on the way. ValueError or ArithmeticError where they mean nothing."""

    def __init__(self, tokens):
        self.rest = ["", *reversed(tokens)]  # the next token stands last
        self.depth = 0

    def skip(self, token):
        """Is this the next token? Then go behind it."""
        is_next = self.rest[-1] == token
        if is_next:
            self.rest.pop()
        return is_next

    def listing(self):
        """a, b = c, d < e"""
        trees = []
        while not trees or self.skip(","):
            sides, signs = [self.expression(0)], []
            while self.rest[-1] in RELATIONS:
                signs.append(self.rest.pop())
                sides.append(self.expression(0))
            trees += members(related(sides, signs))
        return in_any_order(trees)

    def expression(self, level):
        """Reads on while operators bind tighter than `level`."""
        self.depth += 1
        if self.depth > DEEP:
            raise ValueError("too deep")
        left = self.operand()
        while True:
            sign = self.rest[-1]
            if sign in POSTFIX:
                left = apply(POSTFIX[self.rest.pop()], left)
                continue
            name = sign.lstrip("\\")
            if sign in OPEN or name[:1].isalpha() and sign not in OPERATORS:
                sign = "before a function" if name in FUNCTIONS else "beside"
            if sign not in OPERATORS or OPERATORS[sign].left <= level:
                break
            self.skip(sign)
            left = apply(OPERATORS[sign].function, left, self.expression(OPERATORS[sign].right))
        self.depth -= 1
        return left

    def operand(self):
        token = self.rest.pop()
        name = token.lstrip("\\")
        if token in ("+", "-"):
            value = self.expression(4)
            return apply(operator.neg, value) if token == "-" else value
        if token[:1].isdigit() or token[:1] == ".":
            return constant(Fraction(token))
        if token in OPEN:
            return self.bracket(token)
        if token in (r"\frac", r"\binom"):
            return apply(operator.truediv if name == "frac" else binomial, self.operand(), self.operand())
        if token == r"\sqrt":
            degree = self.bracket("[") if self.skip("[") else constant(Fraction(2))
            return apply(root, self.operand(), degree)
        if name in FUNCTIONS:
            base = [self.operand()] if self.skip("_") else []
            exponent = self.operand() if self.skip("^") else constant(Fraction(1))
            argument = self.operand() if self.rest[-1] in OPEN else self.expression(2)
            return apply(power, apply(FUNCTIONS[name], argument, *base), exponent)
        if name in CONSTANTS:
            return constant(CONSTANTS[name])
        if not name[:1].isalpha():
            raise ValueError("no expression")
        if self.rest[-1] == "{" or self.rest[-1] == "(" and name in ("f", "g", "h"):
            return apply(partial(opaque, name), self.operand(), constant(Fraction(0)))
        return variable(name)

    def bracket(self, opening):
        inside = self.listing()
        close = self.rest.pop()
        if close not in CLOSE:
            raise ValueError("unbalanced")
        if isinstance(inside, Group) and inside.kind == "," and opening in "([":
            return Group(opening + close, inside.items)
        return inside


def in_any_order(trees):
    return trees[0] if len(trees) == 1 else Group(",", trees)


def members(tree):
    return tree.items if isinstance(tree, Group) and tree.kind == "," else [tree]


def is_name(tree):
    return isinstance(tree, Value) and tree.name != ""


def related(sides, signs):
    """The equation or inequality of these sides; the interval that it stands for, as in 3 < x."""
    if not signs:
        return sides[0]
    if set(signs) == {"="}:
        left, right = sides[0], sides[-1]
        if is_name(right) and not is_name(left):  # 5 = x
            left, right = right, left
        difference = apply(operator.sub, left, right)
        scale = difference.numbers[0] or 1
        return Equation(left.name, right, difference._replace(numbers=[y / scale for y in difference.numbers]))
    if set(signs) <= {">", ">="}:
        sides, signs = sides[::-1], [sign.replace(">", "<") for sign in signs[::-1]]
    if len(sides) == 2 and is_name(sides[0]):
        sides, signs = [constant(-INFINITY), *sides], ["<", *signs]
    elif len(sides) == 2 and is_name(sides[1]):
        sides, signs = [*sides, constant(INFINITY)], [*signs, "<"]
    if len(sides) == 3 and is_name(sides[1]):
        kind = {"<": "(", "<=": "["}[signs[0]] + {"<": ")", "<=": "]"}[signs[1]]
        return Group(kind, [sides[0], sides[2]])
    return Group(" ".join(signs), sides)


def read(answer):
    """The tree of an answer."""
    tokens = [SYNONYMS.get(token, token) for token in TOKEN.findall(answer)]
    trees = []
    try:
        for signs in ({r"\pm": "+", r"\mp": "-"}, {r"\pm": "-", r"\mp": "+"}):
            reader = Reader([signs.get(token, token) for token in tokens])
            trees += members(reader.listing())
            if reader.rest != [""]:
                raise ValueError("more than an expression")
    except (ValueError, ArithmeticError):
        return Group("".join(tokens).casefold(), [])
    return in_any_order(trees if r"\pm" in tokens or r"\mp" in tokens else trees[:len(trees) // 2])


# ---- Computing: at four points, of which two are negative in half of the variables -------------------

def constant(number):
    return Value([number] * 4)


def variable(name):
    numbers = []
    for point in range(4):  # of x and y one is negative: sqrt(x) sqrt(y) is not compared where both are
        size = Fraction(crc32(f"{name} {point}".encode()) % 1999 + 1, 64)
        is_negative = point > 1 and (ord(name[-1]) + point) % 2
        numbers.append(-size if is_negative else size)
    return Value(numbers, name=name)


def apply(function, *values):
    """function(values), point by point."""
    if not all(isinstance(value, Value) for value in values):
        raise ValueError("a tuple, a list or an equation is no number")
    numbers = []
    for arguments in zip(*[value.numbers for value in values]):
        number = function(*arguments)
        if not isinstance(number, Fraction):
            if not cmath.isfinite(number):
                raise ValueError("too large")
        elif max(number.numerator.bit_length(), number.denominator.bit_length()) > BITS:
            number = complex(number)
        numbers.append(number)
    return Value(numbers, sum(value.operators for value in values) + (function in ARITHMETIC))


def power(base, exponent):
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length()) <= BITS:
            return base ** int(exponent)
    return complex(base) ** complex(exponent)


def root(radicand, degree):
    return power(radicand, 1 / degree)


def log(number, base=10):
    return cmath.log(number) / cmath.log(base)


def factorial(n):
    if not isinstance(n, Fraction) or n.denominator > 1 or not 0 <= n <= 170:
        raise ValueError("no factorial, or too large")
    return Fraction(math.factorial(int(n)))


def binomial(n, k):
    if not isinstance(n, Fraction) or not isinstance(k, Fraction) or not 0 <= k <= n or n.denominator * k.denominator > 1:
        return opaque("binomial", n, k)
    return factorial(n) / factorial(k) / factorial(n - k)


def opaque(name, x, y):
    """A function of which nothing is known, but that its arguments do not commute."""
    return crc32(name.encode()) % 1999 + x * x + 3 * y * y + x


INFINITY = Fraction(10) ** 300
FUNCTIONS = {"sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "cot": lambda z: 1 / cmath.tan(z),
             "sec": lambda z: 1 / cmath.cos(z), "csc": lambda z: 1 / cmath.sin(z), "abs": abs, "log": log,
             "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan, "exp": cmath.exp, "ln": cmath.log}
CONSTANTS = {"pi": cmath.pi, "e": cmath.e, "i": 1j, "infty": INFINITY, "hundred": Fraction(100),
             "thousand": Fraction(10) ** 3, "million": Fraction(10) ** 6, "billion": Fraction(10) ** 9,
             "trillion": Fraction(10) ** 12, "tenths": Fraction(1, 10), "hundredths": Fraction(1, 100),
             "thousandths": Fraction(1, 1000)}
OPERATORS = {"+": Operator(1, 1, operator.add), "-": Operator(1, 1, operator.sub),
             "*": Operator(2, 3, operator.mul), "/": Operator(2, 3, operator.truediv), "^": Operator(6, 5, power),
             "beside": Operator(3, 3, operator.mul),             # 1/2x is (1/2)x,
             "before a function": Operator(2, 3, operator.mul),  # and sin x cos y is (sin x)(cos y)
             ":": Operator(1, 1, partial(opaque, ":")), r"\mid": Operator(1, 1, partial(opaque, "mid")),
             r"\setminus": Operator(1, 1, partial(opaque, "-")), r"\cross": Operator(2, 3, partial(opaque, "x"))}
POSTFIX = {"!": factorial, r"\degree": lambda angle: complex(angle) * cmath.pi / 180}
ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.truediv)
RELATIONS = ("=", "<", ">", "<=", ">=")
OPEN, CLOSE = ("(", "[", "{", r"\{"), (")", "]", "}", r"\}")


# ---- Comparing ---------------------------------------------------------------------------------------

def is_correct(completion, answer, strict=False):
    """Does a completion end in the gold `answer`? The gold may be a whole solution that ends in one."""
    found = extract_answer(completion, strict)
    gold = extract_answer(str(answer), strict=True) or str(answer)
    return found is not None and equal(gold, found, strict)


def equal(gold, answer, strict=False):
    """Are two answers the same, as text or as mathematics? Strict: and is the second worked out?"""
    gold, answer = normalise(gold), normalise(answer)
    if not gold or not answer or max(len(gold), len(answer)) > LONG or gold.casefold() == answer.casefold():
        return gold.casefold() == answer.casefold() != ""
    choice = CHOICE.fullmatch(answer)
    if choice and not CHOICE.fullmatch(gold):  # "(C) 12" for the gold C, or for the gold 12
        answer = choice[1] if re.fullmatch(r"\(?[A-H]\)?", gold) else choice[2]
    units = [match[1] for match in (UNIT.search(gold), UNIT.search(answer)) if match]
    if len(units) == 2 and not abbreviates(*units):
        return False
    gold, answer = UNIT.sub("", gold), UNIT.sub("", answer)
    if bool(BASE.search(gold)) != bool(BASE.search(answer)):
        gold, answer = BASE.sub("", gold), BASE.sub("", answer)
    if strict and len(re.findall(r"\) ?\(", answer)) > len(re.findall(r"\) ?\(", gold)):
        return False  # not multiplied out
    percents = [""]
    if ("%" in gold) != ("%" in answer) and not any(text.isdigit() for text in (gold, answer)):
        percents = ["", "/100"]
    try:
        return any(same(read(gold.replace("%", p)), read(answer.replace("%", p)), strict) for p in percents)
    except OverflowError:  # an exact number too large to compare with a float
        return False


def abbreviates(unit, other):
    """Is one of two units short for the other, as hr is for hours?"""
    names = [re.sub("unit_|[^a-z]", "", name.lower()) for name in (unit, other)]
    short, long = sorted(names, key=len)
    letters = iter(long)
    return short[:1] == long[:1] and all(letter in letters for letter in short.rstrip("s"))


def same(gold, answer, strict):
    """Are two trees equal? An equation is also its right side; a gold one, if its left side is a name."""
    if "," in (gold[0], answer[0]):
        others = members(answer)
        for item in members(gold):
            partners = [other for other in members(answer) if same(item, other, strict)]
            others = [other for other in others if other not in partners]
            if not partners:
                return False
        return not others
    if isinstance(gold, Equation) and isinstance(answer, Equation):
        return same(gold.difference, answer.difference, strict)
    if isinstance(gold, Equation):
        return gold.name != "" and same(gold.right, answer, strict)
    if isinstance(answer, Equation):
        return same(gold, answer.right, strict)
    if isinstance(gold, Group) and isinstance(answer, Group):
        is_alike = gold.kind == answer.kind and len(gold.items) == len(answer.items)
        return is_alike and all(map(partial(same, strict=strict), gold.items, answer.items))
    if isinstance(gold, Group) or isinstance(answer, Group):
        return False
    if strict and answer.operators > gold.operators + 1:
        return False
    return all(map(close, gold.numbers, answer.numbers, range(4)))


def close(x, y, point):
    """Are two numbers equal, exactly or to nine digits? Where variables are negative, if both are real."""
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    if point > 1 and abs(x.imag) + abs(y.imag) > 1e-9:
        return True
    return cmath.isclose(x, y, rel_tol=1e-9, abs_tol=1e-12)
