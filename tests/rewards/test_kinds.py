"""Pairs of answers by kind: which are one answer and which are two, both ways round, with and without sympy."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlft.rewards import ExactMatch, MathVerifier, completion_text
from rlft.rewards.judge import judge

SAME = [
    ("10\\pi\\text{ cm}^2", "10\\pi"),
    ("2\\text{ feet } 3\\text{ inches}", "27\\text{ inches}"),
    ("1\\text{ hour } 30\\text{ minutes}", "90\\text{ minutes}"),
    ("12\\text{ square units}", "12"),
    ("x=1,000", "1000"),
    ("1,000, 2,000", "1000, 2000"),
    ("\\frac35 \\approx 0.6", "\\frac{3}{5}"),
    ("10:00\\text{ a.m.}", "10:00\\text{ AM}"),
    ("4:6", "2:3"),
    ("f^\\prime", "f'"),
    ("4\\frac23", "14/3"),
    ("(A), (C)", "A, C"),
    ("x=1,y=2", "y=2, x=1"),
    ("1, 2", "x=1, y=2"),
    ("(1, 2)", "x=1, y=2"),
    ("(x, y) = (1, 2)", "x=1, y=2"),
    ("x = 1 \\text{ or } x = 2", "2, 1"),
    ("x = 1, 2", "x=2 \\text{ or } x=1"),
    ("x = \\pm 5", "x = 5 \\text{ or } x=-5"),
    ("y = 2x+1", "2x+1"),
    ("f(x) = 2x+1", "y = 2x+1"),
    ("x \\le 3", "x \\leq 3"),
    ("3 \\ge x", "x \\leq 3"),
    ("(-\\infty, 3]", "x \\leq 3"),
    ("2 < x < 5", "(2, 5)"),
    ("x \\in (2, 5)", "(2,5)"),
    ("(3,\\infty) \\cup (-\\infty, 2)", "(-\\infty, 2) \\cup (3, \\infty)"),
    ("x<2 \\text{ or } x>3", "(-\\infty, 2) \\cup (3, \\infty)"),
    ("E", "(E)"),
    ("\\textbf{(E) } 42", "E"),
    ("\\textbf{(E) } 42", "42"),
    ("e", "(E)"),
    ("A, C", "C, A"),
    ("B. Paris", "B"),
    ("Option B", "B"),
    ("\\text{East}", "\\text{east}"),
    ("52_8", "52_{8}"),
    ("4:30 \\text{ p.m.}", "4:30"),
    ("60\\text{ minutes}", "1\\text{ hour}"),
    ("5\\text{ cm}^2", "5\\text{ square centimeters}"),
    ("500\\text{ cm}", "5\\text{ m}"),
    ("60\\text{ mph}", "60\\text{ miles per hour}"),
    ("60\\text{ miles per hour}", "60"),
    ("\\$5", "5\\text{ dollars}"),
    ("\\$0.50", "50\\text{ cents}"),
    ("5\\text{ apples}", "5"),
    ("5\\text{ apple}", "5\\text{ apples}"),
    ("2 berries", "2 berry"),
    ("2 boxes", "2 box"),
    ("90^\\circ", "90"),
    ("5 m", "5m"),
    ("\\emptyset", "\\varnothing"),
    ("\\begin{pmatrix} 1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    ("６", "6"),
    ("50\\%", "0.5"),
    ("-3 – 2i", "-3 - 2i"),
    ("x^2", "x^{2}"),
    ("x²", "x^2"),
    ("\\frac12", "\\frac{1}{2}"),
    ("\\sqrt3", "\\sqrt{3}"),
    ("1{,}000", "1000"),
    ("2.50", "2.5"),
    ("1 + \\sqrt{19}, 1 - \\sqrt{19}", "1 \\pm \\sqrt{19}"),
    ("\\{1,2\\}", "1, 2"),
    ("\\text{Area} = 5", "5"),
    ("A = \\pi r^2 = 25\\pi", "25\\pi"),
    ("\\frac{dy}{dx} = 2x", "2x"),
    ("\\lim_{x\\to 0} f(x) = 5", "5"),
    ("\\text{Evelyn}", "\\text{evelyn}"),
    ("$5", "5"),
    ("2, 3", "2; 3"),
    ("\\text{Total: } 5", "5"),
    ("\\text{Total cost} = 5", "\\text{cost} = 5"),
    ("\\begin{bmatrix} 1 & \\frac12 \\end{bmatrix}", "\\begin{pmatrix} 1 & 0.5 \\end{pmatrix}"),
    ("5\\text{ kg}", "5000\\text{ g}"),
    ("5\\text{ L}", "5000\\text{ mL}"),
    ("7\\text{ days}", "1\\text{ week}"),
    ("9\\text{ square feet}", "1\\text{ square yard}"),
    ("5\\text{ degrees}", "5^\\circ"),
    ("(1, 2), (3, 4)", "(3, 4), (1, 2)"),
    ("1 \\leq x < 4", "[1, 4)"),
    ("4 > x \\ge 1", "[1, 4)"),
    ("k \\ge -2", "[-2, \\infty)"),
    ("\\frac{1}{2} < x", "x > 0.5"),
    ("１／２", "1/2"),
    ("−７", "-7"),
    ("२५", "25"),
    ("٣٫٥", "3.5"),
    ("3 — 5i", "3 - 5i"),
]
DIFFERENT = [
    ("10\\pi\\text{ cm}^2", "10\\pi\\text{ m}^2"),
    ("10\\pi\\text{ cm}", "12\\pi\\text{ cm}"),
    ("1\\text{ hour } 30\\text{ minutes}", "90"),
    ("x=1,000", "1"),
    ("4:6", "3:2"),
    ("x=1,y=2", "x=2,y=1"),
    ("(x,y)=(2,1)", "x=1, y=2"),
    ("\\pm 5", "5"),
    ("x=5", "y=5"),
    ("x=\\sqrt{2}, y=1", "x=1, y=\\sqrt2"),
    ("2x = 6", "6"),
    ("x \\le 3", "x < 3"),
    ("x>3", "3"),
    ("x \\neq 3", "x = 3"),
    ("x \\neq 3", "3"),
    ("(-\\infty, 2] \\cup (3, \\infty)", "(-\\infty, 2) \\cup (3, \\infty)"),
    ("D", "(E)"),
    ("A", "A, C"),
    ("\\text{west}", "\\text{east}"),
    ("\\text{no solution}", "\\text{one solution}"),
    ("5", "\\text{east}"),
    ("52_8", "52_{9}"),
    ("52", "52_{8}"),
    ("4:30", "4:45"),
    ("4:30 \\text{ p.m.}", "4:30\\text{ am}"),
    ("5\\text{ m}^2", "5\\text{ m}"),
    ("500", "5\\text{ m}"),
    ("60\\text{ km/h}", "60\\text{ km}"),
    ("\\$5", "€5"),
    ("5\\text{ apples}", "5\\text{ oranges}"),
    ("16t^2", "16"),
    ("16 t", "16"),
    ("3 x", "3"),
    ("2xy", "2x"),
    ("5m", "5"),
    ("0.333...", "0.333"),
    ("1, 2, 3, \\ldots", "1, 2, 3"),
    ("f'", "f"),
    ("y' = 3", "y = 3"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}"),
    ("x^2", "x^3"),
    ("3\\sqrt{13}", "3\\sqrt{12}"),
    ("-5", "5"),
    ("i", "-i"),
    ("\\infty", "-\\infty"),
    ("(1,2)", "2,1"),
    ("[1,2]", "(1,2)"),
    ("AB=5", "CD = 5"),
    ("\\text{yes}", "\\text{no}"),
    ("5 (mod 7)", "5"),
    ("5 \\pmod 7", "5"),
    ("about 5", "5"),
    ("more than 5", "5"),
    ("5 or more", "5"),
    ("3:2", "2:3"),
    ("p=3, q=4", "p=4, q=3"),
    ("\\text{Alice} = 3, \\text{Bob} = 5", "\\text{Alice} = 5, \\text{Bob} = 3"),
    ("\\text{Alice: } 3", "\\text{Bob: } 3"),
    ("\\begin{pmatrix} 1 & 2 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    ("\\$5\\text{ per hour}", "\\$5"),
    ("5^\\circ\\text{C}", "5^\\circ\\text{F}"),
    ("x = 5, x = -5", "x = 5"),
    ("a = 1, b = 2, c = 3", "a = 1, b = 2, c = 4"),
    ("(1, 2), (3, 4)", "(1, 3), (2, 4)"),
    ("\\text{not even}", "\\text{even}"),
    ("1 \\leq x < 4", "1 < x \\le 4"),
    ("٣", "4"),
    ("101_2", "101_{3}"),
    ("1:2:3", "1:2:4"),
]
#: Equal, but only sympy can tell: without it such answers are unscored or 0.
BY_SYMPY = [
    ("2\\sqrt{2}\\text{ cm}", "\\sqrt{8}\\text{ cm}"),
    ("(-\\infty, \\sqrt{8})", "x < 2\\sqrt{2}"),
    ("x=\\sqrt{2}, y=1", "x=2^{1/2}, y=1"),
    ("x = 3", "2x = 6"),
    ("x \\le \\sqrt{8}", "x \\leq 2\\sqrt{2}"),
    ("5!", "120"),
    ("\\frac{x}{2}", "\\dfrac x2"),
]
#: A completion and the answer that it gives.
GIVES = [
    ("\\boxed{4} <answer>5</answer>", "5"),
    ("<answer>\\boxed{5}</answer>", "5"),
    ("<answer>Answer: 5</answer>", "5"),
    ("<ANSWER> 5 </ANSWER>", "5"),
    ("<answer>5", "5"),
    ("The final answer is 5</think>", "5"),
    ("#### 5</s>", "5"),
    ("The final answer is 5<|im_end|>", "5"),
    ("<think>x</think>\n5", "5"),
    ("<think>a</think> <answer>$\\frac{1}{2}$</answer>", "1/2"),
    ("<answer>5</answer> I hope <answer></answer>", "5"),
    ("\\boxed{5} or so \\boxed{", "5"),
    ("\\boxed{5} then \\boxed{}", "5"),
    ("\\boxed{5}. The final answer is", "5"),
    ("\\boxed{5}. I am sure the final answer is correct.", "5"),
    ("#### Step 1: Add\n2+3\n\n\\boxed{5}\n\n#### Step 2\ndone", "5"),
    ("\\boxed{5}\n#### Verification", "5"),
    ("\\boxed{5}\n#### 2. Check the result\nfine", "5"),
    ("#### **5**", "5"),
    ("#### Final Answer: **5**", "5"),
    ("#### The answer is 5", "5"),
    ("#### Solution\nAdd them.\n#### Answer\n$$5$$", "5"),
    ("The final answer is:\n$$\n5\n$$", "5"),
    ("The final answer is: **5**.", "5"),
    ("The final answer is $5$.", "5"),
    ("The final answer is $\\boxed5$.", "5"),
    ("$\\boxed 5 $ and", "5"),
    ("\\boxed 52", "52"),
    ("\\framebox{5}", "5"),
    ("\\bbox[5px]{5}", "5"),
    ("\\framebox[2cm][c]{5}", "5"),
    ("\\boxed\\frac12$", "1/2"),
    ("\\boxed{\\left\\{1,2\\right\\}}", "1,2"),
    ("\\boxed{$5$}", "5"),
    ("\\boxed{\\text{(E)}}", "E"),
    ("#### (E)", "E"),
    ("The final answer is (E) 5.", "E"),
    ("<answer>(B)</answer>", "B"),
    ("\\boxed{x<y}", "x<y"),
    ("<answer>x<3</answer>", "x<3"),
    ("5</answer>", "5"),
    ("#### 72.", "72"),
    ("#### 1,000", "1000"),
    ("####5", "5"),
    ("#### $5", "5"),
    ("#### Answer 5", "5"),
    ("The final answer is 5 apples. Great", "5"),
    ("the final answer is 3.5.", "3.5"),
    ("the final answer is 5. The final answer is", "5"),
    ("<answer>5</answer>\n#### Notes\n- a", "5"),
    ("\\boxed{7}\n\n#### Why 7 works\nyes", "7"),
    ("#### 5 #### ", "5"),
    ("The final answer is 5 because 2+3=5", "5"),
    ("The final answer is \\(5\\)", "5"),
    ("#### So the answer is 5", "5"),
    ("#### 5 apples", "5"),
    ("#### Total: 5", "5"),
    ("#### x = 5", "5"),
    ("#### Result\n\n5", "5"),
    ("#### Final result: 5", "5"),
    ("the final answer is A.", "A"),
    ("The final answer is Paris.", "Paris"),
    ("#### yes", "yes"),
    ("\\boxed{5}\\n\n### Check\nok", "5"),
    ("<answer type='num'>5</answer>", "5"),
    ("```\n#### 5\n```", "5"),
    ("#### 18 dollars\n", "18"),
]
#: What comes before, what is repeated.
LONG = {
    "boxes": ("", r"\boxed{"), "bare boxes": ("", r"\boxed "), "options": (r"\boxed", "["), "headings": ("", "#### "),
    "tags": ("", "<answer>"), "open tag": ("<answer ", "a"), "spaces": ("#### ", " "), "dollars": ("#### ", "$"),
    "equations": ("#### ", "x="), "labels": ("#### ", "the final "), "points": ("#### ", "1."), "bars": ("#### ", "_"),
    "raised": ("#### ", "²"), "ands": (r"\boxed{", "x and "), "norms": (r"\boxed{", "|"), "list": (r"\boxed{", "x,"),
    "fractions": ("#### ", r"\frac"), "signs": ("#### ", r"\pm"), "brackets": ("#### ", "(x)"), "words": ("#### ", "a "),
    "units": ("#### 5 ", "cm "), "remark": ("#### 5 (", "a "), "slashes": ("#### ", "\\"), "names": ("#### (", "x,"),
    "matrix": (r"#### \begin{pmatrix}", r"\begin{pmatrix} 1 & "), "unions": ("#### ", r"(1,2) \cup "), "quotes": ("#### ", "'"),
    "clock": ("#### ", "1:"), "subscripts": ("#### x_{", "a"), "thoughts": ("", "</think>"),
}  # fmt: skip


@pytest.fixture(scope="module")
def symbolic():
    pytest.importorskip("sympy")
    verifier = MathVerifier(symbolic=True)
    verifier.symbolic.timeout = 20.0
    yield verifier
    verifier.symbolic.close()


def both_ways(verifier, one, other):
    return {verifier.verify(rf"So it is \boxed{{{a}}}.", b) for a, b in ((one, other), (other, one))}


@pytest.mark.parametrize(("one", "other"), SAME)
def test_one_answer(one, other):
    assert both_ways(MathVerifier(), one, other) == {True}


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_two_answers(one, other):
    assert True not in both_ways(MathVerifier(), one, other)


def test_sympy_changes_no_verdict_and_decides_what_was_left(symbolic):
    for one, other in SAME:
        assert both_ways(symbolic, one, other) == {True}, (one, other)
    for one, other in DIFFERENT:
        assert True not in both_ways(symbolic, one, other), (one, other)
    for one, other in BY_SYMPY:
        assert True not in both_ways(MathVerifier(), one, other), (one, other)
        assert both_ways(symbolic, one, other) == {True}, (one, other)


@pytest.mark.parametrize(("completion", "answer"), GIVES)
def test_where_the_answer_stands(completion, answer):
    verifier = MathVerifier()
    assert verifier.verify(completion, answer) is True
    assert verifier.verify(completion, "8128") is not True


def test_what_may_mean_two_things_is_unscored():
    verifier = MathVerifier()
    for one, other in (
        ("(1, 2)", "1, 2"),
        ("[1, 2]", "1, 2"),
        ("a", "A"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        ("red", "dark red"),
    ):
        assert both_ways(verifier, one, other) == {None}, (one, other)


def test_no_answer_is_wrong_for_any_reference():
    verifier = MathVerifier(fallback="none")
    assert verifier.verify("I give up", r"2\sqrt{2}") is False
    assert verifier.verify("I give up", None) is None


# -- any text ---------------------------------------------------------------------------------------------------------
PIECES = st.lists(
    st.sampled_from(
        [*"0123456789xytmE()[]{},;.:=<>+-/^_%$!'* ", r"\frac", r"\sqrt", r"\pm", r"\le", r"\cup", r"\infty", r"\{", r"\}", " or ",
         " cm", r"\text{ m}", "north", "٣", "–", "²", r"\boxed", "####", "<answer>", r"\begin{pmatrix}", r"\\", "&"]
    ),
    min_size=1, max_size=14,
).map("".join)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(PIECES, PIECES)
def test_right_is_right_both_ways_and_text_equals_itself(one, other):
    assert (judge(one, other) is True) == (judge(other, one) is True)
    if any(c.isalnum() for c in one):
        assert judge(one, one) is True
        assert judge(f" {one} ", one) is True


@settings(max_examples=200, deadline=None)
@given(
    st.integers(-(10**6), 10**6),
    st.integers(-(10**6), 10**6),
    st.sampled_from(["{}", "${}$", "x = {}", "{} cm", "({})", "{}.0", "\\${}"]),
)
def test_a_wrong_number_is_wrong_however_written(one, other, form):
    verifier = MathVerifier()
    written = form.format(one)
    assert verifier.verify(rf"\boxed{{{written}}}", str(one)) is True
    assert verifier.verify(f"<answer>{written}</answer>", str(other)) is (one == other)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from("abcxyz"), st.integers(-9, 9), min_size=2), st.randoms())
def test_named_values_are_compared_by_name(values, random):
    names = list(values)
    random.shuffle(names)
    reference = ", ".join(f"{name} = {value}" for name, value in values.items())
    assert judge(", ".join(f"{name}={values[name]}" for name in names), reference) is True
    changed = dict(values)
    changed[names[0]] += 1
    assert judge(", ".join(f"{name}={changed[name]}" for name in names), reference) is False


def seconds(text):
    verifier, taken = MathVerifier(), []
    for _ in range(3):
        start = time.process_time()
        verifier.verify(text, "5")
        verifier.verify("5", text)
        verifier.verify(text, text)
        taken.append(time.process_time() - start)
    return min(taken)


@pytest.mark.parametrize("name", LONG)
def test_long_text_takes_time_in_proportion(name):
    before, unit = LONG[name]
    short, long = (seconds(before + unit * (size // len(unit))) for size in (12_500, 100_000))
    assert long < 24 * short + 0.02  # eight times the text; a square would be 64 times


# -- types that a CSV, pandas, numpy or torch bring -------------------------------------------------------------------
def test_numbers_of_numpy_and_torch_are_references():
    np, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    values = [
        np.int64(5),
        np.float32(5),
        np.float64(5),
        np.array(5),
        torch.tensor(5),
        torch.tensor(5.0),
        np.str_("5"),
        b"5",
    ]
    assert MathVerifier()([r"\boxed{5}"] * len(values), answer=values) == [1.0] * len(values)
    assert MathVerifier()([r"\boxed{6}"] * len(values), answer=values) == [0.0] * len(values)
    for tenth in (
        np.float32(0.1),
        np.float16(0.1),
        np.float64(0.1),
        torch.tensor(0.1),
        torch.tensor(0.1, dtype=torch.bfloat16),
    ):
        assert MathVerifier().verify("#### 1/10", tenth) is True
    assert MathVerifier().verify("#### 5", np.float32("nan")) is None
    assert MathVerifier()(["yes", "#### true", "#### True"], answer=[np.True_] * 3) == [0.0, 1.0, 1.0]


def test_exact_match_against_values_that_lost_their_text():
    np = pytest.importorskip("numpy")
    match = ExactMatch()
    right = [("true", True), ("False", np.False_), ("1.10", 1.1), ("2", 2.0), ("007", 7), ("1e3", 1000.0), ("2.50", np.float32(2.5)),
             ("yes", np.array(["no", "yes"])), ("5", [np.int64(5)])]  # fmt: skip
    wrong = [
        ("true", False),
        ("1", True),
        ("1.11", 1.1),
        ("7.0", 7),
        ("07", "7"),
        ("nan", "x"),
        ("1/2", 0.5),
        ("9" * 200, 9),
    ]
    assert match([c for c, _ in right], answer=[r for _, r in right]) == [1.0] * len(right)
    assert match([c for c, _ in wrong], answer=[r for _, r in wrong]) == [0.0] * len(wrong)
    assert match(["nan", "x"], answer=[math.nan, None]) == [None, None]


def test_a_cell_of_parquet_is_a_completion():
    np = pytest.importorskip("numpy")
    cell = np.array([{"role": "user", "content": "2+3"}, {"role": "assistant", "content": "5"}], dtype=object)
    assert completion_text(cell) == "5"
    parts = np.array([{"type": "text", "text": "4"}, {"type": "text", "text": "2"}], dtype=object)
    assert completion_text([{"role": "assistant", "content": parts}]) == "42"
