"""Changed samples: as the page shows them, in colour or with the character that decided; as a run records them."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sgsc.demos.certification import _changed
from sgsc.demos.tasks import load
from sgsc.report import page, pictures, to_json
from tests.pages import HOSTILE, INF, NAN, elements_of, rows_of, words_of


def pixels_of(uri):
    """Rows of [r, g, b] of a PNG that this package wrote."""
    return [[list(row[i : i + 3]) for i in range(0, len(row), 3)] for row in rows_of(uri, colour=2, size=3)]


@pytest.mark.parametrize(
    ("picture", "pixels"),
    [
        ([[[1.0, 0.0, 0.0], [0.0, 0.5, 1.0]]], [[[255, 0, 0], [0, 128, 255]]]),
        ([[[0.2, 0.2, 0.2]], [[0.4, 0.4, 0.4]]], [[[51, 51, 51]], [[102, 102, 102]]]),  # within 0..1: as it is
        ([[[-1.0, 0.0, 1.0]]], [[[0, 128, 255]]]),  # beyond: stretched, all colours alike
        ([[[0, 51, 255]]], [[[0, 51, 255]]]),
        ([[[NAN, None, 0.6], [INF, "x", 0.0]]], [[[0, 0, 153], [0, 0, 0]]]),
    ],
    ids=["colours", "dim", "negative", "bytes", "not-a-number"],
)
def test_colours_become_a_png(picture, pixels):
    assert pixels_of(pictures.png(picture)) == pixels


@pytest.mark.parametrize(
    "picture",
    [
        [[[1.0, 0.0]]],
        [[[1.0, 0.0, 0.0, 1.0]]],
        [[[1.0, 0.0, 0.0], 0.5]],
        [[0.5, [1.0, 0.0, 0.0]]],
        [[[1.0, 0.0, 0.0]], [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]],
        [[[1.0, 0.0, 0.0]], ["x"]],
        [[[NAN, NAN, NAN]]],
        [[[]]],
    ],
    ids=repr,
)
def test_what_is_no_colour_picture_is_said(picture, monkeypatch):
    monkeypatch.setattr(page, "draw", lambda *_: {})
    if picture == [[0.5, [1.0, 0.0, 0.0]]]:  # a grey one with a gap
        assert pictures.png(picture) is not None
        return
    assert pictures.png(picture) is None
    assert "No picture or text was recorded." in words_of(page.render({"changed": [{"picture": picture}]}))


def shown(monkeypatch, **sample):
    monkeypatch.setattr(page, "draw", lambda *_: {})
    html = page.render({"changed": [{"split": "guard", "index": 4, **sample}]})
    elements_of(html)
    return html


def test_a_picture_says_what_it_is(monkeypatch):
    html = shown(monkeypatch, picture=[[0.0, 1.0]], target="8", float_answer="8", packed_answer="3", reason="hard")
    assert 'alt="sample 4 of the guard split, a 8 that reads as 3"' in html
    assert "8 → 3 , right is 8 guard 4, chosen as hard" in words_of(html)


def test_text_shows_the_character_that_decided(monkeypatch):
    html = shown(monkeypatch, text="def f\nx", at=4, target="f", float_answer="f", packed_answer="g")
    assert '<pre tabindex="0">def <mark title="right">f</mark><del title="packed answer">g</del>\nx</pre>' in html


def test_white_space_is_made_visible(monkeypatch):
    html = shown(monkeypatch, text="a\n", at=1, target="\n", float_answer="\n", packed_answer=" ")
    assert '<mark title="right">⏎</mark><del title="packed answer">␣</del>' in html
    assert "⏎ → ␣ , right is ⏎" in words_of(html)
    assert "⇥ → ∅" in words_of(shown(monkeypatch, text="a", float_answer="\t", packed_answer=""))


@pytest.mark.parametrize("at", [None, -1, 3, True, 1.0, "1"], ids=repr)
def test_without_a_place_the_text_is_whole(at, monkeypatch):
    html = shown(monkeypatch, text="abc", at=at, target="c")
    assert '<pre tabindex="0">abc</pre>' in html
    assert "<mark" not in html


def test_hostile_text_stays_text(monkeypatch):
    for at in (0, len(HOSTILE) - 1):
        html = shown(monkeypatch, text=HOSTILE, at=at, target=HOSTILE, float_answer=HOSTILE, packed_answer=HOSTILE)
        assert "<script" not in html
        assert not set("\x00\x1b\ud800") & set(html)
    html = shown(monkeypatch, picture=[[0.0, 1.0]], target='"><script>', packed_answer='" onload="alert(1)')
    (image,) = (attributes for tag, attributes in elements_of(html) if tag == "img")
    assert image.keys() == {"src", "alt"}


# what a run records


class Fixed(nn.Module):
    """Answers one class for every sample, at each of the `positions` of a sequence."""

    def __init__(self, answer, classes, positions=()):
        super().__init__()
        self.answer, self.shape = answer, (*positions, classes)

    def forward(self, x):
        outputs = torch.zeros(len(x), *self.shape)
        outputs[..., self.answer] = 1
        return outputs


def test_a_colour_sample_is_recorded_as_rows_of_colours():
    task = SimpleNamespace(text=False, show=lambda x: x.permute(1, 2, 0).tolist())
    x = torch.tensor([0, 51, 102, 153, 204, 255, 10, 20, 30, 40, 50, 60]).view(1, 3, 1, 4) / 255
    (entry,) = _changed(task, "guard", (x, torch.tensor([1])), (Fixed(1, 3), Fixed(2, 3)), [0])
    assert (entry["target"], entry["float_answer"], entry["packed_answer"]) == ("1", "1", "2")
    assert entry["picture"][0][1] == [0.2, 1.0, 0.1569]  # red, green and blue of the second pixel
    assert pixels_of(pictures.png(entry["picture"])) == (255 * x[0]).round().int().permute(1, 2, 0).tolist()
    to_json(entry)


def test_every_level_of_8_bits_survives_the_record():
    levels = torch.arange(256).view(1, 1, 16, 16) / 255
    task = dataclasses.replace(load("digits", limit=1))
    (entry,) = _changed(task, "guard", (levels, torch.tensor([0])), (Fixed(0, 2), Fixed(1, 2)), [0])
    assert [round(255 * v) for row in entry["picture"] for v in row] == list(range(256))
    assert len(to_json(entry)) < 20 * 256


def test_a_text_sample_goes_on_to_its_answer(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 600)
    task = load("char-lm", text)
    x, y = task.guard[:2]
    answer = task.alphabet.index("q")
    models = (Fixed(0, 97, (64,)), Fixed(answer, 97, (64,)))
    first, second = _changed(task, "guard", (x, y), models, [0, 1])
    assert first["text"] == task.show(x[0]) + first["target"]
    assert (first["at"], first["packed_answer"], first["float_answer"]) == (64, "q", "\n")
    assert second["text"][64] == second["target"] == task.alphabet[int(y[1, -1])]
