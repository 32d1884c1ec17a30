"""
Tests of the grader: which answer is found, which answers are equal, and that no text breaks it.

The tables are what real models wrote, or what other graders get wrong. A row of KINDS stands for
a kind of mistake, told in the comment above it.
"""
import time

import pytest
from hypothesis import example, given, settings, strategies as st

from grade import equal, extract_answer, is_correct, states_answer


# ---- Which answer is found -----------------------------------------------------------------------

FOUND = [  # completion, its answer
    # the last marker, of whatever kind
    (r"First \boxed{3}, no: \boxed{5}.", "5"),
    (r"\boxed{3}. Wait, the answer is 5.", "5"),
    ("The answer is 3.\n#### 5", "5"),
    (r"#### 3" "\n" r"so $\boxed{5}$", "5"),
    (r"The answer is $\boxed{5}$, which takes 3 days.", "5"),
    (r"We get \boxed{5}. I have checked that the answer is correct.", "5"),
    # boxes
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\fbox{7}", "7"),
    (r"\boxed 5.", "5"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    ("\\boxed{\n 12.\n}", "12"),
    (r"\boxed{\text{east}}", r"\text{east}"),
    (r"The answer is 5. \boxed{7", "5"),  # cut off: no marker
    (r"The answer is 5. \boxed{}", "5"),  # empty: no marker
    (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed{The answer is 5}", "5"),
    # ####
    ("#### 10.", "10"),
    ("#### Final Answer\n10", "10"),
    ("####72", "72"),
    ("#### $1,250", "1250"),
    ("#### -3 degrees", "-3"),
    ("#### 5 because 2 + 3 = 5", "5"),
    # "answer is"
    ("The answer is 38.", "38"),
    ("the final ANSWER IS: 38", "38"),
    ("**Answer:** 38", "38"),
    ("**Final Answer**: **38** apples", "38"),
    ("The final answer is:\n\n38\n", "38"),
    ("The answer is 36 + 36 = 72", "72"),
    ("The answer is 5 * 2 = $10 dollars.", "10"),
    ("The answer is 20 apples + 16 apples = 36 apples.", "36"),
    ("The answer is 12 apples, because 3 x 4 = 12 and 5 are green.", "12"),
    ("The answer is 12 (since 3 * 4 = 12).", "12"),
    ("The answer is $10 a week", "10"),
    ("The answer is $5.00. They spent $7.", "5.00"),
    ("The answer is 1,234.50.", "1234.50"),
    ("The answer is −7.", "-7"),
    ("The answer is negative 7.", "-7"),
    ("The answer is x = 5.", "5"),
    ("The answer is $y = 2x + 3$.", "y = 2x + 3"),
    (r"The answer is $\frac{1}{2}$.", r"\frac{1}{2}"),
    (r"The answer is \(\frac{1}{2}\), that is 50%.", r"\frac{1}{2}"),
    ("The answer is\n\\[\n\\sqrt{2}\n\\]", r"\sqrt{2}"),
    ("The answer is therefore equal to 12.", "12"),
    ("Answer: Janet makes $18 every day.", "18"),
    ("the answer is: (A)", "(A)"),
    ("The answer is Evelyn, since she is fastest.", "Evelyn"),
    ("The answer is June 20.", "June 20"),
    ("The answer is 25%.", "25%"),
    ("The answer is <<3+5=8>>8.", "8"),
    ("Answer: The total, 18.", "18"),
    (r"\boxed{3.14}, which is the final answer to 2 decimal places.", "3.14"),
    ("The answer is 18. This final answer uses 3 facts.", "18"),
    (r"So it is $\boxed{44}$. We may check our answer: $17 \cdot 44 = 748$.", "44"),
    (r"\boxed{12}, for 24 points/answer = 12", "12"),
    ("The answer is 38\nQuestion: what is 3 + 4?", "38"),
]
NO_MARKER = [
    "", "   ", "I do not know.", "so 5 + 3 = 8", "The answer is", "####", "boxed", "$", "\ud800",
    "\\boxed{", "\\boxed{5", "\\boxed{{5}", "Let me use \\boxed as you wished",
]
LAST_NUMBER = [
    ("so 5 + 3 = 8.", "8"),
    ("It costs $1,250.", "1250"),
    ("from 10 to -3", "-3"),
    ("10-3", "3"),
    ("half: 1/2", "1/2"),
    ("about .5", ".5"),
]
# A step that only announces its answer was taken for the end of a solution, and the teacher that
# wrote the answer one step later was graded wrong.
ANNOUNCED = [
    "The answer is:", "**Final Answer:**", "**Final Answer**", "#### Step 1", "#### 2. Add them up",
    "#### Step 1: add 3 and 4", "Thus the answer is the sum of 3 and 4:", "So the answer is",
    "The answer is given by", "This shows that the answer is correct.", "\\boxed{}",
    "Round the final answer to the nearest 10.", "We compute the final answer by adding 3 and 4.",
    "The answer is found by adding 3 and 4", "The answer is the larger of 3 and 4",
    "## Answer choices",
]
STATED = ["The answer is 5.", "#### 5", "so \\boxed{5}", "**Final Answer:** east"]


@pytest.mark.parametrize("completion, answer", FOUND)
def test_finds_the_answer(completion, answer):
    assert extract_answer(completion, strict=True) == answer
    assert extract_answer(completion) == answer


@pytest.mark.parametrize("text", NO_MARKER)
def test_without_a_marker_strict_finds_nothing(text):
    assert extract_answer(text, strict=True) is None


@pytest.mark.parametrize("text, number", LAST_NUMBER)
def test_without_a_marker_evaluation_takes_the_last_number(text, number):
    assert extract_answer(text) == number
    assert is_correct(text, number)
    assert not is_correct(text, number, strict=True)


@pytest.mark.parametrize("step", ANNOUNCED)
def test_an_announcement_is_no_answer(step):
    assert not states_answer(step)


@pytest.mark.parametrize("step", STATED)
def test_a_step_states_its_answer(step):
    assert states_answer(step)


# ---- Which answers are equal ---------------------------------------------------------------------


RIGHT = [  # gold, then answers
    ("72", ["72.0", "72.", r"\text{72}", r"72 \text{ apples}", "x = 72", "72 = x",
        "36 + 36 = 72", "36 + 36", "x + y = 72", r"\frac{144}{2}", "(72)", r"7.2 \times 10^1"]),
    ("... #### 72", ["72", r"\$72", "72 dollars", r"72\%"]),
    ("1,234", ["1234", "1{,}234", r"1,\!234", r"1\,234", "1 234", r"\$1,234.00"]),
    ("$5.00", ["5", r"\$5", r"5 \text{ dollars}"]),
    ("-3", ["−3", "- 3", "-3.0"]),
    ("100000000000000000001", ["100,000,000,000,000,000,001"]),
    (".0000672", [r"6.72 \times 10^{-5}", "6.72e-5", "0.0000672"]),
    ("1/2", ["0.5", ".50", r"\frac12", r"\dfrac{1}{2}", r"\tfrac 1 2", r"\frac{2}{4}", "2^{-1}",
        r"50\%"]),
    (r"-\frac{3}{4}", [r"\frac{-3}{4}", r"\frac{3}{-4}", "-3/4", "-0.75"]),
    (r"1 \frac{3}{4}", [r"\frac{7}{4}", "1.75", r"1\frac34", "1 3/4"]),
    (r"\frac{1}{3}", [r"0.\overline{3}", r"\frac{1}{3} \approx 0.33", r"1:3 = \frac13"]),
    (r"25\%", ["25", r"25\%", "0.25", r"\frac{1}{4}", r"25 \text{ percent}"]),
    (r"\$18.90", ["18.90", "18.9", r"\$18.90", r"18.90 \text{ dollars}"]),
    (r"11,\! 111,\! 111,\! 100", ["11111111100", r"11,\! 111,\! 111,\! 100", "11,111,111,100"]),
    (r"2\sqrt{3}", [r"\sqrt{12}", r"2\sqrt3", r"2 \cdot 3^{1/2}", "2*sqrt(3)", "2√3",
        r"\frac{6}{\sqrt{3}}"]),
    (r"\frac{\sqrt{3}}{3}", [r"\frac{1}{\sqrt{3}}", r"\frac{1}{3}\sqrt 3"]),
    (r"\sqrt[3]{2}", ["2^{1/3}", r"2^{\frac13}"]),
    (r"12\pi", [r"12 \pi \text{ cm}", r"π \cdot 12", "12pi"]),
    (r"\frac{\pi}{4}", [r"\pi/4", r"\frac14\pi", r"\arctan 1"]),
    ("120", ["5!", r"\binom{10}{3}"]),
    (r"90^\circ", ["90", r"90^{\circ}", "90°", r"90 \text{ degrees}"]),
    (r"15\mbox{ cm}^2", ["15", "15 cm^2", r"15\ \text{cm}^2", "15 cm²",
        r"15 \text{ square centimeters}"]),
    (r"864 \mbox{ inches}^2", [r"864\text{ in}^2", "864 square inches"]),
    ("5", ["5 miles per hour", r"5\text{ m/s}", r"5\,\mathrm{km}", "5km"]),
    ("10:30", [r"10:30 \text{ a.m.}", r"10\!:\!30"]),
    ("4210_{5}", ["4210_5", "4210", "(4210)_5", r"4210_{\text{5}}"]),
    ("6 - 5i", ["6-5i", "-5i + 6", r"6 - 5 \cdot i"]),
    ("p - q", ["-q+p", "p-q"]),
    ("x^2+2x+1", ["(x+1)^2", "1 + 2x + x^{2}", "x(x+2)+1"]),
    (r"\frac{x+1}{2}", [r"\frac{1}{2}(x+1)", "0.5x + 0.5"]),
    (r"30x\sqrt{7x}", [r"30\sqrt{7x^3}"]),
    ("3x^{2/3}", [r"3\sqrt[3]{x}^2"]),
    (r"\cot x", ["cot x", "cot(x)", r"\frac{\cos x}{\sin x}", r"\frac{1}{\tan(x)}"]),
    (r"2 \sin b \cos a", [r"2\cos a\sin b"]),
    (r"\tan^2 y + 1", [r"\sec^2 (y)"]),
    (r"\log_2 3", [r"\frac{\ln 3}{\ln 2}"]),
    (r"\sin \theta", ["sin θ", r"\sin(\theta)"]),
    ("2^{2005}", [r"2 \cdot 2^{2004}"]),
    (r"e^{i\pi/3}", [r"e^{\pi i/3}", r"\frac{1+i\sqrt{3}}{2}"]),
    (r"\frac{x^2}{4}+\frac{y^2}{9}=1", ["9x^2+4y^2=36"]),
    ("x=5", ["5", "x = 5", "5 = x", "x = 10/2 = 5"]),
    ("y = 2x + 3", ["y=3+2x", "2x - y + 3 = 0", "2y = 4x + 6", "2x+3"]),
    ("5x - 7y + 11z + 4 = 0", ["10x-14y+22z+8=0", "5x - 7y + 11z = -4"]),
    (r"\left( 3, \frac{\pi}{2} \right)", [r"(3, \pi/2)", r"(3,\tfrac{\pi}2)",
        r"(r,\theta) = (3, \frac{\pi}{2})"]),
    ("3, 5, 7", ["7, 5, 3", "3,5,7", r"\{3, 5, 7\}", r"3, 5 \text{ and } 7",
        "x = 3, x = 5, x = 7"]),
    ("1,-2", ["-2, 1", r"x = 1 \text{ or } x = -2"]),
    (r"1 \pm \sqrt{19}", [r"1+\sqrt{19}, 1-\sqrt{19}", r"x = 1 \pm \sqrt{19}",
        r"\{1-\sqrt{19}, 1+\sqrt{19}\}"]),
    (r"\{1\pm\sqrt{5},-2\}", [r"\{-2, 1+\sqrt{5}, 1-\sqrt{5}\}", r"-2, 1 \pm \sqrt5"]),
    (r"(3,\pm 2)", ["(3,-2), (3,2)"]),
    ("(3,4]", [r"\left(3, 4\right]", r"3 < x \le 4", r"x \in (3,4]"]),
    (r"x \in [-2,7]", ["[-2,7]", r"-2 \leq x \leq 7", r"7 \ge x \ge -2"]),
    (r"(-\infty, 2)", ["x < 2", "2 > x", "(-∞, 2)"]),
    (r"(-\infty, 2) \cup (3, \infty)", [r"(3,\infty)\cup(-\infty,2)", r"x<2 \text{ or } x>3",
        r"(-\infty, 2) \cup (3, +\infty)"]),
    (r"\begin{pmatrix} -2 \\ 1/5 \end{pmatrix}", [r"\begin{bmatrix}-2\\\frac15\end{bmatrix}",
        r"\left(\begin{array}{c}-2\\0.2\\\end{array}\right)", "(-2, 1/5)"]),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", [r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"]),
    (r"\text{Evelyn}", ["Evelyn", "evelyn", r"\textbf{Evelyn}", r"\textbf{\text{Evelyn}}",
        r"\mathrm{Evelyn}"]),
    (r"\text{(C)}", ["C", "(C)", r"\text{C}", r"\textbf{(C)}\ 12"]),
    ("12", [r"\textbf{(C)}\ 12"]),
    (r"\text{even}", ["even", "Even"]),
    (r"\text{no solution}", ["No solution"]),
    (r"\text{June 20}", ["June 20"]),
    (r"\emptyset", [r"\varnothing", r"\{\}"]),
]

WRONG = [  # gold, then answers
    ("72", ["-72", "7", "722", "27", "72.5", "7,2", "72x", r"72\pi", r"\sqrt{72}", "72i",
        r"\pm 72", "72, 73", r"\frac{1}{72}", "x", "0.72", "7 2", "x = 27", r"\text{no}",
        "70 + 72 = 142"]),
    ("... #### 72", ["27"]),
    ("12", ["1/2", "1,2", "1 2", "21", "(1,2)", "12^2"]),
    ("5,000", ["5", "5.000"]),
    ("1,234", ["1.234", "234"]),
    ("1/3", ["0.3333", "0.33", "3"]),
    ("0.33", ["1/3"]),
    ("0.1", ["0.10000000000000000001"]),
    ("100000000000000000001", ["100000000000000000000"]),
    ("2^{100}", ["2^{100}+1", "2^{101}"]),
    ("9^{9^9}", ["9^{9^8}", "0"]),
    (r"\pi", ["3.14", r"\frac{22}{7}"]),
    (r"\frac{3}{4}", [r"\frac{4}{3}", r"-\frac{3}{4}", "34", "3,4"]),
    (r"1 \frac{3}{4}", [r"\frac{13}{4}", r"\frac{3}{4}", "13/4"]),
    ("25", ["0.25"]),
    (r"25\%", [r"0.25\%", "2.5", "2500"]),
    (r"5.4 \text{ cents}", [r"5.4 \text{ dollars}", r"54 \text{ cents}"]),
    (r"30 \text{ minutes}", [r"30 \text{ hours}"]),
    (r"10:30 \text{ a.m.}", [r"10:30 \text{ p.m.}", r"10:03 \text{ a.m.}"]),
    ("3:2", ["2:3"]),
    ("52_8", ["52_9", "42"]),
    ("6-5i", ["6+5i", "1", "6-5"]),
    ("p-q", ["q-p", "pq", "p"]),
    ("x^2+1", ["x^2-1", "x^2", "y^2+1"]),
    ("2x", ["2", "x^2", "2y"]),
    (r"\sin 2x", [r"2 \sin x", r"\sin 2"]),
    (r"\log 2", [r"\ln 2"]),
    (r"\sqrt[3]{8}", [r"\sqrt{8}"]),
    ("y=2x+3", ["y=2x-3", "x=2y+3", "3", "y = 2x"]),
    ("2x - y + 3 = 0", ["0", "2x - y - 3 = 0"]),
    ("x^2+y^2=9", ["9", "x^2+y^2=3"]),
    ("x=5", ["y=5"]),
    ("(3,4)", ["(4,3)", "[3,4)", "(3,4]", "3", r"\{3,4\}", "(3,4,5)", r"3 \le x \le 4"]),
    ("[0,1)", ["(0,1]", "[0,1]", "0,1", "(0,1)"]),
    ("x<3", ["x>3", r"x \le 3", "3", r"(3,\infty)"]),
    (r"(2,\infty)", [r"(-2,\infty)", r"(2,-\infty)", r"(-\infty,2)"]),
    (r"(-\infty,2) \cup (3,\infty)", [r"(-\infty,3)\cup(2,\infty)", r"(-\infty,2)",
        r"(-\infty,2] \cup [3,\infty)"]),
    ("2,3", ["23", "2", "2,3,4", "2,2", "(2,3)"]),
    ("(3,4),(5,6)", ["(3,4,5,6)", "(4,3),(5,6)"]),
    (r"3 \pm \sqrt{2}", [r"3+\sqrt{2}", r"\pm\sqrt2", r"3 \pm \sqrt{3}"]),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", [
        r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}", "(1,2,3,4)"]),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", [r"\begin{pmatrix} 1 & 2 \end{pmatrix}", "(2,1)"]),
    (r"\text{Evelyn}", [r"\text{Evelyn and Briana}", "Evely", "Briana"]),
    (r"\text{(C)}", ["D", "CD", "3", r"\textbf{(D)}\ 12"]),
    (r"\text{even}", ["odd", "2"]),
    (r"\text{no solution}", ["no"]),
    (r"\text{June 20}", ["June 2", "July 20", "20"]),
    ("AB", ["BA"]),
]


KINDS = {
    # Of "The area is $6\sqrt{5}$." the 5 was taken, rewarded as 5 and refused as 6 sqrt 5.
    "formula behind words": [
        (r"Answer: The perimeter of the kite equals $8\sqrt{3}$.", r"8\sqrt{3}", True),
        (r"Answer: The perimeter of the kite equals $8\sqrt{3}$.", "3", False),
        (r"The answer is the fraction $\frac{9}{11}$.", r"\frac{9}{11}", True),
        (r"The answer is the fraction $-\frac{9}{11}$.", r"\frac{9}{11}", False),
        (r"Answer: The quotient is $x^2 + 3x - 7$.", "x^2+3x-7", True),
        (r"Answer: The quotient is $x^2 + 3x - 7$.", "7", False),
        (r"Answer: The midpoint has coordinates \((5, -\tfrac{1}{2})\).", r"(5,-\frac12)", True),
        (r"The answer is then \[ (-\infty, 0] \cup [6, \infty). \]",
         r"(-\infty,0]\cup[6,\infty)", True),
        (r"Answer: With $k = 3$ there are 20 paths.", "20", True),
        (r"Answer: With $k = 3$ there are 20 paths.", "3", False),
        (r"Answer: Lea paid $\$45$ in all.", "45", True),
        (r"The answer is exactly -2\sqrt{7}.", "7", False),
        (r"The answer is exactly -2\sqrt{7}.", r"-2\sqrt{7}", True),
        (r"Answer: In triangle $PQR$, the side $PQ$ has length $\frac{12}{5}$ units.",
         r"\frac{12}{5}", True),
        ("The answer is $12 or $15.", "15", False),
    ],
    # "The answer is verified." behind a box was the answer.
    "remark behind a box": [
        (r"\boxed{41}. As a check, 20 + 21 = 41, so the answer is sound.", "41", True),
        (r"We get \boxed{41}. The answer is rounded to the nearest dollar.", "41", True),
        (r"\boxed{41}" "\n\nBoth ways agree, hence our answer is confirmed.", "41", True),
        (r"\boxed{41}. The answer is positive, as it must be.", "41", True),
        (r"\boxed{41}. The answers are consistent with each other.", "41", True),
        ("#### 41\nThis answer is accurate because 40 + 1 = 41.", "41", True),
        (r"\boxed{41}. No, that is wrong: the answer is 14.", "41", False),
        (r"\boxed{41}. No, that is wrong: the answer is 14.", "14", True),
    ],
    # h in pi r^2 h was hours, s in 4 s seconds, m in 5 m metres.
    "variable or unit": [
        (r"\boxed{\frac{1}{3}\pi r^2 h}", r"\frac{1}{3}\pi r^2", False),
        (r"\boxed{\frac{1}{3}\pi r^2}", r"\frac{1}{3}\pi r^2 h", False),
        (r"\boxed{6 s}", "6", False),
        (r"\boxed{6 s}", "6s", True),
        (r"\boxed{9}", "9 g", False),
        (r"\boxed{2 l + 2 w}", "2w+2l", True),
        (r"\boxed{5 xy}", "5", False),
        (r"\boxed{5\text{ s}}", "5", True),
    ],
    # "million", "squared", "hundredths", "plus one" were read as units.
    "words that compute": [
        (r"\boxed{4\text{ million}}", "4", False),
        (r"\boxed{4\text{ million}}", "4000000", True),
        ("The answer is 6 thousand dollars.", "6", False),
        ("The answer is 6 thousand dollars.", "6000", True),
        (r"\boxed{9 \text{ squared}}", "9", False),
        (r"\boxed{25\text{ hundredths}}", "25", False),
        (r"\boxed{25\text{ hundredths}}", "0.25", True),
        (r"\boxed{8\text{ plus three}}", "8", False),
        (r"\boxed{3 \text{ factorial}}", "3", False),
        (r"\boxed{6\text{ thousand dollars}}", "6000", True),
        (r"\boxed{3\text{ dozen eggs}}", "36", True),
        (r"\boxed{3\text{ dozen eggs}}", "3", False),
        (r"\boxed{7\text{ less than ten}}", "7", False),
        ("The answer is 2 and a half.", "2", False),
        ("The answer is 2 and a half.", "2.5", True),
    ],
    # mL, Mb, W and kWh were no units.
    "unit": [
        (r"\boxed{750\text{ mL}}", "750", True),
        (r"It downloads \boxed{12\text{ Mb}} a second.", "12", True),
        (r"\boxed{40\,\mathrm{W}}", "40", True),
        (r"\boxed{2.4 \text{ kWh}}", "2.4", True),
        (r"\boxed{65\text{ mph}}", "65", True),
        (r"\boxed{30\text{ ft}^2}", "30", True),
        (r"\boxed{14\text{ sq. in.}}", "14", True),
        (r"\boxed{7:45\text{ PM}}", "7:45", True),
        (r"\boxed{7:45\text{ PM}}", r"7:45\text{ AM}", False),
        (r"\boxed{10\text{ miles}}", r"10\text{ meters}", False),
        (r"\boxed{10\text{ mi}}", r"10\text{ miles}", True),
        (r"\boxed{3\text{ dollars}}", r"3\text{ cents}", False),
        ("The answer is 80 kg of sand.", "80", True),
        (r"\boxed{\frac{2}{3}\text{ of the cake}}", r"\frac23", True),
        (r"\boxed{5\text{ in total}}", "5", True),
    ],
    # "not 72", "less than 72" and "ten times 6" were 72 and 6.
    "changed number": [
        ("The answer is not 18.", "18", False),
        ("The answer isn't 18.", "18", False),
        ("The answer is more than 18.", "18", False),
        ("The answer is at least 18.", "18", False),
        ("The answer is no more than 18.", "18", False),
        ("The answer is greater than or equal to 18.", "18", False),
        ("The answer is 18 or more.", "18", False),
        ("The answer is five-sixths of 18.", "18", False),
        ("The answer is negative $18$.", "18", False),
        ("The answer is half of 18.", "18", False),
        ("The answer is three times 18.", "18", False),
        ("The answer is 18 to 20.", "18", False),
        ("The answer is 18 to 20.", "20", False),
        ("The answer is between 18 and 20.", "20", False),
        ("The answer is the square root of $18$.", "18", False),
        ("The answer is 3 feet 7 inches.", "7", False),
        ("The answer is 3 hours and 20 minutes.", "20", False),
        ("The answer is that she needs 18 more.", "18", True),
    ],
    # 7200 % was 72.
    "percent": [
        (r"\boxed{6400\%}", "64", False),
        ("The answer is 300%.", "3", False),
        (r"\boxed{64\%}", "64", True),
        (r"\boxed{75\%}", "0.75", True),
        (r"\boxed{\frac{3}{4}}", r"75\%", True),
        ("The answer is 12.5 percent.", r"12.5\%", True),
        (r"\boxed{7.5}", r"75\%", False),
        (r"\boxed{1}", "100", False),
    ],
    # \binom{3}{7} was read as a product, A \setminus B as B \setminus A, and f(8) as f times 8.
    "does not commute": [
        (r"\boxed{\binom{3}{7}}", r"\binom{7}{3}", False),
        (r"\boxed{\binom{m}{3}}", r"\binom{3}{m}", False),
        (r"\boxed{\binom{m}{3}}", r"\binom{m}{3}", True),
        (r"\boxed{Q \setminus P}", r"P \setminus Q", False),
        (r"\boxed{6 \mid n}", r"n \mid 6", False),
        (r"\boxed{w \times v}", r"v \times w", False),
        (r"\boxed{\vec{v} \times \vec{w}}", r"\vec{v}\times\vec{w}", True),
        (r"\boxed{\mathbf{v} \cdot \mathbf{w}}", r"\mathbf{v} \times \mathbf{w}", False),
        (r"\boxed{g(f(2))}", "f(g(2))", False),
        (r"\boxed{4f(2)}", "f(8)", False),
        (r"\boxed{5 \times 3}", "15", True),
    ],
    # Bars were dropped, or formulas were compared where all variables are positive.
    "absolute value": [
        (r"\boxed{|z|}", "z", False),
        (r"\boxed{\sqrt{a^2}}", "a", False),
        (r"\boxed{\sqrt{a^2}}", "|a|", True),
        (r"\boxed{|3 - x|}", "|x-3|", True),
        (r"\boxed{\left|-9\right|}", "9", True),
        (r"\boxed{\lvert b \rvert c}", "c|b|", True),
        (r"\boxed{|x + y|}", "|x|+|y|", False),
    ],
    # x_1 was x, and a number in one base was the same digits in another.
    "index": [
        (r"\boxed{b}", "b_1", False),
        (r"\boxed{b_3}", "b_1", False),
        (r"\boxed{b_{12}}", "b_{12}", True),
        (r"\boxed{b_1 + b_2}", "2b", False),
        (r"\boxed{1201_3}", "1201", True),
        (r"\boxed{1201_3}", "1201_4", False),
    ],
    # \sin^{-1} x was 1 over sin x.
    "inverse function": [
        (r"\boxed{\sin^{-1}(t)}", r"\arcsin t", True),
        (r"\boxed{\tan^{-1} 5}", r"\arctan(5)", True),
        (r"\boxed{\cos^{-1} t}", r"\frac{1}{\cos t}", False),
        (r"\boxed{\sin^{-1} 1}", r"\frac{\pi}{2}", True),
    ],
    # The sine of 30 degrees was the sine of 30.
    "degrees in a function": [
        (r"\boxed{\sin 80^\circ}", r"\cos 10^\circ", True),
        (r"\boxed{6\cos 60^{\circ}}", "3", True),
        (r"\boxed{\tan(45°)}", "1", True),
        (r"\boxed{\sin 30}", r"\frac12", False),
        (r"\boxed{\cos^2 45^\circ}", r"\frac12", True),
        (r"\boxed{75^\circ}", "75", True),
    ],
    # A policy that boxes the question's own formula earned 6.5 % of MATH.
    "unsolved": [
        (r"\boxed{(x-4)(x+6)}", "x^2+2x-24", False),
        (r"\boxed{7 \cdot 8 \cdot 9}", "504", False),
        (r"The answer is $(3^5 - 3^4) \div 9$.", "18", False),
        (r"\boxed{2 + 4 + 6 + 8}", "20", False),
        (r"\boxed{\dfrac{12 \cdot 11}{2}}", "66", False),
        (r"\boxed{\frac{12!}{3!4!5!}}", "27720", False),
        (r"\boxed{\frac{6!}{3!}}", "120", False),
        (r"\boxed{10! - 8!}", "3588480", False),
        (r"\boxed{\binom{10}{3} \binom{7}{2}}", "2520", False),
        (r"\boxed{48 + 24}", "72", True),
        (r"\boxed{(8 - 2) \cdot (5 + 4) = 54}", "54", True),
        (r"\boxed{(x+6)(x-4)}", "(x-4)(x+6)", True),
        (r"\boxed{1, 2, 3, 4}", "4,3,2,1", True),
    ],
    # A bullet was a minus sign; quotes and underscores belonged to the answer.
    "emphasis": [
        ("Answer:\n- 64", "64", True),
        ("Answer:\n• 64", "64", True),
        ("Answer: -64", "64", False),
        ("The answer is __64__", "64", True),
        ("The answer is ***64***.", "64", True),
        ("Answer: `64`", "64", True),
        ("The answer is \"64\".", "64", True),
        ("**Final Answer**\n\n64", "64", True),
    ],
    # A rate behind a slash was a quotient by an unknown.
    "rate": [
        ("The answer is $60/hour.", "60", True),
        ("#### 60 miles/hour", "60", True),
        (r"\boxed{\$60/\text{hour}}", "60", True),
        (r"\boxed{5/abc}", "5", False),
    ],
    # The tokens that end a turn, and tags of HTML, belonged to the answer.
    "token or tag": [
        ("The answer is 64.<|im_end|>", "64", True),
        ("The answer is 64</s>", "64", True),
        ("#### 64 [DONE]", "64", True),
        ("The final answer is: <strong>64</strong>", "64", True),
        ("<think>Is the answer 46?</think>\n<answer>64</answer>", "64", True),
        ("<answer>46</answer>", "64", False),
        ("Answer: The total is <b>64</b>.", "64", True),
        ("The answer is 64<|eot_id|>The answer", "64", True),
    ],
    # Models write zero-width characters, and no eye finds why the answer is refused.
    "invisible character": [
        ("\\boxed{\u200b64}", "64", True),
        ("\\boxed{6\u20604}", "64", True),
        ("The answer is \ufeff64.", "64", True),
        ("The answer is\u00a064.", "64", True),
        ("\ue012\\boxed{64}", "64", True),
    ],
    # A box with a sentence around its number was refused.
    "sentence in a box": [
        (r"\boxed{\text{Ann needs }31\text{ stamps}}", "31", True),
        (r"\boxed{\text{They sold 31 tickets}}", "31", True),
        (r"\boxed{\text{fewer than } 31}", "31", False),
        (r"\boxed{\text{The slope is } -\frac{3}{4}}", r"-\frac{3}{4}", True),
        (r"\boxed{\text{The slope is } -\frac{3}{4}}", "4", False),
    ],
    # Colours and fonts belonged to the answer.
    "styling": [
        (r"\boxed{\textcolor{green}{88}}", "88", True),
        (r"\boxed{\color{blue} 88}", "88", True),
        (r"\boxed{\underline{88}}", "88", True),
        (r"\boxed{\boldsymbol{88}}", "88", True),
        (r"\boxed{\mathbf{\frac{8}{9}}}", r"\frac89", True),
        (r"\boxed{\textcolor{green}{87}}", "88", False),
    ],
    # Rows that end in \\[3pt] or \cr ran together.
    "matrix": [
        (r"\boxed{\begin{bmatrix} 7 \\[2ex] 5 \end{bmatrix}}",
         r"\begin{pmatrix} 7 \\ 5 \end{pmatrix}", True),
        (r"\boxed{\begin{pmatrix} 7 \cr 5 \end{pmatrix}}",
         r"\begin{pmatrix} 7 \\ 5 \end{pmatrix}", True),
        (r"\boxed{\begin{pmatrix} 5 \\ 7 \end{pmatrix}}",
         r"\begin{pmatrix} 7 \\ 5 \end{pmatrix}", False),
        (r"\boxed{\begin{vmatrix} 7 & 1 \\ 0 & 5 \end{vmatrix}}",
         r"\begin{pmatrix} 7 & 1 \\ 0 & 5 \end{pmatrix}", False),
        (r"Answer: The product is $\begin{pmatrix} 0 & 1 \\ 6 & 2 \end{pmatrix}$.",
         r"\begin{pmatrix} 0 & 1 \\ 6 & 2 \end{pmatrix}", True),
        (r"\boxed{\begin{pmatrix} 0 & 6 \\ 1 & 2 \end{pmatrix}}",
         r"\begin{pmatrix} 0 & 1 \\ 6 & 2 \end{pmatrix}", False),
    ],
    # 2^5 7^2 was 2 to the power 57, squared, or nothing at all.
    "powers side by side": [
        (r"\boxed{2^5 7^2}", r"2^5 \cdot 7^2", True),
        (r"\boxed{2^{5}3^{2}}", "288", True),
        (r"\boxed{5^2 2^7}", "2^7 5^2", True),
        (r"\boxed{2^5 7^2}", r"2^2 \cdot 7^5", False),
    ],
    # Only the last of several boxes counted, so that half an answer was right.
    "several boxes": [
        (r"\boxed{4} and \boxed{-9}", "-9,4", True),
        (r"So $x = \boxed{4}$ or $x = \boxed{-9}$.", "4,-9", True),
        (r"\(\boxed{1}\), \(\boxed{2}\), and \(\boxed{6}\)", "1,2,6", True),
        (r"\boxed{4} or \boxed{-9}", "-9", False),
        (r"\boxed{4} \quad \text{or} \quad \boxed{-9}", "4,-9", True),
        (r"First \boxed{4}. Then, corrected, \boxed{-9}.", "-9", True),
    ],
    # Sets written by a condition or as a difference are unions of intervals.
    "set notation": [
        (r"\boxed{\mathbb{R}}", r"(-\infty,\infty)", True),
        (r"\boxed{\text{all real numbers}}", r"(-\infty,\infty)", True),
        (r"\boxed{\{y \mid y \le 8\}}", r"(-\infty,8]", True),
        (r"\boxed{\{x : 2 < x < 9\}}", "(2,9)", True),
        (r"\boxed{x \ne 4}", r"(-\infty,4)\cup(4,\infty)", True),
        (r"\boxed{\mathbb{R} \setminus \{4\}}", r"(-\infty,4)\cup(4,\infty)", True),
        (r"\boxed{[1, 9] \setminus \{3\}}", r"[1,3)\cup(3,9]", True),
        (r"\boxed{[1, 9] \setminus \{4\}}", r"[1,3)\cup(3,9]", False),
        (r"\boxed{\mathbb{R} - \{4\}}", r"(-\infty,4)\cup(4,\infty)", True),
        (r"\boxed{\left\{ x \,\middle|\, x > 4 \right\}}", r"(4,\infty)", True),
        (r"\boxed{x \ne 4}", "4", False),
        (r"\boxed{\{y \mid y < 8\}}", r"(-\infty,8]", False),
    ],
    # The modulus is optional, as the base is; but two that are named must agree.
    "congruence": [
        (r"\boxed{x \equiv 8 \pmod{11}}", "8", True),
        (r"\boxed{8 \pmod{11}}", "8", True),
        (r"\boxed{8 \bmod 11}", "8", True),
        (r"\boxed{x \equiv 8 \pmod{11}}", r"x \equiv 8 \pmod{13}", False),
        (r"\boxed{x \equiv 7 \pmod{11}}", "8", False),
    ],
    # Worked out, it is its number.
    "binomial coefficient": [
        (r"\boxed{\binom{9}{2}}", "36", True),
        (r"\boxed{\dbinom{6}{2}}", "15", True),
        (r"\boxed{{7 \choose 3}}", "35", True),
        (r"\boxed{\binom{9}{2}}", "72", False),
    ],
    # A pair is often given as x = 3 and y = 10, or with its names in front.
    "pair as equations": [
        ("The answer is $a = 4$ and $b = -1$.", "(4,-1)", True),
        (r"\boxed{x = 4, y = -1}", "(4,-1)", True),
        (r"\boxed{(x, y) = (4, -1)}", "(4,-1)", True),
        (r"\boxed{(4, -1)}", "(x,y) = (4,-1)", True),
        ("The answer is $a = -1$ and $b = 4$.", "(4,-1)", False),
        (r"\boxed{x = 1, y = 2, z = 3}", "(1,2,3)", True),
        (r"\boxed{x = 4, x = -1}", "4,-1", True),
    ],
    # Multiplied by -1, its sign turns round.
    "inequality": [
        (r"\boxed{-y < 6}", "y > -6", True),
        (r"\boxed{-y < 6}", "y < -6", False),
        (r"\boxed{-t \ge 2}", r"t \le -2", True),
        (r"\boxed{-x > -7}", r"(-\infty,7)", True),
        (r"\boxed{7 > x}", "x < 7", True),
    ],
    # Trailing zeros made a number too long to be read.
    "many digits": [
        ("The answer is 0.25" + "0" * 500 + ".", r"\frac{1}{4}", True),
        (r"\boxed{64." + "0" * 500 + "}", "64", True),
        (r"\boxed{0.25" + "0" * 500 + "1}", r"\frac{1}{4}", False),
        (r"\boxed{" + "0" * 500 + "64}", "65", False),
    ],
    # The text in brackets behind the number, or "per day", made it another answer.
    "words behind a number": [
        ("#### 50 (25 + 25)", "50", True),
        ("#### 50 per week", "50", True),
        ("The answer is 50 (2 * 25).", "50", True),
        (r"\boxed{50\text{ a week}}", "50", True),
        (r"\boxed{50\text{ for each}}", "50", True),
        ("#### 25 (50 / 2)", "50", False),
    ],
    # A formula with "= x" behind it, other signs or \left( was taken for worked out.
    "not worked out": [
        (r"The answer is $441+2(21)(19)+361=x$.", "1600", False),
        (r"\boxed{7 \cdot 8 \cdot 9 = x}", "504", False),
        (r"\boxed{7 × 8 × 9}", "504", False),
        (r"\boxed{\left(x-4\right)\left(x+6\right)}", "x^2+2x-24", False),
        (r"\boxed{504 = x}", "504", True),
        (r"\boxed{\left(4, -1\right)}", "(4,-1)", True),
    ],
    # A sentence with an equation gave its first number.
    "an equation with units": [
        ("The answer is 20 red apples + 16 green apples = 36 apples.", "36", True),
        ("The answer is 20 red apples + 16 green apples = 36 apples.", "20", False),
        ("The answer is 12 hours per week * 4 weeks = 48 hours", "48", True),
        ("The answer is 5 people x 3 apples = 15 apples.", "15", True),
        ("The answer is 10% of $50 = $5.", "5", True),
        ("The answer is 10% of $50 = $5.", "10", False),
        ("The answer is 3 x 4 = 12.", "12", True),
    ],
    # Of named units the powers were not compared.
    "powers of units": [
        (r"\boxed{864\text{ inches}^3}", r"864 \mbox{ inches}^2", False),
        (r"\boxed{864\text{ inches}^2}", r"864 \mbox{ inches}^2", True),
        (r"\boxed{864\text{ inches}}", r"864 \mbox{ inches}^2", True),
        (r"\boxed{864\text{ square inches}}", r"864 \mbox{ inches}^2", True),
    ],
    # Written out, \pm took more operators than the gold has.
    "plus or minus written out": [
        (r"\boxed{3+2\sqrt{2} \text{ and } 3-2\sqrt{2}}", r"3 \pm 2 \sqrt{2}", True),
        (r"\boxed{\frac{7+\sqrt{13}}{6}, \frac{7-\sqrt{13}}{6}}", r"\frac{7\pm\sqrt{13}}{6}", True),
        (r"\boxed{\frac{1}{2} \text{ and } \frac{1}{4}}", "0.5,0.25", True),
        (r"\boxed{3+2\sqrt{2} \text{ and } 3+2\sqrt{2}}", r"3 \pm 2 \sqrt{2}", False),
    ],
    # A vector behind a number was taken for its unit.
    "vectors": [
        (r"\boxed{4\mathbf{a}+3\mathbf{b}}", r"3\mathbf{a}+4\mathbf{b}", False),
        (r"\boxed{4\mathbf{b}+3\mathbf{a}}", r"3\mathbf{a}+4\mathbf{b}", True),
        (r"\boxed{\frac45}", r"\frac45\mathbf{v}", False),
    ],
}


def pairs(table):
    """One row for each answer of a table."""
    found = []
    for gold, answers in table:
        found += [(gold, answer) for answer in answers]
    return found


def kinds():
    found = []
    for kind, cases in KINDS.items():
        found += [pytest.param(*case, id=f"{kind} {k}") for k, case in enumerate(cases)]
    return found


@pytest.mark.parametrize("gold, answer", pairs(RIGHT))
def test_right(gold, answer):
    assert is_correct(rf"So $\boxed{{{answer}}}$.", gold, strict=True)
    if "$" not in answer:
        sentence = f"Hence the final answer is ${answer}$. I hope it is correct."
        assert is_correct(sentence, gold, strict=True)


@pytest.mark.parametrize("gold, answer", pairs(WRONG))
def test_wrong(gold, answer):
    assert not is_correct(rf"So $\boxed{{{answer}}}$.", gold, strict=True)
    if (gold, answer) != ("x=5", "y=5"):  # in a sentence, "y = 5" is 5
        sentence = f"Hence the final answer is ${answer}$. I hope it is correct."
        assert not is_correct(sentence, gold, strict=True)


@pytest.mark.parametrize("completion, gold, right", kinds())
def test_kind(completion, gold, right):
    assert is_correct(completion, gold, strict=True) == right


def test_a_formula_that_is_not_worked_out_is_right_in_evaluation_alone():
    assert is_correct(r"\boxed{(x-4)(x+6)}", "x^2+2x-24")
    assert not is_correct(r"\boxed{(x-4)(x+6)}", "x^2+2x-24", strict=True)


@pytest.mark.parametrize("gold", ["", " ", "$", ".", "\\text{}"])
@pytest.mark.parametrize("completion", ["", "\\boxed{}", "5", "The answer is ."])
def test_a_gold_without_content_is_never_right(completion, gold):
    assert not is_correct(completion, gold)


def test_a_gold_may_be_a_number_or_a_whole_solution():
    assert is_correct("#### 72", 72)
    assert is_correct("#### 72", "She sold 48 + 24 = 72 clips.\n#### 72")


def test_long_answers_are_compared_as_text():
    digits = "9" * 10**6
    assert is_correct(rf"\boxed{{{digits}}}", digits)
    assert not is_correct(rf"\boxed{{{digits}}}", digits[1:])
    assert not is_correct("#### " + "9" * 501, "9" * 500)


# ---- Any text at all -----------------------------------------------------------------------------

# \boxed{(\sqrt{9})!} once ended a training run, and every resume of it, in a TypeError: operators
# meet what is no integer, no real number and no number here.
PIECES = [
    *"0123456789+-*/^_=<>()[]{}|!.,:;%$&# \n\tabcixyzABCπ√∞²½−×°≤∪éß中٣\0\x7f", "\ud800", "\ue041",
    "\\", "\\\\", "\\{", "\\}", "\\frac", "\\sqrt", "\\boxed{", "\\fbox", "\\text{", "\\left(",
    "\\right]", "\\pi", "\\pm", "\\mp", "\\cup", "\\in", "\\infty", "\\le", "\\approx", "\\circ",
    "\\overline{", "\\log_", "\\sin", "\\cdot", "\\,", "\\!", "\\begin{pmatrix}", "\\end{pmatrix}",
    "####", "The answer is ", "answer: ", "**", " or ", " and ", " apples", " cm^2", "1,234",
    "3.14", "9^9^9^9", "10!", "1e999", "None", "nan", "inf", "True", "__import__('os')", "1/0",
    "0^{-1}", "(C) ", "(\\sqrt{9})!", "(1/2)!", "\\pi!", "i!", "x!", "(1,2)!", "(-3)!",
    "\\sqrt[0]{", "\\of", "\\abs", "\\cross", "\\degree", "\\mid", "\\setminus", "\\binom{n}{",
    "\\sin^{-1}", "million",
]
COMPLETIONS = ["{}", "\\boxed{{{}}}", "The answer is {}.", "#### {}", "The answer is ${}$"]
pieces = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(gold=pieces, answer=pieces, completion=st.sampled_from(COMPLETIONS))
@example(gold="6", answer="(\\sqrt{9})!", completion="\\boxed{{{}}}")
@example(gold="2^{8000}", answer="\\sqrt{2}", completion="\\boxed{{{}}}")
@example(gold="5", answer="(" * 390 + "5", completion="\\boxed{{{}}}")
def test_no_text_raises(gold, answer, completion):
    """Whatever a model may write."""
    text = completion.format(answer)
    found = extract_answer(text)
    assert found is None or found != ""
    assert is_correct(text, gold) in (True, False)
    assert is_correct(text, gold, strict=True) in (True, False)
    assert equal(gold, answer) == equal(gold, answer)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=200), st.text(max_size=50))
def test_no_unicode_raises(completion, gold):
    assert is_correct(completion, gold) in (True, False)
    assert is_correct(f"\\boxed{{{completion}}}", gold, strict=True) in (True, False)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(pairs(RIGHT)), st.integers(0, 60), st.integers(0, 2), pieces)
def test_published_answers_with_a_few_characters_changed(pair, place, length, piece):
    gold, answer = pair
    changed = gold[:place] + piece + gold[place + length:]
    assert is_correct(f"\\boxed{{{answer}}}", changed) in (True, False)


# Each once took seconds, or minutes: a backtracking expression, 20,000 match objects and a garbage
# collection, an exact power of a power.
SIZE = 200_000
REPEATED = [
    "{", "}", "{}", "(", "[", "((1,", "\\boxed", "\\boxed{", "\\boxed{}", "\\boxed{5", "\\boxed{5}",
    "\\boxed{{}", "\\boxed{5} and ", "answer is", "answer is ", "answer: 5 ", "answer * _ *",
    "####", "####\n", "#### 5 ", "<answer>", "<a", "[AB", " ", "\n", "a", "a ", "9", "9 ", "9,",
    "9,999,", "99 ", "-", "+-", "9^", "x^", "5!", "\\frac", "\\frac1", "\\frac{1}{2}", "\\sqrt{",
    "$", "$5",
    "$x$ ", "\\[", "\\(", "\\text{", "5 \\text{a} ", "\\left(", "\\begin{pmatrix}", "1 & 2 \\\\ ",
    "\\pm", "1\\pm2,", "x=", "x<", "x = 3, ", "1_2", "0.\\overline{3}", "1.2.", "1 3/4 ", "^\\circ",
    " and ", "cm ", "miles per ", "less than ", "a 5 and ", "\ud800", "\\\\", "|x", "(C) ", "ln ",
    "sin x", "equal to ", "1e9", "٣", "é", "\u200b", "\ue000", "```", " (a", ", which ",
    "\\setminus ",
]
EXPENSIVE = [
    "9^9^9^9", "9^{9^{9^{9}}}", "1000000000!", "10^{1000000000}", "1e999999999", "1e-999999999",
    "1/0", "0^{-1}", "\\ln 0", "\\sqrt[0]{5}", "\\log_1 5", "170!" * 50, "2^{2000}*" * 40 + "1",
    "+".join(f"1/{n}" for n in range(10**6, 10**6 + 40)), "x^{99}" * 60, "(x+1)^9" * 50,
    "-" * 300 + "1", "(" * 180 + "1" + ")" * 180, "\\frac{1}{1+" * 30 + "x" + "}" * 30,
    ",".join(map(str, range(99))), ",".join(map(str, range(99, 0, -1))), "(2/3)^{2000}" * 30,
    "{" * 20_000 + "5" + "}" * 20_000, "9" * SIZE,
]
EXPENSIVE += [piece * (190 // len(piece)) + "," + piece * (190 // len(piece)) for piece in REPEATED]
EXPENSIVE += [piece * (SIZE // len(piece)) for piece in REPEATED]


def seconds(completion, gold):
    """Of the processor, the best of three: the time of the grader and not of the machine."""
    spent = []
    for _ in range(3):
        start = time.process_time()
        is_correct(completion, gold)
        spent.append(time.process_time() - start)
        if spent[-1] < 0.5:
            break
    return min(spent)


@pytest.mark.parametrize("frame", ["{}", "\\boxed{{{}}}", "The answer is {}."])
def test_never_slow(frame):
    """A few hundredths of a second for 200 kB and for short formulas that are dear to compute."""
    for text in EXPENSIVE:
        completion = frame.format(text)
        gold = text[:300]
        assert seconds(completion, gold) < 1, (completion[:60], gold)
