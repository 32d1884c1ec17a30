"""
Whether an answer is right: find it in a completion, read it as mathematics, compare it with the
gold. Model text is data, never code. Any string is graded, without an exception and in
milliseconds: loops are linear in the text, and beyond LONG characters it is compared as text.

What counts as equal. Rational numbers agree exactly: 0.5 is 1/2, 0.33 is not 1/3. Roots, pi and
functions agree to nine digits; formulas agree in value at four points. Tuples and intervals keep
order and brackets; lists, sets, unions and both values of \\pm come in any order. Optional: units
(but two that are named must agree), money signs, degrees, the base of a number, the letter of a
choice, the "x =" of "x = 5", and the percent sign: 25% is 25, and is 1/4, but 700% is not 7.

Strict is for search and training: only a marked answer counts, and it must be worked out, with at
most one operator more than the gold, or a policy earns reward by boxing the question's formula.
Evaluation (strict=False) takes the last number where no answer is marked.
"""
import cmath
import math
import operator
import re
from collections import deque, namedtuple
from fractions import Fraction
from functools import partial
from itertools import islice
from numbers import Rational
from zlib import crc32

LONG = 400   # characters of an answer
BITS = 8192  # of an exact number


def respell(rules, text):
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


# ---- Finding the answer --------------------------------------------------------------------------

# Where a sentence is read for its answer, each ASCII character of its formulas is moved to
# Unicode's private area, so that no rule about words, commas and full stops meets them.
HIDE = {code: 0xE000 + code for code in range(128)}
SHOW = {0xE000 + code: code for code in range(128)}
N = r"[\d\ue000-\ue07f]"  # a digit, or a character of a formula

BOX = r"\\boxed ?\{((?:[^{}]|\{[^{}]*\})*)\}"
FILL = r"(?:[\s$}]|\\[()]|\\q?quad|\\text\{|[a-z] ?=)*"
CLEAN = [
    (r"[\u200b-\u200f\u2060\ufeff\xad\ue000-\uf8ff]", ""),  # zero-width, and what HIDE makes
    (r"<<[^<>]*>>", ""),  # GSM8K's calculator: <<3+4=7>>7
    (r"(?i)<(?:final_)?answer>", "answer: "),
    (r"(?i)\b(?:check|verify)(?:ing)? (?:\w+ )?answer", " "),  # "check our answer: 2 + 3 = 5"
    (r"\[/?[A-Z]{3,9}\]|<[A-Za-z/|][\w|]{0,40}>", " "),  # </s>, <|eot_id|>, [END]
    (rf"{BOX}(?:(?:{FILL}(?:,|and\b|or\b))+{FILL}{BOX})+",  # \boxed{2} and \boxed{3}
     lambda boxes: rf"\boxed{{{', '.join(re.findall(BOX, boxes[0]))}}}")]
# What announces an answer. {0,9} in place of * keeps the search linear, the first letter quick.
MARKER = re.compile(
    r"(?=[\\#a])(?:(?P<box>\\(?:boxed|fbox)\s{0,9})|"
    r"(?P<hashes>(?<!#)#{4,9}(?!#|\s{0,9}\d{1,2}[.):]\s{1,9}[A-Z*]))|"  # "#### 2. Add" is a heading
    r"(?P<words>answers?[\s*_]{0,9}(?:is|are)\b(?: (?:therefore|now|just))?[\s:*_]{0,9})|"
    r"(?P<colon>(?:(?<!/)answers?[\s*_]{0,9}[:=]|"
    r"(?:(?<=[#*])|(?<=[#*] )|(?<=final ))answer\b(?=[ *_]{0,9}[-\n$\\\d]))"
    r"[\s:*_]{0,9}(?:(?<=\n)[-•]\s)?))", re.IGNORECASE)  # the answer may be the item of a list
BRACE = re.compile(r"\\[\\{}]|[{}]")
BARE = re.compile(r"[-+.\d\\][^\s$]*")  # \boxed 5, but not "\boxed as you wished"
NUMBER = re.compile(  # the last one counts where no answer is marked
    r"\\[dtc]?frac\{-?[0-9]+\}\{[0-9]+\}|(?:(?<![\w)}])[-−])?\\?\$?"
    r"(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?\\?%?")
FORMULA = re.compile(  # in a sentence; but "$5 or $6" is money
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|\$(?=\S)((?:[^$\\]|\\.)+)(?<!\s)\$(?!\d)|"
    r"(\\[a-zA-Z]+(?: ?\{[^{}]*\})?)", re.DOTALL)
CLAUSE_END = re.compile(
    r"\n|(?<!\\)[.!?](?=\s|$)|;|,(?= (?!and\b|or\b)[a-z]{2})|"
    r",?\s(?:because|since|which|so|where|when|or about)\b|"
    rf" \((?=[a-z]{{2}})|(?<={N}) \((?=[\d\s+*/=$.×x-]+\))")  # 96 (48 + 48)
NAMES = ("arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|exp|log|ln|abs|sqrt|pi|hundred|thousand|"
         "million|billion|trillion|dozen|halves|thirds|tenths|hundredths|thousandths|squared|cubed|"
         "doubled|factorial|plus|minus|divided|less than|more than")  # they compute: no units
WORDS = re.compile(  # of a sentence, those apart that belong to a formula
    rf"((?:[\s,:]*(?<![\w\\])(?!(?:{NAMES}|[A-Z]+)\b)(?:[A-Za-z]{{2,}}(?:['’-][A-Za-z]+)*|"
    r"a(?= [a-z]))(?![\w(^{_]|(?: [A-Za-z]+)* ?[+*/=^<>]|(?: [A-Za-z]+)* - ))+)")
CHANGED = re.compile(  # words that make another number of the next, and quantities of two parts
    r"\b(?:not|never|isn['’]t|than|but|except|neither|nor|half|thirds?|quarters?|(?:fif|six)ths|"
    r"twice|double|triple|times|square|cube|root|power|sum|product|ratio|difference|multiple|"
    r"divisor|factor|reciprocal|negative|opposite|most|least|under|below|over|above|between|up to|"
    r"adding|subtracting|multiplying|dividing|larger|smaller|rounded)"
    rf"(?: (?:of|the|an?|or|equal|to))* \$?-?{N}|{N} (?:or (?:more|less|fewer)|at (?:mo|lea)st)\b|"
    rf"\d [a-z]+,? \$?\d|{N} [a-z]+,? and \$?{N}|(?:%|percent) of \$?{N}")
NO_ANSWER = re.compile(  # words behind "the answer is" that do not state it
    r"(?:\S+ ){3}|(?:the|an?|in|on|at|by|to|of|as|for|from|that|this|what|how|not|we|it|our|your|"
    r"given|found|shown|below|right|wrong|\w*correct|\w*valid|verified|confirmed|checked|"
    r"consistent|accurate|reasonable|sound)\b", re.IGNORECASE)
VARIABLE = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])")


def extract_answer(text, strict=False):
    """The answer behind the last marker, \\boxed{72} or "#### 72" or "The answer is 72.", or None.

    Passed over are markers with nothing behind them and boxes that never close (a cut completion).
    Words, as in "the answer is an integer", count where no other marker has an answer. Without a
    marker: None if strict, else the last number."""
    text = respell(CLEAN, text)
    end = len(text)
    words = None
    for marker in reversed(deque(MARKER.finditer(text), maxlen=30)):  # thirty empty ones: no answer
        if marker["box"]:
            answer = in_box(text, marker.end(), end)
            at_once = True
        else:
            answer, at_once = in_sentence(text[marker.end():end])
        if answer and (at_once or marker["colon"]):
            return answer
        if marker["words"]:
            words = words or answer
        end = marker.start()  # what reaches an unclosed box is unclosed: nothing is read twice
    if strict and words and CHANGED.search(words):  # "the sum of 3 and 4" announces the answer
        return None
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

    "36 + 36 = $72 dollars, because" has 72, True. A sentence that opens with words has its last
    formula or number: "the area is $2\\pi$." has 2\\pi, False. Where words change that number, the
    whole clause is the answer: "less than 72". A few words are one, too: "east"."""
    text = re.sub(r"\*\*|__|[`\"“”]", "", text.lstrip()[:LONG])
    text = FORMULA.sub(lambda match: match[match.lastindex].translate(HIDE), text)
    clause = CLAUSE_END.split(respell(SPOKEN, text), 1)[0]
    clause = " ".join(clause.split())
    parts = WORDS.split(clause)  # formula, words, formula, ..., words, formula
    formulas = [part for part in parts[::2] if re.search(rf"[A-Za-z]|{N}", part)]
    at_once = parts[0] in formulas
    if not formulas or not at_once and not re.search(r"\b[a-z]{2}", clause):
        answer = re.split("[,;]", clause)[0]  # "east, since" or "June 20"
        answer = "" if NO_ANSWER.match(answer) else answer
    elif CHANGED.search(clause):
        answer = clause
        at_once = False
    else:
        answer = formulas[0] if at_once else formulas[-1]
    answer = tidy(answer.translate(SHOW))
    left, _, right = answer.rpartition("=")
    if not VARIABLE.search(right) and (len(left.strip()) == 1 or not VARIABLE.search(left)):
        answer = tidy(right)  # else the equation is the answer
    return answer, at_once


def tidy(answer):
    """Without what surrounds it; a plain number also without "$" and thousands separators."""
    answer = answer.strip().lstrip(" }:,*_`\"“'").rstrip(" .,;:\\*_`\"”'")
    if re.fullmatch(r"-?\d*\.\d{40,}", answer):
        answer = answer.rstrip("0")
    if len(answer) > LONG:
        return answer
    while answer.endswith("}") and answer.count("{") < answer.count("}"):  # {The answer is 5}
        answer = answer[:-1].rstrip(" .,;:\\")
    plain = re.sub(r"\\?\$|(?<=\d),(?=\d{3}(?!\d))", "", answer).replace("−", "-")
    return plain if re.fullmatch(r"-?\d*\.?\d+", plain) else answer


# ---- One spelling for the many of LaTeX and plain text -------------------------------------------

def repeating(match):
    """0.1\\overline{3} is (13 - 1) / 90."""
    whole, start, digits = match.groups()
    return f"(({whole}{start}{digits}-0{whole}{start})/{'9' * len(digits)}{'0' * len(start)})"


# Rules (pattern, replacement), applied one after another.
SPOKEN = [
    (rf"\b(?:negative|minus) (?=\$?{N}|\\)", "-"),
    (r"(?<=\d) and a half\b", ".5"),
    (rf"(?<=[\da-z}}\ue000-\ue07f]) ?/ ?(?=(?:\\text\{{)?(?!(?:{NAMES})\b)(?:[a-z]{{4}}|day\b))",
     " per "),  # $18/hour
    (r"(?<=[\da-z]) [xX] (?=\$?\d)", " * "),  # 5 apples x 3
    (rf"(?<={N}),? (?:and|or) (?=\$?-?{N})", ", "),
    (r"^(?:In|For|With|If|When|Since|After|Given|On|At|By|From)\b[^,]*, ", "")]  # In $ABC$, ...
MATRIX = r"\{(?:[bpB]?(?:small)?matrix|array)\}"
STYLE = (r"\\(?:text\w*|math(?!bb)[a-z]+|[mh]box|operatorname|emph|underline|boxed|vec|bm|"
         r"boldsymbol)\s*")
LETTER = r"\{?[A-Za-z]\}?"
RULES = [
    # A matrix is a tuple of rows in brackets; a row of one entry is that entry, a column a tuple.
    (rf"\\begin{MATRIX}(?:\{{[lcr|]*\}})?", "(["),
    (rf"(?:\\\\|\\cr)?\s*\\end{MATRIX}", "])"),
    (r"\\\\\*?(?:\[[\d.]+ ?[a-z]{2}\])?|\\cr(?![a-z])|\\(?:tabular)?newline", "],["),
    ("&", ","),
    # What is not seen or does not matter: spaces, sizes, colours, money, styles.
    (r"\{([,:])\}", r"\1"),  # 10{,}080
    (r"(?<=\d)\\,(?=\d{3})|\\!\s*", ""),  # 10\,080 and 10,\!080
    (r"\\[,;: ]|~|\\q?quad(?![a-z])|\\(?:[hv]space|phantom)\{[^{}]*\}", " "),
    (r"\\(?:left|right|middle|[bB]igg?[lr]?|displaystyle|[lL]arge|bf|hline)(?![a-zA-Z])", ""),
    (r"\\(?:text)?color(?:box)? ?(?:\[\w*\])?\{[\w.,]*\}|\\?\$|\\[()\[\]]|[£€¢]", ""),
    (rf"(?<=[\d)}}])\s*(?!\\(?:mathbf|vec|bm|bold)){STYLE}"
     rf"\{{ *(?!(?:[ie]|and|or|{NAMES})\b)([A-Za-z][^{{}}]*)\}}",
     r" unit_\1 "),  # 60\text{ W}: a letter that is not marked is a variable
    (rf"{STYLE}\{{([^{{}}]*)\}}", r" \1 "),
    (rf"{STYLE}(?=\{{)", ""),
    # Degrees count inside a function alone: 90^\circ is 90.
    (r"\^?\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z])|\\degree)|°| (?:unit_)?degrees?\b", "°"),
    (r"(sin|cos|tan|cot|sec|csc)(\^\{?\d\}?)?\s*[({]?\s*([\d.]+)\s*°[)}]?", r"\1\2{\3\\degree}"),
    (r"°(?: *(?:unit_)?(?:[CF]|Celsius|Fahrenheit)\b)?", " "),
    (r"(sin|cos|tan)\s*\^\s*\{\s*-1\s*\}", r"arc\1 "),
    (r"\\?log\s*_\s*(\{[^{}]*\}|\w)", r"\\frac{1}{\\ln \1}\\ln "),
    # Numbers.
    (r"(?<=[\d)}])\s*(?:\\approx|≈).*", ""),  # 1/3 \approx 0.33
    ("²", "^2"), ("³", "^3"),
    (r"\\%|\bpercent\b", "%"),
    (r"(?<=\d) *\( *([a-z]{3,}) *\) *$", r" \1"),  # 72 (dollars)
    (r"(?<=\d)(?=[A-Za-z]{4,}|(?:[ckmap]m|[km]g|ml|ft|lbs?|hrs?)\b)", " "),  # 12inches
    (r"\\[dtc]?frac *(\d|\{[^{}]*\}) *(\d)", r"\\frac{\1}{\2}"),  # \frac43
    (r"(?<![\w.^])(\d+)\s*(\\[dtc]?frac\{\d+\}\{\d+\}|(?<= )\d+\s*/\s*\d+)", r"(\1+\2)"),  # 1 3/4
    (r"\{(\w+) *\\choose *(\w+)\}|\\[dt]?binom\{(\w+)\}\{(\w+)\}",
     r"(\1\3!/(\2\4!(\1\3-\2\4)!))"),
    (r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}", repeating),
    (r"(\d)[eE]([-+]?\d)", r"\1*10^\2"),
    (r"(\^(?:\{[^{}]*\}|\d+ )|!)\s*(?=\d)", r"\1*"),  # 2^3 3^4
    (r"\s*_\s*\{\s*\(?(\w+)\)?\s*\}", r"_\1"),
    (r"^\s*\((\w+)\)(?=_)", r"\1"),  # (52)_8
    # Lists and sets.
    (r",?\s+(?:and|or)\s+(?![a-z]{2})", ", "),
    (r"\\\{\s*\\\}", r"\\emptyset "),
    (r"\\[lr]?vert(?![a-z])", "|"),
    (r"^\\\{\s*[a-z]\s*(?:\\in ?\\mathbb\{?R\}? ?)?(?:\\mid|\||:)(.*)\\\}$", r"\1"),  # \{x: x > 4\}
    (r"\\mathbb\s*\{?R\}?|ℝ|[Aa]ll real numbers", r"(-\\infty,\\infty)"),
    (r"^\s*[a-zA-Z]\s*(?:\\in(?![a-z])|∈)", ""),  # x \in [0, 1]
    (r"^\((?:\\?[a-z]+, ?)+\\?[a-z]+\) ?= ?(?=\()", ""),  # (x, y) = (3, 10)
    (r"^\s*[a-z] ?(?:\\neq?(?![a-z])|≠)(.+)$", r"(-\\infty,\1),(\1,\\infty)"),  # x \ne 6
    (r"^([(\[][^,]*,)([^,]*[)\]]) *(?:\\setminus|-) *\\\{([^,]*)\\\}$", r"\1\3),(\3,\2"),
    (r"^-([a-z])\s*(<|>|\\[lg]eq?(?![a-z])|≤|≥)(.*)$", r"-(\3) \2 \1"),  # -x > -4
    # Absolute values, and what does not commute.
    (r"\|([^|]*)\|", r"\\abs{\1}"),
    (r"(?<![\w\\])([fgh])(?=\()", r"\1\\of "),
    (rf"(?<![\w\\])({LETTER}) *(?:\\times(?![a-z])|×) *(?={LETTER}(?!\w))", r"\1\\cross ")]
SYNONYMS = {}  # of single tokens
for token, others in {
        "-": "− – — ‐ ‑", "*": r"\cdot \times \ast × · ⋅", "/": r"\div ÷ \over", ":": r"\colon",
        "(": r"\langle", ")": r"\rangle", r"\{": r"\lbrace", r"\}": r"\rbrace", "<": r"\lt",
        ">": r"\gt", "<=": r"\le \leq \leqslant ≤", ">=": r"\ge \geq \geqslant ≥",
        "=": r"\approx ≈ \equiv ≡", ",": r"\cup ∪", r"\frac": r"\dfrac \tfrac \cfrac",
        r"\sqrt": "√ sqrt", r"\infty": "∞ infinity Infinity", r"\emptyset": r"∅ \varnothing",
        r"\pi": "π pi", r"\theta": "θ", r"\setminus": r"\smallsetminus \backslash"}.items():
    SYNONYMS.update(dict.fromkeys(others.split(), token))
TOKEN = re.compile(rf"\d+(?:\.\d*)?|\.\d+|\\[a-zA-Z]+|\\.|<=|>=|[A-Za-z]{{4,}}|{NAMES}|[A-Z]{{2,}}|"
                   r"[A-Za-z]_(?:\d+|[A-Za-z])|\S")  # AB is one name, xy is x times y
# A unit stands behind a number: SHORT, a word of four letters or more, or what was marked unit_.
NUMERALS = "one|two|three|four|five|six|seven|eight|nine|ten"  # "less than two" is no unit
SHORT = (r"(?:[cmk]m|[km]g|[kmg]?hz|[kmgt]b|[km]?wh|in|ft|yd|mi|lb|oz|ml|pt|qt|gal|sec|min|hr|day|"
         r"wk|yr|cup|men|egg|pen)s?|[ap]m|mph|[cmk]?m/s|km/h|of|per|an?|for")
UNIT = re.compile(
    rf"(?:(?<=[\d)}}\]i%!])|(?<=llion|usand|ndred|dozen)) (?!.*\b(?:{NUMERALS})\b)"
    r"(?:(?:unit_)?(?:square|sq|cubic|cu)\.? )*"
    rf"((?:unit_[A-Za-z.]+|(?:{SHORT})\b|(?!(?:{NAMES})\b)[A-Za-z]{{4,}})"
    rf"(?:[ ./]+(?!(?:{NAMES})\b)[A-Za-z_]+)*)(?: ?\^\{{?([23])\}}?| squared)?", re.IGNORECASE)
CHOICE = re.compile(r"\(([A-H])\) (.+)")  # (C) 12
BASE = re.compile(r"(?<=\d)_\d+$|\s*\(? ?\\?[pb]?mod ?[{( ]*\d+[})]*$")  # 4210_5, 5 \pmod{17}


def normalise(answer):
    """One spelling."""
    answer = tidy(answer)
    if len(answer) > LONG:
        return answer
    answer = respell(RULES, respell(SPOKEN, answer))
    if not re.search(r"[(\[]|\\\{", answer):  # 1,250 is a number, (1,250) a pair
        answer = re.sub(r"(?<=\d)[, ](?=\d{3}(?!\d))", "", answer)
    answer = " ".join(answer.split()).rstrip(" .,;:")
    if re.match(r"[A-Za-z]{2,} .*\d", answer):  # \boxed{\text{There are 45 pens left}}
        answer = in_sentence(answer)[0] or answer
    return answer


# ---- Reading: tokens -> tree ---------------------------------------------------------------------

Value = namedtuple("Value", "numbers name", defaults=[""])  # a number, or a formula at four points
Group = namedtuple("Group", "kind items")  # kind "," in any order; "(]" and the like in this one
Equation = namedtuple("Equation", "name right difference")  # name if its left side is a variable
Operator = namedtuple("Operator", "left right function")  # how tightly it binds on each side


class Reader:
    """Reads tokens and computes on the way. ValueError or ArithmeticError if they mean nothing."""

    def __init__(self, tokens):
        self.rest = ["", *reversed(tokens)]  # the next token stands last

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
            sides = [self.expression(0)]
            signs = []
            while self.rest[-1] in ("=", "<", ">", "<=", ">="):
                signs.append(self.rest.pop())
                sides.append(self.expression(0))
            trees += members(related(sides, signs))
        names = {tree.name for tree in trees if isinstance(tree, Equation)} - {""}
        if len(names) == len(trees) > 1:  # x = 3, y = 10 is the pair (3, 10)
            return Group("()", [tree.right for tree in trees])
        return joined(trees)

    def expression(self, level):
        """Reads on while operators bind tighter than `level`."""
        left = self.operand()
        while True:
            sign = self.rest[-1]
            name = sign.lstrip("\\")
            if sign in OPEN or name[:1].isalpha() and sign not in OPERATORS:
                sign = "before a function" if name in FUNCTIONS else "beside"
            if self.skip("!"):
                left = apply(factorial, left)
            elif sign not in OPERATORS or OPERATORS[sign].left <= level:
                return left
            else:
                self.skip(sign)
                right = self.expression(OPERATORS[sign].right)
                left = apply(OPERATORS[sign].function, left, right)

    def operand(self):
        """A number, a name, a bracket, a function with its argument."""
        token = self.rest.pop()
        name = token.lstrip("\\")
        if token in ("-", "+"):
            return apply(operator.mul, constant(int(token + "1")), self.expression(4))
        if token[:1].isdigit() or token[:1] == ".":
            return constant(Fraction(token))
        if token in OPEN:
            inside = self.listing()
            close = self.rest.pop()
            is_tuple = inside[0] == "," and token in "(["
            if close not in CLOSE:
                raise ValueError("unbalanced")
            return Group(token + close, inside.items) if is_tuple else inside
        if token == r"\frac":
            return apply(operator.truediv, self.operand(), self.operand())
        if token == r"\sqrt":
            degree = self.operand() if self.rest[-1] == "[" else constant(Fraction(2))
            return apply(power, self.operand(), apply(operator.truediv, constant(1), degree))
        if name in FUNCTIONS:
            exponent = self.operand() if self.skip("^") else constant(1)
            argument = self.operand() if self.rest[-1] in OPEN else self.expression(2)
            return apply(power, apply(FUNCTIONS[name], argument), exponent)
        if name in CONSTANTS:
            return constant(CONSTANTS[name])
        if name[:1].isalpha():
            return variable(name)
        raise ValueError("no expression")


def joined(trees):
    return trees[0] if len(trees) == 1 else Group(",", trees)


def members(tree):
    return tree.items if tree[0] == "," else [tree]


def related(sides, signs):
    """The tree of an equation; of an inequality, as the interval where it holds."""
    names = [getattr(side, "name", "") for side in sides]  # of variables, "" of other expressions
    if not signs:
        return sides[0]
    if set(signs) <= {">", ">="} or set(signs) == {"="} and names[-1] and not names[0]:  # 5 = x
        return related(sides[::-1], [sign.replace(">", "<") for sign in signs[::-1]])
    if set(signs) == {"="}:
        difference = apply(operator.sub, sides[0], sides[-1]).numbers
        scaled = [number / (difference[0] or 1) for number in difference]
        return Equation(names[0], sides[-1], Value(scaled))
    if len(sides) == 2 and names[0]:
        return related([constant(-INFINITY), *sides], ["<", *signs])
    if len(sides) == 2 and names[1]:
        return related([*sides, constant(INFINITY)], [*signs, "<"])
    if len(sides) == 3 and names[1] and set(signs) <= {"<", "<="}:
        brackets = {"<": "()", "<=": "[]"}
        return Group(brackets[signs[0]][0] + brackets[signs[1]][1], sides[::2])
    return Group(" ".join(signs), sides)


def read(answer):
    """The tree of an answer; of both where it has \\pm."""
    trees = []
    for variant in {re.sub(r"\\pm|±", sign, answer) for sign in "+-"}:
        reader = Reader([SYNONYMS.get(token, token) for token in TOKEN.findall(variant)])
        try:
            trees += members(reader.listing())
            if reader.rest != [""]:
                raise ValueError("more than an expression")
        except (ValueError, ArithmeticError, RecursionError):
            return Group("".join(answer.split()).casefold(), [])
    return joined(trees)


# ---- Computing: at four points; at two of them half of the variables are negative ----------------

def constant(number):
    return Value([number] * 4)


def variable(name):
    a, b = [Fraction(crc32(f"{name}{k}".encode()) % 1999 + 1, 64) for k in range(2)]
    sign = 1 - 2 * (ord(name[-1]) % 2)  # of x and y one is negative: sqrt(x) sqrt(y) is sqrt(xy)
    return Value([a, b, a * sign, -b * sign], name)


def apply(function, *values):
    """function(values), point by point."""
    if not all(isinstance(value, Value) for value in values):
        raise ValueError("a tuple, a list or an equation is no number")
    numbers = list(map(function, *[value.numbers for value in values]))
    if max(map(bits, numbers)) > BITS:
        raise ValueError("too large")
    return Value(numbers)


def bits(number):
    """The size of an exact number; of a float, 0 where it is finite."""
    if isinstance(number, Rational):
        return max(number.numerator.bit_length(), number.denominator.bit_length())
    return 0 if cmath.isfinite(number) else math.inf


def power(base, exponent):
    if isinstance(base, Rational) and isinstance(exponent, Rational) and exponent.denominator == 1:
        if abs(exponent) * bits(base) <= BITS:
            return Fraction(base) ** int(exponent)
    return complex(base) ** complex(exponent)


def factorial(n):
    if not isinstance(n, Rational) or n.denominator != 1 or not 0 <= n <= 170:
        raise ValueError("no factorial, or too large")
    return Fraction(math.factorial(int(n)))


def opaque(x, y):
    """Of an operation such as A \\setminus B, nothing is known but that it does not commute."""
    return cmath.e * x * x + cmath.pi * y


INFINITY = 10 ** 300
FUNCTIONS = {"sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "abs": abs,
             "cot": lambda z: 1 / cmath.tan(z), "sec": lambda z: 1 / cmath.cos(z),
             "csc": lambda z: 1 / cmath.sin(z),
             "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan, "exp": cmath.exp,
             "ln": cmath.log, "log": cmath.log10}
CONSTANTS = {"pi": cmath.pi, "e": cmath.e, "i": 1j, "infty": INFINITY, "degree": cmath.pi / 180,
             "hundred": 100, "thousand": 1000, "million": 10 ** 6, "billion": 10 ** 9,
             "trillion": 10 ** 12, "dozen": 12, "halves": Fraction(1, 2), "thirds": Fraction(1, 3),
             "tenths": Fraction(1, 10), "hundredths": Fraction(1, 100),
             "thousandths": Fraction(1, 1000)}
OPERATORS = {"+": Operator(1, 1, operator.add), "-": Operator(1, 1, operator.sub),
             "*": Operator(2, 3, operator.mul), "/": Operator(2, 3, operator.truediv),
             "beside": Operator(3, 3, operator.mul),             # 1/2x is (1/2)x,
             "before a function": Operator(2, 3, operator.mul),  # and sin x cos y (sin x)(cos y)
             "^": Operator(6, 5, power), r"\of": Operator(8, 8, opaque),
             ":": Operator(1, 1, opaque), r"\mid": Operator(1, 1, opaque),
             r"\setminus": Operator(1, 1, opaque), r"\cross": Operator(1, 1, opaque)}
OPEN = ("(", "[", "{", r"\{")
CLOSE = (")", "]", "}", r"\}")


# ---- Comparing -----------------------------------------------------------------------------------

def is_correct(completion, answer, strict=False):
    """Does a completion end in the gold `answer`? The gold may be a solution that ends in one."""
    found = extract_answer(completion, strict)
    gold = extract_answer(str(answer), strict=True) or str(answer)
    if found is None or not equal(gold, found):
        return False
    if not strict:
        return True
    signs = 1 + (r"\pm" in gold)  # written out, it has each operator twice, and one sign more
    parts = len(re.findall(r",|\b(?:and|or)\b", found))
    return operators(found) <= signs * (operators(gold) + signs) - signs + 1 + parts


def is_solved(text, problem):
    """Whether a completion solves a problem: what the search, training and scores ask.

    text      of a completion, in the search of a whole solution
    problem   every field of its data file. A grader of another kind changes this function, and
              the next two where its answers are no text. `extract_answer` leaves out a unit that
              stands behind a number outside of a box.
    """
    return is_correct(text, problem["answer"], strict=True)


def is_gradable(problem):
    """Whether a problem's own answer would be taken for right, were it given."""
    return is_correct(f"\\boxed{{{problem['answer']}}}", problem["answer"])


def states_answer(step):
    """Whether a step announces an answer and states it: a heading alone does not."""
    return extract_answer(step, strict=True) is not None


def operators(answer):
    """How many operators and brackets are left to work out, those of numeric exponents apart."""
    left, _, right = answer.rpartition("=")
    value = right
    if left and re.fullmatch(r"\s*[A-Za-z]\s*", right):  # 7 * 8 = x
        value = left
    value = "".join(SYNONYMS.get(character, character) for character in value)
    value = re.sub(r"\^\{?[\d/]+\}?", "", value)
    return len(re.findall(r"[+*/]|(?<!\\)!|(?<=[\w)}])\s*-|(?:(?<![a-z])|(?<=left))[(\[]|"
                          r"\\(?:[dtc]?frac|[dt]?binom|cdot|ast|times|div|over)(?![a-z])", value))


def equal(gold, answer):
    """Are two answers the same, as text or as mathematics?"""
    gold = normalise(gold)
    answer = normalise(answer)
    is_same = gold.casefold() == answer.casefold()
    if is_same or "" in (gold, answer) or max(len(gold), len(answer)) > LONG:
        return is_same and gold != ""
    choice = CHOICE.fullmatch(answer)
    if choice and not CHOICE.fullmatch(gold):  # "(C) 12" for the gold C, or for the gold 12
        answer = choice[1] if re.fullmatch(r"\(?[A-H]\)?", gold) else choice[2]
    units = [match for match in (UNIT.search(gold), UNIT.search(answer)) if match]
    names = sorted([unit[1] for unit in units], key=len)
    if len(names) == 2 and not abbreviates(*names):
        return False
    if {"2", "3"} == {unit[2] for unit in units}:  # of an area and a volume
        return False
    gold = UNIT.sub("", gold)
    answer = UNIT.sub("", answer)
    if bool(BASE.search(gold)) != bool(BASE.search(answer)):
        gold = BASE.sub("", gold)
        answer = BASE.sub("", answer)
    readings = [""]  # of the percent sign
    if "%" in gold + answer and not gold.isdigit() and not answer.isdigit():
        readings.append("/100")
    try:
        return any(same(read(gold.replace("%", p)), read(answer.replace("%", p))) for p in readings)
    except OverflowError:  # an exact number too large to compare with a float
        return False


def abbreviates(unit, other):
    """Is a unit short for another, as hr is for hours?"""
    short, long = [re.sub("unit_|[^a-z]", "", name.lower()) for name in (unit, other)]
    letters = iter(long)
    return short[:1] == long[:1] and all(letter in letters for letter in short.rstrip("s"))


def same(gold, answer):
    """Are two trees equal? An equation is also its right side; a gold one if its left is a name."""
    if "," in (gold[0], answer[0]):
        golds = members(gold)
        answers = members(answer)
        is_found = all(any(map(partial(same, item), answers)) for item in golds)
        return is_found and all(any(map(partial(same, answer=item), golds)) for item in answers)
    if isinstance(gold, Equation) and isinstance(answer, Equation):
        return same(gold.difference, answer.difference)
    if isinstance(gold, Equation):
        return gold.name != "" and same(gold.right, answer)
    if isinstance(answer, Equation):
        return same(gold, answer.right)
    if isinstance(gold, Value) and isinstance(answer, Value):
        return all(map(close, gold.numbers, answer.numbers, range(4)))
    is_alike = gold[0] == answer[0] and len(gold.items) == len(answer.items)
    return is_alike and all(map(same, gold.items, answer.items))


def close(x, y, point):
    """Are two numbers equal? What is not real where variables are negative does not count."""
    if isinstance(x, Rational) and isinstance(y, Rational):
        return x == y
    if point > 1 and abs(x.imag) + abs(y.imag) > 1e-9:
        return True
    return cmath.isclose(x, y, rel_tol=1e-9, abs_tol=1e-12)
