"""Cards and README say what the files of results say, and nothing else."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from visbio_diffusers.cards import render_card
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


def test_the_hub_reads_metrics_that_are_those_of_the_results():
    folder = ROOT / "model_cards" / "visbio-blood-28"
    data = ModelCard.load(folder / "README.md").data
    run = json.loads((folder / "results.json").read_text())["runs"][0]
    found = {result.metric_name: result.metric_value for result in data.eval_results}
    measured = run["evaluators"]["cnn3"]["fidelity"]["overall"]["value"]
    assert found["Recognised as the class in the prompt (cnn3)"] == pytest.approx(measured, abs=1e-4)
    assert data.library_name == "diffusers" and data.pipeline_tag == "text-to-image" and data.license == "apache-2.0"


def test_card_of_a_new_adapter_names_its_data_command_and_base(tmp_path):
    folder = tmp_path / "my-adapter"
    folder.mkdir()
    shutil.copy(ROOT / "model_cards" / "visbio-blood-28" / "training.json", folder)
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"\0" * 1_500_000)
    text = render_card(folder)
    data = ModelCard(text, ignore_metadata_errors=False).data
    assert "trained by visbio_diffusers on bloodmnist_rebuilt_28" in text and "not for clinical use" in text
    assert "pytorch_lora_weights.safetensors 1.5 MB" in text and "--preset blood-28" in text
    assert "lora" in data.tags and data.base_model is None and not data.eval_results and data.license == "unknown"
    assert "from_pretrained(default_model())" in text and "import VisBioPipeline, default_model" in text
    assert 'pipe.load_lora_weights("my-adapter")' in text
    assert 'pipe.load_lora_weights("me/nuclei")' in render_card(folder, "me/nuclei")
    record = {"config": {"dataset_name": ["bloodmnist"], "pretrained_model_name_or_path": "me/cells"}}
    (folder / "training.json").write_text(json.dumps(record | {"base_model": "me/cells"}))
    text = render_card(folder, "me/nuclei")
    data = ModelCard(text, ignore_metadata_errors=False).data
    assert data.base_model == "me/cells" and data.datasets == ["albertvillanova/medmnist-v2"]
    assert 'DiffusionPipeline.from_pretrained("me/cells")' in text and "VisBioPipeline" not in text
    (folder / "training.json").unlink()
    with pytest.raises(OSError, match="my-adapter has neither training.json nor about.md"):
        render_card(folder)


def test_card_of_a_text_encoder_names_its_words(tmp_path):
    record = json.loads((ROOT / "model_cards" / "visbio-blood-28" / "training.json").read_text())
    config = {"caption_banks": ["bloodmnist", "pathmnist"], "corpus": ["data/abstracts.jsonl"]}
    (tmp_path / "training.json").write_text(json.dumps(record | {"config": config}))
    text = render_card(tmp_path, "me/words")
    data = ModelCard(text, ignore_metadata_errors=False).data
    assert "# words" in text and "captions of bloodmnist and pathmnist and abstracts" in text
    assert data.library_name == "transformers" and data.pipeline_tag == "feature-extraction"


def test_card_of_a_trained_pipeline_says_how_to_load_it_and_under_which_licence(tiny_pipeline_dir, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(tiny_pipeline_dir, folder)
    record = json.loads((ROOT / "model_cards" / "visbio-blood-28" / "training.json").read_text())
    config = {"dataset_name": ["bloodmnist", "my/images"], "validation_prompts": ["a cell in mitosis"]}
    (folder / "training.json").write_text(json.dumps(record | {"config": config}))
    text = render_card(folder, "me/mine")
    assert 'custom_pipeline="me/mine", trust_remote_code=True' in text and 'pipe("a cell in mitosis")' in text
    assert "bloodmnist: CC BY 4.0; images: licence unknown" in text and "grid.png" not in text
