"""Rewards of written answers: each fault of the released ones as a test of the right value."""

import threading

import pytest

from multimodal.metrics.rewards import answer_of, boxes, choice, form, iou, judging, labels, mathematics, text, verdict
from zoo.errors import DataError

TAGGED = "<think>it is round</think> <answer>yes</answer>"


def test_the_answer_is_what_stands_in_the_only_pair_of_tags():
    assert answer_of(TAGGED) == "yes"
    assert answer_of("<answer>\n a\nb </answer>") == "a\nb"
    for text_ in (
        "yes",
        "<answer>yes",
        "yes</answer>",
        "<answer>yes</answer><answer>no</answer>",
        "<answer><answer>a</answer>",
    ):
        assert answer_of(text_) is None


def test_form_is_thought_and_answer_and_nothing_else():
    assert form(TAGGED) == form("<think></think>\n<answer>no</answer>\n") == 1.0
    for broken in ("yes", "<answer>yes</answer>", f"so {TAGGED}", f"{TAGGED} indeed", TAGGED + TAGGED, TAGGED[:-1]):
        assert form(broken) == 0.0
    assert form("<think>a</think><think>b</think><answer>c</answer>") == 0.0
    assert form(TAGGED, box=True) == 0.0
    assert form("<think>there</think><answer>{'box': [1, 2.5, 30, 40]}</answer>", box=True) == 1.0


def test_a_negated_yes_is_a_no():
    assert verdict("Yes, that is right.") is True
    for no in (
        "not correct",
        "That is not true.",
        "it isn't right",
        "False",
        "not quite right",
        "no, it is not correct",
        "it isn\u2019t correct",
        "That can't be right.",
        "it doesn't look correct",
        "that cannot be true",
        "these aren't right",
        "not at all correct",
        "neither true nor right",
        "untrue",
    ):
        assert verdict(no) is False, no
    assert verdict("not incorrect") is True
    assert verdict("the circle is not red, correct") is True  # "not" belongs to "red"
    for neither in ("perhaps", "", "yes and no", "eyes", "nothing"):
        assert verdict(neither) is None, neither
    assert judging("not correct", "yes") == 0.0
    assert judging("incorrect", "No") == judging("TRUE", "yes") == 1.0
    assert judging("maybe", "no") == 0.0
    with pytest.raises(DataError, match="verdict"):
        judging("yes", "red")


def test_letters_count_in_any_order():
    assert choice("C, A", "A, C") == choice("A and C", "A C") == choice("(C) (A)", "A, C") == 1.0
    assert (
        choice("B. red circle", "B")
        == choice("b", "B")
        == choice("The answer is B", "B")
        == choice("A is right", "A")
        == 1.0
    )
    assert choice("A red circle", "A") == 0.0  # the article
    assert choice("I think B", "B") == choice("I\u2019m sure: C", "C") == choice("'D'", "D") == 1.0
    assert choice("I", "I") == choice("B and I", "B, I") == choice("I is right", "I") == 1.0
    assert choice("A, B, C", "B") == choice("A B", "A") == choice("", "A") == choice("Bar", "B") == 0.0
    with pytest.raises(DataError, match="letters"):
        choice("A", "red")


def test_boxes_are_real_numbers_and_only_one_counts():
    assert iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0.0  # touching is no overlap
    assert iou((0, 0, 0.5, 0.5), (0, 0, 0.5, 0.5)) == 1.0  # not cut to whole numbers, not short of a pixel
    assert boxes("[0.1, 0.1, 0.9, 0.9]", "[0.1, 0.1, 0.9, 0.8]") == 1.0
    assert boxes("[10, 10, 20, 20]", [10, 10, 20, 20]) == boxes("at (10,10,20,21).", "[10, 10, 20, 20]") == 1.0
    assert boxes("[0, 0, 2, 1]", "[0, 0, 1, 1]") == 0.0  # exactly 0.5 is not above it
    assert boxes("[10, 10, 20, 20] or [0, 0, 5, 5]", "[10, 10, 20, 20]") == 0.0
    assert boxes("[0, 0, 5, 5] or [10, 10, 20, 20]", "[10, 10, 20, 20]") == 0.0
    for none in ("nothing", "[1, 2, 3]", "[20, 20, 10, 10]", "[0, 0, 0, 0]", "[1e999, 0, 1, 1]"):
        assert boxes(none, "[10, 10, 20, 20]") == 0.0
    with pytest.raises(DataError, match="a box"):
        boxes("[0, 0, 1, 1]", "[]")  # both sides without a box is a fault of the data, not a zero of the answer


def test_labels_in_brackets_are_read():
    assert labels("['red car', 'dog']", '["dog", "red car"]') == 1.0
    assert labels("red car, dog", ["dog", "Red  car"]) == 1.0  # labels of two words are not cut
    assert labels("[dog, cat]", "dog, cat, bird") == pytest.approx(2 / 3)
    assert labels("dog, dog, cow", "dog") == 0.5
    assert labels("", "dog") == labels("[]", "dog") == 0.0
    with pytest.raises(DataError, match="labels"):
        labels("dog", "[]")


def test_mathematics_is_never_right_for_being_in_tags_or_by_a_part():
    pytest.importorskip("math_verify")
    assert mathematics("7", "5") == 0.0  # neither side holds a letter
    assert mathematics("1", "12") == mathematics("12", "1") == 0.0
    assert mathematics("", "5") == mathematics("unclear", "5") == 0.0
    assert mathematics("0.5", r"\frac{1}{2}") == mathematics("1/2", "0.5") == mathematics(" 5 ", "5") == 1.0
    assert mathematics(r"2\sqrt{3}", r"$\sqrt{12}$") == 1.0
    assert mathematics("B", "B") == 1.0 and mathematics("A", "B") == 0.0
    with pytest.raises(DataError, match="expected a value"):
        mathematics("5", " ")


def test_mathematics_in_a_thread():
    pytest.importorskip("math_verify")
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(mathematics("1/4", "0.25")))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_text_is_equal_or_similar():
    assert text("A circle.", "circle") == text("two", ["2", "three"]) == 1.0
    assert text("round", "circle") == text("circles", "circle") == text(" ", "circle") == 0.0
    assert text("-5", "5") == text("5", "-5") == text("\u2212.5", ".5") == 0.0
    assert text("-5", "\u22125") == text("-5 degrees", "-5 degrees.") == text("3-5", "3 - 5") == 1.0
    assert text("A", "A") == text("the", "The") == text("a.", "A") == 1.0 and text("the", "a") == text("", "a") == 0.0
    assert text("round", "circle", similarity=lambda a, r: 0.96) == 1.0
    assert text("round", "circle", similarity=lambda a, r: 0.91) == 0.2
    assert text("round", "circle", similarity=lambda a, r: 0.9) == 0.0
    with pytest.raises(DataError, match="reference"):
        text("a", "")
