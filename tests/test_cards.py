"""Cards and README say what the files of results say, and nothing else."""

import runpy
from pathlib import Path

import pytest

from visbio_diffusers.evaluation.report import between_markers


ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "train_scripts" / "write_card.py"))
TEXTS = SCRIPT["render"](ROOT)


@pytest.mark.parametrize("path", sorted(TEXTS), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_card_holds_the_numbers_of_its_results(path):
    assert path.read_text() == TEXTS[path], "run: python train_scripts/write_card.py"


def test_every_card_is_made_from_results():
    assert set(ROOT.glob("model_cards/*/README.md")) <= set(TEXTS)


def test_text_between_markers_is_replaced_and_the_rest_kept():
    text = "before\n<!-- a -->\nold\n<!-- end of a -->\nafter"
    assert between_markers(text, "a", "new\n") == "before\n<!-- a -->\nnew\n<!-- end of a -->\nafter"
    with pytest.raises(ValueError, match="lacks the lines <!-- b -->"):
        between_markers(text, "b", "")
